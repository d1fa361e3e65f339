"""From the arrays of an artifact to the weights of the model (recipe section 4). Inverse of pgolf.quantize."""

import numpy as np
from numpy.typing import NDArray

from pgolf.errors import PgolfError

State = dict[str, NDArray]
Weights = NDArray[np.float32]

# Suffixes that belong to the quantized form of one weight; everything else passes through.
_PARTS = "scale step awqg_start awqg_size awqg_s_hi lqA_a lqAs_a lqB_a lqBs_a lqA lqAs lqB lqBs gs".split()


def dequantize(state: State) -> dict[str, Weights]:
    """Float32 weights by name, from the flat arrays that `artifact.load` gives.

    A weight NAME is an array NAME; or `NAME.q` int8 [out, in] with `NAME.scale` [out] and, optionally, column
    factors 2^(step / 8), `NAME.step` int8 [in], protected column groups (`.awqg_*`) and a low-rank correction (`.lqA*`,
    `.lqB*`); or a gate `NAME.gq` with `NAME.gs`.
    Raises PgolfError naming the array that is missing or does not fit.
    """
    result: dict[str, Weights] = {}
    for key, array in state.items():
        name, _, suffix = key.rpartition(".")
        if suffix == "q":
            result[name] = _matrix(state, name)
        elif suffix == "gq":
            result[name] = _f32(array) * _part(state, name, "gs", (array.shape[0],))[:, None]
        elif suffix in _PARTS and (f"{name}.q" in state or f"{name}.gq" in state):
            continue
        else:
            result[key] = _f32(array)
    return result


def column_factor(step: NDArray) -> Weights:
    """float32: 2^(step / 8)."""
    return np.exp2(step.astype(np.float64) / 8).astype(np.float32)


def _matrix(state: State, name: str) -> Weights:
    q = _f32(state[f"{name}.q"])
    if q.ndim != 2:
        raise PgolfError(f"{name}.q must have 2 dimensions, got {q.shape}")
    rows, columns = q.shape
    weights = q * _part(state, name, "scale", (rows,))[:, None]
    if f"{name}.step" in state:
        weights *= column_factor(_part(state, name, "step", (columns,)))
    if f"{name}.awqg_start" in state:
        starts = _part(state, name, "awqg_start").astype(np.int64).reshape(-1)
        size = int(_part(state, name, "awqg_size", ()))
        scales = _part(state, name, "awqg_s_hi").reshape(-1, rows)
        if len(scales) != len(starts) or any(not 0 <= start <= columns - size for start in starts):
            raise PgolfError(f"{name}: protected column groups do not fit {rows} x {columns}")
        for start, scale in zip(starts, scales, strict=True):
            group = slice(start, start + size)
            weights[:, group] = q[:, group] * scale[:, None]
    return weights + _correction(state, name, rows, columns)


def _correction(state: State, name: str, rows: int, columns: int) -> Weights | float:
    """The low-rank correction A B; 0 when the matrix has none."""
    if f"{name}.lqA_a" in state:
        a = _part(state, name, "lqA_a") * _part(state, name, "lqAs_a", ())
        b = _part(state, name, "lqB_a")
        scales = _part(state, name, "lqBs_a").reshape(-1)
        if scales.size == 0 or b.size % scales.size:
            raise PgolfError(f"{name}.lqB_a: {b.size} entries do not divide into {scales.size} groups")
        b = (b.reshape(scales.size, -1) * scales[:, None]).reshape(b.shape)
    elif f"{name}.lqA" in state:
        a = _part(state, name, "lqA")
        b = _part(state, name, "lqB")
        a = a * _part(state, name, "lqAs", (rows,))[:, None]
        b = b * _part(state, name, "lqBs", b.shape[:1])[:, None]
    else:
        return 0.0
    if a.ndim != 2 or b.ndim != 2 or (a.shape[0], b.shape[1]) != (rows, columns) or a.shape[1] != b.shape[0]:
        raise PgolfError(f"{name}: a correction of {a.shape} x {b.shape} does not fit {rows} x {columns}")
    return np.asarray(a @ b, np.float32)


def _part(state: State, name: str, suffix: str, shape: tuple[int, ...] | None = None) -> Weights:
    try:
        part = _f32(state[f"{name}.{suffix}"])
    except KeyError as error:
        raise PgolfError(f"{name}.{suffix} is missing beside {name}") from error
    if shape is not None and part.shape != shape:
        raise PgolfError(f"{name}.{suffix} must have the shape {shape}, got {part.shape}")
    return part


def _f32(array: NDArray) -> Weights:
    return array.astype(np.float32)
