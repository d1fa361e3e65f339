"""The stages of a run on its folder: train, quantize and pack, score. Commands and the demo call these."""

import dataclasses
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pgolf import __version__, artifact, checkpoint, console, doctor, fit, loading, parallel, score, ttt
from pgolf import train as training
from pgolf.compress import compress
from pgolf.config import AUTO, Config, EvalConfig, TTTConfig, from_dict, override, to_dict
from pgolf.data import build, shards
from pgolf.data.tokenizer import Tokenizer
from pgolf.errors import PgolfError
from pgolf.files import make_folder, read_object, write_bytes, write_json
from pgolf.inspection import ACCOUNT
from pgolf.model import BOS, GPT

CAP = artifact.CAP
TOKENIZER = "tokenizer.model"
ARTIFACT = "model.pgolf"


def check_data(data: Path, vocab_size: int) -> str:
    """The SHA-256 of a data folder's tokenizer ("" when it has none), after checking that all fit together."""
    path = data / TOKENIZER
    if not path.exists():
        return ""
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size != vocab_size:
        raise PgolfError(
            f"{path} has {tokenizer.vocab_size} tokens, the model {vocab_size}; "
            f"use --set model.vocab_size={tokenizer.vocab_size} or other data"
        )
    build.verify_manifest(data, tokenizer.sha256)
    return tokenizer.sha256


def check_tokenizer(run: Path, data: Path, sha: str) -> None:
    """PgolfError when a run was trained on data of another tokenizer than `sha` ("": not known)."""
    path = run / "run.json"
    known = read_object(path).get("tokenizer_sha256") if path.exists() else ""
    if sha and known and sha != known:
        raise PgolfError(f"{data} was tokenized with another tokenizer than {run} was trained on; build the data again")


def note(run: Path, **values: Any) -> None:
    """Merge values into run.json (rank 0)."""
    if parallel.rank() == 0:
        path = run / "run.json"
        known = read_object(path) if path.exists() else {}
        stages = known.get("seconds", {}) | values.pop("seconds", {})
        write_json(path, known | values | {"seconds": stages})


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device and commit, for run.json."""
    git = shutil.which("git")
    words = ["-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run([git, *words], capture_output=True, text=True, check=False).stdout.strip() if git else ""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "pgolf": __version__,
        "commit": commit or None,
        "device": name,
        "ranks": parallel.world_size(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def train(
    config: Config, data: Path, run: Path, device: torch.device, resume: bool = False, stop_after: float | None = None
) -> None:
    """Train into `run`; the last checkpoint holds the averaged weights that later stages use."""
    sha = check_data(data, config.model.vocab_size)
    files = shards.train_files(data)
    if resume:
        checkpoint.newest(run)  # nothing is written for a run that cannot go on
    if resume and (run / "run.json").exists():
        known = read_object(run / "run.json")
        if config.train.micro_batch == AUTO:
            config = override(config, [f"train.micro_batch={_micro_batch_of(known)}"])
        if known.get("config") != to_dict(config):
            raise PgolfError(f"{run / 'run.json'}: another configuration; resume with the same recipe and settings")
        check_tokenizer(run, data, sha)
    elif not resume and run.exists() and checkpoint.checkpoints(run):
        raise PgolfError(f"{run} already holds checkpoints; use --resume to go on or choose another folder with --out")
    make_folder(run)
    if config.train.micro_batch == AUTO:
        tokens = fit.largest_micro_batch(config, device, training.compute_dtype(config, device))
        console.say(f"train.micro_batch: {tokens:,} tokens fit in this GPU's memory")
        config = override(config, [f"train.micro_batch={tokens}"])
    note(run, config=to_dict(config), seed=config.seed, tokenizer_sha256=sha, **environment(device))
    if sha and parallel.rank() == 0:
        write_bytes(run / TOKENIZER, (data / TOKENIZER).read_bytes())
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    with console.Bar("train") as bar:
        peak_flops = (doctor.peak_flops(device) or 0.0) * parallel.world_size()

        def show(p: training.Progress) -> None:
            share = f" ({p.flops_per_second / peak_flops:.1%} of the GPU's peak)" if peak_flops else ""
            mode = f"{p.context}{' looped' if p.looping else ''}"
            bar.update(
                p.fraction,
                f"step {p.step}  loss {p.loss:.4f}  context {mode}  {p.tokens_per_second / 1e6:.4g} Mtok/s  "
                f"{p.flops_per_second / 1e12:.3g} TFLOP/s{share}  {p.elapsed:.1f} s",
                p.elapsed,
            )

        trainer = training.train(config, files, run, device, resume, stop_after, show)
    # Reserved, not allocated: what graphs hold for their next replay counts.
    peak = torch.cuda.max_memory_reserved() if device.type == "cuda" else None
    note(
        run,
        steps=trainer.step,
        tokens=trainer.step * config.train.step_tokens,
        train_seconds=trainer.elapsed,
        peak_gpu_bytes=peak,
        looping=trainer.model.looping,
        seconds={"train": time.perf_counter() - started},
    )
    memory = "" if peak is None else f", peak GPU memory {peak / 2**20:,.0f} MiB"
    console.say(f"trained {trainer.step} steps in {trainer.elapsed:.1f} s{memory}")


def _micro_batch_of(known: dict[str, Any]) -> int:
    """The micro-batch that a run's first start found."""
    found = from_dict(known.get("config", {}))
    assert isinstance(found, Config)
    return found.train.micro_batch


