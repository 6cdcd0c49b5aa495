"""The whole procedure, command after command: what one writes is what the next one reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nemo_rao.config.engine_choice import BRIDGE, installed_engine
from nemo_rao.data.encode import Encoder, load_tokenizer
from nemo_rao.objectives import registry
from nemo_rao.rows.reading import read_rows
from nemo_rao.runtime.metrics_file import read_metrics

from ..hugging_face.models import command, import_converter, make_model
from ..hugging_face.test_trl_dpo import conversations, pairs_of
from ..train.runs import make_data, parallel

MODEL = "qwen3" if installed_engine() == BRIDGE else "llama"
QUICK = (
    "trainer.enable_progress_bar=false",
    "exp_manager.draw_curves=false",
    "trainer.max_epochs=null",
    "trainer.max_steps=4",
    "model.seq_length=64",
    "model.global_batch_size=8",
    "model.micro_batch_size=4",
    "model.optim.lr=1e-3",
    "model.optim.sched.warmup_steps=0",
)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face in -> SFT -> reward model -> scores -> RAO -> Hugging Face out -> samples; the folder of it all."""
    import_converter()
    folder = tmp_path_factory.mktemp("pipeline")
    make_data(folder, 16)
    make_model(MODEL, folder / "tokenizer", folder / "given")
    command("import-hf", folder / "given", folder / "start")

    def train(recipe: str, name: str, *overrides: str) -> None:
        command(
            "train",
            *("--config-dir", folder / "start", "--config-name", recipe, "model=imported", *QUICK),
            *(f"exp_manager.exp_dir={folder}", f"exp_manager.name={name}"),
            *overrides,
        )

    data = f"data.train_path={folder / 'train.jsonl'}"
    train("gpt_sft", "sft", data)
    same = f"data.validation_path={folder / 'train.jsonl'}"
    train("gpt_rm", "rm", data, same, *parallel(2, 1, 1), f"model.restore_from_path={folder / 'sft'}")
    command("score", folder / "train.jsonl", folder / "scored.jsonl", "--scorer", f"model:{folder / 'rm'}")
    scored = f"data.train_path={folder / 'scored.jsonl'}"
    same = f"data.validation_path={folder / 'scored.jsonl'}"
    train("gpt_rao", "rao", scored, same, *parallel(2, 2, 1), f"model.restore_from_path={folder / 'sft'}")
    command("export-hf", folder / "rao", folder / "policy")
    command("export-hf", folder / "rm", folder / "reward_model")
    command(
        "generate",
        *(folder / "policy", folder / "train.jsonl", folder / "samples.jsonl"),
        *("--num-responses", "2", "--max-new-tokens", "8"),
    )
    return folder


def test_the_scored_file_has_the_rewards_that_rao_was_trained_on(pipeline: Path) -> None:
    rows = list(read_rows(str(pipeline / "scored.jsonl")))
    given = list(read_rows(str(pipeline / "train.jsonl")))
    assert [row.prompt for row in rows] == [row.prompt for row in given]
    rewards = [[response.reward for response in row.responses] for row in rows]
    assert all(reward is not None for of_row in rewards for reward in of_row)
    assert len({reward for of_row in rewards for reward in of_row}) > len(rows)
    mean = sum(sum(of_row) / len(of_row) for of_row in rewards) / len(rewards)
    first = next(record for record in read_metrics(pipeline / "rao" / "metrics.jsonl") if "loss" in record)
    assert first["rao/log_z"] == pytest.approx(mean / 0.1, rel=1e-3, abs=1e-4), "auto: the mean reward over beta"


def test_transformers_gives_the_reward_models_scores(pipeline: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(pipeline / "reward_model").eval()
    assert model.config.num_labels == 1
    encoder = Encoder(load_tokenizer(pipeline / "reward_model"))
    for row in list(read_rows(str(pipeline / "scored.jsonl")))[:4]:
        sample = encoder.encode(row)
        for tokens, response in zip(sample.responses, row.responses, strict=True):
            ids = torch.tensor([[*sample.prompt.tolist(), *tokens.tolist()]])
            with torch.no_grad():
                score = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 0]
            assert float(score) == pytest.approx(response.reward, rel=1e-4, abs=1e-5)


def test_transformers_generates_with_the_exported_policy(pipeline: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(pipeline / "policy").eval()
    assert (model.config.model_type, model.config.architectures) == (MODEL, [type(model).__name__])
    row = next(iter(read_rows(str(pipeline / "train.jsonl"))))
    prompt = Encoder(load_tokenizer(pipeline / "policy")).encode(row).prompt
    tokens = torch.tensor([prompt.tolist()])
    made = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        min_new_tokens=4,
        max_length=None,
        max_new_tokens=4,
    )
    assert torch.equal(made[:, : len(prompt)], tokens) and made.shape == (1, len(prompt) + 4)


@pytest.mark.filterwarnings("ignore")
def test_trl_reads_the_exported_reward_model_and_policy(pipeline: Path, tmp_path: Path) -> None:
    """Its trainers take both as they are, and measure what our validation measured at the end of the runs."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    def last(run: str) -> dict[str, float]:
        return [record for record in read_metrics(pipeline / run / "metrics.jsonl") if "val/loss" in record][-1]

    shared = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
        "max_length": None,
    }
    rows = datasets.Dataset.from_list(conversations(pairs_of(pipeline / "train.jsonl")))
    rewards = RewardTrainer(
        AutoModelForSequenceClassification.from_pretrained(pipeline / "reward_model"),
        args=RewardConfig(
            per_device_eval_batch_size=len(rows),
            center_rewards_coefficient=registry.get("rm").make_config({}).center,
            **shared,
        ),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=load_tokenizer(pipeline / "reward_model"),
    ).evaluate()
    assert rewards["eval_loss"] == pytest.approx(last("rm")["val/loss"], rel=1e-4)
    assert rewards["eval_margin"] == pytest.approx(last("rm")["val/rewards/margins"], rel=1e-3, abs=1e-5)
    assert rewards["eval_accuracy"] == pytest.approx(last("rm")["val/rewards/accuracies"])

    # Our RAO's chosen and rejected are the best and the worst by the model's scores.
    rows = datasets.Dataset.from_list(conversations(pairs_of(pipeline / "scored.jsonl")))
    policy = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(pipeline / "policy"),
        args=DPOConfig(per_device_eval_batch_size=len(rows), **shared),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=load_tokenizer(pipeline / "policy"),
    ).evaluate()
    for part in ("chosen", "rejected"):
        assert policy[f"eval_logps/{part}"] == pytest.approx(last("rao")[f"val/logps/{part}"], rel=1e-4), part


def test_the_samples_of_the_exported_policy_are_rows_that_can_be_scored_and_trained_on(pipeline: Path) -> None:
    rows = [json.loads(line) for line in (pipeline / "samples.jsonl").read_text().splitlines()]
    assert rows and all(len(row["responses"]) == 2 for row in rows)
    command(
        "score",
        *(pipeline / "samples.jsonl", pipeline / "scored_samples.jsonl"),
        *("--scorer", f"model:{pipeline / 'rm'}"),
    )
    scored = list(read_rows(str(pipeline / "scored_samples.jsonl")))
    assert len(scored) == len(rows)
    assert all(response.reward is not None for row in scored for response in row.responses)
