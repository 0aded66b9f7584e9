"""A source's predictions on disk, against the source itself."""

from __future__ import annotations

import pytest
import torch

from bitwright.errors import ResourceError
from bitwright.evaluation.quality import LiveReference, measure, quality, run_windows, summarize
from bitwright.evaluation.reference import StoredReference, reference_key, store_reference
from bitwright.evaluation.windows import make_windows


def model_of(noise: float, vocab: int = 500, sharpness: float = 3.0):
    rng = torch.Generator().manual_seed(0)
    table = torch.randn(vocab, vocab, generator=rng) * sharpness
    change = torch.randn(vocab, vocab, generator=rng) * noise
    return lambda tokens: (table + change)[tokens]


@pytest.fixture(scope="module")
def windows():
    return make_windows(torch.randint(0, 500, (4096,), generator=torch.Generator().manual_seed(1)).tolist(), length=128)


@pytest.mark.parametrize(("noise", "bound"), [(0.003, 2e-8), (0.05, 1e-7), (0.5, 1e-6)])
@pytest.mark.parametrize("sharpness", [0.5, 3.0, 20.0])
def test_the_mean_divergence_is_that_of_the_source_itself(windows, tmp_path, noise, bound, sharpness):
    source, model = model_of(0.0, sharpness=sharpness), model_of(noise, sharpness=sharpness)
    store_reference(tmp_path, run_windows(source, windows))
    stored = summarize(measure(model, windows, StoredReference(tmp_path)))
    live = quality(model, windows, source)
    assert stored.kl.mean == pytest.approx(live.kl.mean, abs=max(bound, 2e-4 * live.kl.mean))
    assert stored.kl.p99 == pytest.approx(live.kl.p99, rel=0.02, abs=1e-6)
    # What concerns the text's own tokens and the most likely ones is kept exactly.
    assert stored.source == live.source
    assert (stored.top1, stored.top5, stored.flips, stored.delta_p) == (live.top1, live.top5, live.flips, live.delta_p)


def test_it_takes_less_than_16_bits_a_probability(windows, tmp_path):
    store_reference(tmp_path, run_windows(model_of(0.0), windows))
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert size < 2 * len(windows) * 128 * 500


def test_a_model_does_not_diverge_from_its_own_kept_predictions(windows, tmp_path):
    source = model_of(0.0)
    store_reference(tmp_path, run_windows(source, windows))
    found = summarize(measure(source, windows, StoredReference(tmp_path)))
    assert abs(found.kl.mean) < 1e-7
    assert found.top1 == 1
    assert found.increase.nll == 0


def test_damage_is_noticed(windows, tmp_path):
    store_reference(tmp_path, run_windows(model_of(0.0), windows))
    file = tmp_path / "window-00003.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    reference = StoredReference(tmp_path)
    reference.read(2)
    with pytest.raises(ResourceError, match="00003"):
        reference.read(3)
    file.unlink()
    with pytest.raises(ResourceError, match="00003"):
        reference.read(3)


def test_the_key_depends_on_windows_and_facts_alone(windows):
    key = reference_key(windows, {"dtype": "float32"})
    assert key == reference_key(list(windows), {"dtype": "float32"})
    assert (
        len({key, reference_key(windows[1:], {"dtype": "float32"}), reference_key(windows, {"dtype": "bfloat16"})}) == 3
    )
    shifted = make_windows(range(64), length=16, stride=8)
    assert reference_key(shifted, {}) != reference_key([type(w)(w.tokens, 0) for w in shifted], {})


def test_a_live_reference_reads_any_window(windows):
    reference = LiveReference(model_of(0.0), windows)
    assert torch.equal(reference.read(5).nll, next(iter(run_windows(model_of(0.0), [windows[5]]))).nll)
