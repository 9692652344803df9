"""One engine whose attention at decode is changed between asks: full, FIER, and what FIER is compared with.

Prompts are read once, exactly, and found in the prefix cache by every arm after the first; only decode differs.
Quest and the recent window choose tokens in torch from the same cache, so their speed means nothing here. All arms but
full attend to everything in the first two layers. At equal traffic: Quest's bounds of pages of 16 are as many bytes
as FIER's codes in groups of 32; a window reads none, and gets a sixteenth of the context more for it. `exact` chooses
as FIER does, but by the keys themselves: what no better code could improve on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from metier.runtime.plugin.fier.fier_cpu import SideCache
from metier.specializers.methods.fier.key_retrieval import (
    attend,
    page_bounds,
    page_scores,
    shared_query,
    top_tokens,
    window_tokens,
)
from metier.specializers.shelf.fier_settings import FierSettings

__all__ = ["BLOCK", "Arm", "ArmEngine", "prose"]

PAGE = 16
EVERYTHING = 1 << 20
BLOCK = 32
"""Tokens of a block of the prefix cache: of a prompt one longer than whole blocks, read before, one token is left."""


def prose() -> str:
    """A story by Jules Verne that reasoning-gym ships, about 8,000 tokens, without what Project Gutenberg adds."""
    text = files("reasoning_gym.data").joinpath("in_the_year_2889.txt").read_text(encoding="utf-8")
    return text.split("*** START", 1)[1].split("***", 1)[1].split("*** END", 1)[0].strip()


@dataclass(frozen=True)
class Arm:
    """What decode attends to: `kind` is full, fier, exact, quest or window, `budget` its tokens per key-value head."""

    kind: str
    budget: int = 0

    @classmethod
    def parse(cls, text: str) -> Arm:
        """Read `full` or `kind:budget`."""
        kind, _, budget = text.partition(":")
        if kind not in ("full", "fier", "exact", "quest", "window") or (kind == "full") == bool(budget):
            raise SystemExit(f"no such arm: {text!r} (full, fier:K, exact:K, quest:K or window:K)")
        return cls(kind, int(budget or 0))

    def __str__(self) -> str:
        return self.kind if self.kind == "full" else f"{self.kind}:{self.budget}"


@dataclass(frozen=True)
class ComparedSide(SideCache):
    """A side cache whose decode chooses as `arm` does, in torch."""

    arm: Arm = Arm("full")

    def decode(
        self,
        out: torch.Tensor,
        query: torch.Tensor,
        values: torch.Tensor,
        table: torch.Tensor,
        lengths: torch.Tensor,
        *,
        scale: float,
        native: bool,
        wide: bool = True,
    ) -> None:
        """See `SideCache.decode`."""
        block, heads = values.shape[2], self.rows.shape[1]
        for row, length in enumerate(lengths[: len(query)].tolist()):
            places = torch.arange(length)
            blocks = table[row].long()[places // block]
            keys = self.rows[blocks * block + places % block].transpose(0, 1)
            chosen = self._choose(query[row], keys, length)
            shared = query[row].unflatten(0, (heads, -1))
            for head in range(heads):
                at = chosen[head]
                value = values[blocks[at], head, at % block]
                mixed = attend(shared[head], keys[head, at], value, scale)
                out[row].unflatten(0, (heads, -1))[head] = mixed.to(out.dtype)

    def _choose(self, query: torch.Tensor, keys: torch.Tensor, length: int) -> list[torch.Tensor]:
        heads, group = keys.shape[0], self.settings.group_tokens
        if self.arm.kind == "window":
            return [window_tokens(length, self.arm.budget + length // 16)] * heads
        closed = length // group * group
        tail = torch.arange(closed, length)
        if closed <= self.arm.budget:
            return [torch.arange(length)] * heads
        if self.arm.kind == "exact":
            scores = (shared_query(query, heads).unsqueeze(1) @ keys[:, :closed].float().transpose(1, 2)).squeeze(1)
            return [torch.cat([at, tail]) for at in top_tokens(scores, self.arm.budget, self.settings.sink_tokens)]
        bounds = page_scores(shared_query(query, heads), *page_bounds(keys[:, :closed].float(), PAGE))
        pages = top_tokens(bounds, self.arm.budget // PAGE)
        inside = (pages.unsqueeze(-1) * PAGE + torch.arange(PAGE)).flatten(-2)
        return [torch.cat([inside[head], tail]) for head in range(heads)]


class ArmEngine:
    """A vLLM engine on a checkpoint, asked in token ids, greedily, by one arm after the other."""

    def __init__(self, weights: Path, *, threads: int, context_tokens: int = 8192, cache_mib: int = 1024) -> None:
        from metier.runtime.engines.vllm_environment import import_vllm

        import_vllm(threads=threads, in_process=True)
        torch.set_num_threads(threads)
        from vllm.v1.engine.llm_engine import LLMEngine

        from metier.runtime.engines.engine_arguments import engine_arguments
        from metier.runtime.plugin.fier.fier_attention import FierAttention
        from metier.runtime.settings.engine import EngineSettings

        settings = EngineSettings(
            kv_cache_mib=cache_mib,
            max_model_tokens=context_tokens,
            block_tokens=BLOCK,
            threads=threads,
            eager=True,
            fier=FierSettings(budget_tokens=512, min_context_tokens=0),
        )
        args = engine_arguments(weights, dtype="bfloat16", settings=settings, adapters=False)
        self._llm: Any = LLMEngine.from_engine_args(args)
        self.tokenizer: Any = self._llm.get_tokenizer()
        layers = self._llm.model_executor.driver_worker.worker.model_runner.compilation_config.static_forward_context
        self._layers = [layer.impl for layer in layers.values() if isinstance(layer.impl, FierAttention)]
        self.answer(Arm("full"), [[1] * 8], 1)  # side caches are made when something is first stored
        self._layers = [impl for impl in self._layers if impl.side is not None]
        self._sides = [impl.side for impl in self._layers]

    def answer(self, arm: Arm, prompts: list[list[int]], tokens: int) -> list[str]:
        """What an arm writes after each prompt, all asked at once, `tokens` at most each."""
        from vllm import SamplingParams

        self._use(arm)
        params = SamplingParams(temperature=0.0, max_tokens=tokens)
        for number, prompt in enumerate(prompts):
            self._llm.add_request(str(number), {"prompt_token_ids": prompt}, params)
        found: dict[int, str] = {}
        while self._llm.has_unfinished_requests():
            for output in self._llm.step():
                if output.finished:
                    found[int(output.request_id.split("-")[0])] = output.outputs[0].text
        return [found[number] for number in range(len(prompts))]

    def _use(self, arm: Arm) -> None:
        budget = EVERYTHING if arm.kind == "full" else arm.budget
        settings = FierSettings(budget_tokens=budget, min_context_tokens=0)
        for number, impl in enumerate(self._layers):
            impl.retrieval = settings  # decides whether this is stock attention
            side = getattr(self, "_sides", [None] * len(self._layers))[number]
            if side is None:
                continue
            if arm.kind in ("exact", "quest", "window"):
                impl.side = ComparedSide(side.rows, side.pages, settings, arm)
            else:
                impl.side = replace(side, settings=settings)
