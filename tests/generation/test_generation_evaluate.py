"""`nemo-rao evaluate`: files in the form that the judges of benchmarks read, and tasks of lm-evaluation-harness."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from nemo_rao.cli import main
from nemo_rao.data.encode import load_tokenizer
from nemo_rao.data.rendering_record import Rendering, write_rendering
from nemo_rao.generation.with_transformers import TransformersEngine
from tests.generation.conftest import read_lines
from tests.generation.test_generation_generate import Killed, one_line

OPTIONS = ("--engine=transformers", "--max-new-tokens=12", "--batch-size=2")
QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write a.", "Write it again."]},
    {"question_id": 111, "category": "math", "turns": ["What is 6 times 7?", "And 7 times 6?"]},
    {"question_id": 150, "category": "stem", "turns": ["Name a prime."], "reference": ["7"]},
]
MULTIPLE_CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: [" a", " 42"]
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def evaluate(model: Path, out: Path, *options: str) -> int:
    return main(["evaluate", str(model), "--out", str(out), *OPTIONS, *options])


@pytest.fixture
def instructions(tmp_path: Path) -> str:
    """A JSON array, like AlpacaEval's own file."""
    path = tmp_path / "instructions.json"
    given = [{"instruction": f"Say {text}.", "output": "of another", "dataset": "koala"} for text in "abcde"]
    del given[1]["dataset"]
    path.write_text(json.dumps(given))
    return str(path)


@pytest.fixture
def questions(write_rows: Callable[..., str]) -> str:
    return write_rows(*QUESTIONS, name="question.jsonl")


