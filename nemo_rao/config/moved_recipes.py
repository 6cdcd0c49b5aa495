"""Deprecated names of recipes, valid until 0.3: recipes that only combined an objective with a model's files.

Each is now the objective's recipe with these files chosen, such as ``gpt_dpo model=llama3_8b``. An old name composes
the same config as its file did, and a warning states the replacement. Hydra sees the old names as files at the end of
its search path: a user's file of the same name is found first, and a user's recipe may list an old name in its
defaults.
"""

from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from omegaconf import OmegaConf

from nemo_rao.runtime.console import warn_once

REMOVED_IN = "0.3"

_BASELINES = ("dpo", "dro", "ipo", "orpo", "robust_po", "simpo", "slic")  # of the RAO paper
_ITS_MODELS = ("eurollm_9b", "llama3_8b", "qwen2_5_7b")
_LARGER_MODELS = (
    *("llama3_1_405b", "llama3_70b", "llama3_70b_lora", "mixtral_8x7b"),
    *("qwen2_5_72b", "qwen3_30b_a3b", "qwen3_32b", "qwen3_8b"),
)

# Old name -> the recipe that replaces it, and the file to choose in each group.
MOVED_RECIPES: dict[str, tuple[str, dict[str, str]]] = {
    **{
        f"gpt_{objective}_{model}": (
            f"gpt_{objective}",
            {"model": model, "precision": "bf16_mixed", "paper": "rao_2026_baselines"},
        )
        for objective in _BASELINES
        for model in _ITS_MODELS
    },
    **{f"gpt_dpo_{model}": ("gpt_dpo", {"model": model, "precision": "bf16_mixed"}) for model in _LARGER_MODELS},
}

_CHOSEN = ("model", "precision")  # groups in the defaults of an objective's recipe, to be overridden there
SEARCH_PATH = ("moved", "moved://recipes")  # Hydra's provider and path of the old names


def replacement(old: str) -> tuple[str, list[str]]:
    """The recipe and overrides equivalent to an old name, including the run's name and therefore its directory.

    Args:
        old: a name in :data:`MOVED_RECIPES`.
    """
    recipe, groups = MOVED_RECIPES[old]
    return recipe, [*(f"{group}={file}" for group, file in groups.items()), f"exp_manager.name={old}"]


class MovedRecipes(ConfigSource):
    """The old names as files for Hydra. Loading one warns: Hydra does so only to compose it, wherever it is named."""

    @staticmethod
    def scheme() -> str:
        return "moved"

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return False

    def is_config(self, config_path: str) -> bool:
        return config_path.removesuffix(".yaml") in MOVED_RECIPES

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        return []  # the old names are not in groups

    def load_config(self, config_path: str) -> ConfigResult:
        old = config_path.removesuffix(".yaml")
        if old not in MOVED_RECIPES:
            raise ConfigLoadError(f"no recipe named {old}")
        recipe, overrides = replacement(old)
        warn_once(f"{old} is now: --config-name {recipe} {' '.join(overrides)}. The old name works until {REMOVED_IN}.")
        return ConfigResult(self.provider, self.full_path(), OmegaConf.create(_file(old)), header={"package": None})


def _file(old: str) -> dict[str, object]:
    """What the YAML file of an old name would contain."""
    recipe, groups = MOVED_RECIPES[old]
    return {
        "defaults": [
            recipe,
            *({group: file} for group, file in groups.items() if group not in _CHOSEN),
            "_self_",
            *({f"override {group}": file} for group, file in groups.items() if group in _CHOSEN),
        ],
        "exp_manager": {"name": old},
    }


Plugins.instance().register(MovedRecipes)
