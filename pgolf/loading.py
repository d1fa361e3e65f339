"""From an artifact to a model that scores: unpack, dequantize, put the matrices back into their banks."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pgolf import artifact, banks
from pgolf.config import EvalConfig, ModelConfig, TTTConfig, from_dict
from pgolf.dequantize import dequantize
from pgolf.errors import PgolfError
from pgolf.model import GPT


class Loaded(NamedTuple):
    """A model ready to score, and the settings that its artifact carries."""

    model: GPT
    looping: bool
    eval: EvalConfig
    ttt: TTTConfig
    seed: int
    tokenizer_sha256: str


def model_from_state(state: dict[str, np.ndarray], config: ModelConfig) -> GPT:
    """Dequantize a flat quantized state into a float32 model on the CPU; PgolfError when it does not fit `config`."""
    try:
        flat = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in dequantize(state).items()}
        whole = banks.bank(flat, config.num_layers)
        # Before anything is made of the size that the metadata claims.
        layers, dim = config.num_layers, config.model_dim
        for name, shape in (
            ("tok_emb.weight", (config.vocab_size, dim)),
            ("qo_bank", (2 * layers, dim, dim)),
            ("mlp_up_bank", (layers, config.mlp_dim, dim)),
        ):
            if tuple(whole[name].shape) != shape:
                raise ValueError(f"{name} is {list(whole[name].shape)}, not {list(shape)}")
        with torch.device("meta"):  # nothing is drawn or allocated only to be overwritten
            model = GPT(config)
        shapes = {name: value.shape for name, value in model.state_dict().items()}
        given = {name: value.reshape(shapes.get(name, value.shape)) for name, value in whole.items()}
        model.load_state_dict(given, assign=True)
    except (KeyError, RuntimeError, ValueError) as error:
        raise PgolfError(f"the weights do not fit the model: {str(error).splitlines()[0]}") from error
    return model


def load(path: str | Path, device: torch.device, dtype: torch.dtype = torch.float32) -> Loaded:
    """Read `model.pgolf`; PgolfError says what is wrong with a file that is damaged or of another kind."""
    packed = artifact.load(path)
    metadata: dict[str, Any] = packed.metadata
    try:
        config = from_dict(metadata["model"], ModelConfig)
        model = model_from_state(packed.state, config).to(device)
        model.dtype = dtype
        model.looping = bool(metadata["looping"])
        return Loaded(
            model,
            model.looping,
            from_dict(metadata["eval"], EvalConfig),
            from_dict(metadata["ttt"], TTTConfig),
            int(metadata["seed"]),
            str(metadata["tokenizer_sha256"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise PgolfError(f"{path}: metadata lacks or garbles {error}; pack the model again") from error
    except PgolfError as error:
        raise PgolfError(f"{path}: {error}") from error
