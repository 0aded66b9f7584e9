"""bitsandbytes files: bytes by hand, and against bitsandbytes' own state dicts."""

from __future__ import annotations

import json

import pytest
import torch

from bitwright.core.inputs import InputScheme
from bitwright.core.layout import ENGINES
from bitwright.core.quantized import QuantizedTensor
from bitwright.core.tensor import TensorSpec
from bitwright.errors import InputError, PlanError
from bitwright.layouts.bitsandbytes import Bitsandbytes
from bitwright.schemes.absmax_int8 import AbsmaxInt8
from bitwright.schemes.affine import Affine
from bitwright.schemes.codebook import Codebook

NAME = "model.layers.0.mlp.up_proj"
LAYOUT = Bitsandbytes()
INT8 = AbsmaxInt8(inputs=InputScheme(threshold=6.0))
#: transformers 5.23, BitsAndBytesConfig.to_dict
KEYS = {
    "quant_method", "_load_in_4bit", "_load_in_8bit", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "llm_int8_threshold",
    "llm_int8_skip_modules", "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight",
}  # fmt: skip


def weight(shape=(16, 128)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02


def quantized(scheme, w) -> QuantizedTensor:
    params, codes = scheme.quantize(w)
    return QuantizedTensor(scheme, (w.shape[0], w.shape[1]), codes, params)


def specs_of(tensors):
    return {name: TensorSpec(name, tuple(t.shape), t.dtype) for name, t in tensors.items()}


def test_bytes_by_hand():
    w = torch.zeros(1, 32)
    w[0, :4] = torch.tensor([1.0, -1.0, 0.5, 0.0])
    stored = LAYOUT.pack(NAME, quantized(Codebook(block_size=32), w))
    # Indices 15, 0, 12 (0.4407; 0.5626 is farther), 7, and zeros: the first of a pair in the high nibble.
    assert stored[f"{NAME}.weight"].view(-1).tolist() == [0xF0, 0xC7, *[0x77] * 14]
    assert stored[f"{NAME}.weight.absmax"].tolist() == [1.0]
    fp4 = LAYOUT.pack(NAME, quantized(Codebook(book="fp4", block_size=32), w))
    assert fp4[f"{NAME}.weight"].view(-1).tolist() == [0x3B, 0x50, *[0x00] * 14]
    eight = LAYOUT.pack(NAME, quantized(INT8, torch.tensor([[1.0, -2.0, 4.0]])))
    assert eight[f"{NAME}.weight"].tolist() == [[32, -64, 127]]
    assert eight[f"{NAME}.SCB"].tolist() == [4.0]


def test_an_odd_number_of_weights_is_filled_up_with_a_zero():
    for book, zero in (("nf4", 7), ("fp4", 0)):
        scheme = Codebook(book=book)
        q = quantized(scheme, weight((3, 13)))
        stored = LAYOUT.pack(NAME, q)
        assert stored[f"{NAME}.weight"].shape == (20, 1)
        assert int(stored[f"{NAME}.weight"][-1]) & 15 == zero
        assert LAYOUT.unpack(NAME, scheme, (3, 13), stored).equals(q)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("book", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_state_dict_of_bitsandbytes_has_the_same_tensors(book, double_quant, dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    scheme = Codebook(book=book, double_quant=double_quant).limit(LAYOUT.limits(dtype))
    w = weight((64, 512)).to(dtype)
    packed, state = functional.quantize_4bit(w, blocksize=64, quant_type=book, compress_statistics=double_quant)
    theirs = {f"{NAME}.weight": packed}
    theirs |= {f"{NAME}.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    ours = LAYOUT.pack(NAME, quantized(scheme, w.float()))
    assert ours.keys() == theirs.keys()
    blob = f"{NAME}.weight.quant_state.bitsandbytes__{book}"
    for name in ours.keys() - {blob}:
        assert torch.equal(ours[name], theirs[name]), name
    assert json.loads(bytes(ours[blob].tolist())) == json.loads(bytes(theirs[blob].tolist()))
    # Their bytes are read here, and ours there.
    found = LAYOUT.read_config({}, dtype, specs_of(theirs), theirs.__getitem__)
    assert found == {NAME: (scheme, (64, 512))}
    decoded = LAYOUT.unpack(NAME, *found[NAME], theirs).decode().to(dtype)
    parts = {name.removeprefix(f"{NAME}."): value for name, value in ours.items() if name != f"{NAME}.weight"}
    read = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
    assert torch.equal(decoded, functional.dequantize_4bit(ours[f"{NAME}.weight"], read))


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32, torch.int8])
def test_weights_stored_under_another_dtype_are_read(storage):
    q = quantized(Codebook(), weight())
    stored = LAYOUT.pack(NAME, q)
    stored[f"{NAME}.weight"] = stored[f"{NAME}.weight"].view(-1).view(storage).view(-1, 1)
    assert LAYOUT.unpack(NAME, q.scheme, q.shape, stored).equals(q)


def test_int8_equals_what_bitsandbytes_decodes():
    functional = pytest.importorskip("bitsandbytes.functional")
    w = weight()
    codes, absmax, _ = functional.int8_vectorwise_quant(w.to(torch.float16))
    theirs = {
        f"{NAME}.weight": codes,
        f"{NAME}.SCB": absmax,
        f"{NAME}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    ours = LAYOUT.pack(NAME, quantized(INT8, w))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    config = {"llm_int8_threshold": 6.0}
    found = LAYOUT.read_config(config, torch.float16, specs_of(theirs), theirs.__getitem__)
    assert found == {NAME: (INT8, (16, 128))}
    decoded = LAYOUT.unpack(NAME, *found[NAME], theirs).decode()
    torch.testing.assert_close(decoded, functional.int8_vectorwise_dequant(codes, absmax), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "scheme",
    [Codebook(), Codebook(book="fp4", double_quant=True, dtype="float16"), INT8],
    ids=lambda s: s.describe_all(),
)
def test_transformers_reads_every_key_of_the_config(scheme):
    transformers = pytest.importorskip("transformers")
    config = LAYOUT.config({NAME: scheme}, ["lm_head", "model.layers.0.mlp.gate"], {})
    assert config.keys() == KEYS
    theirs = transformers.BitsAndBytesConfig.from_dict(config)
    four = isinstance(scheme, Codebook)
    assert theirs.quantization_method() == (scheme.book if isinstance(scheme, Codebook) else "llm_int8")
    assert (theirs.load_in_4bit, theirs.load_in_8bit) == (four, not four)
    assert theirs.llm_int8_threshold == 6.0
    assert theirs.llm_int8_skip_modules == ["lm_head", "model.layers.0.mlp.gate"]
    if isinstance(scheme, Codebook):
        assert theirs.bnb_4bit_use_double_quant == scheme.double_quant
        assert str(theirs.bnb_4bit_compute_dtype) == f"torch.{scheme.dtype}"


def test_the_head_is_skipped_under_the_name_that_it_has_in_memory():
    skipped = LAYOUT.config({"gpt_neox.layers.0.mlp.dense_h_to_4h": Codebook()}, ["embed_out"], {})[
        "llm_int8_skip_modules"
    ]
    assert skipped == ["embed_out", "lm_head"]
    both = {NAME: Codebook(), "lm_head": Codebook()}
    assert LAYOUT.config(both, [], {})["llm_int8_skip_modules"] == []


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        (Affine(), "nf4, fp4 and int8"),
        (Codebook(book="kmeans"), "nf4 and fp4"),
        (AbsmaxInt8(), "inputs"),
        (AbsmaxInt8(inputs=InputScheme(symmetric=False)), "symmetric"),
        (AbsmaxInt8(inputs=InputScheme(number="float")), "int8 per token"),
    ],
)
def test_what_has_no_place_is_refused(scheme, reason):
    assert reason in (LAYOUT.accepts(scheme, (64, 128)) or "")
    with pytest.raises(PlanError, match="cannot store"):
        LAYOUT.pack(NAME, quantized(scheme, weight((64, 128))))


def test_one_file_is_of_4_bits_or_of_8():
    mixed = {NAME: Codebook(), "model.layers.1.mlp.up_proj": INT8}
    words = LAYOUT.loads_together(mixed, ["lm_head"])
    assert set(words) == set(ENGINES)
    assert "4 bits or of 8" in (words["transformers"] or "")
    assert words["bitwright"] is None
    # Kind, block size and double quantization lie in every tensor's own quant_state.
    books = {NAME: Codebook(), "model.layers.1.mlp.up_proj": Codebook(book="fp4", block_size=32, double_quant=True)}
    assert LAYOUT.loads_together(books, ["lm_head"])["transformers"] is None
    thresholds = {NAME: INT8, "model.layers.1.mlp.up_proj": AbsmaxInt8(inputs=InputScheme(threshold=3.0))}
    assert "threshold" in (LAYOUT.loads_together(thresholds, [])["transformers"] or "")


def test_what_transformers_does_not_replace_is_told():
    experts = {"model.layers.0.mlp.experts.3.up_proj": Codebook()}
    assert "3-D" in (LAYOUT.loads_together(experts, [])["transformers"] or "")
    assert "class of their own" in (LAYOUT.loads_in(Codebook(), "falcon")["transformers"] or "")
    assert LAYOUT.loads_in(Codebook(), "gpt2")["transformers"] is None
    assert "plugin" in (LAYOUT.loads_in(Codebook(), "llama")["vllm"] or "")


def damaged(stored, **changes):
    blob = next(name for name in stored if "quant_state" in name)
    state = json.loads(bytes(stored[blob].tolist())) | changes
    return stored | {blob: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [16]}, "shape"),
        ({"blocksize": 63}, "not usable"),
        ({"quant_type": "int4"}, "not usable"),
        ({"dtype": "float64"}, "not usable"),
        ({"nested_blocksize": 128}, "nested blocks"),
        ({"nested_offset": "much"}, "no number"),
    ],
)
def test_states_that_cannot_be_represented_are_refused(changes, message):
    stored = damaged(LAYOUT.pack(NAME, quantized(Codebook(double_quant=True), weight())), **changes)
    with pytest.raises(InputError, match=message):
        LAYOUT.read_config({}, torch.bfloat16, specs_of(stored), stored.__getitem__)


