"""Which variant serves whom: measures, decides, executes nothing itself."""

from .assign import Assigned, AssignSettings, assign
from .assignment import Assignment, RoleAssignment, load_assignment
from .coupling import Prediction, Problem, Serving, make_problem, predict
from .escalation import NO_SETBACKS, Rung, Setbacks
from .evaluator import Evaluator, RunTasks
from .outcomes import AskCost, Journal, Outcome
from .placement import PlacedAsk, Placement, PlacementCosts, ReplicaState, place
from .priority import PrioritySettings
from .probe import ProbeResult, ProbeSettings, probe
from .profile import Footprint, Profile, read_profiles, write_profiles
from .route import Route, Router
from .solve import Limits, Solution, SolverSettings, front, solve
from .space import Candidate, Part, Space, space_of

__all__ = [
    "NO_SETBACKS",
    "AskCost",
    "AssignSettings",
    "Assigned",
    "Assignment",
    "Candidate",
    "Evaluator",
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
    "Rung",
    "Serving",
    "Setbacks",
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
