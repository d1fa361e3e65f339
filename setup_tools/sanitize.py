"""`make sanitize`: every operator's kernels, all builds, once under each tool of NVIDIA's compute-sanitizer.

Exit code: 0 no tool found an error, 1 one did, 2 it cannot run (no compute-sanitizer, no GPU, no kernels built).
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from pgolf.ops import _native

ROOT = Path(__file__).resolve().parents[1]
# Forward and backward on two small inputs an operator, build and type, and no reference on the GPU: the largest inputs
# take minutes under the tools and reach no line that the small ones do not.
TESTS = ("tests/test_ops.py", "-m", "gpu", "-k")
CHOSEN = {
    "memcheck": "test_kernel_once",
    # Not sm90/: CUDA 13.0's racecheck aborts there ("failed to handle a hardware exception"). Those kernels are left to
    # memcheck and to the tests that compare their bits from run to run.
    "racecheck": "test_kernel_once and not sm90",
    "initcheck": "test_kernel_once",
    "synccheck": "test_kernel_once",
}
SECONDS = 600  # a tool normally takes one minute; more means that something hangs


def missing() -> str:
    """What is missing to run, or nothing."""
    if shutil.which("compute-sanitizer") is None:
        return "compute-sanitizer is not on PATH; it comes with the CUDA toolkit"
    if not torch.cuda.is_available():
        return "no CUDA GPU"
    return _native.why_not(torch.device("cuda", 0))


def command(tool: str) -> list[str]:
    """What runs the tests under `tool`."""
    # initcheck has to see the kernels that wrote what ours read, torch's; the other tools look at ours alone.
    watched = [] if tool == "initcheck" else ["--kernel-regex", "kns=pgolf", "--error-exitcode", "9"]
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS, CHOSEN[tool]]
    return ["compute-sanitizer", "--tool", tool, *watched, *pytest]


def in_our_kernels(output: str) -> list[str]:
    """The places in our kernels that compute-sanitizer's output accuses."""
    return [line for line in output.splitlines() if re.match(r"=+\s+at .*(pgolf::|csrc/kernels/)", line)]


def passes(tool: str) -> bool:
    """Whether `tool` finds nothing; its output is printed."""
    # torch's caching allocator would hide an access beyond a tensor inside its larger blocks.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        ran = subprocess.run(
            command(tool), cwd=ROOT, env=environment, check=False, timeout=SECONDS,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        print(f"no end after {SECONDS} s")
        return False
    accused = in_our_kernels(ran.stdout)
    lines = ran.stdout.splitlines()
    print("\n".join(lines if ran.returncode or accused else lines[-3:]), flush=True)
    return ran.returncode == 0 and not accused


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tools", nargs="*", metavar="TOOL", help=f"of {', '.join(CHOSEN)} (default: all)")
    tools = parser.parse_args().tools or list(CHOSEN)
    if unknown := set(tools) - set(CHOSEN):
        parser.error(f"no such tool: {', '.join(sorted(unknown))}; there are {', '.join(CHOSEN)}")
    if reason := missing():
        print(f"sanitize: {reason}", file=sys.stderr)
        return 2
    failed = []
    for tool in tools:
        print(f"== {tool}", flush=True)
        if not passes(tool):
            failed.append(tool)
    print(f"sanitize: {', '.join(failed)} failed" if failed else f"sanitize: {', '.join(tools)} found nothing")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
