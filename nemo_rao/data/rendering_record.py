"""Settings for rendering prompts and answers, on which training, scoring, sampling and evaluation must agree.

``nemo-rao export-hf`` writes those of the run next to the model; sampling takes its defaults from there:

    nemo_rao.json    {"chat_template": "auto", "template_arguments": {"enable_thinking": false}, "answers": "template"}
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nemo_rao.data.rendering import Answers
from nemo_rao.errors import UserError
from nemo_rao.runtime.files import write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nemo_rao.data.encode import Encoder

ChatTemplate = Literal["auto", "always", "never"]
FILE = "nemo_rao.json"


@dataclass(frozen=True)
class Rendering:
    """Arguments of :class:`nemo_rao.data.encode.Encoder`, where they are described."""

    chat_template: ChatTemplate = "auto"
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    answers: Answers = "template"

    def encoder(self, tokenizer: PreTrainedTokenizerBase) -> Encoder:
        """The encoder with these settings.

        Raises:
            UserError: the tokenizer does not fit these settings.
        """
        from nemo_rao.data.encode import Encoder

        return Encoder(
            tokenizer,
            chat_template=self.chat_template,
            template_arguments=self.template_arguments,
            answers=self.answers,
        )


NAMES = tuple(field.name for field in dataclasses.fields(Rendering))


def write_rendering(folder: Path, rendering: Rendering) -> None:
    """Write ``nemo_rao.json`` into a model's directory."""
    write_atomically(folder / FILE, json.dumps(dataclasses.asdict(rendering), ensure_ascii=False, indent=2) + "\n")


def read_rendering(folder: Path) -> Rendering | None:
    """Read the rendering with which the model in a directory was trained; ``None`` if it was not recorded.

    Raises:
        UserError: ``nemo_rao.json`` cannot be read, or has other keys or values than this version writes.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    remedy = "Export the model again, or remove the file and pass the options."
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}). {remedy}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: is not a JSON object. {remedy}")
    if unknown := sorted(found.keys() - set(NAMES)):
        raise UserError(f"{path}: has the unknown key {unknown[0]}. {remedy}")
    return checked_rendering(found, f"{path}: ", f". {remedy}")


def checked_rendering(values: Mapping[str, Any], where: str, remedy: str = "") -> Rendering:
    """Build a :class:`Rendering` from its keys in ``values``, ignoring others.

    Args:
        values: as read from a file.
        where, remedy: prefix and suffix of the error message.

    Raises:
        UserError: a value is not allowed.
    """
    chosen = {name: values[name] for name in NAMES if name in values}
    for name, kind in (("chat_template", ChatTemplate), ("answers", Answers)):
        allowed = typing.get_args(kind)
        if name in chosen and chosen[name] not in allowed:
            raise UserError(f"{where}{name} is {chosen[name]!r}; allowed are {', '.join(allowed)}{remedy}")
    if not isinstance(chosen.get("template_arguments", {}), dict):
        raise UserError(f"{where}template_arguments must be an object{remedy}")
    return Rendering(**chosen)
