"""Settings of post-training quantisation, checked before anything is rounded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ...checkpoints.quantisation_plan import LAYER_NAMES, Scheme, check_fused, choose_schemes

__all__ = ["PtqSettings", "SchemeName"]


SchemeName = Literal["w8a8", "w4a16"]


_ANY = range(256)  # numbers of layers that patterns may name before a model is known


class PtqSettings(BaseModel):
    """Settings of post-training quantisation.

    `scheme` is for all layers but those whose name matches a pattern of `ignore` (kept as they are) or of
    `overrides` (pattern → scheme, the last match wins); patterns are as in a shell, `*.o_proj` or `*.layers.0.*`.
    Members of one fused matrix (q, k, v; gate, up) must get the same. `group_size` inputs share a scale in W4A16.
    `clip_search` tries scales that cut off the largest weights. `adapter` says what becomes of the parent's LoRA:
    `merge` it into the weights before rounding, `keep` it as an adapter on the rounded weights, or `drop` it.

    GPTQ looks at `calibration_rows` rows of at most `max_row_tokens` tokens; `damping` is the share of the mean
    curvature added to all. Perplexity before and after goes on the card, on `perplexity_windows` windows (0: none)
    of `perplexity_window_tokens` tokens of a text that ships with Python.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["ptq"] = "ptq"
    scheme: SchemeName = "w8a8"
    rounding: Literal["rtn", "gptq"] = "rtn"
    clip_search: bool = True
    group_size: Literal[32, 64, 128] = 64
    ignore: tuple[str, ...] = ()
    overrides: dict[str, SchemeName] = {}
    adapter: Literal["merge", "keep", "drop"] = "merge"
    calibration_rows: int = Field(default=64, ge=1)
    max_row_tokens: int = Field(default=1024, ge=2)
    damping: float = Field(default=0.01, gt=0.0, le=1.0)
    perplexity_windows: int = Field(default=16, ge=0)
    perplexity_window_tokens: int = Field(default=256, ge=2)

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
