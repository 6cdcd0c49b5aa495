"""Import and export give back what was given, and Megatron computes what transformers computes with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_rao.data.dataset import load_preferences
from nemo_rao.data.encode import load_tokenizer
from nemo_rao.data.rendering_record import Rendering, read_rendering

from ..slow import slow_but
from .conftest import Converted
from .models import MODELS, command, config, log_prob_sums, make_model, read_json, sft_loss, tensors


@pytest.mark.parametrize("name", MODELS)
def test_a_round_trip_gives_back_every_weight_bit_for_bit(converted: dict[str, Converted], name: str) -> None:
    before, after = tensors(converted[name].source), tensors(converted[name].exported)
    assert before.keys() == after.keys()
    assert ("lm_head.weight" in after) != MODELS[name].get("tie_word_embeddings", False)
    for tensor_name, tensor in before.items():
        assert tensor.dtype == after[tensor_name].dtype
        assert torch.equal(tensor, after[tensor_name]), tensor_name


@pytest.mark.parametrize("name", MODELS)
def test_a_round_trip_gives_back_the_config(converted: dict[str, Converted], name: str) -> None:
    """Also where the source spells its rotary embedding as transformers 5 does."""
    given, found = config(name).to_diff_dict(), read_json(converted[name].exported / "config.json")
    # The tokens are the tokenizer's, which the random model's config did not know.
    apart = {key for key in given.keys() | found.keys() if given.get(key) != found.get(key)}
    assert apart <= {"bos_token_id", "eos_token_id", "architectures", "dtype"}


@pytest.mark.parametrize("name", ["llama", "tied qwen2, padded"])
def test_tokenizer_and_chat_template_are_carried_along(converted: dict[str, Converted], name: str) -> None:
    source, exported = converted[name].source, converted[name].exported
    written = {"tokenizer.json", "chat_template.jinja", "special_tokens_map.json"}  # the last by transformers 4 alone
    for file in written & {path.name for path in source.iterdir()}:
        assert (source / file).read_bytes() == (exported / file).read_bytes()
    assert {"tokenizer.json", "chat_template.jinja"} <= {path.name for path in exported.iterdir()}
    messages = [{"role": "user", "content": "Sort: b a"}]
    texts = [load_tokenizer(folder).apply_chat_template(messages, tokenize=False) for folder in (source, exported)]
    assert texts[0] == texts[1] and "Sort: b a" in texts[0]


@pytest.mark.parametrize(
    ("name", "ranks"),
    slow_but(
        [("tied llama 3.2", (2, 2, 1)), ("mistral, window of 24 tokens", (2, 1, 2))],
        [
            ("llama", (4, 2, 2)),
            ("tied llama 3.2", (2, 2, 1)),
            ("tied qwen2, padded", (4, 2, 2)),
            ("mistral, window of 24 tokens", (2, 1, 2)),
            ("qwen3", (2, 2, 1)),
        ],
    ),
)
def test_megatron_gives_the_log_probabilities_of_transformers(
    converted: dict[str, Converted], data: Path, tmp_path: Path, name: str, ranks: tuple[int, int, int]
) -> None:
    """The reference pass of a run, as the printed command line starts it, with TP and PP."""
    devices, tensor, pipeline = ranks
    command(
        *("train", "--config-dir", converted[name].imported, "--config-name", "gpt_rao", "model=imported"),
        *(f"data.train_path={data}/train.jsonl", "trainer.max_steps=1", "trainer.enable_progress_bar=false"),
        *(f"trainer.devices={devices}", f"model.tensor_model_parallel_size={tensor}"),
        *(f"model.pipeline_model_parallel_size={pipeline}", f"exp_manager.exp_dir={tmp_path}"),
        "exp_manager.checkpoint_callback_params.save_top_k=0",
        "exp_manager.checkpoint_callback_params.save_last=false",
    )
    [sums] = [np.load(file) for file in tmp_path.glob("reference/*/sums.npy")]
    from transformers import AutoModelForCausalLM

    exported = converted[name].exported
    samples = load_preferences([f"{data}/train.jsonl"], load_tokenizer(exported), seq_length=256)
    longest = max(len(sample.prompt) + len(response) for sample in samples for response in sample.responses)
    assert longest > 24  # the window is felt
    wanted = log_prob_sums(AutoModelForCausalLM.from_pretrained(exported, attn_implementation="eager"), samples)
    torch.testing.assert_close(torch.from_numpy(sums.copy()), wanted, rtol=0, atol=1e-4)


def test_generation_ends_at_the_end_of_a_turn_and_at_the_end_of_a_text(data: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    tokenizer.chat_template = tokenizer.chat_template.replace("eos_token", "'<|end|>'")
    tokenizer.eos_token = "<|pad|>"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    source = make_model("llama", tmp_path / "tokenizer", tmp_path / "source")
    (source / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": 7}')  # and no do_sample
    for file in source.glob("*.safetensors"):  # without a format entry, and another kind of metadata
        save_file(load_file(file), file, metadata={"origin": "a merge"})
    command("import-hf", source, tmp_path / "imported")
    command("export-hf", tmp_path / "imported", tmp_path / "exported", "--dtype", "bf16")
    written = read_json(tmp_path / "exported" / "generation_config.json")
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|end|>", "<|pad|>")]
    assert written["eos_token_id"] == ends and (written["temperature"], written["do_sample"]) == (0.6, True)
    found = tensors(tmp_path / "exported")
    assert all(torch.equal(tensor.bfloat16(), found[name]) for name, tensor in tensors(source).items())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", torch_dtype="auto")
    assert model.dtype == torch.bfloat16 and model.generation_config.eos_token_id == ends


@pytest.fixture(scope="module")
def lora(converted: dict[str, Converted], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps at TP 2 that trains adapters alone, scored on its own data before and after."""
    folder = tmp_path_factory.mktemp("lora")
    paths = (f"data.train_path={data}/train.jsonl", f"data.validation_path={data}/train.jsonl")
    command(
        *("train", "--config-dir", converted["tied qwen2, padded"].imported, "--config-name", "gpt_sft"),
        *("model=imported", *paths, "trainer.max_steps=3", "model.peft.scheme=lora", "model.optim.lr=1e-2"),
        *("model.peft.lora.dim=4", "model.peft.lora.alpha=24", "model.optim.sched.name=constant"),
        *("trainer.devices=2", "model.tensor_model_parallel_size=2", "trainer.enable_progress_bar=false"),
        *(f"exp_manager.exp_dir={folder}", "exp_manager.name=run", "data.chat_template=always"),
    )
    return folder


