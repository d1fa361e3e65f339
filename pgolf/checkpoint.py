"""Checkpoints: one safetensors file with all tensors and a JSON header of plain values; written whole or not at all.

A GPU does not wait for one to be written: its tensors are copied to pinned memory in the order of its stream, so that
later steps may change them at once, and a thread takes the copies to the disk.
"""

import json
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pgolf.errors import PgolfError

KEEP = 2


def path_of(run: Path, step: int) -> Path:
    """Where the checkpoint of `step` lives."""
    return run / f"checkpoint-{step:06d}.safetensors"


class Writer:
    """Writes a run's checkpoints from one device while its training goes on, at most one at a time.

    An error of a write, PgolfError or OSError, is raised by the next `save` or `wait`, or the first `advance` after it.
    """

    def __init__(self, run: Path, device: torch.device) -> None:
        self._run, self._on_gpu = run, device.type == "cuda"
        self._host: dict[str, Tensor] = {}  # kept: pinning memory takes longer than filling it
        self._copied: torch.cuda.Event | None = None
        self._next: Callable[[], None] | None = None  # the write that waits for `_copied`
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Begin a checkpoint of tensors and the JSON-able `state` as they are now, after the last one is written.

        On a GPU the copies are only queued; `advance` has them written.
        """
        self.wait()
        self._host = {name: self._buffer(name, value) for name, value in tensors.items()}
        for name, value in tensors.items():
            self._host[name].copy_(value, non_blocking=True)
        self._next = partial(_write, self._run, step, self._host, json.dumps(state))
        if self._on_gpu:
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._start()

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        """Host memory for a tensor, the last checkpoint's where it fits."""
        kept = self._host.get(name)
        if kept is not None and kept.shape == like.shape and kept.dtype == like.dtype:
            return kept
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)

    def advance(self) -> None:
        """Start the write whose copies have arrived. To be called between steps; never waits.

        Not the thread's to find out: a CUDA call of another thread would break a graph's capture in this one.
        """
        if self._copied is None or self._copied.query():
            self._start()
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Return when the last checkpoint begun is on the disk."""
        self._start()
        if self._writing is not None:
            done, self._writing = self._writing, None
            done.result()

    def _start(self) -> None:
        """Hand the copies under way to the thread, once they are there."""
        if self._next is None:
            return
        if self._copied is not None:
            self._copied.synchronize()
        self._writing, self._next = self._pool.submit(self._next), None

    def close(self) -> None:
        """End the thread once it has written what was begun; whether it could is not told."""
        self._start()
        self._pool.shutdown()


def _write(run: Path, step: int, tensors: dict[str, Tensor], state: str) -> None:
    """Write a checkpoint, then drop all but the newest `KEEP` and what a killed process left behind."""
    path = path_of(run, step)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # From 0.8 on the library lets Python's lock go meanwhile, and training with it.
        safetensors.torch.save_file(tensors, temporary, metadata={"state": state})
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PgolfError(f"cannot write {path}: {reason}; free space or choose another folder") from error
    finally:
        temporary.unlink(missing_ok=True)
    for old in (*checkpoints(run)[:-KEEP], *run.glob(".checkpoint-*.tmp")):
        old.unlink(missing_ok=True)


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
