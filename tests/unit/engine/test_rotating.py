"""Rotated checkpoints, against plain transformers on both sides."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.zoo import ZOO, make

from bitwright.core.tensor import TensorSpec
from bitwright.engine.rotated import NormScale, RotatedSource, Turn
from bitwright.engine.rotating import rotated_source
from bitwright.engine.run import open_source
from bitwright.errors import InputError, NumericError, PlanError
from bitwright.transforms.rotate import Rotate

#: a norm stands between what they compute and the residual stream
POST_NORM = {"gemma2", "gemma3_text"}
#: config values that tie the head to the embeddings
TIED = {"llama", "gpt2", "opt", "falcon"}


@pytest.fixture(scope="module", params=sorted(set(ZOO) - POST_NORM))
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rotation") / request.param
    return request.param, make(request.param, folder, dtype=torch.float32)


def _logits(folder, tokens):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def _written(rotated, folder):
    """The rewritten checkpoint as a plain folder that transformers loads."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(rotated.config)))
    tensors = {name: rotated.read(name).contiguous() for name in rotated.tensors}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", ["hadamard", "random"])
def test_logits_stay_the_same_in_every_architecture(kind, model, tmp_path):
    name, folder = model
    tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(5))
    with open_source(folder) as source:
        rotated, notes = rotated_source(source, Rotate(kind=kind), seed=1)
        written = _written(rotated, tmp_path / "out")
        assert rotated.config.get("tie_word_embeddings", name in TIED) is False
        assert any("unties" in note for note in notes) == (name in TIED)
        before, after = load_file(folder / "model.safetensors"), load_file(written / "model.safetensors")
    expected, found = _logits(folder, tokens), _logits(written, tokens)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    # Everything but the norms' constants, query and key biases has moved.
    moved = {n for n in before if not torch.allclose(before[n], after[n], atol=1e-3)}
    matrices = {n for n, value in before.items() if value.dim() == 2}
    assert matrices <= moved


_SMALL = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
#: what the zoo does not have: norms of 1 + w without a norm behind, norms without weights, parallel blocks with scaled logits, latent
#: attention beside dense and expert blocks, experts stored as 3-D tensors with biases of their own, a shared expert with a gate, scaled
#: residuals, recurrent blocks
OTHERS = {
    "gemma": ("GemmaConfig", {**_SMALL, "head_dim": 16}),
    "olmo": ("OlmoConfig", _SMALL),
    "cohere": ("CohereConfig", _SMALL),
    "deepseek_v3": ("DeepseekV3Config", {
        **_SMALL, **_EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 24,
        "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_shared_experts": 1}),
    "gpt_oss": ("GptOssConfig", {**_SMALL, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2MoeConfig", {**_SMALL, **_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 48}),
    "granite": ("GraniteConfig", {**_SMALL, "residual_multiplier": 0.5, "embedding_multiplier": 3.0, "logits_scaling": 2.0}),
    "mamba2": ("Mamba2Config", {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 16,
                                "n_groups": 1, "state_size": 16}),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(OTHERS))
@pytest.mark.filterwarnings("ignore:.*fast path is not available.*")
def test_logits_stay_the_same_in_other_architectures_too(name, tmp_path):
    import transformers

    class_name, arguments = OTHERS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, class_name)(**arguments)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "model")
    tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(5))
    with open_source(tmp_path / "model") as source:
        rotated, _ = rotated_source(source, Rotate(), seed=1)
        written = _written(rotated, tmp_path / "out")
    expected, found = _logits(tmp_path / "model", tokens), _logits(written, tokens)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_norms_multiply_by_one_afterwards(model):
    _, folder = model
    with open_source(folder) as source:
        rotated, _ = rotated_source(source, Rotate(), seed=1)
        norms = [n for n in rotated.tensors if n.endswith("weight") and "norm" in n.replace("ln_", "norm")]
        per_head = [n for n in norms if "q_norm" in n or "k_norm" in n]
        assert len(norms) - len(per_head) == 2 * 3 + 1
        for norm in set(norms) - set(per_head):
            assert torch.equal(rotated.read(norm), torch.ones_like(rotated.read(norm)))
        for norm in per_head:
            assert torch.equal(rotated.read(norm), source.read(norm))


def test_values_are_rotated_per_head_where_asked(model):
    """With and without, the value matrices differ, and by an orthogonal matrix: their Gram matrices are the same."""
    _, folder = model
    with open_source(folder) as source:
        with_values, _ = rotated_source(source, Rotate(), seed=1)
        without, _ = rotated_source(source, Rotate(values=False), seed=1)
        different = [n for n in with_values.tensors if not torch.equal(with_values.read(n), without.read(n))]
        matrices = [n for n in different if len(source.tensors[n].shape) == 2]
        assert len(matrices) == 2 * 3  # what holds the values, and the output projection, of three blocks
        for n in matrices:
            a, b = with_values.read(n).double(), without.read(n).double()
            assert torch.allclose(a.T @ a, b.T @ b, atol=1e-4) or torch.allclose(a @ a.T, b @ b.T, atol=1e-4)


