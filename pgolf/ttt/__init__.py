"""Phased test-time training: score a chunk of each document, then adapt that document's LoRA to it, and go on.

Order of work (recipe section 5): documents sorted by length are cut into batches, which run longest first. In a
batch every document has adapters of its own; chunk by chunk the loss is recorded, and only then do the adapters
take a step on it. When enough documents are scored, the network itself takes a few steps on them (`phase`) and
scoring goes on. A prediction so depends on nothing but earlier tokens of its document and documents already scored,
and every target is scored once: both are tested, the latter checked in every run.

Modes: window runs all of a chunk's context anew, as the record does. Streaming keeps the keys and values of earlier
tokens (`memory`) as they were computed by the adapters of then, and runs only the last `ttt.refresh` tokens anew.
"""

from pgolf.ttt.evaluation import TTTResult, evaluate

__all__ = ["TTTResult", "evaluate"]
