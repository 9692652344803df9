"""The one place that sets vLLM's environment, imports it, and checks its version."""

from __future__ import annotations

import os
import warnings

from ...agents.errors import PluginError
from ..plugin.register import register
from ..plugin.signatures import SUPPORTED_VLLM, check_version

__all__ = ["engine_environment", "import_vllm"]

_FIXED = {
    # Nothing leaves the machine.
    "VLLM_NO_USAGE_STATS": "1",
    # The V2 model runner has no LoRA hook for our plugin.
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    # An ask whose logits are not finite has no answer, which must not look like an empty one.
    "VLLM_COMPUTE_NANS_IN_LOGITS": "1",
}
_DEFAULTS = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    # A base is a local folder by the time an engine sees it.
    "HF_HUB_OFFLINE": "1",
    # Silences the C++ side (NUMA binding notes); Python loggers do not reach it.
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    # Automatic binding keeps one core for itself: on two cores the engine would compute with one.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Threads that wait for each other spin for some microseconds before they sleep: alone on two cores that decodes
    # about twice as fast as sleeping at once, beside a busy neighbour at half the speed or more, where spinning for
    # longer takes minutes (docs/log, "Spinning"). `OMP_WAIT_POLICY=PASSIVE` makes them sleep at once.
    "GOMP_SPINCOUNT": "1000",
    "TOKENIZERS_PARALLELISM": "false",
}


def engine_environment(*, threads: int, in_process: bool) -> dict[str, str]:
    """Environment variables of a process that will hold an engine, or a part of one.

    `in_process` keeps scheduler and model together, without vLLM's worker process in between.
    A variable that only tunes and that the user has set already keeps the user's value.
    """
    chosen = {name: os.environ.get(name, value) for name, value in _DEFAULTS.items()}
    if "OMP_WAIT_POLICY" in os.environ and "GOMP_SPINCOUNT" not in os.environ:
        del chosen["GOMP_SPINCOUNT"]  # it would win over the policy
    chosen |= _FIXED
    chosen["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if in_process else "1"
    # An inherited value would win over `threads`, which is the setting people see.
    chosen["OMP_NUM_THREADS"] = chosen["MKL_NUM_THREADS"] = str(threads)
    return chosen


def import_vllm(*, threads: int, in_process: bool) -> None:
    """Import vLLM with our environment and switch our plugin on in this process.

    Raises: PluginError when vLLM is absent, of another series, or not what the plugin patches.
    """
    os.environ.update(engine_environment(threads=threads, in_process=in_process))
    try:
        with warnings.catch_warnings():
            # Raised by libraries among themselves while importing; nothing a user could act on.
            warnings.simplefilter("ignore")
            import vllm
    except ImportError as error:
        raise PluginError(
            f"vLLM cannot be imported: {error}",
            expected=f"vLLM {SUPPORTED_VLLM}.*",
            remedy="Install the engine with `pip install 'metier[cpu]'`, or `metier[gpu]` beside a GPU.",
        ) from error
    # vLLM walks over every attribute of torch.distributed when it first makes an engine.
    warnings.filterwarnings("ignore", message="`torch.distributed.reduce_op` is deprecated")
    # vLLM only logs a plugin's failure and goes on; ours corrects wrong answers, so it is called here, where it raises.
    check_version(vllm.__version__)
    register()
