"""The keys of ``precision`` arrive in Megatron's own configs: model, optimizer, gradient buffers."""

from __future__ import annotations

from typing import Any

import pytest

from ..engine_models import megatron_configs
from ..megatron_ranks import import_once


@pytest.fixture(scope="module")
def reached() -> Any:
    """Overrides -> the three configs after the engine has written its number formats into them."""
    import_once()
    from nemo_rao.config.compose import compose

    return lambda *overrides: megatron_configs(compose("gpt_rao", overrides))


def test_delayed_scaling_arrives_whole(reached: Any) -> None:
    extra = ("precision.fp8_margin=2", "precision.fp8_wgrad=false", "precision.fp8_param_gather=true")
    model, optimizer, buffers = reached("precision=fp8_delayed", *extra)
    assert (model.fp8, model.fp8_recipe, model.bf16) == ("hybrid", "delayed", True)
    assert (model.fp8_amax_history_len, model.fp8_amax_compute_algo, model.fp8_margin) == (1024, "max", 2)
    assert model.fp8_wgrad is False and model.fp8_param is True and model.first_last_layers_bf16 is False
    assert not model.fp8_dot_product_attention and not model.fp8_multi_head_attention, "attention stays in bf16"
    assert optimizer.fp8_recipe == "delayed" and optimizer.bf16 and buffers.fp8_param_gather


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
def test_the_other_recipes_arrive_with_their_ends_in_bf16(reached: Any, recipe: str) -> None:
    ends = ("precision.first_last_layers_bf16=true", "precision.num_layers_at_end_in_bf16=2")
    model, optimizer, buffers = reached(f"precision=fp8_{recipe}", *ends)
    assert (model.fp8_recipe, optimizer.fp8_recipe) == (recipe, recipe)
    assert model.fp8 == ("hybrid" if recipe == "tensorwise" else "e4m3")
    assert model.first_last_layers_bf16 and not buffers.fp8_param_gather
    assert (model.num_layers_at_start_in_bf16, model.num_layers_at_end_in_bf16) == (1, 2)


def test_a_simulation_leaves_megatrons_fp8_settings_unset(reached: Any) -> None:
    model, _, buffers = reached("precision=fp8_delayed", "precision.fp8_simulation=true")
    assert model.fp8 is None and model.bf16 and not buffers.fp8_param_gather


def test_fp16_arrives_with_its_loss_scale_and_lets_gradients_overflow(reached: Any) -> None:
    keys = (
        "precision.fp16_initial_loss_scale=512",
        "precision.fp16_loss_scale_window=7",
        "precision.fp16_hysteresis=3",
    )
    model, optimizer, buffers = reached("precision=fp16_mixed", *keys)
    assert model.fp16 and not model.bf16 and optimizer.fp16 and not optimizer.bf16
    assert (optimizer.initial_loss_scale, optimizer.loss_scale_window, optimizer.hysteresis) == (512, 7, 3)
    assert optimizer.loss_scale is None
    # Checked by this project, which knows a step's rows: tests/train/test_not_finite.py.
    assert not buffers.check_for_nan_in_grad and not reached("precision=bf16_mixed")[2].check_for_nan_in_grad
