"""Muon's direction as torch.compile makes it of plain PyTorch."""

import torch

from pgolf.testing.operator import Function


def compiled(reference: Function) -> Function:
    """`reference` compiled for the shapes it meets."""
    function: Function = torch.compile(reference, fullgraph=True, dynamic=False)
    return function
