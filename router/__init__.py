"""Which variant plays which role: measures and decides; runtime executes."""

from .assignment import Assignment, RoleAssignment, load_assignment
from .escalation import NO_FAILURES, EscalationLevel, Failures
from .placement.placement import PlacedAsk, Placement, PlacementCosts, ReplicaState, place
from .priority import PrioritySettings
from .probing.evaluator import Evaluator, RunTasks
from .probing.journal import Journal
from .probing.outcomes import AskCost, Outcome
from .probing.probe import ProbeResult, ProbeSettings, probe
from .probing.profile import Footprint, Profile, read_profiles, write_profiles
from .route import Route, Router
from .solving.assign import assign
from .solving.assigned import Assigned, AssignSettings
from .solving.coupling import Prediction, Problem, make_problem, predict
from .solving.limits import Limits
from .solving.serving import Serving
from .solving.solve import Solution, SolverSettings, front, solve
from .space import Candidate, Part, Space, space_of

__all__ = [
    "NO_FAILURES",
    "AskCost",
    "AssignSettings",
    "Assigned",
    "Assignment",
    "Candidate",
    "EscalationLevel",
    "Evaluator",
    "Failures",
    "Footprint",
    "Journal",
    "Limits",
    "Outcome",
    "Part",
    "PlacedAsk",
    "Placement",
    "PlacementCosts",
    "Prediction",
    "PrioritySettings",
    "ProbeResult",
    "ProbeSettings",
    "Problem",
    "Profile",
    "ReplicaState",
    "RoleAssignment",
    "Route",
    "Router",
    "RunTasks",
    "Serving",
    "Solution",
    "SolverSettings",
    "Space",
    "assign",
    "front",
    "load_assignment",
    "make_problem",
    "place",
    "predict",
    "probe",
    "read_profiles",
    "solve",
    "space_of",
    "write_profiles",
]
