"""A quantized weight in another layout's terms: the same decoded numbers, nothing quantized anew.

Grids that differ on paper often hold the same numbers. What is known here to be the same, bit for bit in float32:

==================================== ==============================================================================================
symmetric                            asymmetric with a zero point of 2^(bits-1) everywhere
one group a row                      per channel; per tensor is per channel with one scale repeated
zero points >= 1                     zero points of any value, where none is 0 (the v1 form of GPTQ files)
a scale in one dtype                 the same scale in another, where that holds every scale exactly
a group index in whole, aligned runs groups without an index, their parameters put in order
8 bits symmetric per channel         int8 codes with a row's largest magnitude (LLM.int8): scale = fl(absmax / 127)
==================================== ==============================================================================================

``lossy`` allows one thing more: scales are rounded to the dtype that the layout demands.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from bitwright import catalog
from bitwright.core.inputs import InputScheme
from bitwright.core.layout import Layout
from bitwright.core.quantized import QuantizedTensor
from bitwright.core.scheme import Params, Scheme
from bitwright.core.tensor import parse_dtype
from bitwright.engine.tensors import decoded_hash
from bitwright.errors import NumericError, PlanError, VerifyError
from bitwright.schemes.affine import Affine
from bitwright.schemes.affine_indexed import AffineIndexed

__all__ = ["express", "forms", "regrid"]

#: The scheme of LLM.int8 weights, by its name in the catalog.
_ABSMAX = "absmax-int8"


def regrid(q: QuantizedTensor, layout: Layout, model_dtype: torch.dtype, *, lossy: bool = False) -> QuantizedTensor:
    """``q`` in the first of ``forms`` that its parameters allow.

    model_dtype: what the checkpoint's other tensors have, which some layouts want scales in too. lossy: scales may be rounded. Raises
    PlanError with the reason where no form holds the same numbers, NumericError where a rounded scale overflows.
    """
    first: PlanError | None = None
    for scheme in forms(q.scheme, q.shape, layout, model_dtype):
        try:
            result, worst = express(q, scheme, lossy=lossy)
        except PlanError as error:
            first = first or error
            continue
        if worst == 0.0 and decoded_hash(result) != decoded_hash(q):
            raise VerifyError(f"{q.scheme.describe()} decodes otherwise as {scheme.describe()}", mend="report this")
        return result
    assert first is not None
    raise first


def forms(scheme: Scheme, shape: tuple[int, int], layout: Layout, model_dtype: torch.dtype) -> tuple[Scheme, ...]:
    """Schemes in which ``layout`` may store the numbers of a weight in ``scheme``, the nearest first; from headers alone.

    Whether a weight's parameters allow one of them, ``express`` tells. Raises PlanError with the layout's reason where there is none.
    """
    limits = layout.limits(model_dtype)
    found: dict[Scheme, None] = {}
    refusal: str | None = None
    for other in _equivalent(scheme, shape):
        limited = other.limit(limits)
        reason = layout.accepts(limited, shape)
        if reason is None:
            found.setdefault(limited)
        refusal = refusal or reason
    if not found:
        raise PlanError(
            f"layout {layout.name} cannot store it: {refusal}", mend="use --layout native, or --layout dense"
        )
    return tuple(found)


def _equivalent(scheme: Scheme, shape: tuple[int, int]) -> Iterator[Scheme]:
    """Schemes that may hold the same numbers, the scheme itself first. Scale dtypes and zero point limits are left to the layout."""
    columns = shape[1]
    if isinstance(scheme, Affine):
        plain = replace(scheme, zero_min=0)
        for where in _granularities(plain, columns):
            for symmetric in (where, replace(where, symmetric=not where.symmetric, symmetric_range="full")):
                yield symmetric
                if symmetric.symmetric_range != "full":
                    yield replace(symmetric, symmetric_range="full")
        if scheme.bits == 8 and plain.span(columns) == columns:
            yield from _absmax(scheme.inputs)
        return
    yield scheme
    if isinstance(scheme, AffineIndexed):
        common: dict[str, Any] = {"bits": scheme.bits, "scale_dtype": scheme.scale_dtype}
        if columns % scheme.group_size == 0:
            grouped = Affine(group_size=scheme.group_size, symmetric=False, **common)
            yield from _equivalent(grouped, shape)
        elif scheme.group_size > columns:
            yield from _equivalent(Affine(granularity="channel", symmetric=False, **common), shape)
    elif scheme.kind == _ABSMAX:
        # LLM.int8 keeps large inputs apart as it runs; where a layout cannot say so, all inputs are int8, or none.
        tokens = replace(scheme.inputs, threshold=0.0) if scheme.inputs is not None else None
        for inputs in dict.fromkeys((scheme.inputs, tokens, None)):
            channel = Affine(bits=8, granularity="channel", scale_dtype="float32", inputs=inputs)
            yield channel
            yield replace(channel, symmetric=False)


def _granularities(scheme: Affine, columns: int) -> Iterator[Affine]:
    yield scheme
    if scheme.granularity == "group" and scheme.group_size == columns:
        yield replace(scheme, granularity="channel")
    elif scheme.granularity == "channel":
        yield replace(scheme, granularity="group", group_size=columns)
    elif scheme.granularity == "tensor":
        yield replace(scheme, granularity="channel")
        yield replace(scheme, granularity="group", group_size=columns)


def _absmax(inputs: InputScheme | None) -> Iterator[Scheme]:
    """With the inputs as they are, and as LLM.int8 has them: int8 tokens, columns beyond 6 apart (arXiv:2208.07339, section 3.2)."""
    plugin = catalog.load("schemes", _ABSMAX)
    yield plugin(inputs=inputs)
    yield plugin(inputs=InputScheme(threshold=6.0))


def express(q: QuantizedTensor, scheme: Scheme, *, lossy: bool = False) -> tuple[QuantizedTensor, float]:
    """``q`` in ``scheme``, and by how much its scales changed at worst: relative, 0 where the numbers are the same.

    Parameters decide, codes stay as they are. Raises PlanError where ``scheme`` does not hold the same numbers, NumericError where a
    rounded scale overflows.
    """
    if isinstance(scheme, Affine) and (isinstance(q.scheme, Affine | AffineIndexed) or q.scheme.kind == _ABSMAX):
        params, worst = _to_affine(q, scheme, lossy)
    elif scheme.kind == _ABSMAX and isinstance(q.scheme, Affine):
        params, worst = _to_absmax(q, scheme, lossy)
    elif type(scheme) is type(q.scheme):
        params, worst = _cast_all(q, scheme, lossy)
    else:
        raise PlanError(
            f"{q.scheme.describe()} is not {scheme.describe()}", mend="use --layout native, or --layout dense"
        )
    return QuantizedTensor(scheme, q.shape, q.codes, params, q.outliers, q.inputs), worst


def _to_affine(q: QuantizedTensor, scheme: Affine, lossy: bool) -> tuple[Params, float]:
    rows, groups = scheme.grid(q.shape)
    scale, zero = _scale_and_zero(q)
    bits = (q.scheme.levels - 1).bit_length()
    if bits != scheme.bits or scale.shape[1] != groups:
        raise PlanError(
            f"{q.scheme.describe()} is not {scheme.describe()}", mend="use --layout native, or --layout dense"
        )
    if len(scale) == 1 and rows > 1:
        scale = scale.expand(rows, -1).contiguous()
        zero = zero.expand(rows, -1).contiguous() if zero is not None else None
    if scheme.low and not (isinstance(q.scheme, Affine) and q.scheme.low) and int(q.codes.min()) < scheme.low:
        raise PlanError("it uses the most negative code, which the narrow range leaves out", mend="use --layout native")
    stored, worst = _cast(scale, parse_dtype(scheme.scale_dtype), lossy)
    params = {"scale": stored}
    if not scheme.symmetric:
        params["zero"] = torch.full_like(stored, scheme.middle, dtype=torch.uint8) if zero is None else zero
        if scheme.zero_min and int(params["zero"].min()) < scheme.zero_min:
            count = int((params["zero"] < scheme.zero_min).sum())
            raise PlanError(
                f"{count} of its zero points are 0, which v1 files cannot hold",
                mend="use --layout-option checkpoint_format=gptq_v2",
            )
    elif zero is not None and bool((zero != scheme.middle).any()):
        count = int((zero != scheme.middle).sum())
        raise PlanError(
            f"{count} of {zero.numel()} zero points lie off the middle: it is not symmetric",
            mend="use a layout that stores zero points",
        )
    return params, worst


def _scale_and_zero(q: QuantizedTensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``(rows, groups)`` scales and zero points (None: the middle) of neighbouring columns."""
    if q.scheme.kind == _ABSMAX:
        return q.params["absmax"].float() / 127.0, None
    scale, zero = q.params["scale"], q.params.get("zero")
    if not isinstance(q.scheme, AffineIndexed):
        return scale, zero
    assert zero is not None
    order = _order_of_groups(q)
    return scale[:, order].contiguous(), zero[:, order].contiguous()


