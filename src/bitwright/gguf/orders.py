"""Orders in which GGUF wants the rows of attention weights, as permutations: GGUF row ``i`` is row ``order[i]`` of the checkpoint.

Source: llama.cpp's converter, by what it does to each architecture (MIT).
"""

from __future__ import annotations

import numpy as np

from bitwright.errors import InputError
from bitwright.gguf.architecture import RowOrder
from bitwright.gguf.settings import Model

__all__ = ["groups_to_parts", "interleave", "rope_keys", "rope_queries", "thirds_of_heads"]


def interleave(rows: int, heads: int) -> RowOrder:
    """Halves of each head become pairs, as rotary embeddings over neighbouring rows want them.

    >>> interleave(8, 1).tolist()
    [0, 4, 1, 5, 2, 6, 3, 7]
    """
    if rows % (2 * heads):
        raise InputError(f"{rows} rows are not {heads} heads of even size", mend="check the config's head counts")
    return np.arange(rows, dtype=np.int64).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def rope_queries(model: Model, rows: int) -> RowOrder:
    """``interleave`` over the query heads."""
    return interleave(rows, model.heads)


def rope_keys(model: Model, rows: int) -> RowOrder:
    """``interleave`` over the key heads."""
    return interleave(rows, model.kv_heads)


def thirds_of_heads(model: Model, rows: int) -> RowOrder:
    """From q, k, v of one head after the other (GPT-NeoX, BLOOM) to all of q, all of k, all of v.

    The rows of two heads of size one, ``q0 k0 v0 q1 k1 v1``, become ``q0 q1 k0 k1 v0 v1``.
    """
    if rows % (3 * model.heads):
        raise InputError(f"{rows} rows are not 3 x {model.heads} heads", mend="check the config's head count")
    return np.arange(rows, dtype=np.int64).reshape(model.heads, 3, -1).swapaxes(0, 1).reshape(-1)


def groups_to_parts(model: Model, rows: int) -> RowOrder:
    """From one group of queries with its key and its value after the other (Falcon) to all of q, all of k, all of v."""
    groups, share = model.kv_heads, model.heads // model.kv_heads + 2
    if rows % (groups * share):
        raise InputError(f"{rows} rows are not {groups} groups of {share} heads", mend="check the config's head counts")
    heads = np.arange(rows, dtype=np.int64).reshape(groups, share, -1)
    return np.concatenate([heads[:, :-2].reshape(-1), heads[:, -2].reshape(-1), heads[:, -1].reshape(-1)])
