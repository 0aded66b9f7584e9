"""bitwright's own layout: every scheme, no loss, true size."""

from __future__ import annotations

import pytest
import torch

from bitwright.core.quantized import QuantizedTensor
from bitwright.core.tensor import TensorSpec
from bitwright.errors import InputError
from bitwright.layouts.native import Native
from bitwright.schemes.affine import Affine

NAME = "model.layers.0.mlp.up_proj"
LAYOUT = Native()


def specs_of(tensors):
    return {name: TensorSpec(name, tuple(t.shape), t.dtype) for name, t in tensors.items()}


def quantized(scheme: Affine, shape=(16, 128)) -> QuantizedTensor:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    params, codes = scheme.quantize(w)
    return QuantizedTensor(scheme, shape, codes, params)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes_take_their_true_bits(bits):
    stored = LAYOUT.pack(NAME, quantized(Affine(bits=bits, symmetric=False)))
    assert stored[f"{NAME}.weight.codes"].nbytes == 16 * 128 * bits // 8
    assert set(stored) == {f"{NAME}.weight.{part}" for part in ("codes", "shape", "scale", "zero")}


def test_schemes_are_told_in_full():
    narrow = Affine(bits=5, granularity="tensor", symmetric_range="narrow", scale_dtype="float32")
    entries = {"a": Affine(), "b": narrow, "c": Affine()}
    config = LAYOUT.config(entries, ["lm_head"], {"damping": 0.01})
    assert config["schemes"] == [Affine().to_spec(), narrow.to_spec()]
    assert config["modules"] == {"a": 0, "b": 1, "c": 0}
    assert config["kept"] == ["lm_head"]


def test_padded_columns_are_read_from_the_shape_tensor():
    q = quantized(Affine(bits=5, granularity="channel"), (4, 10))
    stored = LAYOUT.pack(NAME, q)
    config = LAYOUT.config({NAME: q.scheme}, [], {})
    found = LAYOUT.read_config(config, torch.float16, specs_of(stored), stored.__getitem__)
    assert found == {NAME: (q.scheme, (4, 10))}
    with pytest.raises(InputError, match="codes"):
        LAYOUT.read_config(config, torch.float16, specs_of(stored), lambda _: torch.tensor([4, 99]))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"version": 2}, "version"),
        ({"schemes": None}, "schemes"),
        ({"modules": {NAME: 1}}, "scheme 1"),
        ({"modules": {"other": 0}}, "other"),
        ({"schemes": ["affine"]}, "kind"),
        ({"schemes": [{"kind": "no_such_scheme"}]}, "unknown"),
        ({"schemes": [{"kind": "affine", "colour": 1}]}, "unknown"),
        ({"schemes": [{"kind": "../evil"}]}, "not a name"),
    ],
)
def test_damaged_configs_are_refused(change, match):
    q = quantized(Affine())
    stored = LAYOUT.pack(NAME, q)
    config = LAYOUT.config({NAME: q.scheme}, [], {}) | change
    with pytest.raises(InputError, match=match):
        LAYOUT.read_config(config, torch.float16, specs_of(stored), stored.__getitem__)
