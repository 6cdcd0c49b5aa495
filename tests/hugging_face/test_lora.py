"""Runs of adapters alone: killed, continued under another parallelism, exported merged and for peft."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ..slow import slow_but
from ..train.runs import die_after_step, in_fork, parallel, steps
from .conftest import Converted
from .models import command, read_json, refused, sft_loss, tensors

NUM_STEPS, EVERY, DIES_AFTER = 7, 3, 5
RECOMPUTED = ("model.recompute_granularity=full", "model.recompute_method=uniform")

# Name: (model, target modules, layout at first, layout after the kill, peft's target modules).
CASES: dict[str, tuple[str, str, Sequence[str], Sequence[str], list[str]]] = {
    "lm_head and some layers, TP 2 x DP 2, then PP 2": (
        "llama",
        "[q_proj,k_proj,v_proj,lm_head,'*.layers.1.mlp.*']",
        parallel(2, 1, 2),
        parallel(1, 2, 1),
        [
            "k_proj",
            "lm_head",
            *(f"model.layers.1.mlp.{name}" for name in ("down_proj", "gate_proj", "up_proj")),
            *("q_proj", "v_proj"),
        ],
    ),
    "every linear layer, tied embeddings, PP 2, then TP 2 and recomputed": (
        "tied qwen2, padded",
        "[all-linear,output_layer]",
        parallel(1, 2, 1),
        (*parallel(2, 1, 1), "model.sequence_parallel=true", *RECOMPUTED),
        ["down_proj", "gate_proj", "k_proj", "lm_head", "o_proj", "q_proj", "up_proj", "v_proj"],
    ),
}


def arguments(converted: Converted, data: Path, folder: Path, targets: str, *extra: str) -> list[str]:
    return [
        *("train", "--config-dir", str(converted.imported), "--config-name", "gpt_sft", "model=imported"),
        *(f"data.train_path={data}/train.jsonl", f"data.validation_path={data}/train.jsonl"),
        *(
            f"trainer.max_steps={NUM_STEPS}",
            "trainer.max_epochs=null",
            "trainer.enable_progress_bar=false",
            "exp_manager.draw_curves=false",
        ),
        *("model.peft.scheme=lora", "model.peft.lora.dim=4", "model.peft.lora.alpha=24"),
        *(f"model.peft.lora.target_modules={targets}", "model.optim.lr=1e-2", "model.optim.sched.name=constant"),
        *("model.global_batch_size=8", "model.micro_batch_size=2"),
        *(f"exp_manager.exp_dir={folder}", "exp_manager.name=run"),
        f"exp_manager.checkpoint_callback_params.every_n_train_steps={EVERY}",
        *extra,
    ]


def killed(given: Sequence[str]) -> None:
    from nemo_rao.cli import main

    die_after_step(DIES_AFTER)
    assert main(given) == 1


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("name", slow_but(list(CASES)[1:], CASES))
def test_a_killed_run_continues_under_another_parallelism_and_is_exported(
    converted: dict[str, Converted], data: Path, tmp_path: Path, name: str
) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    model, targets, first, then, peft_targets = CASES[name]
    # On one rank, undisturbed. Its adapters start as theirs do, whatever the parallelism.
    command(*arguments(converted[model], data, tmp_path / "whole", targets))
    expected = steps(tmp_path / "whole" / "run")

    in_fork(killed, arguments(converted[model], data, tmp_path, targets, *first))
    run = tmp_path / "run"
    assert len(steps(run)) == DIES_AFTER
    command(*arguments(converted[model], data, tmp_path, targets, *then))
    got = steps(run)
    assert [step["step"] for step in got] == list(range(1, NUM_STEPS + 1))
    for want, have in zip(expected, got, strict=True):
        assert have["loss"] == pytest.approx(want["loss"], rel=1e-5)
        # Steps are large here, and spread what rounding does; the first one's gradient is that of the same start.
        rel = 1e-5 if want["step"] == 1 else 1e-4
        assert have["grad_norm"] == pytest.approx(want["grad_norm"], rel=rel) and have["grad_norm"] > 0
    for file in run.glob("checkpoints/*/weights/adapter_metadata.json"):
        assert Path(read_json(file)["model_ckpt_path"]).samefile(converted[model].imported)

    command("export-hf", run, tmp_path / "merged")
    command("export-hf", run, tmp_path / "adapters", "--adapters")
    validations = [line for line in (run / "metrics.jsonl").read_text().splitlines() if "val/loss" in line]
    logged = [json.loads(line)["val/loss"] for line in validations]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert sft_loss(merged, tmp_path / "merged", data) == pytest.approx(logged[-1], abs=1e-5)
    assert logged[-1] < logged[0] - 0.1  # the adapters do something
    assert "lm_head.weight" in tensors(tmp_path / "merged") and not merged.config.tie_word_embeddings

    base = AutoModelForCausalLM.from_pretrained(converted[model].source)
    tokens = torch.arange(300).view(6, 50)
    before = logits(base, tokens)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapters")
    assert read_json(tmp_path / "adapters" / "adapter_config.json")["target_modules"] == peft_targets
    torch.testing.assert_close(logits(adapted, tokens), logits(merged, tokens), rtol=1e-4, atol=1e-4)
    assert (logits(merged, tokens) - before).abs().max() > 0.1
    # The embeddings are the base's: an adapter of the output layer does not reach them where they were tied.
    assert torch.equal(merged.get_input_embeddings().weight, base.get_input_embeddings().weight)

    # What such a checkpoint is no good for, or cannot go on as.
    def again(*extra: str) -> list[str]:
        return arguments(converted[model], data, tmp_path, targets, *extra)

    for extra, parts in (
        (("model.peft.lora.dim=8",), ("model.peft.lora.dim from 4 to 8", "another exp_manager.name")),
        (("model.peft.lora.target_modules=[linear_proj]",), ("model.peft.lora.target_modules", "another exp_manager")),
        (("model.peft.scheme=none",), ("model.peft.scheme from lora to none", "another exp_manager.name")),
        ((f"model.restore_from_path={run}", "exp_manager.name=next"), ("holds only adapters", "import-hf")),
    ):
        refused(again(*extra), *parts)
    other = converted["llama" if model != "llama" else "tied qwen2, padded"].imported
    refused(["export-hf", run, tmp_path / "x", "--base", other], "has other weights")
