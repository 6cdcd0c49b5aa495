"""The pages of docs/ are what the code states, and their links lead somewhere."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from docs_pages import moving, objectives, pages
from nemo_rao.batch import RewardSummary
from nemo_rao.cli import main
from nemo_rao.config.monitor import _OF_STEPS, _any_batch
from nemo_rao.config.typed_config import types_of_keys
from nemo_rao.objectives.registry import OBJECTIVES
from tests.readme.blocks import PAGES, ROOT, inline_code

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", pages.OF_CODE)
def test_a_page_that_describes_the_code_is_up_to_date(name: str) -> None:
    assert (pages.DOCS / name).read_text() == pages.text(pages.OF_CODE[name]), "make docs-pages"


def test_a_changed_or_missing_page_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pages, "DOCS", tmp_path)
    monkeypatch.setattr(pages, "OF_CODE", {"keys.md": "docs_pages.keys", "moving.md": "docs_pages.moving"})
    monkeypatch.setattr(pages, "OF_RESULTS", {})
    assert pages.main([]) == 0 and pages.main(["--check"]) == 0
    (tmp_path / "keys.md").write_text((tmp_path / "keys.md").read_text().replace("`devices`", "`device`"))
    (tmp_path / "moving.md").unlink()
    assert pages.main(["--check"]) == 1
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["docs/keys.md", "docs/moving.md"]


def _anchors(page: Path) -> set[str]:
    """Of a page's headings, as Python-Markdown and GitHub write them."""
    headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_of_a_page_lead_to_files_and_headings(page: Path) -> None:
    links = [link for link in _LINK.findall(_FENCE.sub("", page.read_text())) if not link.startswith("http")]
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r"[\w/]+\.md", str(yaml.safe_load(text)["nav"])))
    pages_of_docs = {page.relative_to(pages.DOCS).as_posix() for page in PAGES if page.parent != ROOT}
    assert pages_of_docs <= listed
    for page in listed - pages_of_docs:  # files at the top of the repository (docs_pages/hooks.py)
        assert (ROOT / f"{Path(page).stem.upper()}.md").is_file(), page


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_objective_has_a_section_with_its_formula_and_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert objectives.NOTES.keys() == OBJECTIVES.keys(), "docs_pages/objectives.py: each objective has a note"
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", objectives.page(), re.MULTILINE | re.DOTALL))
    assert main(["objectives"]) == 0
    printed = capsys.readouterr().out
    for name, objective in OBJECTIVES.items():
        assert all(f"$$\n{tex}\n$$" in sections[name] for tex in objectives.NOTES[name].tex.split("\n\n"))
        assert objective.source in sections[name] and objective.checked in sections[name]
        rows = [line.split("`")[1] for line in sections[name].splitlines() if line.startswith("| `")]
        assert rows == [field.name for field in dataclasses.fields(objective.config_type)]
        assert objective.formula in printed


def test_every_metric_of_an_objective_is_listed() -> None:
    listed = set(inline_code(pages.DOCS / "reference" / "metrics.md"))
    for objective in OBJECTIVES.values():
        rewards = RewardSummary(mean=0.5, low=0.0, high=1.0, all_labels=True, all_ranked=True)
        config = objective.resolve(objective.config_type(), rewards)
        metrics = objective.loss(_any_batch(2), config).metrics
        if objective.critic is not None:
            metrics = {**metrics, **objective.critic.loss(_any_batch(2), config).metrics}
        assert metrics.keys() <= listed, objective.name
    assert set(_OF_STEPS) <= listed


def test_keys_of_other_tools_lead_to_keys_that_exist() -> None:
    known = types_of_keys()
    rows = [row for tool in moving.TOOLS.values() for row in tool]
    assert [ours for _, ours, _ in rows if ours and ours not in known] == []
    for tool in moving.TOOLS.values():
        theirs = [name for name, _, _ in tool]
        assert len(set(theirs)) == len(theirs)


def test_trls_keys_are_trls() -> None:
    trl = pytest.importorskip("trl")
    for rows, config in ((moving.TRL, trl.DPOConfig), (moving.TRL_ONLINE, trl.GRPOConfig)):
        fields = {field.name for field in dataclasses.fields(config)}
        assert [name for name, _, _ in rows if name not in fields] == []
