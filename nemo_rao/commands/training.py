"""Run commands: train here or on a cluster, plan, compare, monitor, demonstrate."""

from __future__ import annotations

import argparse

from nemo_rao.commands.parser import Command, Parser, add_recipe
from nemo_rao.errors import UserError


def train_parser() -> Parser:
    parser = Parser(
        prog="nemo-rao train",
        description="Train a model with the objective and data of a recipe.",
        epilog="example: nemo-rao train --config-name gpt_rao data.train_path=prefs.jsonl data.tokenizer=./tokenizer "
        "trainer.max_steps=100",
        allow_abbrev=False,
    )
    add_recipe(parser)
    parser.add_argument(
        "--print-config", action="store_true", help="print the full recipe, each key with its comment, and exit"
    )
    parser.add_argument(
        "-m",
        "--multirun",
        action="store_true",
        help="train a grid of runs, one after the other: keys with several values, such as model.dpo.beta=0.05,0.1, or "
        "a published grid, search=dpo; with --print-config, list the runs",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="a key of the recipe, or a group such as model=llama3_8b"
    )
    return parser


def train(arguments: argparse.Namespace) -> int:
    from nemo_rao.runtime.job import supervised

    with supervised():
        return train_grid(arguments) if arguments.multirun else train_one(arguments)


def train_one(arguments: argparse.Namespace) -> int:
    from nemo_rao.config.compose import compose
    from nemo_rao.config.recipe_text import to_yaml

    config = compose(arguments.config_name, arguments.overrides, arguments.config_dir)
    if arguments.print_config:
        print(to_yaml(config), end="")
        return 0
    from nemo_rao.config.checks import check_keys_are_read
    from nemo_rao.training.checks import check_run

    check_keys_are_read(arguments.overrides, config)
    check_run(config)
    from nemo_rao.training.train import train as run

    run(config)
    return 0


def train_grid(arguments: argparse.Namespace) -> int:
    from nemo_rao.training.sweep import check, plan, run_sweep

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
        description="Estimate memory per rank, communication, FLOPs and time of a step, and the duration of a run, "
        "without running it. If the recipe does not fit, propose the nearest settings that do. Exit code 0: it fits, "
        "even if the margin is smaller than the estimate's uncertainty (JSON: tight), 1: it does not.",
        epilog="example: nemo-rao plan --config-name gpt_rao_llama3_8b --gpu h100 model.micro_batch_size=2",
        allow_abbrev=False,
    )
    add_recipe(parser)
    parser.add_argument("--gpu", default="h100", metavar="NAME", help="a100, h100, h200 or b200 (default: %(default)s)")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="memory of a GPU, instead of that of --gpu")
    parser.add_argument(
        "--peak-tflops",
        type=float,
        metavar="N",
        help="peak of a GPU in the run's number format, instead of that of --gpu",
    )
    parser.add_argument(
        "--mfu",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="assumed fraction of the peak reached while a GPU computes; recomputation, communication and the pipeline "
        "bubble are added to the time (default: %(default)s)",
    )
    parser.add_argument(
        "--intra-node-bandwidth",
        type=float,
        metavar="GB/S",
        help="bandwidth of a GPU inside its node, one direction, instead of that of --gpu",
    )
    parser.add_argument(
        "--inter-node-bandwidth",
        type=float,
        metavar="GB/S",
        help="bandwidth of a GPU to other nodes, one direction, instead of that of --gpu",
    )
    parser.add_argument(
        "--link-efficiency",
        type=float,
        default=0.8,
        metavar="SHARE",
        help="assumed fraction of these bandwidths that is reached (default: %(default)s)",
    )
    parser.add_argument(
        "--memory-bandwidth",
        type=float,
        metavar="GB/S",
        help="bandwidth of a GPU's memory, by which sampling is planned, instead of that of --gpu",
    )
    parser.add_argument(
        "--devices-per-node",
        type=int,
        metavar="N",
        help="maximum GPUs per node in proposed settings (default: 8 for a recipe of one node, else trainer.devices)",
    )
    parser.add_argument(
        "--reserve",
        type=float,
        default=4.0,
        metavar="GIB",
        help="memory assumed for the CUDA context, NCCL and fragmentation (default: %(default)s)",
    )
    parser.add_argument(
        "--tokens-per-row",
        type=int,
        metavar="N",
        help="mean number of tokens of prompt and response (default: model.seq_length, the maximum)",
    )
    parser.add_argument(
        "--responses",
        type=int,
        metavar="K",
        help="responses per prompt in the data, of which the run may use fewer (default: counted if data.train_path is "
        "on this machine, else data.num_responses, else 2)",
    )
    parser.add_argument(
        "--prompts",
        type=int,
        metavar="N",
        help="number of training prompts, for the length of the run (default: counted if data.train_path is on this "
        "machine)",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the plan to this file, in bytes and seconds")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="a key of the recipe, or a group such as model=llama3_8b"
    )
    return parser


