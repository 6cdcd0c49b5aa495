"""From YAML and ``key=value`` to a typed, checked :class:`RunConfig`.

Hydra finds the files, composes the groups (``model``, ``precision``, ``objective``) and parses the overrides. It does
not know the keys: its result is typed and checked in :mod:`nemo_rao.config.typed_config`. Every error is a one-line
:class:`UserError`.

Hydra takes about 0.1 s to compose a recipe. A process that composes one of the package's recipes many times, such as a
study, pays this once: the composition of the recipe with its groups is cached until one of the YAML files changes, and
values are set in a copy.
"""

import contextlib
import copy
import dataclasses
import functools
import itertools
import os
import types
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import yaml
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, RangeSweep, ValueType
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_rao.config.moved_recipes import MOVED_RECIPES, SEARCH_PATH
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

QUOTING = "quote text with commas or brackets twice: 'key=\"a, b\"'"


def compose(
    config_name: str, overrides: Sequence[str] = (), config_dir: str | os.PathLike[str] | None = None
) -> RunConfig:
    """The run described by a recipe and overrides.

    Args:
        config_name: a YAML file of ``config_dir`` or of the package, with or without ``.yaml``, or a deprecated
            name (:mod:`nemo_rao.config.moved_recipes`).
        overrides: ``key=value``, or ``group=file`` such as ``model=llama3_8b``; later ones win.
        config_dir: a directory of the user's own recipes and groups, searched before the package's.

    Raises:
        UserError: one line with the file, group or key, and what is allowed.
    """
    name, recipes = _find(config_name, config_dir)
    composed, grid = _compose_untyped(name, [_prepare(_parse(text), recipes.groups) for text in overrides], recipes)
    if grid:
        raise UserError(
            f"recipe {name}: a grid over {' and '.join(grid)} is several runs (search=, or hydra.sweeper.params); "
            "add --multirun to nemo-rao train, or remove the grid"
        )
    return typed_config(composed, where=name)


def compose_grid(
    config_name: str, overrides: Sequence[str] = (), config_dir: str | os.PathLike[str] | None = None
) -> list[tuple[tuple[str, ...], RunConfig]]:
    """The runs of a grid: for each run, its overrides and its config. The last key varies fastest.

    A grid consists of overrides with several values, in Hydra's syntax (``0.05,0.1``, ``choice(a,b)``,
    ``range(1,4)``), and of those in ``hydra.sweeper.params`` of the recipe or of a group's file (``search=dpo``);
    ``overrides`` take precedence. Without any, there is a single run, which has no overrides.

    Args:
        config_name, overrides, config_dir: see :func:`compose`.

    Raises:
        UserError: see :func:`compose`; an error in one run is reported with that run's overrides.
    """
    name, recipes = _find(config_name, config_dir)
    groups = recipes.groups
    given = [_parse(text) for text in overrides]
    for text, read in zip(overrides, given, strict=True):
        if read.input_line != text and "," in text:  # not Hydra's syntax, so taken literally
            raise UserError(f'{text}: cannot be parsed as several values; quote each: \'key="a=1","b=2"\'')
    fixed = [_prepare(one, groups) for one in given if not one.is_sweep_override()]
    _, grid = _compose_untyped(name, fixed, recipes)
    by_key = {one.key_or_group: one for one in [*(_parse(f"{key}={value}") for key, value in grid.items()), *given]}
    once = [_prepare(one, groups) for one in by_key.values() if not one.is_sweep_override()]
    combinations = _combinations([one for one in by_key.values() if one.is_sweep_override()])

    of_groups: dict[tuple[str, ...], DictConfig] = {}  # compositions by the choices of groups
    runs = []
    for own in combinations:
        try:
            choices = tuple(text for text in own if text.partition("=")[0] in groups)
            if choices not in of_groups:
                prepared = [_prepare(_parse(text), groups) for text in choices]
                of_groups[choices], its_grid = _compose_untyped(name, [*once, *prepared], recipes)
                if its_grid != grid:
                    raise UserError("cannot sweep over a file that contains a grid; choose one file")
            values = copy.deepcopy(of_groups[choices])
            _update(values, [text for text in own if text not in choices])
            runs.append((own, typed_config(values, where=name)))
        except UserError as error:
            raise UserError(f"{' '.join(own)}: {error}" if own else str(error)) from None
    return runs


def override(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """A copy of the run with some keys overridden, ``key=value``. Groups can no longer be chosen.

    Raises:
        UserError: see :func:`compose`.
    """
    given = OmegaConf.create(dataclasses.asdict(config))
    _update(given, overrides)
    return typed_config(given, where="of the overrides")


def _update(values: DictConfig, overrides: Sequence[str]) -> None:
    for text in overrides:
        _set(values, _prepare(_parse(text), groups={}))


def _set(values: DictConfig, prepared: str) -> None:
    """Apply ``++key=value``, as Hydra does: dictionaries are merged."""
    parsed = _parse(prepared)
    try:
        OmegaConf.update(values, parsed.key_or_group, parsed.value(), force_add=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{prepared.lstrip('+')}: {first_line(error)}") from None


def package_recipes() -> Path:
    """The directory of the package's recipes: in the package if it is installed, else at the top of the checkout."""
    package = Path(__file__).resolve().parents[1]
    installed, checkout = package / "conf", package.parent / "conf"
    return installed if installed.is_dir() else checkout


def recipe_names(folders: Sequence[Path]) -> list[str]:
    """Names of the recipes in these directories."""
    return sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})


