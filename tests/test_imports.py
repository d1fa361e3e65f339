"""Imports point one way, and importing pgolf touches nothing outside the interpreter. Read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "pgolf"


def module_name(path: Path) -> str:
    parts = ["pgolf", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(name: str, *, deferred: bool = True) -> set[str]:
    """Modules of pgolf that module `name` imports; with deferred=False only those imported when it is loaded."""
    tree = ast.parse(MODULES[name].read_text())
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.rsplit(".", node.level - 1)[0]
                base = f"{parent}.{base}" if base else parent
            found.add(base)
            found.update(f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not deferred:
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return {module for module in found if module in MODULES and module not in ("pgolf", name)}


def reachable(start: str) -> dict[str, str]:
    """Every module that `start` can import, mapped to the module that imports it."""
    parents: dict[str, str] = {}
    queue = [start]
    while queue:
        name = queue.pop()
        # A submodule runs the packages above it first.
        above = {".".join(name.split(".")[:depth]) for depth in range(2, name.count(".") + 1)}
        for target in imports_of(name) | above:
            if target not in parents and target != start:
                parents[target] = name
                queue.append(target)
    return parents


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def chain(parents: dict[str, str], end: str) -> str:
    path = [end]
    while path[-1] in parents:
        path.append(parents[path[-1]])
    return " <- ".join(path)


RULES = [  # (who, what it must never reach, why)
    (
        ("pgolf.score", "pgolf.ttt"),
        ("train", "optim", "quantize", "checkpoint", "report"),
        "code that scores counts toward the artifact's bytes",
    ),
    (
        ("pgolf.ops",),
        ("config", "recipes", "model", "data", "train", "optim", "quantize", "cli"),
        "operators know tensors only",
    ),
    (("pgolf.data",), ("model", "ops", "optim", "train", "quantize", "ttt", "score"), "data is below the model"),
    (
        ("pgolf.model", "pgolf.layers"),
        ("optim", "train", "quantize", "score", "ttt", "artifact"),
        "the model is below its users",
    ),
    (("pgolf.config", "pgolf.errors", "pgolf.files"), ("model", "data", "ops", "train"), "the floor stands on nothing"),
    (("pgolf.optim", "pgolf.quantize", "pgolf.artifact"), ("train", "cli"), "the loop is on top"),
]


@pytest.mark.parametrize(("rooms", "forbidden", "why"), RULES, ids=[", ".join(rule[0]) for rule in RULES])
def test_imports_point_one_way(rooms: tuple[str, ...], forbidden: tuple[str, ...], why: str) -> None:
    starts = [name for name in MODULES if any(within(name, room) for room in rooms)]
    assert starts, f"none of {', '.join(rooms)} exists; a rule about nothing proves nothing"
    for start in starts:
        parents = reachable(start)
        wrong = [name for name in parents if any(within(name, f"pgolf.{room}") for room in forbidden)]
        assert not wrong, f"{why}, yet {chain(parents, wrong[0])}"


def test_nothing_imports_the_command_line() -> None:
    for name in set(MODULES) - {"pgolf.cli", "pgolf.__main__"}:
        assert "pgolf.cli" not in imports_of(name), f"{name} imports the command line"


def test_no_cycle_at_load_time() -> None:
    graph = {name: imports_of(name, deferred=False) for name in MODULES}
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"import cycle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in done:
            for target in graph[name]:
                # A package may gather its own modules, which name their siblings through it.
                if not within(name, target):
                    walk(target, (*path, name))
            done.add(name)

    for name in MODULES:
        walk(name, ())


QUIET = """
import os, sys
import torch  # what torch does at its own import is not ours to judge

reads, connections = [], []
before, lookup = dict(os.environ), type(os.environ).__getitem__

def watched(environment, key):
    frame = sys._getframe(1)
    while frame and os.path.basename(frame.f_code.co_filename) in ("os.py", "_collections_abc.py", "<frozen os>"):
        frame = frame.f_back
    if frame and frame.f_globals.get("__name__", "").partition(".")[0] == "pgolf":
        reads.append((frame.f_globals["__name__"], key))
    return lookup(environment, key)

type(os.environ).__getitem__ = watched
sys.addaudithook(lambda event, arguments: connections.append(event) if event == "socket.connect" else None)
for name in MODULES:
    __import__(name)
assert not torch.cuda.is_initialized(), "CUDA was initialized"
assert dict(os.environ.items()) == before, "an environment variable was changed"
assert not reads, f"environment variables were read: {reads}"
assert not connections, "a connection was opened"
"""


def test_importing_everything_touches_nothing() -> None:
    # The benchmarks' rivals need Triton; only their loaders import them.
    rivals = {name for name in MODULES if name.startswith("pgolf.testing.baselines.")}
    names = sorted(set(MODULES) - rivals - {"pgolf.__main__"})
    code = QUIET.replace("MODULES", repr(names))
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]


def test_importing_pgolf_does_not_import_torch() -> None:
    code = "import sys, pgolf; assert 'torch' not in sys.modules"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
