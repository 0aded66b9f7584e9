"""AWQ as the paper and its authors' code describe it, in plain float64 loops over a Llama (arXiv:2306.00978, section 3.2).

Per block: the scale s = s_x^alpha of each group of linears is searched over 20 exponents by the error of what follows it (the whole
attention, the whole MLP, the one linear), with rounded weights; then every group of a row is clipped where that lowers the error of its
share of the output (queries and keys are not clipped); then weights are rounded. Blocks see the original model's activations. As in the
authors' code, the edge from the values to the output projection is left out where query heads share values.
"""

from __future__ import annotations

import torch

from tests.reference_llama import Llama

GRID, CLIPS, SMALLEST, CLIP_TOKENS = 20, 10, 0.5, 256


def rounded(w: torch.Tensor, bits: int, group: int, largest: torch.Tensor | None = None) -> torch.Tensor:
    """Symmetric codes -2^(bits-1) .. 2^(bits-1) - 1 per group; largest: ``(rows, groups, 1)``, the clipped range."""
    view = w.view(len(w), -1, group)
    top = view.abs().amax(-1, keepdim=True) if largest is None else largest
    scale = (2 * top / (2**bits - 1)).clamp_min(1e-12)
    return ((view / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale).view_as(w)


def awq(model: Llama, windows: torch.Tensor, *, bits: int, group: int) -> None:
    """Quantize ``model`` in place with calibration tokens ``windows (count, tokens)``."""
    hidden = [model.embed(tokens) for tokens in windows]
    for i in range(model.blocks):
        after = [model.block(i, x) for x in hidden]
        _block(model, i, hidden, bits, group)
        hidden = after


def _inputs(model: Llama, i: int, hidden: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """What every linear of a block reads: name -> ``(tokens, in)`` over all windows."""
    seen: dict[str, list[torch.Tensor]] = {}

    def note(name: str, x: torch.Tensor) -> torch.Tensor:
        seen.setdefault(name, []).append(x)
        return model.project(name, x)

    for x in hidden:
        model.block(i, x, note)
    return {name: torch.cat(parts) for name, parts in seen.items()}


def _block(model: Llama, i: int, hidden: list[torch.Tensor], bits: int, group: int) -> None:
    lead, weights, tokens = f"model.layers.{i}.", model.weights, len(hidden[0])
    attention = [f"{lead}self_attn.{part}_proj" for part in "qkv"]
    mlp = [f"{lead}mlp.{part}_proj" for part in ("gate", "up")]
    down = f"{lead}mlp.down_proj"

    def through_attention(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([model.attention(i, part, model.project) for part in x.split(tokens)])

    def through_mlp(x: torch.Tensor) -> torch.Tensor:
        return model.mlp(i, x, model.project)

    seen = _inputs(model, i, hidden)
    scales = _searched(model, attention, seen[attention[0]], through_attention, bits, group)
    weights[f"{lead}input_layernorm.weight"] /= scales
    scales = _searched(model, mlp, seen[mlp[0]], through_mlp, bits, group)
    weights[f"{lead}post_attention_layernorm.weight"] /= scales
    scales = _searched(model, [down], seen[down], lambda x: model.project(down, x), bits, group)
    weights[f"{lead}mlp.up_proj.weight"] /= scales[:, None]
    seen = _inputs(model, i, hidden)
    for name in model.linears(i):
        largest = (
            None
            if "q_proj" in name or "k_proj" in name
            else _clipped(weights[f"{name}.weight"], seen[name], bits, group)
        )
        weights[f"{name}.weight"] = rounded(weights[f"{name}.weight"], bits, group, largest)


def _searched(model, names, x, through, bits, group):
    """The best scales; the linears ``names`` that read ``x`` are multiplied by them."""
    originals = {name: model.weights[f"{name}.weight"].clone() for name in names}
    wanted, magnitude = through(x), x.abs().mean(0)
    best, least = None, torch.inf
    for step in range(GRID):
        scales = magnitude.pow(step / GRID).clamp_min(1e-4)
        scales = scales / (scales.max() * scales.min()).sqrt()
        for name in names:
            model.weights[f"{name}.weight"] = rounded(originals[name] * scales, bits, group) / scales
        error = float((through(x) - wanted).square().mean())
        if error < least:
            best, least = scales, error
    for name in names:
        model.weights[f"{name}.weight"] = originals[name] * best
    return best


def _clipped(w, x, bits, group):
    """The range of every group, ``(rows, groups, 1)``, that loses least of the group's share of the output."""
    x = x[:: max(1, len(x) // CLIP_TOKENS)]
    view = w.view(len(w), -1, group)
    best = view.abs().amax(-1, keepdim=True)
    least = torch.full_like(best, torch.inf)
    found = best.clone()
    for step in range(CLIPS + 1):
        largest = best * (1 - (1 - SMALLEST) * step / CLIPS)
        change = (rounded(w, bits, group, largest) - w).view_as(view)
        for part in range(view.shape[1]):
            share = x[:, part * group : (part + 1) * group] @ change[:, part].T
            error = share.square().mean(0)[:, None]
            better = error < least[:, part]
            least[:, part] = torch.where(better, error, least[:, part])
            found[:, part] = torch.where(better, largest[:, part], found[:, part])
    return found
