"""vLLM's greedy continuations of some prompts, as JSON. Runs in vLLM's environment; it does not import bitwright.

prompts: a JSON file with lists of token ids. A folder that vLLM refuses gives ``{"refused": message}``.
"""

from __future__ import annotations

import argparse
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

# The engine in this process: its errors arrive here as they are.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=32, help="tokens to generate after each prompt")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    found: dict[str, Any] = {"vllm": version("vllm-cpu"), "torch": version("torch")}

    from vllm import LLM, SamplingParams

    prompts = json.loads(arguments.prompts.read_text(encoding="utf-8"))
    try:
        model = LLM(
            model=str(arguments.model), enforce_eager=True, dtype=arguments.dtype, max_model_len=512, max_num_seqs=16
        )
    except Exception as error:
        found["refused"] = f"{type(error).__name__}: {error}"
    else:
        wanted = SamplingParams(temperature=0, max_tokens=arguments.tokens, ignore_eos=True)
        answers = model.generate([{"prompt_token_ids": prompt} for prompt in prompts], wanted)
        found["tokens"] = [list(answer.outputs[0].token_ids) for answer in answers]
        found["prompts"] = [list(answer.prompt_token_ids) for answer in answers]
    arguments.json.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
