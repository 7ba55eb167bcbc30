"""The verbs that tell what a model is, whether it is good, whether it is intact: validate, info, plan, verify, card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import click

from quaver import budget, ledger, plan, runtime, validate
from quaver.card import card, check_place
from quaver.checkpoint import Checkpoint
from quaver.cli.shell import DTYPES, Progress, cli, json_option, judge_options, judging, model_options
from quaver.config import FRAME_RATE_HZ
from quaver.errors import Damaged, RecipeError
from quaver.files import check_new, write_file
from quaver.verify import verify

FRAME_S = 1 / FRAME_RATE_HZ


@cli.command(name="validate")
@click.argument("candidate")
@click.option("--against", required=True, metavar="SOURCE", help="The original model.")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="A new folder for report.html, report.md and report.json."
)
@click.option("--samples", type=int, default=32, show_default=True, help="Held-out utterances.")
@click.option("--seed", type=int, default=1729, show_default=True)
@click.option("--record", is_flag=True, help="Write the verdict and its figures into CANDIDATE's provenance.json too.")
@judge_options
@model_options
@json_option
def validate_command(
    candidate: str, against: str, out: Path | None, samples: int, seed: int, judge: str | None, gates: Path | None,
    codec: str | None, device: str, dtype: str, *, record: bool, as_json: bool,
) -> None:  # fmt: skip
    """Compare CANDIDATE with its original on held-out speech; exit 1 when a gate fails."""
    if out is not None:
        check_new(out)
    limits, judges = judging(judge, gates)
    recipe = validate.Recipe(n_samples=samples, seed=seed, limits=limits, judges=judges)
    made, source = Checkpoint.open(candidate, codec=codec), Checkpoint.open(against, codec=codec)
    if record:
        made.check_recordable()
    report = validate.validate(made, source, recipe, device=device, dtype=DTYPES[dtype], progress=Progress())
    if out is not None:
        report.save(out)
    if record:
        validate.record(made, source, report)
    click.echo(report.to_json() if as_json else report.to_markdown())
    report.require()


@cli.command()
@click.argument("source")
@click.option("--codec", metavar="PATH_OR_ID", help="Where the speech tokenizer is, if not in the model's folder.")
@click.option("--device", default="cpu", show_default=True, help="Where memory is counted: cpu or cuda.")
@click.option("--runtime", "speaking", is_flag=True, help="Show what speaking takes of the device, line by line.")
@click.option("--memory", metavar="SIZE", help="With --runtime: plan for so much, such as 1.2GB.")
@click.option("--seconds", type=float, default=30.0, show_default=True, help="With --runtime: speech at a time.")
@click.option("--profile", type=click.Choice(["bf16", "int4", "compact"]),
              help="With --runtime, of a config.json alone: how the model is stored.")  # fmt: skip
@json_option
def info(
    source: str, codec: str | None, device: str, memory: str | None, seconds: float,
    profile: Literal["bf16", "int4", "compact"] | None, *, speaking: bool, as_json: bool,
) -> None:  # fmt: skip
    """Show each module of SOURCE: parameters, type, bytes on disk and in memory, what is quantized."""
    if speaking:
        imagined = profile is not None or Path(source).is_file()
        of = plan.imagined(source, profile or "bf16", codec=codec) if imagined else Checkpoint.open(source, codec=codec)
        _print_runtime(of, device, seconds, memory, as_json=as_json)
        return
    if memory is not None or profile is not None:
        raise RecipeError("--memory and --profile say what --runtime is about: add it, or see quaver plan")
    checkpoint = Checkpoint.open(source, codec=codec)
    weighed = ledger.weigh(checkpoint, device=device)
    if as_json:
        click.echo(json.dumps(weighed.to_json()))
        return
    for line in ledger.table(weighed):
        click.echo(line)


def _print_runtime(of: Checkpoint, device: str, seconds: float, memory: str | None, *, as_json: bool) -> None:
    if not FRAME_S <= seconds <= 3600:
        raise RecipeError(f"--seconds is {seconds}: it must be {FRAME_S} (one frame) to 3600")
    request, limit = runtime.Request.seconds(seconds), None if memory is None else budget.size(memory)
    found = runtime.weigh(of, request, device) if limit is None else runtime.fit(of, request, device, limit)
    if as_json:
        click.echo(json.dumps(found.to_json()))
        return
    for line in runtime.table(found, limit):
        click.echo(line)


@cli.command(name="plan")
@click.argument("model")
@click.option("--profile", type=click.Choice(["bf16", "int4", "compact"]), help="One profile. Default: all.")
@click.option("--codec", metavar="PATH", help="The speech tokenizer's folder or configuration, if not with the model.")
@click.option("--device", default="cpu", show_default=True, help="Where memory is counted: cpu or cuda.")
@json_option
def plan_command(
    model: str, profile: Literal["bf16", "int4", "compact"] | None, codec: str | None, device: str, *, as_json: bool
) -> None:
    """Tell what MODEL, a folder or a config.json alone, would take on disk and in memory in each profile."""
    made = plan.plan(model, (profile,) if profile else plan.PROFILES, codec=codec, device=device)
    if as_json:
        click.echo(json.dumps(made.to_json()))
        return
    for line in plan.table(made):
        click.echo(line)


@cli.command(name="verify")
@click.argument("source")
@click.option("--parent", "parents", multiple=True, metavar="MODEL", help="A model it was made from, checked as well.")
@json_option
def verify_command(source: str, parents: tuple[str, ...], *, as_json: bool) -> None:
    """Check every byte of SOURCE against its provenance.json; exit 1 and name what differs first."""
    try:
        found = verify(source, parents, Progress())
    except Damaged as error:
        if as_json:
            told = {"intact": False, "file": str(error.file), "tensor": error.tensor, "error": str(error)}
            click.echo(json.dumps(told))
        raise
    click.echo(json.dumps(found.to_json()) if as_json else found.summary())


@cli.command(name="card")
@click.argument("source")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The file to write, such as SOURCE/README.md.")
@click.option("--codec", metavar="PATH_OR_ID", help="Where the speech tokenizer is, if not in the model's folder.")
def card_command(source: str, out: Path | None, codec: str | None) -> None:
    """Write the model card of SOURCE from its provenance.json: Markdown, to standard output or a file."""
    checkpoint = Checkpoint.open(source, codec=codec)
    if out is not None:
        check_place(out, checkpoint)
    text = card(checkpoint)
    if out is None:
        click.echo(text, nl=False)
        return
    write_file(out, text.encode())
    click.echo(f"{out}: {len(text.encode()):,} bytes", err=True)