def plan(arguments: argparse.Namespace) -> int:
    from nemo_rao.planning.plan import main as run

    return run(arguments)


def study_parser() -> Parser:
    parser = Parser(
        prog="nemo-rao study",
        description="Train several recipes with several seeds as a YAML file describes, sample and judge what was "
        "trained, and write a report with intervals. The same command continues a study that was interrupted. Exit "
        "code 1: a step failed, and the others are in the report.",
        epilog="example: nemo-rao study my_study.yaml --dry-run",
        allow_abbrev=False,
    )
    parser.add_argument("study", metavar="STUDY", help="a YAML file, or the name of a study in conf/study")
    parser.add_argument(
        "--out", metavar="DIR", help="directory of runs and report (default: the file's out, or runs/study/NAME)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, list the runs and what is left of them, and exit"
    )
    parser.add_argument(
        "--gpu", metavar="NAME", help="with --dry-run: plan the time of runs for this GPU: a100, h100, h200 or b200"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="a key of all recipes, or of the study, such as seeds=[1,2] or arms.sft.start=/checkpoints/llama3_8b",
    )
    return parser


def study(arguments: argparse.Namespace) -> int:
    from nemo_rao.study.command import main as run

    if arguments.gpu is not None and not arguments.dry_run:
        raise UserError(
            f"--gpu {arguments.gpu}: only plans the runs that --dry-run lists. Add --dry-run, or remove --gpu."
        )
    planning = None if arguments.gpu is None else plan_parser().parse_intermixed_args(["--gpu", arguments.gpu])
    return run(arguments, planning)


def launch_parser() -> Parser:
    parser = Parser(
        prog="nemo-rao launch",
        description="Train on a cluster: submit the run as a SLURM job that survives time limits, pre-emption and the "
        "loss of nodes, and follow it. With cluster=local, or without cluster=, the run starts here.",
        epilog="example: nemo-rao launch --config-dir my_recipes --config-name gpt_rao_llama3_8b cluster=my_cluster "
        "data.train_path=/data/prefs.jsonl model.restore_from_path=/checkpoints/llama3_8b",
        allow_abbrev=False,
    )
    add_recipe(parser, " and cluster/NAME.yaml")
    parser.add_argument(
        "-m", "--multirun", action="store_true", help="submit a grid of runs, as in nemo-rao train, as a job array"
    )
    parser.add_argument(
        "--dependency",
        metavar="WHAT",
        help="wait for other jobs: a dependency of sbatch, such as afterok:17, or the directory of a launched run, "
        "from whose checkpoint this one may start",
    )
    parser.add_argument("--detach", action="store_true", help="submit without following")
    parser.add_argument("--dry-run", action="store_true", help="check and print the batch script without submitting")
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
        description="Report the jobs of runs, their last step and its metrics, and their last checkpoint.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run, such as runs/gpt_rao")
    parser.add_argument(
        "--follow",
        action="store_true",
        help="follow the run until its job has ended; Ctrl-C stops following, not the job",
    )
    parser.add_argument(
        "--poll-seconds",
        type=float,
        default=5.0,
        metavar="S",
        help="interval between checks of the job (default: %(default)s)",
    )
    return parser


def status(arguments: argparse.Namespace) -> int:
    from nemo_rao.cluster.status import main as run

    return run(arguments)


def demo_parser() -> Parser:
    parser = Parser(
        prog="nemo-rao demo",
        description="Fine-tune a small Llama on this machine's CPU with four ranks (TP 2 x PP 2), align it with RAO on "
        "generated preferences, and compare the policy before and after.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--out", default="runs/demo", metavar="DIR", help="directory of the results (default: %(default)s)"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="keys of the recipe, for both parts of the demonstration"
    )
    return parser


def demo(arguments: argparse.Namespace) -> int:
    from nemo_rao.demo.run import main as run

    return run(arguments) or 0


COMMANDS = (
    Command("train", "train a model from a recipe", train_parser, train),
    Command("plan", "estimate memory, communication and time of a run", plan_parser, plan),
    Command("study", "compare recipes over several seeds, with a report", study_parser, study),
    Command("launch", "train a model on a cluster, as a SLURM job", launch_parser, launch),
    Command("status", "report jobs, last step and metrics of runs", status_parser, status),
    Command("demo", "fine-tune and align a small model on this machine", demo_parser, demo),
)
