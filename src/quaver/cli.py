"""The command line: one verb a command, ``quaver VERB SOURCE [-o OUT] [--json]``.

Exit codes: 0 done, 1 a validation gate failed, 2 anything else that quaver explains (on one line), 130 Ctrl-C.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

import click
import numpy as np
import torch

from quaver import audio, awq, blend, ledger, validate
from quaver.audio import Audio
from quaver.checkpoint import Checkpoint, check_new
from quaver.config import FRAME_RATE_HZ
from quaver.demo import demonstrate
from quaver.engine import Chunk, Engine, Knobs
from quaver.errors import BudgetError, GateFailed, QuaverError, RecipeError
from quaver.model.tts import TTS, Utterance
from quaver.sampling import Sampling
from quaver.voice import Voice

F = TypeVar("F", bound=Callable[..., Any])

DTYPES: dict[str, torch.dtype | None] = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class Progress:
    """A line on stderr that tells what is being done and how far it is; without a terminal, only when it is done."""

    def __init__(self) -> None:
        self._start, self._what = time.perf_counter(), ""

    def __call__(self, what: str, done: int, total: int) -> None:
        """Shows ``what`` at ``done`` of ``total``."""
        if what != self._what:
            self._start, self._what = time.perf_counter(), what
        if not sys.stderr.isatty() and done != total:
            return
        seconds = time.perf_counter() - self._start
        left = f", {seconds / done * (total - done):.0f} s left" if 0 < done < total else ""
        click.echo(f"\r\033[K{what}: {done}/{total} ({seconds:.0f} s{left})", err=True, nl=done == total)


def _model_options(command: F) -> F:
    options: tuple[Callable[[F], F], ...] = (
        click.option("--codec", metavar="PATH_OR_ID", help="Where the speech tokenizer is, if not with the model."),
        click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N."),
        click.option(
            "--dtype", type=click.Choice(list(DTYPES)), default="auto", show_default=True,
            help="Type of the floats; auto: as stored, but float32 on a CPU for models under 1 GB.",
        ),
    )  # fmt: skip
    for option in options:
        command = option(command)
    return command


def _json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")(command)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="quaver")
def cli() -> None:
    """Makes a Qwen3-TTS voice model small, proves that it is still good, and runs it fast.

    SOURCE is a model's folder, a hub id (owner/name), or "tiny", the small voice that ships with quaver.
    """


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
@click.option("--stream", is_flag=True, help="Write sound while it is made: 4 frames (0.32 s) at a time.")
@_model_options
@_json_option
def say(
    source: str, text: str, out: str, voice: str | None, voice_text: str | None, language: str, instruct: str | None,
    layout: str, seed: int, temperature: float | None, top_k: int | None, top_p: float | None, penalty: float | None,
    max_seconds: float | None, *, stream: bool, codec: str | None, device: str, dtype: str, as_json: bool,
) -> None:  # fmt: skip
    """Speak TEXT (- reads it from standard input) with the model SOURCE."""
    if text == "-":
        text = sys.stdin.read()
    if out != "-":
        audio.check_target(out)
    tts = TTS.load(source, codec=codec, device=device, dtype=DTYPES[dtype])
    engine = Engine(tts)
    knobs = _knobs(engine, temperature, top_k, top_p, penalty, max_seconds)
    spoken_by = tts.voice(voice, text=voice_text) if voice is not None else None
    utterance = Utterance(text, language, spoken_by, instruct, seed, "whole" if layout == "whole" else "stream")
    result = _speak_to(out, engine, utterance, knobs, chunk_frames=4 if stream or out == "-" else 12)
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


def _speak_to(out: str, engine: Engine, utterance: Utterance, knobs: Knobs, *, chunk_frames: int) -> dict[str, Any]:
    """Speaks to the file ``out``, or as raw 16-bit PCM to stdout for "-", and returns the figures."""
    start = time.perf_counter()
    first_audio_s = 0.0
    chunks: list[Chunk] = []
    raw = sys.stdout.buffer if out == "-" else None
    for chunk in engine.speak(utterance, knobs, chunk_frames=chunk_frames):
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
@_model_options
@_json_option
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
@click.argument("source")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The new folder to write.")
@click.option("--samples", type=int, default=128, show_default=True, help="Calibration utterances.")
@click.option("--positions", type=int, default=512, show_default=True, help="Cut each utterance at so many positions.")
@click.option("--seed", type=int, default=1729, show_default=True)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="Your own utterances: a JSONL of text, audio, language, voice.",
)
@_model_options
@_json_option
def quantize(
    source: str, out: Path, samples: int, positions: int, seed: int, calibration: Path | None, codec: str | None,
    device: str, dtype: str, *, as_json: bool,
) -> None:  # fmt: skip
    """Quantize the talker of SOURCE to AWQ INT4 (group 128, zero points, GEMM layout)."""
    check_new(out)
    recipe = awq.Recipe(n_samples=samples, n_positions=positions, seed=seed)
    checkpoint = Checkpoint.open(source, codec=codec)
    report = awq.quantize(
        checkpoint, out, recipe, device=device, dtype=DTYPES[dtype], calibration=calibration, progress=Progress()
    )
    if as_json:
        click.echo(json.dumps(report.to_json()))
    else:
        click.echo(f"{out}: {report.summary()}", err=True)


@cli.command(name="blend")
@click.argument("source")
@click.option(
    "--donor", required=True, metavar="LLM", help="A language model of the talker's widths: folder or hub id."
)
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The new folder to write.")
@click.option("--alpha", type=float, default=0.03, show_default=True, help="The donor's share.")
@click.option("--layers", metavar="N-M=ALPHA,...", help="Other shares for some layers, such as 0-3=0,27=0.05.")
@click.option("--tensors", default="*", show_default=True, metavar="PATTERN", help="Only tensors named like this.")
@click.option("--method", type=click.Choice(["lerp", "slerp"]), default="lerp", show_default=True)
@click.option("--force", is_flag=True, help="Blend 10 % and more all the same.")
@click.option("--codec", metavar="PATH_OR_ID", help="Where the speech tokenizer is, if not in the model's folder.")
@_json_option
def blend_command(
    source: str, donor: str, out: Path, alpha: float, layers: str | None, tensors: str,
    method: Literal["lerp", "slerp"], codec: str | None, *, force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Blend a language model's feed-forward weights into the talker of SOURCE."""
    check_new(out)
    recipe = blend.Recipe(alpha, blend.layer_shares(layers or ""), tensors, method, force)
    checkpoint = Checkpoint.open(source, codec=codec)
    report = blend.blend(checkpoint, blend.Donor.open(donor), out, recipe, progress=Progress())
    if as_json:
        click.echo(json.dumps(report.to_json()))
    else:
        click.echo(f"{out}: {report.summary}", err=True)


