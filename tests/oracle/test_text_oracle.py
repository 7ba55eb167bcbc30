"""Token ids against transformers' Qwen2 tokenizer, on a vocabulary trained here in its file format."""

import json
from pathlib import Path

import pytest

from quaver.text import QWEN2_SPLIT, Tokenizer

pytestmark = pytest.mark.oracle

TEXTS = [
    "Hello world, it's 3.14 o'clock; they'd've said I'M HERE'S.",
    "  leading and trailing   spaces \t tabs\n\n\nand lines \r\n end  ",
    "Straße, naïve café — “quotes” … ½ ² ﬁ Å Å é ñ",
    "这是第一句。价格是3.14元！",
    "今日は、「東京」へ行きます。ガギグ",
    "안녕하세요 여러분 각",
    "Привет, мир! Ёлка ёжик №5",
    "¿Qué tal? ¡Olé! Ação, não. C'est l'été.",
    "🙂👩‍👩‍👧 🇩🇪 ☕️ \u200b zero\u00a0width\u202f!",
    "<|im_start|>assistant\nHi<|im_end|>\n<|im_start|>assistant\n",
    "snake_case CamelCase HTML5 x=y**2 // a/b\\c #tag @me user@example.com https://example.com/?q=1",
    "",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Regex
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
    from tokenizers.trainers import BpeTrainer

    out = tmp_path_factory.mktemp("tokenizer")
    backend = Backend(BPE())
    byte_level = ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = Sequence([Split(Regex(QWEN2_SPLIT), behavior="isolated"), byte_level])
    trainer = BpeTrainer(vocab_size=700, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    backend.train_from_iterator(TEXTS * 3 + ["assistant\nuser\n"] * 50, trainer)
    backend.model.save(str(out))
    n_base = backend.get_vocab_size()
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    contents = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tts_pad>", "<think>")
    added = {
        str(n_base + i): {"content": content, "special": content != "<think>", **plain}
        for i, content in enumerate(contents)
    }
    settings = {"added_tokens_decoder": added, "tokenizer_class": "Qwen2Tokenizer", "model_max_length": 131072}
    (out / "tokenizer_config.json").write_text(json.dumps(settings))
    return out


def test_ids_are_qwen2s(folder: Path) -> None:
    from transformers import Qwen2TokenizerFast

    official = Qwen2TokenizerFast.from_pretrained(folder)
    ours = Tokenizer.load(folder)
    for text in [*TEXTS, " ".join(TEXTS), "a <think> b <tts_pad>"]:
        assert ours.encode(text) == official(text)["input_ids"], text
    assert ours.size == len(official)


def test_template_is_the_official_one(folder: Path) -> None:
    from qwen_tts.inference.qwen3_tts_model import Qwen3TTSModel
    from transformers import Qwen2TokenizerFast

    official = Qwen2TokenizerFast.from_pretrained(folder)
    ours = Tokenizer.load(folder)
    wrapper = Qwen3TTSModel.__new__(Qwen3TTSModel)
    for text in (text for text in TEXTS if "<|" not in text):
        assert ours.ids_speech(text) == official(wrapper._build_assistant_text(text))["input_ids"]
        assert ours.ids_reference(text) == official(wrapper._build_ref_text(text))["input_ids"]
        assert ours.ids_instruct(text) == official(wrapper._build_instruct_text(text))["input_ids"]
