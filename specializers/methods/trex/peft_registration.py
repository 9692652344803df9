"""Making PEFT know a method that is not its own.

PEFT has `register_peft_method`, but it takes names of its own enumeration only, and that cannot be extended in
public: the member is created by hand. So the shape of everything relied on is checked first.
"""

from __future__ import annotations

import enum
import inspect
from typing import Any

import peft
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

from ....agents.errors import VariantError

__all__ = ["register_tuner"]

# What tuners of ours override in PEFT: hook → the parameters it must take.
_HOOKS = {
    "_create_and_replace": (
        "self",
        "peft_config",
        "adapter_name",
        "target",
        "target_name",
        "parent",
        "current_key",
        "parameter_name",
    ),
    "_get_adapter_state_dict": ("model", "config", "adapter_name", "state_dict", "unwanted_adapter_names"),
    "_remove_adapter_name_from_key": ("key", "adapter_name"),
    "_remap_adapter_state_dict_for_load": ("model", "config", "adapter_name", "state_dict"),
}


def register_tuner(name: str, config: type[Any], model: type[Any]) -> None:
    """Make PEFT know `peft_type: name` (upper case), its config and its model; once more does nothing.

    Raises: VariantError when PEFT has such a method of its own, or is not as this was written for.
    """
    if name in PeftType.__members__ and PEFT_TYPE_TO_TUNER_MAPPING.get(PeftType(name)) is model:
        return
    problem = _problem(name)
    if problem:
        raise VariantError(
            f"peft {peft.__version__} {problem}",
            expected=f"a peft that {name} was written for, 0.21",
            remedy="Install peft>=0.21.2,<0.22.",
        )
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    register_peft_method(name=name.lower(), config_cls=config, model_cls=model)


def _problem(name: str) -> str:
    """What of PEFT differs from what is relied on; empty when nothing does."""
    if not issubclass(PeftType, str) or not issubclass(PeftType, enum.Enum):
        return "no longer keeps its methods in an enumeration of strings"
    if name in PeftType.__members__:
        return f"already has a method {name}, which is another"
    for hook, wanted in _HOOKS.items():
        method = getattr(BaseTuner, hook, None)
        found = () if method is None else tuple(inspect.signature(method).parameters)
        if found != wanted:
            return f"has BaseTuner.{hook}({', '.join(found)}), where ({', '.join(wanted)}) is overridden"
    return ""
