"""A synthetic preference set: letter puzzles whose answers have a computable reward.

    Copy: d a c b       ->  d a c b
    Reverse: d a c b    ->  b c a d
    Sort: d a c b       ->  a b c d

Each prompt has one perfect answer and others with various errors (letters swapped, replaced, left out, repeated, the
answer to another task, chatter). A model of two layers and 128 channels, trained on the perfect answers of 4,000
prompts, gets most of them right within a minute on a CPU core. Length does not reveal the reward: more than a third of
the wrong answers are exactly as long as the perfect one.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from nemo_rao.errors import UserError
from nemo_rao.runtime.files import write_atomically

LETTERS = "abcdefghijkl"
NUM_LETTERS = (3, 8)  # letters of a puzzle, inclusive
CHATTER = ("Sure:", "I think", "The answer is", "Well,")
Split = Literal["train", "held_out"]

TASKS = {
    "Copy": lambda letters: list(letters),
    "Reverse": lambda letters: list(reversed(letters)),
    "Sort": lambda letters: sorted(letters),
}


def ground_truth_reward(prompt: str | Sequence[Mapping[str, Any]], response: str) -> float:
    """Reward in [0, 1]: 1 minus the word edit distance to the right answer, divided by the longer one's length.

    It is 1 only for the right answer (up to whitespace), and 0 if no word matches.

    Args:
        prompt: a puzzle, as text or as messages that end with the puzzle.
        response: any text.

    Raises:
        UserError: the prompt is not a puzzle.
    """
    expected = right_answer(prompt if isinstance(prompt, str) else prompt[-1]["content"])
    given = response.split()
    return 1.0 - _edit_distance(expected, given) / max(len(expected), len(given))


def right_answer(puzzle: str) -> list[str]:
    """Letters of the right answer."""
    task, _, letters = puzzle.partition(": ")
    if task not in TASKS or not letters.strip():
        tasks = ", ".join(TASKS)
        raise UserError(
            f"prompt {puzzle[:60]!r} is not a letter puzzle. It must be like 'Sort: c a b' (tasks: {tasks})."
        )
    return TASKS[task](letters.split())


def write_preferences(
    path: str | os.PathLike[str], num_prompts: int, num_responses: int = 4, seed: int = 0, split: Split = "train"
) -> None:
    """Write canonical JSON Lines (compressed if the name ends in .gz), atomically.

    Args:
        path: its directory is created if missing.
        num_prompts, num_responses, seed, split: see :func:`preferences`.
    """
    rows = preferences(num_prompts, num_responses, seed, split)
    write_atomically(Path(path), (json.dumps(row) + "\n" for row in rows))


def preferences(num_prompts: int, num_responses: int = 4, seed: int = 0, split: Split = "train") -> Iterator[dict]:
    """Canonical records with distinct prompts. The same arguments give the same records.

    Args:
        num_prompts: number of records.
        num_responses: distinct responses per prompt, 2 to 16: the perfect one, at a random position, and wrong ones.
        seed: different seeds give different prompts and answers.
        split: ``train`` and ``held_out`` never share a prompt, whatever the seeds.
    """
    if split not in get_args(Split):
        raise UserError(f"split is {split!r}; allowed are {', '.join(get_args(Split))}")
    if not 2 <= num_responses <= 16:
        raise UserError(f"num_responses is {num_responses}; allowed are 2 to 16")
    if not 1 <= num_prompts <= 1_000_000:
        raise UserError(f"num_prompts is {num_prompts}; allowed are 1 to 1000000")
    generator = random.Random(f"nemo_rao {seed} {split}")
    seen: set[str] = set()
    while len(seen) < num_prompts:
        puzzle = _puzzle(generator)
        if puzzle in seen or _is_held_out(puzzle) != (split == "held_out"):
            continue
        seen.add(puzzle)
        answers = _answers(puzzle, num_responses, generator)
        yield {
            "prompt": puzzle,
            "responses": [{"content": text, "reward": round(ground_truth_reward(puzzle, text), 6)} for text in answers],
        }


def _puzzle(generator: random.Random) -> str:
    letters = generator.sample(LETTERS, generator.randint(*NUM_LETTERS))
    return f"{generator.choice(list(TASKS))}: {' '.join(letters)}"


def _is_held_out(puzzle: str) -> bool:
    """Whether a puzzle is held out: one in eight, determined by its text."""
    return hashlib.sha256(puzzle.encode()).digest()[0] % 8 == 0


def _answers(puzzle: str, number: int, generator: random.Random) -> list[str]:
    """The perfect answer and ``number - 1`` distinct wrong ones, shuffled."""
    expected = right_answer(puzzle)
    answers = {" ".join(expected): None}  # a dict keeps their order, which the seed determines
    while len(answers) < number:
        words = list(expected)
        for _ in range(generator.choice((1, 1, 2, 3))):
            words = _spoil(words, puzzle, generator)
        if words:
            answers.setdefault(" ".join(words))
    shuffled = list(answers)
    generator.shuffle(shuffled)
    return shuffled


def _spoil(words: list[str], puzzle: str, generator: random.Random) -> list[str]:
    """Introduce one of eight kinds of errors. Half of them keep the length."""
    mistake = generator.randrange(8)
    at = generator.randrange(len(words)) if words else 0
    if not words or mistake == 0:  # another task's answer
        letters = puzzle.partition(": ")[2].split()
        return TASKS[generator.choice(list(TASKS))](letters)
    if mistake == 1:  # two swapped
        other = generator.randrange(len(words))
        words[at], words[other] = words[other], words[at]
    elif mistake == 2:  # one replaced
        words[at] = generator.choice(LETTERS)
    elif mistake == 3:  # all shuffled
        generator.shuffle(words)
    elif mistake == 4:  # one left out
        del words[at]
    elif mistake == 5:  # one repeated
        words.insert(at, words[at])
    elif mistake == 6:  # cut short
        words = words[: (len(words) + 1) // 2]
    else:  # chatter
        words = generator.choice(CHATTER).split() + words
    return words


def _edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Levenshtein distance in words."""
    before = list(range(len(b) + 1))
    for i, word in enumerate(a, start=1):
        row = [i]
        for j, other in enumerate(b, start=1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (word != other)))
        before = row
    return before[-1]
