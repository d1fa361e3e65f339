"""pgolf: train, quantize, pack, adapt and score small language models by the rules of Parameter Golf."""

__version__ = "0.1.0"
