"""Prompts are rendered, and responses checked, as the model was trained: by its folder's record, or by options."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_rao.cli import main
from nemo_rao.data.dataset import load_preferences
from nemo_rao.data.encode import load_tokenizer
from nemo_rao.data.rendering_record import FILE, Rendering, read_rendering, write_rendering
from nemo_rao.demo.tokenizer_training import CHAT_TEMPLATE
from nemo_rao.errors import UserError
from nemo_rao.generation.engine import Continuation
from nemo_rao.generation.policy import Policy, Question
from nemo_rao.generation.settings import EvaluateSettings, GenerateSettings
from nemo_rao.generation.with_transformers import TransformersEngine
from tests.generation.conftest import read_lines
from tests.generation.test_generation_generate import one_line

GENERATION_PROMPT = "{{ '<|assistant|>' }}{% endif %}"
# Templates: one that takes an argument and tools; one whose generation prompt opens a block that answers do not have.
WITH_ARGUMENT = "{% for tool in tools or [] %}{{ tool.name }};{% endfor %}{{ mode or '' }}" + CHAT_TEMPLATE
OPENS_A_BLOCK = CHAT_TEMPLATE.replace(GENERATION_PROMPT, "{{ '<|assistant|><think>\n' }}{% endif %}")
QUESTION = Question("Sort: b a", "here", (0, 0, 0), 1.0)


@pytest.fixture
def with_template(model_folder: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copies of the policy with another chat template."""

    def make(template: str) -> Path:
        folder = shutil.copytree(model_folder, tmp_path / "model")
        (folder / "chat_template.jinja").write_text(template)
        return folder

    return make


def prompt_of(policy: Policy) -> str:
    return policy.prompt_text(QUESTION.content, "here")


def test_template_arguments_render_as_in_training_and_are_the_runs_own_by_default(
    with_template: Callable[[str], Path], write_rows: Callable[..., str]
) -> None:
    folder = with_template(WITH_ARGUMENT)
    path = write_rows({"prompt": "Sort: b a", "chosen": "a b", "rejected": "b"}, name="pairs.jsonl")
    given = GenerateSettings(template_arguments={"mode": "none"})
    policy = Policy(folder, given)
    trained = load_preferences(path, policy.tokenizer, seq_length=64, template_arguments={"mode": "none"})[0]
    assert policy.encoder.encode(QUESTION.row()).prompt.tolist() == trained.prompt.tolist()
    assert prompt_of(policy).startswith("none<|begin|>") and policy.notes == ()
    assert prompt_of(Policy(folder, GenerateSettings())).startswith("<|begin|>")

    write_rendering(folder, Rendering("always", {"mode": "some"}, "verbatim"))
    policy = Policy(folder, EvaluateSettings())
    assert prompt_of(policy).startswith("some<|begin|>") and policy.notes == ()
    assert policy.rendering.answers == "verbatim"
    policy = Policy(folder, given)
    assert prompt_of(policy).startswith("none<|begin|>")
    assert policy.notes == ('template_arguments={"mode": "none"}: the model was trained with {"mode": "some"}',)
    assert Policy(folder, GenerateSettings(chat_template="auto")).notes == ()  # renders like always
    policy = Policy(folder, GenerateSettings(chat_template="never", answers="template"))
    assert policy.notes == (
        "answers=template: the model was trained with verbatim",
        "chat_template=never: the model was trained with always",
    )
    assert prompt_of(policy) == "Sort: b a"


def test_what_a_template_takes_beside_the_messages_reaches_it(with_template: Callable[[str], Path]) -> None:
    policy = Policy(with_template(WITH_ARGUMENT), GenerateSettings())
    asked = Question("Sort: b a", "here", (0, 0, 0), 1.0, template_fields={"tools": [{"name": "sort"}]})
    assert policy.tokenizer.decode(policy.encoder.encode(asked.row()).prompt).startswith("sort;<|begin|>")


