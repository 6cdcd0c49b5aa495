"""Peak memory of training steps compared with ``nemo-rao plan``, for your own recipe, model and data.

python -m benchmarks.memory --config-dir IMPORTED --config-name gpt_rao model=imported data.train_path=FILE ...

IMPORTED is a directory written by `nemo-rao import-hf`. Each batch layout runs two steps on one rank in a separate
process. The plan is computed for the largest micro-batch of the run, as planning does not know the lengths of rows.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from collections.abc import Sequence
from typing import Any

from benchmarks.results import parser, write_result
from benchmarks.training import ENDLESS
from nemo_rao.config.gpu_models import GIB

LAYOUTS = {"rows": (), "packed": ("data.packing=true",), "shared": ("data.packing=true", "data.prefix_sharing=true")}


def run(recipe: str, config_dir: str | None, overrides: Sequence[str], threads: int, connection: Any) -> None:
    """In a separate process: train, then send the peak and the plan's figures, in bytes."""
    import torch

    from nemo_rao.config.compose import compose
    from nemo_rao.config.derived import run_dir
    from nemo_rao.loop.session import Hook
    from nemo_rao.planning.memory import stage_memory
    from nemo_rao.planning.plan import setting_of
    from nemo_rao.training.checks import check_run
    from nemo_rao.training.train import train

    class LargestMicroBatch(Hook):
        tokens = 0

        def micro_batch(self, session: Any, batch: Any, *, embeds_tokens: bool) -> None:
            self.tokens = max(self.tokens, batch.tokens.numel())

    largest = LargestMicroBatch()
    config = compose(recipe, [f"trainer.threads_per_rank={threads}", *overrides], config_dir)
    if config.data.num_prompts is None:  # the reference pass needs only the rows of the steps
        config.data.num_prompts = (config.trainer.max_steps or 1) * config.model.global_batch_size
    check_run(config)
    train(config, hooks=lambda hooks: [*hooks, largest])
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        config.trainer.accelerator = "cpu"
    setting = setting_of(config)
    per_row = -(-largest.tokens // setting.rows)
    planned = stage_memory(setting_of(config, tokens_per_row=per_row), 0)
    [peak] = json.loads((run_dir(config) / "memory.json").read_text())["peak_bytes_by_rank"]
    connection.send(
        {
            "micro_batch_tokens": largest.tokens,
            "rows": setting.rows,
            "planned_bytes": planned.total,
            "planned": vars(planned),
            "peak_bytes": peak,
            "peak_over_planned": peak / planned.total,
        }
    )


def measure(recipe: str, config_dir: str | None, overrides: Sequence[str], threads: int) -> dict[str, Any]:
    context: Any = multiprocessing.get_context("spawn")  # a fork would count the memory of this process's imports
    ours, theirs = context.Pipe()
    process = context.Process(target=run, args=(recipe, config_dir, overrides, threads, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        process.join()
        raise SystemExit(f"the run ended with exit code {process.exitcode}") from None
    finally:
        process.join()


def main() -> None:
    made = parser(__doc__, repeats=1)
    made.add_argument("--config-name", default="gpt_rao", help="recipe (default: %(default)s)")
    made.add_argument("--config-dir", help="folder of your own recipes")
    made.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    made.add_argument("--steps", type=int, default=2)
    made.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = made.parse_intermixed_args()
    found: dict[str, Any] = {}
    print(f"{'layout':<10}{'tokens':>8}{'plan, GiB':>12}{'peak, GiB':>12}{'peak / plan':>14}")
    for layout in arguments.layouts:
        with tempfile.TemporaryDirectory() as folder:
            own = [*ENDLESS, f"trainer.max_steps={arguments.steps}", f"exp_manager.exp_dir={folder}"]
            given = [*own, *LAYOUTS[layout], *arguments.overrides]
            one = measure(arguments.config_name, arguments.config_dir, given, arguments.threads)
        found[layout] = one
        print(
            f"{layout:<10}{one['micro_batch_tokens']:>8,}{one['planned_bytes'] / GIB:>12.2f}"
            f"{one['peak_bytes'] / GIB:>12.2f}{one['peak_over_planned']:>14.2f}",
            flush=True,
        )
    # Paths are private.
    shown = {"config_dir": None, "overrides": [key for key in arguments.overrides if "/" not in key]}
    write_result("memory", arguments, {"layouts": found}, shown=shown)


if __name__ == "__main__":
    main()
