"""The command: from an artifact and a data folder to trials, a choice and a picture."""

import gc
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pgolf import config, console, files, loading, parallel, pipeline, ttt
from pgolf.config import TTTConfig
from pgolf.data import build, shards
from pgolf.data.tokenizer import Tokenizer
from pgolf.errors import PgolfError
from pgolf.score import Progress
from pgolf.tuning.report import changes, report, words
from pgolf.tuning.sample import Sample, draw, work_ratio
from pgolf.tuning.search import Trial, search

TRIALS = "trials.jsonl"


class Bench:
    """Measures settings on a sample, once each: a file keeps every outcome, and what it holds is not run again."""

    def __init__(self, loaded: loading.Loaded, sample: Sample, context: dict[str, Any], path: Path, targets: int):
        """context: what an outcome depends on beside the settings, as JSON values; targets: of the whole stream."""
        self._loaded, self._sample, self._context, self._path, self._targets = loaded, sample, context, path, targets
        self._weights = {name: value.clone() for name, value in loaded.model.state_dict().items()}
        self._lines: list[str] = []
        self._known: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else (), 1):
            try:
                told = json.loads(line)
                numbers = [told["nats"] or 0.0, told["seconds"], told["preparing"]]
                if not all(math.isfinite(value) for value in numbers):
                    raise ValueError(numbers)
                self._keep(told)
            except (ValueError, TypeError, KeyError) as error:
                raise PgolfError(f"{path}, line {number}, is no trial; remove it or choose another --out") from error

    @staticmethod
    def _key(context: dict[str, Any], settings: dict[str, Any]) -> str:
        return json.dumps([context, settings], sort_keys=True)

    def _keep(self, told: dict[str, Any]) -> None:
        self._known[self._key(told["context"], told["ttt"])] = told
        self._lines.append(json.dumps(told))

    def measure(self, settings: TTTConfig, progress: Progress) -> Trial:
        """The outcome of `settings`, printed in one line too; `progress` as in `ttt.evaluate`."""
        key = self._key(self._context, asdict(settings))
        verb = "known" if key in self._known else "tried"
        if key not in self._known:
            self._keep(self._score(settings, progress))
            files.write_bytes(self._path, "".join(f"{line}\n" for line in self._lines).encode())
        told, sample = self._known[key], self._sample
        if told["nats"] is None:
            trial, outcome = Trial(settings, math.inf, math.inf), "out of memory"
        else:
            loss = told["nats"] / (int(sample.bytes.sum()) * math.log(2) or sample.targets)
            # The engine and graphs are made once, whatever the stream's length.
            scored = told["seconds"] - told["preparing"]
            seconds = told["preparing"] + scored * work_ratio(sample, settings, self._targets)
            trial = Trial(settings, loss, seconds)
            measured = f"on the sample {told['preparing']:.1f} + {scored:.1f} s"
            outcome = f"{loss:.5f} {self._context['unit']}, {seconds:,.1f} s ({measured})"
        console.say(f"{verb}: {outcome}  {words(settings, self._loaded.ttt) or 'as the artifact'}")
        return trial

    def _score(self, settings: TTTConfig, progress: Progress) -> dict[str, Any]:
        """A line of the file. Nats and seconds are of the sample, `preparing` the part of them in which the GPU waited
        for the engine and graphs; nats None: out of memory."""
        loaded, sample = self._loaded, self._sample
        gc.collect()  # the graphs of the trial before hold memory that nobody else may use
        if loaded.model.tok_emb.weight.is_cuda:
            torch.cuda.empty_cache()
        loaded.model.load_state_dict(self._weights)  # a global phase has moved them
        told: dict[str, Any] = {"changes": changes(settings, loaded.ttt)}
        try:
            result = ttt.evaluate(
                loaded.model, sample.tokens, sample.bytes, settings, loaded.seed, loaded.looping, progress=progress
            )
            told |= {"nats": result.score.nats, "seconds": result.seconds, "preparing": result.stalled}
        except RuntimeError as error:
            # To end a capture that has failed may fail in turn.
            if not any(isinstance(one, torch.OutOfMemoryError) for one in (error, error.__context__)):
                raise
            told |= {"nats": None, "seconds": 0.0, "preparing": 0.0}
        told |= {"targets": sample.targets, "bytes": int(sample.bytes.sum())}
        return told | {"context": self._context, "ttt": asdict(settings)}