def test_commands_report_how_they_differ_from_the_training(
    with_template: Callable[[str], Path],
    prompts: str,
    write_rows: Callable[..., str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = with_template(WITH_ARGUMENT)
    write_rendering(folder, Rendering(template_arguments={"mode": "x"}))
    options = ("--engine=transformers", "--max-new-tokens=4", '--template-arguments={"mode": "y"}')
    line = 'template_arguments={"mode": "y"}: the model was trained with {"mode": "x"}\n'
    output = tmp_path / "out.jsonl"
    assert main(["generate", str(folder), prompts, str(output), "--num-responses=1", *options]) == 0
    said = capfd.readouterr().out
    assert said.startswith(line) and said.endswith('data.template_arguments={"mode": "y"}\n')
    rows = write_rows({"instruction": "Say a."}, {"instruction": "Say b."}, name="instructions.jsonl")
    evaluate = ["evaluate", str(folder), "--task=alpaca_eval", "--instructions", rows, "--out", str(tmp_path / "out")]
    assert main([*evaluate, *options, "--max-new-tokens=1"]) == 0
    said = capfd.readouterr().out
    assert said.startswith(line) and "alpaca_eval: of 2 answers 2 cut at 1 tokens (--max-new-tokens)" in said
    assert main([*evaluate, "--engine=transformers", "--max-new-tokens=1"]) == 2
    assert "has alpaca_eval with another template_arguments" in one_line(capfd)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "is not a JSON object"),
        ('{"answer": "template"}', "has the unknown key answer"),
        ('{"answers": "mine"}', "answers is 'mine'; allowed are template, verbatim"),
        ('{"template_arguments": []}', "template_arguments must be an object"),
    ],
)
def test_a_damaged_record_of_the_training_is_refused(tmp_path: Path, text: str, part: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(UserError, match=r"nemo_rao\.json: ") as error:
        read_rendering(tmp_path)
    assert part in str(error.value) and "\n" not in str(error.value)


def test_template_arguments_without_a_template_are_refused(with_template: Callable[[str], Path]) -> None:
    folder = with_template("")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="template_arguments: the tokenizer has no chat template"):
        Policy(folder, GenerateSettings(template_arguments={"mode": "x"}))


# ------------------------------------------------------------------------------- responses that cannot be trained on


def scripted(monkeypatch: pytest.MonkeyPatch, folder: Path, answer_of: Callable[[int], tuple[str, bool]]) -> None:
    """The engine says what ``answer_of`` gives for a prompt's number: a text, and whether it is cut."""
    tokenizer = load_tokenizer(folder)

    def generate(self: TransformersEngine, requests: Any) -> list[Continuation]:
        answers = [answer_of(request.stream[0]) for request in requests]
        return [Continuation(tokenizer.encode(text, add_special_tokens=False), cut) for text, cut in answers]

    monkeypatch.setattr(TransformersEngine, "generate", generate)


