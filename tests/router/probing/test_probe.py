"""Probing and searching on a table whose every entry is known."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from metier.agents.errors import ProfileError
from metier.router.probing.arms import fit_token_cost
from metier.router.probing.evaluator import Evaluator
from metier.router.probing.journal import Journal
from metier.router.probing.outcomes import AskCost, Outcome
from metier.router.probing.probe import ProbeSettings, probe
from metier.router.probing.profile import Profile, read_profiles, write_profiles
from metier.router.probing.search import Duel, SearchSettings, explore, find_best
from metier.router.space import Candidate, Part
from tests.router.solving.table import TableRun, chance, space, task_ids

pytestmark = pytest.mark.anyio

SKILL = {
    ("planner", "a"): 0.9, ("planner", "b"): 0.88, ("planner", "c"): 0.1,
    ("solver", "a"): 0.3, ("solver", "b"): 0.95, ("solver", "c"): 0.92,
    ("critic", "a"): 0.97, ("critic", "b"): 0.97, ("critic", "c"): 0.5,
}  # fmt: skip
GOOD = {Part("planner"): Candidate("a"), Part("solver"): Candidate("b"), Part("critic"): Candidate("a")}


def evaluator(run: TableRun, path: Path | None = None, tasks: int = 40, identity: str = "w") -> Evaluator:
    return Evaluator(space(), task_ids(tasks), run, Journal(path, Outcome), identity=identity)


async def test_profiles_are_what_replacing_one_part_does() -> None:
    run = TableRun(SKILL, {"a": 0.3, "b": 0.2, "c": 0.1})
    settings = ProbeSettings(margin=1.0)  # nothing is dropped
    result = await probe(evaluator(run), GOOD, settings, workflow="w")
    assert len(result.profiles) == 9 and result.saved_runs == 0 and result.incumbent == GOOD
    for row in result.profiles:
        cast = {**{p.role: c.variant for p, c in GOOD.items()}, row.role: row.variant}
        solved = [all(chance(t, r) < SKILL[r, v] for r, v in cast.items()) for t in task_ids(40)]
        assert row.n == 40 and row.quality == pytest.approx(sum(solved) / 40)
        assert row.quality_interval[0] <= row.quality <= row.quality_interval[1]
        assert row.cpu_s == pytest.approx({"a": 0.3, "b": 0.2, "c": 0.1}[row.variant])
        assert row.tokens == 110 and row.elsewhere_cpu_s == pytest.approx(0)
    incumbent = {(r.role, r.variant) for r in result.profiles if r.candidate == GOOD[r.part]}
    assert all(r.gain == 0 for r in result.profiles if (r.role, r.variant) in incumbent)
    critic = next(r for r in result.profiles if r.role == "critic")
    assert critic.shared_tokens == {"planner": 60.0, "solver": 60.0}


async def test_clearly_worse_arms_are_dropped_early_and_the_rest_is_not_touched() -> None:
    notes: list[str] = []
    run = TableRun(SKILL)
    result = await probe(evaluator(run), GOOD, ProbeSettings(batch_tasks=8), on_note=notes.append)
    dropped = {(r.role, r.variant): r.n for r in result.profiles if r.dropped}
    assert set(dropped) == {("planner", "c"), ("solver", "a"), ("critic", "c")}
    assert result.saved_runs == sum(40 - n for n in dropped.values()) > 30
    assert len(run.calls) == 7 * 40 - result.saved_runs
    assert any("planner on c is dropped: at least" in note for note in notes)


async def test_a_killed_probe_goes_on_where_it_was(tmp_path: Path) -> None:
    """The third batch dies in the middle of a line; the next probe makes only the runs that are missing."""

    class Dies(TableRun):
        async def __call__(self, *arguments: object) -> None:
            if len(self.calls) >= 60:
                raise KeyboardInterrupt
            await super().__call__(*arguments)  # type: ignore[arg-type]

    path = tmp_path / "runs.jsonl"
    dying = Dies(SKILL)
    with pytest.raises(KeyboardInterrupt):
        await probe(evaluator(dying, path), GOOD)
    with path.open("a") as file:
        file.write('{"key": "cut o')
    run, whole = TableRun(SKILL), TableRun(SKILL)
    again = evaluator(run, path)
    result = await probe(again, GOOD)
    assert again.counts.recalled == len(dying.calls) and not set(run.calls) & set(dying.calls)
    expected = await probe(evaluator(whole), GOOD)
    assert result.profiles == expected.profiles and len(run.calls) + len(dying.calls) == len(whole.calls)


async def test_another_workflow_or_variant_is_measured_anew(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    with Journal(path, Outcome) as journal:
        first = Evaluator(space(), task_ids(4), TableRun(SKILL), journal, identity="w")
        await first.scores(GOOD, list(task_ids(4)))
    for identity, variants, expected in (("w", {}, 0), ("other", {}, 4), ("w", {"a": "0123"}, 4)):
        with Journal(path, Outcome) as journal:
            run = TableRun(SKILL)
            found = Evaluator(space(), task_ids(4), run, journal, identity=identity, variants=variants)
            await found.scores(GOOD, list(task_ids(4)))
            assert len(run.calls) == expected


async def test_without_an_incumbent_the_best_is_found(tmp_path: Path) -> None:
    """The start solves something although no candidate does in every part, and the search ends at the best there is."""
    run = TableRun({**SKILL, ("critic", "b"): 0.0, ("planner", "b"): 0.3, ("solver", "c"): 0.4})
    found = await probe(evaluator(run), None)
    assert found.incumbent == GOOD
    brute = 27 * 40
    assert len(run.calls) < brute / 3


async def test_the_search_finds_the_best_of_independent_parts_with_few_runs() -> None:
    """Ten random tables: within 1 % of the best assignment in nearly all, with at most half the runs of brute force."""
    good = 0
    for seed in range(10):
        rng = random.Random(seed)
        skill = {(role, v): rng.uniform(0.3, 1.0) for role, _ in SKILL for v in "abc"}
        run = TableRun(skill)
        judge, tasks = evaluator(run), list(task_ids(40))
        best = await find_best(space(), tasks, judge.scores, space().uniform(Candidate("a")), SearchSettings(seed=seed))
        assert len(run.calls) < 27 * 40 / 2
        reached = sum(await judge.scores(best, tasks))
        means = []
        for a in "abc":
            for b in "abc":
                for c in "abc":
                    cast = {"planner": a, "solver": b, "critic": c}
                    means.append(sum(all(chance(t, r) < skill[r, v] for r, v in cast.items()) for t in tasks))
        good += reached >= 0.99 * max(means)
    assert good >= 9


async def test_exploring_ends_near_the_best_after_few_runs() -> None:
    """One success in a row of three speaks for all three: the bad candidates are found without comparing pairs."""
    good = 0
    for seed in range(8):
        run = TableRun(SKILL)
        found = await explore(space(), list(task_ids(40)), evaluator(run).scores, SearchSettings(seed=seed))
        good += found[Part("planner")].variant != "c" and found[Part("solver")].variant != "a"
        assert len(run.calls) <= 128
    assert good >= 7


async def test_where_nothing_is_solved_there_is_a_named_error() -> None:
    run = TableRun(dict.fromkeys(SKILL, 0.0))
    with pytest.raises(ProfileError, match="none of 128 runs under different assignments solved its task"):
        await explore(space(), list(task_ids(9)), evaluator(run).scores, SearchSettings())


def test_duels_end_without_doubt_when_the_rest_cannot_matter() -> None:
    tasks = ["a", "b", "c", "d"]
    duel = Duel(tasks, {"a": 1.0, "b": 1.0, "c": 1.0, "d": 0.0}, alpha=1e-9)
    assert duel.verdict() is None
    duel.see("a", 1.0, 0.0)
    assert duel.verdict() is False  # what it lost it can at best win back, and a draw is no win
    other = Duel(tasks, {"a": 0.0, "b": 0.0, "c": 1.0, "d": 0.0}, alpha=1e-9)
    other.see("a", 0.0, 1.0)
    other.see("b", 0.0, 1.0)
    assert other.verdict() is True


@pytest.mark.parametrize("score", [float("nan"), 1.5, -0.1])
async def test_a_score_that_is_none_is_a_named_error(score: float) -> None:
    with pytest.raises(ProfileError, match="expected a number from 0 to 1"):
        Outcome(key="", task="t", score=score)
    with pytest.raises(ProfileError, match="role 'critic'"):
        Outcome(key="", task="t", score=1.0, role_scores={"critic": score})


async def test_profiles_are_kept_as_lines_that_can_be_read(tmp_path: Path) -> None:
    result = await probe(evaluator(TableRun(SKILL)), GOOD, workflow="w")
    path = tmp_path / "profiles.jsonl"
    assert write_profiles(path, result.profiles) == 9
    assert write_profiles(path, result.profiles) == 0
    assert read_profiles(path) == result.profiles
    other = await probe(evaluator(TableRun(SKILL), tasks=8), GOOD, workflow="w")
    write_profiles(path, other.profiles)
    assert read_profiles(path) == other.profiles and len(path.read_text().splitlines()) == 18


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no profiles"),
        ("{}\n", "line 1 is no Profile"),
        ('{"role": "solver", "variant": "x", "quality": NaN}\n', "quality=NaN"),
    ],
)
def test_profiles_that_are_none_are_named_errors(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "profiles.jsonl"
    path.write_text(text)
    with pytest.raises(ProfileError, match=said):
        read_profiles(path)
    with pytest.raises(ProfileError, match="no profiles"):
        read_profiles(tmp_path / "nowhere.jsonl")


def test_the_cost_of_a_token_is_what_the_asks_were_made_with() -> None:
    rng = random.Random(0)
    asks = []
    for _ in range(30):
        prompt, answer = rng.randrange(20, 400), rng.randrange(5, 40)
        asks.append(
            AskCost(
                role="a", variant="base", prompt_tokens=prompt + 16, cached_tokens=16, answer_tokens=answer,
                cpu_s=2e-4 * prompt + 3e-3 * answer + 0.01, seconds=1e-4 * prompt + 1e-2 * answer,
            )
        )  # fmt: skip
    cost = fit_token_cost(asks)
    assert cost.prefill_cpu_s == pytest.approx(2e-4) and cost.prefill_s == pytest.approx(1e-4)
    assert fit_token_cost(asks[:5]).prefill_cpu_s == 0.0
    assert Profile.model_fields["token_cost"].default.prefill_s == 0.0
