"""Seconds of a step: computation, and bytes over the links that they take."""

from __future__ import annotations

import dataclasses

import pytest

from nemo_rao.config.compose import compose
from nemo_rao.planning import links
from nemo_rao.planning.communication import communication, forward_communication
from nemo_rao.planning.compute import flops
from nemo_rao.planning.links import Group
from nemo_rao.planning.machine import Machine
from nemo_rao.planning.plan import setting_of
from nemo_rao.planning.setting import Setting
from nemo_rao.planning.step_time import forward_seconds, step_time

GB = 10**9
# 1e12 FLOPs, 100 GB inside a node and 10 GB between nodes a second.
MACHINE = Machine("a GPU", 80.0, 4.0, 2.0, 0.5, 200.0, 20.0, 0.5, 1000.0, 8)


@pytest.fixture(scope="module")
def setting() -> Setting:
    return setting_of(compose("gpt_rao_llama3_8b"))


@pytest.fixture(scope="module")
def copies(setting: Setting) -> Setting:
    """Eight copies of the model, without anything that is hidden."""
    return dataclasses.replace(setting, tensor=1, sequence_parallel=False, overlap_grad_reduce=False)


@pytest.mark.parametrize(
    ("group", "ring", "neighbour"),
    [
        (Group(size=8, stride=1, devices=8, nodes=2), 1.0, 1.0),
        (Group(size=4, stride=2, devices=8, nodes=2), 1.0, 1.0),
        (Group(size=16, stride=8, devices=8, nodes=16), 10.0, 10.0),  # one rank a node, with its own card
        (Group(size=4, stride=4, devices=8, nodes=2), 5.0, 10.0),  # two ranks a node, with two cards
        (Group(size=16, stride=1, devices=8, nodes=2), 1.25, 10.0),
        (Group(size=16, stride=1, devices=16, nodes=2), 1.0, 1.0),
        (Group(size=3, stride=1, devices=8, nodes=3), 10.0 / 3, 10.0),  # some of them lie over two nodes
        (Group(size=32, stride=1, devices=16, nodes=2), 1.0, 10.0),  # never faster than inside the node
    ],
)
def test_a_group_is_as_fast_as_the_links_between_its_ranks(group: Group, ring: float, neighbour: float) -> None:
    assert group.ring_seconds(100 * GB, MACHINE) == pytest.approx(ring)
    assert group.neighbour_seconds(100 * GB, MACHINE) == pytest.approx(neighbour)


def test_an_exchange_takes_both_links_at_once() -> None:
    inside, over = Group(size=8, stride=1, devices=8, nodes=2), Group(size=16, stride=1, devices=8, nodes=2)
    assert inside.all_to_all_seconds(100 * GB, MACHINE) == pytest.approx(1.0)
    assert over.all_to_all_seconds(100 * GB, MACHINE) == pytest.approx(10.0 * 8 / 15)  # 8 of 15 others are outside
    assert Group(size=1, stride=8, devices=8, nodes=2).all_to_all_seconds(0, MACHINE) == 0


def test_ranks_are_numbered_as_megatron_does(setting: Setting) -> None:
    """tensor, context, data, pipeline; experts over consecutive ranks of a stage."""
    laid_out = dataclasses.replace(
        setting, tensor=2, context=2, pipeline=4, devices=8, nodes=8, expert=4, expert_tensor=1, global_batch_size=64
    )
    assert laid_out.data == 4
    groups = (
        links.tensor_group(laid_out),
        links.context_group(laid_out),
        links.shards_group(laid_out),
        links.pipeline_group(laid_out),
        links.expert_group(laid_out),
        links.expert_shards_group(laid_out),
    )
    assert [(one.stride, one.size) for one in groups] == [(1, 2), (2, 2), (2, 8), (16, 4), (1, 4), (4, 4)]
    assert [one.within_node for one in groups] == [True, True, False, False, True, False]


def test_what_is_sent_takes_time(setting: Setting, copies: Setting) -> None:
    whole = step_time(copies, MACHINE)
    assert whole.compute == pytest.approx(flops(copies).executed / (8 * 1e12))
    assert whole.data == pytest.approx(communication(copies).total / (100 * GB)) and whole.tensor == 0
    split = step_time(setting, MACHINE)
    assert split.tensor == pytest.approx(communication(setting).tensor / (100 * GB))
    assert split.total > whole.total  # the more that is sent, the longer, for the same FLOPs
    assert split.compute == pytest.approx(whole.compute)


