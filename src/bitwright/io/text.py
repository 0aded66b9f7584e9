"""Safe display of texts that come from files: names in a checkpoint may hold escape sequences of the terminal."""

from __future__ import annotations

import re

__all__ = ["printable", "quoted"]

# C0, DEL, C1, zero-width and direction controls, line separators, surrogates, BOM, interlinear and tag characters.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff"
    "\ufeff\ufff9-\ufffb\U000e0000-\U000e0fff]"
)


def printable(text: str, *, keep: str = "") -> str:
    r"""``text`` with control, direction and invisible characters escaped, so that a terminal only displays it.

    keep: characters to leave alone, for example ``"\n"``.

    >>> printable("a\x1b[31mb")
    'a\\x1b[31mb'
    """
    return _UNPRINTABLE.sub(lambda hit: hit[0] if hit[0] in keep else _escape(ord(hit[0])), text)


def _escape(code: int) -> str:
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def quoted(text: str, *, limit: int = 200) -> str:
    """A name from a file, quoted for a message: printable, and cut to ``limit`` characters.

    >>> quoted("model.norm")
    "'model.norm'"
    """
    return f"'{printable(text[:limit])}{'…' if len(text) > limit else ''}'"
