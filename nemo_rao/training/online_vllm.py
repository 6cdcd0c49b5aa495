"""vLLM as the sampler of a run: preparation before the ranks start."""

from __future__ import annotations

from nemo_rao.config.run_config import RunConfig
from nemo_rao.hugging_face.policy import policy_of
from nemo_rao.rollout.vllm_model import VllmModel, check_python


def python_of_sampler(config: RunConfig) -> str | None:
    """Return the python of vLLM's environment; ``None`` if vLLM does not sample.

    Raises:
        UserError: it is not a python interpreter, or does not have vLLM.
    """
    keys = config.online
    if keys.num_generations is None or keys.sampler != "vllm":
        return None
    assert keys.vllm_python is not None, "checked with the recipe"
    return check_python(keys.vllm_python)


def vllm_model(config: RunConfig, python: str, num_tokens: int) -> VllmModel:
    """Describe the policy of a run for vLLM. Imports megatron.

    Args:
        python: from :func:`python_of_sampler`.
        num_tokens: vocabulary size without padding.

    Raises:
        UserError: vLLM cannot represent the model.
    """
    policy, keys = policy_of(config, num_tokens), config.online
    return VllmModel(
        python=python,
        config_json=policy.config_json,
        dtype=policy.dtype,
        to_hugging_face=policy.tensors,
        seq_length=config.model.seq_length,
        gpus=keys.vllm_gpus,
        memory=keys.vllm_memory,
    )
