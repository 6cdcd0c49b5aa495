"""Hugging Face's weights through NeMo's own connectors, ``HFLlamaImporter`` and ``HFLlamaExporter``.

NeMo has such a pair for each family, but they map the same names, except for Qwen2's biases and Qwen3's norms of
queries and keys, and only Llama's handles tied embeddings. Llama's pair is therefore used for all families, with NeMo's
additional transforms of the others. NeMo's translation of configs is not used: it unties Qwen2, takes Mistral's
attention window for its length, drops factors of Llama 3.1's rotary scaling, exports the training length as the maximum
length, and unpickles a checkpoint's context on export.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from nemo_rao.runtime.console import quiet_third_parties, say

if TYPE_CHECKING:
    from torch import Tensor

# Names of Qwen2's biases in Hugging Face and Megatron.
HF_BIASES = tuple(f"model.layers.*.self_attn.{name}_proj.bias" for name in "qkv")
MEGATRON_BIAS = "decoder.layers.*.self_attention.linear_qkv.bias"

# Names of Qwen3's norms of queries and keys: Hugging Face -> Megatron.
QK_NORMS = {
    f"model.layers.*.self_attn.{name}_norm.weight": f"decoder.layers.*.self_attention.{name}_layernorm.weight"
    for name in "qk"
}


class Weights:
    """Tensors of one model by name, with the interface of a model that NeMo's connectors expect.

    Args:
        tensors: under the names of Hugging Face or Megatron.
        config: the sizes for splitting fused queries, keys and values: ``num_attention_heads``, ``num_query_groups``,
            ``kv_channels``.
        qkv_bias: whether queries, keys and values have biases.
        qk_norm: whether queries and keys have norms.

    Attributes:
        dtype: of all tensors.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], config: SimpleNamespace, *, qkv_bias: bool, qk_norm: bool
    ) -> None:
        self._tensors = dict(tensors)
        self.dtype = next(iter(tensors.values())).dtype
        self.config, self.qkv_bias, self.qk_norm = config, qkv_bias, qk_norm

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self._tensors)

    def clear(self) -> None:
        """Release the tensors."""
        self._tensors.clear()


def write_checkpoint(
    weights: Weights, model_class: str, network: str, fields: Mapping[str, Any], folder: Path, source: Path
) -> None:
    """Write ``folder/weights`` and ``folder/context``, a NeMo checkpoint, and clear ``weights``.

    Args:
        weights: under Hugging Face's names.
        model_class: class of ``nemo.collections.llm``.
        network: name of the family of networks.
        fields: what makes up the network, for :func:`nemo_rao.engines.nemo.families.config_of_family`.
        folder: output directory that already contains ``tokenizer/``.
        source: the model's directory.

    Raises:
        UserError: NeMo does not have this family of networks, or rejects the sizes.
    """
    _load()
    import torch
    from nemo.collections import llm
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
    from nemo.collections.llm.gpt.model.llama import HFLlamaImporter
    from nemo.lightning import io
    from nemo.lightning.io.state import TransformFns

    from nemo_rao.engines.nemo.families import config_of_family
    from nemo_rao.mcore.layer_spec import layer_spec_without_te

    say("converting")
    config = config_of_family(
        network,
        fields,
        params_dtype=weights.dtype,
        bf16=weights.dtype == torch.bfloat16,
        fp16=weights.dtype == torch.float16,
    )
    # Set after construction so that the checkpoint's context does not contain it.
    config.transformer_layer_spec = layer_spec_without_te
    config.perform_initialization = False
    model = vars(llm)[model_class](config, tokenizer=AutoTokenizer(str(folder / "tokenizer"), trust_remote_code=False))
    importer = HFLlamaImporter(source)
    trainer = importer.nemo_setup(model, ckpt_async_save=False)
    importer.convert_state(weights, model)
    if weights.qkv_bias:
        bias = io.state_transform(source_key=HF_BIASES, target_key=MEGATRON_BIAS, fn=TransformFns.merge_qkv_bias)
        io.apply_transforms(weights, model, mapping={}, transforms=[bias])
    if weights.qk_norm:
        io.apply_transforms(weights, model, mapping=QK_NORMS, transforms=[])
    weights.clear()
    say("writing the checkpoint")
    importer.nemo_save(folder, trainer)
    if torch.distributed.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def to_hugging_face(weights: Weights, hf_config: Any, checkpoint: Path) -> Any:
    """Convert to a causal language model of transformers, with the dtype of ``weights``, on the CPU.

    Args:
        weights: under Megatron's names.
        hf_config: transformers' config of the model.
        checkpoint: directory that the weights are from.
    """
    _load()
    import transformers
    from nemo.collections.llm.gpt.model.llama import HFLlamaExporter
    from nemo.lightning import io
    from nemo.lightning.io.state import TransformFns
    from transformers.modeling_utils import no_init_weights

    class Exporter(HFLlamaExporter):
        """NeMo's exporter, with the config that it would otherwise unpickle."""

        config = property(lambda self: hf_config)

        def is_llama4(self) -> bool:
            return False

    transformers.logging.set_verbosity_error()
    say("converting")
    with no_init_weights():
        model = transformers.AutoModelForCausalLM.from_config(hf_config, torch_dtype=weights.dtype)
    model = Exporter(checkpoint).convert_state(weights, model)
    if weights.qkv_bias:
        bias = io.state_transform(source_key=MEGATRON_BIAS, target_key=HF_BIASES, fn=TransformFns.split_qkv_bias)
        io.apply_transforms(weights, model, mapping={}, transforms=[bias])
    if weights.qk_norm:
        io.apply_transforms(weights, model, mapping={to: name for name, to in QK_NORMS.items()}, transforms=[])
    model.tie_weights()
    return model


def _load() -> None:
    """Import NeMo with a progress message, and silence its routine messages."""
    from nemo_rao.engines.nemo import engine

    if "nemo.collections.llm" not in sys.modules:
        say("importing NeMo, which takes about 20 seconds")
    engine.load()
    from nemo.utils import logging as nemo_logging

    nemo_logging.setLevel(nemo_logging.ERROR)
    quiet_third_parties()
