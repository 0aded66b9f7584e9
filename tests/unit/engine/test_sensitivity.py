"""Sensitivities against whole models run in plain transformers, with the group's weights rounded in place."""

from __future__ import annotations

import pytest
import torch
from tests.small import make_model

from bitwright.engine import sensitivity
from bitwright.engine.plan import make_plan
from bitwright.engine.progress import Silent
from bitwright.engine.recipe import make_recipe
from bitwright.engine.run import open_source
from bitwright.engine.sensitivity import Candidate, Tied, measure_sensitivities

RECIPE = {"method": "rtn", "scheme": "affine", "bits": 8, "group_size": "channel", "layout": "native"}


def rounded(step: float):
    """Weights on multiples of ``step``: a candidate that needs no scheme."""
    return lambda weight, _gram: (weight / step).round() * step


def candidates():
    return tuple(Candidate(str(step), rounded(step)) for step in (0.01, 0.05, 0.2))


def groups_of(units):
    """q, k and v together, everything else alone."""
    found: dict[str, list] = {}
    for unit in units:
        leaf = unit.name.rpartition(".")[2]
        name = unit.name.rpartition(".")[0] + ".qkv" if leaf in ("q_proj", "k_proj", "v_proj") else unit.name
        found.setdefault(name, []).append(unit)
    return [Tied(name, tuple(units), candidates(), "0.05") for name, units in found.items()]


def measured(folder, mode, tmp_path, tokens, cap=1 << 30):
    with open_source(folder) as source:
        plan = make_plan(make_recipe(RECIPE), source)
        groups = groups_of(plan.structure.units)
        found = measure_sensitivities(
            plan, source, tokens, groups, mode, folder=tmp_path, cap_bytes=cap, progress=Silent()
        )
    return groups, found


def loaded(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def logits(model, tokens):
    with torch.no_grad():
        return torch.log_softmax(model(tokens).logits.double(), -1)


@pytest.fixture(scope="module")
def tokens():
    rng = torch.Generator().manual_seed(3)
    return [torch.randint(0, 256, (2, 48), generator=rng), torch.randint(0, 256, (1, 32), generator=rng)]


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral", "gpt2"])
def test_full_losses_are_those_of_whole_models(name, tmp_path, tokens):
    folder = make_model(name, tmp_path / "model")
    groups, found = measured(folder, "full", tmp_path, tokens)
    clean = loaded(folder)
    before = [logits(clean, batch) for batch in tokens]
    state = {key: value.clone() for key, value in clean.state_dict().items()}
    checked = 0
    for group in groups:
        if any(unit.role == "expert" for unit in group.units):
            continue  # stored one by one, held as one parameter in memory
        clean.load_state_dict(state)
        for unit in group.units:
            parameter = clean.get_parameter(unit.place.parameter)
            with torch.no_grad():
                view = parameter if unit.place.rows is None else parameter[slice(*unit.place.rows)]
                view.copy_(rounded(0.05)(view, None))
        total = count = 0
        for p, batch in zip(before, tokens, strict=True):
            q = logits(clean, batch)
            total += float((p.exp() * (p - q)).sum())
            count += batch.numel()
        assert found[group.name].reference_loss == pytest.approx(total / count, rel=2e-3, abs=1e-9), group.name
        assert found[group.name].loss("0.05") == found[group.name].reference_loss
        checked += total > 1e-7
    assert checked >= 6


def test_errors_are_those_of_the_outputs(tmp_path, tokens):
    folder = make_model("llama", tmp_path / "model")
    groups, found = measured(folder, "full", tmp_path, tokens)
    model = loaded(folder)
    inputs: dict[str, list[torch.Tensor]] = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _m, given, path=path: inputs.setdefault(path, []).append(
                    given[0].reshape(-1, given[0].shape[-1])
                )
            )
    for batch in tokens:
        logits(model, batch)
    for group in groups:
        if group.units[0].block is None:
            continue
        for step in (0.01, 0.2):
            wanted = energy = 0.0
            for unit in group.units:
                x, w = (
                    torch.cat(inputs[unit.name]).double(),
                    model.get_parameter(unit.name + ".weight").detach().double(),
                )
                delta = rounded(step)(w.float(), None).double() - w
                wanted += float((x @ delta.T).square().sum(-1).mean())
                energy += float((x @ w.T).square().sum(-1).mean())
            assert found[group.name].errors[str(step)] == pytest.approx(wanted, rel=1e-4)
            assert found[group.name].energy == pytest.approx(energy, rel=1e-4)
        ratio = found[group.name].errors["0.2"] / found[group.name].errors["0.05"]
        assert found[group.name].loss("0.2") == pytest.approx(ratio * found[group.name].reference_loss)


