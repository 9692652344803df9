"""Thinking keeps to its profile to the token, whatever the model would like to write."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metier.agents.thinking import ThinkingProfile
from metier.runtime.plugin.thinking.budget_forcing import BudgetForcing, ThinkingRules
from metier.runtime.plugin.thinking.end_tag import EndTag
from tests.runtime.plugin.thinking.test_end_tag import CLOSE, PIECES, TOKENIZER

STOP = PIECES.index("stop")
WAIT = PIECES.index("Wait")
A, HALF, THINK, END, BRACE = (PIECES.index(p) for p in ("a", "</", "think", ">", ">{"))
CLOSE_IDS = (HALF, THINK, END)
Model = Callable[[list[int]], list[int]]


def profile(most: int, least: int = 0, waits: int = 0) -> ThinkingProfile:
    return ThinkingProfile(max_tokens=most, min_tokens=least, waits=waits)


def write(given_profile: ThinkingProfile, ranked: Model, *, limit: int = 200, ask_twice: bool = False) -> list[int]:
    """What is written until thinking ends: at each place the best of the model's tokens that is allowed."""
    rules = ThinkingRules.from_plain(ThinkingRules(given_profile, CLOSE, CLOSE_IDS, (WAIT,)).to_plain())
    forcing = BudgetForcing(rules, EndTag(TOKENIZER, CLOSE), [STOP])
    written: list[int] = []
    while not forcing.closed and len(written) < limit:
        order = ranked(written)
        if ask_twice:  # a sample that is dropped, of another mind
            forcing.next(lambda: random.Random(len(written)).choice(range(len(PIECES))))
        constraint = forcing.next(lambda order=order: order[0])  # type: ignore[misc]
        token = constraint.forced
        if token is None:
            token = next(t for t in order if t not in constraint.banned)
        written.append(token)
        forcing.read([token])
    assert forcing.closed
    nothing = forcing.next(lambda: STOP)
    assert nothing.forced is None and not nothing.banned
    return written


def thought(written: list[int]) -> int:
    """Tokens wholly before the end tag."""
    text = "".join(PIECES[t] for t in written)
    assert text.endswith(CLOSE) and text.count(CLOSE) == 1
    before, count = len(text) - len(CLOSE), 0
    while len("".join(PIECES[t] for t in written[: count + 1])) <= before:
        count += 1
    return count


def saying(*script: int, then: int = A) -> Model:
    """A model that writes a script, whatever stands there, and then the same token for ever."""
    rest = [t for t in range(len(PIECES)) if t != A]

    def ranked(written: list[int]) -> list[int]:
        best = script[len(written)] if len(written) < len(script) else then
        return [best, A, *rest]

    return ranked


def test_a_model_that_never_ends_thinks_exactly_the_maximum() -> None:
    for most in range(1, 9):
        assert write(profile(most), saying()) == [A] * most + list(CLOSE_IDS)


def test_a_natural_end_within_the_bounds_is_left_alone() -> None:
    assert write(profile(9, 2), saying(A, A, HALF, THINK, END)) == [A, A, HALF, THINK, END]


def test_an_end_below_the_minimum_does_not_happen() -> None:
    written = write(profile(9, 5), saying(A, HALF, THINK, END))
    assert written[:4] == [A, HALF, THINK, A]
    assert thought(written) == 9


def test_an_end_begun_at_the_maximum_is_finished_not_begun_again() -> None:
    assert write(profile(4), saying(A, A, A, HALF)) == [A, A, A, HALF, THINK, END]
    assert thought(write(profile(4, 4), saying(A, A, A, HALF))) == 4


def test_stopping_without_an_answer_becomes_the_end_of_thinking() -> None:
    assert write(profile(9), saying(A, A, STOP)) == [A, A, *CLOSE_IDS]
    assert write(profile(9, 4), saying(A, A, STOP, A, STOP)) == [A, A, A, A, *CLOSE_IDS]
    assert write(profile(9), saying(A, HALF, STOP)) == [A, *CLOSE_IDS]


