"""Five steps of each objective and online recipe from weights that both engines can create.

Results of NeMo's engine are kept in a file.

    PYTHONPATH=. python -m tests.bridge.five_steps [FILE]   with NeMo installed: writes FILE, or else nemo_steps.json

The weights are drawn from the hash of each parameter's name; data and tokenizer are generated from seeds. The file
includes their fingerprint, so that a difference in the data is not mistaken for one between the engines.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from nemo_rao.loop.session import Hook, Session

from ..train import test_online
from ..train.runs import NO_CHECKPOINTS, OF_DATA, TINY, make_data, run_training, steps
from .nemo_results import write_results

RECORDED = Path(__file__).with_name("nemo_steps.json")
NUM_STEPS = 5
KEYS = {"kto": ("threshold=0.6",), "dro": ("value_lr=0.05",)}
ONLINE = {recipe: (*test_online.ONLINE, *keys) for recipe, keys in test_online.RECIPES}
# A schedule with all its parts, and every number of the optimizer other than its default.
OVERRIDES = (
    *TINY,
    *NO_CHECKPOINTS,
    "trainer.max_epochs=null",
    f"trainer.max_steps={NUM_STEPS}",
    "trainer.gradient_clip_val=0.5",
    "model.global_batch_size=8",
    "model.micro_batch_size=2",
    "model.optim.weight_decay=0.1",
    "model.optim.betas=[0.8,0.9]",
    "model.optim.eps=1e-6",
    "model.optim.sched.name=cosine",
    "model.optim.sched.warmup_steps=2",
    "model.optim.sched.min_lr=1e-4",
)


class WeightsByName(Hook):
    """Before anything else, weights that depend on their names alone. For one rank, in fp32."""

    def start(self, session: Session) -> None:
        import torch

        from nemo_rao.mcore.forward import unwrapped

        for chunk in session.chunks:
            for name, parameter in unwrapped(chunk).named_parameters():
                if "head" in name or name.endswith(("layernorm.weight", "layer_norm_weight")):
                    continue  # these start alike on both
                seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
                drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                parameter.data.copy_(0.05 * drawn)


def weights_first(hooks: list[Hook]) -> list[Hook]:
    return [WeightsByName(), *hooks]


def run(name: str, folder: Path, data: tuple[str, ...], *extra: str) -> list[dict[str, float]]:
    """The steps of a run, as ``metrics.jsonl`` has them.

    Args:
        name: an objective that trains on data, or an online recipe, which needs a checkpoint to start from.
        extra: further overrides. Unless they name a checkpoint, the first weights are those that depend on their names.
    """
    recipe, own = "gpt_rao", (f"model.objective={name}", *(f"model.{name}.{key}" for key in KEYS.get(name, ())))
    if name in ONLINE:
        recipe, own = name, ONLINE[name]
    given = [*OVERRIDES, *data, *own, f"exp_manager.exp_dir={folder}", f"exp_manager.name={name}", *extra]
    is_new = not any(override.startswith("model.restore_from_path=") for override in extra)
    run_training(recipe, given, **({"hooks": weights_first} if is_new else {}))
    return steps(folder / name)


def start_of_online(folder: Path, data: tuple[str, ...]) -> str:
    """A fine-tuned checkpoint, as an override."""
    run("sft", folder / "start", data, "exp_manager.checkpoint_callback_params.save_last=true")
    return f"model.restore_from_path={folder / 'start' / 'sft'}"


def fingerprint(folder: Path, name: str) -> str:
    """Of what a run was trained on."""
    return str(json.loads((folder / name / "data.json").read_text())["training"]["contents"])


def every_run() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        data = make_data(folder / "data")
        found = {name: run(name, folder, data) for name in OF_DATA}
        start = start_of_online(folder, data)
        found |= {name: run(name, folder, data, start) for name in ONLINE}
        return {"data": {name: fingerprint(folder, name) for name in found}, "steps": found}


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"], os.environ["OMP_NUM_THREADS"] = "false", "1"
    write_results(every_run(), RECORDED)
