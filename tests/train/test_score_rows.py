"""What a trained model reads of a file's rows: rendered as in its training, as long as it may be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers

from nemo_rao.batch import Response, Row
from nemo_rao.config.run_config import RunConfig
from nemo_rao.demo.tokenizer_training import train_tokenizer
from nemo_rao.errors import UserError
from nemo_rao.training import score_rows
from nemo_rao.training.score_rows import AS_TRAINED, NOT_AS_TRAINED, Limit, length_limit, tokenize, with_length

# Of an answer, what follows its thinking.
CUTS_THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
THINKING = "<think>two and two</think>four"
ROWS = [
    Row(
        "ask", (Response("four"), Response(THINKING), Response("four " * 150), Response("five", weight=0.0)), "a row 1"
    ),
    Row("ask", (Response(THINKING),), "a row 2"),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["ask two and two four five think"] * 3, folder, 300)
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    loaded.chat_template = CUTS_THINKING
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    loaded.save_pretrained(folder)
    return folder


def recipe(tokenizer: Path, answers: str) -> RunConfig:
    config = RunConfig()
    return replace(config, data=replace(config.data, tokenizer=str(tokenizer), answers=answers))


def test_answers_are_rendered_as_the_recipe_says_and_those_left_out_are_named(tokenizer: Path) -> None:
    limit = Limit(100, "--max-length 100")
    decode = transformers.AutoTokenizer.from_pretrained(tokenizer).decode
    made = tokenize(ROWS, recipe(tokenizer, "template"), limit)
    assert made.numbers == [(0, 0), (0, 3)] and len(made.data) == 1
    assert {at: lacks.reason for at, lacks in made.lacks.items()} == {
        (0, 1): "text or fields that the chat template leaves out",
        (0, 2): "longer than --max-length 100",
        (1, 0): "text or fields that the chat template leaves out",
    }
    detail = made.lacks[0, 1].detail
    assert "two and two" in detail and "response 1" not in detail and "a row 1" not in detail
    verbatim = tokenize(ROWS, recipe(tokenizer, "verbatim"), limit)
    assert verbatim.numbers == [(0, 0), (0, 1), (0, 3), (1, 0)] and list(verbatim.lacks) == [(0, 2)]
    texts = [decode(response) for at in range(2) for response in verbatim.data[at].responses]
    assert texts == ["four<|end|>", f"{THINKING}<|end|>", "five<|end|>", f"{THINKING}<|end|>"]


@pytest.mark.parametrize(("truncated", "remark"), [("drop", NOT_AS_TRAINED), ("without_end", AS_TRAINED)])
def test_truncated_responses_are_scored_without_an_end_token_and_their_rows_counted(
    tokenizer: Path, truncated: str, remark: str
) -> None:
    config = recipe(tokenizer, "verbatim")
    rows = [
        Row("ask", (Response("five"), Response("four", truncated=True), Response("two", truncated=True)), "a row 1"),
        Row("ask", (Response("five"), Response("four " * 150, truncated=True)), "a row 2"),  # that one is not scored
    ]
    made = tokenize(rows, replace(config, data=replace(config.data, truncated=truncated)), Limit(100, "a limit"))
    decode = transformers.AutoTokenizer.from_pretrained(tokenizer).decode
    assert [decode(response) for response in made.data[0].responses] == ["five<|end|>", "four", "two"]
    assert {at: list(remarks) for at, remarks in made.remarks.items()} == {0: [remark], 1: []}


def test_the_context_is_what_the_model_states_and_is_not_guessed(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    positions = {"position_embedding_type": "rope", "hidden_size": 8}
    engine = SimpleNamespace(load=lambda: True, model_config=lambda _: SimpleNamespace(**positions))
    monkeypatch.setattr(score_rows, "engine_of", lambda _: engine)
    config = recipe(tmp_path, "template")
    assert length_limit(config, "runs/rm", 99999) == Limit(99999, "--max-length 99999")  # nothing states it
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8, "max_position_embeddings": 2048}))
    assert length_limit(config, "runs/rm", 2048).tokens == 2048
    with pytest.raises(UserError, match=r"^--max-length 2049: the context of runs/rm's model is 2048 tokens. Lower it"):
        length_limit(config, "runs/rm", 2049)
    positions["hidden_size"] = 16  # of another model
    assert length_limit(config, "runs/rm", 2049).tokens == 2049
    positions["position_embedding_type"] = "learned_absolute"
    with pytest.raises(UserError, match="is 1024 tokens"):
        length_limit(config, "runs/rm", 1025)


def test_the_limit_is_that_of_training_and_the_recipe_is_for_it(tokenizer: Path) -> None:
    config = recipe(tokenizer, "template")
    trained = length_limit(config, "runs/rm", None)
    assert trained.tokens == 1024 and "model.seq_length=1024, with which runs/rm was trained" in trained.set_by
    assert length_limit(config, "runs/rm", 100) == Limit(100, "--max-length 100")
    parallel = replace(config.model, tensor_model_parallel_size=4, sequence_parallel=True)
    assert with_length(replace(config, model=parallel), 101).model.seq_length == 104
