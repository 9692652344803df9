"""What a step of training descends on: the loss of the answers, and the class that methods extend it by.

torch is imported inside the functions, so that settings and recipes load without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Required, TypedDict

from .batches import EncodedRow, passes, shared_start

if TYPE_CHECKING:
    import torch

__all__ = ["Objective", "Placed", "answer_loss", "can_share_start", "scales_by_length"]

_SCALED_BY_LENGTH = ("dynamic", "longrope")
IGNORED = -100
"""Label of a place that is not learned, as cross-entropy knows it."""


def answer_loss(model: Any, rows: Sequence[EncodedRow], *, pad_token: int, device: str = "cpu") -> torch.Tensor:
    """Mean cross-entropy over the answer tokens of a batch, in nats; a scalar that can be differentiated.

    What all prompts start with is computed once, and its keys and values are shared by the rows (gradients add
    up): the same loss for a third less work on prompts of one role. Rows are padded at their end, so that every token
    stands where it stands in a row by itself: attention windows count places. What pads comes after all that is
    looked at, so it needs no mask. Logits are computed for the columns in which some row is asked for a word.
    """
    import torch

    if len(rows) > 1 and scales_by_length(model, max(len(row.tokens) for row in rows)):
        answers = [len(row.tokens) - row.prompt_tokens for row in rows]
        alone = [answer_loss(model, [row], pad_token=pad_token, device=device) for row in rows]
        return torch.stack([n * loss for n, loss in zip(answers, alone, strict=True)]).sum() / sum(answers)
    shared = shared_start(rows) if len(rows) > 1 and can_share_start(model) else 0
    width = max(len(row.tokens) for row in rows) - shared
    tokens = torch.full((len(rows), width), pad_token)
    labels = torch.full((len(rows), width), IGNORED)  # in the column of the token before, from which it is predicted
    for i, row in enumerate(rows):
        tokens[i, : len(row.tokens) - shared] = torch.tensor(row.tokens[shared:])
        answer = slice(row.prompt_tokens - shared - 1, len(row.tokens) - shared - 1)
        labels[i, answer] = torch.tensor(row.tokens[row.prompt_tokens :])
    asked = (labels != IGNORED).any(0).nonzero().flatten()
    extra = {}
    if rows[0].intuition is not None:
        extra["intuition"] = torch.tensor([row.intuition for row in rows], device=device)
    cache = None
    if shared:
        start = torch.tensor([rows[0].tokens[:shared]], device=device)
        of_one = {name: values[:1] for name, values in extra.items()}
        cache = model(input_ids=start, use_cache=True, logits_to_keep=1, **of_one).past_key_values
        cache.batch_repeat_interleave(len(rows))
    output = model(
        input_ids=tokens.to(device),
        past_key_values=cache,
        logits_to_keep=asked.to(device),
        use_cache=bool(shared),
        **extra,
    )
    logits = output.logits.float()  # [rows, asked columns, vocabulary]
    wanted = labels[:, asked].to(device)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED)


def can_share_start(model: Any) -> bool:
    """Whether rows may go on from one another's keys and values: all layers keep those, and no state that is updated.

    A window's layers keep as many as its tokens look back to.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    return kinds <= {DynamicLayer, DynamicSlidingWindowLayer}


def scales_by_length(model: Any, longest: int) -> bool:
    """Whether the model places tokens by the length of all it is given, and `longest` tokens are where that begins.

    Rows of several lengths cannot go through such a model together (rope of the kinds `dynamic` and `longrope`).
    """
    config = model.config.get_text_config()
    ropes = getattr(config, "rope_parameters", None) or {}
    by_layer = [ropes] if "rope_type" in ropes else [rope for rope in ropes.values() if isinstance(rope, dict)]
    return any(
        rope.get("rope_type") in _SCALED_BY_LENGTH
        and longest > rope.get("original_max_position_embeddings", config.max_position_embeddings)
        for rope in by_layer
    )


class Placed(TypedDict, total=False):
    """What computing a loss needs besides model and rows: what pads, where, and whether products run in bfloat16."""

    pad_token: Required[int]
    device: str
    autocast: bool


class Objective:
    """What each step descends on: here the mean cross-entropy of the answers; methods that want more override it.

    `state` holds tensors, of fixed shapes, that are saved with every checkpoint and restored in place; `pass_tokens`
    is the settings' own, set by `train`.
    """

    def __init__(self, model: Any, *, pad_token: int, device: str = "cpu", autocast: bool = False) -> None:
        self.model = model
        self.pad_token = pad_token
        self.device = device
        self.autocast = autocast
        self.state: dict[str, torch.Tensor] = {}
        self.pass_tokens: int | None = None

    def loss(self, rows: Sequence[EncodedRow]) -> torch.Tensor:
        """`answer_loss` of the model as it is now, in the precision training asked for."""
        import torch

        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.autocast):
            return answer_loss(self.model, rows, pad_token=self.pad_token, device=self.device)

    def add_gradients(self, rows: Sequence[EncodedRow], step: int) -> dict[str, float]:
        """Add this step's gradients to those of the parameters; returns what the log keeps, `loss` among it."""
        return {"loss": self.add_answer_gradients(rows)}

    def add_answer_gradients(self, rows: Sequence[EncodedRow], weight: float = 1.0) -> float:
        """Add the gradients of `weight` times the loss of a batch, pass by pass, and return the loss."""
        answers = [len(row.tokens) - row.prompt_tokens for row in rows]
        total, mean, done = sum(answers), 0.0, 0
        for part in passes(rows, self.pass_tokens):
            share = sum(answers[done : done + len(part)]) / total
            loss = self.loss(part)
            (weight * share * loss).backward()
            mean += share * loss.item()
            done += len(part)
        return mean

    def after_step(self, step: int) -> dict[str, float]:
        """Called when the optimiser has stepped, before a checkpoint; returns what else the log keeps."""
        return {}
