"""transformers' classes after vLLM has changed one for an engine: others make objects of it as before."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PROGRAM = """
import sys
from pathlib import Path
from metier.specializers.checkpoints.self_check import make_self_check
base = Path(sys.argv[1])
known = make_self_check(base)
from metier.runtime.engines.vllm_environment import import_vllm
import_vllm(threads=1, in_process=True)
# What vLLM does when it starts an engine on a family that it has no class for.
from transformers import SmolLM3Model
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.models.transformers import base as backend
for _ in range(2):
    backend.support_torch_compile(
        dynamic_arg_dims={"input_ids": 1}, enable_if=lambda config: False, is_encoder=False
    )(SmolLM3Model)
assert make_self_check(base) == known
from transformers import AutoConfig
with set_current_vllm_config(VllmConfig()):
    model = SmolLM3Model(AutoConfig.from_pretrained(base))
print("of the engine:", hasattr(model, "vllm_config"))
print("of others:", hasattr(SmolLM3Model(AutoConfig.from_pretrained(base)), "vllm_config"))
"""


@pytest.mark.engine
def test_a_class_that_vllm_changed_serves_others_as_before(tiny_family: Callable[[str], Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tiny_family("smollm3"))],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert "of the engine: True\nof others: False" in done.stdout, done.stderr[-3000:]
