"""No field of a prompt is dropped in silence: it is used, carried along, declared unwanted or reported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_rao.cli import main
from nemo_rao.demo.tokenizer_training import CHAT_TEMPLATE
from nemo_rao.generation.with_transformers import TransformersEngine
from nemo_rao.rows.reading import read_rows
from tests.generation.conftest import read_lines
from tests.generation.test_generation_generate import one_line

TOOLS = [{"name": "sort"}]


@pytest.fixture
def with_tools(model_folder: Path, tmp_path: Path) -> Path:
    """The policy with a chat template that takes tools."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    template = "{% for tool in tools or [] %}{{ tool.name }};{% endfor %}" + CHAT_TEMPLATE
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, with_tools: Path) -> list[str]:
    """The texts of all prompts that the engine gets."""
    from nemo_rao.data.encode import load_tokenizer

    texts: list[str] = []
    original, tokenizer = TransformersEngine.generate, load_tokenizer(with_tools)

    def watched(self: TransformersEngine, requests: Any) -> Any:
        texts.extend(tokenizer.decode(request.tokens) for request in requests)
        return original(self, requests)

    monkeypatch.setattr(TransformersEngine, "generate", watched)
    return texts


def test_fields_of_prompts_are_rendered_and_carried_along(
    with_tools: Path,
    asked: list[str],
    write_rows: Callable[..., str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    prompts = write_rows(
        {"ask": "a", "system": "Be brief.", "tools": TOOLS, "answer": "b"},
        {"ask": "c", "chosen": "d", "rejected": "e", "source": "web"},
    )
    command = ["generate", str(with_tools), prompts, str(tmp_path / "out.jsonl"), "--engine=transformers"]
    options = ("--num-responses=1", "--max-new-tokens=4", "--column=prompt=ask")
    assert main([*command, *options]) == 0
    assert "1 prompts have a field 'source' that is neither used nor written" in capfd.readouterr().out
    assert list(dict.fromkeys(asked)) == [  # an empty response is sampled again
        "sort;<|begin|><|system|>Be brief.<|end|><|user|>a<|end|><|assistant|>",
        "<|begin|><|user|>c<|end|><|assistant|>",
    ]
    first, second = read_rows(tmp_path / "out.jsonl")
    assert first.template_fields == {"tools": TOOLS} and first.prompt[0] == {"role": "system", "content": "Be brief."}
    assert read_lines(tmp_path / "out.jsonl")[0]["answer"] == "b" and second.template_fields == {}
    for option, part in (
        ("--column=prompt", "--column prompt: must be OURS=THEIRS"),
        ("--column=prompt=other", "--column prompt=other: prompt is already set to ask"),
        ("--ignore-field=ask", "'ask', which --column names for 'prompt', is missing"),
    ):
        assert main([*command[:3], str(tmp_path / "other.jsonl"), *options, option]) == 2
        assert part in one_line(capfd)


@pytest.mark.parametrize("task", ["alpaca_eval", "mt_bench"])
def test_fields_of_benchmarks_are_rendered_refused_or_reported(
    task: str,
    with_tools: Path,
    asked: list[str],
    write_rows: Callable[..., str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    known: dict[str, Any] = {"question_id": 1, "category": "math", "turns": ["a"], "reference": ["b"]}
    option = "--questions"
    if task == "alpaca_eval":
        known, option = {"instruction": "a", "output": "b", "generator": "c", "dataset": "d"}, "--instructions"
    file = write_rows(
        known | {"system": "Be brief.", "tools": TOOLS, "context": "x", "source": "web"}, name="tasks.jsonl"
    )
    command = ["evaluate", str(with_tools), f"--task={task}", option, file, "--out", str(tmp_path / "out")]
    assert main([*command, "--engine=transformers"]) == 2
    assert "field 'context' looks like part of the prompt, but would not be used" in one_line(capfd)
    assert main([*command, "--engine=transformers", "--ignore-field=context", "--max-new-tokens=4"]) == 0
    assert asked == ["sort;<|begin|><|system|>Be brief.<|end|><|user|>a<|end|><|assistant|>"]
    out = capfd.readouterr().out
    assert "have a field 'source' that is not used" in out and out.count("that is not used") == 1
    before = json.loads((tmp_path / "out/results.json").read_text())["tasks"][task]["settings"]
    write_rows(known | {"system": "Be kind.", "tools": TOOLS}, name="tasks.jsonl")
    assert main([*command, "--engine=transformers", "--max-new-tokens=4"]) == 2
    assert f"has {task} with another" in one_line(capfd) and "digest_of_model" in before
