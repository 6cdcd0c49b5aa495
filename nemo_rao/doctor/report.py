"""The doctor's findings, as a table and as a record for ``--json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_rao.doctor.abilities import Ability

_WIDTH = 27


@dataclass(frozen=True)
class Report:
    """
    Attributes:
        versions: versions of Python, the plugin and packages; ``None``: not installed.
        gpus: name, compute capability and bytes of memory of each GPU.
        driver: version of NVIDIA's driver, if nvidia-smi reports it.
        container: description of NVIDIA's container, if in one.
        remarks: remarks that do not affect the exit code.
        abilities: what works and what does not.
        no_training: why training does not work here, or ``None``.
    """

    versions: Mapping[str, str | None]
    gpus: Sequence[Mapping[str, Any]]
    driver: str | None
    container: str | None
    remarks: Sequence[str]
    abilities: Sequence[Ability]
    no_training: str | None

    def record(self) -> dict[str, Any]:
        return {"training_works": self.no_training is None, **dataclasses.asdict(self)}

    def table(self) -> str:
        return "\n".join(line.rstrip() for line in self._lines()) + "\n"

    def _lines(self) -> Iterator[str]:
        for name, version in self.versions.items():
            yield _row(name, version or "-")
        yield _row("GPUs", "-" if not self.gpus else "")
        for index, gpu in enumerate(self.gpus):
            major, minor = gpu["capability"]
            yield _row(f"  {index}", f"{gpu['name']}, sm_{major}{minor}, {gpu['memory_bytes'] / 2**30:.1f} GiB")
        yield _row("NVIDIA driver", self.driver or "-")
        if self.container is not None:
            yield _row("container", self.container)
        for remark in self.remarks:
            yield _row("note", remark)
        yield ""
        for ability in self.abilities:
            yield _row(ability.what, f"{'yes' if ability.works else 'no':<4} {ability.why}")


def _row(name: str, value: str) -> str:
    return f"{name:<{_WIDTH}} {value}"
