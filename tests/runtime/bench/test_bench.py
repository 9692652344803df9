"""Load and its records: every request is one line with AIPerf's names, also of what failed or was stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from pydantic import ValidationError

from metier.agents import Ask, AskRejectedError, Reply, ScriptedBackend, SettingsError, TaskSetError, TrafficRow
from metier.agents.backend import OnText
from metier.agents.messages import Message, Usage
from metier.agents.traffic import write_traffic
from metier.runtime import RunStore, open_session
from metier.runtime.bench.command import BenchOptions, measure, read_workload
from metier.runtime.bench.load import LoadLevel, apply_load
from metier.runtime.bench.records import RequestRecord, request_metrics
from metier.runtime.bench.summary import level_figures
from metier.runtime.bench.workload import SyntheticMix, from_store, from_traffic, synthetic, variants_of
from tests.agents.workflow import Answer, Plan, Puzzle, Verdict, solve_and_check

pytestmark = pytest.mark.anyio

MIX = SyntheticMix(requests=6, variants=("base", "lora"), seed=3)


class Counting:
    """Answers in two pieces, and counts how many asks are inside at once."""

    def __init__(self) -> None:
        self.asks: list[Ask] = []
        self.inside = self.most = 0

    async def reply(self, ask: Ask, *, on_text: OnText | None = None) -> Reply:
        self.asks.append(ask)
        self.inside += 1
        self.most = max(self.most, self.inside)
        try:
            for piece in ("a", "b"):
                await anyio.lowlevel.checkpoint()
                assert on_text is not None
                on_text(piece)
            return Reply(text="ab", usage=Usage(prompt_tokens=10, cached_tokens=4, answer_tokens=2, cpu_s=0.5))
        finally:
            self.inside -= 1


async def recorded(backend: Any, level: LoadLevel, conversations: Any = None) -> list[RequestRecord]:
    """The records of one level."""
    records: list[RequestRecord] = []
    await apply_load(backend, conversations or synthetic(MIX), level, records.append)
    return records


def test_a_mix_is_the_same_for_the_same_seed_and_keeps_to_its_bounds() -> None:
    one, two = synthetic(MIX), synthetic(MIX)
    assert one == two != synthetic(MIX.model_copy(update={"seed": 4}))
    assert variants_of(one) == ["lora"] and [c.asks[0].variant for c in one[:3]] == [None, "lora", None]
    assert all(16 <= c.asks[0].max_tokens <= 48 for c in one)
    assert one[0].asks[0].messages[0].content.split()[:32] == one[4].asks[0].messages[0].content.split()[:32]


@pytest.mark.parametrize(("concurrency", "most"), [(1, 1), (3, 3), (50, 6)])
async def test_a_closed_loop_keeps_its_number_of_conversations_under_way(concurrency: int, most: int) -> None:
    backend = Counting()
    records = await recorded(backend, LoadLevel(concurrency=concurrency))
    assert backend.most == most and len(records) == 6
    assert len({record.metadata.x_request_id for record in records}) == 6


async def test_arrivals_at_random_ask_everything_once() -> None:
    records = await recorded(Counting(), LoadLevel(rate_per_s=1e6))
    assert sorted(record.metadata.session_num for record in records) == list(range(6))


async def test_cold_prompts_share_no_beginning_and_warm_ones_were_asked_before() -> None:
    backend = Counting()
    await recorded(backend, LoadLevel(concurrency=2, cache="cold"))
    assert len({ask.messages[0].content[:16] for ask in backend.asks}) == 6
    backend = Counting()
    records = await recorded(backend, LoadLevel(concurrency=2, cache="warm"))
    assert [record.metadata.benchmark_phase for record in records] == ["warmup"] * 6 + ["profiling"] * 6
    assert level_figures(records)["requests"] == 6


async def test_runs_of_a_store_are_asked_turn_by_turn_in_their_order() -> None:
    graph, _ = solve_and_check()
    verdicts = [Verdict(correct=False), Verdict(correct=True)] * 2
    scripted = ScriptedBackend(
        {"planner": lambda ask: Plan(expression="1"), "solver": lambda ask: Answer(value=1), "critic": verdicts}
    )
    with RunStore(":memory:") as store:
        async with open_session(backend=scripted, store=store) as session:
            await session.map(graph, [Puzzle(text="a"), Puzzle(text="b")], concurrency=1)
            assert session.batch is not None
            conversations = from_store(store, session.batch)
            store.query("UPDATE asks SET prompt_layout = 99")
            with pytest.raises(TaskSetError, match="recorded with prompt layout 99"):
                from_store(store, session.batch)
    assert [len(one.asks) for one in conversations] == [6, 6]
    assert [ask.role for ask in conversations[0].asks] == ["planner", "solver", "critic"] * 2
    backend = Counting()
    records = await recorded(backend, LoadLevel(concurrency=2), conversations)
    for number in (0, 1):
        turns = [record.metadata.turn_index for record in records if record.metadata.session_num == number]
        assert turns == list(range(6))
    assert len({record.metadata.x_correlation_id for record in records}) == 2


async def test_a_failed_turn_ends_its_conversation_only() -> None:
    def answer(ask: Ask) -> str:
        if ask.variant == "lora":
            raise AskRejectedError("no such variant")
        return "words"

    records = await recorded(ScriptedBackend(default=answer), LoadLevel(concurrency=2))
    failed = [record for record in records if record.error is not None]
    assert len(records) == 6 and len(failed) == 3
    assert failed[0].metrics == {} and failed[0].error is not None and failed[0].error.type == "AskRejectedError"
    assert level_figures(records)["failed"] == 3


async def test_stopped_in_the_middle_everything_so_far_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reached = anyio.Event()

    async def answer(ask: Ask) -> str:
        asked.append(ask.id)
        if len(asked) == len(conversations) + 4:
            reached.set()
            await anyio.sleep_forever()
        return "words"

    conversations, asked = synthetic(MIX), list[str]()
    levels = tuple(LoadLevel(concurrency=number) for number in (2, 1, 3))
    options = BenchOptions(mix=MIX, levels=levels)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(measure, ScriptedBackend(default=answer), conversations, options, tmp_path / "bench.jsonl")
        await reached.wait()
        tasks.cancel_scope.cancel()
    lines = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    assert [line["metadata"]["was_cancelled"] for line in lines] == [False] * 9 + [True]
    assert lines[-1]["error"]["code"] == 499
    said = capsys.readouterr()
    assert "1 at a time" in said.out
    assert "bench.jsonl: 2 at a time. Missing: 1 at a time (3 requests ended); 3 at a time (0 " in said.err


def test_records_have_aiperfs_names_and_units() -> None:
    ask = synthetic(MIX)[0].asks[0]
    usage = Usage(prompt_tokens=50, cached_tokens=10, answer_tokens=5, cpu_s=0.25)
    metrics = request_metrics(ask, usage, 100.0, [100.2, 100.3, 100.6], 100.6)
    plain = {name: (value.value, value.unit) for name, value in metrics.items()}
    assert plain["time_to_first_token"] == (pytest.approx(200.0), "ms")
    assert plain["inter_token_latency"] == (pytest.approx(100.0), "ms")
    assert plain["inter_chunk_latency"] == (pytest.approx([100.0, 300.0]), "ms")
    assert plain["request_latency"] == (pytest.approx(600.0), "ms")
    assert plain["output_token_throughput_per_user"] == (pytest.approx(10.0), "tokens/sec/user")
    assert plain["input_sequence_length"] == (50, "tokens") and plain["output_sequence_length"] == (5, "tokens")
    assert plain["cpu_time"] == (250.0, "ms")
    thought = Usage(thinking_tokens=3, answer_tokens=2, queue_s=0.1, prefill_s=0.05)
    metrics = request_metrics(ask, thought, 100.0, [100.5], 100.6)
    assert metrics["time_to_first_token"].value == pytest.approx(150.0)  # not when the answer after it began
    assert metrics["reasoning_token_count"].value == 3


def test_rates_are_over_the_time_from_first_start_to_last_end() -> None:
    def one(start_s: float, end_s: float) -> RequestRecord:
        metadata = {
            "session_num": 0, "x_request_id": "a", "x_correlation_id": "a", "conversation_id": "a", "turn_index": 0,
            "request_start_ns": int(1e9 * start_s), "request_ack_ns": None, "request_end_ns": int(1e9 * end_s),
            "worker_id": "w", "record_processor_id": "m", "benchmark_phase": "profiling", "load": "1", "role": "r",
            "variant": "base",
        }  # fmt: skip
        usage = Usage(prompt_tokens=10, cached_tokens=5, answer_tokens=8, cpu_s=0.5)
        metrics = request_metrics(synthetic(MIX)[0].asks[0], usage, start_s, [start_s + 1], end_s)
        return RequestRecord(metadata=metadata, metrics=metrics)  # type: ignore[arg-type]

    figures = level_figures([one(0, 2), one(1, 4)])
    assert figures["requests_per_s"] == 0.5 and figures["tokens_per_s"] == 4.0
    assert figures["cached_share"] == 50.0 and figures["cpu_ms_per_token"] == 62.5
    assert level_figures([]) == {}


def test_traces_that_do_not_fit_are_named(tmp_path: Path) -> None:
    row = TrafficRow(role="solver", messages=(Message(role="user", content="x"),), reply="y", run_id="r", step_path="s")
    path = tmp_path / "t.jsonl"
    write_traffic(path, [row, row])
    assert [len(one.asks) for one in from_traffic(path, 8)] == [2]
    write_traffic(path, [row.model_copy(update={"prompt_layout": 99})])
    with pytest.raises(TaskSetError, match="t.jsonl was recorded with prompt layout 99; expected at most layout 2"):
        from_traffic(path, 8)
    path.write_text('{"version": 9, "role": "solver"}\n')
    with pytest.raises(TaskSetError, match="line 1 is no traffic row"):
        from_traffic(path, 8)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TaskSetError, match="cannot be read"):
        from_traffic(path, 8)
    path.write_text("")
    with pytest.raises(TaskSetError, match="holds no asks"):
        from_traffic(path, 8)
    level = (LoadLevel(concurrency=1),)
    with pytest.raises(SettingsError, match="no trace"):
        read_workload(BenchOptions(trace=str(tmp_path / "none.db"), levels=level))
    with pytest.raises(SettingsError, match="neither or both"):
        read_workload(BenchOptions(levels=level))
    assert len(read_workload(BenchOptions(mix=MIX, requests=20, levels=level))) == 20


@pytest.mark.parametrize("wrong", [{}, {"concurrency": 1, "rate_per_s": 1.0}, {"concurrency": 0}, {"rate_per_s": -1}])
def test_a_level_is_a_concurrency_or_a_rate(wrong: dict[str, Any]) -> None:
    with pytest.raises((ValidationError, SettingsError)):
        LoadLevel(**wrong)
