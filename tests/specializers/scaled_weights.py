"""A method for tests: a checkpoint whose last norm is scaled, which keeps shapes and changes every logit."""

from __future__ import annotations

import os
import signal
from typing import Literal

from pydantic import BaseModel, ConfigDict

from metier.specializers.methods.method import Job, Made, Method


class ScaledSettings(BaseModel):
    """`factor` scales the last norm; `keep_adapter` says that the adapter fits the new weights too."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["scaled"] = "scaled"
    factor: float = 0.5
    keep_adapter: bool = False
    die: bool = False


def make_scaled(settings: ScaledSettings, job: Job) -> Made:
    import shutil

    from safetensors.torch import load_file, save_file

    tensors = load_file(job.model / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * settings.factor
    (job.out / "weights").mkdir()
    save_file(tensors, job.out / "weights" / "model.safetensors", metadata={"format": "pt"})
    if settings.die:
        os.kill(os.getpid(), signal.SIGKILL)
    if settings.keep_adapter and job.adapter is not None:
        shutil.copytree(job.adapter, job.out / "adapter")
        return Made(job.ask, card={"factor": settings.factor})
    return Made(ask=type(job.ask)(), card={"factor": settings.factor}, log=[{"factor": settings.factor}])


METHOD = Method(settings=ScaledSettings, make=make_scaled, makes="weights")
