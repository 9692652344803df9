"""FIER's Triton kernels against the torch oracle: in Triton's interpreter here, compiled where there is a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from typing import Any

import pytest
import torch

from metier.specializers.methods.fier.key_retrieval import (
    encode_keys,
    pack_bits,
    retrieval_attention,
    score_keys,
    shared_query,
)
from metier.specializers.shelf.fier_settings import FierSettings

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BLOCK = 64


@pytest.fixture
def kernels() -> Any:
    if DEVICE == "cpu" and not INTERPRETED:
        pytest.skip("runs below, in Triton's interpreter")
    return import_module("metier.runtime.plugin.fier.fier_gpu_kernels")


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="runs in this process")
def test_the_rest_of_this_file_in_tritons_interpreter() -> None:
    """In a process of its own: Triton chooses when it is first imported, which other tests' engines have done."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(words, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 passed" in done.stdout, done.stdout


class Step:
    """A decode step of some sequences whose blocks lie scattered in a cache."""

    def __init__(self, lengths: list[int], d: int, shared: int, group: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(sum(lengths) + d + shared + group)
        heads, blocks = 2, sum(-(-length // BLOCK) for length in lengths) + 1
        width = max(-(-length // BLOCK) for length in lengths)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        self.keys, self.values = random(blocks, BLOCK, heads, d), random(blocks, BLOCK, heads, d)
        self.query = random(len(lengths), heads * shared, d)
        order = torch.randperm(blocks, generator=generator).int().tolist()
        self.table = torch.zeros(len(lengths), width, dtype=torch.int32)
        for row, length in enumerate(lengths):
            for place in range(-(-length // BLOCK)):
                self.table[row, place] = order.pop()
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        # Codes of what no whole group is yet are there too, and must not be looked at.
        codes = encode_keys(self.keys.view(-1, heads, d).transpose(0, 1), group)
        self.words = pack_bits(codes.bits).transpose(0, 1).contiguous()
        self.low, self.high = codes.low.transpose(0, 1).contiguous(), codes.high.transpose(0, 1).contiguous()

    def of(self, row: int, cache: torch.Tensor) -> torch.Tensor:
        """Keys or values of one sequence, [n, h, d]."""
        return cache[self.table[row].long()].flatten(0, 1)[: int(self.lengths[row])]

    def codes(self) -> list[torch.Tensor]:
        return [self.words.to(DEVICE), self.low.to(DEVICE), self.high.to(DEVICE)]

    def place(self) -> list[torch.Tensor]:
        return [self.table.to(DEVICE), self.lengths.to(DEVICE)]


@pytest.mark.parametrize(("d", "shared", "group"), [(64, 3, 32), (128, 1, 64)])
def test_scores_are_the_query_on_the_decoded_keys(kernels: Any, d: int, shared: int, group: int) -> None:
    step = Step([150, 64, 200], d, shared, group, torch.float32)
    settings = FierSettings(budget_tokens=16, group_tokens=group, sink_tokens=3)
    found = kernels.score_tokens(step.query.to(DEVICE), *step.codes(), *step.place(), settings, BLOCK).cpu()
    for row, length in enumerate(step.lengths.tolist()):
        closed = length // group * group
        codes = encode_keys(step.of(row, step.keys)[:closed].transpose(0, 1), group)
        expected = score_keys(shared_query(step.query[row], 2), codes)
        assert torch.allclose(found[row, :, 3:closed], expected[:, 3:], rtol=1e-4, atol=1e-3)
        assert found[row, :, :3].isposinf().all() and found[row, :, closed:].isneginf().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("d", "shared", "group", "budget"), [(64, 3, 32, 40), (128, 1, 64, 64), (64, 2, 32, 1000)])
def test_a_step_is_what_the_oracle_computes(
    kernels: Any, d: int, shared: int, group: int, budget: int, dtype: torch.dtype
) -> None:
    # Far longer than the budget, just a tail more than it, shorter than one group, and the whole of some blocks.
    step = Step([205, budget % 256 + group // 2, 7, 128], d, shared, group, dtype)
    settings = FierSettings(budget_tokens=budget, group_tokens=group, sink_tokens=2)
    found = kernels.decode(
        step.query.to(DEVICE), step.keys.to(DEVICE), step.values.to(DEVICE), *step.codes(), *step.place(),
        settings, d**-0.5,
    ).cpu()  # fmt: skip
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for row in range(4):
        expected = retrieval_attention(
            step.query[row], step.of(row, step.keys), step.of(row, step.values),
            scale=d**-0.5, budget=budget, group=group, sinks=2,
        )  # fmt: skip
        assert torch.allclose(found[row].float(), expected, rtol=tolerance, atol=tolerance)
