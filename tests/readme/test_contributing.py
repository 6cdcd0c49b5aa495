"""The objective that CONTRIBUTING.md adds as an example works as written there, and its formula agrees with it."""

from __future__ import annotations

import re
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nemo_rao.config.typed_config import known_keys
from nemo_rao.objectives.base import Objective
from nemo_rao.objectives.registry import OBJECTIVES

from ..objectives import formulas
from ..objectives.batches import loss_and_gradients, make_batch, make_config
from ..objectives.formulas import answers_of
from .blocks import ROOT

PAGE = ROOT / "CONTRIBUTING.md"


def block(language: str, containing: str) -> str:
    """The one fenced block that has this text, without its indentation."""
    found = re.findall(rf"^ *```{language}\n(.*?)^ *```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    [text] = [text for text in found if containing in text]
    return textwrap.dedent(text)


def executed(code: str, monkeypatch: pytest.MonkeyPatch, **names: Any) -> dict[str, Any]:
    """The names that the code defines, as a module's, where ``dataclass`` looks types up."""
    module = types.ModuleType("example")
    vars(module).update(names)
    monkeypatch.setitem(sys.modules, "example", module)
    exec(code, vars(module))
    return vars(module)


def test_the_example_objective_has_the_value_and_gradient_of_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    objective: Objective = executed(block("python", "LN_DPO = Objective"), monkeypatch)["LN_DPO"]
    assert objective.name not in OBJECTIVES, "the page would describe what is there already"
    for table in ("FORMULAS", "PAIRS"):
        monkeypatch.setattr(formulas, table, type(vars(formulas)[table])(vars(formulas)[table]))
    executed(block("python", "@pair_formula"), monkeypatch, **vars(formulas))
    cases = eval(f"{{{block('python', '[{}, {')}}}")
    batch = make_batch()
    for keys in cases[objective.name]:
        output, _, gradient = loss_and_gradients(objective, batch, make_config(objective, keys))
        loss, by_hand = 0.0, torch.zeros_like(gradient)
        for row, answers in enumerate(answers_of(batch)):
            of_prompt, slopes = formulas.FORMULAS[objective.name](answers, **keys)
            loss += of_prompt or 0.0
            for column, slope in slopes.items():
                by_hand[row, column] = slope
        assert output.loss_sum.item() == pytest.approx(loss, rel=1e-10)
        torch.testing.assert_close(gradient, by_hand, rtol=1e-10, atol=1e-12)


def test_the_example_recipe_sets_keys_that_exist() -> None:
    recipe = yaml.safe_load(block("yaml", "objective: ln_dpo"))
    assert set(recipe) == {"model"} and set(recipe["model"]) == {"objective", "optim"}
    assert {f"model.optim.{name}" for name in recipe["model"]["optim"]} <= known_keys().keys()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:nemo_rao|tests|conf)/[\w/.]+)`", PAGE.read_text()))))
def test_the_files_that_the_page_names_exist_unless_the_example_makes_them(path: str) -> None:
    assert (ROOT / path).exists() or "ln_dpo" in Path(path).name
