"""Adapters that no engine loads beside a base, as a checkpoint of their own: peft merges, and what it made is compared.

Whatever changes only weights can be merged: DoRA, trained modules and tokens, biases, embeddings, kinds that multiply
weights, and starts that changed the base, which peft repeats on the base given. What peft does not merge it refuses,
and what it merges wrongly is found: merged and unmerged model must give the same logits.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...agents.errors import AdapterError
from ..checkpoints.dense_checkpoint import dense_tensors, write_dense
from ..checkpoints.output_head import HEAD
from ..checkpoints.tensor_files import base_tensors, read_json
from ..shelf.companion_files import add_companions
from .adapter_files import WEIGHTS, check_finite, read_config, read_tensors
from .adapter_mending import naming, write_mended
from .peft_kinds import check_mergeable
from .peft_models import load_adapter, load_base, logits_of, peft_at_work, prompt_tokens

if TYPE_CHECKING:
    import torch

    from .logit_error import LogitError

__all__ = ["MERGE_TOLERANCE", "Merged", "merge_adapter"]

MERGE_TOLERANCE = 1e-3
"""Share of the adapter's own effect on the logits that the merged model may differ by, before its numbers are rounded
to the base's format; float32 noise is 100 times less."""

_NOISE = 1e-4  # between logits of float32; an adapter that changes nothing has no effect to take a share of


@dataclass(frozen=True)
class Merged:
    """What became of an adapter: its kind, whether head and embedding had to be parted, and what rounding lost."""

    peft_type: str
    untied: bool
    error: LogitError


def merge_adapter(
    folder: Path, base: Path, out: Path, *, on_progress: Callable[[int, int], None] | None = None
) -> Merged:
    """Write a checkpoint folder `out`: `base` with the adapter in `folder` merged into its weights.

    The model is in memory in float32, twice at most. A head that shares its weights with the embedding is stored apart
    where the adapter changes only one of them. `on_progress` gets the steps done and their number.
    Raises: AdapterError for an adapter that is damaged, that fixed weights cannot equal, or that peft does not merge;
    OSError when the disk is full.
    """
    say = on_progress or (lambda done, steps: None)
    kind = check_mergeable(folder, read_config(folder))
    check_finite(folder / WEIGHTS, read_tensors(folder))
    config = read_json(base, "config.json")
    if "quantization_config" in config:
        raise AdapterError(
            f"base {base.name} is quantised, and {folder} would be merged into its rounded weights",
            expected="a base of plain weights",
            remedy="Merge it into the plain one (--base), then quantise that by a recipe with `method: ptq`.",
        )
    with tempfile.TemporaryDirectory() as place, naming(folder, not_copy=Path(place)):
        mended = Path(place)
        write_mended(folder, mended, base, for_engine=False)
        say(1, 5)
        tokens = prompt_tokens(base)
        model = load_base(base)
        bare = logits_of(model, tokens)
        tuned = load_adapter(model, mended, kind)
        with peft_at_work("compute with", kind, folder):
            original = logits_of(tuned, tokens)
        del model, tuned
        say(2, 5)
        # Whether a kind changes a tied head with its embedding is its own affair, so the logits decide.
        merged = _same(_merged(mended, base, kind, apart=True), tokens, original, bare)
        if merged is None:
            merged = _same(_merged(mended, base, kind, apart=False), tokens, original, bare)
    say(3, 5)
    if merged is None:
        raise AdapterError(
            f"{kind} adapter {folder}: the model that peft merges computes something else than the unmerged one",
            expected="the same logits from both",
            remedy="Merge it where it was trained, and give the result as a base.",
        )
    tensors = dense_tensors(merged)
    _check_names(folder, base, tensors)
    untied = HEAD in tensors and HEAD not in base_tensors(base)
    write_dense(out, tensors, config)
    add_companions(base, out)
    say(4, 5)
    del merged, tensors
    rounded = _error(original, logits_of(load_base(out), tokens), bare)
    say(5, 5)
    return Merged(kind, untied, rounded)


def _merged(folder: Path, base: Path, kind: str, *, apart: bool) -> Any:
    """The merged model; with `apart`, a head and embedding that are one tensor in the base are merged as two.

    None where the adapter itself treats the two as one, so that it does not fit them apart.
    """
    import torch

    model = load_base(base)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is embedding.weight
    if tied and apart:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    try:
        tuned = load_adapter(model, folder, kind)
    except AdapterError:
        if tied and apart:
            return None
        raise
    with peft_at_work("merge", kind, folder):
        merged = tuned.merge_and_unload(safe_merge=True)
    head, embedding = merged.get_output_embeddings(), merged.get_input_embeddings()
    if tied and torch.equal(head.weight, embedding.weight):
        head.weight = embedding.weight
    return merged


def _same(
    merged: Any, tokens: list[torch.Tensor], original: list[torch.Tensor], bare: list[torch.Tensor]
) -> Any | None:
    """The merged model where its logits are the original's, else None."""
    if merged is None:
        return None
    error = _error(original, logits_of(merged, tokens), bare)
    return merged if error.share <= MERGE_TOLERANCE or error.max_logit <= _NOISE else None


def _error(original: list[torch.Tensor], stand_in: list[torch.Tensor], bare: list[torch.Tensor]) -> LogitError:
    from .logit_error import LogitErrorMeter

    meter = LogitErrorMeter()
    for triple in zip(original, stand_in, bare, strict=True):
        meter.add(*triple)
    return meter.result()


def _check_names(folder: Path, base: Path, tensors: dict[str, Any]) -> None:
    """Check that the model's tensors are those that a checkpoint of this base has: engines look for these names."""
    stored = base_tensors(base)
    strange = sorted((tensors.keys() ^ stored.keys()) - {HEAD})
    if strange:
        raise AdapterError(
            f"{folder} cannot be merged into {base.name}: {strange[0]} is only in "
            f"{'the checkpoint' if strange[0] in stored else 'the merged model'}",
            expected="a base that stores its weights as the model names them, and an adapter that adds none",
            remedy="Merge it where it was trained, and give the result as a base.",
        )
