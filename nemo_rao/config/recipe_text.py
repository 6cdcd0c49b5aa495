"""A recipe as YAML: every key with its comment and allowed values."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import yaml

from nemo_rao.config.run_config import RunConfig
from nemo_rao.keys import KeySpec


def to_yaml(config: RunConfig) -> str:
    """The full resolved recipe, each key with its comment beside it; the text is itself a valid recipe."""
    return "\n".join(_yaml_lines(config, indent="")) + "\n"


def _yaml_lines(config: Any, indent: str) -> Iterator[str]:
    for field in dataclasses.fields(config):
        spec, value = field.metadata["key"], vars(config)[field.name]
        beside = "  # " + spec.comment + limits(spec)
        if dataclasses.is_dataclass(value):
            yield f"{indent}{field.name}:{beside}"
            yield from _yaml_lines(value, indent + "  ")
        else:
            yield f"{indent}{field.name}: {shown(value)}{beside}"


def limits(spec: KeySpec) -> str:
    """The key's allowed values, to append to its comment: `` [> 0, <= 1]``."""
    if spec.choices is not None:
        return f" [{' | '.join(map(shown, spec.choices))}]"
    equal = "" if spec.exclusive else "="
    bounds = [
        f"{sign}{equal} {bound:g}"
        for sign, bound in ((">", spec.low), ("<", spec.high))
        if bound is not None and math.isfinite(bound)
    ]
    return f" [{', '.join(bounds)}]" if bounds else ""


def shown(value: Any) -> str:
    """A value as YAML on one line."""
    text = yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True, width=math.inf)
    return text.removesuffix("\n").removesuffix("\n...")
