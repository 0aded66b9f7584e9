"""Send text through a model one decoder block at a time and watch what its linears read; nothing is quantized or written.

The hidden states go through the blocks as in a calibrated run. Of each input only what a probe keeps stays, and a block's probes are
handed on before the next block is loaded.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch
from torch import nn

from bitwright.engine.activations import ActivationStore, ActivationWriter
from bitwright.engine.blockwise import cast_call
from bitwright.engine.calibration import CalibrationTokens, load_texts, load_tokenizer, tokens_from_texts
from bitwright.engine.collect import Group, trace
from bitwright.engine.plan import Plan, make_plan
from bitwright.engine.progress import Progress
from bitwright.engine.recipe import Recipe, make_recipe
from bitwright.engine.run import open_source, vocab_size
from bitwright.engine.sample import sample_tokens
from bitwright.errors import InputError, NumericError
from bitwright.io.heap import release_free_memory
from bitwright.io.safetensors_dir import SafetensorsDir
from bitwright.model.blocks import BlockCall, BlockRunner
from bitwright.model.observe import InputObserver, Slot
from bitwright.model.structure import LinearUnit

__all__ = ["Probe", "Watch", "Watched", "first_hidden", "watched_inputs", "watching"]

#: Hidden states that are held in memory; what is beyond is read back from temporary files.
_ACTIVATION_BYTES = 1 << 30


class Probe(Protocol):
    """What is kept of one input."""

    @property
    def count(self) -> int:
        """Tokens seen."""

    @property
    def finite(self) -> bool:
        """False once a value was NaN or infinite."""

    def update(self, x: torch.Tensor) -> None:
        """Take in ``(tokens, columns)``."""


P = TypeVar("P", bound=Probe)


@dataclass
class Watched(Generic[P]):
    """Linears that read the same input; where expert stacks are watched as one, all experts of a stack.

    last: token of the input that was counted last in this run, which dense linears share.
    """

    slots: tuple[Slot, ...]
    units: tuple[LinearUnit, ...]
    probe: P
    last: int | None = None


@contextmanager
def watching(
    model: Path,
    make_probe: Callable[[int], P],
    *,
    text: str | Path | None,
    samples: int,
    length: int,
    seed: int,
    max_memory_bytes: int | None,
    progress: Progress,
    stacks: bool = True,
    shuffle: bool = True,
    allow_pickle: bool = False,
) -> Iterator[Watch[P]]:
    """Open the checkpoint folder ``model`` and its text for a walk through the blocks.

    make_probe: from an input's columns. text: a file as for calibration; None: the model's own samples. samples sequences of ``length``
    tokens are read. stacks: all experts of a stack share a probe. max_memory_bytes: a third of it may hold hidden states. Raises
    InputError for models whose blocks transformers cannot run.
    """
    recipe = make_recipe(
        {
            "method": "rtn", "scheme": "affine", "bits": 8, "group_size": "channel", "layout": "native", "seed": seed,
            "calibration": {"text": None if text is None else str(text), "samples": samples, "length": length, "shuffle": shuffle},
        }
    )  # fmt: skip
    with (
        open_source(model, allow_pickle=allow_pickle) as source,
        tempfile.TemporaryDirectory(prefix="bitwright-watch-") as folder,
    ):
        given = None if text is None else _tokens(recipe, source)
        plan = make_plan(recipe, source)
        if plan.skeleton is None:
            raise InputError(f"{model}: transformers cannot run this model's blocks", mend="use a model it knows")
        tokens = given or sample_tokens(recipe, source, Path(folder), vocab_size(source), progress)
        for note in tokens.warnings:
            progress.note(note)
        cap = _ACTIVATION_BYTES if max_memory_bytes is None else max_memory_bytes // 3
        yield Watch(plan, source, tokens, Path(folder), cap, make_probe, stacks, progress)


def _tokens(recipe: Recipe, source: SafetensorsDir) -> CalibrationTokens:
    calibration = recipe.calibration
    texts, tokenizer = load_texts(calibration), load_tokenizer(source.path)
    return tokens_from_texts(
        texts, tokenizer, calibration, seed=recipe.seed, vocab_size=vocab_size(source), origin=str(calibration.text)
    )


class Watch(Generic[P]):
    """A walk through the blocks. tokens: what is read."""

    def __init__(
        self,
        plan: Plan,
        source: SafetensorsDir,
        tokens: CalibrationTokens,
        folder: Path,
        cap_bytes: int,
        make_probe: Callable[[int], P],
        stacks: bool,
        progress: Progress,
    ) -> None:
        assert plan.skeleton is not None
        assert plan.names is not None
        self.tokens = tokens
        self._plan, self._progress, self._make_probe, self._stacks = plan, progress, make_probe, stacks
        self._prefix = plan.skeleton.blocks_path
        self._runner = BlockRunner(plan.skeleton, plan.names, source, plan.compute_dtype)
        self._store, self._calls = first_hidden(self._runner, tokens.batches, folder, cap_bytes)

    def run(self) -> Iterator[tuple[int, list[Watched[P]]]]:
        """Block by block, in order: its number and what was seen there. NumericError where activations are not finite."""
        count = self._plan.structure.block_count
        self._progress.begin(count, "blocks")
        for index in range(count):
            yield index, self._block(index)
            release_free_memory()
            self._progress.step(f"block {index}")

    def _block(self, index: int) -> list[Watched[P]]:
        """What was seen in one block; where a narrow dtype overflows, it is repeated in float32."""
        for dtype in dict.fromkeys((self._store[0].dtype, torch.float32)):
            self._runner.dtype = dtype
            block = self._runner.load_block(index)
            try:
                with closing(self._store.writer(index + 1)) as writer:
                    watched = self._watch(block, index, dtype, writer)
                    if watched is not None:
                        writer.finish()
                        self._store.adopt(writer)
                        return watched
            finally:
                self._runner.free(block)
            if dtype != torch.float32:
                self._progress.note(f"block {index}: activations overflow in {dtype}; repeated in float32")
        raise NumericError(f"block {index}: activations are not finite", mend="check the weights of this block")

    def _watch(
        self, block: nn.Module, index: int, dtype: torch.dtype, writer: ActivationWriter
    ) -> list[Watched[P]] | None:
        """Run all batches through a loaded block; None where something is not finite."""
        calls = [cast_call(call[index], dtype) for call in self._calls]
        units = [unit for unit in self._plan.structure.units if unit.block == index and unit.place is not None]
        stages = trace(block, f"{self._prefix}.{index}.", units, self._store[0].to(dtype), calls[0])
        watched = self._watched([group for stage in stages for group in stage])
        of_slot = {slot: seen for seen in watched for slot in seen.slots}

        def on_input(slot: Slot, x: torch.Tensor, token: int) -> None:
            seen = of_slot[slot]
            if slot[1] is None:
                if seen.last == token:
                    return
                seen.last = token
            seen.probe.update(x)

        names = {name for name, _ in of_slot}
        parameters = {name: value for name, value in block.named_parameters() if name in names}
        for call, hidden in zip(calls, self._store, strict=True):
            for seen in watched:
                seen.last = None
            with InputObserver(parameters, on_input):
                out = self._runner.run(block, hidden.to(dtype), call)
            if not bool(torch.isfinite(out).all()) or not all(seen.probe.finite for seen in watched):
                return None
            writer.append(out)
        return [seen for seen in watched if seen.probe.count]

    def _watched(self, groups: Sequence[Group]) -> list[Watched[P]]:
        return watched_inputs(groups, self._make_probe, stacks=self._stacks)


def first_hidden(
    runner: BlockRunner, batches: Sequence[torch.Tensor], folder: Path, cap_bytes: int
) -> tuple[ActivationStore, list[tuple[BlockCall, ...]]]:
    """What enters the first block, stored in ``folder``, and how every block is called for each batch."""
    captures = runner.capture(batches)
    store = ActivationStore(folder, cap_bytes=cap_bytes, total_bytes=sum(capture.hidden.nbytes for capture in captures))
    with closing(store.writer(0)) as writer:
        for capture in captures:
            writer.append(capture.hidden)
        writer.finish()
    store.adopt(writer)
    return store, [capture.calls for capture in captures]


def watched_inputs(groups: Sequence[Group], make_probe: Callable[[int], P], *, stacks: bool) -> list[Watched[P]]:
    """One for each group of dense linears, one for all experts of a stack together, or (stacks False) one for each expert."""
    together: dict[object, list[Group]] = {}
    for group in groups:
        name, expert = group.slots[0]
        together.setdefault(name if expert is not None and stacks else group.slots, []).append(group)
    return [
        Watched(
            tuple(slot for group in stack for slot in group.slots),
            tuple(unit for group in stack for unit in group.units),
            make_probe(stack[0].columns),
        )
        for stack in together.values()
    ]
