"""Settings that determine what is trained on, for display."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemo_rao.config.derived import chosen_responses, total_steps
from nemo_rao.config.run_config import DataConfig, RunConfig
from nemo_rao.data.encode import Encoder
from nemo_rao.errors import UserError
from nemo_rao.objectives import registry
from nemo_rao.show.pieces import Decode, visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Keys of ``data`` that do not change the interpretation of rows, or that are shown elsewhere.
_UNSHOWN = {
    *("train_path", "tokenizer", "cache", "cache_dir", "shuffle", "pad_to_multiple_of", "packing", "prefix_sharing"),
}


@dataclass(frozen=True)
class Setting:
    """A setting that determines what is trained on.

    Attributes:
        is_default: whether it has its default value.
    """

    name: str
    value: str
    is_default: bool = False


def steps(config: RunConfig, num_prompts: int) -> str:
    """Length of the run, "144 steps of 8 prompts (3 epochs)", or why it cannot run."""
    batch = config.model.global_batch_size
    try:
        number = total_steps(config, num_prompts)
    except UserError as error:
        return f"cannot train yet: {error}"
    epochs = f"{number * batch / num_prompts:.3g}"
    length = f"{number:,} step{'' if number == 1 else 's'} of {batch:,} prompts"
    return f"{length} ({epochs} epoch{'' if epochs == '1' else 's'})"


def settings(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder,
    decode: Decode,
    first_token: int,
    resolved: Any,
) -> list[Setting]:
    """Keys that determine the interpretation of rows, and properties of the tokenizer.

    Args:
        first_token: first token of the prompts.
        resolved: the objective's keys, with data-dependent ones resolved.
    """
    objective = registry.get(config.model.objective)
    template = "none: plain text"
    if encoder.uses_template:
        template = "the tokenizer's"
    elif tokenizer.chat_template is None:
        template = "none: plain text, since the tokenizer has no template"
    found = [
        Setting("objective", f"{objective.name}: {objective.formula}"),
        Setting("model.seq_length", f"{config.model.seq_length:,} tokens"),
        Setting("data.tokenizer", f"{config.data.tokenizer} ({len(tokenizer):,} tokens)"),
        Setting("chat template", template),
        Setting("first token", f"{visible(decode([first_token]))!s} ({first_token})"),
        Setting("end token", f"{visible(decode([encoder.end_token_id]))!s} ({encoder.end_token_id})"),
    ]
    for field in dataclasses.fields(DataConfig):
        if field.name in _UNSHOWN:
            continue
        value, default = vars(config.data)[field.name], vars(DataConfig())[field.name]
        if field.name == "responses" and value is None:
            found.append(Setting("data.responses", f"null: {chosen_responses(config)}", True))
            continue
        found.append(Setting(f"data.{field.name}", _text(value), value == default))
    defaults = objective.config_type()
    for field in dataclasses.fields(resolved):
        value = vars(resolved)[field.name]
        is_default = value == vars(defaults)[field.name]
        found.append(Setting(f"model.{objective.name}.{field.name}", _text(value), is_default))
    return found


def _text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value)
