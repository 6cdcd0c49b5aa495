"""``nemo-rao export-hf``: a NeMo checkpoint becomes a folder that ``transformers`` loads, or adapters for ``peft``.

What the model is stands as text in the checkpoint's ``context/model.yaml``, which NeMo writes beside its pickled twin:
that one is never read. The weights' own format, torch_dist, has pickles, which are looked at first
(:mod:`nemo_rao.checkpoint.pickles`).

Adapters of a LoRA run are merged, ``W + alpha / dim * B A`` in fp32, into the weights that the run started from, which
:mod:`nemo_rao.checkpoint.adapters` finds.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_rao.checkpoint.adapters import base_of_adapters
from nemo_rao.checkpoint.find import check_checkpoint, resolve_checkpoint, stored_tensors
from nemo_rao.checkpoint.pickles import refuse_code
from nemo_rao.config.engine_choice import BRIDGE
from nemo_rao.data.rendering_record import write_rendering
from nemo_rao.errors import UserError
from nemo_rao.hugging_face import bridge_export
from nemo_rao.hugging_face.adapters import changes_output_layer, check_adapters, merge, write_adapters
from nemo_rao.hugging_face.checkpoint import (
    SCORE_HEAD,
    Described,
    check_names,
    describe,
    read_tensors,
)
from nemo_rao.hugging_face.conversion import Weights, engine_here, import_nemo_aloud, on_cpu_alone
from nemo_rao.hugging_face.destination import check_destination, written_whole
from nemo_rao.hugging_face.families import HF_BIASES, MEGATRON_BIAS, QK_NORMS
from nemo_rao.hugging_face.generation_config import read_generation_config
from nemo_rao.hugging_face.rendering_of_run import rendering_of_run
from nemo_rao.hugging_face.tokenizer_files import generation_config, write_tokenizer
from nemo_rao.runtime.console import quiet_imports, quiet_third_parties, say

_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_BYTES = {"fp32": 4, "bf16": 2}


def main(arguments: argparse.Namespace) -> int:
    """Exports ``arguments.checkpoint`` to ``arguments.dest``.

    Raises:
        UserError: the checkpoint is not whole or of a family that is not known, or the destination does not suit.
    """
    on_cpu_alone()
    quiet_third_parties()
    if engine_here() == BRIDGE:
        return bridge_export.export(arguments)
    described = describe(resolve_checkpoint(arguments.checkpoint, "CHECKPOINT"))
    if arguments.adapters and described.lora is None:
        raise UserError(
            f"--adapters: {described.folder} has none, it is a whole model; leave the option out, or name a run with "
            "model.peft.scheme=lora"
        )
    if arguments.base and described.lora is None:
        raise UserError(f"--base: {described.folder} has no adapters, it is a whole model; leave the option out")
    base = described
    if described.lora is not None:
        base = describe(base_of_adapters(described.folder, "CHECKPOINT", arguments.base))
    from nemo_rao.data.encode import load_tokenizer

    tokenizer = load_tokenizer(described.tokenizer)
    rendering = rendering_of_run(described.folder)
    vocab_size = base.config.vocab_size or len(tokenizer)
    remedy = "the checkpoint's context/ and weights/ are not of one model"
    with quiet_imports():
        import megatron.core.dist_checkpointing  # noqa: F401  # what the check reads with
    if not arguments.allow_pickle:
        for folder in {base.folder, described.folder}:
            refuse_code(folder, "CHECKPOINT")
    check_checkpoint(base.folder, base.config, vocab_size, key="CHECKPOINT", remedy=remedy, trusted=True)
    shapes = {name: shape for name, (shape, _) in stored_tensors(base.folder, trusted=True).items()}
    check_names(base, shapes)
    if described.lora is not None:
        check_adapters(described)
    generation, changed = read_generation_config(Path(base.tokenizer), "CHECKPOINT")
    for line in changed:
        say(line)

    wanted = described if arguments.adapters else base
    tensors = stored_tensors(wanted.folder, trusted=True).values()
    stored = {dtype for _, dtype in tensors}
    dtype = arguments.dtype or ("bf16" if stored == {"bfloat16"} else "fp32")
    num_bytes = sum(math.prod(shape) for shape, _ in tensors) * _BYTES[dtype]
    destination = check_destination(arguments.dest, num_bytes, "DEST")
    with written_whole(destination, "DEST") as partial:
        if arguments.adapters:
            write_adapters(described, partial, _DTYPES[dtype], vocab_size)
        else:
            _write_model(base, described, partial, dtype, vocab_size, tokenizer, generation)
        write_tokenizer(described.tokenizer, tokenizer, partial)
        if rendering is not None:
            write_rendering(partial, rendering)
    if arguments.adapters:
        say(f"adapters  {destination}")
        say(f'to load   peft.PeftModel.from_pretrained(model, "{destination}"), model: what the run started from')
    else:
        kind = "SequenceClassification" if SCORE_HEAD in shapes else "CausalLM"
        say(f"model    {destination}")
        say(f'to load  transformers.AutoModelFor{kind}.from_pretrained("{destination}")')
    return 0


def _hf_config(base: Described, vocab_size: int, tokenizer: Any, *, tied: bool) -> Any:
    """Hugging Face's config. What NeMo's does not know comes from the config.json that stands with the tokenizer."""
    from transformers import CONFIG_MAPPING

    config = base.config
    carried: dict[str, Any] = {}
    with_tokenizer = Path(base.tokenizer) / "config.json"
    if with_tokenizer.is_file():
        found = json.loads(with_tokenizer.read_text())
        same = {"model_type": base.family.model_type, "hidden_size": config.hidden_size}
        if {name: found.get(name) for name in same} == same:
            carried = found
    rope = None
    if hasattr(config, "scale_factor"):
        rope = {
            "rope_type": "llama3",
            "factor": config.scale_factor,
            "low_freq_factor": config.low_freq_factor,
            "high_freq_factor": config.high_freq_factor,
            "original_max_position_embeddings": config.old_context_len,
        }
    of_family: dict[str, Any] = {}
    if base.family.model_type == "mistral":
        of_family["sliding_window"] = None if config.window_size is None else config.window_size[0] + 1
    # Some configs always have it, the others' only where it does not follow from the sizes.
    if (
        base.family.model_type in ("llama", "qwen3")
        or config.kv_channels * config.num_attention_heads != config.hidden_size
    ):
        of_family["head_dim"] = config.kv_channels
    return CONFIG_MAPPING[base.family.model_type](
        architectures=[base.family.architecture],
        num_hidden_layers=config.num_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_query_groups,
        max_position_embeddings=max(config.seq_length, carried.get("max_position_embeddings") or 0),
        initializer_range=config.init_method_std,
        rms_norm_eps=config.layernorm_epsilon,
        rope_theta=config.rotary_base,
        rope_scaling=rope,
        vocab_size=vocab_size,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **of_family,
    )


def _write_model(
    base: Described,
    described: Described,
    folder: Path,
    dtype: str,
    vocab_size: int,
    tokenizer: Any,
    generation: Mapping[str, Any] | None,
) -> None:
    import torch
    import transformers
    from transformers.modeling_utils import no_init_weights

    say("reading the weights")
    num_layers = base.config.num_layers
    weights, tied = read_tensors(base.folder, num_layers), bool(base.config.share_embeddings_and_output_weights)
    if described.lora is not None:
        say(f"merging the adapters of {described.folder}")
        adapters = read_tensors(described.folder, num_layers)
        if tied and changes_output_layer(adapters):
            say("the adapter of the output layer changes it alone: the exported model's embeddings are not tied to it")
            weights["output_layer.weight"], tied = weights["embedding.word_embeddings.weight"], False
        merge(weights, adapters, described.lora)
    hf_config = _hf_config(base, vocab_size, tokenizer, tied=tied)
    torch_dtype = vars(torch)[_DTYPES[dtype]]
    source = Weights({name: tensor.to(torch_dtype) for name, tensor in weights.items()}, base.config)
    del weights

    import_nemo_aloud()
    from nemo.collections.llm.gpt.model.llama import HFLlamaExporter
    from nemo.lightning import io
    from nemo.lightning.io.state import TransformFns

    class Exporter(HFLlamaExporter):
        """NeMo's, told what it would otherwise unpickle."""

        config = property(lambda self: hf_config)

        def is_llama4(self) -> bool:
            return False

    transformers.logging.set_verbosity_error()
    say("converting")
    with no_init_weights():
        target = transformers.AutoModelForCausalLM.from_config(hf_config, torch_dtype=torch_dtype)
    target = Exporter(base.folder).convert_state(source, target)
    if base.family.of_nemo.qkv_bias:
        bias = io.state_transform(source_key=MEGATRON_BIAS, target_key=HF_BIASES, fn=TransformFns.split_qkv_bias)
        io.apply_transforms(source, target, mapping={}, transforms=[bias])
    if base.family.of_nemo.qk_norm:
        io.apply_transforms(source, target, mapping={to: name for name, to in QK_NORMS.items()}, transforms=[])
    target.tie_weights()
    if SCORE_HEAD in source.state_dict():
        target = _classifier(target, source.state_dict()[SCORE_HEAD], tokenizer)
    else:
        target.generation_config = generation_config(generation or {}, tokenizer)
    say("writing")
    target.save_pretrained(folder)


def _classifier(model: Any, head: Any, tokenizer: Any) -> Any:
    """A reward model as a sequence classifier: a label for each of the head's scores, the scores its logits."""
    import copy

    import torch
    from transformers import AutoModelForSequenceClassification
    from transformers.modeling_utils import no_init_weights

    from nemo_rao.data.encode import end_tokens

    config = copy.deepcopy(model.config)
    config.num_labels = len(head)
    # It reads the last token that is no padding. Where the end token pads, too, one row at a time is all it can do.
    ends = end_tokens(tokenizer)
    config.pad_token_id = None if tokenizer.pad_token_id in ends else tokenizer.pad_token_id
    with no_init_weights():
        classifier = AutoModelForSequenceClassification.from_config(config, torch_dtype=model.dtype)
    classifier.model.load_state_dict(model.model.state_dict())
    with torch.no_grad():
        classifier.score.weight.copy_(head)
    return classifier
