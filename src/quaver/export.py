"""An INT4 checkpoint in the formats of other runtimes, the same weights bit for bit.

``compressed-tensors`` is the whole model with its INT4 weights in the pack-quantized layout of that package, which is
vLLM's own. ``qwen3`` is the talker's decoder alone, as a stock ``Qwen3ForCausalLM`` in AWQ: whatever loads an AWQ
language model loads it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from quaver import awq
from quaver.checkpoint import WEIGHTS, Checkpoint, Edit, read_specs, write_tensors
from quaver.corpus import Progress
from quaver.errors import CheckpointError, RecipeError
from quaver.files import check_new, new_folder, sync
from quaver.int4 import GROUP, IN_TURN, pack, unpack
from quaver.model.homes import LAYERS
from quaver.model.talker import TextProjection
from quaver.model.tts import shapes
from quaver.provenance import PROVENANCE, Provenance, Step
from quaver.recipe import readers

Format = Literal["compressed-tensors", "qwen3"]

HEAD_WARNING = (
    "the head is the text embedding, tied: this model was never trained to predict text, so what it generates is no "
    "language; it is for loading, timing and comparing, and as a start for training"
)
"""What the head of a ``qwen3`` export is and is not."""

_TEXT, _PROJECTION = "talker.model.text_embedding.weight", "talker.text_projection"
_TOKENIZER = (
    "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip
_ROWS = 2048
_N_POSITIONS = 32768


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written: the format, the INT4 linears in it, the bytes of its tensors, and what to beware of."""

    format: Format
    n_linears: int
    tensor_bytes: int
    warning: str | None

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return asdict(self)

    @property
    def summary(self) -> str:
        """One line for a person."""
        return f"{self.format}, {self.n_linears} linears in INT4, {self.tensor_bytes / 1e6:.1f} MB of tensors"


def export(
    source: str | Path | Checkpoint, out: str | Path, form: Format, *, progress: Progress | None = None
) -> ExportReport:
    """Writes the INT4 checkpoint ``source`` in the format ``form`` to the new folder ``out``, and reports.

    One tensor is in memory at a time. Raises CheckpointError, before anything is written, for a model that is not
    quantized or whose tensors are not those of its configuration; RecipeError when ``out`` exists or the checkpoint has
    edits that are not saved. Whatever is interrupted leaves nothing behind.
    """
    out = check_new(out)
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.open(source)
    _check(checkpoint)
    if form == "qwen3":
        _write_qwen3(checkpoint, out, progress)
    else:
        step = Step("export", {"format": form})
        settings = {**checkpoint.settings, "quantization_config": compressed_settings()}
        # Not through `edit`: it would read the settings back as those of a model that quaver runs.
        replace(checkpoint, settings=settings, edits=((step, compressed),)).write(out)
    specs = read_specs(out, Provenance.read(out))
    return ExportReport(
        format=form,
        n_linears=sum(name.endswith(".qweight") for name in shapes(checkpoint.config)),
        tensor_bytes=sum(spec.n_bytes for spec in specs.values()),
        warning=HEAD_WARNING if form == "qwen3" else None,
    )


