"""The common inputs of a comparison: one data file, one tokenizer, one model in Hugging Face's format.

Lengths decide how much padding costs. Without ``--data``, the rows consist of made-up words, with lengths that vary as
in real data: lengths of prompts and answers are log-normal, with the deviations of AlpacaEval's instructions and the
answers of four models to them (0.85 and 1.15 of the logarithm; means of 40 and 320 tokens, halved here so that a step
takes seconds on two cores).
"""

from __future__ import annotations

import dataclasses
import json
import random
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nemo_rao.batch import Row
from nemo_rao.data.encode import load_tokenizer
from nemo_rao.demo.tokenizer_training import texts_of_rows, train_tokenizer
from nemo_rao.rows.reading import read_rows

PROMPT_WORDS, ANSWER_WORDS = (13.0, 0.85), (70.0, 1.15)  # median, deviation of the logarithm
_Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ModelSizes:
    """Sizes of a Llama with random weights."""

    layers: int = 4
    hidden: int = 256
    feed_forward: int = 704
    heads: int = 8
    groups: int = 4
    vocab: int = 4096

    @property
    def overrides(self) -> tuple[str, ...]:
        """Overrides that give a recipe's model these sizes."""
        return (
            f"model.arch.num_layers={self.layers}",
            f"model.arch.hidden_size={self.hidden}",
            f"model.arch.ffn_hidden_size={self.feed_forward}",
            f"model.arch.num_attention_heads={self.heads}",
            f"model.arch.num_query_groups={self.groups}",
        )


def made_up_rows(num_prompts: int, num_responses: int, seed: int) -> Iterator[_Record]:
    """Prompts and answers of meaningless words, with rewards in [0, 1] that differ within a prompt."""
    generator = random.Random(seed)
    words = _words(generator)

    def text(median: float, deviation: float) -> str:
        return " ".join(generator.choices(words, k=max(1, round(median * generator.lognormvariate(0, deviation)))))

    for _ in range(num_prompts):
        rewards = generator.sample(range(1001), num_responses)
        yield {
            "prompt": text(*PROMPT_WORDS),
            "responses": [{"content": text(*ANSWER_WORDS), "reward": reward / 1000} for reward in rewards],
        }


def _words(generator: random.Random) -> list[str]:
    syllables = [consonant + vowel for consonant in "bdfgklmnprst" for vowel in "aeiou"]
    return ["".join(generator.choices(syllables, k=generator.randint(1, 3))) for _ in range(6000)]


def train_on_made_up_text(tokenizer: Path, vocab_size: int) -> None:
    """A tokenizer of these words."""
    train_tokenizer((record["responses"][0]["content"] for record in made_up_rows(500, 1, 0)), tokenizer, vocab_size)


