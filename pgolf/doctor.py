"""What this machine offers pgolf: compilers, torch, GPU, compiled modules, attention backends and why not better."""

import importlib
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import torch

from pgolf import __version__
from pgolf.ops import _native, attention

Row = tuple[str, str]


# Dense bfloat16 FLOP/s by the makers' data sheets, the first name that a device's name contains.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 FLOP/s of a known GPU, the denominator of model FLOP utilisation; None for any other device."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def report() -> list[Row]:
    """(what, what was found) in the order a reader would ask; nothing is changed, nothing raises."""
    return [
        ("pgolf", f"{__version__}, Python {platform.python_version()}, {platform.machine()}"),
        ("CPU", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"),
        *(_tool(*tool) for tool in TOOLS),
        ("torch", torch.__version__ + (f", CUDA {torch.version.cuda}" if torch.version.cuda else ", no CUDA")),
        *_gpus(),
        ("entropy coder", _built("pgolf._codec")),
        ("trellis search", _built("pgolf._trellis")),
        ("CUDA kernels", _kernels()),
        *_attention(),
    ]


# command, the word before its version, what it is for
TOOLS = (
    ("g++", "", "builds the entropy coder"),
    ("cmake", "version", "fetched by pip when missing"),
    ("nvcc", "release", "builds the CUDA kernels; not needed on a CPU"),
)


def _tool(command: str, marker: str, purpose: str) -> Row:
    """Version and path of a command, or what its absence means."""
    path = shutil.which(command)
    if path is None:
        return command, f"not on PATH ({purpose})"
    try:
        ran = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return command, f"{path} does not run: {error}"
    lines = [line for line in ran.stdout.splitlines() if marker in line] or ["unknown version"]
    return command, f"{lines[0].strip()} ({path})"


def _gpus() -> list[Row]:
    """A row for each CUDA device."""
    if not torch.cuda.is_available():
        return [("GPU", "none that torch can use: everything runs on the CPU")]
    rows = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        rows.append((f"GPU {index}", f"{device.name}, sm_{device.major}{device.minor}, {memory:.0f} GiB"))
    return rows


def _built(module: str) -> str:
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"missing ({error}): run `pip install .` with a C++ compiler"
    return "built"


def _kernels() -> str:
    """Architectures the kernels were built for, whether any spills, and which of them the first GPU runs."""
    module = _native.kernels()
    if module is None:
        return _native.why_not(torch.device("cuda", 0))
    built = "built for " + ", ".join(f"sm_{arch}" for arch in module.archs()) + _resources(module)
    if not torch.cuda.is_available():
        return f"{built}; no GPU to run them"
    device = torch.device("cuda", 0)
    reason = _native.why_not(device)
    return f"{built}; not used: {reason}" if reason else f"{built}; used: {_native.build_of(device)}"


def _resources(module: ModuleType) -> str:
    """What the build's table beside the module says of spills, as the end of a list; nothing without the table."""
    path = Path(module.__file__ or "").with_name("kernel_resources.json")
    if not path.is_file():
        return ""
    kernels = json.loads(path.read_text())
    names = {(kernel["file"], kernel["name"]) for kernel in kernels}
    spilling = {(kernel["file"], kernel["name"]) for kernel in kernels if kernel["spilled"]}
    return f"; {len(names)} kernels, {len(spilling) or 'none'} spilling registers"


def _attention() -> list[Row]:
    """The attention backends in order of speed, the first usable one marked."""
    rows: list[Row] = []
    chosen = False
    for name, available, reason in attention.backends():
        state = "usable" if available else "no"
        if available and not chosen:
            chosen, state = True, "CHOSEN"
        rows.append((f"attention: {name}", state if reason == "usable" else f"{state}: {reason}"))
    return rows
