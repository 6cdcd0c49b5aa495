"""From YAML and ``key=value`` to a typed, checked :class:`RunConfig`.

Hydra finds the files, puts the groups (``model``, ``precision``, ``objective``) together and applies the overrides.
It does not know the keys: its result is typed and checked in :mod:`nemo_rao.config.typed_config`. Every error is a
:class:`UserError` of one line.
"""

import copy
import dataclasses
import os
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import version as hydra_version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, RangeSweep, ValueType
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_rao.config.run_config import RunConfig
from nemo_rao.config.typed_config import (
    alternatives,
    first_line,
    known_keys,
    not_a_value,
    require_known,
    typed_config,
    types_of_keys,
)
from nemo_rao.errors import UserError, did_you_mean
from nemo_rao.other_names import MADE_FILES, objective_hint

QUOTING = "text with commas or brackets is put in quotes twice: 'key=\"a, b\"'"


def compose(
    config_name: str, overrides: Sequence[str] = (), config_dir: str | os.PathLike[str] | None = None
) -> RunConfig:
    """The run that a recipe and the overrides describe.

    Args:
        config_name: a YAML file of ``config_dir`` or of the package, with or without ``.yaml``.
        overrides: ``key=value``, or ``group=file`` such as ``model=llama3_8b``; later ones win.
        config_dir: a directory of the user's own recipes and groups, searched before the package's.

    Raises:
        UserError: one line that names the file, group or key, and what is allowed.
    """
    name, folders = _find(config_name, config_dir)
    groups = _groups(folders)
    composed, grid = _compose_untyped(name, [_prepare(_parse(text), groups) for text in overrides], folders)
    if grid:
        raise UserError(
            f"recipe {name}: a grid of {' and '.join(grid)} is several runs (search=, or hydra.sweeper.params); add "
            "--multirun to the command nemo-rao train, or leave the grid out"
        )
    return typed_config(composed, where=name)


def compose_grid(
    config_name: str, overrides: Sequence[str] = (), config_dir: str | os.PathLike[str] | None = None
) -> list[tuple[tuple[str, ...], RunConfig]]:
    """The runs of a grid: of each the overrides that are its own, and its config. The last key changes first.

    A grid is made of overrides with several values, in Hydra's syntax (``0.05,0.1``, ``choice(a,b)``, ``range(1,4)``),
    and of the same in ``hydra.sweeper.params`` of the recipe or of a group's file (``search=dpo``); what is set in
    ``overrides`` replaces that. Without any, there is one run, without overrides of its own.

    Args:
        config_name, overrides, config_dir: see :func:`compose`.

    Raises:
        UserError: see :func:`compose`; an error in one run is reported with that run's overrides.
    """
    name, folders = _find(config_name, config_dir)
    groups = _groups(folders)
    given = [_parse(text) for text in overrides]
    for text, read in zip(overrides, given, strict=True):
        if read.input_line != text and "," in text:  # not Hydra's syntax, so taken literally
            raise UserError(f'{text}: cannot be read as several values; put each in quotes: \'key="a=1","b=2"\'')
    fixed = [_prepare(one, groups) for one in given if not one.is_sweep_override()]
    _, grid = _compose_untyped(name, fixed, folders)
    by_key = {one.key_or_group: one for one in [*(_parse(f"{key}={value}") for key, value in grid.items()), *given]}
    once = [_prepare(one, groups) for one in by_key.values() if not one.is_sweep_override()]
    combinations = _combinations([one for one in by_key.values() if one.is_sweep_override()])

    of_groups: dict[tuple[str, ...], DictConfig] = {}  # what Hydra has composed, by the choices of groups
    runs = []
    for own in combinations:
        try:
            choices = tuple(text for text in own if text.partition("=")[0] in groups)
            if choices not in of_groups:
                prepared = [_prepare(_parse(text), groups) for text in choices]
                of_groups[choices], its_grid = _compose_untyped(name, [*once, *prepared], folders)
                if its_grid != grid:
                    raise UserError("a file with a grid of its own is chosen once, not swept over")
            values = copy.deepcopy(of_groups[choices])
            _update(values, [text for text in own if text not in choices])
            runs.append((own, typed_config(values, where=name)))
        except UserError as error:
            raise UserError(f"{' '.join(own)}: {error}" if own else str(error)) from None
    return runs


