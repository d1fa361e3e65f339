"""Named configurations. A recipe is a function that returns one; `--set` changes single values of it."""

import difflib
from collections.abc import Callable

from pgolf.config import Config, EvalConfig, ModelConfig, QuantizeConfig, TrainConfig, TTTConfig
from pgolf.errors import PgolfError


def record() -> Config:
    """The record: 8 GPUs, 600 s of training, every constant as published."""
    return Config(recipe="record", quantize=QuantizeConfig(mode="record"))


def duel() -> Config:
    """The record's constants on one GPU for 300 s, in steps of 196,608 tokens; quantized in trellis form to the cap."""
    return Config(
        recipe="duel",
        train=TrainConfig(seconds=300.0, reserve_seconds=0.0, step_tokens=196608, muon_momentum_steps=300),
        ttt=TTTConfig(prefix_docs=200),
    )


def demo() -> Config:
    """The whole architecture small enough for two CPU cores in minutes; the curves run over steps: reproducible."""
    return Config(
        recipe="demo",
        model=ModelConfig(
            num_layers=6,
            model_dim=128,
            num_heads=4,
            num_kv_heads=2,
            vocab_size=1024,
            mlp_mult=3.0,
            rope_dims=16,
            num_loops=1,
            loop_start=2,
            loop_end=3,
            parallel_start_layer=4,
            xsa_last_n=6,
        ),
        train=TrainConfig(
            steps=200,
            schedule_by="step",
            step_tokens=8192,
            micro_batch=4096,
            contexts="128@0.1,256@0.7,384@1.0",
            warmup_steps=0,
            muon_momentum_steps=100,
            ema_decay=0.97,
            rewarm_steps=8,
            clip_scope="global",
            log_every=10,
            step="eager",
        ),
        quantize=QuantizeConfig(mode="record", calibration_batches=8, passthrough=4096),
        eval=EvalConfig(context=384, stride=192),
        ttt=TTTConfig(
            batch_size=8,
            rank=8,
            alpha=14.4,
            lr=1e-3,
            context=384,
            eval_seq_len=384,
            prefix_docs=16,
            global_chunk=8192,
            chunk_size=96,
            short_chunks="256:32",
        ),
    )


RECIPES: dict[str, Callable[[], Config]] = {"record": record, "duel": duel, "demo": demo}


def get(name: str) -> Config:
    """The recipe called `name`; PgolfError with the nearest name when there is none."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.0)
        raise PgolfError(f"unknown recipe {name!r}; did you mean {near[0]!r}? (there are {', '.join(RECIPES)})")
    return RECIPES[name]()
