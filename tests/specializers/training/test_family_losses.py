"""The loss of a batch is the mean of its rows' own losses, in every family: windows, mixed layers, experts, states."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from metier.specializers.training.batches import EncodedRow
from metier.specializers.training.objective import answer_loss, can_share_start, scales_by_length
from tests.tiny_families import HYBRIDS, write_tiny_family

FAMILIES = (
    "llama3",
    "mistral",
    "ministral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "phi3",
    "granite",
    "smollm3",
    "olmo2",
    "cohere",
    "mixtral",
    "qwen3_moe",
    "gpt2",
    "opt",
)
STEP = 2e-5


def rows_after(shared: int, *lengths: int) -> list[EncodedRow]:
    """Rows that start with the same tokens and go on for so many; the last three of each are the answer."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(3, 400, (shared,), generator=generator).tolist()
    found = []
    for length in lengths:
        rest = torch.randint(3, 400, (length,), generator=generator).tolist()
        found.append(EncodedRow((*start, *rest), shared + length - 3))
    return found


def alone(model: Any, rows: list[EncodedRow]) -> torch.Tensor:
    """The mean over all answer tokens of the rows' losses, each row by itself through the plain model."""
    losses = []
    for row in rows:
        logits = model(input_ids=torch.tensor([row.tokens])).logits[0, row.prompt_tokens - 1 : -1]
        answer = torch.tensor(row.tokens[row.prompt_tokens :])
        losses.append(torch.nn.functional.cross_entropy(logits, answer, reduction="none"))
    return torch.cat(losses).mean()


def opened(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_a_batch_is_the_mean_of_its_rows_own(family: str, tiny_family: Callable[[str], Path]) -> None:
    model = opened(tiny_family(family))
    window = getattr(model.config, "sliding_window", None) or 16
    for shared in (0, window // 2, 3 * window):
        rows = rows_after(shared, 4, 12, 21, window + 14)
        with torch.no_grad():
            expected = alone(model, rows)
            assert float(answer_loss(model, rows, pad_token=2)) == pytest.approx(float(expected), rel=STEP), shared


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3", "qwen3_moe"])
def test_and_so_are_its_gradients(family: str, tiny_family: Callable[[str], Path]) -> None:
    model = opened(tiny_family(family))
    weight = model.model.layers[0].self_attn.k_proj.weight
    rows = rows_after(40, 4, 12, 21)
    (expected,) = torch.autograd.grad(alone(model, rows), [weight])
    (found,) = torch.autograd.grad(answer_loss(model, rows, pad_token=2), [weight])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_model_that_keeps_a_state_shares_no_start(family: str, tiny_family: Callable[[str], Path]) -> None:
    model = opened(tiny_family(family))
    assert can_share_start(model) == (family == "gpt_oss")
    rows = rows_after(20, 4, 9, 15)
    loss = answer_loss(model, rows, pad_token=2)
    assert loss.item() == pytest.approx(alone(model, rows).item(), rel=STEP)
    loss.backward()


def test_rows_go_alone_where_a_model_places_tokens_by_the_length_of_all(tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0}
    factors = {"short_factor": [1.0] * 16, "long_factor": [3.0] * 16}
    sizes = {"max_position_embeddings": 160, "original_max_position_embeddings": 40}
    folder = write_tiny_family(tmp_path, "phi3", **sizes, rope_parameters={**rope, **factors})
    model = opened(folder)
    assert scales_by_length(model, 41) and not scales_by_length(model, 40)
    rows = rows_after(30, 5, 25)
    with torch.no_grad():
        assert float(answer_loss(model, rows, pad_token=2)) == pytest.approx(float(alone(model, rows)), rel=STEP)
