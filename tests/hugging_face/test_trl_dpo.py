"""TRL's DPOTrainer on the same pairs, start and batches takes the same steps."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from nemo_rao.data.encode import load_tokenizer

from ..train.runs import parallel, steps
from .conftest import Converted
from .models import command

STEPS, RATE, BETA = 4, 5e-3, 0.2
NAMES = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


def pairs_of(path: Path) -> list[dict[str, str]]:
    pairs = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        best = max(row["responses"], key=lambda answer: answer["reward"])
        worst = min(row["responses"], key=lambda answer: answer["reward"])
        pairs.append({"prompt": row["prompt"], "chosen": best["content"], "rejected": worst["content"]})
    return pairs


def conversations(pairs: list[dict[str, str]]) -> list[dict[str, Any]]:
    """As TRL takes them."""

    def message(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}]

    return [
        {
            "prompt": message("user", pair["prompt"]),
            "chosen": message("assistant", pair["chosen"]),
            "rejected": message("assistant", pair["rejected"]),
        }
        for pair in pairs
    ]


def trl_steps(model: Path, pairs: list[dict[str, str]], folder: Path) -> list[dict[str, Any]]:
    import datasets
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    rows = conversations(pairs)
    config = DPOConfig(
        output_dir=str(folder),
        beta=BETA,
        max_steps=STEPS,
        per_device_train_batch_size=len(rows),
        learning_rate=RATE,
        lr_scheduler_type="constant",
        adam_beta1=0.9,
        adam_beta2=0.98,
        weight_decay=0.0,
        max_grad_norm=0.0,
        max_length=None,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = DPOTrainer(
            AutoModelForCausalLM.from_pretrained(model),
            args=config,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=load_tokenizer(model),
        )
        trainer.train()
    return [record for record in trainer.state.log_history if "loss" in record]


def test_trl_takes_the_same_steps(converted: dict[str, Converted], data: Path, tmp_path: Path) -> None:
    given = converted["llama"]
    pairs = pairs_of(data / "train.jsonl")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    command(
        "train",
        *("--config-dir", given.imported, "--config-name", "gpt_dpo", "model=imported"),
        *parallel(2, 1, 1),
        f"data.train_path={tmp_path / 'pairs.jsonl'}",
        f"model.dpo.beta={BETA}",
        f"model.optim.lr={RATE}",
        "model.optim.sched.name=constant",
        "model.optim.sched.warmup_steps=0",
        f"model.global_batch_size={len(pairs)}",
        "model.micro_batch_size=4",
        "trainer.gradient_clip_val=0",
        "trainer.max_epochs=null",
        f"trainer.max_steps={STEPS}",
        "trainer.enable_progress_bar=false",
        "exp_manager.draw_curves=false",
        f"exp_manager.exp_dir={tmp_path}",
        "exp_manager.name=ours",
    )
    ours, theirs = steps(tmp_path / "ours"), trl_steps(given.source, pairs, tmp_path / "trl")
    assert len(ours) == len(theirs) == STEPS
    assert ours[-1]["loss"] < 0.9 * ours[0]["loss"], "or nothing was learned"
    for one, other in zip(ours, theirs, strict=True):
        for name in NAMES[1:]:
            if name == "rewards/accuracies" and one["step"] == 1:
                continue  # which of two equal rewards is greater is rounding
            assert float(other[name]) == pytest.approx(one[name], rel=1e-4, abs=1e-4), (one["step"], name)
        assert float(other["loss"]) == pytest.approx(one["loss"], abs=1e-4), "TRL logs four digits of it"
