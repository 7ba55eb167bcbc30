"""The talker, the code predictor, the prompts and the sampling, held against the official code number by number."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import official
import pytest
import torch

import toy
from quaver.checkpoint import Checkpoint
from quaver.config import ModelConfig, parse
from quaver.engine import Engine, Knobs
from quaver.model.talker import Talker
from quaver.model.tts import TTS, Utterance
from quaver.provenance import Step
from quaver.sampling import Sampling, distribution
from quaver.voice import Voice

pytestmark = pytest.mark.oracle
N_FRAMES = 64
GREEDY = Knobs(Sampling(temperature=0.0), Sampling(temperature=0.0, penalty=1.0), N_FRAMES)
TEXT = "The quick brown fox. 42 jumps, naïvely!"


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether the largest difference is at most 1e-4 of the output's scale."""
    assert ours.shape == theirs.shape
    return bool((ours - theirs).abs().max() <= 1e-4 * theirs.abs().max())


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Our model and the official one of each kind, with the same random weights."""
    made = {}
    for seed, kind in enumerate(("base", "custom_voice", "voice_design")):
        folder = toy.checkpoint(tmp_path_factory.mktemp(kind) / "raw", kind, seed)
        # A random model would stop after a few frames: without a stop row it speaks all 64.
        folder = Checkpoint.open(folder).edit(Step("test"), toy.never_stop).save(folder.with_name("model")).path
        made[kind] = TTS.load(folder, dtype=torch.float32), official.model(folder), folder
    return made


def official_codes(model, folder, utterance, max_frames=N_FRAMES, others=()):
    """Greedy codes [T, Q] and hidden states of the official code for one utterance of any kind."""
    rows = [utterance, *others]
    voices = [row.voice for row in rows]
    prompt = None
    if voices[0] is not None and voices[0].speaker is not None:
        icl = [voice.codes is not None for voice in voices]
        prompt = {
            "ref_spk_embedding": [voice.speaker for voice in voices],
            "ref_code": [voice.codes for voice in voices] if any(icl) else None,
            "x_vector_only_mode": [not flag for flag in icl],
            "icl_mode": icl,
        }
    ref_ids = [
        official.ids(folder, f"<|im_start|>assistant\n{voice.text}<|im_end|>\n") if voice and voice.text else None
        for voice in voices
    ]
    instruct = [
        official.ids(folder, f"<|im_start|>user\n{r.instruct}<|im_end|>\n") if r.instruct else None for r in rows
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        codes, hidden = model.generate(
            input_ids=[
                official.ids(folder, f"<|im_start|>assistant\n{r.text}<|im_end|>\n<|im_start|>assistant\n")
                for r in rows
            ],
            instruct_ids=instruct,
            ref_ids=ref_ids,
            voice_clone_prompt=prompt,
            languages=[row.language for row in rows],
            speakers=[voice.preset if voice else None for voice in voices] if prompt is None else None,
            non_streaming_mode=utterance.layout == "whole",
            # The official loop samples one token more than it returns frames.
            max_new_tokens=max_frames + 1,
            do_sample=False,
            subtalker_dosample=False,
        )
    return codes[0], hidden[0]


def voice_of(kind: str, seed: int = 3) -> Voice | None:
    generator = torch.Generator().manual_seed(seed)
    speaker = torch.randn(128, generator=generator)
    codes = torch.randint(0, toy.N_CODES, (9 * seed, 16), generator=generator)
    return {
        "xvector": Voice(name="x", speaker=speaker),
        "icl": Voice(name="icl", speaker=speaker, codes=codes, text="What the reference says."),
        "long icl": Voice(
            name="icl", speaker=speaker, codes=codes[:4], text="A reference text longer than its speech."
        ),
        "preset": Voice(name="anna", preset="anna"),
        "dialect": Voice(name="dylan", preset="dylan"),
    }.get(kind)


CASES = [
    ("base", N_FRAMES, Utterance(TEXT, "english", voice_of("xvector"))),
    ("base", 16, Utterance(TEXT, "auto", voice_of("xvector"), layout="whole")),
    ("base", N_FRAMES, Utterance(TEXT, "spanish", voice_of("icl"))),
    ("base", 16, Utterance(TEXT, "auto", voice_of("long icl"))),
    ("base", 16, Utterance(TEXT, "auto", voice_of("icl"), layout="whole")),
    ("custom_voice", N_FRAMES, Utterance(TEXT, "English", voice_of("preset"))),
    ("custom_voice", 16, Utterance(TEXT, "auto", voice_of("dialect"), layout="whole")),
    ("custom_voice", 16, Utterance(TEXT, "chinese", voice_of("dialect"), instruct="Whisper.")),
    ("voice_design", N_FRAMES, Utterance(TEXT, "auto", None, instruct="A warm, low voice.", layout="whole")),
    ("voice_design", 16, Utterance("Hi", "english", None)),
]


@pytest.mark.parametrize(("kind", "n_frames", "utterance"), CASES)
def test_greedy_codes_and_forced_states_equal_the_official_ones(pairs, kind, n_frames, utterance):
    tts, model, folder = pairs[kind]
    theirs, hidden = official_codes(model, folder, utterance, n_frames)
    prompt = tts.prompt(utterance)
    ours = Engine(tts).codes([prompt], [0], replace(GREEDY, max_frames=n_frames))[0]
    assert len(theirs) == n_frames
    assert torch.equal(ours, theirs)
    forced = tts.force([prompt], [theirs])[0]
    # The official list holds the state after each frame, but for the last: the one before frame 0 comes first.
    assert close(forced.hidden[:-1], hidden)
    # Law 6: what was spoken greedily is the forced logits' own argmax (penalty and bans applied alike).
    assert torch.equal(forced.residual.argmax(-1), theirs[:, 1:])
    banned = tts.suppressed(stop_too=False)
    seen = torch.zeros(1, tts.config.talker_config.vocab_size, dtype=torch.bool)
    for frame in range(2, n_frames):
        seen[0, theirs[:frame, 0]] = True
        _, best = distribution(forced.talker[frame][None], GREEDY.sampling, banned=banned, seen=seen)
        assert best[0, 0] == theirs[frame, 0]


def test_a_row_speaks_the_same_alone_and_in_a_batch(pairs):
    tts, model, folder = pairs["base"]
    rows = [
        Utterance(TEXT, "english", voice_of("xvector")),
        Utterance("Short.", "auto", voice_of("xvector", 4)),
        Utterance("Another one of a different length, with more words.", "spanish", voice_of("xvector", 5)),
    ]
    prompts = [tts.prompt(row) for row in rows]
    knobs = replace(GREEDY, max_frames=24)
    together = Engine(tts).codes(prompts, [0, 0, 0], knobs)
    for prompt, codes in zip(prompts, together, strict=True):
        assert torch.equal(Engine(tts).codes([prompt], [0], knobs)[0], codes)
    theirs, _ = official_codes(model, folder, rows[0], 24, others=rows[1:])
    assert torch.equal(together[0], theirs)


def test_batched_force_equals_the_official_talker(pairs):
    tts, model, _ = pairs["base"]
    prompts = [tts.prompt(Utterance(text, "english", voice_of("xvector"))) for text in (TEXT, "Hm.", "One two three.")]
    codes = [torch.randint(0, toy.N_CODES, (n, 16), generator=torch.Generator().manual_seed(n)) for n in (7, 20, 1)]
    for prompt, frames, logits in zip(prompts, codes, tts.force(prompts, codes), strict=True):
        with torch.no_grad():
            out = model.talker.model(inputs_embeds=tts.inputs(prompt, frames)[None], use_cache=False)
            states = out.last_hidden_state[0, len(prompt.embeds) - 1 :]
            assert close(logits.talker, model.talker.codec_head(states))
            residual, _ = model.talker.forward_sub_talker_finetune(frames, states[:-1])
        assert close(logits.residual, residual)


@pytest.mark.parametrize("size", ["0.6b", "1.7b"])
def test_one_layer_at_the_true_widths(size):
    folder = Path(__file__).parent / "published"
    settings = json.loads((folder / f"config-{size}-base.json").read_text())
    talker = settings["talker_config"]
    talker |= {"num_hidden_layers": 1, "text_vocab_size": 600}
    talker["code_predictor_config"] |= {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    config = parse(ModelConfig, settings, "published")
    generator = torch.Generator().manual_seed(1)
    with torch.device("meta"):
        ours = Talker(config.talker_config)
    weights = {
        name: torch.ones(value.shape) if "norm" in name else torch.randn(value.shape, generator=generator) * 0.03
        for name, value in ours.state_dict().items()
    }
    ours.load_state_dict(weights, assign=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.device("meta"):
            theirs = official.module().Qwen3TTSTalkerForConditionalGeneration(official.config(settings).talker_config)
        theirs = theirs.to_empty(device="cpu").eval()
        theirs.load_state_dict(weights, strict=True)
        fresh = official.module().Qwen3TTSTalkerRotaryEmbedding(theirs.config)
        theirs.model.rotary_emb = fresh
        theirs.code_predictor.model.rotary_emb = official.module().Qwen3TTSRotaryEmbedding(theirs.code_predictor.config)
    x = torch.randn(1, 40, config.talker_config.hidden_size, generator=generator)
    codes = torch.randint(0, 2048, (5, 16), generator=generator)
    with torch.no_grad():
        hidden = theirs.model(inputs_embeds=x, use_cache=False).last_hidden_state
        residual, _ = theirs.forward_sub_talker_finetune(codes, hidden[0, :5])
        mine = ours.hidden(x)
        assert close(mine, hidden)
        ids = codes % 600
        assert close(ours.embed_text(ids), theirs.text_projection(theirs.model.text_embedding(ids)))
        first = ours.embed_codec(codes[:, 0])
        assert close(ours.code_predictor.force(mine[0, :5], first, codes[:, 1:]), residual)


def test_rotary_axes_carry_one_position(pairs):
    """The official rotary embedding has three axes; with one position on all of them the sections change nothing."""
    tts, _, _ = pairs["base"]
    positions = torch.arange(50)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = official.config(toy.settings()).talker_config
    cos, sin = official.module().Qwen3TTSTalkerRotaryEmbedding(config)(torch.zeros(1), positions.expand(3, 1, -1))
    q = torch.randn(1, 4, 50, 32)
    turned, _ = official.module().apply_multimodal_rotary_pos_emb(q, q, cos, sin, [6, 5, 5], True)
    assert close(tts.talker.model.rotary(positions[None], torch.float32).turn(q), turned)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(0.5, 0, 0.9, 1.3),
        Sampling(1.7, 20, 0.5, 1.0),
        Sampling(0.9, 50, 1.0, 1.05),
        Sampling(1.0, 3, 0.01),
    ],
)
@pytest.mark.parametrize("frame", [0, 1, 2, 30])
def test_probabilities_equal_those_of_the_official_processors(pairs, sampling, frame):
    tts, model, _ = pairs["base"]
    vocabulary = tts.config.talker_config.vocab_size
    stop_id = tts.config.talker_config.codec_eos_token_id
    generator = torch.Generator().manual_seed(frame)
    logits = torch.randn(3, vocabulary, generator=generator) * 3
    past = torch.randint(0, toy.N_CODES, (3, frame), generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import GenerationConfig

        asked = GenerationConfig(
            do_sample=True, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p,
            repetition_penalty=sampling.penalty, min_new_tokens=2, eos_token_id=stop_id,
            suppress_tokens=[i for i in range(vocabulary - 1024, vocabulary) if i != stop_id],
        )  # fmt: skip
        model.talker._prepare_special_tokens(asked, device="cpu")
        processors = model.talker._get_logits_processor(asked, input_ids_seq_length=0)
        scores = processors(past, logits.clone())
    seen = torch.zeros(3, vocabulary, dtype=torch.bool).scatter_(1, past, True)
    probs, ids = distribution(logits, sampling, banned=tts.suppressed(stop_too=frame < 2), seen=seen)
    ours = torch.zeros(3, vocabulary).scatter_(1, ids, probs)
    assert torch.allclose(ours, scores.softmax(-1), atol=1e-6)


def test_stop_comes_no_earlier_than_the_minimum(pairs):
    tts, model, folder = pairs["base"]
    utterance = CASES[0][2]
    stop_id = tts.config.talker_config.codec_eos_token_id
    prompt = tts.prompt(utterance)
    with torch.no_grad():
        kept = model.talker.codec_head.weight.clone()
        hidden = tts.talker.hidden(prompt.embeds[None])[0, -1]
        for talker in (model.talker, tts.talker):
            talker.codec_head.weight.mul_(0.01)
            # Later states keep much of the first one's direction in a random model: the stop row follows it.
            talker.codec_head.weight[stop_id] = hidden
        ours = Engine(tts).codes([prompt], [0], GREEDY)[0]
        theirs, _ = official_codes(model, folder, utterance)
        for talker in (model.talker, tts.talker):
            talker.codec_head.weight.copy_(kept)
    assert torch.equal(ours, theirs)
    assert 2 <= len(ours) < N_FRAMES
