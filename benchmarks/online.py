"""Improvement of each online recipe: the ground-truth reward of samples on held-out prompts, before and after.

    python -m benchmarks.online

The model of `nemo-rao demo` is fine-tuned as in the demo and then trained with each recipe and several seeds, on
tensor- and pipeline-parallel ranks. Responses to held-out prompts are sampled before the first step and after the last
(``val/reward``), with the same draws. A control with random rewards shows how training by itself changes the
ground-truth reward.

The same command resumes: finished runs are not repeated (``--folder``).
"""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import parser, write_result
from nemo_rao.study.statistics import mean

GENERATIONS = 8
TRUTH = "nemo_rao.demo.synthetic:ground_truth_reward"

COMMON = (
    "model=demo_llama",
    "trainer.devices=4",
    "model.tensor_model_parallel_size=2",
    "model.pipeline_model_parallel_size=2",
    "trainer.threads_per_rank=1",
    "trainer.max_epochs=null",
    "trainer.enable_progress_bar=false",
    "exp_manager.draw_curves=false",
)
SFT = (
    "trainer.max_steps=200",
    "model.global_batch_size=48",
    "model.micro_batch_size=24",
    "model.optim.lr=2e-3",
    "model.optim.sched.warmup_steps=10",
    "model.sft.prompt_weight=1",
)
ONLINE = (
    f"online.num_generations={GENERATIONS}",
    "online.max_new_tokens=24",
    "online.rows_at_once=512",
    f"online.validation_generations={GENERATIONS}",
    "model.global_batch_size=64",
    "model.micro_batch_size=32",
    "model.optim.lr=1e-3",
    "model.optim.sched.warmup_steps=5",
)
LOOK = ("trainer.max_steps=1", "model.optim.lr=1e-12", "model.optim.sched.warmup_steps=0")
# Keys of each recipe, chosen by trial on another seed; all recipes take the same number of optimizer steps.
RECIPES: Mapping[str, Sequence[str]] = {
    "gpt_rloo": ("model.rloo.beta=0.01",),
    "gpt_grpo": ("model.grpo.beta=0.01",),
    "gpt_ppo": (),
    "gpt_rpo_online": ("model.rpo.distance=sqloo", "model.rpo.beta=0.05", "model.rpo.sft_weight=0"),
    "gpt_rao_online": ("model.rao.beta=0.05",),
}
CONTROL = "gpt_rloo, random rewards"


NOISE = random.Random(0)


def random_reward(prompt: str | Sequence[Mapping[str, Any]], response: str) -> float:
    """A random number in [0, 1). It does not depend on the text, since a policy could learn a function of it."""
    return NOISE.random()


def main() -> None:
    arguments_of = parser(__doc__, repeats=1)
    arguments_of.add_argument("--steps", type=int, default=100)
    arguments_of.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    arguments_of.add_argument("--recipes", nargs="+", choices=[*RECIPES, CONTROL], default=[*RECIPES, CONTROL])
    arguments_of.add_argument("--folder", type=Path, default=Path("runs/benchmarks_online"), help="of the runs")
    arguments = arguments_of.parse_args()
    folder = arguments.folder.resolve()
    start = make_start(folder)
    runs: dict[str, list[dict[str, Any]]] = {}
    for seed in arguments.seeds:  # seed by seed, so that all recipes have some result early
        for name in arguments.recipes:
            runs.setdefault(name, []).append(run(folder, start, name, seed, arguments.steps))
            print(f"{name}, seed {seed}: {shown(runs[name][-1])}", flush=True)
    write_result("online", arguments, {"runs": runs}, shown={"folder": None})


def make_start(folder: Path) -> Path:
    """The demo's data and its fine-tuned model."""
    from nemo_rao.demo.run import make_data

    make_data(folder / "data")
    train("gpt_sft", folder, "sft", SFT)
    return folder / "sft"


def run(folder: Path, start: Path, name: str, seed: int, steps: int) -> dict[str, Any]:
    """Held-out reward, length and KL before and after."""
    is_control = name == CONTROL
    recipe = name.partition(",")[0]
    of_run = f"{recipe}{'_control' if is_control else ''}-{steps}-{seed}"
    length = (f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}")
    rule = f"benchmarks.online:{random_reward.__name__}" if is_control else TRUTH
    train_online(recipe, folder, of_run, start, seed, rule, length)
    before, after = validations(folder / of_run)
    if is_control:  # its validations would use random rewards
        for of, weights, name_of in ((before, start, "start"), (after, folder / of_run, of_run)):
            looked = f"{name_of}-looked_at-{seed}"
            train_online(recipe, folder, looked, weights, seed, TRUTH, LOOK)
            of["reward"] = validations(folder / looked)[0]["reward"]
    return {"seed": seed, "before": before, "after": after}


def train_online(recipe: str, folder: Path, name: str, start: Path, seed: int, rule: str, more: Sequence[str]) -> None:
    """Train from the weights of another run."""
    overrides = (
        *ONLINE,
        *RECIPES[recipe],
        f"model.restore_from_path={start}",
        f"data.validation_path={folder / 'data' / 'held_out.jsonl'}",
        f"online.reward=[rule:{rule}]",
        f"online.seed={seed}",
        f"data.seed={seed}",
    )
    train(recipe, folder, name, (*overrides, *more))


def validations(run: Path) -> tuple[dict[str, float], dict[str, float]]:
    """The first and the last validation of a run."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = [record for record in records if "val/reward" in record]
    names = ("reward", "length", "cut", "entropy", "kl")
    before, after = ({name: of[f"val/{name}"] for name in names} for of in (first, last))
    return before, after


def train(recipe: str, folder: Path, name: str, overrides: Sequence[str]) -> None:
    """``nemo-rao train``, which resumes an interrupted run and leaves a finished one unchanged."""
    data = folder / "data"
    where = (f"data.train_path={data / 'train.jsonl'}", f"data.tokenizer={data / 'tokenizer'}")
    words = [
        "train",
        "--config-name",
        recipe,
        *COMMON,
        *where,
        f"exp_manager.exp_dir={folder}",
        f"exp_manager.name={name}",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.log", "w") as log:
        subprocess.run([sys.executable, "-m", "nemo_rao", *words, *overrides], check=True, stdout=log, stderr=log)


def rise(runs: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Mean over seeds of the rise in reward, and half of its 95 % interval, infinite for one seed."""
    found = mean([one["after"]["reward"] - one["before"]["reward"] for one in runs])
    return found.value, math.inf if math.isnan(found.half_width) else found.half_width


def shown(one: Mapping[str, Any]) -> str:
    before, after = one["before"], one["after"]
    return f"{before['reward']:.4f} -> {after['reward']:.4f}, KL {after['kl']:.2f}, {after['length']:.1f} tokens"


if __name__ == "__main__":
    main()
