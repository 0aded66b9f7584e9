"""A GGUF file seen as a Hugging Face checkpoint: its config, tensors under transformers' names and in its row orders, its tokenizer.

Everything comes from the same tables as the way there: settings are restored where they were exported, and a road is walked backwards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bitwright.blocks.types import BlockType
from bitwright.core.tensor import TensorSpec
from bitwright.errors import InputError
from bitwright.gguf.architecture import Architecture, Floats, Piece, Road, Rule
from bitwright.gguf.settings import Model
from bitwright.gguf.tables import by_name, make_road, names
from bitwright.gguf.tokenizer_to_hf import write_tokenizer
from bitwright.io.gguf_file import GgufFile
from bitwright.io.text import printable, quoted

__all__ = ["HfView"]

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
#: columns of a transposed tensor are cut out of slabs of this many bytes
_SLAB_BYTES = 64 * 2**20
_IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}


class HfView:
    """A GGUF file as a ``Source``. Blocks are decoded when they are read, and rounded once to the model's dtype.

    left_out: tensors of the file that have no place in the checkpoint -> the reason.
    """

    def __init__(self, file: GgufFile, *, dtype: torch.dtype | None = None) -> None:
        """dtype: of all tensors; by default that of the file's plain matrices, float16 where all are blocks.

        Raises InputError for architectures that are not known, and where keys or tensors do not fit them.
        """
        self._file = file
        where = printable(str(file.path))
        name = file.get("general.architecture", str)
        experts = file.get(f"{name}.expert_count", int, 0) > 0
        self._architecture = by_name(name, experts=experts, where=where)
        self._dtype = dtype or _dtype(file)
        stored = _Stored(file, self._architecture, where)
        self._config = _config(stored, self._dtype)
        self._ways: dict[str, _Way] = {}
        self.left_out: Mapping[str, str] = MappingProxyType(self._find_ways(stored))
        self._specs = {
            name: TensorSpec(name, way.shape, self._dtype) for name, way in sorted(self._ways.items(), key=_by_block)
        }

    @property
    def path(self) -> Path:
        """The GGUF file."""
        return self._file.path

    @property
    def config(self) -> Mapping[str, Any]:
        """``config.json`` as transformers would write it, as far as GGUF says."""
        return self._config

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Every tensor by its name in transformers."""
        return MappingProxyType(self._specs)

    def block_type(self, name: str) -> BlockType:
        """What the file stores a tensor as."""
        return self._file.tensors[self._ways[name].road.name].block

    def fingerprint(self) -> Mapping[str, str]:
        """The file's."""
        return self._file.fingerprint()

    def check_unchanged(self) -> None:
        """Raise InputError if the file changed since it was opened."""
        self._file.check_unchanged()

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """A tensor, or rows ``start .. stop`` of its first axis, decoded, in the model's dtype."""
        way = self._ways.get(name)
        if way is None:
            raise InputError(f"{printable(str(self.path))}: no tensor {quoted(name)}", mend="check the name")
        start, stop = (0, way.shape[0]) if rows is None else rows
        if not 0 <= start <= stop <= way.shape[0]:
            raise InputError(
                f"{quoted(name)}: rows {start}:{stop} of shape {way.shape} do not exist", mend="check the rows"
            )
        values = way.read(self._file, start, stop)
        return torch.from_numpy(np.array(values)).to(self._dtype)

    def write_tokenizer(self, folder: Path) -> None:
        """Write ``tokenizer.json``, ``tokenizer_config.json`` and chat templates. InputError for kinds that are not known."""
        write_tokenizer(self._file, folder)

    def _find_ways(self, stored: _Stored) -> dict[str, str]:
        """Fill the table of tensors; what is left of the file."""
        tensors, used = self._file.tensors, set()
        model = stored.model
        for rule, name, wanted in names(self._architecture, model):
            found = tensors.get(name)
            if not wanted:
                raise InputError(f"{stored.where}: no experts", mend="the file is damaged")
            if found is None:
                if name.endswith(".weight") and not rule.optional:
                    raise InputError(f"{stored.where}: no tensor {quoted(name)}", mend="the file is not whole")
                continue
            shape = _shape(rule, found.shape, len(wanted), stored.where, name)
            road = make_road(rule, name, wanted, shape, model)
            place = 0
            for piece in road.pieces:
                self._ways[piece.tensor] = _Way(road, piece, place, shape)
                place += piece.rows
            used.add(name)
        made = {name for setting in self._architecture.settings for name in setting.generate(model)}
        unknown = {name for name in tensors if name not in used and name not in made}
        return dict.fromkeys(sorted(unknown), f"unknown in architecture {self._architecture.name}")


