"""The merged dense model computes what the masked one does: float64 logits, several architectures, biases, LoRA."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from metier.agents import RecipeError
from metier.specializers.checkpoints.prunable_models import FAMILIES, PrunableModel, part_of
from metier.specializers.methods.pat.merge import (
    OperatorTensors,
    merge_embedding,
    merge_model,
    merge_norm_gain,
    merge_writer,
    merged_config,
    merged_parameters,
)
from metier.specializers.methods.pat.modules import ChannelMask
from metier.specializers.methods.pat.tuner import PatModel, operator_sites

TOKENS = torch.tensor([[3, 41, 7, 19, 2, 60, 33, 5, 5, 11]])
BOUND = 1e-10

# name → (model type, kept channels of 96 (64 for gemma), trained embedding operator, what differs in the config)
CASES: dict[str, tuple[str, int, bool, dict[str, Any]]] = {
    "tied, mask only": ("llama", 72, False, {"tie_word_embeddings": True}),
    "tied, becomes untied": ("llama", 72, True, {"tie_word_embeddings": True}),
    "untied": ("llama", 72, True, {"tie_word_embeddings": False}),
    "biases everywhere": ("llama", 48, True, {"attention_bias": True, "mlp_bias": True}),
    "no multiple of the heads": ("llama", 64, False, {"tie_word_embeddings": True}),
    "mistral": ("mistral", 64, True, {"sliding_window": None}),
    "norms on queries and keys": ("qwen3", 64, False, {"tie_word_embeddings": True}),
    "the same, untied": ("qwen3", 64, True, {"tie_word_embeddings": True}),
    "1 + w norms, scaled tied embedding": ("gemma", 16, False, {"hidden_size": 64, "num_attention_heads": 4}),
    "the same, becomes untied": ("gemma", 16, True, {"hidden_size": 64, "num_attention_heads": 4}),
    "norms on what is written": ("gemma2", 48, False, {}),
    "and on queries and keys": ("gemma3_text", 48, False, {}),
    "and untied": ("gemma3_text", 48, True, {}),
    "norms on what is written and read": ("glm4", 64, True, {"attention_bias": True}),
    "the stream is read without a norm": ("olmo2", 64, True, {}),
    "multiplied by numbers": ("granite", 64, False, {"embedding_multiplier": 6.0, "residual_multiplier": 0.3}),
    "fused": ("phi3", 64, True, {}),
    "heads without positions": ("smollm3", 64, False, {"no_rope_layers": [1, 0]}),
    "a window": ("ministral", 64, True, {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
    "biases on queries, keys, values": ("qwen2", 48, False, {"tie_word_embeddings": True}),
    "the same, untied from the start": ("qwen2", 48, True, {"tie_word_embeddings": False}),
}


@pytest.fixture(autouse=True)
def norms_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers computes RMS norms in float32 whatever the model's type; here they would hide what is looked for."""
    from importlib import import_module

    def normed(module: Any, x: torch.Tensor, eps: float) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    for kind in ("Glm4", "Granite", "Llama", "Ministral", "Mistral", "Olmo2", "Phi3", "Qwen2", "Qwen3", "SmolLM3"):
        module = import_module(f"transformers.models.{kind.lower()}.modeling_{kind.lower()}")
        norm = getattr(module, f"{kind}RMSNorm")
        monkeypatch.setattr(norm, "forward", lambda self, x: self.weight * normed(self, x, self.variance_epsilon))
    for kind in ("Gemma", "Gemma2", "Gemma3"):
        module = import_module(f"transformers.models.{kind.lower()}.modeling_{kind.lower()}")
        norm = getattr(module, f"{kind}RMSNorm")
        monkeypatch.setattr(norm, "forward", lambda self, x: (1 + self.weight) * normed(self, x, self.eps))


