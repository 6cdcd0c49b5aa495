"""Every ``nemo-rao`` command of the README and of docs/ is one: its arguments parse and its recipe composes."""

from __future__ import annotations

import dataclasses
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from nemo_rao.cli import COMMANDS
from nemo_rao.config.checks import check_sizes
from nemo_rao.config.compose import compose, compose_grid
from nemo_rao.config.run_config import RunConfig
from nemo_rao.config.typed_config import require_known

from .blocks import PAGES, ROOT, blocks, commands, inline_code

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


def test_keys_commands_targets_and_modules_in_the_text_exist() -> None:
    """Those in code spans; keys of other tools have pages of their own."""
    sections = "|".join(field.name for field in dataclasses.fields(RunConfig))
    rules = re.findall(r"^([a-z-]+(?: [a-z%-]+)*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = {target for rule in rules for target in rule.split()}
    seen = 0
    for page in PAGES:
        of_others = page.name in ("moving.md", "other_names.md")
        for code in inline_code(page):
            first, *words = code.split()
            if (found := re.fullmatch(rf"((?:{sections})\.[a-z0-9_.]+[a-z0-9_])(=.*)?", first)) and not of_others:
                if not first.endswith((".json", ".yaml", ".safetensors")):  # files
                    require_known(found[1])
            elif first == "nemo-rao" and words and words[0].islower():
                options = {name for action in COMMANDS[words[0]].parser()._actions for name in action.option_strings}
                assert [word for word in words[1:] if word.startswith("--") and word not in options] == [], code
            elif first == "make" and words and "=" not in words[0]:
                assert words[0] in targets, code
            elif (first, words[:1]) == ("python", ["-m"]):
                assert find_spec(words[1]), code
            else:
                continue
            seen += 1
    assert seen > 300
