"""Files made to do harm, byte by byte; what each peer made of such files is in their lists of vulnerabilities."""

import contextlib
import os
import re
import struct
import tracemalloc

import pytest
from tests.gguf_bytes import array, gguf, info, scalar, string, text, u32

from bitwright.errors import InputError
from bitwright.io import gguf_header
from bitwright.io.gguf_file import GgufFile
from bitwright.io.gguf_header import (
    MAX_HEAD_BYTES,
    MAX_KEYS,
    MAX_STRINGS,
    MAX_TENSORS,
    MAX_TEXT_BYTES,
)

F32 = bytes(4)
WEIGHT = [info("w", [2])]


def announced(count, at):
    data = bytearray(gguf([u32("a", 1)], WEIGHT, bytes(8)))
    data[at : at + 8] = struct.pack("<Q", count)
    return bytes(data)


CASES = {
    "empty": (b"", "the first 24 bytes: 0 bytes are too few"),
    "magic": (gguf(magic=b"GGML"), "the first 4 bytes: not a GGUF file"),
    "version 0": (gguf(version=0), "version: 0 is unknown"),
    "version 1": (gguf(version=1), "version: version 1 is not read"),
    "version 1, big endian": (gguf(version=1, sign=">"), "version: version 1 is not read"),
    "version 4": (gguf(version=4), "version: 4 is unknown"),
    "tensors beyond the file": (announced(2**40, 8), "tensor count: 1099511627776 do not fit into the"),
    "tensors, negative": (announced(2**64 - 1, 8), "tensor count: 18446744073709551615 do not fit"),
    "keys beyond the file": (announced(2**60, 16), "key count: 1152921504606846976 do not fit into the"),
    "key beyond the file": (
        gguf([struct.pack("<Q", 2**63) + b"aaaaaaaa"]),
        "key number 0: a key of 9223372036854775808",
    ),
    "key, empty": (gguf([u32("", 1)]), "key number 0: the key is empty"),
    "key, twice": (gguf([u32("a", 1), u32("a", 2)]), "key 'a': there are two keys of this name"),
    "key, not UTF-8": (gguf([u32(b"a\xff", 1)]), "key number 0: a key is not UTF-8 at byte 1"),
    "key, too long": (gguf([u32("k" * 70_000, 1)]), "key number 0: a key of 70000 bytes, at most 65535"),
    "key with escapes": (gguf([u32("\x1b[31m", 1)] * 2), r"key '\x1b[31m': there are two keys"),
    "value type": (gguf([text("a") + struct.pack("<IQ", 13, 0)]), "key 'a': value type 13 is unknown"),
    "element type": (gguf([array("a", 77, bytes(8), 1)]), "key 'a': value type 77 is unknown"),
    "nested arrays": (
        gguf([text("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000]),
        "key 'a': an array of arrays",
    ),
    "string beyond the file": (
        gguf([text("a") + struct.pack("<IQ", 8, 2**62)]),
        "key 'a': a string of 4611686018427387904 bytes, 0 are left",
    ),
    "string, not UTF-8": (gguf([string("a", b"ok\xc3")]), "key 'a': a string is not UTF-8 at byte 2"),
    "strings beyond the file": (gguf([array("a", 8, bytes(80), 2**61)]), "key 'a': 2305843009213693952 elements"),
    "string of an array beyond the file": (
        gguf([array("a", 8, text("x") + struct.pack("<Q", 2**64 - 1), 2)]),
        "key 'a': string 1 of 18446744073709551615 bytes, 0 are left",
    ),
    "array beyond the file": (gguf([array("a", 10, bytes(80), 11)]), "key 'a': 11 elements, only 80 bytes"),
    "array, size wraps": (gguf([array("a", 10, bytes(80), 2**61)]), "key 'a': 2305843009213693952 elements"),
    "bool 2": (gguf([scalar("a", 7, "B", 2)]), "key 'a': a bool is 2, not 0 or 1"),
    "bool 255 in an array": (gguf([array("a", 7, b"\0\1\0\xff\1", 5)]), "key 'a': bool 3 of the array is 255"),
    "alignment 0": (gguf([u32("general.alignment", 0)]), "key 'general.alignment': 0 is not a power of two"),
    "alignment 3": (gguf([u32("general.alignment", 3)]), "key 'general.alignment': 3 is not a power of two"),
    "alignment 4": (gguf([u32("general.alignment", 4)]), "key 'general.alignment': 4 is not a power of two from 8"),
    "alignment 2^31": (gguf([u32("general.alignment", 2**31)]), "2147483648 is not a power of two from 8 to 65536"),
    "alignment u64": (gguf([scalar("general.alignment", 10, "Q", 32)]), "key 'general.alignment': it is u64, u32"),
    "alignment array": (gguf([array("general.alignment", 4, bytes(4), 1)]), "it is array of u32, u32 is demanded"),
    "name, empty": (gguf([], [info("", [1])], F32), "tensor number 0: the name is empty"),
    "name of 64 bytes": (gguf([], [info("n" * 64, [1])], F32), "tensor number 0: a name of 64 bytes, at most 63"),
    "name, not UTF-8": (gguf([], [info(b"\xff", [1])], F32), "tensor number 0: a name is not UTF-8"),
    "name, twice": (
        gguf([], [info("w", [8]), info("w", [8], offset=32)], bytes(64)),
        "tensor 'w': there are two tensors of this name",
    ),
    "5 dimensions": (gguf([], [info("w", [1] * 5)], F32), "tensor 'w': 5 dimensions, at most 4"),
    "2^32 - 1 dimensions": (
        gguf([], [text("w") + struct.pack("<I", 2**32 - 1) + bytes(40)], F32),
        "4294967295 dimensions",
    ),
    "dimension 0": (gguf([], [info("w", [2, 0])]), "tensor 'w': dimensions [2, 0]: each must be from 1"),
    "dimension -1": (gguf([], [info("w", [2**64 - 1])], F32), "dimensions [18446744073709551615]: each must be"),
    "product wraps to 0": (gguf([], [info("w", [2**32, 2**32])], F32), "[4294967296, 4294967296]: the size overflows"),
    "product wraps to 4": (gguf([], [info("w", [2**62 + 1, 4])], F32), "the size overflows"),
    "bytes overflow": (gguf([], [info("w", [2**62])], F32), "the size overflows"),
    "not a multiple of the block": (gguf([], [info("w", [33], 2)], bytes(64)), "the first is not a multiple of the 32"),
    "tensor type": (gguf([], [info("w", [1], 99)], F32), "tensor 'w': tensor type 99 is unknown"),
    "tensor type taken back": (gguf([], [info("w", [32], 4)], bytes(64)), "tensor 'w': tensor type 4 is unknown"),
    "offset beyond the file": (gguf([], [info("w", [1], offset=2**40)], F32), "its offset 1099511627776 leaves a hole"),
    "offset wraps": (
        gguf([], [info("w", [1], offset=2**64 - 32)], F32),
        "its offset 18446744073709551584 leaves a hole",
    ),
    "overlap": (
        gguf([], [info("a", [16]), info("b", [1], offset=32)], bytes(96)),
        "tensor 'b': its offset 32 overlaps",
    ),
    "hole": (
        gguf([], [info("a", [1]), info("b", [1], offset=64)], bytes(96)),
        "tensor 'b': its offset 64 leaves a hole",
    ),
    "offset not aligned": (
        gguf([], [info("a", [1]), info("b", [1], offset=4)], bytes(96)),
        "tensor 'b': its offset 4 overl",
    ),
    "data beyond the file": (
        gguf([], [info("w", [2, 2])], bytes(15)),
        "its data ends at byte 112, the file at byte 111",
    ),
    "no data": (gguf([], [info("w", [2**40])]), "tensor 'w': its data ends at byte"),
}


@pytest.mark.parametrize(("data", "message"), CASES.values(), ids=CASES)
def test_hostile_files_are_refused_with_file_and_field_and_in_little_memory(tmp_path, data, message):
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=re.escape(message)) as caught:
            GgufFile.open(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.message.startswith(f"{path}, ")
    assert caught.value.exit_code == 2
    assert caught.value.mend
    assert "\x1b" not in str(caught.value)
    assert peak < 2_000_000 + 4 * len(data)


def test_every_truncation_is_refused(tmp_path):
    keys = [u32("a", 1), string("s", "text"), array("t", 8, text("x") + text("yz"), 2), array("f", 6, bytes(8), 2)]
    infos = [info("v", [3]), info("w", [2, 2], offset=32)]
    data = gguf([*keys, scalar("b", 7, "B", 1)], infos, bytes(32 + 16))
    path = tmp_path / "cut.gguf"
    path.write_bytes(data)
    GgufFile.open(path).close()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(InputError, match=r"cut\.gguf, "):
            GgufFile.open(path)


def test_every_flipped_bit_is_refused_or_read(tmp_path):
    keys = [u32("general.alignment", 32), array("t", 8, text("x"), 1), scalar("b", 7, "B", 1)]
    data = gguf(keys, [info("w", [2, 2])], bytes(16))
    path = tmp_path / "flip.gguf"
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with contextlib.suppress(InputError), GgufFile.open(path) as file:
            for name in file.tensors:
                file.raw(name)


@pytest.fixture
def eighth(monkeypatch):
    """All limits at an eighth, so that nothing takes long under tracemalloc; memory follows them."""
    for name in ("MAX_HEAD_BYTES", "MAX_KEYS", "MAX_TENSORS", "MAX_STRINGS", "MAX_TEXT_BYTES", "_MAX_WINDOW"):
        monkeypatch.setattr(gguf_header, name, getattr(gguf_header, name) // 8)


def measured(data, size):
    """Peak memory of reading a file of this size that begins with ``data``; the rest are zeros that take no disk."""
    descriptor = os.memfd_create("gguf")
    try:
        os.write(descriptor, data)
        os.ftruncate(descriptor, size)
        tracemalloc.start()
        with contextlib.suppress(InputError):
            gguf_header.read_head(descriptor, size, "x.gguf")
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        os.close(descriptor)


@pytest.mark.usefixtures("eighth")
@pytest.mark.parametrize("count", [2**10, MAX_STRINGS // 8 - 1, 2**30, 2**36])
@pytest.mark.parametrize("element", [0, 7, 8, 12])
def test_huge_arrays_in_huge_sparse_files_stay_below_100_mb(element, count):
    assert measured(gguf([array("a", element, b"", count)]), 2**40) < 100e6 / 8


@pytest.mark.usefixtures("eighth")
def test_a_head_that_goes_to_every_limit_at_once_stays_below_100_mb():
    # a text that takes four bytes for each of its own, empty arrays, empty strings, tensors with the longest names
    tensors = [info(f"{n:063d}", [1, 1, 1, 1], 24, 32 * n) for n in range(MAX_TENSORS // 8)]
    arrays = [array(f"{n:05d}", 8, b"", 0) for n in range(MAX_KEYS // 8 - 2)]
    room = MAX_TEXT_BYTES // 8 - 63 * len(tensors) - 5 * len(arrays) - 100
    count = MAX_STRINGS // 8
    data = gguf([string("a", "😀" + "a" * room), *arrays, array("b", 8, bytes(8 * count), count)], tensors)
    assert len(data) < MAX_HEAD_BYTES // 8
    assert 50e6 / 8 < measured(data, len(data) + 32 * len(tensors)) < 100e6 / 8


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gguf(n_keys=MAX_KEYS + 1), "key count: 16385, at most 16384 are read"),
        (gguf(n_infos=MAX_TENSORS + 1), "tensor count: 32769, at most 32768 are read"),
        (gguf([array("a", 8, b"", MAX_STRINGS + 1)]), "strings up to this array, at most"),
        (gguf([array("a", 0, b"", MAX_HEAD_BYTES)]), "the head goes beyond 33554432 bytes"),
        (gguf([text("a") + struct.pack("<IQ", 8, MAX_TEXT_BYTES)]), "keys, names and single strings have more than"),
    ],
)
def test_more_than_any_model_has_is_refused(tmp_path, data, message):
    path = tmp_path / "large.gguf"
    path.write_bytes(data)
    os.truncate(path, 2**34)
    with pytest.raises(InputError, match=message):
        GgufFile.open(path)
