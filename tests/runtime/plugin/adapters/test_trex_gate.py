"""The T-REX gate, in torch, for all slots at once and in C++, against the double loop over experts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metier.runtime.plugin.adapters import lora_torch
from metier.runtime.plugin.adapters.trex_gate import TrexGate, gated_lanes, gated_lanes_of_slots, stacked_gates
from metier.specializers.adapters.trex_shape import K_TASK, SHARPNESS, TrexShape

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@pytest.fixture(scope="module", autouse=True)
def operators() -> None:
    from metier.runtime.plugin.adapters import lora_operators

    assert lora_operators.load_operators() == ""


def loop_oracle(h: torch.Tensor, gate: TrexGate, c: torch.Tensor) -> torch.Tensor:
    """z of one token, expert by expert, in fp64: h [r1 + r1·r2], c [r1·r2]."""
    logits = [float(v) for v in h[gate.shape.r1 : gate.shape.rows]]
    powers = [math.exp(v - max(logits)) for v in logits]
    z = torch.zeros(gate.shape.r2, dtype=torch.float64)
    for i in range(gate.shape.r1):
        for j in range(gate.shape.r2):
            expert = i * gate.shape.r2 + j
            weight = gate.token_gain * powers[expert] / sum(powers) + gate.task_gain * float(c[expert])
            z[j] += float(h[i]) * weight
    return z


gates = st.builds(
    TrexGate,
    st.builds(TrexShape.released, st.integers(1, 6), st.sampled_from([1, 2, 3, 4, 8, 16, 17, 20])),
    st.floats(0, 40),
    st.floats(0, 4),
)


@settings(max_examples=60, deadline=None)
@given(gates, st.integers(0, 2**16))
def test_gate_is_the_double_loop(gate: TrexGate, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = gate.shape
    h, c = torch.randn(5, shape.rows, generator=generator), torch.randn(5, shape.experts, generator=generator)
    wanted = torch.stack([loop_oracle(row, gate, own) for row, own in zip(h, c, strict=True)])
    torch.testing.assert_close(gated_lanes(h, gate, c).double(), wanted, rtol=1e-4, atol=1e-4)


def test_gains_come_from_the_trained_scalars() -> None:
    shape = TrexShape.released(4, 8)
    gate = TrexGate.from_scalars(shape, omega=1.0 / SHARPNESS, gamma=-2.0 / SHARPNESS)
    alpha, strength = 1 / (1 + math.exp(-1.0)), 1 / (1 + math.exp(2.0))
    assert gate.token_gain == pytest.approx(strength * 32 * alpha)
    assert gate.task_gain == pytest.approx(strength * K_TASK * (1 - alpha))
    assert (shape.experts, shape.rows) == (32, 36)
    saturated = TrexGate.from_scalars(TrexShape(1, 1, 1.0, 1.0), omega=-50.0, gamma=50.0)
    assert (saturated.token_gain, saturated.task_gain) == (0.0, 1.0)


def test_one_expert_alone_is_a_rank_one_lora_and_pins_the_order() -> None:
    """With r1 != r2 a gate read column by column would pick another pair."""
    gate, i, j = TrexGate(TrexShape.released(2, 3), 0.0, 1.0), 1, 0
    c = torch.zeros(1, 6)
    c[0, i * 3 + j] = 1.0
    z = gated_lanes(torch.tensor([[5.0, 7.0, *[0.0] * 6]]), gate, c)
    assert z.tolist() == [[7.0, 0.0, 0.0]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.none() | gates, min_size=1, max_size=4), st.integers(0, 2**16))
def test_all_slots_at_once_is_each_slot_alone(slots: list[TrexGate | None], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rank = max(8, *(gate.shape.rows for gate in slots if gate), 8)
    slot_of = torch.randint(-1, len(slots), (9,), generator=generator)
    h, c = torch.randn(9, rank, generator=generator), torch.zeros(9, rank)
    c[:, :6] = torch.randn(9, 6, generator=generator)
    got = gated_lanes_of_slots(h, slot_of, c, *stacked_gates(slots, rank))
    for token, slot in enumerate(slot_of.tolist()):
        gate = slots[slot] if slot >= 0 else None
        if gate is None:
            assert torch.equal(got[token], h[token])
            continue
        wanted = torch.zeros(rank)
        lanes = gated_lanes(h[token : token + 1], gate, c[token : token + 1, : gate.shape.experts])
        wanted[: gate.shape.r2] = lanes[0]
        torch.testing.assert_close(got[token], wanted, rtol=1e-4, atol=1e-4)


@dataclass(frozen=True)
class Case:
    """One layer with filled slots and one batch; a slot's slice is a gate, or the rank of plain LoRA."""

    dtype: torch.dtype
    d_in: int
    widths: tuple[int, ...]
    slices: tuple[tuple[TrexGate | int, ...], ...]  # per slot, per slice
    slots: tuple[int, ...]  # per token; negative is the base model
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    count, slots = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    slice_of = gates | st.sampled_from([0, 1, 8, 16])
    return Case(
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        d_in=2 * draw(st.integers(4, 40)),
        widths=tuple(draw(st.lists(st.integers(1, 80), min_size=count, max_size=count))),
        slices=tuple(tuple(draw(slice_of) for _ in range(count)) for _ in range(slots)),
        slots=tuple(draw(st.lists(st.integers(-1, slots - 1), min_size=1, max_size=70))),
        seed=draw(st.integers(0, 2**16)),
    )


