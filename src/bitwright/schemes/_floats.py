"""Small floats: float8 e4m3 and e5m2, float4 e2m1, and the power-of-two scale e8m0.

=========== ====== ======== ======== ============== =========================================
element     bits   exponent mantissa largest value  special codes
=========== ====== ======== ======== ============== =========================================
``e4m3``    8      4        3        448            NaN alone (exponent and mantissa all ones)
``e5m2``    8      5        2        57344          infinities and NaN (exponent all ones)
``e2m1``    4      2        1        6              none
``e8m0``    8      8        0        2^127          NaN (255)
=========== ====== ======== ======== ============== =========================================

e4m3 and e5m2: arXiv:2209.05433, table 1. e2m1 and e8m0: OCP Microscaling Formats 1.0, sections 5.3.3 and 5.4.1. Rounding is to the
nearest value, ties to the even code, and saturates: no finite input becomes infinite or NaN.
"""

from __future__ import annotations

import torch

from bitwright.errors import NumericError

__all__ = ["DTYPES", "LARGEST", "decode_e8m0", "decode_element", "encode_element", "finite", "table"]

#: float8 element -> torch dtype
DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0, "e2m1": 6.0}
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def encode_element(values: torch.Tensor, element: str) -> torch.Tensor:
    """Codes of the nearest elements: uint8, the raw byte of a float8, the nibble of a float4 (sign in bit 3).

    >>> encode_element(torch.tensor([0.25, 0.75, -5.0, 100.0]), "e2m1").tolist()
    [0, 2, 14, 7]
    >>> [hex(code) for code in encode_element(torch.tensor([1.0, -448.0, 1e6]), "e4m3").tolist()]
    ['0x38', '0xfe', '0x7e']
    """
    if element != "e2m1":
        largest = LARGEST[element]
        return values.clamp(-largest, largest).to(DTYPES[element]).view(torch.uint8)
    size = values.abs()
    # Within each octave the values are evenly spaced, and every difference below is exact, so that torch's rounding to even
    # decides ties as the format does: 2.5 -> 2 (code 4), 3.5 -> 4 (code 6).
    codes = torch.where(size < 4, (size - 2).round_() + 4, (size / 2 - 2).round_() + 6)
    codes = torch.where(size < 2, (size * 2).round_(), codes).clamp_(max=7).to(torch.uint8)
    return codes | (torch.signbit(values).to(torch.uint8) << 3)


def decode_element(codes: torch.Tensor, element: str) -> torch.Tensor:
    """float32 values of the codes.

    >>> decode_element(torch.tensor([7, 9], dtype=torch.uint8), "e2m1").tolist()
    [6.0, -0.5]
    """
    if element != "e2m1":
        return codes.view(DTYPES[element]).float()
    return torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=codes.device)[codes.long()]


def decode_e8m0(exponents: torch.Tensor) -> torch.Tensor:
    """``2^(byte - 127)`` in float32. 0 stands for 2^-127, a subnormal number there.

    >>> decode_e8m0(torch.tensor([127, 130, 0], dtype=torch.uint8)).tolist()[:2]
    [1.0, 8.0]
    """
    return exponents.view(torch.float8_e8m0fnu).float()


def table(element: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Every finite value once, ascending, float32, and the code of each, uint8. Zero is the positive one.

    >>> values, codes = table("e2m1")
    >>> values.tolist()[:3], codes.tolist()[:3]
    ([-6.0, -4.0, -3.0], [15, 14, 13])
    """
    codes = torch.arange(16 if element == "e2m1" else 256, dtype=torch.uint8)
    values = decode_element(codes, element)
    wanted = torch.isfinite(values) & ~((values == 0) & torch.signbit(values))
    values, codes = values[wanted], codes[wanted]
    order = torch.argsort(values)
    return values[order], codes[order]


def finite(amax: torch.Tensor) -> torch.Tensor:
    """The argument. Raises NumericError where a largest magnitude is infinite or NaN."""
    if not bool(torch.isfinite(amax).all()):
        raise NumericError("a weight is not finite", mend="look for NaN and infinities in the checkpoint")
    return amax
