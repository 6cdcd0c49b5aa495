"""References ``{NAME}`` in the values of a study: to an arm's run, or to files that the study makes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nemo_rao.errors import UserError, did_you_mean
from nemo_rao.study.schema import Study

_REFERENCE = re.compile(r"\{([A-Za-z0-9_-]+)\}")


def references(value: Any, study: Study, where: str, *, per_seed: bool = True) -> list[str]:
    """Return the names that a value refers to, each once.

    Args:
        value: a YAML value; mappings and lists are searched.
        where: the value's key, for errors.
        per_seed: whether the value may refer to arms that are trained with every seed.

    Raises:
        UserError: there is no such arm or file, or the arm is trained with every seed and that is not allowed.
    """
    found = []
    for text in _texts(value):
        for name in _REFERENCE.findall(text):
            known = [*study.arms, *study.files]
            if name not in known:
                near = did_you_mean(name, known, otherwise=".")
                raise UserError(
                    f"{where}: {{{name}}} is neither an arm nor files of this study{near} Known names are "
                    f"{', '.join(known)}."
                )
            if not per_seed and name in study.arms and not study.arms[name].once:
                raise UserError(f"{where}: {{{name}}} is trained with every seed. Set arms.{name}.once: true.")
            found.append(name)
    return list(dict.fromkeys(found))


def resolved(value: Any, paths: Mapping[str, str]) -> Any:
    """Replace the references in a value by ``paths``; other text in braces is unchanged."""
    if isinstance(value, str):
        return _REFERENCE.sub(lambda found: paths.get(found[1], found[0]), value)
    if isinstance(value, Mapping):
        return {name: resolved(one, paths) for name, one in value.items()}
    return [resolved(one, paths) for one in value] if isinstance(value, list) else value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, Sequence):
        for one in value:
            yield from _texts(one)
