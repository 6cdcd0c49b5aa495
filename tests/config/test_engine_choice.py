"""Which engine drives a run, and what is said where it cannot."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Collection
from pathlib import Path

import pytest

from nemo_rao.cli import main
from nemo_rao.config import engine_choice
from nemo_rao.config.compose import compose
from nemo_rao.config.engine_choice import engine_name, installed_engine
from nemo_rao.errors import UserError

DATA = ("data.train_path=train.jsonl", "data.tokenizer=./tokenizer")


def chosen(monkeypatch: pytest.MonkeyPatch, asked: str, installed: Collection[str], release: str = "0.6.2") -> str:
    monkeypatch.setattr(engine_choice, "_is_installed", lambda name: name in installed)
    monkeypatch.setattr(importlib.metadata, "version", lambda package: release)
    return engine_name(compose("gpt_rao", [*DATA, f"trainer.engine={asked}"]))


@pytest.mark.parametrize(
    ("asked", "installed", "expected"),
    [
        ("auto", ("nemo",), "nemo"),
        ("auto", ("bridge",), "bridge"),
        ("auto", ("nemo", "bridge"), "nemo"),
        ("bridge", ("nemo", "bridge"), "bridge"),
        ("nemo", ("nemo", "bridge"), "nemo"),
    ],
)
def test_auto_is_what_is_installed_nemo_first(
    monkeypatch: pytest.MonkeyPatch, asked: str, installed: Collection[str], expected: str
) -> None:
    assert chosen(monkeypatch, asked, installed) == expected


@pytest.mark.parametrize(
    ("asked", "installed", "said"),
    [
        ("bridge", ("nemo",), "trainer.engine=bridge: Megatron-Bridge (megatron-bridge) is not installed"),
        ("nemo", ("bridge",), "trainer.engine=nemo: NeMo's LLM collection (nemo_toolkit 2.x) is not installed"),
        ("auto", (), "trainer.engine=auto: neither NeMo's LLM collection (nemo_toolkit 2.x) nor Megatron-Bridge"),
    ],
)
def test_an_engine_that_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, asked: str, installed: Collection[str], said: str
) -> None:
    with pytest.raises(UserError) as refused:
        chosen(monkeypatch, asked, installed)
    assert str(refused.value).startswith(said) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("release", "works"), [("0.4.0", True), ("0.6.9", True), ("0.3.1", False), ("0.7.0rc1", False)]
)
def test_releases_of_bridge_that_are_not_tested_are_refused(
    monkeypatch: pytest.MonkeyPatch, release: str, works: bool
) -> None:
    if works:
        assert chosen(monkeypatch, "bridge", ("bridge",), release) == "bridge"
        return
    with pytest.raises(
        UserError, match=f"Megatron-Bridge {release} is installed, but the engine is tested with 0.4 to 0.6"
    ):
        chosen(monkeypatch, "bridge", ("bridge",), release)


@pytest.mark.parametrize(
    ("overrides", "installed", "said"),
    [
        (["trainer.engine=nemo"], ("bridge",), "trainer.engine=nemo: NeMo's LLM collection"),
        (["trainer.engine=bridge"], ("nemo",), "trainer.engine=bridge: Megatron-Bridge (megatron-bridge) is not"),
        (
            [],
            ("bridge",),
            "trainer.engine=bridge: Megatron-Bridge 0.7.0 is installed, but the engine is tested with 0.4 to 0.6",
        ),
        (
            ["trainer.engine=bridge", "model.config_class=Llama3Config8B"],
            ("bridge",),
            "model.config_class=Llama3Config8B: must be null with engine bridge",
        ),
        (
            ["model.peft.scheme=dora", "model.restore_from_path=start"],
            ("nemo",),
            "model.peft.scheme=dora: engine nemo supports only lora",
        ),
        (
            [
                *("model.peft.scheme=lora", "model.restore_from_path=start", "trainer.devices=2"),
                *("model.pipeline_model_parallel_size=2", "model.virtual_pipeline_model_parallel_size=2"),
                "model.arch.num_layers=4",
            ],
            ("nemo",),
            "engine nemo does not save adapters of interleaved stages",
        ),
    ],
)
def test_a_run_that_the_engine_cannot_drive_ends_in_one_line_with_nothing_written(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    overrides: list[str],
    installed: Collection[str],
    said: str,
) -> None:
    monkeypatch.setattr(engine_choice, "_is_installed", lambda name: name in installed)
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "0.7.0")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "tokenizer").mkdir()
    assert main(["train", "exp_manager.exp_dir=runs", *DATA, *overrides]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert said in line
    assert {path.name for path in tmp_path.iterdir()} == {"train.jsonl", "tokenizer"}


def test_looking_for_engines_imports_neither() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from nemo_rao.config.engine_choice import installed_engine; installed_engine()\n"
        "assert not {'nemo', 'megatron.core', 'megatron.bridge'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert installed_engine() in ("nemo", "bridge", None)
