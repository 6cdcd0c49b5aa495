"""Keys and values that a rank holds while it samples are those that a plan counts."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

from nemo_rao.config.compose import compose
from nemo_rao.planning.plan import setting_of
from nemo_rao.planning.rollouts import cache_bytes

from ..mcore import tiny
from ..mcore.tiny import Layout
from ..megatron_ranks import run_ranks
from .test_decode import NEW, NUM_PROMPTS, RESPONSES, _sampled, requests


def _held(layout: Layout, source: dict[str, Any]) -> list[int]:
    """Bytes of each model chunk's keys and values on this rank, once each prompt's have been given to its responses."""
    from nemo_rao.rollout import decode

    held: list[int] = []
    keep = decode._Decoder._keep

    def recorded(decoder: Any, rows: Any) -> None:
        keep(decoder, rows)
        if not held:
            of_chunks = [context.key_value_memory_dict.values() for context in decoder._contexts]
            held.extend(sum(part.nbytes for memory in of for part in memory) for of in of_chunks)

    with mock.patch.object(decode._Decoder, "_keep", recorded):
        _sampled(layout, source, fused=True, rows_at_once=100)
    return held


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(tensor=2, pipeline=2), Layout(pipeline=2, virtual_pipeline=2)], ids=str
)
def test_the_cache_is_as_large_as_planned(layout: Layout) -> None:
    ranks = layout.tensor * layout.pipeline
    of_ranks = run_ranks(_held, (layout, tiny.whole_tensors(tiny.llama())), num_ranks=ranks)
    longest = max(len(one.prompt) for one in requests()) + NEW
    setting = setting_of(
        compose(
            "gpt_rloo",
            [
                f"model.arch.num_layers={tiny.NUM_LAYERS}",
                f"model.arch.hidden_size={tiny.HIDDEN}",
                f"model.arch.ffn_hidden_size={tiny.FFN}",
                f"model.arch.num_attention_heads={tiny.HEADS}",
                f"model.arch.num_query_groups={tiny.GROUPS}",
                f"model.arch.extra={{vocab_size: {tiny.VOCAB + 6}}}",
                f"model.tensor_model_parallel_size={layout.tensor}",
                f"model.pipeline_model_parallel_size={layout.pipeline}",
                f"model.virtual_pipeline_model_parallel_size={layout.virtual_pipeline or 'null'}",
                f"trainer.devices={ranks}",
                f"model.global_batch_size={NUM_PROMPTS * 2}",
                "model.micro_batch_size=1",
                f"model.seq_length={longest}",
                f"online.num_generations={RESPONSES}",
                f"online.max_new_tokens={NEW}",
                f"online.rows_at_once={NUM_PROMPTS * RESPONSES}",
            ],
        )
    )
    for rank, held in enumerate(of_ranks):
        assert sum(held) == cache_bytes(setting, rank // layout.tensor)
        assert sum(held) > 0
