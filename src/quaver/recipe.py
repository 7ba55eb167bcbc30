"""How each part of a model is to be stored: a recipe, from a TOML file, by name, or chosen for a budget.

The default of ``quaver quantize`` is no recipe: the talker in AWQ INT4, all else as it is. Here is what goes beyond it,
and what ``config.json`` then says. docs/RECIPES.md has an example of every key.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from quaver import awq
from quaver.checkpoint import Checkpoint
from quaver.config import ModelConfig
from quaver.errors import RecipeError
from quaver.model.homes import LAYERS, TEXT_EMBEDDING
from quaver.model.layers import GROUPS
from quaver.scripts import SCRIPTS
from quaver.stack import Store

RECIPE = "recipe"
"""The ``method`` that provenance.json has for what was stored by one."""
PREDICTOR = "talker.code_predictor"
PREDICTOR_LAYERS = f"{PREDICTOR}.model.layers"
_PREDICTOR_REST = tuple(f"{PREDICTOR}.{name}" for name in ("lm_head", "model.codec_embedding"))
_PROJECTION = f"{PREDICTOR}.small_to_mtp_projection"
STORES: tuple[Store, ...] = ("keep", "int8", "int4")
_BY_BITS: Mapping[int | str, Store] = {"keep": "keep", 8: "int8", 4: "int4"}


@dataclass(frozen=True, slots=True)
class Measured:
    """What a budget's choice of ``store`` for a block rests on: by store, its bytes on disk and what it costs.

    ``kl`` is the divergence from the original, in nats a frame over all codebooks, with this block alone so stored.
    """

    block: str
    store: Store
    n_bytes: Mapping[Store, int]
    kl: Mapping[Store, float]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to store how, and what to calibrate on.

    ``layers`` are talker layers that differ from ``talker``. The predictor in ``int4`` has its decoder layers in INT4
    and its heads, embeddings and projection in INT8. ``languages``: those whose text embedding rows stay, all where
    empty; rows are pruned in INT8 alone. ``measured`` is why, where a budget chose (see budget).
    """

    talker: Store = "int4"
    layers: Mapping[int, Store] = field(default_factory=dict)
    predictor: Store = "keep"
    text_embedding: Literal["keep", "int8"] = "keep"
    languages: tuple[str, ...] = ()
    codec_decoder: Literal["keep", "bfloat16"] = "keep"
    calibration: awq.Recipe = field(default_factory=awq.Recipe)
    budget_bytes: int | None = None
    measured: tuple[Measured, ...] = ()

    def __post_init__(self) -> None:
        if self.languages and self.text_embedding == "keep":
            raise RecipeError("text_embedding.languages: rows are pruned in INT8 alone: set text_embedding.bits to 8")
        for language in self.languages:
            if language not in SCRIPTS:
                raise RecipeError(f"text_embedding.languages: {language!r} is none of {', '.join(SCRIPTS)}")

    def layer(self, index: int) -> Store:
        """How the talker's layer ``index`` is stored."""
        return self.layers.get(index, self.talker)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for provenance."""
        found = asdict(self)
        found["layers"] = {str(index): store for index, store in sorted(self.layers.items())}
        found["languages"], found["measured"] = list(self.languages), list(found["measured"])
        if self.budget_bytes is None:
            del found["budget_bytes"], found["measured"]
        return found

    def check(self, checkpoint: Checkpoint) -> None:
        """Raises CheckpointError or RecipeError, before any work, unless it can be carried out on ``checkpoint``."""
        awq.require_plain(checkpoint)
        talker = checkpoint.config.talker_config
        if strange := [index for index in self.layers if index >= talker.num_hidden_layers]:
            raise RecipeError(f"talker.layers: {strange[0]} is none of this model's {talker.num_hidden_layers} layers")
        for language in self.languages:
            if language not in checkpoint.config.languages:
                known = ", ".join(checkpoint.config.languages[1:])
                raise RecipeError(f"text_embedding.languages: this model does not speak {language}, but {known}")
        indices = range(talker.num_hidden_layers)
        stores = {self.layer(index) for index in indices} | {self.predictor, self.text_embedding, self.codec_decoder}
        if stores == {"keep"}:
            raise RecipeError("this recipe keeps everything as it is: there is nothing to quantize")
        awq.require_stack(checkpoint, LAYERS, (index for index in indices if self.layer(index) == "int4"))
        if self.predictor == "int4":
            awq.require_stack(checkpoint, PREDICTOR_LAYERS, range(talker.code_predictor_config.num_hidden_layers))


COMPACT = Recipe(predictor="int8", text_embedding="int8", codec_decoder="bfloat16")
"""The profile *compact*."""


def settings(recipe: Recipe, config: ModelConfig, text_rows: int | None = None) -> dict[str, Any]:
    """The keys of config.json that say what is stored how; ``text_rows`` where the text embedding was pruned.

    ``quantization_config`` tells of the INT4 linears alone, ``quaver`` of what no other runtime reads.
    """
    found: dict[str, Any] = {}
    stores = [recipe.layer(index) for index in range(config.talker_config.num_hidden_layers)]
    # Linears by their whole names: readers match the start of a name, and layer 1 is the start of layer 10.
    plain = [
        f"{LAYERS}.{index}.{linear}"
        for index, store in enumerate(stores)
        for group in GROUPS
        for linear in group.linears
        if store != "int4"
    ]
    predictor = [PREDICTOR]
    int8 = [f"{LAYERS}.{index}" for index, store in enumerate(stores) if store == "int8"]
    if recipe.predictor == "int4":
        widths = config.talker_config.hidden_size, config.talker_config.code_predictor_config.hidden_size
        rest = [*_PREDICTOR_REST, *([_PROJECTION] if widths[0] != widths[1] else [])]
        predictor = [name for name in rest if not name.endswith("embedding")]
        int8 += rest
    elif recipe.predictor == "int8":
        int8.append(PREDICTOR)
    if recipe.text_embedding == "int8":
        int8.append(TEXT_EMBEDDING)
    if "int4" in (*stores, recipe.predictor):
        found["quantization_config"] = awq.settings([*predictor, *awq.KEPT[1:], *plain])
    if int8:
        found["quaver"] = {"version": 1, "int8": int8}
    if text_rows is not None:
        found["quaver"]["text_rows"] = text_rows
    return found


def readers(config: ModelConfig) -> str | None:
    """Who loads a model of ``config``, where that is not who loads what ``quaver quantize`` writes by default."""
    awq_config = config.quantization_config
    if config.quaver is not None:
        return (
            "it loads in quaver alone: transformers, GPTQModel, vLLM-Omni and qwen-tts know no INT8 rows and miss the "
            "weights; without profile, recipe or budget quaver quantize writes plain AWQ, which loads elsewhere"
        )
    if awq_config is not None and set(awq_config.modules_to_not_convert) != set(awq.KEPT):
        return (
            "it is plain AWQ in some blocks and unquantized in others, as modules_to_not_convert says by full names; "
            "whether other runtimes follow that was not tried"
        )
    return None


def told(values: Mapping[str, Any]) -> str:
    """What a recipe in plain values (see Recipe.to_json) did to a model, in words for its card."""
    how = {"keep": "as they were", "int8": "INT8", "int4": "AWQ INT4"}
    layers = [f"layer {index} {how[store]}" for index, store in values["layers"].items()]
    parts = [
        f"talker layers {how[values['talker']]}" + (f" ({', '.join(layers)})" if layers else ""),
        f"code predictor {how[values['predictor']]}" + (", its heads, embeddings and projection INT8" * _rest(values)),
        f"text embedding {how[values['text_embedding']]}",
        f"codec decoder {'as it was' if values['codec_decoder'] == 'keep' else 'bfloat16 where it was float32'}",
    ]
    pruned = (
        f" Rows of text that {', '.join(values['languages'])} cannot need were pruned." if values["languages"] else ""
    )
    return (
        f"Each part was stored by a recipe: {'; '.join(parts)}.{pruned} INT4 has groups of 128 and zero points "
        "in the GEMM layout, INT8 a scale a row; all else is bit-equal but the norms that absorbed scales."
    )


def _rest(values: Mapping[str, Any]) -> bool:
    return bool(values["predictor"] == "int4")


def read(path: str | Path) -> Recipe:
    """The recipe in a TOML file. Raises RecipeError that names the key for anything unknown or of another type."""
    path = Path(path)
    try:
        value = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"{path} is no recipe: {error}") from error
    try:
        return _parse(value)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error


def _parse(value: dict[str, Any]) -> Recipe:
    tables = {
        "talker": ("bits", "layers"),
        "predictor": ("bits",),
        "text_embedding": ("bits", "languages"),
        "codec": ("decoder",),
        "calibration": ("samples", "positions", "seed"),
    }
    _known(value, tuple(tables), "")
    for name, keys in tables.items():
        _known(_table(value, name), keys, f"{name}.")
    talker, text, codec = _table(value, "talker"), _table(value, "text_embedding"), _table(value, "codec")
    layers: dict[int, Store] = {}
    for spelled, bits in _table(talker, "layers", "talker.").items():
        store = _store(bits, f"talker.layers.{spelled}", ("keep", 8, 4))
        for index in _indices(spelled):
            if layers.setdefault(index, store) != store:
                raise RecipeError(f"talker.layers.{spelled}: layer {index} is named twice, and differently")
    stored = _store(text.get("bits", "keep"), "text_embedding.bits", ("keep", 8))
    decoder = codec.get("decoder", "keep")
    if decoder not in ("keep", "bfloat16"):
        raise RecipeError(f"codec.decoder is {decoder!r}: it can be 'keep' or 'bfloat16'")
    calibration = _table(value, "calibration")
    for key, given in calibration.items():
        if not isinstance(given, int) or isinstance(given, bool):
            raise RecipeError(f"calibration.{key} is {given!r}: it must be a whole number")
    names = {"samples": "n_samples", "positions": "n_positions", "seed": "seed"}
    return Recipe(
        talker=_store(talker.get("bits", 4), "talker.bits", ("keep", 8, 4)),
        layers=layers,
        predictor=_store(_table(value, "predictor").get("bits", "keep"), "predictor.bits", ("keep", 8, 4)),
        text_embedding="int8" if stored == "int8" else "keep",
        languages=_languages(text.get("languages", [])),
        codec_decoder="bfloat16" if decoder == "bfloat16" else "keep",
        calibration=awq.Recipe(**{names[key]: given for key, given in calibration.items()}),
    )


def _table(value: Mapping[str, Any], name: str, where: str = "") -> dict[str, Any]:
    found = value.get(name, {})
    if not isinstance(found, dict):
        raise RecipeError(f"{where}{name} is {found!r}: it must be a table")
    return found


def _known(table: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in keys:
            raise RecipeError(f"unknown key {where}{key}: known are {', '.join(where + known for known in keys)}")


def _store(bits: Any, where: str, allowed: tuple[int | str, ...]) -> Store:
    if isinstance(bits, bool) or bits not in allowed:
        raise RecipeError(f"{where} is {bits!r}: it can be {' or '.join(repr(one) for one in allowed)}")
    return _BY_BITS[bits]


def _indices(spelled: str) -> range:
    """The layers that ``3`` or ``3-5`` names."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", spelled)
    if not match or int(match[2] or match[1]) < int(match[1]):
        raise RecipeError(f"talker.layers.{spelled}: name layers as 3 or 3-5")
    return range(int(match[1]), int(match[2] or match[1]) + 1)


def _languages(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise RecipeError(f"text_embedding.languages is {value!r}: it must be a list of names")
    return tuple(value)
