"""Text on its way into the model: token ids, the chat template, and sentences.

The tokenizer is Qwen2's: NFC, a split by a regular expression, then byte-level byte-pair encoding, read from the
official files. Sentences are found by rules for the ten languages of the published models.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

from quaver.config import read_json
from quaver.errors import CheckpointError, RecipeError

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
IM_START, IM_END = "<|im_start|>", "<|im_end|>"


class Tokenizer:
    """Qwen2's byte-level BPE with the chat template of speech."""

    def __init__(self, vocabulary: Mapping[str, int], merges: list[tuple[str, str]], added: Mapping[int, Any]) -> None:
        """From tokens and merges in byte-level spelling, and ``added``: id to a token's published description.

        Raises CheckpointError when the parts do not fit together or cannot spell the chat template.
        """
        _check_parts(vocabulary, merges)
        described = {index: _added_token(index, value) for index, value in sorted(added.items())}
        ids, taken = dict(vocabulary), {index: token for token, index in vocabulary.items()}
        for index, token in described.items():
            # An added token that is also in the model's vocabulary keeps its id even when ids have gaps.
            if ids.setdefault(token.content, index) != index or taken.setdefault(index, token.content) != token.content:
                raise CheckpointError(f"tokenizer: added token {token.content} and {taken[index]} clash at id {index}")
        self._backend = Backend(BPE(vocab=ids, merges=merges, fuse_unk=False))
        self._backend.normalizer = NFC()
        split = Split(Regex(QWEN2_SPLIT), behavior="isolated")
        self._backend.pre_tokenizer = Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
        self._backend.add_tokens(list(described.values()))
        self._added = frozenset(token.content for token in described.values())
        self._special = tuple(token.content for token in described.values() if token.special)
        self._ids = ids
        self._check_template()

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """The tokenizer of the model in ``folder``: vocab.json and merges.txt, or tokenizer.json.

        Raises CheckpointError, naming the file, for anything missing, damaged, or of another kind.
        """
        folder = Path(folder)
        settings_path, whole_path = folder / "tokenizer_config.json", folder / "tokenizer.json"
        settings = _object(settings_path) if settings_path.exists() else {}
        added = _added_by_id(settings.get("added_tokens_decoder", {}), settings_path)
        if (folder / "vocab.json").exists() or not whole_path.exists():
            vocabulary = _object(folder / "vocab.json")
            return cls(vocabulary, _read_merges(folder / "merges.txt"), added)
        whole = _object(whole_path)
        vocabulary, merges = _parts_of_whole(whole, whole_path)
        found = {str(token.get("id")): token for token in whole.get("added_tokens", [])}
        return cls(vocabulary, merges, {**_added_by_id(found, whole_path), **added})

    @property
    def size(self) -> int:
        """One more than the highest id."""
        return max(self._ids.values()) + 1

    def id_of(self, token: str) -> int | None:
        """The id of one token in its byte-level spelling, None when there is no such token."""
        return self._ids.get(token)

    def spellings(self) -> Mapping[int, bytes | None]:
        """The bytes that each id stands for; None for those of added tokens, which are names and no text."""
        bytes_of = _bytes_of_alphabet()
        return {
            index: None if token in self._added else bytes(bytes_of[character] for character in token)
            for token, index in self._ids.items()
        }

    def text_of(self, index: int) -> str:
        """What the id ``index`` stands for, for people: broken characters are marked."""
        spelling = self.spellings()[index]
        return f"token {index}" if spelling is None else spelling.decode(errors="replace")

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``; control tokens spelled in it become their ids. Raises RecipeError for broken Unicode."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RecipeError(
                f"the text holds half a surrogate pair at character {error.start}: {error.reason}"
            ) from None
        ids: list[int] = self._backend.encode(text).ids
        return ids

    def ids_speech(self, text: str) -> list[int]:
        """The ids that ask for ``text`` to be spoken: 3 of role, the text, 5 that close. Raises RecipeError."""
        return self.encode(f"{IM_START}assistant\n{self._plain(text)}{IM_END}\n{IM_START}assistant\n")

    def ids_reference(self, text: str) -> list[int]:
        """The ids of what a reference recording says: 3 of role, the text, 2 that close. Raises RecipeError."""
        return self.encode(f"{IM_START}assistant\n{self._plain(text)}{IM_END}\n")

    def ids_instruct(self, text: str) -> list[int]:
        """The ids of an instruction how to speak. Raises RecipeError."""
        return self.encode(f"{IM_START}user\n{self._plain(text)}{IM_END}\n")

    def _plain(self, text: str) -> str:
        for token in self._special:
            if token in text:
                raise RecipeError(f"the text holds {token}, a control token of the model: take it out")
        return text

    def _check_template(self) -> None:
        if self.id_of(IM_START) is None or self.id_of(IM_END) is None:
            raise CheckpointError(f"tokenizer: {IM_START} or {IM_END} is missing from added_tokens_decoder")
        if len(self.encode(f"{IM_START}assistant\n")) != 3:
            raise CheckpointError("tokenizer: 'assistant' must be one token: prompts count on a role of three")


