"""Sentences of advice: what the hardware can do, what an engine lacks, how a result is started."""

from __future__ import annotations

import shlex

from bitwright.advise.engines import engine
from bitwright.advise.scenario import Scenario, memory_engine

__all__ = ["describe_device", "gigabytes", "not_there", "start_command"]


def gigabytes(count: int) -> str:
    """Bytes in GB, for sentences.

    >>> gigabytes(5_021_000_000)
    '5.02 GB'
    """
    return f"{count / 1e9:.2f} GB"


def describe_device(scenario: Scenario) -> str:
    """In which numbers the device multiplies."""
    hardware = scenario.hardware
    if hardware.capability is None:
        return "no GPU: GGUF in llama.cpp is made for this"
    have = ["int8"] if 7.5 <= hardware.capability < 10.0 else []
    have += ["float8"] if hardware.capability >= 8.9 else []
    have += ["4-bit floats"] if hardware.capability >= 10.0 else []
    numbers = " and ".join(have) if have else "16 bits alone"
    named = f"{hardware.name} (compute capability {hardware.capability})"
    return f"{hardware.name if 'capability' in hardware.name else named} has products of {numbers}"


#: Kinds of files that somebody might have expected of vLLM.
_EXPECTED = {
    "gguf": "GGUF",
    "bnb-4": "bitsandbytes",
    "ct-fp8": "float8",
    "ct-nvfp4": "4-bit floats",
    "ct-w8a8": "int8 products",
}


def not_there(scenario: Scenario, name: str) -> list[str]:
    """What is not among the candidates of vLLM, or less than it seems, and why."""
    lines = []
    for kind, label in _EXPECTED.items() if memory_engine(name) == "vllm" else ():
        reading = engine(name).reading(kind)
        reason = reading.refused_on(scenario.hardware)
        if reason is not None:
            lines.append(f"no {label}: {reason}")
        elif reading.native is not None and not reading.is_native_on(scenario.hardware):
            lines.append(f"{label}: weights alone are compressed here; products start at {reading.native}")
    return lines


def start_command(scenario: Scenario, name: str, output: str) -> str:
    """How the result is run."""
    where = shlex.quote(output)
    match name:
        case "vllm":
            cache = f" --kv-cache-dtype {scenario.kv}" if scenario.kv in ("fp8", "int8") else ""
            return f"vllm serve ./{where} --max-model-len {scenario.context} --max-num-seqs {scenario.batch}{cache}"
        case "sglang":
            return f"python -m sglang.launch_server --model-path ./{where} --context-length {scenario.context}"
        case "llamacpp":
            layers = "" if scenario.hardware.is_cpu else " -ngl 999"
            # llama.cpp quantizes the cache of values with flash attention alone.
            cache = f" -fa on -ctk {scenario.kv} -ctv {scenario.kv}" if scenario.kv in ("q8_0", "q4_0") else ""
            return f"llama-server -m {where} -c {scenario.context * scenario.batch} -np {scenario.batch}{layers}{cache}"
        case "ollama":
            return f"echo 'FROM ./{output}' > Modelfile && ollama create {where} -f Modelfile"
        case "bitwright":
            return f"python -c \"import bitwright; model = bitwright.load('{output}')\""
        case "gptqmodel":
            return f"python -c \"from gptqmodel import GPTQModel; model = GPTQModel.load('{output}')\""
    loaded = f"AutoModelForCausalLM.from_pretrained('{output}', device_map='auto')"
    return f'python -c "from transformers import AutoModelForCausalLM; model = {loaded}"'
