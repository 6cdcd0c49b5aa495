"""Values of a study file: read, merged with the files that it extends, and overridden on the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from nemo_rao.config.compose import package_recipes
from nemo_rao.errors import UserError, did_you_mean
from nemo_rao.study.schema import StudyFile

STUDIES = "study"  # directory of the package's studies, next to its recipes


def read_values(path: Path, extended_by: Sequence[Path] = ()) -> dict[str, Any]:
    """Read a file and merge its values over those of the files that it extends; later files win.

    Args:
        extended_by: the files that extend this one, to detect cycles.

    Raises:
        UserError: a file is missing, cannot be read or extends itself.
    """
    values = _read(path)
    below: dict[str, Any] = {}
    extends = values.pop("extends", None) or []
    names = [extends] if isinstance(extends, str) else extends
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: extends: must be the name of a study, or a list of names.")
    for name in names:
        candidates = [folder / name for folder in (path.parent, package_recipes() / STUDIES)]
        candidates += [one.with_name(f"{one.name}.yaml") for one in candidates]
        other = next((one for one in candidates if one.is_file()), None)
        if other is None:
            known = [one.stem for folder in (path.parent, package_recipes() / STUDIES) for one in folder.glob("*.yaml")]
            near = did_you_mean(Path(name).stem, known, otherwise=".")
            raise UserError(
                f"{path}: extends: {name}: no such file in {path.parent} or among the package's studies{near}"
            )
        if other.resolve() in [one.resolve() for one in (*extended_by, path)]:
            raise UserError(f"{path}: extends: {name} leads back to this file. Remove one of the references.")
        below = _merged(below, read_values(other, [*extended_by, path]))
    return _merged(below, values)


def override(values: dict[str, Any], text: str) -> None:
    """Set one key of the study; any other key is a recipe's and goes into ``common``.

    Args:
        values: values, changed in place.
        text: ``key=value``, such as ``seeds=[1,2]``, ``arms.sft.start=runs/sft`` or ``model.optim.lr=1e-6``.

    Raises:
        UserError: it is not ``key=value``, or a part of the key cannot have subkeys.
    """
    name, equals, given = text.partition("=")
    if not name or not equals:
        raise UserError(f"{text!r} is not an override. Write key=value, such as seeds=[1,2].")
    try:
        value = yaml.safe_load(given)
    except yaml.YAMLError:  # {NAME}/file
        value = given
    if isinstance(value, dict) and None in value.values():  # {NAME}
        value = given
    parts = name.split(".")
    if parts[0] not in {field.name for field in dataclasses.fields(StudyFile)}:
        parts = ["common", name]
    elif parts[0] == "common" and len(parts) > 1:
        parts = ["common", ".".join(parts[1:])]
    elif parts[0] == "arms" and parts[2:3] == ["set"] and len(parts) > 3:
        parts = [*parts[:3], ".".join(parts[3:])]
    inside = values
    for part in parts[:-1]:
        if not isinstance(inside.setdefault(part, {}), dict):
            raise UserError(f"{text}: {part} has no subkeys. Set {part} itself.")
        inside = inside[part]
    if value is None and isinstance(inside.get(parts[-1]), dict):
        del inside[parts[-1]]  # like null in a file that extends another
    else:
        inside[parts[-1]] = value


class _Loader(yaml.SafeLoader):
    """A loader that rejects duplicate keys: PyYAML silently keeps the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # <<
                continue
            name = self.construct_object(key_node, deep=True)
            if not isinstance(name, Hashable):
                continue  # refused by the base class
            if name in seen:
                raise UserError(f"line {key_node.start_mark.line + 1}: {name} is given twice. Rename or remove one.")
            seen.add(name)
        return super().construct_mapping(node, deep)


def _read(path: Path) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.load(file, _Loader)  # a SafeLoader
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: invalid YAML: {' '.join(str(error).split())}") from None
    except UserError as error:
        raise UserError(f"{path} {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must be a mapping with arms, such as arms: {{rao: {{recipe: gpt_rao}}}}.")
    return values


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge mappings key by key; other values are replaced, and null removes a mapping."""
    found = dict(below)
    for name, value in above.items():
        if isinstance(value, dict) and isinstance(found.get(name), dict):
            found[name] = _merged(found[name], value)
        elif value is None and name in found and isinstance(found[name], dict):
            del found[name]
        else:
            found[name] = value
    return found
