"""Transformer Engine's layers are used where it is installed and a GPU is there, not where it can be imported."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_rao.config.compose import compose
from nemo_rao.errors import UserError
from nemo_rao.runtime import gpus
from nemo_rao.training.checks import check_run

from .login_node import write_packages


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu_packages_not_hidden: None) -> None:
    write_packages(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    ("accelerator", "gpu", "used"),
    [
        ("auto", True, True),
        ("auto", False, False),
        ("cpu", True, False),
        ("gpu", False, True),  # where a job is submitted
    ],
)
def test_both_the_package_and_a_gpu_are_needed(
    installed: None, monkeypatch: pytest.MonkeyPatch, accelerator: str, gpu: bool, used: bool
) -> None:
    monkeypatch.setattr(gpus, "has_gpu", lambda: gpu)
    assert gpus.transformer_engine_is_used(accelerator) is used


@pytest.mark.parametrize("accelerator", ["auto", "cpu", "gpu"])
def test_without_the_package_it_is_never_used(monkeypatch: pytest.MonkeyPatch, accelerator: str) -> None:
    monkeypatch.setattr(gpus.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(gpus, "has_gpu", lambda: True)
    assert gpus.transformer_engine_is_used(accelerator) is False


@pytest.mark.parametrize(
    ("overrides", "refused"),
    [
        (
            ("data.prefix_sharing=true", "model.arch.attention_dropout=0.1"),
            "data.prefix_sharing=true with model.arch.attention_dropout=0.1: not supported with Transformer Engine",
        ),
        (
            ("data.prefix_sharing=true", "model.context_parallel_size=2", "trainer.devices=2"),
            "data.prefix_sharing=true with model.context_parallel_size=2: not supported with Transformer Engine",
        ),
        (
            ("precision=bf16_mixed", "precision.fp8=hybrid", "precision.fp8_simulation=true"),
            "precision.fp8_simulation=true: Transformer Engine is installed",
        ),
        (("data.prefix_sharing=true", "data.packing=true"), None),
    ],
)
def test_recipes_are_refused_for_it_on_gpus_alone(
    installed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], refused: str | None
) -> None:
    (tmp_path / "prefs.jsonl").write_text("{}\n")
    of_run = [f"data.train_path={tmp_path}/prefs.jsonl", f"data.tokenizer={tmp_path}"]
    config = compose("gpt_rao", [*overrides, *of_run, f"exp_manager.exp_dir={tmp_path}/runs"])
    monkeypatch.setattr(gpus, "has_gpu", lambda: False)
    check_run(config)
    monkeypatch.setattr(gpus, "has_gpu", lambda: True)
    if refused is None:
        check_run(config)
        return
    with pytest.raises(UserError, match=refused):
        check_run(config)
