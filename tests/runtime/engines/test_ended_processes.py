"""Why an engine ended or did not start, in words: from exit status, exceptions, and what its processes printed."""

from __future__ import annotations

import pytest

from metier.runtime.engines.ended_processes import cause_in_log, cause_of, how_ended

LOG = """INFO 11-30 22:00:00 [importing.py:44] Triton is installed
(EngineCore pid=41) ERROR 11-30 22:00:01 [core.py:1110] EngineCore failed to start.
(EngineCore pid=41) ERROR 11-30 22:00:01 [core.py:1110] Traceback (most recent call last):
(EngineCore pid=41) ERROR 11-30 22:00:01 [core.py:1110]   File "core.py", line 1100, in run_engine_core
(EngineCore pid=41) ERROR 11-30 22:00:01 [core.py:1110] safetensors_rust.SafetensorError: header too small
(EngineCore pid=41) Process EngineCore:
(EngineCore pid=41) Traceback (most recent call last):
(EngineCore pid=41) safetensors_rust.SafetensorError: header too small
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}
"""


@pytest.mark.parametrize(
    ("statuses", "words"),
    [
        ([-9], "was killed (SIGKILL): the system may have run out of memory"),
        ([0, None, -9, -15], "was killed (SIGKILL): the system may have run out of memory"),
        ([-15], "was ended by SIGTERM"),
        ([1], "ended"),
        ([None], "ended"),
        ([], "ended"),
    ],
)
def test_a_status_in_words(statuses: list[int | None], words: str) -> None:
    assert how_ended(statuses) == words


def test_the_exception_of_a_childs_log_is_its_cause_and_what_only_points_there_is_not() -> None:
    assert cause_in_log(LOG) == "safetensors_rust.SafetensorError: header too small"
    assert cause_in_log("loading\nterminate called after throwing an instance of 'std::bad_alloc'\n") != ""
    assert cause_in_log("all is well: no ValueError here\n") == cause_in_log("") == ""


def test_the_last_causes_are_kept_and_long_ones_shortened() -> None:
    log = "\n".join(f"ValueError: {n} {'x' * 2000}" for n in range(9))
    shown = cause_in_log(log)
    assert shown.count("ValueError") == 3 and "ValueError: 8" in shown and len(shown) < 2000


def test_an_exception_is_told_with_the_one_it_began_with() -> None:
    first = OSError("no space")
    middle = RuntimeError("cannot map")
    middle.__cause__ = first
    last = ValueError("bad weights")
    last.__cause__ = middle
    assert cause_of(last) == "bad weights (OSError: no space)"
    assert cause_of(first) == "no space" and cause_of(KeyError()) == "KeyError"


def test_a_core_that_was_killed_while_it_started_names_memory() -> None:
    error = RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {'Core': -9}")
    assert cause_of(error).endswith("(it was killed (SIGKILL): the system may have run out of memory)")
    early = RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")
    assert cause_of(early).endswith("if it was killed, the system may have run out of memory)")
