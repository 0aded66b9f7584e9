"""Mixtures: which ggml type each tensor of a model gets under a name such as Q4_K_M.

A mixture spends more bits where an error costs more: on the value projections, on ``ffn_down``, on the first and last blocks and on the
output head. The rules are llama.cpp's (``llama-quant.cpp`` as in llama-cpp-python 0.3.36; MIT), reproduced to the tensor, with the
fallbacks for widths that are no multiple of 256; ``docs/gguf.md`` has them as a table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bitwright.blocks.types import TYPES, named
from bitwright.errors import InputError, PlanError

__all__ = ["MIXTURES", "Facts", "Mixture", "Override", "assign", "by_layer", "mixture", "quantizable"]


@dataclass(frozen=True, slots=True)
class Mixture:
    """A name for a whole file. number: ``general.file_type``; base: the type of everything without a rule of its own."""

    name: str
    number: int
    base: str


def _mixtures() -> dict[str, Mixture]:
    rows = (
        ("F32", 0, "F32"), ("F16", 1, "F16"), ("Q4_0", 2, "Q4_0"), ("Q4_1", 3, "Q4_1"), ("Q8_0", 7, "Q8_0"), ("Q5_0", 8, "Q5_0"),
        ("Q5_1", 9, "Q5_1"), ("Q2_K", 10, "Q2_K"), ("Q3_K_S", 11, "Q3_K"), ("Q3_K_M", 12, "Q3_K"), ("Q3_K_L", 13, "Q3_K"),
        ("Q4_K_S", 14, "Q4_K"), ("Q4_K_M", 15, "Q4_K"), ("Q5_K_S", 16, "Q5_K"), ("Q5_K_M", 17, "Q5_K"), ("Q6_K", 18, "Q6_K"),
        ("IQ2_XXS", 19, "IQ2_XXS"), ("IQ2_XS", 20, "IQ2_XS"), ("Q2_K_S", 21, "Q2_K"), ("IQ3_XS", 22, "IQ3_S"),
        ("IQ3_XXS", 23, "IQ3_XXS"), ("IQ1_S", 24, "IQ1_S"), ("IQ4_NL", 25, "IQ4_NL"), ("IQ3_S", 26, "IQ3_S"), ("IQ3_M", 27, "IQ3_S"),
        ("IQ2_S", 28, "IQ2_XS"), ("IQ2_M", 29, "IQ2_S"), ("IQ4_XS", 30, "IQ4_XS"), ("IQ1_M", 31, "IQ1_M"), ("BF16", 32, "BF16"),
        ("TQ1_0", 36, "TQ1_0"), ("TQ2_0", 37, "TQ2_0"), ("MXFP4_MOE", 38, "MXFP4"),
    )  # fmt: skip
    return {name: Mixture(name, number, base) for name, number, base in rows}


#: Every mixture by name.
MIXTURES: Mapping[str, Mixture] = _mixtures()
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}


def mixture(name: str) -> Mixture:
    """The mixture of this name, in any case. InputError, with the known ones, where there is none.

    >>> mixture("q4_k").name
    'Q4_K_M'
    """
    wanted = name.upper()
    found = MIXTURES.get(_ALIASES.get(wanted, wanted))
    if found is None:
        raise InputError(f"type '{name}' is unknown", mend=f"use one of: {', '.join(MIXTURES)}")
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What the rules ask about a model. kv_heads: 0 where nothing attends."""

    architecture: str
    blocks: int
    heads: int
    kv_heads: int
    experts: int = 0

    @property
    def gqa(self) -> int:
        """How many query heads share a key head."""
        return self.heads // self.kv_heads if self.kv_heads else 0

    @property
    def is_70b(self) -> bool:
        """The one size with a rule of its own: 80 blocks, few and therefore small value projections."""
        if self.architecture == "llama":
            return self.blocks == 80 and self.heads != self.kv_heads
        return self.architecture in ("qwen2", "olmo", "deci") and self.blocks == 80


@dataclass(frozen=True, slots=True)
class Override:
    """``PATTERN=TYPE``: a regular expression that is searched in the tensor's name. The first that matches counts."""

    pattern: str
    type: str

    @classmethod
    def parse(cls, text: str) -> Override:
        """From the command line. InputError where it is none."""
        pattern, equals, name = text.rpartition("=")
        if not equals or not pattern:
            raise InputError(f"'{text}' is not PATTERN=TYPE", mend="write for example ffn_down=Q6_K")
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(f"pattern '{pattern}' is not a regular expression: {error}", mend="mend it") from error
        return cls(pattern, named(name).name)


#: Parts of names of tensors that stay as they are: tiny, or too sensitive.
_KEPT = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj", "ssm_conv1d",
    "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "attn_rel_b.weight", ".position_embd", "sam.pos_embd",
    "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd", ".patch_merger", "a.rvq.codebook", "mm.a.code_embd",
    *(f"time_mix_{part}.weight" for part in ("first", "w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2", "decay_w1",
                                             "decay_w2", "lerp_fused")),
)  # fmt: skip
_KEPT_NAMES = ("position_embd.weight", "token_types.weight")


