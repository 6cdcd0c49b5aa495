"""Import with NeMo's connectors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nemo_rao.hugging_face.nemo_conversion import HF_BIASES, MEGATRON_BIAS, QK_NORMS, Weights, import_nemo
from nemo_rao.hugging_face.network import network_fields
from nemo_rao.hugging_face.source import Source
from nemo_rao.hugging_face.source_weights import read_tensors, tensors_of
from nemo_rao.runtime.console import say


def import_weights(source: Source, files: Sequence[Path], folder: Path) -> None:
    """Write ``folder/weights`` and ``folder/context``, a NeMo checkpoint of the model.

    Args:
        files: the weights.
        folder: output directory that already contains ``tokenizer/``.

    Raises:
        UserError: a pickle cannot be read, or tied embeddings differ from the stored output layer.
    """
    import torch

    family, config = source.family, source.config
    say("reading the weights")
    wanted = tensors_of(config, family)
    assert wanted is not None and family.nemo_model is not None, family
    tensors = read_tensors(files, wanted, tied=config.tie_word_embeddings)
    dtype = next(iter(tensors.values())).dtype
    model = Weights(tensors, config)
    del tensors

    import_nemo()
    from nemo.collections import llm
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
    from nemo.collections.llm.gpt.model.llama import HFLlamaImporter
    from nemo.lightning import io
    from nemo.lightning.io.state import TransformFns

    from nemo_rao.engines.nemo.families import config_of_family
    from nemo_rao.mcore.layer_spec import layer_spec_without_te

    say("converting")
    made = config_of_family(
        family.network.name,
        {**family.network.fields, **network_fields(config, family), "vocab_size": config.vocab_size},
        seq_length=config.max_position_embeddings,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
    )
    # Set after construction so that the checkpoint's context does not contain it.
    made.transformer_layer_spec = layer_spec_without_te
    made.perform_initialization = False
    target = vars(llm)[family.nemo_model](
        made, tokenizer=AutoTokenizer(str(folder / "tokenizer"), trust_remote_code=False)
    )
    importer = HFLlamaImporter(source.folder)
    trainer = importer.nemo_setup(target, ckpt_async_save=False)
    importer.convert_state(model, target)
    if family.qkv_bias:
        bias = io.state_transform(source_key=HF_BIASES, target_key=MEGATRON_BIAS, fn=TransformFns.merge_qkv_bias)
        io.apply_transforms(model, target, mapping={}, transforms=[bias])
    if family.qk_norm:
        io.apply_transforms(model, target, mapping=QK_NORMS, transforms=[])
    del model
    say("writing the checkpoint")
    importer.nemo_save(folder, trainer)
    if torch.distributed.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
