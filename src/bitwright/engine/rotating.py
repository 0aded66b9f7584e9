"""Rotation of a whole checkpoint: what has to be rotated, as a Source, and the proof that the model stays the same.

The structure is studied on random weights in place of the checkpoint's own: who writes and reads the residual stream does not depend on
their values, a plan needs no weights then, and no channel is dead by chance. What was found is tried on these weights at once: a
rotated block must give the rotated output, or the model is refused. The true weights are compared before anything is written.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitwright.core.rotation import Rotation
from bitwright.core.source import Source
from bitwright.core.tensor import TensorSpec
from bitwright.core.transform import ModelTransform
from bitwright.engine.rotated import NormScale, RotatedSource, Turn
from bitwright.errors import PlanError
from bitwright.model.blocks import BlockCall, BlockRunner
from bitwright.model.names import NameMap, Place, map_names
from bitwright.model.residual import BlockAnatomy, Norm, channels_changed, random_values, study_block
from bitwright.model.skeleton import Skeleton, build_skeleton

__all__ = ["rotated_source"]

_MEND = "leave the rotation out for this model"
#: Tokens of the trial.
_TOKENS = 24
#: Largest relative error of a rotated block on random weights, in float32.
_TOLERANCE = 1e-3


def rotated_source(source: Source, transform: ModelTransform, seed: int) -> tuple[RotatedSource, list[str]]:
    """``source`` with the transform applied, every rotated tensor in float32, and what the reader should know.

    Reads no weights. Raises PlanError where the model cannot be rotated exactly, InputError where transformers does not know it.
    """
    skeleton = build_skeleton(source.path, untied=source.config.get("tie_word_embeddings") is False)
    names = map_names(skeleton, source.tensors)
    study = _Study(skeleton, names, source, transform, seed)
    anatomy = study.anatomy()
    failure = ""
    for keep_ones in (False, True):
        stream = transform.stream_rotation(study.width, rng=_rng("stream", seed), keep_ones=keep_ones)
        turns = _Turns(study, anatomy, stream)
        failure = study.trial(turns.inside, stream, anatomy)
        if not failure:
            break
    else:
        raise PlanError(f"the residual stream cannot be rotated: {failure}", mend=_MEND)
    notes = []
    config = dict(source.config)
    if anatomy.head not in names.parameters:
        config["tie_word_embeddings"] = False
        if isinstance(config.get("text_config"), Mapping):
            config["text_config"] = {**config["text_config"], "tie_word_embeddings": False}
        added = source.tensors[turns.outside[anatomy.head].origin].nbytes
        notes.append(
            f"rotation unties the output head from the embeddings: {anatomy.head} adds {added} bytes before quantization"
        )
    left = [n for n in names.unknown if len(source.tensors[n].shape) > 1]
    if left:
        notes.append(f"{len(left)} tensors that transformers does not use are not rotated, {left[0]} first")
    return RotatedSource(source, {**turns.inside, **turns.outside}, config, None), notes


def _rng(purpose: str, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{purpose} {seed}".encode()))


@dataclass(frozen=True, eq=False)
class _Anatomy:
    """blocks: of every block. embeddings: parameters whose last axis is the stream's. norm: the one before the head. head: its weight."""

    blocks: tuple[BlockAnatomy, ...]
    first_of_kind: tuple[int, ...]
    embeddings: tuple[str, ...]
    norm: Norm | None
    head: str


class _RandomSource:
    """A checkpoint's tensors with random values; outside the blocks every row of a matrix is the same one and takes no memory."""

    def __init__(self, source: Source, inside: frozenset[str]) -> None:
        self._source, self._inside = source, inside
        self.replaced: dict[str, torch.Tensor] = {}

    @property
    def path(self) -> Path:
        return self._source.path

    @property
    def config(self) -> Mapping[str, Any]:
        return self._source.config

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        return self._source.tensors

    def fingerprint(self) -> Mapping[str, str]:
        return {}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """Float32, whatever is stored."""
        if name in self.replaced:
            return self.replaced[name]
        spec = self.tensors[name]
        seed = zlib.crc32(name.encode())
        if not spec.dtype.is_floating_point:
            value = torch.zeros(spec.shape, dtype=spec.dtype)
        elif "bias" in name or len(spec.shape) < 2:
            value = 0.1 * random_values(spec.shape, seed) + float("bias" not in name)
        elif name in self._inside:
            value = random_values(spec.shape, seed) * spec.shape[-1] ** -0.5
        else:
            value = random_values(spec.shape[-1:], seed).expand(spec.shape)
        return value if rows is None else value[rows[0] : rows[1]]


