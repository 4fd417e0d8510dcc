"""``st-corrector compare``: runs side by side."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..reporting.record import LossRecord, RunRecord
from .arguments import Commands, add_command, add_json, show, table


def add_to(commands: Commands) -> None:
    """Add the command."""
    made = add_command(
        commands,
        "compare",
        "show runs side by side: the settings in which they differ, their results and their cost",
        _run,
        "Metrics are from after training, or from the last evaluation. Runs that differ only in their seed show\nhow "
        "much of a difference is chance.",
    )
    made.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    add_json(made)


def _run(args: argparse.Namespace) -> int:
    records = {str(run): RunRecord.load(run) for run in args.runs}
    settings = {name: _settings(record) for name, record in records.items()}
    known = sorted({key for each in settings.values() for key in each})
    different = [key for key in known if len({repr(each.get(key)) for each in settings.values()}) > 1]
    results = {name: _results(record) for name, record in records.items()}
    if args.json:
        found = {
            name: {"settings": {key: settings[name].get(key) for key in different}, "results": results[name]}
            for name in records
        }
        show(found)
        return 0
    print(table({key: [str(settings[name].get(key, "")) for name in records] for key in different}, list(records)))
    print()
    rows = list(dict.fromkeys(key for each in results.values() for key in each))
    print(table({key: [_shown(results[name].get(key)) for name in records] for key in rows}, list(records)))
    return 0


def _settings(record: RunRecord) -> dict[str, Any]:
    of_losses = {
        f"{name}/{key}" if name else key: value
        for name, loss in record.losses.items()
        for key, value in loss.settings.items()
    }
    return {**record.arguments, **of_losses, "processes": record.processes}


def _results(record: RunRecord) -> dict[str, float]:
    results: dict[str, float] = {}
    if record.evaluations:
        last = max(record.evaluations, key=lambda when: (when == "after", int(when) if when.isdigit() else -1))
        results = {f"{metric} [%]": 100 * value for metric, value in record.reached(last).items()}
    for name, loss in record.losses.items():
        results |= {f"{name}/{key}" if name else key: value for key, value in _of_loss(record, name, loss).items()}
    return {**results, "steps": record.steps, "seconds": record.seconds}


def _of_loss(record: RunRecord, name: str, loss: LossRecord) -> dict[str, float]:
    prefix = f"{name}/" if name else ""
    last = record.series[-1] if record.series else {}
    logged = {key: last[prefix + key] for key in ("drift", "corrected_error", "hardness") if prefix + key in last}
    return {**logged, **loss.counts}


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"
