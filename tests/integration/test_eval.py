"""``bitwright eval`` and ``compare`` on real checkpoints: figures against transformers, gates, cards, pages, and going on after a stop."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from tests.small import STORY, STORY_TEXT, add_text, make_model, run

import bitwright
from bitwright.errors import InputError
from bitwright.report.document import Document


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("BITWRIGHT_CACHE", str(tmp_path_factory.getbasetemp() / "eval-cache"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A source, a 3-bit version of it, a GGUF file of it, and a text."""
    folder = tmp_path_factory.mktemp("eval")
    source, text = make_model("llama", folder / "model"), add_text(folder)
    out = folder / "out"
    bitwright.quantize(source, out, method="rtn", bits=3, group_size=32, layout="gptq")
    file = bitwright.to_gguf(source, folder / "file.gguf", gguf={"type": "Q8_0"}).output
    return source, out, file, text


def by_hand(path, tokens, length):
    """Logits of whole windows from transformers, quantized weights decoded."""
    model = bitwright.load(path, dtype=torch.float32)
    with torch.no_grad():
        return [torch.log_softmax(model(window[None]).logits[0].double(), -1) for window in tokens.split(length)]


def bits_on_disk(quantized, source):
    """Stored bits of the quantized linears over their weights, from the files alone."""
    stored = load_file(quantized / "model.safetensors")
    parts = [name for name in stored if name.endswith(("qweight", "qzeros", "scales", "g_idx"))]
    linears = {name.rpartition(".")[0] + ".weight" for name in parts}
    weights = sum(value.numel() for name, value in load_file(source / "model.safetensors").items() if name in linears)
    return 8 * sum(stored[name].nbytes for name in parts) / weights


def test_figures_are_those_of_a_loop_over_windows(made, capsys):
    source, out, _, text = made
    assert run("eval", out, "--against", source, "--text", text, "--length", 64, "--windows", 5, "--json") == 0
    found = Document.from_json(json.loads(capsys.readouterr().out))
    quality = found.candidates[0].quality
    from transformers import AutoTokenizer

    ids = torch.tensor(
        AutoTokenizer.from_pretrained(source)(text.read_text(), add_special_tokens=False).input_ids[: 5 * 64]
    )
    p, q = by_hand(source, ids, 64), by_hand(out, ids, 64)
    windows = ids.split(64)
    nll = torch.cat([-b[:-1].gather(1, w[1:, None])[:, 0] for b, w in zip(q, windows, strict=True)])
    kl = torch.cat([(a.exp() * (a - b)).sum(-1) for a, b in zip(p, q, strict=True)])
    assert quality.model.perplexity == pytest.approx(math.exp(nll.mean()), rel=1e-5)
    assert quality.kl.mean == pytest.approx(float(kl.mean()), rel=1e-4)
    assert quality.kl.max == pytest.approx(float(kl.max()), rel=1e-3)
    assert found.candidates[0].layout == "gptq"
    assert found.candidates[0].size.quantized_bits_per_weight == pytest.approx(bits_on_disk(out, source))
    assert found.source.name == "model"


def test_gates_decide_the_exit_code_and_say_why(made, capsys):
    source, out, _, text = made
    common = ["eval", out, "--against", source, "--text", text, "--length", 64, "--windows", 3]
    assert run(*common, "--gate", "kl_mean<1000,top1>0.01") == 0
    capsys.readouterr()
    assert run(*common, "--gate", "kl_mean<1000,kl_max<1e-6") == 3
    error = capsys.readouterr().err
    assert "quality gate: the largest KL divergence is" in error
    assert "must be below 1e-06" in error
    assert run("eval", out, "--text", text, "--length", 64, "--gate", "kl_mean<1") == 2
    assert "--against" in capsys.readouterr().err


def test_several_texts_are_told_apart(made, capsys):
    source, out, _, text = made
    arguments = ["--text", f"books={text}", "--text", "edge-cases", "--length", 64, "--windows", 2]
    assert run("eval", out, "--against", source, *arguments, "--json") == 0
    found = Document.from_json(json.loads(capsys.readouterr().out))
    domains = found.candidates[0].domains
    assert {"books", "code", "digits", "languages"} <= set(domains)
    total = sum(quality.model.tokens for quality in domains.values())
    assert total == found.candidates[0].quality.model.tokens
    mean = sum(quality.kl.mean * quality.kl.tokens for quality in domains.values())
    assert found.candidates[0].quality.kl.mean == pytest.approx(mean / sum(q.kl.tokens for q in domains.values()))


def test_two_texts_of_one_name_are_refused(made, capsys):
    _, out, _, text = made
    assert run("eval", out, "--text", text, "--text", text) == 2
    assert "two texts are called text" in capsys.readouterr().err


def test_without_a_text_the_source_s_own_samples_serve(made, capsys):
    source, out, _, _ = made
    assert run("eval", out, "--against", source, "--length", 32, "--windows", 4, "--json") == 0
    found = Document.from_json(json.loads(capsys.readouterr().out))
    assert found.measurement.texts == {"model samples": 32 * 32}
    assert found.candidates[0].quality.model.tokens == 4 * 31
    assert run("eval", out) == 2
    assert "--against" in capsys.readouterr().err