def run(
    path: Path,
    data: Path,
    out: Path,
    device: torch.device,
    assignments: list[str],
    budget: float | None = None,
    targets: int | None = None,
    documents: int = 400,
    most: int = 32,
) -> Trial:
    """Search, print and draw; returns the best trial within `budget` seconds.

    Args:
        path: the artifact; its settings with `assignments` are the baseline.
        data: folder of training shards. With a tokenizer losses are bits per byte, without one nats a token.
        out: folder of the trials and the picture.
        assignments: `ttt.KEY=VALUE` texts; what they set is not searched.
        budget: seconds for a stream of `targets` predictions; None: no limit.
        targets: None: as many as the manifest of `data` counts for validation; without one the sample's.
        documents, most: documents of the sample, trials.
    """
    if parallel.world_size() > 1:
        raise PgolfError("tune-ttt runs on one device; for N of them start it alone and give --targets an Nth")
    loaded = loading.load(path, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    settings = config.override(config.Config(ttt=loaded.ttt), assignments).ttt
    fixed = {assignment.partition("=")[0] for assignment in assignments}
    for key in sorted(fixed):
        config.require(key.startswith("ttt."), f"tune-ttt takes settings of ttt alone, got {key}")
    paths = shards.train_files(data)
    tokenizer = Tokenizer.load(data / pipeline.TOKENIZER) if (data / pipeline.TOKENIZER).exists() else None
    if tokenizer and loaded.tokenizer_sha256 not in ("", tokenizer.sha256):
        raise PgolfError(f"{data} was tokenized with another tokenizer than {path} was trained on; name other data")
    targets = targets or _counted(data)
    if budget is not None and targets is None:
        raise PgolfError(f"{data} has no manifest that counts the stream to score; give its length by --targets")
    sample = draw(paths, documents, loaded.model.config.vocab_size, loaded.seed, tokenizer)
    targets = targets or sample.targets
    unit = "nats a token" if tokenizer is None else "bpb"
    context = {
        "artifact": hashlib.sha256(path.read_bytes()).hexdigest(),
        "documents": hashlib.sha256(sample.tokens.tobytes()).hexdigest(),
        "device": pipeline.environment(device)["device"],
    }
    bench = Bench(loaded, sample, context | {"unit": unit}, files.make_folder(out) / TRIALS, targets)
    console.say(
        f"{sample.documents:,} training documents of {sample.targets:,} targets in {unit}; seconds are for {targets:,}"
    )
    if sample.documents < settings.prefix_docs:
        console.say(f"no trial has a global phase: it waits for {settings.prefix_docs:,} documents (ttt.prefix_docs)")
    with console.Bar("tune-ttt") as bar:
        trials = search(
            _counting(bench, bar, most),
            settings,
            {key.removeprefix("ttt.") for key in fixed},
            sample.documents,
            math.inf if budget is None else budget,
            most,
        )
    return report(trials, loaded.ttt, math.inf if budget is None else budget, unit, out)


def _counting(bench: Bench, bar: console.Bar, most: int) -> Callable[[TTTConfig], Trial]:
    """`bench.measure` that shows how far the search is."""
    number = -1

    def measure(settings: TTTConfig) -> Trial:
        nonlocal number
        number += 1

        def show(done: int, total: int, _: float) -> None:
            bar.update((number + done / total) / most, f"trial {number}: {done:,} of {total:,} targets")

        return bench.measure(settings, show)

    return measure


def _counted(data: Path) -> int | None:
    """Targets of the validation stream, of which the manifest of a data folder says no more than how many."""
    path = data / build.MANIFEST
    try:
        return int(files.read_object(path)["splits"]["val"]["tokens"]) - 1 if path.exists() else None
    except (KeyError, TypeError, ValueError):
        return None