def override(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """The same run with some keys set anew, ``key=value``. Other files of groups can no longer be chosen.

    Raises:
        UserError: see :func:`compose`.
    """
    given = OmegaConf.create(dataclasses.asdict(config))
    _update(given, overrides)
    return typed_config(given, where="of the overrides")


def _update(values: DictConfig, overrides: Sequence[str]) -> None:
    for text in overrides:
        parsed = _parse(_prepare(_parse(text), groups={}))
        OmegaConf.update(values, parsed.key_or_group, parsed.value(), force_add=True)


def package_recipes() -> Path:
    """The folder of the package's recipes: inside it once installed, at the top of a checkout otherwise."""
    package = Path(__file__).resolve().parents[1]
    installed, checkout = package / "conf", package.parent / "conf"
    return installed if installed.is_dir() else checkout


def recipe_names(folders: Sequence[Path]) -> list[str]:
    """Names of the recipes in these folders."""
    return sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})


# ---------------------------------------------------------------------------------------------- overrides and Hydra


def _find(config_name: str, config_dir: str | os.PathLike[str] | None) -> tuple[str, list[Path]]:
    """The recipe's name, and the folders in which it and the files of groups are looked for."""
    folders = [package_recipes()]
    if config_dir is not None:
        own = Path(config_dir).expanduser().resolve()
        if not own.is_dir():
            raise UserError(f"--config-dir {config_dir}: no such folder")
        folders.insert(0, own)
    name = config_name.removesuffix(".yaml").removesuffix(".yml")
    if name not in (known := recipe_names(folders)):
        hint = did_you_mean(name, known) if (other := objective_hint(name)) is None else f": {other}"
        raise UserError(f"no recipe named {name!r}{hint}; there are {', '.join(known)}")
    return name, folders


def _combinations(swept: Sequence[Override]) -> list[tuple[str, ...]]:
    """Every combination of the values of these overrides, each a tuple of ``key=value``; of none, the empty one."""
    for one in swept:
        values = one.value()
        if one.value_type in (ValueType.INTERVAL_SWEEP, ValueType.GLOB_CHOICE_SWEEP) or (
            isinstance(values, (ChoiceSweep, RangeSweep)) and values.shuffle
        ):
            # A shuffled list would be another one on every rank that is started from outside.
            raise UserError(f"{one.input_line}: only a list of values in their order is swept over; write them out")
    try:
        [found] = BasicSweeper.split_arguments(list(swept), max_batch_size=None)
    except (HydraException, ValueError) as error:
        raise UserError(f"{' '.join(str(one.input_line) for one in swept)}: {first_line(error)}") from None
    if not found:
        raise UserError(f"{' '.join(str(one.input_line) for one in swept)}: a range without values; widen it")
    return [tuple(text.lstrip("+") for text in combination) for combination in found]


def _parse(text: str) -> Override:
    """One override, parsed by Hydra; what it cannot parse, such as a path with ``~`` or ``=``, is taken literally."""
    name, equals, value = text.partition("=")
    if not name.strip("+~ ") or (not equals and not text.startswith("~")):
        raise UserError(f"{text!r} is not an override; write key=value, such as trainer.max_steps=100")
    parser = OverridesParser.create()
    try:
        return parser.parse_override(text)
    except HydraException as error:
        if _takes_text(name.strip("+ ")) and value[:1] not in tuple("'\"[{"):
            escaped = value.replace("\\", "\\\\").replace('"', '\\"')
            return parser.parse_override(f'{name}="{escaped}"')
        reason = first_line(error).partition(" expecting")[0]
        raise UserError(f"{text}: cannot be read ({reason}); {QUOTING}") from None


