"""Numbers with a unit: counts of tokens, and lengths of a schedule's parts as a fraction, steps or tokens."""

import math
import re
from fractions import Fraction
from typing import Any, ClassVar


class Count(int):
    """A number of tokens: 1000, 2_260_992, 250B, 1.5M, 2.5e11."""

    UNITS: ClassVar = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}

    @classmethod
    def parse(cls, text: Any) -> "Count":
        # Two digits of exponent: a billion of them would be a number that fills the memory.
        pattern = r"([0-9][0-9_]*(?:\.[0-9]+)?(?:e[+]?[0-9]{1,2})?)([KMBT]?)"
        match = re.fullmatch(pattern, str(text).strip(), re.IGNORECASE)
        if match is None:
            raise ValueError(f"{text!r} is not a number of tokens; write it as 250B, 2.5e11 or 2_260_992")
        # Exact: as floats, 1.005 * 10**6 is not whole.
        value = Fraction(match[1].replace("_", "")) * cls.UNITS[match[2].upper()]
        if value.denominator != 1:
            raise ValueError(f"{text!r} is not a whole number of tokens")
        return cls(value.numerator)


def is_length(length: float | str) -> bool:
    """Whether `steps_of` can take it: a fraction below 1, a whole number of steps, or tokens as text."""
    if isinstance(length, str):
        try:
            return Count.parse(length) >= 0
        except ValueError:
            return False
    return 0 <= length < 1 or (length >= 1 and length % 1 == 0)


def steps_of(length: float | str, steps: int, batch_tokens: int, up: bool = True) -> int:
    """A length in steps of `batch_tokens`: below 1 a fraction of `steps`, from 1 on steps, as text ("2B") tokens.

    Tokens are rounded up, as those of the run are. A fraction is rounded up, or down to no less than a step: fractions
    of which one is rounded up and the others down sum to no more than their whole.
    """
    if isinstance(length, str):
        return -(-Count.parse(length) // batch_tokens)
    if length >= 1 or length == 0:
        return int(length)
    return math.ceil(length * steps - 1e-9) if up else max(1, math.floor(length * steps + 1e-9))
