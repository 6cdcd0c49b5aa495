"""A tiny random Llama in a folder as `nemo-rao export-hf` writes it, and files of prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from nemo_rao.demo.tokenizer_training import train_tokenizer

TEXTS = ["Sort these letters: d a c b. Name a prime number. a b c d, 7 or 11!", "What is the answer? It is 42."] * 3


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama with random weights, of whose tokens about one in eight ends the response."""
    folder = tmp_path_factory.mktemp("models") / "policy"
    train_tokenizer(TEXTS, folder, 300)
    transformers.set_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=304,  # more than the tokenizer has, as Megatron pads vocabularies
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 3.0  # a coordinate that is positive everywhere ...
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
        model.lm_head.weight[2] = 0.0
        model.lm_head.weight[2, 0] = 28.0  # ... raises the end token's logit
    # Settings of its own, which must not reach what is sampled here.
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=0.1, top_k=2, repetition_penalty=1.5, eos_token_id=2
    )
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., str]:
    def write(*rows: Any, name: str = "prompts.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def prompts(write_rows: Callable[..., str]) -> str:
    """Five prompts of different lengths: text, messages, a published format."""
    return write_rows(
        {"prompt": "Name a prime number."},
        {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}]},
        {"prompt": "Sort these letters: d a c b", "answer": "a b c d"},
        {"prompt": "What is the answer?", "chosen": "42", "rejected": "7"},
        {"prompt": "x " * 20},
    )


def read_lines(path: str | Path) -> list[Any]:
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]
