"""Every form of adapter that peft can write, on a tiny base, and what may become of each: served, converted, merged,
or refused by name.

Each form is written by peft itself, with every trained part random, so that forgetting one of them shows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from tests.tiny_families import write_tiny_family
from tests.tiny_model import LINEAR_TARGETS

__all__ = ["FORMS", "WHY", "Form", "base_logits", "peft_logits", "write_form"]

Outcome = Literal["served", "converted", "merged", "refused"]

LINEAR = list(LINEAR_TARGETS)
TOKENS = torch.arange(3, 60)[None]


@dataclass(frozen=True)
class Form:
    """One form: its name in the table, its kind and settings in peft, and what becomes of it.

    `before` prepares the base that it is trained on; `config_changes` go into the configuration that peft wrote.
    `family` names a base of its own, for what the tiny Llama does not have; `needs` a package that peft merges it with.
    `noise` is the spread of what is added to every trained number.
    """

    name: str
    outcome: Outcome
    settings: dict[str, Any] = field(default_factory=dict)
    kind: str = "LORA"
    targets: Any = field(default_factory=lambda: list(LINEAR_TARGETS))
    before: Callable[[Any, Any], None] | None = None
    config_changes: dict[str, Any] = field(default_factory=dict)
    family: str = ""
    needs: str = ""
    noise: float = 0.05

    def base(self, folder: Path, tiny_base: Path) -> Path:
        """The base that it is made for: `tiny_base`, or one of its own family below `folder`."""
        return write_tiny_family(folder / self.family, self.family) if self.family else tiny_base


def _lora_ga(model: Any, config: Any) -> None:
    from peft.tuners.lora import preprocess_loraga

    def step() -> None:
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()

    preprocess_loraga(model, config, step)


def _corda(model: Any, config: Any) -> None:
    from peft.tuners.lora.corda import preprocess_corda

    def run() -> None:
        with torch.no_grad():
            model(input_ids=TOKENS)

    preprocess_corda(model, config, run_model=run)


def _blocks() -> Any:
    return _peft("BdLoraConfig", target_modules_bd_a=["o_proj"], nblocks=2, match_strict=False)


def _peft(name: str, *args: Any, **settings: Any) -> Any:
    import peft.tuners.lora.config as lora

    return getattr(lora, name)(*args, **settings)


def lora_forms() -> list[Form]:
    """Options of LoRA."""
    return [
        Form("rank and alpha", "served", {"r": 4, "lora_alpha": 12}),
        Form("rsLoRA", "served", {"use_rslora": True}),
        Form("rank_pattern", "served", {"rank_pattern": {"q_proj": 4, "down_proj": 2}}),
        Form("alpha_pattern", "served", {"alpha_pattern": {"q_proj": 64}}),
        Form(
            "rsLoRA with both patterns",
            "served",
            {"use_rslora": True, "rank_pattern": {"1.mlp.up_proj": 3}, "alpha_pattern": {".*up_proj": 5}},
        ),
        Form("dropout", "served", {"lora_dropout": 0.1}),
        Form("some layers", "served", {"layers_to_transform": [1]}),
        Form("some layers of a list", "served", {"layers_to_transform": 0, "layers_pattern": "layers"}),
        Form("exclude_modules", "served", {"exclude_modules": ["0.self_attn.q_proj"]}),
        Form("targets as a pattern", "served", targets=r".*\.(q|v)_proj"),
        Form("targets all-linear", "served", targets="all-linear"),
        Form("started gaussian", "served", {"init_lora_weights": "gaussian"}),
        Form("started orthogonal", "served", {"init_lora_weights": "orthogonal"}),
        Form("EVA", "served", {"init_lora_weights": "eva"}),
        Form("MiCA", "served", {"init_lora_weights": "mica"}),
        Form("VeLoRA", "served", {"velora_config": _peft("VeloraConfig")}),
        Form("MonteCLoRA", "served", {"monteclora_config": _peft("MontecloraConfig")}),
        Form("output head as target", "served", targets=["q_proj", "lm_head"]),
        Form("embedding as target", "served", targets=["q_proj", "embed_tokens"]),
        Form("tied embedding and head", "served", {"ensure_weight_tying": True}, targets=["q_proj", "embed_tokens"]),
        Form("DoRA", "merged", {"use_dora": True}),
        Form("KaSA", "merged", {"kasa_config": _peft("KasaConfig")}),
        Form(
            "BD-LoRA",
            "merged",
            {"use_bdlora": _peft("BdLoraConfig", target_modules_bd_a=["o_proj"], nblocks=2, match_strict=False)},
        ),
        Form("modules_to_save: head", "merged", {"modules_to_save": ["lm_head"]}),
        Form("modules_to_save: embedding", "merged", {"modules_to_save": ["embed_tokens"]}),
        Form("modules_to_save: norms", "merged", {"modules_to_save": ["input_layernorm"]}),
        Form("trained tokens", "merged", {"trainable_token_indices": [3, 5, 8]}),
        Form("bias: all", "merged", {"bias": "all"}, family="llama_biased"),
        Form("bias: lora_only", "merged", {"bias": "lora_only"}, family="llama_biased"),
        Form("lora_bias", "merged", {"lora_bias": True}, family="llama_biased"),
        Form("target_parameters", "merged", {"target_parameters": ["q_proj.weight"]}, targets=["v_proj"]),
        Form("PiSSA", "merged", {"init_lora_weights": "pissa"}),
        Form("OLoRA", "merged", {"init_lora_weights": "olora"}),
        Form(
            "LoftQ",
            "merged",
            config_changes={"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}},
            needs="bitsandbytes",
        ),
        Form("fan_in_fan_out", "merged", config_changes={"fan_in_fan_out": True}),
        Form("PiSSA by fast SVD", "refused", {"init_lora_weights": "pissa_niter_4"}),
        Form("CorDA", "refused", {"init_lora_weights": "corda", "corda_config": _peft("CordaConfig")}, before=_corda),
        Form(
            "LoRA-GA",
            "refused",
            {"init_lora_weights": "lora_ga", "lora_ga_config": _peft("LoraGAConfig")},
            before=_lora_ga,
        ),
        Form("activated LoRA", "refused", {"alora_invocation_tokens": [5, 6]}),
        Form("layer replication", "refused", {"layer_replication": [[0, 2], [1, 2]]}),
        Form("Arrow", "refused", config_changes={"arrow_config": {"top_k": 1}}),
        Form("QALoRA", "refused", config_changes={"use_qalora": True}),
    ]


def kind_forms() -> list[Form]:
    """Kinds beside LoRA."""
    rank = {"r": 4}
    tokens = {"num_virtual_tokens": 4}
    return [
        Form("AdaLoRA", "converted", {"init_r": 4, "target_r": 4, "total_step": 10}, "ADALORA"),
        Form("VeRA", "converted", rank, "VERA"),
        Form("PVeRA", "converted", rank, "PVERA"),
        Form("VB-LoRA", "converted", {"r": 2, "num_vectors": 16, "vector_length": 32}, "VBLORA"),
        Form("MiSS", "converted", rank, "MISS"),
        Form("TinyLoRA", "converted", {"r": 2}, "TINYLORA"),
        Form("DeLoRA", "converted", rank, "DELORA"),
        Form("UniLoRA", "converted", rank, "UNILORA"),
        Form("PSOFT", "converted", rank, "PSOFT"),
        Form("LoHa", "converted", {"r": 2}, "LOHA"),
        Form("LoKr", "converted", {"r": 2}, "LOKR"),
        Form("GraLoRA", "converted", {"r": 4, "gralora_k": 2}, "GRALORA"),
        Form("FourierFT", "merged", {"n_frequency": 100}, "FOURIERFT"),
        Form("WaveFT", "merged", {"n_frequency": 100}, "WAVEFT"),
        Form("RandLoRA", "merged", rank, "RANDLORA", noise=0.01),
        Form("C3A", "merged", {"block_size": 16}, "C3A"),
        Form("SHiRA", "merged", rank, "SHIRA"),
        Form("IA3", "merged", {"feedforward_modules": ["down_proj"]}, "IA3"),
        Form("OFT", "merged", {"oft_block_size": 8}, "OFT"),
        Form("BOFT", "merged", {"boft_block_size": 8}, "BOFT"),
        Form("HRA", "merged", rank, "HRA"),
        Form("HiRA", "merged", rank, "HIRA"),
        Form("RoAd", "merged", {"group_size": 16}, "ROAD"),
        Form("LN tuning", "merged", {}, "LN_TUNING", targets=["input_layernorm"]),
        Form("BEFT", "merged", {}, "BEFT", family="llama_biased"),
        Form("GLoRA", "merged", rank, "GLORA"),
        Form("FRoD", "merged", {}, "FROD"),
        Form("AdaMSS", "refused", config_changes={"peft_type": "ADAMSS"}),
        Form("PEANuT", "merged", {}, "PEANUT"),
        Form("OSF", "merged", {}, "OSF"),
        Form("DEFT", "merged", {}, "DEFT"),
        Form("Supertuning", "merged", {}, "SUPERTUNING"),
        Form("trainable tokens", "merged", {"token_indices": [3, 5, 8]}, "TRAINABLE_TOKENS", targets=None),
        Form("Lily", "refused", {}, "LILY"),
        Form("Poly", "refused", {"r": 4}, "POLY"),
        Form("Shadow", "refused", {}, "SHADOW"),
        Form("X-LoRA", "refused", config_changes={"peft_type": "XLORA"}),
        Form("prompt tuning", "refused", tokens, "PROMPT_TUNING", targets=None),
        Form("multitask prompt tuning", "refused", tokens, "MULTITASK_PROMPT_TUNING", targets=None),
        Form("P-tuning", "refused", tokens, "P_TUNING", targets=None),
        Form("prefix tuning", "refused", tokens, "PREFIX_TUNING", targets=None),
        Form("CPT", "refused", {}, "CPT", targets=None),
        Form("Cartridge", "refused", tokens, "CARTRIDGE", targets=None),
        Form("LLaMA-Adapter", "refused", {"adapter_len": 4, "adapter_layers": 1}, "ADAPTION_PROMPT", targets=None),
    ]


_FULL = "its change has a high rank: converted where `--max-rank` allows that, or `--accept-error` the loss"
_START = "its start was drawn at random or made from data, and is not in the folder"
_ON_ITS_BASE = "on the base it was made on: peft repeats its start"
_APART = "a tied head is stored apart"
_EMBEDDING = "where the engine takes it (below), elsewhere merged"
_LEFT_OUT = "plain inside; what only training uses is left out"
_MULTIPLIES = "it multiplies weights or activations"
_VECTORS = "it changes normalisations or biases"
_DEPENDS = "what it changes depends on the input"
_PROMPT = "it puts learned vectors before the prompt"
WHY = {
    "VeLoRA": _LEFT_OUT,
    "MonteCLoRA": _LEFT_OUT,
    "output head as target": _EMBEDDING,
    "embedding as target": _EMBEDDING,
    "tied embedding and head": f"`ensure_weight_tying`; {_EMBEDDING}",
    "modules_to_save: head": _APART,
    "modules_to_save: embedding": _APART,
    "lora_bias": "where the base has biases",
    "PiSSA": _ON_ITS_BASE,
    "OLoRA": _ON_ITS_BASE,
    "LoftQ": f"{_ON_ITS_BASE}, with bitsandbytes",
    "fan_in_fan_out": "peft ignores it on linear layers",
    "PiSSA by fast SVD": _START,
    "CorDA": _START,
    "LoRA-GA": _START,
    "activated LoRA": "it acts on some tokens only",
    "layer replication": "it makes a deeper model",
    "Arrow": "it routes between adapters",
    "QALoRA": "it needs the base's own GPTQ weights",
    "AdaLoRA": "at the rank that training left",
    **dict.fromkeys(("FourierFT", "WaveFT", "RandLoRA", "C3A"), _FULL),
    **dict.fromkeys(("IA3", "OFT", "BOFT", "HRA", "HiRA", "RoAd"), _MULTIPLIES),
    **dict.fromkeys(("LN tuning", "BEFT"), _VECTORS),
    **dict.fromkeys(("SHiRA", "GLoRA", "FRoD", "PEANuT", "OSF", "DEFT", "Supertuning"), "peft knows no LoRA of it"),
    "AdaMSS": "peft needs scikit-learn for it",
    "trainable tokens": "it changes embeddings",
    **dict.fromkeys(("Lily", "Poly", "Shadow", "X-LoRA"), _DEPENDS),
    **dict.fromkeys(("prompt tuning", "multitask prompt tuning", "P-tuning", "prefix tuning"), _PROMPT),
    **dict.fromkeys(("CPT", "Cartridge", "LLaMA-Adapter"), _PROMPT),
}
"""Form → why it ends so, or under which condition, for the table."""

FORMS = [*lora_forms(), *kind_forms()]


def write_form(folder: Path, base: Path, form: Form) -> Path:
    """Train the form for no steps and save it, every trained part random."""
    from peft import get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    config_class = {str(t.value): c for t, c in PEFT_TYPE_TO_CONFIG_MAPPING.items()}[form.kind]
    targets = {} if form.targets is None else {"target_modules": form.targets}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _model(base)
        config = config_class(task_type="CAUSAL_LM", **targets, **form.settings)
        if form.before is not None:
            form.before(model, config)
        tuned = get_peft_model(model, config)
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn_like(parameter) * form.noise * (2 if parameter.numel() < 1000 else 1)
        tuned.save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **form.config_changes}))
    return folder


def peft_logits(base: Path, adapter: Path) -> torch.Tensor:
    """What peft computes with the adapter beside the base."""
    from peft import PeftModel

    with torch.no_grad():
        output: torch.Tensor = PeftModel.from_pretrained(_model(base), adapter).eval()(input_ids=TOKENS).logits
    return output


def base_logits(base: Path) -> torch.Tensor:
    """What transformers computes with a checkpoint."""
    with torch.no_grad():
        output: torch.Tensor = _model(base)(input_ids=TOKENS).logits
    return output


def _model(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
