"""``st-corrector report``: what happened in a run, as one HTML file."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import Commands, add_command


def add_to(commands: Commands) -> None:
    """Add the command."""
    made = add_command(
        commands,
        "report",
        "write one HTML file on a run: staleness, fidelity, filters, and which negatives were chosen early and late",
        _run,
    )
    made.add_argument("run", type=Path, help="the run's folder, the output_dir of CorrectorTrainer")
    made.add_argument("--output", type=Path, help="the file (default: report.html in the run's folder)")


def _run(args: argparse.Namespace) -> int:
    from ..reporting.record import RunRecord
    from ..reporting.report import write_report

    print(write_report(RunRecord.load(args.run), args.output or args.run / "report.html"))
    return 0