class _Study:
    """The structure of one model."""

    def __init__(
        self, skeleton: Skeleton, names: NameMap, source: Source, transform: ModelTransform, seed: int
    ) -> None:
        self.skeleton, self.names, self.transform, self.seed = skeleton, names, transform, seed
        inside = {t for p, tensors in names.parameters.items() if skeleton.block_of(p) is not None for t in tensors}
        self.random = _RandomSource(source, frozenset(inside))
        self.runner = BlockRunner(skeleton, names, self.random, torch.float32)
        vocabulary = int(skeleton.model.get_input_embeddings().num_embeddings)
        self.tokens = torch.arange(_TOKENS).unsqueeze(0) % vocabulary
        (capture,) = self.runner.capture([self.tokens])
        self.calls: tuple[BlockCall, ...] = capture.calls
        self.entering = capture.hidden
        self.width = int(capture.hidden.shape[-1])
        self.hidden = random_values((1, _TOKENS, self.width), seed=3)
        self._heads: dict[int, Rotation] = {}

    def head_rotation(self, head_dim: int) -> Rotation:
        """The rotation of heads of this width; only asked for where values are rotated."""
        if head_dim not in self._heads:
            found = self.transform.head_rotation(head_dim, rng=_rng(f"head {head_dim}", self.seed))
            assert found is not None
            self._heads[head_dim] = found
        return self._heads[head_dim]

    def anatomy(self) -> _Anatomy:
        embeddings = self._embeddings()
        kinds: dict[tuple[Any, ...], tuple[int, BlockAnatomy]] = {}
        blocks: list[BlockAnatomy] = []
        for index, block in enumerate(self.skeleton.blocks):
            shapes = tuple((n, tuple(p.shape)) for n, p in block.named_parameters())
            kind = (shapes, tuple(type(module) for module in block.modules()))
            if kind not in kinds:
                kinds[kind] = (index, self._block(index))
            blocks.append(kinds[kind][1])
        norm, head = self._tail()
        return _Anatomy(tuple(blocks), tuple(index for index, _ in kinds.values()), embeddings, norm, head)

    def _block(self, index: int) -> BlockAnatomy:
        block = self.runner.load_block(index)
        config = self.skeleton.config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        dims = [d for d in (width, getattr(config, "v_head_dim", None)) if isinstance(d, int) and d > 1]
        rotates = self.transform.head_rotation(2, rng=_rng("asked", 0)) is not None
        try:
            return study_block(
                block, lambda hidden: self.runner.run(block, hidden, self.calls[index]), self.hidden,
                head_dims=dims or [self.width], trial=self.head_rotation if rotates else None,
            )  # fmt: skip
        except PlanError as error:
            raise PlanError(f"block {index}: {error.message}", mend=error.mend) from error
        finally:
            self.runner.free(block)

    def _embeddings(self) -> tuple[str, ...]:
        """Parameters whose channels are the channels of what enters the first block."""
        part = torch.rand(self.width, generator=torch.Generator().manual_seed(1)) < 0.5
        found: list[str] = []
        for parameter, tensors in self.names.parameters.items():
            spec = self.random.tensors[tensors[0]]
            if self.skeleton.block_of(parameter) is not None or not spec.dtype.is_floating_point:
                continue
            if not spec.shape or spec.shape[-1] != self.width or len(tensors) != 1:
                continue
            row = self.random.read(tensors[0]).reshape(-1, self.width)[0]
            self.random.replaced = {tensors[0]: torch.where(part, row + 1.0, row).expand(spec.shape)}
            (capture,) = self.runner.capture([self.tokens])
            self.random.replaced = {}
            changed = channels_changed(capture.hidden, self.entering)
            if bool(changed[~part].any()):
                raise PlanError(
                    f"{parameter} passes another step, such as a norm, before it enters the residual stream", mend=_MEND
                )
            if bool(changed.any()):
                found.append(parameter)
        model = self.skeleton.model
        entry = model.get_input_embeddings()
        path = next(name for name, module in model.named_modules() if module is entry)
        if f"{path}.weight" not in found:
            raise PlanError(f"{path} does not enter the residual stream directly", mend=_MEND)
        return tuple(found)

    # --- after the blocks ----------------------------------------------------------------------------------------------------

    def _tail(self) -> tuple[Norm | None, str]:
        """The norm before the output head, and the name of the head's weight."""
        model = self.skeleton.model
        head = model.get_output_embeddings()
        if head is None:
            raise PlanError("the model has no output head", mend=_MEND)
        path = next(name for name, module in model.named_modules() if module is head)
        found: Norm | None = None
        factors = 1.0 + torch.rand(self.width, generator=torch.Generator().manual_seed(4))
        with self.runner.head() as logits:
            before = self._entering_head(logits, self.hidden)
            for name, module in model.named_modules():
                weight = module._parameters.get("weight")
                if weight is None or weight.is_meta or tuple(weight.shape) != (self.width,):
                    continue
                bias = module._parameters.get("bias")
                states = []
                for offset in (0.0, 1.0):
                    saved = [(p, p.detach().clone()) for p in (weight, bias) if p is not None]
                    with torch.no_grad():
                        weight.copy_((weight + offset) * factors - offset)
                        if bias is not None:
                            bias.mul_(factors)
                    after = self._entering_head(logits, self.hidden)
                    with torch.no_grad():
                        for parameter, value in saved:
                            parameter.copy_(value)
                    states.append(bool(channels_changed(after, before).any()))
                    if _error(after, before * factors) < _TOLERANCE:
                        found = Norm(f"{name}.weight", f"{name}.bias" if bias is not None else None, offset)
                if any(states) and (found is None or found.weight != f"{name}.weight"):
                    raise PlanError(f"{name} does not feed the output head directly", mend=_MEND)
        return found, f"{path}.weight"

    def _entering_head(self, logits: Any, hidden: torch.Tensor) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        self.skeleton.model.set_output_embeddings(_Seen(seen))
        logits(hidden)
        return seen[-1]

    # --- trial -----------------------------------------------------------------------------------------------------------------

    def trial(self, turns: Mapping[str, Turn], stream: Rotation, anatomy: _Anatomy) -> str:
        """Why rotated random weights compute something else than they should; empty where they do not."""
        rotated = BlockRunner(
            self.skeleton, self.names, RotatedSource(self.random, turns, self.random.config, None), torch.float32
        )
        rotated.capture([self.tokens])  # learns how this model's blocks return their output
        turned = stream.apply(self.hidden.double()).float()
        for index in anatomy.first_of_kind:
            outputs = []
            for runner, hidden in ((self.runner, self.hidden), (rotated, turned)):
                block = runner.load_block(index)
                outputs.append(runner.run(block, hidden, self.calls[index]))
                runner.free(block)
            error = _error(outputs[1], stream.apply(outputs[0].double()).float())
            if not error < _TOLERANCE:
                return f"block {index} then computes something else (relative error {error:.2g})"
        with self.runner.head() as logits:
            plain = self._entering_head(logits, self.hidden).double()
        with rotated.head() as logits:
            found = self._entering_head(logits, turned)
        if anatomy.norm is not None:
            (name,) = self.names.parameters[anatomy.norm.weight]
            plain = plain / (self.random.read(name).double() + anatomy.norm.offset)
        error = _error(found, stream.apply(plain).float())
        return (
            ""
            if error < _TOLERANCE
            else f"the norm before the output head then computes something else (relative error {error:.2g})"
        )


