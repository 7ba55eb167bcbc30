"""One frame of speech as one graph on the GPU: talker, sampling, code predictor, embeddings, stop, and no host in it.

Shapes: B slots, C capacity in positions, Q codebooks, D the talker's width, E the predictor's. A slot is a place for
one utterance: it has its own position, knobs, seed and end, so that utterances join and leave a running batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quaver.config import SUPPRESSED_IDS, DecoderConfig
from quaver.int4 import Int4Linear
from quaver.int8 import Int8Embedding, Int8Linear
from quaver.kernels.attention import Heads, Splits, attend, attend_prompt
from quaver.kernels.linear import Linear, Matrix, linear, norm
from quaver.kernels.persistent import MOST_KEPT, Persistent
from quaver.kernels.sampler import Slots, sample_first, sample_residual, seat, tune
from quaver.model.layers import Decoder, DecoderLayer, KVCache, Rotary
from quaver.model.sparing import lent
from quaver.model.tts import TTS, Prompt
from quaver.recorded import Recorded, loose, undisturbed
from quaver.sampling import MIN_FRAMES, Sampling

_PROGRAMS = 128
"""About how many programs read a cache at once: as many as a large GPU has processors."""
_MOST_SPLITS = 16
_MOST_RECORDED = 256
"""Longer prompts keep a GPU busy while the next kernel is launched, and what they hold would be large."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A decoder layer's fused weights, in the order in which they are read."""

    before_attention: Tensor
    qkv: Matrix
    query_gain: Tensor
    key_gain: Tensor
    o: Matrix
    before_mlp: Tensor
    gate_up: Matrix
    down: Matrix

    @classmethod
    def of(cls, layer: DecoderLayer) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        return cls(
            layer.input_layernorm.weight,
            Matrix.of(attention.q_proj, attention.k_proj, attention.v_proj),
            attention.q_norm.weight,
            attention.k_norm.weight,
            Matrix.of(attention.o_proj),
            layer.post_attention_layernorm.weight,
            Matrix.of(mlp.gate_proj, mlp.up_proj),
            Matrix.of(mlp.down_proj),
        )


