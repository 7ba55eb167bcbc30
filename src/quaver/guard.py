"""The end of never-ending speech: a watch over the frames of one utterance as they are made.

What is known without listening: how long the text takes, whether the codes stand still or go round, and where the
model nearly stopped. A watch only looks, so healthy speech is never touched. It goes by codes, not by loudness, because
the verdict must not depend on when sound is made of them.

Shapes: T frames, Q codebooks.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import deque
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Literal

from quaver.config import FRAME_RATE_HZ
from quaver.errors import RecipeError
from quaver.model.tts import Utterance
from quaver.text import split_sentences

Sign = Literal["loop", "silence", "passed its stop", "length"]
"""What gave a runaway away."""

CHARACTERS_A_MINUTE = {
    "english": 987, "chinese": 255, "french": 998, "german": 920, "italian": 950, "japanese": 357, "korean": 300,
    "portuguese": 913, "russian": 986, "spanish": 1025,
}  # fmt: skip
"""How fast each language is read aloud, spaces counted where it has them.

Trauzettel-Klosinski and Dietz 2012 (IReST), table of 17 languages, the spread between readers 9 to 18 %. The shipped
English voice is 5 to 7 % faster (docs/LOG.md); the others are not calibrated on a model. Korean is not in that table:
300 of its characters, which are syllables, is as slow as the slowest European language there. Portuguese, Russian and
Spanish were not held against the printed table.
"""

# Measured: docs/LOG.md, "The end of never-ending speech".
_AROUND_S = 0.3
_PAUSE_S = 0.6
# Healthy speech of the shipped voice took up to 1.5 times what was expected, recordings at half their speed up to 2.2
# times: late is where slow people end, and nothing that was measured as speech lasted thrice as long.
_LATE, _MOST = 2.0, 3.0
_INSTRUCTED = 2.0
_SLOWEST = 3.0
# A second and a half is a long pause in speech, and no sound is held for two.
_STUCK = round(2.0 * FRAME_RATE_HZ)
_N_ROUNDS = 3
_LONGEST_ROUND = _STUCK // (_N_ROUNDS - 1)
# One code in ten may be another: silence is seldom one code throughout.
_SILENT = 0.9
# A model whose stop id was weakened was at 0.08 to 0.35 where it should have stopped; healthy ones are below 0.003 in
# nine utterances of ten until they stop.
_CLEAN = 0.03
_PASSED = round(1.0 * FRAME_RATE_HZ)
# Of the logarithm of the length: 0.13 in healthy speech of one voice, wider because speakers differ.
_SPREAD = 0.35

_PAUSE = re.compile(r"[,;:.!?…—–。！？、，；：]+")
_WIDE = ("chinese", "japanese", "korean")
_DIGIT, _SYMBOL, _SPELT = 6, 8, 4


@dataclass(frozen=True, slots=True)
class Guard:
    """What is done about speech that never ends: it is tried ``retries`` times more, then cut at its likeliest end.

    Raises RecipeError for a number below 0.
    """

    retries: int = 0

    def __post_init__(self) -> None:
        if self.retries < 0:
            raise RecipeError(f"retries is {self.retries}: it must be 0 (cut at once) or more")


@dataclass(frozen=True, slots=True)
class Length:
    """How many frames a text takes: as expected, ``late`` (slow people are), and the most that is speech at all.

    0 < expected <= late <= most.
    """

    expected: int
    late: int
    most: int


def length(utterance: Utterance) -> Length:
    """How long ``utterance`` lasts, from its text, its language and, cloned in context, its speaker's own pace.

    Late is twice what the text takes, most is three times, each with 0.6 s for every mark that may be a pause; with
    an instruction, which may ask for slow speech, twice that.
    """
    text_s = _AROUND_S + _reading_s(utterance.text, utterance.language)
    voice = utterance.voice
    if voice is not None and voice.codes is not None and voice.text:
        # A fast reference says little about a slow text; a slow one says that there is time.
        own = len(voice.codes) / FRAME_RATE_HZ / (_AROUND_S + _reading_s(voice.text, utterance.language))
        text_s *= min(max(1.0, own), _SLOWEST)
    patience = _INSTRUCTED if utterance.instruct else 1.0
    pauses_s = _PAUSE_S * len(_PAUSE.findall(utterance.text))
    frames = [seconds * FRAME_RATE_HZ for seconds in (text_s, _LATE * text_s + pauses_s, _MOST * text_s + pauses_s)]
    return Length(math.ceil(frames[0]), math.ceil(patience * frames[1]), math.ceil(patience * frames[2]))


def longest_s(text: str, language: str, max_s: float | None = None) -> float:
    """The longest that a sentence of ``text`` can last, in seconds: where a watch ends it, or ``max_s``."""
    sentences = split_sentences(text) or [text]
    most = max(length(Utterance(sentence, language)).most for sentence in sentences) / FRAME_RATE_HZ
    return most if max_s is None else min(most, max_s)


def _reading_s(text: str, language: str) -> float:
    """Seconds that reading ``text`` aloud takes; at the slowest pace of its script where the language is "auto"."""
    words = unicodedata.normalize("NFKC", text).split()
    language = language.lower()
    if language not in CHARACTERS_A_MINUTE:
        wide = any(unicodedata.east_asian_width(c) in "WF" for word in words for c in word)
        same_script = [name for name in CHARACTERS_A_MINUTE if (name in _WIDE) == wide]
        language = min(same_script, key=lambda name: CHARACTERS_A_MINUTE[name])
    n_spaces = 0 if language in ("chinese", "japanese") else len(words) - 1
    return 60 / CHARACTERS_A_MINUTE[language] * (sum(_weight(word) for word in words) + n_spaces)


def _weight(word: str) -> int:
    """The characters of ``word`` as it is said: digits and symbols are words, capitals are spelt."""
    spelt = sum(c.isupper() for c in word) > 1
    total = 0
    for character in word:
        if character.isdigit():
            total += _DIGIT
        elif unicodedata.category(character)[0] == "S" or character in "%&@#*/\\":
            total += _SYMBOL
        else:
            total += _SPELT if spelt and character.isupper() else 1
    return total


@dataclass(frozen=True, slots=True)
class Runaway:
    """That speech ran away, seen after ``at`` frames by ``sign``; the first ``keep`` frames are worth keeping."""

    sign: Sign
    at: int
    keep: int


class Watch:
    """Watches one utterance of ``length``; ``silence`` gives the codes of codebook 0 that say nothing.

    Nothing is judged before the expected length. From there on speech has run away when for 2 s its first codes go
    round (three times or more, a round of a second at most) or nearly all are silence; from the late length on when 1 s
    ago or more the model was near stopping and did not; and at the most that the text can take.
    """

    def __init__(self, length: Length, silence: Callable[[], Set[int]] = frozenset) -> None:
        self._length, self._silence = length, silence
        self._n = 0
        self._recent: deque[int] = deque(maxlen=_STUCK)
        self._repeats = [0] * (_LONGEST_ROUND + 1)
        self._best, self._best_score = 0, -math.inf
        self._pause = 0

    def push(self, code: int, stop: float) -> Runaway | None:
        """What is known after one more frame: its ``code`` in codebook 0, and ``stop``, how likely it was no more."""
        self._note_stop(stop)
        for period in range(1, min(len(self._repeats), len(self._recent) + 1)):
            self._repeats[period] = self._repeats[period] + 1 if self._recent[-period] == code else 0
        self._recent.append(code)
        self._note_pause(code)
        self._n += 1
        sign = self._sign()
        return None if sign is None else Runaway(sign, self._n, self._keep())

    def _note_stop(self, stop: float) -> None:
        """Keeps the clean stop that model and text length together find likeliest."""
        if stop >= _CLEAN and 2 * self._n >= self._length.expected:
            score = math.log(stop) - (math.log(self._n / self._length.expected) / _SPREAD) ** 2 / 2
            if score > self._best_score:
                self._best, self._best_score = self._n, score

    def _note_pause(self, code: int) -> None:
        """Keeps the first pause after the expected length, for speech that has no clean stop."""
        if not self._pause and self._n >= self._length.expected and code in self._silence():
            self._pause = self._n

    def _sign(self) -> Sign | None:
        n, length = self._n, self._length
        if n < length.expected:
            return None
        if any(run + period >= max(_STUCK, _N_ROUNDS * period) for period, run in enumerate(self._repeats) if run):
            return "loop"
        silence = self._silence()
        if sum(one in silence for one in self._recent) >= _SILENT * _STUCK:
            return "silence"
        if n >= length.late and self._best and n - self._best >= _PASSED:
            return "passed its stop"
        return "length" if n >= length.most else None

    def _keep(self) -> int:
        if self._best:
            return self._best
        return min(self._pause or self._length.late, self._n)
