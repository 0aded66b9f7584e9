"""SmolLM3: Llama whose every fourth block knows no positions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitwright.errors import PlanError
from bitwright.gguf.architecture import Architecture
from bitwright.gguf.common import DECODER, LLAMA, NO_WINDOW, RMS, SILU, SPELLINGS
from bitwright.gguf.rope import Rope
from bitwright.gguf.settings import Model, Only, Plain, Stored
from bitwright.io.gguf_values import GgufValue


@dataclass(frozen=True)
class _EveryFourth(Plain):
    """The pattern that llama.cpp takes for granted."""

    def export(self, model: Model) -> Mapping[str, GgufValue]:
        """Nothing; PlanError for another pattern."""
        rotated = model.get("no_rope_layers", [int((block + 1) % 4 != 0) for block in range(model.blocks)])
        if rotated != [int((block + 1) % 4 != 0) for block in range(model.blocks)]:
            raise PlanError(
                f"{model.where}: llama.cpp leaves positions out in every fourth block only", mend="use another layout"
            )
        return {}

    def restore(self, stored: Stored) -> Mapping[str, Any]:
        """Nothing: it is the class's default."""
        del stored
        return {"no_rope_layer_interval": 4}


ARCHITECTURE = Architecture(
    name="smollm3",
    model_types=("smollm3",),
    model_class="SmolLM3ForCausalLM",
    tied=True,
    settings=(
        *DECODER,
        RMS,
        Rope(theta=2e6, dimension=True),
        _EveryFourth(),
        SILU,
        Only("use_sliding_window", (False,)),
        NO_WINDOW,
    ),
    rules=LLAMA,
    spellings=SPELLINGS,
)
