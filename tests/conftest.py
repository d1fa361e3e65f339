"""Fixtures: files that may be absent, and the installed package rather than the source tree."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# `python -m pytest` puts the source tree first on the path, where the compiled modules are not. Tests, and the
# processes they start, import what was installed.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
os.environ["PYTHONSAFEPATH"] = "1"


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """PyTorch on one thread: more only cost time on models this small, and processes are compared bit by bit."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Path]:
    """Path of a golden file by name; skips when it is absent.

    Folder: PGOLF_GOLDEN and no other when it is set, else tests/golden, else ../shared/golden beside the repository.
    """

    def find(name: str) -> Path:
        chosen = os.environ.get("PGOLF_GOLDEN")
        folders = [Path(chosen)] if chosen else [ROOT / "tests" / "golden", ROOT.parent / "shared" / "golden"]
        for folder in folders:
            if (folder / name).is_file():
                return folder / name
        pytest.skip(f"golden file {name} is not present")

    return find


@pytest.fixture(scope="session")
def record_tokenizer() -> Path:
    """Path of the record's SentencePiece model (PGOLF_TOKENIZER, or beside the repository); skips when it is absent."""
    default = ROOT.parent / "shared" / "data" / "tokenizer" / "caseops_sp8192.model"
    path = Path(os.environ.get("PGOLF_TOKENIZER", default))
    if not path.is_file():
        pytest.skip("the record's tokenizer is not present")
    return path
