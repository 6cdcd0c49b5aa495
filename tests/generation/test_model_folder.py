"""Folders that other tools have written: what is loaded computes what the model computed where it was saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from nemo_rao.errors import UserError
from nemo_rao.generation.model_folder import moved_settings, read_configuration
from nemo_rao.generation.with_transformers import load_model

from ..engines import TRANSFORMERS, needs_transformers_4

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.5,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
# Model type -> rotary embedding, as transformers 4 spells it.
ROPES: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 50.0, "rope_scaling": YARN},
    "mistral": {"rope_theta": 50.0, "rope_scaling": YARN, "head_dim": 8},
    "qwen2": {"rope_theta": 50.0},
    "phi": {"rope_theta": 50.0, "partial_rotary_factor": 0.25},
}


def change(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    kept = {name: value for name, value in json.loads(file.read_text()).items() if name not in values}
    file.write_text(json.dumps(kept | {name: value for name, value in values.items() if value is not None}))


@pytest.mark.parametrize("kind", ROPES)
def test_a_folder_of_transformers_5_without_a_format_entry_computes_the_same(kind: str, tmp_path: Path) -> None:
    rope, tokens = ROPES[kind], torch.arange(48)[None] % 50
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(transformers.CONFIG_MAPPING[kind](**SIZES, **rope))
    model.save_pretrained(tmp_path)
    scaling = rope.get("rope_scaling") or {"rope_type": "default"}
    others = {name: value for name, value in rope.items() if name in ("rope_theta", "partial_rotary_factor")}
    change(tmp_path, rope_parameters={**scaling, **others}, rope_scaling=None, **dict.fromkeys(others))
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors", metadata={"origin": "a merge"})
    moved = {name: value for name, value in rope.items() if name != "head_dim"}
    assert moved_settings(tmp_path) == (moved if TRANSFORMERS == 4 else {})
    with torch.no_grad():
        expected, found = model.eval()(tokens).logits, load_model(tmp_path)(tokens).logits
        change(tmp_path, rope_parameters=None)
        other = load_model(tmp_path)(tokens).logits  # the default base
    torch.testing.assert_close(found, expected)
    assert (other - expected).abs().max() > 0.01


@needs_transformers_4
def test_settings_that_the_installed_release_has_by_another_name_are_refused(tmp_path: Path) -> None:
    transformers.GPT2Config().save_pretrained(tmp_path)
    change(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    with pytest.raises(UserError, match=r"rope_theta in rope_parameters.* does not read for gpt2"):
        read_configuration(tmp_path)
    change(tmp_path, rope_parameters={"rope_type": "longrope", "factor": 4.0})
    with pytest.raises(UserError, match=r"rope_type longrope in rope_parameters has a different form"):
        read_configuration(tmp_path)


def test_a_missing_tensor_is_not_drawn_at_random_and_a_further_one_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "score.weight": torch.ones(1, 32)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load_model(tmp_path)
    assert "has no such tensors: 1 tensors, such as score.weight" in capsys.readouterr().out
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"it has no tensor model\.norm\.weight"):
        load_model(tmp_path)
