"""A discrete-event twin of our engines, fitted from a recorded run store: what another set-up would take, in seconds.

Times are simulated seconds. The rules are those that serve: adapter slots by `runtime/slot_table.py`, order by
`router/priority.py`, placement by `router/placement.py`; only the engine's steps and the clock are made up. The event
loop is a heap and twenty lines (`clock.py`), less than the processes of a simulation library would need around it.
"""

from .recorded_programs import RecordedBatch, read_programs
from .service_model import ServiceModel, fit_service
from .serving_plan import ServingPlan
from .simulation import SimulationResult, simulate

__all__ = [
    "RecordedBatch",
    "ServiceModel",
    "ServingPlan",
    "SimulationResult",
    "fit_service",
    "read_programs",
    "simulate",
]
