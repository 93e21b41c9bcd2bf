"""Checks of the arguments that layers and models share."""

from __future__ import annotations

import math


def check_int(name: str, value, minimum: int) -> int:
    """`value`, if it is an int of at least `minimum`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name}={value} is not allowed; it must be at least {minimum}")
    return value


def check_probability(name: str, value) -> float:
    """`value`, if it is a number in 0..1."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    if math.isnan(value) or not 0 <= value <= 1:
        raise ValueError(f"{name}={value} is not allowed; it must lie in 0..1")
    return value
