"""Perplexity and KL divergence against transformers' own loss, scipy and float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import special, stats
from tests.small import STORY, STORY_TEXT

from bitwright.errors import InputError, NumericError
from bitwright.evaluation.divergence import compare_logits
from bitwright.evaluation.quality import quality
from bitwright.evaluation.windows import Window, make_windows

VOCAB = 50


def perplexity(model, windows):
    return quality(model, list(windows)).model


def compare(source, model, windows):
    return quality(model, windows, source)


def table_model(*, seed=0, temperature=1.0, noise=0.0, vocab=VOCAB):
    """Logits that depend on the token and its position alone."""
    rng = torch.Generator().manual_seed(seed)
    by_token, by_position = torch.randn(vocab, vocab, generator=rng), torch.randn(64, vocab, generator=rng)
    change = torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(seed + 1)) * noise

    def run(tokens):
        return (by_token[tokens] + by_position[: tokens.shape[1]] + change[tokens]) * temperature

    return run


def ids(count=200, *, seed=5):
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def probabilities(logits) -> np.ndarray:
    return special.softmax(logits.double().numpy(), axis=-1)


# --- perplexity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [None, 8, 15, 16])
def test_perplexity_is_exp_of_the_mean_over_tokens_with_its_standard_error(stride):
    model, windows = table_model(), make_windows(ids(), length=16, stride=stride)
    nll = np.concatenate(
        [
            [
                -np.log(probabilities(model(w.tokens))[0, t - 1, int(w.tokens[0, t])])
                for t in range(w.first, w.tokens.shape[1])
            ]
            for w in windows
        ]
    )
    found = perplexity(model, windows)
    assert found.tokens == len(nll) == sum(w.counted for w in windows)
    assert found.nll == pytest.approx(nll.mean(), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(nll.mean()), rel=1e-6)
    assert found.error == pytest.approx(stats.sem(nll), rel=1e-5)


def test_a_uniform_model_has_the_vocabulary_s_perplexity():
    found = perplexity(lambda tokens: torch.zeros(*tokens.shape, VOCAB), make_windows(ids(), length=16))
    assert found.perplexity == pytest.approx(VOCAB, rel=1e-6)
    assert found.error == pytest.approx(0, abs=1e-7)


def test_one_prediction_has_no_error():
    assert perplexity(table_model(), [Window(torch.tensor([[1, 2]]))]).error == 0.0


def test_windows_are_weighed_by_their_tokens_in_any_order_and_cut():
    model = table_model()
    short, long = Window(torch.tensor([ids(5)])), Window(torch.tensor([ids(60, seed=6)]))
    one, other = perplexity(model, [short]), perplexity(model, [long])
    both = perplexity(model, iter([short, long]))
    assert both.tokens == 4 + 59
    assert both.nll == pytest.approx((4 * one.nll + 59 * other.nll) / 63, rel=1e-6)
    assert perplexity(model, [long, short]).nll == pytest.approx(both.nll, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_evaluated_in_float32(dtype):
    windows = make_windows(ids(), length=16)
    half = perplexity(lambda tokens: table_model()(tokens).to(dtype), windows)
    single = perplexity(lambda tokens: table_model()(tokens).to(dtype).float(), windows)
    assert half == single


@pytest.fixture(scope="module")
def story():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(STORY, dtype=torch.float32, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(STORY, local_files_only=True)
    text = STORY_TEXT.read_text(encoding="utf-8")[:3000]
    return model, tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[:, :130]


@pytest.mark.parametrize("stride", [24, 47, 48])
def test_perplexity_is_that_of_transformers_sliding_window_recipe(story, stride):
    """The loop of https://huggingface.co/docs/transformers/perplexity, with the model's own labels and loss.

    The documentation weighs every window by its labels less one. Where a window has context, none of its labels is lost to
    the shift, so the labels that the loss averages over are counted here instead.
    """
    model, encoded = story
    length, total = 48, encoded.shape[1]
    nll_sum, counted, previous_end = 0.0, 0, 0
    for begin in range(0, total, stride):
        end = min(begin + length, total)
        new = end - previous_end
        input_ids = encoded[:, begin:end]
        target_ids = input_ids.clone()
        target_ids[:, :-new] = -100
        with torch.no_grad():
            loss = model(input_ids, labels=target_ids).loss
        labels = int((target_ids[:, 1:] != -100).sum())
        nll_sum += float(loss) * labels
        counted += labels
        previous_end = end
        if end == total:
            break

    def logits(tokens):
        with torch.no_grad():
            return model(tokens).logits

    found = perplexity(logits, make_windows(encoded[0].tolist(), length=length, stride=stride))
    assert found.tokens == counted
    assert found.perplexity == pytest.approx(math.exp(nll_sum / counted), rel=1e-5)
    assert 1 < found.perplexity < 200  # the model knows this text's language


# --- divergence --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [None, 8, 15])
def test_divergence_is_scipy_s_over_every_position_once(stride):
    source, model = table_model(), table_model(noise=0.3)
    windows = make_windows(ids(), length=16, stride=stride)
    kl, same = [], []
    for w in windows:
        p, q = probabilities(source(w.tokens))[0, w.new :], probabilities(model(w.tokens))[0, w.new :]
        kl.append(special.rel_entr(p, q).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
    kl, same = np.concatenate(kl), np.concatenate(same)
    found = compare(source, model, windows)
    assert found.kl.tokens == len(kl) == (200 if stride else 192)
    assert found.kl.mean == pytest.approx(kl.mean(), rel=1e-4)
    assert found.kl.median == pytest.approx(np.quantile(kl, 0.5), rel=1e-3)
    assert found.kl.p99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-4)
    assert found.kl.max == pytest.approx(kl.max(), rel=1e-4)
    assert found.top1 == pytest.approx(same.mean())
    assert 0 < found.top1 < 1
    assert found.source == perplexity(source, windows)
    assert found.model == perplexity(model, windows)


def test_divergence_is_torch_s_from_the_source_to_the_model():
    source, model = table_model(), table_model(temperature=0.5)
    windows = make_windows(ids(), length=16)
    total = 0.0
    for w in windows:
        a, b = (torch.log_softmax(m(w.tokens).double(), -1)[0] for m in (source, model))
        total += float(torch.nn.functional.kl_div(b, a, reduction="sum", log_target=True))
    found = compare(source, model, windows)
    assert found.kl.mean == pytest.approx(total / found.kl.tokens, rel=1e-5)
    assert compare(model, source, windows).kl.mean != pytest.approx(found.kl.mean, rel=0.05)


def test_a_model_does_not_diverge_from_itself():
    found = compare(table_model(), table_model(), make_windows(ids(), length=16, stride=4))
    assert found.kl.mean == found.kl.max == found.kl.p99 == found.kl.median == 0
    assert found.top1 == 1
    assert found.source == found.model


def test_a_constant_added_to_the_logits_changes_nothing():
    source = table_model()
    found = compare(source, lambda tokens: source(tokens) + 3.0, make_windows(ids(), length=16))
    assert found.kl.mean == pytest.approx(0, abs=1e-6)
    assert found.top1 == 1


def test_small_divergences_are_resolved():
    """As small as 8-bit weights give: the float32 log-softmax must not drown them."""
    source, model = table_model(vocab=VOCAB), table_model(noise=3e-3)
    windows = make_windows(ids(), length=16)
    kl = [special.rel_entr(probabilities(source(w.tokens)), probabilities(model(w.tokens))).sum(-1) for w in windows]
    wanted = float(np.concatenate(kl, axis=1).mean())
    assert 1e-6 < wanted < 1e-5
    assert compare(source, model, windows).kl.mean == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(bad):
    def broken(tokens):
        logits = table_model()(tokens)
        logits[0, 3, 7] = bad
        return logits

    windows = make_windows(ids(), length=16)
    with pytest.raises(NumericError, match="not finite"):
        perplexity(broken, windows)
    for pair in ((broken, table_model()), (table_model(), broken)):
        with pytest.raises(NumericError, match="not finite"):
            compare(*pair, windows)


def test_a_model_that_is_sure_of_the_wrong_words_is_refused_not_overflown():
    def hopeless(tokens):
        logits = torch.zeros(*tokens.shape, VOCAB)
        logits[..., VOCAB - 1] = 5000.0
        return logits

    with pytest.raises(NumericError, match="nats"):
        perplexity(hopeless, [Window(torch.tensor([[1, 2, 3, 4]]))])


def test_other_vocabularies_are_refused():
    with pytest.raises(InputError, match="50 and 60"):
        compare(table_model(), table_model(vocab=60), make_windows(ids(), length=16))


def test_no_window_is_refused():
    with pytest.raises(InputError, match="no window"):
        perplexity(table_model(), [])
    with pytest.raises(InputError, match="no window"):
        compare(table_model(), table_model(), [])


def test_means_over_one_window_are_those_of_float64():
    tokens = torch.tensor([ids(40)])
    a, b = table_model()(tokens), table_model(noise=0.5)(tokens)
    p, q = probabilities(a)[0], probabilities(b)[0]
    found = compare_logits(a, b, tokens)
    chosen = tokens[0, 1:].numpy()
    rows = np.arange(39)
    assert found["nll_reference"] == pytest.approx(-np.log(p[rows, chosen]).mean(), rel=1e-5)
    assert found["nll"] == pytest.approx(-np.log(q[rows, chosen]).mean(), rel=1e-5)
    assert found["kl"] == pytest.approx(special.rel_entr(p, q).sum(-1).mean(), rel=1e-4)
    assert found["entropy_reference"] == pytest.approx(stats.entropy(p, axis=-1).mean(), rel=1e-5)