def test_adapters_merged_or_not_give_the_loss_that_the_run_ended_with(
    converted: dict[str, Converted], lora: Path, data: Path
) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    command("export-hf", lora / "run", lora / "merged")
    command("export-hf", lora / "run", lora / "adapters", "--adapters")
    logged = [float(line.split('"val/loss": ')[1].split(",")[0]) for line in _scored(lora / "run")]
    source = converted["tied qwen2, padded"].source
    base = AutoModelForCausalLM.from_pretrained(source)
    assert not (converted["tied qwen2, padded"].exported / "nemo_rao.json").exists()  # nothing was trained
    for exported in (lora / "merged", lora / "adapters"):
        assert read_rendering(exported) == Rendering(chat_template="always")
    assert sft_loss(base, lora / "merged", data) == pytest.approx(logged[0], abs=1e-5)
    assert logged[-1] < logged[0] - 0.1  # the adapters do something
    merged = AutoModelForCausalLM.from_pretrained(lora / "merged")
    assert sft_loss(merged, lora / "merged", data) == pytest.approx(logged[-1], abs=1e-5)
    with_adapters = peft.PeftModel.from_pretrained(base, lora / "adapters")
    assert sft_loss(with_adapters, lora / "adapters", data) == pytest.approx(logged[-1], abs=1e-5)
    assert read_json(lora / "adapters" / "adapter_config.json")["base_model_name_or_path"] == str(source)


def _scored(run: Path) -> list[str]:
    return [line for line in (run / "metrics.jsonl").read_text().splitlines() if "val/loss" in line]


def test_a_model_in_several_files_is_imported_whole(data: Path, tmp_path: Path) -> None:
    source = make_model("qwen2", data / "tokenizer", tmp_path / "source", max_shard_size="100KB")
    assert len(list(source.glob("model-*.safetensors"))) > 1
    command("import-hf", source, tmp_path / "imported")
    command("export-hf", tmp_path / "imported", tmp_path / "exported")
    before, after = tensors(source), tensors(tmp_path / "exported")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
