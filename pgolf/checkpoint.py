"""Checkpoints: one safetensors file with all tensors and a JSON header of plain values; written whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from pgolf.errors import PgolfError

KEEP = 2


def path_of(run: Path, step: int) -> Path:
    """Where the checkpoint of `step` lives."""
    return run / f"checkpoint-{step:06d}.safetensors"


def save(run: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
    """Write tensors and the JSON-able `state`, then drop all but the newest `KEEP` checkpoints."""
    path = path_of(run, step)
    temporary = path.with_suffix(".tmp")
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    try:
        safetensors.torch.save_file(contiguous, temporary, metadata={"state": json.dumps(state)})
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except (OSError, safetensors.SafetensorError) as error:
        raise PgolfError(f"cannot write {path}: {error}; free space or choose another folder") from error
    finally:
        temporary.unlink(missing_ok=True)
    for old in checkpoints(run)[:-KEEP]:
        old.unlink(missing_ok=True)
    return path


def checkpoints(run: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    return sorted(run.glob("checkpoint-[0-9]*.safetensors"))


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors on the CPU, state) of a checkpoint."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {})["state"])
            return {name: file.get_tensor(name) for name in file.keys()}, state  # noqa: SIM118
    except (OSError, safetensors.SafetensorError, KeyError, ValueError) as error:
        raise PgolfError(f"{path} is not a readable checkpoint ({error}); delete it to use an older one") from error


def newest(run: Path) -> Path:
    """The newest checkpoint of a run; PgolfError when there is none."""
    found = checkpoints(run)
    if not found:
        raise PgolfError(f"{run} holds no checkpoint; train first, without --resume")
    return found[-1]
