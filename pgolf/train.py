"""The training loop (recipe section 3)."""

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pgolf import checkpoint, parallel, schedule
from pgolf.config import Config, to_dict
from pgolf.data.loader import Loader
from pgolf.errors import PgolfError
from pgolf.files import make_folder, write_bytes
from pgolf.interrupt import Stopped, StopSignal
from pgolf.microstep import EagerMicroStep, GraphedMicroStep
from pgolf.model import GPT, flops_per_token
from pgolf.ops import _native, attention
from pgolf.optim import Optimizer


@dataclasses.dataclass
class Progress:
    """What a log line shows."""

    step: int
    tokens: int
    loss: float
    lr_scale: float
    context: int
    looping: bool
    tokens_per_second: float
    flops_per_second: float
    elapsed: float
    fraction: float


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """The type of activations that `train.dtype` asks for on this device."""
    if config.train.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if config.train.dtype == "bfloat16" else torch.float32


def step_way(config: Config, device: torch.device) -> str:
    """How `train.step` makes a step on this device: graphs, compiled or eager."""
    way = config.train.step
    if device.type != "cuda":
        if way in ("graphs", "compiled"):
            raise PgolfError(f"train.step={way} needs a CUDA GPU; leave it at auto")
        return "eager"
    if way != "auto":
        return way
    return "graphs" if _native.available(device) else "compiled"


class Trainer:
    """One run: model, optimizer, data and the position in all curves; everything a checkpoint must hold."""

    def __init__(self, config: Config, files: list[Path], run: Path, device: torch.device) -> None:
        self.config, self.run, self.device = config, run, device
        settings = config.train
        world = parallel.world_size()
        if settings.step_tokens % (settings.micro_batch * world):
            raise PgolfError(
                f"train.step_tokens ({settings.step_tokens}) must be a multiple of train.micro_batch "
                f"({settings.micro_batch}) times the {world} ranks"
            )
        self.accumulation = settings.step_tokens // (settings.micro_batch * world)
        attention.choose(None if settings.attention == "auto" else settings.attention)
        self.model = GPT(config.model).initialize(config.seed).to(device)
        self.model.dtype = compute_dtype(config, device)
        self.way = step_way(config, device)
        if self.way == "compiled":
            self.model.compile_regions()
        self.optimizer = Optimizer(self.model, settings)
        self._micro_step = (
            GraphedMicroStep(self._share_of_loss, device, self.model.parameters())
            if self.way == "graphs"
            else EagerMicroStep(self._share_of_loss, device)
        )
        self.loader = Loader(
            files,
            rank=parallel.rank(),
            world_size=world,
            step_tokens=settings.step_tokens,
            micro_batch=settings.micro_batch,
            vocab_size=config.model.vocab_size,
        )
        self.writer = checkpoint.Writer(run, device)
        self.step = 0
        self.elapsed = 0.0
        self.context = schedule.context_length(settings, 0.0)
        self.context_since: int | None = None  # step of the last context change
        self.last_lr_scale = 0.0  # of the last step made

    def fraction(self, elapsed: float) -> float:
        """Position in every curve, 0 to 1."""
        settings = self.config.train
        if settings.schedule_by == "step":
            return min(1.0, self.step / settings.steps)
        return min(1.0, elapsed / (settings.seconds - settings.reserve_seconds))

    def _share_of_loss(self, ids: torch.Tensor, targets: torch.Tensor, bounds: torch.Tensor, context: int) -> Any:
        return self.model.train_loss(ids, targets, bounds, context) / self.accumulation

    def micro_step(self) -> torch.Tensor:
        """Forward and backward of the next micro-batch; returns its share of the step's loss, 0-dim."""
        return self._micro_step(self.loader.next_batch(self.context), self.context, self.model.looping)

    def train_step(self, fraction: float) -> torch.Tensor:
        """One optimizer step at `fraction` of the schedule; returns the mean loss of this rank, 0-dim."""
        settings = self.config.train
        context = schedule.context_length(settings, fraction)
        if context != self.context:
            self.context, self.context_since = context, self.step
        self.model.looping = schedule.recurrent(settings, fraction) and self.config.model.num_loops > 0
        losses = [self.micro_step() for _ in range(self.accumulation)]
        self.last_lr_scale = self.lr_scale(fraction)
        self.optimizer.step(self.last_lr_scale, schedule.muon_momentum(settings, self.step))
        self.optimizer.update_average()
        self.step += 1
        return torch.stack(losses).sum()

    def lr_scale(self, fraction: float) -> float:
        """Learning-rate multiplier of the step about to be made, re-warming included."""
        since = None if self.context_since is None else self.step - self.context_since
        return schedule.lr_scale(self.config.train, fraction) * schedule.rewarm(self.config.train, since)

    def warm_up(self, until: float) -> None:
        """Run every mode the schedule meets up to fraction `until`, so that all is compiled; then undo it all.

        With CUDA graphs one step of a mode does that.
        """
        settings = self.config.train
        steps = min(settings.warmup_steps, 1) if self.way == "graphs" else settings.warmup_steps
        if steps == 0:
            return
        tensors = {name: value.detach().cpu().clone() for name, value in self.optimizer.tensors()}
        position = self.loader.state_dict()
        kept = self.context, self.context_since, self.step
        for context, looping in schedule.modes(settings, until):
            self.context, self.model.looping = context, looping and self.config.model.num_loops > 0
            for _ in range(steps):
                for _ in range(self.accumulation):
                    self.micro_step()
                self.optimizer.step(1.0, settings.muon_momentum_start)
        self.optimizer.load(tensors)
        self.loader.load_state_dict(position)
        self.context, self.context_since, self.step = kept

    def save(self, wait: bool) -> Path:
        """Begin a checkpoint of the state as it is now, and with `wait` return when every rank can read it.

        Rank 0 writes; every rank must call, momentum is gathered.
        """
        tensors = dict(self.optimizer.tensors())
        if parallel.rank() == 0:
            state = {
                "config": to_dict(self.config),
                "step": self.step,
                "elapsed": self.elapsed,
                "context": self.context,
                "context_since": self.context_since,
                "looping": self.model.looping,
                "loader": self.loader.state_dict(),
            }
            self.writer.save(self.step, tensors, state)
        if wait:
            self.writer.wait()
            parallel.barrier()  # the next stage reads it on every rank
        return checkpoint.path_of(self.run, self.step)

    def close(self) -> None:
        """End the threads that read ahead and write behind."""
        self.loader.close()
        self.writer.close()

    def load(self, path: Path) -> None:
        """Continue from a checkpoint; PgolfError when it belongs to another configuration."""
        tensors, state = checkpoint.load(path)
        if state.get("config") != to_dict(self.config):
            raise PgolfError(f"{path} was made with another configuration; resume with the same recipe and settings")
        self.optimizer.load(tensors)
        self.loader.load_state_dict(state["loader"])
        self.step, self.elapsed = state["step"], state["elapsed"]
        self.context, self.context_since = state["context"], state["context_since"]
        self.model.looping = state["looping"]


