"""What a model is: frozen configurations read from ``config.json``.

The files are the official ones of Qwen3-TTS. A key that no version of the official code knows, a value of the
wrong type, or a setting that the architecture here does not implement is a CheckpointError that names it: a
silently ignored setting would mean a silently different model.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from quaver.errors import CheckpointError

FRAME_RATE_HZ = 12.5
SUPPRESSED_IDS = 1024
"""The last 1,024 talker ids are control ids: never sampled, but for the stop id (official generation code)."""

LANGUAGES = {
    "chinese": "zh", "english": "en", "german": "de", "italian": "it", "portuguese": "pt", "spanish": "es",
    "japanese": "ja", "korean": "ko", "french": "fr", "russian": "ru",
}  # fmt: skip
"""The languages of the published models, by their codes of ISO 639-1."""

# Written by the transformers library into any configuration; they describe its text generation and bookkeeping,
# never this architecture.
_INERT = frozenset(
    """_name_or_path add_cross_attention architectures bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample
    early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id id2label initializer_range is_decoder is_encoder_decoder label2id
    length_penalty max_length max_window_layers min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix problem_type
    pruned_heads remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p
    dtype torch_dtype torchscript typical_p use_bfloat16 use_cache transformers_version model_type
    position_id_per_seconds max_position_embeddings layer_types _attn_implementation_autoset _frame_rate
    use_streaming normalize audio_channels kernel_size_comment""".split()
)

C = TypeVar("C")


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """The sizes of one Qwen3 decoder stack (talker or code predictor)."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    num_code_groups: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6

    FIXED: typing.ClassVar[Mapping[str, tuple[Any, ...]]] = types.MappingProxyType(
        {
            "attention_bias": (False,),
            "attention_dropout": (0, 0.0),
            "hidden_act": ("silu",),
            "sliding_window": (None,),
            "use_sliding_window": (False,),
            "tie_word_embeddings": (False,),
        }
    )


@dataclass(frozen=True, slots=True)
class PredictorConfig(DecoderConfig):
    """The code predictor: codebooks 1 to 15 of one frame, one after the other."""

    FIXED: typing.ClassVar[Mapping[str, tuple[Any, ...]]] = types.MappingProxyType(
        {**DecoderConfig.FIXED, "rope_scaling": (None,)}
    )


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """The talker's rotary sections; all three axes carry one position, so they change nothing (tested)."""

    mrope_section: tuple[int, ...] = ()
    interleaved: bool = False

    FIXED: typing.ClassVar[Mapping[str, tuple[Any, ...]]] = types.MappingProxyType(
        {"rope_type": ("default",), "type": ("default",)}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TalkerConfig(DecoderConfig):
    """The talker: one frame a step, codebook 0, from text and codec embeddings."""

    code_predictor_config: PredictorConfig
    text_hidden_size: int
    text_vocab_size: int
    codec_bos_id: int
    codec_eos_token_id: int
    codec_think_id: int
    codec_nothink_id: int
    codec_think_bos_id: int
    codec_think_eos_id: int
    codec_pad_id: int
    codec_language_id: Mapping[str, int]
    spk_id: Mapping[str, int] = dataclasses.field(default_factory=dict)
    spk_is_dialect: Mapping[str, str | bool] = dataclasses.field(default_factory=dict)
    rope_scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True)
class SpeakerConfig:
    """The ECAPA-TDNN speaker encoder."""

    enc_dim: int = 1024
    sample_rate: int = 24000
    mel_dim: int = 128
    enc_channels: tuple[int, ...] = (512, 512, 512, 512, 1536)
    enc_kernel_sizes: tuple[int, ...] = (5, 3, 3, 3, 1)
    enc_dilations: tuple[int, ...] = (1, 2, 3, 4, 1)
    enc_attention_channels: int = 128
    enc_res2net_scale: int = 8
    enc_se_channels: int = 128


@dataclass(frozen=True, slots=True)
class AwqConfig:
    """``quantization_config``: the AWQ storage format of the talker's linears (GEMM layout)."""

    modules_to_not_convert: tuple[str, ...]
    bits: int = 4
    group_size: int = 128
    zero_point: bool = True

    FIXED: typing.ClassVar[Mapping[str, tuple[Any, ...]]] = types.MappingProxyType(
        {
            "quant_method": ("awq",),
            "version": ("gemm", "GEMM"),
            "bits": (4,),
            "group_size": (128,),
            "zero_point": (True,),
        }
    )


