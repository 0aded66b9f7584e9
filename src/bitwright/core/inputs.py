"""How a layer's inputs are quantized while it runs: the activation half of W8A8 and of the small floats.

Weights are stored quantized; inputs are quantized when the layer runs. A scheme carries an ``InputScheme`` in its ``inputs``; the static
ones need ranges that were measured on calibration text, stored as ``input_*`` parameters beside the weight's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from bitwright.core.tensor import TensorSpec
from bitwright.errors import InputError, NumericError, PlanError

__all__ = ["InputScheme"]

#: Largest value of each float type, by bits: float8 e4m3 and float4 e2m1.
_LARGEST = {8: 448.0, 4: 6.0}
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
#: Smallest scale; dividing by a smaller one could overflow.
_TINY = 2.0**-100


@dataclass(frozen=True, kw_only=True)
class InputScheme:
    """The numbers that a layer's inputs ``(tokens, columns)`` are rounded to.

    bits: 8 (int8, float8 e4m3) or 4 (float4 e2m1). number: "int" or "float". strategy: what shares a scale: "tensor" (everything),
    "token" (a row), "group" (``group_size`` columns of a token) or "tensor_group" (NVFP4: groups of 16 whose float8 scales share one
    static global scale). dynamic: scales are computed as the layer runs, else measured before ("tensor_group": the global one).
    symmetric: zero stands for zero, else an int8 zero point is fitted ("tensor" and "token"). power_of_two: group scales are powers of
    two (the microscaling formats). threshold: columns that hold a larger magnitude are computed in 16 bits (LLM.int8,
    arXiv:2208.07339, section 3.2); 0 means none.

    int8 codes are -128 .. 127. Symmetric scales put the largest magnitude at 127, so that only what lies beyond a static range becomes
    -128, as it does in serving engines. Values that are NaN stay NaN; infinite ones give NaN where scales are dynamic.
    """

    bits: int = 8
    number: Literal["int", "float"] = "int"
    strategy: Literal["tensor", "token", "group", "tensor_group"] = "token"
    dynamic: bool = True
    symmetric: bool = True
    group_size: int | None = None
    power_of_two: bool = False
    threshold: float = 0.0

    def __post_init__(self) -> None:
        if (self.number, self.bits) not in (("int", 8), ("float", 8), ("float", 4)):
            raise PlanError(f"inputs of {self.bits} bits, {self.number}, are unknown", mend="use int 8, float 8 or 4")
        if self.strategy not in ("tensor", "token", "group", "tensor_group"):
            raise PlanError(f"input strategy '{self.strategy}' is unknown", mend="use tensor, token or group")
        grouped = self.strategy in ("group", "tensor_group")
        if grouped != (self.group_size is not None) or (self.group_size is not None and self.group_size < 1):
            raise PlanError(
                "group_size belongs to the input strategies group and tensor_group, and to no other",
                mend="give both, strategy: group and group_size: 128, or neither",
            )
        possible = {"tensor": (True, False), "tensor_group": (False,)}.get(self.strategy, (True,))
        if self.dynamic not in possible:
            now, then = ("dynamic", "false") if self.dynamic else ("static", "true")
            raise PlanError(f"input strategy {self.strategy} cannot be {now}", mend=f"use dynamic: {then}")
        if not self.symmetric and (self.number != "int" or grouped):
            raise PlanError("only int8 inputs per tensor or token have a zero point", mend="use symmetric inputs")
        if self.power_of_two and self.strategy != "group":
            raise PlanError("only scales of groups are powers of two", mend="use strategy group, or drop power_of_two")
        if self.threshold < 0 or (self.threshold > 0 and (self.number, self.strategy) != ("int", "token")):
            raise PlanError("a threshold belongs to int8 inputs per token", mend="drop it")

    @property
    def largest(self) -> float:
        """The largest magnitude that a scale of one stands for."""
        return 127.0 if self.number == "int" else _LARGEST[self.bits]

    def param_spec(self) -> tuple[TensorSpec, ...]:
        """The static parameters: ``input_scale (1,)`` float32, ``input_zero (1,)`` int8 where asymmetric; none where dynamic.

        For "tensor_group" ``input_scale`` is the global scale as a multiplier: amax / (448 * 6).
        """
        if self.dynamic:
            return ()
        scale = TensorSpec("input_scale", (1,), torch.float32)
        return (scale,) if self.symmetric else (scale, TensorSpec("input_zero", (1,), torch.int8))

    def fit(self, low: float, high: float) -> dict[str, torch.Tensor]:
        """Static parameters for inputs between ``low`` and ``high``; {} where dynamic."""
        if self.dynamic:
            return {}
        low, high = min(low, 0.0), max(high, 0.0)
        if not (low > float("-inf") and high < float("inf")):
            raise NumericError("the range of a layer's inputs is not finite", mend="run the calibration in float32")
        if self.symmetric:
            steps = self.largest * (448.0 if self.strategy == "tensor_group" else 1.0)
            scale = torch.tensor([max(max(-low, high) / steps, _TINY)], dtype=torch.float32)
            # Files store the reciprocal of a global scale; this way round it comes back the same for every float32.
            return {"input_scale": 1.0 / (1.0 / scale) if self.strategy == "tensor_group" else scale}
        scale = torch.tensor([max((high - low) / 255.0, _TINY)], dtype=torch.float32)
        zero = torch.round(-128.0 - low / scale).clamp_(-128, 127)
        return {"input_scale": scale, "input_zero": zero.to(torch.int8)}

    def scale_of(
        self, x: torch.Tensor, params: Mapping[str, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale, and zero point where asymmetric: float32, broadcasting against ``x``, with its last axis cut into groups if there are any.

        params: the static parameters. Raises InputError where they are missing or the columns do not divide into groups.
        """
        view = self._view(x.float())
        if not self.dynamic:
            if params is None or "input_scale" not in params:
                raise InputError("static inputs have no input_scale", mend="quantize with calibration text")
            stored = params["input_scale"].to(x.device, torch.float32)
            if self.strategy == "tensor_group":
                amax = view.abs().amax(-1, keepdim=True)
                inner = (amax / (self.largest * stored)).clamp_(2.0**-9, 448.0).to(torch.float8_e4m3fn).float()
                return inner * stored, None
            return stored, None if self.symmetric else params["input_zero"].to(x.device, torch.float32)
        if not view.numel():  # an expert that no token reached has no largest value
            one = torch.ones((), device=x.device)
            return one, None if self.symmetric else torch.zeros_like(one)
        over = tuple(range(view.dim())) if self.strategy == "tensor" else (-1,)
        if not self.symmetric:
            low, high = view.amin(over, keepdim=True).clamp_max(0), view.amax(over, keepdim=True).clamp_min(0)
            scale = ((high - low) / 255.0).clamp_min(_TINY)
            return scale, torch.round(-128.0 - low / scale).clamp_(-128, 127)
        amax = view.abs().amax(over, keepdim=True)
        if self.power_of_two:
            # OCP Microscaling Formats 1.0, section 6.3: the exponent of amax less that of the largest element.
            exponent = torch.frexp(amax.clamp_min(_TINY))[1] - math.frexp(self.largest)[1]
            # frexp gives NaN and infinity any exponent.
            return torch.exp2(exponent.float()).masked_fill_(~torch.isfinite(amax), math.nan), None
        return (amax / self.largest).clamp_min(_TINY), None

    def codes(self, x: torch.Tensor, params: Mapping[str, torch.Tensor] | None = None) -> tuple[torch.Tensor, ...]:
        """Codes, scale and zero point (0 where symmetric), all float32, with ``x ~ (codes - zero) * scale``.

        codes: values on the code grid, in the shape of ``x`` but for its last axis being cut into ``(groups, group_size)`` where
        there are groups; scale and zero point broadcast against it.
        """
        scale, zero = self.scale_of(x, params)
        view = self._view(x.float()) / scale
        if self.number == "int":
            view = (view if zero is None else view + zero).round().clamp(-128, 127)
        elif self.bits == 8:
            view = view.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float()
        else:
            view = _round_e2m1(view)
        return view, scale, torch.zeros((), device=x.device) if zero is None else zero

    def apply(self, x: torch.Tensor, params: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """``x (..., columns)`` rounded to the grid and back, in its own dtype; outlier columns above ``threshold`` untouched."""
        if self.threshold > 0:
            flat = x.reshape(-1, x.shape[-1])
            outliers = (flat.abs() > self.threshold).any(0)
            rest = flat.masked_fill(outliers, 0.0)
            codes, scale, zero = self.codes(rest, params)
            return torch.where(outliers, flat, ((codes - zero) * scale).to(x.dtype)).reshape(x.shape)
        codes, scale, zero = self.codes(x, params)
        return ((codes - zero) * scale).reshape(x.shape).to(x.dtype)

    def _view(self, x: torch.Tensor) -> torch.Tensor:
        if self.group_size is None:
            return x
        if x.shape[-1] % self.group_size:
            raise InputError(f"{x.shape[-1]} columns are not a multiple of input group size {self.group_size}")
        return x.reshape(*x.shape[:-1], x.shape[-1] // self.group_size, self.group_size)

    def describe(self) -> str:
        """A few words for tables.

        >>> InputScheme(number="float", strategy="tensor", dynamic=False).describe()
        'fp8 tensor static'
        >>> InputScheme(bits=4, number="float", strategy="group", group_size=32, power_of_two=True).describe()
        'fp4 group 32'
        """
        kind = ("int" if self.number == "int" else "fp") + str(self.bits)
        words = [kind, self.strategy, *([str(self.group_size)] if self.group_size else [])]
        words += [] if self.symmetric else ["asym"]
        words += [] if self.dynamic else ["static"]
        return " ".join(words + ([f"outliers above {self.threshold:g}"] if self.threshold else []))

    def to_spec(self) -> dict[str, Any]:
        """Only what differs from the defaults, as JSON."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}


def _round_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Nearest float4 e2m1 value, ties to the even code."""
    levels = torch.tensor(_E2M1, device=x.device)
    middles = (levels[1:] + levels[:-1]) / 2
    magnitude = x.abs()
    code = torch.bucketize(magnitude, middles)  # a tie goes to the lower code
    tie = (magnitude == middles[code.clamp_max(len(middles) - 1)]) & (code < len(middles))
    code = code + (tie & (code % 2 == 1))
    # bucketize takes NaN for larger than everything.
    return torch.where(magnitude.isnan(), x, torch.copysign(levels[code], x))
