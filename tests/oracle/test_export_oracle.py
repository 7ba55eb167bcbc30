"""The exported text model in the stock Qwen3 of the transformers library, and the rotary positions it rests on."""

from __future__ import annotations

import json
import warnings

import official
import pytest
import torch
from safetensors.torch import load_file

import toy
from quaver import export
from quaver.int4 import Int4Weight
from quaver.model.layers import Rotary
from quaver.model.tts import TTS

pytestmark = pytest.mark.oracle


@pytest.mark.parametrize("sections", [(24, 20, 20), (12, 10, 10)])
def test_equal_axes_make_the_official_multimodal_rotary_plain(sections):
    head_dim, n = 2 * sum(sections), 40
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 4, n, head_dim, generator=generator)
    plain = Rotary.at(torch.arange(n)[None], head_dim, 1e6, torch.float32)
    cos, sin = (table[0].expand(3, 1, n, head_dim) for table in (plain.cos, plain.sin))
    theirs = official.module().apply_multimodal_rotary_pos_emb(q, k, cos, sin, list(sections), True)
    for ours, other in zip((plain.turn(q), plain.turn(k)), theirs, strict=True):
        assert torch.equal(ours, other)


@pytest.mark.parametrize("source", ["toy", "tiny"])
def test_a_stock_text_model_computes_what_the_talker_does(source, toy_folder, tmp_path):
    small = toy.rounded(toy_folder if source == "toy" else "tiny", tmp_path / "int4")
    export.export(small, tmp_path / "out", "qwen3")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    settings.pop("quantization_config")
    weights = {}
    for name, tensor in stored.items():
        module, _, kind = name.rpartition(".")
        if kind == "qweight":
            parts = (tensor, stored[f"{module}.qzeros"], stored[f"{module}.scales"])
            weights[f"{module}.weight"] = Int4Weight.read(*parts).dequantize()
        elif kind not in ("qzeros", "scales"):
            weights[name] = tensor.float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import Qwen3Config, Qwen3ForCausalLM

        stock = Qwen3ForCausalLM(Qwen3Config(**settings)).eval().float()
    missing, unexpected = stock.load_state_dict(weights, strict=False)
    assert missing == ["lm_head.weight"]
    assert unexpected == []
    stock.tie_weights()
    ids = torch.randint(0, settings["vocab_size"], (2, 37), generator=torch.Generator().manual_seed(1))
    table = weights["model.embed_tokens.weight"]
    with torch.inference_mode():
        theirs = stock(ids).logits
        ours = TTS.load(small, dtype=torch.float32).talker.hidden(table[ids]) @ table.T
        embedded = TTS.load(small, dtype=torch.float32).talker.embed_text(ids)
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    assert (embedded - table[ids]).abs().max() <= 2**-8 * embedded.abs().max()
