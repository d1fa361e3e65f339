"""Muon for the banks, AdamW for the rest, an average of all weights (recipe section 3)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from pgolf import parallel
from pgolf.config import TrainConfig
from pgolf.model import GPT
from pgolf.ops.polar_express import orthogonalize, polar_express

__all__ = ["Optimizer", "muon_update", "orthogonalize"]


def muon_update(weight: Tensor, grad: Tensor, momentum: Tensor, lr: float, mu: float, weight_decay: float) -> None:
    """One Muon step in place on float32 weight [n, rows, cols]; momentum is a bfloat16 buffer of that shape."""
    direction = polar_express(grad, momentum, mu)
    scale = max(1.0, weight.shape[-2] / weight.shape[-1]) ** 0.5
    weight.mul_(1 - lr * weight_decay).sub_(direction, alpha=lr * scale)


class Optimizer:
    """Everything that changes the weights: reduction over ranks, clipping, Muon, AdamW, and the average.

    Muon's work is shared: a rank receives the averaged gradients of its slices of each bank, updates them, and all
    ranks gather the result. AdamW's parameters are few and updated by every rank alike.
    """

    BANKS = ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank")

    def __init__(self, model: GPT, config: TrainConfig) -> None:
        self.config = config
        named = dict(model.named_parameters())
        self.banks = {name: named.pop(name) for name in self.BANKS}
        self.momentum = {
            name: torch.zeros_like(parallel.cut(bank.data), dtype=torch.bfloat16) for name, bank in self.banks.items()
        }
        self.rest = named
        self.average = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.parameters = dict(model.named_parameters())
        embedding = named["tok_emb.weight"]
        # The evaluation softcaps take no part in the training loss: no gradient, so AdamW leaves them alone.
        scalars = [p for p in named.values() if p is not embedding]
        self.adam = torch.optim.AdamW(
            [
                {"params": [embedding], "base_lr": config.embed_lr, "weight_decay": config.embed_weight_decay},
                {"params": scalars, "base_lr": config.scalar_lr, "weight_decay": config.scalar_weight_decay},
            ],
            lr=config.embed_lr,
            betas=(config.beta1, config.beta2),
            eps=config.adam_eps,
            fused=embedding.is_cuda,
        )

    @torch.no_grad()
    def step(self, lr_scale: float, mu: float) -> None:
        """Reduce, clip and apply the accumulated gradients, then drop them."""
        config = self.config
        rest = [p.grad for p in self.rest.values() if p.grad is not None]
        banks = [bank.grad for bank in self.banks.values() if bank.grad is not None]
        if config.clip_scope == "rank":
            self._clip([*banks, *rest], self._square_norms(banks, rest))
        # In the order of one communicator. The small mean goes first: it travels while the banks are padded.
        mean = parallel.start_mean(rest)
        pending = {
            name: parallel.start_scatter_mean(bank.grad if bank.grad is not None else torch.zeros_like(bank))
            for name, bank in self.banks.items()
        }
        shares: dict[str, Tensor] = {}
        if config.clip_scope == "global":  # the norm of all is wanted before anything moves
            shares = {name: wait() for name, wait in pending.items()}
            mean()
            self._clip([*shares.values(), *rest], self._square_norms(list(shares.values()), rest, sharded=True))
        gathered = []
        for name, bank in self.banks.items():  # those already updated travel back meanwhile
            share = shares[name] if shares else pending[name]()
            weight = parallel.cut(bank.data)
            decay = config.muon_weight_decay
            muon_update(weight, share, self.momentum[name], config.matrix_lr * lr_scale, mu, decay)
            if weight is not bank.data:
                gathered.append((bank, parallel.start_gather(weight, len(bank))))
        for group in self.adam.param_groups:
            group["lr"] = group["base_lr"] * lr_scale
        if config.clip_scope == "rank":
            mean()
        self.adam.step()
        for bank, wait in gathered:
            bank.data.copy_(wait())
        self._drop_gradients()

    def _drop_gradients(self) -> None:
        """Set gradients to zero where they are: captured graphs add to these very tensors."""
        if grads := [p.grad for p in self.parameters.values() if p.grad is not None]:
            torch._foreach_zero_(grads)

    def _square_norms(self, banks: list[Tensor], rest: list[Tensor], sharded: bool = False) -> Tensor:
        """Sum of squares of all gradients. Summed slice by slice, so that the number of ranks cannot change it."""
        slices = [bank.square().flatten(1).sum(1) for bank in banks]
        if sharded:
            counts = [len(bank) for bank in self.banks.values()]
            slices = [parallel.gather(part, count) for part, count in zip(slices, counts, strict=True)]
        return torch.cat([*slices, *(grad.square().sum()[None] for grad in rest)]).sum()

    def _clip(self, grads: list[Tensor], square_norm: Tensor) -> None:
        if self.config.grad_clip > 0:
            factor = (self.config.grad_clip / (square_norm.sqrt() + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(grads, factor)

    @torch.no_grad()
    def update_average(self) -> None:
        """Move the averaged weights towards the current ones."""
        current = [p.detach() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.average.values()), current, 1 - self.config.ema_decay)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of all state that a checkpoint keeps; momentum is gathered from all ranks."""
        yield from ((f"model.{name}", p.detach()) for name, p in self.parameters.items())
        yield from ((f"average.{name}", value) for name, value in self.average.items())
        for name, share in self.momentum.items():
            yield f"momentum.{name}", parallel.gather(share, len(self.banks[name]))
        for name, parameter in self.rest.items():
            for key, value in self.adam.state.get(parameter, {}).items():
                yield f"adam.{key}.{name}", torch.as_tensor(value)

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` wrote, for any number of ranks; AdamW state not listed is cleared."""
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"model.{name}"])
            self.average[name].copy_(tensors[f"average.{name}"])
        self._drop_gradients()
        for name, share in self.momentum.items():
            share.copy_(parallel.cut(tensors[f"momentum.{name}"]).to(share.device))
        self.adam.state.clear()
        for name, parameter in self.rest.items():
            state = {}
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = tensors.get(f"adam.{key}.{name}")
                if value is not None:
                    fused_step = key != "step" or parameter.is_cuda
                    state[key] = value.clone().to(parameter.device if fused_step else "cpu")
            if state:
                self.adam.state[parameter] = state
