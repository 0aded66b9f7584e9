"""Records of tensors: names of dtypes, sizes, and what a quantized tensor refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from bitwright.core.quantized import QuantizedTensor
from bitwright.core.tensor import DTYPES, TensorSpec, dtype_name, parse_dtype
from bitwright.errors import InputError
from bitwright.schemes.affine import Affine

SCHEME = Affine(bits=4, group_size=16, symmetric=False, scale_dtype="float32")


def quantized(rows=4, columns=32) -> QuantizedTensor:
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    params, codes = SCHEME.quantize(w)
    return QuantizedTensor(SCHEME, (rows, columns), codes, params)


def test_dtype_names_are_those_of_safetensors():
    from safetensors.torch import save

    for name, dtype in DTYPES.items():
        if name != "F8_E8M0":  # not every safetensors release writes it
            assert f'"dtype":"{name}"'.encode() in save({"x": torch.zeros(2, dtype=torch.uint8).to(dtype)})
        assert dtype_name(dtype) == name
    with pytest.raises(InputError, match="complex64"):
        dtype_name(torch.complex64)


@pytest.mark.parametrize(
    ("name", "dtype"), [("float16", torch.float16), ("torch.bfloat16", torch.bfloat16), ("float32", torch.float32)]
)
def test_plain_dtype_names_are_read(name, dtype):
    assert parse_dtype(name) is dtype


@pytest.mark.parametrize("name", ["", "fp16", "Tensor", "torch", "nn", "float31"])
def test_what_is_no_dtype_is_refused(name):
    with pytest.raises(InputError, match="not a torch dtype"):
        parse_dtype(name)


def test_sizes_are_those_in_memory():
    specs = {
        str(dtype): TensorSpec("x", (3, 5), dtype)
        for dtype in (torch.uint8, torch.bfloat16, torch.float32, torch.int64)
    }
    for spec in specs.values():
        assert spec.nbytes == torch.empty(spec.shape, dtype=spec.dtype).untyped_storage().nbytes()
    assert sum(spec.nbytes for spec in specs.values()) == 15 * (1 + 2 + 4 + 8)
    assert TensorSpec("scalar", (), torch.float32).nbytes == 4
    assert TensorSpec("empty", (0, 7), torch.float32).nbytes == 0


def test_decoding_is_the_formula_and_outliers_take_their_places():
    q = quantized()
    scale, zero = (np.repeat(q.params[name].double().numpy(), 16, axis=1) for name in ("scale", "zero"))
    wanted = (q.codes.double().numpy() - zero) * scale
    np.testing.assert_allclose(q.decode(), wanted, rtol=1e-6)
    indices = torch.tensor([0, 33, 127])
    with_outliers = replace(q, outliers=(indices, torch.tensor([1.0, 2.0, -1.0], dtype=torch.float16)))
    wanted.reshape(-1)[indices.numpy()] = [1.0, 2.0, -1.0]
    np.testing.assert_allclose(with_outliers.decode(), wanted, rtol=1e-6)


def test_records_that_contradict_the_scheme_are_refused():
    q = quantized()
    wrong = [
        {"codes": q.codes[:, :-1]},
        {"codes": q.codes.T},
        {"shape": (4, 48)},
        {"params": {"scale": q.params["scale"]}},
        {"params": {**q.params, "extra": torch.ones(1)}},
        {"params": {**q.params, "scale": q.params["scale"].half()}},
        {"params": {**q.params, "zero": q.params["zero"][:, :1]}},
        {"scheme": Affine(bits=4, group_size=32, symmetric=False, scale_dtype="float32")},
    ]
    for change in wrong:
        with pytest.raises(InputError):
            replace(q, **change)


def test_equality_is_bit_for_bit():
    q = quantized()
    assert q.equals(quantized())
    codes = q.codes.clone()
    codes[2, 3] ^= 1
    assert not q.equals(replace(q, codes=codes))
    scale = q.params["scale"].clone()
    scale[0, 0] = torch.nextafter(scale[0, 0], torch.tensor(10.0))
    assert not q.equals(replace(q, params={**q.params, "scale": scale}))


def test_equality_counts_outliers():
    q = quantized()
    with_outliers = replace(q, outliers=(torch.tensor([3]), torch.tensor([1.0])))
    assert not q.equals(with_outliers)
    assert not with_outliers.equals(q)
    assert with_outliers.equals(replace(q, outliers=(torch.tensor([3]), torch.tensor([1.0]))))
    assert not with_outliers.equals(replace(q, outliers=(torch.tensor([4]), torch.tensor([1.0]))))
