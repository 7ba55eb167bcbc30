"""What other packages make of our checkpoints: held against quaver, weight by weight and logit by logit.

    make interop                            # builds .venv-interop and runs this on the shipped voice
    python bench/interop.py [--int4 FOLDER] # on an INT4 model of yours, in an environment of constraints/interop.txt

Exits with 1 when a check fails. What is compared with what is told in docs/INTEROP.md.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quaver import awq, export
from quaver.checkpoint import Checkpoint
from quaver.config import ModelConfig, parse, read_json
from quaver.int4 import GROUP, Int4Linear, Int4Weight
from quaver.model.layers import Decoder
from quaver.model.tts import TTS, Model

PACKAGES = ("torch", "transformers", "gptqmodel", "compressed-tensors", "accelerate", "tokenizers")
N_POSITIONS = 64
SEED = 1729


@dataclass(frozen=True, slots=True)
class Check:
    """One question to another package: what was found, and whether it is what it should be."""

    reader: str
    what: str
    found: str
    good: bool


def main() -> int:
    """The command line: runs every check, prints a table, returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--int4", help="an INT4 model; default: the shipped voice, quantized on 8 utterances")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{platform.machine()}, Python {platform.python_version()}; " + "; ".join(map(_version, PACKAGES)), flush=True
    )
    with tempfile.TemporaryDirectory() as folder:
        checks = list(_checks(asked.int4, Path(folder)))
    print("| reader | what | found | |\n|---|---|---|---|")
    for check in checks:
        print(f"| {check.reader} | {check.what} | {check.found} | {'as it should be' if check.good else 'WRONG'} |")
    return 0 if all(check.good for check in checks) else 1


def _version(package: str) -> str:
    return f"{package} {metadata.version(package)}"


