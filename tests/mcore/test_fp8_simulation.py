"""Simulated FP8 layers against plain PyTorch, their scales against lists kept by hand, under tensor parallelism."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from ..megatron_ranks import import_once, run_ranks
from ..ops.float8_table import E4M3, E5M2, LIMIT, through
from . import tiny
from .tiny import Layout

T, B, K, N = 8, 4, 160, 96  # 32 tokens; neither size fills whole blocks of 128
RECIPES = [
    ("hybrid", "delayed"),
    ("e4m3", "delayed"),
    ("hybrid", "tensorwise"),
    ("e4m3", "blockwise"),
    ("hybrid", "mxfp8"),
]
SAMPLES = tiny.preferences(4)


# ------------------------------------------------------------------------------ the same arithmetic, written plainly


def power_below(value: float) -> float:
    power = 1.0
    while power > value:
        power /= 2
    while power * 2 <= value:
        power *= 2
    return power


def in_blocks(values: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Each block under the largest power of 2 that keeps it in range, one block after the other."""
    result = torch.zeros_like(values, dtype=torch.float64)
    for top in range(0, values.shape[0], rows):
        for left in range(0, values.shape[1], columns):
            block = values[top : top + rows, left : left + columns]
            scale = power_below(LIMIT[dtype] / float(block.abs().max()))
            result[top : top + rows, left : left + columns] = through(block, dtype, scale)
    return result


def operands(x: Tensor, weight: Tensor, gradient: Tensor, recipe: str, of_gradient: torch.dtype) -> dict[str, Tensor]:
    """Each operand of the three products, rounded."""
    if recipe in ("delayed", "tensorwise"):
        scales = [
            1.0 if recipe == "delayed" else LIMIT[dtype] / float(values.abs().max())
            for values, dtype in ((x, E4M3), (weight, E4M3), (gradient, of_gradient))
        ]
        same = through(x, E4M3, scales[0]), through(weight, E4M3, scales[1]), through(gradient, of_gradient, scales[2])
        return dict(zip(("x", "weight", "gradient", "x_t", "weight_t", "gradient_t"), same * 2, strict=True))
    size = 128 if recipe == "blockwise" else 32
    tall, wide = ((128, 128), (128, 128)) if recipe == "blockwise" else ((32, 1), (1, 32))
    return {
        "x": in_blocks(x, 1, size, E4M3),
        "x_t": in_blocks(x, size, 1, E4M3),
        "weight": in_blocks(weight, *wide, E4M3),
        "weight_t": in_blocks(weight, *tall, E4M3),
        "gradient": in_blocks(gradient, 1, size, of_gradient),
        "gradient_t": in_blocks(gradient, size, 1, of_gradient),
    }


def products(x: Tensor, weight: Tensor, gradient: Tensor, recipe: str, of_gradient: torch.dtype) -> list[Tensor]:
    """Y, dX and dW in float64."""
    rounded = operands(x, weight, gradient, recipe, of_gradient)
    return [
        rounded["x"] @ rounded["weight"].t(),
        rounded["gradient"] @ rounded["weight_t"],
        rounded["gradient_t"].t() @ rounded["x_t"],
    ]


def given() -> tuple[Tensor, Tensor, Tensor]:
    """X ``[T, B, K]``, W ``[N, K]``, dY ``[T, B, N]``, with outliers, as activations have."""
    generator = torch.Generator().manual_seed(5)
    x, weight, gradient = (torch.randn(*shape, generator=generator) for shape in ((T, B, K), (N, K), (T, B, N)))
    x[:, :, 7] *= 30
    return x, weight * 0.05, gradient * 1e-3


# ------------------------------------------------------------------------------------------------------ the layers


def layer_for(form: str, recipe: str, layout: Layout, weight: Tensor, **more: Any) -> Any:
    """This rank's part of a row-parallel layer: its weight's columns."""
    from megatron.core import parallel_state

    from nemo_rao.mcore.fp8_simulation import Fp8RowParallelLinear, Fp8Simulation

    simulation = Fp8Simulation(format=form, recipe=recipe, **{"amax_history_len": 4, **more})
    layer = Fp8RowParallelLinear(
        K,
        N,
        config=tiny.config_for(layout),
        init_method=torch.nn.init.zeros_,
        bias=False,
        input_is_parallel=True,
        skip_bias_add=True,
        simulation=simulation,
    )
    rank, size = parallel_state.get_tensor_model_parallel_rank(), layout.tensor
    with torch.no_grad():
        layer.weight.copy_(weight.chunk(size, dim=1)[rank])
    return layer


