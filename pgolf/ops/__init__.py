"""Operators: one file each, a plain PyTorch reference beside every compiled build. Tensors only, never configs."""
