"""Compare dense weights with the float model they came from: perplexity of both, and mean KL(float || weights).

Plain torch and transformers, everything in float32. The text is tokenized whole, without special tokens, and cut
into consecutive, non-overlapping windows. KL is the mean over all positions of all windows; perplexity is over the
length-1 next-token predictions inside each window.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from peer_io import emit, token_windows, versions
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def next_token_loss(log_probabilities: torch.Tensor, tokens: torch.Tensor) -> float:
    """Negative log-likelihood summed over the batch: (batch, length, vocabulary) and (batch, length)."""
    chosen = log_probabilities[:, :-1].gather(-1, tokens[:, 1:, None])
    return -float(chosen.double().sum())


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the float model")
    parser.add_argument(
        "--weights", type=Path, required=True, help="safetensors file under the same names (export_dense.py)"
    )
    parser.add_argument("--text", type=Path, required=True, help="evaluation text, UTF-8")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--json", type=Path, help="also write the report here")
    arguments = parser.parse_args()

    tokens = torch.tensor(
        token_windows(
            AutoTokenizer.from_pretrained(arguments.model),
            arguments.text,
            count=arguments.windows,
            length=arguments.length,
        )
    )
    floating = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    other = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    mismatch = other.load_state_dict(
        {name: tensor.float() for name, tensor in load_file(arguments.weights).items()}, strict=False
    )
    missing = [
        name for name in mismatch.missing_keys if name != "lm_head.weight" or not other.config.tie_word_embeddings
    ]
    if missing or mismatch.unexpected_keys:
        raise SystemExit(f"missing {missing}, unexpected {mismatch.unexpected_keys}")

    divergence = float_loss = other_loss = 0.0
    agreed = 0
    for batch in torch.split(tokens, arguments.batch):
        expected = floating(batch, use_cache=False).logits.log_softmax(-1)
        found = other(batch, use_cache=False).logits.log_softmax(-1)
        divergence += float((expected.exp() * (expected - found)).sum(-1).double().sum())
        agreed += int((expected.argmax(-1) == found.argmax(-1)).sum())
        float_loss += next_token_loss(expected, batch)
        other_loss += next_token_loss(found, batch)
    predictions = tokens.shape[0] * (tokens.shape[1] - 1)
    emit(
        {
            "weights": arguments.weights.name,
            "text": arguments.text.name,
            "windows": arguments.windows,
            "length": arguments.length,
            "perplexity_float": math.exp(float_loss / predictions),
            "perplexity": math.exp(other_loss / predictions),
            "kl": divergence / tokens.numel(),
            "top1_agreement": agreed / tokens.numel(),
            "versions": versions(["torch", "transformers"]),
        },
        arguments.json,
    )


if __name__ == "__main__":
    main()
