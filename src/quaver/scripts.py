"""Which text ids a language can need, told from the characters that they spell.

The rule is one of scripts, not of words: an id is kept when every letter that it spells belongs to a script of the
languages, when it spells no letter at all, or when its bytes are no whole characters (byte-pair encoding may use them
for any text). Latin letters are always kept: every language quotes them. So any text in these scripts has all its ids.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence

from quaver.errors import RecipeError

LATIN = frozenset({"LATIN"})
SCRIPTS: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(("english", "french", "german", "italian", "portuguese", "spanish"), LATIN),
    "chinese": frozenset({"CJK", "IDEOGRAPHIC", "BOPOMOFO"}),
    "japanese": frozenset({"CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA"}),
    "korean": frozenset({"HANGUL"}),
    "russian": frozenset({"CYRILLIC"}),
}
"""The languages of the published models, each with the words by which Unicode's names know its letters."""


def writes(text: str, languages: Sequence[str]) -> bool:
    """Whether every letter of ``text`` is of a script of the ``languages``, or Latin; other characters are anyone's.

    Raises RecipeError for a language that SCRIPTS does not know.
    """
    allowed = LATIN.union(*(_scripts(language) for language in languages))
    return all(_is_of(character, allowed) for character in text)


def kept_ids(spellings: Mapping[int, bytes | None], languages: Sequence[str]) -> list[int]:
    """The ids, in order, that text of the ``languages`` can need, of a tokenizer with these ``spellings``.

    Raises RecipeError for a language that SCRIPTS does not know.
    """
    kept = []
    for index, spelling in spellings.items():
        try:
            whole = None if spelling is None else spelling.decode()
        except UnicodeDecodeError:
            whole = None
        if whole is None or writes(whole, languages):
            kept.append(index)
    return sorted(kept)


def _scripts(language: str) -> frozenset[str]:
    if language not in SCRIPTS:
        raise RecipeError(f"language {language!r} is unknown: rows can be pruned to {', '.join(SCRIPTS)}")
    return SCRIPTS[language]


def _is_of(character: str, allowed: frozenset[str]) -> bool:
    # Latin-1 has letters that are not called Latin, such as the ordinals of Spanish.
    if character <= "\xff" or unicodedata.category(character)[0] not in "LM":
        return True
    words = re.findall("[A-Z]+", unicodedata.name(character, ""))
    return not allowed.isdisjoint(words) or "COMBINING" in words
