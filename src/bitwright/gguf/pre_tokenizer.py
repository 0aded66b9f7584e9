r"""Which of llama.cpp's hard-coded splitters (``tokenizer.ggml.pre``) does what a tokenizer's own rules say.

A byte-level BPE tokenizer first cuts the text into words by regular expressions. GGUF cannot hold them; it names a splitter that
llama.cpp has built in. Here the rules of ``tokenizer.json`` are brought to a plain list of steps, and the list is looked up. Splitters
that cut alike under several names are given the name of the family that made it known; what the names differ in beside (whether a token
is put before every text) is written to the file in keys of its own.

Source: the patterns of ``llama-vocab.cpp`` (llama-cpp-python 0.3.36; MIT) and the tokenizer files of the model families.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from bitwright.errors import InputError

__all__ = ["PRE", "Steps", "find_pre", "known_pre", "rules_of", "steps_of"]

#: one step: what it does, and its pattern or setting
Steps = tuple[tuple[str, str], ...]

_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
#: what a ByteLevel step cuts by; spelled out where other steps follow that must see text, not bytes
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_QWEN35 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = r"[^\r\n\p{L}\p{N}]?%s*%s+%s|[^\r\n\p{L}\p{N}]?%s+%s*%s"
_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = _CASED % (_UPPER, _LOWER, "", _UPPER, _LOWER, "") + r"|\p{N}" + _SLASH
_OPTIONAL = _CONTRACTIONS + "?"
_GPT4O = _CASED % (_UPPER, _LOWER, _OPTIONAL, _UPPER, _LOWER, _OPTIONAL) + r"|\p{N}{1,3}" + _SLASH
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: letters of scripts with two cases, as ranges; escaped, since some are alike in print and changed by normalizing editors
_LATIN = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5"
    "\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d"
    "\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4"
    "\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d"
    "\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06"
    "\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_SPACED_PUNCTUATION = "\\s?[!-/:-~！-／：-～‘-‟　-。]+"
_CJK = "[一-龥ࠀ-一가-퟿]+"
_BLOOM = " ?[^(\\s|.,!?…。，、।۔،)]+"

_CLASS_OR_POSSESSIVE = re.compile(r"(?P<class>\\.|\[(?:\\.|[^\]\\])*\])|(?P<greedy>[?*+])\+")

_WORDS = ("words", "")
_DIGIT, _DIGITS = ("digits", "one"), ("digits", "run")


def _split(*patterns: str) -> Steps:
    return tuple(("split", pattern) for pattern in patterns)


#: names of splitters that cut alike, the best known first; the steps; whether whole words are looked up before merging
_FAMILIES: tuple[tuple[tuple[str, ...], Steps, bool], ...] = (
    (
        ("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4", "trillion", "granite-docling", "roberta-bpe", "jina-v1-en", "jina-v2-es",
         "jina-v2-de", "jina-v2-code", "jina-es", "jina-de", "gigachat", "mellum", "modern-bert", "a.x-4.0"),
        (_WORDS,),
        False,
    ),
    (
        ("starcoder", "smollm", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
        (_DIGIT, _WORDS),
        False,
    ),
    (("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "glm4"), _split(_LLAMA3), True),
    (("dbrx", "smaug-bpe", "chatglm-bpe"), _split(_LLAMA3), False),
    (
        ("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan", "solar-open", "grok-2", "kormo", "f2llmv2"),
        _split(_QWEN2),
        False,
    ),
    (("qwen35",), _split(_QWEN35), False),
    (("tekken",), _split(_TEKKEN), True),
    (("gpt-4o", "llama4", "kanana2", "minimax-m2", "talkie"), _split(_GPT4O), False),
    (
        ("deepseek-llm",),
        (*_split(r"[\r\n]", rf"\s?[{_LATIN}]+", _SPACED_PUNCTUATION, r"\s+$", _CJK), _DIGIT),
        False,
    ),
    (("deepseek-coder",), (*_split(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK), _DIGIT), False),
    (("deepseek-v3", "hunyuan-dense", "joyai-llm"), _split(r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _DEEPSEEK3), False),
    (("falcon",), (("punctuation", "Contiguous"), _WORDS, _DIGITS, *_split("[0-9][0-9][0-9]")), False),
    (("bloom", "gpt3-finnish", "poro-chat"), _split(_BLOOM), False),
    (("default",), _split(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"), False),
    (("viking",), (*_split(_BLOOM), _DIGIT), False),
    (
        ("bailingmoe", "bailingmoe2"),
        _split(_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"),
        False,
    ),
    (
        ("seed-coder",),
        _split(_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"),
        False,
    ),
)  # fmt: skip
#: every name that is known -> its steps, and whether whole words are looked up first
PRE: Mapping[str, tuple[Steps, bool]] = {name: (steps, whole) for names, steps, whole in _FAMILIES for name in names}


def known_pre(name: str) -> str:
    """The name, if llama.cpp's splitter of that name is known here. InputError, with the known ones, if not."""
    if name not in PRE:
        raise InputError(f"pre-tokenizer '{name}' is unknown", mend=f"known are: {', '.join(sorted(PRE))}")
    return name