def train(
    config: Config,
    files: list[Path],
    run: Path,
    device: torch.device,
    resume: bool = False,
    stop_after: float | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Trainer:
    """Train to the end of the schedule and write the last checkpoint, metrics.jsonl beside it.

    `stop_after` ends early, at this many seconds (or steps with train.schedule_by=step), with the curves of the whole
    schedule. Ctrl-C and SIGTERM save, then raise Stopped. Returns the trainer in its final state.
    """
    make_folder(run)
    if not resume and checkpoint.checkpoints(run):
        raise PgolfError(f"{run} already holds checkpoints; use --resume to go on or choose another folder with --out")
    # Compiled, the step is PyTorch's alone: the reference that the kernels are held against.
    with _native.forced("none") if step_way(config, device) == "compiled" else contextlib.nullcontext():
        return _train(config, files, run, device, resume, stop_after, progress)


def _train(
    config: Config,
    files: list[Path],
    run: Path,
    device: torch.device,
    resume: bool,
    stop_after: float | None,
    progress: Callable[[Progress], None] | None,
) -> Trainer:
    settings = config.train
    trainer = Trainer(config, files, run, device)
    try:
        if resume:
            trainer.load(checkpoint.newest(run))
        by_step = settings.schedule_by == "step"
        total = settings.steps if by_step else settings.seconds - settings.reserve_seconds
        limit = total if stop_after is None else min(total, stop_after)
        trainer.warm_up(limit / total)
        if parallel.rank() == 0:
            _forget(run / "metrics.jsonl", trainer.step)
        parallel.barrier()
        with StopSignal() as stop, open(run / "metrics.jsonl", "a") as metrics:
            _loop(trainer, limit, by_step, stop, metrics if parallel.rank() == 0 else None, progress)
        parallel.check_same(trainer.model.parameters(), "weights")
        return trainer
    except OSError as error:
        raise PgolfError(f"cannot write in {run}: {error.strerror}; free space or choose another folder") from error
    except torch.OutOfMemoryError as error:
        raise PgolfError(
            f"a micro-batch of {settings.micro_batch:,} tokens does not fit in the GPU's memory; "
            "use --set train.micro_batch=auto"
        ) from error
    finally:
        trainer.close()


def _loop(
    trainer: Trainer,
    limit: float,
    by_step: bool,
    stop: StopSignal,
    metrics: Any,
    progress: Callable[[Progress], None] | None,
) -> None:
    settings, device = trainer.config.train, trainer.device
    begun = time.perf_counter() - trainer.elapsed
    saved = trainer.elapsed
    window_started, window_tokens = trainer.elapsed, 0
    pending: list[tuple[int, float, torch.Tensor]] = []
    previous: Any = None
    while True:
        trainer.elapsed, stopping = parallel.agree(time.perf_counter() - begun, stop.wanted)
        finished = trainer.step >= settings.steps or (trainer.step if by_step else trainer.elapsed) >= limit
        if finished or stopping:
            _losses(pending, trainer.step)
            _write(metrics, pending)
            path = trainer.save(wait=True)
            if stopping and not finished:
                raise Stopped(f"stopped at step {trainer.step}; saved {path}; go on with --resume")
            return
        if settings.checkpoint_seconds and trainer.elapsed - saved >= settings.checkpoint_seconds:
            _losses(pending, trainer.step)
            _write(metrics, pending)
            trainer.save(wait=False)
            saved = trainer.elapsed
        fraction = trainer.fraction(trainer.elapsed)
        pending.append((trainer.step, trainer.elapsed, trainer.train_step(fraction)))
        window_tokens += settings.step_tokens
        if device.type == "cuda":
            # Run at most one step ahead of the GPU: the wallclock that steers the curves stays true.
            if previous is not None:
                previous.synchronize()
            previous = torch.cuda.Event()
            previous.record()
        trainer.writer.advance()
        if trainer.step % settings.log_every == 0 or trainer.step == 1:
            loss = _losses(pending, trainer.step)
            now = time.perf_counter() - begun
            rate = window_tokens / (now - window_started)
            window_started, window_tokens = now, 0
            _write(metrics, pending)
            if progress:
                flops = flops_per_token(trainer.config.model, trainer.model.looping, trainer.context)
                progress(
                    Progress(
                        trainer.step,
                        trainer.step * settings.step_tokens,
                        loss,
                        trainer.last_lr_scale,
                        trainer.context,
                        trainer.model.looping,
                        rate,
                        rate * flops,
                        now,
                        fraction,
                    )
                )


def _losses(pending: list[tuple[int, float, torch.Tensor]], at: int) -> float:
    """Average the pending losses over ranks in place; their mean. PgolfError when it is not finite."""
    if not pending:
        return 0.0
    losses = torch.stack([value for _, _, value in pending])
    parallel.mean_([losses])
    pending[:] = [(step, begin, value) for (step, begin, _), value in zip(pending, losses, strict=True)]
    loss = float(losses.mean())
    if not math.isfinite(loss):
        raise PgolfError(f"the loss became {loss} at step {at}; lower train.matrix_lr or train.embed_lr")
    return loss


def _forget(path: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl from `step` on: a run that died after its checkpoint makes those steps again."""
    if path.exists():
        kept = []
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                if json.loads(line)["step"] >= step:
                    break
            except (ValueError, KeyError, TypeError):  # cut short
                break
            kept.append(line)
        write_bytes(path, b"".join(kept))


def _write(metrics: Any, pending: list[tuple[int, float, torch.Tensor]]) -> None:
    """One line a step: {"step", "elapsed" (seconds at its start), "loss" (nats)}."""
    if metrics is not None:
        for step, elapsed, loss in pending:
            metrics.write(json.dumps({"step": step, "elapsed": round(elapsed, 4), "loss": float(loss)}) + "\n")
        metrics.flush()
        os.fsync(metrics.fileno())
    pending.clear()
