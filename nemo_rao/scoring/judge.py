"""A chat model as judge: what it is asked, how its answer becomes a number, and what is done where it gives none.

    judge.yaml + (prompt, response) -> messages -> (endpoint) -> answer -> (pattern, range) -> number or None

The judge answers at temperature 0. An answer without a number in range is asked for again, ``attempts`` times in all;
then the response has no reward. Answers are kept on disk as they came, so that another pattern needs no new question.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nemo_rao.errors import UserError
from nemo_rao.keys import check, key
from nemo_rao.scoring.answers import Answers
from nemo_rao.scoring.endpoint import Endpoint
from nemo_rao.scoring.scorer import Pair, PairScorer, Place, ScoringFailure

JUDGES = Path(__file__).with_name("judges")
HOPELESS_AFTER = 20  # questions: where none of the first so many has a usable answer, the rest is not asked


@dataclass
class JudgeConfig:
    based_on: str | None = key(None, "a judge of the package, whose keys hold where this file has none")
    base_url: str | None = key(None, "of an OpenAI-compatible endpoint, such as http://localhost:8000/v1")
    model: str | None = key(None, "name of the model there")
    api_key_variable: str | None = key(None, "environment variable that holds the key; null: none is sent")
    system: str | None = key(None, "system message; null: none")
    template: str | None = key(None, "the question; {prompt} and {response} stand for the texts")
    pattern: str = key(
        r"(?i)score\**:\s*\**\s*(-?\d+(?:\.\d+)?)", "regular expression whose one group is the score; the last match"
    )
    low: float = key(0.0, "lowest score; an answer out of range counts as none")
    high: float = key(10.0, "highest score")
    attempts: int = key(2, "times a question is asked until its answer holds a score", low=1)
    max_tokens: int | None = key(1024, "tokens of an answer; null: the endpoint's own limit, and none is sent", low=1)
    parameters: dict[str, Any] = key({}, "further fields of the request, such as {top_p: 1.0}")
    concurrency: int = key(16, "questions under way at once", low=1, high=1024)
    timeout: float = key(120.0, "seconds for one answer", low=0, exclusive=True)
    retries: int = key(6, "further requests after a timeout, a lost connection, 408, 409, 429 or 5xx", low=0)
    backoff: float = key(1.0, "seconds before the first of them at most; doubled each time, up to 60", low=0)
    cache: str | None = key(None, "file of answers, shared by runs; null: judge_answers.sqlite beside the output")


class JudgeScorer(PairScorer):
    """Asks the judge about each pair; see the module."""

    def __init__(self, config: JudgeConfig, api_key: str | None, folder: Path) -> None:
        """
        Args:
            config: checked, with base_url, model and template.
            api_key: sent as bearer token; ``None``: none is.
            folder: where the file of answers lies, unless ``config.cache`` names one.
        """
        assert config.base_url is not None and config.model is not None and config.template is not None
        self.config, self.model, self.template = config, config.model, config.template
        self.pattern = re.compile(config.pattern)
        asked = ("model", "system", "template", "max_tokens", "parameters")
        self.question = {name: vars(config)[name] for name in asked}
        self.identity = {"judge": self.question, "score": [config.pattern, config.low, config.high, config.attempts]}
        path = Path(config.cache).expanduser() if config.cache else folder / "judge_answers.sqlite"
        self.answers = Answers(path)
        self.endpoint = Endpoint(
            config.base_url,
            api_key,
            concurrency=config.concurrency,
            timeout=config.timeout,
            retries=config.retries,
            backoff=config.backoff,
        )
        self.num_known = self.num_without = self.num_usable = 0

    def score_pairs(self, pairs: Sequence[Pair]) -> list[float | None]:
        by_key = {self._key(pair): pair for pair in pairs}  # what is the same is asked once
        scores = dict(zip(by_key, self.endpoint.run([self._ask(*item) for item in by_key.items()]), strict=True))
        return [scores[self._key(pair)] for pair in pairs]

    async def _ask(self, key: str, pair: Pair) -> float | None:
        answers = self.answers.get(key)
        score = next((one for one in map(self.parse, answers) if one is not None), None)
        if answers and (score is not None or len(answers) >= self.config.attempts):
            self.num_known += 1
        while score is None and len(answers) < self.config.attempts:
            answer = await self.endpoint.ask(self._request(pair), pair.place)
            self.answers.add(key, answer)
            answers.append(answer)
            score = self.parse(answer)
        if score is not None:
            self.num_usable += 1
        else:
            self.num_without += 1
            if not self.num_usable and self.num_without >= HOPELESS_AFTER:
                raise ScoringFailure(
                    f"{pair.place}: judge {self.model} gave no score in {self.num_without} answers, the last "
                    f"{_short(answers[-1])}; check pattern ({self.config.pattern}), low, high, template and max_tokens"
                )
        return score

    def parse(self, answer: str) -> float | None:
        """The number that the pattern's last match has in its group; ``None`` without match or out of range."""
        matches = list(self.pattern.finditer(answer))
        try:
            score = float(matches[-1][1]) if matches else float("nan")
        except (TypeError, ValueError):  # a group that took no part, or no number
            return None
        return score if self.config.low <= score <= self.config.high else None

    def _request(self, pair: Pair) -> dict[str, Any]:
        messages = [{"role": "system", "content": self.config.system}] if self.config.system else []
        messages.append({"role": "user", "content": fill(self.template, pair)})
        limit = {} if self.config.max_tokens is None else {"max_tokens": self.config.max_tokens}
        return {"model": self.model, "messages": messages, "temperature": 0} | limit | self.config.parameters

    def _key(self, pair: Pair) -> str:
        asked = [self.question, pair.prompt, pair.response]
        return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()

    def notes(self) -> Mapping[str, int]:
        return {
            "requests": self.endpoint.num_requests,
            "questions answered before": self.num_known,
            "questions without a score": self.num_without,
        }

    def close(self) -> None:
        self.endpoint.close()
        self.answers.close()


