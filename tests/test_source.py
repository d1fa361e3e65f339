"""What of the code counts toward the cap: without comments and docstrings, and the same program for all that."""

import bisect
import dis
import json
import types
from pathlib import Path

import pytest

from pgolf import source


def program(text: str) -> list[object]:
    """The instructions that a module compiles to, docstrings left out by the compiler; line numbers do not count."""

    def parts(code: types.CodeType) -> list[object]:
        # A NOP stands where a docstring was, and where a line has nothing else: a jump to it is one to what follows.
        steps = [step for step in dis.get_instructions(code) if step.opname != "NOP"]
        offsets = [step.offset for step in steps]
        jumps = {*dis.hasjrel, *dis.hasjabs}
        values = [bisect.bisect_left(offsets, step.argval) if step.opcode in jumps else step.argval for step in steps]
        inner = [parts(one) for one in code.co_consts if isinstance(one, types.CodeType)]
        shown = ["code" if isinstance(value, types.CodeType) else repr(value) for value in values]
        return [code.co_name, code.co_varnames, [step.opname for step in steps], shown, inner]

    return parts(compile(text, "module", "exec", optimize=2, dont_inherit=True))


@pytest.mark.parametrize("module", sorted(source.reachable(source.ROOTS)))
def test_a_bare_module_is_the_same_program(module):
    path = source._path(module)
    assert path is not None
    text = path.read_text(encoding="utf-8")
    assert program(source.bare(text)) == program(text)


def test_bare_source_has_no_words_for_readers():
    text = '"""Of all."""\n# aside\nclass A:\n    """Of A."""\n    def f(self):\n        "Of f."\nx = "kept # so"\n'
    assert source.bare(text) == "class A:\n\n    def f(self):\n        pass\nx = 'kept # so'"


def test_every_module_is_there_and_smaller():
    texts = json.loads(source.scoring_source())
    assert {"pgolf/model.py", "pgolf/score.py", "pgolf/ttt/engine.py", "csrc/codec/matrix.cpp"} <= texts.keys()
    root = source.PACKAGE.parent
    for name, text in texts.items():
        path = root / name if (root / name).exists() else source.PACKAGE / name
        original = Path(path).read_text(encoding="utf-8")
        assert len(text) <= len(original)
        if name.endswith((".cpp", ".h")):
            assert all(line in original for line in text.splitlines())
            assert not any(line.startswith("//") for line in text.splitlines())