def quantizable(name: str, shape: Sequence[int]) -> bool:
    """True for tensors that a mixture may quantize; the others keep plain numbers.

    >>> quantizable("blk.0.attn_norm.weight", (256,)), quantizable("blk.0.attn_q.weight", (256, 256))
    (False, True)
    """
    dimensions = len(shape) - next((i for i, n in enumerate(shape) if n != 1), len(shape))
    if dimensions < 2 or not name.endswith("weight") or name in _KEPT_NAMES:
        return False
    return not any(part in name for part in _KEPT)


def by_layer(name: str) -> tuple[int, str]:
    """Sort key: what lies outside the blocks first, then block by block, by name within one.

    >>> sorted(["blk.10.a", "blk.2.b", "output.weight"], key=by_layer)
    ['output.weight', 'blk.2.b', 'blk.10.a']
    """
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else -1, name


_CATEGORIES = ("attn_qkv.weight", "attn_kv_b.weight", "attn_v.weight", "attn_k.weight", "attn_q.weight", "attn_output.weight",
               "ffn_up", "ffn_gate", "ffn_down")  # fmt: skip


def _category(name: str) -> str:
    if name in ("output.weight", "token_embd.weight", "per_layer_token_embd.weight"):
        return "output" if name == "output.weight" else "token_embd"
    found = next((part.removesuffix(".weight") for part in _CATEGORIES if part in name), "other")
    return "attn_v" if found in ("attn_qkv", "attn_kv_b") else found


def _more(i: int, n: int) -> bool:
    """The first and last eighth, and every third block between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


@dataclass
class _Rules:
    """The walk over the tensors in order; value projections and ``ffn_*`` are counted as they come."""

    mix: Mixture
    facts: Facts
    imatrix: bool
    values: int
    tied: bool
    seen: dict[str, int] = field(default_factory=dict)

    def type_of(self, name: str, shape: Sequence[int]) -> str:
        """The mixture's choice, before the fallback for odd widths."""
        category = _category(name)
        if category == "output" or (self.tied and category == "token_embd"):
            return self._output(shape[-1])
        if self.mix.name == "MXFP4_MOE":
            return "MXFP4" if len(shape) == 3 and shape[0] > 1 else "Q8_0"
        if category == "token_embd":
            return self._embedding()
        index = self.seen.get(category, 0)
        self.seen[category] = index + 1
        if self.mix.name in ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ1_S", "IQ1_M"):
            return self._smallest(category, index)
        if category == "attn_v":
            return self._value(index)
        if category in ("attn_k", "attn_q"):
            return self._key_or_query(category)
        if category == "attn_output":
            return self._attn_output()
        if self.facts.experts > 1 and category.startswith("ffn_"):
            index = by_layer(name)[0]
        if category == "ffn_down":
            return self._down(index)
        if category in ("ffn_up", "ffn_gate") and self.mix.name == "IQ3_XS":
            n = self.facts.blocks
            return "IQ3_XXS" if n // 8 <= index < 7 * n // 8 else self.mix.base
        return self.mix.base

    def _output(self, columns: int) -> str:
        base = self.mix.base
        if self.mix.name == "MXFP4_MOE" or self.facts.architecture == "falcon" or columns % TYPES[base].values:
            return "Q8_0"
        if self.mix.name in ("IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ2_S", "IQ2_M", "IQ1_M"):
            return "Q5_K"
        return base if base == "Q8_0" else "Q6_K"

    def _embedding(self) -> str:
        if self.mix.name in ("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M"):
            return "Q2_K"
        if self.mix.name in ("IQ2_S", "IQ2_M", "IQ3_XXS"):
            return "IQ3_S"
        return "Q4_K" if self.mix.name in ("TQ1_0", "TQ2_0") else self.mix.base

    def _smallest(self, category: str, index: int) -> str:
        wider = self.mix.name in ("IQ2_S", "IQ2_M")
        richer = "IQ3_S" if wider else "Q2_K"
        if category == "attn_v":
            return "Q4_K" if self.facts.gqa >= 4 or self.facts.experts >= 4 else richer
        if category == "attn_k" and self.facts.experts == 8:
            return "Q4_K"
        if category == "ffn_down" and index < self.facts.blocks // 8:
            return richer
        if category == "attn_output":
            if self.facts.experts == 8:
                return "Q5_K"
            if self.mix.name in ("IQ1_S", "IQ1_M"):
                return "IQ2_XXS"
            return "IQ3_S" if wider else self.mix.base
        return self.mix.base

    def _value(self, index: int) -> str:
        name, found, many = self.mix.name, self.mix.base, self.facts.gqa >= 4
        if name == "Q2_K":
            found = "Q4_K" if many else "Q3_K"
        elif name in ("Q2_K_S", "IQ3_XS", "IQ3_S") and many:
            found = "Q4_K"
        elif name == "IQ3_XXS":
            found = "Q4_K" if many else "IQ3_XXS" if self.imatrix else "IQ3_S"
        elif name == "IQ3_M":
            found = "Q4_K"
        elif name == "Q3_K_M":
            found = "Q5_K" if index < 2 else "Q4_K"
        elif name == "Q3_K_L" or (name in ("IQ4_NL", "IQ4_XS") and many):
            found = "Q5_K"
        elif name in ("Q4_K_M", "Q5_K_M") and _more(index, self.values):
            found = "Q6_K"
        elif name == "Q4_K_S" and index < 4:
            found = "Q5_K"
        if self.facts.is_70b and found in ("Q3_K", "Q4_K"):
            found = "Q5_K"
        return "Q8_0" if self.facts.experts == 8 else found

    def _key_or_query(self, category: str) -> str:
        if category == "attn_k" and self.facts.experts == 8:
            return "Q8_0"
        return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(self.mix.name, self.mix.base)

    def _down(self, i: int) -> str:
        name, base, n = self.mix.name, self.mix.base, self.facts.blocks
        falcon = self.facts.architecture == "falcon"
        first = i < n // 8
        if name == "Q2_K":
            return "Q3_K"
        if name == "Q2_K_S":
            return "Q4_K" if first else base
        if name == "IQ3_XXS" and not self.imatrix:
            return "Q4_K" if first else "Q3_K"
        if name == "Q3_K_M":
            return "Q5_K" if i < n // 16 else "Q4_K" if not falcon or _more(i, n) else "Q3_K"
        if name == "IQ3_M":
            return "Q4_K" if first or (self.facts.experts == 8 and _more(i, n)) else base
        if name == "Q3_K_L":
            return "Q4_K" if falcon else "Q5_K"
        if name == "Q4_K_M" and falcon:
            return "Q6_K" if i < n // 16 else "Q5_K" if _more(i, n) else "Q4_K"
        if name in ("Q4_K_M", "Q5_K_M"):
            return "Q6_K" if _more(i, n) else base
        if name in ("IQ4_NL", "IQ4_XS") and first and not self.imatrix:
            return "Q5_K"
        if name == "Q4_K_S" and first and not falcon:
            return "Q5_K"
        if name in ("Q4_0", "Q5_0") and self.imatrix and first:
            return "Q4_1" if name == "Q4_0" else "Q5_1"
        return base

    def _attn_output(self) -> str:
        name, base = self.mix.name, self.mix.base
        if self.facts.architecture == "falcon":
            return "Q4_K" if name == "Q3_K_L" else base
        if self.facts.experts == 8:
            raised = (
                "Q2_K",
                "IQ3_XS",
                "IQ3_XXS",
                "Q3_K_S",
                "Q3_K_M",
                "IQ4_NL",
                "Q4_K_S",
                "Q4_K_M",
                "IQ3_S",
                "IQ3_M",
                "IQ4_XS",
            )
            return "Q5_K" if name in raised else base
        return {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}.get(name, base)


