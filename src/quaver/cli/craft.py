"""The verbs that write a new model: quantize, blend, export."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import click
from click.core import ParameterSource

from quaver import awq, blend, export, mixed, recipe, sweep, validate
from quaver import budget as budgets
from quaver.checkpoint import Checkpoint
from quaver.cli.shell import DTYPES, Progress, cli, json_option, judge_options, judging, model_options
from quaver.corpus import Item
from quaver.errors import RecipeError
from quaver.files import check_new
from quaver.partial import partial_folder


@cli.command()
@click.argument("source")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The new folder to write.")
@click.option("--profile", type=click.Choice(["int4", "compact"]), help="compact: more in INT8, for quaver alone.")
@click.option(
    "--recipe", "recipe_file", type=click.Path(path_type=Path), metavar="TOML", help="How to store each part yourself."
)
@click.option("--budget", metavar="SIZE", help="Bytes on disk, such as 0.9GB: choose block by block by measured cost.")
@click.option("--samples", type=int, help="Calibration utterances.  [default: 128]")
@click.option("--positions", type=int, help="Cut each utterance at so many positions.  [default: 512]")
@click.option("--seed", type=int, help="What they are drawn and spoken with.  [default: 1729]")
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="Your own utterances: a JSONL of text, audio, language, voice.",
)
@model_options
@json_option
def quantize(
    source: str, out: Path, profile: str | None, recipe_file: Path | None, budget: str | None, samples: int | None,
    positions: int | None, seed: int | None, calibration: Path | None, codec: str | None, device: str, dtype: str,
    *, as_json: bool,
) -> None:  # fmt: skip
    """Quantize the talker of SOURCE to AWQ INT4 (group 128, zero points, GEMM layout).

    A profile, recipe or budget stores more parts smaller; what it writes may load in quaver alone, and says so.
    Killed or interrupted, the same command goes on from the layers that were finished, to the same bytes; a budget
    first speaks and measures anew.
    """
    check_new(out)
    stored = _recipe(profile, recipe_file, budgeted=budget is not None)
    most_bytes = None if budget is None else budgets.size(budget)
    asked = {"n_samples": samples, "n_positions": positions, "seed": seed}
    calibrating = replace(
        stored.calibration if stored else awq.Recipe(), **{key: one for key, one in asked.items() if one is not None}
    )
    checkpoint = Checkpoint.open(source, codec=codec)
    kind, progress = DTYPES[dtype], Progress()
    report: awq.AwqReport | mixed.MixedReport
    heard: Path | Sequence[Item] | None
    with _resumable(out):
        if stored is None:
            report = awq.quantize(
                checkpoint, out, calibrating,
                device=device, dtype=kind, calibration=calibration, progress=progress, tell=progress.tell,
            )  # fmt: skip
        else:
            stored, heard = replace(stored, calibration=calibrating), calibration
            if most_bytes is not None:
                stored, heard = budgets.choose(
                    checkpoint,
                    most_bytes,
                    stored,
                    device=device,
                    dtype=kind,
                    calibration=calibration,
                    progress=progress,
                )
            report = mixed.quantize(
                checkpoint, out, stored,
                device=device, dtype=kind, calibration=heard, progress=progress, tell=progress.tell,
            )  # fmt: skip
    if as_json:
        click.echo(json.dumps(report.to_json()))
    else:
        click.echo(f"{out}: {report.summary()}", err=True)


@contextmanager
def _resumable(out: Path) -> Iterator[None]:
    """While open, an interruption says what is kept of the work towards ``out``."""
    try:
        yield
    except KeyboardInterrupt:
        kept = partial_folder(out)
        if kept.exists():
            click.echo(f"quaver: what is finished is kept in {kept}: the same command goes on from there", err=True)
        raise


def _recipe(profile: str | None, file: Path | None, *, budgeted: bool) -> recipe.Recipe | None:
    """How the options say to store the model; None for the plain AWQ of the default."""
    if profile and (file or budgeted):
        raise RecipeError("--profile says all: leave --recipe and --budget out, or name no profile")
    if file:
        return recipe.read(file)
    if budgeted:
        return recipe.Recipe()
    return recipe.COMPACT if profile == "compact" else None


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
@click.option(
    "--sweep", "several", metavar="ALPHA,...",
    help="Write no model, but validate a blend of each share, such as 0,0.01,0.03,0.05, and write one report to OUT. "
    "It takes the options of quaver validate.",
)  # fmt: skip
@click.option("--samples", type=int, default=32, show_default=True, help="Held-out utterances.")
@click.option("--seed", type=int, default=1729, show_default=True)
@judge_options
@model_options
@json_option
@click.pass_context
def blend_command(
    context: click.Context, source: str, donor: str, out: Path, alpha: float, layers: str | None, tensors: str,
    method: Literal["lerp", "slerp"], several: str | None, samples: int, seed: int, judge: str | None,
    gates: Path | None, codec: str | None, device: str, dtype: str, *, force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Blend a language model's feed-forward weights into the talker of SOURCE."""
    check_new(out)
    if several is None:
        _refuse(context, _SWEEPING, "with --sweep")
        recipe = blend.Recipe(alpha, blend.layer_shares(layers or ""), tensors, method, force)
        checkpoint = Checkpoint.open(source, codec=codec)
        made = blend.blend(checkpoint, blend.Donor.open(donor), out, recipe, progress=Progress())
        if as_json:
            click.echo(json.dumps(made.to_json()))
        else:
            click.echo(f"{out}: {made.summary}", err=True)
        return
    _refuse(context, _SINGLY, "without --sweep")
    alphas = sweep.shares(several)
    recipe = blend.Recipe(max(alphas), {}, tensors, method, force)
    limits, judges = judging(judge, gates)
    how = validate.Recipe(n_samples=samples, seed=seed, limits=limits, judges=judges)
    place = validate.Place(device, DTYPES[dtype], Progress())
    checkpoint = Checkpoint.open(source, codec=codec)
    report = sweep.sweep(checkpoint, blend.Donor.open(donor), alphas, recipe, how, place)
    report.save(out)
    click.echo(report.to_json() if as_json else report.to_markdown())


_SINGLY = ("alpha", "layers")
_SWEEPING = ("samples", "seed", "judge", "gates", "device", "dtype")


def _refuse(context: click.Context, names: Sequence[str], when: str) -> None:
    """Raises RecipeError when an option was given that is only for the other way to blend."""
    for name in names:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise RecipeError(f"--{name} is for a blend {when}: leave it out")


@cli.command(name="export")
@click.argument("source")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The new folder to write.")
@click.option(
    "--as",
    "form",
    type=click.Choice(["compressed-tensors", "qwen3"]),
    required=True,
    help="The whole model in vLLM's own layout, or the talker as a stock Qwen3 AWQ text model.",
)
@click.option("--codec", metavar="PATH_OR_ID", help="Where the speech tokenizer is, if not in the model's folder.")
@json_option
def export_command(
    source: str, out: Path, form: Literal["compressed-tensors", "qwen3"], codec: str | None, *, as_json: bool
) -> None:  # fmt: skip
    """Write the INT4 model SOURCE in a format of other runtimes, the same weights bit for bit."""
    check_new(out)
    report = export.export(Checkpoint.open(source, codec=codec), out, form, progress=Progress())
    if as_json:
        click.echo(json.dumps(report.to_json()))
    else:
        click.echo(f"{out}: {report.summary}", err=True)
    if report.warning:
        click.echo(f"warning: {report.warning}", err=True)
