"""The rows of a file as the model of a trained run reads them: its template, its tokens, its length."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_rao.batch import Row, Sample
from nemo_rao.config.precision_checks import sequence_multiple
from nemo_rao.config.run_config import RunConfig
from nemo_rao.data.encode import BoundaryError, Encoder, load_tokenizer, pad_token_id
from nemo_rao.engines.engine import engine_of
from nemo_rao.errors import UserError
from nemo_rao.scoring.run import OPTIONS
from nemo_rao.scoring.scorer import NoScore

if TYPE_CHECKING:
    from nemo_rao.data.store import PreferenceData


# Remarks about rows, to be read behind their number.
AS_TRAINED = "have responses marked as truncated, which are scored without an end token, as the model learned them"
NOT_AS_TRAINED = (
    "have responses marked as truncated, which are scored without an end token; the model was trained without such "
    "responses (data.truncated=drop)"
)


@dataclass(frozen=True)
class Limit:
    """The longest prompt with a response that is scored: ``tokens``, and what sets it, for messages."""

    tokens: int
    set_by: str

    def lacks(self, num_tokens: int) -> NoScore:
        return NoScore(f"longer than {self.set_by}", f"{num_tokens} tokens")


@dataclass
class Tokenised:
    """What the model can read of the rows, and what it cannot.

    Attributes:
        data: prompts with the responses that can be read.
        pad_token_id: of the tokenizer.
        numbers: of each response in ``data``, in its order, (row, response) in the rows.
        lacks: (row, response) -> why the response is not in ``data``.
        remarks: row -> what was noticed about it, to be counted.
        notes: about the tokenizer and its chat template.
    """

    data: PreferenceData
    pad_token_id: int
    numbers: list[tuple[int, int]] = field(default_factory=list)
    lacks: dict[tuple[int, int], NoScore] = field(default_factory=dict)
    remarks: dict[int, Sequence[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def length_limit(config: RunConfig, run: str, max_length: int | None) -> Limit:
    """What ``--max-length`` allows, or else the length that the run was trained with.

    It is not checked where nothing states the model's context; positions are computed for any length.

    Raises:
        UserError: ``--max-length`` is beyond the model's context.
    """
    trained = config.model.seq_length
    if max_length is None:
        return Limit(trained, f"model.seq_length={trained}, with which {run} was trained (--max-length reads more)")
    longest = context_length(config) if max_length > trained else None
    if longest is not None and max_length > longest:
        raise UserError(f"--max-length {max_length}: the context of {run}'s model is {longest} tokens; lower it")
    return Limit(max_length, f"--max-length {max_length}")


def context_length(config: RunConfig) -> int | None:
    """Tokens that the network's positions are made for: at least those that it was trained with.

    A checkpoint does not state it. Learned positions end where training did. For others the config.json beside an
    imported model's tokenizer states it, and the defaults of a class that ``model.config_class`` names. Those of a
    family's class belong to no model of it: ``None``.
    """
    engine, trained = engine_of(config), config.model.seq_length
    engine.load()
    made = engine.model_config(config)
    if made.position_embedding_type == "learned_absolute":
        return trained
    with_tokenizer = Path(config.data.tokenizer or "").expanduser() / "config.json"
    found = json.loads(with_tokenizer.read_text()) if with_tokenizer.is_file() else {}
    if found.get("hidden_size") == made.hidden_size and "max_position_embeddings" in found:
        return max(trained, int(found["max_position_embeddings"]))
    if config.model.config_class is None:
        return None
    of_class = next(one.default for one in dataclasses.fields(type(made)) if one.name == "seq_length")
    assert isinstance(of_class, int)
    return max(trained, of_class)


def with_length(config: RunConfig, num_tokens: int) -> RunConfig:
    """The recipe for sequences of so many tokens, or as many more as its parallelism needs."""
    multiple = sequence_multiple(config)
    model = replace(config.model, seq_length=-(-num_tokens // multiple) * multiple)
    return replace(config, model=model)


def tokenise(rows: Sequence[Row], config: RunConfig, limit: Limit) -> Tokenised:
    """Renders the responses as in the run's training, and keeps those that are no longer than the limit."""
    from nemo_rao.data.dataset import ROWS_AT_ONCE
    from nemo_rao.data.store import PreferenceData

    keys = config.data
    encoder = Encoder(
        load_tokenizer(keys.tokenizer or ""),
        chat_template=keys.chat_template,  # type: ignore[arg-type]
        template_arguments=keys.template_arguments,
        answers=keys.answers,  # type: ignore[arg-type]
    )
    made = Tokenised(PreferenceData(iter(())), pad_token_id(encoder.tokenizer))

    def samples() -> Iterator[Sample]:
        for start in range(0, len(rows), ROWS_AT_ONCE):
            batch = rows[start : start + ROWS_AT_ONCE]
            for at, encoded in enumerate(_encode(encoder, batch), start):
                kept: list[_Encoded] = []
                remarks: list[str] = []
                for number, one in enumerate(encoded):
                    if isinstance(one, _Encoded) and one.num_tokens > limit.tokens:
                        one = limit.lacks(one.num_tokens)
                    if isinstance(one, NoScore):
                        made.lacks[at, number] = one
                    else:
                        made.numbers.append((at, number))
                        kept.append(one)
                        remarks += one.sample.remarks
                        if rows[at].responses[number].truncated:
                            remarks.append(AS_TRAINED if keys.truncated == "without_end" else NOT_AS_TRAINED)
                if kept:
                    made.remarks[at] = list(dict.fromkeys(remarks))
                    yield _unrewarded(kept)

    made.data = PreferenceData(samples())
    made.notes = list(dict.fromkeys(encoder.notes))
    return made


