"""Settings for sampling and evaluation, and the command-line options made from them.

Only the standard library is imported, since ``--help`` reads this module.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import types
import typing
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from nemo_rao.data.rendering import Answers
from nemo_rao.data.rendering_record import NAMES, ChatTemplate, Rendering
from nemo_rao.errors import UserError
from nemo_rao.keys import KeySpec, check, key
from nemo_rao.rows.option_names import READING, OptionNames

EngineName = Literal["auto", "transformers", "vllm"]
Settings = TypeVar("Settings", bound="PolicySettings")
_RENDERING = {"chat_template": "--chat-template", "template_arguments": "--template-arguments"}
_AS_TRAINED = " (default: as in training if the model's nemo_rao.json records it, else {})"


@dataclass(frozen=True, kw_only=True)
class PolicySettings:
    """Settings for loading and sampling from a policy, shared by all commands.

    Keys of :class:`nemo_rao.data.rendering_record.Rendering` that are ``None`` are taken from the model's training.
    """

    OPTIONS: ClassVar[OptionNames] = OptionNames({})  # names of `data` keys in messages about rows

    batch_size: int = key(32, "sequences generated at once", low=1)
    seed: int = key(1234, "sampling seed; draws depend on it and on the index of the prompt", low=0)
    system: str | None = key(None, "system message put before prompts that have none")
    chat_template: ChatTemplate | None = key(
        None,
        "auto: use it if the tokenizer has one; always: fail without one; never: plain text, unchanged"
        + _AS_TRAINED.format("auto"),
        choices=(None, *typing.get_args(ChatTemplate)),
    )
    template_arguments: dict[str, Any] | None = key(
        None,
        'JSON object passed to the chat template, such as {"enable_thinking": false}' + _AS_TRAINED.format("{}"),
    )
    engine: EngineName = key(
        "auto",
        "sampling engine; auto: vLLM if it is installed and there is a GPU",
        choices=typing.get_args(EngineName),
    )
    top_p: float = key(1.0, "sample from the smallest set of tokens with this probability; 1: all", low=1e-6, high=1.0)
    top_k: int = key(0, "sample from this many most probable tokens; 0: all", low=0)

    def rendering(self, trained: Rendering | None) -> tuple[Rendering, tuple[str, ...]]:
        """Return the rendering of prompts, and a line for each difference from training.

        Args:
            trained: the rendering in training; ``None`` if it is unknown.
        """
        names = set(NAMES) & {field.name for field in dataclasses.fields(self)}
        chosen = {name: value for name in names if (value := getattr(self, name)) is not None}
        made = dataclasses.replace(trained or Rendering(), **chosen)
        if trained is None:
            return made, ()
        # auto and always render the same.
        kept = {"chat_template"} if (made.chat_template == "never") == (trained.chat_template == "never") else set()
        differing = [name for name in sorted(names - kept) if getattr(made, name) != getattr(trained, name)]
        return made, tuple(
            f"{name}={shown(getattr(made, name))}: the model was trained with {shown(getattr(trained, name))}"
            for name in differing
        )


@dataclass(frozen=True, kw_only=True)
class GenerateSettings(PolicySettings):
    """Keys of ``nemo-rao generate``."""

    OPTIONS = OptionNames({**READING, **_RENDERING, "answers": "--answers"})

    num_responses: int = key(4, "responses per prompt (K)", low=1)
    temperature: float = key(1.0, "divides the logits; 0: greedy", low=0.0)
    max_new_tokens: int = key(512, "maximum number of tokens of a response", low=1)
    resamples: int = key(
        3, "attempts to resample a response that training cannot read before its prompt is skipped", low=0
    )
    answers: Answers | None = key(
        None,
        "how training will append a response to its prompt; template: by the chat template; verbatim: unchanged, "
        "after the generation prompt" + _AS_TRAINED.format("template"),
        choices=(None, *typing.get_args(Answers)),
    )


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(PolicySettings):
    """Keys of ``nemo-rao evaluate``."""

    # Benchmark files have fixed formats, whose columns cannot be renamed by an option.
    OPTIONS = OptionNames({**READING, **_RENDERING, "columns": "call it {name} in the file"})

    temperature: float = key(0.7, "for alpaca_eval, 0: greedy; mt_bench sets it per category", low=0.0)
    max_new_tokens: int | None = key(
        None, "maximum number of tokens of an answer (default: 2048 for alpaca_eval, 1024 for mt_bench)", low=1
    )
    limit: int | None = key(None, "use only this many examples of each task, for a trial run", low=1)
    num_fewshot: int | None = key(None, "few-shot examples before each question (default: the task's own)", low=0)
    apply_chat_template: bool = key(False, "render questions of lm-evaluation-harness with the chat template")


def add_options(parser: argparse.ArgumentParser, settings: type[PolicySettings]) -> None:
    """Add one option per key of ``settings``: ``num_responses`` becomes ``--num-responses``."""
    hints = typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):
        spec: KeySpec = field.metadata["key"]
        option, kind = "--" + field.name.replace("_", "-"), _type(hints[field.name])
        shown = "" if field.default is None or kind is bool else f" (default: {field.default})"
        comment = spec.comment.replace("%", "%%") + shown
        if kind is bool:
            parser.add_argument(option, action="store_true", help=comment)
        elif spec.choices:
            choices = [choice for choice in spec.choices if choice is not None]
            parser.add_argument(option, choices=choices, default=field.default, help=comment)
        else:
            metavar = {int: "N", float: "X", str: "TEXT", dict: "JSON"}[kind]
            convert = _json_object if kind is dict else kind
            parser.add_argument(option, type=convert, default=field.default, metavar=metavar, help=comment)


def from_options(options: argparse.Namespace, settings: type[Settings]) -> Settings:
    """Build the settings from parsed options and check them.

    Raises:
        UserError: a value is out of range, or two of them contradict each other.
    """
    made = settings(**{field.name: getattr(options, field.name) for field in dataclasses.fields(settings)})
    check(made)
    if made.system is not None and not made.system.strip():
        raise UserError("system='': is empty. Leave --system out, or write a message.")
    if made.system is not None and made.chat_template == "never":
        raise UserError("chat_template='never': plain text cannot contain --system. Leave one of them out.")
    if made.template_arguments and made.chat_template == "never":
        raise UserError("chat_template='never': plain text takes no --template-arguments. Leave one of them out.")
    if isinstance(made, GenerateSettings) and made.temperature == 0 and made.num_responses > 1:
        raise UserError(
            f"temperature=0.0: gives the same response {made.num_responses} times. Raise it, or set --num-responses 1."
        )
    return made


def _type(hint: Any) -> type:
    """Type that an option's text is converted to: for ``int | None``, ``int``."""
    if typing.get_origin(hint) is types.UnionType:
        hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
    return str if typing.get_origin(hint) is Literal else typing.get_origin(hint) or hint


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text} is not a JSON object, such as '{{\"enable_thinking\": false}}'")
    return found


def shown(value: Any) -> str:
    """A key's value as written on the command line, without shell quotes."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
