"""Steps of a study, in order: data that is made and runs that are trained, each with its path."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nemo_rao.study.references import references, resolved
from nemo_rao.study.schema import Files, Scored, Study
from nemo_rao.training.several_runs import PlannedRun


@dataclass(frozen=True)
class StudyRun(PlannedRun):
    """A run of a study.

    Attributes:
        arm: name of the arm.
        seed: the run's seed; for an arm that is trained once, the study's first.
        recipe, overrides: arguments of ``nemo-rao train`` for the same run.
        needs: names of the steps (runs, data) that must finish first.
        start: name of the run that it starts from; ``None``: a checkpoint, or random weights.
    """

    arm: str
    seed: int
    recipe: str
    overrides: tuple[str, ...]
    needs: tuple[str, ...]
    start: str | None


@dataclass(frozen=True)
class PlannedData:
    """Data that a study makes.

    Attributes:
        name: its key in ``files``.
        spec: with references resolved.
        path: a file of rows (:class:`Scored`), or a directory.
        needs: see :class:`StudyRun`.
    """

    name: str
    spec: Files
    path: Path
    needs: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """Run names and paths in a study's directory.

    Attributes:
        folder: directory of runs, data, samples and report.
    """

    study: Study
    folder: Path

    def is_shared(self, name: str) -> bool:
        """Whether all seeds share it: files, and arms that are trained once."""
        return name in self.study.files or self.study.arms[name].once

    def step_name(self, name: str, seed: int | None) -> str:
        """Return ``ARM-seedN``, or the plain name of files and of arms that are trained once.

        Args:
            seed: ``None`` if the name is known to be shared.
        """
        return name if self.is_shared(name) else f"{name}-seed{seed}"

    def path(self, name: str, seed: int | None) -> Path:
        """Path of an arm's run, or of data."""
        spec = self.study.files.get(name)
        if spec is None:
            return self.folder / self.step_name(name, seed)
        return self.folder / "data" / (f"{name}.jsonl" if isinstance(spec, Scored) else name)


@dataclass(frozen=True)
class Plan:
    """A study's steps.

    Attributes:
        steps: the steps, each after its dependencies.
    """

    layout: Layout
    steps: tuple[StudyRun | PlannedData, ...]

    @property
    def study(self) -> Study:
        return self.layout.study

    @property
    def folder(self) -> Path:
        return self.layout.folder

    @property
    def runs(self) -> list[StudyRun]:
        return [step for step in self.steps if isinstance(step, StudyRun)]

    def runs_of(self, arm: str) -> list[StudyRun]:
        return [run for run in self.runs if run.arm == arm]

    def run_of(self, arm: str, seed: int) -> StudyRun:
        """Return the arm's run with this seed, or its only one."""
        found = self.runs_of(arm)
        return found[0] if self.study.arms[arm].once else next(run for run in found if run.seed == seed)

    @property
    def compared(self) -> list[str]:
        """Arms that are trained with every seed."""
        return [name for name, arm in self.study.arms.items() if not arm.once]

    def resolved(self, text: str, where: str) -> str:
        """Resolve a value of ``samples``, which may refer to data and to arms that are trained once.

        Raises:
            UserError: see :func:`nemo_rao.study.references.references`.
        """
        names = references(text, self.study, where, per_seed=False)
        filled: str = resolved(text, {name: str(self.layout.path(name, None)) for name in names})
        return filled