@dataclass(frozen=True, slots=True)
class StorageConfig:
    """``quaver``: what is stored in a form that quaver alone reads.

    ``int8`` names modules, each with all that is in it, whose matrices are in INT8 (see int8); ``text_rows`` is how
    many rows of the text embedding are there, where some were pruned.
    """

    version: int
    int8: tuple[str, ...]
    text_rows: int | None = None

    FIXED: typing.ClassVar[Mapping[str, tuple[Any, ...]]] = types.MappingProxyType({"version": (1,)})

    def __post_init__(self) -> None:
        if self.text_rows is not None and (self.text_rows < 1 or not self.holds("talker.model.text_embedding")):
            raise CheckpointError(
                f"quaver: text_rows is {self.text_rows}: rows of a text embedding in INT8, at least one, are meant"
            )

    def holds(self, module: str) -> bool:
        """Whether the matrix of ``module`` is in INT8."""
        return any(f"{module}.".startswith(f"{name}.") for name in self.int8)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A whole Qwen3-TTS model but for its codec."""

    talker_config: TalkerConfig
    tts_model_type: str
    tts_model_size: str
    im_start_token_id: int
    im_end_token_id: int
    tts_bos_token_id: int
    tts_eos_token_id: int
    tts_pad_token_id: int
    assistant_token_id: int
    tokenizer_type: str = "qwen3_tts_tokenizer_12hz"
    speaker_encoder_config: SpeakerConfig | None = None
    quantization_config: AwqConfig | None = None
    quaver: StorageConfig | None = None

    FIXED: typing.ClassVar[Mapping[str, tuple[Any, ...]]] = types.MappingProxyType(
        {
            "tokenizer_type": ("qwen3_tts_tokenizer_12hz",),
            "tts_model_type": ("base", "custom_voice", "voice_design"),
            "tie_word_embeddings": (False, True),
        }
    )

    def with_keys(self, changed: Mapping[str, Any]) -> ModelConfig:
        """This configuration, quantized as the keys ``changed`` of config.json say and in no other way."""
        awq, own = changed.get("quantization_config"), changed.get("quaver")
        return dataclasses.replace(
            self,
            quantization_config=None if awq is None else parse(AwqConfig, awq, "quantization_config"),
            quaver=None if own is None else parse(StorageConfig, own, "quaver"),
        )

    @property
    def has_speaker_encoder(self) -> bool:
        """Whether voices can be cloned from recordings."""
        return self.tts_model_type == "base"

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages a caller may name, "auto" first; dialects come with their preset speakers."""
        named = (name for name in self.talker_config.codec_language_id if "dialect" not in name)
        return ("auto", *named)


@dataclass(frozen=True, slots=True)
class CodecDecoderConfig:
    """The 12.5 Hz codec's decoder: 16 codes a frame to 1,920 samples."""

    latent_dim: int
    codebook_dim: int
    codebook_size: int
    decoder_dim: int
    hidden_size: int
    intermediate_size: int
    head_dim: int
    num_attention_heads: int
    num_hidden_layers: int
    num_key_value_heads: int
    num_quantizers: int
    sliding_window: int
    upsample_rates: tuple[int, ...]
    upsampling_ratios: tuple[int, ...]
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e4
    layer_scale_initial_scale: float = 0.01

    FIXED: typing.ClassVar[Mapping[str, tuple[Any, ...]]] = types.MappingProxyType(
        {"attention_bias": (False,), "attention_dropout": (0, 0.0), "hidden_act": ("silu",)}
    )
    # Present in the published file, read by no line of the official decoder.
    UNUSED: typing.ClassVar[frozenset[str]] = frozenset(
        {"num_semantic_quantizers", "semantic_codebook_size", "vector_quantization_hidden_dimension"}
    )


