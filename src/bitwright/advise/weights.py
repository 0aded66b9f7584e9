"""Bytes of the weights: counted in a file, or worked out from a shape with the very code that will write them.

A formula of bits times parameters misses what is stored beside the codes. So every matrix of a shape is handed to the layout
(``Layout.tensors``), or to llama.cpp's mixture (``gguf.mixture``), which say its tensors to the byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bitwright.advise.decoder import Matrix, ModelShape
from bitwright.errors import InputError, PlanError

if TYPE_CHECKING:
    from bitwright.blocks.types import BlockType
    from bitwright.core.scheme import Scheme

__all__ = [
    "DTYPES",
    "LAYOUTS",
    "WeightBytes",
    "code_bits",
    "default_recipe",
    "gguf_type",
    "split_codes",
    "weight_bytes",
]

#: dtype of what is not quantized -> bytes
DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}
#: types that llama.cpp copies into another order when it loads them on an x86 CPU (its log says how much: ``CPU_REPACK``); embeddings and
#: heads stay as they are
REPACKED = frozenset({"Q4_0", "Q4_K", "IQ4_NL"})
#: what ``memory`` can be asked about: the layouts that files are written in, and plain weights
LAYOUTS = ("compressed-tensors", "gptq", "awq", "bitsandbytes", "fp8", "native", "gguf", "dense")


@dataclass(frozen=True, kw_only=True)
class WeightBytes:
    """weights: codes of quantized layers, and everything plain inside the blocks; scales: what is stored beside codes (scales, zero
    points, padding, orders); embeddings, head: as they are stored; a tied head is 0. largest: elements of the largest
    quantized matrix, 0 where there is none; decoded: whether it is decoded each time it is used. repacked: bytes that llama.cpp copies into
    another order for a CPU. recipe: in words.
    """

    weights: int
    scales: int
    embeddings: int
    head: int
    largest: int = 0
    decoded: bool = False
    repacked: int = 0
    recipe: str = ""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.scales + self.embeddings + self.head


def default_recipe(layout: str, *, bits: int | None = None, group_size: int | str | None = None) -> dict[str, Any]:
    """The recipe that is meant by a layout's name alone.

    gptq, awq, compressed-tensors, native: affine, 4 bits, groups of 128 (awq with zero points); bitsandbytes: NF4 with double
    quantization, or absmax-int8 for ``bits=8``; fp8: float8 in blocks of 128 x 128.
    """
    found: dict[str, Any] = {"layout": layout, "method": "rtn"}
    if layout == "bitsandbytes":
        if bits not in (None, 4, 8):
            raise InputError(f"bitsandbytes has 4 and 8 bits, not {bits}", mend="use --bits 4 or 8")
        if bits == 8:
            return found | {"scheme": "absmax-int8", "inputs": {"threshold": 6.0}}
        found |= {"scheme": "codebook", "scheme_options": {"book": "nf4", "double_quant": True}}
        return found if group_size is None else found | {"group_size": group_size}
    if layout == "fp8":
        if bits not in (None, 8):
            raise InputError(f"fp8 has 8 bits, not {bits}", mend="drop --bits")
        inputs = {"number": "float", "strategy": "group", "group_size": 128}
        return found | {"scheme": "float8", "group_size": group_size or "block", "inputs": inputs}
    return found | {"bits": bits or 4, "group_size": group_size or 128, "symmetric": layout != "awq"}


def gguf_type(bits: int) -> str:
    """The mixture that is usual for a number of bits.

    >>> gguf_type(4), gguf_type(8)
    ('Q4_K_M', 'Q8_0')
    """
    usual = {2: "Q2_K", 3: "Q3_K_M", 4: "Q4_K_M", 5: "Q5_K_M", 6: "Q6_K", 8: "Q8_0", 16: "F16", 32: "F32"}
    if bits not in usual:
        raise InputError(f"no GGUF type has {bits} bits", mend=f"use one of: {', '.join(map(str, usual))}, or --type")
    return usual[bits]


def weight_bytes(
    shape: ModelShape,
    *,
    layout: str = "compressed-tensors",
    bits: int | None = None,
    group_size: int | str | None = None,
    type: str | None = None,
    dtype: str = "bfloat16",
    recipe: Mapping[str, Any] | None = None,
) -> WeightBytes:
    """Bytes of a model of this shape in a layout, headers of files not counted.

    bits, group_size: None for what is usual in the layout (``default_recipe``). type: a GGUF mixture. dtype: of everything that is not
    quantized. recipe: values of a Recipe in place of the layout's usual ones. Raises PlanError where the layout cannot hold a matrix
    (a group size that does not divide it).
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype '{dtype}' is unknown", mend=f"use one of: {', '.join(DTYPES)}")
    if layout == "dense" or bits in (16, 32):
        return _dense(shape, dtype if bits in (None, 16) or layout == "dense" else "float32")
    if layout == "gguf":
        return _gguf(shape, type or gguf_type(bits or 4))
    if layout not in LAYOUTS:
        raise InputError(f"layout '{layout}' is unknown", mend=f"use one of: {', '.join(LAYOUTS)}")
    return _quantized(shape, dict(recipe or default_recipe(layout, bits=bits, group_size=group_size)), dtype)


