"""The choice between the engines that sample, and the one that is chosen, with its weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from pathlib import Path

from nemo_rao.errors import UserError
from nemo_rao.generation.engine import Engine
from nemo_rao.generation.settings import PolicySettings


def choose_engine(asked: str) -> str:
    """The name of the engine: vLLM where it can run, unless one is asked for.

    Raises:
        UserError: vLLM is asked for and not installed.
    """
    installed = importlib.util.find_spec("vllm") is not None
    if asked == "vllm" and not installed:
        raise UserError("engine='vllm': vLLM is not installed; install it, or give --engine transformers")
    if asked != "auto":
        return asked
    if not installed:
        return "transformers"
    import torch

    return "vllm" if torch.cuda.is_available() else "transformers"


def open_engine(
    name: str, folder: Path, settings: PolicySettings, stop: Collection[int], num_tokens: int, padding: int
) -> Engine:
    """Loads the policy's weights.

    Args:
        name: from :func:`choose_engine`.
        folder: a checked folder.
        settings: of sampling.
        stop: the tokens that end a response.
        num_tokens: of the tokenizer; a model may have more, which stand for nothing and are never drawn.
        padding: the token that fills batches.
    """
    if name == "vllm":
        from nemo_rao.generation.with_vllm import VllmEngine

        return VllmEngine(folder, settings, stop)
    from nemo_rao.generation.with_transformers import TransformersEngine

    return TransformersEngine(folder, settings, stop, num_tokens, padding)