def test_contradictions_are_refused():
    q = quantized(Codebook(), weight())
    stored = LAYOUT.pack(NAME, q)
    with pytest.raises(InputError, match="contradict"):
        LAYOUT.unpack(NAME, q.scheme, q.shape, damaged(stored, shape=[8, 256]))
    with pytest.raises(InputError, match="own table"):
        LAYOUT.unpack(NAME, q.scheme, q.shape, stored | {f"{NAME}.weight.quant_map": torch.linspace(-1, 1, 16)})
    blob = f"{NAME}.weight.quant_state.bitsandbytes__nf4"
    with pytest.raises(InputError, match="no JSON"):
        LAYOUT.unpack(NAME, q.scheme, q.shape, stored | {blob: torch.zeros(5, dtype=torch.uint8)})
    with pytest.raises(InputError, match="must be read"):
        LAYOUT.read_config({}, torch.bfloat16, specs_of(stored))
    eight = LAYOUT.pack(NAME, quantized(INT8, weight()))
    with pytest.raises(InputError, match="tiled"):
        LAYOUT.unpack(NAME, INT8, (16, 128), eight | {f"{NAME}.weight_format": torch.tensor(2, dtype=torch.uint8)})
    with pytest.raises(InputError, match="no int8 matrix"):
        LAYOUT.read_config({}, torch.bfloat16, specs_of({f"{NAME}.SCB": torch.ones(4)}))
    with pytest.raises(InputError, match="threshold"):
        LAYOUT.read_config({"llm_int8_threshold": "six"}, torch.bfloat16, specs_of(eight))
