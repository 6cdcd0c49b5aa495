"""Optimizer steps of Llama 3 8B's width and head on one GPU: seconds, FLOPs, and peak memory beside the planner's.

    python -m benchmarks.gpu_steps steps             # RAO and SFT over the same rows, packed, in bf16
    python -m benchmarks.gpu_steps fp8               # RAO in bf16 and in each FP8 recipe of this GPU
    python -m benchmarks.gpu_steps prefix_sharing    # packed rows, and packed rows with shared prompts
    python -m benchmarks.gpu_steps steps --dry-run   # a toy on the CPU, which shows that the command works

The model has as many layers as the planner lets fit, and random weights. Runs are processes of their own that import at
the same time and then have the GPU one after the other; the result is written after each of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.inputs import ModelSizes, train_on_made_up_text, write_uniform_rows
from benchmarks.measure import environment
from benchmarks.results import GPU_PACKAGES
from benchmarks.sessions import RunFailed, Session, Turn, prepare_server
from benchmarks.training import ENDLESS, run_ours
from nemo_rao.config.compose import compose
from nemo_rao.config.gpu_models import FP8_RECIPES, gpu_of_device
from nemo_rao.planning.compute import Work, flops
from nemo_rao.planning.memory import peak
from nemo_rao.planning.plan import setting_of
from nemo_rao.planning.setting import Setting
from nemo_rao.runtime.files import write_atomically
from nemo_rao.runtime.gpus import has_gpu, transformer_engine_is_used

GIB = 2**30
RESERVE = 6 * GIB  # of the GPU's free memory: what the planner does not count, and contexts of the runs that wait
LARGER_BY = 1.05  # than planned, that a run's peak may be
FEWER_LAYERS = 0.75  # where it was larger still


@dataclasses.dataclass(frozen=True)
class Scale:
    """What is run.

    Attributes:
        sizes: of the model; of its layers, the most.
        row, prompt: tokens of a row of ``steps`` and ``fp8``, and of its prompt; two rows are a packed sequence.
        shared_prompt, shared_response: tokens, of ``prefix_sharing``, four responses each.
        batch: prompts of a step.
        warm_up, measured: steps.
    """

    sizes: ModelSizes
    row: int
    prompt: int
    shared_prompt: int
    shared_response: int
    batch: int
    warm_up: int
    measured: int


ON_GPU = Scale(ModelSizes(32, 4096, 14336, 32, 8, 128256), 2048, 512, 1024, 256, batch=8, warm_up=2, measured=4)
DRY = Scale(ModelSizes(3, 64, 128, 4, 2, 512), 64, 16, 32, 16, batch=2, warm_up=1, measured=1)


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a group.

    Attributes:
        name: in the result.
        recipe: of conf/.
        rows: which of the files it reads.
        responses: K.
        overrides: beyond those of all runs.
    """

    name: str
    recipe: str
    rows: str
    responses: int
    overrides: tuple[str, ...]


BF16 = ("precision=bf16_mixed",)
PACKED = ("data.packing=true",)
RAO = Run("rao, bf16", "gpt_rao", "pairs", 2, (*PACKED, *BF16))


