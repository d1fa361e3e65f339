"""`make sanitize`: the GPU tests of the operators under each tool of NVIDIA's compute-sanitizer.

Exit code: 0 no tool found an error, 1 one did, 2 it cannot run (no compute-sanitizer, no GPU, no kernels built).
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from pgolf.ops import _native

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# The largest inputs take minutes under the tools and reach no line that the small ones do not; torch.compile and graph
# capture are torch's code, not ours.
CHOSEN = "kernel and not large and not graph and not compile and not bits and not stream"


def missing() -> str:
    """What is missing to run, or nothing."""
    if shutil.which("compute-sanitizer") is None:
        return "compute-sanitizer is not on PATH; it comes with the CUDA toolkit"
    if not torch.cuda.is_available():
        return "no CUDA GPU"
    return _native.why_not(torch.device("cuda", 0))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tools", nargs="*", default=TOOLS, help=f"of {', '.join(TOOLS)} (default: all)")
    tools = parser.parse_args().tools
    if reason := missing():
        print(f"sanitize: {reason}", file=sys.stderr)
        return 2
    # torch's caching allocator would hide an access beyond a tensor inside its larger blocks.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    failed = []
    for tool in tools:
        print(f"== {tool}", flush=True)
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--kernel-regex", "kns=pgolf"]
        command += [sys.executable, "-m", "pytest", "tests/test_ops.py", "-q", "-m", "gpu", "-k", CHOSEN]
        if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
            failed.append(tool)
    print(f"sanitize: {', '.join(failed)} failed" if failed else f"sanitize: {', '.join(tools)} found nothing")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
