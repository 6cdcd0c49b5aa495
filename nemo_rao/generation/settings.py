"""What can be chosen for sampling and for evaluation, and the command-line options made from it.

Only the standard library is imported: ``--help`` reads this module.
"""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from nemo_rao.errors import UserError
from nemo_rao.keys import KeySpec, check, key

ChatTemplate = Literal["auto", "always", "never"]
EngineName = Literal["auto", "transformers", "vllm"]
Settings = TypeVar("Settings", bound="PolicySettings")


@dataclass(frozen=True, kw_only=True)
class PolicySettings:
    """How a policy is loaded and asked, whatever for."""

    batch_size: int = key(32, "sequences generated at once", low=1)
    seed: int = key(1234, "what is sampled is a function of it and of the prompt's number", low=0)
    system: str | None = key(None, "system message put before prompts that have none")
    chat_template: ChatTemplate = key(
        "auto",
        "auto: where the tokenizer has one; always: refuse a tokenizer without; never: plain text as it stands",
        choices=typing.get_args(ChatTemplate),
    )
    engine: EngineName = key(
        "auto",
        "what generates; auto: vLLM where it is installed and there is a GPU",
        choices=typing.get_args(EngineName),
    )
    top_p: float = key(1.0, "smallest set of tokens with this probability is sampled from; 1: all", low=1e-6, high=1.0)
    top_k: int = key(0, "tokens sampled from; 0: all", low=0)


@dataclass(frozen=True, kw_only=True)
class GenerateSettings(PolicySettings):
    """Keys of ``nemo-rao generate``."""

    num_responses: int = key(4, "responses to each prompt (K)", low=1)
    temperature: float = key(1.0, "divides the logits; 0: the most probable token", low=0.0)
    max_new_tokens: int = key(512, "tokens a response may have before it is cut", low=1)
    resamples: int = key(3, "how often an empty response is sampled again before its prompt is skipped", low=0)


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(PolicySettings):
    """Keys of ``nemo-rao evaluate``."""

    temperature: float = key(0.7, "of alpaca_eval, 0: greedy; mt_bench has one per category of its own", low=0.0)
    max_new_tokens: int | None = key(
        None, "tokens an answer may have (default: 2048 for alpaca_eval, 1024 for mt_bench)", low=1
    )
    limit: int | None = key(None, "only the first examples of each task, to try it out", low=1)
    num_fewshot: int | None = key(None, "solved examples before each question (default: the task's own)", low=0)
    apply_chat_template: bool = key(False, "put questions of lm-evaluation-harness through the chat template")


def add_options(parser: argparse.ArgumentParser, settings: type[PolicySettings]) -> None:
    """One option per key of ``settings``: ``num_responses`` is ``--num-responses``."""
    hints = typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):
        spec: KeySpec = field.metadata["key"]
        option, kind = "--" + field.name.replace("_", "-"), _type(hints[field.name])
        shown = "" if field.default is None or kind is bool else f" (default: {field.default})"
        comment = spec.comment.replace("%", "%%") + shown
        if kind is bool:
            parser.add_argument(option, action="store_true", help=comment)
        elif spec.choices:
            parser.add_argument(option, choices=spec.choices, default=field.default, help=comment)
        else:
            metavar = {int: "N", float: "X", str: "TEXT"}[kind]
            parser.add_argument(option, type=kind, default=field.default, metavar=metavar, help=comment)


def from_options(options: argparse.Namespace, settings: type[Settings]) -> Settings:
    """The settings that were given, checked.

    Raises:
        UserError: a value is out of its range, or two of them contradict each other.
    """
    made = settings(**{field.name: getattr(options, field.name) for field in dataclasses.fields(settings)})
    check(made)
    if made.system is not None and not made.system.strip():
        raise UserError("system='': is empty; leave --system out, or write a message")
    if made.system is not None and made.chat_template == "never":
        raise UserError("chat_template='never': plain text has no place for --system; leave one of them out")
    if isinstance(made, GenerateSettings) and made.temperature == 0 and made.num_responses > 1:
        raise UserError(
            f"temperature=0.0: gives the same response {made.num_responses} times; raise it, or set --num-responses 1"
        )
    return made


def _type(hint: Any) -> type:
    """The type that an option's text is turned into: of ``int | None``, ``int``."""
    if typing.get_origin(hint) is types.UnionType:
        return next(kind for kind in typing.get_args(hint) if kind is not type(None))
    return str if typing.get_origin(hint) is Literal else hint
