"""Which kernels a GPU gets, decided from its properties: no GPU needed."""

import os
import subprocess
import sys

import pytest
import torch

from pgolf.ops import _native

KIB = 1024
DEVICES = [  # name, compute capability, opt-in shared memory per block, build
    ("V100", (7, 0), 96 * KIB, "none"),
    ("T4", (7, 5), 64 * KIB, "none"),
    ("A100", (8, 0), 163 * KIB, "generic"),
    ("RTX 4090", (8, 9), 99 * KIB, "generic"),
    ("H100, H200", (9, 0), 227 * KIB, "generic"),
    ("B200", (10, 0), 227 * KIB, "generic"),
    ("RTX 5090, RTX PRO 6000", (12, 0), 99 * KIB, "generic"),
]


@pytest.mark.parametrize(("name", "capability", "shared_memory", "build"), DEVICES)
def test_device_table(name: str, capability: tuple[int, int], shared_memory: int, build: str) -> None:
    kernels = _native.kernels()
    if kernels is None:
        pytest.skip("pgolf._kernels was not built: no CUDA compiler")
    assert kernels.build_for(*capability, shared_memory) == build


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (["90", "100", "120"], (9, 0), True),
        (["90", "100", "120"], (10, 3), True),  # machine code runs on later minor versions
        (["90", "100", "120"], (12, 1), True),
        (["90", "100", "120"], (8, 0), False),
        (["90", "100", "120"], (11, 0), False),
        (["86"], (8, 0), False),  # but not on earlier ones
        (["86"], (8, 9), True),
        (["90a"], (9, 0), True),
        (["100a"], (10, 3), False),  # architecture-specific code runs on its own version alone
        ([], (9, 0), False),
    ],
)
def test_runs_on(archs: list[str], capability: tuple[int, int], runs: bool) -> None:
    assert _native.runs_on(archs, *capability) is runs


def test_built_archs_are_named() -> None:
    kernels = _native.kernels()
    if kernels is None:
        pytest.skip("pgolf._kernels was not built: no CUDA compiler")
    archs = kernels.archs()
    assert archs and all(arch.rstrip("af").isdigit() for arch in archs)


def test_cpu_has_no_kernels_and_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    assert not _native.available(torch.device("cpu"))
    assert not recwarn.list


@pytest.fixture
def uncached():
    """The loader's caches emptied before and after."""
    caches = (_native._load, _native.why_not, _native._warn_once)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_missing_kernels_warn_once(uncached, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pgolf._kernels", None)
    device = torch.device("cuda", 0)
    with pytest.warns(UserWarning, match="CUDA kernels are not used.*built without them") as caught:
        assert not _native.available(device)
        assert not _native.available(device)
    assert len(caught) == 1
    with pytest.raises(RuntimeError, match="kernels are needed here"):
        _native.require()


def test_kernels_import_without_a_driver() -> None:
    if _native.kernels() is None:
        pytest.skip("pgolf._kernels was not built: no CUDA compiler")
    code = "import pgolf._kernels as k; print(k.archs(), k.smear_gate_scratch(65, 12))"
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=hidden)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip().endswith("26")  # two blocks of rows, twelve weights and lambda


def test_failed_launch_is_an_exception() -> None:
    kernels = _native.kernels()
    if kernels is None:
        pytest.skip("pgolf._kernels was not built: no CUDA compiler")
    if torch.cuda.is_available():
        pytest.skip("would launch on the GPU: the arguments are no tensors")
    names = ("device", "stream", "dtype", "e", "ids", "weight", "lam", "out", "rows", "length", "dim", "window", "bos")
    with pytest.raises(RuntimeError, match="set device: cuda"):  # no GPU: an exception, not a crash
        kernels.smear_gate_forward(**dict.fromkeys(names, 0))
