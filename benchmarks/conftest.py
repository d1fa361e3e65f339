"""Options of the benchmarks, and the installed package rather than the source tree (as tests/conftest.py)."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
os.environ["PYTHONSAFEPATH"] = "1"

import torch  # noqa: E402

from pgolf.testing.timings import Run  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="more repetitions; on a CPU all types, and torch.compile")
    parser.addoption("--no-compile", action="store_true", help="leave torch.compile out: it takes most of the time")
    parser.addoption("--json", type=Path, metavar="FILE", help="write what the operators' benchmarks measured to FILE")


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether --full was given; without it a benchmark takes seconds."""
    return bool(request.config.getoption("--full"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture(scope="session")
def run(request: pytest.FixtureRequest, device: torch.device) -> Iterator[Run]:
    """What this session measures; written to --json at its end, whether or not a benchmark failed."""
    run = Run.on(device)
    yield run
    if path := request.config.getoption("--json"):
        run.save(path)
