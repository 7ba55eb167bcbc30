"""The verbs that write a new model: quantize, blend, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import click

from quaver import awq, blend, export
from quaver.checkpoint import Checkpoint
from quaver.cli.shell import DTYPES, Progress, cli, json_option, model_options
from quaver.files import check_new
from quaver.partial import partial_folder


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
@model_options
@json_option
def quantize(
    source: str, out: Path, samples: int, positions: int, seed: int, calibration: Path | None, codec: str | None,
    device: str, dtype: str, *, as_json: bool,
) -> None:  # fmt: skip
    """Quantize the talker of SOURCE to AWQ INT4 (group 128, zero points, GEMM layout).

    Killed or interrupted, the same command goes on from the layers that were finished, to the same bytes.
    """
    check_new(out)
    recipe = awq.Recipe(n_samples=samples, n_positions=positions, seed=seed)
    checkpoint = Checkpoint.open(source, codec=codec)
    try:
        report = awq.quantize(
            checkpoint, out, recipe, device=device, dtype=DTYPES[dtype], calibration=calibration, progress=Progress()
        )
    except KeyboardInterrupt:
        kept = partial_folder(out)
        if kept.exists():
            click.echo(f"quaver: what is finished is kept in {kept}: the same command goes on from there", err=True)
        raise
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
@json_option
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
