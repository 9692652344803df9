"""What retrieval finds in a checkpoint's own long contexts: FIER beside Quest and a recent window at equal traffic.

Queries and keys are captured from a forward pass over whole prompts, at their last tokens: those are what the first
decode step asks with. Of the checkpoint itself; an adapter is not applied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...checkpoints.attention import AttentionName, open_model, register_attention
from ...shelf.fier_settings import FierSettings
from .key_retrieval import encode_keys, page_bounds, page_scores, score_keys, shared_query, top_tokens, window_tokens

__all__ = ["QUEST_PAGE", "RecallPoint", "capture_attention", "choices", "measure_recall"]

QUEST_PAGE = 16
"""Tokens of a page of Quest: its bounds are as many bytes as FIER's codes in groups of 32."""


@dataclass(frozen=True)
class RecallPoint:
    """One way to choose `budget_tokens` tokens, as means over prompts, layers that retrieve, and heads.

    `recall` is the share of the exact best tokens among those chosen, `mass` the share of the exact attention weights.
    """

    way: str
    budget_tokens: int
    recall: float
    mass: float


def capture_attention(model: Path, prompts: Sequence[Sequence[int]]) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """For each prompt and layer, the last token's query [H, d] and all keys [h, n, d], both after RoPE."""
    taken: list[tuple[torch.Tensor, torch.Tensor]] = []

    def take(attend: Any, module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        taken.append((query[0, :, -1].detach(), key[0].detach()))
        return attend(module, query, key, value, mask, **options)

    def capturing(name: AttentionName) -> str:
        return register_attention("capture", name, take)

    loaded = open_model(model, dtype="auto", attention=capturing).eval()
    found = []
    with torch.no_grad():
        for prompt in prompts:
            taken.clear()
            loaded(torch.tensor([list(prompt)]), use_cache=False, logits_to_keep=1)
            found.append(list(taken))
    return found


def choices(
    query: torch.Tensor, keys: torch.Tensor, settings: FierSettings, budget: int
) -> dict[str, list[torch.Tensor]]:
    """Tokens that each way chooses per key-value head, from a query [H, d] and the keys [h, n, d] of whole groups.

    `exact` are the best by exact scores. The window gets the tokens more that the others' codes are worth in bytes.
    """
    heads, n, _ = keys.shape
    shared = shared_query(query, heads)
    exact = (shared.unsqueeze(1) @ keys.float().transpose(1, 2)).squeeze(1)
    pages = top_tokens(page_scores(shared, *page_bounds(keys.float(), QUEST_PAGE)), max(budget // QUEST_PAGE, 1))
    paged = (pages.unsqueeze(-1) * QUEST_PAGE + torch.arange(QUEST_PAGE)).flatten(-2)
    scores = score_keys(shared, encode_keys(keys, settings.group_tokens))
    return {
        "exact": list(top_tokens(exact, budget)),
        "fier": list(top_tokens(scores, budget, settings.sink_tokens)),
        "quest": list(paged),
        "window": [window_tokens(n, budget + n // 16)] * heads,
    }


def measure_recall(
    model: Path, prompts: Sequence[Sequence[int]], settings: FierSettings, budgets: Sequence[int]
) -> list[RecallPoint]:
    """Recall and attention mass of every way at every budget, over layers that retrieve.

    Budgets that a prompt's whole groups do not exceed are not measured on it; those measured on none are left out.
    """
    sums: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for layers in capture_attention(model, prompts):
        for query, every in layers[settings.dense_layers :]:
            closed = every.shape[1] // settings.group_tokens * settings.group_tokens
            keys = every[:, :closed]
            scale = keys.shape[-1] ** -0.5
            grouped = query.unflatten(0, (keys.shape[0], -1)).float()
            weights = (grouped @ keys.float().transpose(1, 2) * scale).softmax(-1)
            for budget in budgets:
                if budget >= closed:
                    continue
                chosen = choices(query, keys, settings, budget)
                for way, tokens in chosen.items():
                    for head, at in enumerate(tokens):
                        hit = torch.isin(chosen["exact"][head], at).float().mean()
                        mass = weights[head][:, at].sum(-1).mean()
                        sums.setdefault((way, budget), []).append((float(hit), float(mass)))
    points = []
    for (way, budget), values in sums.items():
        recall, mass = (sum(column) / len(values) for column in zip(*values, strict=True))
        points.append(RecallPoint(way, budget, round(recall, 4), round(mass, 4)))
    return points
