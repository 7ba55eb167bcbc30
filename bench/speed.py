"""What a frame costs: milliseconds, times real time, first audio and memory, beside what the bytes alone would take.

    python bench/speed.py CONFIG.json CODEC_CONFIG.json [--batches 1 4 16 64] [--frames 100] [--out speed.json]
                          [--only WORD ...] [--official PYTHON] [--faster PYTHON]

Random weights of the configured shapes (INT4: random integers), so nothing here says how it sounds. Rows: plain
PyTorch, one kernel, and graphs with and without ``overlap``, each with a BF16 and an INT4 talker, and with an INT4
talker and the predictor in INT8 (which the one kernel does not take) and INT4. Beside the figures a plot of them is
written, as SVG. ``--only`` takes the sections whose names have one of the words in them. The 0.6B is measured by its
own CONFIG. Every row stands alone: one that fails is reported with its error, and the others are still measured. Where
there is no CUDA device only plain PyTorch is timed.
``--official`` and ``--faster`` are commands that start a Python with qwen-tts or with faster-qwen3-tts: the same shape
spoken by them, in BF16, on the same machine in the same run.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gemlite_times import gemlite_times
from quaver.config import FRAME_RATE_HZ, ModelConfig, parse
from quaver.engine import Engine, Knobs
from quaver.errors import QuaverError
from quaver.int4 import GROUP, Int4Linear
from quaver.int8 import Int8Linear
from quaver.model.layers import GROUPS, Decoder
from quaver.model.tts import TTS, Model, Prompt, Utterance
from quaver.sampling import Sampling
from quaver.voice import Voice
from random_model import random_checkpoint
from speed_figures import plot, projection, timed

if TYPE_CHECKING:
    from quaver.frame import Weights

SAMPLED = Knobs(Sampling(), Sampling(penalty=1.0), 2048)
GREEDY = Knobs(Sampling(0.0, penalty=1.0), Sampling(0.0, penalty=1.0), 2048)
N_PROMPT = 32
SMALL_PREDICTORS = ("int4/int8", "int4/int4")
"""The models of which the predictor is in fewer bits too."""
Row = dict[str, Any]


def random_tts(shell: TTS, settings: Mapping[str, Any]) -> TTS:
    """A model of ``settings`` with random weights made on the device of ``shell``, which lends codec and tokenizer.

    It never stops: the stop id's row of the head is zero, far below the 50 likeliest.
    """
    config = parse(ModelConfig, dict(settings), "settings")
    with torch.device("meta"):
        model = Model(config)
    model = model.to(shell.dtype).to_empty(device=shell.device)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() == 1 and "norm" in name:
                value.fill_(1)
            else:
                value.normal_(0, 0.5 if "embedding" in name else max(1, value[0].numel()) ** -0.5)
        model.talker.codec_head.weight[config.talker_config.codec_eos_token_id] = 0
    checkpoint = replace(shell.checkpoint, config=config, settings=settings)
    return TTS(checkpoint, model.eval().requires_grad_(False), shell.decoder, shell.tokenizer)


def shell_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``settings`` at tiny widths: a folder of them is written and read in seconds."""
    tiny = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1}
    talker = settings["talker_config"]
    small = {**talker["code_predictor_config"], **tiny}
    found = {
        **settings,
        "talker_config": {**talker, **tiny, "text_hidden_size": 64, "code_predictor_config": small},
    }
    if "speaker_encoder_config" in settings:
        found["speaker_encoder_config"] = {**settings["speaker_encoder_config"], "enc_dim": 128}
    return found


