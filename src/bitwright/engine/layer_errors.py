"""What quantization does inside a model: the error of every linear, of every block, and how it grows from block to block.

One walk through both checkpoints, two decoder blocks at a time: the source's and the quantized one, whose weights are decoded. For every
batch the source's block runs on the source's hidden states, while its linears' inputs are watched; the quantized block runs on the same
states (``BlockError.own``) and on those of the quantized model, from its embeddings on (``BlockError.total``). All of it in float32.

Only weights are compared: where a scheme also rounds the inputs of layers (W8A8), or stores keys and values in fewer bits, that rounding
is left out. Channels that a transform scaled are scaled back first (``engine.layer_frames``), rotated models are compared with the rotated
source (``engine.layer_sides``). The exact figures are defined in ``evaluation.layer_error``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from bitwright.core.transform import ModelTransform
from bitwright.engine.activations import ActivationStore
from bitwright.engine.analyze import label_of
from bitwright.engine.blockwise import cast_call, unit_view
from bitwright.engine.calibration import (
    CalibrationTokens,
    load_texts,
    load_tokenizer,
    tokens_from_texts,
    tokens_from_windows,
)
from bitwright.engine.collect import trace
from bitwright.engine.layer_frames import Frame, changed_outside, find_frames
from bitwright.engine.layer_outside import outside_errors
from bitwright.engine.layer_sides import Side, open_pair
from bitwright.engine.progress import Progress, Silent
from bitwright.engine.recipe import Recipe, make_plugin, make_recipe
from bitwright.engine.run import vocab_size
from bitwright.engine.sample import sample_tokens
from bitwright.engine.watch import Watched, first_hidden, watched_inputs
from bitwright.errors import InputError, NumericError
from bitwright.evaluation.layer_error import OutputError, energy, ratio, snr_db, weight_histogram
from bitwright.evaluation.outliers import InputProbe, LayerInput, summarize
from bitwright.evaluation.record import BlockError, LayerError, WeightHistogram
from bitwright.io.heap import release_free_memory
from bitwright.io.safetensors_dir import SafetensorsDir
from bitwright.io.text import printable
from bitwright.model.blocks import BlockCall
from bitwright.model.observe import InputObserver, Slot
from bitwright.model.structure import LinearUnit, structure_from_skeleton

__all__ = ["LayerReport", "measure_layers"]

#: Hidden states that are held in memory without a cap; what is beyond is read back from temporary files.
_ACTIVATION_BYTES = 1 << 30
#: Tokens of one sequence that scaled channels are searched with.
_SAMPLE = 256
#: Magnitude above which an input counts as an outlier, as in ``bitwright analyze``.
_OUTLIER = 6.0


@dataclass(frozen=True)
class LayerReport:
    """Errors of a quantized model against its source.

    layers: linears in the order in which they run, where an expert that no token reached is missing, then a quantized embedding and head
    (block None). histograms: of the layers with the largest relative error, worst first. activations: what the source's linears read,
    as ``bitwright analyze`` says it. tokens: how many were read; text: where they came from. notes: what the reader should know.
    """

    blocks: tuple[BlockError, ...]
    layers: tuple[LayerError, ...]
    histograms: tuple[WeightHistogram, ...]
    activations: tuple[LayerInput, ...]
    tokens: int
    text: str
    notes: tuple[str, ...] = ()


def measure_layers(
    source: Path,
    model: Path,
    *,
    text: str | Path | None = None,
    tokens: torch.Tensor | None = None,
    samples: int = 8,
    length: int = 512,
    seed: int = 1,
    max_memory_bytes: int | None = None,
    histograms: int = 6,
    progress: Progress | None = None,
) -> LayerReport:
    """Compare the quantized ``model`` with ``source``, layer by layer.

    source: a checkpoint folder or GGUF file that is not quantized. model: a folder of any layout, a plain one too, or a GGUF file. text:
    a file as for calibration; None: the source's own samples, with another ``seed`` than calibration's unless told otherwise, for nothing
    should be measured on what it was fitted to. tokens: ``(sequences, length)`` int64 in place of both. samples sequences of ``length``
    tokens are read. max_memory_bytes: a third of it may hold hidden states. histograms: of how many modules.
    Raises InputError for models that transformers cannot run or that do not belong together, NumericError where activations are not finite.
    """
    progress = progress or Silent()
    with (
        open_pair(source, model) as (ours, theirs, recipe),
        tempfile.TemporaryDirectory(prefix="bitwright-layers-") as name,
    ):
        read = _tokens(ours, text, tokens, samples, length, seed, Path(name), progress)
        cap = _ACTIVATION_BYTES if max_memory_bytes is None else max_memory_bytes // 3
        walk = _Walk(ours, theirs, recipe, read, Path(name), cap // 2, histograms, progress)
        walk.run()
        layers = [*walk.layers, *outside_errors(ours, theirs, walk.outside, read.batches, walk.stores[0])]
        notes = _notes(theirs, recipe, walk.scaled)
        for note in notes:
            progress.note(note)
        return LayerReport(
            tuple(walk.blocks), tuple(layers), tuple(found for _, found in walk.histograms), tuple(walk.activations),
            read.count, Path(read.origin).name, notes,
        )  # fmt: skip


def _tokens(
    side: Side, text: str | Path | None, tokens: torch.Tensor | None, samples: int, length: int, seed: int, folder: Path,
    progress: Progress,
) -> CalibrationTokens:  # fmt: skip
    if samples < 1 or length < 2:
        raise InputError(f"{samples} sequences of {length} tokens measure nothing", mend="use 8 of 512")
    limit = getattr(side.skeleton.config, "max_position_embeddings", None)
    length = min(length, limit) if isinstance(limit, int) and limit > 1 else length
    recipe = make_recipe(
        {"method": "rtn", "seed": seed,
         "calibration": {"text": None if text is None else str(text), "samples": samples, "length": length}}
    )  # fmt: skip
    size = int(side.skeleton.model.get_input_embeddings().num_embeddings)
    if tokens is not None:
        windows = tokens[:samples, :length].tolist()
        return tokens_from_windows(windows, recipe.calibration, vocab_size=size, origin="given tokens")
    if text is not None:
        texts, tokenizer = load_texts(recipe.calibration), load_tokenizer(side.folder)
        return tokens_from_texts(texts, tokenizer, recipe.calibration, seed=seed, vocab_size=size, origin=str(text))
    if side.path.is_file():
        raise InputError(
            f"{printable(str(side.path))}: text is sampled from checkpoint folders only", mend="give a text"
        )
    with SafetensorsDir.open(side.path) as plain:
        return sample_tokens(recipe, plain, folder, vocab_size(plain), progress)


def _notes(model: Side, recipe: Recipe | None, scaled: bool) -> tuple[str, ...]:
    notes = []
    if any(stored.inputs for stored in model.stored.values()):
        notes.append("errors of layers are those of the weights; the rounding of their inputs is left out")
    if scaled:
        notes.append("channels were scaled before rounding: weights are compared after scaling them back")
    if recipe is not None and any(isinstance(make_plugin("transforms", t), ModelTransform) for t in recipe.transforms):
        notes.append("the model was rotated before rounding: it is compared with the rotated source")
    return tuple(notes)


def _slot(unit: LinearUnit, prefix: str) -> Slot:
    assert unit.place is not None
    return (unit.place.parameter.removeprefix(prefix), unit.place.expert)


@dataclass(eq=False)
class _Unit:
    """One linear of the loaded blocks. weight, other: ``(out, in)`` of the source and of the model; sums: of its output."""

    unit: LinearUnit
    weight: torch.Tensor
    other: torch.Tensor
    frame: Frame | None
    sums: OutputError

    def model(self) -> torch.Tensor:
        """The model's weight without the factors of a transform."""
        rows = self.unit.place.rows if self.unit.place is not None else None
        return self.other if self.frame is None else self.frame.back(self.other, rows)

    def difference(self) -> torch.Tensor:
        return self.model() - self.weight


