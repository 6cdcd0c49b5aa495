"""What can be chosen for sampling and for evaluation, and the command-line options made from it.

Only the standard library is imported: ``--help`` reads this module.
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
_AS_TRAINED = " (default: as the model was trained, if nemo_rao.json beside it says so, else {})"


@dataclass(frozen=True, kw_only=True)
class PolicySettings:
    """How a policy is loaded and asked, whatever for.

    What is ``None`` of the keys of :class:`nemo_rao.data.rendering_record.Rendering` is as the model was trained.
    """

    OPTIONS: ClassVar[OptionNames] = OptionNames({})  # what messages about rows call the keys of `data`

    batch_size: int = key(32, "sequences generated at once", low=1)
    seed: int = key(1234, "what is sampled is a function of it and of the prompt's number", low=0)
    system: str | None = key(None, "system message put before prompts that have none")
    chat_template: ChatTemplate | None = key(
        None,
        "auto: where the tokenizer has one; always: refuse a tokenizer without; never: plain text, unchanged"
        + _AS_TRAINED.format("auto"),
        choices=(None, *typing.get_args(ChatTemplate)),
    )
    template_arguments: dict[str, Any] | None = key(
        None,
        'JSON object passed to the chat template, such as {"enable_thinking": false}' + _AS_TRAINED.format("{}"),
    )
    engine: EngineName = key(
        "auto",
        "what generates; auto: vLLM where it is installed and there is a GPU",
        choices=typing.get_args(EngineName),
    )
    top_p: float = key(1.0, "smallest set of tokens with this probability is sampled from; 1: all", low=1e-6, high=1.0)
    top_k: int = key(0, "tokens sampled from; 0: all", low=0)

    def rendering(self, trained: Rendering | None) -> tuple[Rendering, tuple[str, ...]]:
        """How prompts are rendered, and a line for each choice that is not the one the model was trained with.

        Args:
            trained: how it was trained; ``None`` where that is not known.
        """
        names = set(NAMES) & {field.name for field in dataclasses.fields(self)}
        chosen = {name: value for name in names if (value := getattr(self, name)) is not None}
        made = dataclasses.replace(trained or Rendering(), **chosen)
        if trained is None:
            return made, ()
        # auto and always render alike.
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

    num_responses: int = key(4, "responses to each prompt (K)", low=1)
    temperature: float = key(1.0, "divides the logits; 0: the most probable token", low=0.0)
    max_new_tokens: int = key(512, "tokens a response may have before it is cut", low=1)
    resamples: int = key(
        3, "how often a response that training cannot read is sampled again before its prompt is skipped", low=0
    )
    answers: Answers | None = key(
        None,
        "how training will put a response behind its prompt; template: through the chat template; verbatim: unchanged, "
        "behind the generation prompt" + _AS_TRAINED.format("template"),
        choices=(None, *typing.get_args(Answers)),
    )


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(PolicySettings):
    """Keys of ``nemo-rao evaluate``."""

    # Its files have their own formats, whose columns cannot be renamed by an option.
    OPTIONS = OptionNames({**READING, **_RENDERING, "columns": "call it {name} in the file"})

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
            choices = [choice for choice in spec.choices if choice is not None]
            parser.add_argument(option, choices=choices, default=field.default, help=comment)
        else:
            metavar = {int: "N", float: "X", str: "TEXT", dict: "JSON"}[kind]
            convert = _json_object if kind is dict else kind
            parser.add_argument(option, type=convert, default=field.default, metavar=metavar, help=comment)


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
    if made.template_arguments and made.chat_template == "never":
        raise UserError("chat_template='never': plain text takes no --template-arguments; leave one of them out")
    if isinstance(made, GenerateSettings) and made.temperature == 0 and made.num_responses > 1:
        raise UserError(
            f"temperature=0.0: gives the same response {made.num_responses} times; raise it, or set --num-responses 1"
        )
    return made


def _type(hint: Any) -> type:
    """The type that an option's text is turned into: of ``int | None``, ``int``."""
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
    """A key's value as it is given on the command line, but for quotes of the shell."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
