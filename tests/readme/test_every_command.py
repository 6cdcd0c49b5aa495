"""Every ``nemo-rao`` command of the README and of docs/ is one: its arguments parse and its recipe composes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from nemo_rao.cli import COMMANDS
from nemo_rao.config.checks import check_sizes
from nemo_rao.config.compose import compose, compose_grid

from .blocks import PAGES, ROOT, blocks, commands

IMPORTED = "# @package _global_\nmodel: {family: llama, arch: {num_layers: 8}}\ndata: {tokenizer: tokenizer}\n"
FOUND = [(page.relative_to(ROOT).as_posix(), words) for page in PAGES for words in commands(page)]


@pytest.fixture(scope="module")
def own_recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stands for the folders that a reader has: an imported model, and the recipes that pages write down."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "model").mkdir()
    (folder / "model" / "imported.yaml").write_text(IMPORTED)
    for page in PAGES:
        for block in blocks(page, "yaml"):
            if named := re.match(r"# my_recipes/(\S+\.yaml)", block):
                (folder / named[1]).parent.mkdir(exist_ok=True)
                (folder / named[1]).write_text(block)
    return folder


@pytest.mark.parametrize(("page", "words"), FOUND, ids=[f"{page}: {' '.join(words)[:60]}" for page, words in FOUND])
def test_the_command_parses_and_its_recipe_composes(page: str, words: list[str], own_recipes: Path) -> None:
    command = COMMANDS[words[0]]
    given = command.parser().parse_intermixed_args(words[1:])
    overrides = [text for text in getattr(given, "overrides", []) if not text.startswith("cluster")]
    config_dir = own_recipes if getattr(given, "config_dir", None) is not None else None
    composed: list[Any] = []
    if words[0] == "compare-rewards":
        composed = [compose(f"gpt_{name}", [*overrides, *getattr(given, name)], config_dir) for name in ("rm", "dpo")]
    elif getattr(given, "multirun", False):
        composed = [config for _, config in compose_grid(given.config_name, overrides, config_dir)]
    elif "config_name" in vars(given):
        composed = [compose(given.config_name, overrides, config_dir)]
    for config in composed:
        check_sizes(config)


def test_recipes_that_a_page_writes_down_compose(own_recipes: Path) -> None:
    for recipe in own_recipes.glob("*.yaml"):
        compose(recipe.stem, [], own_recipes)


def test_commands_are_found_in_the_blocks() -> None:
    """So that a change of the pages' form does not leave nothing to be tested."""
    lines = re.compile(r"^(?:[^#\n]*&& )?(?:nemo-rao|\$run) ", re.MULTILINE)
    assert len(FOUND) == sum(len(lines.findall(block)) for page in PAGES for block in blocks(page))
    assert len(FOUND) >= 30 and {words[0] for _, words in FOUND} >= {"train", "plan", "launch", "score", "generate"}
