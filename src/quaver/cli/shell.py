"""What every verb shares: the group they are in, their common options, and the line that tells how far one is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import torch

from quaver.errors import RecipeError
from quaver.judge import Judges
from quaver.limits import Limits

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


def model_options(command: F) -> F:
    """Adds --codec, --device and --dtype."""
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


def judge_options(command: F) -> F:
    """Adds --judge and --gates: see `judging`."""
    options: tuple[Callable[[F], F], ...] = (
        click.option(
            "--judge", metavar="FOLDER|hub",
            help="Let judges listen (pip install 'quaver[judge]'): their weights from the hub, or a folder with "
            "whisper-base/ and wespeaker-resnet34.onnx.",
        ),
        click.option("--gates", type=click.Path(path_type=Path), help="A TOML file of limits (docs/RELEASING.md)."),
    )  # fmt: skip
    for option in options:
        command = option(command)
    return command


def judging(judge: str | None, gates: Path | None) -> tuple[Limits, Judges | None]:
    """What --gates and --judge ask for. Raises RecipeError for either, MissingExtra for the judges' packages."""
    limits = Limits() if gates is None else Limits.read(gates)
    if judge is None:
        if limits.judged is not None:
            raise RecipeError(f"{gates} has gates on what judges hear: name judges with --judge, or leave [judged] out")
        return limits, None
    return limits, Judges.find(None if judge == "hub" else Path(judge).expanduser())


def json_option(command: F) -> F:
    """Adds --json."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")(command)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="quaver")
def cli() -> None:
    """Makes a Qwen3-TTS voice model small, proves that it is still good, and runs it fast.

    SOURCE is a model's folder, a hub id (owner/name), or "tiny", the small voice that ships with quaver.
    """
