"""Which kernels a GPU gets, decided from its properties: no GPU needed."""

import os
import subprocess
import sys
import threading
from types import ModuleType, SimpleNamespace

import pytest
import torch

from pgolf.ops import _native

KIB = 1024
LARGE, SMALL = (128, 128, 32, 4), (128, 128, 32, 3)  # m, n, k, stages of a block of the generic matrix products
DEVICES = [  # name, compute capability, opt-in shared memory per block, build, tile
    ("V100", (7, 0), 96 * KIB, "none", None),
    ("T4", (7, 5), 64 * KIB, "none", None),
    ("A100", (8, 0), 163 * KIB, "generic", LARGE),
    ("RTX 4090", (8, 9), 99 * KIB, "generic", SMALL),
    ("H100, H200", (9, 0), 227 * KIB, "sm90", LARGE),
    ("an sm_90 that grants less", (9, 0), 99 * KIB, "generic", SMALL),
    ("B200", (10, 0), 227 * KIB, "generic", LARGE),
    ("RTX 5090, RTX PRO 6000", (12, 0), 99 * KIB, "generic", SMALL),
    ("a later GPU that grants no more than the T4", (13, 0), 64 * KIB, "none", None),
]


@pytest.fixture
def kernels() -> ModuleType:
    """The compiled module; skips where it was not built, fails where it was and does not load."""
    module, reason = _native._load()
    if module is None:
        assert "built without them" in reason, reason
        pytest.skip(f"no pgolf._kernels: {reason}")
    return module


@pytest.mark.parametrize(("name", "capability", "shared_memory", "build", "tile"), DEVICES)
def test_device_table(
    kernels: ModuleType,
    name: str,
    capability: tuple[int, int],
    shared_memory: int,
    build: str,
    tile: tuple[int, int, int, int] | None,
) -> None:
    if build == "sm90" and "90" not in kernels.archs():
        build = "generic"  # compiled without the wgmma kernels
    assert kernels.build_for(*capability, shared_memory) == build
    if tile is not None:
        *chosen, size = kernels.gemm_tile(shared_memory)
        assert tuple(chosen) == tile
        m, n, k, stages = tile
        assert 2 * stages * (m + n) * k <= size <= shared_memory  # bfloat16 slices of both operands


def test_builds_are_those_compiled(kernels: ModuleType) -> None:
    assert set(kernels.BUILDS) == ({"generic", "sm90"} if "90" in kernels.archs() else {"generic"})
    assert len(set(kernels.BUILDS.values())) == len(kernels.BUILDS) and 0 not in kernels.BUILDS.values()


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


def test_built_archs_are_named(kernels: ModuleType) -> None:
    archs = kernels.archs()
    assert archs and all(arch.rstrip("af").isdigit() for arch in archs)


def test_cpu_has_no_kernels_and_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    assert not _native.available(torch.device("cpu"))
    assert not recwarn.list


@pytest.fixture
def uncached():
    """The loader's caches emptied before and after."""
    caches = (_native._load, _native.why_not, _native._warn_once, _native._build_of, _native._shared_memory)
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


@pytest.fixture
def hopper(uncached, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A pretended H100 with kernels of both builds."""
    properties = SimpleNamespace(name="H100", major=9, minor=0, shared_memory_per_block_optin=227 * KIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    stream = SimpleNamespace(device=torch.device("cuda", 0), cuda_stream=77)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)

    def build_for(major: int, minor: int, shared_memory: int) -> str:
        return "sm90" if (major, minor, shared_memory) == (9, 0, 227 * KIB) else "none"

    module = SimpleNamespace(BUILDS={"generic": 1, "sm90": 2}, build_for=build_for, archs=lambda: ["90"])
    monkeypatch.setitem(sys.modules, "pgolf._kernels", module)
    return torch.device("cuda", 0)


def test_target_names_device_stream_build_and_memory(hopper: torch.device) -> None:
    tensor = SimpleNamespace(device=hopper)
    expected = {"device": 0, "stream": 77, "build": 2, "shared_memory": 227 * KIB}
    assert _native.available(hopper)
    assert _native.target(tensor) == expected  # type: ignore[arg-type]
    with _native.forced("generic"):
        assert _native.target(tensor) == {**expected, "build": 1}  # type: ignore[arg-type]


def test_forced_build_ends_with_its_block(hopper: torch.device) -> None:
    assert _native.build_of(hopper) == "sm90"
    with _native.forced("generic"):
        with pytest.raises(KeyError), _native.forced("sm90"):
            assert _native.build_of(hopper) == "sm90"
            raise KeyError
        assert _native.build_of(hopper) == "generic"
    assert _native.build_of(hopper) == "sm90"


def test_forced_build_holds_in_every_thread(hopper: torch.device) -> None:
    seen = []
    with _native.forced("generic"):
        thread = threading.Thread(target=lambda: seen.append(_native.build_of(hopper)))  # as autograd's
        thread.start()
        thread.join()
    assert seen == ["generic"]


def test_forcing_an_unknown_build_is_an_error(hopper: torch.device) -> None:
    with pytest.raises(ValueError, match=r"^forced: build: expected one of generic, sm90, got 'sm91'$"):
        with _native.forced("sm91"):
            pass
    assert _native.build_of(hopper) == "sm90"


def test_kernels_import_without_a_driver(kernels: ModuleType) -> None:
    code = "import pgolf._kernels as k; print(k.archs(), k.smear_gate_scratch(65, 12))"
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=hidden)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip().endswith("26")  # two blocks of rows, twelve weights and lambda


def test_failed_launch_is_an_exception(kernels: ModuleType) -> None:
    if torch.cuda.is_available():
        pytest.skip("would launch on the GPU: the arguments are no tensors")
    names = ("device", "stream", "dtype", "e", "ids", "weight", "lam", "out", "rows", "length", "dim", "window", "bos")
    with pytest.raises(RuntimeError, match="set device: cuda"):  # no GPU: an exception, not a crash
        kernels.smear_gate_forward(**dict.fromkeys(names, 0))