def test_what_runs_over_the_tag_is_cut_at_the_tag() -> None:
    assert write(profile(9), saying(A, HALF, THINK, BRACE)) == [A, HALF, THINK, END]


def test_waits_replace_attempts_to_end() -> None:
    end = (HALF, THINK, END)
    written = write(profile(30, waits=2), saying(A, *end, A, *end, A, *end))
    assert written == [A, HALF, THINK, WAIT, A, HALF, THINK, WAIT, A, HALF, THINK, END]
    below = write(profile(30, 6, waits=2), saying(A, *end, A, A, *end))
    assert below == [A, HALF, THINK, WAIT, A, A, HALF, THINK, END]  # the second attempt is above the minimum
    full = write(profile(3, waits=2), saying(A, *end))
    assert thought(full) <= 3 and WAIT not in full


def test_a_sampled_end_does_not_slip_past_the_minimum_or_a_wait() -> None:
    """The model's best token is never the end, but sampling would take it."""
    rest = [t for t in range(len(PIECES)) if t not in (A, END)]
    for given_profile in (profile(12, 8), profile(12, waits=1)):
        rules = ThinkingRules(given_profile, CLOSE, CLOSE_IDS, (WAIT,))
        forcing = BudgetForcing(rules, EndTag(TOKENIZER, CLOSE), [STOP])
        forcing.read([A, HALF, THINK])
        assert END in forcing.next(lambda: A).banned
        assert not set(rest) <= set(forcing.next(lambda: A).banned)


@given(
    st.integers(1, 24).flatmap(lambda most: st.tuples(st.just(most), st.integers(0, most), st.integers(0, 3))),
    st.integers(0, 10**6),
    st.booleans(),
)
@settings(max_examples=400, deadline=None)
def test_any_model_thinks_within_its_profile(numbers: tuple[int, int, int], seed: int, ask_twice: bool) -> None:
    """Models that write anything, biased to the pieces of the tag, stops and overruns."""
    source = random.Random(seed)
    likely = [HALF, THINK, END, BRACE, STOP, PIECES.index(CLOSE), PIECES.index(".</"), A]

    def ranked(written: list[int]) -> list[int]:
        order = source.sample(range(len(PIECES)), len(PIECES))
        return [source.choice(likely), *order]

    most, least, waits = numbers
    written = write(profile(most, least, waits), ranked, ask_twice=ask_twice)
    assert least <= thought(written) <= most
    assert STOP not in written
    assert len(written) <= most + len(CLOSE_IDS)


@pytest.mark.parametrize("waits", [0, 1, 3])
def test_a_model_that_always_wants_to_stop_waits_as_often_as_it_must(waits: int) -> None:
    written = write(profile(40, waits=waits), saying(then=STOP))
    assert written == [WAIT] * waits + list(CLOSE_IDS)


@pytest.mark.engine
def test_vllms_own_budget_still_forces_end_tags_into_answers() -> None:
    """Why it is not used, not even for a maximum alone; when this fails, it may be looked at again."""
    from types import SimpleNamespace

    import torch
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate
    from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder

    start, end, answer = [3, 4, 5], [6, 7, 8], [10, 3, 4, 5, 11, 11, 11, 11, 11, 11]  # it says the open tag itself
    config = SimpleNamespace(reasoning_start_token_ids=start, reasoning_end_token_ids=end)
    holder = ThinkingBudgetStateHolder(config, 1, 0, torch.device("cpu"), False)
    params, written = SamplingParams(thinking_token_budget=4), list[int]()
    holder.sync_batch(BatchUpdate(1, [], [(0, params, [1, *start], written)], []))
    for best in [9, 9, *end, *answer]:
        logits = torch.nn.functional.one_hot(torch.tensor([best]), 12).float()
        holder.update_state([written], None)
        written.append(int(holder.apply_to_logits(logits, False, None).argmax()))
    assert written[:5] == [9, 9, *end]
    assert written[5:] != answer and end[0] in written[5:]