def _dense(shape: ModelShape, dtype: str) -> WeightBytes:
    item = DTYPES[dtype]
    places = {
        place: item * sum(m.parameters for m in shape.matrices if m.place == place) for place in ("embedding", "head")
    }
    weights = item * shape.parameters - places["embedding"] - places["head"]
    return WeightBytes(
        weights=weights, scales=0, embeddings=places["embedding"], head=places["head"], recipe=f"plain {dtype}"
    )


def _quantized(shape: ModelShape, values: dict[str, Any], dtype: str) -> WeightBytes:
    from bitwright import catalog
    from bitwright.core.layout import Layout
    from bitwright.core.options import build
    from bitwright.core.tensor import parse_dtype
    from bitwright.engine.plan import make_scheme
    from bitwright.engine.recipe import make_recipe

    made = make_recipe(values)
    layout = build(catalog.load("layouts", made.layout), made.layout_options, f"layout '{made.layout}'")
    assert isinstance(layout, Layout)
    scheme = make_scheme(made, layout, parse_dtype(dtype))
    item = DTYPES[dtype]
    weights = item * shape.vector_elements
    scales = embeddings = head = largest = 0
    for matrix in shape.matrices:
        plain = item * matrix.parameters
        asked = {"embedding": made.embeddings, "head": made.head, "router": False}.get(matrix.place, True)
        if not asked:
            weights += plain if matrix.place == "router" else 0
            embeddings += plain if matrix.place == "embedding" else 0
            head += plain if matrix.place == "head" else 0
            continue
        reason = layout.accepts(scheme, (matrix.rows, matrix.columns))
        if reason is not None:
            raise PlanError(f"{matrix.role}: layout {layout.name} cannot store it: {reason}", mend="use another scheme")
        scheme.grid((matrix.rows, matrix.columns))
        specs = layout.tensors(matrix.role, scheme, (matrix.rows, matrix.columns))
        stored = matrix.count * sum(spec.nbytes for spec in specs)
        codes = split_codes(stored, matrix.parameters, scheme)
        largest = max(largest, matrix.rows * matrix.columns)
        if matrix.place in ("embedding", "head"):
            embeddings += stored if matrix.place == "embedding" else 0
            head += stored if matrix.place == "head" else 0
        else:
            weights, scales = weights + codes, scales + stored - codes
    return WeightBytes(
        weights=weights, scales=scales, embeddings=embeddings, head=head, largest=largest, decoded=is_decoded(scheme),
        recipe=f"{scheme.describe_all()} in {layout.name}; the rest in {dtype}",
    )  # fmt: skip


