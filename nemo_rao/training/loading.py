"""Load a run's data: read, tokenized and checked according to its recipe, or from the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from nemo_rao.batch import Row
from nemo_rao.config.derived import chosen_responses, data_cache_dir, objective_config
from nemo_rao.config.run_config import RunConfig
from nemo_rao.data.cache import DataCache
from nemo_rao.data.dataset import load_preferences
from nemo_rao.data.encode import load_tokenizer, pad_token_id
from nemo_rao.data.overlap import shared_prompts
from nemo_rao.data.prompt_set import load_prompts
from nemo_rao.data.rendering_record import ChatTemplate
from nemo_rao.data.store import PreferenceData
from nemo_rao.errors import UserError
from nemo_rao.objectives import registry
from nemo_rao.runtime.console import is_first_rank, say
from nemo_rao.runtime.progress import Progress
from nemo_rao.scoring.rule import asked_for, find_function, rules_among


@dataclass(frozen=True)
class LoadedData:
    """The data of a run.

    Attributes:
        train: all training data, before ``data.num_prompts`` are drawn.
        validation: the validation data, or ``None``.
        num_tokens: size of the tokenizer's vocabulary.
        pad_token_id: see :func:`nemo_rao.data.tokens.pad_token_id`.
        prompts, validation_prompts: for a run that samples its own responses, ``train`` and ``validation`` as text
            without responses; empty otherwise.
    """

    train: PreferenceData
    validation: PreferenceData | None
    num_tokens: int
    pad_token_id: int
    prompts: Sequence[Row] = ()
    validation_prompts: Sequence[Row] = ()


def load_data(config: RunConfig) -> LoadedData:
    """Read, tokenize and check a run's data, or read it from the cache. See :func:`train` for the errors."""
    return _load_preferences(config) if config.online.num_generations is None else _load_prompts(config)


def _load_prompts(config: RunConfig) -> LoadedData:
    keys, length = config.data, config.model.seq_length
    tokenizer = load_tokenizer(keys.tokenizer or "")
    needs = registry.get(config.model.objective).needs_of(objective_config(config))
    rules = [asked_for(find_function(path)) for path in rules_among(config.online.reward).values()]

    def load(paths: Any, label: str) -> tuple[PreferenceData, list[Row]]:
        data, prompts = load_prompts(
            paths,
            tokenizer,
            longest=_longest_prompt(config),
            set_by=f"model.seq_length={length} minus online.max_new_tokens={config.online.max_new_tokens}",
            strict=keys.strict,
            needs_shared_first_token=needs.shared_first_token,
            needed_by=f"objective {config.model.objective}",
            chat_template=cast(ChatTemplate, keys.chat_template),
            template_arguments=keys.template_arguments,
            columns=keys.columns,
            ignore_fields=keys.ignore_fields,
            is_read=lambda name: any(rule.is_read(name) for rule in rules),
        )
        say(f"{label}: {data.report.text()}")
        return data, prompts

    train, prompts = load(keys.train_path, "training data")
    loaded = LoadedData(train, None, len(tokenizer), pad_token_id(tokenizer), prompts)
    if keys.validation_path is None:
        return loaded
    validation, validation_prompts = load(keys.validation_path, "validation data")
    if (shared := shared_prompts(train, validation)) is not None:
        say(f"validation data: {shared}")
    return replace(loaded, validation=validation, validation_prompts=validation_prompts)


def _longest_prompt(config: RunConfig) -> int:
    """Maximum tokens of a prompt that leave room for a sampled response."""
    return config.model.seq_length - config.online.max_new_tokens


