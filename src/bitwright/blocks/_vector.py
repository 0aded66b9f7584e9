"""Vectors for numba code: ``LANES`` independent blocks in step, one block in each lane.

ggml sums strictly left to right, which no compiler may vectorise within a block. Sixteen blocks side by side keep every block's order
and fill the widest registers: lane k of every vector belongs to block k. Numba's own loops leave the choice of width to LLVM, which
takes half registers and keeps sums in memory; these types are LLVM vectors, and arithmetic on them reads like arithmetic on numbers.

A vector holds float32 (``F``), int32 (``I``) or truth values (``M``, from comparisons). Operators work on vectors of a kind and on a
vector and a number. Nothing is contracted or reordered. On machines with narrower registers LLVM splits the vectors.
"""

# Numba calls every emitter with the same four arguments.
# ruff: noqa: ARG005

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing import signature
from numba.core.typing.templates import AbstractTemplate, infer_global
from numba.extending import intrinsic, lower_builtin, models, register_model

__all__ = [
    "LANES", "absolute", "any_lane", "bits", "lane_bits", "lane_numbers", "larger", "load", "load_bytes", "nearest", "number",
    "offset_to", "rint", "select", "smaller", "splat", "splat_int", "sqrt", "store", "store_bytes", "to_float",
    "to_int", "transpose", "transpose_bytes",
]  # fmt: skip

#: Blocks in step.
LANES = 16

_ELEMENT = {"f32": ir.FloatType(), "i32": ir.IntType(32), "bool": ir.IntType(1)}


class Lanes(types.Type):  # type: ignore[misc]
    """The numba type of a vector of ``LANES`` elements."""

    def __init__(self, element: str) -> None:
        self.element = element
        self.vector = ir.VectorType(_ELEMENT[element], LANES)
        super().__init__(name=f"Lanes{LANES}({element})")


@register_model(Lanes)
class _Model(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, dmm: Any, fe_type: Lanes) -> None:
        super().__init__(dmm, fe_type, fe_type.vector)


F, I, M = Lanes("f32"), Lanes("i32"), Lanes("bool")  # noqa: E741


def _spread(builder: Any, value: Any, kind: Lanes) -> Any:
    """A vector with ``value`` in every lane."""
    zero = ir.Constant(ir.IntType(32), 0)
    one = builder.insert_element(ir.Constant(kind.vector, ir.Undefined), value, zero)
    mask = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [zero] * LANES)
    return builder.shuffle_vector(one, ir.Constant(kind.vector, ir.Undefined), mask)


def _as_lanes(context: Any, builder: Any, value: Any, given: Any, kind: Lanes) -> Any:
    if isinstance(given, Lanes):
        return value
    return _spread(builder, context.cast(builder, value, given, types.float32 if kind is F else types.int32), kind)


def _operator(function: Any, table: dict[Lanes, tuple[Lanes, Callable[[Any, Any, Any], Any]]]) -> None:
    """Teach numba ``function`` on two vectors, or a vector and a number. table: kind -> (kind of the result, how it is emitted)."""

    class Template(AbstractTemplate):  # type: ignore[misc]
        key = function

        def generic(self, args: Any, kws: Any) -> Any:
            del kws
            kinds = {a for a in args if isinstance(a, Lanes)}
            others = [a for a in args if not isinstance(a, Lanes)]
            if len(args) != 2 or len(kinds) != 1 or not all(isinstance(a, types.Number) for a in others):
                return None
            (kind,) = kinds
            return signature(table[kind][0], *args) if kind in table else None

    infer_global(function)(Template)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = next(a for a in sig.args if isinstance(a, Lanes))
        a, b = (_as_lanes(context, builder, v, t, kind) for v, t in zip(args, sig.args, strict=True))
        return table[kind][1](builder, a, b)

    for pair in ((Lanes, Lanes), (Lanes, types.Number), (types.Number, Lanes)):
        lower_builtin(function, *pair)(lower)


def _compare(sign: str) -> dict[Lanes, tuple[Lanes, Callable[[Any, Any, Any], Any]]]:
    # "!=" is true for NaN, every other comparison false, as in C.
    floats = "fcmp_unordered" if sign == "!=" else "fcmp_ordered"
    return {
        F: (M, lambda builder, a, b: getattr(builder, floats)(sign, a, b)),
        I: (M, lambda builder, a, b: builder.icmp_signed(sign, a, b)),
    }


