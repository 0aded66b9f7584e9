"""Pack and unpack n-bit unsigned integers as one contiguous little-endian bit stream.

One rule serves every integer layout: along the packed axis, fields of ``bits`` bits follow each other least significant
bit first, and the stream is cut into 32-bit words. For 2, 4 and 8 bits no field crosses a word; for 3, 5 and 6 some do.

Eight codes, one per byte, are one 64-bit lane. Three shift-and-mask steps press its eight fields together (8 -> 16 ->
32 -> 64 bits), after which the lane's low ``bits`` bytes are the stream; unpacking runs the steps backwards. The same
arithmetic serves every width. Rows go in pieces that stay in the processor's cache, so that temporaries are small
whatever the weight's size. Words are reinterpreted in memory, which is right on little-endian machines alone (every
platform that PyTorch ships wheels for).
"""

from __future__ import annotations

import torch

from bitwright.errors import InputError

__all__ = ["pack_words", "packed_words", "unpack_words"]

#: Codes per piece. 2^18 was fastest of 2^16 .. 2^22 on a 4096 x 11008 weight (temporaries of 256 KiB).
_PIECE = 1 << 18


def packed_words(count: int, bits: int) -> int:
    """32-bit words that ``count`` fields need.

    >>> packed_words(32, 3), packed_words(9, 4)
    (3, 2)
    """
    return -(-count * bits // 32)


def _steps(bits: int) -> list[tuple[int, int, int]]:
    """``(shift, low, high)`` of the three steps: fields at ``high << shift`` move down next to those at ``low``."""
    steps = []
    for step in range(3):
        field, lane = bits << step, 16 << step
        low = sum(((1 << field) - 1) << at for at in range(0, 64, lane))
        steps.append(((8 - bits) << step, low, low << field))
    return steps


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise InputError(f"cannot pack fields of {bits} bits", mend="use 1 to 8 bits")


def _lanes(codes: torch.Tensor) -> torch.Tensor:
    """``(rows, count)`` uint8 to ``(rows, lanes)`` int64 of eight codes each, padded with zeros to whole words."""
    rows, count = codes.shape
    padded = -(-count // 32) * 32
    if padded != count:
        whole = torch.zeros(rows, padded, dtype=torch.uint8, device=codes.device)
        whole[:, :count] = codes
        return whole.view(torch.int64)
    # One dimension first: a matrix with one row may have any stride. A view as int64 needs an aligned start.
    flat = codes.contiguous().reshape(-1)
    return (flat.clone() if flat.storage_offset() % 8 else flat).view(torch.int64).view(rows, -1)


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """``(rows, count)`` integers in ``[0, 2^bits)`` to ``(rows, ceil(count*bits/32))`` int32; padded with zero fields.

    Raises InputError for codes outside the range: they would spoil their neighbours.

    >>> [hex(word) for word in pack_words(torch.arange(8)[None], 4)[0].tolist()]
    ['0x76543210']
    """
    _check_bits(bits)
    rows, count = codes.shape
    out = torch.empty(rows, packed_words(count, bits), dtype=torch.int32, device=codes.device)
    if not out.numel():
        return out
    if int(codes.max()) >= 1 << bits or (codes.dtype != torch.uint8 and int(codes.min()) < 0):
        raise InputError(f"codes {int(codes.min())} .. {int(codes.max())} do not fit into {bits} bits")
    step = max(1, _PIECE // count)
    for start in range(0, rows, step):
        out[start : start + step] = _press(_lanes(codes[start : start + step].to(torch.uint8)), bits)[:, : out.shape[1]]
    return out


def _press(lanes: torch.Tensor, bits: int) -> torch.Tensor:
    """``(rows, n)`` int64 of eight codes each to ``(rows, n*bits/4)`` int32 words. Lanes are not changed."""
    rows = lanes.shape[0]
    if bits < 8:
        # The topmost field of a lane is below 2^7, so lanes are not negative and >> shifts zeros in.
        for shift, low, high in _steps(bits):
            lanes = (lanes & low) | (lanes >> shift).bitwise_and_(high)
    if bits == 4:
        return lanes.view(torch.int32)[:, ::2]
    fields = lanes.view(torch.uint8).view(rows, -1, 8)[:, :, :bits]
    return fields.contiguous().view(rows, -1).view(torch.int32)


def unpack_words(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Inverse of ``pack_words``: ``(rows, words)`` int32 to ``(rows, count)`` uint8. Raises InputError for too few
    words.

    >>> unpack_words(torch.tensor([[0x76543210]], dtype=torch.int32), 4, 8).tolist()
    [[0, 1, 2, 3, 4, 5, 6, 7]]
    """
    _check_bits(bits)
    rows, have = packed.shape
    if have < packed_words(count, bits):
        raise InputError(f"{have} words hold fewer than {count} fields of {bits} bits")
    out = torch.empty(rows, count, dtype=torch.uint8, device=packed.device)
    if not out.numel():
        return out
    packed = packed[:, : packed_words(count, bits)]
    step = max(1, _PIECE // count)
    for start in range(0, rows, step):
        out[start : start + step] = _spread(packed[start : start + step], bits, count)
    return out


def _spread(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """``(rows, words)`` int32 to ``(rows, count)`` uint8, the steps of ``_press`` backwards."""
    rows, have = words.shape
    lanes = -(-count // 32) * 4
    full = lanes * bits // 4
    if have != full:
        words = torch.nn.functional.pad(words, (0, full - have))
    stream = words.contiguous().reshape(-1).view(torch.uint8).view(rows, lanes, bits)
    spread = torch.zeros(rows, lanes, 8, dtype=torch.uint8, device=words.device)
    spread[:, :, :bits] = stream
    values = spread.view(torch.int64).view(rows, lanes)
    if bits < 8:
        for shift, low, high in reversed(_steps(bits)):
            values = (values & low) | (values & high).bitwise_left_shift_(shift)
    return values.view(torch.uint8)[:, :count]
