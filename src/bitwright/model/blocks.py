"""Run one decoder block at a time: fill it from the checkpoint, feed it captured inputs, and watch what its linears read.

The inputs of the blocks (hidden states, masks, position embeddings) are captured once, by running transformers' own model code
with every block replaced by a recorder. Which linears share an input is seen while the block runs: the same tensor arrives at q,
k and v. Nothing here depends on names or on the architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bitwright.core.source import Source
from bitwright.errors import InputError
from bitwright.model.names import NameMap
from bitwright.model.skeleton import Skeleton, compute_buffers, materialize_buffers

__all__ = ["BlockCall", "BlockRunner", "Capture"]


@dataclass(frozen=True)
class BlockCall:
    """How the model calls one block: everything but the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Recorder(nn.Module):
    """Stands in for a block: notes its call and passes the hidden states on."""

    def __init__(self, block: nn.Module, calls: list[BlockCall], seen: list[torch.Tensor], as_tuple: bool) -> None:
        super().__init__()
        self._original = [block]  # in a list, so that it does not become a submodule
        self._calls = calls
        self._seen = seen
        self._as_tuple = as_tuple

    def __getattr__(self, name: str) -> Any:
        # Models read attributes such as attention_type off their blocks.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_original"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            hidden, rest = args[0], args[1:]
        else:
            hidden, rest = kwargs.pop("hidden_states"), ()
        self._calls.append(BlockCall(tuple(rest), kwargs))
        self._seen.append(hidden)
        return (hidden,) if self._as_tuple else hidden


@dataclass(frozen=True)
class Capture:
    """What enters the first block for one batch, and how every block is called for batches of this shape."""

    hidden: torch.Tensor
    calls: tuple[BlockCall, ...]


