"""Makes ``AutoModelForCausalLM.from_pretrained`` of transformers know bitwright's checkpoints, without importing transformers.

transformers keeps a table of quantizers in ``transformers.quantizers.auto``. Where that module is loaded already, bitwright registers its
own there; otherwise it waits in ``sys.meta_path`` until it is.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

__all__ = ["install"]

_TARGET = "transformers.quantizers.auto"


def install() -> None:
    """Register now, or as soon as transformers is imported. Calling it again changes nothing."""
    if _TARGET in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    from bitwright.runtime.transformers_quantizer import register

    register()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing itself; it lets the others find the one module and adds a step after it was loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register()
