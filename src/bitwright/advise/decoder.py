"""A decoder-only model as sizes: which matrices it has, what it caches for each token. Everything in ``advise`` is counted from this."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Experts", "Latent", "Matrix", "ModelShape", "Vectors"]


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): keys and values are cached as one short vector.

    kv_rank: its length; rope_dim: the part of a key that carries the position, cached beside it and shared by all heads; nope_dim,
    value_dim: sizes of the rest of a head's key and of its value; query_rank: None where queries are projected at once.
    """

    kv_rank: int
    rope_dim: int
    nope_dim: int
    value_dim: int
    query_rank: int | None = None


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture of experts. count: experts of a layer; used: of these, for each token; intermediate: width of one expert.

    shared: width of the expert that every token goes through, 0 where there is none; shared_gate: whether a linear weighs it;
    dense_layers: how many layers have a plain MLP in place of experts; fused: experts held as two matrices instead of three.
    """

    count: int
    used: int
    intermediate: int
    shared: int = 0
    shared_gate: bool = False
    dense_layers: int = 0
    fused: bool = False


@dataclass(frozen=True, kw_only=True)
class Vectors:
    """Norms and biases, which stay in the model's dtype. norms: of width ``hidden`` in a layer; norm_bias: whether norms have one.

    head_norm: elements of the norms of queries and keys in a layer; qkv, out, mlp: whether these linears have biases; head: whether the
    output head has one; final: norms after the last layer; other: further elements in a layer.
    """

    norms: int = 2
    norm_bias: bool = False
    head_norm: int = 0
    qkv: bool = False
    out: bool = False
    mlp: bool = False
    head: bool = False
    final: int = 1
    other: int = 0


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A kind of weight. role: its last name, ``q_proj``; rows, columns: ``(out, in)``; count: how many of them the model has.

    place: ``attention``, ``mlp``, ``expert``, ``router``, ``embedding`` or ``head``; layers: in which layers it stands.
    """

    role: str
    rows: int
    columns: int
    count: int
    place: str
    layers: tuple[int, ...] = ()

    @property
    def parameters(self) -> int:
        """All of them together."""
        return self.rows * self.columns * self.count


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a decoder-only model.

    hidden: width of the residual stream; intermediate: of the MLP; head_dim: of a query, key and value head (not with ``latent``);
    windows: for each layer how many tokens it sees, None for all; empty: all layers see all. positions: rows of a table of learned
    positions. gated: the MLP has three matrices, not two. fused_qkv, fused_mlp: stored as one matrix. copies_kv: transformers' class
    caches keys and values once for each query head. source: where the sizes are from.

    >>> small = ModelShape(name="x", hidden=8, layers=2, heads=2, kv_heads=1, head_dim=4, intermediate=16, vocab=32)
    >>> small.parameters, small.kv_elements(0)
    (1704, 8)
    """

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool = False
    gated: bool = True
    fused_qkv: bool = False
    fused_mlp: bool = False
    windows: tuple[int | None, ...] = ()
    latent: Latent | None = None
    experts: Experts | None = None
    positions: int = 0
    copies_kv: bool = False
    vectors: Vectors = Vectors()
    source: str = ""

    def window(self, layer: int) -> int | None:
        """How many tokens a layer sees, itself included; None: all."""
        return self.windows[layer] if self.windows else None

    def kv_elements(self, layer: int) -> int:
        """Cached numbers for each token in a layer, keys and values together."""
        del layer
        if self.latent is not None:
            return self.latent.kv_rank + self.latent.rope_dim
        return 2 * self.kv_heads * self.head_dim

    @property
    def query_width(self) -> int:
        """Elements of all query heads together."""
        size = self.head_dim if self.latent is None else self.latent.nope_dim + self.latent.rope_dim
        return self.heads * size

    @property
    def widest(self) -> int:
        """Width of the widest activation inside a layer that every token has: MLP, shared expert or experts in use."""
        if self.experts is None:
            return self.intermediate
        used = self.experts.used * self.experts.intermediate + self.experts.shared
        return max(used, self.intermediate if self.experts.dense_layers else 0)

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """Every weight of two axes, the embedding first, the head last (absent where it is tied)."""
        found = [Matrix(role="embed_tokens", rows=self.vocab, columns=self.hidden, count=1, place="embedding")]
        if self.positions:
            found.append(Matrix(role="positions", rows=self.positions, columns=self.hidden, count=1, place="embedding"))
        every = tuple(range(self.layers))
        found += [self._matrix(role, rows, columns, "attention", every) for role, rows, columns in self._attention()]
        dense = every if self.experts is None else every[: self.experts.dense_layers]
        if dense:
            found += self._mlp(self.intermediate, "", "mlp", dense)
        if self.experts is not None:
            found += self._experts(every[self.experts.dense_layers :])
        if not self.tied:
            found.append(Matrix(role="lm_head", rows=self.vocab, columns=self.hidden, count=1, place="head"))
        return tuple(found)

    @property
    def vector_elements(self) -> int:
        """Elements of norms and biases."""
        v = self.vectors
        norm = self.hidden * (2 if v.norm_bias else 1)
        attention = self._attention()
        per_layer = v.norms * norm + v.head_norm + v.other
        per_layer += sum(rows for role, rows, _ in attention if v.qkv and role != "o_proj")
        per_layer += self.hidden if v.out else 0
        per_layer += (self.intermediate * (2 if self.gated else 1) + self.hidden) if v.mlp else 0
        return self.layers * per_layer + v.final * norm + (self.vocab if v.head else 0)

    @property
    def parameters(self) -> int:
        """All of them; a tied head counts once."""
        return sum(matrix.parameters for matrix in self.matrices) + self.vector_elements

    @property
    def active_parameters(self) -> int:
        """Parameters that one token is multiplied with: without the experts that it does not go to."""
        if self.experts is None:
            return self.parameters
        idle = 1 - self.experts.used / self.experts.count
        return self.parameters - round(sum(m.parameters * idle for m in self.matrices if m.place == "expert"))

    def _matrix(self, role: str, rows: int, columns: int, place: str, layers: tuple[int, ...], each: int = 1) -> Matrix:
        return Matrix(role=role, rows=rows, columns=columns, count=len(layers) * each, place=place, layers=layers)

    def _attention(self) -> list[tuple[str, int, int]]:
        if self.latent is not None:
            return self._latent_attention(self.latent)
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        out = ("o_proj", self.hidden, q)
        if self.fused_qkv:
            return [("qkv_proj", q + 2 * kv, self.hidden), out]
        return [("q_proj", q, self.hidden), ("k_proj", kv, self.hidden), ("v_proj", kv, self.hidden), out]

    def _latent_attention(self, latent: Latent) -> list[tuple[str, int, int]]:
        if latent.query_rank is None:
            queries = [("q_proj", self.query_width, self.hidden)]
        else:
            queries = [
                ("q_a_proj", latent.query_rank, self.hidden),
                ("q_b_proj", self.query_width, latent.query_rank),
            ]
        return [
            *queries,
            ("kv_a_proj_with_mqa", latent.kv_rank + latent.rope_dim, self.hidden),
            ("kv_b_proj", self.heads * (latent.nope_dim + latent.value_dim), latent.kv_rank),
            ("o_proj", self.hidden, self.heads * latent.value_dim),
        ]

    def _mlp(self, width: int, lead: str, place: str, layers: tuple[int, ...], each: int = 1) -> list[Matrix]:
        if self.gated and (self.fused_mlp if place == "mlp" else place == "expert" and bool(self._fused_experts)):
            inner = [("gate_up_proj", 2 * width)]
        elif self.gated:
            inner = [("gate_proj", width), ("up_proj", width)]
        else:
            inner = [("up_proj", width)]
        found = [self._matrix(lead + role, rows, self.hidden, place, layers, each) for role, rows in inner]
        return [*found, self._matrix(lead + "down_proj", self.hidden, width, place, layers, each)]

    @property
    def _fused_experts(self) -> bool:
        return self.experts is not None and self.experts.fused

    def _experts(self, layers: tuple[int, ...]) -> list[Matrix]:
        experts = self.experts
        assert experts is not None
        found = [self._matrix("router", experts.count, self.hidden, "router", layers)]
        found += self._mlp(experts.intermediate, "experts.", "expert", layers, experts.count)
        if experts.shared:
            found += self._mlp(experts.shared, "shared.", "mlp", layers)
        if experts.shared_gate:
            found.append(self._matrix("shared_gate", 1, self.hidden, "router", layers))
        return found
