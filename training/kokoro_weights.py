"""Kokoro-82M's weights: out of the published ONNX file, and small enough to travel."""

from __future__ import annotations

import json
import lzma
import math
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from training.kokoro_model import Kokoro, SnakeBlock

_ONNX_PATHS: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"^bert\.word$", "encoder/bert/embeddings/word_embeddings"),
    (r"^bert\.place$", "encoder/bert/embeddings/position_embeddings"),
    (r"^bert\.norm_in$", "encoder/bert/embeddings/LayerNorm"),
    (r"^bert\.widen$", "encoder/bert/encoder/embedding_hidden_mapping_in"),
    (r"^bert\.(query|key|value)$", r"encoder/bert/LAYER/attention/\1"),
    (r"^bert\.merge$", "encoder/bert/LAYER/attention/dense"),
    (r"^bert\.norm_attention$", "encoder/bert/LAYER/attention/LayerNorm"),
    (r"^bert\.up$", "encoder/bert/LAYER/ffn"),
    (r"^bert\.down$", "encoder/bert/LAYER/ffn_output"),
    (r"^bert\.norm_out$", "encoder/bert/LAYER/full_layer_layer_norm"),
    ("LAYER", "encoder/albert_layer_groups.0/albert_layers.0"),
    (r"^narrow$", "encoder/bert_encoder"),
    (r"^prosody\.lstms\.(\d)$", lambda m: f"encoder/predictor/text_encoder/lstms.{2 * int(m[1])}"),
    (r"^prosody\.norms\.(\d)$", lambda m: f"encoder/predictor/text_encoder/lstms.{2 * int(m[1]) + 1}/fc"),
    (r"^prosody\.lstm$", "encoder/predictor/lstm"),
    (r"^prosody\.shared$", "encoder/shared"),
    (r"^prosody\.duration$", "encoder/predictor/duration_proj/linear_layer"),
    (r"^prosody\.pitch", "encoder/F0"),
    (r"^prosody\.energy", "encoder/N"),
    (r"^encoder/(F0|N)_out$", r"encoder/\1_proj"),
    (r"^text\.(embedding|lstm)$", r"encoder/text_encoder/\1"),
    (r"^text\.convs\.(\d)$", r"encoder/text_encoder/cnn.\1/cnn.\1.0"),
    (r"^text\.norms\.(\d)$", r"encoder/text_encoder/cnn.\1/cnn.\1.1"),
    (r"^decoder\.pitch$", "decoder/decoder/F0_conv"),
    (r"^decoder\.energy$", "decoder/decoder/N_conv"),
    (r"^decoder\.text$", "decoder/decoder/asr_res/asr_res.0"),
    (r"^decoder\.generator\.", "decoder/decoder/generator/"),
    (r"^decoder\.", "decoder/decoder/"),
    (r"generator/source$", "generator/m_source/l_linear"),
    (r"generator/post$", "generator/conv_post"),
    (r"generator/noise_blocks", "generator/noise_res"),
    (r"generator/blocks", "generator/resblocks"),
    (r"\.norms([12])\.(\d)", r"/adain\1.\2"),
    (r"\.(fc|shortcut|pool|norm[12]|conv[12]|convs[12])\b", r"/\1"),
    ("shortcut", "conv1x1"),
)
"""Rules that lead, one after the other, from a module's name to the path of its node in the published ONNX file."""


