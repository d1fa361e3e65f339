"""`make sanitize`: every operator's kernels, all builds, once under each tool of NVIDIA's compute-sanitizer.

Exit code: 0 no tool found an error, 1 one did, 2 it cannot run (no compute-sanitizer, no GPU, no kernels built).
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from pgolf.ops import _native

ROOT = Path(__file__).resolve().parents[1]
# Forward and backward on two small inputs an operator, build and type, and no reference on the GPU: the largest inputs
# take minutes under the tools and reach no line that the small ones do not.
TESTS = ["tests/test_ops.py", "-m", "gpu", "-k"]
CHOSEN = {
    "memcheck": "test_kernel_once",
    "racecheck": "test_kernel_once",
    # Not cross_entropy: a kernel of its backward reads what cuBLAS wrote through the tensor memory accelerator, and
    # initcheck takes memory written so for uninitialized. token_losses runs the kernels of its forward.
    "initcheck": "test_kernel_once and not cross_entropy",
    "synccheck": "test_kernel_once",
}
# CUDA 13.0's racecheck ends so in kernels with clusters and tensor memory copies: ours for sm_90 and some of cuBLAS's.
# Ours are left to memcheck, synccheck and the tests that compare their bits from run to run.
TOOL_FAILED = "Internal Sanitizer Error: The Sanitizer failed to handle a hardware exception"
SECONDS = 600  # a case normally takes ten; more means that something hangs
PROCESSES = 8  # side by side, where there are as many cores: most of a case is starting Python and CUDA
# torch's caching allocator would hide an access beyond a tensor inside its larger blocks.
ENVIRONMENT = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def missing() -> str:
    """What is missing to run, or nothing."""
    if shutil.which("compute-sanitizer") is None:
        return "compute-sanitizer is not on PATH; it comes with the CUDA toolkit"
    if not torch.cuda.is_available():
        return "no CUDA GPU"
    return _native.why_not(torch.device("cuda", 0))


def _run(command: list[str]) -> tuple[int, str]:
    """Exit code (-1: no end in time) and all that was printed."""
    try:
        ran = subprocess.run(
            command, cwd=ROOT, env=ENVIRONMENT, check=False, timeout=SECONDS,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return -1, f"no end after {SECONDS} s"
    return ran.returncode, ran.stdout


def _pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]


def cases(chosen: str) -> list[str]:
    """The tests, as pytest names them, that its expression `chosen` selects."""
    code, output = _run(_pytest("--collect-only", *TESTS, chosen))
    found = [line for line in output.splitlines() if line.startswith(TESTS[0] + "::")]
    if code != 0 or not found:
        raise SystemExit(f"sanitize: no test chosen by {chosen!r}:\n{output}")
    return found


def in_our_kernels(output: str) -> list[str]:
    """The places in our kernels that compute-sanitizer's output accuses."""
    return [line for line in output.splitlines() if re.match(r"=+\s+at .*(pgolf::|csrc/kernels/)", line)]


def watch(tool: str, case: str) -> tuple[str, str]:
    """("clean", "accused" or "not watched", what was printed) of one case under `tool`."""
    # initcheck has to see the kernels that wrote what ours read, torch's; the other tools look at ours alone.
    watched = [] if tool == "initcheck" else ["--kernel-name", "kns=pgolf", "--error-exitcode", "9"]
    code, output = _run(["compute-sanitizer", "--tool", tool, *watched, *_pytest(case)])
    if in_our_kernels(output):
        return "accused", output
    if code and TOOL_FAILED in output:
        return "not watched", output
    return "accused" if code else "clean", output


def passes(tool: str) -> bool:
    """Whether `tool` finds nothing in any case; what it finds is printed, and which cases it could not watch."""
    chosen = cases(CHOSEN[tool])
    with ThreadPoolExecutor(min(PROCESSES, os.cpu_count() or 1)) as pool:
        verdicts = list(pool.map(lambda case: watch(tool, case), chosen))
    for case, (verdict, output) in zip(chosen, verdicts, strict=True):
        if verdict != "clean":
            print(f"-- {verdict}: {case}" + (f"\n{output}" if verdict == "accused" else ""))
    counts = {key: sum(verdict == key for verdict, _ in verdicts) for key in ("clean", "accused", "not watched")}
    print(f"{tool}: {len(chosen)} cases: " + ", ".join(f"{n} {key}" for key, n in counts.items()), flush=True)
    return counts["accused"] == 0 and counts["clean"] > 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tools", nargs="*", metavar="TOOL", help=f"of {', '.join(CHOSEN)} (default: all)")
    tools = parser.parse_args().tools or list(CHOSEN)
    if unknown := set(tools) - set(CHOSEN):
        parser.error(f"no such tool: {', '.join(sorted(unknown))}; there are {', '.join(CHOSEN)}")
    if reason := missing():
        print(f"sanitize: {reason}", file=sys.stderr)
        return 2
    failed = [tool for tool in tools if not passes(tool)]
    print(f"sanitize: {', '.join(failed)} failed" if failed else f"sanitize: {', '.join(tools)} found nothing")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