_FALLBACK = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip


def _fit(name: str, columns: int) -> str:
    """The type itself, or one with smaller blocks where its own do not divide the columns.

    >>> _fit("Q4_K", 96), _fit("Q4_K", 40)
    ('Q5_0', 'F16')
    """
    if columns % TYPES[name].values:
        name = _FALLBACK.get(name, name)
    return "F16" if columns % TYPES[name].values else name


def assign(
    mix: Mixture,
    tensors: Mapping[str, tuple[int, ...]],
    facts: Facts,
    *,
    imatrix: bool = False,
    overrides: Sequence[Override] = (),
    pure: bool = False,
    embedding: str | None = None,
    output: str | None = None,
) -> dict[str, str]:
    """Type of every tensor that the mixture quantizes: name -> ggml type. The others (norms, biases, routers ...) are absent.

    tensors: GGUF name -> shape, rows before columns. imatrix: importance weights will be there, which changes some rules. pure: the
    base type everywhere. embedding, output: types of ``token_embd`` and ``output``. PlanError where an override matches nothing.
    """
    names = [name for name in sorted(tensors, key=by_layer) if quantizable(name, tensors[name])]
    categories = [_category(name) for name in names]
    rules = _Rules(mix, facts, imatrix, categories.count("attn_v"), "output" not in categories)
    hit: set[int] = set()
    found: dict[str, str] = {}
    for name, category in zip(names, categories, strict=True):
        index = next((i for i, o in enumerate(overrides) if re.search(o.pattern, name)), None)
        if category == "token_embd" and embedding is not None:
            found[name] = embedding
            continue
        if category == "output" and output is not None:
            found[name] = output
            continue
        if index is not None:
            hit.add(index)
            chosen = overrides[index].type
        elif pure or not TYPES[mix.base].blocked:
            chosen = mix.base
        elif embedding is None and output is not None and category == "token_embd" and rules.tied:
            chosen = output
        else:
            chosen = rules.type_of(name, tensors[name])
        found[name] = _fit(chosen, tensors[name][-1])
    missed = next((o for i, o in enumerate(overrides) if i not in hit), None)
    if missed is not None:
        raise PlanError(
            f"'{missed.pattern}={missed.type}' matches no tensor that is quantized",
            mend="see the names with `bitwright plan`",
        )
    return found