@dataclass(frozen=True, slots=True)
class CodecEncoderConfig:
    """The 12.5 Hz codec's encoder, of Mimi's architecture (Défossez et al. 2024)."""

    codebook_dim: int
    codebook_size: int
    hidden_size: int
    intermediate_size: int
    head_dim: int
    num_attention_heads: int
    num_hidden_layers: int
    num_key_value_heads: int
    num_filters: int
    num_quantizers: int
    num_residual_layers: int
    num_semantic_quantizers: int
    sliding_window: int
    upsampling_ratios: tuple[int, ...]
    compress: int = 2
    dilation_growth_rate: int = 2
    kernel_size: int = 7
    last_kernel_size: int = 3
    residual_kernel_size: int = 3
    norm_eps: float = 1e-5
    rope_theta: float = 1e4
    layer_scale_initial_scale: float = 0.01
    sampling_rate: int = 24000
    vector_quantization_hidden_dimension: int = 256
    upsample_groups: int = 512

    FIXED: typing.ClassVar[Mapping[str, tuple[Any, ...]]] = types.MappingProxyType(
        {
            "attention_bias": (False,),
            "attention_dropout": (0, 0.0),
            "hidden_act": ("gelu",),
            "pad_mode": ("constant",),
            "trim_right_ratio": (1, 1.0),
            "use_causal_conv": (True,),
            "use_conv_shortcut": (False,),
            "num_semantic_quantizers": (1,),
        }
    )


@dataclass(frozen=True, slots=True)
class CodecConfig:
    """The speech tokenizer, both ways."""

    decoder_config: CodecDecoderConfig
    encoder_config: CodecEncoderConfig
    encoder_valid_num_quantizers: int = 16
    input_sample_rate: int = 24000
    output_sample_rate: int = 24000
    decode_upsample_rate: int = 1920
    encode_downsample_rate: int = 1920


def parse(cls: type[C], value: object, where: str) -> C:
    """A configuration of type ``cls`` from the JSON object ``value``; ``where`` names it in errors.

    Raises CheckpointError for a missing or unknown key, a wrong type, or a setting not implemented here.
    """
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: an object was expected, not {type(value).__name__}")
    fixed: Mapping[str, tuple[Any, ...]] = getattr(cls, "FIXED", {})
    unused: frozenset[str] = getattr(cls, "UNUSED", frozenset())
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key, given in value.items():
        if key in fixed:
            if not any(
                given == allowed and isinstance(given, bool) == isinstance(allowed, bool) for allowed in fixed[key]
            ):
                allowed_text = " or ".join(repr(allowed) for allowed in fixed[key])
                raise CheckpointError(f"{where}: {key} is {given!r}; quaver implements {allowed_text} only")
        elif key not in fields and key not in unused and key not in _INERT:
            raise CheckpointError(f"{where}: unknown key {key!r}: is this a newer architecture, or a misspelt setting?")
    found: dict[str, Any] = {}
    for name, field in fields.items():
        if name in value:
            found[name] = _typed(hints[name], value[name], f"{where}: {name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise CheckpointError(f"{where}: key {name!r} is missing")
    return cls(**found)


def _typed(hint: Any, value: object, where: str) -> Any:
    """``value`` checked against the annotation ``hint``, nested configurations parsed."""
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return parse(typing.cast(type, hint), value, where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        if value is None and type(None) in arguments:
            return None
        members = [a for a in arguments if a is not type(None)]
        if len(members) == 1:
            return _typed(members[0], value, where)
        if isinstance(value, tuple(members)):
            return value
    elif origin is tuple and isinstance(value, list):
        return tuple(_typed(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    elif origin is not None and issubclass(origin, Mapping) and isinstance(value, dict):
        return {key: _typed(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif isinstance(hint, type) and isinstance(value, hint) and isinstance(value, bool) == (hint is bool):
        return value
    name = getattr(hint, "__name__", str(hint))
    raise CheckpointError(f"{where}: {value!r} is not {'an' if name[0] in 'aio' else 'a'} {name}")


def read_json(path: Path) -> Any:
    """The JSON value in ``path``. Raises CheckpointError when it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error


def read_model_config(path: Path) -> ModelConfig:
    """The model configuration in the file ``path``. Raises CheckpointError."""
    return parse(ModelConfig, read_json(path), str(path))


def read_codec_config(path: Path) -> CodecConfig:
    """The codec configuration in the file ``path``. Raises CheckpointError."""
    return parse(CodecConfig, read_json(path), str(path))
