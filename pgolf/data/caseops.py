"""CaseOps: letter case as marker characters, so that a vocabulary holds each word once.

It works on maximal runs of ASCII letters; everything else passes untouched, non-ASCII letters included:

    word        as it is                 WORD      ALLCAPS word   (two letters or more)
    Word, W     TITLE word, TITLE w      eBay      e CAPNEXT bay
    HeLLo       TITLE he CAPNEXT l CAPNEXT lo
    U+E001..4   ESC and the character: a literal marker of the text

`decode` is the exact inverse on everything `encode` writes.
"""

import re

from pgolf.errors import PgolfError

TITLE, ALLCAPS, CAPNEXT, ESC = "\ue001", "\ue002", "\ue003", "\ue004"
MARKERS = TITLE + ALLCAPS + CAPNEXT + ESC

# From the first capital of a run to the run's end: lower-case words, most of any text, are never visited.
_CAPITALS = re.compile(f"[A-Z][A-Za-z]*|[{MARKERS}]")
_CAPITAL = re.compile("[A-Z]")
# Alternatives in order: everything well-formed first, so that a marker left for the last group is malformed.
_MARKED = re.compile(
    f"{ESC}([{MARKERS}])|(?:(?<![A-Za-z])(?:{TITLE}([A-Za-z])|{ALLCAPS}([A-Za-z]+)))|{CAPNEXT}([A-Za-z])|[{MARKERS}]"
)


class CaseOpsError(PgolfError):
    """A string no text encodes to. `position` is the index of the offending character, `reason` says why."""

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(f"malformed CaseOps text at character {position}: {reason}")
        self.position = position
        self.reason = reason


def _cap_next(match: re.Match[str]) -> str:
    return CAPNEXT + match[0].lower()


def _encode_run(match: re.Match[str]) -> str:
    run = match[0]
    if run in MARKERS:
        return ESC + run
    start = match.start()
    if start and "a" <= match.string[start - 1] <= "z":  # the run began in lower case before this match
        return _CAPITAL.sub(_cap_next, run)
    tail = run[1:]
    if tail == "" or tail.islower():
        return TITLE + run.lower()
    if run.isupper():
        return ALLCAPS + run.lower()
    return TITLE + run[0].lower() + _CAPITAL.sub(_cap_next, tail)


def encode(text: str) -> str:
    """Text to its CaseOps form."""
    return _CAPITALS.sub(_encode_run, text)


def _decode_marked(match: re.Match[str]) -> str:
    if match.lastindex is None:
        raise CaseOpsError(match.start(), _fault(match.string, match.start()))
    content = match[match.lastindex]
    return content if match.lastindex == 1 else content.upper()


def _fault(text: str, position: int) -> str:
    """Why the marker at `position` is malformed."""
    marker, following = text[position], text[position + 1 : position + 2]
    name = {TITLE: "TITLE", ALLCAPS: "ALLCAPS", CAPNEXT: "CAPNEXT", ESC: "ESC"}[marker]
    if marker == ESC:
        return "ESC is not followed by a marker character" if following else "ESC ends the text"
    if following == marker:
        return f"{name} is doubled"
    if not (following.isascii() and following.isalpha()):
        return f"{name} is not followed by an ASCII letter"
    return f"{name} stands inside a word"


def decode(text: str, strict: bool = True) -> str:
    """CaseOps form back to text.

    Raises CaseOpsError at a marker not followed by an ASCII letter, a TITLE or ALLCAPS inside a word or doubled, a
    doubled CAPNEXT, or an ESC without a marker after it. With `strict=False` (a model's free output) such markers
    are left out instead.
    """
    if strict:
        return _MARKED.sub(_decode_marked, text)
    return _MARKED.sub(lambda match: "" if match.lastindex is None else _decode_marked(match), text)
