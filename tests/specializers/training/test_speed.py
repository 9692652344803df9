"""What makes training fast changes nothing that is learned."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch

from metier.agents import TrafficRow
from metier.specializers.checkpoints.attention import register_float32_attention
from metier.specializers.training.batches import EncodedRow, encode_rows
from metier.specializers.training.objective import answer_loss
from metier.specializers.training.speed import hold_frozen_weights_in_bfloat16, kept_pages


@pytest.fixture(scope="module")
def encoded(tiny_base: Path, rows: list[TrafficRow]) -> list[EncodedRow]:
    from transformers import AutoTokenizer

    return encode_rows(rows[:6], AutoTokenizer.from_pretrained(tiny_base), max_row_tokens=200)


def tuned(tiny_base: Path, hold: bool = False, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32, **options)
    if hold:
        hold_frozen_weights_in_bfloat16(model)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "up_proj"]))
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter(model).values():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


def adapter(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def loss_and_gradients(model: Any, encoded: list[EncodedRow], autocast: bool = True) -> list[torch.Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = answer_loss(model, encoded, pad_token=0)
    loss.backward()
    return [loss.detach(), *(p.grad for p in adapter(model).values() if p.grad is not None)]


def test_frozen_weights_in_bfloat16_give_the_same_loss_and_gradients_to_the_bit(
    tiny_base: Path, encoded: list[EncodedRow]
) -> None:
    usual, held = tuned(tiny_base), tuned(tiny_base, hold=True)
    weight = held.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight
    assert weight.dtype == torch.bfloat16 and not weight.requires_grad
    assert list(adapter(held)) == list(adapter(usual)) and {p.dtype for p in adapter(held).values()} == {torch.float32}
    before, after = loss_and_gradients(usual, encoded), loss_and_gradients(held, encoded)
    assert len(before) == len(after) == 1 + len(adapter(usual))
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_the_output_head_and_what_is_no_linear_layer_stay_as_they_are(tiny_base: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    hold_frozen_weights_in_bfloat16(model)
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert all("norm" in name or "embed" in name or "lm_head" in name for name in kept)
    assert "model.embed_tokens.weight" in kept
    assert not any(p.requires_grad for name, p in model.named_parameters() if name not in kept)


def test_attention_is_in_float32_under_autocast_and_the_usual_one_without(
    tiny_base: Path, encoded: list[EncodedRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = loss_and_gradients(tuned(tiny_base), encoded, autocast=False)
    model = tuned(tiny_base, attn_implementation=register_float32_attention("sdpa"))
    same = loss_and_gradients(model, encoded, autocast=False)
    assert all(torch.equal(one, other) for one, other in zip(usual, same, strict=True))
    seen = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def note(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
        found = attend(query, key, value, **options)
        seen.extend([query.dtype, key.dtype, value.dtype, found.dtype])
        return found

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", note)
    mixed = loss_and_gradients(model, encoded)
    assert set(seen) == {torch.float32}
    assert mixed[0].item() == pytest.approx(usual[0].item(), rel=0.02)


def test_pages_are_kept_only_within_and_only_where_the_c_library_can(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[int, int]] = []

    class Glibc:
        def mallopt(self, parameter: int, value: int) -> int:
            said.append((parameter, value))
            return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Glibc())
    with pytest.raises(ValueError, match="inside"), kept_pages():
        assert said[-1] == (-1, 2**31 - 1)
        raise ValueError("inside")
    assert said[-1] == (-1, 64 << 20)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    with kept_pages():
        assert len(said) == 3
