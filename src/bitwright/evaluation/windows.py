"""Cut a token stream into evaluation windows: the conventions that people quote.

* ``non-overlapping``: windows of ``length`` tokens side by side; every token but the first of each window is predicted. This is
  what GPTQ's and most papers' "perplexity on WikiText2" means.
* ``sliding``: windows of ``length`` tokens that advance by ``stride``; only the tokens that are new to a window count, so that each
  token is predicted once with at least ``length - stride`` tokens of context (the recipe in transformers' documentation).
* ``llama.cpp``: windows side by side, of which only the second half counts, so that every prediction has at least half a window of
  context; where the model wants a first token (BOS), it stands in the place of each window's first (``llama-perplexity``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bitwright.errors import InputError

__all__ = ["Window", "make_windows", "second_halves"]


@dataclass(frozen=True)
class Window:
    """tokens: ``(1, length)`` int64; new: index of the first token that no window before it held.

    inner: only positions whose next token lies in the window count, from ``new`` on (llama.cpp's way); else the distribution after the
    last token counts as well, and token ``new`` is predicted from the position before it.
    """

    tokens: torch.Tensor
    new: int = 0
    inner: bool = False

    @property
    def first(self) -> int:
        """Index of the first token whose prediction counts: the first new one, but nothing predicts token 0."""
        return self.new + 1 if self.inner else max(self.new, 1)

    @property
    def positions(self) -> slice:
        """The positions whose whole distribution counts."""
        return slice(self.new, int(self.tokens.shape[1]) - int(self.inner))

    @property
    def counted(self) -> int:
        """Predictions that count."""
        return int(self.tokens.shape[1]) - self.first


def make_windows(
    ids: Sequence[int], *, length: int, stride: int | None = None, limit: int | None = None
) -> list[Window]:
    """Windows over a token stream; ``stride`` None gives non-overlapping ones. limit: at most this many windows.

    >>> [w.tokens.tolist()[0] for w in make_windows(range(6), length=3)]
    [[0, 1, 2], [3, 4, 5]]
    >>> [(w.tokens.tolist()[0], w.first) for w in make_windows(range(6), length=4, stride=2)]
    [([0, 1, 2, 3], 1), ([2, 3, 4, 5], 2)]
    """
    if length < 2:
        raise InputError(f"a window of {length} tokens predicts nothing", mend="use a length of at least 2")
    if stride is not None and not 0 < stride <= length:
        raise InputError(f"stride {stride} is outside 1..{length}", mend="use a stride of at most the window length")
    if limit is not None and limit < 1:
        raise InputError(f"{limit} windows measure nothing", mend="use at least 1")
    stream = torch.tensor(list(ids), dtype=torch.int64)
    if len(stream) < 2:
        raise InputError("the evaluation text has fewer than two tokens", mend="give a longer text")
    windows: list[Window] = []
    if stride is None:
        if len(stream) < length:
            return [Window(stream[None])]
        for start in range(0, len(stream) - length + 1, length):
            windows.append(Window(stream[None, start : start + length]))
            if limit is not None and len(windows) >= limit:
                break
        return windows
    previous_end = 0
    for start in range(0, len(stream), stride):
        end = min(start + length, len(stream))
        window = Window(stream[None, start:end], max(previous_end - start, 0))
        if window.counted > 0:
            windows.append(window)
        previous_end = end
        if end == len(stream) or (limit is not None and len(windows) >= limit):
            break
    return windows


def second_halves(
    ids: Sequence[int], *, length: int, first_token: int | None = None, limit: int | None = None
) -> list[Window]:
    """``llama-perplexity``'s windows. first_token: put in the place of each window's first token; limit: at most this many.

    >>> [(w.tokens.tolist()[0], w.first, w.counted) for w in second_halves(range(9), length=4, first_token=77)]
    [([77, 1, 2, 3], 3, 1), ([77, 5, 6, 7], 3, 1)]
    """
    if length < 4:
        raise InputError(f"half a window of {length} tokens predicts nothing", mend="use a length of at least 4")
    found: list[Window] = []
    for window in make_windows(ids, length=length, limit=limit):
        if window.tokens.shape[1] < length:
            raise InputError(
                f"the evaluation text has {window.tokens.shape[1]} tokens, fewer than a window of {length}",
                mend="give a longer text, or use a smaller length",
            )
        tokens = window.tokens.clone()
        if first_token is not None:
            tokens[0, 0] = first_token
        found.append(Window(tokens, length // 2, inner=True))
    return found