def _order_of_groups(q: QuantizedTensor) -> torch.Tensor:
    """Which stored group each run of ``group_size`` columns has; PlanError where columns of several groups are mixed."""
    assert isinstance(q.scheme, AffineIndexed)
    index, size = q.params["g_idx"].long(), q.scheme.group_size
    if len(index) % size and len(index) > size:
        raise PlanError(
            f"{len(index)} columns are not a multiple of group_size {size}: the last group is short",
            mend="use --layout native, or --layout dense",
        )
    runs = index.view(-1, min(size, len(index)))
    if not bool((runs == runs[:, :1]).all()):
        raise PlanError(
            "its columns were grouped in activation order (act-order), which only an index column by column can say",
            mend="use --layout native, or --layout dense",
        )
    return runs[:, 0]


def _to_absmax(q: QuantizedTensor, scheme: Scheme, lossy: bool) -> tuple[Params, float]:
    scale, zero = _scale_and_zero(q)
    if q.scheme.levels != 256 or scale.shape[1] != 1 or (zero is not None and bool((zero != 128).any())):
        raise PlanError(
            f"{q.scheme.describe()} is not {scheme.describe()}", mend="use --layout native, or --layout dense"
        )
    scale = scale.float().expand(q.shape[0], -1)
    # Exact where the scale has at most 17 significant bits (float16, bfloat16): 127 times it is a float32, and the quotient is again it.
    absmax = scale * 127.0
    back = absmax / 127.0
    worst = _compare(scale, back, "float32 / 127", lossy)
    return {"absmax": absmax.contiguous()}, worst


