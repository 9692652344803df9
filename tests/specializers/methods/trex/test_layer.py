"""The gate of T-REX against slow oracles: each claim about one adapted layer, one test."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metier.agents import AdapterError
from metier.specializers.adapters.trex_shape import K_TASK, SHARPNESS, TrexShape
from metier.specializers.methods.trex.layer import (
    TrexLinear,
    ZeroIntuition,
    combine_experts,
    expert_gate,
    gated_update,
    intuition_scope,
)

R1, R2, D_IN, D_OUT = 3, 5, 12, 9  # r1 and r2 differ, or a transposed gate would pass
EXPERTS = R1 * R2
SHAPE = TrexShape.released(R1, R2)
NEUTRAL, ALL_TOKEN, ALL_TASK = 0.0, 1.0, -1.0  # omega: alpha is 0.5, 1 and 0


def parts(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x": (2, 4, D_IN), "a": (R1, D_IN), "router": (EXPERTS, D_IN), "b": (D_OUT, R2), "c": (2, EXPERTS)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def layer(seed: int = 0, *, k_tok: float = EXPERTS, k_task: float = K_TASK, router_init_std: float = 0.02) -> Any:
    torch.manual_seed(seed)
    base = torch.nn.Linear(D_IN, D_OUT)
    base.requires_grad_(False)
    return TrexLinear(base, "default", TrexShape(R1, R2, k_tok, k_task), router_init_std)


def trained(seed: int = 0, **changes: Any) -> Any:
    made = layer(seed, **changes)
    for name, parameter in made.named_parameters():
        if "base_layer" not in name:
            torch.nn.init.normal_(parameter, std=0.005 if "trex_" in name else 0.5)
    return made


def by_hand(p: dict[str, torch.Tensor], omega: float, gamma: float, k_tok: float, k_task: float) -> torch.Tensor:
    """The formulas, expert by expert, in Python floats."""

    def sigmoid(value: float) -> float:
        return 1.0 / (1.0 + math.exp(-SHARPNESS * value))

    rows, tokens, _ = p["x"].shape
    update = torch.zeros(rows, tokens, D_OUT)
    for row in range(rows):
        for token in range(tokens):
            x = p["x"][row, token]
            exponents = [math.exp(float(p["router"][e] @ x)) for e in range(EXPERTS)]
            for i in range(R1):
                for j in range(R2):
                    e = i * R2 + j
                    gate = k_tok * sigmoid(omega) * exponents[e] / sum(exponents)
                    gate += k_task * (1.0 - sigmoid(omega)) * float(p["c"][row, e])
                    update[row, token] += sigmoid(gamma) * gate * float(p["a"][i] @ x) * p["b"][:, j]
    return update


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 20), st.floats(-0.02, 0.02), st.floats(-0.02, 0.02), st.floats(0, 40), st.floats(0, 8))
def test_the_update_is_the_double_loop_over_experts(
    seed: int, omega: float, gamma: float, k_tok: float, k_task: float
) -> None:
    p = parts(seed)
    scalars = [torch.tensor([value]) for value in (omega, gamma)]
    update = gated_update(
        p["x"], p["a"], p["router"], p["b"], *scalars, p["c"].unsqueeze(1), TrexShape(R1, R2, k_tok, k_task)
    )
    torch.testing.assert_close(update, by_hand(p, omega, gamma, k_tok, k_task), rtol=1e-4, atol=1e-4)


def test_expert_i_j_has_place_i_r2_plus_j() -> None:
    p = parts()
    h = p["x"] @ p["a"].T
    for i in range(R1):
        for j in range(R2):
            gate = torch.zeros(2, 4, EXPERTS)
            gate[..., i * R2 + j] = 1.0
            z = combine_experts(h, gate)
            expected = torch.zeros(2, 4, R2)
            expected[..., j] = h[..., i]
            assert torch.equal(z, expected)
            # … so the layer adds b_j (a_i x): a LoRA of rank one.
            torch.testing.assert_close(z @ p["b"].T, (p["x"] @ p["a"][i])[..., None] * p["b"][:, j])


def test_a_diagonal_gate_of_ones_is_plain_lora() -> None:
    p = parts()
    a, b = p["a"], p["b"][:, :R1]
    gate = torch.eye(R1).flatten().expand(2, 4, -1)
    update = combine_experts(p["x"] @ a.T, gate) @ b.T
    torch.testing.assert_close(update, p["x"] @ a.T @ b.T)


def test_a_gate_of_ones_adds_up_to_rank_one() -> None:
    p = parts()
    update = combine_experts(p["x"] @ p["a"].T, torch.ones(2, 4, EXPERTS)) @ p["b"].T
    torch.testing.assert_close(update, (p["x"] @ p["a"].sum(0))[..., None] * p["b"].sum(1))


def test_one_token_has_rank_min_r1_r2_and_the_tokens_together_span_all_experts() -> None:
    p = parts()
    x = torch.randn(64, D_IN, generator=torch.Generator().manual_seed(1))
    gates = expert_gate(x @ p["router"].T, None, torch.tensor([ALL_TOKEN]), SHAPE)
    updates = torch.stack([p["b"] @ gate.view(R1, R2).T @ p["a"] for gate in gates])
    assert {int(torch.linalg.matrix_rank(update)) for update in updates} == {min(R1, R2)}
    assert int(torch.linalg.matrix_rank(updates.flatten(1))) == EXPERTS


def test_the_router_is_per_token_and_the_intuition_per_sequence() -> None:
    p, order = parts(), [2, 0, 3, 1]
    logits, c = p["x"] @ p["router"].T, p["c"].unsqueeze(1)
    omega = torch.tensor([NEUTRAL])
    gate = expert_gate(logits, c, omega, SHAPE)
    assert torch.equal(expert_gate(logits[:, order], c, omega, SHAPE), gate[:, order])
    only_task = gate - expert_gate(logits, None, omega, SHAPE)
    torch.testing.assert_close(only_task, (K_TASK / 2 * c).expand_as(only_task))


def test_a_router_at_zero_and_the_two_ends_of_alpha() -> None:
    p = parts()
    logits, c = p["x"] @ p["router"].T, p["c"].unsqueeze(1)
    uniform = expert_gate(torch.zeros_like(logits), c, torch.tensor([NEUTRAL]), SHAPE)
    torch.testing.assert_close(uniform, (0.5 + K_TASK / 2 * c).expand_as(uniform))
    token = expert_gate(logits, c, torch.tensor([ALL_TOKEN]), SHAPE)
    torch.testing.assert_close(token, EXPERTS * torch.softmax(logits, -1))
    task = expert_gate(logits, c, torch.tensor([ALL_TASK]), SHAPE)
    torch.testing.assert_close(task, (K_TASK * c).expand_as(task))


def test_a_new_layer_is_its_base_and_gradients_reach_the_five_parts_only() -> None:
    made, p = layer(), parts()
    with intuition_scope(p["c"]):
        assert torch.equal(made(p["x"]), made.base_layer(p["x"]))
        made(p["x"]).square().mean().backward()
    grads = {name: value.grad for name, value in made.named_parameters()}
    assert grads["base_layer.weight"] is None and p["c"].grad is None
    # B = 0 keeps the rest from learning in the first step; after it, all five do.
    assert grads["lora_B.default.weight"].abs().sum() > 0
    with torch.no_grad():
        made.lora_B["default"].weight -= grads["lora_B.default.weight"]
    with intuition_scope(p["c"]):
        made(p["x"]).square().mean().backward()
    five = [value for name, value in made.named_parameters() if "base_layer" not in name]
    assert len(five) == 5 and all(value.grad.abs().sum() > 0 for value in five)
    assert sum(value.numel() for value in five) == R1 * D_IN + R2 * D_OUT + EXPERTS * D_IN + 2


@pytest.mark.parametrize(("router_init_std", "intuition"), [(0.0, False), (0.02, False), (0.0, True)])
def test_without_intuition_a_router_at_zero_keeps_b_of_rank_one(router_init_std: float, intuition: bool) -> None:
    """The trap of the released start: nothing tells the columns of B apart, so they get the same gradient.

    Rounding does in the end: differences grow exponentially, and after some 50 steps here they are visible.
    """
    made, p = layer(router_init_std=router_init_std), parts()
    target = parts(seed=1)["x"][..., :D_OUT]
    optimizer = torch.optim.AdamW([v for v in made.parameters() if v.requires_grad], lr=0.01)
    for _ in range(25):
        with intuition_scope(p["c"] if intuition else ZeroIntuition()):
            (made(p["x"]) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    values = torch.linalg.svdvals(made.lora_B["default"].weight.detach())
    trapped = router_init_std == 0.0 and not intuition
    assert bool(values[1] < 1e-4 * values[0]) is trapped


def test_each_row_of_a_batch_has_its_own_intuition() -> None:
    made, p = trained(), parts()
    with intuition_scope(p["c"]):
        both = made(p["x"])
    for row in range(2):
        with intuition_scope(p["c"][row : row + 1]):
            torch.testing.assert_close(made(p["x"][row : row + 1])[0], both[row])
    with intuition_scope(p["c"].flip(0)):
        assert not torch.allclose(made(p["x"]), both)


def test_tokens_of_all_sequences_in_one_list_keep_their_sequence() -> None:
    made, p = trained(), parts()
    with intuition_scope(p["c"]):
        torch.testing.assert_close(made(p["x"].flatten(0, 1)), made(p["x"]).flatten(0, 1))


def test_padding_on_either_side_changes_no_token() -> None:
    made, p = trained(), parts()
    pad = torch.full((2, 3, D_IN), 7.0)
    with intuition_scope(p["c"]):
        alone = made(p["x"])
        torch.testing.assert_close(made(torch.cat([pad, p["x"]], 1))[:, 3:], alone)
        torch.testing.assert_close(made(torch.cat([p["x"], pad], 1))[:, :4], alone)


def test_a_forward_needs_an_intuition_that_fits_its_batch() -> None:
    made, p = trained(), parts()
    with pytest.raises(AdapterError, match=r"without its intuition.*\[2, 15\].*without_intuition"):
        made(p["x"])
    for wrong in (p["c"][:1], p["c"][:, :-1], p["c"][0], torch.cat([p["c"], p["c"]])):
        with intuition_scope(wrong), pytest.raises(AdapterError, match=r"\[2, 15\].*semantic map"):
            made(p["x"])
    with intuition_scope(p["c"]):
        made(p["x"])
    with pytest.raises(AdapterError, match="without its intuition"):  # none is kept
        made(p["x"])


def test_zero_is_what_without_intuition_and_a_weight_of_zero_mean() -> None:
    made, p = trained(), parts()
    with intuition_scope(torch.zeros(2, EXPERTS)):
        zero = made(p["x"])
    with intuition_scope(ZeroIntuition()):
        torch.testing.assert_close(made(p["x"]), zero)
    torch.testing.assert_close(trained(k_task=0.0)(p["x"]), zero)


def test_the_softmax_stays_in_float32_under_autocast() -> None:
    made, p = trained(), parts()
    seen: list[torch.dtype] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "softmax" in str(func):
                seen.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    with intuition_scope(p["c"]), torch.autocast("cpu", dtype=torch.bfloat16), Watch():
        low = made(p["x"])
    assert seen == [torch.float32]
    assert low.dtype == torch.bfloat16
    with intuition_scope(p["c"]):
        exact = made(p["x"])
    assert (low.float() - exact).abs().max() < 0.03 * exact.abs().max()


def test_merging_is_refused_with_the_reason() -> None:
    with pytest.raises(AdapterError, match=r"differs with every token.*Export it as LoRA"):
        layer().merge()