@dataclass(frozen=True, eq=False)
class _Way:
    """The way back of one tensor: piece of a road, from row ``place`` of the GGUF tensor on. shape: in the checkpoint."""

    road: Road
    piece: Piece
    place: int
    shape: tuple[int, ...]

    def read(self, file: GgufFile, start: int, stop: int) -> Floats:
        """Rows ``start .. stop`` of the checkpoint's tensor, float32."""
        if self.road.change == "transpose":
            return self._transposed(file, start, stop)
        if len(self.shape) == 1:
            values = file.read(self.road.name).reshape(-1)[self.place : self.place + self.piece.rows]
            values = values[self._sources(0, self.piece.rows)][start:stop]
        else:
            inner = math.prod(self.shape[1:-1])
            values = self._rows(file, start * inner, stop * inner).reshape(stop - start, *self.shape[1:])
        if self.road.change == "add-one":
            values = values - np.float32(1)
        return values

    def _sources(self, start: int, stop: int) -> NDArray[np.int64]:
        """Which rows of the piece hold rows ``start .. stop`` of the checkpoint."""
        if self.piece.order is None:
            return np.arange(start, stop, dtype=np.int64)
        return np.argsort(self.piece.order, kind="stable")[start:stop]

    def _rows(self, file: GgufFile, start: int, stop: int) -> Floats:
        if self.piece.order is None:
            return file.read(self.road.name, (self.place + start, self.place + stop))
        wanted = self._sources(start, stop) + self.place
        ascending = np.argsort(wanted, kind="stable")
        ordered = wanted[ascending]
        result = np.empty((len(wanted), self.road.columns), np.float32)
        place = 0
        for run in np.split(ordered, np.flatnonzero(np.diff(ordered) > 1) + 1):
            if len(run):
                result[ascending[place : place + len(run)]] = file.read(self.road.name, (int(run[0]), int(run[-1]) + 1))
            place += len(run)
        return result

    def _transposed(self, file: GgufFile, start: int, stop: int) -> Floats:
        rows, columns = self.road.rows, self.road.columns
        step = max(1, _SLAB_BYTES // (4 * columns))
        result = np.empty((stop - start, rows), np.float32)
        for row in range(0, rows, step):
            last = min(row + step, rows)
            result[:, row:last] = file.read(self.road.name, (row, last))[:, start:stop].T
        return result


class _Stored:
    """The file as settings see it; ``config`` grows as they are restored."""

    def __init__(self, file: GgufFile, architecture: Architecture, where: str) -> None:
        self._file = file
        self.architecture = architecture
        self.where = where
        self.config: dict[str, Any] = {}
        self.rows = self._embedding_rows()

    @property
    def model(self) -> Model:
        """The config so far."""
        architecture = self.architecture
        return Model(where=self.where, config=self.config, aliases=architecture.aliases)

    def get(self, name: str, default: Any = None) -> Any:
        """A scalar, or the elements of an array."""
        found = self._file.values.get(f"{self.architecture.name}.{name}")
        if found is None:
            return default
        value = found.value
        if found.element is None:
            return value
        elements = list(value) if not isinstance(value, np.ndarray) else value.tolist()
        # Counts that differ by block cannot be said in these configs; equal ones are one number.
        same = elements and not isinstance(elements[0], bool) and all(one == elements[0] for one in elements)
        return elements[0] if same else elements

    def number(self, name: str, default: float) -> float:
        """A finite float."""
        found = self.get(name, default)
        if not isinstance(found, float) or not math.isfinite(found):
            raise InputError(f"{self.where}: key {quoted(name)} is {quoted(repr(found))}", mend="the file is damaged")
        return found

    def integer(self, name: str, default: int) -> int:
        """A whole number."""
        found = self.get(name, default)
        if isinstance(found, bool) or not isinstance(found, int):
            raise InputError(f"{self.where}: key {quoted(name)} is {quoted(repr(found))}", mend="the file is damaged")
        return found

    def has(self, tensor: str) -> bool:
        """Whether the file holds it."""
        return tensor in self._file.tensors

    def read(self, tensor: str) -> NDArray[np.float32]:
        """A small tensor, flat."""
        found = self._file.tensors.get(tensor)
        if found is None or math.prod(found.shape) > 2**20:
            raise InputError(
                f"{self.where}: tensor {quoted(tensor)} is missing or too large", mend="the file is damaged"
            )
        return self._file.read(tensor).reshape(-1)

    def _embedding_rows(self) -> int:
        found = self._file.tensors.get("token_embd.weight")
        if found is None or len(found.shape) != 2:
            raise InputError(f"{self.where}: no token embedding", mend="this is no file of a language model")
        return found.shape[0]


def _config(stored: _Stored, dtype: torch.dtype) -> Mapping[str, Any]:
    architecture = stored.architecture
    file = stored._file
    for setting in architecture.settings:
        for name, value in setting.restore(stored).items():
            stored.config[architecture.aliases.get(name, name)] = value
    _ = stored.model.head_dim, stored.model.kv_heads  # refuses what no model has
    head = stored.has("output.weight")
    ids = {entry: file.get(f"tokenizer.ggml.{key}", int, None) for key, entry in _IDS.items()}
    extra = (
        {"type_vocab_size": file.get("tokenizer.ggml.token_type_count", int, None)}
        if architecture.name == "bert"
        else {}
    )
    return MappingProxyType(
        {
            "architectures": [architecture.model_class],
            "model_type": architecture.model_types[0],
            **stored.config,
            **ids,
            **extra,
            "vocab_size": stored.rows,
            "tie_word_embeddings": not head,
            "dtype": _DTYPE_NAMES[dtype],
        }
    )


def _dtype(file: GgufFile) -> torch.dtype:
    """What the plain matrices are stored in; float16 where there are none, since the scales of blocks are float16."""
    matrices = [tensor for tensor in file.tensors.values() if len(tensor.shape) > 1 and tensor.name.endswith(".weight")]
    kinds = {tensor.block.name for tensor in matrices}
    for name in ("BF16", "F16"):
        if name in kinds:
            return _PLAIN[name]
    return torch.float32 if kinds <= {"F32"} else torch.float16


def _shape(rule: Rule, shape: tuple[int, ...], count: int, where: str, name: str) -> tuple[int, ...]:
    """The shape of each of the ``count`` tensors of the checkpoint that a GGUF tensor is made of."""
    if not shape:
        raise InputError(f"{where}: {quoted(name)} is a single number", mend="the file is damaged")
    if "{expert}" in rule.hf:
        if len(shape) != 3 or shape[0] != count:
            raise InputError(
                f"{where}: {quoted(name)} has shape {shape}, {count} experts wanted", mend="the file is damaged"
            )
        return shape[1:]
    if rule.single_row and len(shape) == 1:
        return (1, *shape)
    if rule.change == "transpose" and len(shape) == 2:
        return (shape[1], shape[0])
    return shape


def _by_block(item: tuple[str, _Way]) -> tuple[int, str]:
    """Order of tensors in the checkpoint: those of no block first, then block by block."""
    numbers = [int(part) for part in item[0].split(".") if part.isdecimal()]
    return (numbers[0] if numbers else -1), item[0]
