"""Sample text from a model."""

import torch

from pgolf.data.tokenizer import Tokenizer
from pgolf.model import BOS, GPT


@torch.no_grad()
def sample(
    model: GPT, tokenizer: Tokenizer, prompt: str, tokens: int, temperature: float, top_k: int, context: int, seed: int
) -> str:
    """Continue `prompt` by up to `tokens` tokens, stopping at a document's end; same seed, same text (on one device).

    temperature 0 takes the likeliest token; top_k 0 keeps all. Every token runs the window of `context` tokens anew:
    a sampler for looking at models, not for serving them.
    """
    device = model.tok_emb.weight.device
    generator = torch.Generator().manual_seed(seed)
    ids = [BOS, *(int(token) for token in tokenizer.encode_ids(prompt))]
    for _ in range(tokens):
        window = torch.tensor([ids[-context:]], device=device)
        logits = model.eval_logits(model.hidden(window)[:, -1:])[0, 0].cpu()
        logits[[0, 2, 3]] = float("-inf")  # pad, eos and unk never belong to text
        if temperature > 0:
            logits /= temperature
            if top_k:
                logits[logits < logits.topk(min(top_k, len(logits))).values[-1]] = float("-inf")
            token = int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
        else:
            token = int(logits.argmax())
        if token == BOS:
            break
        ids.append(token)
    return tokenizer.decode(ids[1:], strict=False)
