"""What is known of recipes: what each is for, what it lost where it was measured, and in which order they are tried for a task.

Losses are mean KL divergences from the original on text it was not calibrated on, measured by ``benchmarks/recommend.py`` on storylm-8m, a
model of 8 million parameters. Larger models lose less at the same bits; the order of recipes is what carries over, not the figures.

The orders follow public guides, which ``tests/unit/advise/test_recommend.py`` names with their addresses: weights alone at 4 bits where
reading them takes the time (small batches), 8-bit inputs as well where products do (large ones), float8 where the hardware has it, more
bits for tasks in which errors add up.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitwright.advise.scenario import Scenario, memory_engine

if TYPE_CHECKING:
    from bitwright.engine.recipe import Recipe

__all__ = ["CANDIDATES", "LADDER", "Candidate", "is_faithful", "measured", "order", "quality_origin"]

_QUALITY = Path(__file__).with_name("quality.json")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A recipe that can be suggested. flags: of ``bitwright quantize``; kind: of the table of engines; family: alike in use and size.

    text: quality depends on calibration text. good_for: in a few words.
    """

    name: str
    flags: tuple[str, ...]
    kind: str
    family: str
    good_for: str
    text: bool = True

    @property
    def is_gguf(self) -> bool:
        """The output is a file."""
        return self.kind == "gguf"

    def recipe(self) -> Recipe:
        """What the flags mean."""
        from bitwright.engine.recipe import load_recipe, make_recipe

        values = dict(zip(self.flags[::2], self.flags[1::2], strict=True))
        if self.is_gguf:
            gguf: dict[str, Any] = {"type": values["--type"]}
            return make_recipe({"gguf": gguf | ({"imatrix": "auto"} if "--imatrix" in values else {})})
        if "--recipe" in values:
            return load_recipe(values["--recipe"], {})
        return make_recipe({"method": values["--method"], "bits": int(values["--bits"])})


def _preset(name: str, kind: str, family: str, good_for: str, *, text: bool = True) -> Candidate:
    return Candidate(name=name, flags=("--recipe", name), kind=kind, family=family, good_for=good_for, text=text)


def _gguf(type_: str, good_for: str, *, imatrix: bool = False) -> Candidate:
    flags = ("--type", type_, *(("--imatrix", "auto") if imatrix else ()))
    return Candidate(name=type_, flags=flags, kind="gguf", family=type_, good_for=good_for, text=imatrix)


_ALL = (
    _preset(
        "fp8",
        "ct-fp8",
        "fp8",
        "8 bits with next to no loss; float8 products from compute capability 8.9 on",
        text=False,
    ),
    _preset("fp8-block", "fp8", "fp8", "8 bits with next to no loss, in blocks as DeepSeek's", text=False),
    _preset("w8a8", "ct-w8a8", "int8", "8-bit products for throughput on Turing and Ampere, and on CPUs"),
    Candidate(
        name="w8a16",
        flags=("--method", "rtn", "--bits", "8"),
        kind="ct-int8",
        family="int8",
        good_for="8-bit weights, 16-bit inputs: hardly any loss on any GPU",
        text=False,
    ),
    _preset("awq-gptq", "ct-int4", "int4", "4-bit weights with Marlin kernels; scaled by AWQ, rounded by GPTQ"),
    _preset("w4a16", "ct-int4", "int4", "4-bit weights with Marlin kernels"),
    _preset("gptq", "gptq-4", "int4", "4-bit weights as a gptq checkpoint, which most engines read"),
    _preset("awq", "awq-4", "int4", "4-bit weights as an awq checkpoint; asymmetric"),
    _preset("nvfp4", "ct-nvfp4", "fp4", "4-bit floats for Blackwell; weights alone"),
    _preset("mxfp4", "ct-mxfp4", "fp4", "4-bit floats with power-of-two scales; weights alone"),
    _preset("nf4", "bnb-4", "nf4", "QLoRA, and 4 bits in transformers without calibration", text=False),
    _preset("llm-int8", "bnb-8", "bnb-int8", "8 bits in transformers without calibration", text=False),
    _gguf("Q8_0", "next to no loss; the largest file"),
    _gguf("Q6_K", "close to no loss: numbers, code, long documents"),
    _gguf("Q5_K_M", "little loss: code and long documents"),
    _gguf("Q4_K_M", "the usual balance of size, speed and quality"),
    _gguf("IQ4_XS", "a little smaller than Q4_K_M, slower on CPUs", imatrix=True),
    _gguf("Q3_K_M", "where 4 bits do not fit; loss shows", imatrix=True),
    _gguf("Q2_K", "a last resort: a smaller model at 4 bits is often better", imatrix=True),
    _preset("spqr", "native", "native", "about 3.5 bits; runs in bitwright alone"),
    _preset("2bit", "native", "native", "2.5 bits; runs in bitwright alone; loss shows"),
)
CANDIDATES: Mapping[str, Candidate] = {candidate.name: candidate for candidate in _ALL}

