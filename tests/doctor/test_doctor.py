"""nemo-rao doctor, in this environment and in ones where packages are missing, broken, slow or others of their name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_rao.cli import main
from nemo_rao.config.engine_choice import BRIDGE, NEMO, installed_engine
from nemo_rao.doctor.abilities import Facts, abilities, no_training
from nemo_rao.doctor.inside import PROBES, _cudnn
from nemo_rao.doctor.packages import engine_line, other_apex, requirements, unmet, version
from nemo_rao.doctor.probes import Probe, probe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytestmark = pytest.mark.timeout(600)  # two of these import NeMo in several processes

ROOT = Path(__file__).resolve().parents[2]
WHOLE = {name: Probe(None) for name in PROBES}
ABSENT = Probe("not installed", installed=False)
H100 = {"name": "NVIDIA H100 80GB HBM3", "capability": [9, 0], "memory_bytes": 85 * 10**9, "error": None}
TORCH = {"version": "2.9.0a0", "cuda": "13.0", "nccl": "2.27.7", "gloo": True, "no_gpu": None}
PROGRAMS = {"sbatch": "/usr/bin/sbatch", "srun": "/usr/bin/srun", "nvidia-smi": "/usr/bin/nvidia-smi"}


def package(folder: Path, name: str, code: str, version: str | None = None) -> None:
    """A package that is found before the installed one of its name."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(code)
    if version is not None:
        location = folder / f"{name}-{version}.dist-info"
        location.mkdir()
        (location / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
        )


