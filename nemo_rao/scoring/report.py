"""Statistics of an output as tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

NUMBERS = {"mean": "mean", "sd": "sd", "min": "min", "q1": "25 %", "median": "50 %", "q3": "75 %", "max": "max"}


def print_report(statistics: Mapping[str, Any]) -> None:
    """Print distributions (of columns as scored, of the reward as written) and agreements."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # without a terminal, the width is unknown
    table = Table(title="columns as scored, reward as written", box=box.SIMPLE, title_justify="left")
    table.add_column("")
    for heading in ("count", "missing", *NUMBERS.values()):
        table.add_column(heading, justify="right")
    for name, one in (*statistics["columns"].items(), ("reward", statistics["reward"])):
        numbers = ("-" if one[key] is None else f"{one[key]:.4g}" for key in NUMBERS)
        table.add_row(name, str(one["count"]), str(one["missing"]), *numbers)
    console.print(table)
    for title, key in (
        ("chosen above rejected", "agreement_with_labels"),
        ("pairs of responses in the same order", "agreement_between"),
    ):
        if statistics[key]:
            table = Table(title=title, box=box.SIMPLE, title_justify="left")
            for heading in ("", "pairs", "share", "ties"):
                table.add_column(heading, justify="right" if heading else "left")
            for name, one in statistics[key].items():
                table.add_row(name, str(one["pairs"]), f"{one['agreement']:.1%}", f"{one['ties']:.1%}")
            console.print(table)
