"""Export with NeMo's connectors (:mod:`nemo_rao.engines.nemo.hugging_face`)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from nemo_rao.checkpoint.find import stored_tensors
from nemo_rao.engines.nemo.hugging_face import MEGATRON_BIAS, QK_NORMS, Weights, to_hugging_face
from nemo_rao.errors import UserError
from nemo_rao.hugging_face.adapters import keeps_tie, merge
from nemo_rao.hugging_face.checkpoint import LAYERS, SCORE_HEAD, read_tensors, report_left_behind
from nemo_rao.hugging_face.described import KEY, Described
from nemo_rao.hugging_face.target import Target, make_classifier, target_config
from nemo_rao.hugging_face.tokenizer_files import generation_config
from nemo_rao.runtime.console import say


def check_names(described: Described, base: Path) -> None:
    """Check that a checkpoint has all tensors of a model, and report those that cannot be exported.

    Args:
        base: the checkpoint.

    Raises:
        UserError: one is missing.
    """
    family, stored = described.family, set(stored_tensors(base, trusted=True))
    wanted = {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight"}
    wanted |= set() if described.config.share_embeddings_and_output_weights else {"output_layer.weight"}
    for name in ("self_attention.linear_qkv", "mlp.linear_fc1"):
        wanted |= {f"{LAYERS}{name}.weight", f"{LAYERS}{name}.layer_norm_weight"}
    wanted |= {f"{LAYERS}self_attention.linear_proj.weight", f"{LAYERS}mlp.linear_fc2.weight"}
    parts = ([MEGATRON_BIAS] if family.qkv_bias else []) + (list(QK_NORMS.values()) if family.qk_norm else [])
    wanted |= {LAYERS + part.partition("*.")[2] for part in parts}
    missing = sorted(wanted - stored)
    if missing == ["output_layer.weight"]:
        raise UserError(f"{KEY}: {base} has no output layer: it is a reward model, which cannot be exported")
    if missing:
        raise UserError(f"{KEY}: {base} has no tensor {missing[0]}. Pass a {family.architecture} model.")
    report_left_behind(stored - wanted)


def write_model(described: Described, base: Path, target: Target) -> None:
    """Write config.json and the weights, with adapters merged, as safetensors. Runs on one rank.

    Args:
        base: checkpoint with the weights, or the base weights of the adapters of ``described``.
    """
    import torch

    from nemo_rao.data.encode import load_tokenizer

    say("reading the weights")
    family, tokenizer, num_layers = described.family, load_tokenizer(described.tokenizer), described.config.num_layers
    weights, tied = read_tensors(base, num_layers), bool(described.config.share_embeddings_and_output_weights)
    if described.lora is not None:
        say(f"merging the adapters of {described.folder}")
        adapters = read_tensors(described.folder, num_layers)
        if tied and not keeps_tie(described, adapters):
            weights["output_layer.weight"], tied = weights["embedding.word_embeddings.weight"], False
        merge(weights, adapters, described.lora)
    hf_config, dtype = target_config(described, target, tokenizer, tied=tied), vars(torch)[target.dtype]
    converted = {name: tensor.to(dtype) for name, tensor in weights.items()}
    source = Weights(converted, described.config, qkv_bias=family.qkv_bias, qk_norm=family.qk_norm)
    del weights, converted
    model = to_hugging_face(source, hf_config, base)
    if SCORE_HEAD in source.state_dict():
        model = _classifier(model, source.state_dict()[SCORE_HEAD], tokenizer)
    else:
        model.generation_config = generation_config(target.generation or {}, tokenizer)
    say("writing")
    model.save_pretrained(target.folder)


def _classifier(model: Any, head: Any, tokenizer: Any) -> Any:
    """Convert a reward model to a sequence classifier."""
    import torch
    from transformers import AutoModelForSequenceClassification
    from transformers.modeling_utils import no_init_weights

    config = copy.deepcopy(model.config)
    make_classifier(config, len(head), tokenizer)
    with no_init_weights():
        classifier = AutoModelForSequenceClassification.from_config(config, torch_dtype=model.dtype)
    classifier.model.load_state_dict(model.model.state_dict())
    with torch.no_grad():
        classifier.score.weight.copy_(head)
    return classifier
