"""Which layers get an adapter: names of Megatron and of Hugging Face, patterns, pipeline stages; all without NeMo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as torch_checkpoint

from nemo_rao.checkpoint.adapters import base_of_adapters, base_on_resume, digest_of_weights, stored_adapters
from nemo_rao.checkpoint.run_records import write_run
from nemo_rao.checkpoint.starting import start_of
from nemo_rao.config.compose import compose
from nemo_rao.config.engine_choice import NEMO
from nemo_rao.config.lora_targets import (
    SPLIT,
    adapted,
    check_targets,
    layers_of_stages,
    linear_layers,
    lora_targets,
)
from nemo_rao.config.recipe_text import to_yaml
from nemo_rao.config.run_config import RunConfig
from nemo_rao.errors import UserError
from nemo_rao.training.checks import check_run
from nemo_rao.training.compare_rewards import Asked, plan

LORA = ("model.peft.scheme=lora", "model.restore_from_path=x", "model.arch.num_layers=4")
PP2 = ("trainer.devices=2", "model.pipeline_model_parallel_size=2")


def run(targets: str, *overrides: str) -> RunConfig:
    return compose("gpt_rao", [*LORA, f"model.peft.lora.target_modules=[{targets}]", *overrides])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("linear_fc1,linear_qkv", ("linear_fc1", "linear_qkv")),
        ("q_proj,k_proj,v_proj,o_proj", ("linear_qkv", "linear_proj")),
        ("gate_proj,up_proj,down_proj,lm_head", ("linear_fc1", "linear_fc2", "output_layer")),
        ("all-linear", ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")),
        (
            "all-linear,output_layer,linear_qkv",
            ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "output_layer"),
        ),
        (
            "query_key_value,dense,dense_h_to_4h,dense_4h_to_h",
            ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"),
        ),
        ("qkv_proj,gate_up_proj", ("linear_qkv", "linear_fc1")),
    ],
)
def test_names_of_hugging_face_mean_megatrons_layers(given: str, expected: tuple[str, ...]) -> None:
    assert lora_targets(run(given)) == expected


CANONICAL = "model.peft.scheme=canonical_lora"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("q_proj,v_proj,up_proj", ("linear_q", "linear_v", "linear_fc1_up")),
        ("linear_k,linear_fc1_gate,o_proj,lm_head", ("linear_k", "linear_fc1_gate", "linear_proj", "output_layer")),
        ("linear_qkv,q_proj,gate_up_proj", ("linear_q", "linear_k", "linear_v", "linear_fc1_gate", "linear_fc1_up")),
        ("all-linear", (*SPLIT["linear_qkv"], "linear_proj", *SPLIT["linear_fc1"], "linear_fc2")),
    ],
)
def test_canonical_lora_takes_parts_of_fused_layers(given: str, expected: tuple[str, ...]) -> None:
    assert lora_targets(run(given, CANONICAL)) == expected


def test_a_pattern_of_a_fused_layer_means_its_parts() -> None:
    names = linear_layers(2, experts=False, split=True)
    layer = "decoder.layers.1.self_attention."
    assert adapted(["*.layers.1.*.linear_qkv"], names) == [layer + f"linear_{part}" for part in "qkv"]
    assert adapted(["*.layers.1.*.linear_k"], names) == [layer + "linear_k"]
    assert len(names) == 2 * 7 + 1


def test_a_checkpoint_shows_which_parts_have_adapters() -> None:
    stored = {
        "decoder.layers.self_attention.linear_qkv.adapter.adapter_k.linear_in.weight": (2, 4, 48),
        "decoder.layers.1.mlp.linear_fc1.adapter.adapter_gate.linear_in.weight": (4, 48),
        "decoder.layers.1.mlp.linear_fc2.adapter.linear_in.weight": (4, 48),
    }
    attention = {f"decoder.layers.{number}.self_attention.linear_k": 4 for number in range(2)}
    own = {f"decoder.layers.1.mlp.{name}": 4 for name in ("linear_fc1_gate", "linear_fc2")}
    assert stored_adapters(stored, 2) == attention | own


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (("model.peft.scheme=dora", "model.peft.lora.dropout=0.1"), ("model.peft.lora.dropout=0.1", "set it to 0")),
        (("model.peft.scheme=dora", "model.peft.lora.target_modules=['*']"), ("output_layer gets no adapter",)),
        ((CANONICAL, "model.peft.lora.target_modules=[linear_kv]"), ("no linear layer linear_kv", "did you mean")),
        (
            (CANONICAL, "model.family=mixtral", "model.peft.lora.target_modules=[up_proj]"),
            ("linear_fc1_up: experts get no adapters",),
        ),
    ],
)
def test_what_a_form_of_adapters_lacks_is_refused(overrides: tuple[str, ...], parts: tuple[str, ...]) -> None:
    config = run("linear_qkv", *overrides)
    with pytest.raises(UserError) as error:
        check_targets(config, num_layers=4, experts=config.model.family == "mixtral")
    for part in (*parts, "model.peft.lora."):
        assert part in str(error.value)


@pytest.mark.parametrize("scheme", ["canonical_lora", "dora"])
def test_nemos_engine_refuses_the_forms_that_it_lacks(scheme: str) -> None:
    with pytest.raises(UserError, match=rf"model.peft.scheme={scheme}: engine nemo supports only lora; .*=bridge"):
        check_run(run("linear_qkv", f"model.peft.scheme={scheme}", "trainer.engine=nemo"))


@pytest.mark.parametrize(
    ("targets", "overrides", "parts"),
    [
        ("q_proj", (), ("q_proj is a part of Megatron's linear_qkv", "add k_proj and v_proj, or use linear_qkv")),
        ("q_proj,v_proj", (), ("q_proj, k_proj and v_proj", "add k_proj, or use linear_qkv")),
        ("linear_qkv,up_proj", (), ("up_proj is a part of Megatron's linear_fc1", "add gate_proj")),
        ("linear_kqv", (), ("no linear layer linear_kqv", "did you mean linear_qkv?")),
        ("conv1", (), ("no linear layer conv1", "linear_qkv, linear_proj, linear_fc1, linear_fc2, output_layer")),
        ("embed_tokens", (), ("embed_tokens is not a linear layer",)),
        ("word_embeddings", (), ("word_embeddings is not a linear layer",)),
        ("router", (), ("router is not a linear layer",)),
        ("", (), ("no layer gets an adapter",)),
        ("linear_qkv,'*.layers.4.*.linear_qkv'", (), ("*.layers.4.*.linear_qkv matches no", "layers are 0 to 3")),
        ("'*.layers.1.*.q_proj'", (), ("*.layers.1.*.q_proj matches no", "decoder.layers.0.self_attention.linear_qkv")),
        ("'*.layers.0.*','*.layers.1.*'", PP2, ("stage 1 of 2 (layers 2-3) has no adapter", "pipeline_model_parallel")),
        ("output_layer", PP2, ("stage 0 of 2 (layers 0-1) has no adapter",)),
        (
            "'*.layers.0.*','*.layers.2.*'",
            (*PP2, "model.virtual_pipeline_model_parallel_size=2"),
            ("stage 1 of 2 (layers 1, 3) has no adapter",),
        ),
        (
            "all-linear",
            ("model.family=mixtral", "model.arch.extra={num_moe_experts: 4}"),
            ("linear_fc1 and linear_fc2: experts get no adapters", "use linear_qkv and linear_proj"),
        ),
        (
            "linear_qkv",
            ("trainer.devices=4", "model.tensor_model_parallel_size=4", "model.peft.lora.dim=6"),
            ("model.peft.lora.dim=6 is not divisible by model.tensor_model_parallel_size=4",),
        ),
    ],
)
def test_targets_that_mean_no_layer_are_refused(
    targets: str, overrides: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    config = run(targets, *overrides)
    experts = bool(config.model.arch.extra.get("num_moe_experts"))
    with pytest.raises(UserError) as error:
        check_targets(config, num_layers=config.model.arch.num_layers, experts=experts)
    for part in (*parts, "model.peft.lora."):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("targets", "overrides"),
    [
        ("'*.layers.3.*.linear_qkv','*.layers.0.*'", PP2),  # each stage has one of them
        ("'decoder.layers.*.linear_proj'", ()),
        ("'*.output_layer',linear_qkv", ()),
        ("'*.layers.0.*',output_layer", PP2),
    ],
)
def test_patterns_count_the_layers_of_the_whole_model(targets: str, overrides: tuple[str, ...]) -> None:
    check_targets(run(targets, *overrides), num_layers=4, experts=False)


def test_a_pattern_means_linear_layers_alone() -> None:
    names = linear_layers(12, experts=False)
    assert len(names) == 12 * 4 + 1
    assert adapted(["*.layers.1.*"], names) == [
        "decoder.layers.1.self_attention.linear_qkv",
        "decoder.layers.1.self_attention.linear_proj",
        "decoder.layers.1.mlp.linear_fc1",
        "decoder.layers.1.mlp.linear_fc2",
    ]
    assert adapted(["*"], names) == names
    assert adapted(["*.linear_fc1"], linear_layers(12, experts=True)) == []


def test_layers_are_dealt_to_stages_as_megatron_deals_them() -> None:
    interleaved = ("trainer.devices=2", "model.pipeline_model_parallel_size=2")
    eight = run("linear_qkv", *interleaved, "model.virtual_pipeline_model_parallel_size=2")
    assert layers_of_stages(eight, 8) == [{0, 1, 4, 5}, {2, 3, 6, 7}]
    ends = "{account_for_embedding_in_pipeline_split: true, account_for_loss_in_pipeline_split: true}"
    assert layers_of_stages(run("linear_qkv", *PP2, f"model.arch.extra={ends}"), 6) == [{0, 1, 2}, {3, 4, 5}]
    uneven = run("linear_qkv", *PP2, "model.arch.extra={num_layers_in_first_pipeline_stage: 1}")
    assert layers_of_stages(uneven, 4) == [{0}, {1, 2, 3}]
    laid_out = run("linear_qkv", *PP2, "model.arch.extra={pipeline_model_parallel_layout: Et|tttL}")
    assert layers_of_stages(laid_out, 4) is None


# ---------------------------------------------------------------------------------- checkpoints, made by hand


def checkpoint(folder: Path, *, base: Path | None = None, weights: float = 1.0, digest: str | None = None) -> Path:
    """A checkpoint of two tensors, the second with these weights; with ``base``, one of adapters for it."""
    tensors = {"module.norm": torch.ones(64), "module.linear": torch.full((64, 64), weights)}
    states = {"optimizer.state.exp_avg": torch.rand(64, 64)}  # no part of the model
    torch_checkpoint.save({**tensors, **states}, checkpoint_id=str(folder / "weights"), no_dist=True)
    if base is not None:
        record = {"model_ckpt_path": str(base)} | ({} if digest is None else {"model_digest": digest})
        (folder / "weights" / "adapter_metadata.json").write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize("scheme", ["none", "lora"])
def test_no_run_starts_from_adapters_alone(tmp_path: Path, scheme: str) -> None:
    checkpoint(tmp_path / "run" / "checkpoints" / "step=2-last", base=tmp_path / "base")
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "tokenizer").mkdir()
    files = [f"data.train_path={tmp_path}/train.jsonl", f"data.tokenizer={tmp_path}/tokenizer"]
    given = [*files, f"model.peft.scheme={scheme}"]
    for name in ("run", "run/checkpoints/step=2-last"):
        with pytest.raises(UserError, match=r"restore_from_path: .*holds only adapters .*export-hf .* import-hf"):
            check_run(compose("gpt_rao", [*given, f"model.restore_from_path={tmp_path / name}"]))


def test_rewards_are_not_compared_from_adapters_alone(tmp_path: Path) -> None:
    checkpoint(tmp_path / "adapters", base=checkpoint(tmp_path / "base"))
    paths = {"base": str(tmp_path / "base"), "sft": str(tmp_path / "adapters"), "out": str(tmp_path / "out")}
    with pytest.raises(UserError, match=r"--sft: .*holds only adapters"):
        plan(Asked(**paths, pairs=["all"], overrides=[], of_objective={}))


def test_a_chain_of_adapters_leads_to_the_base(tmp_path: Path) -> None:
    """As checkpoints have it that were written before resumed runs remembered their base."""
    whole = checkpoint(tmp_path / "base")
    run_folder = tmp_path / "run"
    first = checkpoint(run_folder / "checkpoints" / "step=2-last", base=whole)
    second = checkpoint(run_folder / "checkpoints" / "step=4-last", base=first / "weights")
    assert base_of_adapters(second, "CHECKPOINT") == whole
    for file in (first / "weights").iterdir():
        file.unlink()
    (first / "weights").rmdir()
    with pytest.raises(UserError, match=r"trained on .*step=2-last, which no longer exists. .*--base"):
        base_of_adapters(second, "CHECKPOINT")
    assert base_of_adapters(second, "CHECKPOINT", str(whole)) == whole
    (run_folder / "recipe.yaml").write_text(to_yaml(compose("gpt_sft", [f"model.restore_from_path={whole}"])))
    assert base_of_adapters(second, "CHECKPOINT") == whole


def test_adapters_that_are_each_others_base_are_refused(tmp_path: Path) -> None:
    one, other = tmp_path / "a" / "one", tmp_path / "b" / "other"
    checkpoint(one, base=other)
    checkpoint(other, base=one)
    with pytest.raises(UserError, match="Restore it, or name a copy"):
        base_of_adapters(one, "CHECKPOINT")


def test_adapters_go_with_the_weights_that_they_were_trained_on(tmp_path: Path) -> None:
    whole = checkpoint(tmp_path / "base")
    digest = digest_of_weights(whole / "weights")
    copy, other = checkpoint(tmp_path / "copy"), checkpoint(tmp_path / "other", weights=0.5)
    trained = checkpoint(tmp_path / "adapters", base=whole, digest=digest)
    assert base_on_resume(trained, copy, "run") == copy
    assert base_on_resume(trained, other, "run") == whole  # restore_from_path may name a run that has gone on since
    assert base_of_adapters(trained, "CHECKPOINT", str(copy)) == copy
    with pytest.raises(UserError, match=r"trained on .*base, and .*other has other weights"):
        base_of_adapters(trained, "CHECKPOINT", str(other))
    whole.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"run: .*trained on .*base, which no longer exists"):
        base_on_resume(trained, other, "run")
    assert base_on_resume(trained, tmp_path / "moved", "run") == tmp_path / "moved"


def test_a_copy_of_the_base_is_the_same_start(tmp_path: Path) -> None:
    whole, copy = checkpoint(tmp_path / "base"), checkpoint(tmp_path / "copy")
    other = checkpoint(tmp_path / "other", weights=0.5)
    folder, digest = tmp_path / "run", digest_of_weights(whole / "weights")
    checkpoint(folder / "checkpoints" / "step=2-last", base=whole, digest=digest)

    def started_from(path: Path) -> RunConfig:
        given = ("model.peft.scheme=lora", f"exp_manager.exp_dir={tmp_path}", "exp_manager.name=run")
        return compose("gpt_sft", [*given, f"model.restore_from_path={path}"])

    (folder / "recipe.yaml").write_text(to_yaml(started_from(whole)))
    write_run(folder, start_from=whole, max_steps=4, engine=NEMO)
    assert start_of(started_from(whole)) == whole
    assert start_of(started_from(copy)) == copy
    with pytest.raises(UserError, match=r"changes model.restore_from_path from .*base to .*other"):
        start_of(started_from(other))
