"""Model FLOPs of the tokens that a step computed, as a share of the GPU's peak."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from nemo_rao.batch import Sample
from nemo_rao.config.compose import compose
from nemo_rao.config.gpu_models import GPUS, gpu_of_device
from nemo_rao.data.collate import collate
from nemo_rao.loop.throughput import Throughput, throughput_of
from nemo_rao.planning.compute import Work, flops
from nemo_rao.planning.plan import setting_of
from nemo_rao.planning.setting import Setting


@pytest.fixture(scope="module")
def setting() -> Setting:
    return dataclasses.replace(setting_of(compose("gpt_rao_llama3_8b")), sequence_parallel=False, tensor=1)


def test_a_dense_step_is_six_flops_for_each_weight_and_token_and_twelve_for_each_pair(setting: Setting) -> None:
    """By the count of the weights in products: Llama 3 8B without its embedding, 7.505 billion."""
    layer = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336
    weights = 32 * layer + 4096 * 128256
    found = flops(setting, Work(tokens=1000, pairs=300_000)).model
    assert found == 6 * weights * 1000 + 32 * 12 * 4096 * 300_000


def test_a_planned_step_is_one_of_its_own_tokens(setting: Setting) -> None:
    tokens = setting.step_tokens
    assert flops(setting) == flops(setting, Work(tokens, setting.length * tokens))


@pytest.mark.parametrize("packed", [False, True])
def test_a_micro_batch_counts_its_pairs_of_queries_and_keys(packed: bool) -> None:
    """Rows of 5 + 3 and 5 + 2 tokens; shared, the prompt's first 4 tokens stand there once."""
    prompt, nothing = np.arange(1, 6, dtype=np.int32), (np.zeros((2, 0)), np.zeros(0))
    responses = (np.array([7, 8, 9], np.int32), np.array([7, 8], np.int32))
    sample = Sample(prompt, responses, np.array([0.0, 1.0]), False, "row", *nothing)
    rows = collate([sample], [0], pad_token_id=0, packed=packed, pad_multiple=16)
    shared = collate([sample], [0], pad_token_id=0, packed=packed, pad_multiple=16, shared_prompts=True)
    assert (rows.num_tokens, rows.num_attention_pairs) == (15, 8 * 8 + 7 * 7)
    assert (shared.num_tokens, shared.num_attention_pairs) == (11, 4 * 4 + 4 * (4 + 4) + 3 * (4 + 3))


def test_a_step_reports_its_share_of_all_gpus_peak(setting: Setting) -> None:
    assert setting.ranks == 8
    work = Work(tokens=100_000, pairs=10**8)
    expected = flops(setting, work).model / (2.0 * 8 * 1e12)
    found = Throughput(setting, 989.4).metrics(work, seconds=2.0)
    assert found == {"perf/tflops_per_gpu": pytest.approx(expected), "perf/mfu": pytest.approx(expected / 989.4)}
    assert Throughput(setting, None).metrics(work, seconds=2.0) == {"perf/tflops_per_gpu": pytest.approx(expected)}


def test_the_peak_is_that_of_the_run_s_gpu_and_format(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose("gpt_rao_llama3_8b", ["precision=bf16_mixed"])
    assert throughput_of(config, responses=2) is None, "on a CPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, peak in (("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        found = throughput_of(config, responses=2)
        assert found is not None and found.peak_tflops == peak


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA B200", "b200"),
        # Other peaks: fewer or slower cores, or a part of a GPU.
        *[(name, None) for name in ("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA GH200 480GB", "NVIDIA H200 NVL")],
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("Tesla V100-SXM2-32GB", None),
    ],
)
def test_a_gpu_is_known_by_its_drivers_name(name: str, key: str | None) -> None:
    assert gpu_of_device(name) is (None if key is None else GPUS[key])
