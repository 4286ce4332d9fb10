"""Times as people write them."""

import re

from schemas.errors import UsageError

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration(text: str) -> float:
    """Seconds of "90s", "30m", "12h" or "7d".

    Raises:
        UsageError: it is none of these.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhd])", text.strip())
    if match is None:
        raise UsageError(f"{text!r} is no time; write it like 90s, 30m, 12h or 7d")
    return float(match[1]) * _UNITS_S[match[2]]
