"""``nemo-rao evaluate``: benchmarks of a policy. Each task's result is saved as soon as the task is finished.

alpaca_eval, mt_bench      answers in the format that these projects judge
any other name             a task of lm-evaluation-harness, run here
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_rao.errors import UserError
from nemo_rao.generation.alpaca_eval import AlpacaEval
from nemo_rao.generation.harness import Harness, task_manager
from nemo_rao.generation.model_folder import check_folder
from nemo_rao.generation.mt_bench import MtBench
from nemo_rao.generation.policy import Policy
from nemo_rao.generation.progress import print_notes
from nemo_rao.generation.settings import EvaluateSettings
from nemo_rao.runtime.files import check_place, write_atomically
from nemo_rao.runtime.part_file import PartFile, part_path

Benchmark = AlpacaEval | MtBench
RESULTS = "results.json"


@dataclass(frozen=True)
class Asked:
    """What to evaluate.

    Attributes:
        tasks: task names; each entry may be a comma-separated list.
        name: the model's name in answers; ``None``: the name of its directory.
        instructions, questions: files of alpaca_eval and mt_bench.
        include_path: directory with tasks of lm-evaluation-harness.
        ignore_fields: fields of instructions and questions to skip.
    """

    tasks: Sequence[str]
    name: str | None = None
    instructions: str | None = None
    questions: str | None = None
    include_path: str | None = None
    ignore_fields: tuple[str, ...] = ()


class Results:
    """``results.json``: the model, and the settings and metrics of each finished task.

    Raises:
        UserError: the existing file is of another model or damaged.
    """

    def __init__(self, folder: Path, model: str, fingerprint: str) -> None:
        self.folder, self._path = folder, folder / RESULTS
        self._kept: dict[str, Any] = {"model": model, "digest_of_model": fingerprint, "tasks": {}}
        if not self._path.exists():
            check_place(self._path)
            return
        try:
            before = json.loads(self._path.read_text("utf-8"))
            of_model, tasks = before["digest_of_model"], dict(before["tasks"])
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{self._path}: was not written by this command, or is damaged. Use another --out."
            ) from None
        if of_model != fingerprint:
            raise UserError(f"{self._path}: has the results of another model. Use another --out.")
        self._kept["tasks"] = tasks

    def has(self, task: str, settings: Mapping[str, Any]) -> bool:
        """Whether the task is finished.

        Raises:
            UserError: it was run with other settings.
        """
        before = self._kept["tasks"].get(task)
        if before is None:
            return False
        for name, value in json.loads(json.dumps(settings)).items():
            if before["settings"].get(name) != value:
                raise UserError(
                    f"{self._path}: has {task} with another {name.removeprefix('digest_of_')}. "
                    "Use the same setting, or another --out."
                )
        return True

    def add(self, task: str, settings: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        self._kept["tasks"][task] = {"settings": dict(settings), **found}
        write_atomically(self._path, json.dumps(self._kept, ensure_ascii=False, indent=2) + "\n")

    def metrics(self, task: str) -> Mapping[str, float]:
        return self._kept["tasks"][task]["metrics"]


def evaluate(model: str, out: str, asked: Asked, settings: EvaluateSettings) -> None:
    """Run the tasks that are missing from ``out/results.json`` and print a table.

    Raises:
        UserError: before any weights are loaded, for invalid models, tasks, files or settings; later, if a file cannot
            be written or the harness cannot run a task.
    """
    folder = check_folder(model)
    tasks = list(dict.fromkeys(name.strip() for given in asked.tasks for name in given.split(",") if name.strip()))
    if not tasks:
        raise UserError("--task: no task is given. Pass alpaca_eval, mt_bench, or a task of lm-evaluation-harness.")
    name = folder.name if asked.name is None else asked.name
    if not name.strip() or "/" in name or name.startswith("."):
        raise UserError(f"--name {name!r}: is used as a file name. Choose one without / and without a leading dot.")
    benchmarks: dict[str, Benchmark] = {}
    if AlpacaEval.name in tasks:
        benchmarks[AlpacaEval.name] = AlpacaEval(asked.instructions, name, settings, asked.ignore_fields)
    if MtBench.name in tasks:
        benchmarks[MtBench.name] = MtBench(asked.questions, name, settings, asked.ignore_fields)
    of_harness = [task for task in tasks if task not in benchmarks]
    if of_harness:
        if settings.engine == "vllm":
            raise UserError(
                f"engine='vllm': task {of_harness[0]} runs on `transformers`. Evaluate it in a separate command."
            )
        settings = dataclasses.replace(settings, engine="transformers")
    manager = task_manager(of_harness, asked.include_path) if of_harness else None
    policy = Policy(folder, settings)
    harness = Harness(policy, manager, settings)
    works = {task: _work(policy, task, benchmarks.get(task), harness) for task in tasks}
    results = Results(Path(out).expanduser(), model, policy.fingerprint)
    todo = [task for task in tasks if not results.has(task, works[task])]
    remarks: Counter[str] = Counter()
    for task in todo:
        if task in benchmarks:
            remarks.update(benchmarks[task].check(policy))
            path = results.folder / benchmarks[task].file_name
            if not part_path(path).exists():  # else the answers are ours, from a run killed before saving
                check_place(path)
    print_notes(policy, remarks)
    for task in todo:
        if task in benchmarks:
            _answer(benchmarks[task], policy, results, works[task])
        else:
            results.add(task, works[task], harness.run(task))
    print_table(name, {task: results.metrics(task) for task in tasks})
    for task in benchmarks:
        if line := _cut_line(task, results.metrics(task), works[task]["max_new_tokens"]):
            print(line, flush=True)
    for task, benchmark in benchmarks.items():
        print(f"To judge {task}: {benchmark.judge_command(results.folder)}", flush=True)


def _answer(benchmark: Benchmark, policy: Policy, results: Results, work: Mapping[str, Any]) -> None:
    """Answer a benchmark, resuming earlier work, and write the file for its judge."""
    path = results.folder / benchmark.file_name
    with PartFile(part_path(path), work) as part:
        benchmark.answer(policy, part)
        records = list(part.records())
        write_atomically(path, benchmark.whole(records))
        results.add(benchmark.name, work, {"metrics": dict(benchmark.metrics(records)), "answers": str(path)})
        part.remove()


def _work(policy: Policy, task: str, benchmark: Benchmark | None, harness: Harness) -> dict[str, Any]:
    """Everything that a task's result depends on."""
    common = {"command": task, "version": 2, "digest_of_model": policy.fingerprint, "engine": policy.engine_name}
    if benchmark is None:
        return common | harness.identity()
    chosen = {name: getattr(policy.settings, name) for name in ("seed", "system", "top_p", "top_k")}
    chosen |= dataclasses.asdict(policy.rendering)
    return common | chosen | benchmark.identity | {"model_name": benchmark.model_name}


def _cut_line(task: str, metrics: Mapping[str, float], limit: int) -> str | None:
    """Report how many answers are incomplete, which a judge cannot know."""
    causes = {"cut": f"cut at {limit} tokens (--max-new-tokens)", "no_room": "without room in the model's context"}
    parts = [f"{round(metrics[name] * metrics['answers'])} {words}" for name, words in causes.items() if metrics[name]]
    return f"{task}: of {metrics['answers']:.0f} answers {', '.join(parts)}" if parts else None


def print_table(name: str, metrics: Mapping[str, Mapping[str, float]]) -> None:
    """Print task, metric, value and standard error, one metric per row."""
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "metric", "value", "± error", title=name)
    for task, values in metrics.items():
        first = True
        for metric, value in values.items():
            if "_stderr" in metric:
                continue
            base, _, kind = metric.partition(",")
            error = values.get(f"{base}_stderr,{kind}" if kind else f"{base}_stderr")
            shown = f"{value:.0f}" if metric == "answers" else f"{value:.4f}"
            table.add_row(task if first else "", metric, shown, "" if error is None else f"{error:.4f}")
            first = False
    Console().print(table)
