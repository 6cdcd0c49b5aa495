"""Model commands: conversion from and to Hugging Face's format, sampling, evaluation."""

from __future__ import annotations

import argparse

from nemo_rao.commands.parser import Command, Parser, add_columns, add_ignored


def import_hf_parser() -> Parser:
    parser = Parser(
        prog="nemo-rao import-hf",
        description="Convert a Hugging Face model (Llama, Mistral, Qwen2 or Qwen3, more families with Megatron-Bridge; "
        "safetensors) to a Megatron checkpoint, with its tokenizer and a file of the recipe group model. Remote code "
        "is never run.",
        epilog="then: nemo-rao train --config-dir DEST --config-name gpt_rao model=imported data.train_path=...",
        allow_abbrev=False,
    )
    parser.add_argument(
        "source", metavar="SOURCE", help="directory of the model, or its name on huggingface.co, ORG/NAME"
    )
    parser.add_argument("dest", metavar="DEST", help="directory to create")
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read weights from .bin files if there are no safetensors; pickles can run code, so trust their author",
    )
    parser.add_argument(
        "--ignore-key",
        action="append",
        default=[],
        metavar="KEY",
        help="unknown key of config.json to ignore, because the network does not depend on it; can be repeated",
    )
    return parser


def import_hf(arguments: argparse.Namespace) -> int:
    from nemo_rao.hugging_face.importer import main as run

    return run(arguments)


def export_hf_parser() -> Parser:
    parser = Parser(
        prog="nemo-rao export-hf",
        description="Convert a checkpoint to a Hugging Face model with tokenizer and chat template. Adapters of a run "
        "with model.peft.scheme=lora are merged into the weights they were trained on.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint, or a run's directory for its last one")
    parser.add_argument("dest", metavar="DEST", help="directory to create")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="dtype of the weights (default: the checkpoint's)")
    parser.add_argument("--adapters", action="store_true", help="write only the adapters, in the format of peft")
    parser.add_argument(
        "--base",
        metavar="CHECKPOINT",
        help="checkpoint that the adapters were trained on (default: the path recorded by the run)",
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read a checkpoint whose pickles name more than tensors and numbers; they can run code, "
        "so trust its author",
    )
    return parser


def export_hf(arguments: argparse.Namespace) -> int:
    from nemo_rao.hugging_face.exporter import main as run

    return run(arguments)


def generate_parser() -> Parser:
    from nemo_rao.generation.settings import GenerateSettings, add_options

    parser = Parser(
        prog="nemo-rao generate",
        description="Sample responses from a model, as rows to score and train on. The same command resumes after an "
        "interruption.",
        epilog="example: nemo-rao generate ./policy prompts.jsonl responses.jsonl --num-responses 4",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="directory in Hugging Face's format, with safetensors")
    parser.add_argument(
        "prompts",
        metavar="PROMPTS",
        help="a file in any training format, or rows with only a prompt (text or messages)",
    )
    parser.add_argument("output", metavar="OUTPUT", help="file to write, such as responses.jsonl")
    add_columns(parser, "PROMPTS")
    add_options(parser, GenerateSettings)
    return parser


def generate(arguments: argparse.Namespace) -> int:
    from nemo_rao.generation.settings import GenerateSettings, from_options

    settings = from_options(arguments, GenerateSettings)
    from nemo_rao.generation.generate import generate as run

    with GenerateSettings.OPTIONS.in_errors():
        run(
            arguments.model,
            arguments.prompts,
            arguments.output,
            settings,
            arguments.columns,
            arguments.ignore_fields,
        )
    return 0


def evaluate_parser() -> Parser:
    from nemo_rao.generation.settings import EvaluateSettings, add_options

    parser = Parser(
        prog="nemo-rao evaluate",
        description="Write a model's answers for AlpacaEval and MT-Bench, and run tasks of lm-evaluation-harness. The "
        "same command resumes after an interruption.",
        epilog="example: nemo-rao evaluate ./policy --task alpaca_eval --instructions alpaca_eval.json "
        "--task gsm8k --task mmlu --out results",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="directory in Hugging Face's format, with safetensors")
    parser.add_argument(
        "--task",
        action="append",
        required=True,
        metavar="NAME",
        help="alpaca_eval, mt_bench, or a task of lm-evaluation-harness such as mmlu; can be repeated",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="directory of answers and results.json")
    parser.add_argument("--name", metavar="NAME", help="model name in the answers (default: the directory's name)")
    parser.add_argument(
        "--instructions", metavar="FILE", help="alpaca_eval: AlpacaEval's alpaca_eval.json, or a file in its format"
    )
    parser.add_argument("--questions", metavar="FILE", help="mt_bench: FastChat's question.jsonl")
    parser.add_argument(
        "--include-path", metavar="DIR", help="directory with your own lm-evaluation-harness tasks (YAML)"
    )
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
        ignore_fields=tuple(arguments.ignore_fields),
        include_path=arguments.include_path,
    )
    with EvaluateSettings.OPTIONS.in_errors():
        run(arguments.model, arguments.out, asked, settings)
    return 0


COMMANDS = (
    Command("import-hf", "convert a Hugging Face model to a checkpoint", import_hf_parser, import_hf),
    Command("export-hf", "convert a checkpoint to a Hugging Face model", export_hf_parser, export_hf),
    Command("generate", "sample responses from a model, to score and train on", generate_parser, generate),
    Command("evaluate", "answer or run benchmarks with a model", evaluate_parser, evaluate),
)
