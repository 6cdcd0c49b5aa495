"""``nemo-rao doctor``."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

from nemo_rao import __version__
from nemo_rao.config.engine_choice import installed_engine
from nemo_rao.doctor import packages
from nemo_rao.doctor.abilities import Facts, abilities, decisive, no_training, programs
from nemo_rao.doctor.inside import PROBES
from nemo_rao.doctor.probes import probe_all
from nemo_rao.doctor.report import Report
from nemo_rao.errors import UserError
from nemo_rao.runtime.files import write_atomically

# Only used if the imports of training fail, to find out which of the two is broken.
_PARTS_OF_TRAINING = ("megatron-core", "nemo-toolkit", "megatron-bridge")


def main(arguments: argparse.Namespace) -> int:
    """Print what works here. Return 0 if training works, else 1, with the reason on stderr.

    Raises:
        UserError: an option cannot be used.
    """
    if not (math.isfinite(arguments.timeout) and arguments.timeout > 0):
        raise UserError(f"--timeout {arguments.timeout:g}: must be above 0, in seconds.")
    report = examine(timeout=arguments.timeout)
    print(report.table(), end="", flush=True)
    if arguments.json is not None:
        write_atomically(Path(arguments.json).expanduser(), json.dumps(report.record(), indent=2) + "\n")
    if report.no_training is not None:
        print(f"error: training does not work here: {report.no_training}", file=sys.stderr)
        return 1
    return 0


def examine(*, timeout: float) -> Report:
    """Examine this machine; ``timeout``: time limit of each import, in seconds."""
    probes = probe_all([name for name in PROBES if name not in _PARTS_OF_TRAINING], timeout=timeout)
    engine = installed_engine()
    if not probes["training"].works:
        of_engine = decisive(engine)
        probes |= probe_all([name for name in _PARTS_OF_TRAINING if name in of_engine], timeout=timeout)
    asked = packages.requirements(engine)
    facts = Facts(probes, packages.unmet(asked), packages.other_apex(), programs(), engine)
    versions: dict[str, str | None] = {
        "Python": platform.python_version(),
        "nemo_rao": __version__,
        "engine": packages.engine_line(engine, asked),
    }
    for name in packages.SHOWN:
        versions[name] = packages.version(name)
        if name == "torch":
            versions |= {f"  {part}": facts.torch.get(part.lower()) for part in ("CUDA", "cuDNN", "NCCL")}
    if facts.other_apex:
        versions["apex"] = f"{versions['apex'] or ''} (not NVIDIA's: a different package of this name)".strip()
    remarks = list(facts.unmet.values())
    if not asked:
        remarks.append("nemo_rao is not installed as a package; versions are not compared with its requirements")
    return Report(
        versions=versions,
        gpus=facts.gpus,
        driver=_driver(facts.programs["nvidia-smi"]),
        container=_container(),
        remarks=remarks,
        abilities=abilities(facts),
        no_training=no_training(facts),
    )


def _driver(nvidia_smi: str | None) -> str | None:
    if nvidia_smi is None:
        return None
    command = [nvidia_smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        versions = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return versions[0] if versions else None


def _container() -> str | None:
    """Return the PyTorch release on which NVIDIA's image is built, which these images state."""
    base = os.environ.get("NVIDIA_PYTORCH_VERSION")
    return None if base is None else f"built on NVIDIA's PyTorch {base}"
