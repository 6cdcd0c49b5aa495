"""The command ``nemo-rao``. Nothing but the standard library is imported until a command has been read.

Exit codes: 0 done; 1 a rank failed, its traceback on stderr, or scoring did, told in one line; 2 input that cannot be
used, told in one line on stderr, nothing written; 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from nemo_rao import __version__
from nemo_rao.errors import RankFailure, UserError, report


class Parser(argparse.ArgumentParser):
    """Refuses in one line, like everything else here."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def train_parser() -> Parser:
    parser = Parser(
        prog="nemo-rao train",
        description="Train a model with the objective and the data that a recipe names.",
        epilog="example: nemo-rao train --config-name gpt_rao data.train_path=prefs.jsonl data.tokenizer=./tokenizer "
        "trainer.max_steps=100",
        allow_abbrev=False,
    )
    parser.add_argument("--config-name", default="gpt_rao", metavar="NAME", help="recipe (default: %(default)s)")
    parser.add_argument("--config-dir", metavar="DIR", help="folder of your own recipes, looked into first")
    parser.add_argument(
        "--print-config", action="store_true", help="print the full recipe, each key with its comment, and stop"
    )
    parser.add_argument(
        "-m",
        "--multirun",
        action="store_true",
        help="train a grid of runs, one after the other: keys with several values, such as model.dpo.beta=0.05,0.1, or "
        "a published grid, search=dpo; with --print-config, list them",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="a key of the recipe, or a group such as model=llama3_8b"
    )
    return parser


def train(arguments: argparse.Namespace) -> int:
    from nemo_rao.integration.job import supervised

    with supervised():
        return train_grid(arguments) if arguments.multirun else train_one(arguments)


def train_one(arguments: argparse.Namespace) -> int:
    from nemo_rao.integration.compose import compose, to_yaml

    config = compose(arguments.config_name, arguments.overrides, arguments.config_dir)
    if arguments.print_config:
        print(to_yaml(config), end="")
        return 0
    from nemo_rao.integration.checks import check_run

    check_run(config)
    from nemo_rao.integration.train import train as run

    run(config)
    return 0


def train_grid(arguments: argparse.Namespace) -> int:
    from nemo_rao.integration.sweep import check, plan, run_sweep

    sweep = plan(arguments.config_name, arguments.overrides, arguments.config_dir)
    if arguments.print_config:
        for run in sweep.runs:
            print(run.name, *run.overrides)
        return 0
    check(sweep)
    return run_sweep(sweep)


def plan_parser() -> Parser:
    parser = Parser(
        prog="nemo-rao plan",
        description="Tell what a recipe would take, without running it: memory of each rank, communication, FLOPs and "
        "time of a step, and where it does not fit, the nearest settings that do. Exit code 0: it fits, 1: it does "
        "not.",
        epilog="example: nemo-rao plan --config-name gpt_rao_llama3_8b --gpu h100 model.micro_batch_size=2",
        allow_abbrev=False,
    )
    parser.add_argument("--config-name", default="gpt_rao", metavar="NAME", help="recipe (default: %(default)s)")
    parser.add_argument("--config-dir", metavar="DIR", help="folder of your own recipes, looked into first")
    parser.add_argument("--gpu", default="h100", metavar="NAME", help="a100, h100, h200 or b200 (default: %(default)s)")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="memory of a GPU, in the place of --gpu's")
    parser.add_argument(
        "--peak-tflops", type=float, metavar="N", help="of a GPU, in the run's number format, in the place of --gpu's"
    )
    parser.add_argument(
        "--mfu", type=float, default=0.4, metavar="SHARE", help="model FLOPs over the peak's (default: %(default)s)"
    )
    parser.add_argument(
        "--reserve",
        type=float,
        default=4.0,
        metavar="GIB",
        help="kept free for the CUDA context, NCCL and fragmentation; an assumption (default: %(default)s)",
    )
    parser.add_argument(
        "--tokens-per-row",
        type=int,
        metavar="N",
        help="mean tokens of prompt and response (default: model.seq_length, the most there can be)",
    )
    parser.add_argument(
        "--responses", type=int, metavar="K", help="of each prompt (default: data.num_responses, or 2 where it is null)"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the plan there, in bytes and seconds")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="a key of the recipe, or a group such as model=llama3_8b"
    )
    return parser


def plan(arguments: argparse.Namespace) -> int:
    from nemo_rao.integration.plan import main as run

    return run(arguments)


