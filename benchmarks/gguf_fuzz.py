"""Mutated GGUF files against the reader: every input is accepted or refused with an InputError, quickly and in little memory.

Small valid files of several kinds are built by hand, which records where their fields are, and damaged: bits, counts, lengths, types
and offsets are edited, fields swapped, parts cut out, doubled or taken from another file, ends cut off. What is accepted is also
used: strings decoded, tensors read, hyper-parameters checked, the file planned again. Any exception that is not of bitwright, any
input over the time limit, and MemoryError under an address-space limit count as failures.

    OMP_NUM_THREADS=1 python benchmarks/gguf_fuzz.py --count 1000000 --seed 1 --out benchmarks/results/gguf_fuzz.json

Every input follows from the seed and its number: ``--only NUMBER --dump FILE`` writes one. ``--accepted-to FOLDER`` keeps accepted
ones, for another program to open.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import random
import re
import resource
import signal
import struct
import sys
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from machine import machine

ARCHITECTURE = "llama"
SIZES = {0: (1, 4), 1: (1, 2), 2: (32, 18), 8: (32, 34), 12: (256, 144), 24: (1, 1), 30: (1, 2)}
FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
EDGES = [0, 1, 2, 3, 4, 7, 8, 9, 12, 13, 31, 32, 33, 63, 64, 255, 256, 2**15, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1]
EDGES += [2**32, 2**40, 2**53, 2**60, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 8, 2**64 - 1]
EXTRA_BYTES = 256 * 2**20
TRACED_EVERY = 64
TRACING_FACTOR = 10
TRACED_SPARSE_EVERY = 8
LARGEST_READ = 2**20
SPARSE = 0.02


@dataclass
class Seed:
    """A file, and its fields: what a field is, where it begins, and its bytes."""

    sign: str = "<"
    version: int = 3
    alignment: int = 32
    data: bytearray = field(default_factory=bytearray)
    fields: list[tuple[str, int, int]] = field(default_factory=list)

    def number(self, what: str, code: str, value: Any) -> None:
        packed = struct.pack(self.sign + code, value)
        self.fields.append((what, len(self.data), len(packed)))
        self.data += packed

    def text(self, what: str, value: bytes) -> None:
        self.number("length", "Q", len(value))
        self.fields.append((what, len(self.data), len(value)))
        self.data += value

    def key(self, name: str, kind: int, value: Any, element: int | None = None) -> None:
        self.text("key", name.encode())
        self.number("type", "I", kind)
        if element is not None:
            self.number("type", "I", element)
            self.number("count", "Q", len(value))
        for item in value if element is not None else [value]:
            inner = kind if element is None else element
            if inner == 8:
                self.text("string", item)
            else:
                self.number("value", FORMATS[inner], item)


def build(
    keys: list[tuple[Any, ...]],
    tensors: list[tuple[str, tuple[int, ...], int]],
    rng: random.Random,
    **options: Any,
) -> Seed:
    """A whole file. keys: arguments of ``Seed.key``; tensors: name, dimensions as stored, type."""
    seed = Seed(**options)
    seed.data += b"GGUF"
    seed.number("version", "I", seed.version)
    if seed.alignment != 32:
        keys = [*keys, ("general.alignment", 4, seed.alignment)]
    seed.number("count", "Q", len(tensors))
    seed.number("count", "Q", len(keys))
    for key in keys:
        seed.key(*key)
    payload = bytearray()
    for name, dims, kind in tensors:
        seed.text("name", name.encode())
        seed.number("rank", "I", len(dims))
        size = 1
        for dim in dims:
            seed.number("dimension", "Q", dim)
            size *= dim
        seed.number("type", "I", kind)
        seed.number("offset", "Q", len(payload))
        values, nbytes = SIZES[kind]
        payload += rng.randbytes(size // values * nbytes)
        payload += bytes(-len(payload) % seed.alignment)
    seed.data += bytes(-len(seed.data) % seed.alignment) + payload
    return seed


def seeds() -> list[Seed]:
    """Valid files: a language model, every type of value, other orders, versions and alignments, one without tensors."""
    rng = random.Random(0)
    own = ARCHITECTURE
    model = [
        ("general.architecture", 8, own.encode()),
        ("general.file_type", 4, 2),
        (f"{own}.block_count", 4, 1),
        (f"{own}.context_length", 4, 64),
        (f"{own}.embedding_length", 4, 32),
        (f"{own}.feed_forward_length", 4, 64),
        (f"{own}.attention.head_count", 4, 4),
        (f"{own}.attention.head_count_kv", 4, 2),
        (f"{own}.attention.layer_norm_rms_epsilon", 6, 1e-5),
        (f"{own}.rope.dimension_count", 4, 8),
        (f"{own}.rope.freq_base", 6, 10000.0),
        ("tokenizer.ggml.model", 8, b"llama"),
        ("tokenizer.ggml.tokens", 9, [b"<unk>", b"<s>", b"</s>", b"\xe2\x96\x81a", b"b", b"<0x0A>"], 8),
        ("tokenizer.ggml.scores", 9, [0.0, 0.0, 0.0, -1.0, -2.0, -3.0], 6),
        ("tokenizer.ggml.token_type", 9, [2, 3, 3, 1, 1, 6], 5),
        ("tokenizer.ggml.bos_token_id", 4, 1),
        ("tokenizer.ggml.eos_token_id", 4, 2),
        ("tokenizer.ggml.add_bos_token", 7, 1),
    ]
    block = [
        ("token_embd.weight", (32, 6), 1),
        ("output_norm.weight", (32,), 0),
        ("output.weight", (32, 6), 8),
        ("blk.0.attn_norm.weight", (32,), 0),
        ("blk.0.attn_q.weight", (32, 32), 2),
        ("blk.0.attn_k.weight", (32, 16), 2),
        ("blk.0.attn_v.weight", (32, 16), 8),
        ("blk.0.attn_output.weight", (32, 32), 30),
        ("blk.0.ffn_norm.weight", (32,), 0),
        ("blk.0.ffn_gate.weight", (32, 64), 2),
        ("blk.0.ffn_up.weight", (32, 64), 2),
        ("blk.0.ffn_down.weight", (64, 32), 8),
    ]
    every: list[tuple[Any, ...]] = [("text", 8, "Ünï".encode()), ("empty", 8, b"")]
    for kind in FORMATS:
        every += [(f"k{kind}", kind, 1), (f"a{kind}", 9, [0, 1, 1], kind), (f"e{kind}", 9, [], kind)]
    every += [("words", 9, [b"", b"a", "é".encode() * 90], 8), ("none", 9, [], 8)]
    mixed = [
        ("q4k", (256, 2), 12),
        ("codes", (5,), 24),
        ("three", (4, 3, 2), 1),
        ("four", (1, 2, 1, 2), 0),
        ("b", (3, 2), 30),
    ]
    return [
        build(model, block, rng),
        build(model, block[:3], rng, alignment=8),
        build(every, mixed, rng),
        build(every, mixed, rng, sign=">"),
        build(model[:6], mixed[1:3], rng, version=2, alignment=64),
        build(
            [("general.type", 8, b"imatrix"), ("imatrix.datasets", 9, [b"x.txt"], 8)], [("w.in_sum2", (8, 1), 0)], rng
        ),
        build(model, [], rng),
        build([], [("w", (2,), 0)], rng),
    ]


def mutate(rng: random.Random, pool: list[Seed]) -> bytes:
    """One damaged file."""
    seed = rng.choice(pool)
    data = bytearray(seed.data)
    for _ in range(rng.choice((1, 1, 1, 1, 2, 2, 3, 4))):
        if not data:
            break
        what = rng.randrange(12)
        at = rng.randrange(len(data))
        if what < 4:
            _edit_field(rng, seed, data)
        elif what == 4:
            for _ in range(rng.choice((1, 1, 2, 8))):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif what == 5:
            del data[at:]
        elif what == 6:
            data[at : at + rng.choice((1, 2, 4, 8, 16))] = rng.randbytes(rng.choice((1, 2, 4, 8, 16)))
        elif what == 7:
            _swap(rng, seed, data)
        elif what == 8:
            other = rng.choice(pool).data
            begin = rng.randrange(len(other))
            data[at : at + rng.choice((0, 8, 64))] = other[begin : begin + rng.choice((8, 64, 512))]
        elif what == 9:
            del data[at : at + rng.choice((1, 4, 8, 32))]
        elif what == 10:
            data[at:at] = data[at : at + rng.choice((4, 8, 16, 64))]
        else:
            begin = rng.choice(seed.fields)[1]
            data[begin : begin + 8] = struct.pack(rng.choice("<>") + "Q", rng.choice(EDGES))
    return bytes(data)


def _edit_field(rng: random.Random, seed: Seed, data: bytearray) -> None:
    what, begin, size = rng.choice(seed.fields)
    if what in ("key", "string", "name"):
        data[begin : begin + size] = rng.randbytes(size) if rng.random() < 0.5 else b"\xff" * size
        return
    order = "little" if seed.sign == "<" else "big"
    old = int.from_bytes(data[begin : begin + size], order)
    if what == "type":
        new = rng.choice((rng.randrange(16), rng.randrange(48), 9))
    else:
        new = rng.choice(
            (rng.choice(EDGES), old + 1, old - 1, len(data), len(data) - begin, old * 2, rng.getrandbits(64))
        )
    data[begin : begin + size] = (new % 2 ** (8 * size)).to_bytes(size, order)


def _swap(rng: random.Random, seed: Seed, data: bytearray) -> None:
    one = rng.choice(seed.fields)
    two = rng.choice([other for other in seed.fields if other[2] == one[2]])
    first, second = data[one[1] : one[1] + one[2]], data[two[1] : two[1] + two[2]]
    if len(first) == len(second) == one[2]:
        data[one[1] : one[1] + one[2]], data[two[1] : two[1] + two[2]] = second, first


class TooLong(BaseException):
    """Raised by the timer; not an Exception, so that nothing swallows it."""


def _ring(_number: int, _frame: FrameType | None) -> None:
    raise TooLong


def use(path: str) -> Exception | None:
    """Open and use a file; returns what its hyper-parameters are refused for. Raises what the reader raises."""
    from bitwright.errors import InputError
    from bitwright.io.gguf_check import check_hyperparameters
    from bitwright.io.gguf_file import GgufFile
    from bitwright.io.gguf_values import Strings
    from bitwright.io.gguf_writer import GgufEntry, plan_gguf

    with GgufFile.open(path) as file:
        for value in file.values.values():
            if isinstance(value.value, Strings):
                value.value.tolist()
        for tensor in file.tensors.values():
            if tensor.nbytes > LARGEST_READ:
                continue
            try:
                if tensor.block.name in ("F32", "F16", "BF16"):
                    file.read(tensor.name)
                else:
                    file.raw(tensor.name)
            except InputError:  # blocks that cannot be turned around
                if file.byte_order == "little":
                    raise
        entries = [GgufEntry(tensor.name, tensor.shape, tensor.block) for tensor in file.tensors.values()]
        (part,) = plan_gguf(file.values, entries)
        if any(part.offsets[name][1] - part.offsets[name][0] != file.tensors[name].nbytes for name in file.tensors):
            raise AssertionError("planned sizes differ from those read")
        try:
            check_hyperparameters(file)
        except InputError as error:
            return error
        return None


def kind_of(error: Exception) -> str:
    """The sentence of an error with names and numbers taken out."""
    message = re.sub(r"^\S+?, ", "", str(getattr(error, "message", error)))
    message = re.sub(r"of a \w+ block", "of a … block", re.sub(r"\[[^\]]*\]", "[…]", re.sub(r"'.*'", "'…'", message)))
    return re.sub(r"(?<![\w-])-?\d+(\.\d+)?(e[+-]?\d+)?\b", "N", message)


def inputs(count: int, first: int, seed: int, pool: list[Seed]) -> Iterator[tuple[int, bytes, int]]:
    """Number, bytes and size of each input; a size beyond the bytes makes a sparse file."""
    for number in range(first, first + count):
        rng = random.Random((seed << 40) + number)
        if rng.random() < SPARSE:
            data = _announce(rng, pool)
            yield number, data, len(data) + (1 << rng.randrange(10, 41))
        else:
            data = mutate(rng, pool)
            yield number, data, len(data)


def _announce(rng: random.Random, pool: list[Seed]) -> bytes:
    """A file cut after a count or length that was made anything; the zeros that follow may hold as much."""
    seed = rng.choice(pool)
    _, begin, _ = rng.choice([part for part in seed.fields if part[0] in ("count", "length", "dimension")])
    return bytes(seed.data[:begin]) + struct.pack(seed.sign + "Q", rng.getrandbits(rng.randrange(1, 45)))


def run(options: argparse.Namespace) -> dict[str, Any]:
    from bitwright.errors import BitwrightError

    pool = seeds()
    descriptor = os.memfd_create("gguf")
    path = f"/proc/self/fd/{descriptor}"

    def store(data: bytes, size: int) -> None:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, data, 0)
        os.ftruncate(descriptor, size)

    for seed in pool:  # every seed is valid, and all code is compiled and imported before anything is measured
        store(bytes(seed.data), len(seed.data))
        use(path)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (pages + EXTRA_BYTES, resource.RLIM_INFINITY))
    signal.signal(signal.SIGPROF, _ring)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts: collections.Counter[str] = collections.Counter()
    errors: collections.Counter[str] = collections.Counter()
    failures: list[dict[str, Any]] = []
    slowest: tuple[float, int] = (0.0, -1)
    traced: tuple[int, int] = (0, -1)
    digest = hashlib.sha256()
    kept = 0
    started = time.perf_counter()
    for number, data, size in inputs(options.count, options.first, options.seed, pool):
        store(data, size)
        digest.update(data + struct.pack("<Q", size))
        tracing = number % (TRACED_EVERY if size == len(data) else TRACED_SPARSE_EVERY) == 0
        if tracing:
            tracemalloc.start()
        begun = time.process_time()
        try:
            # tracing allocations slows Python down many times over
            signal.setitimer(signal.ITIMER_PROF, options.limit * (TRACING_FACTOR if tracing else 1))
            try:
                checked = use(path)
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            counts["accepted"] += 1
            if checked is None:
                counts["accepted, hyper-parameters too"] += 1
            else:
                errors[f"hyper-parameters: {kind_of(checked)}"] += 1
            wanted = size == len(data) and (checked is None or not options.checked_only)
            if options.accepted_to and kept < options.keep and wanted:
                kept += 1
                (options.accepted_to / f"{number:08d}.gguf").write_bytes(data)
        except BitwrightError as error:
            counts["refused"] += 1
            errors[f"{type(error).__name__}: {kind_of(error)}"] += 1
            if error.exit_code != 2 or not error.mend:
                failures.append(
                    {"number": number, "error": f"exit code {error.exit_code}, mend {error.mend!r}: {error}"}
                )
        except (Exception, TooLong) as error:
            failures.append({"number": number, "error": f"{type(error).__name__}: {error}"[:500]})
        spent = time.process_time() - begun
        if tracing:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            traced = max(traced, (peak, number))
        else:
            slowest = max(slowest, (spent, number))
        if (number + 1) % 50_000 == 0:
            print(f"{number + 1}: {dict(counts)}, {len(failures)} failures", file=sys.stderr, flush=True)
    spent = time.perf_counter() - started
    return {
        "count": options.count,
        "seed": options.seed,
        "first": options.first,
        "inputs_sha256": digest.hexdigest(),
        "seconds": round(spent, 1),
        "inputs_per_second": round(options.count / spent),
        "counts": dict(counts),
        "failures": failures[:100],
        "failure_count": len(failures),
        "slowest": {"milliseconds": round(1e3 * slowest[0], 2), "number": slowest[1]},
        "largest_traced_peak": {
            "bytes": traced[0],
            "number": traced[1],
            "traced": f"1 of {TRACED_EVERY}, 1 of {TRACED_SPARSE_EVERY} sparse",
        },
        "resident_growth_bytes": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before),
        "address_space_limit_bytes": EXTRA_BYTES,
        "processor_time_limit_seconds": options.limit,
        "refusals": dict(errors.most_common()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit", type=float, default=1.0, help="processor seconds for one input")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", type=int, help="write this one input to --dump and stop")
    parser.add_argument("--dump", type=Path)
    parser.add_argument("--accepted-to", type=Path, help="a folder for accepted inputs")
    parser.add_argument("--keep", type=int, default=200, help="how many of them")
    parser.add_argument("--checked-only", action="store_true", help="only those whose hyper-parameters pass")
    options = parser.parse_args()
    if options.only is not None:
        _, data, size = next(inputs(1, options.only, options.seed, seeds()))
        options.dump.write_bytes(data)
        os.truncate(options.dump, size)
        return
    if options.accepted_to:
        options.accepted_to.mkdir(parents=True, exist_ok=True)
    result = run(options) | {"machine": machine()}
    text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
    if options.out:
        options.out.write_text(text)
    print(text)
    sys.exit(1 if result["failure_count"] else 0)


if __name__ == "__main__":
    main()
