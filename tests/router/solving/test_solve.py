"""The coupled cost model by hand, and the solvers against looking at every choice."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from pydantic import ValidationError

from metier.agents.errors import InfeasibleError, ProfileError
from metier.router.probing.profile import Footprint, Profile, TokenCost
from metier.router.solving.coupling import Problem, ask_seconds, make_problem, predict, swap_share
from metier.router.solving.limits import Amount, Limits
from metier.router.solving.serving import Serving
from metier.router.solving.solve import (
    Solution,
    SolverSettings,
    all_choices,
    brute_force,
    front,
    is_excluded,
    local_search,
    objective,
    solve,
)
from metier.router.space import Candidate, Part
from tests.router.solving.table import profile

A, B, C = Part("a"), Part("b"), Part("c")
BASE = "a=base, b=base, c=base"


def adapter(name: str, checkpoint: str = "base", mib: float = 100, rank: int = 8) -> Footprint:
    return Footprint(checkpoint=checkpoint, checkpoint_mib=mib, adapter=name, adapter_rank=rank, slot_mib=10)


def cast(*names: str) -> dict[Part, Candidate]:
    return {part: Candidate(name) for part, name in zip((A, B, C), names, strict=False)}


def rows(variants: dict[str, Footprint], parts: Sequence[Part] = (A, B, C), **fields: object) -> list[Profile]:
    incumbent = ", ".join(f"{part}=base" for part in parts)
    return [profile(part, v, incumbent, footprint=f, **fields) for part in parts for v, f in variants.items()]


PLAIN = Footprint(checkpoint_mib=100)
LORAS = {"base": PLAIN, "x": adapter("x"), "y": adapter("y"), "z": adapter("z")}


def test_a_checkpoint_and_its_slots_are_paid_for_once() -> None:
    variants = {"base": PLAIN, "x": adapter("x"), "small": Footprint(checkpoint="s", checkpoint_mib=40)}
    problem = make_problem(rows(variants), (A, B, C), serving=Serving(kv_cache_mib=64, engine_mib=6))
    assert predict(problem, cast("base", "base", "base")).memory_mib == 170
    assert predict(problem, cast("x", "x", "base")).memory_mib == 180
    assert predict(problem, cast("x", "small", "small")).memory_mib == 180 + 110
    alone = Problem(problem.parts, problem.rows, problem.quality, problem.serving, coupled=False)
    assert predict(alone, cast("base", "base", "base")).memory_mib == 3 * 170


def test_more_adapters_than_slots_swap_and_the_cost_is_shared_out() -> None:
    assert [swap_share(n, 2) for n in (1, 2, 3, 4)] == [0, 0, pytest.approx(1 / 3), 0.5]
    serving = Serving(adapter_slots=2, swap_cpu_s=0.3, swap_s=0.6, running=1)
    problem = make_problem(rows(LORAS, asks=2.0, token_cost=TokenCost()), (A, B, C), serving=serving)
    two, three = predict(problem, cast("x", "y", "x")), predict(problem, cast("x", "y", "z"))
    assert two.swaps == 0 and three.swaps == pytest.approx(6 / 3)
    assert three.cpu_s - two.cpu_s == pytest.approx(0.6) and three.latency_s - two.latency_s == pytest.approx(1.2)
    # Of twelve runs four wait for the same adapter: each waits as long, and one load does for all.
    many = replace(problem, serving=serving.model_copy(update={"running": 12}))
    two, three = predict(many, cast("x", "y", "x")), predict(many, cast("x", "y", "z"))
    assert three.swaps == pytest.approx(6 / 3 / 4)
    assert three.cpu_s - two.cpu_s == pytest.approx(0.15) and three.latency_s - two.latency_s == pytest.approx(1.2)


def test_a_part_that_no_run_came_to_stays_with_the_incumbent() -> None:
    first, later = Part("a", "first"), Part("a", "later")
    incumbent = "a[1]=base, a[2+]=x"
    seen = [profile(first, v, incumbent) for v in ("base", "x")]
    never = [profile(later, v, incumbent, asks=0.0, cpu_s=0.0, prompt_tokens=0.0) for v in ("base", "x")]
    problem = make_problem([*seen, *never], (first, later))
    assert list(problem.rows[later]) == [Candidate("x")] and len(problem.rows[first]) == 2
    assert "no run of the probe" in problem.rejected[0].why


def test_three_engines_make_three_times_the_steps_of_one() -> None:
    """A task writes 3 x 20 tokens; with 4 runs at once that is 15 turns, a step of every engine in each."""
    cost = TokenCost(prefill_cpu_s=1e-3, decode_cpu_s=0.01, step_cpu_s=0.1)
    variants = {"base": PLAIN, "s": Footprint(checkpoint="s"), "t": Footprint(checkpoint="t")}
    problem = make_problem(rows(variants, token_cost=cost, answer_tokens=20.0), (A, B, C), serving=Serving(running=4))
    tokens = 3 * (100 * 1e-3 + 20 * 0.01)
    assert predict(problem, cast("base", "base", "base")).cpu_s == pytest.approx(tokens + 1.5)
    assert predict(problem, cast("base", "s", "t")).cpu_s == pytest.approx(tokens + 4.5)
    # One run at a time: a step for each token, whoever makes it.
    alone = make_problem(rows(variants, token_cost=cost, answer_tokens=20.0), (A, B, C), serving=Serving(running=1))
    assert predict(alone, cast("base", "s", "t")).cpu_s == pytest.approx(tokens + 6.0)


def test_engines_that_share_a_thread_add_up_to_the_time_of_many_tasks() -> None:
    profiles = rows({"base": adapter("base", "base"), "own": adapter("own", "own")})
    choices = {A: Candidate("own"), B: Candidate(), C: Candidate()}
    unknown = make_problem(profiles, (A, B, C))
    assert predict(unknown, choices).completion_s is None
    known = make_problem(profiles, (A, B, C), serving=Serving(busy_s_per_cpu_s=0.5))
    prediction = predict(known, choices)
    assert prediction.completion_s == pytest.approx(0.5 * prediction.cpu_s)
    asked = {str(part): known.rows[part][choices[part]] for part in (A, B, C)}
    assert ask_seconds(known, choices) == {
        role: pytest.approx(row.seconds / row.asks) for role, row in asked.items() if row.seconds
    }


def test_what_others_do_more_is_priced_at_the_batches_to_come() -> None:
    cost = TokenCost(decode_cpu_s=0.01, step_cpu_s=0.1)
    fields = {"token_cost": cost, "answer_tokens": 20.0, "cpu_s": 1.1}
    given = [profile(A, "base", "a=base", **fields), profile(A, "x", "a=base", elsewhere_cpu_s=2.2, **fields)]
    problem = make_problem(given, (A,), serving=Serving(running=2))
    assert problem.elsewhere_scale == pytest.approx((20 * 0.01 + 10 * 0.1) / 1.1)
    more = predict(problem, {A: Candidate("x")}).cpu_s - predict(problem, {A: Candidate("base")}).cpu_s
    assert more == pytest.approx(2.4)


def test_staying_on_a_variant_keeps_the_prefix_and_switching_computes_it_again() -> None:
    given = rows(LORAS, shared_tokens={"": 10.0, "a": 50.0, "b": 80.0}, cached_tokens=10.0, prompt_tokens=100.0)
    problem = make_problem(given, (A, B, C), serving=Serving(adapter_slots=4))
    same, other, back = (predict(problem, cast(*c)) for c in (("x", "x", "x"), ("x", "y", "z"), ("x", "y", "x")))
    # Cold: 0.1 + 10 cached tokens at 1e-4 for each of three. Saved: all share 80 with b (b itself too), or 10, or 50.
    assert same.cpu_s == pytest.approx(3 * 0.101 - 1e-4 * (80 + 80 + 80))
    assert other.cpu_s == pytest.approx(3 * 0.101 - 1e-4 * (50 + 80 + 10))
    assert back.cpu_s == pytest.approx(3 * 0.101 - 1e-4 * (50 + 80 + 50))


def test_quality_multiplies_what_each_part_lost_alone() -> None:
    given = [
        profile(A, "base", BASE),
        profile(A, "x", BASE, quality=0.4, gain=-0.4, elsewhere_cpu_s=0.05, elsewhere_tokens=-7),
        profile(B, "base", BASE),
        profile(B, "x", BASE, quality=0.0, gain=-0.8),
        profile(C, "base", BASE),
        profile(C, "x", BASE, quality=0.88, gain=0.08, n=10),
    ]
    problem = make_problem(given, (A, B, C))
    assert problem.quality == 0.8 and problem.incumbent == cast("base", "base", "base")
    assert predict(problem, cast("x", "base", "x")).quality == pytest.approx(0.8 * 0.5 * 1.1)
    assert predict(problem, cast("base", "x", "base")).quality == pytest.approx(0.0008)
    cheap = predict(problem, cast("x", "base", "base"))
    assert cheap.cpu_s == pytest.approx(0.35) and cheap.tokens == 293
    assert math.isinf(type(cheap)(0.0, 1, 1, 1, 1).cost_of_pass)


def instance(seed: int, parts: int = 3, variants: int = 4) -> Problem:
    """A random problem with two checkpoints, adapters on both, few slots and shared prefixes."""
    rng = random.Random(seed)
    names = [Part(f"r{i}") for i in range(parts)]
    prints = {}
    for v in range(variants):
        checkpoint, mib = rng.choice((("base", 270.0), ("small", 140.0)))
        bare = Footprint(checkpoint=checkpoint, checkpoint_mib=mib)
        prints[f"v{v}"] = bare if rng.random() < 0.3 else adapter(f"id{v}", checkpoint, mib)
    prices = {
        c: TokenCost(
            prefill_cpu_s=rng.uniform(0, 1e-3),
            prefill_s=rng.uniform(0, 1e-3),
            decode_cpu_s=rng.uniform(0, 1e-2),
            step_cpu_s=rng.choice((0.0, rng.uniform(0, 0.1))),
        )
        for c in ("base", "small")
    }
    given = []
    for number, part in enumerate(names):
        for v, footprint in prints.items():
            quality = rng.uniform(0.2, 0.9)
            shared = {str(p): float(rng.randrange(0, 90)) for p in names[: number + 1]}
            given.append(
                profile(
                    part, v, ", ".join(f"{p}=v0" for p in names), footprint=footprint, quality=quality,
                    gain=quality - 0.8 if v != "v0" else 0.0, cpu_s=rng.uniform(0.05, 0.4), asks=rng.uniform(1, 3),
                    seconds=rng.uniform(0.1, 0.9), answer_tokens=float(rng.randrange(5, 80)),
                    cached_tokens=float(rng.randrange(0, 60)), token_cost=prices[footprint.checkpoint],
                    shared_tokens={"": float(rng.randrange(0, 20)), **shared},
                )
            )  # fmt: skip
    return make_problem(
        given,
        names,
        serving=Serving(
            kv_cache_mib=32,
            process_mib=50,
            adapter_slots=2,
            swap_cpu_s=0.1,
            swap_s=0.2,
            running=rng.choice((1, 4)),
        ),
    )


def limits_of(problem: Problem, seed: int) -> Limits:
    """Limits around the middle of what there is, so that some choices keep them and some do not."""
    rng = random.Random(seed)
    every = [predict(problem, choices) for choices in all_choices(problem)]

    def middle(name: str, share: float) -> float:
        return sorted(getattr(p, name) for p in every)[int(share * (len(every) - 1))]

    return Limits(
        min_quality=min(middle("quality", rng.uniform(0.2, 0.7)), 1.0),
        memory_mib=middle("memory_mib", 0.8) if rng.random() < 0.7 else None,
        latency_s=middle("latency_s", 0.7) if rng.random() < 0.7 else None,
        tokens=middle("tokens", 0.8) if rng.random() < 0.5 else None,
    )


@pytest.mark.parametrize("minimise", ["cpu_s", "latency_s", "tokens", "memory_mib", "quality"])
@pytest.mark.parametrize("seed", range(8))
def test_solvers_find_what_looking_at_every_choice_finds(seed: int, minimise: Amount) -> None:
    problem = instance(seed)
    limits = limits_of(problem, seed)
    oracle = brute_force(problem, limits, minimise)
    searched = local_search(problem, limits, minimise)
    if oracle is None:
        assert searched is None
        with pytest.raises(InfeasibleError):
            solve(problem, limits, minimise)
        return
    exact = solve(problem, limits, minimise)
    assert exact.method == "milp" and exact.exact and limits.excess(exact.prediction) == 0
    best = objective(oracle.prediction, minimise)
    assert objective(exact.prediction, minimise) == pytest.approx(best, rel=1e-6, abs=1e-9)
    assert searched is not None and limits.excess(searched.prediction) == 0
    assert objective(searched.prediction, minimise) == pytest.approx(best, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_uncoupled_is_solved_too(seed: int) -> None:
    coupled = instance(seed)
    problem = Problem(coupled.parts, coupled.rows, coupled.quality, coupled.serving, coupled=False)
    oracle, exact = brute_force(problem, Limits(min_quality=0.1)), solve(problem, Limits(min_quality=0.1))
    assert oracle is not None and exact.prediction.cpu_s == pytest.approx(oracle.prediction.cpu_s)


def test_an_exclusion_may_name_some_parts_only() -> None:
    variants = {"base": PLAIN, "x": adapter("x")}
    problem = make_problem(rows(variants), (A, B, C))
    barred = [{A: Candidate("base"), B: Candidate("base")}, {C: Candidate("base")}]
    few = SolverSettings(exact_pairs=0)
    for found in (solve(problem, exclude=barred), solve(problem, exclude=barred, settings=few)):
        assert found.choices[C] == Candidate("x") and Candidate("x") in (found.choices[A], found.choices[B])
    assert len([c for c in all_choices(problem) if not is_excluded(c, barred)]) == 3


def test_what_is_excluded_is_not_chosen_again() -> None:
    problem = instance(1)
    seen: list[Solution] = []
    for _ in range(4):
        seen.append(solve(problem, exclude=[s.choices for s in seen]))
    costs = sorted(predict(problem, choices).cpu_s for choices in all_choices(problem))
    assert [s.prediction.cpu_s for s in seen] == pytest.approx(costs[:4])
    few = SolverSettings(exact_pairs=0)
    again = solve(problem, exclude=[seen[0].choices], settings=few)
    assert again.method == "local search" and again.choices != seen[0].choices


def test_the_front_is_what_nothing_beats_and_both_ways_find_it() -> None:
    problem = instance(2)
    every = [predict(problem, choices) for choices in all_choices(problem)]
    points = front(problem, settings=SolverSettings(front_points=1000))
    for point in points:
        better = [p for p in every if p.quality >= point.prediction.quality and p.cpu_s < point.prediction.cpu_s - 1e-9]
        assert not better
    assert points[0].prediction.cpu_s == pytest.approx(min(p.cpu_s for p in every))
    assert points[-1].prediction.quality == pytest.approx(max(p.quality for p in every))
    one_by_one = front(problem, settings=SolverSettings(front_points=1000, all_choices_limit=0))
    assert {round(p.prediction.quality, 6) for p in one_by_one} <= {round(p.prediction.quality, 6) for p in points}
    assert len(one_by_one) >= 0.8 * len(points)
    assert len(front(problem, settings=SolverSettings(front_points=3))) <= 3


def test_the_limit_that_binds_is_named_with_what_is_feasible() -> None:
    problem = make_problem(rows({"base": PLAIN, "x": adapter("x")}, quality=0.8), (A, B, C))
    with pytest.raises(InfeasibleError, match=r"memory_mib=5 \(nearest feasible: 612 MiB of memory\)") as caught:
        solve(problem, Limits(memory_mib=5, min_quality=0.5))
    assert "min_quality" not in str(caught.value)
    with pytest.raises(InfeasibleError, match=r"min_quality=0.9 \(nearest feasible: 0.8 quality\)"):
        solve(problem, Limits(memory_mib=2000, min_quality=0.9))
    with pytest.raises(InfeasibleError, match=r"not without any one.*memory_mib=5 \(alone at best 612\)"):
        solve(problem, Limits(memory_mib=5, min_quality=0.9))
    with pytest.raises(ValidationError):
        Limits(min_quality=1.2)
    with pytest.raises(ValidationError):
        Limits(memory_mib=-1)


def test_what_cannot_be_chosen_is_kept_with_its_reason() -> None:
    given = rows({"base": PLAIN, "wide": adapter("wide", rank=64)})
    given += [profile(A, "slow", BASE, dropped="at least 0.4 below the incumbent after 8 tasks")]
    problem = make_problem(given, (A, B, C))
    why = {(str(r.part), str(r.candidate)): r.why for r in problem.rejected}
    assert "rank 64 does not fit slots of slot_rank=16" in why["b", "wide"]
    assert why["a", "slow"].startswith("dropped by the probe: at least 0.4")
    assert solve(problem).choices == cast("base", "base", "base")  # a role with one variant is no special case


def test_a_pair_without_profile_is_named() -> None:
    given = [*rows({"base": PLAIN}), profile(A, "x", BASE)]
    with pytest.raises(ProfileError, match="no profile of x at b"):
        make_problem(given, (A, B, C), candidates=[Candidate(), Candidate("x")])
    with pytest.raises(ProfileError, match=r"no profile of any candidate at d"):
        make_problem(given, (A, B, C, Part("d")))
    with pytest.raises(ProfileError, match=r"no candidate is left for a \(wide: its rank"):
        make_problem([profile(A, "wide", "a=wide", footprint=adapter("w", rank=64))], (A,))
    with pytest.raises(ProfileError, match="solved nothing"):
        make_problem(rows({"base": PLAIN}, quality=0.0), (A, B, C))


def test_many_parts_are_left_to_local_search() -> None:
    problem = instance(3, parts=12, variants=8)
    found = solve(problem, Limits(min_quality=1e-6), settings=SolverSettings(exact_pairs=50, restarts=3))
    assert found.method == "local search" and not found.exact
    assert found.prediction.cpu_s <= min(predict(problem, c).cpu_s for c in [problem.incumbent])
