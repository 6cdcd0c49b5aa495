"""A synthetic task for studies: short captions on request, whose quality a program can compute.

    Write 9 words, calm, about the sea: gull, wave. Not salt.
    ->  the quiet gull and a still wave under the tide

A request specifies a number of words, a mood, a topic and two of its nouns, and excludes a third noun. There are
184,320 requests with recurring parts: a small model trained on a few thousand generalizes to the others. A caption is a
chain of noun phrases. Many captions fulfil a request, and most fulfil it in part.

Each caption comes from a different writer of random skill (:func:`caption`). The quality has a mean of 0.71 and a
standard deviation of 0.18; the best of four has 0.88, of sixteen 0.97.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

from nemo_rao.errors import UserError
from nemo_rao.runtime.files import write_atomically

Split = Literal["train", "held_out"]

NUM_WORDS = (5, 12)  # words of a caption, inclusive
TOPICS: Mapping[str, tuple[str, ...]] = {
    "sea": ("wave", "gull", "salt", "tide", "shell", "sail", "reef", "foam", "crab", "pier"),
    "farm": ("barn", "hay", "cow", "plough", "fence", "goat", "wheat", "hen", "field", "cart"),
    "kitchen": ("pan", "oven", "soup", "knife", "bread", "spoon", "stove", "plate", "flour", "jar"),
    "city": ("street", "tram", "tower", "crowd", "bridge", "square", "lamp", "shop", "roof", "sign"),
    "forest": ("moss", "fern", "owl", "oak", "path", "deer", "pine", "leaf", "root", "stream"),
    "sky": ("cloud", "star", "moon", "kite", "hawk", "rain", "comet", "wind", "dawn", "storm"),
    "concert": ("drum", "flute", "song", "stage", "choir", "harp", "string", "chord", "horn", "tune"),
    "workshop": ("saw", "nail", "bench", "glue", "wood", "drill", "rope", "wheel", "tool", "paint"),
}
MOODS: Mapping[str, tuple[str, ...]] = {
    "calm": ("quiet", "still", "soft", "slow", "gentle", "mild"),
    "bright": ("golden", "clear", "warm", "shiny", "vivid", "light"),
    "dark": ("grey", "cold", "bleak", "heavy", "lost", "grim"),
    "wild": ("loud", "sharp", "fast", "rough", "fierce", "torn"),
}
ARTICLES = ("a", "the")
LINKS = ("and", "near", "under", "with")

_NOUNS = {noun: topic for topic, nouns in TOPICS.items() for noun in nouns}
_ADJECTIVES = {adjective: mood for mood, adjectives in MOODS.items() for adjective in adjectives}
# Kind of word -> kinds that may follow it.
_FOLLOWING = {
    "article": {"adjective", "noun"},
    "adjective": {"adjective", "noun"},
    "noun": {"link", "end"},
    "link": {"article", "adjective", "noun"},
    "other": set[str](),
}
# Weights of the parts of quality. Using the excluded noun multiplies quality by EXCLUDED_FACTOR.
WEIGHTS: Mapping[str, float] = {
    "mentions": 0.25,
    "topic": 0.2,
    "mood": 0.2,
    "length": 0.15,
    "variety": 0.1,
    "grammar": 0.1,
}
EXCLUDED_FACTOR = 0.7

_REQUEST = re.compile(r"Write (\d+) words, (\w+), about the (\w+): (\w+), (\w+)\. Not (\w+)\.")


@dataclass(frozen=True)
class Request:
    """A parsed prompt.

    Attributes:
        words: requested length of the caption.
        mood, topic: keys of :data:`MOODS` and :data:`TOPICS`.
        nouns: two nouns of the topic to mention.
        excluded: a third noun of the topic, to avoid.
    """

    words: int
    mood: str
    topic: str
    nouns: tuple[str, str]
    excluded: str

    def __str__(self) -> str:
        nouns = ", ".join(self.nouns)
        return f"Write {self.words} words, {self.mood}, about the {self.topic}: {nouns}. Not {self.excluded}."


def parse(prompt: str | Sequence[Mapping[str, Any]]) -> Request:
    """Parse a prompt, given as text or as messages that end with the request.

    Raises:
        UserError: it is not a request of this task.
    """
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    found = _REQUEST.fullmatch(text.strip())
    if found is None or found[2] not in MOODS or found[3] not in TOPICS or int(found[1]) < 1:
        raise UserError(
            f"prompt {text[:80]!r} is not a request for a caption. It must be like "
            "'Write 9 words, calm, about the sea: gull, wave. Not salt.'."
        )
    return Request(int(found[1]), found[2], found[3], (found[4], found[5]), found[6])


def quality(prompt: str | Sequence[Mapping[str, Any]], response: str) -> float:
    """Compute how well a caption fulfils its request, in [0, 1].

    The mean, weighted by :data:`WEIGHTS`, of

        mentions    fraction of the two requested nouns that occur
        topic       fraction of its nouns that belong to the topic
        mood        fraction of its adjectives that belong to the mood
        length      1 - |words - requested| / requested, at least 0
        variety     fraction of its nouns and adjectives that are not repeated
        grammar     fraction of words that may follow the previous one; the end counts as a word that follows a noun

    times :data:`EXCLUDED_FACTOR` if the excluded noun occurs. Empty fractions are 0.

    Raises:
        UserError: see :func:`parse`.
    """
    request, words = parse(prompt), response.split()
    nouns = [word for word in words if word in _NOUNS]
    adjectives = [word for word in words if word in _ADJECTIVES]
    kinds = [_kind(word) for word in words]
    shares = {
        "mentions": _share(noun in nouns for noun in request.nouns),
        "topic": _share(_NOUNS[noun] == request.topic for noun in nouns),
        "mood": _share(_ADJECTIVES[adjective] == request.mood for adjective in adjectives),
        "length": max(0.0, 1 - abs(len(words) - request.words) / request.words),
        "variety": len({*nouns, *adjectives}) / max(1, len(nouns) + len(adjectives)),
        "grammar": _share(after in _FOLLOWING[before] for before, after in pairwise([*kinds, "end"])),
    }
    found = sum(WEIGHTS[name] * share for name, share in shares.items())
    return found * (EXCLUDED_FACTOR if request.excluded in nouns else 1)


def caption(request: Request, generator: random.Random) -> str:
    """Write a caption with random skills, each drawn from a distribution with mean 1/2."""
    mentions, topic, mood, counting, varying = (generator.betavariate(1.2, 1.2) for _ in range(5))
    length = request.words
    if generator.random() > counting:
        length = max(2, length + generator.choice((-4, -3, -2, -1, 1, 2, 3, 4)))
    words: list[str] = []
    asked_for = generator.sample(request.nouns, 2)
    while len(words) < length:
        if words:
            words.append(generator.choice(LINKS))
        if generator.random() < 0.6:
            words.append(generator.choice(ARTICLES))
        if generator.random() < 0.6:
            of_mood = MOODS[request.mood] if generator.random() < mood else [*_ADJECTIVES]
            words.append(_choose(of_mood, words, varying, generator))
        if asked_for and generator.random() < mentions:
            words.append(asked_for.pop())
        else:
            of_topic = TOPICS[request.topic] if generator.random() < topic else [*_NOUNS]
            words.append(_choose(of_topic, words, varying, generator))
    return " ".join(words[:length])


def requests(seed: int, split: Split) -> Iterator[tuple[Request, random.Random]]:
    """Endless iterator over distinct requests, each with a generator for its captions.

    Args:
        seed: different seeds give different requests.
        split: ``train`` and ``held_out`` never share a request, whatever the seeds.
    """
    generator = random.Random(f"captions {seed} {split}")
    seen: set[str] = set()
    while True:
        topic = generator.choice([*TOPICS])
        first, second, excluded = generator.sample(TOPICS[topic], 3)
        request = Request(generator.randint(*NUM_WORDS), generator.choice([*MOODS]), topic, (first, second), excluded)
        text = str(request)
        if text not in seen and _is_held_out(text) == (split == "held_out"):
            seen.add(text)
            yield request, random.Random(f"captions {seed} {text}")


def preferences(
    num_prompts: int, num_responses: int, seed: int = 0, split: Split = "train", noise: float = 0.0
) -> Iterator[dict[str, Any]]:
    """Canonical records. The same arguments give the same records.

    Args:
        num_prompts: records, up to 100,000, or 20,000 of ``held_out``.
        num_responses: distinct responses per prompt, 1 to 16.
        seed, split: see :func:`requests`.
        noise: standard deviation of the normal error added to each reward.

    Raises:
        UserError: an argument is outside its range.
    """
    if split not in get_args(Split):
        raise UserError(f"split is {split!r}; allowed are {', '.join(get_args(Split))}")
    largest = 100_000 if split == "train" else 20_000
    for name, value, low, high in (("num_prompts", num_prompts, 1, largest), ("num_responses", num_responses, 1, 16)):
        if not low <= value <= high:
            raise UserError(f"{name} is {value}; allowed are {low} to {high}")
    if not 0 <= noise < float("inf"):
        raise UserError(f"noise is {noise}. It must not be negative.")
    for (request, generator), _ in zip(requests(seed, split), range(num_prompts), strict=False):
        prompt = str(request)
        captions: dict[str, None] = {}
        while len(captions) < num_responses:
            captions.setdefault(caption(request, generator))
        errors = random.Random(f"noise {prompt}")
        yield {
            "prompt": prompt,
            "responses": [
                {"content": text, "reward": round(quality(prompt, text) + errors.gauss(0, noise), 6)}
                for text in captions
            ],
        }


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write records as JSON Lines, atomically."""
    write_atomically(path, (json.dumps(row) + "\n" for row in rows))


