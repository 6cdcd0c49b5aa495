"""The order of samples is a function of seed and step, and any split of a batch over ranks is the whole batch."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_rao.data.order import every_sample_once, global_batch, rank_micro_batches, steps_per_epoch
from nemo_rao.errors import UserError

sizes = st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


@settings(max_examples=100)
@given(size=sizes, seed=st.integers(0, 2**63), start=st.integers(0, 500))
def test_a_resumed_run_sees_the_batches_it_would_have_seen(size, seed, start):
    num_samples, batch_size = size
    options = {"num_samples": num_samples, "global_batch_size": batch_size, "seed": seed}
    straight = [global_batch(step, **options) for step in range(start, start + 5)]
    resumed = [global_batch(step, **options) for step in reversed(range(start, start + 5))]
    assert all(np.array_equal(a, b) for a, b in zip(straight, reversed(resumed), strict=True))
    assert all(len(batch) == batch_size for batch in straight)


@settings(max_examples=100)
@given(size=sizes, seed=st.integers(0, 1000), epoch=st.integers(0, 20))
def test_an_epoch_repeats_nothing_and_drops_only_what_fills_no_batch(size, seed, epoch):
    num_samples, batch_size = size
    steps = steps_per_epoch(num_samples, batch_size)
    batches = [
        global_batch(epoch * steps + step, num_samples=num_samples, global_batch_size=batch_size, seed=seed)
        for step in range(steps)
    ]
    seen = np.concatenate(batches)
    assert len(set(seen.tolist())) == len(seen) == num_samples - num_samples % batch_size
    assert set(seen.tolist()) <= set(range(num_samples))


def test_epochs_and_seeds_are_shuffled_differently():
    def epoch(seed, number):
        return tuple(global_batch(number, num_samples=100, global_batch_size=100, seed=seed))

    orders = {epoch(seed, number) for seed in range(4) for number in range(4)}
    assert len(orders) == 16 and all(set(order) == set(range(100)) for order in orders)


def test_the_order_is_the_same_on_every_machine_and_numpy():
    assert global_batch(3, num_samples=10, global_batch_size=4, seed=42).tolist() == [6, 4, 0, 3]


def test_changing_a_batch_changes_no_later_one():
    first = global_batch(0, num_samples=8, global_batch_size=8, seed=0)
    expected = first.tolist()
    first[:] = -1
    assert global_batch(0, num_samples=8, global_batch_size=8, seed=0).tolist() == expected


@settings(max_examples=100)
@given(micro=st.integers(1, 5), ranks=st.integers(1, 6), number=st.integers(1, 5))
def test_every_split_over_ranks_and_micro_batches_is_the_global_batch(micro, ranks, number):
    indices = np.random.RandomState(0).permutation(1000)[: micro * ranks * number]
    parts = [rank_micro_batches(indices, micro, rank, ranks) for rank in range(ranks)]
    assert all(len(part) == number and all(len(batch) == micro for batch in part) for part in parts)
    assert [index for part in parts for batch in part for index in batch] == indices.tolist()


@settings(max_examples=100)
@given(num_samples=st.integers(1, 50), micro=st.integers(1, 7), ranks=st.integers(1, 6))
def test_a_pass_over_all_data_sees_each_sample_once(num_samples, micro, ranks):
    parts = [every_sample_once(num_samples, micro, rank, ranks) for rank in range(ranks)]
    counts = Counter(index for part in parts for batch in part for index in batch)
    assert counts == Counter(range(num_samples))
    assert all(0 < len(batch) <= micro for part in parts for batch in part)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="global_batch_size is 11 prompts, but the data has only 10"):
        global_batch(0, num_samples=10, global_batch_size=11, seed=0)
    with pytest.raises(UserError, match="global_batch_size is 0"):
        steps_per_epoch(10, 0)
    with pytest.raises(UserError, match="seed is -1"):
        global_batch(0, num_samples=10, global_batch_size=2, seed=-1)
    with pytest.raises(UserError, match=r"global_batch_size 10 is not a multiple of micro_batch_size 2 x .* size 4"):
        rank_micro_batches(list(range(10)), 2, 0, 4)