def test_a_sample_of_rows_stands_for_all(tmp_path, tokens, monkeypatch):
    folder = make_model("llama", tmp_path / "model")
    _, whole = measured(folder, "gram", tmp_path, tokens)
    monkeypatch.setattr(sensitivity, "_ROWS", 16)
    _, some = measured(folder, "gram", tmp_path, tokens)
    for name, found in some.items():
        assert found.errors["0.05"] == pytest.approx(whole[name].errors["0.05"], rel=0.35)
        assert found.energy == pytest.approx(whole[name].energy)


def test_hidden_states_that_do_not_fit_go_to_disk_and_change_nothing(tmp_path, tokens):
    folder = make_model("llama", tmp_path / "model")
    _, held = measured(folder, "full", tmp_path, tokens)
    _, spilled = measured(folder, "full", tmp_path, tokens, cap=40_000)
    assert held == spilled
    assert not list(tmp_path.glob("hidden-states*"))


def test_a_block_s_own_output_is_judged_through_norm_and_head(tmp_path, tokens):
    folder = make_model("llama", tmp_path / "model")
    groups, found = measured(folder, "blocks", tmp_path, tokens)
    model = loaded(folder)
    group = next(g for g in groups if g.name == "model.layers.1.mlp.down_proj")
    outs: list[torch.Tensor] = []
    model.model.layers[1].register_forward_hook(
        lambda _m, _g, out: outs.append(out[0] if isinstance(out, tuple) else out)
    )

    def lens():
        outs.clear()
        for batch in tokens:
            logits(model, batch)
        with torch.no_grad():
            return [torch.log_softmax(model.lm_head(model.model.norm(out)).double(), -1) for out in outs]

    before = lens()
    with torch.no_grad():
        weight = model.get_parameter("model.layers.1.mlp.down_proj.weight")
        weight.copy_(rounded(0.05)(weight, None))
    total = sum(float((p.exp() * (p - q)).sum()) for p, q in zip(before, lens(), strict=True))
    assert found[group.name].reference_loss == pytest.approx(total / 128, rel=2e-3)


def test_the_last_block_is_judged_alike_in_both_modes(tmp_path, tokens):
    folder = make_model("qwen3", tmp_path / "model")
    groups, full = measured(folder, "full", tmp_path, tokens)
    _, blocks = measured(folder, "blocks", tmp_path, tokens)
    last = [group.name for group in groups if group.units[0].block == 2]
    assert len(last) == 5
    for name in last:
        assert blocks[name].reference_loss == pytest.approx(full[name].reference_loss, rel=1e-5)


def test_a_head_that_is_tied_to_the_embeddings_is_rounded_with_them(tmp_path, tokens):
    """The oracle of the first test rounds the one parameter, which serves as both."""
    folder = make_model("llama", tmp_path / "model")
    groups, found = measured(folder, "full", tmp_path, tokens)
    outside = [group for group in groups if group.units[0].block is None]
    assert [unit.role for group in outside for unit in group.units] == ["embedding"]
    assert found[outside[0].name].reference_loss > 1e-6
