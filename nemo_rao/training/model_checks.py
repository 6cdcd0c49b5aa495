"""Check that a run's network, tokenizer and checkpoints fit each other. Needs the engine."""

from __future__ import annotations

from pathlib import Path

from nemo_rao.checkpoint.adapters import check_resumed_adapters
from nemo_rao.checkpoint.continuing import START
from nemo_rao.checkpoint.find import check_checkpoint
from nemo_rao.checkpoint.starting import FITTING, check_tokenizer
from nemo_rao.config.architecture import network_key
from nemo_rao.config.checks import check_architecture
from nemo_rao.config.run_config import RunConfig
from nemo_rao.engines.engine import engine_of
from nemo_rao.errors import UserError


def check_model(config: RunConfig, num_tokens: int, start_from: Path | None, resume_from: Path | None) -> None:
    """Check that the network can be split as the recipe asks, and that tokenizer and checkpoints fit it.

    Args:
        num_tokens: size of the tokenizer's vocabulary.
        start_from: checkpoint with the weights to start from; ``None``: none is read.
        resume_from: this run's last checkpoint, or ``None`` at its start.

    Raises:
        UserError: on the first mismatch.
    """
    engine = engine_of(config)
    engine.load()
    made = engine.model_config(config)
    check_architecture(
        config,
        num_layers=made.num_layers,
        hidden_size=made.hidden_size,
        ffn_hidden_size=None if made.num_moe_experts else made.ffn_hidden_size,  # experts are split differently
        num_attention_heads=made.num_attention_heads,
        num_query_groups=made.num_query_groups,
        kv_channels=made.kv_channels,
    )
    if made.vocab_size is not None and made.vocab_size < num_tokens:
        raise UserError(
            f"data.tokenizer: has {num_tokens} tokens, more than the {made.vocab_size} of {network_key(config)}. "
            "Use the tokenizer that belongs to the model."
        )
    vocab_size = made.vocab_size or num_tokens
    trusted = config.model.allow_pickle
    if start_from is not None:
        check_checkpoint(start_from, made, vocab_size, key=START, remedy=FITTING, trusted=trusted)
        check_tokenizer(config, start_from, num_tokens)
    if resume_from is not None:
        other = f"{FITTING}, or change exp_manager.name"
        key = f"exp_manager.name={config.exp_manager.name}"
        check_checkpoint(resume_from, made, vocab_size, key=key, remedy=other, trusted=trusted)
        check_resumed_adapters(config, resume_from, made.num_layers, experts=bool(made.num_moe_experts))
