"""The main job in one go, offline: quantize the small voice that ships, check it against its original, and speak."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quaver import audio, awq, corpus, validate
from quaver.checkpoint import Checkpoint
from quaver.engine import Engine
from quaver.files import check_new
from quaver.model.tts import TTS, Utterance, references

MODEL = "tiny"
_RESULT = "demo.json"

Progress = Callable[[str, int, int], None]


def demonstrate(
    out: Path,
    *,
    text: str | None = None,
    progress: Progress | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Figures of the demo; leaves in the folder ``out`` the INT4 model, the report, and the voice before and after.

    An earlier demo in ``out`` is replaced; any other folder there is a RecipeError. Raises GateFailed when the INT4
    model does not hold up.
    """
    start = time.perf_counter()
    if (out / _RESULT).exists():
        shutil.rmtree(out)
    check_new(out)
    checkpoint = Checkpoint.open(MODEL)
    original = TTS.load(checkpoint)
    known = corpus.sentences(original)[0]
    voice = known.get("voice", next(iter(references())))
    text = text if text is not None else known["text"]
    original.prompt(Utterance(text, "english", original.voice(voice)))
    out.mkdir()
    (out / _RESULT).write_text("{}\n")

    tell(f"1/3 quantize {MODEL} to INT4")
    made = awq.quantize(checkpoint, out / "tiny-int4", awq.Recipe(), progress=progress)
    tell(f"    {made.summary()}")

    tell("2/3 validate it against its original on held-out speech")
    candidate = Checkpoint.open(out / "tiny-int4")
    report = validate.validate(candidate, checkpoint, validate.Recipe(n_samples=16), progress=progress)
    validate.record(candidate, checkpoint, report)
    report.save(out / "report")
    tell(f"    {report.verdict}: {out / 'report' / 'report.html'}")

    tell(f"3/3 say {text!r} in the voice of the recording {voice}")
    spoken = {}
    for name, tts in (("original", original), ("int4", TTS.load(out / "tiny-int4"))):
        speech = Engine(tts).say(Utterance(text, "english", tts.voice(voice)))
        path = out / f"{name}.wav"
        audio.write(path, speech.audio)
        spoken[name] = {
            "wav": str(path),
            "seconds": round(speech.audio.seconds, 3),
            "x_real_time": round(speech.x_real_time, 2),
            "finish_reasons": list(speech.finish_reasons),
        }
        tell(f"    {path}: {speech.audio.seconds:.2f} s, {speech.x_real_time:.1f} x real time")
    report.require()
    result = {"text": text, "voice": voice, "spoken": spoken, "wall_s": round(time.perf_counter() - start, 1)}
    (out / _RESULT).write_text(json.dumps(result, indent=1) + "\n")
    tell(f"done in {result['wall_s']} s: listen to {out / 'original.wav'} and {out / 'int4.wav'}")
    return result
