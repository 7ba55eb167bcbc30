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

_QUIET_S = 10
"""Without a terminal, how long nothing new is said at most."""


class Progress:
    """A line on stderr that tells what is being done and how far it is; without a terminal, a new one now and then."""

    def __init__(self) -> None:
        self._start = self._last = self._shown = time.perf_counter()
        self._what = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        """Shows ``what`` at ``done`` of ``total``."""
        now = time.perf_counter()
        if what != self._what:
            # It is first told of when some of it is done: it began when the thing before it had ended.
            self._start, self._what = self._last, what
        self._last = now
        on_terminal = sys.stderr.isatty()
        if not on_terminal and done != total and now - self._shown < _QUIET_S:
            return
        self._shown = now
        seconds = now - self._start
        left = f", {seconds / done * (total - done):.0f} s left" if 0 < done < total else ""
        line = f"{what}: {done}/{total} ({seconds:.0f} s{left})"
        click.echo(f"\r\033[K{line}" if on_terminal else line, err=True, nl=done == total or not on_terminal)

    def tell(self, line: str) -> None:
        """Shows a ``line`` of its own where there is no terminal: in a log, where whoever reads it was not there."""
        if not sys.stderr.isatty():
            click.echo(line, err=True)


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
