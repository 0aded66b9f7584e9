"""transformers loads bitwright's native, gptq and awq checkpoints through this quantizer (``from_pretrained``).

Linears become ``QuantizedLinear`` with packed weights; quantized experts that transformers holds as one 3-D parameter, and quantized
embeddings, are decoded. For gptq and awq it steps in only where transformers' own road is closed: without gptqmodel and optimum.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bitwright.errors import InputError
from bitwright.model.names import NameMap, map_names
from bitwright.model.skeleton import Skeleton
from bitwright.runtime.checkpoint import DecodedSource, open_checkpoint
from bitwright.runtime.linear import QuantizedLinear
from bitwright.runtime.load import whole_linears

__all__ = ["BitwrightConfig", "BitwrightQuantizer", "register"]

#: quant_method -> the packages that transformers' own loader wants
_FOREIGN = {"gptq": ("gptqmodel", "optimum"), "awq": ("gptqmodel",)}


class BitwrightConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """``quantization_config`` of a checkpoint, kept as it is."""

    def __init__(self, quant_method: str = "bitwright", **fields: Any) -> None:
        self.quant_method = quant_method
        self.fields = fields

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config that ``config.json`` holds."""
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` holds."""
        return {"quant_method": self.quant_method, **self.fields}


class _Pending(nn.Module):
    """Stands where a QuantizedLinear will; holds the bias, which transformers loads."""

    def __init__(self, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.bias = bias
        # Some models' initialization reaches for the weights of their parts (GPT-2's c_proj).
        self.register_buffer("weight", torch.empty(0, device="cpu"), persistent=False)


class BitwrightQuantizer(HfQuantizer):  # type: ignore[misc]
    """Fills a model with packed weights after transformers has loaded everything that is not quantized."""

    requires_calibration = True
    requires_parameters_quantization = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._source: DecodedSource | None = None
        self._names: NameMap | None = None
        self._linears: dict[str, str] = {}

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        files = kwargs.get("checkpoint_files")
        if not files:
            raise InputError("the checkpoint's files are not known", mend="load it from a local folder")
        # transformers builds the model with the meta device as the default one.
        with torch.device("cpu"):
            source = open_checkpoint(Path(files[0]).parent)
        if not isinstance(source, DecodedSource):
            raise InputError(f"{Path(files[0]).parent}: no tensor is quantized", mend="check quantization_config")
        with torch.device("cpu"):
            names = map_names(Skeleton(model, ""), source.tensors)
        self._source, self._names = source, names
        self._linears = whole_linears(model, source, names.places)
        for path in self._linears.values():
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, _Pending(model.get_submodule(path).bias))
        # By their endings: transformers has renamed some modules by the time it reports (Mixtral's experts lose their ".weight").
        endings = {name.removeprefix(module) for module, name in source.stored_parts()}
        endings |= {ending.removeprefix(".weight") for ending in endings}
        model._keys_to_ignore_on_load_unexpected |= {f"{re.escape(ending)}$" for ending in endings}
        model._keys_to_ignore_on_load_missing |= {f"^{re.escape(name)}$" for name in self._decoded()}
        return model

    def _decoded(self) -> list[str]:
        """Parameters in memory that are decoded whole: those that hold a quantized tensor and are no QuantizedLinear."""
        assert self._source is not None
        assert self._names is not None
        quantized = {f"{module}.weight" for module in self._source.modules if module not in self._linears}
        return [name for name, stored in self._names.parameters.items() if quantized & set(stored)]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        assert self._source is not None
        assert self._names is not None
        for module, path in self._linears.items():
            pending = model.get_submodule(path)
            bias = None if pending.bias is None else pending.bias.detach()
            made = QuantizedLinear(self._source.quantized(module), bias, dtype=model.dtype).to(model.device)
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, made)
        with torch.no_grad():
            for target in self._decoded():
                for name, value in self._names.load(target, self._source.read, model).items():
                    model.get_parameter(name).copy_(value)
        model.tie_weights()
        self._source.stored.close()
        return model

    @property
    def is_trainable(self) -> bool:
        """Adapters may be trained on top; the packed weights take no gradient."""
        return True

    def is_serializable(self, *_args: Any, **_kwargs: Any) -> bool:
        """False: the folder that was loaded is the serialized form."""
        return False


def register() -> None:
    """Enter the quantizer into transformers' tables. Calling it again changes nothing."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault("bitwright", BitwrightConfig)
    auto.AUTO_QUANTIZER_MAPPING.setdefault("bitwright", BitwrightQuantizer)
    for method, packages in _FOREIGN.items():
        if any(importlib.util.find_spec(package) is None for package in packages):
            auto.AUTO_QUANTIZER_MAPPING[method] = BitwrightQuantizer
            # transformers' own config asks for optimum's version.
            auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = BitwrightConfig
