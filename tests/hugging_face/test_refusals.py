"""What cannot be converted is refused in one line that names it, with exit code 2, and nothing is left on the disk."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_rao.cli import main
from nemo_rao.config.compose import compose
from nemo_rao.config.engine_choice import BRIDGE, NEMO, installed_engine
from nemo_rao.config.recipe_text import to_yaml
from nemo_rao.errors import UserError
from nemo_rao.hugging_face.source import family_of

from ..train.runs import in_fork
from .models import import_converter, make_model, tensors


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the commands set for their process, they are to set for one test alone."""
    for name in ("CUDA_VISIBLE_DEVICES", "USE_TF", "USE_FLAX"):
        monkeypatch.setenv(name, "0" if name.startswith("USE") else "")


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", data / "tokenizer", tmp_path_factory.mktemp("whole") / "model", max_shard_size="100KB")


@pytest.fixture
def source(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "source")


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line that says why, where the exit code is 2."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[0]


def cut(file: Path, num_bytes: int) -> None:
    with file.open("r+b") as opened:
        opened.truncate(num_bytes)


def change(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def without_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(shard(folder))
    del tensors[next(name for name in tensors if "layers.0" in name)]
    save_file(tensors, shard(folder))


def rewrite(file: Path, metadata: dict[str, str], **changes: Any) -> None:
    from safetensors.torch import load_file, save_file

    save_file({**load_file(file), **changes}, file, metadata=metadata)


def tensors_that_overlap(folder: Path) -> None:
    """The last tensor begins with the one before it; its size is another, the file's is the same."""
    length = int.from_bytes(shard(folder).read_bytes()[:8], "little")
    whole = shard(folder).read_bytes()
    header = json.loads(whole[8 : 8 + length])
    entries = sorted(
        (entry for name, entry in header.items() if name != "__metadata__"), key=lambda entry: entry["data_offsets"]
    )
    entries[-1]["data_offsets"][0] = entries[-2]["data_offsets"][0]
    text = json.dumps(header).encode()
    shard(folder).write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])


def whole_beside_shards(folder: Path) -> None:
    shutil.copyfile(shard(folder), folder / "model.safetensors")


def index_of_other_files(folder: Path) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["another"] = shard(folder).name
    file.write_text(json.dumps(index))


def a_tensor_twice(folder: Path) -> None:
    from safetensors.torch import load_file

    first, second, *_ = sorted(folder.glob("model-*.safetensors"))
    name, tensor = next((name, tensor) for name, tensor in load_file(first).items() if "layers.0" in name)
    rewrite(second, {"format": "pt"}, **{name: tensor})


