"""Sizes of NeMo's config classes, which recipes named before ``model.family`` existed, read from NeMo's source.

Importing NeMo takes some twenty seconds. A config class is a dataclass whose sizes are constants in the class body,
inherited and overridden by others; this is read from the syntax tree. Values that are not constant (functions) are
represented by ``NOT_CONSTANT``. Alternatives considered: a table of the classes' sizes, which would be a second source,
and an import in a child process.

This module is imported only if a recipe names such a class, by :mod:`nemo_rao.config.architecture`.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_rao.config.families import FAMILIES, SIZES
from nemo_rao.errors import UserError, did_you_mean

NOT_CONSTANT = object()

# Files of the classes within their packages: those of the models, and their base classes.
_SOURCES = (
    ("nemo", "collections/llm/gpt/model/*.py"),
    ("megatron", "core/transformer/transformer_config.py"),
    ("megatron", "core/model_parallel_config.py"),
)

# Class -> the family of its subclasses, as far as they are in the same files: embedding models and networks of unequal
# layers are subclasses in other files.
_FAMILIES = {
    "LlamaConfig": "llama",
    "MistralConfig7B": "mistral",
    "MixtralConfig": "mixtral",
    "Qwen2Config": "qwen2",
    "Qwen3Config": "qwen3",
    "Qwen3MoEConfig": "qwen3_moe",
}
_FILES = ("llama", "mistral", "mixtral", "qwen2", "qwen3")
_OTHER = "Llama4Config"  # defined in one of them
# Fields of NeMo's Llama 3.1 -> those of ``model.arch.rope_scaling``.
ROPE_SCALING = {
    "scale_factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "old_context_len": "original_max_position_embeddings",
}


def fields_of_class(name: str, given: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Return the family of a config class, and its fields, overridden by ``given``.

    Returns:
        ``(family, fields)`` with the field names of :mod:`nemo_rao.config.families`; or ``(None, fields)`` with NeMo's
        names if the class belongs to no family there.

    Raises:
        UserError: the class does not exist, or NeMo is not installed.
    """
    read, family = config_fields(name), _family(name)
    if family is None:
        return None, {**read, **given}
    fields = {**dict.fromkeys(SIZES), **FAMILIES[family].fields}
    fields |= {key: read[key] for key in fields if read.get(key, NOT_CONSTANT) is not NOT_CONSTANT}
    fields |= {key: value for key, value in given.items() if key not in (*ROPE_SCALING, "cp_comm_type")}
    if "scale_factor" in read:
        fields["rope_scaling"] = {new: given.get(old, read[old]) for old, new in ROPE_SCALING.items()}
    return family, fields


def _family(name: str) -> str | None:
    """Return the family of the class, or of its nearest base class."""
    if name not in _classes() or name == _OTHER:
        return None
    bases, _, file = _classes()[name]
    if file not in _FILES:
        return None
    return _FAMILIES.get(name) or next((found for base in bases if (found := _family(base))), None)


def config_fields(name: str) -> dict[str, Any]:
    """Map the fields of a config class, including inherited ones, to their defaults, by NeMo's names.

    Raises:
        UserError: the class does not exist, or NeMo is not installed.
    """
    classes = _classes()
    if name not in classes:
        raise UserError(
            f"model.config_class: NeMo has no GPT config named {name!r}{did_you_mean(name, classes, otherwise='.')}"
        )
    return _fields(name)


def _fields(name: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if name not in _classes():
        return found
    bases, own, _ = _classes()[name]
    for base in reversed(bases):
        found |= _fields(base)
    return found | own


@functools.cache
def _classes() -> dict[str, tuple[list[str], dict[str, Any], str]]:
    """Map each class to its bases, the fields of its body, and the name of its file."""
    found = {}
    for package, pattern in _SOURCES:
        for file in _first(package, pattern):
            for node in ast.parse(file.read_text()).body:
                if isinstance(node, ast.ClassDef) and "Config" in node.name:
                    bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
                    found[node.name] = bases, _own_fields(node), file.stem
    if "GPTConfig" not in found:
        raise UserError(
            "model.config_class: names a class of NeMo, which is not installed. Set model.family and model.arch."
        )
    return found


def _first(package: str, pattern: str) -> list[Path]:
    """Return the files in the first directory that has them, like an import: megatron may be a namespace package."""
    spec = importlib.util.find_spec(package)  # imports nothing for a top-level package
    folders = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]
    return next((files for folder in folders if (files := sorted(folder.glob(pattern)))), [])


def _own_fields(node: ast.ClassDef) -> dict[str, Any]:
    if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return {}  # attributes of such a class are not fields: instances have the values of its base class
    return {
        line.target.id: _constant(line.value)
        for line in node.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value is not None
    }


def _constant(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("field", "dataclasses.field"):
        made = next((each.value for each in node.keywords if each.arg == "default_factory"), node)
        node = made.body if isinstance(made, ast.Lambda) else node
    try:
        return ast.literal_eval(node)
    except ValueError:
        return NOT_CONSTANT
