"""AWQ-lite: find the column groups whose rounding would hurt most; GPTQ then keeps them at more bits.

Paper: AWQ, arXiv:2306.00978. It rescales salient channels; the recipe (section 4) widens their integers instead.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


def saliency(weight: Tensor, act_rms: Tensor, size: int) -> Tensor:
    """[cols // size]: for each group of `size` columns, the sum of act_rms * mean|w|.

    `weight` is [rows, cols]; `act_rms` [cols] is the root mean square of each input. Groups start at multiples of
    `size`; a remainder narrower than a group is never chosen.
    """
    column = act_rms.to(weight.device).float() * weight.float().abs().mean(dim=0)
    whole = column.numel() // size * size
    return column[:whole].reshape(-1, size).sum(dim=1)


def salient_groups(
    weights: Mapping[str, Tensor], act_rms: Mapping[str, Tensor], count: int, size: int
) -> dict[str, list[tuple[int, int]]]:
    """The `count` most salient groups over all matrices: name -> [(first column, size), ...], ascending.

    Equal scores go to the earlier matrix, then to the earlier group. A matrix without a chosen group is left out.
    """
    if count <= 0:
        return {}
    scores = {name: saliency(weight, act_rms[name], size).cpu() for name, weight in weights.items()}
    places = [(name, group * size) for name, score in scores.items() for group in range(score.numel())]
    if not places:
        return {}
    best = torch.cat(list(scores.values())).argsort(descending=True, stable=True)[:count]
    chosen: dict[str, list[tuple[int, int]]] = {}
    for index in sorted(best.tolist()):
        name, start = places[index]
        chosen.setdefault(name, []).append((start, size))
    return chosen
