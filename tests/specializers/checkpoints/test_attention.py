"""The attention of each family: the one that computes what its config says, wherever a model is opened."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import metier.specializers
from metier.specializers.checkpoints.attention import (
    attention_of,
    open_model,
    register_attention,
    register_float32_attention,
)
from metier.specializers.checkpoints.dense_model import load_dense_model

CAP = 0.5
"""Of attention scores: far below those of a tiny random model, so that a cap that is left out is seen."""
ROW = torch.randint(3, 400, (1, 60), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def capped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny_families import write_tiny_family

    return write_tiny_family(tmp_path_factory.mktemp("capped"), "gemma2", attn_logit_softcapping=CAP)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ROW).logits
    return found


def eager(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager"))


def test_scores_are_capped_wherever_a_capped_model_is_opened(capped: Path) -> None:
    from transformers import AutoModelForCausalLM

    expected = eager(capped)
    usual = logits(AutoModelForCausalLM.from_pretrained(capped, dtype=torch.float32))
    assert (usual - expected).abs().max() > 0.01  # what transformers would do by itself
    for found in (
        open_model(capped, dtype=torch.float32),
        open_model(capped, dtype=torch.float32, attention=register_float32_attention),
        load_dense_model(capped, torch.float32),
    ):
        torch.testing.assert_close(logits(found), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3", "qwen3_moe"])
def test_an_attention_around_another_changes_nothing_and_sees_every_layer(
    family: str, tiny_family: Callable[[str], Path]
) -> None:
    seen = []

    def looking(attend: Any, module: Any, *states: Any, **options: Any) -> Any:
        seen.append(module.layer_idx)
        return attend(module, *states, **options)

    model = open_model(
        tiny_family(family), dtype=torch.float32, attention=lambda name: register_attention("looking", name, looking)
    )
    torch.testing.assert_close(logits(model), eager(tiny_family(family)), rtol=1e-4, atol=1e-4)
    assert seen == list(range(model.config.num_hidden_layers))


def test_what_a_class_does_not_offer_is_not_asked_of_it() -> None:
    from transformers import Gemma2Config, GptOssConfig, LlamaConfig

    assert attention_of(LlamaConfig()) == "sdpa"
    assert attention_of(GptOssConfig()) == "eager"  # attention sinks
    assert attention_of(Gemma2Config()) == "eager"
    assert attention_of(Gemma2Config(attn_logit_softcapping=None)) == "sdpa"


def test_every_model_of_transformers_names_its_cap_in_the_config_as_gemma_2_does() -> None:
    """A model that capped its scores by a field of another name would be trained without."""
    import transformers.models

    found = set()
    for source in Path(transformers.models.__path__[0]).glob("*/modeling_*.py"):
        found |= set(re.findall(r"\bsoftcap=([\w.]+),", source.read_text(encoding="utf-8")))
    assert found == {"self.attn_logit_softcapping", "None"}


def test_no_other_file_opens_models_to_compute_with() -> None:
    rooms = Path(metier.specializers.__path__[0])
    openers = {
        str(path.relative_to(rooms))
        for path in rooms.rglob("*.py")
        if "AutoModelForCausalLM" in path.read_text(encoding="utf-8")
    }
    assert openers == {"checkpoints/attention.py", "shelf/bundled_model.py"}  # the second converts a download
