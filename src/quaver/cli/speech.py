"""The verbs that make sound: say, voice, demo."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import click
import numpy as np

from quaver import audio
from quaver.audio import Audio
from quaver.budget import size
from quaver.cli.shell import DTYPES, Progress, cli, json_option, model_options
from quaver.config import FRAME_RATE_HZ
from quaver.demo import demonstrate
from quaver.engine import ROOM_S, Chunk, Engine, Knobs
from quaver.errors import RecipeError
from quaver.guard import Guard, longest_s
from quaver.model.tts import TTS, Utterance
from quaver.sampling import Sampling
from quaver.voice import Voice


@cli.command()
@click.argument("source")
@click.argument("text")
@click.option("-o", "--out", required=True, help="The audio file to write (.wav, .flac, .ogg); - is raw PCM on stdout.")
@click.option(
    "--voice", help="A recording, a voice file (.safetensors), a preset, or a reference that ships with quaver."
)
@click.option("--voice-text", help="What the recording says: clones in context, nearer to the speaker.")
@click.option("--language", default="auto", show_default=True, help="The language of the text.")
@click.option("--instruct", help="How to speak, in words (CustomVoice 1.7B, VoiceDesign).")
@click.option("--layout", type=click.Choice(["stream", "whole"]), default="stream", show_default=True,
              help="Text one token a frame, or all of it before the first frame.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed gives the same speech.")
@click.option("--temperature", type=float, help="0 takes the likeliest code. Default: the model's own.")
@click.option("--top-k", type=int, help="Keep the K likeliest codes; 0 keeps all. Default: the model's own.")
@click.option("--top-p", type=float, help="Keep the likeliest codes up to this probability. Default: the model's own.")
@click.option("--penalty", type=float, help="Repetition penalty on codebook 0. Default: the model's own.")
@click.option("--max-seconds", type=float, help="Cut a sentence that has not stopped by then.")
@click.option("--guard/--no-guard", default=True, show_default=True, help="End speech that would never end.")
@click.option("--retries", type=int, default=0, show_default=True,
              help="Before a sentence that never ends is cut, try the next seed so often.")  # fmt: skip
@click.option("--memory", metavar="SIZE", help="What speaking may take of the device, such as 1.2GB: more of the model "
              "then waits on a GPU's host, and what does not fit is refused beforehand.")  # fmt: skip
@click.option("--stream", is_flag=True, help="Write sound while it is made: 4 frames (0.32 s) at a time.")
@model_options
@json_option
def say(
    source: str, text: str, out: str, voice: str | None, voice_text: str | None, language: str, instruct: str | None,
    layout: str, seed: int, temperature: float | None, top_k: int | None, top_p: float | None, penalty: float | None,
    max_seconds: float | None, *, guard: bool, retries: int, memory: str | None, stream: bool, codec: str | None,
    device: str, dtype: str, as_json: bool,
) -> None:  # fmt: skip
    """Speak TEXT (- reads it from standard input) with the model SOURCE."""
    if text == "-":
        text = sys.stdin.read()
    if out != "-":
        audio.check_target(out)
    engine = Engine.load(
        source, codec=codec, device=device, dtype=DTYPES[dtype], memory_bytes=None if memory is None else size(memory),
        room_s=longest_s(text, language, max_seconds) if guard else max_seconds or ROOM_S,
    )  # fmt: skip
    tts = engine.tts
    knobs = _knobs(engine, temperature, top_k, top_p, penalty, max_seconds)
    if retries and not guard:
        raise RecipeError("--retries needs the guard, which sees that a sentence never ends: leave --no-guard out")
    stream = stream or out == "-"
    spoken_by = tts.voice(voice, text=voice_text) if voice is not None else None
    utterance = Utterance(text, language, spoken_by, instruct, seed, "whole" if layout == "whole" else "stream")
    chunks = engine.speak(
        utterance, knobs, chunk_frames=4 if stream else 12, guard=Guard(retries) if guard else None, settled=not stream
    )
    result = _write_to(out, chunks)
    if as_json:
        click.echo(json.dumps(result), err=out == "-")
        return
    where = "standard output" if out == "-" else out
    click.echo(
        f"{where}: {result['seconds']:.2f} s of speech in {result['wall_s']:.2f} s, "
        f"{result['x_real_time']:.2f} x real time, "
        f"first sound after {result['first_audio_s'] * 1000:.0f} ms, {', '.join(result['finish_reasons'])}",
        err=True,
    )


def _knobs(
    engine: Engine, temperature: float | None, top_k: int | None, top_p: float | None, penalty: float | None,
    max_seconds: float | None,
) -> Knobs:  # fmt: skip
    """The model's own knobs with those that were given; temperature, top-k and top-p hold for every codebook."""
    own = engine.knobs

    def changed(sampling: Sampling) -> Sampling:
        return replace(
            sampling,
            temperature=sampling.temperature if temperature is None else temperature,
            top_k=sampling.top_k if top_k is None else top_k,
            top_p=sampling.top_p if top_p is None else top_p,
        )

    talker = changed(own.sampling)
    talker = talker if penalty is None else replace(talker, penalty=penalty)
    max_frames = own.max_frames
    if max_seconds is not None:
        max_frames = round(max_seconds * FRAME_RATE_HZ)
        if max_frames < 1:
            raise RecipeError(f"--max-seconds is {max_seconds}: it must be 0.08 (one frame) or more")
    return Knobs(talker, changed(own.residual), max_frames)