@dataclass(eq=False)
class _Walk:
    """Both streams on their way through the blocks. outside: units that belong to no block; scaled: whether channels were."""

    ours: Side
    theirs: Side
    recipe: Recipe | None
    tokens: CalibrationTokens
    folder: Path
    cap_bytes: int
    keep: int
    progress: Progress
    blocks: list[BlockError] = field(default_factory=list)
    layers: list[LayerError] = field(default_factory=list)
    activations: list[LayerInput] = field(default_factory=list)
    histograms: list[tuple[float, WeightHistogram]] = field(default_factory=list)
    scaled: bool = False

    def __post_init__(self) -> None:
        structure = structure_from_skeleton(self.ours.skeleton, self.ours.names, self.ours.source.tensors)
        self.outside = tuple(unit for unit in structure.units if unit.block is None)
        self.inside = [[u for u in structure.units if u.block == i] for i in range(structure.block_count)]
        self.stores: list[ActivationStore] = []
        self.calls: list[list[tuple[BlockCall, ...]]] = []
        for side, name in ((self.ours, "source"), (self.theirs, "model")):
            folder = self.folder / name
            folder.mkdir()
            store, calls = first_hidden(side.runner, self.tokens.batches, folder, self.cap_bytes)
            self.stores.append(store)
            self.calls.append(calls)
        # What precedes a token does not depend on what follows it: a corner of the first batch is called like a batch of its own.
        (sample,) = self.ours.runner.capture([self.tokens.batches[0][:1, :_SAMPLE]])
        self.sample = sample.calls

    def run(self) -> None:
        self.progress.begin(len(self.inside), "blocks")
        for index, units in enumerate(self.inside):
            source = self.ours.runner.load_block(index)
            model = self.theirs.runner.load_block(index)
            try:
                self._block(index, units, source, model)
            finally:
                self.ours.runner.free(source)
                self.theirs.runner.free(model)
            release_free_memory()
            self.progress.step(f"block {index}")

    def _block(self, index: int, units: Sequence[LinearUnit], source: nn.Module, model: nn.Module) -> None:
        prefix = f"{self.ours.skeleton.blocks_path}.{index}."
        units = [unit for unit in units if unit.place is not None]
        calls = [[cast_call(call[index], torch.float32) for call in side] for side in self.calls]
        frames = self._frames(index, {_slot(unit, prefix)[0] for unit in units}, source, model)
        stages = trace(source, prefix, units, self.stores[0][0], calls[0][0])
        groups = [group for stage in stages for group in stage]
        probes = watched_inputs(groups, lambda columns: InputProbe(columns, _OUTLIER), stacks=True)
        pairs: dict[Slot, list[_Unit]] = {}
        for unit in (unit for group in groups for unit in group.units):
            slot = _slot(unit, prefix)
            weight, other = unit_view(source, unit, prefix), unit_view(model, unit, prefix)
            pairs.setdefault(slot, []).append(_Unit(unit, weight, other, frames.get(slot), OutputError(unit.shape[1])))
        watched = {name: value for name, value in source.named_parameters() if any(name == slot[0] for slot in pairs)}
        own = total = signal = 0.0
        with closing(self.stores[0].writer(index + 1)) as first, closing(self.stores[1].writer(index + 1)) as second:
            for batch, (hidden, drifted) in enumerate(zip(*self.stores, strict=True)):
                with InputObserver(watched, _Inputs(pairs, probes).on_input):
                    out = self.ours.runner.run(source, hidden, calls[0][batch])
                alone = self.theirs.runner.run(model, hidden, calls[0][batch])
                both = self.theirs.runner.run(model, drifted, calls[1][batch])
                for what, value in (("the source", out), ("the quantized model", both), ("the quantized block", alone)):
                    if not bool(torch.isfinite(value).all()):
                        raise NumericError(
                            f"block {index}: the output of {what} is not finite", mend="check its weights"
                        )
                signal += energy(out)
                own += energy(alone - out)
                total += energy(both - out)
                first.append(out)
                second.append(both)
            first.finish()
            second.finish()
        self.stores[0].adopt(first)
        self.stores[1].adopt(second)
        self.blocks.append(BlockError(index, ratio(own, signal), ratio(total, signal)))
        for seen in probes:
            if seen.probe.count:
                label, layers = label_of(seen.units, index), [unit.name for unit in seen.units]
                self.activations.append(summarize(seen.probe, block=index, label=label, layers=layers, top=0))
        self._finish(index, [pair for slot in pairs.values() for pair in slot if pair.sums.tokens])

    def _frames(self, index: int, matrices: set[str], source: nn.Module, model: nn.Module) -> dict[Slot, Frame]:
        """Scaled channels of a block; searched where there is a sign of any."""
        told = self.recipe is not None and any(
            not isinstance(make_plugin("transforms", choice), ModelTransform) for choice in self.recipe.transforms
        )
        if not told and not changed_outside(source, model, matrices):
            return {}
        hidden = self.stores[0][0][:1, :_SAMPLE].contiguous()
        call = cast_call(self.sample[index], torch.float32)
        found = find_frames(source, model, lambda: self.ours.runner.run(source, hidden, call), hidden)
        self.scaled |= bool(found)
        return found

    def _finish(self, index: int, pairs: Sequence[_Unit]) -> None:
        """The records of one block."""
        for pair in pairs:
            unit, difference = pair.unit, pair.difference()
            assert unit.place is not None
            relative = pair.sums.relative
            stored = self.theirs.stored.get(unit.place)
            self.layers.append(
                LayerError(
                    module=unit.name,
                    block=index,
                    role=unit.name.partition(f".{index}.")[2] or unit.name,
                    scheme=stored.scheme if stored is not None else "unknown",
                    relative=relative,
                    snr_db=snr_db(relative),
                    weight=ratio(energy(difference), energy(pair.weight)),
                    top_channels=pair.sums.top_channels(difference),
                )
            )
            if relative > 0 and (len(self.histograms) < self.keep or relative > self.histograms[-1][0]):
                self.histograms.append((relative, weight_histogram(unit.name, pair.weight, pair.model())))
                self.histograms.sort(key=lambda entry: -entry[0])
                del self.histograms[self.keep :]


class _Inputs:
    """Hands on what linears read: to the errors of all of them, to a probe once where several share an input."""

    def __init__(self, pairs: dict[Slot, list[_Unit]], probes: Sequence[Watched[InputProbe]]) -> None:
        self._pairs = pairs
        self._probes = {slot: seen for seen in probes for slot in seen.slots}
        for seen in probes:
            seen.last = None

    def on_input(self, slot: Slot, x: torch.Tensor, token: int) -> None:
        for pair in self._pairs.get(slot, ()):
            pair.sums.update(x, pair.weight, pair.difference())
        seen = self._probes.get(slot)
        if seen is not None and (slot[1] is not None or seen.last != token):
            seen.last = token
            seen.probe.update(x)
