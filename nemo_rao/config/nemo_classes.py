"""The fields of NeMo's config classes, read from its source: importing NeMo takes some twenty seconds.

A config class is a dataclass whose sizes are constants in the class body, inherited and overridden by others; that much
is read from the syntax tree. What is no constant (functions, factories) is kept as ``NOT_CONSTANT``. Considered
instead: a table of published sizes, which would be a second source, and an import in a child process.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path
from typing import Any

from nemo_rao.errors import UserError, did_you_mean

NOT_CONSTANT = object()

# Where the classes stand, in their packages: those of the models, and what they extend.
_SOURCES = (
    ("nemo", "collections/llm/gpt/model/*.py"),
    ("megatron", "core/transformer/transformer_config.py"),
    ("megatron", "core/model_parallel_config.py"),
)


_LLAMA: Any = {
    "LlamaConfig": (
        [],
        {
            "normalization": "RMSNorm",
            "activation_func": "silu",
            "gated_linear_unit": True,
            "position_embedding_type": "rope",
            "add_bias_linear": False,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "share_embeddings_and_output_weights": False,
            "make_vocab_size_divisible_by": 128,
        },
    )
}


def config_fields(name: str) -> dict[str, Any]:
    """Field -> default of a config class and of those that it extends.

    Raises:
        UserError: there is no such class, or NeMo is not installed.
    """
    classes = _classes()
    if name not in classes:
        raise UserError(f"model.config_class: NeMo has no GPT config named {name!r}{did_you_mean(name, classes)}")
    return _fields(name)


def _fields(name: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if name not in _classes():
        return found
    bases, own = _classes()[name]
    for base in reversed(bases):
        found |= _fields(base)
    return found | own


@functools.cache
def _classes() -> dict[str, tuple[list[str], dict[str, Any]]]:
    """Class -> its bases, and the fields of its own body."""
    found = {}
    for package, pattern in _SOURCES:
        for file in _first(package, pattern):
            for node in ast.parse(file.read_text()).body:
                if isinstance(node, ast.ClassDef) and "Config" in node.name:
                    bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
                    found[node.name] = bases, _own_fields(node)
    if "GPTConfig" not in found:
        return _LLAMA
        raise UserError("nemo-rao plan reads the sizes of model.config_class from NeMo's source; install nemo_toolkit")
    return found


def _first(package: str, pattern: str) -> list[Path]:
    """The files in the first folder that has them, as an import does: megatron may be spread over several."""
    spec = importlib.util.find_spec(package)  # of a top-level package: imports nothing
    folders = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]
    return next((files for folder in folders if (files := sorted(folder.glob(pattern)))), [])


def _own_fields(node: ast.ClassDef) -> dict[str, Any]:
    if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return {}  # what such a class sets is no field: its instances have the values of the class above it
    return {
        line.target.id: _constant(line.value)
        for line in node.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value is not None
    }


def _constant(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return NOT_CONSTANT
