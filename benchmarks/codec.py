"""Sizes and seconds of the coder beside general compressors, on a trained model's integers.

    python benchmarks/codec.py --data DIR

DIR holds `ints.npz`: int8 matrices `tok_emb.weight.q` and `blocks.N.ROLE.weight.q`. The others get each group as the
published record did, its matrices joined along their rows and transposed; lrzip runs where it is installed. Seconds are
of all groups: ours share the threads, as in an artifact; lrzip has as many for each group in turn. The last line is
`ratio R`: our bytes over the 15,866,921 of the record's compressor (lrzip, with its row permutations) on the integers
of one trained model.
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
from typing import NamedTuple

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


class Outcome(NamedTuple):
    """Bytes, and seconds of each direction."""

    size: int
    encode: float
    decode: float


def clocked(encode: Callable[[bytes], bytes], decode: Callable[[bytes], bytes]) -> Callable[[bytes], Outcome]:
    """A compressor of bytes in memory, both ways; exits if it loses anything."""

    def run(data: bytes) -> Outcome:
        start = time.perf_counter()
        coded = encode(data)
        middle = time.perf_counter()
        decoded = decode(coded)
        end = time.perf_counter()
        if decoded != data:
            sys.exit("a compressor did not give back what it got")
        return Outcome(len(coded), middle - start, end - middle)

    return run


def lrzip(data: bytes, threads: int, *options: str) -> bytes:
    """What lrzip makes of `data`; it works on files."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.lrz", Path(folder) / "out"
        source.write_bytes(data)
        command = ["lrzip", "-q", "-p", str(threads), *options, "-o", str(target), str(source)]
        subprocess.run(command, check=True, capture_output=True)
        return target.read_bytes()


def compressors(threads: int) -> dict[str, Callable[[bytes], Outcome]]:
    """Those that are installed."""
    found: dict[str, Callable[[bytes], Outcome]] = {}
    if shutil.which("lrzip"):
        found["lrzip -z"] = clocked(
            lambda data: lrzip(data, threads, "-z", "-L", "9", "-T"), lambda coded: lrzip(coded, threads, "-d")
        )
    preset = 9 | lzma.PRESET_EXTREME
    found["xz -9e"] = clocked(lambda data: lzma.compress(data, preset=preset), lzma.decompress)
    if importlib.util.find_spec("brotli"):
        import brotli

        found["brotli 11"] = clocked(lambda data: brotli.compress(data, quality=11), brotli.decompress)
    if importlib.util.find_spec("zstandard"):
        import zstandard

        best = zstandard.ZstdCompressor(level=22)
        found["zstd 22"] = clocked(best.compress, zstandard.ZstdDecompressor().decompress)
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
    print(f"{'group':<12}" + "".join(f"{column:>13}" for column in ("entries", "pgolf", *others, "order 0")))
    totals = [0] * (3 + len(others))
    groups = read_groups(options.data)
    start = time.perf_counter()
    coded = codec.encode_groups(list(groups.values()), options.threads)
    middle = time.perf_counter()
    shapes = [[matrix.shape for matrix in matrices] for matrices in groups.values()]
    decoded = codec.decode_groups(list(zip(coded, shapes, strict=True)), options.threads)
    end = time.perf_counter()
    seconds = [[middle - start, *(0.0 for _ in others)], [end - middle, *(0.0 for _ in others)]]  # encoding, decoding
    for (role, matrices), ours, ours_decoded in zip(groups.items(), coded, decoded, strict=True):
        if any(not np.array_equal(got, wanted) for got, wanted in zip(ours_decoded, matrices, strict=True)):
            sys.exit(f"{role} did not come back as it was")
        data = transposed(matrices)
        outcomes = [run(data) for run in others.values()]
        row = [len(data), len(ours), *(outcome.size for outcome in outcomes), order0_bytes(matrices)]
        print_row(role, row)
        totals = [total + value for total, value in zip(totals, row, strict=True)]
        for place, outcome in enumerate(outcomes, 1):
            seconds[0][place] += outcome.encode
            seconds[1][place] += outcome.decode
    print_row("sum", totals)
    for name, values in zip(("encode, s", "decode, s"), seconds, strict=True):
        print(f"{name:<25}" + "".join(f"{value:>13.2f}" for value in values))
    print(f"ratio {totals[1] / RECORD_BYTES:.5f}")


def print_row(name: str, values: list[int]) -> None:
    print(f"{name:<12}" + "".join(f"{value:>13,}" for value in values), flush=True)


if __name__ == "__main__":
    main()
