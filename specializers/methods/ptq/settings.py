"""Settings of post-training quantisation, checked before anything is rounded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from pydantic import Field, model_validator

from ....agents.frozen_model import FrozenModel
from ...checkpoints.quantisation_plan import LAYER_NAMES, Scheme, check_fused, choose_schemes

__all__ = ["PtqSettings", "SchemeName"]


SchemeName = Literal["w8a8", "w4a16"]


_ANY = range(256)  # numbers of layers that patterns may name before a model is known


class PtqSettings(FrozenModel):
    """Settings of post-training quantisation.

    >>> settings = PtqSettings(scheme="w4a16", rounding="gptq", overrides={"*.down_proj": "w8a8"})
    >>> plan = settings.plan(["model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"])
    >>> [scheme.bits for scheme in plan.values()]
    [8, 4]
    """

    method: Literal["ptq"] = "ptq"

    scheme: SchemeName = "w8a8"
    """Number formats of all layers: `w8a8` (8-bit weights and activations) or `w4a16` (4-bit weights)."""

    rounding: Literal["rtn", "gptq"] = "rtn"
    """`rtn` rounds each weight to the nearest level; `gptq` also looks at rows."""

    clip_search: bool = True
    """Whether to try scales that cut off the largest weights."""

    group_size: Literal[32, 64, 128] = 64
    """Inputs that share a scale in W4A16."""

    ignore: tuple[str, ...] = ()
    """Layers that are kept as they are: patterns as in a shell, `*.o_proj` or `*.layers.0.*`."""

    overrides: dict[str, SchemeName] = {}
    """Pattern → scheme for other layers; the last match wins. Members of one fused matrix (q, k, v; gate, up) must get
    the same."""

    adapter: Literal["merge", "keep", "drop"] = "merge"
    """What becomes of the parent's LoRA: `merge` it into the weights before rounding, `keep` it as an adapter on the
    rounded weights, or `drop` it."""

    calibration_rows: int = Field(default=64, ge=1)
    """Rows that GPTQ looks at."""

    max_row_tokens: int = Field(default=1024, ge=2)
    """Most tokens of one row. A longer one is an error."""

    damping: float = Field(default=0.01, gt=0.0, le=1.0)
    """Share of the mean curvature that GPTQ adds to all."""

    perplexity_windows: int = Field(default=16, ge=0)
    """Windows of text that perplexity is measured on before and after, for the card. 0 is none. The text ships with
    Python."""

    perplexity_window_tokens: int = Field(default=256, ge=2)
    """Tokens of one such window."""

    @model_validator(mode="after")
    def _overrides_are_not_ignored(self) -> PtqSettings:
        both = sorted(set(self.ignore) & set(self.overrides))
        if both:
            raise ValueError(f"one of ignore and overrides for {both[0]!r}")
        return self

    @model_validator(mode="after")
    def _patterns_fit_some_model(self) -> PtqSettings:
        """Refuse patterns that fit no model, or split fused matrices of every one, before a checkpoint is seen."""
        blocks = {name: "self_attn" if name[0] in "qkvo" else "mlp" for name in LAYER_NAMES}
        layers = {f"model.layers.{i}.{block}.{name}": None for i in _ANY for name, block in blocks.items()}
        check_fused(self.plan(layers), layers)
        return self

    def plan(self, layers: Iterable[str]) -> dict[str, Scheme]:
        """Layer → scheme, for those that are quantised; raises RecipeError for a pattern that matches none."""
        schemes = {"w8a8": Scheme(8), "w4a16": Scheme(4, self.group_size)}
        overrides: Mapping[str, Scheme | None] = {
            **dict.fromkeys(self.ignore),
            **{pattern: schemes[name] for pattern, name in self.overrides.items()},
        }
        return choose_schemes(layers, schemes[self.scheme], overrides)
