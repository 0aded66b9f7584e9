"""bitwright: a trained model in, the same model in fewer bits out.

>>> import bitwright
>>> bitwright.Recipe(bits=3).layout
'compressed-tensors'
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitwright.api import (
        Evaluation,
        allocate,
        analyze,
        collect_imatrix,
        convert,
        evaluate,
        from_gguf,
        load,
        quantize,
        to_gguf,
    )
    from bitwright.engine.convert import Conversion
    from bitwright.engine.recipe import Recipe
    from bitwright.engine.run import Result
    from bitwright.evaluation.outliers import OutlierReport

from bitwright import _autoload
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
    "Conversion",
    "Evaluation",
    "HubError",
    "InputError",
    "NumericError",
    "OutlierReport",
    "PlanError",
    "Recipe",
    "ResourceError",
    "Result",
    "ResumeError",
    "Stopped",
    "VerifyError",
    "allocate",
    "analyze",
    "collect_imatrix",
    "convert",
    "evaluate",
    "from_gguf",
    "load",
    "quantize",
    "to_gguf",
]

_LAZY = {
    "Conversion": "bitwright.engine.convert",
    "Evaluation": "bitwright.api",
    "allocate": "bitwright.api",
    "analyze": "bitwright.api",
    "convert": "bitwright.api",
    "evaluate": "bitwright.api",
    "load": "bitwright.api",
    "quantize": "bitwright.api",
    "collect_imatrix": "bitwright.api",
    "from_gguf": "bitwright.api",
    "to_gguf": "bitwright.api",
    "Recipe": "bitwright.engine.recipe",
    "OutlierReport": "bitwright.evaluation.outliers",
    "Result": "bitwright.engine.run",
}


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; `bitwright --help` should not.
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'bitwright' has no attribute '{name}'")


_autoload.install()
