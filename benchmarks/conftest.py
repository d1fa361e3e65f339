"""Options of the benchmarks, and the installed package rather than the source tree (as tests/conftest.py)."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
os.environ["PYTHONSAFEPATH"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="more repetitions, and torch.compile on the CPU too")


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether --full was given; without it a benchmark takes seconds."""
    return bool(request.config.getoption("--full"))
