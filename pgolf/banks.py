"""Weight banks <-> one matrix per layer and role.

Training keeps equal shapes in one bank (Muon updates a bank as a batch); quantization and artifacts name each matrix.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from pgolf.errors import PgolfError

# A bank holds, for each role in turn, that role's matrix of every layer: qo_bank[i] is the query of layer i,
# qo_bank[L + i] its attention output.
BANKS: dict[str, tuple[str, ...]] = {
    "qo_bank": ("attn.c_q", "attn.proj"),
    "kv_bank": ("attn.c_k", "attn.c_v"),
    "mlp_up_bank": ("mlp.fc",),
    "mlp_down_bank": ("mlp.proj",),
}


def slice_names(bank: str, num_layers: int) -> list[str]:
    """The matrix in each slice of `bank`, in order."""
    return [f"blocks.{i}.{role}.weight" for role in BANKS[bank] for i in range(num_layers)]


def unbank(state: Mapping[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Replace each bank [n, out, in] by views of its matrices [out, in]; everything else passes unchanged.

    Raises PgolfError when a bank has not one slice per layer and role.
    """
    flat: dict[str, Tensor] = {}
    for name, value in state.items():
        if name not in BANKS:
            flat[name] = value
            continue
        names = slice_names(name, num_layers)
        if value.ndim != 3 or value.shape[0] != len(names):
            raise PgolfError(f"{name} must hold {len(names)} matrices for {num_layers} layers, got {list(value.shape)}")
        flat.update(zip(names, value.unbind(0), strict=True))
    return flat


def bank(state: Mapping[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Inverse of `unbank`: stack the matrices into new banks; everything else passes unchanged.

    Raises PgolfError naming a matrix that is missing or whose shape differs from the rest of its bank.
    """
    rest = dict(state)
    banks: dict[str, Tensor] = {}
    for name in BANKS:
        matrices: list[Tensor] = []
        for part in slice_names(name, num_layers):
            if part not in rest:
                raise PgolfError(f"{part} is missing from the weights of a model of {num_layers} layers")
            matrices.append(rest.pop(part))
            if matrices[-1].shape != matrices[0].shape:
                expected, got = list(matrices[0].shape), list(matrices[-1].shape)
                raise PgolfError(f"{part} must have the shape {expected} of its bank, got {got}")
        banks[name] = torch.stack(matrices)
    return banks | rest
