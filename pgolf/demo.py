"""The whole job in minutes, without a download: the standard library's documentation is the text."""

import json
import lzma
import re
import subprocess
import sys
import time
from pathlib import Path

import brotli
import torch

from pgolf import artifact, console, generate, loading, pipeline
from pgolf.checkpoint import checkpoints
from pgolf.config import Config
from pgolf.data import build, shards, stdlib
from pgolf.data.tokenizer import Tokenizer, train_tokenizer
from pgolf.errors import PgolfError
from pgolf.files import make_folder, read_json, write_bytes

VAL_SHARE = 0.04


def prepare(run: Path, config: Config) -> tuple[Path, list[str]]:
    """Write text, tokenizer and shards under `run`; returns (shard folder, validation documents)."""
    train_text, val_text = stdlib.split(stdlib.documents(), VAL_SHARE)
    data = make_folder(run / "data")
    for name, documents in (("train", train_text), ("val", val_text)):
        lines = "".join(json.dumps({"text": document}) + "\n" for document in documents)
        write_bytes(data / f"{name}.jsonl", lines.encode())
    tokenizer = data / pipeline.TOKENIZER
    train_tokenizer(train_text, tokenizer, config.model.vocab_size)
    for name in ("train", "val"):
        build.build([data / f"{name}.jsonl"], data, tokenizer, split=name)
    return data, val_text


def coder_rows(path: Path) -> list[list[str]]:
    """Bytes of each group of matrices: our coder, xz -9e and brotli -11 on the same integers, transposed."""
    state, sizes = artifact.load(path).state, artifact.sizes(path)
    rows, totals = [], [0, 0, 0]
    for group in sorted({_group(name) for name in state if name.endswith(".q")}):
        matrices = [state[name].T.tobytes() for name in state if name.endswith(".q") and _group(name) == group]
        plain = b"".join(matrices)
        xz = len(lzma.compress(plain, preset=9 | lzma.PRESET_EXTREME))
        found = [sizes[group], xz, len(brotli.compress(plain, quality=11))]
        totals = [total + size for total, size in zip(totals, found, strict=True)]
        rows.append([group, *(f"{size:,}" for size in found)])
    return [*rows, ["sum", *(f"{total:,}" for total in totals)]]


def _group(name: str) -> str:
    """The artifact's section of a coded matrix: blocks.3.mlp.fc.weight.q -> mlp.fc."""
    return re.sub(r"^blocks\.\d+\.", "", name).removesuffix(".weight.q")


def run(run: Path, config: Config) -> None:
    """Train, quantize, pack, reload in a new process, score with test-time training; print what each stage gave."""
    begun = time.perf_counter()
    if checkpoints(run):
        raise PgolfError(f"{run} already holds a demo; delete the folder or choose another with --out")
    device = torch.device("cpu")
    seconds: dict[str, float] = {}

    def timed(stage: str, since: float) -> None:
        seconds[stage] = time.perf_counter() - since

    started = time.perf_counter()
    make_folder(run)
    data, val_text = prepare(run, config)
    validation = shards.load_validation(data, config.model.vocab_size)
    files = shards.train_files(data)
    tokens = sum(len(shards.read_tokens(path)) for path in files)
    timed("text, tokenizer, shards", started)
    console.say(f"text of Python {sys.version.split()[0]}: {tokens:,} training tokens, {validation.targets:,} to score")

    started = time.perf_counter()
    pipeline.train(config, data, run, device)
    timed("train", started)

    started = time.perf_counter()
    model, _ = pipeline.averaged_model(run, device)
    before = pipeline.evaluate(model, data, config.eval, None, config.seed)
    timed("score the weights", started)
    pipeline.report(run, "weights", before)

    started = time.perf_counter()
    path = pipeline.quantize(run, data, device)
    timed("quantize and pack", started)

    started = time.perf_counter()
    in_memory = pipeline.evaluate(loading.load(path, device).model, data, config.eval, None, config.seed)
    pipeline.report(run, "artifact, in this process", in_memory)
    common = [sys.executable, "-m", "pgolf", "eval", str(run), "--data", str(data), "--device", "cpu"]
    for options in (["--no-ttt"], []):
        subprocess.run([*common, *options], check=True)
    timed("reload and score in new processes", started)
    scores = read_json(run / "score.json")
    reloaded, adapted = scores["artifact"], scores["artifact with test-time training"]
    if abs(reloaded["bpb"] - in_memory["bpb"]) > 1e-6:
        raise PgolfError(f"{path} scores {reloaded['bpb']:.6f} reloaded but {in_memory['bpb']:.6f} before; report this")

    started = time.perf_counter()
    text = "\n".join(val_text).encode()
    rivals = {
        "xz -9": len(lzma.compress(text, preset=9)),
        "brotli -11": len(brotli.compress(text, quality=11)),
    }
    timed("rival compressors", started)
    total = validation.total_bytes
    rows = [[name, f"{8 * size / total:.4f}"] for name, size in rivals.items()]
    rows += [
        ["trained weights", f"{before['bpb']:.4f}"],
        ["quantized, reloaded", f"{reloaded['bpb']:.4f}"],
        ["with test-time training", f"{adapted['bpb']:.4f}"],
    ]
    console.table(f"{total:,} bytes of validation text, bits per byte", ["what", "bpb"], rows)
    console.table("bytes of the coded integers", ["group", "pgolf", "xz -9e", "brotli -11"], coder_rows(path))
    console.say(f"artifact: {path.stat().st_size:,} bytes of weights and code")
    tokenizer = Tokenizer.load(data / pipeline.TOKENIZER)
    prompt = "Return a list of"
    sample = generate.sample(loading.load(path, device).model, tokenizer, prompt, 60, 0.7, 40, config.eval.context, 0)
    console.say(f"sample: {sample}")
    timed("everything", begun)
    console.table("seconds by stage", ["stage", "s"], [[name, f"{value:.1f}"] for name, value in seconds.items()])
    pipeline.note(run, seconds=seconds)
