"""Ranks: one process a device, started by torchrun; a single process needs nothing.

GPU tensors travel over NCCL, in the order of the GPU's queue; CPU tensors over gloo, at once and past that queue. A
rank learns within seconds that another has ended, whatever it is doing: a connection closes, and a thread waits for
that.
"""

import contextlib
import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from pgolf.errors import PgolfError

TIMEOUT = timedelta(minutes=30)  # of a collective: longer than rank 0 alone solves and packs while the others wait
GRACE = 1.0  # seconds in which a rank may end by itself after another has: most errors are found by all of them
PATIENCE = 2.0  # seconds for rank 0 to say what this rank is about to say

GONE = ("onnection closed", "onnection reset", "roken pipe", "remote process exited")  # gloo's and NCCL's words
ENDED = "another rank has ended; its own message says why"

# PyTorch 2.13 gave these new names and warns of the old ones.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_leaving = threading.Event()  # set: this rank ends by itself, others may end too
_ending = threading.RLock()  # held by the thread that says why this rank ends: one line, whoever finds it first


def start(device: str = "auto") -> torch.device:
    """Join torchrun's group when there is one and choose this rank's device ("auto", "cpu" or "cuda").

    From then on a rank that ends by another way than `leave` ends all others. PgolfError when there is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise PgolfError("no CUDA GPU is visible; use --device cpu or check the driver with `pgolf doctor`")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda":
        torch.cuda.set_device(local % torch.cuda.device_count())
    if "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=TIMEOUT)
        _watch()
    return torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")


def _watch() -> None:
    """Start a thread for every other rank that ends this one soon after it.

    Each waits for a word that never comes: what it gets is the end of the connection. Nothing else would end a rank
    whose GPU waits inside an NCCL kernel for one that is gone. The group is their own: no wait there runs out of time.
    """
    group = dist.new_group(backend="gloo", timeout=timedelta(days=365))

    def wait(other: int) -> None:
        try:
            dist.recv(torch.empty(1), src=other, group=group)
        except RuntimeError:
            _leaving.wait(GRACE)
            with _ending:
                if not _leaving.is_set():
                    complain(ENDED)
                    sys.stdout.flush()
                    os._exit(2)  # the main thread may never come back from where it waits

    for other in range(world_size()):
        if other != rank():
            threading.Thread(target=wait, args=(other,), daemon=True, name=f"watch rank {other}").start()


def complain(text: str) -> None:
    """Print why this rank ends; under torchrun a rank that would repeat rank 0's words leaves them to it."""
    with _ending:
        _leaving.set()
        if not _said_by_rank_0(text):
            print(f"pgolf: {text}", file=sys.stderr, flush=True)


def _said_by_rank_0(text: str) -> bool:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # only torchrun's own store outlives rank 0
        return False
    key = f"pgolf/complaint/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    try:
        port = int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(os.environ["MASTER_ADDR"], port, is_master=False, timeout=timedelta(seconds=PATIENCE))
        if os.environ["RANK"] == "0":
            store.set(key, text)
            return False
        limit = time.monotonic() + PATIENCE
        while not store.check([key]):  # get() would wait as well, and warn
            if time.monotonic() > limit:
                return False
            time.sleep(0.05)
        return bool(store.get(key).decode() == text)
    except RuntimeError:  # the store is gone
        return False


def leave(code: int) -> int:
    """End this rank's part of the work; returns `code`, or ends the process with it where there are several ranks.

    A gloo worker thread may still be about to drop the tensors of the last collective. For that it wants the GIL, and
    a Python that is shutting down aborts such a thread and the process with it; so a rank skips Python's shutdown.
    """
    if not dist.is_initialized():
        return code
    _leaving.set()
    if code == 0:
        try:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            barrier()  # nobody closes a connection that another rank still reads
        except PgolfError as error:
            complain(str(error))
            code = 2
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def barrier() -> None:
    """Wait for all ranks' processes, not for their GPUs; PgolfError when one has ended."""
    _all_reduce(torch.zeros(1, dtype=torch.uint8))