def averaged_model(run: Path, device: torch.device) -> tuple[GPT, Config]:
    """The averaged weights of a run's newest checkpoint as a float32 model."""
    tensors, state = checkpoint.load(checkpoint.newest(run))
    config: Config = from_dict(state["config"])
    model = GPT(config.model)
    weights = {name.removeprefix("average."): value for name, value in tensors.items() if name.startswith("average.")}
    model.load_state_dict(weights)
    model.looping = bool(state["looping"])
    return model.to(device), config


def quantize(
    run: Path, data: Path, device: torch.device, assignments: Callable[[Config], Config] | None = None
) -> Path:
    """Calibrate, solve, tune and pack the averaged weights of `run` into model.pgolf; prints sizes against the cap."""
    model, config = averaged_model(run, device)
    config = assignments(config) if assignments else config
    sha = check_data(data, config.model.vocab_size)
    check_tokenizer(run, data, sha)
    model.dtype = training.compute_dtype(config, device)
    fitted, budget, seconds = compress(model, config, data, device, sha)
    path = run / ARTIFACT
    if fitted is not None:
        size = len(fitted.packed)
        write_bytes(path, fitted.packed)
        if fitted.report:
            write_json(run / ACCOUNT, {"bytes": size, "budget": budget} | fitted.report)
            console.say(_outcome(fitted.report, size, budget))
        else:
            (run / ACCOUNT).unlink(missing_ok=True)  # it would tell of another artifact
        note(run, artifact_bytes=size, seconds=seconds)
        verdict = "within" if size <= CAP else f"{size - CAP:,} bytes OVER"
        console.say(f"{path}: {size:,} bytes, weights and code; {verdict} the cap of {CAP:,}")
    return path


def _outcome(account: dict[str, Any], size: int, budget: int) -> str:
    """In one line how a search for the steps that fill a budget ended."""
    text = f"{len(account['tries'])} solves"
    if "matrices" in account:
        nats = sum(matrix["nats"] for matrix in account["matrices"].values())
        text += f"; expected loss by quantization {nats:.5f} nats a token"
    if account["outcome"] != "filled":
        why = "finer steps could not hold the largest weights"
        if account["outcome"] == "closest":
            why = "no steps that were tried come closer"
        text += f"; {budget - size:,} bytes of the budget stay free: {why}"
    return text


def first_documents(tokens: np.ndarray, counts: np.ndarray, documents: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The stream up to and including the BOS after the first `documents` documents."""
    starts = np.flatnonzero(tokens == BOS)
    if documents is None or documents >= len(starts):
        return tokens, counts
    end = int(starts[documents]) + 1
    return tokens[:end], counts[:end]


def evaluate(
    model: GPT, data: Path, settings: EvalConfig, adapt: TTTConfig | None, seed: int, documents: int | None = None
) -> dict[str, Any]:
    """Score a model on the validation shards, adapting when `adapt` is given; moves its weights if so."""
    validation = shards.load_validation(data, model.config.vocab_size)
    started = time.perf_counter()
    with console.Bar("adapt and score" if adapt else "score") as bar:

        def show(done: int, total: int, bpb: float) -> None:
            bar.update(done / total, f"{done:,} targets  {bpb:.5f} bpb")

        if adapt:
            result = ttt.evaluate(
                model,
                validation.tokens,
                validation.bytes,
                adapt,
                seed,
                looping=model.looping,
                progress=show,
                max_docs=documents,
            ).score
        else:
            tokens, counts = first_documents(validation.tokens, validation.bytes, documents)
            if settings.mode == "sliding":
                result = score.sliding(model, tokens, counts, settings.context, settings.stride, settings.batch, show)
            else:
                result = score.segments(model, tokens, counts, settings.context, settings.batch, show)
    seconds = time.perf_counter() - started
    return dataclasses.asdict(result) | {"loss": result.loss, "bpb": result.bpb, "seconds": seconds}


def load_artifact(path: Path, data: Path, device: torch.device, dtype: torch.dtype) -> loading.Loaded:
    """Unpack an artifact and check that the data was made with its tokenizer."""
    loaded = loading.load(path, device, dtype)
    sha = check_data(data, loaded.model.config.vocab_size)
    if sha and loaded.tokenizer_sha256 and sha != loaded.tokenizer_sha256:
        raise PgolfError(
            f"{data} was tokenized with another tokenizer than {path} was trained on; build the data again"
        )
    return loaded


def report(run: Path | None, stage: str, result: dict[str, Any]) -> None:
    """Print a score and keep it in score.json."""
    console.say(
        f"{stage}: {result['bpb']:.5f} bpb, {result['loss']:.5f} nats a token, {result['targets']:,} targets, "
        f"{result['seconds']:.1f} s"
    )
    if run is not None and parallel.rank() == 0:
        path = run / "score.json"
        write_json(path, (read_object(path) if path.exists() else {}) | {stage: result})


def score_run(config: Config, data: Path, run: Path, device: torch.device, documents: int | None = None) -> None:
    """After training: score the weights, quantize and pack, score the artifact without and with adaptation."""
    dtype = training.compute_dtype(config, device)
    model, _ = averaged_model(run, device)
    model.dtype = dtype
    report(run, "weights", evaluate(model, data, config.eval, None, config.seed, documents))
    path = quantize(run, data, device)
    parallel.barrier()
    loaded = load_artifact(path, data, device, dtype)
    report(run, "artifact", evaluate(loaded.model, data, config.eval, None, config.seed, documents))
    if config.ttt.enabled:
        adapted = evaluate(loaded.model, data, config.eval, config.ttt, config.seed, documents)
        report(run, "artifact with test-time training", adapted)
