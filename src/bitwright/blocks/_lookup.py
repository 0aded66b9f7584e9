"""Tables in vector registers, for numba code that works on ``_vector``'s lanes.

A table of 16 numbers is itself a vector, and looking 16 numbers up at once is one instruction where the machine can permute registers
by variable indices (AVX-512), a few where it can do so with half as many (AVX2); elsewhere LLVM goes through memory.
``lowest_lane`` finds the best of 16 candidates.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing import signature
from numba.extending import intrinsic

from bitwright.blocks._vector import LANES, F, I, _pointer, _spread

__all__ = ["load_codes", "lookup", "lowest_lane", "lowest_place", "splat_at"]

_WORD = ir.IntType(32)
_CODES = ir.VectorType(ir.IntType(16), LANES)


def _by_halves(builder: Any, table: Any, index: Any) -> Any:
    """``lookup`` for machines that permute 8 numbers at once: bit 3 of an index tells the halves of the table apart."""

    def part(vector: Any, first: int, count: int) -> Any:
        mask = ir.Constant(ir.VectorType(_WORD, count), [_WORD(first + k) for k in range(count)])
        return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)

    eight = ir.VectorType(ir.FloatType(), 8)
    kind = ir.FunctionType(eight, [eight, ir.VectorType(_WORD, 8)])
    permute = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.permps")
    low, high = part(table, 0, 8), part(table, 8, 8)
    halves = []
    for first in (0, 8):
        places = part(index, first, 8)
        bit = builder.and_(places, ir.Constant(places.type, [_WORD(8)] * 8))
        upper = builder.icmp_unsigned("!=", bit, ir.Constant(places.type, [_WORD(0)] * 8))
        halves.append(
            builder.select(upper, builder.call(permute, [high, places]), builder.call(permute, [low, places]))
        )
    whole = ir.Constant(ir.VectorType(_WORD, LANES), [_WORD(k) for k in range(LANES)])
    return builder.shuffle_vector(halves[0], halves[1], whole)


@intrinsic  # type: ignore[untyped-decorator]
def lookup(typingctx: Any, table: Any, index: Any) -> Any:
    """Lane by lane ``table[index % 16]``, a vector of 16 floats as the table."""
    del typingctx
    if table is not F or index is not I:
        return None

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        del sig
        features = context.codegen()._tm_features.split(",")
        if "+avx512f" in features:
            kind = ir.FunctionType(F.vector, [F.vector, I.vector])
            permute = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.permvar.sf.512")
            return builder.call(permute, args)
        if "+avx2" in features:
            return _by_halves(builder, args[0], args[1])
        entries = args[0]
        places = builder.and_(args[1], ir.Constant(I.vector, [_WORD(LANES - 1)] * LANES))
        found = ir.Constant(F.vector, ir.Undefined)
        for lane in range(LANES):
            entry = builder.extract_element(entries, builder.extract_element(places, _WORD(lane)))
            found = builder.insert_element(found, entry, _WORD(lane))
        return found

    return signature(F, table, index), emit


def _least(builder: Any, numbers: Any) -> Any:
    """The smallest lane, unsigned."""
    kind = ir.FunctionType(_WORD, [I.vector])
    name = f"llvm.vector.reduce.umin.v{LANES}i32"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [numbers])


@intrinsic  # type: ignore[untyped-decorator]
def lowest_lane(typingctx: Any, values: Any) -> Any:
    """The first lane that holds the smallest of 16 non-negative floats; never out of range, even where all are NaN."""
    del typingctx
    if values is not F:
        return None

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        del context, sig
        # Non-negative floats are ordered as their bits are, NaN last.
        bits = builder.bitcast(args[0], I.vector)
        mask = ir.IntType(LANES)
        equal = builder.icmp_unsigned("==", bits, _spread(builder, _least(builder, bits), I))
        count = ir.FunctionType(mask, [mask, ir.IntType(1)])
        count_zeros = cgutils.get_or_insert_function(builder.module, count, f"llvm.cttz.i{LANES}")
        return builder.zext(builder.call(count_zeros, [builder.bitcast(equal, mask), ir.IntType(1)(1)]), ir.IntType(64))

    return signature(types.int64, values), emit


@intrinsic  # type: ignore[untyped-decorator]
def lowest_place(typingctx: Any, values: Any, rows: Any) -> Any:
    """The smallest ``rows[lane] * LANES + lane`` among the lanes that hold the smallest of 16 non-negative floats."""
    del typingctx
    if values is not F or rows is not I:
        return None

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        del context, sig
        bits = builder.bitcast(args[0], I.vector)
        equal = builder.icmp_unsigned("==", bits, _spread(builder, _least(builder, bits), I))
        size = ir.Constant(I.vector, [_WORD(LANES)] * LANES)
        places = builder.add(builder.mul(args[1], size), ir.Constant(I.vector, [_WORD(k) for k in range(LANES)]))
        never = ir.Constant(I.vector, [_WORD(0x7FFFFFFF)] * LANES)
        return builder.zext(_least(builder, builder.select(equal, places, never)), ir.IntType(64))

    return signature(types.int64, values, rows), emit


@intrinsic  # type: ignore[untyped-decorator]
def load_codes(typingctx: Any, array: Any, index: Any) -> Any:
    """The 16 numbers at ``array[index : index + 16]``, a flat array of uint16, as integers; unchecked."""
    del typingctx

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        at = context.cast(builder, args[1], sig.args[1], types.intp)
        pointer = _pointer(context, builder, sig.args[0], args[0], at)
        found = builder.load(builder.bitcast(pointer, _CODES.as_pointer()), align=2, typ=_CODES)
        return builder.zext(found, I.vector)

    return signature(I, array, index), emit


@intrinsic  # type: ignore[untyped-decorator]
def splat_at(typingctx: Any, array: Any, index: Any) -> Any:
    """``array[index]`` of a flat float32 array in every lane; unchecked."""
    del typingctx

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        at = context.cast(builder, args[1], sig.args[1], types.intp)
        pointer = _pointer(context, builder, sig.args[0], args[0], at)
        return _spread(builder, builder.load(pointer), F)

    return signature(F, array, index), emit
