"""The whole configuration of a run: frozen dataclasses, checked where they are made, set in one place.

Every field carries its unit and meaning, which `pgolf train --help` prints. Field names of `ModelConfig`
are those of the published recipe, so a golden file's `config` loads as it is.
"""

import dataclasses
import difflib
import typing
from dataclasses import dataclass, field
from typing import Any

from pgolf.errors import PgolfError

AUTO = -1  # train.micro_batch: to be found on the device


def option(default: Any, help: str) -> Any:
    """A dataclass field with a help text (units included)."""
    return field(default=default, metadata={"help": help})


def require(condition: bool, message: str) -> None:
    """Raise PgolfError with `message` unless `condition` holds."""
    if not condition:
        raise PgolfError(message)


@dataclass(frozen=True)
class ModelConfig:
    """Shape and fixed constants of the network."""

    num_layers: int = option(11, "physical layers")
    model_dim: int = option(512, "width of the residual stream")
    num_heads: int = option(8, "query heads")
    num_kv_heads: int = option(4, "key/value heads; divides num_heads")
    vocab_size: int = option(8192, "tokens in the vocabulary")
    mlp_mult: float = option(4.0, "MLP width over model_dim")
    rope_dims: int = option(16, "rotated dimensions of each head (even; the rest carry no position)")
    rope_base: float = option(10000.0, "rotary base")
    num_loops: int = option(2, "extra passes through the looped layers (0: no recurrence)")
    loop_start: int = option(3, "first looped layer")
    loop_end: int = option(5, "last looped layer, inclusive")
    parallel_start_layer: int = option(8, "first layer with parallel attention and MLP lanes")
    xsa_last_n: int = option(11, "XSA in this many last physical layers")
    gate_window: int = option(12, "input dimensions that feed the smear gate and the attention gates")
    sparse_attn_gate_scale: float = option(0.5, "factor on the attention gate's logit")
    qk_gain_init: float = option(5.25, "initial gain on normalized queries")
    logit_softcap: float = option(30.0, "training softcap on logits; initial value of the evaluation caps")

    def __post_init__(self) -> None:
        for name in ("num_layers", "model_dim", "num_heads", "num_kv_heads", "vocab_size"):
            require(getattr(self, name) > 0, f"model.{name} must be positive, got {getattr(self, name)}")
        require(self.model_dim % self.num_heads == 0, "model.model_dim must be a multiple of model.num_heads")
        require(self.num_heads % self.num_kv_heads == 0, "model.num_heads must be a multiple of model.num_kv_heads")
        require(
            self.rope_dims % 2 == 0 and 0 <= self.rope_dims <= self.head_dim,
            f"model.rope_dims must be even and at most the head width {self.head_dim}, got {self.rope_dims}",
        )
        require(0 < self.gate_window <= self.model_dim, "model.gate_window must be between 1 and model.model_dim")
        require(0 <= self.num_loops <= 64, f"model.num_loops must be 0 to 64, got {self.num_loops}")
        require(0 < self.mlp_mult < float("inf"), f"model.mlp_mult must be positive, got {self.mlp_mult}")
        if self.num_loops:
            require(
                0 <= self.loop_start <= self.loop_end < self.num_layers,
                f"model.loop_start..loop_end must lie in the {self.num_layers} layers, "
                f"got {self.loop_start}..{self.loop_end}",
            )

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def kv_dim(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def mlp_dim(self) -> int:
        return int(self.mlp_mult * self.model_dim)


@dataclass(frozen=True)
class TrainConfig:
    """Training: batches, curves, optimizers (recipe section 3)."""

    seconds: float = option(600.0, "wallclock of training, seconds; every curve runs over it")
    reserve_seconds: float = option(4.0, "stop this many seconds before `seconds` (calibration time)")
    steps: int = option(20000, "upper limit on steps; with schedule_by=step the length of every curve")
    schedule_by: str = option("wallclock", "what the curves run over: wallclock or step")
    step_tokens: int = option(786432, "tokens per optimizer step over all ranks")
    micro_batch: int = option(98304, "tokens per micro-batch on one device (auto: the most that its memory holds)")
    contexts: str = option("1024@0.1,2048@0.7,3072@1.0", "context length @ last fraction it is used for, ...")
    rewarm_steps: int = option(32, "steps of linear learning-rate re-warming after a context change")
    recurrence_from: float = option(0.35, "fraction of the schedule from which layers are looped")
    warmdown: float = option(0.85, "last fraction of the schedule over which the learning rate falls")
    min_lr: float = option(0.1, "floor of the learning-rate multiplier")
    warmup_steps: int = option(20, "steps per mode that warm kernels up and are then undone")
    matrix_lr: float = option(0.026, "Muon learning rate")
    muon_momentum: float = option(0.97, "Muon momentum after warm-up")
    muon_momentum_start: float = option(0.92, "Muon momentum at the first step")
    muon_momentum_steps: int = option(1500, "steps over which Muon's momentum warms up")
    muon_weight_decay: float = option(0.095, "Muon weight decay")
    embed_lr: float = option(0.03, "AdamW learning rate of the embedding")
    embed_weight_decay: float = option(0.085, "AdamW weight decay of the embedding")
    scalar_lr: float = option(0.02, "AdamW learning rate of gains, gates and mixes")
    scalar_weight_decay: float = option(0.02, "AdamW weight decay of gains, gates and mixes")
    beta1: float = option(0.9, "AdamW first-moment decay")
    beta2: float = option(0.99, "AdamW second-moment decay")
    adam_eps: float = option(1e-8, "AdamW epsilon")
    grad_clip: float = option(0.3, "gradient norm limit, per rank before the reduction (0: off)")
    clip_scope: str = option(
        "rank", "rank: each rank clips its own gradient; global: the averaged one, the same for any number of ranks"
    )
    ema_decay: float = option(0.9965, "decay per step of the averaged weights used after training")
    step: str = option(
        "auto",
        "how a step runs: graphs (pgolf's kernels in CUDA graphs), compiled (torch.compile, none of pgolf's kernels), "
        "eager, or auto: graphs on a GPU with kernels, compiled on one without, eager on a CPU",
    )
    dtype: str = option("auto", "compute type: auto (bfloat16 on CUDA, float32 on CPU), bfloat16 or float32")
    attention: str = option("auto", "attention backend: auto (fastest usable), fa3, fa4, fa2, torch-varlen or sdpa")
    log_every: int = option(50, "steps between log lines")
    checkpoint_seconds: float = option(60.0, "seconds between checkpoints (0: only at the end)")

    def __post_init__(self) -> None:
        require(self.seconds > self.reserve_seconds >= 0, "train.seconds must be above train.reserve_seconds >= 0")
        require(self.schedule_by in ("wallclock", "step"), "train.schedule_by must be wallclock or step")
        require(
            self.step in ("auto", "graphs", "compiled", "eager"), "train.step must be auto, graphs, compiled or eager"
        )
        require(self.dtype in ("auto", "bfloat16", "float32"), "train.dtype must be auto, bfloat16 or float32")
        require(self.clip_scope in ("rank", "global"), "train.clip_scope must be rank or global")
        require(
            self.micro_batch > 0 or self.micro_batch == AUTO,
            f"train.micro_batch must be positive or auto, got {self.micro_batch}",
        )
        require(self.steps > 0, f"train.steps must be positive, got {self.steps}")
        require(self.log_every > 0, f"train.log_every must be positive, got {self.log_every}")
        require(0 < self.warmdown <= 1, "train.warmdown must be in (0, 1]")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"train.{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("embed_lr", "scalar_lr", "matrix_lr", "adam_eps", "embed_weight_decay", "scalar_weight_decay"):
            require(getattr(self, name) >= 0, f"train.{name} must not be negative, got {getattr(self, name)}")
        require(
            self.step_tokens > 0 and (self.micro_batch == AUTO or self.step_tokens % self.micro_batch == 0),
            f"train.step_tokens ({self.step_tokens}) must be a positive multiple of train.micro_batch "
            f"({self.micro_batch})",
        )


@dataclass(frozen=True)
class QuantizeConfig:
    """Quantization (recipe section 4)."""

    mode: str = option("trellis", "record: rounding as published; trellis: trellis-coded levels that fill a budget")
    budget: int = option(
        0, "bytes of weights and code to fill (0: trellis 16,000,000; record: as many as its clips make)"
    )
    states: int = option(64, "trellis: states of the search, 4, 8, 32, 64 or 256")
    rate: float = option(0.25, "trellis: what a bit is worth, in squared steps")
    column_steps: bool = option(True, "trellis: a step for each column too, by what its error costs")
    row_power: float = option(0.5, "trellis: row steps go with sensitivity^(-row_power / 2); 0: equal in a matrix")
    row_floor: float = option(0.01, "trellis: least sensitivity of a row, as a share of its matrix's mean")
    sensitivity_tokens: int = option(
        524_288, "trellis: tokens of a rank's calibration batches that the loss's gradients are taken of (0: none)"
    )
    tune_steps: int = option(40, "trellis: steps of training of scales and gains through the frozen levels (0: none)")
    tune_lr: float = option(2e-3, "trellis: learning rate of those steps")
    calibration_batches: int = option(
        0,
        "micro-batches of training data behind the Hessians, a rank (0: record 16; trellis 16, but 32 over all ranks)",
    )
    calibration: str = option("all", "all: Hessians averaged over ranks; rank0: the record's behaviour")
    matrix_bits: int = option(6, "record: bits of attention and MLP integers")
    embed_bits: int = option(7, "record: bits of the embedding's integers")
    mlp_clip: float = option(11.5, "record: range of an MLP row, in its standard deviations")
    attn_clip: float = option(13.0, "record: range of an attention row, in its standard deviations")
    matrix_clip: float = option(12.85, "record: range of any other matrix row, in its standard deviations")
    embed_clip: float = option(14.0, "record: range of an embedding row, in its standard deviations")
    damping: float = option(0.01, "added to the Hessian's diagonal, as a share of its mean")
    block: int = option(128, "GPTQ columns per block")
    passthrough: int = option(65_536, "matrices of at most this many entries stay fp16")
    awq_groups: int = option(1, "record: most salient column groups kept at awq_bits")
    awq_group_size: int = option(64, "record: columns per protected group")
    awq_bits: int = option(8, "record: bits of protected groups")
    lqer_rank: int = option(4, "record: rank of the residual correction (0: off)")
    lqer_top: int = option(3, "record: matrices with the largest residual that get a correction")
    lqer_group: int = option(64, "record: entries of B sharing a scale")
    lqer_asymmetric: bool = option(True, "record: A int2, B int4 by groups; false: both int4, a scale per row")

    def __post_init__(self) -> None:
        require(self.mode in ("record", "trellis"), f"quantize.mode must be record or trellis, got {self.mode!r}")
        require(self.states in (4, 8, 32, 64, 256), f"quantize.states must be 4, 8, 32, 64 or 256, got {self.states}")
        for name, most in (("rate", 10), ("row_power", 2), ("row_floor", 1)):
            require(0 <= getattr(self, name) <= most, f"quantize.{name} must be 0 to {most}, got {getattr(self, name)}")
        require(self.calibration in ("all", "rank0"), "quantize.calibration must be all or rank0")
        for name in ("matrix_bits", "embed_bits", "awq_bits"):
            require(2 <= getattr(self, name) <= 8, f"quantize.{name} must be 2 to 8, got {getattr(self, name)}")
        for name in ("mlp_clip", "attn_clip", "matrix_clip", "embed_clip"):
            require(getattr(self, name) > 0, f"quantize.{name} must be positive, got {getattr(self, name)}")
        for name in ("block", "awq_group_size", "lqer_group"):
            require(getattr(self, name) > 0, f"quantize.{name} must be positive, got {getattr(self, name)}")
        sizes = ("budget", "sensitivity_tokens", "calibration_batches", "passthrough", "awq_groups", "lqer_rank")
        for name in (*sizes, "lqer_top", "damping", "tune_steps", "tune_lr"):
            require(getattr(self, name) >= 0, f"quantize.{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True)
class EvalConfig:
    """Scoring without adaptation."""

    context: int = option(3072, "longest context a prediction may see, tokens")
    stride: int = option(1536, "tokens a sliding window moves by")
    mode: str = option("sliding", "sliding: overlapping windows; segments: whole documents cut at context")
    batch: int = option(16, "windows scored together")

    def __post_init__(self) -> None:
        require(self.batch > 0, f"eval.batch must be positive, got {self.batch}")
        require(self.mode in ("sliding", "segments"), "eval.mode must be sliding or segments")
        require(0 < self.stride <= self.context, "eval.stride must be between 1 and eval.context")


@dataclass(frozen=True)
class TTTConfig:
    """Phased test-time training (recipe section 5)."""

    enabled: bool = option(True, "adapt while scoring")
    mode: str = option("window", "window: a chunk's context runs anew; streaming: it is kept, but for `refresh` tokens")
    refresh: int = option(128, "streaming: tokens before a chunk that run anew")
    step: str = option("auto", "how a step runs: graphs (CUDA graphs), eager, or auto: graphs on a GPU with kernels")
    batch_size: int = option(24, "documents adapted together")
    chunk_size: int = option(48, "tokens scored, then trained on, per step")
    short_chunks: str = option("256:8,2000:24", "longest document:chunk size, first match wins (empty: never)")
    context: int = option(3072, "longest window, tokens; streaming: the most that is kept")
    rank: int = option(80, "adapter rank")
    alpha: float = option(144.0, "adapter output is scaled by alpha / rank")
    lr: float = option(1e-4, "adapter learning rate")
    lr_mult: float = option(0.75, "factor on lr")
    long_lr: str = option("", "length:factor on lr from there on, by a batch's longest document (empty: 1 for all)")
    weight_decay: float = option(0.5, "adapter AdamW weight decay")
    beta1: float = option(0.0, "adapter AdamW first-moment decay")
    beta2: float = option(0.99, "adapter AdamW second-moment decay")
    eps: float = option(1e-10, "adapter AdamW epsilon")
    targets: str = option("k,o,mlp,head", "adapted projections, of q,k,v,o,mlp,head")
    grad_steps: int = option(1, "forward and step on each chunk this many times; the first forward is recorded")
    prefix_docs: int = option(2500, "documents scored before the last global step")
    phases: int = option(1, "global steps, at equal shares of prefix_docs")
    global_chunk: int = option(32768, "tokens per global learning-rate step")
    global_lr: float = option(0.001, "global SGD learning rate")
    global_momentum: float = option(0.9, "global SGD momentum")
    global_epochs: int = option(1, "passes over the prefix")
    global_rows: int = option(32, "rows per global step")
    global_clip: float = option(1.0, "gradient norm limit of the global step")
    eval_seq_len: int = option(3072, "row length and segment limit of the global step, tokens")

    def __post_init__(self) -> None:
        unknown = set(self.target_set) - {"q", "k", "v", "o", "mlp", "head"}
        require(not unknown, f"ttt.targets knows q,k,v,o,mlp,head, got {', '.join(sorted(unknown))}")
        sizes = ("batch_size", "chunk_size", "context", "rank", "grad_steps", "phases")
        for name in (*sizes, "global_chunk", "global_rows", "eval_seq_len"):
            require(getattr(self, name) > 0, f"ttt.{name} must be positive, got {getattr(self, name)}")
        require(self.mode in ("window", "streaming"), f"ttt.mode must be window or streaming, got {self.mode!r}")
        require(self.step in ("auto", "graphs", "eager"), f"ttt.step must be auto, graphs or eager, got {self.step!r}")
        require(self.refresh >= 0, f"ttt.refresh must not be negative, got {self.refresh}")
        require(self.chunk_size <= self.context, "ttt.chunk_size must not exceed ttt.context")
        for length, factor in self.long_lr_table:
            require(length > 0 < factor, f"ttt.long_lr needs positive numbers, got {self.long_lr!r}")
        for length, chunk in self.chunk_table:
            require(length > 0 < chunk, f"ttt.short_chunks needs positive numbers, got {self.short_chunks!r}")
        if self.mode == "streaming":
            require(
                self.refresh + self.largest_chunk <= self.context,
                f"ttt.refresh and the largest chunk must fit in ttt.context together, got {self.refresh} and "
                f"{self.largest_chunk} in {self.context}",
            )

    @property
    def long_lr_table(self) -> tuple[tuple[int, float], ...]:
        """((shortest document, factor on lr), ...), ascending; the last whose length is reached counts."""
        try:
            rules = [rule.split(":") for rule in self.long_lr.split(",") if rule]
            return tuple(sorted((int(length), float(factor)) for length, factor in rules))
        except ValueError as error:
            raise PgolfError(f"ttt.long_lr must look like 1000:1.5,4000:2, got {self.long_lr!r}") from error

    @property
    def target_set(self) -> frozenset[str]:
        return frozenset(name for name in self.targets.split(",") if name)

    @property
    def largest_chunk(self) -> int:
        """Tokens of the longest chunk that a rule allows."""
        return max([self.chunk_size, *(chunk for _, chunk in self.chunk_table)])

    @property
    def chunk_table(self) -> tuple[tuple[int, int], ...]:
        """((longest document, chunk size), ...) in the order the rules are tried."""
        try:
            rules = [rule.split(":") for rule in self.short_chunks.split(",") if rule]
            return tuple((int(length), int(chunk)) for length, chunk in rules)
        except ValueError as error:
            raise PgolfError(f"ttt.short_chunks must look like 256:8,2000:24, got {self.short_chunks!r}") from error


@dataclass(frozen=True)
class Config:
    """Everything a run depends on besides its data."""

    recipe: str = option("record", "the recipe this configuration started from")
    seed: int = option(42, "seed of weights and adapters")
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    ttt: TTTConfig = field(default_factory=TTTConfig)

    def __post_init__(self) -> None:
        require(-(2**63) <= self.seed < 2**63, f"seed must fit in 64 bits, got {self.seed}")


SECTIONS = ("model", "train", "quantize", "eval", "ttt")


def keys() -> dict[str, tuple[type, Any, str]]:
    """Every settable key, dotted: (type, default, help)."""
    table: dict[str, tuple[type, Any, str]] = {}
    types_of = typing.get_type_hints(Config)
    for item in dataclasses.fields(Config):
        if item.name not in SECTIONS:
            table[item.name] = (types_of[item.name], item.default, item.metadata["help"])
            continue
        section = types_of[item.name]
        hints = typing.get_type_hints(section)
        for sub in dataclasses.fields(section):
            table[f"{item.name}.{sub.name}"] = (hints[sub.name], sub.default, sub.metadata["help"])
    return table


def parse_value(key: str, kind: type, text: str) -> Any:
    """Turn the text of `--set key=text` into `kind`; PgolfError when it does not fit."""
    if kind is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() not in words:
            raise PgolfError(f"{key} takes true or false, got {text!r}")
        return words[text.lower()]
    if key == "train.micro_batch" and text == "auto":
        return AUTO
    try:
        return kind(text)
    except ValueError as error:
        raise PgolfError(f"{key} takes {kind.__name__}, got {text!r}") from error


def override(config: Config, assignments: list[str]) -> Config:
    """Apply `key=value` texts; an unknown key is refused with the nearest name."""
    known = keys()
    changes: dict[str, dict[str, Any]] = {}
    top: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        require(bool(equals), f"--set takes key=value, got {assignment!r}")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise PgolfError(f"unknown setting {key!r}; did you mean {near[0]!r}?")
        value = parse_value(key, known[key][0], text)
        section, dot, name = key.partition(".")
        if dot:
            changes.setdefault(section, {})[name] = value
        else:
            top[key] = value
    for section, values in changes.items():
        top[section] = dataclasses.replace(getattr(config, section), **values)
    return dataclasses.replace(config, **top)


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON values."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any], kind: Any = Config) -> Any:
    """Inverse of `to_dict`; PgolfError names unknown keys and values of the wrong type."""
    require(isinstance(values, dict), f"{kind.__name__} must be an object")
    hints = typing.get_type_hints(kind)
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        require(key in hints, f"{kind.__name__} has no field {key!r}")
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            value = from_dict(value, hint)
        elif hint is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        require(
            isinstance(value, hint) and not (hint is int and isinstance(value, bool)),
            f"{kind.__name__}.{key} must be {hint.__name__}, got {value!r}",
        )
        arguments[key] = value
    return kind(**arguments)


def describe() -> str:
    """One line a key: name, default, meaning."""
    lines = [f"  {key:<30} {str(default):<28} {help}" for key, (_, default, help) in keys().items()]
    return "\n".join(lines)
