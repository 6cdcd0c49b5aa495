"""Sampling from the training model: the same tokens under any parallelism, and the model's own log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from ..mcore import tiny
from ..mcore.tiny import Layout
from ..megatron_ranks import run_ranks

END = 5
LAYOUTS = {
    "TP 2, sequence parallelism": Layout(tensor=2, sequence_parallel=True),
    "PP 2": Layout(pipeline=2),
    "TP 2 x PP 2": Layout(tensor=2, pipeline=2),
    "PP 2 x VPP 2": Layout(pipeline=2, virtual_pipeline=2),
}
NUM_PROMPTS, RESPONSES, NEW = 5, 3, 9


def requests(sampling_seed: int = 3) -> list[Any]:
    """Prompts of 2 to 10 tokens."""
    from nemo_rao.ops.sampling import uniforms
    from nemo_rao.rollout.decode import Request

    rng = np.random.default_rng(0)
    made = []
    for prompt in range(NUM_PROMPTS):
        tokens = np.append(1, rng.integers(6, tiny.VOCAB, 1 + 2 * prompt)).astype(np.int32)
        made.append(Request(tokens, np.stack([uniforms(sampling_seed, (7, prompt, k), NEW) for k in range(RESPONSES)])))
    return made


def _sampled(layout: Layout, source: dict[str, Any], *, fused: bool, rows_at_once: int, **variant: Any) -> list[Any]:
    """On one rank: the responses to its part of the requests."""
    from megatron.core import parallel_state

    from nemo_rao.rollout.decode import Sampling, sample

    tiny.enter(layout)
    stages = range(layout.virtual_pipeline) if layout.virtual_pipeline else [None]
    chunks = [tiny.build(source, layout, stage, fused=fused, **variant) for stage in stages]
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    own = range(rank, NUM_PROMPTS, size)
    asked = requests()
    found = sample(
        chunks,
        [asked[i] for i in own],
        max_new_tokens=NEW,
        end_tokens=[END],
        sampling=Sampling(),
        rows_at_once=rows_at_once,
        vocab_size=tiny.VOCAB,
    )
    assert all(chunk.config.sequence_parallel == layout.sequence_parallel for chunk in chunks)
    plain = [[(one.tokens.tolist(), one.logps.tolist(), one.is_cut) for one in of] for of in found]
    return list(zip(own, plain, strict=True))


def _of_layouts(layouts: Sequence[Layout], source: dict[str, Any], **arguments: Any) -> list[Any]:
    return [_sampled(layout, source, **arguments) for layout in layouts]


def sampled(layouts: Sequence[Layout], source: dict[str, Any], *, num_ranks: int, **arguments: Any) -> list[list[Any]]:
    """For each layout, the responses of all prompts, as every rank that has them has them."""
    import functools

    of_ranks = run_ranks(functools.partial(_of_layouts, **arguments), (layouts, source), num_ranks=num_ranks)
    together = []
    for number in range(len(layouts)):
        found: dict[int, Any] = {}
        for of_rank in of_ranks:
            for prompt, responses in of_rank[number]:
                assert found.setdefault(prompt, responses) == responses
        together.append([found[prompt] for prompt in range(NUM_PROMPTS)])
    return together


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llama()


@pytest.fixture(scope="module")
def alone(model: Any) -> list[Any]:
    source = tiny.whole_tensors(model)
    return sampled([Layout()], source, num_ranks=1, fused=False, rows_at_once=100)[0]


def test_log_probabilities_are_those_of_a_pass_over_the_whole_row(model: Any, alone: list[Any]) -> None:
    for request, responses in zip(requests(), alone, strict=True):
        for tokens, logps, is_cut in responses:
            row = torch.tensor([*request.prompt, *tokens])
            with torch.no_grad():
                expected = model(row[None]).logits[0, :-1].log_softmax(-1).gather(-1, row[1:, None])[:, 0]
            assert logps == pytest.approx(expected[len(request.prompt) - 1 :].tolist(), abs=1e-5)
            assert (END in tokens) != is_cut and END not in tokens[:-1] and len(tokens) <= NEW
    assert len({tuple(tokens) for of in alone for tokens, _, _ in of}) == NUM_PROMPTS * RESPONSES
    assert {is_cut for of in alone for _, _, is_cut in of} == {True, False}


def test_tokens_are_those_that_the_numbers_choose(model: Any, alone: list[Any]) -> None:
    for request, responses in zip(requests(), alone, strict=True):
        for numbers, (tokens, _, _) in zip(request.uniforms, responses, strict=True):
            row = torch.tensor([*request.prompt, *tokens])
            with torch.no_grad():
                probabilities = model(row[None]).logits[0].double().softmax(-1)
            for at, token in enumerate(tokens):
                below = probabilities[len(request.prompt) - 1 + at].cumsum(-1)
                assert below[token] - probabilities[len(request.prompt) - 1 + at, token] - 1e-6 <= numbers[at]
                assert numbers[at] <= below[token] + 1e-6


def _first_tokens(source: dict[str, Any], prompt: np.ndarray, count: int) -> list[int]:
    """On one rank: the first token of ``count`` responses to one prompt."""
    from nemo_rao.ops.sampling import uniforms
    from nemo_rao.rollout.decode import Request, Sampling, sample

    tiny.enter(Layout())
    numbers = np.stack([uniforms(11, (7, 0, k), 1) for k in range(count)])
    (found,) = sample(
        [tiny.build(source, Layout())],
        [Request(prompt, numbers)],
        max_new_tokens=1,
        end_tokens=[END],
        sampling=Sampling(),
        rows_at_once=count,
        vocab_size=tiny.VOCAB,
    )
    return [int(one.tokens[0]) for one in found]


def test_the_draws_of_a_token_follow_the_softmax(model: Any) -> None:
    """Pearson's chi-squared over the vocabulary, of 20,000 responses with numbers of their own."""
    prompt = requests()[2].prompt
    (tokens,) = run_ranks(_first_tokens, (tiny.whole_tensors(model), prompt, 20_000), num_ranks=1)
    with torch.no_grad():
        probabilities = model(torch.tensor(prompt)[None]).logits[0, -1, : tiny.VOCAB].double().softmax(-1).numpy()
    expected = 20_000 * probabilities / probabilities.sum()
    assert expected.min() > 5
    counts = np.bincount(tokens, minlength=tiny.VOCAB)
    assert scipy.stats.chisquare(counts, expected).pvalue > 0.01
    # The test would see a temperature that is 10 % too high.
    flatter = probabilities ** (1 / 1.1)
    assert scipy.stats.chisquare(counts, 20_000 * flatter / flatter.sum()).pvalue < 0.001


