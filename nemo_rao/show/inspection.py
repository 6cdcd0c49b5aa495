"""An inspection of a recipe's data, loaded by the code that training uses. Nothing is cached."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemo_rao.batch import Row
from nemo_rao.config.derived import objective_config
from nemo_rao.config.run_config import RunConfig
from nemo_rao.data.dataset import load_preferences
from nemo_rao.data.encode import Encoder
from nemo_rao.data.overlap import SharedPrompts, shared_prompts
from nemo_rao.data.report import LoadReport, Outcome
from nemo_rao.data.store import PreferenceData
from nemo_rao.data.tokenizer import load_tokenizer
from nemo_rao.errors import UserError
from nemo_rao.objectives import registry
from nemo_rao.rows.reading import read_rows
from nemo_rao.runtime.progress import Progress
from nemo_rao.show.numbers import Collector, Numbers
from nemo_rao.show.rows import MOST_TOKENS, ShownRow, indices_used, location_of, shown_row
from nemo_rao.show.settings import Setting, settings, steps
from nemo_rao.training.loading import drawn_indices, wanted_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Inspection:
    """Everything that is displayed.

    Attributes:
        source: the file or files, as given.
        recipe: name of the recipe.
        settings: settings that determine what is trained on.
        report: report on the training data.
        validation: report on the validation data; ``None`` if there is none.
        shared: prompts of the validation data that are also trained on.
        num_trained: prompts that are trained on; fewer than are kept if ``data.num_prompts`` draws from them.
        steps: length of the run, or why it cannot run.
        first: number of rows that were read; ``None``: all.
        numbers: statistics of these prompts, and of dropped rows.
        rows: rows chosen for display.
        dropped: first row dropped for each reason, if it could be read.
        prompt_is_learned: whether the objective has a gradient with respect to the prompt's log-probability.
    """

    source: str
    recipe: str
    settings: tuple[Setting, ...]
    report: LoadReport
    validation: LoadReport | None
    shared: SharedPrompts | None
    num_trained: int
    steps: str
    first: int | None
    numbers: Numbers
    rows: tuple[ShownRow, ...]
    dropped: tuple[ShownRow, ...]
    seq_length: int
    prompt_is_learned: bool

    def short(self, text: str) -> str:
        """Shorten locations in a text by the file's name, which is in the title."""
        return text.replace(f"{self.source} line ", "line ").replace(f"{self.source} row ", "row ")


