"""The command line: answers at once, and speaks to users in one line."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_rao import __version__
from nemo_rao.cli import COMMANDS, main


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_nothing_but_the_standard_library(arguments: list[str]) -> None:
    root = Path(__file__).resolve().parents[2]
    # -S: what site-packages' own .pth files import is not ours.
    command = [sys.executable, "-S", "-c", HELP, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=30)
    assert done.returncode == 0, done.stderr
    assert (__version__ if arguments == ["--version"] else "usage: nemo-rao") in done.stdout.splitlines()[0]
    assert done.stderr == "", "imported"


# Prints what is looked for outside of the standard library: an import that is only tried, and not found without
# site-packages, counts too.
HELP = """
import sys

class Elsewhere:
    def find_spec(self, name, path=None, target=None):
        # Jython's "org" is asked for by the standard library's copy.
        if name.partition(".")[0] not in {"nemo_rao", "org", *sys.stdlib_module_names}:
            print(name, file=sys.stderr)

sys.meta_path.insert(0, Elsewhere())
from nemo_rao.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    sys.exit(end.code)
"""


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ("COMMAND", "--help")),
        (["trian"], ("trian", "train")),
        (["train", "--confg-name", "x"], ("--confg-name", "nemo-rao train --help")),
        (["train", "--config-name", "gpt_roa"], ("gpt_roa", "gpt_rao")),
        (["train", "model.optim.lrr=3"], ("model.optim.lrr", "model.optim.lr?")),
        (["train", "trainer.devices=abc", "--config-name", "gpt_dpo"], ("trainer.devices", "abc")),
        (["train", "trainer.max_steps=3"], ("data.train_path",)),
        (["train", "data.train_path=nope.jsonl"], ("data.train_path", "nope.jsonl", "no such file")),
        (
            ["train", "trainer.devices=3", "--config-name", "gpt_rao", "model.tensor_model_parallel_size=2"],
            ("3 ranks",),
        ),
    ],
)
def test_a_user_error_gives_one_line_exit_code_2_and_no_files(
    arguments: list[str],
    parts: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    output, message = capfd.readouterr()
    assert output == "" and message.count("\n") == 1 and message.startswith("error: ")
    assert all(part in message for part in parts), message
    assert not list(tmp_path.iterdir())


def test_print_config_shows_the_recipe_with_comments_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "trainer.max_steps=7", "--print-config", "model.rao.beta=0.25"]) == 0
    output, message = capfd.readouterr()
    assert "  max_steps: 7  # " in output and "    beta: 0.25  # " in output and message == ""
    assert not list(tmp_path.iterdir())


def test_an_interrupt_ends_with_code_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nemo_rao.config.compose.compose", interrupted)
    assert main(["train"]) == 130


@pytest.mark.parametrize("objective", ["rao", "dpo"])
def test_the_example_scripts_are_the_train_command_of_their_recipe(
    objective: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    script = Path(__file__).resolve().parents[2] / "examples" / f"train_gpt_{objective}.py"
    runpy.run_path(str(script), run_name="imported_by_a_rank")  # does nothing
    monkeypatch.setattr(sys, "argv", [str(script), "--print-config", "trainer.max_steps=3"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    output = capfd.readouterr().out
    assert end.value.code == 0 and f"  objective: {objective}  # " in output and "  max_steps: 3  # " in output