def _write_to(out: str, spoken: Iterator[Chunk]) -> dict[str, Any]:
    """Writes the chunks to the file ``out``, or as raw 16-bit PCM to stdout for "-", and returns the figures."""
    start = time.perf_counter()
    first_audio_s = 0.0
    chunks: list[Chunk] = []
    raw = sys.stdout.buffer if out == "-" else None
    for chunk in spoken:
        if not chunks:
            first_audio_s = time.perf_counter() - start
        if raw is not None:
            _write_pcm(raw, chunk.audio)
        chunks.append(chunk)
    whole = Audio(np.concatenate([chunk.audio.samples for chunk in chunks]), chunks[0].audio.rate_hz)
    wall_s = time.perf_counter() - start
    if raw is None:
        audio.write(Path(out), whole)
    return {
        "out": out,
        "seconds": round(whole.seconds, 4),
        "n_frames": sum(chunk.n_frames for chunk in chunks),
        "finish_reasons": [chunk.finish_reason for chunk in chunks if chunk.finish_reason is not None],
        "wall_s": round(wall_s, 4),
        "first_audio_s": round(first_audio_s, 4),
        "x_real_time": round(whole.seconds / wall_s, 3),
    }


def _write_pcm(raw: IO[bytes], piece: Audio) -> None:
    raw.write((np.clip(piece.samples, -1, 1) * 32767).round().astype("<i2").tobytes())
    raw.flush()


@cli.command()
@click.argument("source")
@click.argument("recording", type=click.Path(path_type=Path))
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, help="The voice file to write (.safetensors)."
)
@click.option("--text", help="What the recording says: the voice then clones in context, nearer to the speaker.")
@click.option("--name", help="The voice's name. Default: the recording's.")
@model_options
@json_option
def voice(
    source: str, recording: Path, out: Path, text: str | None, name: str | None, codec: str | None, device: str,
    dtype: str, *, as_json: bool,
) -> None:  # fmt: skip
    """Enrol the voice of RECORDING for the model SOURCE, as a file of a few KB."""
    if out.suffix != ".safetensors":
        raise RecipeError(f"{out}: a voice file ends in .safetensors")
    sound = audio.read(recording)
    tts = TTS.load(source, codec=codec, device=device, dtype=DTYPES[dtype])
    made = tts.enroll(sound, text=text, name=name or recording.stem)
    made.save(out)
    _print_voice(made, out, as_json=as_json)


def _print_voice(made: Voice, out: Path, *, as_json: bool) -> None:
    n_frames = 0 if made.codes is None else len(made.codes)
    if as_json:
        click.echo(json.dumps({"out": str(out), "name": made.name, "n_frames": n_frames, "bytes": out.stat().st_size}))
    else:
        context = f", {n_frames} frames of reference speech" if n_frames else ""
        click.echo(f"{out}: voice {made.name}, {out.stat().st_size:,} bytes{context}", err=True)


@cli.command()
@click.option("-o", "--out", type=click.Path(path_type=Path), default=Path("demo-out"), show_default=True)
@click.option("--say", "text", help="What to say: plain English. Default: a sentence of its own.")
@json_option
def demo(out: Path, text: str | None, *, as_json: bool) -> None:
    """Quantize, validate and speak with the small voice that ships with quaver, offline."""
    result = demonstrate(out, text=text, progress=Progress(), tell=lambda line: click.echo(line, err=True))
    if as_json:
        click.echo(json.dumps(result))