@pytest.mark.parametrize("convention", [["--stride", "16"], ["--convention", "llama.cpp"]])
def test_every_layout_is_measured_by_the_same_code(made, capsys, convention):
    source, _, file, text = made
    dense = file.parent / "dense"
    if not dense.exists():
        bitwright.from_gguf(file, dense, dtype=torch.float32)
    found = []
    for path in (file, dense):
        assert (
            run(
                "eval", path, "--against", source, "--text", text, "--length", 64, "--windows", 3, *convention, "--json"
            )
            == 0
        )
        found.append(Document.from_json(json.loads(capsys.readouterr().out)).candidates[0].quality)
    assert found[0].kl.mean == pytest.approx(found[1].kl.mean, rel=1e-5)
    assert found[0].model == found[1].model


def test_batches_and_the_cache_change_nothing(made, capsys):
    source, out, _, text = made
    common = ["eval", out, "--against", source, "--text", text, "--length", 48, "--windows", 7, "--json"]
    found = []
    for extra in ([], ["--batch-size", "4"], ["--no-cache"], ["--batch-size", "3", "--no-cache"]):
        assert run(*common, *extra) == 0
        found.append(Document.from_json(json.loads(capsys.readouterr().out)).candidates[0].quality)
    for other in found[1:]:
        assert other.kl.mean == pytest.approx(found[0].kl.mean, rel=1e-5)
        assert other.model.nll == pytest.approx(found[0].model.nll, rel=1e-6)
        assert other.top1 == found[0].top1


def test_a_source_that_changed_is_measured_anew(made, tmp_path, capsys):
    source, out, _, text = made
    common = ["--text", text, "--length", 48, "--windows", 2, "--json"]
    other = make_model("llama", tmp_path / "model", seed=5)
    means = []
    for against in (source, other):
        assert run("eval", out, "--against", against, *common) == 0
        means.append(Document.from_json(json.loads(capsys.readouterr().out)).candidates[0].quality.kl.mean)
    assert means[1] > 2 * means[0]


def test_figures_are_entered_into_the_card_once(made, capsys):
    source, out, _, text = made
    for _ in range(2):
        assert run("eval", out, "--against", source, "--text", text, "--length", 64, "--windows", 2, "--card") == 0
    card = (out / "README.md").read_text()
    assert card.count("## Measured") == 1
    assert card.index("## Quality") < card.index("## Measured") < card.index("## Loads in")
    assert "against `model`" in card


def test_errors_of_layers_and_the_page_come_with_it(made, tmp_path, capsys):
    source, out, _, text = made
    page = tmp_path / "page.html"
    arguments = ["--text", text, "--length", 64, "--windows", 2, "--layers", "--html", page, "--json"]
    assert run("eval", out, "--against", source, *arguments) == 0
    candidate = Document.from_json(json.loads(capsys.readouterr().out)).candidates[0]
    assert len(candidate.blocks) == 3
    assert {layer.role for layer in candidate.layers} >= {"self_attn.q_proj", "mlp.down_proj"}
    assert page.read_text().startswith("<!DOCTYPE html>")


def test_a_text_that_is_too_short_is_named(made, tmp_path, capsys):
    _, out, _, _ = made
    (tmp_path / "short.txt").write_text("a")
    assert run("eval", out, "--text", tmp_path / "short.txt") == 2
    assert "text short" in capsys.readouterr().err


def test_windows_longer_than_the_model_s_positions_are_refused(made, capsys):
    _, out, _, text = made
    assert run("eval", out, "--text", text, "--length", 129) == 2
    assert "windows of 129 tokens, but the model was made for 128" in capsys.readouterr().err


# --- compare -------------------------------------------------------------------------------------------------------------


def test_recipes_are_compared_and_an_interrupted_comparison_goes_on(made, tmp_path, capsys, monkeypatch):
    source, _, _, text = made
    mine = tmp_path / "mine.yaml"
    mine.write_text("method: rtn\nbits: 3\ngroup_size: 32\nlayout: native\n")
    arguments = [
        "--recipe",
        "nf4",
        "--recipe",
        mine,
        "--recipe",
        "gguf:Q4_0",
        "--text",
        text,
        "--length",
        64,
        "--windows",
        4,
    ]
    arguments += ["--no-layers", "-o", tmp_path / "out"]
    import bitwright.comparing as comparing

    real = comparing.measure_one

    def interrupted(path, *rest, **options):
        if options["name"] == "Q4_0":
            raise KeyboardInterrupt
        return real(path, *rest, **options)

    monkeypatch.setattr(comparing, "measure_one", interrupted)
    assert run("compare", source, *arguments) == 130
    assert not (tmp_path / "out" / "results.json").exists()
    monkeypatch.setattr(comparing, "measure_one", real)
    capsys.readouterr()
    assert run("compare", source, *arguments) == 0
    told = capsys.readouterr().err
    assert "nf4: measured by an earlier run" in told
    assert "quantizing: Q4_0" in told
    found = Document.from_json(json.loads((tmp_path / "out" / "results.json").read_text()))
    assert [candidate.name for candidate in found.candidates] == ["nf4", "mine", "Q4_0"]
    assert (tmp_path / "out" / "report.html").stat().st_size > 20_000
    for candidate in found.candidates:
        path = tmp_path / "out" / "models" / (candidate.name + (".gguf" if candidate.layout == "gguf" else ""))
        alone = bitwright.evaluate(path, against=source, text=text, length=64, windows=4).quality
        assert candidate.quality.kl.mean == pytest.approx(alone.kl.mean, rel=1e-6)
        assert candidate.seconds > 0


