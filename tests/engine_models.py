"""The installed engine's network of a recipe without the training loop, for tests that build one rank's part."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from nemo_rao.config.derived import objective_config
from nemo_rao.config.run_config import RunConfig

from .engines import BRIDGE, ENGINE


def megatron_configs(config: RunConfig) -> tuple[Any, Any, Any]:
    """Megatron's configs of model, optimizer and gradient buffers, with the number formats that the engine sets.

    The model is split over ranks as the recipe says.
    """
    return _of_bridge(config) if ENGINE == BRIDGE else _of_nemo(config)


def _of_bridge(config: RunConfig) -> tuple[Any, Any, Any]:
    from nemo_rao.engines.bridge import build
    from nemo_rao.engines.bridge.provider import provider

    made = provider(config), build.optimizer(config), build.gradient_buffers(config)
    build.precision(config).setup(*made)
    for deferred in made[1:]:
        deferred.finalize()
    return made


def _of_nemo(config: RunConfig) -> tuple[Any, Any, Any]:
    from nemo.lightning.pytorch.plugins.mixed_precision import update_config_with_dtype_overrides

    from nemo_rao.config.megatron_fields import parallel_fields
    from nemo_rao.engines.nemo import build
    from nemo_rao.mcore.finish import finish_config

    formats, made, keys = build.precision(config).dtype_config, build.model_config(config), config.model
    # What else NeMo's strategy and this project's model write into it.
    for name, value in parallel_fields(config).items():
        setattr(made, name, value)
    made.expert_tensor_parallel_size = keys.expert_tensor_parallel_size or keys.tensor_model_parallel_size
    finish_config(made, fp8_simulation=None)
    options, buffers = build.optimizer(config, max_steps=10).config, build.strategy(config).ddp_config
    model, optimizer, ddp = (update_config_with_dtype_overrides(formats, one) for one in (made, options, buffers))
    return model, optimizer, ddp


def gpt(config: RunConfig, made: Any, num_tokens: int, chunk: int | None = None, *, fused: bool = False) -> Any:
    """A model chunk of this rank, with its objective's head and its adapters; process groups must exist.

    Args:
        made: the first of :func:`megatron_configs`.
        num_tokens: of the tokenizer.
        chunk: of an interleaved pipeline.
        fused: never hold the logits.
    """
    from nemo_rao.mcore.finish import finish_chunk
    from nemo_rao.objectives import registry

    model = _bridges_gpt(made, num_tokens, chunk) if ENGINE == BRIDGE else _nemos_gpt(made, num_tokens, chunk)
    needs = registry.get(config.model.objective).needs_of(objective_config(config))
    finish_chunk(model, needs, fused_log_probs=fused, head_seed=0, fp8_is_simulated=False)
    add_adapters(model, config)
    return model


def add_adapters(model: Any, config: RunConfig) -> None:
    """Add the engine's adapters to a Megatron model, if the recipe has any."""
    if config.model.peft.scheme == "none":
        return
    if ENGINE == BRIDGE:
        from nemo_rao.engines.bridge import lora

        lora.add_adapters([model], config)
    else:
        _add_nemos_adapters(model, config)


def _bridges_gpt(made: Any, num_tokens: int, chunk: int | None) -> Any:
    from megatron.core.process_groups_config import ProcessGroupCollection

    from nemo_rao.engines.bridge.provider import padded_vocab_size

    made.vocab_size = padded_vocab_size(made, num_tokens)
    made._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    made.finalize()
    return made.provide(vp_stage=chunk)


def _nemos_gpt(made: Any, num_tokens: int, chunk: int | None) -> Any:
    return made.configure_model(SimpleNamespace(vocab_size=num_tokens), vp_stage=chunk)


def _add_nemos_adapters(model: Any, config: RunConfig) -> None:
    from nemo.collections.llm.fn import FNMixin
    from torch import nn

    from nemo_rao.engines.nemo import build

    class Whole(nn.Module, FNMixin):
        """What NeMo's own class around the model offers its transform."""

    whole = Whole()
    whole.add_module("whole", model)
    build.lora(config)(whole)  # type: ignore[misc]
