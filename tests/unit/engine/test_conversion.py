"""The plan of a conversion: what it reads, and how it chooses one scheme for every module."""

import pytest
import torch

from bitwright import catalog
from bitwright.core.inputs import InputScheme
from bitwright.core.quantized import QuantizedTensor
from bitwright.engine.conversion import _choose
from bitwright.errors import BitwrightError
from bitwright.schemes.affine import Affine

SHAPE = (128, 256)
OPTIONS = {
    "affine": [
        *({"bits": bits, "symmetric": symmetric, "group_size": 32} for bits in (4, 8) for symmetric in (True, False)),
        {"bits": 8, "granularity": "channel", "inputs": InputScheme()},
    ],
    "absmax-int8": [{"inputs": InputScheme(threshold=6.0)}],
    "codebook": [{"double_quant": False}, {"double_quant": True}],
}


def pairs():
    for name in catalog.names("layouts"):
        layout = catalog.load("layouts", name)()
        if not layout.codes_apart:
            continue
        for kind in catalog.names("schemes"):
            for options in OPTIONS.get(kind, [{}]):
                scheme = catalog.load("schemes", kind)(**options).limit(layout.limits(torch.bfloat16))
                if layout.accepts(scheme, SHAPE) is None and not scheme.outlier_count(SHAPE):
                    yield layout, scheme


@pytest.mark.parametrize(
    ("layout", "scheme"), list(pairs()), ids=lambda v: getattr(v, "name", None) or v.describe_all()
)
def test_the_first_stored_tensor_of_a_module_holds_its_codes_and_no_parameter(layout, scheme):
    w = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 0.02
    try:
        params, codes = scheme.quantize(w, context=scheme.prepare([w]))
        stored = layout.pack("m", QuantizedTensor(scheme, SHAPE, codes, params))
    except BitwrightError as error:
        pytest.skip(f"it cannot be made by rounding alone: {error.message}")
    first = layout.tensors("m", scheme, SHAPE)[0].name
    blank = layout.unpack("m", scheme, SHAPE, stored | {first: torch.zeros_like(stored[first])})
    assert blank.scheme == scheme
    assert all(torch.equal(blank.params[name], value) for name, value in params.items())
    assert not torch.equal(blank.codes, codes)


SYMMETRIC, ASYMMETRIC = Affine(group_size=32), Affine(group_size=32, symmetric=False)


def chosen(**options):
    """Module -> whether the chosen scheme is symmetric."""
    names = {name.replace("__", "."): [(s, 0.0) for s in schemes] for name, schemes in options.items()}
    return {name: scheme.symmetric for name, (scheme, _) in _choose(names).items()}


def test_a_model_that_can_be_symmetric_throughout_is():
    assert chosen(a=[ASYMMETRIC, SYMMETRIC], b=[SYMMETRIC, ASYMMETRIC]) == {"a": True, "b": True}


def test_otherwise_modules_stay_as_they_are():
    assert chosen(a=[ASYMMETRIC], b=[SYMMETRIC, ASYMMETRIC]) == {"a": False, "b": True}


def test_parts_of_a_fused_layer_are_alike():
    both = [SYMMETRIC, ASYMMETRIC]
    found = chosen(x__q_proj=[ASYMMETRIC], x__k_proj=both, x__v_proj=both, x__o_proj=both)
    assert found == {"x.q_proj": False, "x.k_proj": False, "x.v_proj": False, "x.o_proj": True}
