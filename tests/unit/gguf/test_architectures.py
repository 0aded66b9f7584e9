"""Every architecture against PyPI gguf: names, keys and their types, and the numbers that its reader finds."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.gguf_zoo import MODELS, make, write_gguf

import bitwright.io.gguf_values as values
from bitwright.errors import InputError, PlanError
from bitwright.gguf.export import describe
from bitwright.gguf.orders import interleave
from bitwright.gguf.to_hf import HfView
from bitwright.io.gguf_file import GgufFile
from bitwright.io.gguf_values import ValueType
from bitwright.io.safetensors_dir import SafetensorsDir

gguf = pytest.importorskip("gguf")

#: names that gguf's table gives otherwise or not at all: stacks of experts, which it knows under merged names only
STACKED = re.compile(r"ffn_(gate|up|down)_exps")


def architecture(name):
    return next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)


@pytest.mark.parametrize("name", MODELS)
def test_names_are_those_of_gguf(name, zoo):
    _, _, export = zoo(name)
    blocks = export.values[f"{export.architecture}.block_count"].value
    table = gguf.get_tensor_name_map(architecture(export.architecture), blocks)
    compared = 0
    for road in export.roads:
        if STACKED.search(road.name) or not road.pieces:
            continue
        if road.name == "output.weight" and road.pieces[0].tensor == "model.embed_tokens.weight":
            continue
        tensor = road.pieces[0].tensor
        assert table.get_name(tensor, try_suffixes=(".weight", ".bias")) == road.name
        compared += 1
    assert compared > blocks * 5
    known = {gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[architecture(export.architecture)]}
    for road in (road for road in export.roads if road.pieces):
        plain = re.sub(r"^blk\.\d+\.", "blk.{bid}.", road.name).rsplit(".", 1)[0]
        assert plain in known, road.name


@pytest.mark.parametrize("name", MODELS)
def test_gguf_reads_what_was_meant(name, zoo):
    folder, file, export = zoo(name)
    reader = gguf.GGUFReader(file)
    assert next(key for key in reader.fields if not key.startswith("GGUF.")) == "general.architecture"
    for key, value in export.values.items():
        field = reader.fields[key]
        kinds = [value.type] if value.element is None or not len(value.value) else [value.type, value.element]
        assert [int(kind) for kind in field.types] == [int(kind) for kind in kinds]
        found = field.contents()
        if value.element is None:
            assert found == pytest.approx(value.value)
        else:
            assert len(found) == len(value.value)
    assert [tensor.name for tensor in reader.tensors] == [road.name for road in export.roads]
    with SafetensorsDir.open(folder) as source:
        for tensor, road in zip(reader.tensors, export.roads, strict=True):
            assert tuple(int(size) for size in reversed(tensor.shape)) == road.shape
            np.testing.assert_array_equal(tensor.data.reshape(road.rows, road.columns), road.read(source))


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_is_used_or_left_out_with_a_reason(name, zoo):
    folder, _, export = zoo(name)
    stored = load_file(folder / "model.safetensors")
    used = {piece.tensor for road in export.roads for piece in road.pieces}
    assert used | set(export.left_out) == set(stored)
    assert not used & set(export.left_out)
    assert all(export.left_out.values())


@pytest.mark.parametrize("name", MODELS)
def test_reading_rows_equals_reading_all(name, zoo):
    folder, _, export = zoo(name)
    with SafetensorsDir.open(folder) as source:
        for road in export.roads:
            whole = road.read(source)
            assert whole.dtype == np.float32
            assert whole.flags.c_contiguous
            for start, stop in (
                (0, road.rows),
                (1, min(5, road.rows)),
                (road.rows // 2, road.rows),
                (road.rows, road.rows),
            ):
                if start <= stop:
                    np.testing.assert_array_equal(road.read(source, (start, stop)), whole[start:stop])


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_exact(name, zoo):
    folder, file, export = zoo(name)
    stored = load_file(folder / "model.safetensors")
    with GgufFile.open(file) as opened:
        view = HfView(opened, dtype=torch.bfloat16)
        assert view.left_out == {}
        # Qwen-MoE's head must be in the file, so a tied one comes back as a matrix of its own
        assert set(view.tensors) - set(stored) <= {"lm_head.weight"}
        assert set(stored) - set(view.tensors) == set(export.left_out)
        for tensor, spec in view.tensors.items():
            wanted = stored.get(tensor, stored.get("model.embed_tokens.weight"))
            assert spec.shape == tuple(wanted.shape)
            assert torch.equal(view.read(tensor), wanted), tensor
            middle = spec.shape[0] // 2
            assert torch.equal(view.read(tensor, (middle, spec.shape[0])), wanted[middle:])


@pytest.mark.parametrize("name", MODELS)
def test_the_restored_config_computes_the_same(name, zoo, tmp_path):
    import transformers

    folder, file, _ = zoo(name)
    auto = transformers.AutoModel if name == "bert" else transformers.AutoModelForCausalLM
    with GgufFile.open(file) as opened:
        view = HfView(opened, dtype=torch.float32)
        save_file(
            {tensor: view.read(tensor) for tensor in view.tensors}, tmp_path / "model.safetensors", {"format": "pt"}
        )
        (tmp_path / "config.json").write_text(json.dumps(dict(view.config)))
    tokens = torch.arange(3, 27)[None]
    with torch.no_grad():
        first, second = (
            auto.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()(tokens)[0]
            for path in (folder, tmp_path)
        )
    assert torch.isfinite(first).all()
    # gemma stores its norms plus one and llama3 scaling is rebuilt from its factors: last bits may differ
    torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-5)


def test_queries_and_keys_are_reordered_by_hand(zoo):
    folder, _, export = zoo("llama")
    stored = load_file(folder / "model.safetensors")
    roads = {road.name: road for road in export.roads}
    with SafetensorsDir.open(folder) as source:
        for letter, heads in (("q", 4), ("k", 2)):
            weight = stored[f"model.layers.1.self_attn.{letter}_proj.weight"].float().numpy()
            by_head = weight.reshape(heads, 2, 8, 64).transpose(0, 2, 1, 3).reshape(weight.shape)
            np.testing.assert_array_equal(roads[f"blk.1.attn_{letter}.weight"].read(source), by_head)
    piece = roads["blk.1.attn_q.weight"].pieces[0]
    np.testing.assert_array_equal(piece.source_rows(), interleave(64, 4))
    np.testing.assert_array_equal(piece.source_rows(3, 5), interleave(64, 4)[3:5])


def test_experts_are_stacked_one_after_the_other(zoo):
    folder, _, export = zoo("mixtral")
    stored = load_file(folder / "model.safetensors")
    road = next(road for road in export.roads if road.name == "blk.2.ffn_down_exps.weight")
    wanted = (
        torch.stack([stored[f"model.layers.2.block_sparse_moe.experts.{e}.w2.weight"] for e in range(4)])
        .float()
        .numpy()
    )
    assert road.shape == wanted.shape == (4, 64, 128)
    with SafetensorsDir.open(folder) as source:
        np.testing.assert_array_equal(road.read(source), wanted.reshape(-1, 128))
        np.testing.assert_array_equal(road.read(source, (60, 70)), wanted.reshape(-1, 128)[60:70])
    assert [(piece.tensor[-13:], start, stop) for piece, start, stop in road.parts((60, 70))] == [
        ("s.0.w2.weight", 60, 64),
        ("s.1.w2.weight", 0, 6),
    ]


def test_gemma_norms_are_stored_plus_one(zoo):
    folder, _, export = zoo("gemma3")
    stored = load_file(folder / "model.safetensors")
    roads = {road.name: road for road in export.roads}
    pairs = {"blk.0.attn_q_norm.weight": "layers.0.self_attn.q_norm", "output_norm.weight": "norm"}
    with SafetensorsDir.open(folder) as source:
        for name, tensor in pairs.items():
            wanted = stored[f"model.{tensor}.weight"].float().numpy() + 1
            np.testing.assert_array_equal(roads[name].read(source)[0], wanted)


def test_the_order_is_that_of_llamacpp(zoo):
    names = [road.name for road in zoo("llama")[2].roads]
    assert names[:4] == ["output.weight", "output_norm.weight", "token_embd.weight", "blk.0.attn_k.weight"]
    assert names == sorted(names, key=lambda name: (int(name.split(".")[1]) if name.startswith("blk") else -1, name))


def test_roles(zoo):
    plain = {road.name for road in zoo("qwen2-moe")[2].roads if road.role == "plain" and ".0." in road.name}
    assert plain == {
        "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "blk.0.attn_q.bias", "blk.0.attn_k.bias", "blk.0.attn_v.bias",
        "blk.0.ffn_gate_inp.weight", "blk.0.ffn_gate_inp_shexp.weight",
    }  # fmt: skip
    assert {road.role for road in zoo("gpt2")[2].roads if road.name == "position_embd.weight"} == {"plain"}


def change(zoo, name, tmp_path, **entries):
    folder = tmp_path / "changed"
    shutil.copytree(zoo(name)[0], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))
    return folder


def export_of(folder):
    with SafetensorsDir.open(folder) as source:
        return describe(source)


@pytest.mark.parametrize(
    ("name", "entries", "said"),
    [
        ("llama", {"model_type": "opt"}, "model type 'opt'"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ("qwen2", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "'llama3'"),
        ("qwen3-moe", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("qwen3-moe", {"mlp_only_layers": [1]}, "mlp_only_layers"),
        ("qwen2-moe", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("gemma2", {"query_pre_attn_scalar": 256}, "query_pre_attn_scalar"),
        ("falcon-7b", {"alibi": True}, "alibi"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1, 1]}, "fourth"),
        ("llama-yarn", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16}}, "beta_fast"),
    ],
)
def test_what_llamacpp_would_compute_otherwise_is_refused(name, entries, said, zoo, tmp_path):
    with pytest.raises(PlanError, match=said) as caught:
        export_of(change(zoo, name, tmp_path, **entries))
    assert caught.value.mend


@pytest.mark.parametrize(
    "entries",
    [
        {"num_hidden_layers": 2**31},
        {"num_hidden_layers": 4},
        {"num_hidden_layers": 2},
        {"num_hidden_layers": "3"},
        {"num_attention_heads": 0},
        {"num_attention_heads": 2**30},
        {"num_key_value_heads": 3},
        {"head_dim": 2**31},
        {"rms_norm_eps": "small"},
        {"rms_norm_eps": True},
        {"rope_parameters": [1]},
        {"rope_parameters": {"full_attention": 3}},
        {"rope_parameters": {"rope_type": "linear", "factor": -1}},
        {"rope_parameters": {"rope_type": "linear"}},
        {"rope_parameters": {"rope_type": "longrope", "long_factor": ["a"], "short_factor": [1.0]}},
        {"max_position_embeddings": 2**40},
        {"vocab_size": 256, "hidden_size": None},
    ],
)
def test_a_faulty_config_is_an_input_error(entries, zoo, tmp_path):
    with pytest.raises(InputError) as caught:
        export_of(change(zoo, "llama", tmp_path, **entries))
    assert caught.value.mend


def test_a_missing_or_unknown_tensor_is_named(zoo, tmp_path):
    folder = change(zoo, "llama", tmp_path)
    stored = load_file(folder / "model.safetensors")
    without = {name: tensor for name, tensor in stored.items() if "layers.1.mlp.up" not in name}
    save_file(without, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj"):
        export_of(folder)
    save_file({**stored, "model.layers.0.self_attn.sinks": torch.zeros(4)}, folder / "model.safetensors")
    with pytest.raises(InputError, match="sinks"):
        export_of(folder)


def test_buffers_and_tied_heads_are_left_out(zoo, tmp_path):
    folder = change(zoo, "llama-tied", tmp_path)
    stored = load_file(folder / "model.safetensors")
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, folder / "model.safetensors")
    export = export_of(folder)
    assert set(export.left_out) == {"model.layers.0.self_attn.rotary_emb.inv_freq", "lm_head.weight"}
    assert "output.weight" not in {road.name for road in export.roads}


def test_the_language_model_of_a_multimodal_folder(zoo, tmp_path):
    folder = change(zoo, "gemma3", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": config}))
    stored = {f"language_model.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file({**stored, "vision_tower.patch.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    export = export_of(folder)
    assert [road.name for road in export.roads] == [road.name for road in zoo("gemma3")[2].roads]
    assert set(export.left_out) == {"vision_tower.patch.weight"}


def test_a_base_class_saved_alone(zoo, tmp_path):
    folder = change(zoo, "qwen2-tied", tmp_path)
    stored = {name.removeprefix("model."): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(stored, folder / "model.safetensors")
    assert len(export_of(folder).roads) == len(zoo("qwen2-tied")[2].roads)


def test_old_spellings_of_the_config(zoo, tmp_path):
    folder = change(
        zoo,
        "llama-linear",
        tmp_path,
        rope_parameters=None,
        rope_theta=5000.0,
        rope_scaling={"type": "linear", "factor": 4.0},
    )
    found = export_of(folder).values
    assert found["llama.rope.freq_base"] == values.f32(5000.0)
    assert found["llama.rope.scaling.factor"] == values.f32(4.0)
    folder = change(zoo, "gpt-neox", tmp_path / "x", rope_parameters=None, rotary_pct=0.5, rotary_emb_base=7000)
    found = export_of(folder).values
    assert found["gptneox.rope.dimension_count"] == values.u32(8)
    assert found["gptneox.rope.freq_base"] == values.f32(7000)


def test_windows_that_are_not_computed_are_remarked(zoo, tmp_path):
    assert zoo("llama")[2].notes == ()
    notes = export_of(change(zoo, "mistral", tmp_path, sliding_window=32)).notes
    assert len(notes) == 1
    assert "32" in notes[0]


def test_an_unusual_pattern_of_windows_is_written_out(zoo):
    assert "gemma3.attention.sliding_window_pattern" not in zoo("gemma3")[2].values
    found = zoo("gemma3-pattern")[2].values["gemma3.attention.sliding_window_pattern"]
    assert found.element is ValueType.BOOL
    assert found.value.tolist() == [False, True, False]


def test_pooling_is_read_where_sentence_transformers_says_it(zoo, tmp_path):
    folder = change(zoo, "bert", tmp_path)
    assert "bert.pooling_type" not in export_of(folder).values
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    assert export_of(folder).values["bert.pooling_type"] == values.u32(2)


def test_a_name_that_llamacpp_takes_for_phi3_is_changed(tmp_path):
    folder = make("phi3", tmp_path / "my-phi3-test")
    assert write_gguf(folder, tmp_path / "a.gguf").values["general.name"] == values.string("my-phi 3-test")


def test_float16_and_float32_checkpoints(tmp_path):
    for dtype in (torch.float16, torch.float32):
        folder = make("qwen2", tmp_path / str(dtype), dtype=dtype)
        file = tmp_path / f"{dtype}.gguf"
        write_gguf(folder, file)
        stored = load_file(folder / "model.safetensors")
        with GgufFile.open(file) as opened:
            view = HfView(opened)
            assert view.config["dtype"] == "float32"
            for tensor in view.tensors:
                assert torch.equal(view.read(tensor), stored[tensor].float())
