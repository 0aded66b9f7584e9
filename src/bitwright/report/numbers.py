"""Numbers as text, the same way in the verdict, in tables and on charts. Plain ASCII: the page sets its own minus signs."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["bytes_text", "column", "decimals", "fixed", "grouped", "percent", "signed", "significant"]

_UNITS = ("bytes", "kB", "MB", "GB", "TB")


def bytes_text(count: float) -> str:
    """Bytes in the unit that reads best, with three or four digits.

    >>> bytes_text(7467840), bytes_text(15_270_000_000), bytes_text(512)
    ('7.47 MB', '15.3 GB', '512 bytes')
    """
    # No more than the last unit, and never "1000 MB".
    power = max(0, min(len(_UNITS) - 1, math.floor(math.log10(count * 1.0005) / 3))) if count >= 1 else 0
    if power == 0:
        return f"{count:.0f} bytes"
    value = count / 1000**power
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {_UNITS[power]}"


def grouped(count: int) -> str:
    """A count with commas between thousands.

    >>> grouped(1234567)
    '1,234,567'
    """
    return f"{count:,}"


def fixed(value: float, places: int) -> str:
    """With this many decimals; what is no number is named, and a rounded zero has no sign.

    >>> fixed(-0.0001, 2), fixed(float("inf"), 2), fixed(3.14159, 2)
    ('0.00', 'infinite', '3.14')
    """
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite" if value > 0 else "-infinite"
    if abs(value) >= 1e9:
        return f"{value:.2e}"
    text = f"{value:.{places}f}"
    return text[1:] if text.startswith("-") and not text.strip("-0.") else text


def significant(value: float, figures: int = 3) -> str:
    """With this many significant figures, without an exponent wherever that can be read.

    >>> significant(0.0031234, 2), significant(35.6012, 4), significant(1234.5, 3), significant(3.2e-9)
    ('0.0031', '35.60', '1234', '3.20e-09')
    """
    if not math.isfinite(value) or value == 0:
        return fixed(value, 0)
    if abs(value) < 1e-6 or abs(value) >= 1e9:
        return f"{value:.{figures - 1}e}"
    return fixed(value, decimals([value], figures, most=12))


def decimals(values: Sequence[float], figures: int, *, most: int = 6) -> int:
    """Decimals with which the smallest of the values, zero apart, still has that many figures.

    >>> decimals([0.0031, 0.42], 2), decimals([123.4, 99.5], 4), decimals([0.0], 3)
    (4, 2, 0)
    """
    sizes = [abs(value) for value in values if value and math.isfinite(value)]
    if not sizes:
        return 0
    # Rounding may carry into another digit: 0.0999 to two figures is 0.10.
    lead = math.floor(math.log10(float(f"{min(sizes):.{figures - 1}e}")))
    return max(0, min(most, figures - 1 - lead))


def column(values: Sequence[float | None], figures: int, *, most: int = 6) -> list[str]:
    """One column of a table: all with the same decimals, so that the points stand below each other; "" for None.

    >>> column([0.0031, None, 0.42], 2)
    ['0.0031', '', '0.4200']
    """
    places = decimals([value for value in values if value is not None], figures, most=most)
    return ["" if value is None else fixed(value, places) for value in values]


def signed(value: float, places: int) -> str:
    """With its sign, unless it rounds to zero.

    >>> signed(0.49, 1), signed(-2, 0), signed(0.004, 1)
    ('+0.5', '-2', '0.0')
    """
    text = fixed(value, places)
    return f"+{text}" if value > 0 and (not math.isfinite(value) or text.strip("0.")) else text


def percent(value: float) -> str:
    """A change in percent with the figures that mean something.

    >>> percent(0.00537), percent(0.123), percent(3.2), percent(-0.00004)
    ('+0.54 %', '+12.3 %', '+320 %', '0.00 %')
    """
    size = abs(100 * value)
    return f"{signed(100 * value, 2 if size < 10 else 1 if size < 100 else 0)} %"
