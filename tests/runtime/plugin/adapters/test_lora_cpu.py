"""The C++ LoRA operator and the torch path against a loop that anyone can read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metier.agents.errors import PluginError
from metier.runtime.plugin.adapters import lora_torch

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@pytest.fixture(scope="module", autouse=True)
def operators() -> None:
    from metier.runtime.plugin.adapters import lora_operators

    assert lora_operators.load_operators() == ""


@dataclass(frozen=True)
class Case:
    """One layer with filled slots and one batch."""

    dtype: torch.dtype
    d_in: int
    widths: tuple[int, ...]
    ranks: tuple[tuple[int, ...], ...]  # per slot, per slice; 0 leaves the slice alone
    slots: tuple[int, ...]  # per token; negative is the base model
    seed: int


def loop_oracle(case: Case, x: torch.Tensor, y: torch.Tensor, a: Stacks, b: Stacks) -> torch.Tensor:
    """y + B A x token by token, slice by slice, in fp64."""
    result = y.double()
    for token, slot in enumerate(case.slots):
        if slot < 0:
            continue
        column = 0
        for index, width in enumerate(case.widths):
            lanes = a[index][slot, 0].double() @ x[token].double()
            result[token, column : column + width] += b[index][slot, 0].double() @ lanes
            column += width
    return result


Stacks = list[torch.Tensor]


def tensors(case: Case) -> tuple[torch.Tensor, torch.Tensor, Stacks, Stacks]:
    """x, y and the stacks as vLLM lays them out: ranks padded with zeros to the largest."""
    generator = torch.Generator().manual_seed(case.seed)
    slot_rank = max(1, *(rank for ranks in case.ranks for rank in ranks))

    def stacked(rows: int, columns: int, used: str, index: int) -> torch.Tensor:
        stack = torch.zeros(len(case.ranks), 1, rows, columns, dtype=case.dtype)
        for slot, ranks in enumerate(case.ranks):
            shape = (ranks[index], columns) if used == "rows" else (rows, ranks[index])
            stack[slot, 0, : shape[0], : shape[1]] = torch.randn(shape, generator=generator) / max(1, columns) ** 0.5
        return stack

    a = [stacked(slot_rank, case.d_in, "rows", i) for i in range(len(case.widths))]
    b = [stacked(width, slot_rank, "columns", i) for i, width in enumerate(case.widths)]
    x = torch.randn(len(case.slots), case.d_in, generator=generator).to(case.dtype)
    y = torch.randn(len(case.slots), sum(case.widths), generator=generator).to(case.dtype)
    return x, y, a, b


@contextmanager
def opened(case: Case, a: Stacks, b: Stacks) -> Iterator[torch.Tensor]:
    """A layer of the operator with every slot packed to its own ranks and the batch planned; yields its number."""
    ops = torch.ops.metier
    step = ops.lora_step_open()
    layer = ops.lora_layer_open(step, case.d_in, case.widths, len(case.ranks), case.dtype == torch.bfloat16)
    try:
        for slot, ranks in enumerate(case.ranks):
            ops.lora_layer_set_slot(
                layer,
                slot,
                [stack[slot, 0, :rank].contiguous() for stack, rank in zip(a, ranks, strict=True)],
                [stack[slot, 0, :, :rank].contiguous() for stack, rank in zip(b, ranks, strict=True)],
            )
        ops.lora_step_plan(step, torch.tensor(case.slots, dtype=torch.long))
        yield torch.tensor([layer])
    finally:
        ops.lora_layer_close(layer)
        ops.lora_step_close(step)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    slices = draw(st.integers(1, 4))
    slots = draw(st.integers(1, 5))
    rank = st.sampled_from([0, 1, 2, 3, 4, 8, 15, 16, 17, 32])
    return Case(
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        d_in=2 * draw(st.integers(1, 70)),
        widths=tuple(draw(st.lists(st.integers(1, 100), min_size=slices, max_size=slices))),
        ranks=tuple(tuple(draw(rank) for _ in range(slices)) for _ in range(slots)),
        slots=tuple(draw(st.lists(st.integers(-1, slots - 1), min_size=1, max_size=90))),
        seed=draw(st.integers(0, 2**16)),
    )


@settings(max_examples=150, deadline=None)
@given(cases())
def test_operator_and_torch_path_agree_with_the_loop(case: Case) -> None:
    x, y, a, b = tensors(case)
    wanted = loop_oracle(case, x, y, a, b)
    by_torch, by_operator = y.clone(), y.clone()
    lora_torch.add_lora(by_torch, x, a, b, lora_torch.rows_by_slot(torch.tensor(case.slots)), case.widths)
    with opened(case, a, b) as layer:
        torch.ops.metier.lora_linear(by_operator, x, layer)
    tolerance = TOLERANCE[case.dtype]
    for got in (by_torch, by_operator):
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance * 4)
        for token, slot in enumerate(case.slots):
            if slot < 0:
                assert torch.equal(got[token], y[token]), "a base row changed"


@pytest.mark.parametrize("tokens", [1, 7, 16, 64, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_of_sharing_the_work_gives_the_same(tokens: int, dtype: torch.dtype) -> None:
    """One thread takes whole tiles; several share the sums of a few tiles, or the tiles when there are many."""
    case = Case(dtype, 576, (576, 192, 192), ((8, 8, 8), (4, 0, 16)), tuple(t % 3 - 1 for t in range(tokens)), 7)
    x, y, a, b = tensors(case)
    before = torch.get_num_threads()
    results = []
    try:
        with opened(case, a, b) as layer:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                got = y.clone()
                torch.ops.metier.lora_linear(got, x, layer)
                results.append(got.double())
    finally:
        torch.set_num_threads(before)
    wanted = loop_oracle(case, x, y, a, b)
    for got in results:
        torch.testing.assert_close(got, wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 4)


def test_rows_of_wider_tensors_and_three_dimensions() -> None:
    case = Case(torch.float32, 32, (48,), ((4,),), (0, -1, 0, 0), 3)
    x, y, a, b = tensors(case)
    wanted = loop_oracle(case, x, y, a, b)
    wide_x, wide_y = torch.zeros(4, 40), torch.zeros(4, 50)
    wide_x[:, 3:35], wide_y[:, 1:49] = x, y
    with opened(case, a, b) as layer:
        torch.ops.metier.lora_linear(wide_y[:, 1:49], wide_x[:, 3:35], layer)
        deep = y.clone().view(1, 4, 48)
        torch.ops.metier.lora_linear(deep, x.view(1, 4, 32), layer)
    torch.testing.assert_close(wide_y[:, 1:49].double(), wanted, rtol=1e-5, atol=1e-4)
    assert float(wide_y[:, 0].abs().sum() + wide_y[:, 49].abs().sum()) == 0.0
    torch.testing.assert_close(deep[0].double(), wanted, rtol=1e-5, atol=1e-4)


def test_a_slot_can_be_refilled_and_emptied() -> None:
    case = Case(torch.float32, 32, (48,), ((4,),), (0, 0), 5)
    x, y, a, b = tensors(case)
    with opened(case, a, b) as layer:
        empty = [torch.zeros(0, 32)], [torch.zeros(48, 0)]
        torch.ops.metier.lora_layer_set_slot(int(layer), 0, *empty)
        got = y.clone()
        torch.ops.metier.lora_linear(got, x, layer)
        assert torch.equal(got, y)
        torch.ops.metier.lora_layer_set_slot(
            int(layer), 0, [a[0][0, 0, :2].contiguous()], [b[0][0, 0, :, :2].contiguous()]
        )
        torch.ops.metier.lora_linear(got, x, layer)
    a[0][0, 0, 2:] = 0
    torch.testing.assert_close(got.double(), loop_oracle(case, x, y, a, b), rtol=1e-5, atol=1e-4)


def test_misuse_is_refused() -> None:
    case = Case(torch.float32, 32, (48,), ((4,),), (0, 0), 5)
    x, y, a, b = tensors(case)
    ops = torch.ops.metier
    with opened(case, a, b) as layer:
        with pytest.raises(RuntimeError, match="plan is for 2 tokens"):
            ops.lora_linear(y[:1], x[:1], layer)
        with pytest.raises(RuntimeError, match="other shapes or another dtype"):
            ops.lora_linear(y.bfloat16(), x, layer)
        with pytest.raises(RuntimeError, match="no slot 1"):
            ops.lora_layer_set_slot(int(layer), 1, [a[0][0, 0]], [b[0][0, 0]])
        with pytest.raises(RuntimeError, match="slice 0"):
            ops.lora_layer_set_slot(int(layer), 0, [a[0][0, 0]], [b[0][0, 0, :, :2].contiguous()])
    with pytest.raises(RuntimeError, match="is closed"):
        ops.lora_linear(y, x, layer)


def test_embedding_operator() -> None:
    slots, vocab, rank, d = 3, 11, 4, 24
    a, b = torch.randn(slots, vocab, rank), torch.randn(slots, 1, d, rank)
    ids, slot_of = torch.tensor([3, 0, 10, 5]), torch.tensor([2, -1, 0, 1])
    used = torch.tensor([1, 0, 1], dtype=torch.uint8)  # slot 1 leaves the embedding alone
    y = torch.randn(4, d)
    wanted = y.clone()
    for token, slot in ((0, 2), (2, 0)):
        wanted[token] += b[slot, 0] @ a[slot, ids[token]]
    step = torch.ops.metier.lora_step_open()
    try:
        torch.ops.metier.lora_step_plan(step, slot_of)
        for dtype in (torch.int32, torch.int64):
            got = y.clone()
            torch.ops.metier.lora_embedding(got, ids.to(dtype), a, b, used, torch.tensor([step]))
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        with pytest.raises(RuntimeError, match="outside the vocabulary"):
            torch.ops.metier.lora_embedding(y, torch.tensor([3, 0, 11, 5]), a, b, used, torch.tensor([step]))
    finally:
        torch.ops.metier.lora_step_close(step)


def test_no_compiler_falls_back_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from metier.runtime.plugin.adapters import lora_operators

    def refuse(source: object) -> None:
        raise PluginError("no C++ compiler was found on PATH")

    loaded = torch.ops.metier
    monkeypatch.setattr(lora_operators, "build_library", refuse)
    monkeypatch.setattr(torch.ops, "metier", object())
    with caplog.at_level("WARNING"):
        assert "no C++ compiler" in lora_operators.load_operators()
    assert "torch path" in caplog.text
    monkeypatch.setattr(torch.ops, "metier", loaded)
    monkeypatch.undo()
    assert lora_operators.load_operators() == ""
