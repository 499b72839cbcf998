"""Compare arms: the same budget, several seeds, one scenario, measured along the curve."""

from safeopt.compare.arms import ARMS, Arm, parse_arms
from safeopt.compare.comparison import compare
from safeopt.compare.kinds import Context, Kind, Plan
from safeopt.compare.sets import Scenario, Sets, load_rows, set_name
from safeopt.compare.settings import Settings

__all__ = [
    "ARMS",
    "Arm",
    "Context",
    "Kind",
    "Plan",
    "Scenario",
    "Sets",
    "Settings",
    "compare",
    "load_rows",
    "parse_arms",
    "set_name",
]