def test_alpaca_eval_gets_its_own_format_and_the_command_that_judges_it(
    model_folder: Path, instructions: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(model_folder, tmp_path / "out", "--task=alpaca_eval", "--instructions", instructions) == 0
    outputs = json.loads((tmp_path / "out/alpaca_eval.json").read_text())
    assert [output["instruction"] for output in outputs] == [f"Say {text}." for text in "abcde"]
    assert [output["dataset"] for output in outputs] == ["koala", "alpaca_eval", "koala", "koala", "koala"]
    assert all(set(output) == {"instruction", "output", "generator", "dataset"} for output in outputs)
    assert all(output["generator"] == "policy" and isinstance(output["output"], str) for output in outputs)
    assert len({output["output"] for output in outputs}) == 5
    said = capfd.readouterr().out
    assert f"alpaca_eval --model_outputs {tmp_path}/out/alpaca_eval.json" in said and "mean_tokens" in said
    results = json.loads((tmp_path / "out/results.json").read_text())["tasks"]["alpaca_eval"]
    assert results["metrics"]["answers"] == 5 and results["settings"]["temperature"] == 0.7


def test_mt_bench_gets_its_own_format_and_each_turn_sees_the_answers_before_it(
    model_folder: Path, questions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    original = TransformersEngine.generate

    def watched(self: TransformersEngine, requests: Any) -> Any:
        asked.extend(requests)
        return original(self, requests)

    monkeypatch.setattr(TransformersEngine, "generate", watched)
    assert evaluate(model_folder, tmp_path / "out", "--task=mt_bench", "--questions", questions, "--name=mine") == 0
    answers = read_lines(tmp_path / "out/mt_bench/mine.jsonl")
    assert [answer["question_id"] for answer in answers] == [81, 111, 150]
    for answer, question in zip(answers, QUESTIONS, strict=True):
        assert set(answer) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert answer["model_id"] == "mine" and isinstance(answer["tstamp"], float)
        (choice,) = answer["choices"]
        assert choice["index"] == 0 and len(choice["turns"]) == len(question["turns"])
    assert len({answer["answer_id"] for answer in answers}) == 3
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    second = next(request for request in asked if request.stream[:2] == (0, 1))
    assert tokenizer.decode(second.tokens) == (
        f"<|begin|><|user|>Write a.<|end|><|assistant|>{answers[0]['choices'][0]['turns'][0]}<|end|>"
        "<|user|>Write it again.<|end|><|assistant|>"
    )
    assert {request.stream[0]: request.temperature for request in asked} == {0: 0.7, 1: 0.0, 2: 0.1}


def test_killed_answers_go_on_and_finished_tasks_are_not_run_again(
    model_folder: Path, questions: str, instructions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ("--instructions", instructions, "--questions", questions)
    tasks = ("--task=mt_bench,alpaca_eval", *files)
    assert evaluate(model_folder, tmp_path / "whole", *tasks) == 0
    original = TransformersEngine.generate
    streams: list[Any] = []

    def killed(self: TransformersEngine, requests: Any) -> Any:
        streams.append([request.stream for request in requests])
        if len(streams) == 5:  # mt_bench: two turns and one, then alpaca_eval
            raise Killed
        return original(self, requests)

    monkeypatch.setattr(TransformersEngine, "generate", killed)
    with pytest.raises(Killed):
        evaluate(model_folder, tmp_path / "out", *tasks)
    assert list(json.loads((tmp_path / "out/results.json").read_text())["tasks"]) == ["mt_bench"]
    first = list(streams[:4])
    assert evaluate(model_folder, tmp_path / "out", *tasks) == 0
    assert [stream for stream in streams[5:] if stream in first] == []
    assert (tmp_path / "out/alpaca_eval.json").read_bytes() == (tmp_path / "whole/alpaca_eval.json").read_bytes()
    made, streams[:] = len(streams), []
    assert evaluate(model_folder, tmp_path / "out", *tasks) == 0 and streams == [] and made > 5
    assert not list((tmp_path / "out").rglob("*.part.jsonl"))


def test_results_of_another_model_or_of_other_settings_are_not_overwritten(
    model_folder: Path, instructions: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    task = ("--task=alpaca_eval", "--instructions", instructions, "--limit=1")
    assert evaluate(model_folder, tmp_path / "out", *task) == 0
    capfd.readouterr()
    assert evaluate(model_folder, tmp_path / "out", *task, "--temperature=0") == 2
    assert "has alpaca_eval with another temperature" in one_line(capfd)
    results = json.loads((tmp_path / "out/results.json").read_text())
    (tmp_path / "out/results.json").write_text(json.dumps(results | {"digest_of_model": "0"}))
    assert evaluate(model_folder, tmp_path / "out", *task) == 2
    assert "has the results of another model" in one_line(capfd)


def test_what_cannot_be_evaluated_is_reported_before_weights_are_loaded(
    model_folder: Path,
    write_rows: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def no_weights(*_: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("nemo_rao.generation.with_transformers.load_model", no_weights)
    rows = write_rows({"instruction": "a"}, {"instruct": "b"}, name="rows.jsonl")
    turns = write_rows({"question_id": 1, "category": "math", "turns": "one"}, name="turns.jsonl")
    (tmp_path / "broken.json").write_text("[{")
    for options, part in (
        (["--task=alpaca_eval"], "--instructions: is required by task alpaca_eval"),
        (["--task=mt_bench"], "--questions: is required by task mt_bench"),
        (["--task=mt_bench", "--questions", turns], "line 1: field 'turns' must be a list of texts"),
        (["--task=mt_bench", "--questions", turns, "--chat-template=never"], "need a chat template"),
        (["--task=alpaca_eval", "--instructions", rows], "line 2: field 'instruction' is missing"),
        (["--task=alpaca_eval", "--instructions", str(tmp_path / "broken.json")], "cannot be read as a JSON array"),
        (["--task=alpaca_eval", "--instructions", "nowhere.json"], "nowhere.json: no such file"),
        (["--task=alpaca_eval", "--instructions", rows, "--name=a/b"], "--name 'a/b'"),
        (["--task=,"], "--task: no task is given"),
        (["--task=mmlu", "--include-path=nowhere"], "--include-path nowhere: no such directory"),
        (["--task=mmlu", "--limit=0"], "limit=0: must be >= 1"),
    ):
        assert evaluate(model_folder, tmp_path / "out", *options) == 2
        assert part in (message := one_line(capfd)), message
    assert not (tmp_path / "out").exists()


def test_a_task_of_the_harness_says_what_to_install_where_it_is_not(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else original(name))
    assert evaluate(model_folder, tmp_path / "out", "--task=gsm8k") == 2
    assert "pip install 'nemo-rao[eval]'" in one_line(capfd)


def test_a_users_own_task_is_run_by_the_harness_with_the_policys_log_probabilities(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    documents = [{"question": f"What is the answer {text}?", "answer": n % 2} for n, text in enumerate("abcdefgh")]
    tasks, options = own_task(documents, tmp_path, monkeypatch)
    assert evaluate(model_folder, tmp_path / "out", *options) == 0
    found = json.loads((tmp_path / "out/results.json").read_text())["tasks"]["own_task"]["metrics"]

    model = transformers.LlamaForCausalLM.from_pretrained(model_folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    right = []
    for document in documents:
        sums = []
        for choice in (" a", " 42"):
            prompt, whole = (
                tokenizer(text)["input_ids"] for text in (document["question"], document["question"] + choice)
            )
            logps = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            sums.append(sum(logps[at - 1, whole[at]].item() for at in range(len(prompt), len(whole))))
        right.append(int(sums[1] > sums[0]) == document["answer"])
    assert math.isclose(found["acc"], sum(right) / len(right)) and 0 < found["acc"] < 1
    assert "own_task" in (said := capfd.readouterr().out) and f"{found['acc']:.4f}" in said

    assert evaluate(model_folder, tmp_path / "out", "--task=own_tusk", "--include-path", str(tasks)) == 2
    assert "task own_tusk: lm_eval has no task of this name" in capfd.readouterr().err


def test_the_harness_renders_questions_as_in_training(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    _, options = own_task([{"question": "What is a?", "answer": 0}], tmp_path, monkeypatch)
    folder = shutil.copytree(model_folder, tmp_path / "model")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template.replace("{{ bos_token }}", "{{ mode or '' }}"))
    write_rendering(folder, Rendering(template_arguments={"mode": "m"}))
    from lm_eval.models.huggingface import HFLM

    asked: list[list[int]] = []
    original = HFLM._loglikelihood_tokens

    def watched(self: Any, requests: Any, *args: Any, **options: Any) -> Any:
        asked.extend(context for _, context, _ in requests)
        return original(self, requests, *args, **options)

    monkeypatch.setattr(HFLM, "_loglikelihood_tokens", watched)
    assert evaluate(folder, tmp_path / "out", *options, "--apply-chat-template") == 0
    # Without the beginning token, which the tokenizer adds to plain text.
    assert [load_tokenizer(folder).decode(tokens) for tokens in asked] == [
        "m<|user|>What is a?<|end|><|assistant|>"
    ] * 2
    capfd.readouterr()
    assert evaluate(folder, tmp_path / "out", *options, "--apply-chat-template", "--template-arguments={}") == 2
    assert "has own_task with another template_arguments" in one_line(capfd).splitlines()[-1]
    assert evaluate(folder, tmp_path / "never", *options, "--apply-chat-template", "--chat-template=never") == 2
    assert "apply_chat_template: the tokenizer has no chat template, or" in one_line(capfd)


def own_task(documents: Sequence[Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, tuple[str, ...]]:
    """The folder of a multiple-choice task over these documents, and the options that name it."""
    manager = pytest.importorskip("lm_eval.tasks").TaskManager
    # Its own thousands of tasks take seconds to list, and need the network.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(manager, include_defaults=False))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    tasks = folder / "tasks"
    tasks.mkdir()
    (folder / "data.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (tasks / "own.yaml").write_text(MULTIPLE_CHOICE.format(name="own_task", data=folder / "data.jsonl"))
    return tasks, ("--task=own_task", "--include-path", str(tasks))
