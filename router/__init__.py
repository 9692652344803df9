"""Which variant serves whom: decides, executes nothing."""

from .assignment import Assignment, RoleAssignment, load_assignment
from .route import Route, Router

__all__ = ["Assignment", "RoleAssignment", "Route", "Router", "load_assignment"]
