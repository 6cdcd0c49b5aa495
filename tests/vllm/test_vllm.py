"""Runs whose responses a real vLLM samples: ``make test-vllm``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ..train.runs import TINY, make_data, parallel, run_training, start_checkpoint
from ..train.test_online import ONLINE, rollout

# Heads of a size that vLLM's attention has.
NETWORK = (
    *TINY,
    "model.arch.hidden_size=128",
    "model.arch.num_layers=4",
    "model.optim.lr=1e-2",  # so that weights that were not given anew would be noticed
    "trainer.max_steps=3",
)


@pytest.fixture(scope="session")
def python(request: pytest.FixtureRequest) -> str:
    found = request.config.getoption("vllm")
    if not found:
        pytest.skip("samples by vLLM, which takes a minute to start: make test-vllm")
    return str(found)


def _start(folder: Path, *network: str) -> tuple[str, ...]:
    data = make_data(folder / "data")
    start = start_checkpoint(folder, [*NETWORK, *network, *data])
    return (*NETWORK, *network, *data, *ONLINE, f"model.restore_from_path={start}")


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory, python: str) -> tuple[str, ...]:
    return _start(tmp_path_factory.mktemp("vllm"))


def _run(recipe: str, folder: Path, common: tuple[str, ...], *more: str) -> list[dict[str, float]]:
    """The records of its rollouts."""
    run_training(recipe, [*common, f"exp_manager.exp_dir={folder.parent}", f"exp_manager.name={folder.name}", *more])
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "rollout/reward" in record]


def _by_vllm(python: str) -> tuple[str, ...]:
    return "online.sampler=vllm", f"online.vllm_python={python}"


def test_it_samples_with_the_weights_of_the_model_in_training(
    common: tuple[str, ...], python: str, tmp_path: Path
) -> None:
    records = _run("gpt_rloo", tmp_path / "run", common, *_by_vllm(python), *parallel(2, 2, 1))
    assert [record["step"] for record in records] == [1, 2, 3]
    for record in records:
        assert record["rollout/sampler_logps_max_diff"] < 1e-3
    assert records[-1]["rollout/kl"] > 0.01  # the weights have moved
    for number in range(3):
        found = rollout(tmp_path / "run", number)
        np.testing.assert_allclose(found["logps"], found["old_logps"], atol=1e-3)
        ends = found["tokens"][np.cumsum(found["lengths"].flatten()) - 1].reshape(found["lengths"].shape)
        assert (found["lengths"][found["is_cut"]] == 7).all()
        assert len(set(ends[~found["is_cut"]].tolist())) <= 2
        assert len(np.unique(found["tokens"])) > 10


def test_its_most_probable_tokens_are_those_of_the_model_in_training(
    common: tuple[str, ...], python: str, tmp_path: Path
) -> None:
    greedy = ("online.temperature=0", "online.num_generations=1")
    records = _run("gpt_rao_online", tmp_path / "vllm", common, *greedy, *_by_vllm(python))
    same = _run("gpt_rao_online", tmp_path / "megatron", common, *greedy)
    for number in range(3):
        one, other = (rollout(tmp_path / name, number) for name in ("vllm", "megatron"))
        for name in ("prompts", "tokens", "lengths", "is_cut"):
            np.testing.assert_array_equal(one[name], other[name])
        np.testing.assert_allclose(one["logps"], other["logps"], atol=1e-3)
    assert records[-1]["rollout/reward"] == pytest.approx(same[-1]["rollout/reward"])


def test_adapters_are_merged_into_what_it_samples_with(common: tuple[str, ...], python: str, tmp_path: Path) -> None:
    lora = ("model.peft.scheme=lora", "model.peft.lora.target_modules=[all-linear,output_layer]")
    sampling = ("online.top_k=20", "online.top_p=0.9", "online.temperature=1.5")
    records = _run("gpt_grpo", tmp_path / "run", common, *lora, *sampling, *_by_vllm(python), "model.grpo.beta=0.1")
    assert abs(records[-1]["rollout/kl"]) > 0.01  # the adapters have moved
    assert max(record["rollout/sampler_logps_max_diff"] for record in records) < 1e-3


@pytest.mark.parametrize(
    "network",
    [
        ("model.family=qwen2", "model.arch.extra.share_embeddings_and_output_weights=true"),
        ("model.family=qwen3",),
        ("model.family=mistral",),
    ],
    ids=["tied Qwen2", "Qwen3", "Mistral"],
)
def test_other_families(python: str, tmp_path: Path, network: tuple[str, ...]) -> None:
    common = _start(tmp_path, *network)
    records = _run("gpt_rloo", tmp_path / "run", common, *_by_vllm(python), "trainer.max_steps=2")
    assert max(record["rollout/sampler_logps_max_diff"] for record in records) < 1e-3
