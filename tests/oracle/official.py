"""The official model, filled with the weights of a checkpoint of ours."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from quaver.checkpoint import Checkpoint
from quaver.config import read_json


def module() -> Any:
    """The official modelling module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from qwen_tts.core.models import modeling_qwen3_tts

    return modeling_qwen3_tts


def config(settings: dict[str, Any]) -> Any:
    """The official configuration object of a config.json."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from qwen_tts.core.models import Qwen3TTSConfig

    return Qwen3TTSConfig(**settings)


def model(folder: Path) -> Any:
    """The official model in float32 with the weights of the checkpoint ``folder``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built = module().Qwen3TTSForConditionalGeneration(config(read_json(folder / "config.json"))).eval()
        built.load_state_dict({name: tensor.float() for name, tensor in Checkpoint.open(folder).tensors()}, strict=True)
    return built


def tokenizer(folder: Path) -> Any:
    """The official text tokenizer of ``folder``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import Qwen2TokenizerFast

        return Qwen2TokenizerFast.from_pretrained(folder)


def ids(folder: Path, text: str) -> torch.Tensor:
    """The ids [1, S] that the official tokenizer gives to ``text``."""
    return torch.tensor([tokenizer(folder)(text)["input_ids"]])
