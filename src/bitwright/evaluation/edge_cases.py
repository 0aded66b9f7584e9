"""Texts that ordinary evaluation leaves out: long inputs, many scripts, code, digits, markup, unusual characters, repetition.

All of it is generated here from templates and short sentences written for this project, the same for the same seed; nothing is downloaded.
Quantization that costs little on running English can cost much here, because calibration text seldom holds any of it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping

__all__ = ["edge_case_texts"]

#: Every text has at least this many characters.
_LEAST = 6000
#: The long one has this many.
_LONG = 24_000


def edge_case_texts(seed: int = 0) -> Mapping[str, str]:
    """Texts by domain: long, languages, code, digits, markup, unicode, repetition.

    >>> sorted(edge_case_texts())
    ['code', 'digits', 'languages', 'long', 'markup', 'repetition', 'unicode']
    """
    makers: dict[str, Callable[[random.Random], str]] = {
        "long": _long,
        "languages": _languages,
        "code": _code,
        "digits": _digits,
        "markup": _markup,
        "unicode": _unicode,
        "repetition": _repetition,
    }
    return {name: make(random.Random(f"{name} {seed}")) for name, make in makers.items()}


def _until(least: int, make: Callable[[], str], between: str = "\n") -> str:
    """Pieces of text until there are ``least`` characters."""
    parts: list[str] = []
    size = 0
    while size < least:
        parts.append(make())
        size += len(parts[-1]) + len(between)
    return between.join(parts) + "\n"


_NAMES = ("Mara", "Oskar", "Ines", "Tomas", "Leila", "Yuto", "Ada", "Pavel", "Noor", "Ruben", "Sanna", "Kofi")
_PLACES = ("the mill", "the harbour", "the old bridge", "the orchard", "the station", "the lighthouse", "the market")
_THINGS = (
    "a copper lamp",
    "a torn map",
    "a box of seeds",
    "a silver whistle",
    "a blue jar",
    "a heavy key",
    "a small boat",
)
_WEATHER = (
    "It was raining",
    "The wind had dropped",
    "Fog lay over the fields",
    "The sun was low",
    "Snow had begun to fall",
)
_SAID = (
    "We should have left an hour ago", "I have never seen it so quiet here", "You carry it for a while",
    "Someone has moved the stones", "There is only one way back", "Nobody will believe this", "Count them again",
)  # fmt: skip


def _long(rng: random.Random) -> str:
    """One story in numbered chapters, whose names and things come back thousands of tokens later."""
    people = rng.sample(_NAMES, 4)
    owner = dict(zip(rng.sample(_THINGS, 4), people, strict=True))
    chapter = 0

    def make() -> str:
        nonlocal chapter
        chapter += 1
        where = rng.choice(_PLACES)
        lines = [f"Chapter {chapter}", ""]
        for _ in range(4):
            one, other = rng.sample(people, 2)
            thing, holder = rng.choice(list(owner.items()))
            lines.append(
                f"{rng.choice(_WEATHER)} when {one} and {other} came to {where}. {holder} still had {thing}, "
                f'and that was what they had come to talk about. "{rng.choice(_SAID)}," {one} said. '
                f"{other} looked towards {rng.choice(_PLACES)} and did not answer at once."
            )
            if rng.random() < 0.5 and other != holder:
                owner[thing] = other
                lines.append(f"In the end {holder} gave {thing} to {other}, who put it away without a word.")
        lines.append(
            "That evening they wrote down who had what: " + "; ".join(f"{o}, {t}" for t, o in owner.items()) + "."
        )
        return "\n".join(lines) + "\n"

    return _until(_LONG, make)


_SENTENCES = {
    "English": ("The train is late again.", "My sister plants beans by the fence.", "Where did you put the scissors?"),
    "Deutsch": ("Der Zug hat wieder Verspätung.", "Meine Schwester pflanzt Bohnen am Zaun.", "Wo hast du die Schere hingelegt?"),
    "Français": ("Le train est encore en retard.", "Ma sœur plante des haricots près de la clôture.", "Où as-tu mis les ciseaux ?"),
    "Español": ("El tren llega tarde otra vez.", "Mi hermana siembra frijoles junto a la cerca.", "¿Dónde pusiste las tijeras?"),
    "Polski": ("Pociąg znowu się spóźnia.", "Moja siostra sadzi fasolę przy płocie.", "Gdzie położyłeś nożyczki?"),
    "Türkçe": ("Tren yine gecikti.", "Kız kardeşim çitin yanına fasulye ekiyor.", "Makası nereye koydun?"),
    "Русский": ("Поезд опять опаздывает.", "Моя сестра сажает фасоль у забора.", "Куда ты положил ножницы?"),
    "Ελληνικά": ("Το τρένο άργησε πάλι.", "Η αδελφή μου φυτεύει φασόλια δίπλα στον φράχτη.", "Πού έβαλες το ψαλίδι;"),
    "العربية": ("تأخر القطار مرة أخرى.", "أختي تزرع الفاصوليا قرب السياج.", "أين وضعت المقص؟"),
    "עברית": ("הרכבת שוב מאחרת.", "אחותי שותלת שעועית ליד הגדר.", "איפה שמת את המספריים?"),
    "हिन्दी": ("रेलगाड़ी फिर देर से आई।", "मेरी बहन बाड़ के पास सेम बोती है।", "तुमने कैंची कहाँ रखी?"),
    "বাংলা": ("ট্রেনটা আবার দেরি করেছে।", "আমার বোন বেড়ার পাশে শিম লাগায়।", "কাঁচিটা কোথায় রেখেছ?"),
    "ไทย": ("รถไฟมาสายอีกแล้ว", "พี่สาวของฉันปลูกถั่วข้างรั้ว", "คุณวางกรรไกรไว้ที่ไหน"),
    "中文": ("火车又晚点了。", "我姐姐在篱笆旁边种豆子。", "你把剪刀放在哪里了？"),
    "日本語": ("電車がまた遅れている。", "姉は垣根のそばに豆を植えている。", "はさみはどこに置いたの？"),
    "한국어": ("기차가 또 늦었다.", "우리 언니는 울타리 옆에 콩을 심는다.", "가위를 어디에 두었어?"),
}  # fmt: skip


def _languages(rng: random.Random) -> str:
    """Three plain sentences in sixteen languages, language by language, then mixed."""

    def make() -> str:
        names = rng.sample(list(_SENTENCES), len(_SENTENCES))
        lines = [f"{name}: {' '.join(rng.sample(_SENTENCES[name], 3))}" for name in names]
        lines.append(" ".join(rng.choice(_SENTENCES[name]) for name in rng.sample(names, 6)))
        return "\n".join(lines) + "\n"

    return _until(_LEAST, make)


_NOUNS = ("order", "parcel", "sensor", "ticket", "reading", "account", "route", "batch", "garden", "lamp")
_FIELDS = ("weight", "price", "count", "level", "score", "offset", "width", "delay")


def _code(rng: random.Random) -> str:
    """Snippets of Python, C, SQL, JSON and shell, each under a line that names its language."""
    languages = {"python": _python, "c": _c, "sql": _sql, "json": _json, "sh": _shell}

    def make() -> str:
        return "\n".join(f"```{name}\n{snippet(rng)}\n```\n" for name, snippet in languages.items())

    return _until(_LEAST, make)


def _python(rng: random.Random) -> str:
    noun, field = rng.choice(_NOUNS), rng.choice(_FIELDS)
    least, factor = rng.randrange(2, 90), rng.randrange(2, 9)
    return (
        "from dataclasses import dataclass\n\n\n@dataclass(frozen=True)\n"
        f"class {noun.title()}:\n    name: str\n    {field}: int = {least}\n\n"
        f"    def scaled(self, factor: float = {factor}.5) -> float:\n        return self.{field} * factor\n\n\n"
        f"def total_{field}({noun}s: list[{noun.title()}], *, least: int = {least}) -> int:\n"
        f'    """Sum of {field} over every {noun} that has at least ``least``."""\n'
        f"    return sum({noun}.{field} for {noun} in {noun}s if {noun}.{field} >= least)\n"
    )


def _c(rng: random.Random) -> str:
    noun, field, size = rng.choice(_NOUNS), rng.choice(_FIELDS), 1 << rng.randrange(3, 9)
    return (
        f"#include <stddef.h>\n#include <stdint.h>\n\n#define MAX_{noun.upper()} {size}u\n\n"
        f"struct {noun} {{\n    uint32_t {field};\n    const char *name;\n}};\n\n"
        f"static uint64_t sum_{field}(const struct {noun} *items, size_t n)\n{{\n    uint64_t total = 0;\n"
        f"    for (size_t i = 0; i < n && i < MAX_{noun.upper()}; ++i)\n        total += items[i].{field};\n    return total;\n}}\n"
    )


def _sql(rng: random.Random) -> str:
    noun, other = rng.sample(_NOUNS, 2)
    field, group = rng.sample(_FIELDS, 2)
    return (
        f"SELECT a.{group}, COUNT(*) AS n, AVG(b.{field}) AS mean_{field}\n"
        f"FROM {noun}s AS a\nLEFT JOIN {other}s AS b ON b.{noun}_id = a.id\n"
        f"WHERE b.{field} BETWEEN {rng.randrange(10)} AND {rng.randrange(100, 999)}\n  AND a.name NOT LIKE '%test%'\n"
        f"GROUP BY a.{group}\nHAVING COUNT(*) > {rng.randrange(2, 20)}\nORDER BY mean_{field} DESC\nLIMIT {rng.randrange(5, 50)};"
    )


def _json(rng: random.Random) -> str:
    value = {
        "id": f"{rng.getrandbits(64):016x}",
        "active": rng.random() < 0.5,
        "parent": None,
        "items": [{"name": rng.choice(_NOUNS), rng.choice(_FIELDS): round(rng.uniform(-50, 50), 3)} for _ in range(3)],
        "path": f"C:\\data\\{rng.choice(_NOUNS)}",
        "note": 'quoted "text" and a tab\t',
    }
    return json.dumps(value, indent=2)


def _shell(rng: random.Random) -> str:
    noun, days = rng.choice(_NOUNS), rng.randrange(2, 60)
    return (
        f"#!/bin/sh\nset -eu\nout=\"${{1:-/tmp/{noun}.csv}}\"\nfind . -name '*.{noun}' -mtime -{days} -print0 |\n"
        "    xargs -0 -r grep -hE '^[0-9]+,' |\n"
        f'    sort -t, -k{rng.randrange(1, 5)}n | uniq -c | head -n {rng.randrange(5, 99)} > "$out"\n'
        f'if [ ! -s "$out" ]; then\n    echo "no {noun} in the last {days} days" >&2\n    exit 1\nfi'
    )


def _digits(rng: random.Random) -> str:
    """Sums that are right, tables, dates, numbers like those of telephones, hexadecimal."""

    def arithmetic() -> str:
        a, b = rng.randrange(10, 10**5), rng.randrange(2, 10**4)
        operation = rng.choice("+-*/%")
        results = {"+": a + b, "-": a - b, "*": a * b, "/": a // b, "%": a % b}
        shown = "//" if operation == "/" else operation
        return f"{a} {shown} {b} = {results[operation]}"

    def make() -> str:
        lines = [arithmetic() for _ in range(12)]
        lines.append(f"{rng.randrange(1950, 2050)}-{rng.randrange(1, 13):02}-{rng.randrange(1, 29):02}T"
                     f"{rng.randrange(24):02}:{rng.randrange(60):02}:{rng.randrange(60):02}Z")  # fmt: skip
        lines.append(f"({rng.randrange(100, 999)}) 555-01{rng.randrange(100):02}")
        lines.append(f"0x{rng.getrandbits(32):08X} {rng.getrandbits(128):032x}")
        lines.append(f"{rng.uniform(-1, 1):.12f} {rng.uniform(1, 10):.6e} {rng.randrange(10**9):,}")
        lines.append("| item | amount | price | total |")
        for _ in range(3):
            amount, price = rng.randrange(1, 40), rng.randrange(5, 500)
            lines.append(f"| {rng.choice(_NOUNS)} | {amount} | {price} | {amount * price} |")
        return "\n".join(lines) + "\n"

    return _until(_LEAST, make)


def _markup(rng: random.Random) -> str:
    """HTML, Markdown and LaTeX."""

    def make() -> str:
        noun, field = rng.choice(_NOUNS), rng.choice(_FIELDS)
        number = rng.randrange(1, 99)
        rows = "".join(f"<tr><td>{rng.choice(_NOUNS)}</td><td>{rng.randrange(999)}</td></tr>" for _ in range(3))
        return (
            f'<section id="{noun}-{number}" class="card"><h2>The {noun}&#8217;s {field}</h2>\n<p>Less than <b>{number}</b> &lt; '
            f'<a href="https://example.org/{noun}?id={number}&amp;sort={field}">see the list</a>.</p>\n'
            f"<table><thead><tr><th>{noun}</th><th>{field}</th></tr></thead><tbody>{rows}</tbody></table>\n</section>\n\n"
            f"## {noun.title()} {number}\n\n- [x] measure the **{field}**\n- [ ] compare with `{noun}[{number}]`\n"
            f"  1. *once* before\n  2. ~~twice~~ after[^1]\n\n> {rng.choice(_SAID)}.\n\n[^1]: See [{field}](#{noun}-{number}).\n\n"
            f"\\begin{{equation}}\\label{{eq:{noun}{number}}}\n"
            f"  \\sum_{{i=1}}^{{{number}}} \\frac{{x_i^2}}{{2\\sigma_{{\\mathrm{{{field}}}}}}}"
            f" \\le \\int_0^\\infty e^{{-\\alpha t}}\\,\\mathrm{{d}}t\n\\end{{equation}}\n"
        )

    return _until(_LEAST, make)


_EMOJI = ("😀", "🚲", "🌧️", "🧵", "👩‍🔧", "👨‍👩‍👧", "🏳️‍🌈", "🇯🇵", "🇰🇪", "👍🏽", "🦔", "🫖", "❤️‍🔥", "⏱️")
#: e and o with marks of their own, stacked marks, a decomposed Hangul syllable, Devanagari conjuncts
_COMBINING = (
    "e\u0301",
    "o\u0308\u0304",
    "a\u030a\u0323",
    "n\u0303",
    "z\u0351\u036b\u0343\u032a",
    "\u1112\u1161\u11ab",
    "\u0915\u094d\u0937",
)
_INVISIBLE = ("\u200b", "\u200d", "\u00a0", "\u00ad", "\u2060", "\ufeff", "\u2028")
#: Armenian, Georgian, Ethiopic, Cherokee, Tifinagh, Runic, Gothic, Ogham, cuneiform, Osage
_RARE = ("Բարեւ", "გამარჯობა", "ሰላም", "ᎣᏏᏲ", "ⴰⵣⵓⵍ", "ᚠᚢᚦᚨᚱᚲ", "𐌲𐌿𐍄", "ᚁᚂᚃ", "𒀀𒁀", "𐓏𐓘")
_MATH = ("∀x∈ℝ: x²≥0", "𝔣(𝑥)=∑ₙ𝑥ⁿ", "∂u∕∂t=κ∇²u", "½≠⅓", "ℵ₀<2^ℵ₀", "①②③", "Ⅷ·Ⅸ", "ﬁ ﬂ", "ＦＵＬＬ", "→⇒↦", "░▒▓█")
_RIGHT_TO_LEFT = ("שלום 123 abc עולם", "مرحبا (test) 456", "\u202eabc\u202c", "\u2067نص\u2069 end")


def _unicode(rng: random.Random) -> str:
    """Emoji with joiners, combining marks, both directions in a line, characters of no width, rare scripts, symbols."""

    def make() -> str:
        parts = [rng.choice(kind) for kind in (_EMOJI, _COMBINING, _RARE, _MATH, _RIGHT_TO_LEFT, _EMOJI, _COMBINING)]
        rng.shuffle(parts)
        words = rng.sample(_NOUNS, 2)
        broken = rng.choice(_INVISIBLE).join(words[0])
        return " ".join([words[1], *parts, broken]) + "".join(rng.choices(_EMOJI, k=3))

    return _until(_LEAST, make)


def _repetition(rng: random.Random) -> str:
    """One token, phrase or line over and over, with something else now and then."""

    def make() -> str:
        word, count = rng.choice(_NOUNS), rng.randrange(20, 60)
        kind = rng.randrange(4)
        if kind == 0:
            return " ".join([word] * count)
        if kind == 1:
            return rng.choice("-=#.a \t0") * (4 * count) + word
        if kind == 2:
            said = rng.choice(_SAID)
            return "\n".join(said + ("." if i % 13 else ", " + word + ".") for i in range(count // 3))
        return "".join(f"{word} {i}, {word} {i + 1}; " for i in range(count // 2))

    return _until(_LEAST, make)
