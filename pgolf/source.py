"""The code that counts: every module that scoring an artifact needs, found by following imports."""

import ast
import json
from pathlib import Path

from pgolf.errors import PgolfError

PACKAGE = Path(__file__).parent
ROOTS = ("loading", "score", "ttt", "data.bytes", "data.shards")


def _path(module: str) -> Path | None:
    base = PACKAGE.joinpath(*filter(None, module.split(".")))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


def imported_modules(path: Path) -> set[str]:
    """Modules of this package that a file imports, without the leading "pgolf."; imports in functions count too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("pgolf.") for alias in node.names if alias.name.startswith("pgolf.")}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "pgolf":
            base = node.module.removeprefix("pgolf").lstrip(".")
            found.add(base)
            found |= {f"{base}.{alias.name}".lstrip(".") for alias in node.names}
    return {module for module in found if module and _path(module)}


def reachable(roots: tuple[str, ...]) -> set[str]:
    """All modules that importing `roots` brings in, roots included."""
    seen: set[str] = set()
    waiting = list(roots)
    while waiting:
        module = waiting.pop()
        path = _path(module)
        if module not in seen and path is not None:
            seen.add(module)
            waiting.append(module.rpartition(".")[0])  # its package runs first
            waiting += imported_modules(path)
    return seen


class _WithoutDocstrings(ast.NodeTransformer):
    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            ast.get_docstring(node, clean=False) is not None
        ):
            node.body = node.body[1:] or [ast.Pass()]
        return node


def bare(text: str) -> str:
    """Python source that does the same, without comments and docstrings."""
    return ast.unparse(_WithoutDocstrings().visit(ast.parse(text)))


def scoring_source() -> bytes:
    """The source of all that scores an artifact, Python and C++, as JSON {file: text}; it counts toward the cap.

    It goes without what only a reader needs: `bare` Python, C++ without lines of comment.
    """
    files = [path for module in reachable(ROOTS) if (path := _path(module))]
    texts = {f"pgolf/{path.relative_to(PACKAGE)}": bare(path.read_text(encoding="utf-8")) for path in files}
    # The C++ decoder: inside an installed package, beside it in a source tree.
    folders = (PACKAGE / "csrc" / "codec", PACKAGE.parent / "csrc" / "codec")
    decoder = next((folder for folder in folders if folder.is_dir()), None)
    if decoder is None:
        raise PgolfError(f"the decoder's source is missing from {folders[0]}; install pgolf again, it counts its code")
    for path in (*decoder.glob("*.h"), *decoder.glob("*.cpp")):
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("//")]
        texts[f"csrc/codec/{path.name}"] = "\n".join(kept) + "\n"
    return json.dumps(texts, sort_keys=True).encode()