def test_batches_and_the_fused_output_layer_change_nothing(model: Any, alone: list[Any]) -> None:
    source = tiny.whole_tensors(model)
    for rows_at_once, fused in ((3, False), (7, True)):
        (found,) = sampled([Layout()], source, num_ranks=1, fused=fused, rows_at_once=rows_at_once)
        assert_same(found, alone)


def test_any_parallelism_samples_the_same(model: Any, alone: list[Any]) -> None:
    source = tiny.whole_tensors(model)
    for found in sampled(list(LAYOUTS.values()), source, num_ranks=4, fused=True, rows_at_once=100):
        assert_same(found, alone)


@pytest.mark.slow
def test_a_mixture_samples_the_same_with_its_experts_on_several_ranks() -> None:
    source = tiny.whole_tensors(tiny.mixtral())
    (alone,) = sampled([Layout()], source, num_ranks=1, fused=True, rows_at_once=100, experts=True)
    layouts = [Layout(expert=2), Layout(expert=2, pipeline=2)]
    # Of five prompts, the ranks have three and two, so that one decodes longer than the other.
    for found in sampled(layouts, source, num_ranks=4, fused=True, rows_at_once=3, experts=True):
        assert_same(found, alone)


def assert_same(found: list[Any], expected: list[Any]) -> None:
    for of, as_expected in zip(found, expected, strict=True):
        for one, same in zip(of, as_expected, strict=True):
            assert (one[0], one[2]) == (same[0], same[2])
            assert one[1] == pytest.approx(same[1], abs=1e-5)
