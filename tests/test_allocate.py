"""Sensitivity against autograd, the rule behind the steps, the search for a budget, whole models in trellis form."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pgolf.banks import unbank
from pgolf.config import ModelConfig, QuantizeConfig
from pgolf.dequantize import dequantize
from pgolf.errors import PgolfError
from pgolf.model import GPT
from pgolf.quantize import allocate, collect, quantize_state, sensitivity, trellis
from pgolf.quantize.budget import Search, window
from pgolf.quantize.sensitivity import Sensitivity
from pgolf.quantize.solve import Fitted, quantize_scaled, quantize_trellis

CONFIG = QuantizeConfig(mode="trellis", states=8, passthrough=500)
VOCAB = 64


def small_model() -> GPT:
    torch.manual_seed(0)
    model = GPT(
        ModelConfig(
            num_layers=4, model_dim=32, num_heads=4, num_kv_heads=2, vocab_size=VOCAB, rope_dims=4, loop_start=1,
            loop_end=2, parallel_start_layer=3, gate_window=8,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
        model.softcap_pos.fill_(30)
        model.softcap_neg.fill_(30)
    return model


def small_slices(count: int, length: int = 24) -> list[sensitivity.Slice]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(VOCAB - 1, (1, length + 1), generator=generator) for _ in range(count)]  # 63 never occurs
    return [(row[:, :-1], row[:, 1:], torch.tensor([0, 7, length, length], dtype=torch.int32), 17) for row in rows]


# Sensitivity


def test_observer_is_told_inputs_and_outputs_of_every_matrix() -> None:
    model = small_model()
    weights = unbank(model.state_dict(), 4)
    seen: dict[str, int] = {}

    def check(names: tuple[str, ...], x: Tensor, outputs: tuple[Tensor, ...]) -> None:
        for name, output in zip(names, outputs, strict=bool(outputs)):
            if x.is_floating_point():
                torch.testing.assert_close(output, functional.linear(x, weights[name]))
            seen[name] = seen.get(name, 0) + 1

    model.observer = check
    inputs, _, cu_seqlens, longest = small_slices(1)[0]
    with torch.no_grad():
        model.hidden(inputs, cu_seqlens, longest)
    assert seen == {
        name: 3 if name.startswith(("blocks.1.", "blocks.2.")) else 1
        for name in weights
        if name == "tok_emb.weight"
        or name.endswith(("c_q.weight", "c_k.weight", "c_v.weight", "proj.weight", "fc.weight"))
    }


@pytest.mark.parametrize("at_once", [1 << 24, 5 * VOCAB])
def test_sensitivity_equals_autograd(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "LOGITS_AT_ONCE", at_once)
    model, slices = small_model(), small_slices(3)
    found = sensitivity.collect(model, slices, "cpu", torch.float32)
    assert model.observer is None and all(parameter.requires_grad for parameter in model.parameters())
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is not None]

    expected: dict[str, Tensor] = {}
    count, normed, tokens = torch.zeros(VOCAB), 0.0, 0

    def remember(names: tuple[str, ...], x: Tensor, outputs: tuple[Tensor, ...]) -> None:
        kept.extend(zip(names if x.is_floating_point() else ("input",), outputs, strict=bool(outputs)))

    for inputs, targets, cu_seqlens, longest in slices:
        kept: list[tuple[str, Tensor]] = []
        model.observer = remember
        h = model.hidden(inputs, cu_seqlens, longest)
        z = functional.linear(h, model.tok_emb.weight)
        logits = model.config.logit_softcap * torch.tanh(z / model.config.logit_softcap)
        total = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        kept.append(("tok_emb.weight", z))
        summed: dict[str, Tensor] = {}  # over the passes of a looped layer
        for (name, _), gradient in zip(kept, torch.autograd.grad(total, [output for _, output in kept]), strict=True):
            summed[name] = summed.get(name, torch.zeros(())) + gradient
        for name, gradient in summed.items():
            square = gradient.square().flatten(0, 1).sum(dim=0)
            if name == "input":
                normed += float(square.mean())
            else:
                expected[name] = expected.get(name, torch.zeros(())) + square
        count += torch.bincount(inputs.flatten(), minlength=VOCAB)
        tokens += inputs.numel()
    assert found.outputs.keys() == expected.keys() and len(expected) == 4 * 6 + 1
    for name, square in expected.items():
        torch.testing.assert_close(found.outputs[name], square / tokens, rtol=1e-4, atol=1e-7)
    inputs_share = count / tokens * normed / tokens / model.tok_emb.weight.detach().square().mean(dim=1)
    torch.testing.assert_close(found.inputs, inputs_share, rtol=1e-4, atol=1e-8)
    assert found.inputs[VOCAB - 1] == 0


def test_the_observer_leaves_on_failure_and_no_slice_is_refused() -> None:
    model = small_model()
    with pytest.raises(PgolfError, match="no batch"):
        sensitivity.collect(model, [], "cpu", torch.float32)
    inputs, targets, cu_seqlens, longest = small_slices(1)[0]
    with pytest.raises(IndexError):
        sensitivity.collect(model, [(inputs + 999, targets, cu_seqlens, longest)], "cpu", torch.float32)
    assert model.observer is None and all(parameter.requires_grad for parameter in model.parameters())


def test_ranks_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity.parallel, "mean_", lambda tensors: [tensor.mul_(0.5) for tensor in tensors])
    alone, ranks = (
        sensitivity.collect(small_model(), small_slices(2), "cpu", torch.float32, all_reduce=all_reduce)
        for all_reduce in (False, True)
    )
    torch.testing.assert_close(ranks.inputs, alone.inputs / 2)
    for name, rows in alone.outputs.items():
        torch.testing.assert_close(ranks.outputs[name], rows / 2)


def test_a_slice_ends_where_it_is_cut() -> None:
    inputs, targets = torch.arange(10)[None], torch.arange(1, 11)[None]
    cu_seqlens = torch.tensor([0, 3, 8, 10, 10], dtype=torch.int32)
    short = sensitivity.take(inputs, targets, cu_seqlens, 5, 6)
    assert short[0].tolist() == [[0, 1, 2, 3, 4, 5]] and short[1].tolist() == [[1, 2, 3, 4, 5, 6]]
    assert short[2] is not None and short[2].tolist() == [0, 3, 6, 6, 6]
    whole = sensitivity.take(inputs, targets, cu_seqlens, 5, 99)
    assert whole[0].shape == (1, 10) and whole[2] is not None and whole[2].tolist() == cu_seqlens.tolist()


# Steps


def made_up(rows: tuple[int, ...] = (96, 48, 64), cols: int = 40) -> dict[str, Any]:
    """Matrices, statistics and sensitivities of three matrices, the embedding among them."""
    generator = torch.Generator().manual_seed(3)
    names = ("blocks.0.mlp.fc.weight", "blocks.0.attn.proj.weight", "tok_emb.weight")
    matrices, hessians, act_rms, outputs = {}, {}, {}, {}
    for index, (name, count) in enumerate(zip(names, rows, strict=True)):
        matrices[name] = torch.randn(count, cols, generator=generator) * (0.1 + 0.2 * index)
        mixing = torch.randn(cols, cols, generator=generator) * torch.logspace(-1, 0.5, cols)
        x = torch.randn(400, cols, generator=generator) @ mixing
        hessians[name], act_rms[name] = x.T @ x / 4, x.square().mean(dim=0).sqrt()
        outputs[name] = 1e-4 * torch.exp(1.5 * torch.randn(count, generator=generator)) * 10.0 ** (index - 1)
    inputs = torch.rand(rows[2], generator=generator) * 1e-5
    return {
        "matrices": matrices, "hessians": hessians, "act_rms": act_rms, "sensitivity": Sensitivity(outputs, inputs)
    }  # fmt: skip


def column_cost(one: allocate.Plan) -> Tensor:
    """d_c of the Hessian as it stands, in the order of processing."""
    return one.factor.upper.diagonal().square().reciprocal()


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("column_steps", [True, False])
def test_every_matrix_costs_the_same_an_entry(power: float, column_steps: bool) -> None:
    config = dataclasses.replace(CONFIG, row_floor=0.0, row_power=power, column_steps=column_steps)
    given = made_up()
    plans = allocate.plan(**given, config=config)
    for name, one in plans.items():
        # Of the mean of x xᵀ: the plan's own factor is of XᵀX / batches, except the embedding's.
        scale = 1.0 if name == "tok_emb.weight" else 4 / 400
        d = column_cost(one) * scale
        column = d.log().mean().exp() if column_steps else d.mean()
        rows = one.sensitivity * one.step.square() * column
        assert float(rows.mean()) == pytest.approx(1, rel=1e-4), name
        assert float(rows.std() / rows.mean()) < 1e-6 or power < 1
        if power == 0:
            assert float(one.step.std()) < 1e-9 * float(one.step.mean())
        if name != "tok_emb.weight":
            torch.testing.assert_close(one.hessian, given["hessians"][name] * scale, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(one.sensitivity.float(), given["sensitivity"].outputs[name])


def test_batches_in_a_hessian_change_no_step() -> None:
    given = made_up()
    first = allocate.plan(**given, config=CONFIG)
    other = allocate.plan(**given | {"hessians": {n: 7 * h for n, h in given["hessians"].items()}}, config=CONFIG)
    for name, one in first.items():
        torch.testing.assert_close(one.step, other[name].step, rtol=1e-4, atol=0)


def test_the_embedding_counts_as_head_and_as_input() -> None:
    """A change of equal size in every entry costs what the two uses cost together."""
    given = made_up()
    one = allocate.plan(**given, config=dataclasses.replace(CONFIG, row_floor=0.0))["tok_emb.weight"]
    hessian = given["hessians"]["tok_emb.weight"] * 4 / 400
    head = given["sensitivity"].outputs["tok_emb.weight"].double() * float(hessian.trace())
    as_input = given["sensitivity"].inputs.double() * len(hessian)
    torch.testing.assert_close(one.sensitivity * float(one.hessian.trace()), head + as_input, rtol=1e-4, atol=0)
    share = (one.hessian - hessian).diagonal().mean()
    uses = given["sensitivity"].inputs.sum() / given["sensitivity"].outputs["tok_emb.weight"].sum()
    torch.testing.assert_close(share, uses, rtol=0.01, atol=0)


def test_the_floor_and_rows_without_gradient() -> None:
    given = made_up()
    name = "blocks.0.mlp.fc.weight"
    given["sensitivity"].outputs[name][:3] = 0
    steps = allocate.plan(**given, config=dataclasses.replace(CONFIG, row_floor=0.04, row_power=1.0))[name].step
    mean = float(given["sensitivity"].outputs[name].mean())
    largest = given["sensitivity"].outputs[name].argmax()
    ratio = math.sqrt(float(given["sensitivity"].outputs[name][largest]) / (0.04 * mean))
    assert float(steps[0] / steps[largest]) == pytest.approx(ratio, rel=1e-5)


def test_without_sensitivity_steps_are_half_the_records() -> None:
    given = made_up() | {"sensitivity": None}
    plans = allocate.plan(**given, config=CONFIG)
    for name, clip, top in (("blocks.0.mlp.fc.weight", 11.5, 62), ("tok_emb.weight", 14.0, 126)):
        torch.testing.assert_close(plans[name].step, clip * given["matrices"][name].double().std(dim=1) / top)
        assert bool((plans[name].sensitivity == 1).all())


def test_steps_stop_at_the_largest_weight_and_where_nothing_is_left() -> None:
    one = allocate.plan(**made_up(), config=CONFIG)["blocks.0.mlp.fc.weight"]
    peak = one.weight.abs().amax(dim=1).double()
    torch.testing.assert_close(one.steps(-200.0), peak / 127)
    coarsest = one.steps(200.0)
    assert bool((trellis.solve(one.weight, one.factor, coarsest, states=8).q == 0).all())
    low, high = allocate.bounds({"one": one})
    torch.testing.assert_close(one.steps(low), peak / 127)
    torch.testing.assert_close(one.steps(high), coarsest)
    sizes = [one.bits(octaves) for octaves in np.linspace(low, high, 30)]
    assert sizes == sorted(sizes, reverse=True)


# The search


def sizes_of(search: Search, size: Callable[[float], float]) -> list[int]:
    while (octaves := search.next()) is not None:
        search.tell(octaves, round(size(octaves)))
    return [one.size for one in search.tries]


def model(octaves: float) -> float:
    return 3e6 * math.log2(1 + 2.0 ** (8 - 2 * octaves)) / 2


@pytest.mark.parametrize("budget", [1_500_000, 4_000_000, 12_000_000])
@pytest.mark.parametrize("wrong", [lambda u: 0.0, lambda u: 20_000 * u, lambda u: 150_000 * math.sin(u)])
def test_a_smooth_size_is_met_in_four_solves(budget: int, wrong: Callable[[float], float]) -> None:
    search = Search(model, 90_000, (-6.0, 12.0), budget)
    sizes = sizes_of(search, lambda u: 90_000 + 0.93 * model(u) + wrong(u))
    assert search.outcome == "filled" and len(sizes) <= 4
    assert search.best is not None and search.best.size == sizes[-1] and window(budget)[0] <= sizes[-1] <= budget


@pytest.mark.parametrize("seed", range(40))
def test_a_jumpy_size_is_never_too_large_in_the_end(seed: int) -> None:
    random = np.random.default_rng(seed)
    jumps = random.uniform(0.9, 1.1, 1000)
    search = Search(model, 0, (-6.0, 12.0), 4_000_000)
    sizes_of(search, lambda u: model(u) * jumps[int(u * 50)])
    assert search.best is not None and search.best.size <= 4_000_000
    assert search.best.size == max(one.size for one in search.tries if one.size <= 4_000_000)
    assert search.best.size > 3_500_000


def test_a_model_smaller_than_the_budget_gets_the_finest_steps() -> None:
    search = Search(model, 0, (-2.0, 12.0), 10**9)
    assert len(sizes_of(search, model)) == 1 and search.outcome == "finest"
    assert search.best is not None and search.best.octaves == -2.0


def test_a_budget_below_the_coarsest_steps_is_refused() -> None:
    search = Search(model, 0, (-2.0, 12.0), 50_000)
    with pytest.raises(
        PgolfError, match="coarsest steps make 60,000 bytes, the budget is 50,000; raise quantize.budget"
    ):
        sizes_of(search, lambda u: max(model(u), 60_000.0))
    # A cliff that no model foretells is climbed down in the end.
    search = Search(model, 0, (-2.0, 12.0), 50_000)
    sizes_of(search, lambda u: 49_000.0 if u > 11.9 else 1e9 + model(u))
    assert search.best is not None and search.best.size == 49_000


def test_windows() -> None:
    assert window(16_000_000) == (15_992_000, 16_000_000)
    assert window(1_600_000) == (1_599_200, 1_600_000)
    assert window(160_000) == (159_488, 160_000)
    assert window(64_000_000) == (63_992_000, 64_000_000)


# A whole model


def entropy_size(state: dict[str, np.ndarray]) -> int:
    """A stand-in for an artifact's bytes: the levels' estimate, 5,000 of code, everything else as it is."""
    levels = sum(trellis.estimate_bits(torch.from_numpy(value)) for name, value in state.items() if name.endswith(".q"))
    return 5000 + int(levels / 8) + sum(value.nbytes for name, value in state.items() if not name.endswith(".q"))


def entropy_pack(state: dict[str, np.ndarray]) -> bytes:
    return bytes(entropy_size(state))


def whole(
    budget: int, pack: Callable[[dict[str, np.ndarray]], bytes] = entropy_pack, **changes: Any
) -> tuple[dict[str, Any], Fitted]:
    given = made_up()
    given["matrices"]["blocks.0.attn.attn_gate_w"] = torch.ones(4, 8)
    given["matrices"]["softcap_pos"] = torch.tensor(30.0)
    given |= {name: changes.pop(name) for name in tuple(changes) if name in given}
    return given, quantize_trellis(**given, config=dataclasses.replace(CONFIG, **changes), budget=budget, pack=pack)


@pytest.mark.parametrize("column_steps", [True, False])
@pytest.mark.parametrize("budget", [8_000, 10_000])
def test_a_model_fills_its_budget(budget: int, column_steps: bool) -> None:
    sizes: list[int] = []

    def pack(state: dict[str, np.ndarray]) -> bytes:
        sizes.append(entropy_size(state))
        return bytes(sizes[-1])

    given, fitted = whole(budget, pack, column_steps=column_steps)
    size = entropy_size(fitted.state)
    assert size == len(fitted.packed) == max(size for size in sizes if size <= budget)
    assert window(budget)[0] <= size <= budget and fitted.report["outcome"] == "filled" and len(sizes) <= 5
    weights = dequantize(fitted.state)
    assert weights.keys() == given["matrices"].keys()
    for name in given["hessians"]:
        assert fitted.state[f"{name}.q"].dtype == np.int8 and fitted.state[f"{name}.scale"].dtype == np.float16
        assert (f"{name}.step" in fitted.state) == column_steps
        q = torch.from_numpy(fitted.state[f"{name}.q"])
        assert fitted.report["matrices"][name]["bits"] == pytest.approx(trellis.estimate_bits(q) / q.numel())
    assert not [name for name in fitted.state if ".lq" in name or ".awqg" in name]
    # Reloaded, the weights lose what the report says.
    config = dataclasses.replace(CONFIG, column_steps=column_steps)
    matrices = {name: given["matrices"][name] for name in given["hessians"]}
    plans = allocate.plan(matrices, given["hessians"], given["act_rms"], given["sensitivity"], config)
    for name, one in plans.items():
        lost = one.cost(one.weight - torch.from_numpy(weights[name]))
        assert lost == pytest.approx(fitted.report["matrices"][name]["nats"], rel=1e-5) and lost > 0


def test_a_larger_budget_loses_less_and_theory_less_than_equal_steps() -> None:
    def nats(budget: int, **changes: Any) -> float:
        return sum(one["nats"] for one in whole(budget, **changes)[1].report["matrices"].values())

    full = nats(9_000)
    assert nats(10_500) < 0.7 * full
    assert full < 0.97 * nats(9_000, row_power=0.0)
    assert full < 0.97 * nats(9_000, column_steps=False)


@pytest.mark.parametrize("awq_groups", [0, 1])
@pytest.mark.parametrize("budget", [8_500, 9_500])
def test_the_records_clips_scaled_fill_a_budget(budget: int, awq_groups: int) -> None:
    given = made_up()
    del given["sensitivity"]
    config = QuantizeConfig(mode="record", passthrough=500, awq_groups=awq_groups, awq_group_size=8, lqer_rank=0)
    seen: list[tuple[int, int, str]] = []
    fitted = quantize_scaled(
        **given, config=config, budget=budget, pack=entropy_pack, progress=lambda *step: seen.append(step)
    )
    assert window(budget)[0] <= len(fitted.packed) <= budget and fitted.report["outcome"] == "filled"
    tries = fitted.report["tries"]
    assert [size for _, size in tries][-1] == len(fitted.packed) and len(tries) <= 5
    assert [step[0] for step in seen] == list(range(1, 3 * len(tries) + 1))
    factor = 2.0 ** tries[-1][0]
    scaled = {name: getattr(config, name) * factor for name in ("mlp_clip", "attn_clip", "matrix_clip", "embed_clip")}
    expected = quantize_state(**given, config=dataclasses.replace(config, **scaled))[0]
    assert expected.keys() == fitted.state.keys()
    assert all(np.array_equal(expected[name], fitted.state[name]) for name in expected)


def test_progress_counts_every_solve() -> None:
    seen: list[tuple[int, int, str]] = []
    given = made_up()
    fitted = quantize_trellis(
        **given, config=CONFIG, budget=9_000, pack=entropy_pack, progress=lambda *step: seen.append(step)
    )
    assert [step[0] for step in seen] == [3 * solve for solve in range(1, len(fitted.report["tries"]) + 1)]
    assert all(done <= total for done, total, _ in seen)


def test_extreme_weights_stay_within_the_budget() -> None:
    """Rows of zeros, tiny and huge rows, one heavy entry, dead columns."""
    given = made_up()
    weight = given["matrices"]["blocks.0.mlp.fc.weight"]
    weight[0], weight[1, 5], weight[2], weight[3] = 0, 300.0, 1e-4 * weight[2], 50 * weight[3]
    given["matrices"]["blocks.0.attn.proj.weight"].zero_()
    hessian = given["hessians"]["blocks.0.mlp.fc.weight"]
    hessian[7], hessian[:, 7] = 0, 0
    for budget in (7_000, 9_000, 10**7):
        fitted = whole(budget, **given)[1]
        assert entropy_size(fitted.state) <= budget and fitted.report["outcome"] == (
            "filled" if budget < 10**7 else "finest"
        )
    assert all(np.isfinite(value).all() for value in dequantize(fitted.state).values())


def test_errors_name_the_matrix_or_the_budget() -> None:
    given, name = made_up(), "blocks.0.mlp.fc.weight"
    changes: list[tuple[str, dict[str, Any]]] = [
        ("no Hessian", {"hessians": {}}),
        ("no input RMS", {"act_rms": {}}),
        ("no sensitivity", {"sensitivity": Sensitivity({}, torch.zeros(64))}),
        ("cannot be inverted", {"hessians": given["hessians"] | {name: -torch.eye(40)}}),
        ("undefined weights", {"matrices": given["matrices"] | {name: torch.full((96, 40), torch.nan)}}),
        ("beyond fp16", {"matrices": given["matrices"] | {name: given["matrices"][name] * 1e8}}),
    ]
    for text, change in changes:
        with pytest.raises(PgolfError, match=rf"{text}.*{name}|{name}.*{text}"):
            whole(9_000, **change)
    with pytest.raises(PgolfError, match="the budget is 5,100"):
        whole(5_100)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"mode": "tcq"}, "quantize.mode must be record or trellis, got 'tcq'"),
        ({"states": 16}, "quantize.states"),
        ({"budget": -1}, "quantize.budget"),
        ({"rate": math.nan}, "quantize.rate"),
        ({"row_power": 3.0}, "quantize.row_power"),
        ({"row_floor": 2.0}, "quantize.row_floor"),
        ({"sensitivity_tokens": -5}, "quantize.sensitivity_tokens"),
        ({"calibration_batches": -1}, "quantize.calibration_batches"),
    ],
)
def test_settings_are_checked(change: dict[str, Any], text: str) -> None:
    with pytest.raises(PgolfError, match=text):
        QuantizeConfig(**change)


def test_column_factors_are_multiplied_in() -> None:
    q = np.arange(-6, 6, dtype=np.int8).reshape(3, 4)
    state = {"m.q": q, "m.scale": np.array([1, 2, 0.5], np.float16), "m.step": np.array([0, 8, -16, 3], np.int8)}
    expected = q * np.array([[1], [2], [0.5]]) * np.array([1, 2, 0.25, 2**0.375])
    np.testing.assert_allclose(dequantize(state)["m"], expected, rtol=1e-6)
    assert list(dequantize(state)) == ["m"]
    with pytest.raises(PgolfError, match=r"m\.step must have the shape \(4,\), got \(3,\)"):
        dequantize(state | {"m.step": np.zeros(3, np.int8)})


def test_statistics_of_a_model_reach_every_plan() -> None:
    """From a model to its state, nothing made up; in record mode the trellis's settings change nothing."""
    model = small_model()
    slices = small_slices(2)
    hessians, act_rms = collect(model, [(one[0], one[2], one[3]) for one in slices], "cpu", torch.float32)
    costs = sensitivity.collect(model, slices, "cpu", torch.float32)
    matrices = {name: value.detach() for name, value in unbank(model.state_dict(), 4).items()}
    fitted = quantize_trellis(matrices, hessians, act_rms, costs, CONFIG, 30_000, entropy_pack)
    chosen = {name: weight for name, weight in matrices.items() if name in hessians}
    plans = allocate.plan(chosen, hessians, act_rms, costs, CONFIG)
    weights = dequantize(fitted.state)
    lost = sum(one.cost(one.weight - torch.from_numpy(weights[name])) for name, one in plans.items())
    assert fitted.report["matrices"].keys() == plans.keys()
    assert 0 < lost < 0.05 * sum(one.cost(one.weight) for one in plans.values())  # of storing nothing
    record = QuantizeConfig(mode="record", passthrough=500)
    other = QuantizeConfig(mode="record", passthrough=500, states=4, rate=1.0, row_power=0.0, budget=1)
    first, second = (quantize_state(matrices, hessians, act_rms, config)[0] for config in (record, other))
    assert all(np.array_equal(first[name], second[name]) for name in first) and first.keys() == second.keys()
