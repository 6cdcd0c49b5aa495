"""A small tokenizer with a ChatML template, files with given records, and a recipe composed over them. No NeMo."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from nemo_rao.config.compose import compose
from nemo_rao.data.tokenizer import load_tokenizer
from nemo_rao.demo.tokenizer_training import train_tokenizer
from nemo_rao.show.inspection import Inspection, inspect
from nemo_rao.show.rows import MOST_TOKENS

CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of the tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["Name a prime. The answer is 7, as you know.\n\nsystem user assistant You help."] * 3, folder, 320)
    made = load_tokenizer(folder)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = CHATML
    made.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[..., str]:
    """Writes records (or raw lines) as JSON Lines and returns the path."""

    def write(records: Iterable[object], name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
        return str(path)

    return write


@pytest.fixture
def look(tokenizer: str) -> Callable[..., Inspection]:
    """Inspects a file under a recipe."""

    def made(
        path: str,
        recipe: str,
        *overrides: str,
        rows: int = 3,
        row_numbers: tuple[int, ...] = (),
        most_tokens: int | None = MOST_TOKENS,
    ) -> Inspection:
        keys = [f"data.train_path={path}", f"data.tokenizer={tokenizer}", *overrides]
        config = compose(recipe, keys)
        return inspect(config, recipe, num_rows=rows, row_numbers=row_numbers, most_tokens=most_tokens)

    return made