@dataclass(frozen=True)
class _Encoded:
    """A response in tokens: the one of this number in a sample."""

    sample: Sample
    number: int

    @property
    def num_tokens(self) -> int:
        """With the prompt."""
        return len(self.sample.prompt) + len(self.sample.responses[self.number])


def _encode(encoder: Encoder, rows: Sequence[Row]) -> list[list[_Encoded | NoScore]]:
    """Each row's responses in tokens, or what keeps them from being read."""
    wanted = [replace(row, responses=tuple(replace(one, weight=1.0) for one in row.responses)) for row in rows]
    return [_of_responses(encoder, *pair) for pair in zip(wanted, encoder.encode_many(wanted), strict=True)]


def _of_responses(encoder: Encoder, row: Row, encoded: Sample | UserError) -> list[_Encoded | NoScore]:
    if isinstance(encoded, Sample):
        return [_Encoded(encoded, number) for number in range(len(row.responses))]
    if len(row.responses) > 1:  # one of them may be all that cannot be read
        single = [replace(row, responses=(response,)) for response in row.responses]
        return [one for responses in _encode(encoder, single) for one in responses]
    reason = encoded.reason if isinstance(encoded, BoundaryError) else "cannot be rendered as in the run's training"
    said = OPTIONS(str(encoded).removeprefix(f"{row.place}: "))
    return [NoScore(reason, said.replace("response 1", "the response"))]  # the caller says which one it is


def _unrewarded(kept: Sequence[_Encoded]) -> Sample:
    """A prompt with some of its responses, and nothing of what the file says of them."""
    import numpy as np

    answers = [one.sample.answers[one.number] for one in kept if one.sample.answers is not None]
    return Sample(
        prompt=kept[0].sample.prompt,
        responses=tuple(one.sample.responses[one.number] for one in kept),
        rewards=np.full(len(kept), np.nan),
        ranked=False,
        place=kept[0].sample.place,
        ensemble=np.zeros((len(kept), 0)),
        reference_rewards=np.zeros(0),
        answers=tuple(answers) or None,
    )