# ---------------------------------------------------------------------------------------------- overrides and Hydra


class _File(NamedTuple):
    """A YAML file, with the modification time and size that show whether it has changed."""

    path: str
    mtime_ns: int
    size: int


@dataclasses.dataclass(frozen=True)
class _Recipes:
    """The directories searched for recipes and groups, in this order, and the YAML files in each."""

    folders: tuple[Path, ...]
    files: tuple[tuple[_File, ...], ...]

    @functools.cached_property
    def names(self) -> list[str]:
        """Names of the recipes: the files at the top of a directory."""
        return sorted({Path(file.path).stem for files in self.files for file in files if "/" not in file.path})

    @functools.cached_property
    def groups(self) -> dict[str, list[str]]:
        """Group (a subdirectory of a recipe directory) -> names of its files."""
        groups: dict[str, set[str]] = {}
        for file in itertools.chain(*self.files):
            group, slash, name = file.path.rpartition("/")
            if slash:
                groups.setdefault(group, set()).add(name.removesuffix(".yaml"))
        return {group: sorted(names) for group, names in sorted(groups.items())}


def _yaml_files(folder: Path) -> Iterator[_File]:
    for parent, _, names in os.walk(folder):
        for name in names:
            if name.endswith(".yaml"):
                path = os.path.join(parent, name)
                with contextlib.suppress(FileNotFoundError):  # deleted since, or a broken link
                    status = os.stat(path)
                    yield _File(path.removeprefix(f"{folder}/"), status.st_mtime_ns, status.st_size)


def _find(config_name: str, config_dir: str | os.PathLike[str] | None) -> tuple[str, _Recipes]:
    """The recipe's name, and the directories searched for it and for groups."""
    folders = [package_recipes()]
    if config_dir is not None:
        own = Path(config_dir).expanduser().resolve()
        if not own.is_dir():
            raise UserError(f"--config-dir {config_dir}: no such directory")
        folders.insert(0, own)
    recipes = _Recipes(tuple(folders), tuple(tuple(sorted(_yaml_files(folder))) for folder in folders))
    name = config_name.removesuffix(".yaml").removesuffix(".yml")
    if name not in (known := recipes.names) and name not in MOVED_RECIPES:
        near = did_you_mean(name, [*known, *MOVED_RECIPES], otherwise=".")
        hint = near if (other := objective_hint(name)) is None else f": {other}."
        raise UserError(f"no recipe named {name!r}{hint} The recipes are {', '.join(known)}.")
    return name, recipes


def _combinations(swept: Sequence[Override]) -> list[tuple[str, ...]]:
    """All combinations of the values of these overrides, each a tuple of ``key=value``; ``[()]`` without overrides."""
    for one in swept:
        values = one.value()
        if one.value_type in (ValueType.INTERVAL_SWEEP, ValueType.GLOB_CHOICE_SWEEP) or (
            isinstance(values, (ChoiceSweep, RangeSweep)) and values.shuffle
        ):
            # Ranks started by srun or torchrun would each shuffle differently.
            raise UserError(f"{one.input_line}: only an ordered list of values can be swept over; write them out")
    try:
        choices = [
            [f"{one.get_key_element().lstrip('+')}={value}" for value in one.sweep_string_iterator()] for one in swept
        ]
    except (HydraException, ValueError) as error:
        raise UserError(f"{' '.join(str(one.input_line) for one in swept)}: {first_line(error)}") from None
    for one, values in zip(swept, choices, strict=True):
        if not values:
            raise UserError(f"{one.input_line}: the range is empty; widen it")
    return list(itertools.product(*choices))


@functools.lru_cache(maxsize=4096)  # parsing takes milliseconds; the result is only read
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
        raise UserError(f"{text}: cannot be parsed ({reason}); {QUOTING}") from None


