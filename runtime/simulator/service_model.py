"""What an engine's steps take, fitted from the times that a store has of each ask."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import median

from pydantic import Field

from ...agents.errors import ProfileError
from ...agents.frozen_model import FrozenModel
from ..report.ledger import BASE, AskEntry, Ledger
from ..report.slot_timeline import Span, merged
from .recorded_programs import RecordedBatch

__all__ = ["ServiceModel", "fit_service"]

FEWEST_ASKS = 20
"""Asks that a fit takes at least; fewer say too little about four costs."""
FIT_ROUNDS = 8
MOST_EQUATIONS = 4000
"""Spans that a fit looks at; of longer batches, every so many-th."""
ROWS_RATIO = 1.5
"""How much larger than the small ones the large batches of a fit should be."""
COVERS = 0.98
"""From this share on a time covers another: clocks are read at different moments of a step."""
KNOWN_LOAD_S = 0.033
"""Seconds of a load where none was recorded: a rank-8 adapter of a 135M model."""


class ServiceModel(FrozenModel):
    """Seconds of an engine's step, fitted from recorded batches."""

    step_s: float = Field(ge=0, allow_inf_nan=False)
    """Seconds of a step, whatever is in it."""

    prompt_token_s: float = Field(ge=0, allow_inf_nan=False)
    """Seconds more for each prompt token computed in it."""

    row_s: float = Field(ge=0, allow_inf_nan=False)
    """Seconds more for each row that generates."""

    adapter_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Seconds more for each adapter among its rows."""

    load_s: float = Field(default=KNOWN_LOAD_S, ge=0, allow_inf_nan=False)
    """Seconds of loading an adapter, in which no step is made."""

    evict_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Seconds of evicting one, in which no step is made."""

    handoff_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Seconds between an answer and the asks that waited for it."""

    misfit: float = 0.0
    """Median of |fitted - measured| ÷ measured over the stretches of the fit."""

    fitted_asks: int = 0
    """Asks that it was fitted from."""

    fewest_rows: float = 0.0
    """Four in five of the fit's answers were generated among at least this many rows."""

    most_rows: float = 0.0
    """And among at most this many: the cost of a row is known as far as the two differ."""

    @property
    def extrapolates(self) -> bool:
        """Whether the batches of the fit were too alike to predict larger or smaller ones."""
        return self.most_rows < ROWS_RATIO * self.fewest_rows

    def step_of(self, prompt_tokens: int, rows: int, adapters: int) -> float:
        """Seconds of one step."""
        return self.step_s + prompt_tokens * self.prompt_token_s + rows * self.row_s + adapters * self.adapter_s