#: role -> name of a GGUF tensor
_GGUF = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "qkv_proj": "attn_qkv", "o_proj": "attn_output", "gate_proj": "ffn_gate",
    "up_proj": "ffn_up", "gate_up_proj": "ffn_up", "down_proj": "ffn_down", "router": "ffn_gate_inp", "shared_gate": "ffn_gate_inp_shexp",
    "experts.gate_proj": "ffn_gate_exps", "experts.up_proj": "ffn_up_exps", "experts.down_proj": "ffn_down_exps",
    "experts.gate_up_proj": "ffn_gate_up_exps", "shared.gate_proj": "ffn_gate_shexp", "shared.up_proj": "ffn_up_shexp",
    "shared.down_proj": "ffn_down_shexp", "q_a_proj": "attn_q_a", "q_b_proj": "attn_q_b", "kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "kv_b_proj": "attn_kv_b",
}  # fmt: skip
#: model types of transformers -> llama.cpp's name, where its mixtures tell them apart
_ARCHITECTURES = {
    "falcon": "falcon",
    "RefinedWeb": "falcon",
    "RefinedWebModel": "falcon",
    "qwen2": "qwen2",
    "olmo": "olmo",
}


def _gguf_tensors(shape: ModelShape) -> dict[str, tuple[Matrix, tuple[int, ...]]]:
    """GGUF name -> matrix and shape, of every tensor with two axes or three."""
    found: dict[str, tuple[Matrix, tuple[int, ...]]] = {}
    for matrix in shape.matrices:
        size = (matrix.rows, matrix.columns)
        if matrix.place in ("embedding", "head"):
            name = {"embed_tokens": "token_embd", "positions": "position_embd"}.get(matrix.role, "output")
            found[f"{name}.weight"] = (matrix, size)
            continue
        each = matrix.count // len(matrix.layers)
        for layer in matrix.layers:
            found[f"blk.{layer}.{_GGUF[matrix.role]}.weight"] = (matrix, (each, *size) if each > 1 else size)
    return found


def _gguf(shape: ModelShape, type: str) -> WeightBytes:
    from bitwright.blocks.types import TYPES
    from bitwright.gguf.mixture import Facts, assign, mixture

    mix = mixture(type)
    tensors = _gguf_tensors(shape)
    architecture = _ARCHITECTURES.get(shape.name, "llama")
    facts = Facts(
        architecture=architecture, blocks=shape.layers, heads=shape.heads, kv_heads=shape.kv_heads,
        experts=shape.experts.count if shape.experts else 0,
    )  # fmt: skip
    types = assign(mix, {name: size for name, (_, size) in tensors.items()}, facts)
    # Norms and biases are float32.
    weights = 4 * shape.vector_elements
    scales = embeddings = head = repacked = 0
    for name, (matrix, size) in tensors.items():
        block = TYPES[types.get(name, "F32")]
        count = size[0] if len(size) == 3 else 1
        stored = count * matrix.rows * block.row_bytes(matrix.columns)
        codes = count * matrix.rows * matrix.columns * code_bits(block) // 8
        if matrix.place in ("embedding", "head"):
            embeddings += stored if matrix.place == "embedding" else 0
            head += stored if matrix.place == "head" else 0
        else:
            weights, scales = weights + codes, scales + stored - codes
            repacked += stored if block.name in REPACKED else 0
    return WeightBytes(
        weights=weights,
        scales=scales,
        embeddings=embeddings,
        head=head,
        repacked=repacked,
        recipe=f"{mix.name} in GGUF",
    )


def code_bits(block: BlockType) -> int:
    """Whole bits of a weight's own code in a ggml block; the rest of the block are its scales.

    >>> from bitwright.blocks.types import TYPES
    >>> code_bits(TYPES["Q4_K"]), code_bits(TYPES["F16"])
    (4, 16)
    """
    return int(block.bits_per_weight)


def is_decoded(scheme: Scheme) -> bool:
    """True where ``runtime.linear`` has no packed product on a CPU in bfloat16, so that a weight is decoded each time it is used."""
    from bitwright.schemes.affine import Affine

    if scheme.inputs is not None:
        return not (scheme.inputs.number == "int" and scheme.inputs.bits == 8)
    if not isinstance(scheme, Affine) or not scheme.symmetric:
        return True
    by_group = scheme.bits == 4 and scheme.granularity == "group" and scheme.group_size in (32, 64, 128, 256)
    return not (by_group or (scheme.bits == 8 and scheme.granularity == "channel"))


def split_codes(stored: int, elements: int, scheme: Scheme) -> int:
    """How many of a matrix's stored bytes are its codes."""
    return min(stored, elements // scheme.vector * scheme.code_bits // 8)
