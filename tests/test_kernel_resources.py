"""No kernel spills: what the build says each of them uses, and the reading of the compiler's log."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

from pgolf.ops import _native

# setup_tools is no part of the installed package.
_spec = importlib.util.spec_from_file_location(
    "pgolf_resources", Path(__file__).resolve().parents[1] / "setup_tools" / "resources.py"
)
assert _spec is not None and _spec.loader is not None
resources = sys.modules["pgolf_resources"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(resources)

SPILLS_ALLOWED: dict[str, str] = {}  # kernel's file and name -> why its spills or stack cost nothing


@pytest.fixture(scope="module")
def kernels() -> list[dict]:
    """The build's table, installed beside the module; skips where there are no kernels."""
    module, reason = _native._load()
    if module is None:
        assert "built without them" in reason, reason
        pytest.skip(f"no pgolf._kernels: {reason}")
    return json.loads((Path(module.__file__ or "").parent / "kernel_resources.json").read_text())


def test_no_kernel_spills(kernels: list[dict]) -> None:
    wrong = [
        f"{k['file']}: {k['name']} on {k['arch']}: {k['stack']} bytes of stack, {k['spilled']} spilled"
        for k in kernels
        if (k["stack"] or k["spilled"]) and f"{k['file']}: {k['name']}" not in SPILLS_ALLOWED
    ]
    assert not wrong, "\n".join(wrong)


def test_the_compiler_expects_no_loss(kernels: list[dict]) -> None:
    """Its remark on wgmma instructions that wait for each other: a kernel several times slower, without an error."""
    told = [f"{k['file']}: {k['name']} on {k['arch']}: {remark}" for k in kernels for remark in k["remarks"]]
    assert not [line for line in told if "Potential Performance Loss" in line]


def test_every_file_is_built_for_every_architecture(kernels: list[dict]) -> None:
    archs = {f"sm_{arch}" for arch in _native.require().archs()}
    files = {kernel["file"] for kernel in kernels}
    assert any(file.startswith("generic/") for file in files)
    for file in files:
        expected = archs if file.startswith("generic/") else {"sm_90a"}
        assert {kernel["arch"] for kernel in kernels if kernel["file"] == file} == expected, file


LOG = """\
nvcc warning : something about the host compiler
ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient \
register resources for the wgmma pipeline in the function '_ZN5pgolf7generic12_GLOBAL__N_15firstIfLi4EEEvPKT_'
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN5pgolf7generic12_GLOBAL__N_15firstIfLi4EEEvPKT_' for 'sm_90a'
ptxas info    : Function properties for _ZN5pgolf7generic12_GLOBAL__N_15firstIfLi4EEEvPKT_
    256 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 1024 bytes smem, 464 bytes cmem[0]
ptxas info    : Compile time = 37.225 ms
ptxas info    : Function properties for _Z6helperi
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function '_Z6secondv' for 'sm_100'
ptxas info    : Function properties for _Z6secondv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 24 registers, used 0 barriers
"""


@pytest.fixture
def objects(tmp_path: Path) -> list[Path]:
    """Two object files with the log of each beside them."""
    folder = tmp_path / "csrc" / "kernels" / "generic"
    folder.mkdir(parents=True)
    (folder / "one.cu.o.ptxas").write_text(LOG)
    (folder / "two.cu.o.ptxas").write_text("")
    return [folder / "one.cu.o", folder / "two.cu.o"]


def test_reading_a_log(objects: list[Path]) -> None:
    if shutil.which("c++filt") is None:
        pytest.skip("c++filt is not on PATH: names stay mangled")
    first, helper, second = resources.read(objects)
    assert (first.file, first.name, first.arch) == ("generic/one.cu", "first<float, 4>", "sm_90a")
    assert (first.registers, first.shared, first.stack, first.spilled) == (168, 1024, 256, 40)
    assert len(first.remarks) == 1 and first.remarks[0].startswith("(C7511) Potential Performance Loss: wgmma")
    assert not second.remarks
    assert (helper.name, helper.arch, helper.registers, helper.stack) == ("helper", "sm_90a", 0, 8)
    assert (second.name, second.arch, second.registers, second.shared) == ("second", "sm_100", 24, 0)


def test_the_table_shows_all_of_it(objects: list[Path]) -> None:
    head, file, first, remark, *_ = resources.table(resources.read(objects)).splitlines()
    assert file.split() == ["generic/one.cu", "sm_90a", "sm_100", "shared", "stack", "spilled"]
    assert first.split()[-4:] == ["168", "1024", "256", "40"]
    assert "serialized" in remark


def test_an_object_without_a_log_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"x\.o\.ptxas is not there"):
        resources.read([tmp_path / "x.o"])


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void pgolf::generic::(anonymous namespace)::f<float, 4>(pgolf::Params, long)", "f<float, 4>"),
        ("pgolf::sm90::(anonymous namespace)::f(void (*)(int))", "f"),
        ("void pgolf::sm90::gemm::g<pgolf::sm90::Up, (bool)1>(int)", "gemm::g<Up, (bool)1>"),
        ("_Zmangled", "_Zmangled"),
    ],
)
def test_short_names(name: str, short: str) -> None:
    assert resources.shortened(name) == short
