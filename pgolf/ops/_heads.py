"""Attention heads in memory as their kernels read them: [B, T, heads, d] in 16-byte pieces."""

from torch import Tensor

MAX_DIM = 128  # columns of a head
MAX_HEADS = 1 << 30  # of all tokens together


def aligned(x: Tensor) -> Tensor:
    """x itself where it is contiguous and starts at a multiple of 16 bytes, else a copy that is."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def rows_of(x: Tensor) -> tuple[Tensor, int]:
    """x [B, T, heads, d] and its values from token to token. A copy where a token's heads do not lie side by side, the
    tokens are not evenly apart, or one does not start at a multiple of 16 bytes."""
    batch, length, heads, dim = x.shape
    stride = x.stride(1) if length > 1 else x.stride(0)
    side_by_side = x.stride(3) == 1 and (heads == 1 or x.stride(2) == dim)
    even = batch == 1 or length == 1 or x.stride(0) == length * stride
    if side_by_side and even and (x.data_ptr() | stride * x.itemsize) % 16 == 0:
        return x, stride
    return aligned(x), heads * dim