_operator(operator.add, {F: (F, lambda b, x, y: b.fadd(x, y)), I: (I, lambda b, x, y: b.add(x, y))})
_operator(operator.sub, {F: (F, lambda b, x, y: b.fsub(x, y)), I: (I, lambda b, x, y: b.sub(x, y))})
_operator(operator.mul, {F: (F, lambda b, x, y: b.fmul(x, y)), I: (I, lambda b, x, y: b.mul(x, y))})
_operator(operator.truediv, {F: (F, lambda b, x, y: b.fdiv(x, y))})
_operator(operator.and_, {I: (I, lambda b, x, y: b.and_(x, y)), M: (M, lambda b, x, y: b.and_(x, y))})
_operator(operator.or_, {I: (I, lambda b, x, y: b.or_(x, y)), M: (M, lambda b, x, y: b.or_(x, y))})
_operator(operator.xor, {I: (I, lambda b, x, y: b.xor(x, y)), M: (M, lambda b, x, y: b.xor(x, y))})
_operator(operator.lshift, {I: (I, lambda b, x, y: b.shl(x, y))})
_operator(operator.rshift, {I: (I, lambda b, x, y: b.lshr(x, y))})  # logical: the sign bit is a bit
for _function, _sign in (
    (operator.lt, "<"), (operator.le, "<="), (operator.gt, ">"), (operator.ge, ">="), (operator.eq, "=="), (operator.ne, "!=")
):  # fmt: skip
    _operator(_function, _compare(_sign))
# In-place forms on immutable values.
_operator(operator.iadd, {F: (F, lambda b, x, y: b.fadd(x, y)), I: (I, lambda b, x, y: b.add(x, y))})
_operator(operator.isub, {F: (F, lambda b, x, y: b.fsub(x, y)), I: (I, lambda b, x, y: b.sub(x, y))})
_operator(operator.ior, {I: (I, lambda b, x, y: b.or_(x, y)), M: (M, lambda b, x, y: b.or_(x, y))})
_operator(operator.iand, {I: (I, lambda b, x, y: b.and_(x, y)), M: (M, lambda b, x, y: b.and_(x, y))})


class _Invert(AbstractTemplate):  # type: ignore[misc]
    key = operator.invert

    def generic(self, args: Any, kws: Any) -> Any:
        del kws
        return signature(M, M) if args[0] is M else None


infer_global(operator.invert)(_Invert)
lower_builtin(operator.invert, Lanes)(lambda context, builder, sig, args: builder.not_(args[0]))


def _unary(result: Lanes, kind: Lanes, emit: Callable[[Any, Any], Any]) -> Any:
    """An intrinsic of one vector."""

    def typed(typingctx: Any, x: Any) -> Any:
        del typingctx
        if x is not kind:
            return None
        return signature(result, x), lambda context, builder, sig, args: emit(builder, args[0])

    return intrinsic(typed)


def _call(name: str) -> Callable[[Any, Any], Any]:
    def emit(builder: Any, x: Any) -> Any:
        kind = ir.FunctionType(x.type, [x.type])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"{name}.v{LANES}f32"), [x])

    return emit


sqrt = _unary(F, F, _call("llvm.sqrt"))
absolute = _unary(F, F, _call("llvm.fabs"))
#: Rounds half to even.
rint = _unary(F, F, _call("llvm.nearbyint"))
#: The bits of every float as an integer, and back.
bits = _unary(I, F, lambda b, x: b.bitcast(x, I.vector))
number = _unary(F, I, lambda b, x: b.bitcast(x, F.vector))
to_float = _unary(F, I, lambda b, x: b.sitofp(x, F.vector))
#: Towards zero; what lies outside of int32 must be masked before.
to_int = _unary(I, F, lambda b, x: b.fptosi(x, I.vector))


@intrinsic  # type: ignore[untyped-decorator]
def any_lane(typingctx: Any, mask: Any) -> Any:
    """True where at least one lane is true."""
    del typingctx
    if mask is not M:
        return None

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        del context, sig
        word = ir.IntType(LANES)
        return builder.icmp_unsigned("!=", builder.bitcast(args[0], word), ir.Constant(word, 0))

    return signature(types.boolean, mask), emit


