"""Pruning by script keeps every id that text of the languages can need, and drops what it cannot."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from quaver.checkpoint import Checkpoint
from quaver.errors import RecipeError
from quaver.scripts import SCRIPTS, kept_ids, writes
from quaver.text import Tokenizer

TEXTS = (
    "The ferry leaves at six — “quiet”, 5 €. ",
    "Übergröße, naïve façade, señor 1ª, çà et là, cœur. ",
    "Привет, как дела? Москва, ёлка. ",
    "你好，世界。我们去北京。",
    "おはようございます。カタカナのテスト、東京。",
    "안녕하세요. 서울입니다. ",
)


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE that was trained on six scripts, so that many of its tokens are of one of them."""
    backend = Backend(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(vocab_size=700, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    backend.train_from_iterator([text * 20 for text in (*TEXTS, "assistant user ")], trainer)
    model = json.loads(backend.to_str())["model"]
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    top = max(model["vocab"].values())
    added = {top + 1: {"content": "<|im_start|>", "special": True}, top + 2: {"content": "<|im_end|>", "special": True}}
    return Tokenizer(model["vocab"], merges, added)


def test_spellings_are_the_bytes_that_encode_reads(tokenizer):
    spellings = tokenizer.spellings()
    for text in TEXTS:
        assert b"".join(spellings[index] for index in tokenizer.encode(text)) == text.encode()
    assert spellings[tokenizer.id_of("<|im_end|>")] is None
    assert sorted(s for s in spellings.values() if s is not None and len(s) == 1) == [bytes([b]) for b in range(256)]


@pytest.mark.parametrize(
    ("language", "own", "foreign"),
    [
        ("english", TEXTS[0], TEXTS[3]),
        ("german", TEXTS[1], TEXTS[2]),
        ("russian", TEXTS[2] + TEXTS[0], TEXTS[4]),
        ("chinese", TEXTS[3] + TEXTS[0], TEXTS[5]),
        ("japanese", TEXTS[4] + TEXTS[0], TEXTS[5]),
        ("korean", TEXTS[5] + TEXTS[0], TEXTS[3]),
    ],
)
def test_own_text_keeps_its_ids_and_foreign_text_loses_some(tokenizer, language, own, foreign):
    kept = set(kept_ids(tokenizer.spellings(), [language]))
    assert set(tokenizer.encode(own)) <= kept
    assert not set(tokenizer.encode(foreign)) <= kept
    # Every byte, every added token and the chat template stay whatever the language.
    assert {index for index, s in tokenizer.spellings().items() if s is None or len(s) == 1} <= kept
    assert set(tokenizer.ids_speech("a")) <= kept


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=40), st.sampled_from(sorted(SCRIPTS)))
def test_text_in_the_scripts_of_a_language_never_meets_a_pruned_id(tokenizer, text, language):
    spoken = "".join(character for character in text if writes(character, [language]))
    # The tokenizer composes characters before it looks for tokens.
    kept = set(kept_ids(tokenizer.spellings(), [language]))
    assert set(tokenizer.encode(spoken)) <= kept


def test_two_languages_keep_both(tokenizer):
    spellings = tokenizer.spellings()
    both = set(kept_ids(spellings, ["english", "russian"]))
    assert both == set(kept_ids(spellings, ["russian"])) | set(kept_ids(spellings, ["english"]))


def test_every_language_of_the_published_models_is_known_and_others_are_refused():
    published = {"chinese", "english", "german", "italian", "portuguese", "spanish", "japanese", "korean", "french",
                 "russian"}  # fmt: skip
    assert set(SCRIPTS) == published
    with pytest.raises(RecipeError, match="'klingon' is unknown"):
        kept_ids({0: b"a"}, ["klingon"])


def test_the_shipped_voice_keeps_all_that_it_can_be_asked():
    tokenizer = Tokenizer.load(Checkpoint.open("tiny").path)
    assert kept_ids(tokenizer.spellings(), ["english"]) == sorted(tokenizer.spellings())
