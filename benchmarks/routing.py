"""What the router decides per ask, and what it costs: ladder, thinking and priority, in CPU time.

python benchmarks/routing.py --asks 20000 --rounds 5
"""

from __future__ import annotations

from harness import Samples, arguments, clocked, machine, paired_rounds, spread
from pydantic import BaseModel

from metier.agents import Ask, Message, Role, TaskGraph, Usage
from metier.router import Assignment, Failures, PrioritySettings, Router
from metier.runtime.runs.run_priority import AttainedService, RemainingPath, RunPriority

ASSIGNMENT = {
    "roles": {
        "solver": {"ladder": [{"thinking": 64}, {"thinking": 256}, "large"], "climb_on": ["rejected", "unparsed"]},
        "critic": {"variant": "critic-lora", "thinking": 16},
    }
}


class Puzzle(BaseModel):
    text: str


class Answer(BaseModel):
    value: int


solver = Role("solver", takes=Puzzle, gives=Answer, instructions="Solve.")
critic = Role("critic", takes=Answer, gives=Answer, instructions="Judge.")


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--asks", type=int, default=20_000)
    options = parser.parse_args()
    graph = TaskGraph("g", takes=Puzzle, gives=Answer)
    with graph.loop("attempt", max_rounds=6):
        solve = graph.step(solver)
        graph.step(critic, after=solve)
    graph.returns(solve)
    path = RemainingPath(graph.build(), lambda role: 1.0)
    router = Router(Assignment.model_validate(ASSIGNMENT))
    messages = (Message(role="user", content="2+2"),)
    asks = [
        Ask(run_id="r", step_path=f"attempt[{n}]/{role}", role=role, messages=messages, round=n)
        for n in range(1, 7)
        for role in ("solver", "critic")
    ]
    usage = Usage(prompt_tokens=100, cached_tokens=60, answer_tokens=20)
    took_us: Samples[str, float] = Samples(("router",), options.journal)
    for number, arm in paired_rounds(list(took_us), options.rounds):
        priority = RunPriority(path, PrioritySettings(), AttainedService(), began_s=1.0)
        with clocked() as spent:
            for place in range(options.asks):
                ask = asks[place % len(asks)]
                priority.of(ask.step_path)
                router.route(ask, Failures(rejected=ask.round - 1, rejected_by="critic")).send(ask)
                priority.note(usage)
        took_us.keep(number, arm, 1e6 * spent.cpu_s / options.asks)
    kept = took_us["router"]
    shown = ", ".join(f"{took:.1f}" for took in kept)
    print(f"{machine()}\nCPU us per ask: median {spread(kept, '.1f')}; rounds: {shown}")


if __name__ == "__main__":
    main()
