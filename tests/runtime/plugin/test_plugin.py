"""The plugin refuses a vLLM it does not know, and can be switched off."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from metier.agents.errors import PluginError
from metier.runtime.plugin import signatures


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0", "0.320.0", "1.0.0", "0.33.0+cpu"])
def test_another_version_is_refused_with_the_remedy(version: str) -> None:
    with pytest.raises(PluginError, match=f"vLLM {version.replace('+', '.')} is installed") as caught:
        signatures.check_version(version)
    assert caught.value.expected == "vLLM 0.32.*"
    assert "Install vllm" in caught.value.remedy


@pytest.mark.parametrize("version", ["0.32.0", "0.32.3", "0.32.0+cpu"])
def test_our_series_is_accepted(version: str) -> None:
    signatures.check_version(version)


def test_the_installed_vllm_has_the_methods_we_replace() -> None:
    signatures.check_signatures(signatures.CPU_LORA_METHODS | signatures.TREX_METHODS)
    signatures.check_signatures(
        signatures.QUANTISED_LORA_METHODS | signatures.COMPILE_CACHE_METHODS | signatures.THINKING_METHODS
    )
    # The CUDA platform itself cannot be imported everywhere.
    signatures.check_signatures(
        {path: names for path, names in signatures.GPU_LORA_METHODS.items() if ".cuda:" not in path}
    )


def test_a_changed_signature_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.lora.model_manager import LoRAModelManager

    def activate_adapter(self: object, lora_id: int, slot: int) -> bool:
        return True

    monkeypatch.setattr(LoRAModelManager, "activate_adapter", activate_adapter)
    with pytest.raises(PluginError, match="activate_adapter takes \\(self, lora_id, slot\\)") as caught:
        signatures.check_signatures(signatures.CPU_LORA_METHODS)
    assert caught.value.expected == "(self, lora_id)"


def test_a_method_that_is_gone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    monkeypatch.delattr(BaseLinearLayerWithLoRA, "_apply_lora_to_output")
    with pytest.raises(PluginError, match="does not exist"):
        signatures.check_signatures(signatures.CPU_LORA_METHODS)


_STATUS = """
from metier.runtime.plugin.register import register
from metier.runtime.plugin.wire import plugin_status
import sys
assert "torch" not in sys.modules and "vllm" not in sys.modules, "importing the plugin must stay light"
print("before:", plugin_status()["lora"])
from vllm.plugins import load_general_plugins
load_general_plugins()
register()
from vllm.platforms import current_platform
print("after:", plugin_status())
print("wrapper:", current_platform.get_punica_wrapper())
"""


def in_a_fresh_process(**environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _STATUS],
        env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.engine
def test_vllm_finds_the_plugin_by_its_entry_point() -> None:
    output = in_a_fresh_process(METIER_PLUGIN="1")
    assert "before: not registered" in output
    active = (
        "thinking",
        "grammars",
        "lora",
        "trex",
        "experts",
        "lora on int8",
        "int8",
        "model classes",
        "torchvision",
        "compile cache",
        "fier",
        "seeded chunks",
        "finite values",
    )
    assert f"after: {dict.fromkeys(active, 'active')}" in output
    assert "wrapper: metier.runtime.plugin.adapters.lora_cpu.GroupedPunicaCPU" in output


@pytest.mark.engine
def test_the_switch_leaves_vllm_as_it_is() -> None:
    output = in_a_fresh_process(METIER_PLUGIN="0")
    assert "off (METIER_PLUGIN=0)" in output
    assert "wrapper: vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU" in output