def _prepare(override: Override, groups: dict[str, list[str]]) -> str:
    """The override as Hydra is to see it: its key checked, and allowed to be set whether or not a file sets it."""
    text = override.input_line
    assert text is not None
    name = override.key_or_group
    value = text.partition("=")[2]
    if override.is_sweep_override():
        raise UserError(
            f"{text}: one value at a time is set here; --multirun makes a run of each, a list is written "
            f"{name}=[{value}], and {QUOTING}"
        )
    if name in groups and isinstance(choice := override.value(), str):
        if choice.removesuffix(".yaml") not in groups[name]:
            options = groups[name]
            if (made := MADE_FILES.get((name, choice))) is not None:
                raise UserError(f"{name}={choice}: no such file; {made}")
            raise UserError(
                f"{name}={choice}: no such file{did_you_mean(choice, options)}; there are {', '.join(options)}"
            )
        return f"{name}={choice}" if override.package is None else text
    if override.is_delete():
        raise UserError(f"{text}: keys cannot be deleted; set {name} to null, where its comment allows that")
    require_known(name)
    if name in known_keys() and name not in types_of_keys() and not isinstance(override.value(), dict):
        # Not left to Hydra: to it a group of that name may exist, registered by another package in this process.
        raise not_a_value(name, value)
    if alternatives(types_of_keys().get(name)) <= {str, types.NoneType} and type(override.value()) in (
        int,
        float,
        bool,
    ):
        value = f'"{value}"'  # a name such as 2024_11_21, which Hydra would take for a number
    return f"++{name}={value}"


def _takes_text(name: str) -> bool:
    return bool(alternatives(types_of_keys().get(name)) & {str, Any})


def _compose_untyped(name: str, overrides: Sequence[str], folders: Sequence[Path]) -> tuple[DictConfig, dict[str, str]]:
    """What Hydra makes of a recipe, and the grid in it (``hydra.sweeper.params``: key -> values as they are written).

    A group that the recipe does not choose from is added to it: ``search=dpo`` is to work as ``+search=dpo`` does.

    ``hydra.compose`` is not used: it would let plugins extend the search path, and the one that comes with
    multi-storage-client prints a traceback into every run without such a storage. It would also change global state.
    """
    search_path = ConfigSearchPathImpl()
    search_path.append("hydra", "pkg://hydra.conf")
    for folder in folders:
        search_path.append("recipes", f"file://{folder}")
    search_path.append("schema", "structured://")
    Plugins.instance()  # registers what reads these schemes
    hydra_version.setbase("1.3")
    try:
        loader = ConfigLoaderImpl(search_path)
        if any(not text.startswith("++") for text in overrides):
            chosen = loader.compute_defaults_list(name, [], RunMode.RUN).overrides.known_choices
            overrides = [
                text if text.startswith("++") or text.partition("=")[0] in chosen else f"+{text}" for text in overrides
            ]
        composed = loader.load_configuration(name, list(overrides), run_mode=RunMode.RUN, from_shell=False)
    except yaml.YAMLError as error:
        raise UserError(f"recipe {name}: invalid YAML: {' '.join(str(error).split())}") from None
    except MissingConfigException as error:
        missing = error.missing_cfg_file or "a file of its defaults"
        group, _, choice = missing.rpartition("/")
        options = _groups(folders).get(group, []) if group else recipe_names(folders)
        near = did_you_mean(choice, options)
        raise UserError(f"recipe {name}: there is no {missing}.yaml{near}; there are {', '.join(options)}") from None
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"recipe {name}: {first_line(error)}") from None
    grid = OmegaConf.select(composed, "hydra.sweeper.params") or {}
    values = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    return values, {str(key): str(value) for key, value in grid.items()}


def _groups(folders: Sequence[Path]) -> dict[str, list[str]]:
    """Group (a folder below a recipe folder) -> its files' names."""
    groups: dict[str, set[str]] = {}
    for folder in folders:
        for file in folder.glob("*/**/*.yaml"):
            groups.setdefault(file.parent.relative_to(folder).as_posix(), set()).add(file.stem)
    return {group: sorted(names) for group, names in groups.items()}