@settings(max_examples=120, deadline=None)
@given(cases())
def test_operator_and_torch_path_agree_with_the_loop(case: Case) -> None:
    """Slots of T-REX, LoRA and both in one merged layer; every token with a vector of its own, but for some without."""
    from metier.runtime.plugin.adapters.lora_operators import set_slot

    generator = torch.Generator().manual_seed(case.seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(case.dtype)

    tokens, rank = len(case.slots), 128
    a = [torch.zeros(len(case.slices), 1, rank, case.d_in, dtype=case.dtype) for _ in case.widths]
    b = [torch.zeros(len(case.slices), 1, width, rank, dtype=case.dtype) for width in case.widths]
    found: dict[int, list[TrexGate | None]] = {}
    for slot, slices in enumerate(case.slices):
        found[slot] = [made if isinstance(made, TrexGate) else None for made in slices]
        for index, made in enumerate(slices):
            rows, columns = (made.shape.rows, made.shape.r2) if isinstance(made, TrexGate) else (made, made)
            a[index][slot, 0, :rows] = random(rows, case.d_in) / case.d_in**0.5
            b[index][slot, 0, :, :columns] = random(case.widths[index], columns) / 4
    x, y = random(tokens, case.d_in), random(tokens, sum(case.widths))
    table = torch.randn(tokens, 128, generator=generator)
    row_of = torch.arange(tokens)
    row_of[::5] = -1
    c = torch.where(row_of[:, None] >= 0, table, 0.0)

    wanted = y.double()
    for token, slot in enumerate(case.slots):
        for index, start in enumerate(torch.tensor((0, *case.widths)).cumsum(0)[:-1].tolist()):
            if slot < 0:
                continue
            gate = found[slot][index]
            h = a[index][slot, 0].double() @ x[token].double()
            lanes = h if gate is None else torch.zeros(rank, dtype=torch.float64)
            if gate is not None:
                lanes[: gate.shape.r2] = loop_oracle(h, gate, c[token])
            wanted[token, start : start + case.widths[index]] += b[index][slot, 0].double() @ lanes

    by_torch, by_operator = y.clone(), y.clone()
    groups = lora_torch.rows_by_slot(torch.tensor(case.slots))
    lora_torch.add_lora(by_torch, x, a, b, groups, case.widths, gates=found, intuition=c)
    ops = torch.ops.metier
    step = ops.lora_step_open()
    layer = ops.lora_layer_open(step, case.d_in, case.widths, len(case.slices), case.dtype == torch.bfloat16)
    try:
        for slot, slices in enumerate(case.slices):
            ranks = [made if isinstance(made, int) else rank for made in slices]
            rows = [stack[slot, 0, :r] for stack, r in zip(a, ranks, strict=True)]
            columns = [stack[slot, 0, :, :r] for stack, r in zip(b, ranks, strict=True)]
            set_slot(layer, slot, rows, columns, found[slot])
        ops.lora_step_plan(step, torch.tensor(case.slots, dtype=torch.long))
        ops.lora_step_intuition(step, table, row_of)
        ops.lora_linear(by_operator, x, torch.tensor([layer]))
    finally:
        ops.lora_layer_close(layer)
        ops.lora_step_close(step)
    tolerance = TOLERANCE[case.dtype]
    for got in (by_torch, by_operator):
        scale = max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(got.double() / scale, wanted / scale, rtol=tolerance, atol=tolerance * 4)
        for token, slot in enumerate(case.slots):
            if slot < 0:
                assert torch.equal(got[token], y[token]), "a base row changed"


def test_misuse_of_the_operator_is_refused() -> None:
    ops = torch.ops.metier
    step = ops.lora_step_open()
    layer = ops.lora_layer_open(step, 8, [4], 1, False)
    try:
        with pytest.raises(RuntimeError, match="slice 0: A has 4 rows, B 3 columns, and the gate 2 inputs"):
            ops.lora_layer_set_slot(layer, 0, [torch.zeros(4, 8)], [torch.zeros(4, 3)], [2], [1.0], [1.0])
        with pytest.raises(RuntimeError, match="one gate per slice"):
            ops.lora_layer_set_slot(layer, 0, [torch.zeros(8, 8)], [torch.zeros(4, 3)], [2], [1.0], [])
        with pytest.raises(RuntimeError, match="token 1 names semantic vector 2 of 2"):
            ops.lora_step_intuition(step, torch.zeros(2, 6), torch.tensor([1, 2]))
        with pytest.raises(RuntimeError, match="table: float32"):
            ops.lora_step_intuition(step, torch.zeros(2, 6).double(), torch.tensor([1]))
    finally:
        ops.lora_layer_close(layer)
        ops.lora_step_close(step)
