"""A T-REX variant as LoRA variants on the shelf, one per cluster of tasks, with what each of them loses."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from ....agents.errors import VariantError
from ....agents.traffic import TrafficRow, data_fingerprint
from ...adapters.adapter_check import SLOT_RANKS, check_adapter, check_variant
from ...adapters.adoption import new_staging
from ...shelf.base_model import find_base
from ...shelf.shelf import Shelf
from ...shelf.variant import Variant
from .frozen_gate import FrozenCluster, FrozenGateSettings, freeze_gate

__all__ = ["export_as_lora"]


def export_as_lora(
    name_or_id: str,
    rows: Sequence[TrafficRow],
    *,
    shelf: Shelf,
    base: str | Path,
    settings: FrozenGateSettings | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[Variant, FrozenCluster]]:
    """Freeze a T-REX variant's gate per cluster of `rows`, and yield each LoRA variant as it is put on the shelf.

    `rows` are those it was made from, or its traffic: they say which clusters there are, set the gates and measure
    the loss. Variants are named after their parent and cluster (`solver-cluster-07`); their cards say what they
    lose against the gate that moves with every token.
    Raises: VariantError for a variant that is not T-REX, and what `freeze_gate` raises for the rows.
    """
    parent = shelf.get(name_or_id)
    if parent.ask.kind is None or not parent.ask.kind.needs_intuition:
        raise VariantError(
            f"variant {parent.name!r} has {parent.ask.adapter or 'no'} adapter",
            expected="a T-REX adapter, whose gate can be frozen",
            remedy="Export it as it is, without --as lora.",
        )
    chosen = settings or FrozenGateSettings()
    if parent.checkpoint == "base":
        place = find_base(base)
        check_variant(parent, shelf.path(parent), place, slot_rank=SLOT_RANKS[-1])
    else:
        place = shelf.path(parent.checkpoint) / "weights"
        check_adapter(shelf.path(parent) / "adapter", place, slot_rank=SLOT_RANKS[-1])
    data = data_fingerprint(rows)
    with new_staging(shelf) as work:
        frozen = freeze_gate(
            shelf.path(parent) / "adapter",
            place,
            rows,
            work,
            settings=chosen,
            template=parent.template,
            on_progress=on_progress,
        )
        for done in frozen:
            method = {"method": "frozen-gate", "cluster": done.cluster, **chosen.model_dump()}
            record = {
                "base": parent.base,
                "parent": parent.id,
                "recipe": {"methods": [method]},
                "seed": chosen.seed,
                "data": data,
                "prompt_layout": parent.prompt_layout,
                "chat_template_args": parent.chat_template_args,
                "thinking_tags": parent.thinking_tags,
                "engine": parent.engine.model_copy(update={"weights": parent.checkpoint}),
                "ask": parent.ask.model_copy(update={"adapter": "lora", "rank": done.rank}),
                "card": {
                    "kl_nats": done.error.as_card()["kl_nats"],
                    "agreement": done.error.as_card()["agreement"],
                    "frozen_gate": {
                        "calibration_rows": done.calibration_rows,
                        "held_out_rows": done.held_out_rows,
                        "answer_loss": asdict(done.loss),
                        **done.error.as_card(),
                    },
                },
            }
            with new_staging(shelf) as staging:
                shutil.move(done.folder, staging / "adapter")
                variant = shelf.add(staging, name=f"{parent.name}-cluster-{done.cluster:02d}", record=record)
            yield variant, done