def _prepare(override: Override, groups: dict[str, list[str]]) -> str:
    """The override in its final form: ``group=file``, or ``++key=value`` with a checked key.

    ``++``, because a key may be set whether or not a file sets it.
    """
    text = override.input_line
    assert text is not None
    name = override.key_or_group
    value = text.partition("=")[2]
    if override.is_sweep_override():
        raise UserError(
            f"{text}: must be a single value; add --multirun for a run of each, write a list as {name}=[{value}], or "
            f"{QUOTING}"
        )
    if name in groups and isinstance(choice := override.value(), str):
        if choice.removesuffix(".yaml") not in groups[name]:
            options = groups[name]
            if (made := MADE_FILES.get((name, choice))) is not None:
                raise UserError(f"{name}={choice}: no such file; {made}")
            near = did_you_mean(choice, options, otherwise=".")
            raise UserError(f"{name}={choice}: no such file{near} The files are {', '.join(options)}.")
        return f"{name}={choice}" if override.package is None else text
    if override.is_delete():
        raise UserError(f"{text}: keys cannot be deleted; set {name} to null if its comment allows it")
    require_known(name)
    if name in known_keys() and name not in types_of_keys() and not isinstance(override.value(), dict):
        raise not_a_value(name, value)
    if alternatives(types_of_keys().get(name)) <= {str, types.NoneType} and type(override.value()) in (
        int,
        float,
        bool,
    ):
        value = f'"{value}"'  # text such as 2024_11_21, which Hydra parses as a number
    return f"++{name}={value}"


def _takes_text(name: str) -> bool:
    return bool(alternatives(types_of_keys().get(name)) & {str, Any})


def _compose_untyped(name: str, prepared: Sequence[str], recipes: _Recipes) -> tuple[DictConfig, dict[str, str]]:
    """A recipe with overrides, and its grid (``hydra.sweeper.params``: key -> values as written).

    A group that is not in the recipe's defaults is added to them: ``search=dpo`` works like ``+search=dpo``.
    """
    choices = [text for text in prepared if not text.startswith("++")]
    if choices:
        chosen = _composition(name, (), recipes).choices
        choices = [text if text.partition("=")[0] in chosen else f"+{text}" for text in choices]
    composition = _composition(name, tuple(choices), recipes)
    values = copy.deepcopy(composition.values)
    for text in prepared:
        if text.startswith("++"):
            _set(values, text)
    return values, dict(composition.grid)


class _Composition(NamedTuple):
    """Hydra's composition of a recipe and choices of groups; shared, so it must not be modified."""

    values: DictConfig
    grid: dict[str, str]
    choices: frozenset[str]  # the groups in the defaults


def _composition(name: str, choices: tuple[str, ...], recipes: _Recipes) -> _Composition:
    # A user's recipe may depend on more than its files: on environment variables in its defaults list
    # (${oc.env:NAME}), and on further directories (hydra.searchpath). The package's recipes do not.
    if recipes.folders == (package_recipes(),):
        return _cached_composition(name, choices, recipes)
    return _compose_with_hydra(name, choices, recipes)


@functools.lru_cache(maxsize=512)
def _cached_composition(name: str, choices: tuple[str, ...], recipes: _Recipes) -> _Composition:
    return _compose_with_hydra(name, choices, recipes)


def _compose_with_hydra(name: str, choices: tuple[str, ...], recipes: _Recipes) -> _Composition:
    try:
        with _initialized(recipes.folders):
            composed = hydra.compose(name, list(choices), return_hydra_config=True)
    except yaml.YAMLError as error:
        raise UserError(f"recipe {name}: invalid YAML: {' '.join(str(error).split())}") from None
    except MissingConfigException as error:
        missing = error.missing_cfg_file or "a file of its defaults"
        group, _, choice = missing.rpartition("/")
        options = recipes.groups.get(group, []) if group else recipes.names
        near = did_you_mean(choice, options, otherwise=".")
        files = f"The files are {', '.join(options)}."
        raise UserError(f"recipe {name}: there is no {missing}.yaml{near} {files}") from None
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"recipe {name}: {first_line(error)}") from None
    grid = OmegaConf.select(composed, "hydra.sweeper.params") or {}
    values = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    return _Composition(
        values,
        {str(key): str(value) for key, value in grid.items()},
        frozenset(map(str, composed.hydra.runtime.choices)),
    )


_searched: ContextVar[tuple[Path, ...]] = ContextVar("_searched", default=())


class _RecipeFolders(SearchPathPlugin):
    """Restricts Hydra's search path to the recipe directories while one of our recipes is composed.

    Plugins of other packages extend the search path of every application in the process. That of multi-storage-client,
    which NeMo installs, logs a traceback if no such storage is configured. Plugins are called in the order of their
    registration, so this one comes last.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if folders := _searched.get():
            elements = search_path.get_path()
            elements[:] = [element for element in elements if element.provider == "hydra"]
            for folder in folders:
                search_path.append("main", f"file://{folder}")
            search_path.append(*SEARCH_PATH)


@contextlib.contextmanager
def _initialized(folders: tuple[Path, ...]) -> Iterator[None]:
    """Initialize Hydra for these directories, and restore its global state afterwards."""
    Plugins.instance().register(_RecipeFolders)  # has no effect the second time
    outer = GlobalHydra.instance().hydra  # set if the application uses Hydra itself
    GlobalHydra.instance().clear()
    token = _searched.set(folders)
    try:
        with hydra.initialize_config_dir(str(folders[0]), version_base="1.3"):
            yield
    finally:
        _searched.reset(token)
        GlobalHydra.instance().clear()
        if outer is not None:
            GlobalHydra.instance().initialize(outer)
