"""What is wrong with an online run, through the command: one line and exit code 2, before the engine is imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_rao.cli import main
from nemo_rao.config.compose import compose
from nemo_rao.demo.tokenizer_training import train_tokenizer
from nemo_rao.engines.engine import engine_of

RULES = """
import os

def good(prompt, response):
    return float(prompt == "Sort: b a" and bool(response))

def not_a_number(prompt, response):
    return float("nan")

def endless(prompt, response):
    return float("inf")

def text(prompt, response):
    return "good"

def nothing(prompt, response):
    return None

def broken(prompt, response):
    return response["score"]

def leaves(prompt, response):
    os._exit(3)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("inputs")
    (made / "rules_of_bad_input.py").write_text(RULES)
    train_tokenizer(["Sort: b a c"] * 3, made / "tokenizer", 300)
    (made / "prompts.jsonl").write_text('{"prompt": "Sort: b a"}\n')
    (made / "long.jsonl").write_text(json.dumps({"prompt": "Sort: b a"}) + "\n" + json.dumps({"prompt": "b " * 99}))
    return made


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        *[
            ([f"online.reward=[rule:rules_of_bad_input:{name}]"], (f"rules_of_bad_input:{name}{said}",))
            for name, said in (
                ("not_a_number", " returned nan; it must be finite"),
                ("endless", " returned inf; it must be finite"),
                ("text", " returned text ('good'), not a number"),
                ("nothing", " returned null, not a number"),
                ("broken", " raised TypeError: string indices must be integers"),
                ("leaves", ": a call ended the process"),
            )
        ],
        (["online.reward=[rule:rules_of_bad_input:good,'r=rule:rules_of_bad_input:text']"], ("online.reward: r, ",)),
        (
            ["data.train_path=FOLDER/long.jsonl", "data.strict=true"],
            (
                "long.jsonl line 2: the prompt has ",
                "tokens, more than 96: model.seq_length=128 minus online.max_new_tokens=32",
                "strict",
            ),
        ),
        (["online.num_generations=1"], ("online.num_generations=1: objective grpo compares", "at least 2")),
        (["online.max_new_tokens=0"], ("online.max_new_tokens=0: must be >= 1",)),
    ],
)
def test_one_line_reports_what_is_wrong(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    overrides: list[str],
    parts: tuple[str, ...],
) -> None:
    def not_to_be_called(*_: Any, **__: Any) -> None:
        raise AssertionError("the engine was imported")

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(engine_of(compose("gpt_grpo", [])), "load", not_to_be_called)
    given = [f"data.train_path={folder}/prompts.jsonl", f"data.tokenizer={folder}/tokenizer", "model.seq_length=128"]
    given += ["online.max_new_tokens=32", "online.reward=[rule:rules_of_bad_input:good]", "model.micro_batch_size=1"]
    given += [
        "model.global_batch_size=1",
        "model.arch.num_layers=2",
        "model.arch.hidden_size=32",
        "model.arch.ffn_hidden_size=64",
    ]
    more = [text.replace("FOLDER", str(folder)) for text in overrides]
    code = main(["train", "--config-name", "gpt_grpo", *given, *more])
    output, message = capfd.readouterr()
    assert code == 2, output + message
    assert message.startswith("error: ") and message.count("\n") == 1, message
    assert all(part in message for part in parts), message
    assert not list(tmp_path.iterdir())
