"""bitwright's own layout: any scheme, without loss, at the scheme's true size. Read by bitwright alone.

Tensors of a quantized linear ``NAME``:

================== ======= ============================================================================
``NAME.weight.codes``      int32 ``(rows, ceil(columns / vector * code_bits / 32))``: per row the dense bit
                           stream of ``core/bits.py`` along the columns
``NAME.weight.shape``      int64 ``(2,)``: rows, columns (padded words leave the columns open)
``NAME.weight.<param>``    every parameter of the scheme, as ``param_spec`` says
``NAME.input_<param>``     static parameters of the inputs, where the scheme quantizes them
================== ======= ============================================================================

Outliers, where the scheme has any, lie in compressed sparse rows: ``NAME.weight.outlier_rows`` int32 ``(rows + 1,)`` (where each row
begins), ``outlier_columns`` uint16 (int32 above 65,536 columns) and ``outlier_values`` ``(count,)``.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from bitwright.core.bits import pack_words, packed_words, unpack_words
from bitwright.core.inputs import InputScheme
from bitwright.core.layout import ENGINES, Layout, Read, check_stored
from bitwright.core.quantized import QuantizedTensor
from bitwright.core.scheme import Limits, Scheme
from bitwright.core.tensor import TensorSpec
from bitwright.errors import BitwrightError, InputError

__all__ = ["LAYOUT", "Native"]

VERSION = 1
_CODES, _SHAPE = ".weight.codes", ".weight.shape"


@dataclass(frozen=True, kw_only=True)
class Native(Layout):
    """Codes as a dense bit stream, parameters as they are, the scheme in full in the config."""

    name: ClassVar[str] = "native"
    quant_method: ClassVar[str] = "bitwright"
    stores_embeddings: ClassVar[bool] = True
    fuses: ClassVar[bool] = False

    def limits(self, model_dtype: torch.dtype) -> Limits:
        del model_dtype
        return Limits()

    def accepts(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        try:
            scheme.grid(shape)
        except BitwrightError as error:
            return error.message
        return None

    def tensors(self, name: str, scheme: Scheme, shape: tuple[int, int]) -> tuple[TensorSpec, ...]:
        rows, columns = shape
        words = packed_words(columns // scheme.vector, scheme.code_bits)
        return (
            TensorSpec(name + _CODES, (rows, words), torch.int32),
            TensorSpec(name + _SHAPE, (2,), torch.int64),
            *(TensorSpec(f"{name}.weight.{p.name}", p.shape, p.dtype) for p in scheme.param_spec(shape)),
            *(TensorSpec(f"{name}.{p.name}", p.shape, p.dtype) for p in _input_spec(scheme)),
            *_outlier_spec(name, scheme, shape),
        )

    def _holds_outliers(self, q: QuantizedTensor) -> bool:
        return q.outliers is not None and len(q.outliers[0]) == q.scheme.outlier_count(q.shape)

    def pack(self, name: str, q: QuantizedTensor) -> dict[str, torch.Tensor]:
        self._refuse(q)
        return {
            name + _CODES: pack_words(q.codes, q.scheme.code_bits),
            name + _SHAPE: torch.tensor(q.shape, dtype=torch.int64),
            **{
                f"{name}.weight.{p.name}": q.params[p.name].clone(memory_format=torch.contiguous_format)
                for p in q.scheme.param_spec(q.shape)
            },
            **{f"{name}.{key}": value.clone() for key, value in q.inputs.items()},
            **_pack_outliers(name, q),
        }

    def unpack(
        self, name: str, scheme: Scheme, shape: tuple[int, int], tensors: Mapping[str, torch.Tensor]
    ) -> QuantizedTensor:
        codes, stored_shape, *rest = (check_stored(tensors, spec) for spec in self.tensors(name, scheme, shape))
        spec, inputs = scheme.param_spec(shape), _input_spec(scheme)
        params, rest = rest[: len(spec)], rest[len(spec) :]
        if tuple(stored_shape.tolist()) != shape:
            raise InputError(f"'{name}{_SHAPE}' says {stored_shape.tolist()}, expected {shape}", mend="read it anew")
        count = shape[1] // scheme.vector
        return QuantizedTensor(
            scheme,
            shape,
            unpack_words(codes, scheme.code_bits, count),
            {p.name: value for p, value in zip(spec, params, strict=True)},
            _unpack_outliers(name, shape, rest[len(inputs) :]),
            {p.name: value for p, value in zip(inputs, rest, strict=False)},
        )

    def config(self, entries: Mapping[str, Scheme], kept: Sequence[str], meta: Mapping[str, Any]) -> dict[str, Any]:
        schemes = list(dict.fromkeys(entries.values()))
        index = {scheme: i for i, scheme in enumerate(schemes)}
        return {
            "quant_method": self.quant_method,
            "version": VERSION,
            "schemes": [scheme.to_spec() for scheme in schemes],
            "modules": {name: index[scheme] for name, scheme in entries.items()},
            "kept": list(dict.fromkeys(kept)),
            "meta": dict(meta),
        }

    def read_config(
        self,
        config: Mapping[str, Any],
        model_dtype: torch.dtype,
        names: Mapping[str, TensorSpec],
        read: Read | None = None,
    ) -> dict[str, tuple[Scheme, tuple[int, int]]]:
        del model_dtype
        version, specs, modules = config.get("version"), config.get("schemes"), config.get("modules")
        if version != VERSION:
            raise InputError(f"native version {version!r} is unknown", mend="use the bitwright release that wrote it")
        if not isinstance(specs, list) or not isinstance(modules, Mapping):
            raise InputError("quantization_config lacks 'schemes' or 'modules'", mend="fetch config.json again")
        schemes = [_scheme(spec) for spec in specs]
        found = {}
        for name, index in modules.items():
            if not isinstance(index, int) or not 0 <= index < len(schemes):
                raise InputError(
                    f"module '{name}' names scheme {index!r}, which is not there", mend="fetch config.json again"
                )
            codes = names.get(name + _CODES)
            if codes is None:
                raise InputError(f"tensor '{name}{_CODES}' is missing", mend="the file is incomplete; fetch it again")
            shape = (codes.shape[0], _columns(name, schemes[index], codes, names, read))
            found[name] = (schemes[index], shape)
        return found

    def loads_in(self, scheme: Scheme, model_type: str) -> dict[str, str | None]:
        del scheme, model_type
        return {
            engine: None if engine == "bitwright" else "native files are read by bitwright alone" for engine in ENGINES
        }

    def support(self) -> dict[str, str]:
        other = "does not read native files; export as gptq or compressed-tensors"
        return {engine: "any version" if engine == "bitwright" else other for engine in ENGINES}


def _scheme(spec: Any) -> Scheme:
    """A scheme from what ``Scheme.to_spec`` wrote; the kind is a file name in ``schemes``."""
    options = dict(spec) if isinstance(spec, Mapping) else {}
    kind = options.pop("kind", None)
    module = kind.replace("-", "_") if isinstance(kind, str) else ""
    if not module.isidentifier() or module.startswith("_"):
        raise InputError(f"scheme kind {kind!r} is not a name", mend="fetch config.json again")
    try:
        if isinstance(options.get("inputs"), Mapping):
            options["inputs"] = InputScheme(**options["inputs"])
        scheme = importlib.import_module(f"bitwright.schemes.{module}").SCHEME(**options)
    except (ImportError, TypeError) as error:
        raise InputError(
            f"scheme {spec!r} is unknown here: {error}", mend="use the bitwright release that wrote it"
        ) from error
    assert isinstance(scheme, Scheme)
    return scheme


def _columns(name: str, scheme: Scheme, codes: TensorSpec, names: Mapping[str, TensorSpec], read: Read | None) -> int:
    """Columns of a stored weight: from the shape tensor, or without ``read`` from words that hold no padding."""
    if read is not None and name + _SHAPE in names:
        rows, columns = (int(n) for n in read(name + _SHAPE).tolist())
        if rows != codes.shape[0] or packed_words(columns // scheme.vector, scheme.code_bits) != codes.shape[1]:
            raise InputError(
                f"'{name}{_SHAPE}' says {(rows, columns)}, the codes are {codes.shape}", mend="fetch it again"
            )
        return columns
    return codes.shape[1] * 32 // scheme.code_bits * scheme.vector


def _input_spec(scheme: Scheme) -> tuple[TensorSpec, ...]:
    return scheme.inputs.param_spec() if scheme.inputs is not None else ()


def _outlier_spec(name: str, scheme: Scheme, shape: tuple[int, int]) -> tuple[TensorSpec, ...]:
    count = scheme.outlier_count(shape)
    if count == 0:
        return ()
    index = torch.uint16 if shape[1] <= 2**16 else torch.int32
    return (
        TensorSpec(f"{name}.weight.outlier_rows", (shape[0] + 1,), torch.int32),
        TensorSpec(f"{name}.weight.outlier_columns", (count,), index),
        TensorSpec(f"{name}.weight.outlier_values", (count,), scheme.outlier_dtype),
    )


def _pack_outliers(name: str, q: QuantizedTensor) -> dict[str, torch.Tensor]:
    specs = _outlier_spec(name, q.scheme, q.shape)
    if not specs or q.outliers is None:
        return {}
    indices, values = q.outliers
    starts = torch.searchsorted(indices, torch.arange(q.shape[0] + 1) * q.shape[1]).to(torch.int32)
    stored = (starts, (indices % q.shape[1]).to(specs[1].dtype), values.to(specs[2].dtype))
    return {spec.name: value.contiguous() for spec, value in zip(specs, stored, strict=True)}


def _unpack_outliers(
    name: str, shape: tuple[int, int], stored: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    if not stored:
        return None
    starts, columns, values = stored[0].long(), stored[1].to(torch.int64), stored[2]
    counts = starts.diff()
    if int(starts[0]) != 0 or int(starts[-1]) != len(values) or bool((counts < 0).any()):
        raise InputError(f"'{name}.weight.outlier_rows' does not divide the outliers into rows", mend="fetch it again")
    if len(columns) and int(columns.max()) >= shape[1]:
        raise InputError(f"'{name}.weight.outlier_columns' names a column that is not there", mend="fetch it again")
    return torch.repeat_interleave(torch.arange(shape[0]), counts) * shape[1] + columns, values


LAYOUT = Native