def launch_parser() -> Parser:
    parser = Parser(
        prog="nemo-rao launch",
        description="Train on a cluster: submit the run as a SLURM job that survives time limits, pre-emption and the "
        "loss of nodes, and follow it. With cluster=local, or none, it is trained here.",
        epilog="example: nemo-rao launch --config-dir my_recipes --config-name gpt_rao_llama3_8b cluster=my_cluster "
        "cluster.time=8:00:00 data.train_path=/data/prefs.jsonl",
        allow_abbrev=False,
    )
    parser.add_argument("--config-name", default="gpt_rao", metavar="NAME", help="recipe (default: %(default)s)")
    parser.add_argument(
        "--config-dir", metavar="DIR", help="folder of your own recipes and of cluster/NAME.yaml, looked into first"
    )
    parser.add_argument(
        "-m", "--multirun", action="store_true", help="a grid of runs, as of nemo-rao train: a job array, a run each"
    )
    parser.add_argument(
        "--dependency",
        metavar="WHAT",
        help="wait for other jobs: as sbatch takes it, afterok:17, or the folder of a launched run, after whose end "
        "this one may start from its checkpoint",
    )
    parser.add_argument("--detach", action="store_true", help="submit, and do not follow")
    parser.add_argument("--dry-run", action="store_true", help="check, print the batch script, and submit nothing")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="cluster=NAME or cluster=FILE.yaml, cluster.KEY=VALUE, and keys of the recipe",
    )
    return parser


def launch(arguments: argparse.Namespace) -> int:
    from nemo_rao.cluster.launch import main as run

    return run(arguments)


def status_parser() -> Parser:
    parser = Parser(
        prog="nemo-rao status",
        description="Tell of runs: their jobs, the last step and its metrics, the last checkpoint.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, such as runs/gpt_rao")
    parser.add_argument("--follow", action="store_true", help="go on until its job has ended; Ctrl-C does not end it")
    parser.add_argument(
        "--poll-seconds", type=float, default=5.0, metavar="S", help="between two looks (default: %(default)s)"
    )
    return parser


def status(arguments: argparse.Namespace) -> int:
    from nemo_rao.cluster.status import main as run

    return run(arguments)


def compare_rewards_parser() -> Parser:
    parser = Parser(
        prog="nemo-rao compare-rewards",
        description="Train reward models from the base model and from the fine-tuned one, and a DPO policy from the "
        "fine-tuned one, each on a small and on a large part of the data, and compare the loss and the accuracy of "
        "their rewards on the same held-out pairs: Table 1 of the RAO paper. The same command again trains what is not "
        "finished.",
        epilog="example: nemo-rao compare-rewards --base llama --sft runs/sft --pairs 10000 --pairs all "
        "model=llama3_8b data.train_path=prefs.jsonl data.validation_path=held_out.jsonl data.tokenizer=./tokenizer "
        "--rm model.optim.lr=5e-6 --dpo model.dpo.beta=0.1",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--base",
        required=True,
        metavar="CHECKPOINT",
        help="the base model: a NeMo checkpoint, or the folder of a run for its last one; random: random weights",
    )
    parser.add_argument("--sft", required=True, metavar="CHECKPOINT", help="the fine-tuned model, named alike")
    parser.add_argument(
        "--pairs",
        action="append",
        metavar="N",
        help="pairs to train on, drawn from data.train_path, or all; may be given several times (default: 10000, all)",
    )
    parser.add_argument(
        "--out",
        default="runs/compare_rewards",
        metavar="DIR",
        help="folder of the runs and of comparison.json and comparison.md (default: %(default)s)",
    )
    for objective, runs in (("rm", "the reward models'"), ("dpo", "the DPO")):
        parser.add_argument(
            f"--{objective}", action="append", default=[], metavar="key=value", help=f"a key of {runs} runs alone"
        )
    parser.add_argument("--config-dir", metavar="DIR", help="folder of your own recipes, looked into first")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="a key of all runs, or a group such as model=llama3_8b; data.validation_path are the held-out pairs",
    )
    return parser


def compare_rewards(arguments: argparse.Namespace) -> int:
    from nemo_rao.integration.compare_rewards import main as run

    return run(arguments)


def doctor_parser() -> Parser:
    parser = Parser(
        prog="nemo-rao doctor",
        description="Tell what is installed here, whether it can be imported, and what works and what does not and "
        "why. Exit code 0: training works here, 1: it does not.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", metavar="FILE", help="also write it there")
    parser.add_argument(
        "--timeout", type=float, default=300.0, metavar="S", help="seconds of each import (default: %(default)s)"
    )
    return parser


def doctor(arguments: argparse.Namespace) -> int:
    from nemo_rao.doctor.command import main as run

    return run(arguments)


def demo_parser() -> Parser:
    parser = Parser(
        prog="nemo-rao demo",
        description="Fine-tune a small Llama on this machine's CPU with four ranks (TP 2 x PP 2), align it with RAO on "
        "preferences made on the spot, and compare it with its start.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", default="runs/demo", metavar="DIR", help="folder of results (default: %(default)s)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="keys of the recipe, for both parts of the demonstration"
    )
    return parser


