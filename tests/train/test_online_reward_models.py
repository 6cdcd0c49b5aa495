"""A trained reward model in online runs: its scores are those of `nemo-rao score`, on any ranks; what does not fit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from nemo_rao.errors import UserError

from .changed_runs import changed_run
from .runs import FOUR_LAYERS, TINY, make_data, parallel, run_training, score, steps
from .test_online import early_letters, logged, rollout

# Another size than the policy's.
SMALL = ("model.arch.hidden_size=32", "model.arch.ffn_hidden_size=64")
ONLINE = (
    "online.num_generations=3",
    "online.max_new_tokens=7",
    "online.log_samples_every=1",
    "online.log_samples=8",
    "model.global_batch_size=8",
    "model.micro_batch_size=2",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory, data: tuple[str, ...]) -> Path:
    folder = tmp_path_factory.mktemp("reward_model")
    keys = [f"exp_manager.exp_dir={folder}", "exp_manager.name=rm", "trainer.max_steps=3"]
    run_training("gpt_rm", [*TINY, *SMALL, *data, *keys])
    return folder / "rm"


def test_its_scores_are_those_of_the_command_under_any_parallelism_and_after_a_stop(
    data: tuple[str, ...], reward_model: Path, tmp_path: Path
) -> None:
    # A policy that has learned to write: samples of another are no text.
    taught = ["model.optim.lr=1e-2", "trainer.max_steps=40", f"exp_manager.exp_dir={tmp_path}", "exp_manager.name=sft"]
    run_training("gpt_sft", [*FOUR_LAYERS, *data, *taught])
    start = tmp_path / "sft"
    common = [*FOUR_LAYERS, *data, *ONLINE, f"model.restore_from_path={start}", f"exp_manager.exp_dir={tmp_path}"]
    alone = [*common, f"online.reward=['r=model:{reward_model}']"]
    run_training("gpt_rloo", [*alone, "exp_manager.name=alone", "trainer.max_steps=2"])
    for last in (1, 2):
        run_training("gpt_rloo", [*alone, "exp_manager.name=resumed", f"trainer.max_steps={last}"])
    rule = f"rule:{early_letters.__module__}:{early_letters.__name__}"
    weighted = [f"online.reward=[{rule},'r=model:{reward_model}']", "online.reward_weights={r: -2.0}"]
    split = [*parallel(2, 2, 1), "model.sequence_parallel=true"]
    run_training("gpt_rloo", [*common, *weighted, *split, "exp_manager.name=split", "trainer.max_steps=1"])

    expected, given, compared = _scored_texts(tmp_path / "alone", reward_model, tmp_path)
    assert compared.sum() > 8
    np.testing.assert_allclose(given[compared], expected[compared], atol=1e-5)
    assert np.ptp(given) > 1e-3
    both, letters = rollout(tmp_path / "split", 0), np.array(_letters(tmp_path / "split"))
    np.testing.assert_array_equal(both["tokens"], rollout(tmp_path / "alone", 0)["tokens"])
    np.testing.assert_allclose(both["rewards"].flatten(), letters - 2 * given, atol=1e-5)
    np.testing.assert_allclose(both["scores/r"].flatten(), given, atol=1e-5)
    responses = [one for row in _samples(tmp_path / "split") for one in row["responses"]]
    for one, letters_of_one, r in zip(responses, letters, both["scores/r"].flatten(), strict=True):
        assert one["scores"] == {early_letters.__name__: letters_of_one, "r": r}
    (first,) = logged(tmp_path / "split", "rollout/scores/r")
    assert first["rollout/scores/r"] == pytest.approx(given.mean(), abs=1e-5)

    assert steps(tmp_path / "resumed") == steps(tmp_path / "alone")
    for name, values in rollout(tmp_path / "alone", 1).items():
        np.testing.assert_array_equal(rollout(tmp_path / "resumed", 1)[name], values)


def _samples(run: Path) -> list[dict]:
    """Those of the first step."""
    found = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    return [one for one in found if one["step"] == 1]


def _letters(run: Path) -> list[float]:
    return [early_letters(row["prompt"], one["content"]) for row in _samples(run) for one in row["responses"]]


def _scored_texts(run: Path, reward_model: Path, folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each response of the first step: the command's score, the run's, and whether text and tokens are one."""
    from nemo_rao.data.encode import Encoder, load_tokenizer
    from nemo_rao.rows.reading import read_rows

    rows = _samples(run)
    given = np.array([one["reward"] for row in rows for one in row["responses"]])
    readable = [bool(one["content"].strip()) for row in rows for one in row["responses"]]
    asked = []
    for row in rows:
        responses = [
            {"content": one["content"], "truncated": one["truncated"]}
            for one in row["responses"]
            if one["content"].strip()
        ]
        if responses:
            asked.append({"prompt": row["prompt"], "responses": responses})
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    scorer = f"r=model:{reward_model}"
    score(str(folder / "asked.jsonl"), str(folder / "scored.jsonl"), "--scorer", scorer, "--max-missing", "1")
    found = [json.loads(line) for line in (folder / "scored.jsonl").read_text().splitlines()]
    expected, compared = np.full(len(given), np.nan), np.zeros(len(given), dtype=bool)
    scores = [answer["r"] for row in found for answer in row["responses"]]
    expected[readable] = [np.nan if one is None else one for one in scores]

    encoder = Encoder(load_tokenizer(_key(run, "tokenizer")))
    held = rollout(run, 0)
    tokens = iter(np.split(held["tokens"], np.cumsum(held["lengths"].flatten())[:-1]))
    encoded = (
        one.tolist()
        for row in read_rows(str(folder / "asked.jsonl"))
        for sample in encoder.encode_many([_one(row, k) for k in range(len(row.responses))])
        for one in ([np.zeros(0)] if isinstance(sample, UserError) else sample.responses)
    )
    for number, own in enumerate(tokens):
        if readable[number]:
            compared[number] = next(encoded) == own.tolist()
    return expected, given, compared