def _load_preferences(config: RunConfig) -> LoadedData:
    tokenizer, wanted, folder = load_tokenizer(config.data.tokenizer or ""), wanted_rows(config), data_cache_dir(config)
    cache = None if folder is None else DataCache(folder, tokenizer)

    said: list[str] = []  # about the tokenizer, which is the same for all data

    def load(paths: Any, label: str) -> PreferenceData:
        shown = is_first_rank() and config.trainer.enable_progress_bar
        with Progress(label, unit="row", shown=shown, stays=False) as progress:
            if cache is None:
                data, remark = load_preferences(paths, tokenizer, progress=progress.update, **wanted), ""
            else:
                data, remark = cache.load(
                    paths,
                    progress=progress.update,
                    waiting=lambda: say(f"{label}: another process is reading it; waiting for it"),
                    **wanted,
                )
        say(f"{label}: {data.report.text(remark, already_reported=said)}")
        said.extend(data.report.notes)
        return data

    train, validation = load(config.data.train_path, "training data"), None
    if config.data.validation_path is not None:
        validation = load(config.data.validation_path, "validation data")
        if (shared := shared_prompts(train, validation)) is not None:
            say(f"validation data: {shared}")
    return LoadedData(train, validation, len(tokenizer), pad_token_id(tokenizer))


def data_identity(config: RunConfig) -> str:
    """A key that is equal for runs for which :func:`load_data` returns the same data."""
    paths = (config.data.train_path, config.data.validation_path, config.data.tokenizer)
    samples = None if config.online.num_generations is None else _longest_prompt(config)
    return repr((paths, samples, {name: value for name, value in wanted_rows(config).items() if name != "needed_by"}))


def wanted_rows(config: RunConfig) -> dict[str, Any]:
    """Arguments by which a run selects rows; see :func:`nemo_rao.data.dataset.load_preferences`."""
    objective = registry.get(config.model.objective)
    needs = objective.needs_of(objective_config(config))
    return {
        "seq_length": config.model.seq_length,
        "num_responses": config.data.num_responses,
        "responses": chosen_responses(config),
        "pairs_by": config.data.pairs_by,
        "seed": config.data.seed,
        "min_responses": needs.min_responses,
        "needs_rewards": needs.rewards,
        "needs_preference": needs.preference,
        "needs_pairs": needs.pairs,
        "needs_shared_first_token": needs.shared_first_token,
        "needed_by": f"objective {objective.name}",
        "strict": config.data.strict,
        "bad_rows": config.data.bad_rows,
        "max_bad_rows": config.data.max_bad_rows,
        "truncated": config.data.truncated,
        "chat_template": config.data.chat_template,
        "template_arguments": config.data.template_arguments,
        "answers": config.data.answers,
        "reward_field": config.data.reward_field,
        "columns": config.data.columns,
        "ignore_fields": config.data.ignore_fields,
    }


def drawn(config: RunConfig, loaded: LoadedData) -> PreferenceData:
    """The prompts to train on: all, or ``data.num_prompts`` drawn from them."""
    if config.data.num_prompts is None:
        return loaded.train
    return draw_prompts(loaded.train, config.data.num_prompts, seed=config.data.seed)


def drawn_prompts(config: RunConfig, loaded: LoadedData) -> Sequence[Row]:
    """The prompts of :func:`drawn`, as text."""
    if config.data.num_prompts is None:
        return loaded.prompts
    chosen = drawn_indices(loaded.train, config.data.num_prompts, seed=config.data.seed)
    return [loaded.prompts[index] for index in chosen.tolist()]


def draw_prompts(data: PreferenceData, num_prompts: int, *, seed: int) -> PreferenceData:
    """Draw ``num_prompts`` of the prompts by the seed, in the data's order; a smaller draw is a subset of a larger.

    Drawn rather than the first ones: files are often sorted by the origin of their rows.

    Raises:
        UserError: the data has fewer prompts.
    """
    drawn = drawn_indices(data, num_prompts, seed=seed)
    say(f"training data: {num_prompts} of {len(data)} prompts drawn (data.num_prompts)")
    return PreferenceData((data[index] for index in drawn), data.report)


def drawn_indices(data: PreferenceData, num_prompts: int, *, seed: int) -> np.ndarray:
    """``[num_prompts]`` int64: which prompts :func:`draw_prompts` draws, in the data's order."""
    if num_prompts > len(data):
        raise UserError(
            f"data.num_prompts={num_prompts}: the training data has only {len(data)} ({data.report}). Lower it, or set "
            "it to null for all."
        )
    # RandomState: its stream is frozen, see nemo_rao.data.order.
    generator = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed])))
    return np.sort(generator.permutation(len(data))[:num_prompts])
