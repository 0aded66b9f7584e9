"""Watch which matrices of a block read which tensors, and what their outputs are added to, while transformers' code runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["AttentionObserver", "InputObserver", "InputQuantizer", "Slot", "product_of"]

#: A matrix inside a block: parameter name relative to the block, and the expert index for 3-D parameters.
Slot = tuple[str, int | None]


def product_of(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], by_storage: Mapping[int, tuple[str, torch.Tensor]]
) -> tuple[int, Slot, bool] | None:
    """Whether a call multiplies by a watched matrix: position of the input among ``args``, the matrix, and whether it is ``(in, out)``.

    Linear (F.linear), Conv1D (addmm) and plain matmul by a parameter or a slice of a 3-D parameter are known. by_storage: address of
    a parameter's storage -> its name and itself.
    """
    name = getattr(func, "__name__", "")
    if func is torch.nn.functional.linear:
        at, weight, transposed = 0, args[1] if len(args) > 1 else kwargs.get("weight"), False
    elif func is torch.addmm and len(args) >= 3:
        at, weight, transposed = 1, args[2], True
    elif name in ("matmul", "__matmul__", "mm") and len(args) >= 2:
        at, weight, transposed = 0, args[1], True
    else:
        return None
    if not isinstance(weight, torch.Tensor) or weight.is_meta or weight.dim() != 2:
        return None
    found = by_storage.get(weight.untyped_storage().data_ptr())
    if found is None:
        return None
    parameter, whole = found
    if transposed and weight.stride(0) < weight.stride(1):
        transposed = False  # x @ w.T
    if whole.dim() == 2:
        return at, (parameter, None), transposed
    expert = (weight.storage_offset() - whole.storage_offset()) // whole.stride(0)
    return at, (parameter, expert), transposed


class InputQuantizer(TorchFunctionMode):
    """Rounds what watched matrices read, as the quantized model will: slot -> function of the input."""

    def __init__(
        self, watched: Mapping[str, torch.Tensor], change: Mapping[Slot, Callable[[torch.Tensor], torch.Tensor]]
    ) -> None:
        super().__init__()
        self._by_storage = {value.untyped_storage().data_ptr(): (name, value) for name, value in watched.items()}
        self._change = change

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        found = product_of(func, args, kwargs, self._by_storage)
        if found is None or found[1] not in self._change:
            return func(*args, **kwargs)
        at = found[0]
        return func(*args[:at], self._change[found[1]](args[at]), *args[at + 1 :], **kwargs)


class AttentionObserver(TorchFunctionMode):
    """Calls ``on_attention(key, value)`` wherever attention is computed: ``(batch, heads, tokens, head_dim)`` each."""

    def __init__(self, on_attention: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        super().__init__()
        self._on_attention = on_attention

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            key, value = (args[i] if len(args) > i else kwargs[name] for i, name in ((1, "key"), (2, "value")))
            self._on_attention(key, value)
        return func(*args, **kwargs)


class InputObserver(TorchFunctionMode):
    """Sees every matrix product with a watched parameter while a block runs.

    watched: parameter name relative to the block -> tensor. ``on_input(slot, x, token)`` is called with ``x (tokens, in)`` and a
    token that is equal for linears that read the very same tensor within one run. Linear (F.linear), Conv1D (addmm) and plain
    matmul by a parameter or a slice of a 3-D parameter are seen. ``on_sum(slot, other)`` is called where the output of a watched
    linear is added to another tensor of its shape, as at the end of a residual branch: other is ``(tokens, out)``.
    """

    def __init__(
        self,
        watched: Mapping[str, torch.Tensor],
        on_input: Callable[[Slot, torch.Tensor, int], None],
        on_sum: Callable[[Slot, torch.Tensor], None] | None = None,
    ) -> None:
        super().__init__()
        self._by_storage = {value.untyped_storage().data_ptr(): (name, value) for name, value in watched.items()}
        self._on_input = on_input
        self._on_sum = on_sum
        self._inputs: list[torch.Tensor] = []
        self._outputs: dict[int, tuple[Slot, torch.Tensor]] = {}

    def new_run(self) -> None:
        """Forget the tensors of the run before; needed because memory addresses are reused."""
        self._inputs.clear()
        self._outputs.clear()

    def _token(self, x: torch.Tensor) -> int:
        for index, seen in enumerate(self._inputs):
            if seen is x or (
                seen.data_ptr() == x.data_ptr() and seen.shape[-1] == x.shape[-1] and seen.numel() == x.numel()
            ):
                return index
        # Kept alive until the run ends, so that its address stays its own.
        self._inputs.append(x)
        return len(self._inputs) - 1

    def _note_sum(self, first: Any, second: Any) -> None:
        for out, other in ((first, second), (second, first)):
            if not isinstance(out, torch.Tensor) or not isinstance(other, torch.Tensor) or out.shape != other.shape:
                continue
            found = self._outputs.get(out.data_ptr())
            if found is not None and found[1].numel() == out.numel() and self._on_sum is not None:
                del self._outputs[out.data_ptr()]
                self._on_sum(found[0], other.reshape(-1, other.shape[-1]))
                return

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        found = product_of(func, args, kwargs, self._by_storage)
        if found is None:
            if getattr(func, "__name__", "") in ("add", "add_") and len(args) >= 2 and self._outputs:
                self._note_sum(args[0], args[1])
            return func(*args, **kwargs)
        at, slot, _ = found
        x = args[at]
        self._on_input(slot, x.reshape(-1, x.shape[-1]), self._token(x))
        out = func(*args, **kwargs)
        if self._on_sum is not None:
            # Kept alive for the same reason as the inputs.
            self._outputs[out.data_ptr()] = (slot, out)
        return out