def _bytes_of_alphabet() -> dict[str, int]:
    """The byte that each character of the byte-level alphabet stands for (as GPT-2 spells bytes).

    Printable bytes of Latin-1 are themselves; the others, in order, are the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: an object was expected, not {type(value).__name__}")
    return value


def _read_merges(path: Path) -> list[tuple[str, str]]:
    """The merges in a merges.txt, in order. Raises CheckpointError."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if lines[0].startswith("#version:"):
        lines = lines[1:]
    pairs = [tuple(line.split(" ")) for line in lines if line.strip()]
    return _pairs(pairs, path)


def _pairs(values: list[Any], path: Path) -> list[tuple[str, str]]:
    for value in values:
        if len(value) != 2 or not all(isinstance(part, str) and part for part in value):
            raise CheckpointError(f"{path}: {value!r} is not a merge of two tokens")
    return [(first, second) for first, second in values]


def _parts_of_whole(whole: dict[str, Any], path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a tokenizer.json that is Qwen2's in every other setting."""
    model, steps = whole.get("model"), whole.get("pre_tokenizer")
    steps = steps.get("pretokenizers") if isinstance(steps, dict) else None
    split = {"type": "Split", "pattern": {"Regex": QWEN2_SPLIT}, "behavior": "Isolated", "invert": False}
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise CheckpointError(f"{path}: not a byte-pair encoding")
    if whole.get("normalizer") != {"type": "NFC"} or not isinstance(steps, list) or steps[:1] != [split]:
        raise CheckpointError(f"{path}: its normalizer or its splitting is not Qwen2's")
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", [])]
    return model["vocab"], _pairs(merges, path)


def _added_by_id(values: Mapping[str, Any], path: Path) -> dict[int, Any]:
    try:
        return {int(index): value for index, value in values.items()}
    except (ValueError, AttributeError):
        raise CheckpointError(f"{path}: added_tokens_decoder must map ids to tokens") from None


def _added_token(index: int, value: Any) -> AddedToken:
    if not isinstance(value, dict) or not isinstance(value.get("content"), str) or not value["content"]:
        raise CheckpointError(f"tokenizer: added token {index} has no content")
    flags = {
        name: bool(value.get(name, False)) for name in ("lstrip", "rstrip", "single_word", "normalized", "special")
    }
    return AddedToken(value["content"], **flags)


def _check_parts(vocabulary: Mapping[str, int], merges: list[tuple[str, str]]) -> None:
    """Raises CheckpointError unless every byte and every merge has its token: a lack would lose text silently."""
    if not all(isinstance(index, int) and index >= 0 for index in vocabulary.values()):
        raise CheckpointError("tokenizer: vocab.json must map tokens to ids")
    if len(set(vocabulary.values())) != len(vocabulary):
        raise CheckpointError("tokenizer: two tokens of vocab.json have one id")
    missing = [token for token in ByteLevel.alphabet() if token not in vocabulary]
    if missing:
        raise CheckpointError(f"tokenizer: vocab.json lacks the byte token {min(missing)!r} ({len(missing)} in all)")
    for first, second in merges:
        if not (first in vocabulary and second in vocabulary and first + second in vocabulary):
            raise CheckpointError(f"tokenizer: the merge of {first!r} and {second!r} has no token in vocab.json")


def check_text(text: str) -> None:
    """Raises RecipeError unless ``text`` holds at least one letter or digit and no control character."""
    if not text.strip():
        raise RecipeError("the text is empty: give at least one word to say")
    for position, character in enumerate(text):
        if unicodedata.category(character) in ("Cc", "Cs") and not character.isspace():
            raise RecipeError(f"the text holds the control character U+{ord(character):04X} at {position}: take it out")
    if not speakable(text):
        raise RecipeError(f"nothing in the text can be spoken: {text.strip()[:40]!r} has no letter and no digit")


def speakable(text: str) -> bool:
    """Whether ``text`` holds a letter or a digit of any script."""
    return any(unicodedata.category(character)[0] in "LN" for character in text)


# Sentences. Not splitting is the cheaper mistake: an unsplit pair is read in one breath, a split name is read wrong.

_WIDE = "。！？｡"
_WIDE_CLOSERS = "”’」』）】》〉〕］｝\"'"
_CLOSERS = "\"'”’“‘»›)]}"
_OPENERS = "\"'“‘„‚«»‹›([{—–-「『（【《〈¿¡"
_RUN = re.compile(r"[.!?…‼⁇⁈⁉．" + _WIDE + "]+")
_FRENCH_CLOSER = re.compile(r"\s[»›](?=\s|$)")
_PARAGRAPH = re.compile(r"\n\s*\n|[\f\u2029]|\n(?=\s*(?:[-*•–—]|\d{1,3}[.)])\s)")
_ROMAN_OR_DIGIT = re.compile(r"\d|[IVXLC]+\b")
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


def _words(listing: str) -> frozenset[str]:
    return frozenset(listing.split())


_BEFORE_NAMES = _words(
    """mr mrs ms dr prof st sr jr messrs rev hon gen col capt lt sgt maj sen rep gov pres supt mt ft vs
    hr fr frl hrn dipl ing bzw bspw evtl ggf inkl exkl sog vgl ca zzgl abzgl insb gegr geb gest verh
    mm ee mme mmes mlle mlles mgr cie env
    sig sigg dott avv geom egr spett
    sra srta srto ud uds vd vds dra dn dña lic exmo exma ilmo ilma av avda
    проф акад им ул пр просп пл наб пер тов гр св напр"""
)
_BEFORE_NUMBERS = _words(
    """no nos nr nrn vol vols p pp ch chap fig figs sec eq art arts abs bd kap s abb tab ziff pag pagg pág págs núm
    núms n num cap caps ex est al approx jan feb mar apr jun jul aug sep sept oct nov dec с стр рис табл гл ст п пп т
    тт №"""
)
_GERMAN_BEFORE_ORDINAL = _words(
    "am der des dem den die das vom zum zur im beim bis ab seit jeder jede jedes jeden unser unsere mein"
)
_RUSSIAN_FINAL = re.compile(r"т\.\s?[дп]$")
_LOWER_INITIALS = frozenset("bcdefghijklmnpqrstuvwxzгсвнэтдпрчмк")

_BREAKS = (
    re.compile(r"[.!?…;:](?=\s)|[" + _WIDE + "；：…]"),
    re.compile(r",(?=\s)|[，、،]|[—–](?=\s)"),
    re.compile(r"(?=\s)"),
)


def split_sentences(text: str, max_chars: int = 240) -> list[str]:
    """The sentences of ``text``, each of at most ``max_chars`` characters, white space collapsed, nothing else lost.

    A longer sentence is cut at a semicolon or colon, else at a comma, else at a space, else anywhere. A piece without
    letter or digit joins its neighbour, the only case of a longer one. Raises RecipeError when max_chars < 16.
    """
    if max_chars < 16:
        raise RecipeError(f"max_chars is {max_chars}: sentences cannot be cut shorter than 16 characters")
    pieces: list[str] = []
    for paragraph in _PARAGRAPH.split(text.replace("\r\n", "\n")):
        for sentence in _sentences(paragraph):
            pieces.extend(_shorten(" ".join(sentence.split()), max_chars))
    return _join_unspeakable(pieces)


def _sentences(paragraph: str) -> Iterator[str]:
    start = 0
    for run in _RUN.finditer(paragraph):
        end = _sentence_end(paragraph, run, start)
        if end is not None and end > start:
            yield paragraph[start:end]
            start = end
    if paragraph[start:].strip():
        yield paragraph[start:]


def _sentence_end(text: str, run: re.Match[str], start: int) -> int | None:
    """Where the sentence that began at ``start`` ends if the marks ``run`` end it, closing quotes included."""
    if any(mark in _WIDE for mark in run[0]):
        end = _skip(text, run.end(), _WIDE_CLOSERS)
        goes_on = end > run.end() and end < len(text) and not text[end].isspace() and text[end] not in _OPENERS
        return None if goes_on else end
    end = _skip(text, run.end(), _CLOSERS)
    if french := _FRENCH_CLOSER.match(text, end):
        end = french.end()
    if end < len(text) and not text[end].isspace():
        return end if _between_ideographs(text, run, end) else None
    following = text[end:].lstrip()
    opened = following.lstrip(_OPENERS + " \t\n\u00a0\u202f")
    if following.startswith(("¿", "¡")) or not opened:
        return end
    if opened[0].islower() or (run[0] == "." and _abbreviates(text[start : run.start()], opened)):
        return None
    return end


def _between_ideographs(text: str, run: re.Match[str], end: int) -> bool:
    """Whether ASCII marks stand in Chinese or Japanese, where no space follows them."""
    if not _CJK.match(text, end):
        return False
    return run[0][0] in "!?" or (run[0] == "." and bool(_CJK.match(text, run.start() - 1)))


def _skip(text: str, position: int, characters: str) -> int:
    while position < len(text) and text[position] in characters:
        position += 1
    return position


def _abbreviates(before: str, following: str) -> bool:
    """Whether the period between ``before`` and ``following`` belongs to an abbreviation, an initial or a number."""
    words = [word.lstrip(_OPENERS) for word in before.split()]
    if not words or _RUSSIAN_FINAL.search(before.lower()):
        return not words
    word, previous = words[-1], words[-2] if len(words) > 1 else ""
    if word.isdecimal():
        return _ordinal(word, previous, lone=len(words) == 1)
    numbered = word.lower() in _BEFORE_NUMBERS and _ROMAN_OR_DIGIT.match(following) is not None
    return numbered or word.lower() in _BEFORE_NAMES or _dotted(word) or _initial(word, previous)


def _dotted(word: str) -> bool:
    """Whether ``word`` is an abbreviation with periods inside: e.g, z.B, U.S, J.-C."""
    parts = word.replace("-", "").split(".")
    return len(parts) > 1 and all(part.isalpha() and len(part) <= 3 for part in parts)


def _initial(word: str, previous: str) -> bool:
    """Whether ``word`` is one letter of a name or an abbreviation, not English's pronoun."""
    if len(word) != 1 or word.lower() == word.upper():
        return False
    if word == "I":
        return not previous.islower()
    return word.isupper() or word in _LOWER_INITIALS


def _ordinal(number: str, previous: str, *, lone: bool) -> bool:
    """Whether ``number`` and a period count: the mark of a list item (alone), or a German ordinal."""
    return len(number) <= 3 and (lone or previous.lower() in _GERMAN_BEFORE_ORDINAL)


def _shorten(sentence: str, max_chars: int) -> Iterator[str]:
    """``sentence`` in pieces of at most ``max_chars``, each cut at the best kind of break, near equal lengths."""
    while len(sentence) > max_chars:
        n_pieces = -(-len(sentence) // max_chars)
        ideal = len(sentence) / n_pieces
        cut = _break_near(sentence, ideal, max_chars)
        yield sentence[:cut].rstrip()
        sentence = sentence[cut:].lstrip()
    if sentence:
        yield sentence


def _break_near(sentence: str, ideal: float, max_chars: int) -> int:
    for pattern in _BREAKS:
        cuts = [match.end() for match in pattern.finditer(sentence, 1, max_chars + 1)]
        cuts = [cut for cut in cuts if max_chars // 4 <= cut <= max_chars]
        if cuts:
            return min(cuts, key=lambda cut: abs(cut - ideal))
    cut = max_chars
    # A mark, a variation selector or a joiner belongs to the character before it.
    while cut > 1 and (unicodedata.category(sentence[cut])[0] == "M" or "\u200d" in sentence[cut - 1 : cut + 1]):
        cut -= 1
    return cut if cut > 1 else max_chars


def _join_unspeakable(pieces: list[str]) -> list[str]:
    """``pieces``, those without letter or digit joined to the piece before, at the start to the one after."""
    joined: list[str] = []
    for piece in pieces:
        if joined and (not speakable(piece) or not speakable(joined[-1])):
            joined[-1] += " " + piece
        else:
            joined.append(piece)
    return joined
