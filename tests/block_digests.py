"""Values for block types that do not come from a random generator, and what ggml made of them.

``DIGESTS`` were computed with llama.cpp's ``ggml_quantize_chunk`` (libggml-base 0.25.3 of llama-cpp-python 0.3.36, x86-64): the first
eight hex digits of SHA-256 of its bytes, by type, then for every kind in ``KINDS`` without and with ``weights()``; "-" where the type
needs weights.
"""

from __future__ import annotations

import numpy as np

#: Kinds of rows that ``row`` makes.
KINDS = (
    "plain", "heavy", "sparse", "zero-groups", "lone", "constant", "two-values", "all-negative", "steps", "tiny", "denormal", "large",
    "mixed",
)  # fmt: skip


def row(kind: str, columns: int = 1024) -> np.ndarray:
    """``(columns,)`` float32, the same on every machine: integers, divided and multiplied."""
    i = np.arange(columns, dtype=np.int64)
    u = (((i * 7919 + i * i % 4093 * 3571 + 17) % 65521) / 65521 - 0.5) * 2
    v = (((i * 104729 + i * i % 2003 * 911 + 5) % 32749) / 32749 - 0.5) * 2
    x = (u + v) * 0.7
    made = {
        "plain": x,
        "heavy": x / (1.01 - np.abs(u)) ** 2,
        "sparse": np.where(i * 7 % 10 == 0, x, 0),
        "zero-groups": np.where(i // 32 * 5 % 3 == 0, 0, x),
        "lone": np.where(i % 32 == 3, x, 0),
        "constant": np.full(columns, -0.37),
        "two-values": np.where(x > 0, 1.0, -1.0),
        "all-negative": -100 - np.abs(x),
        "steps": np.floor(4 * x) / 2,
        "tiny": x * 2.0**-40,
        "denormal": x * 2.0**-135,
        "large": x * 3000,
        "mixed": x * 2.0 ** (i // 16 * 11 % 40 - 25),
    }
    return made[kind].astype(np.float32)


def weights(columns: int = 1024) -> np.ndarray:
    """``(columns,)`` float32 importance, every seventh column without any."""
    i = np.arange(columns, dtype=np.int64)
    return np.where(i % 7 == 5, 0, (i * 48271 % 9973) / 1024 + 0.01).astype(np.float32)


DIGESTS = {
    "IQ4_NL": (
        "70bf1d81 69de443b 9c741426 f916e34d 5c6a50e8 56a4b329 8498895e 98baf94f d7336cfe a98e4284 720acb1f 12364e3f 56ebf5f5",
        "918ff36a 4967c256 e08508df 5fdaab9d 77157556 a222b5dd b7ef0c9b ca70b590 7c9a7ad9 82bf563c 720acb1f 48492edf 0627b69b",
    ),
    "IQ4_XS": (
        "2f56214f 2e1f7c5d 71e51b58 88fe431d 0f2d1204 58162538 2f0d4172 a5b82841 129bb3c4 4e8deb14 fb845f1d 55679811 b1586cf4",
        "9e128b54 377f1a9f 0ebbe26f 4bdb192f 491fdedc 36c04ad6 a7577f77 172b95f1 2f0dfeb6 18c8db94 fb845f1d 9cad1cf0 93fedc0a",
    ),
    "IQ3_S": (
        "33e71106 1bf2e4f9 631fa538 e3038127 baef104c 2b4e4559 8dec57a9 25202f53 1f35a566 b1d321ab 77278bbb 01b3b625 30c36139",
        "1b982d8e e9f8145d add152e1 03eaf5ac 3e9e8a44 ed5098cb 09186ab9 52055daa 6c9e2bd4 a02d5f02 77278bbb 981ea9bb 93650439",
    ),
    "IQ3_XXS": (
        "5894dd2d bd78f194 f6bd337c 6583cb14 01a5d3c1 60cb08a1 655a32eb c5da623e 2ae2ef0c 3eefc479 3eefc479 bbf49d25 ba962a0f",
        "8b1009f5 55ac26e9 5c8a581b 968a3198 df5c1ebd a2f5a823 70937f37 2d6ff189 3c351847 3eefc479 3eefc479 e20c2842 eb713353",
    ),
    "IQ2_S": (
        "c208c298 19b7e0fc 5c489773 8aa0d85a a9a2632f 53e8c59d 8e8ca1fb d961442b ccf9f30d 7b4499c3 7b4499c3 2510806a e2780fb7",
        "292ad226 27f96d9d 674d216e 5e2732df b1018957 53e8c59d 8e8ca1fb 6543bf30 3604cb1a 7b4499c3 7b4499c3 0994080d 5c229519",
    ),
    "IQ2_XS": (
        "- - - - - - - - - - - - -",
        "4c84ad4b e5242c70 82b44f1e 665917ef 71f45cf5 c7bded6a e934012b 3c545c50 dbb3d162 9af782f8 250f52cb 87057495 2221589e",
    ),
    "IQ2_XXS": (
        "- - - - - - - - - - - - -",
        "8ec64c9b 3477f2a2 1a0d5e6f c4d49164 0a2ce00d 4020d304 408721dd f1814c05 f606b345 54ce9edc 44b8aa4d 8d87999a 2862c559",
    ),
    "IQ1_S": (
        "- - - - - - - - - - - - -",
        "fed46649 b3d05b8d 8db72061 b3ae3484 da9c3d2d 7a9240c0 63247f18 cb7f1c6a 86d34235 1bdb0e8f 6d9c54de 7b23108b 580404e5",
    ),
    "IQ1_M": (
        "- - - - - - - - - - - - -",
        "9f7d6dd4 cf4968e9 adc9be41 982fc9f7 d6fe3f10 6a61c0d3 a8342752 880cc3fc 0a3c22bd 6eb69e26 6eb69e26 529bbfa6 c9f5542e",
    ),
    "TQ1_0": (
        "db08fcde 2fc89903 9bdce35f f832707e caf43dcd 1af066e9 d3f30b81 c92ab79d 816c9c42 febf20f9 580407a1 69704a75 02b443bf",
        "db08fcde 2fc89903 9bdce35f f832707e caf43dcd 1af066e9 d3f30b81 c92ab79d 816c9c42 febf20f9 580407a1 69704a75 02b443bf",
    ),
    "TQ2_0": (
        "862bdaab b480604b af3abf74 006fd7c0 35779d93 e784c784 311eaa99 578c1e9b 6f95a880 a9e7a56f 4227686d bf8963f2 da48af7d",
        "862bdaab b480604b af3abf74 006fd7c0 35779d93 e784c784 311eaa99 578c1e9b 6f95a880 a9e7a56f 4227686d bf8963f2 da48af7d",
    ),
    "MXFP4": (
        "25a97cbd a3aadd29 00eee1de 7da5636c 13abc1b1 3dfc6ee2 588512a6 d644a7e3 0cc0e68c 1769e711 bbe65643 27c369ca d24d7705",
        "25a97cbd a3aadd29 00eee1de 7da5636c 13abc1b1 3dfc6ee2 588512a6 d644a7e3 0cc0e68c 1769e711 bbe65643 27c369ca d24d7705",
    ),
    "NVFP4": (
        "d05616c4 88003ad1 dc635d3d 26d76eab 2107199a b9507e5c 8b5ec4bd bb5b8dff 7855535b 1a0295f4 1a0295f4 b287eb0d 1384dbbc",
        "d05616c4 88003ad1 dc635d3d 26d76eab 2107199a b9507e5c 8b5ec4bd bb5b8dff 7855535b 1a0295f4 1a0295f4 b287eb0d 1384dbbc",
    ),
}


def known(name: str, kind: str, weighted: bool) -> str:
    """ggml's digest of ``row(kind)`` in a type."""
    return DIGESTS[name][weighted].split()[KINDS.index(kind)]
