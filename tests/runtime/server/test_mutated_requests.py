"""No request, whatever has become of it, is answered with a 5xx or an error that is not in OpenAI's shape."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from pydantic import BaseModel

from metier.agents import TaskGraph
from metier.runtime.server.served_models import ServedWorkflow
from metier.runtime.settings.session import load_settings
from tests.runtime.served import WORKFLOWS, Served, scripted, server
from tests.runtime.server.raw_requests import answer_to, mutated_requests, whole_requests, written


class Loose(BaseModel):
    """An input that nearly everything fits."""

    data: Any = None
    f: float = 0.0
    named: dict[str, float] = {}


def echo(loose: Loose) -> Loose:
    return loose


loose_graph = TaskGraph("loose", takes=Loose, gives=Loose)
loose_graph.step(echo)
BOTH = [*WORKFLOWS, ServedWorkflow(loose_graph.build())]
QUICK = {"server.header_timeout_s": 0.5, "server.body_timeout_s": 0.5, "server.drain_s": 1.0}
AT_ONCE = 16


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with server(scripted(), workflows=BOTH, settings=load_settings(overrides=QUICK)) as running:
        yield running


def address(served: Served) -> tuple[str, int]:
    parts = urlsplit(served.url)
    assert parts.hostname and parts.port
    return parts.hostname, parts.port


def check_all(served: Served, seed: int, count: int) -> Counter[int | None]:
    """Send them, and count the statuses of the answers."""
    requests = list(mutated_requests(seed, count))
    statuses: Counter[int | None] = Counter()
    with ThreadPoolExecutor(AT_ONCE) as threads:
        for request, answer in zip(requests, threads.map(partial(answer_to, address(served)), requests), strict=True):
            status, body = answer or (None, b"")
            statuses[status] += 1
            assert status is None or status < 500, (request[:3000], answer)
            if status is not None and status >= 400 and not request.startswith(b"HEAD "):
                error = json.loads(body)["error"]
                assert error.keys() == {"message", "type", "param", "code"}, (request[:3000], answer)
    return statuses


def test_the_requests_that_are_mutated_are_answered_as_they_are(served: Served) -> None:
    for method, path, data in whole_requests():
        answer = answer_to(address(served), written(method, path, b"" if data is None else json.dumps(data).encode()))
        assert answer is not None and answer[0] in ((404,) if "nobody" in f"{path}{data}" else (200, 201)), (
            path,
            answer,
        )


def test_mutated_requests_get_no_5xx(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        statuses = check_all(served, seed=1, count=400)
    assert statuses[200] > 20 and statuses[400] > 40 and statuses[431] > 2 and statuses[408] > 0, statuses
    assert not caplog.records, caplog.records[0].getMessage()
    assert httpx.get(f"{served.url}/health").status_code == 200


@pytest.mark.faults
def test_ten_thousand_mutated_requests_get_no_5xx(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        check_all(served, seed=2, count=10_000)
    assert not caplog.records, caplog.records[0].getMessage()
    assert httpx.get(f"{served.url}/health").status_code == 200


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('{"workflow":"chain","input":{"text":"\\ud800"}}', "surrogate"),
        ('{"workflow":"loose","input":{"data":' + "[" * 900 + "]" * 900 + "}}", "64 levels"),
        ('{"workflow":"loose","input":{"f":NaN}}', "NaN is no number"),
        ('{"workflow":"loose","input":{"f":1e999}}', "beyond every finite"),
        ('{"workflow":"loose","input":{"f":"inf"}}', "no finite number"),
        ('{"workflow":"loose","input":"{\\"f\\": NaN}"}', "NaN is no number"),
        ('{"workflow":"loose","input":{"f":0.5}}\0', "byte of 0"),
        ('{"workflow":"loose","input":{"data":1,"data":2}}', "field 'data' is there twice"),
        ('{"workflow":"loose","workflow":"loose","input":{}}', "field 'workflow' is there twice"),
    ],
)
def test_what_no_run_could_be_recorded_with_is_refused_at_the_door(served: Served, body: str, said: str) -> None:
    answer = httpx.post(f"{served.url}/v1/runs", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
@pytest.mark.parametrize(
    ("body", "headers", "code"),
    [
        (b'{"model": "base", "user": "\\ud800"}', {}, "invalid_json"),
        (b'{"model": "base", "user": "\xed\xa0\x80"}', {}, "invalid_json"),
        (b'{"model": "base", "model": "base"}', {}, "invalid_json"),
        ('{"model": "base"}'.encode("utf-16"), {}, "invalid_json"),
        ('{"model": "b\u00e4se"}'.encode("latin-1"), {}, "invalid_json"),
        (b'{"model": "base"}', {"content-type": "application/json; charset=latin-1"}, "unsupported_encoding"),
        (b'{"model": "base"}', {"content-encoding": "gzip"}, "unsupported_encoding"),
    ],
)
def test_bodies_in_other_encodings_and_fields_sent_twice_are_refused(
    served: Served, path: str, body: bytes, headers: dict[str, str], code: str
) -> None:
    answer = httpx.post(f"{served.url}{path}", content=body, headers={"content-type": "application/json"} | headers)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == code, answer.text


def test_a_byte_order_mark_is_read_over(served: Served) -> None:
    body = b'\xef\xbb\xbf{"model": "base", "input": "hi"}'
    sent = {"content-type": "application/json; charset=UTF-8"}
    assert httpx.post(f"{served.url}/v1/responses", content=body, headers=sent).status_code == 200


def test_text_that_looks_odd_is_text(served: Served) -> None:
    for text in ("NaN", "[" * 100, "1e999 \U0001f600"):
        answer = httpx.post(f"{served.url}/v1/runs", json={"workflow": "chain", "input": text})
        assert answer.status_code == 201 and answer.json()["input"] == {"text": text}, answer.text
