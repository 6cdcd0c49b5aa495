"""Canonical LoRA and DoRA: what they compute, under any parallelism, and from a checkpoint of another one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from nemo_rao.config.run_config import RunConfig
from nemo_rao.errors import UserError
from nemo_rao.loop.session import Hook, Session

from ..engines import needs_bridge
from ..megatron_ranks import import_once
from ..train.runs import TINY, in_fork, make_data, parallel, run_training, start_checkpoint, steps

pytestmark = needs_bridge
# Biases of queries, keys and values; layers all of which, or one of which, have an adapter of a kind.
NETWORK = (*TINY, "model.family=qwen2")
DIM, ALPHA = 4, 6
FORMS = {
    "canonical_lora": "q_proj,v_proj,o_proj,up_proj,'*.layers.1.*.linear_fc1'",
    "dora": "linear_qkv,linear_proj,linear_fc2,'*.layers.0.*'",
}


class Formula(Hook):
    """Trained are the parameters that are planned. At the end, an adapted layer's output is its input times the weight
    that the paper's formula gives."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config

    def start(self, session: Session) -> None:
        from nemo_rao.mcore.forward import unwrapped
        from nemo_rao.planning.parameters import stage_parameters
        from nemo_rao.planning.plan import setting_of

        own = unwrapped(session.chunks[0]).named_parameters()
        planned = stage_parameters(setting_of(self._config), 0)
        expected = {one.name: one.size for one in planned if one.trained}
        assert {name: one.numel() for name, one in own if one.requires_grad} == expected

    def end(self, session: Session) -> None:
        import torch
        from megatron.bridge.peft.adapter_wrapper import AdapterWrapper

        from nemo_rao.mcore.forward import unwrapped

        found = [module for module in unwrapped(session.chunks[0]).modules() if isinstance(module, AdapterWrapper)]
        assert len(found) in (6, 7)
        for wrapper in found:
            layer = wrapper.to_wrap
            inputs = torch.randn(3, 2, layer.input_size, generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                output = layer(inputs)[0]
                bare, normed = output if isinstance(output, tuple) else (output, inputs)
                bias = 0 if layer.bias is None else layer.bias
                expected = normed @ effective(wrapper).T + bias
                got = wrapper(inputs)[0]
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
            assert not torch.allclose(got, bare, rtol=1e-4, atol=1e-4), "it has been trained"


def effective(wrapper: Any) -> Any:
    """The weight with its adapters, ``[out, in]``, of one rank."""
    import torch

    def product(adapter: Any) -> Any:
        return ALPHA / DIM * adapter.linear_out.weight @ adapter.linear_in.weight

    weight, adapter, config = wrapper.to_wrap.weight, wrapper.adapter, wrapper.to_wrap.config
    if not isinstance(adapter, torch.nn.ModuleDict):
        changed = weight + product(adapter)
        magnitude = dict(adapter.named_parameters()).get("weight_magnitude")
        return changed if magnitude is None else magnitude[:, None] * changed / changed.norm(dim=1, keepdim=True)
    changed = weight.clone()
    if "adapter_q" in adapter:
        heads, groups, width = config.num_attention_heads, config.num_query_groups, config.kv_channels
        rows = torch.arange(len(weight)).view(groups, heads // groups + 2, width)
        parts = {"q": rows[:, :-2].flatten(), "k": rows[:, -2].flatten(), "v": rows[:, -1].flatten()}
    else:
        rows = torch.arange(len(weight))
        parts = dict(zip(("gate", "up"), rows.chunk(2), strict=True))
    for name, one in adapter.items():
        changed[parts[name.removeprefix("adapter_")]] += product(one)
    return changed


def _train_and_check(given: list[str]) -> None:
    from nemo_rao.config.compose import compose
    from nemo_rao.training.train import train

    config = compose("gpt_dpo", given)
    train(config, hooks=lambda hooks: [*hooks, Formula(config)])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, data: tuple[str, ...]) -> Path:
    return start_checkpoint(tmp_path_factory.mktemp("start"), (*NETWORK, *data))


@pytest.mark.parametrize("scheme", FORMS)
def test_a_run_computes_the_formula_and_goes_on_under_another_parallelism(
    scheme: str, data: tuple[str, ...], start: Path, tmp_path: Path
) -> None:
    given = [
        *(*NETWORK, *data, f"model.restore_from_path={start}", "exp_manager.name=run", f"model.peft.scheme={scheme}"),
        *(f"model.peft.lora.dim={DIM}", f"model.peft.lora.alpha={ALPHA}", "model.optim.lr=1e-2"),
        f"model.peft.lora.target_modules=[{FORMS[scheme]}]",
    ]
    run_training("gpt_dpo", [*given, f"exp_manager.exp_dir={tmp_path}/one", "trainer.max_steps=2"])
    shutil.copytree(tmp_path / "one", tmp_path / "split")
    given.append("trainer.max_steps=4")
    in_fork(_train_and_check, [*given, f"exp_manager.exp_dir={tmp_path}/one"])
    split = (*parallel(2, 2, 1), "model.sequence_parallel=true", f"exp_manager.exp_dir={tmp_path}/split")
    run_training("gpt_dpo", [*given, *split])
    whole, split_up = (steps(tmp_path / name / "run") for name in ("one", "split"))
    assert len(whole) == len(split_up) == 4 and whole[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    for want, have in zip(whole, split_up, strict=True):
        for name in ("loss", "grad_norm", "logps/chosen", "rewards/margins"):
            assert have[name] == pytest.approx(want[name], rel=1e-5, abs=1e-6), (want["step"], name)


def test_parts_of_a_layer_that_has_none_are_refused() -> None:
    import_once()
    from nemo_rao.config.compose import compose
    from nemo_rao.engines.bridge.provider import model_config

    given = (*NETWORK, "model.peft.scheme=canonical_lora", "model.arch.extra={gated_linear_unit: false}")
    with pytest.raises(UserError, match="linear_fc1 of this model has no gate to split"):
        model_config(compose("gpt_dpo", given))
