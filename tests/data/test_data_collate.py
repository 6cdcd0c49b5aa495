"""A micro-batch against a reconstruction that goes token by token."""

from dataclasses import replace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_rao.batch import MicroBatch, Sample
from nemo_rao.data.collate import collate

PAD = 99
tokens = st.lists(st.integers(1, 50), min_size=1, max_size=6)
samples = st.lists(
    st.builds(
        lambda prompt, responses, ranked: Sample(
            prompt=np.array(prompt, np.int32),
            responses=tuple(np.array(response, np.int32) for response in responses),
            rewards=np.array([np.nan if i == 2 else i / 4 for i in range(len(responses))]),
            ranked=ranked,
            location="somewhere",
            ensemble=np.array([[i / 2, i / 8] for i in range(len(responses))]),
            reference_rewards=np.arange(len(prompt), dtype=np.float64),
        ),
        tokens,
        st.lists(tokens, min_size=1, max_size=4),
        st.booleans(),
    ),
    min_size=1,
    max_size=4,
)


LAYOUTS = [{"packed": packed, "shared_prompts": shared} for packed in (False, True) for shared in (False, True)]


@settings(max_examples=200)
@given(samples=samples, pad_multiple=st.sampled_from([1, 4, 16]), layout=st.sampled_from(LAYOUTS), data=st.data())
def test_every_layout_predicts_each_rows_tokens_from_what_stands_before_them_there(samples, pad_multiple, layout, data):
    firsts = [data.draw(st.integers(0, 40)) for _ in samples]
    reference = np.arange(100, dtype=np.float64).reshape(50, 2)
    batch = collate(samples, firsts, pad_token_id=PAD, pad_multiple=pad_multiple, reference=reference, **layout)

    pairs = [(p, k) for p, sample in enumerate(samples) for k in range(len(sample.responses))]
    seen = visible(batch)
    tokens, labels, position_ids = batch.tokens.flatten(), batch.labels.flatten(), batch.position_ids.flatten()
    assert batch.num_prompts == len(samples)
    assert batch.tokens.shape[0] == 1 if layout["packed"] else len(samples) if layout["shared_prompts"] else len(pairs)
    assert batch.tokens.shape[1] % pad_multiple == 0
    for row, (p, k) in enumerate(pairs):
        prompt, response = samples[p].prompt.tolist(), samples[p].responses[k].tolist()
        whole = prompt + response
        positions = [
            *[location for location in batch.prompt_positions[p].tolist() if location >= 0],
            *[location for location in batch.response_positions[row].tolist() if location >= 0],
        ]
        assert len(positions) == len(whole) - 1
        for t, location in enumerate(positions):
            assert labels[location] == whole[t + 1] and position_ids[location] == t
            assert [int(tokens[other]) for other in seen[location]] == whole[: t + 1]
            assert (location in batch.all_prompt_positions) == (t + 1 < len(prompt))
            assert (location in batch.all_response_positions) == (t + 1 >= len(prompt))
        assert batch.boundary[row] == positions[len(prompt) - 1] and batch.end[row] == positions[-1] + 1
        assert [int(tokens[other]) for other in seen[int(batch.end[row])]] == whole
        number = firsts[p] + k
        assert (batch.prompt_index[row], batch.response_index[row], batch.response_ids[row]) == (p, k, number)
        assert batch.reference is not None and batch.reference[row].tolist() == [2.0 * number, 2.0 * number + 1]
        reward = float(samples[p].rewards[k])
        assert batch.rewards[row] == reward or (np.isnan(reward) and batch.rewards[row].isnan())
        assert batch.reward_ensemble is not None and batch.reward_ensemble[row].tolist() == [k / 2, k / 8]
    for listed, of_rows in (
        (batch.all_prompt_positions, batch.prompt_positions),
        (batch.all_response_positions, batch.response_positions),
    ):
        assert listed.tolist() == of_rows[of_rows >= 0].tolist()
    everywhere = batch.all_prompt_positions.tolist() + batch.all_response_positions.tolist()
    assert len(set(everywhere)) == len(everywhere)
    assert batch.num_row_tokens == sum(len(samples[p].prompt) + len(samples[p].responses[k]) for p, k in pairs)
    shared = sum((len(sample.prompt) - 1) * (len(sample.responses) - 1) for sample in samples)
    assert batch.num_tokens == batch.num_row_tokens - shared * layout["shared_prompts"]
    assert (batch.tokens == PAD).sum() == batch.tokens.numel() - batch.num_tokens
    assert batch.reference_rewards is not None
    for p, sample in enumerate(samples):
        known = batch.reference_rewards[p, : len(sample.reference_rewards)]
        assert known.tolist() == sample.reference_rewards.tolist()
        assert batch.reference_rewards[p, len(known) :].isnan().all()
    assert batch.ranked.tolist() == [sample.ranked for sample in samples]
    assert {t.dtype for t in (batch.tokens, batch.labels, batch.prompt_index, batch.response_index)} == {torch.int64}
    assert (batch.rewards.dtype, batch.reference.dtype) == (torch.float32, torch.float32)


def visible(batch: MicroBatch) -> list[list[int]]:
    """For each place, those that it sees, in their order."""
    num_sequences, length = batch.tokens.shape
    if batch.segments is None:
        return [list(range(b * length, b * length + t + 1)) for b in range(num_sequences) for t in range(length)]
    seen: list[list[int]] = []
    runs: list[list[int]] = []
    for size, continued, _ in batch.segments.tolist():
        before = runs[continued] if continued >= 0 else []
        runs.append(list(range(len(seen), len(seen) + size)))
        seen += [before + runs[-1][: t + 1] for t in range(size)]
    assert len(seen) == num_sequences * length
    return seen


@given(samples=samples, layout=st.sampled_from(LAYOUTS))
def test_of_conversations_only_the_answers_are_predicted(samples, layout):
    rng = np.random.default_rng(0)
    chats = [replace(s, answers=tuple(rng.random(len(r)) < 0.5 for r in s.responses)) for s in samples]
    batch = collate(chats, [0] * len(chats), pad_token_id=PAD, **layout)
    row = 0
    for chat in chats:
        for response, answers in zip(chat.responses, chat.answers, strict=True):
            positions = batch.response_positions[row]
            assert batch.labels.flatten()[positions[positions >= 0]].tolist() == response[answers].tolist()
            row += 1


def test_what_the_data_does_not_have_is_none():
    sample = Sample(np.array([1]), (np.array([2]),), np.array([0.0]), False, "p", np.zeros((1, 0)), np.zeros(0))
    batch = collate([sample], [0], pad_token_id=PAD)
    assert (batch.reference, batch.reward_ensemble, batch.reference_rewards) == (None, None, None)