class _Seen(nn.Module):
    """Stands in for the output head and notes what it reads."""

    def __init__(self, seen: list[torch.Tensor]) -> None:
        super().__init__()
        self._seen = seen
        self.weight = torch.empty(0)  # some models ask for its dtype

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self._seen.append(hidden)
        return hidden


def _error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp_min(1e-30))


class _Turns:
    """From parameters in memory to stored tensors. inside: all but embeddings and head; outside: these."""

    def __init__(self, study: _Study, anatomy: _Anatomy, stream: Rotation) -> None:
        self._study, self._stream = study, stream
        self._of: dict[str, list[tuple[str, Place]]] = {}
        for tensor, place in study.names.places.items():
            self._of.setdefault(place.parameter, []).append((tensor, place))
        self.inside: dict[str, Turn] = {}
        self.outside: dict[str, Turn] = {}
        for index, block in enumerate(anatomy.blocks):
            self._block(f"{study.skeleton.blocks_path}.{index}.", block)
        if anatomy.norm is not None:
            self._norm(anatomy.norm, "")
        inside, self.inside = self.inside, self.outside
        for name in anatomy.embeddings:
            self._columns(name, False, stream, None, None)
        self._head(anatomy)
        self.inside = inside

    def _tensors(self, parameter: str) -> list[tuple[str, Place]]:
        found = self._of.get(parameter, [])
        if not found or {name for name, _ in found} != set(self._study.names.parameters.get(parameter, ())):
            raise PlanError(f"{parameter} is not stored as plain matrices", mend=_MEND)
        return found

    def _add(self, name: str, **values: Any) -> None:
        turn = self.inside.get(name, Turn(name))
        if any(getattr(turn, key) is not None for key in ("columns", "rows", "constant") if key in values):
            raise PlanError(f"{name} would have to be rotated twice", mend=_MEND)
        self.inside[name] = replace(turn, **values)

    def _columns(
        self, parameter: str, transposed: bool, rotation: Rotation, index: torch.Tensor | None, scale: NormScale | None
    ) -> None:
        for name, place in self._tensors(parameter):
            self._add(name, columns=rotation, column_index=index, scale=scale, turned=place.transposed != transposed)

    def _rows(self, parameter: str, transposed: bool, rotation: Rotation, index: torch.Tensor | None) -> None:
        for name, place in self._tensors(parameter):
            mine = index
            if place.rows is not None:
                if index is None:
                    raise PlanError(f"{name} is a part of {parameter}, whose rows must be rotated together", mend=_MEND)
                inside = (index >= place.rows[0]) & (index < place.rows[1])
                if not bool((inside.all(1) | ~inside.any(1)).all()):
                    raise PlanError(f"{name} holds parts of heads", mend=_MEND)
                mine = index[inside.all(1)] - place.rows[0]
                if not len(mine):
                    continue
            self._add(name, rows=rotation, row_index=mine, turned=place.transposed != transposed)

    def _norm(self, norm: Norm, prefix: str) -> NormScale:
        ((weight, _),) = self._tensors(prefix + norm.weight)
        self._add(weight, constant=1.0 - norm.offset)
        if norm.bias is not None:
            # (weight x + bias) W = (x + bias / weight) diag(weight) W
            inverse = NormScale(weight, norm.offset, inverse=True)
            self._columns(prefix + norm.bias, False, self._stream, None, inverse)
        return NormScale(weight, norm.offset)

    def _block(self, prefix: str, block: BlockAnatomy) -> None:
        scales = {norm: self._norm(norm, prefix) for norm in block.norms}
        for reader in block.readers:
            scale = scales[reader.norm] if reader.norm is not None else None
            self._columns(prefix + reader.weight, reader.transposed, self._stream, None, scale)
        for name, transposed in block.writers.items():
            self._rows(prefix + name, transposed, self._stream, None)
        for name in block.vectors:
            self._columns(prefix + name, False, self._stream, None, None)
        for edge in block.values:
            rotation = self._study.head_rotation(edge.rows.shape[1])
            self._rows(prefix + edge.producer, edge.producer_transposed, rotation, edge.rows)
            if edge.bias is not None:
                self._columns(prefix + edge.bias, False, rotation, edge.rows, None)
            self._columns(prefix + edge.consumer, edge.consumer_transposed, rotation, edge.columns, None)

    def _head(self, anatomy: _Anatomy) -> None:
        scale = None
        if anatomy.norm is not None:
            ((weight, _),) = self._tensors(anatomy.norm.weight)
            scale = NormScale(weight, anatomy.norm.offset)
        if anatomy.head in self._study.names.parameters:
            self._columns(anatomy.head, False, self._stream, None, scale)
            return
        origin = self._study.skeleton.tied.get(anatomy.head)
        if origin is None or origin not in anatomy.embeddings:
            raise PlanError(f"{anatomy.head} is tied to something that is no embedding", mend=_MEND)
        ((stored, _),) = self._tensors(origin)
        self.inside[anatomy.head] = Turn(stored, scale=scale, columns=self._stream)
