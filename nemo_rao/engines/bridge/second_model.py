"""Chunks of a second model on a run's rank, over the run's process groups, built only by Bridge's provider."""

from __future__ import annotations

import contextlib
import io
from typing import Any

from nemo_rao.config.run_config import RunConfig
from nemo_rao.data.encode import load_tokenizer
from nemo_rao.engines.bridge.build import precision
from nemo_rao.engines.bridge.provider import finish_when_built, padded_vocab_size, provider
from nemo_rao.objectives.base import Needs


def chunks(config: RunConfig, needs: Needs, *, is_trained: bool) -> list[Any]:
    """See :meth:`nemo_rao.engines.engine.Engine.second_model`."""
    made = provider(config)
    made.vocab_size = padded_vocab_size(made, made.vocab_size or len(load_tokenizer(config.data.tokenizer or "")))
    finish_when_built(made, config, needs)
    formats = precision(config)
    formats.finalize()
    formats.setup(made)
    made.perform_initialization = is_trained
    made.finalize()
    with contextlib.redirect_stdout(io.StringIO()):  # the number of its parameters
        return [chunk.eval() for chunk in made.provide_distributed_model(wrap_with_ddp=False)]
