"""Which machine a probe's costs were measured on, so that those of two machines are never mixed without a word."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ...agents.errors import ProfileError
from ...router.probing.evaluator import Evaluator
from ...router.probing.journal import Journal
from ...router.probing.outcomes import Outcome
from ...router.probing.profile import Profile
from ...router.space import Choices
from ...specializers.machine.machine import Machine, this_machine
from ...specializers.machine.number_types import engine_number_type
from ..backends import OpenBackend, on_servers

__all__ = ["KnownMachine", "check_machines", "measured_on", "note_machine", "rescaled"]

MACHINES = "machines.jsonl"
RESCALED_BY_TASKS = 6
"""Tasks that are run again to compare two machines."""

Note = Callable[[str], None]


class KnownMachine(BaseModel):
    """A machine by its key, so that the many records of a journal need not repeat it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    """Its key, as records name it."""
    machine: Machine
    """The machine."""


def measured_on(engine: str, opened: OpenBackend) -> Machine:
    """The machine that the engines of an opened backend compute on; servers elsewhere are known by their address."""
    if on_servers(engine):
        return Machine(processor=f"servers {engine}")
    if opened.base_folder is None:
        return this_machine()
    return this_machine(engine_number_type(opened.base_folder, opened.settings.dtype).dtype)


def note_machine(folder: Path, machine: Machine, journals: Sequence[Journal[Any]], *, mix: bool, on_note: Note) -> None:
    """Say in the folder's journals that what comes is measured on `machine`, and tell what they have of others.

    Records of other machines are not used again unless `mix`; those of an unknown one are, with a warning.
    """
    with Journal(folder / MACHINES, KnownMachine) as known:
        if known.get(machine.key) is None:
            known.add(KnownMachine(key=machine.key, machine=machine))
        names = {record.key: str(record.machine) for _, record in known.items()}
    found: dict[str, int] = {}
    for journal in journals:
        journal.measure_on(machine.key, mix=mix)
        for key, n in journal.by_machine().items():
            found[key] = found.get(key, 0) + n
    for key, n in found.items():
        if not key:
            on_note(f"{n} records of {folder} are of an unknown machine: taken as if they had been measured here")
        elif mix:
            on_note(f"{n} records of {folder} were measured on {names.get(key, key)}: mixed with those of {machine}")
        else:
            on_note(
                f"{n} records of {folder} were measured on {names.get(key, key)}, this is {machine}: "
                "what is needed of them is measured again (--mix-machines uses them as they are)"
            )


def check_machines(profiles: Sequence[Profile], here: Machine, *, mix: bool, on_note: Note) -> bool:
    """Whether all profiles were measured here; those of an unknown machine count as such, with a warning.

    Raises: ProfileError when some were measured elsewhere and `mix` is not set.
    """
    elsewhere = list(dict.fromkeys(row.machine for row in profiles if row.machine.is_known and row.machine != here))
    if any(not row.machine.is_known for row in profiles):
        on_note("profiles of an unknown machine are taken as if they had been measured here")
    if not elsewhere:
        return True
    if not mix:
        raise ProfileError(
            f"profiles were measured on {elsewhere[0]}; here {', '.join(here.differences(elsewhere[0]))}",
            expected=f"those of one machine, {here}: the costs of two cannot be compared",
            remedy="Probe again here (the same --out keeps both), or assign with --rescale, which scales "
            f"the costs by {RESCALED_BY_TASKS} tasks that it runs here, or with --mix-machines.",
        )
    on_note(f"costs of several machines are mixed: {'; '.join(map(str, elsewhere))}; and this, {here}")
    return False


async def rescaled(
    profiles: Sequence[Profile],
    incumbent: Choices,
    evaluator: Evaluator,
    runs: Journal[Outcome],
    here: Machine,
    *,
    on_note: Note,
) -> list[Profile]:
    """The profiles with their costs as this machine would have them: multiplied by what the incumbent's first tasks
    cost here for each CPU-second, and second, that they cost there.

    One factor for all variants: whether 8-bit weights gain as much here as 16-bit ones is not measured.
    Raises: ProfileError where profiles are of several machines, or none of the incumbent's runs there is known.
    """
    machines = {row.machine for row in profiles}
    keys = evaluator.keys(incumbent, list(evaluator.tasks)[:RESCALED_BY_TASKS])
    there = {task: found for task, key in keys.items() if (found := runs.elsewhere(key)) is not None}
    if len(machines) > 1 or not there:
        raise ProfileError(
            f"--rescale with profiles of {len(machines)} machines, {len(there)} of whose incumbent's runs are known",
            expected="profiles of one machine in the folder of their probe",
            remedy="Probe again here.",
        )
    on_note(f"running {len(there)} tasks of the incumbent here, to compare the machines")
    outcomes = await evaluator.outcomes(incumbent, list(there))
    cpu_s, seconds = (_ratio(outcomes, list(there.values()), amount) for amount in ("cpu_s", "seconds"))
    on_note(f"costs are multiplied by {cpu_s:.2f} (CPU-seconds) and {seconds:.2f} (seconds)")
    return [_scaled(row, cpu_s, seconds, here) for row in profiles]


def _ratio(here: Sequence[Outcome], there: Sequence[Outcome], amount: str) -> float:
    spent, before = (sum(getattr(ask, amount) for run in runs for ask in run.asks) for runs in (here, there))
    return spent / before if spent > 0 and before > 0 else 1.0


def _scaled(row: Profile, cpu_s: float, seconds: float, here: Machine) -> Profile:
    cost = row.token_cost
    token_cost = cost.model_copy(
        update={
            "prefill_cpu_s": cost.prefill_cpu_s * cpu_s,
            "decode_cpu_s": cost.decode_cpu_s * cpu_s,
            "step_cpu_s": cost.step_cpu_s * cpu_s,
            "prefill_s": cost.prefill_s * seconds,
        }
    )
    return row.model_copy(
        update={
            "machine": here,
            "token_cost": token_cost,
            **{name: getattr(row, name) * cpu_s for name in ("cpu_s", "run_cpu_s", "elsewhere_cpu_s")},
            **{name: getattr(row, name) * seconds for name in ("seconds", "elsewhere_seconds")},
        }
    )
