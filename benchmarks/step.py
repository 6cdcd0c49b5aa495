"""Time and peak memory of an optimizer step: nemo_rao by layout, TRL's DPOTrainer, and SFT over the same rows.

    python -m benchmarks.step                                    # some minutes on two cores
    python -m benchmarks.step --data prefs.jsonl --responses 4   # rows of a file; without TRL, which needs pairs

All variants start from the same weights and use the same prompts in the same order, with the same number of threads and
the same precision (fp32 on a CPU, bf16 on a GPU). Each runs in a separate process; they take turns, one round each. All
rounds use the same prompts: the file repeats them eight times, so that an epoch has more than one or two steps. Time is
measured from the start of one step to the start of the next: reading and laying out the batch, forward, backward,
optimizer, metrics. Start-up is not included, nor is nemo_rao's reference pass, which runs once and is reported
separately. Memory is the process's peak above the memory in use before it reads data and model.

    trl_dpo                   TRL's defaults: gradient checkpointing; the reference policy runs in every step
    trl_dpo, no checkpointing
    trl_dpo, precomputed      precompute_ref_log_probs=True, with and without checkpointing
    rao, dpo                  nemo_rao: rows, or packed, or with shared prompts, or both
    sft                       nemo_rao, over the same rows as RAO with the same K: each row is a prompt with one
                              response, a step has K times as many prompts, and the loss is on the responses
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.inputs import Inputs, ModelSizes, make_inputs
from benchmarks.measure import paired_ratio
from benchmarks.results import parser, summary, write_result
from benchmarks.sessions import Session, in_child, in_turn, prepare_server
from benchmarks.training import ENDLESS, import_model, run_ours
from benchmarks.trl_dpo import run_trl

TRL: Mapping[str, Mapping[str, bool]] = {
    "trl_dpo": {},
    "trl_dpo, no checkpointing": {"gradient_checkpointing": False},
    "trl_dpo, precomputed": {"precompute_ref_log_probs": True},
    "trl_dpo, precomputed, no checkpointing": {"precompute_ref_log_probs": True, "gradient_checkpointing": False},
}
ROUNDS_OF_AN_EPOCH = 8
LAYOUTS: Mapping[str, Sequence[str]] = {
    "rows": (),
    "packed": ("data.packing=true",),
    "shared": ("data.prefix_sharing=true",),
    "packed+shared": ("data.packing=true", "data.prefix_sharing=true"),
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A variant of nemo_rao.

    Attributes:
        objective: rao, dpo or sft.
        layout: of :data:`LAYOUTS`.
        responses: K.
    """

    objective: str
    layout: str
    responses: int

    @property
    def name(self) -> str:
        return f"{self.objective}, {self.layout}, K={self.responses}"

    def overrides(self, inputs: Inputs, arguments: argparse.Namespace) -> list[str]:
        sft = self.objective == "sft"
        batch = arguments.batch * (self.responses if sft else 1)
        data = (inputs.single_rows if sft else inputs.preferences)[self.responses]
        folder = inputs.folder / "ours" / self.name.replace(", ", "-").replace("=", "")
        return [
            *ENDLESS,
            *LAYOUTS[self.layout],
            "model=imported",
            f"precision={'bf16_mixed' if torch.cuda.is_available() else 'fp32'}",
            f"data.train_path={data}",
            f"data.tokenizer={inputs.tokenizer}",
            f"model.seq_length={arguments.max_length}",
            f"model.global_batch_size={batch}",
            f"model.micro_batch_size={batch // arguments.micro_batches}",
            f"trainer.threads_per_rank={arguments.threads}",
            f"exp_manager.exp_dir={folder}",
        ]


def variants(responses: Sequence[int]) -> list[Variant]:
    made = [Variant("rao", layout, number) for number in responses for layout in LAYOUTS]
    made += [Variant("sft", layout, number) for number in responses for layout in ("rows", "packed")]
    if 2 in responses:
        made += [Variant("dpo", layout, 2) for layout in ("rows", "packed+shared")]
    return made


def main() -> None:
    arguments_of = parser(__doc__, repeats=5)
    arguments_of.add_argument("--name", default="step", help="of the result")
    arguments_of.add_argument("--data", help="preference file; default: generated rows")
    arguments_of.add_argument("--data-name", help="description of the data in the result; default: the file's name")
    arguments_of.add_argument("--responses", type=int, nargs="+", default=[2, 4], help="K")
    arguments_of.add_argument("--prompts", type=int, default=8, help="of a round")
    arguments_of.add_argument("--batch", type=int, default=8, help="prompts of a step")
    arguments_of.add_argument("--micro-batches", type=int, default=1, help="of a step; TRL's is one")
    arguments_of.add_argument("--max-length", type=int, default=512, help="tokens; longer rows are left out")
    for field in dataclasses.fields(ModelSizes):
        arguments_of.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    arguments_of.add_argument("--minutes", type=float, default=8.0, help="after this time, no further round starts")
    arguments_of.add_argument("--only", nargs="+", help="run only variants whose names contain one of these")
    arguments = arguments_of.parse_args()
    assert arguments.prompts % arguments.batch == 0, "a round is whole batches"

    prepare_server()
    with tempfile.TemporaryDirectory() as folder:
        sizes = ModelSizes(**{field.name: vars(arguments)[field.name] for field in dataclasses.fields(ModelSizes)})
        inputs = make_inputs(
            Path(folder),
            sizes,
            data=arguments.data,
            num_prompts=arguments.prompts,
            numbers_of_responses=arguments.responses,
            max_length=arguments.max_length,
            copies=ROUNDS_OF_AN_EPOCH,
        )
        in_child(import_model, inputs.source, inputs.imported)
        sessions = start(inputs, arguments)
        rounds = in_turn(sessions, repeats=arguments.repeats, minutes=arguments.minutes)
    figures = {name: figures_of(of_name, arguments.prompts) for name, of_name in rounds.items()}
    ratios = compare(rounds)
    show(figures, ratios)
    write_result(
        arguments.name,
        arguments,
        {"lengths": inputs.lengths, "variants": figures, "ratios": ratios},
        shown={"data": arguments.data_name or (Path(arguments.data).name if arguments.data else None)},
    )