def quantize_at_random(tts: TTS, decoder: Decoder) -> None:
    """Puts random 4-bit weights of the usual size in the place of the linears of ``decoder``, a part of ``tts``."""
    for layer in decoder.layers:
        for path in (path for group in GROUPS for path in group.linears):
            parent, _, leaf = path.rpartition(".")
            linear = layer.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            n_in, n_out = linear.in_features, linear.out_features
            with torch.device(tts.device):
                made = Int4Linear(n_in, n_out)
                shape = (n_in, n_out // 8)
                made.qweight = torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32)
                made.qzeros = torch.full((n_in // GROUP, n_out // 8), -0x77777778, dtype=torch.int32)
                # 16 levels spread evenly have a deviation of 4.6 steps.
                made.scales = torch.full((n_in // GROUP, n_out), n_in**-0.5 / 4.6, dtype=torch.float16)
            made.prepare(tts.dtype)
            setattr(layer.get_submodule(parent), leaf, made)


def round_at_random(part: nn.Module) -> None:
    """Puts random 8-bit weights of the usual size in the place of the linears of ``part``, heads included."""
    for name, linear in list(part.named_modules()):
        if not isinstance(linear, nn.Linear) or linear.bias is not None:
            continue
        made = Int8Linear(linear.in_features, linear.out_features).to(linear.weight.device)
        made.weight_int8.random_(-127, 128)
        # 255 levels spread evenly have a deviation of 74 steps.
        made.weight_scale.fill_(linear.in_features**-0.5 / 74)
        parent, _, leaf = name.rpartition(".")
        setattr(part.get_submodule(parent), leaf, made)


def prompts(tts: TTS, n: int) -> list[Prompt]:
    """``n`` prompts of random embeddings, each of another length."""
    table = tts.talker.model.codec_embedding.weight.detach()
    return [Prompt(table[: N_PROMPT + i % 8].clone(), table[:40].clone()) for i in range(n)]


def synchronize(tts: TTS) -> None:
    """Waits for the device."""
    if tts.device.type == "cuda":
        torch.cuda.synchronize()


def timed_frames(engine: Engine, batch: int, n_frames: int) -> Row:
    """The median and the 95th percentile of a frame's milliseconds, as a caller of ``frames`` sees them."""
    tts = engine.tts
    knobs = replace(SAMPLED, max_frames=n_frames)
    given = prompts(tts, batch)
    for _ in engine.frames(given, range(batch), replace(knobs, max_frames=min(n_frames, 4))):
        pass
    for _ in engine.frames(given, range(batch), knobs):
        break
    synchronize(tts)
    if tts.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times, start = [], time.perf_counter()
    # Each frame is waited for by the loop itself, which must know whether anyone still speaks.
    for _ in engine.frames(given, range(batch), knobs):
        now = time.perf_counter()
        times.append(1e3 * (now - start))
        start = now
    # The first frame holds the prefill.
    later = times[2:] or times
    middle = statistics.median(later)
    peak = torch.cuda.max_memory_allocated() / 1e9 if tts.device.type == "cuda" else None
    return {
        "ms_per_frame": middle,
        "p95_ms": sorted(later)[int(0.95 * (len(later) - 1))],
        "prefill_ms": times[0],
        "x_real_time": batch * 1e3 / FRAME_RATE_HZ / middle,
        "peak_gb": peak,
        "n_frames": len(times),
    }


def replayed(weights: Weights, batch: int, n_frames: int, way: str) -> Row:
    """The milliseconds of a frame on the device alone: a run of replays between two events, for both samplings."""
    from quaver.frame import FrameGraph

    found: Row = {}
    start_s = time.perf_counter()
    frame = FrameGraph(weights, batch, 512, 64, overlap=way == "graph overlap", whole=way == "whole")
    if way == "whole" and not frame.whole:
        return {"not here": "the one kernel does not fit this GPU or this batch"}
    # A graph is captured when its first step is taken; idle slots say nothing.
    frame.step()
    torch.cuda.synchronize()
    found["build_s"] = time.perf_counter() - start_s
    n_frames = min(n_frames, 400)
    for name, knobs in (("greedy", GREEDY), ("sampled", SAMPLED)):
        for slot, prompt in enumerate(prompts(weights.tts, batch)):
            frame.join(slot, prompt, slot, knobs.sampling, knobs.residual)
        for _ in range(5):
            frame.step()
        found[f"{name}_ms"] = device_ms(frame.step, n_frames)
        found[f"{name}_alive"] = int(frame.slots.alive.sum())
    return found


def kernel_times(weights: Weights, batch: int) -> list[Row]:
    """One frame's kernels by name and launch shape: how many, and their microseconds together, longest first."""
    from quaver.frame import FrameGraph

    frame = FrameGraph(weights, batch, 512, 64)
    for slot, prompt in enumerate(prompts(weights.tts, batch)):
        frame.join(slot, prompt, slot, SAMPLED.sampling, SAMPLED.residual)
    for _ in range(3):
        frame.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        frame.step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("cat") in ("kernel", "gpu_memcpy")]
    events.sort(key=lambda event: event["ts"])
    span = events[-1]["ts"] + events[-1]["dur"] - events[0]["ts"]
    found: dict[str, Row] = {}
    for event in events:
        name = f"{event['name'][:40]} {event['args'].get('grid', '')}"
        row = found.setdefault(name, {"kernel": name, "n": 0, "us": 0.0})
        row["n"] += 1
        row["us"] += event["dur"]
    rows = sorted(found.values(), key=lambda row: -float(row["us"]))
    busy = sum(float(row["us"]) for row in rows)
    return [{"kernel": "frame, first to last", "n": len(events), "us": span}, *rows[:30], {
        "kernel": "all kernels", "n": len(events), "us": busy}]  # fmt: skip


def time_line(weights: Weights) -> list[Row]:
    """Where a frame's cycles go in the one kernel, stage by stage: the mean of all blocks' first warps."""
    from quaver.frame import FrameGraph

    config = weights.tts.config.talker_config
    frame = FrameGraph(weights, 1, 512, 64)
    kernel = frame.kernel(traced=True)
    if kernel is None:
        return [{"not here": "the one kernel does not fit this GPU"}]
    frame.join(0, prompts(weights.tts, 1)[0], 0, SAMPLED.sampling, SAMPLED.residual)
    for _ in range(20):
        kernel()
    torch.cuda.synchronize()
    steps = ("rows", "product", "others", "sum")
    layer = [f"{name} {step}" for name in ("qkv", "o", "gate_up", "down") for step in steps]
    layer.insert(len(steps), "attention")
    names = [*(f"first {step}" for step in steps)]
    if weights.projection is not None:
        names += [f"projection {step}" for step in steps[1:]]
    names.append("first sample")
    for _ in range(config.num_code_groups - 1):
        names += config.code_predictor_config.num_hidden_layers * [f"predictor {name}" for name in layer]
        names += [*(f"predictor head {step}" for step in steps), "predictor sample"]
    names += config.num_hidden_layers * [f"talker {name}" for name in layer]
    # A moment: cycles, which, cycles waited for weights so far, nanoseconds.
    moments = kernel.trace[:, : len(names) + 1].double()
    spent = (moments[:, 1:] - moments[:, :-1]).mean(0).tolist()
    found: dict[str, Row] = {}
    for name, (cycles, _, waited, _) in zip(names, spent, strict=True):
        row = found.setdefault(name, {"stage": name, "n": 0, "cycles": 0.0, "waited for weights": 0.0})
        row["n"] += 1
        row["cycles"] += cycles
        row["waited for weights"] += waited
    cycles, _, _, ns = (moments[0, -1] - moments[0, 0]).tolist()
    whole = {"stage": "frame", "n": 1, "cycles": cycles, "us": ns / 1e3, "ghz": cycles / max(ns, 1)}
    return [whole, *found.values()]


def product_times(weights: Weights) -> list[Row]:
    """Each shape of product for one row, on multiply-adds and on tensor cores: microseconds and bandwidth.

    Every call reads the next layer's weight, as a frame does, so that the cache is as cold as it is there.
    """
    from quaver.kernels.linear import linear

    config = weights.tts.config.talker_config
    found = []
    for stack, layers, eps in (
        ("talker", weights.talker, config.rms_norm_eps),
        ("predictor", weights.predictor, config.code_predictor_config.rms_norm_eps),
    ):
        for name in ("qkv", "o", "gate_up", "down"):
            matrices = [getattr(layer, name) for layer in layers]
            n_out, n_in = matrices[0].shape
            gated = name == "gate_up"
            like = weights.tables[0]
            x = torch.randn(1, n_in, device=like.device).to(like.dtype)
            y = like.new_zeros(1, n_out // 2 if gated else n_out)
            gain = like.new_ones(n_in) if name in ("qkv", "gate_up") else None
            for cores in (False, True):

                def run(
                    matrices: list[Any] = matrices, x: Tensor = x, y: Tensor = y, gain: Tensor | None = gain,
                    gated: bool = gated, cores: bool = cores, eps: float = eps,
                ) -> None:  # fmt: skip
                    for matrix in matrices:
                        linear(x, matrix, y, gain=gain, eps=eps, gated=gated, tensor_cores=cores)

                us = 1e3 * graph_ms(run) / len(matrices)
                found.append({
                    "product": f"{stack} {name}", "tensor_cores": cores, "us": us,
                    "tb_s": matrices[0].n_bytes / us / 1e6,
                })  # fmt: skip
    return found


def graph_ms(run: Callable[[], None], n: int = 50) -> float:
    """The milliseconds of ``run`` as a graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    return device_ms(graph.replay, n)


def device_ms(run: Callable[[], object], n: int) -> float:
    """The milliseconds of one of ``n`` runs in a row, as the device counts them."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    first.record()
    for _ in range(n):
        run()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last)) / n


def copy_tb_s() -> float:
    """The bandwidth of a kernel that copies within the device, reads and writes together.

    Not of PyTorch's own copy: in a graph that is left to the driver, which takes two thirds of what there is.
    """
    source = torch.ones(1 << 28, device="cuda")
    target = torch.empty_like(source)
    ms = graph_ms(lambda: _copy(source, target), 10)
    return 2 * source.nbytes / ms / 1e9


def _copy(source: Tensor, target: Tensor) -> None:
    torch.neg(source, out=target)


def _utterance(tts: TTS, seed: int) -> Utterance:
    width = tts.config.talker_config.hidden_size
    voice = Voice(name="x", speaker=torch.randn(width, generator=torch.Generator().manual_seed(5)))
    return Utterance("This is what it takes to be heard.", "english", voice, seed=seed)


def first_audio(engine: Engine, n: int = 20) -> Row:
    """Seconds from the request to the first four frames' samples: median and 95th percentile of ``n`` after three."""
    tts = engine.tts
    seconds = []
    for seed in range(n + 3):
        utterance = _utterance(tts, seed)
        start = time.perf_counter()
        # Four frames are all: what would be made behind them is no part of this.
        chunks = engine.speak(utterance, replace(SAMPLED, max_frames=5), chunk_frames=4, guard=None)
        next(chunks)
        seconds.append(time.perf_counter() - start)
        for _ in chunks:
            pass
    later = sorted(seconds[3:])
    return {
        "first_audio_s": statistics.median(later),
        "p95_s": later[int(0.95 * (len(later) - 1))],
        "cold_s": seconds[0],
    }


PROMPTS = (32, 64, 128, 256, 512, 1024, 2048)
LENGTHS_S = (10, 30, 60, 120, 180)


def prefill_times(weights: Weights) -> list[Row]:
    """The prompt alone: milliseconds as the host waits for them, and on the device, by positions."""
    table = weights.tts.talker.model.codec_embedding.weight.detach()
    found = []
    with torch.inference_mode():
        for n in PROMPTS:
            embeds = table[torch.arange(n, device=table.device) % len(table)]
            # The first compiles, the second records.
            for _ in range(3):
                weights.prefill(embeds)
            on_device = device_ms(partial(weights.prefill, embeds), 10)
            times = []
            for _ in range(10):
                start = time.perf_counter()
                weights.prefill(embeds)
                torch.cuda.synchronize()
                times.append(1e3 * (time.perf_counter() - start))
            ms = statistics.median(times)
            found.append({"positions": n, "ms": ms, "in a row ms": on_device, "positions_s": 1e3 * n / ms})
    return found


def first_audio_parts(weights: Weights) -> Row:
    """Medians of the parts of first audio, in milliseconds, each waited for: together they are more than the whole.

    ``host`` is what ``join`` takes until it returns, before the device has done it.
    """
    from quaver.frame import FrameGraph

    tts = weights.tts
    frame = FrameGraph(weights, 1, 2048, 64, whole=True)
    stream = tts.decoder.stream(recorded=True)
    utterance = _utterance(tts, 0)
    parts: dict[str, list[float]] = {}
    clock = 0.0

    def lap(name: str, *, waits: bool = True) -> None:
        nonlocal clock
        if waits:
            synchronize(tts)
        now = time.perf_counter()
        parts.setdefault(name, []).append(1e3 * (now - clock))
        clock = now

    for _ in range(15):
        synchronize(tts)
        clock = time.perf_counter()
        prompt = tts.prompt(utterance)
        lap("prompt")
        frame.join(0, prompt, 0, SAMPLED.sampling, SAMPLED.residual)
        lap("join, host", waits=False)
        lap("join, device")
        for _ in range(4):
            frame.step()
        lap("four frames")
        stream.reset()
        lap("codec reset")
        codes = frame.slots.codes[:4, 0].long().cpu().clamp(min=0)
        lap("codes to host")
        stream.push(codes.to(tts.device, non_blocking=True)).float().cpu()
        lap("codec")
    return {"positions": len(prompt.embeds), **{name: statistics.median(ms[3:]) for name, ms in parts.items()}}


def growth(weights: Weights) -> Row:
    """Milliseconds of a frame on the device, by how many seconds have been said before it."""
    from quaver.frame import FrameGraph

    frame = FrameGraph(weights, 1, 4096, 64, whole=True)
    found: Row = {}
    frame.join(0, prompts(weights.tts, 1)[0], 0, SAMPLED.sampling, SAMPLED.residual)
    for seconds in LENGTHS_S:
        # What stands in the cache does not matter to the time: the slot is told that it is there.
        n_said = round(seconds * FRAME_RATE_HZ)
        frame.slots.frame.fill_(n_said)
        frame.slots.past.fill_(N_PROMPT + n_said)
        for _ in range(3):
            frame.step()
        found[f"{seconds} s"] = device_ms(frame.step, 30)
    return found


def same_codes(tts: TTS, n_frames: int) -> Row:
    """How many greedy frames graphs and plain PyTorch agree on before their first difference, for two slots."""
    knobs = replace(GREEDY, max_frames=n_frames)
    given = prompts(tts, 2)
    plain = Engine(tts, graphs=False).codes(given, [0, 1], knobs)
    graphs = Engine(tts).codes(given, [0, 1], knobs)
    alone = Engine(tts).codes(given[:1], [0], knobs)
    pairs = {"slot 0": (plain[0], graphs[0]), "slot 1": (plain[1], graphs[1]), "alone": (plain[0], alone[0])}
    return {name: agreement(*pair) for name, pair in pairs.items()}


def agreement(a: Tensor, b: Tensor) -> int:
    """Frames before the first difference."""
    n = min(len(a), len(b))
    differs = (a[:n] != b[:n]).any(1).nonzero()
    return int(differs[0]) if len(differs) else n


def sections(tts: TTS, kind: str, batches: list[int], n_frames: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is measured of one model, by name, the most telling first."""
    plain = Engine(tts, graphs=False)
    if tts.device.type != "cuda":
        for batch in batches:
            yield f"{kind} eager b{batch}", partial(timed_frames, plain, batch, n_frames)
        yield f"{kind} eager first audio", lambda: first_audio(plain)
        return
    if kind == "bf16":
        # Before the weights are fused: each frame of it takes long.
        yield f"{kind} eager b{batches[0]}", partial(timed_frames, plain, batches[0], min(n_frames, 12))
    from quaver.frame import Weights

    held: list[Weights] = []

    def weights() -> Weights:
        if not held:
            held.append(Weights(tts))
        return held[0]

    def graph_times(batch: int, way: str) -> Row:
        return replayed(weights(), batch, n_frames, way)

    # Each of these compiles kernels of its own, for a minute in all.
    yield f"{kind} whole b{batches[0]}", partial(graph_times, batches[0], "whole")
    yield f"{kind} time line", lambda: time_line(weights())
    for way in ("graph", "graph overlap"):
        yield f"{kind} {way} b{batches[0]}", partial(graph_times, batches[0], way)
    if kind in SMALL_PREDICTORS:
        yield f"{kind} roofline", lambda: {"frame_mb": weights().frame_bytes / 1e6}
        return
    engine = Engine(tts)
    for batch in batches:
        yield f"{kind} engine b{batch}", partial(timed_frames, engine, batch, n_frames)
    yield f"{kind} first audio", lambda: first_audio(engine)
    yield f"{kind} first audio, parts", lambda: first_audio_parts(weights())
    for batch in batches[1:]:
        yield f"{kind} graph overlap b{batch}", partial(graph_times, batch, "graph overlap")
    yield f"{kind} prefill", lambda: prefill_times(weights())
    yield f"{kind} growth", lambda: growth(weights())
    yield f"{kind} roofline", lambda: {"frame_mb": weights().frame_bytes / 1e6}
    yield f"{kind} products", lambda: product_times(weights())
    if kind == "int4":
        yield f"{kind} gemlite", lambda: gemlite_times(weights(), graph_ms)
    yield f"{kind} kernels b1", lambda: kernel_times(weights(), 1)
    yield f"{kind} agreement", lambda: same_codes(tts, 24)


def other(command: str, which: str, model: Path, n_frames: int) -> Row:
    """The figures of another engine on the folder ``model``, in a process of its own (see others.py)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    told = [str(Path(__file__).with_name("others.py")), str(model), which, "--device", device, "--frames"]
    done = subprocess.run([*shlex.split(command), *told, str(n_frames)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise QuaverError(f"{which} ended with {done.returncode}: {done.stderr[-2000:]}")
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def measure(
    config: Path, codec_config: Path, batches: list[int], n_frames: int, out: Path, others: Mapping[str, str],
    only: Sequence[str] = (),
) -> Row:  # fmt: skip
    """Everything, written to ``out`` after each section: what was measured is kept if the machine goes."""
    settings, codec = json.loads(config.read_text()), json.loads(codec_config.read_text())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: Row = {"machine": machine(), "config": config.name, "n_frames": n_frames}

    def note(name: str, run: Callable[[], Any]) -> None:
        # Without the bytes nothing else can be judged.
        if only and not any(word in name for word in (*only, "copy", "roofline") if word):
            return
        start = time.perf_counter()
        try:
            found[name] = run()
        except Exception as error:  # A section that fails is a finding, and must not cost the others.
            found[name] = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-3000:]}
        print(f"{time.perf_counter() - start:7.1f} s  {name}: {shown(found[name])}", flush=True)
        out.write_text(json.dumps(found, indent=1) + "\n")

    if device == "cuda":
        note("copy_tb_s", copy_tb_s)
    with tempfile.TemporaryDirectory() as folder:
        if others:
            model = random_checkpoint(Path(folder) / "model", settings, codec)
        for which, command in others.items():
            note(f"{which} b1", partial(other, command, which, model, n_frames))
    with tempfile.TemporaryDirectory() as folder:
        made = random_checkpoint(Path(folder) / "shell", shell_settings(settings), codec)
        # As on a GPU; on a CPU a small model would become float32.
        shell = TTS.load(made, device=device, dtype=torch.bfloat16 if device == "cuda" else None)
    for kind in ("int4", "bf16", *SMALL_PREDICTORS):
        tts = random_tts(shell, settings)
        if kind != "bf16":
            quantize_at_random(tts, tts.talker.model)
        if kind == "int4/int8":
            round_at_random(tts.talker.code_predictor)
        if kind == "int4/int4":
            quantize_at_random(tts, tts.talker.code_predictor.model)
        for name, run in sections(tts, kind, batches, n_frames):
            note(name, run)
        del tts
    return found


def machine() -> Mapping[str, str]:
    """What this was measured on and with."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "gpu": gpu, "cpu": platform.machine(), "torch": torch.__version__, "python": platform.python_version(),
        "commit": commit.stdout.strip(),
    }  # fmt: skip


def shown(value: Any) -> str:
    """A section's figures in a line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(item)}" for key, item in value.items() if key != "trace")
    if isinstance(value, list):
        return "".join(f"\n{'':12}{shown(item)}" for item in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(found: Row) -> str:
    """Milliseconds a frame beside what the bytes alone take at the speed of a copy."""
    lines = [f"{'row':32} {'ms/frame':>9} {'x real time':>12} {'bytes alone, ms':>16}"]
    for row in timed(found):
        floor = "" if row.bytes_ms is None else f"{row.bytes_ms:16.3f}"
        lines.append(f"{row.name:32} {row.ms:9.3f} {row.batch * 80 / row.ms:12.1f} {floor}")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("codec_config", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--frames", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("speed.json"))
    parser.add_argument("--only", nargs="+", default=(), metavar="WORD", help="sections named so, such as whole")
    for which in ("official", "faster"):
        parser.add_argument(f"--{which}", metavar="PYTHON", help="a command: python, or env NAME=VALUE python")
    asked = parser.parse_args()
    others = {which: getattr(asked, which) for which in ("official", "faster") if getattr(asked, which)}
    found = measure(asked.config, asked.codec_config, asked.batches, asked.frames, asked.out, others, asked.only)
    asked.out.with_suffix(".svg").write_text(plot(found), encoding="utf-8")
    print("\n".join([table(found), *projection(found)]))


if __name__ == "__main__":
    main()
