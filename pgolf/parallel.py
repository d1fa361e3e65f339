"""Ranks: one process a device, started by torchrun; a single process needs nothing."""

import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist

from pgolf.errors import PgolfError


def start(device: str = "auto") -> torch.device:
    """Join torchrun's group when there is one and choose this rank's device ("auto", "cpu" or "cuda")."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise PgolfError("no CUDA GPU is visible; use --device cpu or check the driver with `pgolf doctor`")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda":
        torch.cuda.set_device(local % torch.cuda.device_count())
    if "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")


def leave(code: int) -> int:
    """End this rank's part of the work; returns `code`, or ends the process with it where there are several ranks.

    A gloo worker thread may still be about to drop the tensors of the last collective. For that it wants the GIL, and
    a Python that is shutting down aborts such a thread and the process with it; so a rank skips Python's shutdown.
    """
    if not dist.is_initialized():
        return code
    if code == 0:
        dist.barrier()  # nobody closes a connection that another rank still reads
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def rank() -> int:
    """This process's rank, 0 alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks, 1 alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def mean_(tensors: list[torch.Tensor]) -> None:
    """Average tensors over ranks in place, in one collective per type."""
    if world_size() == 1:
        return
    for dtype in {tensor.dtype for tensor in tensors}:
        group = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.flatten() for tensor in group])
        dist.all_reduce(flat)
        flat /= world_size()
        for tensor, part in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
            tensor.copy_(part.view_as(tensor))


def broadcast_(tensors: list[torch.Tensor]) -> None:
    """Give every rank rank 0's tensors, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def agree(elapsed: float, stop_now: bool, device: torch.device) -> tuple[float, bool]:
    """Rank 0's elapsed seconds, and whether any rank wants to stop."""
    if world_size() == 1:
        return elapsed, stop_now
    word = torch.tensor([elapsed if rank() == 0 else 0.0, float(stop_now)], dtype=torch.float64, device=device)
    dist.all_reduce(word, op=dist.ReduceOp.MAX)
    elapsed, flag = word.tolist()
    return elapsed, bool(flag)


def smallest(value: float, device: torch.device) -> float:
    """The smallest of all ranks' values."""
    if world_size() == 1:
        return value
    word = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(word, op=dist.ReduceOp.MIN)
    return float(word)


def _padded(bank: torch.Tensor) -> torch.Tensor:
    """A copy of a bank [n, ...] with zero slices appended, so that every rank gets as many."""
    world = world_size()
    padded = bank.new_zeros(-(-len(bank) // world) * world, *bank.shape[1:])
    padded[: len(bank)] = bank
    return padded


def start_scatter_mean(bank: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Begin to average a bank [n, ...] over ranks; what is returned waits, and gives this rank's share of its slices.

    n is padded with zeros to a multiple of the ranks.
    """
    world = world_size()
    if world == 1:
        return lambda: bank
    padded = _padded(bank)
    share = len(padded) // world
    if dist.get_backend() == "gloo":  # gloo has no reduce-scatter
        work = dist.all_reduce(padded, async_op=True)
        mine = padded[rank() * share : (rank() + 1) * share]
    else:
        mine = bank.new_empty(share, *bank.shape[1:])
        work = dist.reduce_scatter_tensor(mine, padded, async_op=True)

    def finish() -> torch.Tensor:
        work.wait()
        return mine / world

    return finish


def start_gather(share: torch.Tensor, count: int) -> Callable[[], torch.Tensor]:
    """Begin the inverse of `cut`; what is returned waits, and gives every rank's slices, the first `count` of them."""
    world = world_size()
    if world == 1:
        return lambda: share
    whole = share.new_empty(world * len(share), *share.shape[1:])
    work = dist.all_gather_into_tensor(whole, share.contiguous(), async_op=True)

    def finish() -> torch.Tensor:
        work.wait()
        return whole[:count]

    return finish


def gather(share: torch.Tensor, count: int) -> torch.Tensor:
    """The inverse of `cut`, at once."""
    return start_gather(share, count)()


def cut(bank: torch.Tensor) -> torch.Tensor:
    """This rank's share of a bank, padded as in `start_scatter_mean`."""
    world = world_size()
    if world == 1:
        return bank
    padded = _padded(bank)
    share = len(padded) // world
    return padded[rank() * share : (rank() + 1) * share].clone()
