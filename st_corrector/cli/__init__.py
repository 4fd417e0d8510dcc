"""``st-corrector``: caches, evaluation, mining, reports, and indices carried over to newer models, from the shell."""

from __future__ import annotations

import argparse
import sys

from .._version import __version__
from ..errors import StCorrectorError
from . import adapter, cache, card, compare, evaluate, mine, report, serve_plan, upgrade

_EPILOG = """
exit status: 0; 1 if damage was found or something failed, with the reason on standard error; 2 for invalid arguments.
With --json the only output on standard output is the result as one JSON object.

Models, corpora and correctors are folders or ids on the Hugging Face Hub; tokens, HF_HUB_OFFLINE and HF_ENDPOINT are
huggingface_hub's.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit status: 0, or 1 if it found damage or failed."""
    args = parser().parse_args(arguments)
    try:
        return int(args.command(args))
    except (StCorrectorError, OSError) as error:  # the latter also from the Hub
        print(f"error: {error}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    made = argparse.ArgumentParser(
        prog="st-corrector",
        description=__doc__.replace("``", ""),
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action="version", version=f"st-corrector {__version__}")
    commands = made.add_subparsers(required=True, metavar="command")
    for command in (cache, evaluate, mine, serve_plan, adapter, upgrade, report, card, compare):
        command.add_to(commands)
    return made
