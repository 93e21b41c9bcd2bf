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


def check_positive(name: str, value) -> float:
    """`value`, if it is a finite number above 0."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    if not 0 < value < math.inf:  # NaN fails too
        raise ValueError(f"{name}={value} is not allowed; it must be a finite number above 0")
    return value


def check_bool(name: str, value) -> bool:
    """`value`, if it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    return value


def check_ints(name: str, values, minimum: int) -> tuple[int, ...]:
    """`values`, if they are a tuple or list of ints of at least `minimum`, one or more."""
    if not isinstance(values, (tuple, list)):
        raise TypeError(f"{name} must be a tuple of ints, got {type(values).__name__}")
    if not values:
        raise ValueError(f"{name} must not be empty")
    return tuple(check_int(name, value, minimum) for value in values)
