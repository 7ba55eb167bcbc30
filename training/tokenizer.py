"""The small voice's text tokenizer: a byte-level BPE learned from the training sentences, in Qwen2's files.

python -m training.tokenizer --texts .data/texts.jsonl --out VOICE_FOLDER
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer

from quaver import text
from quaver.text import QWEN2_SPLIT

N_LEARNED = 700
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tts_pad>", "<tts_text_bos>", "<tts_text_eod>")
_ROLES = ("assistant", "user")
"""Each role must be one token: the official code cuts fixed numbers of ids off a prompt."""


def learn(texts: list[str]) -> Tokenizer:
    """A BPE of N_LEARNED tokens from ``texts``, the role words among them."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = NFC()
    split = Split(Regex(QWEN2_SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = BpeTrainer(vocab_size=N_LEARNED, initial_alphabet=sorted(ByteLevel.alphabet()), show_progress=False)
    tokenizer.train_from_iterator([*texts, *(role for role in _ROLES for _ in range(100_000))], trainer)
    return tokenizer


def write(tokenizer: Tokenizer, folder: Path) -> dict[str, int]:
    """Writes vocab.json, merges.txt and tokenizer_config.json; returns the ids of SPECIAL."""
    model = json.loads(tokenizer.to_str())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    ids = {token: len(model["vocab"]) + i for i, token in enumerate(SPECIAL)}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings = {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(i): {"content": token, **flags} for token, i in ids.items()},
        "additional_special_tokens": list(SPECIAL[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False) + "\n", "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return ids


def spelled(tokenizer: text.Tokenizer, texts: list[str], n: int = 4, dropout: float = 0.1) -> list[list[list[int]]]:
    """The ids of each text, as it will be read and in ``n`` - 1 other spellings, merges left out at random.

    A rare word is read by its pieces: the model must know them from more words than those they come from unbroken
    (BPE-dropout, Provilkov et al. 2020).
    """
    backend = tokenizer._backend
    model = backend.model
    found = [[e.ids] for e in backend.encode_batch(texts)]
    model.dropout = dropout
    try:
        for _ in range(n - 1):
            for variants, encoded in zip(found, backend.encode_batch(texts), strict=True):
                variants.append(encoded.ids)
    finally:
        model.dropout = None
    return found


def main() -> None:
    """Learns and writes the tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    texts = [json.loads(line)["text"] for line in args.texts.read_text("utf-8").splitlines()]
    tokenizer = learn(texts)
    print(write(tokenizer, args.out))
    n_ids = sum(len(e.ids) for e in tokenizer.encode_batch(texts))
    print(f"{sum(map(len, texts)) / n_ids:.2f} characters an id")


if __name__ == "__main__":
    main()
