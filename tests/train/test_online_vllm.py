"""Sampling in a process of its own, up to the border: what a stand-in for vLLM's process is given, and what becomes of
its answers and of its end. Runs with vLLM itself are in tests/vllm."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nemo_rao.errors import UserError

from ..slow import slow_but
from .runs import FOUR_LAYERS, in_fork, make_data, parallel, run_training, start_checkpoint
from .test_online import ONLINE, rollout

# Instead of vLLM's python: keeps the weights that it is given, and draws tokens by the seeds that it is given.
STAND_IN = """
import json, random, shutil, sys
from pathlib import Path

if "-c" in sys.argv:
    sys.exit(0)  # was asked whether it has vLLM
FOLDER, DIES_AT = Path(__file__).parent, {dies_at}
begun = parts = 0
for line in sys.stdin:
    asked = json.loads(line)
    what, answer = asked["do"], {{}}
    if what == "start":
        shutil.copy(Path(asked["model"]) / "config.json", FOLDER)
        (FOLDER / "start.json").write_text(line)
    elif what == "begin":
        if begun == DIES_AT:
            print("out of memory", file=sys.stderr)
            sys.exit(3)
        parts, begun = 0, begun + 1
    elif what == "weights":
        (FOLDER / f"given{{begun}}").mkdir(exist_ok=True)
        shutil.copy(asked["path"], FOLDER / f"given{{begun}}" / f"{{parts}}.safetensors")
        parts += 1
    elif what == "sample":
        (FOLDER / f"sample{{begun}}.json").write_text(line)
        responses = []
        for index, seed in zip(asked["prompt_indices"], asked["seeds"], strict=True):
            draw = random.Random(seed)
            length = draw.randint(1, asked["settings"]["max_tokens"])
            tokens = [draw.randint(8, 99) for _ in range(length)]
            is_cut = length == asked["settings"]["max_tokens"]
            if not is_cut:
                tokens[-1] = asked["settings"]["stop_token_ids"][0]
            responses.append([tokens, [-0.5] * length, is_cut])
        answer = {{"responses": responses}}
    print(json.dumps(answer), flush=True)
"""


def stand_in(folder: Path, *, dies_at: int = -1) -> tuple[str, ...]:
    folder.mkdir()
    program = folder / "python"
    program.write_text(f"#!{sys.executable}\n" + STAND_IN.format(dies_at=dies_at))
    program.chmod(0o755)
    return "online.sampler=vllm", f"online.vllm_python={program}"


def start(folder: Path, *network: str) -> tuple[str, ...]:
    data = make_data(folder / "data")
    return (*network, *data, *ONLINE, f"model.restore_from_path={start_checkpoint(folder, [*network, *data])}")


def _exported(checkpoint: Path, folder: Path) -> None:
    from nemo_rao.cli import main

    assert main(["export-hf", str(checkpoint), str(folder)]) == 0


CASES = {
    "LoRA, norms of queries and keys, TP 2 x PP 2": (
        ("model.family=qwen3", "model.arch.extra.kv_channels=16"),
        (
            *parallel(2, 2, 1),
            "model.peft.scheme=lora",
            "model.peft.lora.dim=4",
            "model.optim.lr=1e-2",
        ),
    ),
    "tied embeddings, biases, TP 2 x DP 2": (
        ("model.family=qwen2", "model.arch.extra.share_embeddings_and_output_weights=true"),
        parallel(2, 1, 2),
    ),
}


@pytest.mark.parametrize("name", slow_but(list(CASES)[:1], CASES))
def test_it_is_given_what_an_export_has_and_its_samples_are_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    network, layout = CASES[name]
    monkeypatch.setattr("nemo_rao.rollout.vllm_sampler._PART_BYTES", 40_000)
    common = start(tmp_path, *FOUR_LAYERS, *network)
    other, folder = tmp_path / "other", tmp_path / "run"
    keys = [*common, *layout, *stand_in(other), f"exp_manager.exp_dir={tmp_path}", "exp_manager.name=run"]
    keys += ["model.grpo.beta=0.1", "online.vllm_importance_cap=1.5"]
    # A checkpoint of the second step, whose weights the third rollout is sampled with.
    kept = "exp_manager.checkpoint_callback_params."
    run_training("gpt_grpo", [*keys, "trainer.max_steps=3", f"{kept}every_n_train_steps=2", f"{kept}save_top_k=-1"])
    given = sorted((other / "given3").iterdir())
    assert len(given) > 1
    tensors = {name: tensor for file in given for name, tensor in load_file(file).items()}

    checkpoint = next((folder / "checkpoints").glob("step=2*"))
    in_fork(_exported, checkpoint, tmp_path / "exported")
    exported = {
        name: tensor
        for file in (tmp_path / "exported").glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    exported.setdefault("lm_head.weight", exported["model.embed_tokens.weight"])  # it is never tied
    assert tensors.keys() == exported.keys()
    for one, tensor in tensors.items():
        torch.testing.assert_close(tensor, exported[one], rtol=1e-6, atol=1e-6)
    described, same = (json.loads((folder / "config.json").read_text()) for folder in (other, tmp_path / "exported"))
    for config in (described, same):
        for key in ("torch_dtype", "dtype", "transformers_version", "tie_word_embeddings"):
            config.pop(key, None)
    assert described == same
    assert json.loads((other / "start.json").read_text())["max_model_len"] == 64

    asked = [json.loads((other / f"sample{number}.json").read_text()) for number in (1, 3)]
    assert not set(asked[0]["seeds"]) & set(asked[1]["seeds"]) and len(set(asked[1]["seeds"])) == 24
    found = rollout(folder, 2)
    assert (found["logps"] == -0.5).all() and (found["lengths"][found["is_cut"]] == 7).all()
    last = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if "rollout/" in line][-1]
    assert last["rollout/sampler_logps_max_diff"] == pytest.approx(np.abs(found["old_logps"] + 0.5).max())
    assert last["rollout/sampler_logps_mean_diff"] == pytest.approx(np.abs(found["old_logps"] + 0.5).mean())
    assert last["rollout/length"] == found["lengths"].mean()
    weights = np.minimum(np.exp(found["old_logps"] + 0.5), 1.5)
    assert last["rollout/importance"] == pytest.approx(weights.mean(), rel=1e-6)


def test_its_end_is_that_of_the_run_in_one_line(tmp_path: Path) -> None:
    common = start(tmp_path, *FOUR_LAYERS)
    keys = [*common, *stand_in(tmp_path / "other", dies_at=1), f"exp_manager.exp_dir={tmp_path}"]
    for number, layout in enumerate((parallel(1, 1, 1), parallel(1, 1, 2))):
        with pytest.raises(AssertionError) as failed:
            run_training("gpt_rloo", [*keys, *layout, f"exp_manager.name=run{number}"])
        last = str(failed.value).strip().splitlines()[-1]
        assert "online.sampler=vllm: the vLLM process ended with code 3 (out of memory). See its log," in last
        shutil.rmtree(tmp_path / f"run{number}")


def test_a_python_without_vllm_is_refused(tmp_path: Path) -> None:
    from nemo_rao.rollout.vllm_model import check_python

    with pytest.raises(UserError, match=r"online.vllm_python=.*: has no vLLM. Install it there"):
        check_python(sys.executable)
    with pytest.raises(UserError, match=r"online.vllm_python=/nowhere/python: no such program"):
        check_python("/nowhere/python")
    (tmp_path / "python").write_text("#!/nowhere\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(UserError, match=r"online.vllm_python=.*: does not run"):
        check_python(str(tmp_path / "python"))
