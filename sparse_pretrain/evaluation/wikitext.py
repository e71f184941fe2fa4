"""WikiText as running text: its files hold words, punctuation and the parts of numbers apart."""

from __future__ import annotations

import re

TITLE = re.compile(r"^(?= = [^=\n].* = $)", re.MULTILINE)  # ` = Title = `; sections are ` = = Section = = `
# In the order of lm-evaluation-harness (task `wikitext`): each changes what those after it find
WORDS = (
    ("s '", "s'"),
    *((f" @{mark}@ ", mark) for mark in "-,."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
)
ENCLOSED = ((r"\(", r"\)"), (r"\[", r"\]"), (r"{", r"}"), ('"', '"'), ("'", "'"))
REST = (
    *(("= " * n + "=", "=" * (n + 1)) for n in (3, 2, 1)),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def detokenize_wikitext(text: str) -> str:
    """A file of WikiText with its words joined as in prose, as lm-evaluation-harness does before it encodes them.

    `1 @,@ 000` becomes `1,000`, ` ( x ) ` becomes ` (x) `, ` = = Section = = ` becomes `== Section ==`. Page by page:
    a quotation mark finds its partner on its own page. `<unk>`, which only the word-level files have, stays as it is
    written. Some of it is rough (a lone ` N ` becomes ` 1 `): published numbers have it so.
    """
    return "".join(_detokenize_page(page) for page in TITLE.split(text))


def _detokenize_page(page: str) -> str:
    for old, new in WORDS:
        page = page.replace(old, new)
    for opening, closing in ENCLOSED:
        page = re.sub(rf"({opening})\s*([^{closing}]*?)\s*({closing})", r"\1\2\3", page)
    for old, new in REST:
        page = page.replace(old, new)
    return page
