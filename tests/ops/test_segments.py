"""Token log-probabilities to prompt and response sums, arranged by prompt."""

import torch

from nemo_rao.ops.segments import sequence_sums, to_prompts, valid_entries

# Two prompts, of two responses and one: rows of 6 positions, some of padding.
PROMPT_MASK = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
RESPONSE_MASK = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 0, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
PROMPT_INDEX = torch.tensor([0, 0, 1])
RESPONSE_INDEX = torch.tensor([0, 1, 0])


def test_sums_are_those_of_each_mask() -> None:
    logps = -torch.arange(1.0, 19).view(3, 6)
    prompt, response = sequence_sums(logps, PROMPT_MASK, RESPONSE_MASK)
    assert prompt.tolist() == [-(1 + 2), -(7 + 8), 0]
    assert response.tolist() == [-(3 + 4 + 5), -9, -(13 + 14 + 15 + 16 + 17 + 18)]


def test_masked_positions_get_exactly_zero_gradient_whatever_stands_there() -> None:
    logps = torch.full((3, 6), torch.nan)
    logps[1] = -torch.inf
    kept = PROMPT_MASK | RESPONSE_MASK
    logps[kept] = -1.0
    logps.requires_grad_()
    prompt, response = sequence_sums(logps, PROMPT_MASK, RESPONSE_MASK)
    assert prompt.tolist() == [-2, -2, 0] and response.tolist() == [-3, -1, -6]
    (3 * prompt + 5 * response.square()).sum().backward()
    expected = 3 * PROMPT_MASK - 10 * torch.tensor([[3], [1], [6]]) * RESPONSE_MASK
    assert torch.equal(logps.grad, expected.float())


def test_rows_go_to_their_prompt_and_response_with_their_gradient() -> None:
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    arranged = to_prompts(values, PROMPT_INDEX, RESPONSE_INDEX, 2, 2)
    assert arranged.tolist() == [[1, 2], [3, 0]]
    (arranged * torch.tensor([[10.0, 20], [30, 40]])).sum().backward()
    assert values.grad.tolist() == [10, 20, 30]
    assert valid_entries(PROMPT_INDEX, RESPONSE_INDEX, 2, 2).tolist() == [[True, True], [True, False]]


def test_rows_may_stand_in_any_order() -> None:
    order = torch.tensor([2, 0, 1])
    shuffled = to_prompts(torch.tensor([1.0, 2, 3])[order], PROMPT_INDEX[order], RESPONSE_INDEX[order], 2, 2)
    assert shuffled.tolist() == [[1, 2], [3, 0]]


def test_gradcheck_from_tokens_to_prompts() -> None:
    def arranged(logps: torch.Tensor) -> tuple[torch.Tensor, ...]:
        sums = sequence_sums(logps, PROMPT_MASK, RESPONSE_MASK)
        return tuple(to_prompts(row, PROMPT_INDEX, RESPONSE_INDEX, 2, 3) for row in sums)

    assert torch.autograd.gradcheck(arranged, (torch.randn(3, 6, dtype=torch.float64, requires_grad=True),))