class Weights:
    """The weights of ``tts`` as the kernels read them. The modules go on with views of them: memory holds them once.

    But embeddings in 8 bits, which the kernels read as those dequantize: the host holds these, and lends them.
    What the predictor reads of an embedding is its projection, so that is tabled: ``projected`` [Q - 1][V, E]. It takes
    a product and a launch off every code (and, for a talker of width 2,048, 65 MB). Those on the host are lent.
    """

    def __init__(self, tts: TTS, *, records: bool = True) -> None:
        talker, predictor = tts.talker, tts.talker.code_predictor
        self._recorded = Recorded(loose(self.heard)) if records else None
        self._turns: dict[int, tuple[Tensor, Tensor]] = {}
        # The modules outlive whatever inference mode this is called in.
        with torch.inference_mode(False), torch.no_grad():
            self.tts = tts
            self.talker = [Layer.of(layer) for layer in _layers(talker.model)]
            self.predictor = [Layer.of(layer) for layer in _layers(predictor.model)]
            self.codec_head = Matrix.of(_linear(talker.codec_head))
            self.heads = [Matrix.of(_linear(head)) for head in predictor.lm_head]
            project = predictor.small_to_mtp_projection
            self.projection = None if isinstance(project, nn.Identity) else Matrix.of(_linear(project))
            self.tables = [
                lent(table.dequantize(), tts.device) if isinstance(table, Int8Embedding) else table.weight.detach()
                for table in (talker.model.codec_embedding, *predictor.model.codec_embedding)
                if isinstance(table, nn.Embedding | Int8Embedding)
            ]
            # The last codebook's embedding goes to the talker alone.
            lends = tts.placement.tables_on_host and self.projection is not None
            made = (project(table) for table in self.tables[:-1])
            self.projected = [lent(one, one.device) if lends else one.contiguous() for one in made]

    def prefill(self, embeds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the talker makes of the prompt ``embeds`` [T, D]: last hidden state [D], keys and values [L, G, T, d].

        By kernels, without a GPU by the modules. With ``records`` a short one is filled up to one of a few lengths, and
        nothing sees what stands behind it.
        """
        n = len(embeds)
        if not embeds.is_cuda:
            hidden, keys, values = self._from_modules(embeds)
        elif self._recorded is None or n > _MOST_RECORDED:
            hidden, keys, values = self.heard(embeds)
        else:
            hidden, keys, values = self._recorded(F.pad(embeds, (0, 0, 0, _filled(n) - n)))
        return hidden[n - 1], keys[:, :, :n], values[:, :, :n]

    def _from_modules(self, embeds: Tensor) -> tuple[Tensor, ...]:
        cache = KVCache(self.tts.config.talker_config, 1, len(embeds), embeds)
        return self.tts.talker.hidden(embeds[None], cache)[0], cache.keys[:, 0], cache.values[:, 0]

    def heard(self, embeds: Tensor) -> tuple[Tensor, ...]:
        """Hidden states [T, D], keys and values [L, G, T, d] of a prompt [T, D]: seven kernels a layer."""
        config, n, on = self.tts.config.talker_config, len(embeds), _can_overlap(embeds.device)
        d, eps = config.head_dim, config.rms_norm_eps
        shape = (config.num_hidden_layers, config.num_key_value_heads, n, d)
        keys, values = embeds.new_empty(shape), embeds.new_empty(shape)
        x, normed = embeds.clone(), torch.empty_like(embeds)
        qkv = embeds.new_empty(n, (config.num_attention_heads + 2 * config.num_key_value_heads) * d)
        attended = embeds.new_empty(n, config.num_attention_heads * d)
        inner = embeds.new_empty(n, config.intermediate_size)
        cos, sin = self._turns_of(n, embeds)
        for layer, own_keys, own_values in zip(self.talker, keys, values, strict=True):
            heads = Heads(layer.query_gain, layer.key_gain, eps, cos, sin)
            norm(x, layer.before_attention, eps, normed, overlap=on)
            linear(normed, layer.qkv, qkv, tensor_cores=True)
            attend_prompt(qkv, heads, own_keys, own_values, attended, overlap=on)
            linear(attended, layer.o, x, residual=x, tensor_cores=True)
            norm(x, layer.before_mlp, eps, normed, overlap=on)
            linear(normed, layer.gate_up, inner, gated=True, tensor_cores=True)
            linear(inner, layer.down, x, residual=x, tensor_cores=True)
        last = self.tts.talker.model.norm
        norm(x, last.weight, last.eps, normed, overlap=on)
        return normed, keys, values

    def _turns_of(self, n: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of ``n`` positions or more, which stay where they are: recordings read them."""
        size = max(_MOST_RECORDED, 1 << (n - 1).bit_length())
        if size not in self._turns:
            self._turns[size] = _turns(self.tts.config.talker_config, size, like)
        return self._turns[size]

    @property
    def frame_bytes(self) -> int:
        """What one frame reads of them, in bytes: the talker once, the predictor's layers for each residual code."""

        def layers(stack: list[Layer]) -> int:
            return sum(m.n_bytes for layer in stack for m in (layer.qkv, layer.o, layer.gate_up, layer.down))

        heads = sum(matrix.n_bytes for matrix in (self.codec_head, *self.heads))
        projection = 0 if self.projection is None else self.projection.n_bytes
        return layers(self.talker) + len(self.heads) * layers(self.predictor) + heads + projection


class Stack:
    """A decoder stack at work on up to ``n_rows`` rows: its cache [L, B, G, C, d] and the room between the kernels."""

    def __init__(
        self, layers: list[Layer], config: DecoderConfig, n_slots: int, n_rows: int, capacity: int, like: Tensor
    ) -> None:
        self.layers, self.config = layers, config
        d, n_heads, n_key_heads = config.head_dim, config.num_attention_heads, config.num_key_value_heads
        shape = (config.num_hidden_layers, n_slots, n_key_heads, capacity, d)
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        self.cos, self.sin = _turns(config, capacity, like)
        self.qkv = like.new_zeros(n_rows, (n_heads + 2 * n_key_heads) * d)
        self.attended = like.new_zeros(n_rows, n_heads * d)
        self.inner = like.new_zeros(n_rows, config.intermediate_size)
        # A cache of a few positions is one block's work.
        n_splits = min(_MOST_SPLITS, max(1, _PROGRAMS // (n_slots * n_key_heads))) if capacity > _PROGRAMS else 1
        self.splits = {rows: Splits.of(rows, n_heads, n_key_heads, d, n_splits, like) for rows in {n_slots, n_rows}}

    def run(self, x: Tensor, past: Tensor, overlap: bool) -> None:
        """Carries the stream ``x`` [R, D] through all layers, in place; not through the last norm."""
        rows, eps = len(x), self.config.rms_norm_eps
        qkv, attended, inner = self.qkv[:rows], self.attended[:rows], self.inner[:rows]
        for index, layer in enumerate(self.layers):
            heads = Heads(layer.query_gain, layer.key_gain, eps, self.cos, self.sin)
            linear(x, layer.qkv, qkv, gain=layer.before_attention, eps=eps, overlap=overlap)
            attend(qkv, heads, self.keys[index], self.values[index], past, self.splits[rows], attended, overlap=overlap)
            linear(attended, layer.o, x, residual=x, overlap=overlap)
            linear(x, layer.gate_up, inner, gain=layer.before_mlp, eps=eps, gated=True, overlap=overlap)
            linear(inner, layer.down, x, residual=x, overlap=overlap)


class FrameGraph:
    """B slots that speak a frame a step; on a GPU the step is one graph, captured when it is first taken.

    ``capacity``: positions of a slot's cache, prompt and frames together; ``n_lines``: rows of text it can hold.
    ``overlap`` lets each kernel ask for its weights while the one before it ends; by default where it can be
    (compute capability 9.0).
    ``whole`` takes one kernel instead of the graph (``kernels.persistent``) where the model and the GPU fit it.
    """

    def __init__(
        self,
        weights: Weights,
        n_slots: int,
        capacity: int,
        n_lines: int,
        *,
        overlap: bool | None = None,
        whole: bool = False,
    ) -> None:
        self.weights, self.capacity, self.n_slots, self.n_lines = weights, capacity, n_slots, n_lines
        self._overlap = _can_overlap(weights.tables[0].device) if overlap is None else overlap
        tts = weights.tts
        config = tts.config.talker_config
        small = config.code_predictor_config
        table = weights.tables[0]
        n_codebooks = config.num_code_groups
        self.slots = Slots.of(n_slots, capacity, n_lines, config.vocab_size, n_codebooks, table)
        self._talker = Stack(weights.talker, config, n_slots, n_slots, capacity, table)
        self._predictor = Stack(weights.predictor, small, n_slots, 2 * n_slots, n_codebooks, table)
        self.hidden = table.new_zeros(n_slots, config.hidden_size)
        self._embedded = table.new_zeros(n_slots, config.hidden_size)
        # Two positions begin the predictor's sequence: all slots' hidden states, then all slots' first codes.
        self._pair = table.new_zeros(2 * n_slots, small.hidden_size)
        self._single = table.new_zeros(n_slots, small.hidden_size)
        self._first_logits = table.new_zeros(n_slots, config.vocab_size)
        self._logits = table.new_zeros(n_slots, small.vocab_size)
        ramp = torch.arange(n_codebooks, dtype=torch.int32, device=table.device)
        self._past = ramp[:, None].repeat(1, n_slots)
        # Captured when a step first needs it: where one kernel takes every step, never.
        self._graph: torch.cuda.CUDAGraph | None = None
        self._kernel = self.kernel() if whole else None
        # The slots whose knobs ask for more than the kernel can.
        self._demanding: set[int] = set()

    @torch.inference_mode()
    def join(self, slot: int, prompt: Prompt, seed: int, sampling: Sampling, residual: Sampling) -> None:
        """Begins an utterance in ``slot``, whatever was there; the other slots do not notice."""
        n_prompt, n_text = len(prompt.embeds), min(len(prompt.tail), self.n_lines)
        assert n_prompt < self.capacity, "the prompt is longer than the slot"
        last, keys, values = self.weights.prefill(prompt.embeds)
        self.hidden[slot] = last
        self._talker.keys[:, slot, :, :n_prompt] = keys
        self._talker.values[:, slot, :, :n_prompt] = values
        self.slots.texts[slot, :n_text] = prompt.tail[:n_text]
        seat(self.slots, slot, seed, n_prompt, n_text, sampling, residual)
        self._note_demands(slot, sampling, residual)

    @torch.inference_mode()
    def tune(self, slot: int, sampling: Sampling, residual: Sampling) -> None:
        """Sets the knobs of ``slot`` from its next frame on."""
        tune(self.slots, slot, sampling, residual)
        self._note_demands(slot, sampling, residual)

    def _note_demands(self, slot: int, sampling: Sampling, residual: Sampling) -> None:
        self._demanding.discard(slot)
        if any(given.temperature > 0 and not 0 < given.top_k <= MOST_KEPT for given in (sampling, residual)):
            self._demanding.add(slot)

    @torch.inference_mode()
    def leave(self, slot: int) -> None:
        """Ends what ``slot`` says."""
        self.slots.alive[slot] = 0

    @torch.inference_mode()
    def step(self) -> None:
        """Speaks the next frame of every slot: row ``frame`` of ``codes`` and ``stops``. Returns before the GPU has."""
        if self._kernel is not None and not self._demanding:
            self._kernel()
        elif self.hidden.is_cuda:
            if self._graph is None:
                self._graph = self._capture()
            self._graph.replay()
        else:
            self._enqueue()

    @property
    def whole(self) -> bool:
        """Whether a step is one kernel, unless a slot's knobs ask for more than it can."""
        return self._kernel is not None

    @property
    def stacks(self) -> tuple[Stack, Stack]:
        """The talker and the predictor at work."""
        return self._talker, self._predictor

    def kernel(self, *, traced: bool = False) -> Persistent | None:
        """The kernel that takes a step of this at once, None where it does not fit; ``traced``: see there."""
        return Persistent.of(self.weights, self.slots, *self.stacks, self.hidden, traced=traced)

    def _capture(self) -> torch.cuda.CUDAGraph:
        # Kernels are compiled and loaded when they are first run, which must not happen while a graph is captured.
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._rehearse()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with undisturbed(), torch.cuda.graph(graph):
            self._enqueue()
        return graph

    def _rehearse(self) -> None:
        """Takes the next step and undoes it: slots may be speaking."""
        slots = self.slots
        # What a frame reads and changes. All else that it writes, the same frame writes again when it is taken.
        state = (self.hidden, slots.frame, slots.past, slots.alive, slots.seen)
        kept = [tensor.clone() for tensor in state]
        self._enqueue()
        for tensor, before in zip(state, kept, strict=True):
            tensor.copy_(before)

    def _enqueue(self) -> None:
        """One frame, kernel by kernel: codes from the hidden states, then the hidden states of the next frame."""
        weights, slots, n, on = self.weights, self.slots, self.n_slots, self._overlap
        config = weights.tts.config.talker_config
        linear(self.hidden, weights.codec_head, self._first_logits, overlap=on)
        sample_first(
            self._first_logits, slots, weights.tables[0], weights.projected[0], self._pair[n:], self._embedded,
            stop_id=config.codec_eos_token_id, n_banned=SUPPRESSED_IDS, min_frames=MIN_FRAMES, overlap=on,
        )  # fmt: skip
        if weights.projection is None:
            self._pair[:n].copy_(self.hidden)
        else:
            linear(self.hidden, weights.projection, self._pair[:n], overlap=on)
        small = weights.tts.talker.code_predictor.model
        gain, eps = small.norm.weight, small.norm.eps
        x, last = self._pair, config.num_code_groups - 1
        for codebook in range(1, last + 1):
            self._predictor.run(x, self._past[0 if codebook == 1 else codebook], on)
            linear(x[-n:], weights.heads[codebook - 1], self._logits, gain=gain, eps=eps, overlap=on)
            x = self._single
            sample_residual(
                codebook, self._logits, slots, weights.tables[codebook],
                weights.projected[min(codebook, last - 1)], x, self._embedded, overlap=on,
            )  # fmt: skip
        self._talker.run(self._embedded, slots.past, on)
        self.hidden.copy_(weights.tts.talker.model.norm(self._embedded))


def _can_overlap(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _filled(n: int) -> int:
    """The length that a recorded prompt of ``n`` positions is filled up to: two or so for each power of two."""
    step = max(16, (1 << (n - 1).bit_length()) // 4)
    return -(-n // step) * step


def _turns(config: DecoderConfig, n: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [n, d / 2] of the first ``n`` positions."""
    rotary = Rotary.at(torch.arange(n, device=like.device)[None], config.head_dim, config.rope_theta, like.dtype)
    cos, sin = (part[0, 0, :, : config.head_dim // 2].contiguous() for part in (rotary.cos, rotary.sin))
    return cos, sin


def _layers(decoder: Decoder) -> list[DecoderLayer]:
    return [layer for layer in decoder.layers if isinstance(layer, DecoderLayer)]


def _linear(module: nn.Module) -> Linear:
    assert isinstance(module, nn.Linear | Int4Linear | Int8Linear)
    return module