def pickled(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle that is never opened")


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "no such directory"),
    "no config.json": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "config.json cut off": (lambda folder: cut(folder / "config.json", 40), "config.json cannot be read"),
    "another architecture": (
        lambda folder: change(folder, architectures=["GPT2LMHeadModel"], model_type="gpt2"),
        "GPT2LMHeadModel, which cannot be imported. Only LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3",
    ),
    "a missing shard": (lambda folder: shard(folder).unlink(), "model-00001-of-00004.safetensors is missing"),
    "a truncated shard": (lambda folder: cut(shard(folder), 9000), "is truncated: it has 9000 of"),
    "a shard with data after its end": (lambda folder: cut(shard(folder), 1_000_000), "but its tensors end at"),
    "an empty shard": (lambda folder: cut(shard(folder), 0), "is not a safetensors file"),
    "a header that contradicts itself": (tensors_that_overlap, "is damaged"),
    "a shard of TensorFlow": (lambda folder: rewrite(shard(folder), {"format": "tf"}), "the weights of a tf model"),
    "whole weights beside shards": (whole_beside_shards, "has both model.safetensors and model.safetensors.index.json"),
    "an index of other files": (index_of_other_files, "index.json does not match the files: tensor another"),
    "a tensor in two shards": (a_tensor_twice, "both have a tensor model.layers.0"),
    "a missing tensor": (without_a_tensor, "is in the index but not in the files"),
    "other sizes": (lambda folder: change(folder, hidden_size=64), "config.json requires [300, 64]"),
    "a layer too many": (lambda folder: change(folder, num_hidden_layers=1), "which the model does not use"),
    "other positions": (
        lambda folder: change(folder, rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}),
        'rope_scaling ({"rope_type": "yarn"',
    ),
    "a generation config that cannot be saved": (
        lambda folder: (folder / "generation_config.json").write_text('{"max_new_tokens": 0}'),
        "Correct the file, or remove it",
    ),
    "ties that the weights do not have": (lambda folder: change(folder, tie_word_embeddings=True), "with other values"),
    "adapters alone": (
        lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"),
        "contains only adapters",
    ),
    "quantized": (lambda folder: change(folder, quantization_config={"bits": 4}), "quantization_config"),
    "pickles alone": (pickled, "--allow-pickle"),
    "no tokenizer": (lambda folder: [file.unlink() for file in folder.glob("token*")], "tokenizer"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_imported_is_refused_in_one_line(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    spoil, said = BAD[name]
    spoil(source)
    assert said in refusal(capsys, "import-hf", source, tmp_path / "made")
    assert not set(tmp_path.iterdir()) - {source}


@pytest.mark.parametrize("command", ["import-hf", "export-hf"])
def test_a_folder_with_something_in_it_is_not_written_to(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, converted: dict[str, Any]
) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "mine").write_text("mine")
    given = source if command == "import-hf" else converted["llama"].imported
    assert "is not an empty directory" in refusal(capsys, command, given, tmp_path / "made")
    assert [file.name for file in (tmp_path / "made").iterdir()] == ["mine"]


def test_what_is_no_checkpoint_is_not_exported(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert "is neither a checkpoint" in refusal(capsys, "export-hf", tmp_path / "empty", tmp_path / "made")


def test_a_hugging_face_folder_in_a_checkpoints_place_is_answered_with_the_command_that_imports_it(
    source: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    remedy = f"nemo-rao import-hf {source} DEST"
    assert remedy in refusal(capsys, "export-hf", source, tmp_path / "made")
    paths = (f"data.train_path={data}/train.jsonl", f"data.tokenizer={source}", f"exp_manager.exp_dir={tmp_path}/runs")
    train = ("train", "--config-name", "gpt_dpo", *paths)
    assert remedy in refusal(capsys, *train, f"model.restore_from_path={source}")
    assert "nemo-rao import-hf org/name DEST" in refusal(capsys, *train, "model.restore_from_path=org/name")
    scored = ("score", data / "train.jsonl", tmp_path / "scored.jsonl", "--scorer", f"model:{source}")
    assert "Import the model with nemo-rao import-hf" in refusal(capsys, *scored)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert "Set model.restore_from_path to it" in refusal(capsys, "import-hf", tmp_path / "run", tmp_path / "made")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "empty", "run"} - {"empty"}


def test_a_damaged_checkpoint_is_not_exported(
    converted: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    described, kind, other = ("context/model.yaml", "model.llama.LlamaConfig", "model.gemma.Gemma")
    if installed_engine() == BRIDGE:
        described, kind, other = ("tokenizer/config.json", "LlamaForCausalLM", "GemmaForCausalLM")

    def rename(folder: Path) -> None:
        (folder / described).write_text((folder / described).read_text().replace(kind, other))

    def nameless(folder: Path) -> None:
        shutil.rmtree(folder / "context", ignore_errors=True)
        shutil.rmtree(folder / "tokenizer")

    for name, spoil, said in (
        ("cut", lambda folder: cut(next((folder / "weights").glob("__0_*.distcp")), 1000), "is incomplete"),
        ("nameless", nameless, "model.yaml is missing"),
        ("another", rename, f"is a {other.rpartition('.')[2]}, which cannot be exported"),
    ):
        spoil(shutil.copytree(converted["llama"].imported, tmp_path / name))
        assert said in refusal(capsys, "export-hf", tmp_path / name, tmp_path / "made")
    assert "--adapters" in refusal(capsys, "export-hf", converted["llama"].imported, tmp_path / "made", "--adapters")
    assert not (tmp_path / "made").exists()


def test_a_class_of_nemo_that_belongs_to_no_family_is_not_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = to_yaml(compose("gpt_rao", ["data.train_path=x", "data.tokenizer=x", "model.config_class=Gemma2Config2B"]))
    (tmp_path / "run" / "checkpoints" / "step=2-last" / "weights").mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").write_text(recipe)
    said = "model.config_class: names a class of NeMo, which is not installed"
    if installed_engine() == NEMO:
        said = "is a model of model.config_class=Gemma2Config2B, which cannot be exported"
    assert said in refusal(capsys, "export-hf", tmp_path / "run", tmp_path / "made")


def test_a_family_of_the_other_engine_is_answered_with_that_engine() -> None:
    given = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}
    assert family_of(given, Path("x"), BRIDGE).model_type == "gemma3_text"
    with pytest.raises(UserError, match="cannot be imported by NeMo's engine, only by Megatron-Bridge's"):
        family_of(given, Path("x"), NEMO)


def test_without_an_engine_nothing_is_converted(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemo_rao.hugging_face.conversion.installed_engine", lambda: None)
    for command in ("import-hf", "export-hf"):
        assert "or Megatron-Bridge, and neither is installed" in refusal(capsys, command, source, tmp_path / "made")


def on_a_disk_that_fills(arguments: list[str], largest: int) -> None:
    """No file may grow beyond ``largest`` bytes: what a full disk does, in a form that one process can be given."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    assert main(arguments) == 2


CUT_SHORT = "a write was cut short" if installed_engine() == NEMO else "a writer process failed"


@pytest.mark.parametrize(("command", "said"), [("import-hf", CUT_SHORT), ("export-hf", "File too large")])
def test_a_disk_that_fills_leaves_nothing_behind(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], command: str, said: str, converted: dict[str, Any]
) -> None:
    import_converter()
    given = source if command == "import-hf" else converted["llama"].imported
    capfd.readouterr()
    in_fork(on_a_disk_that_fills, [command, str(given), str(tmp_path / "made")], 50_000)
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and f"could not be written ({said})" in error[0]
    assert set(tmp_path.iterdir()) == {source}


def test_code_that_a_model_brings_along_is_not_run(source: Path, tmp_path: Path) -> None:
    for name in ("configuration_evil", "modeling_evil", "tokenization_evil"):
        (source / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    change(
        source,
        auto_map={"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"},
    )
    import_converter()
    in_fork(_import, [str(source), str(tmp_path / "made")])
    assert (tmp_path / "made" / "weights").is_dir()
    assert not (tmp_path / "ran").exists()
    assert "auto_map" not in (tmp_path / "made" / "tokenizer" / "config.json").read_text()


def test_pickled_weights_are_read_where_that_is_asked_for(data: Path, tmp_path: Path) -> None:
    source = make_model("llama", data / "tokenizer", tmp_path / "source")
    import_converter()
    torch.save(tensors(source), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    in_fork(_import, [str(source), str(tmp_path / "made"), "--allow-pickle"])
    assert (tmp_path / "made" / "weights").is_dir()


def _import(arguments: list[str]) -> None:
    assert main(["import-hf", *arguments]) == 0


@pytest.mark.parametrize("command", ["import-hf", "export-hf"])
def test_help_imports_nothing_heavy(command: str) -> None:
    code = (
        "import sys; from nemo_rao.cli import main\n"
        f"try: main([{command!r}, '--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'nemo', 'megatron'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, stdout=subprocess.DEVNULL)
