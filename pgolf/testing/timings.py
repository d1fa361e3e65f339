"""What a run of the operators' benchmarks measured: as objects, as JSON, as Markdown."""

import importlib.metadata
import json
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from pgolf import __version__
from pgolf.testing.clock import Quantiles, copy_bandwidth, matmul_rate


@dataclass(frozen=True)
class Timing:
    """One contender at one operator on one input: its time, or why there is none."""

    operator: str
    shape: tuple[int, ...]
    dtype: str
    direction: str  # "forward", or "both": forward and backward
    contender: str  # the first of a group is ours; the others' ratios are to it
    seconds: Quantiles | None = None
    bytes: int = 0  # the least to be read and written
    flops: int = 0
    memory: int | None = None  # added at the peak, bytes; None on a CPU
    graphed: bool = False  # a replayed CUDA graph rather than calls
    absent: str = ""  # why there is no time

    def share(self, run: "Run") -> tuple[float, str]:
        """The larger of the shares of the two measured ceilings, and which: "copy" or "matmul"."""
        assert self.seconds is not None
        shares = ((self.bytes / run.bandwidth, "copy"), (self.flops / run.matmul, "matmul"))
        most, which = max(shares)
        return most / self.seconds.p50, which


@dataclass
class Run:
    """One run of the benchmarks on one device."""

    device: str
    bandwidth: float  # bytes per second of a copy, read and written
    matmul: float  # operations per second of a matrix product
    versions: dict[str, str]
    date: str
    timings: list[Timing] = field(default_factory=list)

    @classmethod
    def on(cls, device: torch.device) -> "Run":
        """An empty run, its ceilings measured."""
        name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
        today = datetime.now(UTC).date().isoformat()
        return cls(name, copy_bandwidth(device), matmul_rate(device), versions(), today)

    def save(self, path: Path) -> None:
        """Write the run as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Run":
        """Read what `save` wrote."""
        fields = json.loads(path.read_text())
        fields["timings"] = [_timing(timing) for timing in fields["timings"]]
        return cls(**fields)


def _timing(fields: dict[str, Any]) -> Timing:
    seconds = fields["seconds"] and Quantiles(**fields["seconds"])
    return Timing(**{**fields, "seconds": seconds, "shape": tuple(fields["shape"])})


def versions() -> dict[str, str]:
    """Versions of what a time depends on; "none" for what is not there."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return {
        "pgolf": __version__,
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda or "none",
        "driver": _driver(),
        "python": platform.python_version(),
    }


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "none"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return lines[0] if lines else "none"


COLUMNS = (
    "device",
    "shape, type",
    "pass",
    "contender",
    "median µs",
    "p20 to p80",
    "GB/s",
    "TFLOP/s",
    "of ceiling",
    "of our time",
    "peak MiB",
)


def cells(timing: Timing, ours: Timing, run: Run) -> list[str]:
    """A row of COLUMNS; `ours` is the first contender on the same input."""
    alike = timing.absent or timing.graphed == ours.graphed
    name = timing.contender if alike else f"{timing.contender} (without a graph)"
    shape = "x".join(map(str, timing.shape))
    row = [run.device, f"{shape} {timing.dtype}", _PASSES[timing.direction], name]
    if timing.seconds is None:
        return row + [f"absent: {timing.absent}"] + [""] * (len(COLUMNS) - len(row) - 1)
    t = timing.seconds
    share, which = timing.share(run)
    return row + [
        f"{t.p50 * 1e6:.1f}",
        f"{t.p20 * 1e6:.1f} to {t.p80 * 1e6:.1f}",
        f"{timing.bytes / t.p50 / 1e9:.0f}" if timing.bytes else "",
        f"{timing.flops / t.p50 / 1e12:.2f}" if timing.flops else "",
        f"{share:.0%} {which}",
        f"{t.p50 / ours.seconds.p50:.2f}x" if ours.seconds else "",
        "" if timing.memory is None else f"{timing.memory / 2**20:.0f}",
    ]


_PASSES = {"forward": "forward", "both": "forward+backward"}


def rows(run: Run, operator: str) -> list[list[str]]:
    """The rows of COLUMNS of one operator in a run."""
    first: dict[tuple, Timing] = {}
    found = []
    for timing in run.timings:
        if timing.operator == operator:
            ours = first.setdefault((timing.shape, timing.dtype, timing.direction), timing)
            found.append(cells(timing, ours, run))
    return found


def markdown(runs: list[Run]) -> str:
    """All runs as Markdown: the devices, then a table an operator."""
    lines = ["# Measured times of the operators", "", *_INTRODUCTION, ""]
    for run in runs:
        about = ", ".join(f"{name} {version}" for name, version in run.versions.items())
        lines.append(
            f"- **{run.device}**, {run.date}: copy {run.bandwidth / 1e9:.0f} GB/s, "
            f"matmul {run.matmul / 1e12:.2f} TFLOP/s; {about}"
        )
    for operator in dict.fromkeys(timing.operator for run in runs for timing in run.timings):
        lines += ["", f"## {operator}", "", _line(COLUMNS), _line(["---"] * 4 + ["---:"] * (len(COLUMNS) - 4))]
        lines += [_line(row) for run in runs for row in rows(run, operator)]
    return "\n".join(lines) + "\n"


def _line(values: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(value.replace('|', '/') for value in values)} |"


_INTRODUCTION = """\
Measured by `python -m pytest benchmarks/test_ops.py --json FILE`, written by `python benchmarks/render.py FILE...`, not
edited by hand. On a GPU each time is of a replayed CUDA graph with a cold L2 cache. `GB/s` and `TFLOP/s` count the
least the operator must move and compute, not what a contender does. `of ceiling` is the larger share of two ceilings
measured on the same device: a copy, and a large matrix product by torch (bfloat16 on a GPU, float32 on a CPU). `of our
time` is the time over that of the first contender on the same input, the kernel that pgolf runs there.""".splitlines()
