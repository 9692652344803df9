"""What peft can express as LoRA is converted exactly, at the smallest rank; the rest is refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from metier.agents import AdapterError
from metier.specializers import check_adapter
from metier.specializers.adapters.adapter_conversion import EXACT_SHARE, convert_adapter, low_rank_factors
from metier.specializers.adapters.logit_error import LogitErrorMeter
from tests.tiny_model import LINEAR_TARGETS, write_tiny_llama

EXACT = {
    "VERA": {"r": 4},
    "VBLORA": {"r": 2, "num_vectors": 16, "vector_length": 32},
    "MISS": {"r": 4},
    "TINYLORA": {"r": 2},
    "DELORA": {"r": 4},
    "UNILORA": {"r": 4},
    "PSOFT": {"r": 4},
}


def write_adapter(folder: Path, base: Path, kind: str, **settings: Any) -> Path:
    """An adapter of that kind whose every part is random, saved by peft itself."""
    from peft import get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from transformers import AutoModelForCausalLM

    config = {str(t.value): c for t, c in PEFT_TYPE_TO_CONFIG_MAPPING.items()}[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if "num_virtual_tokens" not in settings:
            settings.setdefault("target_modules", list(LINEAR_TARGETS))
        tuned = get_peft_model(model, config(task_type="CAUSAL_LM", **settings))
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn_like(parameter) * 0.1
        tuned.save_pretrained(folder)
    return folder


def logits(base: Path, adapter: Path, tokens: torch.Tensor) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        output: torch.Tensor = PeftModel.from_pretrained(model, adapter).eval()(input_ids=tokens).logits
    return output


@pytest.mark.parametrize("kind", EXACT)
def test_low_rank_kinds_are_converted_exactly_at_their_own_rank(tmp_path: Path, tiny_base: Path, kind: str) -> None:
    adapter = write_adapter(tmp_path / "adapter", tiny_base, kind, **EXACT[kind])
    layers: list[tuple[int, int]] = []
    done = convert_adapter(adapter, tiny_base, tmp_path / "lora", on_progress=lambda *at: layers.append(at))
    assert done.exact and done.peft_type == kind
    assert done.rank == done.exact_rank == EXACT[kind]["r"]
    assert layers == [(n, 14) for n in range(1, 15)]
    facts = check_adapter(tmp_path / "lora", tiny_base, slot_rank=8)
    assert (facts.kind, facts.rank, facts.scaling) == ("lora", done.rank, 1.0)
    tokens = torch.arange(3, 60)[None]
    difference = (logits(tiny_base, tmp_path / "lora", tokens) - logits(tiny_base, adapter, tokens)).abs().max()
    assert difference < 1e-4
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["target_modules"] == sorted(
        LINEAR_TARGETS
    )


def test_half_precision_adapters_are_converted_in_full(tmp_path: Path, tiny_base: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapter = write_adapter(tmp_path / "adapter", tiny_base, "VERA", r=4)
    path = adapter / "adapter_model.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(path).items()}, path)
    assert convert_adapter(adapter, tiny_base, tmp_path / "lora").rank == 4


def test_layers_may_differ_in_rank_and_number(tmp_path: Path, tiny_base: Path) -> None:
    targets = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    adapter = write_adapter(
        tmp_path / "adapter", tiny_base, "LOHA", r=2, target_modules=targets, rank_pattern={"up_proj": 3}
    )
    done = convert_adapter(adapter, tiny_base, tmp_path / "lora")
    assert done.exact and done.rank == 3**2  # the elementwise product of two changes of rank r has rank r²
    facts = check_adapter(tmp_path / "lora", tiny_base, slot_rank=16)
    assert facts.modules == tuple(targets)


def test_a_lossy_kind_is_refused_with_its_measured_error_unless_that_is_accepted(
    tmp_path: Path, tiny_base: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", tiny_base, "LOHA", r=4)
    lora = tmp_path / "lora"
    with pytest.raises(
        AdapterError, match=r"LOHA .* rank 8 loses (\d+)\.\d% .*KL .* --max-rank 16 .*--accept-error 0"
    ) as refused:
        convert_adapter(adapter, tiny_base, lora, max_rank=8)
    assert not lora.exists() and not list(tmp_path.glob(".lora*"))
    with pytest.raises(AdapterError, match="a loss of at most 0.01 of what it changes"):
        convert_adapter(adapter, tiny_base, lora, max_rank=8, accept_error=0.01)
    named = float(str(refused.value).rpartition("--accept-error ")[2].removesuffix("."))
    done = convert_adapter(adapter, tiny_base, lora, max_rank=8, accept_error=named)
    assert not done.exact and (done.rank, done.exact_rank) == (8, 16)
    assert EXACT_SHARE < done.error.share <= named and done.error.kl_nats > 0
    exact = convert_adapter(adapter, tiny_base, tmp_path / "exact", max_rank=16)
    assert exact.exact and exact.rank == 16


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        (
            "IA3",
            {"feedforward_modules": ["down_proj"]},
            "IA3 .* cannot be served: it multiplies .* `metier variants merge ",
        ),
        ("PROMPT_TUNING", {"num_virtual_tokens": 4}, "cannot be served: it puts learned vectors before the prompt"),
        ("LN_TUNING", {"target_modules": ["input_layernorm"]}, "it changes normalisations or biases"),
        ("SHIRA", {}, r"SHIRA adapter cannot be served: peft [\d.]+ knows no conversion of it to LoRA"),
        ("VERA", {"modules_to_save": ["lm_head"]}, "modules_to_save .* without whole trained modules"),
    ],
)
def test_what_is_no_fixed_change_of_linear_layers_is_refused(
    tmp_path: Path, tiny_base: Path, kind: str, settings: dict[str, Any], reason: str
) -> None:
    adapter = write_adapter(tmp_path / "adapter", tiny_base, kind, **settings)
    with pytest.raises(AdapterError, match=reason):
        convert_adapter(adapter, tiny_base, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_damaged_and_foreign_adapters_are_refused(tmp_path: Path, tiny_base: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapter = write_adapter(tmp_path / "adapter", tiny_base, "VERA", r=4)
    wide = write_tiny_llama(tmp_path / "wide", hidden=96)
    with pytest.raises(AdapterError, match="peft cannot load the VERA adapter"):
        convert_adapter(adapter, wide, tmp_path / "lora")
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    some = next(name for name in tensors if "vera_lambda_b" in name)
    save_file({**tensors, some: tensors[some] * float("nan")}, path)
    with pytest.raises(AdapterError, match=f"{some} holds values that are not finite"):
        convert_adapter(adapter, tiny_base, tmp_path / "lora")
    save_file({name: value for name, value in tensors.items() if name != some}, path)
    with pytest.raises(AdapterError, match="missing adapter keys.*Copy the adapter again"):
        convert_adapter(adapter, tiny_base, tmp_path / "lora")


def test_factors_have_the_numerical_rank_and_the_best_come_first() -> None:
    generator = torch.Generator().manual_seed(0)
    b, a = torch.randn(12, 3, generator=generator), torch.randn(3, 20, generator=generator)
    found_a, found_b = low_rank_factors(b @ a)
    assert (found_a.shape, found_b.shape) == ((3, 20), (12, 3))
    torch.testing.assert_close(found_b @ found_a, b @ a)
    best_error = torch.linalg.svdvals(b @ a)[2:].norm()
    torch.testing.assert_close((found_b[:, :2] @ found_a[:2] - b @ a).norm(), best_error)
    nothing_a, nothing_b = low_rank_factors(torch.zeros(12, 20))
    assert (nothing_a.shape, nothing_b.shape) == ((0, 20), (12, 0))


def test_the_error_is_what_its_definition_says() -> None:
    generator = torch.Generator().manual_seed(0)
    original, stand_in, base = torch.randn(3, 5, 7, generator=generator)
    meter = LogitErrorMeter()
    meter.add(original[:2], stand_in[:2], base[:2])
    meter.add(original[2:], stand_in[2:], base[2:])
    error = meter.result()
    p, q, n = (torch.softmax(x.double(), -1) for x in (original, stand_in, base))
    kl = sum(float(p[i, v] * (p[i, v] / q[i, v]).log()) for i in range(5) for v in range(7)) / 5
    base_kl = sum(float(p[i, v] * (p[i, v] / n[i, v]).log()) for i in range(5) for v in range(7)) / 5
    assert error.tokens == 5
    assert error.kl_nats == pytest.approx(kl) and error.base_kl_nats == pytest.approx(base_kl)
    assert error.max_logit == pytest.approx(float((original - stand_in).abs().max()))
    assert error.share == pytest.approx(float((original - stand_in).abs().mean() / (original - base).abs().mean()))
    assert error.agreement == sum(float(p[i].argmax() == q[i].argmax()) for i in range(5)) / 5
    same = LogitErrorMeter()
    same.add(original, original, original)
    assert (same.result().share, same.result().kl_nats, same.result().agreement) == (0.0, 0.0, 1.0)
