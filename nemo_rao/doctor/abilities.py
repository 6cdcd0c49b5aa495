"""Derive from facts which features work here, which do not, and why."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_rao.config.gpu_models import FP8_RECIPES, NO_END
from nemo_rao.doctor.packages import ENGINES
from nemo_rao.doctor.probes import Probe

NO_ENGINE = (
    "neither NeMo's LLM collection (nemo_toolkit 2.x) nor Megatron-Bridge is installed. Run make install, or use "
    "NVIDIA's container"
)


def decisive(engine: str | None) -> tuple[str, ...]:
    """Return the packages whose version must be suitable for any training. For others, a version out of range is only
    reported."""
    return ("torch", "megatron-core", *([ENGINES[engine][1]] if engine else []))


@dataclass(frozen=True)
class Ability:
    """
    Attributes:
        what: name of the feature.
        works: whether it works here.
        why: what it runs on, or what is missing, with a remedy if there is one.
    """

    what: str
    works: bool
    why: str


@dataclass(frozen=True)
class Facts:
    """The facts from which abilities are derived.

    Attributes:
        probes: imports that were tried, by name.
        unmet: unmet requirements of the plugin, by package.
        other_apex: whether the package named apex is not NVIDIA's.
        programs: program -> its path, or ``None``.
        engine: the engine that ``trainer.engine=auto`` selects, or ``None``.
    """

    probes: Mapping[str, Probe]
    unmet: Mapping[str, str]
    other_apex: bool
    programs: Mapping[str, str | None]
    engine: str | None

    @property
    def torch(self) -> Mapping[str, Any]:
        return self.probes["torch"].facts

    @property
    def gpus(self) -> Sequence[Mapping[str, Any]]:
        return self.torch.get("gpus", [])


PROGRAMS = ("sbatch", "srun", "nvidia-smi")


def programs() -> dict[str, str | None]:
    return {name: shutil.which(name) for name in PROGRAMS}


def no_training(facts: Facts) -> str | None:
    """Return why nothing can be trained here, on any device; ``None`` if training works."""
    if facts.engine is None:
        return NO_ENGINE
    for name in (*decisive(facts.engine), "training"):
        tried = facts.probes.get(name)
        if tried is not None and not tried.works:
            subject = "what a run imports" if name == "training" else name
            return f"{subject}: {tried.error}"
    return next((facts.unmet[name] for name in decisive(facts.engine) if name in facts.unmet), None)


def no_gpu(facts: Facts) -> str | None:
    """Return why GPUs cannot be used; ``None`` if all can."""
    if not facts.torch:
        return "torch cannot be imported"
    if not facts.gpus:
        return facts.torch["no_gpu"] or "torch finds no GPU"
    return next((f"GPU {index}: {gpu['error']}" for index, gpu in enumerate(facts.gpus) if gpu["error"]), None)


def abilities(facts: Facts) -> list[Ability]:
    return [
        *_training(facts),
        *_ranks(facts),
        *_with_transformer_engine(facts),
        *_other_commands(facts),
    ]


def _training(facts: Facts) -> Iterator[Ability]:
    broken, missing = no_training(facts), no_gpu(facts)
    yield Ability("training on the CPU", broken is None, broken or "small models, Megatron over gloo")
    on_gpus = f"{len(facts.gpus)} x {facts.gpus[0]['name']}" if facts.gpus else ""
    yield Ability("training on GPUs", broken is None and missing is None, broken or missing or on_gpus)
    if facts.gpus:
        least = _capabilities(facts)[0]
        enough = least >= (8, 0)
        yield Ability("bf16 on GPUs", enough, "" if enough else f"from sm_80; here {_sm(least)}")


def _ranks(facts: Facts) -> Iterator[Ability]:
    gloo, nccl = bool(facts.torch.get("gloo")), facts.torch.get("nccl")
    yield Ability("several ranks on CPUs", gloo, "gloo" if gloo else "torch is built without gloo")
    yield Ability("several ranks on GPUs", nccl is not None, f"NCCL {nccl}" if nccl else "torch is built without NCCL")
    absent = [name for name in ("sbatch", "srun") if facts.programs[name] is None]
    yield Ability(
        "jobs on SLURM (launch)",
        not absent,
        f"{' and '.join(absent)} not found; use a machine with SLURM" if absent else "sbatch, srun",
    )


def _with_transformer_engine(facts: Facts) -> Iterator[Ability]:
    engine, apex = facts.probes["transformer-engine"], facts.probes["apex"]
    unused = "Transformer Engine is not used without a GPU" if engine.installed and not facts.gpus else ""
    if not facts.gpus:
        yield Ability("fused optimizer", False, f"{unused or 'needs a GPU'}; torch's Adam is used instead")
    elif engine.works or (apex.works and not facts.other_apex):
        yield Ability("fused optimizer", True, "Transformer Engine's" if engine.works else "apex's")
    else:
        reason = f"Transformer Engine {engine.error}, apex {_apex_error(facts)}"
        yield Ability("fused optimizer", False, f"{reason}; torch's Adam is used instead")
    if engine.installed and facts.gpus:
        why = "by PyTorch's FlexAttention" if engine.works else f"Transformer Engine {engine.error}"
        yield Ability("prefix sharing", engine.works, why)
    else:
        yield Ability("prefix sharing", True, unused)
    missing = no_gpu(facts) or (None if engine.works else f"Transformer Engine {engine.error}")
    for name, recipe in FP8_RECIPES.items():
        lacking = [one for one in _capabilities(facts) if not recipe.runs_on(one)]
        if missing is None and lacking:
            upper = "" if recipe.below == NO_END else f" to before {_sm(recipe.below)}"
            yield Ability(f"FP8, {name}", False, f"from {_sm(recipe.lowest)}{upper}; here {_sm(lacking[0])}")
        else:
            yield Ability(f"FP8, {name}", missing is None, missing or recipe.scales)


def _apex_error(facts: Facts) -> str | None:
    if facts.other_apex:
        return "is a different package of this name, not NVIDIA's, which its containers include"
    return facts.probes["apex"].error


def _other_commands(facts: Facts) -> Iterator[Ability]:
    broken, models = no_training(facts), facts.probes["transformers"]
    transformers = None if models.works else f"transformers {models.error}"
    yield Ability("import-hf, export-hf", broken is None and models.works, broken or transformers or "safetensors")
    yield Ability("generate, local judge", models.works, transformers or "engine transformers")
    for what, name, remedy in (
        ("engine vllm", "vllm", "; the engine transformers does without"),
        ("evaluate: lm-eval's tasks", "lm-eval", "; pip install 'nemo-rao[eval]'"),
        ("NeMo-Run: nemo rao train", "nemo-run", "; comes with the engine NeMo"),
        ("Weights & Biases", "wandb", ""),
    ):
        tried = facts.probes[name]
        yield Ability(what, tried.works, "" if tried.works else f"{name} {tried.error}{remedy}")


def _capabilities(facts: Facts) -> list[tuple[int, int]]:
    """Return the GPUs' compute capabilities, lowest first: a run uses all GPUs."""
    return sorted({(gpu["capability"][0], gpu["capability"][1]) for gpu in facts.gpus})


def _sm(capability: tuple[int, int]) -> str:
    return f"sm_{capability[0]}{capability[1]}"
