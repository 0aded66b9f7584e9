"""A model without weights: transformers' modules on the meta device, buffers that are computed, blocks found by structure."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitwright.errors import InputError

__all__ = ["Skeleton", "build_skeleton"]


@dataclass(eq=False)
class Skeleton:
    """A causal language model on the meta device and where its decoder blocks are.

    blocks_path: module path of the ModuleList, for example ``model.layers``.
    """

    model: Any
    blocks_path: str

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks."""
        found = self.model.get_submodule(self.blocks_path)
        assert isinstance(found, nn.ModuleList)
        return found

    @property
    def config(self) -> Any:
        """The transformers configuration (the text part of a multimodal one)."""
        return self.model.config.get_text_config()

    def block_of(self, parameter: str) -> int | None:
        """Index of the block that a parameter (or buffer) name belongs to, or None.

        The name is the one in memory, such as ``model.layers.3.mlp.up_proj.weight``.
        """
        prefix = self.blocks_path + "."
        return int(parameter.removeprefix(prefix).split(".", 1)[0]) if parameter.startswith(prefix) else None

    @property
    def tied(self) -> dict[str, str]:
        """Tied parameters: name -> the name whose tensor it shares."""
        return dict(self.model.all_tied_weights_keys)


def build_skeleton(path: Path, *, dtype: torch.dtype | None = None, untied: bool = False) -> Skeleton:
    """The skeleton of the checkpoint in ``path``, from its config.json alone.

    dtype: dtype of the parameters (default: the config's). untied: embeddings and head are two tensors, whatever the config says. Raises
    InputError where transformers does not know the architecture or no decoder blocks can be found; the data-free methods do not need
    a skeleton.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    mend = "use a data-free method (--method rtn), which needs no model code"
    try:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path / 'config.json'}: transformers cannot use it: {_first_line(error)}", mend=mend
        ) from error
    text = config.get_text_config()
    # A quantized checkpoint's skeleton is built dense; the runtime puts its own modules in.
    for part in (config, text):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
        if untied:
            part.tie_word_embeddings = False
    wanted = dtype or getattr(text, "dtype", None) or torch.float32
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=wanted, trust_remote_code=False, experts_implementation="eager"
            )
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=wanted, trust_remote_code=False)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError):
            kind = getattr(config, "model_type", "?")
            raise InputError(
                f"{path}: model type '{kind}' is not a causal language model that transformers can build: "
                f"{_first_line(error)}",
                mend=mend,
            ) from error
    finally:
        logger.setLevel(level)
    model.eval().requires_grad_(False)
    return Skeleton(model, _find_blocks(model, path, mend))


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0][:300] or type(error).__name__


def _find_blocks(model: nn.Module, path: Path, mend: str) -> str:
    """The outermost ModuleList that holds the most parameters."""
    sizes: dict[str, int] = {}
    for name, module in model.named_modules():
        inside_another = any(name.startswith(found + ".") for found in sizes)
        if isinstance(module, nn.ModuleList) and len(module) > 0 and not inside_another:
            sizes[name] = sum(parameter.numel() for parameter in module.parameters())
    if not sizes or max(sizes.values()) == 0:
        raise InputError(f"{path}: no list of decoder blocks was found in {type(model).__name__}", mend=mend)
    return max(sizes, key=lambda name: sizes[name])


def materialize_buffers(model: Any, module: nn.Module) -> None:
    """Give every buffer below ``module`` that is still on the meta device its computed value (rotary frequencies, masks)."""
    for child in module.modules():
        compute_buffers(model, child)


def compute_buffers(model: Any, module: nn.Module) -> None:
    """Compute the buffers of one module that are still on the meta device; its children and loaded tensors stay as they are.

    Non-persistent buffers are not in the checkpoint; transformers recomputes them in ``_init_weights``, which also draws random
    parameters. So parameters are on the meta device meanwhile (Gemma's embeddings hold both), and loaded buffers set aside.
    """
    waiting = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
    if not waiting:
        return
    parameters = dict(module._parameters)
    loaded = {name: buffer for name, buffer in module._buffers.items() if buffer is not None and name not in waiting}
    for name in waiting:
        module._buffers[name] = torch.empty_like(module.get_buffer(name), device="cpu")
    for name, buffer in loaded.items():
        module._buffers[name] = buffer.clone()
    for name, parameter in parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    try:
        model._init_weights(module)
    finally:
        module._parameters.update(parameters)
        module._buffers.update(loaded)