def demo(arguments: argparse.Namespace) -> int:
    from nemo_rao.integration.demo import main as run

    return run(arguments) or 0


def objectives_parser() -> Parser:
    return Parser(
        prog="nemo-rao objectives",
        description="Print every objective with its formula, needs, keys and source, as Markdown.",
        allow_abbrev=False,
    )


def objectives(arguments: argparse.Namespace) -> int:
    from nemo_rao.integration.objectives_page import page

    print(page(), end="")
    return 0


def import_hf_parser() -> Parser:
    parser = Parser(
        prog="nemo-rao import-hf",
        description="Make a NeMo checkpoint of a Hugging Face model (Llama, Mistral, Qwen2; safetensors), with its "
        "tokenizer and a file of the recipe group model. No code that the model brings along is run.",
        epilog="then: nemo-rao train --config-dir DEST --config-name gpt_rao model=imported data.train_path=...",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help="folder of the model, or its name on huggingface.co, ORG/NAME")
    parser.add_argument("dest", metavar="DEST", help="folder to make")
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read weights from .bin files where there are no safetensors; pickles can run code: trust who made them",
    )
    return parser


def import_hf(arguments: argparse.Namespace) -> int:
    from nemo_rao.integration.hugging_face_import import main as run

    return run(arguments)


def export_hf_parser() -> Parser:
    parser = Parser(
        prog="nemo-rao export-hf",
        description="Make a Hugging Face model, with tokenizer and chat template, of a NeMo checkpoint. Adapters of a "
        "run with model.peft.scheme=lora are merged into the weights they were trained on.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="NeMo checkpoint, or folder of a run: its last one")
    parser.add_argument("dest", metavar="DEST", help="folder to make")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), help="number format of the weights (default: the checkpoint's)"
    )
    parser.add_argument(
        "--adapters", action="store_true", help="write the adapters alone, as a folder of the package peft"
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read a checkpoint whose pickles name more than tensors and numbers; they can run code",
    )
    return parser


def export_hf(arguments: argparse.Namespace) -> int:
    from nemo_rao.integration.hugging_face_export import main as run

    return run(arguments)


def score_parser() -> Parser:
    parser = Parser(
        prog="nemo-rao score",
        description="Put rewards on the responses of a file: those of a rule, of a chat model as judge, of a trained "
        "reward model or policy, or columns that the file has. The same command again goes on where it was stopped.",
        epilog="example: nemo-rao score prefs.jsonl scored.jsonl --scorer r_1=rule:my_rules:exact_match "
        "--scorer r_2=judge:judge.yaml --standardize global; then nemo-rao train ... data.train_path=scored.jsonl",
        allow_abbrev=False,
    )
    parser.add_argument("input", metavar="INPUT", help="a file, pattern or data set, as data.train_path takes it")
    parser.add_argument("output", metavar="OUTPUT", help="the rows with their rewards: .jsonl or .jsonl.gz")
    parser.add_argument(
        "--scorer",
        action="append",
        required=True,
        metavar="[NAME=]KIND:WHAT",
        help="rule:MODULE:FUNCTION, a Python function (prompt, response) -> number, looked for in this folder first; "
        "it is imported and run, so name none that you do not trust. judge:FILE.yaml, a chat model behind an "
        "OpenAI-compatible endpoint, or in a folder and run here. model:RUN_FOLDER, a trained reward model, or the "
        "implicit reward of a trained policy. column:FIELD, a field of the responses; column alone, the reward they "
        "have. Several are several columns, and their mean is the reward",
    )
    parser.add_argument("--weight", action="append", default=[], metavar="NAME=W", help="in the mean (default: 1)")
    parser.add_argument(
        "--standardize",
        choices=("none", "global", "prompt"),
        default="none",
        help="give each column mean 0 and standard deviation 1: over the whole file, or over each prompt's responses",
    )
    parser.add_argument(
        "--statistics", metavar="FILE", help="with global: by the means and deviations in this .stats.json, not its own"
    )
    parser.add_argument("--shift", type=float, default=0.0, metavar="X", help="then subtract X from each column")
    parser.add_argument("--scale", type=float, default=1.0, metavar="Y", help="then divide by Y, above 0")
    parser.add_argument("--strict", action="store_true", help="stop at a response that gets no score")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT")
    parser.add_argument(
        "--rows-at-once", type=int, default=32, metavar="N", help="rows scored, then written (default: %(default)s)"
    )
    return parser


def score(arguments: argparse.Namespace) -> int:
    from nemo_rao.scoring.run import KINDS
    from nemo_rao.scoring.run import main as run

    if not any(":" in spec and spec.partition(":")[0].rpartition("=")[2] == "model" for spec in arguments.scorer):
        return run(arguments)
    from nemo_rao.integration.score_model import model_kind  # costs only those who score with a model

    return run(arguments, {**KINDS, "model": model_kind(arguments.input)})


