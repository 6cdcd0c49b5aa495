"""Models: to and from Hugging Face's format, sampled, evaluated."""

from __future__ import annotations

import argparse

from nemo_rao.commands.parser import Command, Parser, add_columns, add_ignored, columns_of


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
    parser.add_argument(
        "--ignore-key",
        action="append",
        default=[],
        metavar="KEY",
        help="key of config.json that import-hf does not know and the network does not depend on; may be given several "
        "times",
    )
    return parser


def import_hf(arguments: argparse.Namespace) -> int:
    from nemo_rao.hugging_face.importer import main as run

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
        "--base",
        metavar="CHECKPOINT",
        help="adapters: where the weights are that they were trained on (default: where they were then)",
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read a checkpoint whose pickles name more than tensors and numbers; they can run code",
    )
    return parser


def export_hf(arguments: argparse.Namespace) -> int:
    from nemo_rao.hugging_face.exporter import main as run

    return run(arguments)


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
    add_columns(parser, "PROMPTS")
    add_options(parser, GenerateSettings)
    return parser


def generate(arguments: argparse.Namespace) -> int:
    from nemo_rao.generation.settings import GenerateSettings, from_options

    settings, columns = from_options(arguments, GenerateSettings), columns_of(arguments.column)
    from nemo_rao.generation.generate import generate as run

    run(arguments.model, arguments.prompts, arguments.output, settings, columns, arguments.ignore_field)
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
    add_ignored(parser, "these two files")
    add_options(parser, EvaluateSettings)
    return parser


def evaluate(arguments: argparse.Namespace) -> int:
    from nemo_rao.generation.settings import EvaluateSettings, from_options

    settings = from_options(arguments, EvaluateSettings)
    from nemo_rao.generation.evaluate import Asked
    from nemo_rao.generation.evaluate import evaluate as run

    asked = Asked(
        tasks=arguments.task,
        name=arguments.name,
        instructions=arguments.instructions,
        questions=arguments.questions,
        ignore_fields=tuple(arguments.ignore_field),
        include_path=arguments.include_path,
    )
    run(arguments.model, arguments.out, asked, settings)
    return 0


COMMANDS = (
    Command("import-hf", "make a NeMo checkpoint of a Hugging Face model", import_hf_parser, import_hf),
    Command("export-hf", "make a Hugging Face model of a NeMo checkpoint", export_hf_parser, export_hf),
    Command("generate", "sample responses from a model, to score and train on", generate_parser, generate),
    Command("evaluate", "answer benchmarks with a model, or run them", evaluate_parser, evaluate),
)