def _one(row: object, number: int) -> object:
    import dataclasses

    return dataclasses.replace(row, responses=(row.responses[number],))


def _key(run: Path, name: str) -> str:
    import yaml

    return yaml.safe_load((run / "recipe.yaml").read_text())["data"][name]


@pytest.mark.parametrize(
    ("recipe", "overrides", "said"),
    [
        ({"objective: rm": "objective: dpo"}, [], "objective dpo does not train a reward model"),
        ({"scheme: none": "scheme: lora"}, [], r"trained only adapters \(lora\). Name a run that trained all weights"),
        ({}, ["model.seq_length=128"], "trained with model.seq_length=64, but samples with their prompts may have 128"),
        (
            {},
            ["model.pipeline_model_parallel_size=4", "trainer.devices=4"],
            "model.arch.num_layers=2 is not divisible by model.pipeline_model_parallel_size=4",
        ),
        ({"chat_template: auto": "chat_template: never"}, [], "was trained with data.chat_template=never"),
        ({"/tokenizer ": "/other "}, [], "tokens are missing there or have other ids"),
        ({"/tokenizer ": "/lower "}, [], "splits the prompt of .*train.jsonl line 1 into other tokens"),
        ({"/tokenizer ": "/chat "}, [], "its tokenizer .*chat has a different chat template"),
    ],
)
def test_one_line_reports_what_does_not_fit_before_the_engine_is_imported(
    data: tuple[str, ...],
    reward_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe: dict[str, str],
    overrides: Sequence[str],
    said: str,
) -> None:
    from nemo_rao.config.compose import compose
    from nemo_rao.engines.engine import engine_of
    from nemo_rao.training.prepare import prepare

    run = changed_run(reward_model, tmp_path, recipe)
    keys = [f"online.reward=[model:{run}]", f"model.restore_from_path={reward_model}"]
    config = compose("gpt_rloo", [*FOUR_LAYERS, *data, *ONLINE, *keys, *overrides, f"exp_manager.exp_dir={tmp_path}"])
    monkeypatch.setattr(engine_of(config), "load", lambda: pytest.fail("the engine was imported"))
    with pytest.raises(UserError, match=said) as refused:
        prepare(config)
    assert str(refused.value).startswith("online.reward=model:") and "\n" not in str(refused.value)