def make_data(
    folder: Path,
    *,
    num_prompts: int = 2000,
    num_responses: int = 4,
    num_examples: int = 12_000,
    num_held_out: int = 400,
    noise: float = 0.3,
) -> None:
    """Write the data of studies. The same arguments give the same files.

    examples.jsonl      one caption for each of ``num_examples`` prompts of another seed, for fine-tuning
    unrelated.jsonl     the same captions, each with the prompt of the next, for a base model
    train.jsonl         ``num_responses`` captions for each of ``num_prompts`` prompts, rewarded by :func:`quality`
    train_noisy.jsonl   the same with noisy rewards
    held_out.jsonl      4 captions for each of ``num_held_out`` prompts that occur in no other file
    selection.jsonl     the same for as many further prompts, on which hyperparameters can be chosen
    tokenizer           trained on train.jsonl
    """
    from nemo_rao.demo.tokenizer_training import texts_of_rows, train_tokenizer
    from nemo_rao.rows.reading import read_rows

    write_rows(folder / "train.jsonl", preferences(num_prompts, num_responses))
    write_rows(folder / "train_noisy.jsonl", preferences(num_prompts, num_responses, noise=noise))
    examples = [*preferences(num_examples, 1, seed=1)]
    write_rows(folder / "examples.jsonl", examples)
    shifted = zip(examples, [*examples[1:], examples[0]], strict=True)
    write_rows(folder / "unrelated.jsonl", ({**one, "prompt": other["prompt"]} for one, other in shifted))
    held_out = [*preferences(2 * num_held_out, 4, split="held_out")]
    write_rows(folder / "held_out.jsonl", held_out[:num_held_out])
    write_rows(folder / "selection.jsonl", held_out[num_held_out:])
    train_tokenizer(texts_of_rows(read_rows(str(folder / "train.jsonl"))), folder / "tokenizer", 768)


def _is_held_out(text: str) -> bool:
    """Whether a request is held out: one in eight, determined by its text."""
    return hashlib.sha256(text.encode()).digest()[0] % 8 == 0


def _choose(words: Sequence[str], used: Sequence[str], varying: float, generator: random.Random) -> str:
    """Choose one of ``words``; with probability ``varying`` an unused one, if there is any."""
    new = [word for word in words if word not in used]
    return generator.choice(new if new and generator.random() < varying else words)


def _kind(word: str) -> str:
    if word in _NOUNS:
        return "noun"
    if word in _ADJECTIVES:
        return "adjective"
    return "article" if word in ARTICLES else "link" if word in LINKS else "other"


def _share(held: Iterable[bool]) -> float:
    """Fraction of true values; 0 if there are none."""
    values = list(held)
    return sum(values) / max(1, len(values))
