"""Which settings are tried: a small table, gone down knob by knob; and which of them is best."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pgolf.config import TTTConfig
from pgolf.errors import PgolfError

Changes = dict[str, Any]  # settings of a `TTTConfig`, by name


@dataclass(frozen=True)
class Trial:
    """Settings and what they gave."""

    settings: TTTConfig
    loss: float  # bits per byte or nats a token; infinite: they need more memory than there is
    seconds: float  # of the whole stream


def space(base: TTTConfig, documents: int) -> list[list[Changes]]:
    """The values of each knob, in the order in which knobs are turned."""
    others = [name for name in base.targets.split(",") if name not in ("", "q", "k", "v")]
    return [
        [{"lr_mult": base.lr_mult * factor} for factor in (0.5, 1, 2, 4)],
        [{"long_lr": rules} for rules in ("", "1000:1.5,4000:2", "1000:2,4000:4")],
        [_chunks(base, factor) for factor in (0.5, 1, 2, 4)],
        [{"refresh": tokens} for tokens in (0, 32, 64, 128, 256)],
        [{"targets": ",".join(names)} for names in (["k", *others], others, ["q", "k", "v", *others]) if names],
        [{"weight_decay": decay} for decay in (0.0, 0.5, 2.0)],
        [{"rank": rank} for rank in (16, 32, 56, 80)],  # alpha stays: what a step moves goes with it, not with rank
        [{"beta2": decay} for decay in (0.95, 0.99, 0.999)],
        [{"batch_size": size} for size in (24, 48, 96) if size <= documents],
        [{"grad_steps": count} for count in (1, 2)],
        [{"mode": mode} for mode in ("streaming", "window")],
    ]


def start(base: TTTConfig) -> Changes:
    """From where the search goes down: streaming takes a fraction of the seconds of windows, at about their loss."""
    return {"mode": "streaming", "refresh": min(128, base.context // 4)}


def _chunks(base: TTTConfig, factor: float) -> Changes:
    """All chunk sizes times `factor`."""
    rules = [f"{longest}:{max(1, round(size * factor))}" for longest, size in base.chunk_table]
    return {"chunk_size": max(1, round(base.chunk_size * factor)), "short_chunks": ",".join(rules)}


def search(
    measure: Callable[[TTTConfig], Trial],
    base: TTTConfig,
    fixed: Collection[str],
    documents: int,
    budget: float,
    most: int,
) -> list[Trial]:
    """Measure `base`, then `start`, and go on from there, each time with a knob's best value, until no knob helps.

    Within `budget` seconds the lower loss is better, beyond it the faster trial. Knobs of the settings `fixed` are left
    alone. Returns at most `most` trials, no two alike, in the order in which they were measured.
    """
    trials = {base: measure(base)}

    def tried(origin: Trial, changes: Changes) -> Trial:
        """`origin` itself when its settings do not go with the changes, or no trial is left."""
        try:
            settings = replace(origin.settings, **changes)
        except PgolfError:  # chunk and refresh do not fit into the context
            return origin
        if settings.mode == "window":
            settings = replace(settings, refresh=base.refresh)  # which has no effect
        if settings not in trials and len(trials) < most:
            trials[settings] = measure(settings)
        return trials.get(settings, origin)

    def badness(trial: Trial) -> tuple[bool, float]:
        over = trial.seconds > budget
        return over, trial.seconds if over else trial.loss

    knobs = [knob for knob in space(base, documents) if not any(set(fixed) & changes.keys() for changes in knob)]
    current = tried(trials[base], {name: value for name, value in start(base).items() if name not in fixed})
    before = None
    while current is not before and len(trials) < most:
        before = current
        for knob in knobs:
            current = min([current, *(tried(current, changes) for changes in knob)], key=badness)
        current = min([current, *trials.values()], key=badness)  # the baseline may be better still
    return list(trials.values())


def front(trials: Sequence[Trial]) -> list[Trial]:
    """The trials than which none is both faster and better, by ascending seconds and so descending loss."""
    found: list[Trial] = []
    for trial in sorted(trials, key=lambda trial: (trial.seconds, trial.loss)):
        if trial.loss < (found[-1].loss if found else math.inf):
            found.append(trial)
    return found


def choose(trials: Sequence[Trial], budget: float) -> Trial | None:
    """The lowest loss within `budget` seconds; None when no trial keeps to it."""
    within = [trial for trial in front(trials) if trial.seconds <= budget]
    return within[-1] if within else None
