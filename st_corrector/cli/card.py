"""``st-corrector card``: how the negatives were chosen, in a model's card."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import Commands, add_command


def add_to(commands: Commands) -> None:
    """Add the command."""
    made = add_command(
        commands,
        "card",
        "write how a run's negatives were chosen into the card of a model, replacing an existing section",
        _run,
        "The trainer's own saves have this section; use it for cards that were edited, or models saved in another way.",
    )
    made.add_argument("run", type=Path, help="the run's folder, the output_dir of CorrectorTrainer")
    made.add_argument("--model", type=Path, help="the model's folder (default: the run's own, or final in it)")


def _run(args: argparse.Namespace) -> int:
    from ..reporting.model_card import update_card
    from ..reporting.record import RunRecord

    record = RunRecord.load(args.run)
    of_the_run = [folder for folder in (args.run, args.run / "final") if (folder / "README.md").is_file()]
    print(update_card(args.model or (of_the_run or [args.run])[0], record))
    return 0