def find_pre(document: Mapping[str, Any], where: str) -> str:
    """The splitter for a byte-level BPE ``tokenizer.json``. InputError where none does what its rules say."""
    model = document["model"]
    steps = steps_of(document.get("pre_tokenizer"), where)
    whole = bool(model.get("ignore_merges", False))
    alike = [(names[0], looks) for names, wanted, looks in _FAMILIES if wanted == steps]
    # Looking whole words up changes nothing where every token can be merged, as those of trained vocabularies can.
    exact = [name for name, looks in alike if looks == whole]
    if not alike:
        raise InputError(
            f"{where}: llama.cpp has no pre-tokenizer known to cut by these rules: {_shown(steps)}",
            mend="give --pre NAME, where llama.cpp has a splitter for this model family under that name",
        )
    return exact[0] if exact else alike[0][0]


def steps_of(pre_tokenizer: Any, where: str) -> Steps:
    """A ``pre_tokenizer`` as plain steps; the byte-level encoding itself, which every BPE here has, is left out."""
    if not isinstance(pre_tokenizer, Mapping):
        raise InputError(f"{where}: no pre_tokenizer", mend="give --pre NAME")
    kind = pre_tokenizer.get("type")
    if kind == "Sequence":
        parts = pre_tokenizer.get("pretokenizers", [])
        return tuple(step for part in parts for step in steps_of(part, where))
    if kind == "ByteLevel":
        prefix = (("prefix", "space"),) if pre_tokenizer.get("add_prefix_space") else ()
        return (*prefix, _WORDS) if pre_tokenizer.get("use_regex", True) else prefix
    if kind == "Digits":
        return (_DIGIT if pre_tokenizer.get("individual_digits") else _DIGITS,)
    if kind == "Punctuation":
        return (("punctuation", str(pre_tokenizer.get("behavior"))),)
    if kind == "Split":
        return (_of_split(pre_tokenizer, where),)
    return ((str(kind), ""),)


def _of_split(step: Mapping[str, Any], where: str) -> tuple[str, str]:
    pattern = step.get("pattern", {})
    text = pattern.get("Regex", pattern.get("String")) if isinstance(pattern, Mapping) else None
    if not isinstance(text, str):
        raise InputError(f"{where}: a Split without a pattern", mend="give --pre NAME")
    # Keeping the matches and dropping nothing else is what isolating them does where the pattern covers every text.
    behavior, invert = str(step.get("behavior")), bool(step.get("invert"))
    kind = "split" if (behavior, invert) in {("Isolated", False), ("Removed", True)} else f"split {behavior} {invert}"
    return kind, _plain(text)


def _plain(pattern: str) -> str:
    """Spellings of the same pattern made one: possessive repetitions, raw line ends, contractions by their last letters."""
    text = pattern.replace("\r", r"\r").replace("\n", r"\n")
    text = _CLASS_OR_POSSESSIVE.sub(lambda hit: hit["class"] or hit["greedy"], text)
    return text.replace("'(?i:[sdmt]|ll|ve|re)", _CONTRACTIONS)


def _shown(steps: Steps) -> str:
    return "; ".join(f"{kind} {pattern}".strip() for kind, pattern in steps)


def rules_of(name: str) -> tuple[dict[str, Any], bool]:
    """The ``pre_tokenizer`` of ``tokenizer.json`` that cuts as this splitter does, and ``ignore_merges``."""
    steps, whole = PRE[known_pre(name)]
    parts: list[dict[str, Any]] = []
    encoded = False
    for kind, pattern in steps:
        if kind == "split":
            parts.append({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False})
        elif kind == "digits":
            parts.append({"type": "Digits", "individual_digits": pattern == "one"})
        elif kind == "punctuation":
            parts.append({"type": "Punctuation", "behavior": pattern})
        else:
            parts.append(_byte_level(words=True))
            encoded = True
    if not encoded:
        parts.append(_byte_level(words=False))
    return (parts[0] if len(parts) == 1 else {"type": "Sequence", "pretokenizers": parts}), whole


def _byte_level(*, words: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": words}
