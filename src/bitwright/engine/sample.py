"""Calibration text from the model itself: sampled at temperature 1, seeded, and kept so that a resumed run uses the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitwright.engine.calibration import CalibrationTokens, tokens_from_windows
from bitwright.engine.progress import Progress
from bitwright.engine.recipe import Recipe
from bitwright.errors import InputError, NumericError
from bitwright.io.safetensors_dir import SafetensorsDir
from bitwright.model.blocks import BlockRunner
from bitwright.model.names import map_names
from bitwright.model.skeleton import build_skeleton

__all__ = ["sample_tokens"]

_BATCH = 32
#: A larger model is not loaded whole for sampling.
MAX_MODEL_BYTES = 16_000_000_000


def sample_tokens(
    recipe: Recipe, source: SafetensorsDir, folder: Path, vocab_size: int, progress: Progress
) -> CalibrationTokens:
    """``samples`` sequences of ``length`` tokens drawn from the model, starting at its beginning-of-text token.

    The whole model is loaded for this; InputError where it is too large. The tokens are kept in ``folder`` for resuming.
    """
    kept = folder / "sampled-tokens.npy"
    if kept.is_file():
        ids = np.load(kept)
    else:
        ids = _sample(recipe, source, progress)
        temporary = folder / "sampled-tokens.tmp.npy"
        np.save(temporary, ids)
        temporary.replace(kept)
    return tokens_from_windows(ids.tolist(), recipe.calibration, vocab_size=vocab_size, origin="model samples")


def _sample(recipe: Recipe, source: SafetensorsDir, progress: Progress) -> np.ndarray:
    if source.total_bytes > MAX_MODEL_BYTES:
        raise InputError(
            f"{source.path}: {source.total_bytes / 1e9:.0f} GB is too large to sample calibration text from on this machine",
            mend="give a text with --calibration",
        )
    calibration = recipe.calibration
    progress.note(
        f"no calibration text given: sampling {calibration.samples} x {calibration.length} tokens from the model"
    )
    model = _whole_model(source)
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or calibration.length
    length = min(calibration.length, int(limit))
    start = config.bos_token_id if isinstance(config.bos_token_id, int) else 0
    generator = torch.Generator().manual_seed(recipe.seed)
    rows: list[torch.Tensor] = []
    with torch.no_grad():
        for first in range(0, calibration.samples, _BATCH):
            count = min(_BATCH, calibration.samples - first)
            tokens = torch.full((count, 1), start, dtype=torch.int64)
            cache = None
            current = tokens
            while tokens.shape[1] < length:
                out = model(input_ids=current, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                logits = out.logits[:, -1].float()
                if not bool(torch.isfinite(logits).all()):
                    raise _not_finite(source)
                probabilities = torch.softmax(logits, dim=-1)
                current = torch.multinomial(probabilities, 1, generator=generator)
                tokens = torch.cat([tokens, current], dim=1)
            rows.append(tokens)
    return torch.cat(rows).numpy()


def _whole_model(source: SafetensorsDir) -> Any:
    skeleton = build_skeleton(source.path)
    model = skeleton.model
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    BlockRunner(skeleton, map_names(skeleton, source.tensors), source, dtype).fill("", model)
    model.tie_weights()
    return model.eval()


def _not_finite(source: SafetensorsDir) -> NumericError:
    """Names the tensor to blame, where there is one."""
    for name, spec in source.tensors.items():
        if spec.dtype.is_floating_point and spec.dtype.itemsize > 1:
            bad = int((~torch.isfinite(source.read(name))).sum())
            if bad:
                return NumericError(
                    f"{name}: {bad} values are NaN or infinite", mend="the checkpoint is damaged; download it again"
                )
    return NumericError("the model's own logits are not finite", mend="give a text with --calibration")
