"""Adapters against golden vectors, and what a step does to documents that are finished."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pgolf.config import ModelConfig, TTTConfig
from pgolf.errors import PgolfError
from pgolf.layers import NO_HOOKS, Hooks, at, attend, mlp
from pgolf.model import GPT
from pgolf.score import token_losses
from pgolf.ttt.adapters import NAMES, READS, Adapters, Rows, output_width, uniform_a

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = ModelConfig(
    num_layers=4, model_dim=16, num_heads=2, num_kv_heads=1, vocab_size=32, mlp_mult=2.0, rope_dims=4,
    loop_start=1, loop_end=1, parallel_start_layer=3, xsa_last_n=4, gate_window=8,
)  # fmt: skip
CONFIG = TTTConfig(rank=2, alpha=4.0, lr=0.01, targets="q,k,v,o,mlp,head")


def adapters(documents: int = 3, config: TTTConfig = CONFIG) -> Adapters:
    return Adapters(MODEL, GPT(MODEL).slots, config, documents, uniform_a(0))


def delta(rows: Rows, target: str, slot: int, x: torch.Tensor) -> torch.Tensor:
    """What the adapter of one target adds."""
    _, add = rows.read(READS[target], slot, x)
    return add((target,), torch.zeros(*x.shape[:2], output_width(MODEL, target)))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def model_arguments(config: dict) -> dict:
    return {key: value for key, value in config.items() if key in ModelConfig.__dataclass_fields__}


@pytest.mark.golden
def test_golden_step(golden):
    """Losses, gradients and one AdamW step of given adapters; targets, rank and shapes come from the file."""
    base = np.load(golden("model.npz"), allow_pickle=False)
    file = np.load(golden("ttt_step.npz"), allow_pickle=False)

    def group(archive, prefix):
        return {
            key.removeprefix(prefix): torch.from_numpy(archive[key]) for key in archive.files if key.startswith(prefix)
        }

    model = GPT(ModelConfig(**model_arguments(json.loads(str(base["config"])))))
    model.load_state_dict(group(base, "param."))
    model.requires_grad_(False)
    model.looping = True

    values = group(file, "lora.")
    stems = {re.sub(r"(\.\d+)?\.[AB]$", "", name) for name in values}
    some_a = next(tensor for name, tensor in values.items() if name.endswith(".A"))
    config = TTTConfig(
        rank=some_a.shape[1],
        alpha=float(file["alpha"]),
        targets=",".join(target for target, stem in NAMES.items() if stem in stems),
    )
    lora = Adapters(model.config, model.slots, config, some_a.shape[0], uniform_a(0))
    lora.load(values)

    ids, targets = torch.from_numpy(file["input_ids"]), torch.from_numpy(file["target_ids"])
    rows = lora.rows()
    losses = token_losses(model, model.hidden(ids, adapters=rows), targets, rows)
    assert relative(losses.detach(), torch.from_numpy(file["per_token_loss"])) <= 1e-5
    losses[:, 8:24].mean(1).sum().backward()
    gradients = lora.named_grads()
    for name, expected in group(file, "grad.").items():
        assert relative(gradients[name], expected) <= 1e-4, name
    lora.step()
    stepped = lora.named()
    for name, expected in group(file, "stepped.").items():
        assert relative(stepped[name], expected) <= 1e-6, name


def test_fresh_adapters_change_nothing():
    model = GPT(MODEL).initialize(0)
    ids = torch.randint(0, 32, (3, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.hidden(ids, adapters=adapters().rows()), model.hidden(ids))


def test_targets_choose_the_adapted_projections():
    rows = adapters(config=TTTConfig(rank=2, targets="k,head")).rows()
    x = torch.ones(3, 5, 16)
    assert delta(rows, "k", 0, x).shape == (3, 5, 8)
    assert delta(rows, "head", 0, x).shape == (3, 5, 32)
    out = torch.ones(3, 5, 16 + 2 * 8)
    _, add = rows.read("attention", 0, x)
    assert add(("q", "v"), out) is out and add(("q", "k", "v"), out) is not out
    same, add = rows.read("mlp", 0, x)
    assert same is x and add(("mlp",), out) is out


def test_delta_is_the_scaled_product_of_its_own_document():
    lora = adapters()
    weights = lora.named()
    weights["o_loras.1.B"].normal_(generator=torch.Generator().manual_seed(1))
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(2))
    expected = [2.0 * x[b] @ weights["o_loras.1.A"][b].T @ weights["o_loras.1.B"][b].T for b in range(3)]
    torch.testing.assert_close(delta(lora.rows(), "o", 1, x), torch.stack(expected))
    torch.testing.assert_close(delta(lora.rows(first=1), "o", 1, x[1:]), torch.stack(expected[1:]))


def test_initial_a_is_uniform_and_repeatable():
    draw = uniform_a(7)((3, 4, 16))
    assert torch.equal(draw, uniform_a(7)((3, 4, 16))) and not torch.equal(draw, uniform_a(8)((3, 4, 16)))
    wide = uniform_a(0)((1, 1000, 100))
    assert float(wide.abs().max()) <= 0.1
    assert float(wide.std()) == pytest.approx(0.1 / 3**0.5, rel=0.01)


@pytest.mark.parametrize("needs_x", [True, False])
@pytest.mark.parametrize("targets", ["q,k,v,o,mlp,head", "k,o", "v", "o"])
@pytest.mark.parametrize("first", [0, 1])
def test_gradients_are_those_of_autograd(first, targets, needs_x):
    """Those of the adapters, written straight to their places, and that of the x which they and a product read."""
    lora, generator = adapters(config=dataclasses.replace(CONFIG, targets=targets)), torch.Generator().manual_seed(1)
    weights = lora.named()
    for tensor in weights.values():
        tensor.normal_(generator=generator)
    x, base, other = (torch.randn(3 - first, 5, width, generator=generator) for width in (16, 32, 16))
    places = torch.tensor([[1, 3], [4, 0], [2, 2]])[first:]
    matrix = torch.randn(32, 16, generator=generator)
    plain = {name: tensor[first:].clone().requires_grad_() for name, tensor in weights.items()}

    def product(target: str, x: torch.Tensor) -> torch.Tensor:
        name = f"{target}_loras.0"
        if f"{name}.A" not in plain:
            return torch.zeros(*x.shape[:2], output_width(MODEL, target))
        return 2.0 * x @ plain[f"{name}.A"].mT @ plain[f"{name}.B"].mT

    expected_x = x.clone().requires_grad_(needs_x)
    read = expected_x.sin()  # as in the network, no leaf
    expected = read @ matrix.T + base + torch.cat([product(target, read) for target in "qkv"], dim=-1)
    expected_o = at(other + product("o", read), places)
    (expected.square().sum() + expected_o.square().sum()).backward()

    found_x = x.clone().requires_grad_(needs_x)
    read, add = lora.rows(first).read("attention", 0, found_x.sin())
    assert read.requires_grad == needs_x
    found = add(("q", "k", "v"), read @ matrix.T + base)
    found_o = add(("o",), at(other, places), places)
    (found.square().sum() + found_o.square().sum()).backward()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found_o, expected_o, rtol=1e-4, atol=1e-3)
    if needs_x:
        torch.testing.assert_close(found_x.grad, expected_x.grad, rtol=1e-4, atol=1e-3)
    for name, grad in lora.named_grads().items():
        if plain[name].grad is None:
            assert not grad.any(), name
        else:
            torch.testing.assert_close(grad[first:], plain[name].grad, rtol=1e-4, atol=1e-3)
            assert not grad[:first].any()


class Sums(TorchDispatchMode):
    """Counts the additions of two tensors of one shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_):
            self.count += all(isinstance(each, torch.Tensor) and each.shape == self.shape for each in arguments)
        return function(*arguments, **(options or {}))


