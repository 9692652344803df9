"""What a training keeps, so that it goes on after any kill: weights, the optimiser's moments, state, and the log."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from ...agents.errors import TrainingError
from ...agents.text_files import open_regular
from ...agents.whole_files import whole_file

if TYPE_CHECKING:
    import torch

__all__ = ["TrainingCheckpoint"]


@dataclass(frozen=True)
class TrainingCheckpoint:
    """One training's file at `path`, a safetensors file that is always whole.

    `job` is a fingerprint of what is trained on what; `trained` are the parameters by name, `optimizer` is the AdamW
    that moves them, and `state` holds tensors of fixed shapes that are kept beside them.
    """

    path: Path
    job: str
    trained: Mapping[str, torch.Tensor]
    optimizer: torch.optim.Optimizer
    state: Mapping[str, torch.Tensor]

    def save(self, log: list[dict[str, float]]) -> None:
        """Replace the file by how things are now."""
        from safetensors.torch import save_file

        tensors = {f"state.{name}": tensor.cpu().contiguous() for name, tensor in self.state.items()}
        for name, parameter in self.trained.items():
            moments = self.optimizer.state[parameter]
            tensors[f"weight.{name}"] = parameter.detach().cpu().contiguous()
            tensors[f"mean.{name}"] = moments["exp_avg"].cpu().contiguous()
            tensors[f"square.{name}"] = moments["exp_avg_sq"].cpu().contiguous()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(self.path) as part:
            save_file(tensors, part, metadata={"job": self.job, "log": json.dumps(log)})

    def load(self) -> list[dict[str, float]]:
        """Put everything back in place and return the log, which is empty where there is no file yet.

        Raises: TrainingError for a file of another job, or one that is damaged.
        """
        import torch
        from safetensors import SafetensorError, safe_open

        if not self.path.exists():
            return []
        remedy = f"Delete {self.path} to start over."
        try:
            open_regular(self.path).close()  # the library would wait for a pipe
            with safe_open(str(self.path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("job") != self.job:
                    raise TrainingError(
                        f"checkpoint {self.path} belongs to another job", expected=f"job {self.job}", remedy=remedy
                    )
                # Whole numbers stay whole: the log is part of what a variant is named by.
                log = TypeAdapter(list[dict[str, int | float]]).validate_json(metadata["log"])
                with torch.no_grad():
                    for name, tensor in self.state.items():
                        tensor.copy_(file.get_tensor(f"state.{name}"))
                    for name, parameter in self.trained.items():
                        parameter.copy_(file.get_tensor(f"weight.{name}"))
                        self.optimizer.state[parameter] = {
                            "step": torch.tensor(float(len(log))),
                            "exp_avg": file.get_tensor(f"mean.{name}").to(parameter.device),
                            "exp_avg_sq": file.get_tensor(f"square.{name}").to(parameter.device),
                        }
        except (SafetensorError, KeyError, ValueError, RuntimeError, OSError) as error:
            raise TrainingError(
                f"checkpoint {self.path} cannot be read: {error}", expected="one that this job wrote", remedy=remedy
            ) from error
        return log
