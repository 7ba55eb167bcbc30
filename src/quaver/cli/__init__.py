"""The command line: one verb a command, ``quaver VERB SOURCE [-o OUT] [--json]``.

Exit codes: 0 done, 1 a validation gate failed or a model is not what its provenance says, 2 anything else that quaver
explains (on one line), 130 Ctrl-C.
"""

from __future__ import annotations

import sys

import click
import torch

# Imported for what they add to the group.
from quaver.cli import craft, proof, speech
from quaver.cli.shell import DTYPES, Progress, cli
from quaver.errors import BudgetError, Damaged, GateFailed, QuaverError

__all__ = ["DTYPES", "Progress", "cli", "craft", "main", "proof", "run", "speech"]


def main() -> None:
    """The program ``quaver``: runs a verb and exits."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Runs the command line ``arguments`` and returns the exit code."""
    try:
        cli.main(arguments, prog_name="quaver", standalone_mode=False)
    except (Damaged, GateFailed) as error:
        click.echo(f"quaver: {error}", err=True)
        return 1
    except QuaverError as error:
        click.echo(f"quaver: {error}", err=True)
        return 2
    except (MemoryError, torch.OutOfMemoryError) as error:
        first = str(error).strip().splitlines()[:1]
        short = BudgetError(
            f"out of memory: {first[0] if first else 'the machine has no more'}; nothing half-written was left"
        )
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
