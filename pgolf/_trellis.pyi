import numpy as np
from numpy.typing import NDArray

def quantize(
    weight: NDArray[np.float32],
    upper: NDArray[np.float32],
    row_step: NDArray[np.float32],
    row_variance: NDArray[np.float32],
    column_factor: NDArray[np.float32],
    states: int,
    rate: float,
    block: int,
) -> NDArray[np.int8]: ...
