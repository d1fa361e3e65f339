"""What a search found: words to paste, a table, the trade-off curve as a picture."""

import dataclasses
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pgolf import console, files
from pgolf.config import TTTConfig
from pgolf.errors import PgolfError
from pgolf.tuning.search import Trial, choose, front

CURVE = "curve.png"


def changes(settings: TTTConfig, own: TTTConfig) -> dict[str, Any]:
    """The settings that differ from an artifact's own, by name."""
    before = dataclasses.asdict(own)
    return {name: value for name, value in dataclasses.asdict(settings).items() if value != before[name]}


def words(settings: TTTConfig, own: TTTConfig) -> str:
    """What `pgolf eval` has to be told for these settings; empty for the artifact's own."""
    return " ".join(f"--set ttt.{name}={value}" for name, value in changes(settings, own).items())


def report(trials: Sequence[Trial], own: TTTConfig, budget: float, unit: str, folder: Path) -> Trial:
    """Print the front of `trials`, of which the first is the baseline, and the best within the budget; returns that.

    Writes the picture as well. PgolfError without matplotlib, and when no trial keeps to the budget.
    """
    base, chosen, best = trials[0], choose(trials, budget), front(trials)
    rows = []
    for trial in sorted({*best, base}, key=lambda trial: trial.seconds):
        marks = [name for name, what in (("baseline", base), ("chosen", chosen)) if trial is what]
        # Where the baseline does not fit into memory there is nothing to compare with.
        gain = f"{base.loss - trial.loss:+.5f}" if math.isfinite(base.loss) else ""
        short = words(trial.settings, own).replace("--set ttt.", "") or "the artifact's own"
        rows.append([short, f"{trial.loss:.5f}", gain, f"{trial.seconds:,.1f}", " ".join(marks)])
    console.table(f"best of {len(trials)} trials by seconds", ["settings", unit, "gain", "seconds", "what"], rows)
    if chosen is not None:
        console.say(
            f"{chosen.loss:.5f} {unit} in {chosen.seconds:,.1f} s; baseline {base.loss:.5f} in {base.seconds:,.1f} s; "
            + (words(chosen.settings, own) or "nothing to set: the artifact's own settings are best")
        )
    try:
        plot(trials, chosen, budget, unit, folder / CURVE)
    finally:
        if chosen is None:  # says more than that there is no picture
            fastest = min(trials, key=lambda trial: trial.seconds)
            raise PgolfError(
                f"no trial takes less than {budget:,.1f} s; the fastest, {fastest.seconds:,.1f} s, is "
                f"{words(fastest.settings, own) or 'the artifact as it is'}; give a larger --budget"
            )
    return chosen


def plot(trials: Sequence[Trial], chosen: Trial | None, budget: float, unit: str, path: Path) -> None:
    """Write a PNG: loss against seconds of all trials, of which the first is the baseline, their front, the choice."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PgolfError(
            f"{CURVE} needs matplotlib; install it with `pip install pgolf[plot]` and start again: trials are kept"
        ) from error
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    finite = [trial for trial in trials if math.isfinite(trial.loss)]
    axes.plot(*_columns(finite), "o", color="tab:gray", alpha=0.6, label="trials")
    axes.plot(*_columns(front(trials)), "o-", color="tab:blue", drawstyle="steps-post", label="front")
    if math.isfinite(trials[0].loss):
        axes.plot(*_columns(trials[:1]), "s", color="black", markersize=9, label="baseline")
    if chosen is not None:
        axes.plot(*_columns([chosen]), "*", color="tab:red", markersize=16, label="chosen")
    if math.isfinite(budget):
        axes.axvline(budget, color="tab:red", linestyle=":", label="budget")
    axes.set_xscale("log")
    axes.set_xlabel("seconds of the whole stream")
    axes.set_ylabel("nats a token" if unit != "bpb" else "bits per byte")
    axes.set_title(f"{len(trials)} settings of test-time training, on training documents")
    axes.grid(alpha=0.3)
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    files.write_bytes(path, image.getvalue())


def _columns(trials: Sequence[Trial]) -> tuple[list[float], list[float]]:
    return [trial.seconds for trial in trials], [trial.loss for trial in trials]