@intrinsic  # type: ignore[untyped-decorator]
def lane_bits(typingctx: Any, mask: Any) -> Any:
    """The truth of lane k as bit k of an integer."""
    del typingctx
    if mask is not M:
        return None

    def emit(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return builder.zext(builder.bitcast(args[0], ir.IntType(LANES)), ir.IntType(64))

    return signature(types.int64, mask), emit


@intrinsic  # type: ignore[untyped-decorator]
def select(typingctx: Any, mask: Any, a: Any, b: Any) -> Any:
    """Lane by lane ``a`` where the mask is true, else ``b``; numbers stand for vectors."""
    del typingctx
    numbers = I if isinstance(a, types.Integer) else F
    kind = next((v for v in (a, b) if isinstance(v, Lanes)), numbers)
    if mask is not M:
        return None

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        one, other = (_as_lanes(context, builder, args[i], sig.args[i], kind) for i in (1, 2))
        return builder.select(args[0], one, other)

    return signature(kind, mask, a, b), emit


def _splat(kind: Lanes) -> Any:
    def typed(typingctx: Any, value: Any) -> Any:
        del typingctx
        if not isinstance(value, types.Number):
            return None
        return signature(kind, value), lambda context, builder, sig, args: _as_lanes(
            context, builder, args[0], sig.args[0], kind
        )

    return intrinsic(typed)


@intrinsic  # type: ignore[untyped-decorator]
def lane_numbers(typingctx: Any) -> Any:
    """0, 1, 2 ... as integers."""
    del typingctx
    numbers = ir.Constant(I.vector, [ir.IntType(32)(k) for k in range(LANES)])
    return signature(I), lambda context, builder, sig, args: numbers


splat = _splat(F)
splat_int = _splat(I)


def _pointer(context: Any, builder: Any, array: Any, value: Any, index: Any) -> Any:
    data = context.make_array(array)(context, builder, value).data
    return builder.gep(data, [index])


@intrinsic  # type: ignore[untyped-decorator]
def load(typingctx: Any, array: Any, index: Any) -> Any:
    """The vector at ``array[index : index + LANES]``, a flat array of float32 or int32; unchecked."""
    del typingctx
    kind = {types.float32: F, types.int32: I}[array.dtype]

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        at = context.cast(builder, args[1], sig.args[1], types.intp)
        pointer = _pointer(context, builder, sig.args[0], args[0], at)
        return builder.load(builder.bitcast(pointer, kind.vector.as_pointer()), align=4, typ=kind.vector)

    return signature(kind, array, index), emit


@intrinsic  # type: ignore[untyped-decorator]
def store(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """Write a vector to ``array[index : index + LANES]``, a flat array of its element type; unchecked."""
    del typingctx
    if {types.float32: F, types.int32: I}[array.dtype] is not value:
        return None

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        at = context.cast(builder, args[1], sig.args[1], types.intp)
        pointer = _pointer(context, builder, sig.args[0], args[0], at)
        builder.store(args[2], builder.bitcast(pointer, value.vector.as_pointer()), align=4)
        return context.get_dummy_value()

    return signature(types.void, array, index, value), emit


_BYTES = ir.VectorType(ir.IntType(8), LANES)


@intrinsic  # type: ignore[untyped-decorator]
def load_bytes(typingctx: Any, array: Any, index: Any) -> Any:
    """``LANES`` bytes of a flat uint8 array as integers; unchecked."""
    del typingctx

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        at = context.cast(builder, args[1], sig.args[1], types.intp)
        pointer = _pointer(context, builder, sig.args[0], args[0], at)
        found = builder.load(builder.bitcast(pointer, _BYTES.as_pointer()), align=1, typ=_BYTES)
        return builder.zext(found, I.vector)

    return signature(I, array, index), emit


@intrinsic  # type: ignore[untyped-decorator]
def store_bytes(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """Write the low byte of every lane to a flat uint8 array; unchecked."""
    del typingctx
    if value is not I:
        return None

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        at = context.cast(builder, args[1], sig.args[1], types.intp)
        pointer = _pointer(context, builder, sig.args[0], args[0], at)
        builder.store(builder.trunc(args[2], _BYTES), builder.bitcast(pointer, _BYTES.as_pointer()), align=1)
        return context.get_dummy_value()

    return signature(types.void, array, index, value), emit


@intrinsic  # type: ignore[untyped-decorator]
def offset_to(typingctx: Any, array: Any, alignment: Any) -> Any:
    """How many elements lie before the first one whose address is a multiple of ``alignment`` bytes."""
    del typingctx

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        word = ir.IntType(64)
        start = builder.ptrtoint(context.make_array(sig.args[0])(context, builder, args[0]).data, word)
        size = context.cast(builder, args[1], sig.args[1], types.int64)
        rest = builder.urem(builder.neg(start), size)
        return builder.udiv(rest, ir.Constant(word, sig.args[0].dtype.bitwidth // 8))

    return signature(types.intp, array, alignment), emit


def _turn(builder: Any, rows: list[Any]) -> list[Any]:
    """``LANES`` vectors as the rows of a square matrix, transposed: squares of 1, 2, 4 ... elements change places."""
    step = 1
    while step < LANES:
        order = ir.VectorType(ir.IntType(32), LANES)
        upper = ir.Constant(order, [ir.IntType(32)(LANES + k - step if k & step else k) for k in range(LANES)])
        lower = ir.Constant(order, [ir.IntType(32)(LANES + k if k & step else k + step) for k in range(LANES)])
        for i in range(LANES):
            if not i & step:
                a, b = rows[i], rows[i + step]
                rows[i], rows[i + step] = builder.shuffle_vector(a, b, upper), builder.shuffle_vector(a, b, lower)
        step *= 2
    return rows


@intrinsic  # type: ignore[untyped-decorator]
def transpose(typingctx: Any, source: Any, starts: Any, element: Any, target: Any, index: Any) -> Any:
    """Bring values ``element .. element + LANES`` of every block into lanes: ``target[index + i * LANES + lane]`` becomes
    ``source[starts[lane] + element + i]``. source, target: flat float32; starts: int64, one per lane; unchecked.
    """
    del typingctx

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        element, index = (context.cast(builder, args[i], sig.args[i], types.intp) for i in (2, 4))
        rows = []
        for lane in range(LANES):
            place = _pointer(context, builder, sig.args[1], args[1], context.get_constant(types.intp, lane))
            at = builder.add(builder.load(place), element)
            pointer = _pointer(context, builder, sig.args[0], args[0], at)
            rows.append(builder.load(builder.bitcast(pointer, F.vector.as_pointer()), align=4, typ=F.vector))
        for i, row in enumerate(_turn(builder, rows)):
            at = builder.add(index, context.get_constant(types.intp, i * LANES))
            pointer = _pointer(context, builder, sig.args[3], args[3], at)
            builder.store(row, builder.bitcast(pointer, F.vector.as_pointer()), align=4)
        return context.get_dummy_value()

    return signature(types.void, source, starts, element, target, index), emit


@intrinsic  # type: ignore[untyped-decorator]
def transpose_bytes(typingctx: Any, source: Any, index: Any, target: Any, starts: Any, element: Any) -> Any:
    """The way back for ``LANES`` bytes of every block: ``target[starts[lane] + element + i]`` becomes
    ``source[index + i * LANES + lane]``. source, target: flat uint8; starts: int64, one per lane; unchecked.
    """
    del typingctx

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        index, element = (context.cast(builder, args[i], sig.args[i], types.intp) for i in (1, 4))
        rows = []
        for i in range(LANES):
            at = builder.add(index, context.get_constant(types.intp, i * LANES))
            pointer = _pointer(context, builder, sig.args[0], args[0], at)
            rows.append(builder.load(builder.bitcast(pointer, _BYTES.as_pointer()), align=1, typ=_BYTES))
        for lane, row in enumerate(_turn(builder, rows)):
            place = _pointer(context, builder, sig.args[3], args[3], context.get_constant(types.intp, lane))
            at = builder.add(builder.load(place), element)
            pointer = _pointer(context, builder, sig.args[2], args[2], at)
            builder.store(row, builder.bitcast(pointer, _BYTES.as_pointer()), align=1)
        return context.get_dummy_value()

    return signature(types.void, source, index, target, starts, element), emit


_MAGIC = np.float32(12582912.0)  # 1.5 * 2^23


@numba.njit(inline="always")
def larger(a, b):  # type: ignore[no-untyped-def]
    """Lane by lane ``a > b ? a : b``."""
    return select(a > b, a, b)


@numba.njit(inline="always")
def smaller(a, b):  # type: ignore[no-untyped-def]
    """Lane by lane ``a < b ? a : b``."""
    return select(a < b, a, b)


@numba.njit(inline="always")
def nearest(v):  # type: ignore[no-untyped-def]
    """ggml's ``nearest_int`` as an integer: half to even up to 2^22, and past it the low bits of the mantissa that ggml reads."""
    return (bits(v + _MAGIC) & 0x007FFFFF) - 0x00400000
