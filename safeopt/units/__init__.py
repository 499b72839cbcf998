"""Units of a model: which rows and columns of which parameters form one channel or head."""

from safeopt.units.groups import Lines, UnitGroup
from safeopt.units.unit_map import Selection, UnitMap

__all__ = ["Lines", "Selection", "UnitGroup", "UnitMap"]
