"""A server elsewhere as a backend: our own over a socket, and others as far as they answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from metier.agents import Ask, Message, ScriptedBackend, ThinkingProfile, Usage
from metier.agents.errors import AskRejectedError, ContextError, EngineDeadError, EngineError, UnknownVariantError
from metier.agents.messages import Reply
from metier.router import Assignment, RoleAssignment
from metier.runtime import RunStore, open_session
from metier.runtime.cli.run import RunOptions, run_workflow
from metier.runtime.remote.remote_backend import RemoteBackend
from metier.runtime.remote.server_calls import ServerCalls
from metier.runtime.settings.fleet import RemoteSettings
from metier.runtime.settings.session import load_settings
from metier.specializers.shelf.variant import AskSpec, EngineSpec, Variant
from tests import workflow_for_cli
from tests.agents.workflow import Puzzle
from tests.runtime.served import graph, scripted, server

pytestmark = pytest.mark.anyio

USAGE = Usage(prompt_tokens=9, cached_tokens=4, answer_tokens=2, queue_s=0.25, cpu_s=0.5, swaps=1, swap_s=0.125)
AT_ONCE = RemoteSettings(retry_wait_s=0.0)


def make(**fields: Any) -> Ask:
    ask: dict[str, Any] = {"run_id": "run", "step_path": "solve[2]", "role": "solver", "round": 2, "task": "cows"}
    return Ask(**(ask | {"messages": (Message(role="user", content="2 + 2"),)} | fields))


# --- a server of ours -----------------------------------------------------------------------------------------


async def test_an_ask_arrives_at_our_server_as_it_was_sent_and_its_cost_comes_back() -> None:
    asks: list[Ask] = []

    class Costly:
        async def reply(self, ask: Ask, *, on_text: Any = None) -> Reply:
            asks.append(ask)
            for piece in ("fo", "ur"):
                if on_text is not None:
                    on_text(piece)
            return Reply(text="four", thinking="2 and 2", profile=ask.thinking, usage=USAGE, variant=ask.variant)

    schema = {"type": "object", "properties": {"value": {"type": "integer"}}}
    sent = make(
        variant="lora0", answer_schema=schema, max_tokens=7, seed=5, priority=-2, temperature=0.5, top_p=0.9,
        thinking=ThinkingProfile(max_tokens=8, min_tokens=2, waits=1), attempt=3,
    )  # fmt: skip
    with server(Costly(), variants=["lora0"]) as served:
        async with RemoteBackend(served.url + "/v1") as remote:
            whole = await remote.reply(sent)
            pieces: list[str] = []
            streamed = await remote.reply(sent, on_text=pieces.append)
    assert asks == [sent, sent]
    assert whole == streamed
    assert "".join(pieces) == whole.text == "four"
    assert (whole.usage, whole.thinking, whole.profile) == (USAGE, "2 and 2", sent.thinking)


async def test_a_session_on_a_server_runs_as_one_that_has_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METIER_API_KEY", "secret")
    assignment = Assignment(roles={"solver": RoleAssignment(variant="lora0")})
    backend = scripted()
    with server(backend, key="secret", variants=["lora0"]) as served:
        async with open_session(engine=served.url, assignment=assignment, store=":memory:") as session:
            output = await session.run(graph, Puzzle(text="2 cows"))
            assert output.value == 4
            rows = session.store.query("SELECT role, variant, engine, prompt_tokens FROM asks ORDER BY asked_at")
    assert [(row["role"], row["variant"]) for row in rows] == [("planner", None), ("solver", "lora0")]
    assert [ask.step_path for ask in backend.asks] == ["planner", "solver"]
    assert all(row["engine"] == f"{served.url} scripted" and row["prompt_tokens"] > 0 for row in rows)


async def test_a_key_that_is_wrong_and_a_variant_that_is_not_there_are_said() -> None:
    with server(scripted(), key="secret") as served:
        async with RemoteBackend(served.url, api_key="wrong") as remote:
            with pytest.raises(EngineError, match="401: wrong API key.*METIER_API_KEY"):
                await remote.reply(make())
        async with RemoteBackend(served.url, api_key="secret") as remote:
            with pytest.raises(AskRejectedError, match="404: model 'variant:nobody' is not served"):
                await remote.reply(make(variant="nobody"))


@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_inside_the_other_server_is_one_here(stream: bool) -> None:
    def fail(ask: Ask) -> str:
        raise EngineDeadError("gone")

    with server(ScriptedBackend(default=fail)) as served:
        async with RemoteBackend(served.url, settings=AT_ONCE) as remote:
            with pytest.raises(EngineDeadError, match="EngineDeadError: gone"):
                await remote.reply(make(), on_text=print if stream else None)


async def test_a_prompt_beyond_the_context_there_is_one_here() -> None:
    def fail(ask: Ask) -> str:
        raise ContextError("the prompt has 600 tokens", expected="fewer than 512")

    with server(ScriptedBackend(default=fail)) as served:
        async with RemoteBackend(served.url, settings=AT_ONCE) as remote:
            with pytest.raises(ContextError, match="600 tokens"):
                await remote.reply(make())
    of_vllm = '{"error": {"message": "This model\'s maximum context length is 512 tokens.", "code": 400}}'
    calls = ServerCalls("http://other", AT_ONCE, None)
    assert isinstance(calls.refused(400, "/v1/chat/completions", of_vllm), ContextError)


async def test_nobody_there_is_said_after_bounded_tries() -> None:
    with server(scripted()) as served:
        url = served.url
    async with RemoteBackend(url, settings=RemoteSettings(retries=2, retry_wait_s=0.0)) as remote:
        with pytest.raises(EngineDeadError, match="cannot be reached"):
            await remote.reply(make())


# --- servers of others ----------------------------------------------------------------------------------------


class Other:
    """A server that answers as it is told; `heard` has the bodies it got, by path."""

    def __init__(self, answer: Callable[[str, Any], httpx.Response | None]) -> None:
        self.heard: list[tuple[str, Any]] = []
        self._answer = answer

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content) if request.content else None
        self.heard.append((request.url.path, body))
        answer = self._answer(request.url.path, body)
        if answer is not None:
            return answer
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "tiny", "owned_by": "vllm", "parent": None}]})
        if request.url.path == "/v1/load_lora_adapter":
            return httpx.Response(200, text="Success")
        message = {"role": "assistant", "content": "four", "reasoning": None}
        usage = {"prompt_tokens": 5, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}
        return httpx.Response(200, json={"choices": [{"message": message, "finish_reason": "length"}], "usage": usage})

    def backend(self, variant: Variant | None = None, folder: Path = Path("shelf"), retries: int = 2) -> RemoteBackend:
        def resolve(name: str) -> tuple[Variant, Path]:
            if variant is None:
                raise UnknownVariantError(f"no variant {name!r}")
            return variant, folder

        settings = RemoteSettings(retries=retries, retry_wait_s=0.0)
        remote = RemoteBackend("http://other", resolve, settings)
        remote._calls.client = httpx.AsyncClient(base_url="http://other", transport=httpx.MockTransport(self))
        return remote


def variant(**ask: Any) -> Variant:
    return Variant(
        id="0" * 16, name="lora0", base="b", prompt_layout=1, engine=EngineSpec(base="b"), ask=AskSpec(**ask)
    )


async def test_an_adapter_is_loaded_once_under_its_content_id(tmp_path: Path) -> None:
    other = Other(lambda path, body: None)
    async with other.backend(variant(adapter="lora", rank=8), tmp_path) as remote:
        first = await remote.reply(make(variant="lora0"))
        await remote.reply(make(variant="lora0"))
        await remote.reply(make())
    assert [path for path, _ in other.heard].count("/v1/load_lora_adapter") == 1
    assert dict(other.heard)["/v1/load_lora_adapter"] == {
        "lora_name": "0" * 16, "lora_path": str(tmp_path / "adapter"),
    }  # fmt: skip
    chats = [body for path, body in other.heard if path == "/v1/chat/completions"]
    assert [body["model"] for body in chats] == ["0" * 16, "0" * 16, "tiny"]
    assert not {"priority", "thinking", "metier"} & chats[0].keys()
    assert first.finish_reason == "length" and first.usage == Usage(prompt_tokens=5, cached_tokens=2, answer_tokens=3)


@pytest.mark.parametrize(
    ("made", "ask", "kind", "said"),
    [
        (variant(adapter="trex", rank=36), {"variant": "v"}, EngineError, "has a T-REX adapter, which http://other"),
        (variant(thinking=ThinkingProfile(max_tokens=4)), {"variant": "v"}, EngineError, "thinking of its own"),
        (None, {"thinking": ThinkingProfile(max_tokens=4)}, AskRejectedError, "has no means for that.*metier serve"),
        (None, {"variant": "v"}, UnknownVariantError, "no variant 'v'"),
    ],
)
async def test_what_a_server_of_others_cannot_do_is_said(
    made: Variant | None, ask: dict[str, Any], kind: type[Exception], said: str
) -> None:
    async with Other(lambda path, body: None).backend(made) as remote:
        with pytest.raises(kind, match=said):
            await remote.reply(make(**ask))


@pytest.mark.parametrize("status", [400, 404, 500])
async def test_a_server_that_loads_no_adapters_is_said_with_how_to_start_it(status: int, tmp_path: Path) -> None:
    def answer(path: str, body: Any) -> httpx.Response | None:
        return httpx.Response(status, json={"detail": "no such thing"}) if path == "/v1/load_lora_adapter" else None

    async with Other(answer).backend(variant(adapter="lora", rank=8), tmp_path) as remote:
        with pytest.raises(EngineError, match=f"{status}: no such thing.*VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
            await remote.reply(make(variant="lora0"))


async def test_what_fails_on_the_way_is_tried_again_within_bounds() -> None:
    left = [503, 429, 502]

    def answer(path: str, body: Any) -> httpx.Response | None:
        if path != "/v1/chat/completions" or not left:
            return None
        return httpx.Response(left.pop(), headers={"retry-after": "0"}, text="later")

    assert (await Other(answer).backend(retries=3).reply(make())).text == "four"
    left = [503] * 9
    other = Other(answer)
    with pytest.raises(EngineDeadError, match="503: later"):
        await other.backend(retries=3).reply(make())
    assert len(left) == 5


@pytest.mark.parametrize(
    ("models", "said"),
    [({"data": []}, "lists no model"), ("<html>", "lists no model|no JSON")],
)
async def test_what_is_no_server_of_models_is_said(models: Any, said: str) -> None:
    def answer(path: str, body: Any) -> httpx.Response:
        return httpx.Response(200, json=models) if isinstance(models, dict) else httpx.Response(200, text=models)

    async with Other(answer).backend() as remote:
        with pytest.raises(EngineError, match=said):
            await remote.reply(make())


async def test_a_stream_that_breaks_off_is_no_answer() -> None:
    def answer(path: str, body: Any) -> httpx.Response | None:
        piece = {"choices": [{"delta": {"content": "fo"}, "finish_reason": None}]}
        return httpx.Response(200, text=f"data: {json.dumps(piece)}\n\n") if path.endswith("completions") else None

    async with Other(answer).backend() as remote:
        pieces: list[str] = []
        with pytest.raises(EngineDeadError, match="in the middle of an answer"):
            await remote.reply(make(), on_text=pieces.append)
    assert pieces == ["fo"]


def test_the_bounds_are_settings() -> None:
    assert load_settings(overrides={"remote.retries": 1}).remote.retries == 1


def test_the_command_line_runs_on_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with server(workflow_for_cli.scripted()) as served:
        options = RunOptions(workflow=workflow_for_cli.__file__, input='{"text": "7"}', engine=served.url)
        anyio.run(run_workflow, options, tmp_path / "runs.db")
    assert capsys.readouterr().out == '{"value":7}\n'
    with RunStore(tmp_path / "runs.db") as store:
        (batch,) = store.batches()
        assert batch.options["engine"] == served.url
