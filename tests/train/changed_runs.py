"""Runs with another recipe than the one that trained them, to be refused as second models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import yaml


def changed_run(run: Path, folder: Path, changes: Mapping[str, str]) -> Path:
    """The directory ``folder/rm``: the checkpoints of a run, and its recipe with some texts replaced.

    Its tokenizer is a copy, ``folder/tokenizer``. ``{"/tokenizer ": "/NAME "}`` gives it another: ``other`` has another
    vocabulary, ``lower`` another normalizer, ``chat`` another chat template.
    """
    made = folder / "rm"
    made.mkdir()
    (made / "checkpoints").symlink_to(run / "checkpoints")
    text = (run / "recipe.yaml").read_text()
    own = Path(yaml.safe_load(text)["data"]["tokenizer"])
    text = text.replace(f"tokenizer: {own} ", f"tokenizer: {folder}/tokenizer ")
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (made / "recipe.yaml").write_text(text)
    _make_tokenizer(own, Path(yaml.safe_load(text)["data"]["tokenizer"]))
    return made


def _make_tokenizer(own: Path, folder: Path) -> None:
    if folder.name == "other":
        from nemo_rao.demo.tokenizer_training import train_tokenizer

        train_tokenizer(["other texts of other words"] * 9, folder, 300)
        return
    shutil.copytree(own, folder)
    if folder.name == "lower":
        tokenizer = json.loads((own / "tokenizer.json").read_text())
        tokenizer["normalizer"] = {"type": "Lowercase"}
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    elif folder.name == "chat":
        settings = json.loads((own / "tokenizer_config.json").read_text())
        settings["chat_template"] = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        for file in folder.glob("*.jinja"):
            file.unlink()
