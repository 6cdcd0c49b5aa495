"""Reward commands: score the responses of a file, compare reward models."""

from __future__ import annotations

import argparse

from nemo_rao.commands.parser import Command, Parser, add_columns
from nemo_rao.errors import UserError


def score_parser() -> Parser:
    parser = Parser(
        prog="nemo-rao score",
        description="Add rewards to the responses of a file: from a rule, a chat model as judge, a trained reward "
        "model or policy, or columns of the file. The same command resumes after an interruption.",
        epilog="example: nemo-rao score prefs.jsonl scored.jsonl --scorer r_1=rule:my_rules:exact_match "
        "--scorer r_2=judge:judge.yaml --standardize global; then nemo-rao train ... data.train_path=scored.jsonl",
        allow_abbrev=False,
    )
    parser.add_argument("input", metavar="INPUT", help="file, pattern or data set, in any form of data.train_path")
    parser.add_argument("output", metavar="OUTPUT", help="the rows with their rewards: .jsonl or .jsonl.gz")
    parser.add_argument(
        "--scorer",
        action="append",
        required=True,
        metavar="[NAME=]KIND:WHAT",
        help="rule:MODULE:FUNCTION, a Python function (prompt, response) -> number, searched for in the current "
        "directory first; it is imported and executed, so use only code that you trust. judge:FILE.yaml, a chat model "
        "behind an OpenAI-compatible endpoint, or loaded from a directory. model:RUN_FOLDER, a trained reward model, "
        "or the implicit reward of a trained policy. column:FIELD, a field of the responses; column alone, their "
        "reward. Can be repeated: each scorer becomes a column, and the reward is their weighted mean",
    )
    parser.add_argument(
        "--weight", action="append", default=[], metavar="NAME=W", help="weight of a column in the mean (default: 1)"
    )
    parser.add_argument(
        "--standardize",
        choices=("none", "global", "prompt"),
        default="none",
        help="give each column mean 0 and standard deviation 1, over the whole file or over each prompt's responses",
    )
    parser.add_argument(
        "--statistics", metavar="FILE", help="with global: use the means and deviations in this .stats.json"
    )
    parser.add_argument(
        "--shift", type=float, default=0.0, metavar="X", help="after standardizing, subtract X from each column"
    )
    parser.add_argument("--scale", type=float, default=1.0, metavar="Y", help="after --shift, divide by Y (> 0)")
    parser.add_argument(
        "--max-missing",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="fail if more than this fraction of the responses get no score in a column; finished scores are kept "
        "(default: %(default)s)",
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first response that gets no score")
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="model scorers: maximum number of tokens of prompt and response, up to the model's context (default: the "
        "run's model.seq_length); longer responses get no score",
    )
    add_columns(parser, "INPUT")
    parser.add_argument(
        "--bad-rows",
        choices=("refuse", "drop"),
        default="refuse",
        help="rows that cannot be read: refuse the first one, or drop and count them (default: %(default)s)",
    )
    parser.add_argument(
        "--max-bad-rows",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="with drop: refuse INPUT where more of its rows are bad (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT")
    parser.add_argument(
        "--rows-at-once", type=int, default=32, metavar="N", help="rows scored, then written (default: %(default)s)"
    )
    return parser


def score(arguments: argparse.Namespace) -> int:
    from nemo_rao.scoring.run import KINDS, Job
    from nemo_rao.scoring.run import main as run

    job = Job.of(arguments)
    if not any(":" in spec and spec.partition(":")[0].rpartition("=")[2] == "model" for spec in arguments.scorer):
        if arguments.max_length is not None:
            raise UserError(
                "--max-length: only applies to model:RUN_FOLDER scorers. Remove it (for a judge, set max_tokens)."
            )
        return run(job)
    from nemo_rao.training.score_model import model_kind  # imported here because only model scorers need it

    return run(job, {**KINDS, "model": model_kind(job)})


def compare_rewards_parser() -> Parser:
    parser = Parser(
        prog="nemo-rao compare-rewards",
        description="Train reward models from the base model and from the fine-tuned one, and a DPO policy from the "
        "fine-tuned one, each on a small and on a large part of the data, and compare the loss and the accuracy of "
        "their rewards on the same held-out pairs (Table 1 of the RAO paper). The same command trains what is not "
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
        help="base model: a checkpoint, or a run's directory for its last one; random: random weights",
    )
    parser.add_argument(
        "--sft", required=True, metavar="CHECKPOINT", help="fine-tuned model: a checkpoint, or a run's directory"
    )
    parser.add_argument(
        "--pairs",
        action="append",
        metavar="N",
        help="number of pairs to train on, drawn from data.train_path, or all; can be repeated (default: 10000, all)",
    )
    parser.add_argument(
        "--out",
        default="runs/compare_rewards",
        metavar="DIR",
        help="directory of the runs, comparison.json and comparison.md (default: %(default)s)",
    )
    for objective, runs in (("rm", "the reward models'"), ("dpo", "the DPO")):
        parser.add_argument(
            f"--{objective}", action="append", default=[], metavar="key=value", help=f"a key of {runs} runs only"
        )
    parser.add_argument("--config-dir", metavar="DIR", help="directory with your own recipes, searched first")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="a key of all runs, or a group such as model=llama3_8b; data.validation_path has the held-out pairs",
    )
    return parser


def compare_rewards(arguments: argparse.Namespace) -> int:
    from nemo_rao.training.compare_rewards import main as run

    return run(arguments)


COMMANDS = (
    Command("score", "add rewards to the responses of a file", score_parser, score),
    Command(
        "compare-rewards",
        "train reward models and DPO, and compare their rewards",
        compare_rewards_parser,
        compare_rewards,
    ),
)
