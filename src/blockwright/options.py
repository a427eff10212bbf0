"""The types that options may have, so that a recipe is checked and explained without importing torch."""

from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt

Share = Annotated[float, Ge(0), Lt(1)]  # a fraction of a whole, 0 <= share < 1
Bits = Annotated[int, Ge(2), Le(8)]  # bits of one stored weight
GroupSize = Annotated[int, Ge(-1)]  # inputs that share a scale; -1: the whole row
Count = Annotated[int, Ge(0)]
Positive = Annotated[int, Ge(1)]
Rate = Annotated[float, Gt(0)]  # a learning rate or another positive factor
Targets = list[str]  # "Linear", a module's dotted name or suffix, or "re:<regex>"
