"""How the report formats numbers, for people and as JSON."""

import math


def percent(share: float, digits: int = 1) -> str:
    """Format a share from 0 to 1 as a percentage.

    >>> percent(0.285)
    '28.5%'
    """
    return f"{100 * share:.{digits}f}%"


def rounded(value: float, digits: int) -> float | None:
    """Round a number to `digits` significant digits; None (null in JSON) if it is not finite.

    >>> rounded(3.14159, 3), rounded(math.nan, 3)
    (3.14, None)
    """
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None