def build(kind: str, **changes: Any) -> Any:
    """A random two-layer model in float64, every parameter drawn, norms and biases too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        kind,
        **{
            "vocab_size": 80,
            "hidden_size": 96,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rms_norm_eps": 1e-2,  # large, so that a wrong epsilon shows
            "pad_token_id": None,
            **changes,
        },
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="sdpa")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model.eval()


def describe(model: Any) -> PrunableModel:
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    parameters = sum(p.numel() for p in model.parameters())
    embedding = model.get_input_embeddings().weight.numel()
    tied = model.config.tie_word_embeddings
    return PrunableModel(
        config, FAMILIES[model.config.model_type], parameters, embedding if tied else 2 * embedding, tied
    )


def with_operators(model: Any, count: int, *, trained_embedding: bool, lora: bool = True) -> PatModel:
    """The model with LoRA and operators, all of them random, and a hard mask of `count` random channels."""
    from peft import LoraConfig, get_peft_model

    if lora:
        targets = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if name.endswith("_proj")})
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=6, target_modules=targets))
    hidden = model.config.hidden_size
    mask = ChannelMask(hidden, count, milestone=10, harden_step=10)
    pat = PatModel(model, mask, rank=4, embedding_rank=4 if trained_embedding else 0).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in pat.named_parameters():
            if parameter.requires_grad:
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(1 + 0.5 * drawn if name.endswith(".scale") else 0.2 * drawn)
    mask.harden()
    return pat.eval()


def logits_of_merged(
    pat: PatModel, facts: PrunableModel, *, untie: bool, scale: bool = True, epsilon: bool = True
) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, Any]]:
    from transformers import AutoConfig, AutoModelForCausalLM

    operators = pat.operator_tensors()
    if not scale:  # what the released merge does
        operators = {
            site: operator and dataclasses.replace(operator, scale=torch.ones_like(operator.scale))
            for site, operator in operators.items()
        }
    keep, width = pat.mask.keep(), facts.hidden_size
    tensors = merge_model(pat.tensors(), operators, keep, facts.family, hidden_size=width, tied=facts.tied, untie=untie)
    config = merged_config(facts, pat.mask.count, untie=untie)
    if not epsilon:
        config["rms_norm_eps"] = facts.config["rms_norm_eps"]
    loaded = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float64)
    missed = loaded.load_state_dict(tensors, strict=False)
    assert not missed.unexpected_keys and set(missed.missing_keys) <= {"lm_head.weight"}
    loaded.tie_weights()
    with torch.no_grad():
        return loaded.eval()(input_ids=TOKENS).logits, tensors, config


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.fixture(params=CASES, ids=list(CASES))
def case(request: pytest.FixtureRequest) -> Iterator[tuple[PatModel, PrunableModel, bool]]:
    kind, count, trained, changes = CASES[request.param]
    model = build(kind, **changes)
    facts = describe(model)
    untie = facts.tied and trained
    yield with_operators(model, count, trained_embedding=trained), facts, untie


def test_merged_logits_are_the_masked_models(case: tuple[PatModel, PrunableModel, bool]) -> None:
    pat, facts, untie = case
    with torch.no_grad():
        expected = pat(input_ids=TOKENS).logits
    found, tensors, config = logits_of_merged(pat, facts, untie=untie)
    assert distance(found, expected) <= BOUND
    assert distance(logits_of_merged(pat, facts, untie=untie, scale=False)[0], expected) > 1e-2
    if not facts.family.head_norms:
        assert distance(logits_of_merged(pat, facts, untie=untie, epsilon=False)[0], expected) > 1e-4
    # Sizes are as predicted, and nothing of how it was made is in the export.
    assert config["hidden_size"] == pat.mask.count and config["head_dim"] == 16
    assert not any("operator" in name or "mask" in name or "lora" in name for name in tensors)
    expected_count = merged_parameters(facts, pat.mask.count, untie=untie)
    head_norms_and_input_biases = 2 * (40 * 2 + 16 * 10)
    assert abs(sum(t.numel() for t in tensors.values()) - expected_count) <= head_norms_and_input_biases


def test_widths_are_exported_as_what_takes_them() -> None:
    facts = describe(build("llama", tie_word_embeddings=True))
    assert merged_config(facts, 72, untie=False)["model_type"] == "llama"
    other = merged_config(facts, 64, untie=False)
    assert other["model_type"] == "mistral" and other["architectures"] == ["MistralForCausalLM"]
    assert other["sliding_window"] is None and "attention_bias" not in other
    with pytest.raises(RecipeError, match=r"64 is no multiple of the model's 6 heads.*no biases.*multiple of 48"):
        merged_config(describe(build("llama", attention_bias=True)), 64, untie=False)


def test_dropped_channels_are_zero_after_every_block_and_every_norm() -> None:
    pat = with_operators(build("llama", attention_bias=True, mlp_bias=True), 72, trained_embedding=True)
    dropped = torch.tensor(sorted(set(range(96)) - set(pat.mask.keep().tolist())))
    seen: list[str] = []

    def look(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            assert bool((hidden[..., dropped] == 0).all()), name
            assert bool((hidden != 0).any())
            seen.append(name)

        return hook

    inner = pat.model.base_model.model.model
    for name, module in inner.named_modules():
        if "norm" in name or name.startswith("layers.") and name.count(".") == 1:
            module.register_forward_hook(look(name))
    with torch.no_grad():
        pat(input_ids=TOKENS)
    assert len(seen) == 2 + 2 * 2 + 1


def test_at_step_0_the_model_is_the_base() -> None:
    for kind, changes in (("llama", {"tie_word_embeddings": True}), ("gemma", {"hidden_size": 64})):
        model = build(kind, **changes)
        with torch.no_grad():
            expected = model(input_ids=TOKENS).logits
            mask = ChannelMask(model.config.hidden_size, 32, milestone=10, harden_step=10)
            found = PatModel(model, mask, rank=4, embedding_rank=4).double()(input_ids=TOKENS).logits
        assert torch.equal(found, expected)


def test_one_mask_is_shared_and_only_what_is_trained_gets_gradients() -> None:
    pat = with_operators(build("llama"), 72, trained_embedding=True)
    assert len(pat.operators) == len(operator_sites(2)) == 5
    assert all(operator.mask is pat.mask for operator in pat.operators)
    assert sum(name.endswith("proxies") for name, _ in pat.named_parameters()) == 1
    pat.mask.step = 3
    pat(input_ids=TOKENS).logits.square().sum().backward()
    named = dict(pat.named_parameters())
    with_gradient = {name for name, parameter in named.items() if parameter.grad is not None}
    kinds = ("mask.proxies", ".down", ".up", ".scale", ".lora_A.default.weight", ".lora_B.default.weight")
    assert all(name.endswith(kinds) for name in with_gradient)
    assert len(with_gradient) == 1 + 5 * 3 + 14 * 2
    # The one mask's gradient is that of moving it everywhere at once.
    step, channel = 1e-5, 7

    def loss(change: float) -> float:
        with torch.no_grad():
            pat.mask.proxies[channel] += change
            value = float(pat(input_ids=TOKENS).logits.square().sum())
            pat.mask.proxies[channel] -= change
        return value

    assert pat.mask.proxies.grad is not None
    slope = (loss(step) - loss(-step)) / (2 * step)
    assert float(pat.mask.proxies.grad[channel]) == pytest.approx(slope, rel=1e-4)


def test_the_identity_loss_reaches_every_operator() -> None:
    pat = with_operators(build("llama"), 72, trained_embedding=True)
    pat.penalty()[1].backward()
    assert all(operator.down.grad is not None for operator in pat.operators)


def test_the_small_functions_against_loops() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    operator = OperatorTensors(down=draw(2, 6), up=draw(6, 2), scale=draw(6))
    keep = torch.tensor([0, 2, 5])
    mixing = torch.eye(6, dtype=torch.float64) + operator.up @ operator.down
    weight, bias, embedding, gain = draw(6, 4), draw(6), draw(9, 6), draw(6)
    for row, k in enumerate(keep.tolist()):
        expected = operator.scale[k] * sum(mixing[k, i] * weight[i] for i in range(6))
        torch.testing.assert_close(merge_writer(weight, operator, keep)[row], expected)
        expected = operator.scale[k] * sum(mixing[k, i] * bias[i] for i in range(6))
        torch.testing.assert_close(merge_writer(bias, operator, keep)[row], expected)
        expected = operator.scale[k] * sum(mixing[k, i] * embedding[:, i] for i in range(6))
        torch.testing.assert_close(merge_embedding(embedding, operator, keep)[:, row], expected)
        assert float(merge_norm_gain(gain, keep)[row]) == pytest.approx(float(gain[k]) * 2**0.5)
        assert float(merge_norm_gain(gain, keep, offset=1)[row]) == pytest.approx((1 + float(gain[k])) * 2**0.5 - 1)


def test_a_tensor_that_pruning_does_not_know_is_named() -> None:
    with pytest.raises(RecipeError, match=r"model.layers.0.mixer.weight.*that pruning does not know"):
        part_of("model.layers.0.mixer.weight", FAMILIES["llama"])
    weight = torch.zeros(6, 4)
    tensors = {"model.embed_tokens.weight": weight, "model.layers.0.mlp.down_proj.weight": weight}
    with pytest.raises(RecipeError, match=r"no operator behind model.layers.0.mlp.down_proj"):
        merge_model(
            tensors.items(),
            {"model.embed_tokens": None},
            torch.tensor([0]),
            FAMILIES["llama"],
            hidden_size=4,
            tied=True,
            untie=False,
        )
