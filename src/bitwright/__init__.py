"""bitwright: a trained model in, the same model in fewer bits out.

>>> import bitwright
>>> bitwright.Recipe(bits=3).group_size
128
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitwright.api import Evaluation, evaluate, load, quantize
    from bitwright.engine.recipe import Recipe
    from bitwright.engine.run import Result

from bitwright.errors import (
    BitwrightError,
    HubError,
    InputError,
    NumericError,
    PlanError,
    ResourceError,
    ResumeError,
    Stopped,
    VerifyError,
)

__all__ = [
    "BitwrightError",
    "Evaluation",
    "HubError",
    "InputError",
    "NumericError",
    "PlanError",
    "Recipe",
    "ResourceError",
    "Result",
    "ResumeError",
    "Stopped",
    "VerifyError",
    "evaluate",
    "load",
    "quantize",
]

_LAZY = {
    "Evaluation": "bitwright.api",
    "evaluate": "bitwright.api",
    "load": "bitwright.api",
    "quantize": "bitwright.api",
    "Recipe": "bitwright.engine.recipe",
    "Result": "bitwright.engine.run",
}


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; `bitwright --help` should not.
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'bitwright' has no attribute '{name}'")