def _all_reduce(tensor: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> torch.Tensor:
    """All-reduce in place, if there are several ranks; a CPU tensor while the GPU works on."""
    if world_size() > 1:
        with _told():
            dist.all_reduce(tensor, op=op)
    return tensor


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Collectives' errors about other ranks in the words of a user; all others pass."""
    try:
        yield
    except RuntimeError as error:
        if any(sign in str(error) for sign in GONE):
            raise PgolfError(ENDED) from error
        if "Timed out" in str(error):
            raise PgolfError(f"another rank has not answered for {TIMEOUT}; see what it waits for") from error
        raise


def _finish(work: dist.Work) -> None:
    """Wait for a collective: of CPU tensors now, of GPU tensors on the GPU's current stream."""
    with _told():
        work.wait()


def rank() -> int:
    """This process's rank, 0 alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks, 1 alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def start_mean(tensors: list[torch.Tensor]) -> Callable[[], None]:
    """Begin to average tensors over ranks, in one collective per type; what is returned waits, and writes them."""
    if world_size() == 1:
        return lambda: None
    pending = []
    for dtype in {tensor.dtype for tensor in tensors}:
        group = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.flatten() for tensor in group])
        pending.append((group, flat, dist.all_reduce(flat, async_op=True)))

    def finish() -> None:
        for group, flat, work in pending:
            _finish(work)
            flat /= world_size()
            for tensor, part in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
                tensor.copy_(part.view_as(tensor))

    return finish


def mean_(tensors: list[torch.Tensor]) -> None:
    """Average tensors over ranks in place, in one collective per type."""
    start_mean(tensors)()


def sum_(values: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over ranks in place; returns it. PgolfError when another rank has ended."""
    return _all_reduce(values)


def broadcast_(tensors: list[torch.Tensor]) -> None:
    """Give every rank rank 0's tensors, in place."""
    if world_size() > 1:
        barrier()  # rank 0 may have long to go: on the CPU the others wait for it without holding a GPU
        with _told():
            for tensor in tensors:
                dist.broadcast(tensor, 0)


def check_same(tensors: Iterable[torch.Tensor], what: str) -> None:
    """PgolfError on every rank unless all hold the same bytes of `tensors`; `what` names them in its message."""
    if world_size() == 1:
        return
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().data)
    mine = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
    every = mine.new_empty(world_size() * len(mine))
    with _told():
        _all_gather(every, mine)
    first, *others = every.split(len(mine))
    wrong = [str(other) for other, theirs in enumerate(others, 1) if not torch.equal(theirs, first)]
    if wrong:
        raise PgolfError(
            f"{what} differ between ranks: not rank 0's bytes on rank {', '.join(wrong)} of {world_size()}; this run "
            "is void: check those GPUs and their links (nvidia-smi -q, dmesg) and start again"
        )


def agree(elapsed: float, stop_now: bool) -> tuple[float, bool]:
    """Rank 0's elapsed seconds, and whether any rank wants to stop; PgolfError when another rank has ended."""
    word = torch.tensor([elapsed if rank() == 0 else 0.0, float(stop_now)], dtype=torch.float64)
    elapsed, flag = _all_reduce(word, dist.ReduceOp.MAX).tolist()
    return elapsed, bool(flag)


def smallest(value: float) -> float:
    """The smallest of all ranks' values; PgolfError when another rank has ended."""
    return float(_all_reduce(torch.tensor(value, dtype=torch.float64), dist.ReduceOp.MIN))


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
    mine = bank.new_empty(share, *bank.shape[1:])
    work = _reduce_scatter(mine, padded, async_op=True)

    def finish() -> torch.Tensor:
        _finish(work)
        return mine / world

    return finish


def start_gather(share: torch.Tensor, count: int) -> Callable[[], torch.Tensor]:
    """Begin the inverse of `cut`; what is returned waits, and gives every rank's slices, the first `count` of them."""
    world = world_size()
    if world == 1:
        return lambda: share
    whole = share.new_empty(world * len(share), *share.shape[1:])
    work = _all_gather(whole, share.contiguous(), async_op=True)

    def finish() -> torch.Tensor:
        _finish(work)
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
