"""What is summarized of a model against its source, against numpy in float64; windows in batches; llama.cpp's convention."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import special, stats

from bitwright.errors import InputError
from bitwright.evaluation.quality import LiveReference, measure, quality, summarize
from bitwright.evaluation.windows import Window, make_windows, second_halves

VOCAB = 40


def model_of(seed: int, noise: float = 0.0):
    """Logits that depend on the whole prefix, so that a window that is read wrongly shows."""
    rng = torch.Generator().manual_seed(seed)
    table, change = torch.randn(VOCAB, VOCAB, generator=rng), torch.randn(VOCAB, VOCAB, generator=rng) * noise

    def run(tokens: torch.Tensor) -> torch.Tensor:
        seen = (table + change)[tokens].cumsum(1) / torch.arange(1, tokens.shape[1] + 1)[None, :, None].sqrt()
        return 2 * seen

    return run


def stream(count: int) -> list[int]:
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(9)).tolist()


def softmax(logits: torch.Tensor) -> np.ndarray:
    return special.softmax(logits.double().numpy(), axis=-1)


@pytest.mark.parametrize(("length", "stride"), [(16, None), (16, 6)])
def test_every_figure_is_numpy_s(length, stride):
    source, model = model_of(1), model_of(1, noise=0.4)
    windows = make_windows(stream(300), length=length, stride=stride)
    kl, shared, same, change, lost, gained, rise = [], [], [], [], [], [], []
    for window in windows:
        p, q = softmax(source(window.tokens)[0]), softmax(model(window.tokens)[0])
        for at in range(window.new, len(p)):
            kl.append(stats.entropy(p[at], q[at]))
            a, b = np.argsort(-p[at])[:5], np.argsort(-q[at])[:5]
            same.append(a[0] == b[0])
            shared.append(len(set(a) & set(b)) / 5)
        for at in range(window.first, len(p)):
            token = int(window.tokens[0, at])
            before, after = p[at - 1], q[at - 1]
            change.append(after[token] - before[token])
            rise.append(math.log(before[token]) - math.log(after[token]))
            lost.append(before.argmax() == token != after.argmax())
            gained.append(after.argmax() == token != before.argmax())
    found = quality(model, windows, source)
    assert found.kl.mean == pytest.approx(np.mean(kl), rel=1e-4)
    assert found.kl.error == pytest.approx(stats.sem(kl), rel=1e-4)
    for share, value in ((0.5, found.kl.median), (0.9, found.kl.p90), (0.99, found.kl.p99), (0.999, found.kl.p999)):
        assert value == pytest.approx(np.quantile(kl, share), rel=1e-4)
    assert found.kl.max == pytest.approx(np.max(kl), rel=1e-4)
    assert found.top1 == pytest.approx(np.mean(same))
    assert found.top5 == pytest.approx(np.mean(shared), rel=1e-5)
    assert found.delta_p.mean == pytest.approx(np.mean(change), abs=1e-7)
    assert found.delta_p.error == pytest.approx(stats.sem(change), rel=1e-4)
    assert found.delta_p.rms == pytest.approx(np.sqrt(np.mean(np.square(change))), rel=1e-4)
    for share, value in (
        (0.01, found.delta_p.p1),
        (0.1, found.delta_p.p10),
        (0.5, found.delta_p.p50),
        (0.99, found.delta_p.p99),
    ):
        assert value == pytest.approx(np.quantile(change, share), abs=1e-6)
    assert found.flips.right_to_wrong == pytest.approx(np.mean(lost))
    assert found.flips.wrong_to_right == pytest.approx(np.mean(gained))
    assert 0 < found.flips.total < 0.5
    assert found.increase.nll == pytest.approx(np.mean(rise), rel=1e-3)
    assert found.increase.error == pytest.approx(stats.sem(rise), rel=1e-4)
    assert found.increase.perplexity == pytest.approx(found.model.perplexity - found.source.perplexity)


@pytest.mark.parametrize("batch_size", [2, 3, 8, 100])
def test_any_batch_size_gives_the_same_figures(batch_size):
    source, model = model_of(2), model_of(2, noise=0.3)
    windows = [
        *make_windows(stream(100), length=16, stride=8),
        Window(torch.tensor([stream(7)])),
        *make_windows(stream(60), length=12),
    ]
    one = quality(model, windows, source)
    assert quality(model, windows, source, batch_size=batch_size) == one


def test_batches_hold_windows_of_one_length_only():
    shapes = []

    def watching(tokens):
        shapes.append(tuple(tokens.shape))
        return model_of(3)(tokens)

    windows = [
        *make_windows(stream(64), length=16),
        Window(torch.tensor([stream(7)])),
        *make_windows(stream(32), length=16),
    ]
    measure(watching, windows, batch_size=3)
    assert shapes == [(3, 16), (1, 16), (1, 7), (2, 16)]


def test_texts_are_summed_up_apart_and_together():
    source, model = model_of(4), model_of(4, noise=0.3)
    windows = make_windows(stream(160), length=16)
    values = measure(model, windows, LiveReference(source, windows))
    first, second, whole = summarize(values[:3]), summarize(values[3:]), summarize(values)
    assert whole.kl.tokens == first.kl.tokens + second.kl.tokens
    assert whole.kl.mean == pytest.approx((first.kl.mean * 48 + second.kl.mean * 112) / 160, rel=1e-6)
    assert first == quality(model, windows[:3], source)


def test_without_a_source_there_is_perplexity_alone():
    found = quality(model_of(5), make_windows(stream(64), length=16))
    assert found.model.tokens == 60
    assert found.source is found.kl is found.top1 is found.delta_p is found.flips is None


def test_a_batch_of_no_window_is_refused():
    with pytest.raises(InputError, match="batch of 0"):
        quality(model_of(6), make_windows(stream(64), length=16), batch_size=0)


# --- llama.cpp's convention ----------------------------------------------------------------------------------------------


def llama_perplexity(model, tokens: list[int], n_ctx: int, bos: int | None) -> tuple[float, float, int]:
    """What examples/perplexity.cpp of llama.cpp adds up: the second half of every whole chunk, mean and error of its nll."""
    first, nll, nll2, count = n_ctx // 2, 0.0, 0.0, 0
    for chunk in range(len(tokens) // n_ctx):
        batch = list(tokens[chunk * n_ctx : (chunk + 1) * n_ctx])
        if bos is not None:
            batch[0] = bos
        p = softmax(model(torch.tensor([batch]))[0])
        for i in range(n_ctx - 1 - first):
            v = -math.log(p[first + i][batch[first + i + 1]])
            nll, nll2, count = nll + v, nll2 + v * v, count + 1
    mean = nll / count
    return math.exp(mean), math.sqrt((nll2 / count - mean * mean) / (count - 1)), count


@pytest.mark.parametrize("bos", [None, 3])
def test_perplexity_is_llama_cpp_s_over_the_same_windows(bos):
    ids = stream(150)
    wanted, error, count = llama_perplexity(model_of(7), ids, 32, bos)
    found = quality(model_of(7), second_halves(ids, length=32, first_token=bos)).model
    assert found.tokens == count == 4 * 15
    assert found.perplexity == pytest.approx(wanted, rel=1e-6)
    assert found.error == pytest.approx(error, rel=1e-4)


def test_divergence_counts_the_positions_that_llama_cpp_counts():
    windows = second_halves(stream(64), length=32)
    found = quality(model_of(8, noise=0.1), windows, model_of(8))
    assert found.kl.tokens == found.model.tokens == 2 * 15


def test_a_text_shorter_than_a_window_is_refused_by_llama_cpp_s_convention():
    with pytest.raises(InputError, match="20 tokens, fewer than a window of 32"):
        second_halves(stream(20), length=32)
