"""``import-hf`` and ``export-hf`` where Megatron-Bridge is installed and NeMo is not."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ..engines import BRIDGE, ENGINE, NO_BRIDGE

if ENGINE != BRIDGE:
    pytest.skip(NO_BRIDGE, allow_module_level=True)

import torch
from safetensors.torch import load_file, save_file

from nemo_rao.data.encode import load_tokenizer
from nemo_rao.hugging_face.config_keys import read_config
from nemo_rao.hugging_face.network import config_values, model_keys, network_fields
from nemo_rao.hugging_face.source import family_of

from ..hugging_face.models import command, read_json, refused, tensors
from ..train.runs import make_data
from .models import MODELS, make_model
from .test_hugging_face import import_bridge

PADDED = 320  # rows of the embeddings; the tokenizer has 300 tokens or fewer
CONVERTED = ("Qwen3-MoE", "Gemma 3 (text): local and global layers")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_data(folder, 8)
    return folder / "tokenizer"


def make_source(name: str, tokenizer: Path, folder: Path) -> Path:
    make_model(name, folder, vocab_size=PADDED)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    return folder


@pytest.mark.parametrize("name", CONVERTED)
def test_a_model_goes_in_and_comes_out_the_same(tokenizer: Path, tmp_path: Path, name: str) -> None:
    import_bridge()
    source = make_source(name, tokenizer, tmp_path / "source")
    command("import-hf", source, tmp_path / "imported")
    command("export-hf", tmp_path / "imported", tmp_path / "exported")
    before, after = tensors(source), tensors(tmp_path / "exported")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    given, found = (read_json(folder / "config.json") for folder in (source, tmp_path / "exported"))
    apart = {key for key in given.keys() | found.keys() if given.get(key) != found.get(key)}
    assert apart <= {"bos_token_id", "eos_token_id", "pad_token_id", "_name_or_path"}
    for file in ("tokenizer.json", "chat_template.jinja"):
        assert (source / file).read_bytes() == (tmp_path / "exported" / file).read_bytes()
    written = read_json(tmp_path / "exported" / "generation_config.json")
    assert (written["temperature"], written["do_sample"]) == (0.6, True)
    assert written["eos_token_id"] == load_tokenizer(source).eos_token_id
    recipe = (tmp_path / "imported" / "model" / "imported.yaml").read_text()
    assert f"vocab_size: {PADDED}" in recipe and "family: " in recipe


@pytest.mark.parametrize("name", MODELS)
def test_a_recipe_names_the_network_that_bridge_builds(tmp_path: Path, name: str) -> None:
    """Every field of the provider that the recipe's keys make is that of the provider that AutoBridge makes."""
    import_bridge()
    from transformers import AutoConfig

    from nemo_rao.config.families import FAMILIES
    from nemo_rao.engines.bridge.families import in_bridges_terms
    from nemo_rao.engines.bridge.hugging_face import Conversion
    from nemo_rao.mcore.activations import activation

    make_model(name, tmp_path)
    given = read_json(tmp_path / "config.json")
    family = family_of(given, tmp_path, BRIDGE)
    config = read_config(given, family, "config.json")
    keys = model_keys(config, family)
    arch = dict(keys["arch"])
    fields = {**FAMILIES[keys["family"]].fields, **arch.pop("extra"), **arch}
    kind, own = in_bridges_terms(keys["family"], {**fields, "activation_func": activation(fields["activation_func"])})
    theirs = Conversion(AutoConfig.from_pretrained(tmp_path), name).provider
    assert issubclass(type(theirs), kind)  # Mistral's differs in its defaults alone
    names = {field.name for field in dataclasses.fields(kind)} & own.keys()
    # What the engine decides: how far a vocabulary is padded, and dropout.
    for field in names - {"make_vocab_size_divisible_by", "attention_dropout", "hidden_dropout"}:
        mine, wanted = plain(own[field]), plain(vars(theirs)[field])
        if field == "kv_channels" and wanted is None:
            wanted = theirs.hidden_size // theirs.num_attention_heads
        assert mine == pytest.approx(wanted) if isinstance(mine, float) else mine == wanted, field
    # And back again.
    again = config_values({**fields, **network_fields(config, family)}, family)
    read = {**vars(config), "num_experts": vars(config).get("num_local_experts")}  # as transformers 5 names it
    assert all(read[key] == value for key, value in again.items() if key != "rope_scaling")


def plain(value: Any) -> Any:
    if callable(value):
        return value.__name__  # Megatron has some activation functions twice
    return list(value) if isinstance(value, tuple) else value


def change(folder: Path, **changed: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**read_json(file), **changed}))


def without(folder: Path, name: str) -> None:
    kept = load_file(folder / "model.safetensors")
    save_file(
        {key: value for key, value in kept.items() if key != name}, folder / "model.safetensors", {"format": "pt"}
    )


def scaled(folder: Path, **changed: Any) -> None:
    rope = read_json(folder / "config.json")["rope_parameters"]
    change(folder, rope_parameters={**rope, **changed})


LLAMA, MIXTURE, GEMMA = "Llama 3.x: scaled rotary embedding, tied", "Qwen3-MoE", CONVERTED[1]
BAD: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "a family that Bridge does not know": (
        LLAMA,
        lambda folder: change(folder, architectures=["BloomForCausalLM"], model_type="bloom"),
        "is a BloomForCausalLM, which cannot be imported",
    ),
    "another rotary scaling": (
        LLAMA,
        lambda folder: scaled(folder, low_freq_factor=2.0),
        "rope_scaling.low_freq_factor",
    ),
    "a missing tensor": (
        MIXTURE,
        lambda folder: without(folder, "model.layers.1.mlp.experts.2.up_proj.weight"),
        "has no tensor model.layers.1.mlp.experts.2.up_proj.weight",
    ),
    "dense layers in a mixture": (MIXTURE, lambda folder: change(folder, mlp_only_layers=[0]), "mlp_only_layers"),
    "an expert too many": (
        MIXTURE,
        lambda folder: change(folder, num_local_experts=3),
        "which the model does not use",
    ),
    "other sizes": (MIXTURE, lambda folder: change(folder, hidden_size=64), "do not fit config.json"),
    "a soft cap": (GEMMA, lambda folder: change(folder, final_logit_softcapping=30.0), "final_logit_softcapping"),
    "layers in another order": (
        GEMMA,
        lambda folder: change(folder, layer_types=["full_attention"] + ["sliding_attention"] * 5),
        "layer_types",
    ),
}


@pytest.fixture(scope="module")
def sources(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make_source(name, tokenizer, tmp_path_factory.mktemp("source")) for name in (LLAMA, MIXTURE, GEMMA)}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_imported_is_refused_in_one_line(sources: dict[str, Path], tmp_path: Path, case: str) -> None:
    import_bridge()
    name, spoil, said = BAD[case]
    source = shutil.copytree(sources[name], tmp_path / "source")
    spoil(source)
    refused(["import-hf", source, tmp_path / "made"], said)
    assert not set(tmp_path.iterdir()) - {source}


def test_a_family_that_the_installed_release_lacks_is_refused_in_one_line(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_bridge()
    from megatron.bridge import AutoBridge

    monkeypatch.setattr(AutoBridge, "supports", lambda config: False)
    said = "is a Gemma3ForCausalLM, which the installed Megatron-Bridge"
    refused(["import-hf", sources[GEMMA], tmp_path / "made"], said)
    assert not list(tmp_path.iterdir())