def test_adapters_leave_no_gradients_to_be_added_up():
    """In one layer, the sums that are left are those of the network itself."""
    model = GPT(MODEL).initialize(0).requires_grad_(False)
    layer = model._layers(model.frozen_weights())[0]
    context = model._context(torch.arange(5.0), None, None)
    n = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    lora = adapters()
    for tensor in lora.named().values():
        tensor.normal_(generator=torch.Generator().manual_seed(1))
    rows = lora.rows()
    results = {}
    for adapted in (False, True):
        hooks = Hooks(lambda group, x: rows.read(group, 0, x)) if adapted else NO_HOOKS
        x = n.clone().requires_grad_()
        out = mlp(attend(x.cos(), None, layer, context, False, hooks), layer, hooks)
        with Sums(n.shape) as sums:
            out.square().sum().backward()
        results[adapted] = sums.count, x.grad
    assert results[True][0] == results[False][0]
    assert not torch.allclose(results[True][1], results[False][1])  # the adapters did take part


def test_a_projection_that_is_kept_for_a_backward_pass_is_not_changed_unnoticed():
    out = torch.randn(3, 5, 16, requires_grad=True).exp()  # whose backward reads its result
    lora = adapters()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        lora.rows().read("attention", 0, torch.ones(3, 5, 16))[1](("o",), out).sum().backward()


