"""Sizes and seconds of the coder beside general compressors, on a trained model's integers.

    python benchmarks/codec.py --data DIR

DIR holds `ints.npz`: int8 matrices `tok_emb.weight.q` and `blocks.N.ROLE.weight.q`. The others get each group as the
published record did, its matrices joined along their rows and transposed; lrzip runs where it is installed. The last
line is `ratio R`: our bytes over the 15,866,921 of the record's compressor (lrzip, with its row permutations) on the
integers of one trained model.
"""

import argparse
import importlib.util
import lzma
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pgolf import codec

RECORD_BYTES = 15_866_921


def read_groups(folder: Path) -> dict[str, list[np.ndarray]]:
    """Matrices by role, layers in order."""
    layers: dict[str, list[tuple[int, np.ndarray]]] = {}
    with np.load(folder / "ints.npz", allow_pickle=False) as arrays:
        for name in arrays.files:
            match = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+?)(?:\.weight)?\.q", name)
            if match:
                layers.setdefault(match[2], []).append((int(match[1] or 0), arrays[name]))
    return {role: [matrix for _, matrix in sorted(found, key=lambda item: item[0])] for role, found in layers.items()}


def transposed(matrices: list[np.ndarray]) -> bytes:
    """What a general compressor gets of a group."""
    return np.concatenate(matrices).T.tobytes()


def order0_bytes(matrices: list[np.ndarray]) -> int:
    """Bytes by the empirical entropy of single entries, the table of frequencies not counted."""
    counts = np.bincount(np.concatenate([matrix.reshape(-1) for matrix in matrices]).view(np.uint8))
    counts = counts[counts > 0]
    return round(float(-(counts * np.log2(counts / counts.sum())).sum()) / 8)


def lrzip_bytes(data: bytes, threads: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "group", Path(folder) / "group.lrz"
        source.write_bytes(data)
        command = ["lrzip", "-q", "-z", "-L", "9", "-T", "-p", str(threads), "-o", str(target), str(source)]
        subprocess.run(command, check=True, capture_output=True)
        return target.stat().st_size


def compressors(threads: int) -> dict[str, Callable[[bytes], int]]:
    found: dict[str, Callable[[bytes], int]] = {}
    if shutil.which("lrzip"):
        found["lrzip -z"] = lambda data: lrzip_bytes(data, threads)
    found["xz -9e"] = lambda data: len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
    if importlib.util.find_spec("brotli"):
        import brotli

        found["brotli 11"] = lambda data: len(brotli.compress(data, quality=11))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of ints.npz")
    parser.add_argument("--threads", type=int, default=1, help="threads of our coder and of lrzip")
    parser.add_argument("--only-ours", action="store_true", help="skip the other compressors (they take minutes)")
    options = parser.parse_args()
    if not (options.data / "ints.npz").is_file():
        sys.exit(f"{options.data / 'ints.npz'} is not there; give --data the folder that holds it")
    others = {} if options.only_ours else compressors(options.threads)
    columns = ["entries", "pgolf", *others, "order 0", "encode s", "decode s"]
    print(f"{'group':<12}" + "".join(f"{column:>13}" for column in columns))
    totals = [0.0] * len(columns)
    for role, matrices in read_groups(options.data).items():
        start = time.perf_counter()
        coded = codec.encode_matrices(matrices, options.threads)
        middle = time.perf_counter()
        decoded = codec.decode_matrices(coded, [matrix.shape for matrix in matrices], options.threads)
        end = time.perf_counter()
        if any(not np.array_equal(got, wanted) for got, wanted in zip(decoded, matrices, strict=True)):
            sys.exit(f"{role} did not come back as it was")
        sizes = [sum(matrix.size for matrix in matrices), len(coded)]
        sizes += [size(transposed(matrices)) for size in others.values()]
        row = [*sizes, order0_bytes(matrices), middle - start, end - middle]
        print_row(role, row)
        totals = [total + value for total, value in zip(totals, row, strict=True)]
    print_row("sum", totals)
    print(f"ratio {totals[1] / RECORD_BYTES:.5f}")


def print_row(name: str, values: list[float]) -> None:
    cells = [f"{value:>13,.0f}" for value in values[:-2]] + [f"{value:>13.2f}" for value in values[-2:]]
    print(f"{name:<12}" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