def test_a_recipe_that_does_not_fit_is_named_and_the_others_go_on(made, tmp_path, capsys):
    source, _, _, text = made
    wide = tmp_path / "wide.yaml"
    wide.write_text("method: rtn\nbits: 4\ngroup_size: 100\nlayout: native\n")
    arguments = ["--text", text, "--length", 64, "--windows", 2, "--no-layers", "--keep-models", "none", "--json"]
    assert run("compare", source, "--recipe", "nf4", "--recipe", wide, "-o", tmp_path / "out", *arguments) == 0
    found = Document.from_json(json.loads(capsys.readouterr().out))
    assert [candidate.name for candidate in found.candidates] == ["nf4"]
    assert any(line.startswith("wide: ") and "group_size 100" in line for line in found.not_measured)
    assert list((tmp_path / "out" / "models").iterdir()) == []
    assert run("compare", source, "--recipe", wide, "-o", tmp_path / "none", *arguments) == 2


def test_a_folder_that_holds_something_else_is_left_alone(made, tmp_path, capsys):
    source, _, _, text = made
    (tmp_path / "thesis.txt").write_text("mine")
    assert run("compare", source, "--recipe", "nf4", "-o", tmp_path, "--text", text) == 2
    assert "holds something else" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_sets_and_names_of_recipes_are_checked_before_anything_runs():
    from bitwright.comparing import SETS, entries_of

    for name in SETS:
        assert len(entries_of([], [name])) == len(SETS[name])
    assert len(SETS["all-4bit"]) == 8
    (entry,) = entries_of(["gguf:Q4_K_M+gptq"])
    assert (entry.name, entry.recipe.method, entry.recipe.gguf.imatrix) == ("Q4_K_M+gptq", "gptq", "auto")
    for bad in (["nonsense"], ["gguf:Q99"], ["gguf:Q4_0+magic"], ["nf4", "nf4"], []):
        with pytest.raises(InputError):
            entries_of(bad)
    with pytest.raises(InputError, match="set 'some'"):
        entries_of([], ["some"])


# --- the conventions on the embedded model ---------------------------------------------------------------------------------


def test_perplexity_is_that_of_transformers_documentation(tmp_path):
    """The loop of https://huggingface.co/docs/transformers/perplexity as it stands there, weights of windows included."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = tmp_path / "text.txt"
    text.write_text(STORY_TEXT.read_text(encoding="utf-8")[:12_000], encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(STORY, dtype=torch.float32, local_files_only=True).eval()
    encodings = AutoTokenizer.from_pretrained(STORY)(text.read_text(), return_tensors="pt", add_special_tokens=False)
    max_length, stride = 256, 128
    seq_len = encodings.input_ids.size(1)
    nll_sum, n_tokens, prev_end_loc = 0.0, 0, 0
    for begin_loc in range(0, seq_len, stride):
        end_loc = min(begin_loc + max_length, seq_len)
        trg_len = end_loc - prev_end_loc
        input_ids = encodings.input_ids[:, begin_loc:end_loc]
        target_ids = input_ids.clone()
        target_ids[:, :-trg_len] = -100
        with torch.no_grad():
            neg_log_likelihood = model(input_ids, labels=target_ids).loss
        num_valid_tokens = (target_ids != -100).sum().item()
        num_loss_tokens = num_valid_tokens - target_ids.size(0)
        nll_sum += float(neg_log_likelihood) * num_loss_tokens
        n_tokens += num_loss_tokens
        prev_end_loc = end_loc
        if end_loc == seq_len:
            break
    found = bitwright.evaluate(STORY, text=text, length=max_length, stride=stride)
    assert found.perplexity.perplexity == pytest.approx(math.exp(nll_sum / n_tokens), rel=1e-3)


def test_speed_and_memory_come_with_it(made, capsys):
    source, out, _, text = made
    arguments = ["--text", text, "--length", 64, "--windows", 2, "--bench", "--json"]
    # The prompt is longer than this model's positions, which is said in place of figures.
    assert run("eval", out, "--against", source, *arguments) == 0
    found = Document.from_json(json.loads(capsys.readouterr().out))
    assert {speed.engine for speed in found.candidates[0].speed} == {speed.engine for speed in found.source_speed}
    assert "transformers" in {speed.engine for speed in found.source_speed}
    assert all(speed.note or speed.new_tokens_per_s.median > 0 for speed in found.candidates[0].speed)
