"""What the operators' benchmarks write: JSON that comes back, tables with the right ratios and shares."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pgolf.testing import Quantiles
from pgolf.testing.clock import capturable, copy_bandwidth, matmul_rate, measure, peak_memory, repeats_within
from pgolf.testing.timings import COLUMNS, Run, Timing, markdown, rows

CPU = torch.device("cpu")
RENDER = Path(__file__).resolve().parents[1] / "benchmarks" / "render.py"


def timing(contender: str, microseconds: float, direction: str = "forward", **fields) -> Timing:
    seconds = Quantiles(*(microseconds * factor * 1e-6 for factor in (0.9, 1.0, 1.2)))
    about = {"operator": "scale", "shape": (4, 5), "dtype": "bfloat16", "bytes": 10_000_000, "flops": 3_000_000_000}
    return Timing(**{**about, "contender": contender, "direction": direction, "seconds": seconds, **fields})


@pytest.fixture
def run() -> Run:
    """Two operators on a device of 1 TB/s and 100 TFLOP/s."""
    return Run(
        "H100",
        1e12,
        1e14,
        {"pgolf": "0.1", "driver": "580"},
        "2026-01-31",
        [
            timing("pgolf sm90", 50.0, memory=3 << 20, graphed=True),
            timing("eager", 125.0, memory=9 << 20),
            Timing("scale", (4, 5), "bfloat16", "forward", "triton", absent="ImportError: no | triton"),
            timing("pgolf sm90", 200.0, "both", flops=0),
            timing("eager", 300.0, "both", flops=0),
            timing("pgolf generic", 7.0, operator="other", bytes=0),
        ],
    )


def test_json_comes_back(run: Run, tmp_path: Path) -> None:
    run.save(tmp_path / "new" / "run.json")
    assert Run.load(tmp_path / "new" / "run.json") == run


def test_a_row_holds_rate_share_ratio_and_memory(run: Run) -> None:
    ours, eager, triton, both, both_eager = (dict(zip(COLUMNS, row, strict=True)) for row in rows(run, "scale"))
    assert list(ours.values()) == [
        "H100", "4x5 bfloat16", "forward", "pgolf sm90", "50.0", "45.0 to 60.0",
        "200", "60.00", "60% matmul", "1.00x", "3",
    ]  # fmt: skip
    assert (eager["contender"], eager["of our time"], eager["peak MiB"]) == ("eager (without a graph)", "2.50x", "9")
    assert triton["median µs"] == "absent: ImportError: no | triton" and not triton["of our time"]
    assert (both["pass"], both["of ceiling"], both["TFLOP/s"]) == ("forward+backward", "5% copy", "")
    assert (both_eager["of our time"], both_eager["peak MiB"]) == ("1.50x", "")


def test_markdown_has_a_table_an_operator(run: Run) -> None:
    other = Run("A100", 5e11, 1e14, {}, "2026-02-01", [timing("pgolf generic", 100.0)])
    text = markdown([run, other])
    assert "- **H100**, 2026-01-31: copy 1000 GB/s, matmul 100.00 TFLOP/s; pgolf 0.1, driver 580\n" in text
    _, scale, only = text.split("\n## ")
    assert scale.startswith("scale\n") and only.startswith("other\n")
    table = [line for line in scale.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 5 + 1 and {line.count("|") for line in table} == {len(COLUMNS) + 1}
    assert table[-1].startswith("| A100 | 4x5 bfloat16 | forward | pgolf generic | 100.0 |")


def test_render_writes_the_page(run: Run, tmp_path: Path) -> None:
    run.save(tmp_path / "run.json")
    out = tmp_path / "RESULTS.md"
    subprocess.run([sys.executable, RENDER, tmp_path / "run.json", "--out", out], check=True, capture_output=True)
    assert out.read_text(encoding="utf-8") == markdown([run])


def test_a_run_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgolf.testing.timings.copy_bandwidth", lambda device: 1.0)
    monkeypatch.setattr("pgolf.testing.timings.matmul_rate", lambda device: 2.0)
    run = Run.on(CPU)
    assert "CPU" in run.device and (run.bandwidth, run.matmul) == (1.0, 2.0) and not run.timings
    assert {"pgolf", "torch", "triton", "cuda", "driver"} <= run.versions.keys() and all(run.versions.values())


def test_clocks_on_the_cpu() -> None:
    calls: list[int] = []
    quantiles = measure(lambda: calls.append(1), CPU, repeats=4)
    assert len(calls) == 4 and 0 < quantiles.p20 <= quantiles.p50 <= quantiles.p80
    assert peak_memory(lambda: calls.append(1), CPU) is None and len(calls) == 4
    assert copy_bandwidth(CPU, 1 << 20) > 0 and matmul_rate(CPU) > 0


def test_repeats_fit_a_time() -> None:
    assert repeats_within(1e-9, lambda: sum(range(1000)), CPU, least=2, most=7) == 2
    assert repeats_within(60.0, lambda: None, CPU, least=2, most=7) == 7


@pytest.mark.gpu
def test_what_waits_for_the_gpu_is_not_capturable() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    x = torch.ones(3, device="cuda")
    assert capturable(lambda: x + 1)
    assert not capturable(lambda: x.sum().item())
    assert torch.cuda.get_sync_debug_mode() == 0