def test_pieces_have_the_bits_of_the_whole(model):
    _, folder = model
    with open_source(folder) as source:
        rotated, _ = rotated_source(source, Rotate(), seed=1)
        for name in rotated.tensors:
            whole = rotated.read(name)
            assert whole.dtype == torch.float32
            for rows in ((0, 1), (1, len(whole) // 2 + 1), (len(whole) - 3, len(whole))):
                assert torch.equal(rotated.read(name, rows), whole[slice(*rows)])


@pytest.mark.parametrize("name", sorted(POST_NORM))
def test_post_norm_blocks_are_refused(name, tmp_path):
    with open_source(make(name, tmp_path / name)) as source, pytest.raises(PlanError, match=r"o_proj.*such as a norm"):
        rotated_source(source, Rotate(), seed=0)


def test_norm_after_the_embeddings_is_refused(tmp_path):
    import transformers

    config = transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2)
    transformers.BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    with open_source(tmp_path / "bloom") as source, pytest.raises(PlanError, match=r"word_embeddings"):
        rotated_source(source, Rotate(), seed=0)


def test_embeddings_of_another_width_are_refused(tmp_path):
    import transformers

    config = transformers.OPTConfig(
        vocab_size=64, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=32
    )
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    with open_source(tmp_path / "opt") as source, pytest.raises(PlanError):
        rotated_source(source, Rotate(), seed=0)


def test_norm_applied_after_the_sum_is_refused(tmp_path):
    """The first OPT-350m kind of block: the residual stream itself is normalized."""
    import transformers

    config = transformers.OPTConfig(
        vocab_size=64, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=2, do_layer_norm_before=False,
        word_embed_proj_dim=64,
    )  # fmt: skip
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    with open_source(tmp_path / "opt") as source, pytest.raises(PlanError):
        rotated_source(source, Rotate(), seed=0)


def test_width_without_hadamard_matrix_names_the_other_kind(tmp_path):
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=52, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, head_dim=16
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    with open_source(tmp_path / "llama") as source:
        with pytest.raises(PlanError) as caught:
            rotated_source(source, Rotate(), seed=0)
        assert "kind=random" in caught.value.mend
        rotated_source(source, Rotate(kind="random"), seed=0)


def test_unknown_kind_is_refused():
    with pytest.raises(InputError, match="nonsense"):
        Rotate(kind="nonsense")


class _Given:
    """A source of given tensors."""

    def __init__(self, tensors):
        self._values = tensors
        self.tensors = {n: TensorSpec(n, tuple(v.shape), v.dtype) for n, v in tensors.items()}
        self.config, self.path = {}, None

    def read(self, name, rows=None):
        value = self._values[name]
        return value.clone() if rows is None else value[slice(*rows)].clone()


def _rotation(width):
    return Rotate().stream_rotation(width, rng=torch.Generator().manual_seed(2), keep_ones=False)


@pytest.mark.parametrize("turned", [False, True])
def test_turns_follow_their_formula_in_float64(turned):
    rng = torch.Generator().manual_seed(0)
    w, g = torch.randn(96, 128, generator=rng), torch.rand(128, generator=rng) + 0.5
    left, right = _rotation(96), _rotation(128)
    stored = w.T.contiguous() if turned else w
    turn = Turn("w", scale=NormScale("g", 1.0), columns=right, rows=left, turned=turned)
    source = RotatedSource(_Given({"w": stored, "g": g}), {"w": turn}, {}, None)
    expected = left.matrix().T @ (w.double() * (g.double() + 1)) @ right.matrix()
    found = source.read("w").T if turned else source.read("w")
    assert torch.equal(found, expected.float()) or float((found - expected).abs().max()) < 1e-6


def test_kept_tensors_are_rounded_once_to_their_stored_dtype():
    rng = torch.Generator().manual_seed(0)
    w, q = torch.randn(70, 64, generator=rng).bfloat16(), _rotation(64)
    turns = {"w": Turn("w", columns=q), "new": Turn("w", columns=q)}
    source = RotatedSource(_Given({"w": w}), turns, {}, frozenset({"new"}))
    expected = w.double() @ q.matrix()
    assert source.read("new").dtype == torch.float32
    assert source.tensors["new"].shape == (70, 64)
    assert source.read("w").dtype == torch.bfloat16
    assert float((source.read("w").double() - expected).abs().max()) <= float(expected.abs().max()) * 2**-8
    assert torch.equal(source.read("w"), source.with_exact(None).read("w").bfloat16())


def test_bias_of_a_norm_with_a_zero_weight_is_refused():
    turn = Turn("b", scale=NormScale("g", 0.0, inverse=True), columns=_rotation(4))
    source = RotatedSource(_Given({"b": torch.ones(4), "g": torch.tensor([1.0, 0.0, 1.0, 1.0])}), {"b": turn}, {}, None)
    with pytest.raises(NumericError, match="zero"):
        source.read("b")
