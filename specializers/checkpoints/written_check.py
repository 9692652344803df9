"""Whether others read a quantised checkpoint as it was meant: the format's own library, by the config that was written.

A config that takes a layer for quantised which is stored dense is read without an error, as garbage.
"""

from __future__ import annotations

from pathlib import Path

from ...agents.errors import RecipeError
from .checkpoint_files import CheckpointReader
from .dense_model import build_without_weights
from .stored_weights import quantised_layers

__all__ = ["check_written"]


def check_written(folder: Path) -> None:
    """Compare which modules the config of a compressed-tensors checkpoint takes for quantised with what is stored.

    Raises: RecipeError that names the first module that they disagree on.
    """
    import torch
    from compressed_tensors.utils import match_named_modules

    reader = CheckpointReader(folder)
    settings = reader.config["quantization_config"]
    targets = [target for group in settings["config_groups"].values() for target in group["targets"]]
    model = build_without_weights(folder)
    taken = {
        name
        for name, module in match_named_modules(model, targets, settings["ignore"])
        if isinstance(module, torch.nn.Linear)
    }
    wrong = sorted(taken ^ quantised_layers(reader))
    if wrong:
        how = "quantised" if wrong[0] in taken else "dense"
        raise RecipeError(
            f"{wrong[0]} of the new checkpoint would be read as {how}, and is not stored so",
            expected="a config that says of every layer how it is stored",
            remedy="Report it, with the base's name: its layers are built in a way that quantising does not know.",
        )
