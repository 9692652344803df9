"""T-REX through PEFT's own doors: get_peft_model, save and load, generate, a plain Trainer, checkpointing."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from metier.agents import AdapterError, RecipeError, VariantError
from metier.specializers.adapters.semantic_map import SemanticMap
from metier.specializers.adapters.trex_shape import K_TASK, TREX_FORMAT
from metier.specializers.methods.trex.peft_registration import register_tuner
from metier.specializers.methods.trex.tuner import TrexConfig, TrexModel
from tests.tiny_model import LINEAR_TARGETS, linear_shapes

R1, R2 = 2, 3
TASKS = [f"{verb} the {thing} {n}" for verb in ("sort", "add", "spell") for thing in ("cats", "days") for n in range(4)]
MAP = SemanticMap.fit(TASKS, R1 * R2, seed=0)
TOKENS = torch.arange(10, 40).view(2, 15)
C = torch.tensor([MAP.intuition("sort the dogs"), MAP.intuition("add the numbers")])


def base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def untied(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, tie_word_embeddings=False)


def wrapped(folder: Path, **settings: Any) -> Any:
    fields = {"task_type": "CAUSAL_LM", "r1": R1, "r2": R2, "target_modules": "all-linear", **settings}
    model = get_peft_model(base(folder), TrexConfig(**fields))
    model.set_semantic_map(MAP)
    return model.eval()


def trained(folder: Path, seed: int = 0, **settings: Any) -> Any:
    model = wrapped(folder, **settings)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.005 if "trex_" in name else 0.1)
    return model


def test_a_new_adapter_changes_nothing_and_trains_what_the_formula_counts(tiny_base: Path) -> None:
    model = wrapped(tiny_base)
    assert torch.equal(model(input_ids=TOKENS, intuition=C).logits, base(tiny_base)(TOKENS).logits)
    expected = sum(
        (R1 + R1 * R2) * d_in + R2 * d_out + 2 for _, d_in, d_out in linear_shapes(tiny_base, LINEAR_TARGETS)
    )
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    with model.disable_adapter():
        model(input_ids=TOKENS)  # needs no intuition


def test_saved_and_loaded_it_gives_the_same_logits(tiny_base: Path, tmp_path: Path) -> None:
    model = trained(tiny_base)
    logits = model(input_ids=TOKENS, intuition=C).logits
    assert (logits - base(tiny_base)(TOKENS).logits).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    shapes = {name.removeprefix(layer): list(t.shape) for name, t in tensors.items() if name.startswith(layer)}
    assert shapes == {
        ".lora_A.weight": [R1, 64],
        ".lora_B.weight": [128, R2],
        ".lora_router.weight": [R1 * R2, 64],
        ".trex_omega": [1],
        ".trex_gamma": [1],
    }
    assert [name for name in tensors if "layers" not in name] == ["trex_center", "trex_centroids"]
    assert len(tensors) == 14 * 5 + 2
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "TREX"
    assert config["trex"] == {
        "format": TREX_FORMAT,
        "r1": R1,
        "r2": R2,
        "k_tok": 6.0,
        "k_task": K_TASK,
        "embed_id": MAP.embed_id,
        "prompt_rule": "task-input/1",
    }
    loaded = PeftModel.from_pretrained(base(tiny_base), tmp_path)
    assert torch.equal(loaded(input_ids=TOKENS, intuition=C).logits, logits)
    assert loaded.semantic_map().intuition("sort it") == MAP.intuition("sort it")
    assert SemanticMap.load(tmp_path).intuition("sort it") == MAP.intuition("sort it")
    assert isinstance(PeftConfig.from_pretrained(tmp_path), TrexConfig)


def test_two_adapters_live_on_one_model(tiny_base: Path, tmp_path: Path) -> None:
    first, second = trained(tiny_base, seed=1), trained(tiny_base, seed=2, k_task=1.0)
    expected = [model(input_ids=TOKENS, intuition=C).logits for model in (first, second)]
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    model = PeftModel.from_pretrained(base(tiny_base), tmp_path / "first", adapter_name="first")
    model.load_adapter(tmp_path / "second", adapter_name="second")
    for name, logits in zip(("first", "second"), expected, strict=True):
        model.set_adapter(name)
        assert torch.equal(model(input_ids=TOKENS, intuition=C).logits, logits)
    model.delete_adapter("first")
    model.save_pretrained(tmp_path / "again")
    again, saved = (load_file(tmp_path / place / "adapter_model.safetensors") for place in ("again/second", "second"))
    assert again.keys() == saved.keys() and all(torch.equal(again[name], saved[name]) for name in saved)


def test_the_intuition_is_a_keyword_or_a_scope_and_is_never_kept(tiny_base: Path) -> None:
    model = trained(tiny_base)
    logits = model(input_ids=TOKENS, intuition=C).logits
    with model.intuition(C.flip(0)):
        other = model(input_ids=TOKENS).logits
        assert torch.equal(model(input_ids=TOKENS, intuition=C).logits, logits)  # the innermost counts
        assert torch.equal(model(input_ids=TOKENS).logits, other)
    assert not torch.allclose(logits, other)
    with pytest.raises(AdapterError, match="without its intuition"):
        model(input_ids=TOKENS)
    with pytest.raises(AdapterError, match=r"shape \[2, 6\].*\[1, 6\]"):
        model(input_ids=TOKENS[:1], intuition=C)
    with pytest.raises(AdapterError, match="without its intuition"):  # also after an error
        model(input_ids=TOKENS)
    with model.without_intuition():
        assert torch.equal(model(input_ids=TOKENS).logits, model(input_ids=TOKENS, intuition=torch.zeros(2, 6)).logits)


def test_a_model_without_a_task_type_takes_the_keyword_too(tiny_base: Path) -> None:
    assert torch.equal(
        trained(tiny_base, task_type=None)(input_ids=TOKENS, intuition=C).logits,
        trained(tiny_base)(input_ids=TOKENS, intuition=C).logits,
    )


def test_rows_of_different_intuition_generate_as_they_do_alone(tiny_base: Path) -> None:
    model = trained(tiny_base)
    wanted = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    both = model.generate(input_ids=TOKENS, intuition=C, **wanted)
    for row in range(2):
        at = slice(row, row + 1)
        assert torch.equal(model.generate(input_ids=TOKENS[at], intuition=C[at], **wanted), both[at])
    with model.intuition(C):
        assert torch.equal(model.generate(input_ids=TOKENS, **wanted), both)
    beams = C.repeat_interleave(3, dim=0)
    assert model.generate(input_ids=TOKENS, intuition=beams, num_beams=3, **wanted).shape == both.shape
    with pytest.raises(AdapterError, match="for beams"):
        model.generate(input_ids=TOKENS, intuition=C, num_beams=3, **wanted)


def test_decoding_step_by_step_is_the_whole_forward(tiny_base: Path) -> None:
    model = trained(tiny_base)
    whole = model(input_ids=TOKENS, intuition=C).logits
    cache, steps = None, []
    for at in range(TOKENS.shape[1]):
        step = model(input_ids=TOKENS[:, at : at + 1], past_key_values=cache, use_cache=True, intuition=C)
        cache = step.past_key_values
        steps.append(step.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_with_the_same_intuition(tiny_base: Path, reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> dict[str, Any]:
        model = trained(tiny_base).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        loss = model(input_ids=TOKENS, labels=TOKENS, intuition=C, use_cache=False).loss
        with model.intuition(C.flip(0)):  # another batch's, when the backward pass runs
            loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    expected = gradients(False)
    for name, gradient in gradients(True).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_a_plain_trainer_trains_it(tiny_base: Path, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = wrapped(tiny_base)
    rows = [
        {"input_ids": TOKENS[n % 2] + n, "labels": TOKENS[n % 2] + n, "intuition": C[n % 2].tolist()} for n in range(8)
    ]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=0.02,
        logging_steps=1,
        save_steps=6,
        report_to=[],
        use_cpu=True,
        seed=0,
        remove_unused_columns=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    loaded = PeftModel.from_pretrained(base(tiny_base), tmp_path / "checkpoint-6")
    torch.testing.assert_close(
        loaded(input_ids=TOKENS, intuition=C).logits, model.eval()(input_ids=TOKENS, intuition=C).logits
    )


def test_a_bfloat16_base_keeps_the_scalars_in_float32(tiny_base: Path, tmp_path: Path) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16),
        TrexConfig(task_type="CAUSAL_LM", r1=R1, r2=R2, target_modules=["q_proj"]),
        autocast_adapter_dtype=False,
    )
    model.set_semantic_map(MAP)
    kinds = {
        name.split(".")[-3 if "weight" in name else -2]: p.dtype
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    assert {kinds["trex_omega"], kinds["trex_gamma"]} == {torch.float32}
    assert {kinds["lora_A"], kinds["lora_B"], kinds["lora_router"]} == {torch.bfloat16}
    assert model(input_ids=TOKENS, intuition=C).logits.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors")["trex_centroids"].dtype == torch.float32


def test_files_that_do_not_fit_are_named(tiny_base: Path, tmp_path: Path) -> None:
    trained(tiny_base).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    whole = load_file(path)
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    router, center = f"{layer}.lora_router.weight", "trex_center"

    def refused(match: str, **changes: Any) -> None:
        tensors = {**whole, **changes}
        save_file({name: t for name, t in tensors.items() if t is not None}, path)
        with pytest.raises(AdapterError, match=match):
            PeftModel.from_pretrained(base(tiny_base), tmp_path)

    refused(r"lacks .*q_proj\.lora_router", **{router: None})
    refused(r"lora_router.* has shape \[6, 63\].*\[6, 64\]", **{router: whole[router][:, 1:].contiguous()})
    refused("has base_model.*w_proj", **{router.replace("q_proj", "w_proj"): whole[router].clone()})
    refused(r"shapes \[6, 256\] and None", **{center: None})
    refused(r"shapes \[6, 256\] and \[255\]", **{center: whole[center][1:].contiguous()})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["trex"]["format"] = TREX_FORMAT + 1
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="trex.format is 2.*format 1"):
        PeftConfig.from_pretrained(tmp_path)


def test_settings_and_maps_that_do_not_fit_are_named(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="r1=0"):
        TrexConfig(r1=0)
    with pytest.raises(AdapterError, match=r"6 clusters.*r1·r2 = 32"):
        get_peft_model(base(tiny_base), TrexConfig(target_modules=["q_proj"])).set_semantic_map(MAP)
    unmapped = get_peft_model(base(tiny_base), TrexConfig(target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="no semantic map"):
        unmapped.save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="embed_tokens' is Embedding"):
        get_peft_model(untied(tiny_base), TrexConfig(target_modules=["embed_tokens"]))
    with pytest.raises(AdapterError, match="cannot be merged"):
        trained(tiny_base).merge_and_unload()


# -- the version guard ---------------------------------------------------------------------------------------


def test_peft_is_as_it_was_when_the_method_was_registered() -> None:
    """Pins the one patch of PEFT: a member of its enumeration, made by hand."""
    member = PeftType("TREX")
    assert member is PeftType.TREX and member.name == member.value == member == "TREX"
    assert list(PeftType)[-1] is member and len(set(PeftType)) == len(PeftType)
    assert pickle.loads(pickle.dumps(member)) is member and copy.deepcopy(member) is member
    register_tuner("TREX", TrexConfig, TrexModel)  # once more does nothing
    assert list(PeftType).count(member) == 1


@contextmanager
def unregistered() -> Iterator[None]:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    member = PeftType.TREX
    mappings = (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING)
    kept = [mapping.pop(member) for mapping in mappings]
    PeftType._member_names_.remove("TREX")
    del PeftType._member_map_["TREX"], PeftType._value2member_map_["TREX"]
    try:
        yield
    finally:
        PeftType._member_names_.append("TREX")
        PeftType._member_map_["TREX"] = PeftType._value2member_map_["TREX"] = member
        for mapping, value in zip(mappings, kept, strict=True):
            mapping[member] = value


def test_another_peft_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(cls: Any, key: str) -> str:
        return key

    with unregistered():
        monkeypatch.setattr(BaseTuner, "_remove_adapter_name_from_key", classmethod(changed))
        with pytest.raises(VariantError, match=r"peft .*_remove_adapter_name_from_key\(key\).*peft>=0.21.2,<0.22"):
            register_tuner("TREX", TrexConfig, TrexModel)
        assert "TREX" not in PeftType.__members__
    with pytest.raises(VariantError, match="already has a method TREX"):
        register_tuner("TREX", TrexConfig, BaseTuner)