def write_uniform_rows(
    path: Path, tokenizer: Path, *, num_prompts: int, num_responses: int, length: int, prompt: int | None = None
) -> Path:
    """A file in which each row, a prompt with one of its responses, has about ``length`` tokens, never more.

    Args:
        prompt: tokens of the prompt; ``None`` for an eighth of ``length``.
    """
    from transformers import AutoTokenizer

    of_prompt = length // 8 if prompt is None else prompt

    generator, encode = random.Random(0), AutoTokenizer.from_pretrained(tokenizer)
    words = _words(generator)

    def text(num_tokens: int) -> str:
        tokens = encode(" ".join(generator.choices(words, k=num_tokens)), add_special_tokens=False)["input_ids"]
        return encode.decode(tokens[:num_tokens])

    def record() -> _Record:
        answers = [text(length - of_prompt - 6) for _ in range(num_responses)]
        responses = [{"content": answer, "reward": number / 10} for number, answer in enumerate(answers)]
        return {"prompt": text(of_prompt), "responses": responses}

    return _write(path, (record() for _ in range(num_prompts)))


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Directories and files of a benchmark, below one directory.

    Attributes:
        preferences: K -> canonical file of the same prompts; for K = 2, the best and the worst of their responses.
        single_rows: K -> the same rows, each a prompt with one response, in the same order.
        pairs: the prompts of ``preferences[2]`` in TRL's format.
        tokenizer, source, imported: directories; ``source`` is the model in Hugging Face's format.
        lengths: lengths of the tokenized rows and prompts.
    """

    folder: Path
    preferences: dict[int, Path]
    single_rows: dict[int, Path]
    pairs: Path
    tokenizer: Path
    source: Path
    imported: Path
    lengths: dict[str, float]


def make_inputs(
    folder: Path,
    sizes: ModelSizes,
    *,
    data: str | None,
    num_prompts: int,
    numbers_of_responses: Sequence[int],
    max_length: int,
    copies: int = 1,
    seed: int = 0,
) -> Inputs:
    """Create everything but ``imported``, which needs Megatron (:func:`benchmarks.training.import_model`).

    Args:
        copies: number of times that the files of rows and pairs repeat the same ``num_prompts`` prompts.
    """
    most = max(2, *numbers_of_responses)
    source_rows = folder / "all.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    if data is None:
        _write(source_rows, made_up_rows(40 * num_prompts, most, seed))
    rows = [row for row in read_rows(str(source_rows) if data is None else data) if len(row.responses) >= most]
    train_tokenizer(texts_of_rows(rows), folder / "tokenizer", sizes.vocab)
    random.Random(seed).shuffle(rows)
    tokenizer = load_tokenizer(folder / "tokenizer")
    chosen: list[_Record] = []
    lengths: dict[str, list[int]] = {"prompt": [], "response": [], "row": []}
    for row in rows:
        record = _record(row, most)
        of_prompt = len(tokenizer(record["prompt"])["input_ids"])
        of_responses = [len(tokenizer(answer["content"])["input_ids"]) for answer in record["responses"]]
        rewards = [answer["reward"] for answer in record["responses"]]
        # Room for the chat template's tokens; a pair needs two different rewards.
        if of_prompt + max(of_responses) + 8 > max_length or min(rewards) == max(rewards):
            continue
        chosen.append(record)
        lengths["prompt"].append(of_prompt)
        lengths["response"] += of_responses
        lengths["row"] += [of_prompt + length for length in of_responses]
        if len(chosen) == num_prompts:
            break
    assert len(chosen) == num_prompts, f"only {len(chosen)} prompts are short enough, --prompts {num_prompts}"

    preferences, single_rows = {}, {}
    for number in numbers_of_responses:
        of_number = [_with_responses(record, number) for record in chosen] * copies
        preferences[number] = _write(folder / f"preferences_{number}.jsonl", of_number)
        singles = [{**record, "responses": [answer]} for record in of_number for answer in record["responses"]]
        single_rows[number] = _write(folder / f"single_rows_{number}.jsonl", singles)
    pairs = _write(folder / "pairs.jsonl", [_pair(_with_responses(record, 2)) for record in chosen] * copies)
    return Inputs(
        folder=folder,
        preferences=preferences,
        single_rows=single_rows,
        pairs=pairs,
        tokenizer=folder / "tokenizer",
        source=_make_model(sizes, folder / "tokenizer", folder / "source"),
        imported=folder / "imported",
        lengths={
            f"{of}_{name}": round(function(values), 1)
            for of, values in lengths.items()
            for name, function in (("mean", statistics.fmean), ("longest", max))
        },
    )


def _record(row: Row, num_responses: int) -> _Record:
    prompt = row.prompt if isinstance(row.prompt, str) else row.prompt[-1]["content"]
    answers = row.responses[:num_responses]
    return {"prompt": prompt, "responses": [{"content": one.content, "reward": one.reward} for one in answers]}


def _with_responses(record: _Record, number: int) -> _Record:
    """The first K responses; for K = 2, the best and the worst."""
    answers = record["responses"]
    if number == 2:
        ordered = sorted(answers, key=lambda answer: answer["reward"])
        answers = [ordered[-1], ordered[0]]
    return {**record, "responses": answers[:number]}


def _pair(record: _Record) -> _Record:
    def message(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}]

    chosen, rejected = (answer["content"] for answer in record["responses"])
    return {
        "prompt": message("user", record["prompt"]),
        "chosen": message("assistant", chosen),
        "rejected": message("assistant", rejected),
    }


def _write(path: Path, records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def _make_model(sizes: ModelSizes, tokenizer: Path, folder: Path) -> Path:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.feed_forward,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.groups,
        max_position_embeddings=4096,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder
