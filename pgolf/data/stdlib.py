"""Text that every Python installation carries: documentation of the language and of its standard library.

It is read from source files with `ast`, so no module is imported. Good for a demonstration without any download; the
text differs a little between Python versions.
"""

import ast
import hashlib
import inspect
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from pgolf.errors import PgolfError

# Not about the library: tests, bundled tools and their copies, compiled files.
_SKIPPED = {"test", "tests", "idlelib", "idle_test", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
_SHORTEST = 200  # characters; shorter ones are stubs


def documents() -> list[str]:
    """Documents of this Python's standard library, the same list each time.

    One for each topic of the language reference and one for each module: its docstring and those of its classes and
    functions in source order. Without duplicates, sorted by path and topic.
    PgolfError when the installation carries no sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, None] = {}
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        parts = path.relative_to(root).parts
        if _SKIPPED.isdisjoint(parts) and not parts[0].startswith("config-"):
            for text in _texts(path):
                if len(text) >= _SHORTEST:
                    found[text] = None
    if not found:
        raise PgolfError(f"this Python has no library sources in {root}; give text files instead")
    return list(found)


def split(documents: Sequence[str], val_share: float) -> tuple[list[str], list[str]]:
    """(train, validation) of the documents, in order; a document's own hash decides, so more text moves none."""
    train: list[str] = []
    val: list[str] = []
    for text in documents:
        point = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
        (val if point < val_share else train).append(text)
    return train, val


def _texts(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):  # a file this interpreter cannot read has nothing for us
        return []
    if path.parts[-2:] == ("pydoc_data", "topics.py"):
        return _topics(tree)
    seen: dict[str, None] = {}
    for node in _definitions(tree):
        text = ast.get_docstring(node)
        if text and _is_text(text):
            seen[text.strip()] = None
    return ["\n\n".join(seen)]


Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _definitions(node: ast.AST) -> Iterator[Definition]:
    """Everything that can carry a docstring, in source order. Only statements are visited: expressions hold none."""
    if isinstance(node, Definition):
        yield node
    for block in ("body", "handlers", "orelse", "finalbody"):
        statements = getattr(node, block, None)
        if isinstance(statements, list):
            for child in statements:
                yield from _definitions(child)


def _topics(tree: ast.Module) -> list[str]:
    """The values of the `topics` dictionary."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            values = [value.value for value in node.value.values if isinstance(value, ast.Constant)]
            return [inspect.cleandoc(text) for text in values if isinstance(text, str) and _is_text(text)]
    return []


def _is_text(text: str) -> bool:
    """No lone surrogates, which a few docstrings show off: they have no UTF-8 form."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