def test_step_matches_adamw_written_out_and_decays_left_out_documents():
    lora = adapters()
    names = list(lora.named())
    for name in names:
        lora.named()[name].normal_(generator=torch.Generator().manual_seed(names.index(name)))
    before = {name: tensor.clone() for name, tensor in lora.named().items()}
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3))
    delta(lora.rows(first=1), "k", 0, x).square().sum().backward()
    grad = {name: tensor.clone() for name, tensor in lora.named_grads().items()}
    assert not grad["k_loras.0.B"][0].any() and grad["k_loras.0.B"][1:].all()
    lora.step()
    rate = CONFIG.lr * CONFIG.lr_mult
    for name, tensor in lora.named().items():
        # betas (0, b2): after one step the bias-corrected second moment is the squared gradient
        update = rate * grad[name] / (grad[name].abs() + CONFIG.eps)
        torch.testing.assert_close(tensor, before[name] * (1 - rate * CONFIG.weight_decay) - update)


def test_start_batch_keeps_a_and_reset_returns_it():
    lora, fresh = adapters(), adapters()
    x = torch.ones(3, 5, 16)
    for _ in range(2):  # B moves first, then A
        delta(lora.rows(), "k", 0, x).sum().backward()
        lora.step()
    moved = {name: tensor.clone() for name, tensor in lora.named().items()}
    lora.start_batch()
    for name, tensor in lora.named().items():
        assert torch.equal(tensor, moved[name] if name.endswith("A") else torch.zeros_like(tensor))
    # a first step after start_batch is the first step of AdamW again: its state was dropped
    lora.reset_a()
    for each in (lora, fresh):
        delta(each.rows(), "k", 0, x).sum().backward()
        each.step()
    for name, tensor in fresh.named().items():
        assert torch.equal(tensor, lora.named()[name]), name


def test_a_copy_in_the_compute_type_follows_the_weights():
    lora = Adapters(MODEL, GPT(MODEL).slots, CONFIG, 3, uniform_a(0), dtype=torch.bfloat16)
    x = torch.ones(3, 5, 16, dtype=torch.bfloat16)

    def same() -> bool:
        return torch.equal(lora.seen, torch.cat([t.flatten() for t in weights_in_order()]).bfloat16())

    def weights_in_order() -> list[torch.Tensor]:
        views = lora.views(lora._weight)
        return [*views.a.values(), *views.b.values()]

    def take_step() -> None:
        lora.rows().read("attention", 0, x)[1](("o",), torch.zeros(3, 5, 16, dtype=torch.bfloat16)).sum().backward()
        lora.step()

    def load() -> None:
        lora.load({name: tensor + 1 for name, tensor in adapters().named().items()})

    for change in (take_step, take_step, lora.start_batch, lora.reset_a, load):
        before = lora.seen.clone()
        change()
        assert same() and not torch.equal(before, lora.seen)
    assert lora.grad.dtype == torch.bfloat16


def test_refusals():
    with pytest.raises(PgolfError, match="targets is empty"):
        adapters(config=TTTConfig(targets=""))
    lora = adapters(config=TTTConfig(rank=2, targets="head"))
    good = {name: tensor.clone() for name, tensor in lora.named().items()}
    with pytest.raises(PgolfError, match="lm_head_lora.B"):
        lora.load({"lm_head_lora.A": good["lm_head_lora.A"]})
    with pytest.raises(PgolfError, match="must have shape"):
        lora.load(good | {"lm_head_lora.A": torch.zeros(1)})
