"""bitsandbytes files in transformers with bitsandbytes, and under a peft adapter, in this environment."""

from importlib.metadata import version

import pytest
import torch
from tests.interop.greedy import agreement

import bitwright
from bitwright.runtime.checkpoint import open_checkpoint

pytest.importorskip("bitsandbytes")

RECIPES = {
    "nf4": {"scheme": "codebook"},
    "nf4-double": {"scheme": "codebook", "scheme_options": {"double_quant": True}},
    "fp4": {"scheme": "codebook", "scheme_options": {"book": "fp4"}},
    "nf4-gptq": {"scheme": "codebook", "method": "gptq"},
    "int8": {"scheme": "absmax-int8", "inputs": {"threshold": 6.0}},
}
FOUR_BITS = [name for name in RECIPES if name != "int8"]
TOKENS = 32
#: bitsandbytes casts the inputs of int8 layers to float16 and says so on every call.
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning", "ignore:.*gemm_4bit_forward.*")


def load(folder, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": "auto", **options}).eval()


def made(checkpoint, recipe):
    return checkpoint(f"bnb-{recipe}", layout="bitsandbytes", **RECIPES[recipe])


@pytest.mark.parametrize("recipe", RECIPES)
def test_greedy_tokens_are_the_same(recipe, checkpoint, prompts, report):
    folder = made(checkpoint, recipe)
    model = load(folder)
    assert {type(m.up_proj).__name__ for m in (layer.mlp for layer in model.model.layers)} == {
        "Linear8bitLt" if recipe == "int8" else "Linear4bit"
    }
    assert type(model.lm_head) is torch.nn.Linear
    with torch.no_grad():
        out = model.generate(torch.tensor(prompts), do_sample=False, min_new_tokens=TOKENS, max_new_tokens=TOKENS)
    found = agreement(folder, prompts, out[:, len(prompts[0]) :].tolist(), torch.bfloat16)
    report(f"{found} (bitsandbytes {version('bitsandbytes')})")
    assert found.compared > found.positions // 2
    assert found.different == 0


@pytest.mark.parametrize("recipe", FOUR_BITS)
def test_bitsandbytes_decodes_the_same_weights(recipe, checkpoint, report):
    from bitsandbytes.functional import dequantize_4bit

    folder = made(checkpoint, recipe)
    source, model = open_checkpoint(folder), load(folder)
    assert len(source.modules) == 56
    for name in source.modules:
        weight = model.get_submodule(name).weight
        theirs = dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(source.read(f"{name}.weight").to(torch.bfloat16), theirs), name
    report("56 of 56 weights equal in bfloat16")


@pytest.mark.parametrize("eight", [False, True])
def test_a_checkpoint_that_transformers_saved_is_read(eight, checkpoint, tmp_path, report):
    """Quantized by bitsandbytes itself: same tensors as ours, so the same model."""
    from tests.small import STORY
    from transformers import BitsAndBytesConfig

    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    four["bnb_4bit_compute_dtype"] = torch.bfloat16
    config = BitsAndBytesConfig(load_in_8bit=True) if eight else BitsAndBytesConfig(**four)
    load(STORY, quantization_config=config, dtype=torch.bfloat16).save_pretrained(tmp_path / "theirs")
    ours, theirs = (
        open_checkpoint(made(checkpoint, "int8" if eight else "nf4-double")),
        open_checkpoint(tmp_path / "theirs"),
    )
    assert theirs.modules == ours.modules
    for name in ours.modules:
        assert theirs.quantized(name).equals(ours.quantized(name)), name
    report(f"{len(ours.modules)} of {len(ours.modules)} modules equal bit for bit")
    ids = torch.arange(5, 69)[None]
    with torch.no_grad():
        logits = [bitwright.load(source.path)(ids, use_cache=False).logits for source in (ours, theirs)]
    assert torch.equal(*logits)


# peft 0.21.2 uses names that transformers 5.23 has changed.
@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_a_lora_adapter_trains_on_the_nf4_file(checkpoint, prompts, report):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.prepare_model_for_kbit_training(load(made(checkpoint, "nf4-double")))
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    assert type(model.base_model.model.model.layers[0].self_attn.q_proj).__module__ == "peft.tuners.lora.bnb"
    ids = torch.tensor(prompts[:8])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    report(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in 3 steps (peft {version('peft')})")
    assert losses[1] < losses[0]
    assert losses[-1] < losses[1]
