"""Optimizer steps of a model of Llama 3 8B's width and head on one GPU: time, FLOP/s, and peak memory against the plan.

    python -m benchmarks.gpu_steps steps             # RAO and SFT over the same rows, packed, in bf16
    python -m benchmarks.gpu_steps fp8               # RAO in bf16 and in each FP8 recipe of this GPU
    python -m benchmarks.gpu_steps prefix_sharing    # packed rows, and packed rows with shared prompts
    python -m benchmarks.gpu_steps steps --dry-run   # a toy model on the CPU, to test the command

The model has random weights and as many layers as fit by the planner's estimate. Each run is a separate process; all
import at the same time and then use the GPU one after the other. The result is written after each run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
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
RESERVE = 6 * GIB  # of the GPU's free memory, for what the planner does not count and the waiting runs' CUDA contexts
LARGER_BY = 1.05  # a run's peak may be larger than planned by this factor
FEWER_LAYERS = 0.75  # fraction of the layers that is tried after running out of memory


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes of the runs.

    Attributes:
        sizes: of the model; its number of layers is an upper limit.
        row, prompt: ``steps`` and ``fp8``: tokens of a row and of its prompt; two rows are a packed sequence.
        shared_prompt, shared_response: ``prefix_sharing``: tokens of a prompt and of each of its four responses.
        batch: prompts of a step.
        warm_up, measured: number of steps.
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
        name: its name in the result.
        recipe: a file of conf/.
        rows: stem of the data file.
        responses: responses of a prompt.
        overrides: in addition to those of all runs.
    """

    name: str
    recipe: str
    rows: str
    responses: int
    overrides: tuple[str, ...]


BF16 = ("precision=bf16_mixed",)
PACKED = ("data.packing=true",)
RAO = Run("rao, bf16", "gpt_rao", "pairs", 2, (*PACKED, *BF16))


def _steps(scale: Scale) -> list[Run]:
    # The same rows, each a prompt with one response; two of them are a micro-batch.
    batch = (f"model.global_batch_size={2 * scale.batch}", "model.micro_batch_size=2")
    return [RAO, Run("sft, bf16", "gpt_sft", "singles", 1, (*PACKED, *BF16, *batch))]


def _fp8(scale: Scale) -> list[Run]:
    import torch

    # On a CPU, the recipes of a Hopper are simulated.
    capability = torch.cuda.get_device_capability() if has_gpu() else (9, 0)
    simulated = () if transformer_engine_is_used() else ("precision.fp8_simulation=true",)
    recipes = [name for name, recipe in FP8_RECIPES.items() if recipe.runs_on(capability)]
    return [
        RAO,
        *(
            Run(f"rao, fp8 {name}", "gpt_rao", "pairs", 2, (*PACKED, f"precision=fp8_{name}", *simulated))
            for name in recipes
        ),
    ]


def _prefix_sharing(scale: Scale) -> list[Run]:
    length = -(-(scale.shared_prompt + 4 * scale.shared_response) // 64) * 64
    overrides = (*PACKED, *BF16, f"model.seq_length={length}")
    return [
        Run("packed", "gpt_rao", "shared", 4, overrides),
        Run("packed, shared prompts", "gpt_rao", "shared", 4, (*overrides, "data.prefix_sharing=true")),
    ]


# Group -> its runs, the baseline first.
GROUPS = {"steps": _steps, "fp8": _fp8, "prefix_sharing": _prefix_sharing}


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
    """Write the tokenizer and the data files, with twice as many prompts as a step has."""
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
    """The largest number of layers that fits into this GPU's memory by the planner's estimate, at least one."""
    if not has_gpu():
        return scale.sizes.layers
    import torch

    limit = torch.cuda.mem_get_info()[0] - RESERVE
    numbers = range(scale.sizes.layers, 1, -1)
    return next((n for n in numbers if LARGER_BY * peak(setting_of_run(run, scale, n, folder)) <= limit), 1)


# ---------------------------------------------------------------------------------------- in a run's process


def run_when_begun(turn: Turn) -> None:
    """Import, wait for the session to begin, and train; a failure is printed and reported to the session."""
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
    """A hook that records each step's work and metrics."""
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
    """Yield the figures so far after each run."""
    write_inputs(folder, scale, group)
    runs = GROUPS[group](scale)
    found: dict[str, Any] = {"layers": layers_that_fit(runs[0], scale, folder), "runs": {}}
    options: dict[str, Any] = {"steps": 1, "forked": not has_gpu(), "held": True}
    sessions = {run.name: Session(run_when_begun, (), **options) for run in runs}
    spare = Session(run_when_begun, (), **options) if has_gpu() else None  # for a first run that is out of memory
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
    """The figures of a run, or ``{"failed": ...}``."""
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
    middle = statistics.median(seconds)
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
    """Dense peak of this GPU in the weights' format; ``None`` on a CPU, or if it is not known."""
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
    command.add_argument("--dry-run", action="store_true", help="a toy model on the CPU")
    command.add_argument("--output", type=Path, help="JSON file; none by default")
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
