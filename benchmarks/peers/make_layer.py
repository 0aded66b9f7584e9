"""Make one layer's GPTQ problem for the timers: a weight and the Gram matrix of correlated synthetic inputs.

X = Z A with Z gaussian and A = diag(1/sqrt(1 + i)) Qᵀ (Q random orthogonal: a spectrum that decays, mixed over the
channels); one channel in 512, at least four, is then made ten times stronger, as outlier channels of real models are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, required=True, help="output features")
    parser.add_argument("--columns", type=int, required=True, help="input features")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, required=True, help=".npz: W (out, in), H (in, in) float32 = sum of x xᵀ, tokens"
    )
    arguments = parser.parse_args()

    rng = np.random.default_rng(arguments.seed)
    columns = arguments.columns
    orthogonal, _ = np.linalg.qr(rng.standard_normal((columns, columns)))
    mixing = (orthogonal / np.sqrt(1.0 + np.arange(columns))).T.astype(np.float32)
    inputs = rng.standard_normal((arguments.tokens, columns), dtype=np.float32) @ mixing
    inputs[:, rng.choice(columns, size=max(4, columns // 512), replace=False)] *= 10
    weight = rng.standard_normal((arguments.rows, columns), dtype=np.float32) * np.float32(0.02)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez(arguments.out, W=weight, H=inputs.T @ inputs, tokens=np.int64(arguments.tokens))


if __name__ == "__main__":
    main()