def _cast_all(q: QuantizedTensor, scheme: Scheme, lossy: bool) -> tuple[Params, float]:
    """The same scheme under other limits: parameters in the dtypes that it states."""
    params, worst = {}, 0.0
    for spec in scheme.param_spec(q.shape):
        value = q.params.get(spec.name)
        if value is None or tuple(value.shape) != spec.shape:
            raise PlanError(
                f"{q.scheme.describe()} is not {scheme.describe()}", mend="use --layout native, or --layout dense"
            )
        params[spec.name], off = _cast(value, spec.dtype, lossy)
        worst = max(worst, off)
    return params, worst


def _cast(value: torch.Tensor, dtype: torch.dtype, lossy: bool) -> tuple[torch.Tensor, float]:
    if value.dtype == dtype:
        return value, 0.0
    stored = value.to(dtype)
    return stored, _compare(value, stored, str(dtype).removeprefix("torch."), lossy)


def _compare(value: torch.Tensor, stored: torch.Tensor, what: str, lossy: bool) -> float:
    """The worst relative difference; PlanError where there is one and ``lossy`` does not allow it."""
    before, after = value.double(), stored.double()
    wrong = before != after
    count = int(wrong.sum())
    if not count:
        return 0.0
    worst = float(((after - before)[wrong] / before[wrong]).abs().max())
    if not bool(torch.isfinite(after).all()):
        raise NumericError(
            f"a scale of {float(before.abs().max()):.4g} overflows {what}",
            mend="use --layout native, or --layout dense",
        )
    if not lossy:
        own = str(value.dtype).removeprefix("torch.")
        raise PlanError(
            f"{count} of {value.numel()} scales are not exact in {what} (by up to {worst:.1e})",
            mend=f"--lossy rounds them; where the layout wants scales in the model's dtype, --dtype {own} keeps them",
        )
    return worst
