"""Suggestions for misspelled names."""

import re

import pytest

from nemo_rao.errors import did_you_mean, nearest

from .test_layers import PACKAGE


@pytest.mark.parametrize(
    ("name", "known", "meant"),
    [
        ("bta", ["low", "beta", "log_z0"], "beta"),
        ("ppo", ["gpt_ipo", "gpt_ppo", "gpt_dpo"], "gpt_ppo"),  # equally similar, but only one ends in the name
        ("kot", ["rloo", "sft", "kto"], "kto"),  # the same letters
        ("temperature", ["beta", "kto"], None),
        ("x", [], None),
    ],
)
def test_the_most_similar_name_is_suggested(name: str, known: list[str], meant: str | None) -> None:
    assert nearest(name, known) == meant
    assert did_you_mean(name, known) == ("" if meant is None else f"; did you mean {meant}?")
    assert did_you_mean(name, known, otherwise="; none") == ("; none" if meant is None else f"; did you mean {meant}?")


def test_only_one_module_looks_for_similar_names() -> None:
    found = [file.name for file in PACKAGE.rglob("*.py") if re.search(r"(import|from) difflib", file.read_text())]
    assert found == ["errors.py"]
