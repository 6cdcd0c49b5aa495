"""Tiny Hugging Face models of random weights, made on the spot, and what the two commands make of them."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_rao.config.engine_choice import BRIDGE, installed_engine
from nemo_rao.config.families import BRIDGE_ROPE_SCALING

from ..megatron_ranks import import_once
from ..train.runs import in_fork

NUM_TOKENS = 300  # of the tokenizer
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": NUM_TOKENS,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 32,
}
if installed_engine() == BRIDGE:  # where these three are what they are in published models
    LLAMA3_ROPE |= BRIDGE_ROPE_SCALING
# Name -> config: vocabularies of the tokenizer's size and padded ones, tied and untied embeddings.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rms_norm_eps": 1e-5},
    "tied llama 3.2": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rope_scaling": LLAMA3_ROPE,
        "rope_theta": 5e5,
        "head_dim": 16,
    },
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": False},
    "tied qwen2, padded": {"model_type": "qwen2", "tie_word_embeddings": True, "vocab_size": 320},
    "mistral, window of 24 tokens": {"model_type": "mistral", "sliding_window": 24, "vocab_size": 352},
    "mistral": {"model_type": "mistral", "sliding_window": None, "rope_theta": 1e6},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
}


def config(name: str) -> Any:
    from transformers import CONFIG_MAPPING

    given = copy.deepcopy({**SIZES, **MODELS[name]})  # transformers 5 adds the base to the rotary scaling it is given
    return CONFIG_MAPPING[given.pop("model_type")](**given)


def make_model(name: str, tokenizer: Path, folder: Path, **save: Any) -> Path:
    """A model in which every tensor matters: norms and biases too are drawn at random."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(len(name))
    model = AutoModelForCausalLM.from_config(config(name))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name or "bias" in parameter_name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder, **save)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    if name == "tied llama 3.2" and "rope_theta" in read_json(folder / "config.json"):
        spell_as_transformers_5(folder / "config.json")
    return folder


def spell_as_transformers_5(file: Path) -> None:
    given = json.loads(file.read_text())
    rope = {"rope_theta": given.pop("rope_theta"), **(given.pop("rope_scaling") or {"rope_type": "default"})}
    file.write_text(json.dumps({**given, "rope_parameters": rope, "transformers_version": "5.3.0"}))


def command(*arguments: str | Path) -> None:
    """``nemo-rao ...`` in a process of its own, which has to succeed."""
    in_fork(_succeed, [str(argument) for argument in arguments])


def refused(given: Sequence[str | Path], *parts: str) -> None:
    """``nemo-rao ...`` in a process of its own, which has to end with code 2 and one line that has these parts."""
    in_fork(_fail, [str(argument) for argument in given], parts)


def _fail(given: Sequence[str], parts: Sequence[str]) -> None:
    from nemo_rao.cli import main

    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = main(given)
    [line] = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
    assert code == 2, line
    for part in parts:
        assert part in line, line


def _succeed(arguments: Sequence[str]) -> None:
    from nemo_rao.cli import main

    code = main(arguments)
    assert code == 0, (arguments, code)


def tensors(folder: Path) -> dict[str, Any]:
    """All tensors of a folder's safetensors files."""
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def log_prob_sums(model: Any, data: Any) -> Any:
    """``[responses, 2]`` in transformers: of the prompt without its first token, of the response; nats."""
    import torch

    rows = []
    with torch.no_grad():
        for sample in data:
            for response in sample.responses:
                tokens = torch.tensor([[*sample.prompt.tolist(), *response.tolist()]])
                logps = model(tokens).logits.float().log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[0, :, 0]
                start = len(sample.prompt) - 1
                rows.append(torch.stack([logps[:start].sum(), logps[start:].sum()]))
    return torch.stack(rows)


def sft_loss(model: Any, tokenizer: Path, data: Path) -> float:
    """The mean over prompts of the best response's mean negative log-probability."""
    import numpy as np

    from nemo_rao.data.dataset import load_preferences
    from nemo_rao.data.encode import load_tokenizer

    samples = load_preferences([f"{data}/train.jsonl"], load_tokenizer(tokenizer), seq_length=256)
    sums, first, losses = log_prob_sums(model, samples)[:, 1], 0, []
    for sample in samples:
        best = int(np.argmax(sample.rewards))
        losses.append(-float(sums[first + best]) / len(sample.responses[best]))
        first += len(sample.responses)
    return float(np.mean(losses))


def import_converter() -> None:
    """What a conversion imports, before the first fork."""
    import_once()
    if installed_engine() == BRIDGE:
        import nemo_rao.engines.bridge.hugging_face  # noqa: F401


def read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())
