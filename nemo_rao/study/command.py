"""``nemo-rao study`` and ``nemo-rao report``."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from nemo_rao.config.gpu_models import GPUS
from nemo_rao.errors import UserError, errors_at
from nemo_rao.runtime.files import one_at_a_time, write_atomically
from nemo_rao.runtime.launch import started_externally
from nemo_rao.study.plan import plan
from nemo_rao.study.plan_checks import check
from nemo_rao.study.planned import Plan, PlannedData
from nemo_rao.study.run import check_steps, policies_of, run_steps
from nemo_rao.study.study_file import load_study
from nemo_rao.training.several_runs import print_table


def main(arguments: argparse.Namespace, planning: argparse.Namespace | None) -> int:
    """Run a study, or list what it would do.

    Args:
        planning: options of ``nemo-rao plan`` for estimates of time.

    Returns:
        the exit code: 0, or 1 if a step failed.

    Raises:
        UserError: the study file or a recipe cannot be used; nothing has been written then.
    """
    if (launcher := started_externally()) is not None:
        raise UserError(
            f"nemo-rao study: {launcher} started several ranks, but a study starts its own. Run it without {launcher}."
        )
    if planning is not None and planning.gpu not in GPUS:
        raise UserError(f"--gpu {planning.gpu}: is unknown. Choose one of {', '.join(GPUS)}.")
    made = plan(load_study(arguments.study, arguments.overrides), arguments.out)
    check(made)
    check_steps(made)
    if arguments.dry_run:
        list_steps(made, planning)
        return 0
    from nemo_rao.study.report import MARKDOWN, PAGE, write_report
    from nemo_rao.study.results import collect

    with one_at_a_time(made.folder / "study", lambda: print("waiting for another process with this study")):
        outcomes = run_steps(made)
        write_report(made, collect(made, outcomes))
    failed = [name for name, one in outcomes.items() if one.state == "failed"]
    if failed:
        print(f"\n{len(failed)} of {len(outcomes)} steps failed, {failed[0]} first; run the same command to retry them")
    print(f"\nreport: {made.folder / PAGE}, {made.folder / MARKDOWN}")
    return 1 if failed else 0


def list_steps(made: Plan, planning: argparse.Namespace | None) -> None:
    """Print the data, the runs with what is left of each, and the policies to sample."""
    from rich.table import Table

    from nemo_rao.study.estimate import expected

    for step in made.steps:
        if isinstance(step, PlannedData):
            print(f"files {step.name}: {step.path}{' (exists)' if step.path.exists() else ''}")
    with errors_at(str(made.study.path)):
        runs = expected(made, planning)
    table = Table(title=f"{made.study.name}: {len(runs)} runs in {made.folder}", title_justify="left")
    for name in ("run", "recipe", "needs", "state"):
        table.add_column(name)
    for name in ("steps left", "hours"):
        table.add_column(name, justify="right")
    for one in runs:
        hours = "unknown" if one.seconds is None else f"{one.seconds / 3600:.3f}"
        steps = "unknown" if one.steps is None else f"{one.steps:,}"
        table.add_row(one.run.name, one.run.recipe, ", ".join(one.run.needs), one.state, steps, hours)
    print_table(table)
    known = math.fsum(one.seconds for one in runs if one.seconds is not None)
    sources = {one.source for one in runs if one.seconds}
    unknown = sum(one.seconds is None for one in runs)
    if sources:
        print(f"known: {known / 3600:.2f} hours, {' and '.join(sorted(sources))}")
    if unknown:
        print(
            f"unknown for {unknown} runs: no run of their arm has logged a step yet (--gpu NAME plans them for a GPU)"
        )
    if policies := policies_of(made):
        print(f"{len(policies)} policies to sample or evaluate, whose time is not estimated")


def report_run(arguments: argparse.Namespace) -> int:
    """Write the report of one run.

    Raises:
        UserError: the directory is not that of a run, or the output exists and is not a report.
    """
    from nemo_rao.study.document import MARK, html, write_markdown
    from nemo_rao.study.run_report import run_document

    folder = Path(arguments.run).expanduser()
    page = folder / "report.html" if arguments.output is None else Path(arguments.output).expanduser()
    if page.suffix != ".html":
        raise UserError(f"--output {page}: must end in .html.")
    document = run_document(folder)
    if page.is_dir() or (page.exists() and MARK.encode() not in page.read_bytes()[:1000]):
        raise UserError(f"--output {page}: exists and was not written by nemo-rao report. Give another file.")
    write_atomically(page, html(document))
    markdown = page.with_suffix(".md")
    write_markdown(document, markdown)
    print(f"report: {page}, {markdown}")
    return 0