def _checks(given: str | None, folder: Path) -> Iterator[Check]:
    if given is None:
        given = str(folder / "int4")
        awq.quantize("tiny", given, awq.Recipe(n_samples=8))
    int4 = Checkpoint.open(given)
    text, packed = folder / "qwen3", folder / "compressed"
    export.export(int4, text, "qwen3")
    export.export(int4, packed, "compressed-tensors")
    exact, plain = (TTS.load(int4, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    yield patterns(int4, exact)
    yield unpacker(int4)
    yield from converter(int4, packed)
    yield from whole_model(int4.path, exact, plain)
    yield from dequantized_model(packed, exact, plain)
    yield from text_model(text, exact, plain)


def patterns(int4: Checkpoint, exact: TTS) -> Check:
    """Whether transformers would convert the talker's linears and no other, by its own rule for names."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    assert int4.config.quantization_config is not None
    kept = list(int4.config.quantization_config.modules_to_not_convert)
    modules = dict(exact.model.named_modules())
    linears = {name for name, module in modules.items() if isinstance(module, nn.Linear | Int4Linear)}
    converted = {name for name in linears if should_convert_module(name, kept)}
    ours = {name for name, module in modules.items() if isinstance(module, Int4Linear)}
    found = f"{len(converted)} of {len(linears)} linears, the talker's {len(ours)}"
    return Check("transformers", "linears that the configuration converts", found, converted == ours)


def unpacker(int4: Checkpoint) -> Check:
    """GPTQModel's own reading of our packed weights, in float32, where nothing is rounded."""
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    modules = [name.removesuffix(".qweight") for name in int4.specs if name.endswith(".qweight")]
    n_equal = 0
    for module in modules:
        stored = [int4.read(f"{module}.{kind}") for kind in ("qweight", "qzeros", "scales")]
        read = dequantize_gemm(stored[0], stored[1], stored[2].float(), 4, GROUP)
        n_equal += _same(read.T, Int4Weight.read(*stored).dequantize())
    found = f"{n_equal} of {len(modules)} weights equal in float32"
    return Check("GPTQModel", "its unpacker on our checkpoint", found, n_equal == len(modules) > 0)


def converter(int4: Checkpoint, packed: Path) -> Iterator[Check]:
    """The AWQ converter of compressed-tensors on our file, and its unpacker on our export."""
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from safetensors.torch import load_file

    reader = "compressed-tensors"
    settings = read_json(int4.path / "config.json")["quantization_config"]
    theirs = AutoAWQConverter.from_autoawq_config(settings).process(dict(int4.tensors()))
    ours = load_file(packed / "model.safetensors")
    equal = theirs.keys() == ours.keys() and all(_same(theirs[name], ours[name]) for name in ours)
    yield Check(reader, "AutoAWQConverter against our export", f"{len(ours)} tensors, bit for bit", equal)
    weights = read_json(packed / "config.json")["quantization_config"]["config_groups"]["group_0"]["weights"]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    n_equal, modules = 0, [name.removesuffix(".weight_packed") for name in ours if name.endswith(".weight_packed")]
    for module in modules:
        parts = {kind: ours[f"{module}.weight_{kind}"] for kind in ("packed", "shape", "zero_point")}
        state = {f"weight_{kind}": value for kind, value in parts.items()}
        # In float32, where nothing is rounded.
        state["weight_scale"] = ours[f"{module}.weight_scale"].float()
        read = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
        stored = Int4Weight.read(*(int4.read(f"{module}.{kind}") for kind in ("qweight", "qzeros", "scales")))
        n_equal += _same(read, stored.dequantize())
    found = f"{n_equal} of {len(modules)} weights equal in float32"
    yield Check(reader, "its unpacker on our export", found, n_equal == len(modules) > 0)


def whole_model(folder: Path, exact: TTS, plain: TTS) -> Iterator[Check]:
    """The AWQ checkpoint through ``from_pretrained``, in a shell of transformers around quaver's modules."""
    reader = "transformers, GPTQModel"
    shell, info = _shell(folder).from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    yield _complete(reader, "whole model, tensors", info)
    yield _converted(reader, "whole model, packed modules", shell, exact)
    yield _talker_logits(reader, exact, plain, shell)


def dequantized_model(folder: Path, exact: TTS, plain: TTS) -> Iterator[Check]:
    """The compressed-tensors export through ``from_pretrained``, its weights unpacked as they are read."""
    from transformers import CompressedTensorsConfig

    reader = "transformers, compressed-tensors"
    unpacked = CompressedTensorsConfig(dequantize=True)
    shell, info = _shell(folder).from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True, quantization_config=unpacked
    )
    yield _complete(reader, "whole model, tensors", info)
    yield _talker_logits(reader, exact, plain, shell)


def _complete(reader: str, what: str, info: Any) -> Check:
    left = {kind: len(info[f"{kind}_keys"]) for kind in ("missing", "unexpected", "mismatched")}
    return Check(reader, what, ", ".join(f"{n} {kind}" for kind, n in left.items()), not any(left.values()))


def _talker_logits(reader: str, exact: TTS, plain: TTS, shell: Any) -> Check:
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(1, N_POSITIONS, exact.config.talker_config.hidden_size, generator=generator) * 0.05

    def logits(talker: Any, dtype: torch.dtype) -> Tensor:
        out: Tensor = talker.codec_head(talker.hidden(x.to(dtype)))
        return out

    return _near(reader, "whole model, talker's logits", logits, exact.talker, plain.talker, shell.talker)


def _shell(folder: Path) -> Any:
    """A class of transformers that holds the modules of the model in ``folder``, plain linears all."""
    from transformers import PretrainedConfig, PreTrainedModel

    settings = {key: value for key, value in read_json(folder / "config.json").items() if key != "quantization_config"}
    modules = parse(ModelConfig, settings, str(folder / "config.json"))

    class ShellConfig(PretrainedConfig):  # type: ignore[misc]
        model_type = "qwen3_tts"

    class Shell(PreTrainedModel):  # type: ignore[misc]
        config_class = ShellConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            model = Model(modules)
            self.talker, self.speaker_encoder = model.talker, model.speaker_encoder
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            """Nothing: a tensor that the file lacks is to be found out, not made up."""

    return Shell


def _converted(reader: str, what: str, model: nn.Module, exact: TTS, prefix: str = "") -> Check:
    """Whether the modules that hold a packed weight are the talker's linears, no more and no fewer."""
    ours = {name for name, module in exact.model.named_modules() if isinstance(module, Int4Linear)}
    packed = {
        f"{prefix}{name}": type(module).__name__ for name, module in model.named_modules() if hasattr(module, "qweight")
    }
    kinds = ", ".join(sorted(set(packed.values()))) or "none"
    return Check(reader, what, f"{len(packed)}: {kinds}", packed.keys() == ours)


def text_model(folder: Path, exact: TTS, plain: TTS) -> Iterator[Check]:
    """The talker as a text model: the usual calls of an AWQ language model, and its logits."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reader = "transformers, GPTQModel"
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    yield _complete(reader, f"qwen3 export, tensors of {type(model).__name__}", info)
    yield _converted(reader, "qwen3 export, packed modules", model, exact, "talker.")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "The ferry leaves at six and the harbour is quiet."
    ids, own = tokenizer(text, return_tensors="pt")["input_ids"], exact.tokenizer.encode(text)
    yield Check(reader, "qwen3 export, token ids", f"{ids.shape[1]} ids", ids[0].tolist() == own)
    made = model.generate(ids, max_new_tokens=8, do_sample=False)
    good = made.shape[1] > ids.shape[1] and torch.equal(made[:, : ids.shape[1]], ids)
    yield Check(reader, "qwen3 export, generate", f"{made.shape[1] - ids.shape[1]} new ids", good)
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]

    def logits(decoder: Any, dtype: torch.dtype) -> Tensor:
        if not isinstance(decoder, Decoder):
            out: Tensor = decoder(ids).logits
            return out
        hidden: Tensor = decoder(table[ids].to(dtype))
        return hidden @ table.T.to(dtype)

    yield _near(reader, "qwen3 export, logits", logits, exact.talker.model, plain.talker.model, model)


@torch.inference_mode()
def _near(
    reader: str, what: str, logits: Callable[[Any, torch.dtype], Tensor], exact: Any, plain: Any, theirs: Any
) -> Check:
    """Theirs in bfloat16 against ours in float32: good when it errs at most twice as much as ours in bfloat16."""
    wanted = logits(exact, torch.float32)
    dtype = next(parameter.dtype for parameter in theirs.parameters() if parameter.is_floating_point())
    made = {name: logits(model, kind) for name, model, kind in (("own", plain, torch.bfloat16), ("", theirs, dtype))}
    errors = {name: float((one.float() - wanted).norm() / wanted.norm()) for name, one in made.items()}
    same = float((made[""].argmax(-1) == wanted.argmax(-1)).float().mean())
    found = (
        f"{100 * errors['']:.3f} % from quaver's in float32 (quaver's own bfloat16: {100 * errors['own']:.3f} %), "
        f"likeliest the same at {100 * same:.0f} % of {wanted.shape[1]} positions"
    )
    return Check(reader, what, found, errors[""] <= 2 * errors["own"])


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


if __name__ == "__main__":
    sys.exit(main())
