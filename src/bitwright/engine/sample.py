"""Calibration text from the model itself: sampled at temperature 1, seeded, and kept so that a resumed run uses the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from bitwright.engine.calibration import CalibrationTokens, tokens_from_windows
from bitwright.engine.progress import Progress
from bitwright.engine.recipe import Recipe
from bitwright.errors import InputError
from bitwright.io.safetensors_dir import SafetensorsDir

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
    from bitwright.runtime.load import load_model

    calibration = recipe.calibration
    progress.note(
        f"no calibration text given: sampling {calibration.samples} x {calibration.length} tokens from the model"
    )
    model = load_model(source.path)
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
                probabilities = torch.softmax(out.logits[:, -1].float(), dim=-1)
                current = torch.multinomial(probabilities, 1, generator=generator)
                tokens = torch.cat([tokens, current], dim=1)
            rows.append(tokens)
    return torch.cat(rows).numpy()