@cli.command(name="validate")
@click.argument("candidate")
@click.option("--against", required=True, metavar="SOURCE", help="The original model.")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="A new folder for report.html, report.md and report.json."
)
@click.option("--samples", type=int, default=32, show_default=True, help="Held-out utterances.")
@click.option("--seed", type=int, default=1729, show_default=True)
@_model_options
@_json_option
def validate_command(
    candidate: str, against: str, out: Path | None, samples: int, seed: int, codec: str | None, device: str, dtype: str,
    *, as_json: bool,
) -> None:  # fmt: skip
    """Compare CANDIDATE with its original on held-out speech; exit 1 when a gate fails."""
    if out is not None:
        check_new(out)
    recipe = validate.Recipe(n_samples=samples, seed=seed)
    report = validate.validate(
        Checkpoint.open(candidate, codec=codec), Checkpoint.open(against, codec=codec), recipe,
        device=device, dtype=DTYPES[dtype], progress=Progress(),
    )  # fmt: skip
    if out is not None:
        report.save(out)
    click.echo(report.to_json() if as_json else report.to_markdown())
    report.require()


@cli.command()
@click.argument("source")
@click.option("--codec", metavar="PATH_OR_ID", help="Where the speech tokenizer is, if not in the model's folder.")
@click.option("--device", default="cpu", show_default=True, help="Where memory is counted: cpu or cuda.")
@click.option("--verify", is_flag=True, help="Check every weight file against the sums in provenance.json first.")
@_json_option
def info(source: str, codec: str | None, device: str, *, verify: bool, as_json: bool) -> None:
    """Show each module of SOURCE: parameters, type, bytes on disk and in memory, what is quantized."""
    checkpoint = Checkpoint.open(source, codec=codec)
    if verify:
        checkpoint.verify()
    weighed = ledger.weigh(checkpoint, device=device)
    if as_json:
        click.echo(json.dumps(weighed.to_json()))
        return
    for line in ledger.table(weighed):
        click.echo(line)


@cli.command()
@click.option("-o", "--out", type=click.Path(path_type=Path), default=Path("demo-out"), show_default=True)
@click.option("--say", "text", help="What to say: plain English. Default: a sentence of its own.")
@_json_option
def demo(out: Path, text: str | None, *, as_json: bool) -> None:
    """Quantize, validate and speak with the small voice that ships with quaver, offline."""
    result = demonstrate(out, text=text, progress=Progress(), tell=lambda line: click.echo(line, err=True))
    if as_json:
        click.echo(json.dumps(result))


def main() -> None:
    """The program ``quaver``: runs a verb and exits."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Runs the command line ``arguments`` and returns the exit code."""
    try:
        cli.main(arguments, prog_name="quaver", standalone_mode=False)
    except GateFailed as error:
        click.echo(f"quaver: {error}", err=True)
        return 1
    except QuaverError as error:
        click.echo(f"quaver: {error}", err=True)
        return 2
    except (MemoryError, torch.OutOfMemoryError) as error:
        first = str(error).strip().splitlines()[:1]
        short = BudgetError(f"out of memory: {first[0] if first else 'the machine has no more'}; nothing was written")
        click.echo(f"quaver: {short}", err=True)
        return 2
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return 2
    except (click.Abort, KeyboardInterrupt):
        click.echo("quaver: stopped; nothing half-written was left", err=True)
        return 130
    return 0