def generate_parser() -> Parser:
    from nemo_rao.generation.settings import GenerateSettings, add_options

    parser = Parser(
        prog="nemo-rao generate",
        description="Sample responses from a model, as rows that can be scored and trained on. The same command again "
        "goes on where it was stopped.",
        epilog="example: nemo-rao generate ./policy prompts.jsonl responses.jsonl --num-responses 4",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="folder in Hugging Face's format, with safetensors")
    parser.add_argument(
        "prompts", metavar="PROMPTS", help="a file that training reads, or rows with prompt (text or messages) alone"
    )
    parser.add_argument("output", metavar="OUTPUT", help="file of rows to write, such as responses.jsonl")
    add_options(parser, GenerateSettings)
    return parser


def generate(arguments: argparse.Namespace) -> int:
    from nemo_rao.generation.settings import GenerateSettings, from_options

    settings = from_options(arguments, GenerateSettings)
    from nemo_rao.generation.generate import generate as run

    run(arguments.model, arguments.prompts, arguments.output, settings)
    return 0


def evaluate_parser() -> Parser:
    from nemo_rao.generation.settings import EvaluateSettings, add_options

    parser = Parser(
        prog="nemo-rao evaluate",
        description="Write a model's answers for AlpacaEval and MT-Bench, and run tasks of lm-evaluation-harness. The "
        "same command again goes on where it was stopped.",
        epilog="example: nemo-rao evaluate ./policy --task alpaca_eval --instructions alpaca_eval.json "
        "--task gsm8k --task mmlu --out results",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="folder in Hugging Face's format, with safetensors")
    parser.add_argument(
        "--task",
        action="append",
        required=True,
        metavar="NAME",
        help="alpaca_eval, mt_bench, or a task of lm-evaluation-harness such as mmlu; may be given several times",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of answers and results.json")
    parser.add_argument("--name", metavar="NAME", help="the model's name in answers (default: its folder's)")
    parser.add_argument("--instructions", metavar="FILE", help="alpaca_eval: AlpacaEval's alpaca_eval.json or the like")
    parser.add_argument("--questions", metavar="FILE", help="mt_bench: FastChat's question.jsonl")
    parser.add_argument("--include-path", metavar="DIR", help="folder of your own lm-evaluation-harness tasks (YAML)")
    add_options(parser, EvaluateSettings)
    return parser


def evaluate(arguments: argparse.Namespace) -> int:
    from nemo_rao.generation.settings import EvaluateSettings, from_options

    settings = from_options(arguments, EvaluateSettings)
    from nemo_rao.generation.evaluate import Asked
    from nemo_rao.generation.evaluate import evaluate as run

    files = Asked(arguments.task, arguments.name, arguments.instructions, arguments.questions, arguments.include_path)
    run(arguments.model, arguments.out, files, settings)
    return 0


COMMANDS: dict[str, tuple[str, Callable[[], Parser], Callable[[argparse.Namespace], int]]] = {
    "train": ("train a model from a recipe", train_parser, train),
    "plan": ("tell what a recipe takes, and settings that fit", plan_parser, plan),
    "launch": ("train a model on a cluster, as a SLURM job", launch_parser, launch),
    "status": ("tell of runs: jobs, last step, metrics", status_parser, status),
    "import-hf": ("make a NeMo checkpoint of a Hugging Face model", import_hf_parser, import_hf),
    "export-hf": ("make a Hugging Face model of a NeMo checkpoint", export_hf_parser, export_hf),
    "objectives": ("print the objectives, their formulas and keys", objectives_parser, objectives),
    "score": ("put rewards on the responses of a file", score_parser, score),
    "compare-rewards": (
        "train reward models and DPO, and compare their rewards",
        compare_rewards_parser,
        compare_rewards,
    ),
    "generate": ("sample responses from a model, to score and train on", generate_parser, generate),
    "evaluate": ("answer benchmarks with a model, or run them", evaluate_parser, evaluate),
    "doctor": ("tell what works on this machine, and what does not", doctor_parser, doctor),
    "demo": ("fine-tune and align a small model on this machine, and compare", demo_parser, demo),
}


def command_parser() -> Parser:
    listing = "\n".join(f"  {name:17}{summary}" for name, (summary, _, _) in COMMANDS.items())
    parser = Parser(
        prog="nemo-rao",
        description="Align Megatron GPT models with explicit rewards.",
        epilog=f"commands:\n{listing}\n\nnemo-rao COMMAND --help tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"nemo-rao {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="what to do")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the command's own arguments")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; returns the exit code."""
    try:
        given = command_parser().parse_args(argv)
        _, parser, run = COMMANDS[given.command]
        return run(parser().parse_intermixed_args(given.arguments))
    except (UserError, RankFailure) as error:
        return report(error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main())
