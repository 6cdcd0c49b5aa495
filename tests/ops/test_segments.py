"""Token log-probabilities to prompt and response sums, arranged by prompt."""

import torch

from nemo_rao.ops.segments import sums_at, to_prompts, valid_entries

# Places 2 to 4, 8 and 12 to 17 of [3, 6]; of one sequence there is nothing to add up.
PLACES = torch.tensor([[2, 3, 4, -1, -1, -1], [8, -1, -1, -1, -1, -1], [12, 13, 14, 15, 16, 17], [-1] * 6])
PROMPT_INDEX = torch.tensor([0, 0, 1])
RESPONSE_INDEX = torch.tensor([0, 1, 0])


def test_sums_are_those_of_the_places_that_are_listed() -> None:
    logps = -torch.arange(1.0, 19).view(3, 6)
    assert sums_at(logps, PLACES).tolist() == [-(3 + 4 + 5), -9, -(13 + 14 + 15 + 16 + 17 + 18), 0]


def test_other_places_get_exactly_zero_gradient_whatever_stands_there() -> None:
    listed = PLACES[PLACES >= 0]
    logps = torch.full((18,), torch.nan)
    logps[::2] = -torch.inf
    logps[listed] = -1.0
    logps = logps.view(3, 6).requires_grad_()
    sums = sums_at(logps, PLACES)
    assert sums.tolist() == [-3, -1, -6, 0]
    sums.square().sum().backward()
    expected = torch.zeros(18)
    expected[listed] = torch.tensor([-6.0] * 3 + [-2] + [-12] * 6)
    assert torch.equal(logps.grad, expected.view(3, 6))


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
    def arranged(logps: torch.Tensor) -> torch.Tensor:
        return to_prompts(sums_at(logps, PLACES[:3]), PROMPT_INDEX, RESPONSE_INDEX, 2, 3)

    assert torch.autograd.gradcheck(arranged, (torch.randn(3, 6, dtype=torch.float64, requires_grad=True),))
