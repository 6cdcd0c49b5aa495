"""A micro-batch against a reconstruction that goes token by token."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_rao.batch import Sample
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
            place="somewhere",
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


@settings(max_examples=100, deadline=None)
@given(samples=samples, pad_multiple=st.sampled_from([1, 4, 16]), pad_to=st.sampled_from([None, 5, 20]), data=st.data())
def test_masks_select_exactly_the_prompt_without_t0_and_the_response(samples, pad_multiple, pad_to, data):
    firsts = [data.draw(st.integers(0, 40)) for _ in samples]
    reference = np.arange(100, dtype=np.float64).reshape(50, 2)
    batch = collate(samples, firsts, pad_token_id=PAD, pad_multiple=pad_multiple, pad_to=pad_to, reference=reference)

    pairs = [(p, k) for p, sample in enumerate(samples) for k in range(len(sample.responses))]
    longest = max(len(samples[p].prompt) + len(samples[p].responses[k]) for p, k in pairs)
    length = max(longest, pad_to or 0)
    while length % pad_multiple:
        length += 1
    assert batch.tokens.shape == (len(pairs), length)
    assert batch.num_prompts == len(samples)
    for row, (p, k) in enumerate(pairs):
        prompt, response = samples[p].prompt.tolist(), samples[p].responses[k].tolist()
        whole = prompt + response
        assert batch.tokens[row].tolist() == whole + [PAD] * (length - len(whole))
        assert batch.labels[row][batch.prompt_mask[row]].tolist() == prompt[1:]
        assert batch.labels[row][batch.response_mask[row]].tolist() == response
        for t in range(length):
            predicted = t + 1  # the position whose token is predicted at t
            assert batch.labels[row, t] == (whole[predicted] if predicted < len(whole) else 0)
            assert batch.prompt_mask[row, t] == (predicted < len(prompt))
            assert batch.response_mask[row, t] == (len(prompt) <= predicted < len(whole))
        number = firsts[p] + k
        assert (batch.prompt_index[row], batch.response_index[row], batch.response_ids[row]) == (p, k, number)
        assert batch.reference is not None and batch.reference[row].tolist() == [2.0 * number, 2.0 * number + 1]
        reward = float(samples[p].rewards[k])
        assert batch.rewards[row] == reward or (np.isnan(reward) and batch.rewards[row].isnan())
        assert batch.reward_ensemble is not None and batch.reward_ensemble[row].tolist() == [k / 2, k / 8]
    assert batch.reference_rewards is not None
    for p, sample in enumerate(samples):
        known = batch.reference_rewards[p, : len(sample.reference_rewards)]
        assert known.tolist() == sample.reference_rewards.tolist()
        assert batch.reference_rewards[p, len(known) :].isnan().all()
    assert batch.ranked.tolist() == [sample.ranked for sample in samples]
    assert {t.dtype for t in (batch.tokens, batch.labels, batch.prompt_index, batch.response_index)} == {torch.int64}
    assert (batch.rewards.dtype, batch.reference.dtype) == (torch.float32, torch.float32)


def test_what_the_data_does_not_have_is_none():
    sample = Sample(np.array([1]), (np.array([2]),), np.array([0.0]), False, "p", np.zeros((1, 0)), np.zeros(0))
    batch = collate([sample], [0], pad_token_id=PAD)
    assert (batch.reference, batch.reward_ensemble, batch.reference_rewards) == (None, None, None)