class BlockRunner:
    """Materializes parts of one skeleton from one checkpoint.

    dtype: dtype in which blocks run. Peak memory is the embeddings while capturing, then one block.
    """

    def __init__(self, skeleton: Skeleton, names: NameMap, source: Source, dtype: torch.dtype) -> None:
        self.skeleton = skeleton
        self.names = names
        self.source = source
        self.dtype = dtype
        self._as_tuple = False

    # --- filling -------------------------------------------------------------------------------------------------------

    def fill(self, prefix: str, module: nn.Module) -> None:
        """Load every parameter and persistent buffer below ``module``, whose full path is ``prefix``."""
        loaded: set[str] = set()
        lead = prefix + "." if prefix else ""
        state = module.state_dict(keep_vars=True)
        wanted = {lead + name for name, value in state.items() if value.is_meta}
        for target in self.names.parameters:
            if target not in wanted or target in loaded:
                continue
            for name, value in self.names.load(target, self.source.read, self.skeleton.model).items():
                _assign(module, name.removeprefix(lead), value, self.dtype)
                loaded.add(name)
        for name in wanted - loaded:
            origin = self.skeleton.tied.get(name)
            if origin is None or origin not in self.names.parameters:
                raise InputError(f"the checkpoint lacks {name}", mend="check the download")
            (value,) = self.names.load(origin, self.source.read, self.skeleton.model).values()
            _assign(module, name.removeprefix(lead), value, self.dtype)
        materialize_buffers(self.skeleton.model, module)

    def load_block(self, index: int) -> nn.Module:
        """Block ``index`` with its weights; hand it back with ``free``."""
        block = self.skeleton.blocks[index]
        self.fill(f"{self.skeleton.blocks_path}.{index}", block)
        return block

    def free(self, module: nn.Module) -> None:
        """Put a filled module back on the meta device."""
        module.to("meta")

    # --- capturing -----------------------------------------------------------------------------------------------------

    def capture(self, batches: Iterable[torch.Tensor]) -> list[Capture]:
        """Embed every batch ``(batch, tokens)`` int64 and note how the blocks are called.

        Everything outside the blocks but the output head is loaded for this and freed again. Raises InputError for
        architectures whose blocks do not form a chain of hidden states.
        """
        base = self.skeleton.model.base_model
        base_path = next((n for n, m in self.skeleton.model.named_modules() if m is base), "")
        outside = [
            (name, child)
            for name, child in base.named_modules()
            if not self._inside_blocks(_join(base_path, name)) and _owns_tensors(child)
        ]
        for name, child in outside:
            self._fill_shallow(_join(base_path, name), child)
        blocks = self.skeleton.blocks
        originals = list(blocks)
        shapes: dict[tuple[int, ...], tuple[BlockCall, ...]] = {}
        result: list[Capture] = []
        try:
            for tokens in batches:
                hidden, calls = self._record(base, blocks, originals, tokens)
                shape = tuple(tokens.shape)
                # Unpadded batches of one shape have the same masks and positions; one copy serves all.
                result.append(Capture(hidden, shapes.setdefault(shape, calls)))
        finally:
            for i, block in enumerate(originals):
                blocks[i] = block
            for _, child in outside:
                _to_meta_shallow(child)
        return result

    def _record(
        self, base: nn.Module, blocks: nn.ModuleList, originals: list[nn.Module], tokens: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[BlockCall, ...]]:
        for as_tuple in (self._as_tuple, not self._as_tuple):
            calls: list[BlockCall] = []
            seen: list[torch.Tensor] = []
            for i, block in enumerate(originals):
                blocks[i] = _Recorder(block, calls, seen, as_tuple)
            try:
                with torch.no_grad():
                    base(input_ids=tokens, use_cache=False)
            except (IndexError, TypeError, RuntimeError, ValueError, AttributeError) as error:
                failure: Exception | None = error
            else:
                failure = None
            chained = len(seen) == len(originals) and all(hidden is seen[0] for hidden in seen)
            if failure is None and chained:
                self._as_tuple = as_tuple
                return seen[0], tuple(calls)
        kind = type(base).__name__
        raise InputError(
            f"{kind}: its blocks are not a plain chain of hidden states"
            + (f" ({str(failure).splitlines()[0]})" if failure and str(failure) else ""),
            mend="use a data-free method (--method rtn), which needs no model code",
        )

    def _inside_blocks(self, path: str) -> bool:
        return path == self.skeleton.blocks_path or path.startswith(self.skeleton.blocks_path + ".")

    def _fill_shallow(self, path: str, module: nn.Module) -> None:
        """Fill a module's own tensors, not its children's."""
        own = {f"{path}.{n}" if path else n for n, p in module.named_parameters(recurse=False) if p.is_meta}
        own |= {
            f"{path}.{n}" if path else n
            for n, b in module.named_buffers(recurse=False)
            if b.is_meta and n not in module._non_persistent_buffers_set
        }
        lead = path + "." if path else ""
        for name in sorted(own):
            origin = name if name in self.names.parameters else self.skeleton.tied.get(name, name)
            if origin not in self.names.parameters:
                raise InputError(f"the checkpoint lacks {name}", mend="check the download")
            made = self.names.load(origin, self.source.read, self.skeleton.model)
            _assign(module, name.removeprefix(lead), made[origin], self.dtype)
        compute_buffers(self.skeleton.model, module)

    # --- running -------------------------------------------------------------------------------------------------------

    @staticmethod
    def run(block: nn.Module, hidden: torch.Tensor, call: BlockCall) -> torch.Tensor:
        """Output hidden states of a filled block: same shape as ``hidden`` ``(batch, tokens, width)``."""
        with torch.no_grad():
            out = block(hidden, *call.args, **call.kwargs)
        result = out[0] if isinstance(out, tuple) else out
        assert isinstance(result, torch.Tensor)
        return result

    @contextmanager
    def head(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """``hidden -> logits``: what the model does after its last block, final norm and output head, in ``dtype``.

        hidden: ``(batch, tokens, width)``. The head's weight stays in its stored dtype and is cast piece by piece, so that a large
        vocabulary does not cost twice its size; the input embeddings are not loaded.
        """
        model = self.skeleton.model
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        modules = [
            (name, module)
            for name, module in model.named_modules()
            if not self._inside_blocks(name) and _owns_tensors(module) and module not in (embedding, head)
        ]
        for name, module in modules:
            self._fill_shallow(name, module)
        if head is not None:
            path = next(name for name, module in model.named_modules() if module is head)
            model.set_output_embeddings(
                _PiecewiseHead(*(self._stored(f"{path}.{leaf}") for leaf in ("weight", "bias")))
            )
        blocks = self.skeleton.blocks
        originals = list(blocks)

        def logits(hidden: torch.Tensor) -> torch.Tensor:
            for i, block in enumerate(originals):
                blocks[i] = _Replay(block, hidden, self._as_tuple)
            with torch.no_grad():
                found: torch.Tensor = model(inputs_embeds=hidden, use_cache=False).logits
            return found

        try:
            yield logits
        finally:
            for i, block in enumerate(originals):
                blocks[i] = block
            if head is not None:
                model.set_output_embeddings(head)
            for _, module in modules:
                _to_meta_shallow(module)

    def _stored(self, name: str) -> torch.Tensor | None:
        """A parameter outside the blocks in its stored dtype, through its tie where it has one; None where there is none."""
        origin = name if name in self.names.parameters else self.skeleton.tied.get(name, name)
        if origin not in self.names.parameters:
            return None
        return self.names.load(origin, self.source.read, self.skeleton.model)[origin]


class _PiecewiseHead(nn.Module):
    """A linear layer whose weight is cast to the input's dtype in pieces of rows."""

    def __init__(self, weight: torch.Tensor | None, bias: torch.Tensor | None) -> None:
        super().__init__()
        assert weight is not None
        self._weight = [weight]
        self._bias = [bias]
        self.weight = weight[:0]  # some models ask for its dtype

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        parts = [nn.functional.linear(hidden, piece.to(hidden.dtype)) for piece in torch.split(self._weight[0], 4096)]
        out = torch.cat(parts, dim=-1)
        return out if self._bias[0] is None else out + self._bias[0].to(out.dtype)


class _Replay(nn.Module):
    """Stands in for a block and returns known hidden states, so that what follows the blocks can be run alone."""

    def __init__(self, block: nn.Module, hidden: torch.Tensor, as_tuple: bool) -> None:
        super().__init__()
        self._original = [block]
        self._hidden = [hidden]
        self._as_tuple = as_tuple

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_original"][0], name)

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return (self._hidden[0],) if self._as_tuple else self._hidden[0]


def _join(lead: str, name: str) -> str:
    return f"{lead}.{name}" if lead and name else lead or name


def _owns_tensors(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False))


def _assign(module: nn.Module, path: str, value: torch.Tensor, dtype: torch.dtype) -> None:
    owner_path, _, leaf = path.rpartition(".")
    owner = module.get_submodule(owner_path) if owner_path else module
    value = value.to(dtype) if value.is_floating_point() else value
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value


def _to_meta_shallow(module: nn.Module) -> None:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = buffer.to("meta")
