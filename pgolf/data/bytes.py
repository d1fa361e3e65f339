"""How many bytes of original text each token stands for: the denominator of bits per byte."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pgolf.data.caseops import ESC, MARKERS

_ESCAPED = re.compile(f"{ESC}[{MARKERS}]")


def surface_bytes(surfaces: Sequence[str]) -> np.ndarray:
    """Original bytes behind each token of one document, from the tokens' surfaces (their CaseOps text).

    Markers and an ESC count 0, the marker after an ESC its 3 bytes, any other character its UTF-8 length. An ESC may
    end one surface and its character begin the next, so the surfaces are read as one string.
    Returns uint16 [tokens]; a surface of more than 65,535 bytes raises OverflowError.
    """
    text = "".join(surfaces)
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    width = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    width[(points >= ord(MARKERS[0])) & (points <= ord(MARKERS[-1]))] = 0
    if ESC in text:
        width[[match.end() - 1 for match in _ESCAPED.finditer(text)]] = 3
    ends = np.cumsum(np.fromiter(map(len, surfaces), np.int64, len(surfaces)))
    counts = np.diff(np.concatenate(([0], np.cumsum(width)))[ends], prepend=0)
    if counts.size and counts.max() > np.iinfo(np.uint16).max:
        raise OverflowError("a token stands for more than 65,535 bytes of text")
    return counts.astype(np.uint16)


@dataclass(frozen=True)
class ByteTable:
    """Bytes of a token from the vocabulary alone, for data without CaseOps and without a sidecar.

    `length` [V]: UTF-8 bytes of the piece without a leading U+2581 (byte pieces 1, control tokens 0); `space` [V]: the
    piece begins with that mark, which stands for one more byte unless the token before is a `boundary` [V] (control,
    unknown or unused).
    """

    length: np.ndarray
    space: np.ndarray
    boundary: np.ndarray

    def counts(self, tokens: np.ndarray) -> np.ndarray:
        """uint16 [n] for tokens [n]; nothing stands before the first token, so its space counts nothing."""
        after_text = np.zeros(len(tokens), bool)
        after_text[1:] = ~self.boundary[tokens[:-1]]
        return (self.length[tokens] + (self.space[tokens] & after_text)).astype(np.uint16)