def fill(template: str, pair: Pair) -> str:
    """The template with both texts in place, in one pass: braces in the texts and elsewhere stay as they are."""
    texts = {"prompt": prompt_text(pair.prompt), "response": pair.response}
    return re.sub(r"\{(prompt|response)\}", lambda match: texts[match[1]], template)


def prompt_text(prompt: str | tuple[Mapping[str, Any], ...]) -> str:
    """A prompt to be read by a judge: a single message is its text, several have their roles before them."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


# ------------------------------------------------------------------------------------------------------ judge.yaml


def load_judge(path: str) -> tuple[JudgeConfig, str | None]:
    """The judge that a YAML file describes, and its API key.

    Raises:
        UserError: no such file, an unknown key or a wrong value, or an environment variable that is not set.
    """
    config = _typed(_read_yaml(Path(path).expanduser()), path)
    try:
        check(config)
        _check_together(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return config, _api_key(config, path)


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a YAML file that describes a judge") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must be keys and values, such as base_url, model and template")
    return values


def _typed(values: dict[str, Any], path: str) -> JudgeConfig:
    known = [one.name for one in dataclasses.fields(JudgeConfig)]
    for name in values:
        if name in ("api_key", "key", "token"):
            raise UserError(
                f"{path}: {name} stands in no file; put it into an environment variable and name that, "
                "api_key_variable: NAME"
            )
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"{path}: unknown key {name}{hint}; there are {', '.join(known)}")
    if (base := values.get("based_on")) is not None:
        there = sorted(file.stem for file in JUDGES.glob("*.yaml"))
        if base not in there:
            raise UserError(f"{path}: based_on={base!r}: there are {', '.join(there)}")
        values = _read_yaml(JUDGES / f"{base}.yaml") | values
    return JudgeConfig(**values)


def _check_together(config: JudgeConfig) -> None:
    for name in ("base_url", "model", "template"):
        if not vars(config)[name]:
            raise UserError(f"{name} is not set; add it")
    assert config.base_url is not None and config.template is not None
    try:
        url = urlsplit(config.base_url)
        usable = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        usable = False
    if not usable or url.query or url.fragment:
        raise UserError(f"base_url={config.base_url!r}: must be like http://localhost:8000/v1")
    if url.username or url.password:
        raise UserError("base_url holds a password; put the key into an environment variable (api_key_variable)")
    if "{response}" not in config.template:
        raise UserError("template does not ask about {response}; put it where the response is to stand")
    try:
        groups = re.compile(config.pattern).groups
    except re.error as error:
        raise UserError(f"pattern={config.pattern!r}: no regular expression ({error})") from None
    if groups != 1:
        raise UserError(f"pattern={config.pattern!r}: has {groups} groups; one must hold the score, (?:...) is none")
    if not config.low < config.high:
        raise UserError(f"low={config.low:g} must be below high={config.high:g}")
    if taken := {"model", "messages", "temperature", "stream", "n", "max_tokens"} & config.parameters.keys():
        raise UserError(f"parameters.{min(taken)} cannot be set; model, max_tokens and template are keys of their own")


def _api_key(config: JudgeConfig, path: str) -> str | None:
    name = config.api_key_variable
    if name is None:
        return None
    api_key = os.environ.get(name, "").strip()
    if not api_key:
        raise UserError(f"{path}: api_key_variable={name}: this environment variable is not set; export it")
    if not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
        raise UserError(f"{path}: api_key_variable={name}: holds what no key has (blanks, line ends); export it anew")
    return api_key


def make(path: str, place: Place) -> JudgeScorer:
    """The judge that a YAML file describes; its answers are kept beside the output."""
    config, api_key = load_judge(path)
    return JudgeScorer(config, api_key, place.folder)
