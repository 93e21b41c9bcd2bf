"""Arithmetic of launchers. Triton's own functions of these names also work in kernels, and take microseconds here."""


def cdiv(value: int, divisor: int) -> int:
    """value / divisor, rounded up."""
    return -(-value // divisor)


def next_power_of_2(value: int) -> int:
    """The least power of two that is not below a positive number."""
    return 1 << (value - 1).bit_length()


def is_power_of_2(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0