def run_layer(layer: Any, x: Tensor, gradient: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    layer.weight.grad = None
    output, _ = layer(x)
    output.backward(gradient)
    return [output.detach().flatten(0, 1), x.grad.flatten(0, 1), layer.weight.grad.clone()]


def one_rank() -> dict[tuple[str, str], list[Tensor]]:
    tiny.enter(Layout())
    x, weight, gradient = given()
    return {
        (form, recipe): run_layer(layer_for(form, recipe, Layout(), weight), x, gradient) for form, recipe in RECIPES
    }


@pytest.fixture(scope="module")
def alone() -> dict[tuple[str, str], list[Tensor]]:
    return run_ranks(one_rank, num_ranks=1)[0]


@pytest.mark.parametrize(("form", "recipe"), RECIPES)
def test_output_and_gradients_are_products_of_rounded_operands(alone: Any, form: str, recipe: str) -> None:
    x, weight, gradient = given()
    of_gradient = E5M2 if form == "hybrid" else E4M3
    expected = products(x.flatten(0, 1), weight, gradient.flatten(0, 1), recipe, of_gradient)
    exact = [x.flatten(0, 1) @ weight.t(), gradient.flatten(0, 1) @ weight]
    for got, wanted in zip(alone[form, recipe], expected, strict=True):
        assert (got - wanted).norm() / wanted.norm() < 1e-6
    for got, unrounded in zip(alone[form, recipe], exact, strict=False):
        assert (got - unrounded).norm() / unrounded.norm() > 5e-3, "something was rounded"


def delayed_course(algorithm: str, margin: int) -> list[list[float]]:
    """Scales of a layer over six micro-batches whose values grow and shrink; a backward pass for every one."""
    from nemo_rao.mcore.fp8_simulation import ScaleUpdates

    tiny.enter(Layout())
    x, weight, gradient = given()
    layer = layer_for("hybrid", "delayed", Layout(), weight, amax_compute_algo=algorithm, margin=margin)
    decoder = torch.nn.Sequential(layer)
    layer.updates = ScaleUpdates([layer], decoder)
    course = []
    for factor in FACTORS:
        inputs = (x * factor).requires_grad_()
        decoder(inputs)[0].backward(gradient * factor)
        course.append(layer.get_extra_state()[0].tolist())
    return course


FACTORS = [1.0, 8.0, 2.0, 0.5, 0.25, 0.125]


@pytest.mark.parametrize(("algorithm", "margin"), [("max", 0), ("most_recent", 0), ("max", 2)])
def test_delayed_scales_follow_a_history_kept_by_hand(algorithm: str, margin: int) -> None:
    [course] = run_ranks(delayed_course, (algorithm, margin), num_ranks=1)
    x, weight, gradient = given()
    seen: list[tuple[float, float, float]] = []
    for factor, scales in zip(FACTORS, course, strict=True):
        seen.append(
            (float((x * factor).abs().max()), float(weight.abs().max()), float((gradient * factor).abs().max()))
        )
        window = seen[-4:] if algorithm == "max" else seen[-1:]
        for operand, limit in enumerate((448.0, 448.0, 57344.0)):
            amax = max(entry[operand] for entry in window)
            assert scales[operand] == pytest.approx(limit / amax / 2**margin, rel=1e-6)


# -------------------------------------------------------------------------------------------------- whole models


def model_for(layout: Layout, recipe: str, **more: Any) -> Any:
    from nemo_rao.mcore.fp8_simulation import Fp8Simulation, keep_scales_up_to_date, layer_spec_with_simulated_fp8

    config = tiny.config_for(layout)
    simulation = Fp8Simulation(recipe=recipe, **{"amax_history_len": 3, **more})
    config.transformer_layer_spec = functools.partial(layer_spec_with_simulated_fp8, simulation=simulation)
    torch.manual_seed(11)
    model = config.build()
    keep_scales_up_to_date(model)
    return model


def states(model: Any) -> dict[str, Tensor]:
    """What quantized layers keep; the output layer has a state of that name, too, with nothing in it."""
    kept = {name: value for name, value in model.state_dict().items() if name.endswith("_extra_state")}
    assert kept.pop("output_layer._extra_state", None) is None
    return kept


def loss(output: Any, batch: Any) -> tuple[Tensor, Tensor, dict]:
    from nemo_rao.mcore.loss import sequence_log_probs

    prompt, response = sequence_log_probs(output, batch, vocab_size=tiny.VOCAB)
    return -(prompt + response).sum(), torch.tensor(len(response), dtype=torch.int), {}


def on_two_ranks(layout: Layout) -> dict[str, Any]:
    """States after two micro-batches of training, after looking with and without care, and through a state dict."""
    from megatron.core import parallel_state

    from nemo_rao.mcore.forward import evaluation_mode, forward_only

    tiny.enter(layout)
    model = model_for(layout, "delayed")
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    batches = [tiny.micro_batch(SAMPLES, [prompt]) for prompt in range(len(SAMPLES))][rank::size]
    tiny.run_schedule(model, batches[:2], loss)
    trained = states(model)

    def look() -> None:
        forward_only(
            [model],
            [[3]],
            make_micro_batch=lambda prompts: tiny.micro_batch(SAMPLES, prompts),
            report=lambda output, batch: {},
        )

    with evaluation_mode([model]):
        look()
        during = states(model)
    after = states(model)
    with torch.no_grad():
        look()
    careless = states(model)
    other = model_for(layout, "delayed")
    fresh = states(other)
    other.load_state_dict({name: None if name in trained else value for name, value in model.state_dict().items()})
    without = states(other)
    other.load_state_dict(model.state_dict() | trained)
    return {
        "trained": trained,
        "during": during,
        "after": after,
        "careless": careless,
        "fresh": fresh,
        "without": without,
        "loaded": states(other),
    }


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(
    scope="module",
    params=[Layout(tensor=2), Layout(tensor=2, sequence_parallel=True), Layout()],
    ids=["TP 2", "TP 2, SP", "DP 2"],
)
def two_ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_ranks(on_two_ranks, (request.param,), num_ranks=2)


def test_ranks_agree_on_the_scales_of_every_linear_layer(two_ranks: list[dict[str, Any]]) -> None:
    trained = two_ranks[0]["trained"]
    assert len(trained) == 4 * tiny.NUM_LAYERS
    assert all((state[0] != 1).all() and (state[1] == 0).all() for state in trained.values()), "all three have moved on"
    assert same(trained, two_ranks[1]["trained"])


def test_looking_leaves_every_state_as_it_was(two_ranks: list[dict[str, Any]]) -> None:
    for rank in two_ranks:
        assert same(rank["after"], rank["trained"])
        assert not same(rank["during"], rank["trained"]), "casts note what they see"
        assert not same(rank["careless"], rank["trained"])


def test_a_state_dict_carries_the_scales_and_one_without_them_changes_nothing(two_ranks: list[dict[str, Any]]) -> None:
    for rank in two_ranks:
        assert same(rank["loaded"], rank["trained"]) and not same(rank["fresh"], rank["trained"])
        assert same(rank["without"], rank["fresh"])


def ends_in_bf16() -> list[list[bool]]:
    from nemo_rao.mcore.fp8_simulation import Fp8Linear

    found = []
    for layout in (Layout(), Layout(pipeline=2)):
        tiny.enter(layout)
        model = model_for(layout, "tensorwise", num_layers_at_start_in_bf16=1, num_layers_at_end_in_bf16=2)
        linear = [
            [isinstance(module, Fp8Linear) for name, module in layer.named_modules() if name.count("linear")]
            for layer in model.decoder.layers
        ]
        assert all(len(layer) == 4 and len(set(layer)) == 1 for layer in linear)
        assert not any(isinstance(module, Fp8Linear) for name, module in model.named_modules() if "output" in name)
        found.append([layer[0] for layer in linear])
    return found


def test_first_and_last_layers_stay_in_bf16_on_any_pipeline_stage() -> None:
    whole, split = zip(*run_ranks(ends_in_bf16, num_ranks=2), strict=True)
    assert whole[0] == [False, True, False, False]
    assert split[0] + split[1] == whole[0]


def calibrated() -> tuple[int, list[bool]]:
    """Passes of a calibration, and whether each of the first step's micro-batches then runs under the same scales."""
    from nemo_rao.mcore.calibration import calibrate

    tiny.enter(Layout())
    model = model_for(Layout(), "delayed", amax_history_len=64)
    passes = calibrate(
        [model], [[0, 1], [2], [3]], make_micro_batch=lambda prompts: tiny.micro_batch(SAMPLES, list(prompts))
    )
    scales = {name: state[0, :2].clone() for name, state in states(model).items()}
    constant = []
    for prompts in ([0, 1], [2], [3]):
        tiny.run_schedule(model, [tiny.micro_batch(SAMPLES, prompts)], loss)
        constant.append(all(torch.equal(state[0, :2], scales[name]) for name, state in states(model).items()))
    return passes, constant


def test_after_calibration_scales_stay_in_the_first_step() -> None:
    [(passes, constant)] = run_ranks(calibrated, num_ranks=1)
    assert 2 <= passes < 8
    assert constant == [True, True, True]


def test_transformer_engine_is_not_installed_where_it_is_simulated() -> None:
    import_once()
    from nemo_rao.runtime.gpus import transformer_engine_is_used

    assert not transformer_engine_is_used()