def test_a_template_behind_which_no_answer_can_be_trained_on_is_refused_before_sampling(
    with_template: Callable[[str], Path],
    prompts: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = with_template(OPENS_A_BLOCK)
    command = ["generate", str(folder), prompts, str(tmp_path / "out.jsonl"), "--num-responses=2"]

    def no_weights(*_: Any) -> None:
        raise AssertionError("weights were loaded")

    with monkeypatch.context() as patched:
        patched.setattr("nemo_rao.generation.with_transformers.load_model", no_weights)
        assert main([*command, "--engine=transformers"]) == 2
    message = one_line(capfd)
    assert "training could not read any response to these prompts: " in message and "--answers verbatim" in message
    assert "line 1" in message and "empty" not in message

    # Kept unchanged behind the generation prompt, with the block closed, they can be.
    scripted(monkeypatch, folder, lambda number: (f"hm {number}\n</think>\n\n42", False))
    assert main([*command, "--engine=transformers", "--answers=verbatim"]) == 0
    rows = read_lines(tmp_path / "out.jsonl")
    assert [row["responses"][0]["content"] for row in rows] == [f"hm {n}\n</think>\n\n42" for n in range(5)]
    tokenizer = load_tokenizer(folder)
    data = load_preferences(str(tmp_path / "out.jsonl"), tokenizer, seq_length=128, answers="verbatim")
    assert tokenizer.decode(data[0].prompt).endswith("<|assistant|><think>\n")
    assert tokenizer.decode(data[0].responses[0]) == "hm 0\n</think>\n\n42<|end|>"


def test_the_reason_why_a_prompt_has_no_responses_is_reported(
    with_template: Callable[[str], Path],
    prompts: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A generation prompt that ends in a line break, which an answer's own line breaks merge with."""
    breaks = "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}"
    folder = with_template(
        CHAT_TEMPLATE.replace("{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}", breaks).replace(
            GENERATION_PROMPT, "{{ '<|assistant|>\n' }}{% endif %}"
        )
    )
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    assert ["Ċ", "Ċ"] not in tokenizer["model"]["merges"]
    tokenizer["model"]["merges"].append(["Ċ", "Ċ"])
    tokenizer["model"]["vocab"]["ĊĊ"] = 301
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    said = {0: ("\n\nyes", False), 1: ("", False), 2: ("\n\nyes", True)}
    scripted(monkeypatch, folder, lambda number: said.get(number, ("yes", False)))
    command = ["generate", str(folder), prompts, str(tmp_path / "out.jsonl"), "--num-responses=2"]
    assert main([*command, "--engine=transformers"]) == 0
    report = capfd.readouterr().out
    assert "3 prompts, 6 responses" in report and "1 skipped for empty responses" in report
    assert "1 skipped for responses that training could not read, the first: " in report
    assert "prompts.jsonl line 1: response 1 has no boundary in tokens" in report
    rows = read_lines(tmp_path / "out.jsonl")
    assert [[response.get("truncated", False) for response in row["responses"]] for row in rows] == [
        [True, True],
        [False, False],
        [False, False],
    ]


def test_thinking_of_earlier_answers_is_left_out_where_the_template_cuts_it(
    with_template: Callable[[str], Path],
    write_rows: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuts = CHAT_TEMPLATE.replace("message['content'] +", "message['content'].split('</think>')[-1] +")
    folder = with_template(cuts)
    asked: list[str] = []

    def generate(self: TransformersEngine, requests: Any) -> list[Continuation]:
        asked.extend(tokenizer.decode(request.tokens) for request in requests)
        return [Continuation(tokenizer.encode("hm</think>\n42", add_special_tokens=False), False) for _ in requests]

    tokenizer = load_tokenizer(folder)
    monkeypatch.setattr(TransformersEngine, "generate", generate)
    questions = write_rows({"question_id": 1, "category": "math", "turns": ["6 * 7?", "7 * 6?"]}, name="q.jsonl")
    evaluate = ["evaluate", str(folder), "--task=mt_bench", "--questions", questions, "--out", str(tmp_path / "out")]
    assert main([*evaluate, "--engine=transformers", "--name=mine"]) == 0
    assert asked == [
        "<|begin|><|user|>6 * 7?<|end|><|assistant|>",
        "<|begin|><|user|>6 * 7?<|end|><|assistant|>42<|end|><|user|>7 * 6?<|end|><|assistant|>",
    ]
    (answer,) = read_lines(tmp_path / "out/mt_bench/mine.jsonl")
    assert answer["choices"][0]["turns"] == ["hm</think>\n42"] * 2


def test_evaluation_has_no_option_about_answers(capfd: pytest.CaptureFixture[str]) -> None:
    """It puts no answer behind a prompt to be trained on."""
    assert main(["evaluate", "nowhere", "--task=mmlu", "--out=out", "--answers=verbatim"]) == 2
    assert "unrecognized arguments: --answers=verbatim" in one_line(capfd)
