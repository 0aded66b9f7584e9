"""The Range contract: from what was measured of a layer's inputs to the range that static scales represent."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from bitwright.core.inputs import InputScheme
from bitwright.core.stats import Statistic

__all__ = ["Range"]


class Range(ABC):
    """Base of every range finder; a range finder is a frozen dataclass of options."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def needs(self) -> frozenset[str]:
        """Names of the statistics (``core.stats.SIMPLE``) that it reads."""

    @abstractmethod
    def find(self, stats: Mapping[str, Statistic], inputs: InputScheme) -> tuple[float, float]:
        """``(low, high)`` to be handed to ``inputs.fit``. Raises InputError where no token was seen."""