def from_onnx(file: Path) -> dict[str, Tensor]:
    """Kokoro's weights under the names of :class:`Kokoro`. Raises KeyError when the graph is another one."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(file)).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    nodes = {node.name: node for node in graph.node}

    def given(node: str, count: int | None = None) -> list[Tensor]:
        inputs = [name for name in nodes[f"/{node}"].input if name in tensors][:count]
        return [torch.from_numpy(numpy_helper.to_array(tensors[name]).copy()) for name in inputs]

    found: dict[str, Tensor] = {}
    for name, module in Kokoro().named_modules():
        path = name
        for pattern, replacement in _ONNX_PATHS:
            path = re.sub(pattern, replacement, path)
        if isinstance(module, nn.LSTM):
            weight, recurrent, bias = given(f"{path}/LSTM", 3)
            for i, end in enumerate(("", "_reverse")):
                parts = (weight[i], recurrent[i], *bias[i].chunk(2))
                for kind, part in zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), parts, strict=True):
                    # The gates come as input, output, forget, cell and are wanted as input, forget, cell, output.
                    gates = part.chunk(4)
                    found[f"{name}.{kind}_l0{end}"] = torch.cat([gates[0], gates[2], gates[3], gates[1]])
        elif isinstance(module, nn.Linear):
            if f"/{path}/Gemm" in nodes:
                weight, bias = given(f"{path}/Gemm")
            else:
                (weight,), (bias,) = given(f"{path}/MatMul"), given(f"{path}/Add")
                weight = weight.T.contiguous()
            found[f"{name}.weight"], found[f"{name}.bias"] = weight, bias
        elif isinstance(module, nn.Conv1d | nn.ConvTranspose1d | nn.LayerNorm | nn.Embedding):
            kinds = {nn.LayerNorm: "LayerNormalization", nn.Embedding: "Gather"}
            values = given(f"{path}/{kinds.get(type(module), type(module).__name__.removesuffix('1d'))}")
            found.update(zip((f"{name}.weight", f"{name}.bias"), values, strict=False))
        elif isinstance(module, SnakeBlock):
            for number in "12":
                names = [f"{path.replace('/', '.')}.alpha{number}.{k}" for k in range(3)]
                alphas = [torch.from_numpy(numpy_helper.to_array(tensors[n]).copy()).reshape(-1) for n in names]
                found[f"{name}.alphas{number}"] = torch.stack(alphas)
    # Every token is of the first of two types.
    found["bert.place.weight"] += given("encoder/bert/embeddings/token_type_embeddings/Gather")[0][0]
    Kokoro().load_state_dict(found)
    return found


_STEPS = ((r"^decoder\.(encode|decode)\..*conv|^decoder\.(encode|decode).*shortcut", 0.30), (r"^decoder\.", 0.24))
"""Quantization steps, in standard deviations of an output channel, of the weights that stand the most."""
_FINE = 0.12
"""The step of all others: durations and pitch are heard at once when they are wrong."""
_SMALLEST = 4096
"""Tensors of fewer elements are kept as float16."""
_FILTERS: list[dict[str, int]] = [
    {"id": lzma.FILTER_LZMA2, "mode": lzma.MODE_NORMAL, "mf": lzma.MF_HC4, "dict_size": 4096, "lc": 0, "pb": 0}
]
"""The integers are independent draws: only their frequencies can be used, not what went before. The fast mode would
take chance repetitions, which cost more than they save."""


def pack(weights: dict[str, Tensor], files: list[Path]) -> None:
    """Writes ``weights`` as ``files``, about equally large: integers and a float16 scale for each output channel."""
    sizes, parts = [0.0] * len(files), [list[str]() for _ in files]

    def step(name: str) -> float:
        return next((s for pattern, s in _STEPS if re.search(pattern, name)), _FINE)

    for name in sorted(weights, key=lambda n: -weights[n].numel()):
        part = sizes.index(min(sizes))
        sizes[part] += weights[name].numel() * (2.05 - math.log2(step(name)))
        parts[part].append(name)
    for file, names in zip(files, parts, strict=True):
        # Those of one step follow each other: they share their frequencies.
        heads, scales, integers = list[tuple[str, list[int]]](), list[bytes](), list[bytes]()
        for name in sorted(names, key=step):
            values = weights[name].float()
            heads.append((name, list(values.shape)))
            if values.numel() < _SMALLEST:
                scales.append(values.half().numpy().tobytes())
                continue
            flat = values.reshape(values.shape[0], -1)
            scale = torch.maximum(flat.std(1) * step(name), flat.abs().amax(1) / 127).clamp(min=1e-7).half()
            scales.append(scale.numpy().tobytes())
            integers.append((flat / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8).numpy().tobytes())
        blocks = [json.dumps(heads).encode(), b"".join(scales)]
        blocks.append(lzma.compress(b"".join(integers), lzma.FORMAT_RAW, filters=_FILTERS))
        file.write_bytes(b"".join(len(block).to_bytes(4, "little") + block for block in blocks))


def unpack(file: Path) -> dict[str, Tensor]:
    """The weights in one file of :func:`pack`, float32."""
    data, blocks = file.read_bytes(), list[bytes]()
    while data:
        end = 4 + int.from_bytes(data[:4], "little")
        blocks.append(data[4:end])
        data = data[end:]
    halves = torch.frombuffer(bytearray(blocks[1]), dtype=torch.float16).float()
    unpacked = lzma.decompress(blocks[2], lzma.FORMAT_RAW, filters=_FILTERS)
    integers = torch.frombuffer(bytearray(unpacked), dtype=torch.int8)
    found, at, place = dict[str, Tensor](), 0, 0
    for name, shape in json.loads(blocks[0]):
        count = math.prod(shape)
        width = count if count < _SMALLEST else shape[0]
        scale, at = halves[at : at + width], at + width
        if count < _SMALLEST:
            found[name] = scale.reshape(shape)
            continue
        values, place = integers[place : place + count].reshape(shape[0], -1), place + count
        found[name] = (values * scale[:, None]).reshape(shape)
    return found


def load(files: list[Path]) -> Kokoro:
    """The model with the weights of a .safetensors file, or of all files of :func:`pack`."""
    with ThreadPoolExecutor(len(files)) as side_by_side:
        parts = side_by_side.map(lambda f: load_file(f) if f.suffix == ".safetensors" else unpack(f), files)
    model = Kokoro()
    model.load_state_dict({name: value for part in parts for name, value in part.items()})
    return model
