"""A GGUF file becomes the Hugging Face model that it was made from, with a tokenizer that splits text as that one's."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_rao.config.compose import compose
from nemo_rao.config.engine_choice import NEMO
from nemo_rao.hugging_face import gguf as ours
from nemo_rao.hugging_face.importer import _recipe
from nemo_rao.hugging_face.network import model_keys
from nemo_rao.hugging_face.source import find_source

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
LAYERS, HEADS, GROUPS = 2, 4, 2


@pytest.fixture(autouse=True)
def _leaves_this_process_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "on_cpu_alone", lambda: None)


def make_llama() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + 256 + 1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_theta=1e5,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def write_gguf(model: Any, file: Path, *, pre: str = "smollm", without: str = "lm_head") -> Path:
    """The model as llama.cpp's converter writes it, in fp32, with a byte-level tokenizer that joins two spaces."""
    import gguf
    from tokenizers.pre_tokenizers import ByteLevel

    config, writer = model.config, gguf.GGUFWriter(file, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_rope_freq_base(1e5)
    writer.add_rope_dimension_count(config.hidden_size // HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = [*SPECIAL, *sorted(ByteLevel.alphabet()), "ĠĠ"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * len(SPECIAL) + [gguf.TokenType.NORMAL] * 257)
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, tensor in model.state_dict().items():
        if without in name:  # lm_head is tied
            continue
        values = tensor.numpy()
        for part, heads in (("q_proj", HEADS), ("k_proj", GROUPS)):
            if part in name:  # llama.cpp rotates neighbouring pairs, Hugging Face the two halves of a head
                halves = values.reshape(heads, 2, values.shape[0] // heads // 2, values.shape[1])
                values = halves.swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), values.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_the_converted_model_is_the_one_that_the_file_was_made_from(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs the extra smollm2")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = make_llama()
    folder = tmp_path / "made"
    assert ours.main([str(write_gguf(source, tmp_path / "model.gguf")), str(folder)]) == 0
    made = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(made(ids).logits, source(ids).logits)
    assert made.dtype == torch.float32
    assert (made.config.rms_norm_eps, made.config.tie_word_embeddings) == (1e-5, True)
    assert_its_recipe_composes(folder, tmp_path / "recipes")

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (SPECIAL[1], SPECIAL[2], SPECIAL[2])
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"], "digits are split off before spaces are joined"
    text = "naïve 東京\n\n  x  7 <|im_end|>"
    assert set(tokenizer(text)) == {"input_ids", "attention_mask"}, "all that the model takes"
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.convert_tokens_to_ids("n") and ids[-1] == 2, "nothing is prepended"
    assert tokenizer.decode(ids) == text
    assert tokenizer.chat_template == TEMPLATE and tokenizer.model_max_length == 128
    assert {path.name for path in tmp_path.iterdir()} == {"model.gguf", "made", "recipes"}
    assert not list(folder.glob("*.model")), "transformers 4 would copy the GGUF file"


def assert_its_recipe_composes(folder: Path, recipes: Path) -> None:
    """With the file of the group ``model`` that import-hf writes; all values are the family's usual ones."""
    source = find_source(str(folder), engine=NEMO, allow_pickle=False, ignored=())
    keys = model_keys(source.config, source.family)
    assert keys["arch"]["extra"] == {}
    (recipes / "model").mkdir(parents=True)
    (recipes / "model" / "imported.yaml").write_text(_recipe(folder, keys, source.config, source.config.vocab_size))
    arch = compose("gpt_rao", ["model=imported"], recipes).model.arch
    assert (arch.num_layers, arch.num_query_groups, arch.rotary_base, arch.extra) == (LAYERS, GROUPS, 1e5, {})


def test_files_that_cannot_be_converted_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf", reason="needs the extra smollm2")
    other = write_gguf(make_llama(), tmp_path / "other.gguf", pre="qwen2")
    partial = write_gguf(make_llama(), tmp_path / "partial.gguf", without="layers.1.mlp")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(other.read_bytes()[:1000])
    text = tmp_path / "text.gguf"
    text.write_text("no model\n")
    expected = {
        other: "has the tokenizer gpt2 / qwen2, which is not supported",
        partial: "lacks model.layers.1.mlp.down_proj.weight and 2 others",
        cut: "not a complete GGUF file",
        text: "not a complete GGUF file",
        tmp_path / "absent.gguf": "cannot be read (No such file or directory)",
    }
    for file, said in expected.items():
        assert ours.main([str(file), str(tmp_path / "made")]) == 2
        _, error, line = capsys.readouterr().err.partition("error: ")  # after the bar of transformers
        assert error and line.startswith(f"FILE: {file}: ") and said in line and line.count("\n") == 1
    assert not (tmp_path / "made").exists()


def test_the_package_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert ours.main([str(tmp_path / "model.gguf"), str(tmp_path / "made")]) == 2
    assert "needs the package gguf. Run make smollm2" in capsys.readouterr().err
