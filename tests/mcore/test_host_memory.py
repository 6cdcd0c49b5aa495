"""Tensors that wait in host memory: their memory is free, and views and optimizers find their values again."""

from __future__ import annotations

import torch

from nemo_rao.mcore.host_memory import HostMemory, on_gpu


def test_what_shares_a_buffer_is_back_with_its_values_and_away_without_memory() -> None:
    buffer = torch.arange(12.0)
    parameter, other = torch.nn.Parameter(buffer[:4].view(2, 2)), torch.nn.Parameter(buffer[4:10])
    adam = torch.optim.Adam([parameter, other], lr=0.1)

    def tensors() -> list[torch.Tensor]:
        of_adam = [value for state in adam.state.values() for value in state.values()]
        return [parameter.data, other.data, *of_adam]

    memory = HostMemory(tensors)
    memory.send_away()
    assert buffer.untyped_storage().nbytes() == 0
    plain = [torch.nn.Parameter(torch.arange(12.0)[:4].view(2, 2)), torch.nn.Parameter(torch.arange(12.0)[4:10])]
    same = torch.optim.Adam(plain, lr=0.1)
    for step in range(3):
        with memory.on_device(changed=True):  # the moments of the first step are new, and wait with the others
            for one in (adam, same):
                one.zero_grad()
            for one in (parameter, other, *plain):
                (one.square() * (step + 1)).sum().backward()
            for one in (adam, same):
                one.step()
        assert all(tensor.untyped_storage().nbytes() == 0 for tensor in tensors())
        with memory.on_device(changed=False):
            assert (
                torch.equal(parameter, plain[0]) and torch.equal(other, plain[1]) and buffer[10:].tolist() == [10, 11]
            )
            parameter.data.zero_()  # is not kept: what has not changed is not copied again
    with memory.on_device(changed=False):
        assert torch.equal(buffer[:4].view(2, 2), plain[0])
        for own, expected in zip(adam.state.values(), same.state.values(), strict=True):
            assert all(torch.equal(own[name], expected[name]) for name in expected)


def test_buffers_whose_values_do_not_count_are_not_kept() -> None:
    gradients = torch.ones(8)
    memory = HostMemory(lambda: [gradients[:4], gradients[4:]], kept=False)
    memory.send_away()
    assert gradients.untyped_storage().nbytes() == 0
    with memory.on_device(changed=True):
        assert gradients.zero_().sum() == 0 and gradients.untyped_storage().nbytes() == 32


def test_without_a_gpu_nothing_moves() -> None:
    weights = torch.ones(4)
    memory = HostMemory(lambda: on_gpu([weights]))
    memory.send_away()
    assert weights.tolist() == [1, 1, 1, 1]