def start(inputs: Inputs, arguments: argparse.Namespace) -> dict[str, Session]:
    steps = arguments.prompts // arguments.batch
    sessions: dict[str, Session] = {}
    for variant in variants(arguments.responses):
        if wanted(variant.name, arguments):
            args = (f"gpt_{variant.objective}", variant.overrides(inputs, arguments), str(inputs.imported))
            sessions[variant.name] = Session(run_ours, args, steps=steps, forked=True)
            print(f"{time.strftime('%X')} {variant.name}", flush=True)
    for name, keys in TRL.items():
        if 2 in arguments.responses and wanted(name, arguments):
            given = (inputs.source, inputs.pairs, inputs.folder / "trl", arguments.threads, arguments.batch)
            sessions[name] = Session(run_trl, (*given, arguments.max_length, keys), steps=steps, forked=False)
            print(f"{time.strftime('%X')} {name}", flush=True)
    return sessions


def wanted(name: str, arguments: argparse.Namespace) -> bool:
    return arguments.only is None or any(part in name for part in arguments.only)


# ---------------------------------------------------------------------------------------------- figures


def figures_of(rounds: Sequence[Mapping[str, Any]], prompts: int) -> dict[str, Any]:
    """Seconds of a round, and of the reference pass over its prompts once; a sample is a prompt with all its
    responses."""
    seconds = [one["seconds"] for one in rounds]
    notes = dict(rounds[-1]["notes"])
    if "reference_seconds" in notes:
        notes["reference_seconds"] /= ROUNDS_OF_AN_EPOCH
    return {
        "seconds": seconds,
        "samples_per_second": {"max": prompts / min(seconds), "median": prompts / summary(seconds)["median"]},
        "cpu_seconds": summary([one["cpu_seconds"] for one in rounds]),
        "peak_bytes": rounds[-1]["peak_bytes"],
        **notes,
    }


def compare(rounds: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    """Name of a comparison -> median ratio of times of the same rounds, ratio of their minima, and median ratio of CPU
    times.

    CPU time of all threads remains comparable if other processes use the same cores. Its minimum does not: a single
    round in which the others pause determines it.
    """
    seconds = {name: [one["seconds"] for one in of_name] for name, of_name in rounds.items()}
    cpu_seconds = {name: [one["cpu_seconds"] for one in of_name] for name, of_name in rounds.items()}
    pairs: list[tuple[str, str]] = []
    for name in seconds:
        objective, *layout = name.split(", ")
        if objective == "rao":
            for baseline in (f"sft, {layout[0]}, {layout[1]}", f"rao, rows, {layout[1]}"):
                pairs.append((name, baseline))
        if objective in ("rao", "dpo") and layout[1] == "K=2":
            pairs += [(name, baseline) for baseline in TRL]
    return {
        f"{name} / {baseline}": {
            **paired_ratio(seconds[name], seconds[baseline]),
            "of_cpu": paired_ratio(cpu_seconds[name], cpu_seconds[baseline])["median"],
        }
        for name, baseline in pairs
        if name != baseline and baseline in seconds
    }


def show(figures: Mapping[str, Mapping[str, Any]], ratios: Mapping[str, Mapping[str, float]]) -> None:
    print(f"{'':<42} {'samples/s':>10} {'best':>7} {'MiB':>6} {'reference s':>12} {'of padded':>10} {'shared':>7}")
    for name, of_name in figures.items():
        rate, reference = of_name["samples_per_second"], of_name.get("reference_seconds")
        print(f"{name:<42} {rate['median']:>10.2f} {rate['max']:>7.2f} {of_name['peak_bytes'] / 2**20:>6.0f}", end=" ")
        print(f"{'' if not reference else format(reference, '.2f'):>12}", end=" ")
        efficiency, shared = of_name.get("data/token_efficiency"), of_name.get("data/tokens_shared")
        print("" if efficiency is None else f"{efficiency:>10.2f} {shared:>7.2f}", flush=True)
    print(f"\n{'time over time':<70} {'median':>7} {'of minima':>10} {'of cpu':>7}")
    for name, ratio in ratios.items():
        print(f"{name:<70} {ratio['median']:>7.2f} {ratio['of_minima']:>10.2f} {ratio['of_cpu']:>7.2f}", flush=True)


if __name__ == "__main__":
    main()
