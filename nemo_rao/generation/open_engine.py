"""Selection and construction of the sampling engine."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from pathlib import Path

from nemo_rao.errors import UserError
from nemo_rao.generation.engine import Engine
from nemo_rao.generation.settings import PolicySettings


def choose_engine(asked: str) -> str:
    """Name of the engine: the one asked for, or with ``auto``, vLLM if it can run here.

    Raises:
        UserError: vLLM is requested but not installed.
    """
    installed = importlib.util.find_spec("vllm") is not None
    if asked == "vllm" and not installed:
        raise UserError("engine='vllm': vLLM is not installed. Install it, or use --engine transformers.")
    if asked != "auto":
        return asked
    if not installed:
        return "transformers"
    import torch

    return "vllm" if torch.cuda.is_available() else "transformers"


def open_engine(
    name: str, folder: Path, settings: PolicySettings, stop: Collection[int], num_tokens: int, padding: int
) -> Engine:
    """Load the policy's weights into an engine.

    Args:
        name: as returned by :func:`choose_engine`.
        folder: a checked model directory.
        settings: sampling settings.
        stop: tokens that end a response.
        num_tokens: size of the tokenizer; the model's vocabulary may be larger, but the excess is never sampled.
        padding: token that pads batches.
    """
    if name == "vllm":
        from nemo_rao.generation.with_vllm import VllmEngine

        return VllmEngine(folder, settings, stop)
    from nemo_rao.generation.with_transformers import TransformersEngine

    return TransformersEngine(folder, settings, stop, num_tokens, padding)
