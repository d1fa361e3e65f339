"""The curves of training as pure functions of the schedule's fraction or the step (recipe section 3)."""

from pgolf.config import TrainConfig
from pgolf.errors import PgolfError


def parse_contexts(text: str) -> tuple[tuple[int, float], ...]:
    """'1024@0.1,2048@0.7,3072@1.0' -> ((length, last fraction it is used for), ...), fractions rising to 1."""
    try:
        stages = tuple((int(length), float(until)) for length, until in (part.split("@") for part in text.split(",")))
    except ValueError as error:
        raise PgolfError(f"train.contexts must look like 1024@0.1,2048@1.0, got {text!r}") from error
    ends = [until for _, until in stages]
    if ends != sorted(ends) or ends[-1] < 1 or any(length < 1 for length, _ in stages):
        raise PgolfError(f"train.contexts needs positive lengths with fractions rising to 1.0, got {text!r}")
    return stages


def context_length(config: TrainConfig, fraction: float) -> int:
    """Context in tokens at `fraction` of the schedule; a stage's end belongs to it."""
    stages = parse_contexts(config.contexts)
    return next((length for length, until in stages if fraction <= until), stages[-1][0])


def lr_scale(config: TrainConfig, fraction: float) -> float:
    """Learning-rate multiplier: one, then linear to zero over the last `warmdown`, never below `min_lr`."""
    return min(1.0, max(config.min_lr, (1.0 - fraction) / config.warmdown))


def rewarm(config: TrainConfig, steps_since_change: int | None) -> float:
    """Factor on the learning rate `steps_since_change` steps after the context grew (None: it never has)."""
    if steps_since_change is None or config.rewarm_steps == 0:
        return 1.0
    return min(1.0, (steps_since_change + 1) / config.rewarm_steps)


def muon_momentum(config: TrainConfig, step: int) -> float:
    """Muon's momentum at `step`, warming up linearly."""
    share = min(1.0, step / max(1, config.muon_momentum_steps))
    return config.muon_momentum_start + share * (config.muon_momentum - config.muon_momentum_start)


def recurrent(config: TrainConfig, fraction: float) -> bool:
    """Whether layers are looped at `fraction` of the schedule."""
    return fraction >= config.recurrence_from


def modes(config: TrainConfig, until: float = 1.0) -> list[tuple[int, bool]]:
    """The (context, recurrence) pairs that a run meets up to fraction `until`, in order."""
    edges = sorted({0.0, config.recurrence_from, *(end for _, end in parse_contexts(config.contexts))})
    points = [(low + high) / 2 for low, high in zip(edges, [*edges[1:], 1.0], strict=True) if low < until]
    pairs = [(context_length(config, point), recurrent(config, point)) for point in points]
    return list(dict.fromkeys(pairs))