def _check(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError or RecipeError unless the checkpoint is a whole INT4 model, judged by its headers."""
    if checkpoint.edits:
        raise RecipeError(f"{checkpoint.path}: edits are not saved yet: save the model, then export what was saved")
    if checkpoint.config.quantization_config is None:
        raise CheckpointError(
            f"{checkpoint.path} is not quantized, and only INT4 is exported: make it INT4 first with quaver quantize"
        )
    if readers(checkpoint.config) is not None:
        raise CheckpointError(
            f"{checkpoint.path} is stored by a recipe, and the export formats know a talker in INT4 and all else "
            "unquantized: export what quaver quantize writes without profile, recipe and budget"
        )
    wanted = shapes(checkpoint.config)
    if wrong := wanted.keys() ^ checkpoint.specs.keys():
        name = min(wrong)
        how = "missing" if name in wanted else "left over: this architecture has none of that name"
        raise CheckpointError(f"{checkpoint.path}: tensor {name} is {how}")
    for name, shape in wanted.items():
        found = checkpoint.specs[name].shape
        if found != shape:
            raise CheckpointError(f"{checkpoint.path}: tensor {name} has shape {found}, the configuration says {shape}")


def compressed(name: str, tensor: Tensor) -> Mapping[str, Tensor]:
    """What stands for one tensor of an AWQ checkpoint in compressed-tensors' pack-quantized layout.

    ``weight_packed`` [out, in / 8] int32 holds eight neighbouring inputs a word, lowest nibble first,
    ``weight_zero_point`` [out / 8, in / 128] int32 eight neighbouring outputs; ``weight_scale`` is [out, in / 128]
    float16, ``weight_shape`` [2] int64. A nibble is the signed value plus 8, so that q and z stay as they are. Source:
    compressed-tensors 0.20.
    """
    module, _, kind = name.rpartition(".")
    if kind == "qweight":
        values = unpack(tensor).T.contiguous()
        return {f"{module}.weight_packed": pack(values, IN_TURN), f"{module}.weight_shape": torch.tensor(values.shape)}
    if kind == "qzeros":
        return {f"{module}.weight_zero_point": pack(unpack(tensor), IN_TURN).T.contiguous()}
    if kind == "scales":
        return {f"{module}.weight_scale": tensor.T.contiguous()}
    return {name: tensor}


def compressed_settings() -> dict[str, Any]:
    """``quantization_config`` of the compressed-tensors export."""
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": GROUP}
    # By its last name, wherever a runtime hangs the module: some leave "talker." out.
    kept = [f"re:.*{prefix.rpartition('.')[2]}.*" for prefix in awq.KEPT]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head", *kept],
    }


def qwen3_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """``config.json`` of the talker's decoder as a Qwen3 language model.

    The talker's multimodal rotary positions become plain ones: its three axes always carry one position.
    """
    talker = checkpoint.config.talker_config
    own: Mapping[str, Any] = checkpoint.settings["talker_config"]
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": talker.hidden_size,
        "intermediate_size": talker.intermediate_size,
        "num_hidden_layers": talker.num_hidden_layers,
        "num_attention_heads": talker.num_attention_heads,
        "num_key_value_heads": talker.num_key_value_heads,
        "head_dim": talker.head_dim,
        "vocab_size": talker.text_vocab_size,
        "max_position_embeddings": own.get("max_position_embeddings", _N_POSITIONS),
        "rms_norm_eps": talker.rms_norm_eps,
        "rope_theta": talker.rope_theta,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": checkpoint.config.im_end_token_id,
        "pad_token_id": checkpoint.config.im_end_token_id,
        "dtype": str(checkpoint.specs[_TEXT].dtype).removeprefix("torch."),
        "quantization_config": {**awq.settings(), "modules_to_not_convert": ["lm_head"]},
    }


def _write_qwen3(checkpoint: Checkpoint, out: Path, progress: Progress | None) -> None:
    step = Step("export", {"format": "qwen3"}, parents=checkpoint.origins())
    text = replace(checkpoint, edits=((step, _qwen3_edit(checkpoint, progress)),))
    settings = qwen3_settings(checkpoint)
    end = checkpoint.config.im_end_token_id
    with new_folder(out) as aside:
        write_tensors(aside / WEIGHTS, text.tensors(), len(text.specs))
        sync(aside / WEIGHTS)
        for source in (checkpoint.path / name for name in _TOKENIZER):
            if source.exists():
                shutil.copyfile(source, aside / source.name)
        files = {
            "config.json": _json(settings),
            "generation_config.json": _json({"do_sample": False, "eos_token_id": end, "pad_token_id": end}),
            "README.md": _card(checkpoint),
        }
        for name, content in files.items():
            (aside / name).write_text(content, encoding="utf-8")
        provenance = Provenance.of(aside, (*checkpoint.provenance.steps, step))
        (aside / PROVENANCE).write_text(provenance.to_json(), encoding="utf-8")


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"


def _qwen3_edit(checkpoint: Checkpoint, progress: Progress | None) -> Edit:
    """Keeps the decoder under a language model's names; the projected text embedding is its input and its head."""
    talker = checkpoint.config.talker_config
    projection = TextProjection(talker.text_hidden_size, talker.hidden_size).float()
    projection.load_state_dict({name: checkpoint.read(f"{_PROJECTION}.{name}") for name in projection.state_dict()})

    def edit(name: str, tensor: Tensor) -> Mapping[str, Tensor]:
        if name.startswith(f"{LAYERS}.") or name == "talker.model.norm.weight":
            return {name.removeprefix("talker."): tensor}
        if name == _TEXT:
            return {"model.embed_tokens.weight": _projected(tensor, projection, progress)}
        return {}

    return edit


@torch.inference_mode()
def _projected(table: Tensor, projection: TextProjection, progress: Progress | None) -> Tensor:
    """Every row of the text embedding ``table`` [V, E] through the projection [V, D]: in float32, rounded once."""
    parts = []
    for start in range(0, len(table), _ROWS):
        parts.append(projection(table[start : start + _ROWS].float()).to(table.dtype))
        if progress:
            progress("projecting text embeddings", min(start + _ROWS, len(table)), len(table))
    return torch.cat(parts)


def _card(checkpoint: Checkpoint) -> str:
    talker = checkpoint.config.talker_config
    kind = f"{checkpoint.config.tts_model_type} {checkpoint.config.tts_model_size}"
    n_layers, text_size, size = talker.num_hidden_layers, talker.text_hidden_size, talker.hidden_size
    return f"""---
library_name: transformers
tags: [awq, int4, qwen3]
---
# The talker of {checkpoint.path.resolve().name} as a Qwen3 language model, AWQ INT4

**This is not a language model that can write.** It is the decoder of a speech model (Qwen3-TTS, {kind}) in the shape of
a stock `Qwen3ForCausalLM`, so that runtimes for AWQ text models load it, time it and compare their kernels on it.

- **The head was never trained.** It is the input embedding, tied. The model learned to predict speech codes through a
  head that is not here, never text: what `generate` returns is no language.
- **The embedding is computed.** The talker reads a text token as `text_projection(text_embedding)`: {text_size} values
  become {size} through two layers. `model.embed_tokens.weight` holds that for every token, row by row, computed in
  float32 and rounded once to the stored type.
- **Rotary positions are plain.** The talker's three multimodal axes always carry the same position, which is plain
  rotary embedding.
- **The layers are the INT4 checkpoint's, bit for bit**: {n_layers} of them, {7 * n_layers} linears, groups of {GROUP},
  zero points, GEMM layout, scales that float16 and bfloat16 both hold exactly. The codec, the code predictor, the codec
  embeddings and head and the speaker encoder are left out.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
model.generate(**tokenizer("The ferry leaves at six.", return_tensors="pt"), max_new_tokens=8)
```

Its licence is that of the model it was made from. `{PROVENANCE}` tells how it came to be.
"""