def fit_service(batches: Sequence[RecordedBatch]) -> ServiceModel:
    """Least squares over the stretches that each ask spent in its engine, its prompt's and its answer's apart.

    In a stretch an engine has made as many steps as the ask has got tokens; what else it has done in them follows from
    the other asks' times: how many tokens they wrote meanwhile, which prompts fell in between, which adapters were
    among them, and for how long no step was made because an adapter was moved. None is negative. A stretch is weighted
    by one over what is fitted for it, so that all fitted seconds add up to the measured ones: a noisy machine makes
    steps more expensive, it never makes them seem cheap.

    Raises: ProfileError when there are too few asks, or all were served alike.
    """
    import numpy as np
    from scipy.optimize import nnls

    rows, seconds = list[list[float]](), list[float]()
    for batch in batches:
        by_engine: dict[str, list[AskEntry]] = defaultdict(list)
        for ask in batch.ledger.asks:
            if not ask.lost and ask.answer_tokens + ask.thinking_tokens > 0:
                by_engine[ask.engine].append(ask)
        for engine, asks in by_engine.items():
            for row, taken_s in _stretches(asks, _moves(batch.ledger, engine)):
                rows.append(row)
                seconds.append(taken_s)
    asked = sum(batch.asks for batch in batches)
    if asked < FEWEST_ASKS:
        raise ProfileError(
            f"{asked} asks are too few to fit what an engine's steps take",
            expected=f"at least {FEWEST_ASKS}",
            remedy="Record more runs, or name more batches.",
        )
    every = max(len(rows) // MOST_EQUATIONS, 1)
    x, y = np.array(rows[::every]), np.array(seconds[::every])
    if np.linalg.matrix_rank(x[:, :3] / y[:, None]) < 3:
        raise ProfileError(
            "all asks of this store were served alike: the cost of a row cannot be separated from the cost of a step",
            expected="batches of changing size, as at the end of a batch of runs",
            remedy="Record runs at another --concurrency too, and name both batches.",
        )
    fitted = y
    for _ in range(FIT_ROUNDS):
        weight = 1 / np.sqrt(np.maximum(fitted, 1e-9))
        costs, _ = nnls(x * weight[:, None], y * weight)
        fitted = x @ costs
    step_s, prompt_token_s, row_s, adapter_s = costs
    batch_rows = x[:, 2] / x[:, 0]
    fewest, most = np.quantile(batch_rows[x[:, 0] > 1] if (x[:, 0] > 1).any() else batch_rows, (0.1, 0.9))
    loads = [event.seconds for b in batches for event in b.ledger.slot_events if event.loaded]
    evictions = [event.seconds for b in batches for event in b.ledger.slot_events if not event.loaded]
    return ServiceModel(
        step_s=float(step_s),
        prompt_token_s=float(prompt_token_s),
        row_s=float(row_s),
        adapter_s=float(adapter_s),
        load_s=median(loads) if loads else KNOWN_LOAD_S,
        evict_s=median(evictions) if evictions else 0.0,
        handoff_s=median([batch.handoff_s for batch in batches]),
        misfit=float(np.median(np.abs(fitted - y) / y)),
        fitted_asks=asked,
        fewest_rows=round(float(fewest), 2),
        most_rows=round(float(most), 2),
    )


def _moves(ledger: Ledger, engine: str) -> list[Span]:
    server = engine.partition(" ")[0]  # a server says which of its engines answered
    return merged((event.at - event.seconds, event.at) for event in ledger.slot_events if event.engine == server)


def _stretches(asks: Sequence[AskEntry], moves: Sequence[Span]) -> list[tuple[list[float], float]]:
    """For each ask's prompt and answer: (steps, prompt tokens, tokens written, adapters × steps), and seconds."""
    import numpy as np

    scheduled = np.array([ask.asked_at + ask.queue_s + ask.swap_s for ask in asks])
    first = scheduled + np.array([max(ask.prefill_s, 1e-6) for ask in asks])
    last = first + np.array([ask.decode_s for ask in asks])
    written = np.array([ask.answer_tokens + ask.thinking_tokens - 1.0 for ask in asks])
    prompts = np.array([float(ask.prompt_tokens - ask.cached_tokens) for ask in asks])
    in_use = {
        variant: merged((scheduled[i], last[i]) for i, ask in enumerate(asks) if ask.variant == variant)
        for variant in {ask.variant for ask in asks} - {BASE}
    }
    found = []
    for i in range(len(asks)):
        for start, end, steps in ((scheduled[i], first[i], 1.0), (first[i], last[i], written[i])):
            taken_s = end - start - sum(_overlap(span, (start, end)) for span in moves)
            if steps < 1 or taken_s <= 0:
                continue
            # A prompt whose step ended with this stretch was in it, whatever part of the clock's grain is missing.
            part = np.clip(np.minimum(end, first) - np.maximum(start, scheduled), 0, None) / (first - scheduled)
            beside = np.clip(np.minimum(end, last) - np.maximum(start, first), 0, None)
            share = np.divide(beside, last - first, out=np.zeros_like(beside), where=last > first)
            # Steps with a prompt are longer than others, so tokens are not evenly spread over time. But who wrote in
            # all of this stretch wrote one in each of its steps, and who wrote within it, all there were.
            of_its_own, of_this = share * written, beside / (end - start) * steps
            tokens = np.where(beside >= COVERS * (end - start), of_this, (of_its_own + of_this) / 2)
            tokens = np.where((beside > 0) & (beside >= COVERS * (last - first)), of_its_own, tokens)
            with_adapter = sum(
                _overlap(span, (start, end)) / (end - start) for spans in in_use.values() for span in spans
            )
            row = [steps, float(prompts @ part), float(tokens.sum()), steps * with_adapter]
            found.append((row, float(taken_s)))
    return found


def _overlap(one: Span, other: Span) -> float:
    return max(min(one[1], other[1]) - max(one[0], other[0]), 0.0)