def test_a_second_node_sends_over_the_slower_links(copies: Setting) -> None:
    more = dataclasses.replace(copies, nodes=2)
    # Eight cards of 10 GB a second each, together.
    assert step_time(more, MACHINE).data == pytest.approx(communication(more).total / (80 * GB))
    alone = dataclasses.replace(copies, devices=1, nodes=8)
    assert step_time(alone, MACHINE).data == pytest.approx(10 * step_time(copies, MACHINE).data)


def test_overlapping_hides_messages_behind_one_micro_batch(copies: Setting) -> None:
    sent, work = communication(copies), flops(copies)
    gradients, weights = sent.gradients / (100 * GB), sent.weights / (100 * GB)
    assert gradients == 2 * weights  # fp32 and bf16
    one = 1 / (8 * 1e12 * copies.num_micro_batches)
    forward, backward = work.forward * one, (work.executed - work.forward) * one
    reduced = dataclasses.replace(copies, overlap_grad_reduce=True)
    both = dataclasses.replace(reduced, overlap_param_gather=True)
    assert backward > gradients and forward > weights
    assert step_time(reduced, MACHINE).data == pytest.approx(weights)
    assert step_time(both, MACHINE).data == pytest.approx(0) and step_time(both, MACHINE).hidden > 0
    # Where messages take longer than that, what is left over counts.
    slow = dataclasses.replace(MACHINE, intra_node_gbs=0.2)
    assert step_time(reduced, slow).data == pytest.approx(1000 * (gradients + weights) - backward)
    assert step_time(both, slow).data == pytest.approx(1000 * (gradients + weights) - backward - forward)


def test_a_bubble_adds_what_stages_wait(setting: Setting) -> None:
    deep = dataclasses.replace(setting, pipeline=4, devices=16, global_batch_size=16)
    time = step_time(deep, MACHINE)
    assert deep.num_micro_batches == 16
    within = time.compute + time.tensor + time.pipeline
    assert time.bubble == pytest.approx(within * 3 / 16)
    assert time.total == pytest.approx(within + time.bubble + time.data)


def test_recomputation_takes_time(setting: Setting) -> None:
    again = dataclasses.replace(setting, recompute_granularity="full")
    assert step_time(again, MACHINE).compute > 1.2 * step_time(setting, MACHINE).compute
    assert flops(again).model == flops(setting).model


def test_a_forward_pass_sends_and_computes_less_than_a_step(setting: Setting) -> None:
    forward = forward_seconds(setting, MACHINE, prompts=setting.global_batch_size)
    sent = forward_communication(setting)
    assert sent.data == sent.embedding == 0 and sent.tensor < communication(setting).tensor / 2
    compute = flops(setting).forward / (8 * 1e12)
    assert forward == pytest.approx(compute + sent.tensor / (100 * GB))
    assert forward_seconds(setting, MACHINE, prompts=10 * setting.global_batch_size) == pytest.approx(10 * forward)
    assert forward_seconds(setting, MACHINE, prompts=0) == 0
    # A micro-batch that is not full takes less; an odd prompt leaves one of the two copies waiting.
    large = dataclasses.replace(setting, micro_batch_size=64)
    assert forward_seconds(large, MACHINE, prompts=setting.global_batch_size) == pytest.approx(forward)
    one, two, three = (forward_seconds(setting, MACHINE, prompts=number) for number in (1, 2, 3))
    assert one == two and three == pytest.approx(2 * two)


def test_a_pass_that_is_saved_often_fills_its_pipeline_often(setting: Setting) -> None:
    deep = dataclasses.replace(setting, pipeline=2)
    whole = forward_seconds(deep, MACHINE, prompts=640)
    assert forward_seconds(deep, MACHINE, prompts=640, in_a_row=10) == pytest.approx(whole / (641 / 640) * 11 / 10)


def test_mismatched_responses_are_sent_and_computed_too(setting: Setting) -> None:
    with_pass = dataclasses.replace(setting, kl_estimate=True)
    # One response more for two, forward only.
    more = communication(with_pass).tensor - communication(setting).tensor
    assert more == pytest.approx(forward_communication(setting).tensor / 2, rel=1e-6)
    assert flops(with_pass).model - flops(setting).model == flops(setting).forward // 2
