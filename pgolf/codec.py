"""Arrays to bytes and back, without loss: the entropy coder behind `model.pgolf` (recipe section 4).

Quantized weights are close to Gaussian given their row scale, so an entry is predicted from the earlier entries of its
row and coded with adaptive binary models and an arithmetic coder (`csrc/codec`). It computes in integers only: the same
arrays give the same bytes on every machine and with any number of threads.

The coder notices matrices whose columns all obey one of the trellises of trellis-coded quantization
(`csrc/codec/trellis.h`): an entry's parity is then known from the entries above it and costs nothing.
"""

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pgolf import _codec
from pgolf.errors import PgolfError

# (h0, h1) by number of states, octal: the trellises of `csrc/codec/trellis.h`.
TRELLISES = {4: (0o5, 0o2), 8: (0o13, 0o4), 32: (0o45, 0o10), 64: (0o103, 0o24), 256: (0o515, 0o362)}

PART_ENTRIES = 1 << 21  # of a matrix, at most in one stream
MOST_ENTRIES_PER_BYTE = 8192  # as `csrc/codec/matrix.h`

Matrix = NDArray[np.int8]
Shape = tuple[int, int]


class CodecError(PgolfError):
    """A coded stream that no encoder wrote, or arrays that cannot be coded."""


def encode_groups(groups: Sequence[Sequence[Matrix]], threads: int | None = None) -> list[bytes]:
    """Code each group of int8 matrices ([rows, columns], any values, any shapes) to one byte string.

    Consecutive matrices of equal shape share what was learned on the first ones: put like beside like. They also share
    a trellis: beside a matrix that disobeys it, parities cost about a bit an entry.
    `threads` (default: all cores) changes the time taken and nothing else.
    """
    return [coded for coded, _ in _encode(groups, threads)]


def sizes(groups: Sequence[Sequence[Matrix]], threads: int | None = None) -> list[list[int]]:
    """Bytes that each matrix takes of its group's `encode_groups`: they add up to it, each is right to some bytes."""
    return [parts for _, parts in _encode(groups, threads)]


def _encode(groups: Sequence[Sequence[Matrix]], threads: int | None) -> list[tuple[bytes, list[int]]]:
    for matrix in (matrix for group in groups for matrix in group):
        if matrix.dtype != np.int8 or matrix.ndim != 2:
            raise CodecError(f"a matrix to code must be int8 with 2 dimensions, got {matrix.dtype} {matrix.shape}")
    pieces = [
        [np.ascontiguousarray(matrix[:, part]) for matrix in group for part in _parts(matrix.shape)] for group in groups
    ]
    coded = _codec.encode_groups(pieces, _threads(threads))
    return [
        (data, _whole(sizes, [matrix.shape for matrix in group]))
        for group, (data, sizes) in zip(groups, coded, strict=True)
    ]


def _parts(shape: Shape) -> list[slice]:
    """The columns of a matrix in parts of equal width, few entries each: the decoder's longest job is one part.

    Columns, because a trellis runs down them. It costs up to 1 % of an embedding: like rows are found less surely.
    """
    rows, columns = shape
    count = max(1, min(columns, -(-rows * columns // PART_ENTRIES)))
    edges = [columns * i // count for i in range(count + 1)]
    return [slice(begin, end) for begin, end in zip(edges, edges[1:], strict=False)]


def _whole(sizes: Sequence[int], shapes: Sequence[Shape]) -> list[int]:
    """Bytes of each matrix, from those of its parts."""
    rest = iter(sizes)
    return [sum(next(rest) for _ in _parts(shape)) for shape in shapes]


def decode_groups(groups: Sequence[tuple[bytes, Sequence[Shape]]], threads: int | None = None) -> list[list[Matrix]]:
    """Inverse of `encode_groups` from (bytes, shapes) pairs; CodecError on bytes it did not write.

    Memory and time are bounded by the bytes given: shapes that the bytes cannot fill are refused before allocating.
    """
    return [matrices for matrices, _ in decode_and_measure(groups, threads)]


def matrix_sizes(coded: bytes, shapes: Sequence[Shape], threads: int | None = None) -> list[int]:
    """`sizes` of one group from its coded bytes, which this decodes; CodecError as `decode_groups`."""
    return decode_and_measure([(coded, shapes)], threads)[0][1]


def decode_and_measure(
    groups: Sequence[tuple[bytes, Sequence[Shape]]], threads: int | None = None
) -> list[tuple[list[Matrix], list[int]]]:
    """`decode_groups` and `matrix_sizes` at once, a pair for each group."""
    for coded, shapes in groups:
        for rows, columns in shapes:
            if not (0 <= rows < 2**31 and 0 <= columns < 2**31):
                raise CodecError(f"a matrix cannot have the shape {rows} x {columns}")
            if rows * columns // MOST_ENTRIES_PER_BYTE > len(coded):
                raise CodecError("coded stream is too short for its matrices; the data is damaged")
    pieces = [
        (coded, [(shape[0], part.stop - part.start) for shape in shapes for part in _parts(shape)])
        for coded, shapes in groups
    ]
    try:
        found = _codec.decode_groups(pieces, _threads(threads))
    except ValueError as error:
        raise CodecError(f"{error}; the data is damaged") from error
    result = []
    for (_, shapes), (parts, sizes) in zip(groups, found, strict=True):
        rest = iter(parts)
        matrices = [[next(rest) for _ in _parts(shape)] for shape in shapes]
        whole = [one[0] if len(one) == 1 else np.concatenate(one, axis=1) for one in matrices]
        result.append((whole, _whole(sizes, shapes)))
    return result


def encode_matrices(matrices: Sequence[Matrix], threads: int | None = None) -> bytes:
    """Code one group of int8 matrices; see `encode_groups`."""
    return encode_groups([matrices], threads)[0]


def decode_matrices(coded: bytes, shapes: Sequence[Shape], threads: int | None = None) -> list[Matrix]:
    """Inverse of `encode_matrices`; see `decode_groups`."""
    return decode_groups([(coded, shapes)], threads)[0]


def encode_bytes(data: bytes) -> bytes:
    """Code general bytes (small tensors, text) with a context-mixing model."""
    return _codec.encode_bytes(data)


def decode_bytes(coded: bytes, size: int) -> bytes:
    """Inverse of `encode_bytes` for `size` bytes; CodecError on bytes it did not write."""
    if not 0 <= size < 2**62:
        raise CodecError(f"cannot decode {size} bytes")
    try:
        return _codec.decode_bytes(coded, size)
    except ValueError as error:
        raise CodecError(f"{error}; the data is damaged") from error


def _threads(threads: int | None) -> int:
    if threads is not None and threads < 1:
        raise CodecError(f"threads must be at least 1, got {threads}")
    return threads or os.cpu_count() or 1
