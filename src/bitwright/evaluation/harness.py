"""lm-evaluation-harness made to fit in: silent, without traces in the process, and with a model that is loaded already."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import logging
import os
import random
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitwright.errors import InputError

__all__ = ["quiet", "wrap_model"]

_LOGGERS = ("lm_eval", "datasets", "evaluate", "huggingface_hub", "transformers")


@contextlib.contextmanager
def quiet(seed: int, allow_code: bool) -> Iterator[Path]:
    """The harness without its prints, bars, warnings and worker processes; random states and settings as before at the end.

    Gives a folder for prepared data, which is deleted.
    """
    import datasets
    from lm_eval.api import task as harness

    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    # The harness's bootstrap starts as many processes as there are cores unless it is told not to. The other one is how the metric
    # `code_eval`, which runs generated programs, is told that this is wanted.
    variables = {"DISABLE_MULTIPROC": "1"} | ({"HF_ALLOW_CODE_EVAL": "1"} if allow_code else {})
    before = {name: os.environ.get(name) for name in variables}
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    bar, bars = harness.tqdm, datasets.are_progress_bars_disabled()
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="bitwright-tasks-"))
        try:
            os.environ.update(variables)
            for name in _LOGGERS:
                logging.getLogger(name).setLevel(logging.CRITICAL)
            datasets.disable_progress_bars()
            harness.tqdm = functools.partial(bar, disable=True)
            torch.manual_seed(seed)
            yield Path(scratch)
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
            harness.tqdm = bar
            if not bars:
                datasets.enable_progress_bars()
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])


def wrap_model(model: Any, tokenizer: Any, batch_size: int) -> Any:
    """The harness's transformers model around one that is loaded already."""
    from lm_eval.models.huggingface import HFLM

    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise InputError("the tokenizer names neither a BOS nor an EOS token", mend="add one to tokenizer_config.json")

    class Loaded(HFLM):  # type: ignore[misc]
        """Without progress bars."""

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, override_bs: Any = None) -> Any:
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().generate_until(requests, disable_tqdm=True)

        @property
        def eot_token_id(self) -> int:
            end, start = self.tokenizer.eos_token_id, self.tokenizer.bos_token_id
            return int(start if end is None else end)

    # A copy: the harness gives it a padding token.
    return Loaded(
        pretrained=model,
        backend="causal",
        tokenizer=copy.deepcopy(tokenizer),
        batch_size=batch_size,
        softmax_dtype=torch.float32,
    )