def inspect(
    config: RunConfig,
    recipe: str,
    *,
    num_rows: int,
    row_numbers: Sequence[int] = (),
    first: int | None = None,
    most_tokens: int | None = MOST_TOKENS,
) -> Inspection:
    """Load a recipe's data and collect everything to display.

    Args:
        recipe: name of the recipe, for the title.
        num_rows: number of rows to show, spread evenly over those that are trained on, including the first.
        row_numbers: lines (or rows of Parquet and `datasets`) to show in addition, dropped or not.
        first: load only this many rows of the training files, without drawing from them; ``None``: all.
        most_tokens: number of tokens to show of a prompt or response; ``None``: all.

    Raises:
        UserError: training would reject the data, or a line does not exist.
    """
    data_keys, wanted = config.data, wanted_rows(config)
    tokenizer = load_tokenizer(data_keys.tokenizer or "")
    objective = registry.get(config.model.objective)
    needs = objective.needs_of(objective_config(config))
    watcher = _Watcher(row_numbers, needs_pairs=needs.pairs)
    data = _load(
        data_keys.train_path, "training data", tokenizer, {**wanted, "max_rows": first, "observer": watcher.add}
    )
    validation = None
    if data_keys.validation_path is not None and first is None:
        validation = _load(data_keys.validation_path, "validation data", tokenizer, wanted)
    drawn = None
    if data_keys.num_prompts is not None and first is None:
        drawn = drawn_indices(data, data_keys.num_prompts, seed=data_keys.seed)
    trained = data if drawn is None else PreferenceData((data[index] for index in drawn), data.report)
    resolved = objective.resolve(objective_config(config), trained.reward_summary())
    if validation is not None:
        objective.resolve(objective_config(config), validation.reward_summary())

    encoder = Encoder(tokenizer, **{name: wanted[name] for name in ("chat_template", "template_arguments", "answers")})

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def shown(outcome: Outcome) -> ShownRow:
        return shown_row(
            outcome,
            decode,
            encoder.end_token_id,
            needs_pairs=needs.pairs,
            drops_truncated=data_keys.truncated == "drop",
            most_tokens=most_tokens,
        )

    spread = [number * len(trained) // num_rows for number in range(min(num_rows, len(trained)))]
    asked_for = watcher.asked_for()
    already = {index for _, index in asked_for}
    chosen = [int(index if drawn is None else drawn[index]) for index in dict.fromkeys(spread)]
    chosen = [index for index in chosen if index not in already]
    rows = [
        dataclasses.replace(shown(outcome), is_drawn=drawn is None or index is None or index in drawn)
        for outcome, index in asked_for
    ]
    rows += [shown(outcome) for outcome in watcher.kept(data, chosen, lambda: _rows(config))]
    return Inspection(
        source=_source(data_keys.train_path),
        recipe=recipe,
        settings=tuple(settings(config, tokenizer, encoder, decode, int(data[0].prompt[0]), resolved)),
        report=data.report,
        validation=None if validation is None else validation.report,
        shared=None if validation is None else shared_prompts(data, validation),
        num_trained=len(trained),
        steps=steps(config, len(trained)),
        first=first,
        numbers=watcher.collector.numbers(drawn),
        rows=tuple(rows),
        dropped=tuple(shown(outcome) for outcome in watcher.first_dropped.values()),
        seq_length=config.model.seq_length,
        prompt_is_learned=needs.prompt_gradient,
    )


class _Watcher:
    """Observes rows while they are loaded. Keeps statistics, the first dropped row per reason, and requested rows.

    For kept rows it only stores which responses are used: the few that are shown are read again.
    """

    def __init__(self, row_numbers: Sequence[int], *, needs_pairs: bool) -> None:
        self.collector = Collector(needs_pairs=needs_pairs)
        self.first_dropped: dict[str, Outcome] = {}
        self._found: dict[int, tuple[Outcome, int | None] | None] = dict.fromkeys(row_numbers)
        self._used: list[tuple[tuple[int, ...], tuple[str, ...]]] = []

    def add(self, outcome: Outcome) -> None:
        self.collector.add(outcome)
        if self._found:
            number = _number_of(location_of(outcome))
            if number in self._found and self._found[number] is None:
                self._found[number] = outcome, None if outcome.reason is not None else len(self._used)
        if outcome.reason is not None:
            self.first_dropped.setdefault(outcome.reason, outcome)
        else:
            assert outcome.read is not None and outcome.used is not None
            self._used.append((tuple(indices_used(outcome.read, outcome.used)), outcome.left_out))

    def asked_for(self) -> list[tuple[Outcome, int | None]]:
        """The requested rows, each with its index among the kept ones.

        Raises:
            UserError: one of them does not exist.
        """
        found = []
        for number, one in self._found.items():
            if one is None:
                raise UserError(
                    f"--row {number}: no row begins at line {number} of the data. Pass the number of a line that is "
                    "not blank, or of a row of a Parquet file or data set."
                )
            found.append(one)
        return found

    def kept(self, data: PreferenceData, indices: Sequence[int], read: Callable[[], Iterator[Row]]) -> list[Outcome]:
        """The kept rows with these indices.

        Args:
            read: reads the files' rows again.
        """
        samples = {data[index].location: index for index in indices}
        found: dict[int, Outcome] = {}
        for row in read():
            if len(found) == len(samples):
                break
            if (index := samples.get(row.location)) is None or index in found:
                continue
            used, left_out = self._used[index]
            responses = tuple(row.responses[at] for at in used)
            found[index] = Outcome(
                read=row,
                used=dataclasses.replace(row, responses=responses, ranked=data[index].ranked),
                sample=data[index],
                reason=None,
                left_out=left_out,
            )
        return [found[index] for index in indices if index in found]


def _rows(config: RunConfig) -> Iterator[Row]:
    """Rows of the training files, skipping unreadable ones, which loading has already reported."""
    keys = config.data
    return read_rows(
        keys.train_path,
        reward_field=keys.reward_field,
        columns=keys.columns,
        ignore_fields=keys.ignore_fields,
        on_bad=lambda _: None,
    )


def _number_of(location: str) -> int | None:
    """The line or row number in a location such as "prefs.jsonl line 12"."""
    last = location.rpartition(" ")[2]
    return int(last) if last.isdecimal() else None


def _load(paths: Any, label: str, tokenizer: PreTrainedTokenizerBase, wanted: Mapping[str, Any]) -> PreferenceData:
    with Progress(label, unit="row", stays=False) as progress:
        return load_preferences(paths, tokenizer, progress=progress.update, **wanted)


def _source(paths: Any) -> str:
    return paths if isinstance(paths, str) else ", ".join(map(str, paths))
