"""What a model weighs: each module's parameters, types and bytes, read from the files' headers alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from quaver.checkpoint import Checkpoint, Spec
from quaver.model.filling import PACKED_SUFFIXES
from quaver.model.homes import memory_bytes

_PARTS: tuple[tuple[str, str], ...] = (
    ("talker.code_predictor.model.layers.", "predictor layers"),
    ("talker.code_predictor.model.codec_embedding.", "predictor embeddings"),
    ("talker.code_predictor.lm_head.", "predictor heads"),
    ("talker.code_predictor.", "predictor projection, norm"),
    ("talker.model.layers.", "talker layers"),
    ("talker.model.text_embedding.", "text embedding"),
    ("talker.text_projection.", "text projection"),
    ("talker.model.codec_embedding.", "codec embedding"),
    ("talker.codec_head.", "codec head"),
    ("talker.", "talker norm"),
    ("speaker_encoder.", "speaker encoder"),
    ("decoder.", "codec decoder"),
    ("encoder.", "codec encoder"),
)
"""Module prefixes and their names, the most specific first."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One module: its parameters (a packed weight counts the weights it stands for), types, and bytes."""

    name: str
    n_parameters: int
    dtypes: tuple[str, ...]
    disk_bytes: int
    memory_bytes: int
    quantized: str


@dataclass(frozen=True, slots=True)
class Ledger:
    """All modules of a checkpoint; file headers and the alignment of files come on top of ``disk_bytes``."""

    model: str
    kind: str
    entries: tuple[Entry, ...]
    file_bytes: int

    @property
    def total(self) -> Entry:
        """The sum of the entries."""
        return total(self.entries)

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return {**asdict(self), "total": asdict(self.total)}


def weigh(checkpoint: Checkpoint, *, device: str = "cpu") -> Ledger:
    """The ledger of ``checkpoint``; memory is what its weights take when loaded on ``device`` by default."""
    in_memory = memory_bytes(checkpoint.specs, checkpoint.codec_specs, device)
    files = {spec.file for specs in (checkpoint.specs, checkpoint.codec_specs) for spec in specs.values()}
    return Ledger(
        model=checkpoint.path.name,
        kind=f"{checkpoint.config.tts_model_type} {checkpoint.config.tts_model_size}",
        entries=entries(checkpoint.specs, checkpoint.codec_specs, in_memory),
        file_bytes=sum(file.stat().st_size for file in files),
    )


def entries(
    specs: Mapping[str, Spec], codec_specs: Mapping[str, Spec], in_memory: Mapping[str, int]
) -> tuple[Entry, ...]:
    """The modules of a model and its codec, in their order; ``in_memory`` is the memory of each tensor by name."""
    groups: dict[str, dict[str, Spec]] = {}
    for name, spec in (*specs.items(), *codec_specs.items()):
        part = next((label for prefix, label in _PARTS if name.startswith(prefix)), "other")
        groups.setdefault(part, {})[name] = spec
    order = [label for _, label in _PARTS] + ["other"]
    return tuple(_entry(label, groups[label], in_memory) for label in order if label in groups)


def total(entries: Sequence[Entry]) -> Entry:
    """The sum of ``entries``."""
    return Entry(
        name="total",
        n_parameters=sum(entry.n_parameters for entry in entries),
        dtypes=tuple(sorted({dtype for entry in entries for dtype in entry.dtypes})),
        disk_bytes=sum(entry.disk_bytes for entry in entries),
        memory_bytes=sum(entry.memory_bytes for entry in entries),
        quantized="",
    )


def _entry(label: str, specs: Mapping[str, Spec], in_memory: Mapping[str, int]) -> Entry:
    words = sum(spec.n_elements for name, spec in specs.items() if name.endswith(".qweight"))
    in_int8 = sum(spec.n_elements for name, spec in specs.items() if name.endswith(".weight_int8"))
    plain = sum(spec.n_elements for name, spec in specs.items() if not name.endswith(PACKED_SUFFIXES))
    packed = (("INT4 g128", 8 * words), ("INT8 rows", in_int8))
    return Entry(
        name=label,
        n_parameters=plain + 8 * words + in_int8,
        dtypes=tuple(sorted({str(spec.dtype).removeprefix("torch.") for spec in specs.values()})),
        disk_bytes=sum(spec.n_bytes for spec in specs.values()),
        memory_bytes=sum(in_memory[name] for name in specs),
        quantized=", ".join(f"{how} ({n_weights:,} weights)" for how, n_weights in packed if n_weights),
    )


def table(ledger: Ledger) -> Iterator[str]:
    """The ledger as lines of text; megabytes are millions of bytes, rounded up."""
    row = "{:<28} {:>15} {:>12} {:>12}  {:<18} {}"
    yield f"{ledger.model} ({ledger.kind})"
    yield row.format("module", "parameters", "disk MB", "memory MB", "stored as", "quantized")
    for entry in (*ledger.entries, ledger.total):
        yield row.format(
            entry.name,
            f"{entry.n_parameters:,}",
            megabytes(entry.disk_bytes),
            megabytes(entry.memory_bytes),
            ",".join(entry.dtypes),
            entry.quantized,
        ).rstrip()
    yield f"exactly {ledger.total.disk_bytes:,} bytes of tensors, {ledger.file_bytes:,} bytes of weight files"


def megabytes(n_bytes: int) -> str:
    """Millions of bytes with one decimal, rounded up."""
    tenths = -(-n_bytes // 100_000)
    return f"{tenths // 10:,}.{tenths % 10}"