def doctor(*arguments: str, first: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command, with the packages in ``first`` before all others."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")] if first is None else [str(first), str(ROOT)]
    return subprocess.run(
        [sys.executable, "-m", "nemo_rao", "doctor", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        timeout=580,
    )


def found(record: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The JSON, and its abilities by what they are."""
    report = json.loads(record.read_text())
    return report, {one["what"]: one for one in report["abilities"]}


# ------------------------------------------------------------------------------------------------- this environment


def test_here_training_works_and_every_version_is_the_installed_one(tmp_path: Path) -> None:
    done = doctor("--json", str(tmp_path / "found.json"))
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    report, able = found(tmp_path / "found.json")
    assert report["training_works"] is True and report["no_training"] is None
    engine = ("NeMo", "nemo-toolkit") if installed_engine() == NEMO else ("Megatron-Bridge", "megatron-bridge")
    assert report["versions"]["engine"].startswith(f"{engine[0]} {version(engine[1])}")
    for name in ("torch", engine[1], "megatron-core", "transformers"):
        assert report["versions"][name] == version(name) is not None
        assert f"{name:<27} {version(name)}\n" in done.stdout
    assert able["training on the CPU"]["works"] and able["import-hf, export-hf"]["works"]
    if not report["gpus"]:
        assert not able["training on GPUs"]["works"] and able["training on GPUs"]["why"]
    assert max(len(line) for line in done.stdout.splitlines()) < 300


# -------------------------------------------------------------------------------------------- broken and foreign ones


def test_a_broken_package_stops_what_needs_it_and_is_reported_with_its_error(tmp_path: Path) -> None:
    package(tmp_path / "broken", "transformers", "raise ImportError('libfoo.so.7: cannot\\nopen')", "4.99.0")
    done = doctor("--json", str(tmp_path / "found.json"), first=tmp_path / "broken")
    assert done.returncode == 1, done.stdout
    engine = "nemo-toolkit" if installed_engine() == NEMO else "megatron-bridge"
    assert done.stderr == f"error: training does not work here: {engine}: ImportError: libfoo.so.7: cannot open\n"
    report, able = found(tmp_path / "found.json")
    assert report["training_works"] is False and report["versions"]["transformers"] == "4.99.0"
    assert able["generate, local judge"]["why"] == "transformers ImportError: libfoo.so.7: cannot open"
    assert not able["import-hf, export-hf"]["works"]


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("raise ImportError('libfoo.so.7: cannot\\nopen')", "ImportError: libfoo.so.7: cannot open"),
        ("import os; os.kill(os.getpid(), 11)", "killed by SIGSEGV"),
        ("import sys; print('half'); print('a word', file=sys.stderr); sys.exit(3)", "exited with code 3: a word"),
        ("import time; time.sleep(600)", "not imported within 2 seconds"),
        ("LLM = 1", "ImportError: cannot import name 'SamplingParams' from 'vllm'"),
        ("print('welcome'); LLM = SamplingParams = 1; import atexit; atexit.register(lambda: 1 / 0)", None),
    ],
)
def test_whatever_an_import_does_is_reported_in_one_line(
    code: str, error: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(tmp_path, "vllm", code)
    monkeypatch.syspath_prepend(tmp_path)
    tried = probe("vllm", timeout=2 if "sleep" in code else 60)
    assert tried.installed and tried.works is (error is None)
    assert error is None or ((tried.error or "").startswith(error) and "\n" not in (tried.error or ""))


def test_the_apex_of_pypi_is_distinguished_from_nvidias(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu_packages_not_hidden: None
) -> None:
    package(tmp_path / "pypi", "apex", "", "0.9.10.dev0")
    package(tmp_path / "nvidia", "apex", "", "0.1")
    package(tmp_path / "nvidia" / "apex", "optimizers", "class FusedAdam: ...")
    monkeypatch.syspath_prepend(tmp_path / "pypi")
    assert other_apex()
    why = next(
        one.why
        for one in abilities(facts(apex=probe("apex", timeout=60), other_apex=True, transformer_engine=ABSENT))
        if "fused" in one.what
    )
    assert "is a different package of this name, not NVIDIA's" in why
    monkeypatch.syspath_prepend(tmp_path / "nvidia")
    assert not other_apex()
    assert probe("apex", timeout=60).error == "ModuleNotFoundError: No module named 'amp_C'"  # it has no kernels
    package(tmp_path / "nvidia", "amp_C", "")
    assert probe("apex", timeout=60).works


def test_what_is_absent_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.run", None)
    monkeypatch.setitem(PROBES, "vllm", (dict, "no_such_package"))
    assert probe("vllm", timeout=1) == ABSENT


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of packages that are found first: the plugin, as pyproject.toml describes it, is one of them."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    extras = [
        f'{text}; extra == "{name}"' for name in (NEMO, BRIDGE) for text in project["optional-dependencies"][name]
    ]
    location = tmp_path / "nemo_rao-0.1.0.dist-info"
    location.mkdir()
    lines = [f"Requires-Dist: {text}" for text in [*project["dependencies"], *extras]]
    (location / "METADATA").write_text(
        "\n".join(["Metadata-Version: 2.1", "Name: nemo-rao", "Version: 0.1.0", *lines, ""])
    )
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("engine", "megatron", "allowed"),
    [(NEMO, "0.16.0", "<0.16"), (BRIDGE, "0.16.0", ">=0.17"), (BRIDGE, "0.20.0", "<0.20")],
)
def test_a_megatron_that_the_engine_does_not_work_with_is_refused_by_its_version(
    engine: str, megatron: str, allowed: str, plugin: Path
) -> None:
    package(plugin, "megatron_core", "", megatron)
    assert {"torch", "megatron-core"} <= {one.name for one in requirements(engine)}
    wrong = unmet(requirements(engine))["megatron-core"]
    assert megatron in wrong and allowed in wrong
    assert no_training(facts(unmet={"megatron-core": wrong}, engine=engine)) == wrong
    assert no_training(facts(unmet={"pandas": "pandas 3"}, engine=engine)) is None


def test_an_engine_is_reported_with_its_tested_range_and_refused_outside_it(plugin: Path) -> None:
    package(plugin, "megatron_bridge", "", "0.7.0")
    package(plugin, "nemo_toolkit", "", "2.6.2")
    assert engine_line(BRIDGE, requirements(BRIDGE)) == "Megatron-Bridge 0.7.0 (tested: <0.7,>=0.4)"
    assert engine_line(NEMO, requirements(NEMO)) == "NeMo 2.6.2 (tested: <2.8,>=2.5)"
    wrong = unmet(requirements(BRIDGE))["megatron-bridge"]
    assert "0.7.0" in wrong and no_training(facts(unmet={"megatron-bridge": wrong}, engine=BRIDGE)) == wrong
    assert no_training(facts(unmet={"megatron-bridge": wrong}, engine=NEMO)) is None


def test_without_an_engine_nothing_trains() -> None:
    why = no_training(facts(engine=None))
    assert why is not None and "NeMo" in why and "Megatron-Bridge" in why and "make install" in why


@pytest.mark.parametrize(("arguments", "part"), [(["--timeout", "0"], "--timeout 0"), (["--jsn", "x"], "--jsn")])
def test_bad_input_gives_one_line_and_code_2(
    arguments: list[str], part: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *arguments]) == 2
    output, message = capfd.readouterr()
    assert output == "" and message.count("\n") == 1 and part in message


# ------------------------------------------------------------------------------------------ other machines, as facts


def facts(
    unmet: dict[str, str] | None = None, other_apex: bool = False, engine: str | None = NEMO, **probes: Probe
) -> Facts:
    """Of a machine with two H100s on which everything can be imported, but for what is given."""
    torch = Probe(None, facts={**TORCH, "gpus": [H100, H100]})
    given = {name.replace("_", "-"): tried for name, tried in probes.items()}
    return Facts({**WHOLE, "torch": torch, **given}, unmet or {}, other_apex, PROGRAMS, engine)


def works(of: Facts) -> dict[str, bool]:
    return {one.what: one.works for one in abilities(of)}


def on(*gpus: dict[str, Any]) -> Facts:
    return facts(torch=Probe(None, facts={**TORCH, "gpus": list(gpus)}))


def gpu(major: int, minor: int, error: str | None = None) -> dict[str, Any]:
    return {**H100, "capability": [major, minor], "error": error}


@pytest.mark.parametrize(
    ("gpus", "recipes", "bf16"),
    [
        ([gpu(7, 0)], set(), False),
        ([gpu(8, 0)], set(), True),
        ([gpu(8, 9)], {"delayed", "tensorwise"}, True),
        ([gpu(9, 0)], {"delayed", "tensorwise", "blockwise"}, True),
        ([gpu(10, 0)], {"delayed", "tensorwise", "blockwise", "mxfp8"}, True),
        ([gpu(12, 0)], {"delayed", "tensorwise", "blockwise"}, True),
        ([gpu(10, 0), gpu(8, 0)], set(), True),  # a run is on all of them
    ],
)
def test_number_formats_follow_from_the_gpus_architecture(gpus: list[dict], recipes: set[str], bf16: bool) -> None:
    able = works(on(*gpus))
    assert {what.removeprefix("FP8, ") for what, yes in able.items() if yes and "FP8" in what} == recipes
    assert able["bf16 on GPUs"] is bf16 and able["training on GPUs"]


def test_a_gpu_that_cannot_compute_is_named_and_the_cpu_still_trains() -> None:
    able = {one.what: one for one in abilities(on(gpu(9, 0), gpu(9, 0, "AcceleratorError: no kernel image")))}
    assert (
        not able["training on GPUs"].works
        and able["training on GPUs"].why == "GPU 1: AcceleratorError: no kernel image"
    )
    assert able["training on the CPU"].works and not able["FP8, delayed"].works


def test_what_depends_on_transformer_engine() -> None:
    with_te, without = works(facts()), works(facts(transformer_engine=ABSENT))
    broken = works(facts(transformer_engine=Probe("OSError: libtransformer_engine.so")))
    assert [able["prefix sharing"] for able in (with_te, without, broken)] == [True, True, False]
    assert [able["FP8, delayed"] for able in (with_te, without, broken)] == [True, False, False]
    assert [able["fused optimizer"] for able in (with_te, without, broken)] == [True, True, True]  # apex has one, too
    assert not works(facts(transformer_engine=ABSENT, apex=ABSENT))["fused optimizer"]


def test_transformer_engine_without_a_gpu_is_not_used_and_forbids_nothing() -> None:
    no_gpu = {**TORCH, "gpus": [], "no_gpu": "RuntimeError: Found no NVIDIA driver on your system."}
    able = {one.what: one for one in abilities(facts(torch=Probe(None, facts=no_gpu)))}
    assert able["training on the CPU"].works and not able["training on GPUs"].works
    assert able["prefix sharing"].works
    assert able["prefix sharing"].why == "Transformer Engine is not used without a GPU"
    assert not able["fused optimizer"].works
    assert able["fused optimizer"].why == ("Transformer Engine is not used without a GPU; torch's Adam is used instead")
    assert not able["FP8, delayed"].works and "no NVIDIA driver" in able["FP8, delayed"].why.lower().replace(
        "nvidia", "NVIDIA"
    )


def test_slurm_needs_both_of_its_programs() -> None:
    of = Facts({**facts().probes}, {}, False, {**PROGRAMS, "srun": None}, NEMO)
    found = next(one for one in abilities(of) if "SLURM" in one.what)
    assert not found.works and found.why.startswith("srun not found")


@pytest.mark.parametrize(("number", "text"), [(91301, "9.13.1"), (90100, "9.1.0"), (8906, "8.9.6"), (None, None)])
def test_cudnns_number_is_read_as_its_version(number: int | None, text: str | None) -> None:
    assert _cudnn(number) == text
