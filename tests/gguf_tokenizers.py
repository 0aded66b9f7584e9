"""Small trained tokenizers of every kind that GGUF knows, and texts that are hard to cut alike."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tests.small import STORY_TEXT

#: hard texts, one case each
TEXTS = [
    "Hello world, this is a plain sentence.",
    "I'm you're HE'S they'Ll WE'VE don'T o'clock 'tis rock'n'roll",
    "1 12 123 1234 12345 1234567890 3.14159 1,000,000 2024-01-31 ١٢٣ 四五六 ½ ⅓ x²",
    "tabs\tand\t\ttwo, spaces  two   three    four     five",
    "lines\nand\n\ntwo\n\n\nthree \n trailing  \n\r\nwindows\r\n",
    "   leading and trailing   ",
    "def f(x: int) -> str:\n    return f\"{x!r}\"  # comment\n\tif x >= 0 && y != 1: pass;\n",
    "<div class=\"a\">&amp;</div> http://example.org/?q=1&r=2#frag user@example.com",
    "naïve café résumé Ångström coöperate",
    "e\u0301 a\u0300 o\u0308 combining n\u0303 \u1100\u1161\u11a8",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 ❤️ ✈",
    "مرحبا بالعالم שלום עולם",
    "你好，世界。これはテストです。한국어 문장입니다",
    "Привет мир, ДОМ; Ελληνικά ΚΑΛΗΜΕΡΑ; हिन्दी में नमस्ते; ภาษาไทย",
    "ALLCAPS CamelCase snake_case kebab-case mixedCASEWords iPhone XMLHttpRequest",
    "!!! ??? ... --- *** ### $$$ %%% ^^^ ~~~ ``` ''' \"\"\" (((a))) [b] {c}",
    "\u00a0no-break\u2003em\u3000wide\u200bzero\u200djoin\ufeffbom",
    "a" * 40 + " " + "-" * 25 + " " + "=" * 17 + " " + "ab" * 30,
    "\U0001d54f\U00020000 𝓯𝓪𝓷𝓬𝔂 ﬁ ﬂ Ⅷ ™ © µ ß ẞ İ ı",
    " ",
    "\n",
    "x",
]  # fmt: skip
#: texts with special tokens in them
SPECIAL_TEXTS = ["<|begin|>user says hi<|end|>", "a<|end|><|end|> b", "word<|tool|>word <|tool|> \n<|begin|>"]


@cache
def corpus() -> tuple[str, ...]:
    """A little of everything, mostly English."""
    story = STORY_TEXT.read_text(encoding="utf-8")[:60_000]
    return tuple(story.splitlines() + [text for text in TEXTS for _ in range(3)])


def write_bpe(
    folder: Path, pre_tokenizer: dict[str, Any], *, ignore_merges: bool = False, normalizer: Any = None, **settings: Any
) -> None:
    """A byte-level BPE with this ``pre_tokenizer`` of ``tokenizer.json``."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    shell = json.loads(tokenizer.to_str())
    shell |= {"pre_tokenizer": pre_tokenizer, "normalizer": normalizer}
    tokenizer = Tokenizer.from_str(json.dumps(shell))
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|begin|>", "<|end|>"],
    )  # fmt: skip
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_tokens([AddedToken("<|tool|>", special=False, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    _settings(folder, {"bos_token": "<|begin|>", "eos_token": "<|end|>", **settings})


def _settings(folder: Path, settings: dict[str, Any]) -> None:
    entries = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 100000, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(entries))


_PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
_PREPEND: list[dict[str, Any]] = [{"type": "Prepend", "prepend": "▁"}]
_REPLACE: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]


def write_spm_bpe(folder: Path, *, prefix: bool = True, metaspace: bool = False, bos: bool = True) -> None:
    """Llama's way (a space is put before the text) or Gemma's: BPE with byte fallback whose merges are all ways to make a token."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=900, show_progress=False, special_tokens=_PIECES)
    tokenizer.train_from_iterator(corpus(), trainer)
    document = json.loads(tokenizer.to_str())
    vocab = document["model"]["vocab"]
    for run in ("▁▁", "▁▁▁", "▁▁▁▁"):
        vocab[run] = len(vocab)
    document["model"]["merges"] = [
        [token[:cut], token[cut:]]
        for token in sorted(vocab, key=lambda token: vocab[token])
        for cut in range(1, len(token))
        if token not in _PIECES and token[:cut] in vocab and token[cut:] in vocab
    ]
    if metaspace:
        scheme = "first" if prefix else "never"
        document["normalizer"] = None
        document["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    else:
        document["normalizer"] = {"type": "Sequence", "normalizers": [*(_PREPEND if prefix else []), *_REPLACE]}
        document["pre_tokenizer"] = None
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    pieces = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    document["decoder"] = {"type": "Sequence", "decoders": [*pieces, *strip]}
    document["added_tokens"] = [token for token in document["added_tokens"] if token["content"] in _PIECES[:3]]
    if bos:
        sequence = {"Sequence": {"id": "A", "type_id": 0}}
        first = {"SpecialToken": {"id": "<s>", "type_id": 0}}
        document["post_processor"] = {
            "type": "TemplateProcessing", "single": [first, sequence],
            "pair": [first, sequence, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(document))
    _settings(folder, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


def write_unigram(folder: Path) -> None:
    """T5's way, without a character map."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=600, show_progress=False, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>"
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    document = json.loads(tokenizer.to_str())
    # as SentencePiece and GGUF store them; with more digits, sums that nearly tie could be ranked otherwise
    document["model"]["vocab"] = [[piece, float(np.float32(score))] for piece, score in document["model"]["vocab"]]
    (folder / "tokenizer.json").write_text(json.dumps(document))
    _settings(folder, {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"})


def write_wordpiece(folder: Path, *, lowercase: bool = True, vocab: int = 700) -> None:
    """BERT's way."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab,
        limit_alphabet=vocab // 4,
        show_progress=False,
        special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {
        "unk_token": "[UNK]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
    }
    _settings(folder, names)