#: From most to fewest bits.
LADDER = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "Q2_K")
#: The rung at which a task starts on a CPU, where every bit costs speed. On GPUs chat starts higher: what fits is fast enough.
_START = {
    "chat": "Q4_K_M",
    "batch-serving": "Q4_K_M",
    "code": "Q5_K_M",
    "long-context": "Q5_K_M",
    "arithmetic": "Q6_K",
    "embedding": "Q8_0",
}
_FOUR_BITS = ("awq-gptq", "w4a16", "gptq", "awq")


@functools.cache
def _quality() -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads(_QUALITY.read_text(encoding="utf-8"))
    return found


def measured(name: str) -> float | None:
    """Mean KL divergence of a candidate on storylm-8m, in nats."""
    value = _quality()["kl_mean"].get(name)
    return None if value is None else float(value)


def is_faithful(name: str) -> bool:
    """More than four bits, so that a task in which errors add up prefers it whatever engine it needs.

    >>> is_faithful("fp8"), is_faithful("Q5_K_M"), is_faithful("awq")
    (True, True, False)
    """
    return CANDIDATES[name].family in ("fp8", "int8", "bnb-int8", "Q8_0", "Q6_K", "Q5_K_M")


def quality_origin() -> str:
    """Where the figures are from, in a sentence."""
    return str(_quality()["origin"])


def order(scenario: Scenario, name: str) -> tuple[tuple[str, ...], str]:
    """Candidates for an engine in the order in which they are tried, and the reason. What does not fit is sorted out later."""
    if scenario.task == "finetune":
        return ("nf4", "llm-int8", "gptq", "awq"), "fine-tuning: adapters on NF4 weights (QLoRA) take the least memory"
    family = memory_engine(name)
    if family == "llamacpp":
        return _gguf_order(scenario)
    if family == "vllm":
        return _vllm_order(scenario)
    if name == "bitwright":
        return (
            *_FOUR_BITS,
            "w8a16",
            "spqr",
            "2bit",
        ), "bitwright reads every layout; 4 bits first, fewer where they do not fit"
    if name == "gptqmodel":
        return ("gptq", "awq"), "GPTQModel reads gptq and awq checkpoints"
    if scenario.hardware.capability is not None and scenario.hardware.capability < 7.5:
        return ("nf4", "gptq", "awq"), "bitsandbytes names such old GPUs among those it supports"
    if scenario.is_exact:
        return (
            "llm-int8",
            "fp8-block",
            "gptq",
            "awq",
            "nf4",
        ), f"{scenario.task}: errors add up, so 8 bits where they fit"
    return ("gptq", "awq", "nf4", "llm-int8"), "transformers keeps gptq, awq and bitsandbytes layers packed"


def _gguf_order(scenario: Scenario) -> tuple[tuple[str, ...], str]:
    start = LADDER.index(_START[scenario.task])
    why = f"{scenario.task}: {LADDER[start]} is the usual start on a CPU, where every bit read costs time"
    if not scenario.hardware.is_cpu:
        start = min(start, LADDER.index("Q6_K")) if scenario.task != "batch-serving" else start
        why = f"{scenario.task} on a GPU: the largest file up to {LADDER[start]} that fits wholly"
    elif scenario.is_exact:
        why = f"{scenario.task}: errors add up, so {LADDER[start]} or more bits first"
    if scenario.is_exact:
        # More bits are welcome, one step at most: beyond it nothing is gained.
        return (*LADDER[start : start + 1], *LADDER[max(0, start - 1) : start], *LADDER[start + 1 :]), why
    if scenario.hardware.is_cpu:
        return (*LADDER[start : start + 1], *reversed(LADDER[1:start]), *LADDER[start + 1 :]), why
    return LADDER[start:], why


def _vllm_order(scenario: Scenario) -> tuple[tuple[str, ...], str]:
    capability = scenario.hardware.capability
    if capability is None:
        if scenario.is_large_batch or scenario.is_exact:
            return ("w8a8", *_FOUR_BITS), "8-bit products, else 4-bit weights"
        return (*_FOUR_BITS, "w8a8"), "4-bit weights are read fastest"
    float8 = capability >= 8.9
    fp4 = ("nvfp4", "mxfp4") if capability >= 10.0 else ()
    eight = ("fp8", "fp8-block") if float8 else ("w8a16", "w8a8")
    if scenario.is_large_batch:
        first = ("fp8", "fp8-block") if float8 else ("w8a8", "w8a16")
        why = f"a large batch is limited by products: {'float8' if float8 else 'int8'} inputs and weights"
        return (*first, *fp4, *_FOUR_BITS), why
    if scenario.is_exact:
        return (*eight, *_FOUR_BITS, *fp4), f"{scenario.task}: errors add up, so 8 bits where they fit"
    if capability >= 9.0:
        why = "float8 products on Hopper and later lose next to nothing; 4 bits where they do not fit"
        return (*eight, *fp4, *_FOUR_BITS), why
    why = "a small batch is limited by reading weights: 4 bits with Marlin kernels"
    return (*_FOUR_BITS, *eight), why
