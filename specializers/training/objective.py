"""What a step of training descends on: the loss of the answers, and the class that methods extend it by.

torch is imported inside the functions, so that settings and recipes load without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Required, TypedDict

from .batches import EncodedRow, passes, shared_start

if TYPE_CHECKING:
    import torch

__all__ = ["Objective", "Placed", "answer_loss"]


def answer_loss(model: Any, rows: Sequence[EncodedRow], *, pad_token: int, device: str = "cpu") -> torch.Tensor:
    """Mean cross-entropy over the answer tokens of a batch, in nats; a scalar that can be differentiated.

    What all prompts start with is computed once, and its keys and values are shared by the rows (gradients add
    up): the same loss for a third less work on prompts of one role. Rows are padded between that start and
    their rest, so that answers end in the same column, and logits are needed for the last columns only.
    """
    import torch

    shared = shared_start(rows)
    rest = [row.tokens[shared:] for row in rows]
    width = max(map(len, rest))
    keep = max(len(row.tokens) - row.prompt_tokens for row in rows)
    tokens = torch.full((len(rows), width), pad_token)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    labels = torch.full((len(rows), keep), -100)
    for i, (row, tail) in enumerate(zip(rows, rest, strict=True)):
        tokens[i, width - len(tail) :] = torch.tensor(tail)
        mask[i, width - len(tail) :] = 1
        answer = row.tokens[row.prompt_tokens :]
        labels[i, keep - len(answer) :] = torch.tensor(answer)
    positions = (shared + mask.cumsum(1) - 1).clamp(min=0)
    extra = {}
    if rows[0].intuition is not None:
        extra["intuition"] = torch.tensor([row.intuition for row in rows], device=device)
    cache = None
    if shared:
        start = torch.tensor([rows[0].tokens[:shared]], device=device)
        of_one = {name: values[:1] for name, values in extra.items()}
        cache = model(input_ids=start, use_cache=True, logits_to_keep=1, **of_one).past_key_values
        cache.batch_repeat_interleave(len(rows))
        mask = torch.cat([torch.ones((len(rows), shared), dtype=torch.long), mask], dim=1)
    output = model(
        input_ids=tokens.to(device),
        attention_mask=mask.to(device),
        position_ids=positions.to(device),
        past_key_values=cache,
        logits_to_keep=min(keep + 1, width),
        use_cache=bool(shared),
        **extra,
    )
    logits = output.logits[:, -keep - 1 : -1].float()  # [rows, keep, vocabulary]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.to(device).flatten(), ignore_index=-100)


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
