"""What is moved to host memory, profiled or written in the background: refused where it cannot be, and handed on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from nemo_rao.config import offloading
from nemo_rao.config.checks import check_config
from nemo_rao.config.compose import compose
from nemo_rao.config.megatron_fields import offload_fields, optimizer_fields
from nemo_rao.errors import UserError

LAYERS = "model.cpu_offloading_num_layers=1"
OPTIMIZER = "model.optim.cpu_offload_fraction=0.5"


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "tokenizer.json").write_text("{}")
    return [f"data.train_path={tmp_path}/train.jsonl", f"data.tokenizer={tmp_path}", f"exp_manager.exp_dir={tmp_path}"]


def refusal(files: Sequence[str], *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        check_config(compose("gpt_rao", [*files, *overrides]))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("accelerator", ["cpu", "auto"])
@pytest.mark.parametrize("key", [LAYERS, OPTIMIZER])
def test_on_a_cpu_nothing_is_moved_to_host_memory(
    key: str, accelerator: str, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offloading, "transformer_engine_is_used", lambda accelerator: False)
    message = refusal(files, key, f"trainer.accelerator={accelerator}")
    assert message.startswith(key) and "; set it to" in message


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (("model.cpu_offloading_num_layers=4",), ("num_layers=4", "below the number of layers, 4")),
        ((LAYERS, "model.pipeline_model_parallel_size=2", "trainer.devices=2"), ("pipeline_model_parallel_size=2",)),
        ((LAYERS, "model.recompute_granularity=selective"), ("recompute_granularity=selective", "one of the two")),
        ((OPTIMIZER, "model.optim.use_distributed_optimizer=false"), ("use_distributed_optimizer=true",)),
    ],
)
def test_what_megatron_cannot_combine_is_refused(
    overrides: Sequence[str], parts: Sequence[str], files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offloading, "transformer_engine_is_used", lambda accelerator: True)
    message = refusal(files, "trainer.accelerator=gpu", *overrides)
    assert all(part in message for part in parts), message


def test_megatrons_offloading_is_configured_on_a_gpu(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offloading, "transformer_engine_is_used", lambda accelerator: True)
    config = compose("gpt_rao", [*files, "trainer.accelerator=gpu", LAYERS, OPTIMIZER])
    check_config(config)
    assert offload_fields(config)["cpu_offloading_num_layers"] == 1 and offload_fields(config)["cpu_offloading"]
    assert optimizer_fields(config)["optimizer_offload_fraction"] == 0.5
    assert optimizer_fields(config)["optimizer_cpu_offload"]
    plain = compose("gpt_rao", files)
    assert offload_fields(plain) == {} and not any("offload" in name for name in optimizer_fields(plain))


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("trainer.profile_steps=[3]", "first and the last"),
        ("trainer.profile_steps=[5,4]", "first and the last"),
        ("trainer.profile_steps=[9,11]", "trainer.max_steps=10"),
    ],
)
def test_profiled_steps_are_two_of_the_run(override: str, part: str, files: list[str]) -> None:
    message = refusal(files, override, "trainer.max_steps=10")
    assert message.startswith("trainer.profile_steps=") and part in message
    with pytest.raises(UserError, match="profile_steps"):
        compose("gpt_rao", ["trainer.profile_steps=[0,3]"])