def runs_of(group: str, scale: Scale) -> list[Run]:
    """The runs of a group, what the others are compared with first."""
    if group == "steps":
        # The same rows, each a prompt with one response; two of them are a micro-batch.
        batch = (f"model.global_batch_size={2 * scale.batch}", "model.micro_batch_size=2")
        return [RAO, Run("sft, bf16", "gpt_sft", "singles", 1, (*PACKED, *BF16, *batch))]
    if group == "fp8":
        made = [RAO]
        for recipe in _fp8_recipes():
            simulated = () if transformer_engine_is_used() else ("precision.fp8_simulation=true",)
            made.append(
                dataclasses.replace(RAO, name=f"rao, fp8 {recipe}", overrides=(*PACKED, *_fp8(recipe), *simulated))
            )
        return made
    assert group == "prefix_sharing", group
    length = -(-(scale.shared_prompt + 4 * scale.shared_response) // 64) * 64
    shared = Run("packed", "gpt_rao", "shared", 4, (*PACKED, *BF16, f"model.seq_length={length}"))
    together = dataclasses.replace(
        shared, name="packed, shared prompts", overrides=(*shared.overrides, "data.prefix_sharing=true")
    )
    return [shared, together]


GROUPS = ("steps", "fp8", "prefix_sharing")


def _fp8_recipes() -> list[str]:
    """Those that this GPU has; on a CPU, those that are simulated of a Hopper."""
    import torch

    capability = torch.cuda.get_device_capability() if has_gpu() else (9, 0)
    return [name for name, recipe in FP8_RECIPES.items() if recipe.runs_on(capability)]


def _fp8(recipe: str) -> tuple[str, ...]:
    return (f"precision=fp8_{recipe}",)


def overrides_of(run: Run, scale: Scale, layers: int, folder: Path) -> list[str]:
    sizes = dataclasses.replace(scale.sizes, layers=layers)
    return [
        *ENDLESS,
        *sizes.overrides,
        f"model.arch.extra={{vocab_size: {sizes.vocab}, init_method_std: 0.01}}",
        f"model.seq_length={scale.row}",
        "model.micro_batch_size=1",
        f"model.global_batch_size={scale.batch}",
        "model.allow_random_weights=true",
        f"data.train_path={folder}/{run.rows}.jsonl",
        f"data.tokenizer={folder}/tokenizer",
        f"trainer.accelerator={'gpu' if has_gpu() else 'cpu'}",
        f"exp_manager.exp_dir={folder}/runs/{run.name.replace(', ', '-').replace(' ', '_')}",
        *run.overrides,
    ]


def write_inputs(folder: Path, scale: Scale, group: str) -> None:
    """The tokenizer and the files of rows, of twice as many prompts as a step has."""
    tokenizer = folder / "tokenizer"
    train_on_made_up_text(tokenizer, min(4096, scale.sizes.vocab))
    number = 2 * scale.batch
    if group == "prefix_sharing":
        length = scale.shared_prompt + scale.shared_response
        sizes = {"num_prompts": number, "num_responses": 4, "length": length, "prompt": scale.shared_prompt}
        write_uniform_rows(folder / "shared.jsonl", tokenizer, **sizes)
        return
    sizes = {"num_prompts": number, "num_responses": 2, "length": scale.row, "prompt": scale.prompt}
    pairs = write_uniform_rows(folder / "pairs.jsonl", tokenizer, **sizes)
    records = [json.loads(line) for line in pairs.read_text().splitlines()]
    singles = [{**record, "responses": [answer]} for record in records for answer in record["responses"]]
    (folder / "singles.jsonl").write_text("".join(json.dumps(record) + "\n" for record in singles))


def setting_of_run(run: Run, scale: Scale, layers: int, folder: Path, tokens_per_row: int | None = None) -> Setting:
    config = compose(run.recipe, overrides_of(run, scale, layers, folder))
    return setting_of(config, responses=run.responses, tokens_per_row=tokens_per_row)


def layers_that_fit(run: Run, scale: Scale, folder: Path) -> int:
    """The most layers with which the planner lets the run fit into this GPU's memory, at least one."""
    if not has_gpu():
        return scale.sizes.layers
    import torch

    limit = torch.cuda.mem_get_info()[0] - RESERVE
    numbers = range(scale.sizes.layers, 1, -1)
    return next((n for n in numbers if LARGER_BY * peak(setting_of_run(run, scale, n, folder)) <= limit), 1)


# ---------------------------------------------------------------------------------------- in a run's process


def run_when_told(turn: Turn) -> None:
    """Import, wait, and train as told; a failure is one line for the session, and a traceback here."""
    import importlib

    from nemo_rao.config.engine_choice import installed_engine

    importlib.import_module(f"nemo_rao.engines.{installed_engine()}.engine").load()
    recipe, overrides = turn.hold()
    try:
        run_ours(turn, recipe, overrides, None, (counting_work,))
    except BaseException as error:
        traceback.print_exc()
        turn.fail(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
        raise


def counting_work(turn: Turn) -> Any:
    """A hook that notes what each step computed, and its metrics."""
    from nemo_rao.loop.session import Hook

    class CountWork(Hook):
        def before_step(self, session: Any) -> None:
            self.tokens = self.pairs = self.rows = 0

        def micro_batch(self, session: Any, batch: Any, *, embeds_tokens: bool) -> None:
            self.tokens += batch.num_tokens
            self.pairs += batch.num_attention_pairs
            self.rows += batch.num_row_tokens

        def after_step(self, session: Any) -> None:
            metrics = session.reported()
            wanted = {name: metrics[name] for name in ("loss", "perf/mfu", "perf/tflops_per_gpu") if name in metrics}
            turn.notes |= {"tokens": self.tokens, "pairs": self.pairs, "row_tokens": self.rows, "metrics": wanted}

    return CountWork()


# ---------------------------------------------------------------------------------------------------- figures


def measure(group: str, scale: Scale, folder: Path) -> Iterator[dict[str, Any]]:
    """The figures so far, once more after each run."""
    write_inputs(folder, scale, group)
    runs = runs_of(group, scale)
    found: dict[str, Any] = {"layers": layers_that_fit(runs[0], scale, folder), "runs": {}}
    options: dict[str, Any] = {"steps": 1, "forked": not has_gpu(), "held": True}
    sessions = {run.name: Session(run_when_told, (), **options) for run in runs}
    spare = Session(run_when_told, (), **options) if has_gpu() else None  # for a first run that does not fit
    try:
        for number, run in enumerate(runs):
            figures = measure_run(sessions[run.name], run, scale, found["layers"], folder)
            if number == 0 and spare is not None and "OutOfMemory" in figures.get("failed", ""):
                found["did_not_fit"] = {"layers": found["layers"], "failed": figures["failed"]}
                found["layers"] = max(1, int(FEWER_LAYERS * found["layers"]))
                figures = measure_run(spare, run, scale, found["layers"], folder)
            found["runs"][run.name] = figures
            print(f"{time.strftime('%X')} {run.name}: {shown(figures)}", flush=True)
            yield found
    finally:
        for session in [*sessions.values(), *([spare] if spare else [])]:
            session.stop()


def measure_run(session: Session, run: Run, scale: Scale, layers: int, folder: Path) -> dict[str, Any]:
    """Seconds of each step that counts, and what follows from them; or ``{"failed": ...}``."""
    try:
        session.begin((run.recipe, overrides_of(run, scale, layers, folder)))
        rounds = [session.round() for _ in range(scale.warm_up + scale.measured)]
    except RunFailed as error:
        return {"failed": str(error)}
    finally:
        session.stop()
    return figures_of(rounds, run, scale, layers, folder)


def figures_of(
    rounds: Sequence[Mapping[str, Any]], run: Run, scale: Scale, layers: int, folder: Path
) -> dict[str, Any]:
    counted = rounds[scale.warm_up :]
    seconds, notes = [one["seconds"] for one in counted], dict(rounds[-1]["notes"])
    middle = sorted(seconds)[len(seconds) // 2]
    batch = scale.batch * (2 if run.rows == "singles" else 1)
    tokens_per_row = -(-notes["row_tokens"] // (batch * run.responses))
    setting = setting_of_run(run, scale, layers, folder, tokens_per_row)
    work = flops(setting, Work(notes["tokens"], notes["pairs"]))
    planned = peak(setting)
    return {
        "seconds": seconds,
        "warm_up_seconds": [one["seconds"] for one in rounds[: scale.warm_up]],
        "samples_per_second": batch / middle,
        "tokens_per_second": notes["row_tokens"] / middle,
        "tflops": work.model / middle / 1e12,
        "mfu": None if (share := peak_tflops(setting)) is None else work.model / middle / 1e12 / share,
        "peak_bytes": rounds[-1]["peak_bytes"],
        "planned_bytes": planned,
        "peak_over_planned": rounds[-1]["peak_bytes"] / planned,
        "tokens_per_row": tokens_per_row,
        **notes,
    }


def peak_tflops(setting: Setting) -> float | None:
    """Of this GPU, in the format of the weights; ``None``: not known, or a CPU."""
    import torch

    gpu = gpu_of_device(torch.cuda.get_device_name()) if has_gpu() else None
    return None if gpu is None else gpu.peak_tflops(setting.param_bytes)


def shown(figures: Mapping[str, Any]) -> str:
    if "failed" in figures:
        return f"failed, {figures['failed']}"
    mfu = "" if figures["mfu"] is None else f", MFU {figures['mfu']:.1%}"
    rate, memory = figures["samples_per_second"], figures["peak_bytes"] / GIB
    return f"{rate:.2f} samples/s, {figures['tflops']:.3g} TFLOP/s{mfu}, {memory:.2f} GiB"


def main() -> int:
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("group", choices=GROUPS)
    command.add_argument("--dry-run", action="store_true", help="a toy on the CPU")
    command.add_argument("--output", type=Path, help="JSON file; the default is not to write one")
    arguments = command.parse_args()
    scale = DRY if arguments.dry_run else ON_GPU
    prepare_server()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for found in measure(arguments.group, scale, Path(folder)):
            if arguments.output is not None:
                report = {**environment(GPU_PACKAGES), "scale": dataclasses.asdict(scale), **found}
                write_atomically(arguments.output, json.dumps(report, indent=2) + "\n")
    return 1 if any("failed" in figures for figures in found["runs"].values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
