"""Configuration: overrides, validation, plain dictionaries and the recipes' constants."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf import config, recipes
from pgolf.config import Config, EvalConfig, ModelConfig, QuantizeConfig, TrainConfig, TTTConfig
from pgolf.errors import PgolfError
from pgolf.schedule import parse_contexts

# The record's published command and the defaults behind it.
RECORD = {
    "model.num_layers": 11, "model.model_dim": 512, "model.num_heads": 8, "model.num_kv_heads": 4,
    "model.vocab_size": 8192, "model.mlp_mult": 4.0, "model.rope_dims": 16, "model.rope_base": 10000.0,
    "model.num_loops": 2, "model.loop_start": 3, "model.loop_end": 5, "model.parallel_start_layer": 8,
    "model.xsa_last_n": 11, "model.gate_window": 12, "model.sparse_attn_gate_scale": 0.5,
    "model.qk_gain_init": 5.25, "model.logit_softcap": 30.0,
    "train.seconds": 600.0, "train.reserve_seconds": 4.0, "train.steps": 20000, "train.schedule_by": "wallclock",
    "train.step_tokens": 786432, "train.contexts": "1024@0.1,2048@0.7,3072@1.0", "train.rewarm_steps": 32,
    "train.recurrence_from": 0.35, "train.warmdown": 0.85, "train.min_lr": 0.1, "train.warmup_steps": 20,
    "train.matrix_lr": 0.026, "train.muon_momentum": 0.97, "train.muon_momentum_start": 0.92,
    "train.muon_momentum_steps": 1500, "train.muon_weight_decay": 0.095, "train.embed_lr": 0.03,
    "train.embed_weight_decay": 0.085, "train.scalar_lr": 0.02, "train.scalar_weight_decay": 0.02,
    "train.beta1": 0.9, "train.beta2": 0.99, "train.adam_eps": 1e-8, "train.grad_clip": 0.3,
    "train.clip_scope": "rank", "train.ema_decay": 0.9965,
    "quantize.matrix_bits": 6, "quantize.embed_bits": 7,
    "quantize.mlp_clip": 11.5, "quantize.attn_clip": 13.0, "quantize.matrix_clip": 12.85,
    "quantize.embed_clip": 14.0, "quantize.awq_groups": 1, "quantize.awq_group_size": 64, "quantize.awq_bits": 8,
    "quantize.lqer_rank": 4, "quantize.lqer_top": 3, "quantize.lqer_group": 64, "quantize.lqer_asymmetric": True,
    "eval.context": 3072, "eval.stride": 1536,
    "ttt.enabled": True, "ttt.batch_size": 24, "ttt.chunk_size": 48, "ttt.short_chunks": "256:8,2000:24",
    "ttt.context": 3072, "ttt.rank": 80, "ttt.alpha": 144.0, "ttt.lr": 1e-4, "ttt.lr_mult": 0.75,
    "ttt.weight_decay": 0.5, "ttt.beta1": 0.0, "ttt.beta2": 0.99, "ttt.targets": "k,o,mlp,head",
    "ttt.grad_steps": 1, "ttt.prefix_docs": 2500, "ttt.phases": 1, "ttt.global_chunk": 32768,
    "ttt.global_lr": 0.001, "ttt.global_momentum": 0.9, "ttt.global_epochs": 1, "ttt.global_rows": 32,
    "ttt.global_clip": 1.0, "ttt.eval_seq_len": 3072, "ttt.mode": "window", "ttt.refresh": 128, "ttt.step": "auto",
    "seed": 42,
}  # fmt: skip


def value_of(settings: Config, key: str):
    for name in key.split("."):
        settings = getattr(settings, name)
    return settings


@pytest.mark.parametrize("key", RECORD)
def test_record_constant(key):
    found = value_of(recipes.get("record"), key)
    assert found == RECORD[key] and type(found) is type(RECORD[key])


def test_duel_is_the_record_but_for_its_size():
    duel, record = recipes.get("duel"), recipes.get("record")
    changed = {key for key in config.keys() if value_of(duel, key) != value_of(record, key)}
    assert changed == {
        "recipe", "train.seconds", "train.reserve_seconds", "train.step_tokens", "train.muon_momentum_steps",
        "quantize.mode", "ttt.prefix_docs",
    }  # fmt: skip
    train = duel.train
    assert (train.seconds, train.step_tokens, train.micro_batch) == (300.0, 196608, 98304)
    assert (train.muon_momentum_steps, duel.ttt.prefix_docs) == (300, 200)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_recipe_is_complete(name):
    recipe = recipes.get(name)
    assert recipe.recipe == name
    assert recipe.train.step_tokens % recipe.train.micro_batch == 0
    contexts = [length for length, _ in parse_contexts(recipe.train.contexts)]
    assert contexts == sorted(contexts) and contexts[-1] == recipe.eval.context == recipe.ttt.context
    assert recipe.model.num_loops and recipe.model.xsa_last_n and recipe.ttt.enabled
    assert recipe.model.parallel_start_layer < recipe.model.num_layers
    assert config.from_dict(json.loads(json.dumps(config.to_dict(recipe)))) == recipe


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(PgolfError, match=r"unknown recipe 'recrod'; did you mean 'record'\? .*record, duel, demo"):
        recipes.get("recrod")


def test_every_key_has_type_default_and_help():
    table = config.keys()
    assert {"seed", "recipe", "train.matrix_lr", "model.num_layers", "ttt.rank"} <= set(table)
    for key, (kind, default, help) in table.items():
        assert kind in (int, float, str, bool) and type(default) is kind, key
        assert len(help) > 5 and "\n" not in help, key
    text = config.describe()
    for key, (_, default, help) in table.items():
        assert any(line.split()[0] == key and str(default) in line and help in line for line in text.splitlines())


def test_times_and_sizes_state_their_unit():
    table = config.keys()
    for key in ("train.seconds", "train.reserve_seconds", "train.checkpoint_seconds"):
        assert "seconds" in table[key][2], key
    for key in (
        "train.step_tokens",
        "train.micro_batch",
        "eval.context",
        "eval.stride",
        "ttt.context",
        "ttt.chunk_size",
    ):
        assert "tokens" in table[key][2], key


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("train.matrix_lr=0.028", 0.028),
        ("train.matrix_lr=1", 1.0),
        ("train.matrix_lr=2.5e-2", 0.025),
        ("model.num_layers=12", 12),
        ("seed=-7", -7),
        ("ttt.short_chunks=64:8", (64, 8)),
        ("ttt.enabled=no", False),
        ("quantize.lqer_asymmetric=TRUE", True),
        ("train.contexts=512@1.0", "512@1.0"),
    ],
)
def test_override(text, value):
    before = recipes.get("record")
    after = config.override(before, [text])
    key = text.partition("=")[0]
    if key == "ttt.short_chunks":
        assert after.ttt.chunk_table == (value,)
    else:
        found = value_of(after, key)
        assert found == value and type(found) is type(value)
    assert {k for k in config.keys() if value_of(after, k) != value_of(before, k)} <= {key}
    assert before == recipes.get("record")


def test_overrides_are_checked_together_and_the_last_one_wins():
    both = ["train.step_tokens=1000", "train.micro_batch=500"]
    for assignments in (both, both[::-1]):
        assert config.override(Config(), assignments).train.step_tokens == 1000
    assert config.override(Config(), ["seed=1", "seed=2"]).seed == 2
    assert config.override(Config(), []) == Config()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.matrx_lr=1", r"unknown setting 'train\.matrx_lr'; did you mean 'train\.matrix_lr'\?"),
        ("num_layers=1", r"unknown setting 'num_layers'; did you mean 'model\.num_layers'\?"),
        ("=1", "unknown setting ''"),
        ("model=1", "unknown setting 'model'"),
        ("train.steps", "--set takes key=value, got 'train.steps'"),
        ("train.steps=many", r"train\.steps takes int, got 'many'"),
        ("train.steps=1.5", r"train\.steps takes int, got '1\.5'"),
        ("train.steps=", r"train\.steps takes int, got ''"),
        ("train.matrix_lr=fast", r"train\.matrix_lr takes float, got 'fast'"),
        ("ttt.enabled=maybe", r"ttt\.enabled takes true or false, got 'maybe'"),
        ("train.steps=0", r"train\.steps must be positive, got 0"),
        ("model.num_heads=7", r"model\.model_dim must be a multiple of model\.num_heads"),
        ("model.num_heads=0", r"model\.num_heads must be positive"),
        ("model.num_kv_heads=3", r"model\.num_kv_heads"),
        ("model.rope_dims=15", r"model\.rope_dims must be even"),
        ("model.rope_dims=66", r"model\.rope_dims .* at most the head width 64, got 66"),
        ("model.gate_window=0", r"model\.gate_window"),
        ("model.num_layers=5", r"model\.loop_start\.\.loop_end must lie in the 5 layers"),
        ("model.num_loops=-1", r"model\.num_loops"),
        ("train.micro_batch=0", r"train\.micro_batch"),
        ("train.micro_batch=98305", r"train\.step_tokens \(786432\) .*train\.micro_batch \(98305\)"),
        ("train.schedule_by=hour", r"train\.schedule_by must be wallclock or step"),
        ("train.seconds=3", r"train\.seconds must be above train\.reserve_seconds"),
        ("train.seconds=nan", r"train\.seconds"),
        ("train.warmdown=0", r"train\.warmdown"),
        ("train.step=maybe", r"train\.step"),
        ("train.dtype=float16", r"train\.dtype"),
        ("train.clip_scope=all", r"train\.clip_scope"),
        ("train.log_every=0", r"train\.log_every"),
        ("train.beta1=1", r"train\.beta1"),
        ("train.beta2=1.5", r"train\.beta2"),
        ("train.adam_eps=-1", r"train\.adam_eps"),
        ("train.embed_lr=-1", r"train\.embed_lr"),
        ("train.embed_weight_decay=-1", r"train\.embed_weight_decay"),
        ("model.mlp_mult=0", r"model\.mlp_mult"),
        ("model.mlp_mult=nan", r"model\.mlp_mult"),
        ("model.num_loops=1000000000", r"model\.num_loops"),
        ("seed=99999999999999999999", "seed"),
        ("quantize.calibration=some", r"quantize\.calibration"),
        ("quantize.calibration_batches=-1", r"quantize\.calibration_batches"),
        ("quantize.matrix_bits=9", r"quantize\.matrix_bits must be 2 to 8, got 9"),
        ("quantize.embed_clip=-1", r"quantize\.embed_clip"),
        ("quantize.block=0", r"quantize\.block"),
        ("eval.mode=random", r"eval\.mode"),
        ("eval.stride=0", r"eval\.stride"),
        ("eval.stride=4000", r"eval\.stride must be between 1 and eval\.context"),
        ("eval.batch=0", r"eval\.batch"),
        ("ttt.targets=k,z", r"ttt\.targets knows q,k,v,o,mlp,head, got z"),
        ("ttt.rank=0", r"ttt\.rank"),
        ("ttt.chunk_size=4000", r"ttt\.chunk_size must not exceed ttt\.context"),
        ("ttt.short_chunks=256-8", r"ttt\.short_chunks must look like"),
        ("ttt.short_chunks=256:0", r"ttt\.short_chunks"),
        ("ttt.global_rows=0", r"ttt\.global_rows"),
        ("ttt.mode=fast", r"ttt\.mode must be window or streaming, got 'fast'"),
        ("ttt.step=compiled", r"ttt\.step must be auto, graphs or eager, got 'compiled'"),
        ("ttt.refresh=-1", r"ttt\.refresh must not be negative, got -1"),
        ("ttt.eval_seq_len=0", r"ttt\.eval_seq_len"),
    ],
)
def test_bad_setting_is_refused_with_its_name(text, message):
    with pytest.raises(PgolfError, match=message) as caught:
        config.override(recipes.get("record"), [text])
    assert "\n" not in str(caught.value)


def test_streaming_runs_what_it_keeps():
    settings = config.override(recipes.get("record"), ["ttt.mode=streaming", "ttt.refresh=3024"])
    assert settings.ttt.refresh + settings.ttt.largest_chunk == settings.ttt.context
    with pytest.raises(PgolfError, match=r"must fit in ttt\.context together, got 3025 and 48 in 3072"):
        config.override(settings, ["ttt.refresh=3025"])
    assert config.override(Config(), ["ttt.refresh=9999"]).ttt.mode == "window"  # which has no use for it


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().train.steps = 1


finite = st.floats(1e-6, 1e6)
CONFIGS = st.builds(
    Config,
    seed=st.integers(-(2**62), 2**62),
    model=st.builds(ModelConfig, num_layers=st.integers(6, 20), mlp_mult=finite, num_loops=st.integers(0, 4)),
    train=st.builds(
        TrainConfig,
        steps=st.integers(1, 10**9),
        schedule_by=st.sampled_from(["wallclock", "step"]),
        matrix_lr=finite,
        warmdown=st.floats(0, 1, exclude_min=True),
    ),
    quantize=st.builds(QuantizeConfig, matrix_bits=st.integers(2, 8), lqer_asymmetric=st.booleans()),
    eval=st.builds(EvalConfig, mode=st.sampled_from(["sliding", "segments"])),
    ttt=st.builds(TTTConfig, enabled=st.booleans(), targets=st.sampled_from(["", "k", "q,v,head"]), lr=finite),
)


@settings(max_examples=50, deadline=None)
@given(CONFIGS)
def test_dictionary_and_text_round_trips(settings):
    plain = json.loads(json.dumps(config.to_dict(settings)))
    assert config.from_dict(plain) == settings
    texts = [f"{key}={value_of(settings, key)}" for key in config.keys()]
    assert config.override(Config(), texts) == settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sed": 1}, "Config has no field 'sed'"),
        ({"train": {"stepz": 1}}, "TrainConfig has no field 'stepz'"),
        ({"train": {"steps": "1"}}, "TrainConfig.steps must be int, got '1'"),
        ({"train": {"steps": True}}, "TrainConfig.steps must be int"),
        ({"train": {"steps": 1.0}}, "TrainConfig.steps must be int"),
        ({"train": {"steps": None}}, "TrainConfig.steps must be int"),
        ({"train": {"warmdown": True}}, "TrainConfig.warmdown must be float"),
        ({"ttt": {"enabled": 1}}, "TTTConfig.enabled must be bool"),
        ({"train": 3}, "TrainConfig must be an object"),
        ([], "Config must be an object"),
        ({"train": {"steps": 0}}, "train.steps must be positive"),
    ],
)
def test_bad_dictionary_is_refused(values, message):
    with pytest.raises(PgolfError, match=message):
        config.from_dict(values)


def test_whole_numbers_stand_for_floats():
    settings = config.from_dict({"train": {"seconds": 700}})
    assert settings.train.seconds == 700.0 and isinstance(settings.train.seconds, float)
