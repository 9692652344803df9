"""What engines are started with, and what is refused by name before they are: from the checkpoint, without starting."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metier.agents.errors import EngineError
from metier.runtime.engines.engine_arguments import engine_arguments
from tests.runtime.conftest import TINY
from tests.tiny_families import HYBRIDS, write_tiny_family

pytestmark = pytest.mark.engine


def arguments(base: Path, dtype: str = "auto") -> Any:
    return engine_arguments(base, dtype=dtype, settings=TINY.model_copy(update={"dtype": "auto"}), adapters=False)


def test_a_delta_rule_in_other_numbers_than_bfloat16_is_refused(tiny_family: Callable[[str], Path]) -> None:
    base = tiny_family("qwen3_5")
    assert arguments(base).dtype == arguments(base, "bfloat16").dtype == "bfloat16"
    for dtype in ("float32", "float16"):
        with pytest.raises(EngineError, match=f"of type 'qwen3_5_text', is to be computed in {dtype}; expected bfl"):
            arguments(base, dtype)


def test_starts_of_prompts_are_kept_where_all_layers_have_keys_and_values(tiny_family: Callable[[str], Path]) -> None:
    families = {"qwen3", "gemma3", *HYBRIDS} - {"lfm2"}
    kept = {family: arguments(tiny_family(family)).enable_prefix_caching for family in families}
    assert {family for family, keeps in kept.items() if keeps} == {"qwen3", "gemma3", "gpt_oss"}


def test_short_convolutions_that_the_cpu_computes_wrongly_are_refused(tiny_family: Callable[[str], Path]) -> None:
    with pytest.raises(EngineError, match="of type 'lfm2', whose base vLLM computes wrongly on a CPU"):
        arguments(tiny_family("lfm2"))


def test_an_embedding_that_is_stored_twice_is_refused_where_the_engine_has_no_head(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = write_tiny_family(tmp_path / "base", "gemma2")
    assert arguments(base).hf_overrides == {}
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EngineError, match="stores its embedding a second time, as lm_head.weight.*save it again"):
        arguments(base)
