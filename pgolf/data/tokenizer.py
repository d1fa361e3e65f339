"""The tokenizer: CaseOps, then SentencePiece BPE; loading, use and training.

Two settings exist. `record` normalizes (nmt_nfkc) and collapses whitespace, as the published recipe does, so a text
comes back changed; `lossless` leaves the text alone. One character is beyond the lossless setting too: SentencePiece
writes a space as U+2581, so a U+2581 of the text comes back as a space.

Ids: pad 0, bos 1, eos 2, unk 3, the four CaseOps markers 4-7, bytes 8-263, then learned pieces.
"""

import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pgolf import files
from pgolf.data import caseops
from pgolf.data.bytes import ByteTable, surface_bytes
from pgolf.errors import PgolfError

BOS = 1
SETTINGS = ("record", "lossless")
# The trainer drops longer sentences, and merging is superlinear in a sentence's length.
_SENTENCE_BYTES = 4000


class Tokenizer:
    """A loaded SentencePiece model; `Tokenizer.load(path)` makes one."""

    pad, bos, eos, unk = 0, BOS, 2, 3

    def __init__(self, model: bytes, name: str = "tokenizer") -> None:
        """Read a serialized model. PgolfError when it is none or its special ids are not those of the recipe."""
        import sentencepiece

        self.sha256 = hashlib.sha256(model).hexdigest()
        self._processor: Any = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
            spec = _model_proto(model).normalizer_spec
        except Exception as error:  # SentencePiece throws RuntimeError, protobuf its own DecodeError
            raise PgolfError(f"{name} is not a SentencePiece model ({error}); train or download it again") from error
        processor = self._processor
        ids = (processor.pad_id(), processor.bos_id(), processor.eos_id(), processor.unk_id())
        if ids != (self.pad, self.bos, self.eos, self.unk):
            raise PgolfError(f"{name}: pad, bos, eos, unk must be 0, 1, 2, 3, got {ids}; train it with pgolf")
        self.vocab_size: int = processor.vocab_size()
        if self.vocab_size > 1 << 16:
            raise PgolfError(f"{name} has {self.vocab_size} tokens; shards hold 16-bit ids, so at most 65536")
        self.caseops: bool = [processor.id_to_piece(i) for i in range(4, min(8, self.vocab_size))] == list(
            caseops.MARKERS
        )
        self.setting = "lossless" if spec.name == "identity" and not spec.remove_extra_whitespaces else "record"

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a model file; PgolfError when it is missing or not a tokenizer of this recipe."""
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise PgolfError(f"cannot read tokenizer {path}: {error.strerror}; check the path") from error
        return cls(model, f"tokenizer {path}")

    def encode_ids(self, text: str) -> np.ndarray:
        """Text to token ids, uint16 [n], without BOS. PgolfError when the text holds a lone surrogate."""
        return np.array(self._processor.encode(_prepared(text, self.caseops)), np.uint16)

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Text to (ids, bytes), each uint16 [n], without BOS.

        `bytes` are the bytes of original text each token stands for; under `record` they add up to the UTF-8 length
        of the text without its leading and trailing whitespace. About three times slower than `encode_ids`.
        """
        pieces = self._processor.encode_as_proto(_prepared(text, self.caseops)).pieces
        ids = np.fromiter((piece.id for piece in pieces), np.uint16, len(pieces))
        try:
            return ids, surface_bytes([piece.surface for piece in pieces])
        except OverflowError as error:
            raise PgolfError(f"cannot count bytes: {error}; split or clean the document") from error

    def decode(self, ids: Iterable[int] | np.ndarray, strict: bool = True) -> str:
        """Ids to text. Ids outside the vocabulary raise PgolfError, as does a malformed CaseOps sequence (strict)."""
        numbers = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64)
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < self.vocab_size:
            raise PgolfError(f"cannot decode token ids outside 0..{self.vocab_size - 1}")
        text: str = self._processor.decode(numbers.tolist())
        return caseops.decode(text, strict) if self.caseops else text

    def piece(self, token: int) -> str:
        """The token's piece as SentencePiece spells it."""
        return str(self._processor.id_to_piece(token))

    def byte_lengths(self) -> ByteTable:
        """Bytes per token from the vocabulary alone: how data without CaseOps is counted."""
        processor = self._processor
        ids = range(self.vocab_size)
        boundary = np.array([processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i) for i in ids])
        pieces = [self.piece(i) for i in ids]
        space = np.array([piece.startswith("\u2581") for piece in pieces]) & ~boundary
        length = np.array([len(piece.removeprefix("\u2581").encode()) for piece in pieces], np.uint16)
        length[[processor.is_byte(i) for i in ids]] = 1
        length[boundary] = 0
        return ByteTable(length, space, boundary)


def _model_proto(model: bytes) -> Any:
    """A serialized model as its protobuf message."""
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2
    return messages.ModelProto.FromString(model)


def _prepared(text: str, with_caseops: bool = True) -> str:
    """What SentencePiece is given for a text. PgolfError for a lone surrogate, which has no UTF-8 form."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PgolfError(f"the text holds a lone surrogate at character {error.start}; remove it") from error
    return caseops.encode(text) if with_caseops else text


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """CaseOps lines short enough for the trainer. Newlines stay, so that the lossless setting can learn them."""
    for text in texts:
        for line in _prepared(text).splitlines(keepends=True):
            # At most 4 bytes a character; a cut inside a word is harmless, there are few.
            yield from (line[at : at + _SENTENCE_BYTES // 4] for at in range(0, len(line), _SENTENCE_BYTES // 4))


def _training_fault(message: str, vocab_size: int) -> str:
    """A trainer's error in our words; the numbers are in its message only."""
    if most := re.search(r"<= (\d+)\.", message):
        wanted = f"choose a vocabulary of at most {most[1]} or give more text"
        return f"the text is too small for {vocab_size} tokens; {wanted}"
    if least := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return f"{vocab_size} tokens are too few for the characters of this text; choose at least {least[1]}"
    return f"cannot train a tokenizer: {' '.join(message.split())}; is there any text?"


def train_tokenizer(
    texts: Iterable[str], path: str | Path, vocab_size: int = 8192, setting: str = "record", threads: int | None = None
) -> None:
    """Train a BPE vocabulary of `vocab_size` on `texts` and write the model to `path`, whole or not at all.

    The same texts give the same file, whatever `threads`. PgolfError when the text is too small for the vocabulary or
    has too many characters for it (the limit is named), or the setting is unknown.
    """
    import sentencepiece

    if setting not in SETTINGS:
        raise PgolfError(f"unknown tokenizer setting {setting!r}; choose {' or '.join(SETTINGS)}")
    if not 272 <= vocab_size <= 1 << 16:
        raise PgolfError(f"a vocabulary holds 272 to 65536 tokens (264 are special or bytes), got {vocab_size}")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            add_dummy_prefix=False,
            character_coverage=0.999,
            normalization_rule_name="identity" if setting == "lossless" else "nmt_nfkc",
            remove_extra_whitespaces=setting == "record",
            allow_whitespace_only_pieces=setting == "lossless",  # indentation as one token
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            user_defined_symbols=list(caseops.MARKERS),
            num_threads=threads or os.cpu_count() or 1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise PgolfError(_training_fault(str(error), vocab_size)) from error
    proto = _model_proto(model.getvalue())
    proto.trainer_spec.ClearField("num_threads")  # it changes nothing but the file
    files.write_bytes(path, proto.SerializeToString(deterministic=True))
