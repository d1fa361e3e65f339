"""The compiled CUDA kernels: loaded when first asked for, on the GPUs they were built for, with torch's streams."""

import contextlib
import functools
import importlib
import warnings
from collections.abc import Iterable, Iterator
from types import ModuleType

import torch


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """(pgolf._kernels or None, why it is None)."""
    try:
        return importlib.import_module("pgolf._kernels"), ""
    except ModuleNotFoundError:
        return None, "this installation was built without them (no CUDA compiler was found)"
    except ImportError as error:
        return None, f"pgolf._kernels cannot be loaded ({error})"


def kernels() -> ModuleType | None:
    """The module of compiled kernels, or None where it was not built."""
    return _load()[0]


def require() -> ModuleType:
    """The module of compiled kernels; RuntimeError says why there is none."""
    module, reason = _load()
    if module is None:
        raise RuntimeError(f"pgolf's CUDA kernels are needed here: {reason}")
    return module


def runs_on(archs: Iterable[str], major: int, minor: int) -> bool:
    """Whether machine code for one of `archs` ("90", "90a", "120") runs on compute capability `major`.`minor`.

    Code runs on its own major version from its minor version up; with a letter, on exactly its own version.
    """
    for arch in archs:
        version = int(arch.rstrip("af"))
        if version == 10 * major + minor:
            return True
        if arch.isdigit() and version // 10 == major and version % 10 <= minor:
            return True
    return False


@functools.cache
def why_not(device: torch.device) -> str:
    """Why the compiled kernels cannot run on `device`, in words; empty when they can."""
    if device.type != "cuda":
        return f"{device} is not a CUDA device"
    module, reason = _load()
    if module is None:
        return reason
    properties = torch.cuda.get_device_properties(device)
    name = f"{properties.name} (compute capability {properties.major}.{properties.minor})"
    if _build_of(device) == "none":
        return f"{name} is not supported; they need compute capability 8.0 and 96 KiB of shared memory a block"
    if not runs_on(module.archs(), properties.major, properties.minor):
        return (
            f"they were built for sm_{', sm_'.join(module.archs())}, not for {name}; rebuild with "
            f"-DPGOLF_CUDA_ARCHS={properties.major}{properties.minor}"
        )
    return ""


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"pgolf's CUDA kernels are not used, PyTorch operators run instead: {reason}", stacklevel=3)


def available(device: torch.device) -> bool:
    """Whether the compiled kernels run on `device`. A CUDA device without them is reported by one warning."""
    if _forced == "none":
        return False
    reason = why_not(device)
    if reason and device.type == "cuda":
        _warn_once(reason)
    return not reason


# What torch.compiler.assume_constant_result sets, without importing the compiler (a second) just to import pgolf.
available._dynamo_marked_constant = True  # type: ignore[attr-defined]


# Not a context variable: autograd runs the backward in a thread of its own, which must see it.
_forced: str | None = None


@contextlib.contextmanager
def forced(build: str) -> Iterator[None]:
    """Run the kernels of `build` ("generic" or "sm90"; "none": PyTorch's operators) inside the block, in every thread.

    ValueError where this installation has no such build; that the GPU can run it is for the caller to know.
    """
    global _forced
    if build != "none" and build not in (names := require().BUILDS):
        raise ValueError(f"forced: build: expected one of {', '.join(names)}, got {build!r}")
    before, _forced = _forced, build
    try:
        yield
    finally:
        _forced = before


def build_of(device: torch.device) -> str:
    """The name of the build whose kernels run on `device`, a CUDA device that has kernels."""
    return _forced or _build_of(device)


@functools.cache
def _build_of(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    name: str = require().build_for(properties.major, properties.minor, _shared_memory(device))
    return name


@functools.cache
def _shared_memory(device: torch.device) -> int:
    properties = torch.cuda.get_device_properties(device)
    shared: int = getattr(properties, "shared_memory_per_block_optin", 48 * 1024)  # every GPU grants 48 KiB
    return shared


def target(tensor: torch.Tensor) -> dict[str, int]:
    """The keyword arguments device, stream, build and shared_memory of a launch on the tensor's device."""
    build = require().BUILDS[build_of(tensor.device)]
    return {**stream_of(tensor), "build": build, "shared_memory": _shared_memory(tensor.device)}


def dtype_code(tensor: torch.Tensor) -> int:
    """The kernels' number for the tensor's type (float32 or bfloat16)."""
    module = require()
    codes: dict[torch.dtype, int] = {torch.float32: module.FLOAT32, torch.bfloat16: module.BFLOAT16}
    return codes[tensor.dtype]


def stream_of(tensor: torch.Tensor) -> dict[str, int]:
    """The keyword arguments `device` and `stream` of a launch: where torch would launch work on `tensor` now."""
    stream = torch.cuda.current_stream(tensor.device)
    return {"device": stream.device.index, "stream": stream.cuda_stream}
