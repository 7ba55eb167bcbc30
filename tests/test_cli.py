"""The doors: every verb on a toy, and what each does with bad input. Nothing is written when something is wrong."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import soundfile

import toy
from quaver import audio, cli, judge
from quaver.audio import Audio
from quaver.cli import shell
from quaver.int4 import Int4Linear
from quaver.model.tts import TTS


@pytest.fixture(scope="session")
def recording(tmp_path_factory):
    """Two seconds of something speech-like: noise whose loudness goes up and down, 16 kHz, stereo."""
    rng = np.random.default_rng(0)
    loudness = np.abs(np.sin(np.arange(32000) / 4000))[:, None]
    path = tmp_path_factory.mktemp("recording") / "ref.wav"
    soundfile.write(path, rng.standard_normal((32000, 2)) * 0.1 * loudness, 16000)
    return path


def run(capsys, *arguments):
    """The exit code, stdout and stderr of a command line."""
    code = cli.run([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_say_voice_and_json(capsys, toy_folder, recording, tmp_path):
    out, voice = tmp_path / "out.wav", tmp_path / "ref.safetensors"
    code, text, _ = run(
        capsys, "voice", toy_folder, recording, "-o", voice, "--text", "What it says.", "--name", "Ann", "--json"
    )
    assert code == 0
    assert json.loads(text) == {"out": str(voice), "name": "Ann", "n_frames": 25, "bytes": voice.stat().st_size}
    assert voice.stat().st_size < 4096
    spoken = ("say", toy_folder, "Hello there.", "--voice", voice, "-o", out, "--max-seconds", "0.8")
    code, text, _ = run(capsys, *spoken, "--json", "--language", "english", "--seed", "4")
    assert code == 0
    told = json.loads(text)
    found = audio.read(out)
    assert found.rate_hz == 24000
    assert abs(told["seconds"] - found.seconds) < 1e-4
    assert told["n_frames"] * 1920 == len(found.samples)
    code, _, told = run(capsys, *spoken)
    assert code == 0
    assert "x real time" in told


def test_the_same_seed_writes_the_same_samples_streamed_or_not(capsys, toy_folder, recording, tmp_path):
    for name, more in (("a", ()), ("b", ("--stream",)), ("c", ("--seed", "9"))):
        spoken = ("say", toy_folder, "Hello.", "--voice", recording, "-o", tmp_path / f"{name}.wav")
        assert run(capsys, *spoken, "--max-seconds", "0.8", *more)[0] == 0
    a, b, c = (audio.read(tmp_path / f"{name}.wav").samples for name in "abc")
    assert np.abs(a - b).max() <= 2 / 32768
    assert np.abs(a - c).max() > 0.001


def test_raw_samples_on_stdout(toy_folder, recording):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "quaver",
            "say",
            toy_folder,
            "-",
            "--voice",
            recording,
            "-o",
            "-",
            "--max-seconds",
            "0.4",
        ],
        input=b"Hello.",
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) == 2 * 5 * 1920 or len(done.stdout) % (2 * 1920) == 0
    assert np.frombuffer(done.stdout, "<i2").std() > 0


def test_info(capsys, toy_folder):
    code, text, _ = run(capsys, "info", toy_folder, "--json")
    assert code == 0
    told = json.loads(text)
    on_disk = sum((toy_folder / f).stat().st_size for f in ("model.safetensors", "speech_tokenizer/model.safetensors"))
    assert told["file_bytes"] == on_disk
    assert told["total"]["disk_bytes"] < on_disk
    assert sum(entry["n_parameters"] for entry in told["entries"]) == told["total"]["n_parameters"]
    assert {entry["name"] for entry in told["entries"]} >= {"talker layers", "predictor heads", "codec decoder"}
    code, text, _ = run(capsys, "info", toy_folder)
    assert "talker layers" in text


def test_quantize_then_say_and_validate(capsys, toy_folder, recording, tmp_path):
    rows = [{"text": f"Sentence number {n}.", "audio": str(recording)} for n in range(3)]
    (tmp_path / "calibration.jsonl").write_text("\n".join(map(json.dumps, rows)))
    int4 = tmp_path / "int4"
    code, text, _ = run(
        capsys, "quantize", toy_folder, "-o", int4, "--calibration", tmp_path / "calibration.jsonl", "--json"
    )
    assert code == 0
    assert json.loads(text)["loss"] <= json.loads(text)["loss_nearest"]
    assert run(capsys, "verify", int4, "--parent", toy_folder)[0] == 0
    told = json.loads(run(capsys, "info", int4, "--json")[1])
    layers = next(entry for entry in told["entries"] if entry["name"] == "talker layers")
    assert "INT4" in layers["quantized"]
    loaded = TTS.load(int4).talker.model.layers
    held = sum(module.weight_bytes for module in loaded.modules() if isinstance(module, Int4Linear))
    norms = sum(parameter.nbytes for parameter in loaded.parameters())
    assert layers["memory_bytes"] == held + norms
    before = json.loads(run(capsys, "info", toy_folder, "--json")[1])
    assert told["total"]["n_parameters"] == before["total"]["n_parameters"]
    spoken = ("say", int4, "Hello.", "--voice", recording, "-o", tmp_path / "x.wav", "--max-seconds", "0.4")
    assert run(capsys, *spoken)[0] == 0
    code, _, told = run(capsys, "quantize", int4, "-o", tmp_path / "again")
    assert code == 2
    assert "is quantized already" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["say", "MODEL", "", "--voice", "REF"], "empty"),
        (["say", "MODEL", "?!", "--voice", "REF"], "has no letter and no digit"),
        (["say", "MODEL", "Hi", "--voice", "missing.wav"], "missing.wav does not exist"),
        (["say", "MODEL", "Hi", "--voice", "empty.wav"], "empty.wav is empty"),
        (["say", "MODEL", "Hi", "--voice", "noise.txt"], "noise.txt cannot be read as audio"),
        (["say", "MODEL", "Hi", "--voice", "silent.wav"], "is silent"),
        (["say", "MODEL", "Hi", "--voice", "short.wav"], "lasts 0.004 s"),
        (["say", "MODEL", "Hi", "--voice", "nan.wav"], "NaN or infinite"),
        (["say", "MODEL", "Hi", "--voice", "broken.safetensors"], "is no voice file"),
        (["say", "MODEL", "Hi", "--voice", "nobody"], "nobody is no recording"),
        (["say", "MODEL", "Hi"], "speaks in a cloned voice only"),
        (["say", "MODEL", "Hi", "--voice", "REF", "--language", "klingon"], "'klingon' is unknown"),
        (["say", "MODEL", "Hi", "--voice", "REF", "--temperature", "-1"], "temperature is -1"),
        (["say", "MODEL", "Hi", "--voice", "REF", "--max-seconds", "0"], "--max-seconds is 0"),
        (["say", "nowhere", "Hi", "--voice", "REF"], "nowhere is no folder"),
        (["say", "MODEL", "Hi", "--voice", "REF", "--device", "cuda"], "no CUDA device"),
    ],
)
def test_bad_requests(capsys, toy_folder, recording, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.wav").touch()
    (tmp_path / "noise.txt").write_text("not audio")
    (tmp_path / "broken.safetensors").write_bytes(b"xx")
    audio.write(tmp_path / "silent.wav", Audio(np.zeros(48000, np.float32), 24000))
    audio.write(tmp_path / "short.wav", Audio(np.ones(96, np.float32), 24000))
    soundfile.write(tmp_path / "nan.wav", np.full(48000, np.nan), 24000, subtype="FLOAT")
    before = sorted(path.name for path in tmp_path.iterdir())
    places = {"MODEL": str(toy_folder), "REF": str(recording)}
    code, printed, told = run(capsys, *[places.get(a, a) for a in arguments], "-o", "out.wav")
    assert code == 2
    assert message in told
    assert len(told.strip().splitlines()) == 1
    assert printed == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gates", "judged.toml"], "judged.toml has gates on what judges hear: name judges with --judge"),
        (["--gates", "typo.toml"], "typo.toml: first_lk is no limit: there are first_kl"),
        (["--gates", "none.toml"], "none.toml cannot be read"),
        (["--judge", "nowhere"], "nowhere/whisper-base is missing: put Systran/faster-whisper-base of the hub there"),
    ],
)
def test_bad_gates_and_judges_cost_no_speech(capsys, toy_folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    for module in ("faster_whisper", "onnxruntime"):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    monkeypatch.setattr(judge, "_quality_weights", lambda: tmp_path)
    (tmp_path / "judged.toml").write_text("[judged]\ncer = 0.1\n")
    (tmp_path / "typo.toml").write_text("first_lk = 0.1\n")
    before = sorted(tmp_path.iterdir())
    code, printed, told = run(capsys, "validate", toy_folder, "--against", toy_folder, "-o", "report", *arguments)
    assert code == 2 and message in told and printed == ""
    assert sorted(tmp_path.iterdir()) == before


def test_gates_of_a_file_decide_the_exit_code(capsys, toy_folder, tmp_path):
    asked = ("validate", toy_folder, "--against", toy_folder, "--samples", "1", "--json", "--gates")
    (tmp_path / "loose.toml").write_text("stop_change = inf\nduration = inf\n")
    code, printed, _ = run(capsys, *asked, tmp_path / "loose.toml")
    assert code == 0 and json.loads(printed)["passed"]
    assert "duration ratio, longer by shorter" in {row["name"] for row in json.loads(printed)["metrics"]}
    (tmp_path / "small.toml").write_text("stop_change = inf\nduration = inf\ndisk = 0.9\n")
    code, printed, told = run(capsys, *asked, tmp_path / "small.toml")
    assert code == 1 and "disk, candidate by original is 1, at most 0.9 is allowed" in told


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("no/such/out.wav", "the folder no/such does not exist"),
        ("out.mp9", "cannot be written as .mp9"),
        (".", "is a folder"),
    ],
)
def test_bad_output_places(capsys, toy_folder, recording, tmp_path, monkeypatch, out, message):
    monkeypatch.chdir(tmp_path)
    code, _, told = run(capsys, "say", toy_folder, "Hi", "--voice", recording, "-o", out, "--max-seconds", "0.2")
    assert code == 2
    assert message in told
    assert list(tmp_path.iterdir()) == []


def test_a_preset_unknown_to_the_model(capsys, tmp_path):
    folder = toy.checkpoint(tmp_path / "m", "custom_voice")
    code, _, told = run(capsys, "say", folder, "Hi", "--voice", "bob", "-o", tmp_path / "out.wav")
    assert code == 2
    assert "anna, dylan" in told


def test_usage_errors_and_help(capsys):
    assert run(capsys, "sing")[0] == 2
    assert run(capsys, "say")[0] == 2
    code, printed, _ = run(capsys, "--help")
    assert code == 0
    for verb in (
        "say", "voice", "quantize", "blend", "export", "validate", "info", "plan", "verify", "card", "demo",
    ):  # fmt: skip
        assert verb in printed
        assert run(capsys, verb, "--help")[0] == 0


def test_an_existing_output_is_never_overwritten_by_quantize(capsys, toy_folder, tmp_path):
    (tmp_path / "out").mkdir()
    code, _, told = run(capsys, "quantize", toy_folder, "-o", tmp_path / "out")
    assert code == 2
    assert "exists already" in told


def test_ctrl_c_leaves_nothing_half_written_and_says_how_to_go_on(toy_folder, recording, tmp_path):
    folder = shutil.copytree(toy_folder, tmp_path / "model")
    rows = [{"text": f"Sentence number {n}.", "audio": str(recording)} for n in range(400)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    before = sorted(path.name for path in tmp_path.iterdir())
    asked = ["quantize", folder, "-o", tmp_path / "out", "--samples", "400", "--calibration", tmp_path / "rows.jsonl"]
    running = subprocess.Popen(
        [sys.executable, "-m", "quaver", *asked],
        stderr=subprocess.PIPE,
        # A test run in a shell's background inherits that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    assert running.stderr is not None
    assert any(b"encoding recordings: 400/400" in line for line in running.stderr)
    # Once they are kept, the search over the layers is next.
    while not list(tmp_path.glob(".out.partial/calibration.*.safetensors")):
        assert running.poll() is None
        time.sleep(0.01)
    time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    _, told = running.communicate(timeout=60)
    assert running.returncode == 130, told
    assert b"nothing half-written" in told
    assert b".out.partial: the same command goes on from there" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, ".out.partial"])


def test_say_tells_of_speech_that_never_ends(capsys, toy_folder, recording, tmp_path):
    out = tmp_path / "out.wav"
    spoken = (
        "say",
        toy_folder,
        "Hello there, you.",
        "--voice",
        recording,
        "-o",
        out,
        "--language",
        "english",
        "--json",
    )
    reasons = {}
    for seed in range(6):
        for name, more in (("raw", ("--no-guard", "--max-seconds", "8")), ("cut", ()), ("again", ("--retries", "1"))):
            code, text, _ = run(capsys, *spoken, "--seed", str(seed), *more)
            assert code == 0
            reasons.setdefault(seed, {})[name] = json.loads(text)["finish_reasons"][0]
    assert {told["cut"] for told in reasons.values()} == {"stop", "runaway-trimmed"}
    for told in reasons.values():
        assert told["raw"] in ("stop", "length")
        assert told["again"] == "stop" if told["cut"] == "stop" else told["again"].startswith("runaway-")
    code, _, told = run(capsys, *spoken, "--retries", "1", "--no-guard")
    assert code == 2 and "--retries needs the guard" in told
    code, _, told = run(capsys, *spoken, "--retries", "1", "--stream")
    assert code == 2 and "cannot be tried again" in told
    code, _, told = run(capsys, *spoken, "--retries", "-1")
    assert code == 2 and "retries is -1" in told


def test_a_log_has_a_line_now_and_then_and_a_kind_begins_where_the_last_ended(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(shell, "time", types.SimpleNamespace(perf_counter=lambda: now))
    progress = shell.Progress()
    for second, event in ((4, ("one", 1, 2)), (9, ("one", 2, 2)), (29, ("two", 1, 3)), (31, ("two", 2, 3))):
        now = second
        progress(*event)
    progress.tell("a line")
    now = 40.0
    progress("two", 3, 3)
    assert capsys.readouterr().err.splitlines() == [
        "one: 2/2 (9 s)",
        "two: 1/3 (20 s, 40 s left)",
        "a line",
        "two: 3/3 (31 s)",
    ]
