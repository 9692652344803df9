"""A server somewhere else as a backend: `metier serve`, or any OpenAI-compatible vLLM server."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from ...agents.answers.held_schema import xgrammar_schema
from ...agents.backend import OnText
from ...agents.errors import AskRejectedError, EngineDeadError, EngineError, NotServedError, UnknownVariantError
from ...agents.messages import Ask, Reply
from ...agents.sampling import Sampling
from ..closing import AsyncClosing
from ..settings.fleet import RemoteSettings
from .completions import completed, text_of
from .server_calls import ServerCalls, ServerGoneError

if TYPE_CHECKING:
    from ...specializers.shelf.variant import Variant

__all__ = ["RemoteBackend"]

Resolve = Callable[[str], "tuple[Variant, Path]"]

OURS = "metier"
COMPLETIONS = "/v1/chat/completions"


class RemoteBackend(AsyncClosing):
    """Asks a server by HTTP; works on asyncio and trio. Close it, or use it as an async context manager.

    `url` is the server's address, with or without `/v1`. A server of ours serves variants by their names, and knows
    thinking, priority and everything an ask carries. Of any other, the first model is the base, and `resolve` gives
    the folder of a variant's adapter, which the server has to see under the same path: it is loaded once, by
    `/v1/load_lora_adapter`, under its content id (a name used again would answer from an older adapter's cache).
    What such a server cannot do (thinking, T-REX, variants with checkpoints of their own) raises an error that says so.
    """

    def __init__(
        self,
        url: str,
        resolve: Resolve | None = None,
        settings: RemoteSettings | None = None,
        *,
        api_key: str | None = None,
    ) -> None:
        self._calls = ServerCalls(url, settings or RemoteSettings(), api_key)
        self.url = self._calls.url
        self._resolve = resolve
        self._looking = anyio.Lock()
        self._ours: bool | None = None
        self._base = ""
        self._served: set[str] = set()
        self._loaded: set[str] = set()
        self._models: dict[str, str] = {}

    async def close(self) -> None:
        """Close the connections; closing twice is harmless."""
        await self._calls.close()

    async def warm(self, variants: Iterable[str | None] = (None,)) -> None:
        """Look at the server, and load these variants there.

        Raises: EngineDeadError when nothing answers, EngineError when the server cannot serve one of them.
        """
        for name in dict.fromkeys(variants):
            await self._model(name)

    async def reply(self, ask: Ask, *, on_text: OnText | None = None) -> Reply:
        """See `Backend.reply`.

        Raises: AskRejectedError (this ask cannot be served there), EngineError (the server lacks a capability, or
        refuses the key), EngineDeadError (it cannot be reached, or keeps failing).
        """
        model = await self._model(ask.variant)
        try:
            return await self._complete(ask, model, on_text)
        except NotServedError:
            if self.ours or model not in self._loaded:
                raise
        # It was loaded before: the server has restarted since, or another client has unloaded the adapter.
        self._drop(model)
        return await self._complete(ask, await self._model(ask.variant), on_text)

    async def _complete(self, ask: Ask, model: str, on_text: OnText | None) -> Reply:
        body = self._body(ask, model, stream=on_text is not None)
        if on_text is None:
            data = await self._calls.call("POST", COMPLETIONS, body)
            return self._read_reply(ask, data)
        return await self._stream(ask, body, on_text)

    # --- what the server has ------------------------------------------------------------------------------

    @property
    def ours(self) -> bool:
        """Whether it is `metier serve`, which moves adapters by itself; False before the first call to it."""
        return bool(self._ours)

    @property
    def base(self) -> str:
        """The name of the base there, "" where it does not say."""
        return self._base

    @property
    def model(self) -> str:
        """Which base answers: its fingerprint from `metier serve`, else the server's name for it and its address."""
        return self._base if self.ours and self._base else f"{self._base or 'base'} at {self.url}"

    async def ready(self, timeout_s: float) -> bool:
        """Whether it takes asks: False while it drains. Raises: EngineDeadError when it does not answer within
        `timeout_s`, or reports that it is not healthy.
        """
        path = "/ready" if self.ours else "/health"
        status = await self._calls.probe(path, timeout_s)
        if status == 503 and self.ours:
            return False
        if status >= 400:
            raise self._calls.gone(f"answered {path} with {status}")
        return True

    async def check(self, variant: str | None) -> None:
        """Whether the server can serve a variant, without loading its adapter.

        Raises: UnknownVariantError, EngineError saying what the server lacks; EngineDeadError when nothing answers.
        """
        await self.look()
        if variant is None:
            return
        if self.ours:
            if not {variant, f"variant:{variant}"} & self._served:
                raise UnknownVariantError(
                    f"variant {variant!r} is not served at {self.url}",
                    expected=f"one of {', '.join(sorted(self._served))}",
                    remedy=f"Start `metier serve WORKFLOW.py --variants {shlex.quote(variant)}` there.",
                )
        elif self._resolve is not None:
            self._check_servable(self._resolve(variant)[0])

    async def unload(self, id: str) -> None:
        """Unload an adapter that was loaded by this backend, by its content id; harmless when the server does not have
        it."""
        self._drop(id)
        try:
            await self._calls.call("POST", "/v1/unload_lora_adapter", {"lora_name": id})
        except AskRejectedError:
            return  # the server has started anew since

    def forget(self) -> None:
        """Read again what the server is and serves before the next ask: it may have restarted."""
        self._ours = None
        self._models.clear()
        self._served.clear()
        self._loaded.clear()

    def _drop(self, model: str) -> None:
        self._served.discard(model)
        self._loaded.discard(model)
        self._models = {name: served for name, served in self._models.items() if served != model}

    # --- what a request says ------------------------------------------------------------------------------

    def _body(self, ask: Ask, model: str, *, stream: bool) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": model,
            "messages": [{"role": m.role, "content": m.content} for m in ask.messages],
            "max_completion_tokens": ask.max_tokens,
            "temperature": ask.temperature,
            "top_p": ask.top_p,
        }
        if ask.seed is not None:
            body["seed"] = ask.seed
        body |= _sampling(ask.sampling)
        if ask.answer_schema is not None:
            schema = {"name": "answer", "schema": xgrammar_schema(ask.answer_schema), "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if self._ours:
            body["priority"] = ask.priority
            if ask.thinking is not None:
                body["thinking"] = ask.thinking.model_dump()
            names = ("run_id", "step_path", "role", "round", "attempt", "prompt_layout", "task")
            body["metier"] = {name: getattr(ask, name) for name in names}
        elif ask.thinking is not None:
            raise AskRejectedError(
                f"the ask of role {ask.role!r} at step {ask.step_path!r} says how long to think "
                f"({ask.thinking.max_tokens} tokens), and {self.url} has no means for that",
                expected="a server of `metier serve`",
                remedy="Serve the model with `metier serve WORKFLOW.py`, or leave `thinking` out.",
            )
        return body

    async def _model(self, variant: str | None) -> str:
        """The server's name for a variant, loaded there if need be."""
        known = self._models.get(variant or "")
        if known is not None:
            return known
        async with self._looking:
            await self._learn()
            name = self._models.get(variant or "")
            if name is None:
                name = await self._find(variant)
                self._models[variant or ""] = name
            return name

    async def look(self) -> None:
        """Learn what the server is and what it serves, unless that is known."""
        async with self._looking:
            await self._learn()

    async def _learn(self) -> None:
        if self._ours is not None:
            return
        listed = (await self._calls.call("GET", "/v1/models")).get("data")
        if not isinstance(listed, list) or not listed:
            raise EngineError(f"{self.url}/v1/models lists no model", expected="an OpenAI-compatible server")
        if not all(isinstance(model, dict) and isinstance(model.get("id"), str) for model in listed):
            raise self._calls.garbled("answered /v1/models with no list of models", json.dumps(listed))
        bases = [model["id"] for model in listed if not model.get("parent")]
        ours = listed[0].get("owned_by") == OURS
        base = listed[0].get("root", "") if ours else bases[0] if bases else listed[0]["id"]
        if not isinstance(base, str):
            raise self._calls.garbled("answered /v1/models with a root that is no name", json.dumps(base))
        self._served = {model["id"] for model in listed}
        self._base, self._ours = base, ours

    async def _find(self, variant: str | None) -> str:
        if self._ours:
            return f"variant:{variant or 'base'}"
        if variant is None:
            return self._base
        if self._resolve is None:
            if variant in self._served:
                return variant
            raise UnknownVariantError(
                f"variant {variant!r} is not served at {self.url}", expected=f"one of {', '.join(sorted(self._served))}"
            )
        return await self._load(*self._resolve(variant))

    def _check_servable(self, variant: Variant) -> None:
        if variant.engine.attention != "stock":
            raise EngineError(
                f"variant {variant.name!r} asks for attention {variant.engine.attention!r}, which {self.url} has not",
                expected="a variant with stock attention",
                remedy="Serve it with `metier serve WORKFLOW.py`, which starts engines with our plugin.",
            )
        kind = variant.ask.kind
        needs_plugin = kind is not None and not kind.served_elsewhere
        if variant.engine.weights != "base" or needs_plugin or variant.ask.thinking is not None:
            what = f"a {kind.title}" if kind is not None and needs_plugin else "weights or thinking of its own"
            raise EngineError(
                f"variant {variant.name!r} has {what}, which {self.url} cannot serve beside its base",
                expected="a LoRA adapter on the base",
                remedy="Serve it with `metier serve WORKFLOW.py`.",
            )

    async def _load(self, variant: Variant, folder: Path) -> str:
        """Load a variant's adapter into vLLM's server, under its content id."""
        self._check_servable(variant)
        if variant.ask.adapter is None:
            return self._base
        self._loaded.add(variant.id)
        if variant.id in self._served:
            return variant.id
        load = {"lora_name": variant.id, "lora_path": str((folder / "adapter").resolve())}
        try:
            await self._calls.call("POST", "/v1/load_lora_adapter", load)
        except ServerGoneError:
            raise
        except (AskRejectedError, EngineDeadError) as error:
            if "already been loaded" not in error.problem:
                raise EngineError(
                    f"{self.url} does not load the adapter of variant {variant.name!r}: {error.problem}",
                    expected="a server that loads adapters while it runs, and sees this folder",
                    remedy="Start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora, with room for the rank "
                    "(--max-lora-rank), on a disk both share; or use `metier serve WORKFLOW.py`.",
                ) from error
        self._served.add(variant.id)
        return variant.id

    # --- replies ------------------------------------------------------------------------------------------

    async def _stream(self, ask: Ask, body: dict[str, Any], on_text: OnText) -> Reply:
        texts: list[str] = []
        thoughts: list[str] = []
        data: dict[str, Any] = {}
        tokens: list[Any] = []
        finish, ended = "stop", False
        async with self._calls.answered("POST", COMPLETIONS, body) as response:
            async for line in self._calls.lines(response, COMPLETIONS):
                if not line.startswith(b"data:"):
                    continue
                said = line[5:].strip()
                if said == b"[DONE]":
                    ended = True
                    break
                piece = self._calls.read_json(said, COMPLETIONS)
                if isinstance(piece, dict) and "error" in piece:
                    raise self._calls.refused(500, COMPLETIONS, said.decode())
                text = ""
                try:
                    data |= {name: piece[name] for name in ("usage", "metier") if piece.get(name)}
                    for choice in piece.get("choices") or ():
                        delta = choice.get("delta") or {}
                        thoughts.append(text_of(delta.get("reasoning_content") or delta.get("reasoning")))
                        finish = choice.get("finish_reason") or finish
                        tokens += (choice.get("logprobs") or {}).get("content") or ()
                        text = text_of(delta.get("content"))
                        texts.append(text)
                except (TypeError, AttributeError) as error:
                    raise self._calls.garbled("streamed what is no chat completion", said.decode()) from error
                if text:
                    on_text(text)
        if not ended:
            raise self._calls.gone("stopped in the middle of an answer")
        message = {"content": "".join(texts), "reasoning_content": "".join(thoughts)}
        choice = {"message": message, "finish_reason": finish, "logprobs": {"content": tokens} if tokens else None}
        return self._read_reply(ask, data | {"choices": [choice]})

    def _read_reply(self, ask: Ask, data: dict[str, Any]) -> Reply:
        try:
            return completed(ask, data, self.url)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._calls.garbled("answered what is no chat completion", json.dumps(data)) from error


def _sampling(sampling: Sampling) -> dict[str, Any]:
    """What it says in the words of OpenAI and vLLM; nothing of what it leaves as it is."""
    said = sampling.asks_for
    if "logprobs" in said:
        said |= {"logprobs": True, "top_logprobs": sampling.logprobs}
    return said
