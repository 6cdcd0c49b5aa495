"""judge.yaml: the model, the question, and how an answer becomes a number. Checked before anything is asked."""

from __future__ import annotations

import dataclasses
import os
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nemo_rao.errors import UserError, errors_at
from nemo_rao.generation.settings import EngineName
from nemo_rao.keys import key, make

JUDGES = Path(__file__).with_name("judges")
# Keys of one kind of judge only.
OF_ENDPOINT = ("base_url", "model", "api_key_variable", "concurrency", "timeout", "retries", "backoff")
OF_FOLDER = ("model_folder", "engine", "batch_size")
PARAMETERS_OF_FOLDER = ("seed", "top_p", "top_k", "template_arguments")


@dataclass
class JudgeConfig:
    based_on: str | None = key(None, "a built-in judge; its values are used for keys that this file does not set")
    base_url: str | None = key(None, "URL of an OpenAI-compatible endpoint, such as http://localhost:8000/v1")
    model: str | None = key(None, "name of the model at the endpoint")
    api_key_variable: str | None = key(None, "environment variable with the API key; null: send no key")
    model_folder: str | None = key(
        None,
        "instead of an endpoint: directory of a chat model in Hugging Face's format, with safetensors, to run here",
    )
    system: str | None = key(None, "system message; null: none")
    template: str | None = key(None, "the question; {prompt} and {response} are replaced by the texts")
    pattern: str = key(
        r"""(?i)\bscore["'*_`]*\s*[:=：]\s*["'*_`$(\[]*\s*([-−+]?\d+(?:\.\d+)?)""",
        "regular expression whose one group is the score; the last match counts",
    )
    low: float | None = key(
        None,
        "lowest score of the scale. {low} and {high} in template or system are replaced by its ends; without them, a "
        "sentence after the question states the scale. Scores outside it are not used",
    )
    high: float | None = key(None, "highest score of the scale; low and high are required")
    attempts: int = key(
        2,
        "maximum number of times to ask a question until an answer has a score; model_folder at temperature 0: once",
        low=1,
    )
    max_tokens: int | None = key(
        1024, "maximum number of tokens of an answer; null: send none, so that the endpoint's own limit applies", low=1
    )
    temperature: float = key(0.0, "divides the logits; 0: greedy", low=0.0)
    parameters: dict[str, Any] = key(
        {},
        "further fields of the request, such as {top_p: 1.0}; for model_folder: seed, top_p, top_k, template_arguments",
    )
    concurrency: int = key(16, "number of concurrent questions", low=1, high=1024)
    timeout: float = key(120.0, "seconds for one request", low=0, exclusive=True)
    retries: int = key(6, "further requests after a timeout, a lost connection, 408, 409, 425, 429 or 5xx", low=0)
    backoff: float = key(1.0, "maximum seconds before the first retry; doubled for each further one, up to 60", low=0)
    engine: EngineName = key(
        "auto",
        "engine that runs model_folder; auto: vLLM if it is installed and there is a GPU",
        choices=typing.get_args(EngineName),
    )
    batch_size: int = key(16, "questions that model_folder answers at once", low=1)
    cache: str | None = key(None, "file of answers, shared by runs; null: judge_answers.sqlite next to the output")

    def messages(self, question: str) -> tuple[Mapping[str, str], ...]:
        """A question as messages to the judge."""
        system = ({"role": "system", "content": self.system},) if self.system else ()
        return (*system, {"role": "user", "content": question})


def load_judge(path: str) -> tuple[JudgeConfig, str | None]:
    """The judge described by a YAML file, and its API key.

    Raises:
        UserError: no such file, an unknown key or an invalid value, keys of both kinds of judge, or an environment
            variable that is not set.
    """
    values = _with_base(_read_yaml(Path(path).expanduser()), path)
    with errors_at(path):
        config = make(JudgeConfig, values)
        _check_kind(values)
        _check_together(config)
    return _with_scale(config), _api_key(config, path)


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}). Pass a YAML file that describes a judge."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must be a mapping of keys to values, such as base_url, model and template")
    return values


def _with_base(values: dict[str, Any], path: str) -> dict[str, Any]:
    """The values of a file over those of the judge that it is based on."""
    for name in values:
        if name in ("api_key", "key", "token"):
            raise UserError(
                f"{path}: {name}: API keys must not be stored in this file. Export an environment variable and name "
                "it, api_key_variable: NAME."
            )
    if (base := values.get("based_on")) is not None:
        there = sorted(file.stem for file in JUDGES.glob("*.yaml"))
        if base not in there:
            raise UserError(f"{path}: based_on={base!r}: no such built-in judge. Use one of {', '.join(there)}.")
        values = _read_yaml(JUDGES / f"{base}.yaml") | values
    return values


def _check_kind(values: Mapping[str, Any]) -> None:
    """Refuse keys that only the other kind of judge has."""
    in_folder = values.get("model_folder") is not None
    for name in OF_ENDPOINT if in_folder else OF_FOLDER:
        if values.get(name) is None:
            continue
        if in_folder:
            raise UserError(f"{name}: applies only to an endpoint, but model_folder is set. Leave one of them out.")
        raise UserError(f"{name}: applies only to a model_folder, but none is set. Leave it out, or set model_folder.")


def _check_together(config: JudgeConfig) -> None:
    if config.model_folder is None:
        _check_endpoint(config)
    else:
        _check_folder(config)
    if not config.template:
        raise UserError("template: is not set. Add it.")
    if "{response}" not in config.template:
        raise UserError("template: does not contain {response}. Put it where the response belongs.")
    try:
        groups = re.compile(config.pattern).groups
    except re.error as error:
        raise UserError(f"pattern={config.pattern!r}: is not a regular expression ({error})") from None
    if groups != 1:
        raise UserError(
            f"pattern={config.pattern!r}: has {groups} groups, but must have one, the score. Write others as (?:...)."
        )
    if config.low is None or config.high is None:
        missing = "low" if config.low is None else "high"
        raise UserError(f"{missing}: is not set. Set the scale that the judge uses, such as low: 1 and high: 10.")
    if not config.low < config.high:
        raise UserError(f"low={config.low:g} must be below high={config.high:g}")


def _with_scale(config: JudgeConfig) -> JudgeConfig:
    """The judge with its scale in the question: ``{low}`` and ``{high}`` filled in, or an additional sentence."""
    assert config.template is not None
    ends = {name: f"{getattr(config, name):.10g}" for name in ("low", "high")}
    system, template = config.system, config.template
    if not all(f"{{{name}}}" in f"{system}{template}" for name in ends):
        template = f"{template.rstrip()}\n\nThe score is a number from {{low}} to {{high}}."
    for name, end in ends.items():
        template = template.replace(f"{{{name}}}", end)
        system = system and system.replace(f"{{{name}}}", end)
    return dataclasses.replace(config, system=system, template=template)


def _check_endpoint(config: JudgeConfig) -> None:
    if not config.base_url:
        raise UserError("base_url: is not set. Add it, or model_folder.")
    if not config.model:
        raise UserError("model: is not set. Add it.")
    try:
        url = urlsplit(config.base_url)
        usable = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        usable = False
    if not usable or url.query or url.fragment:
        raise UserError(f"base_url={config.base_url!r}: must be a URL such as http://localhost:8000/v1")
    if url.username or url.password:
        raise UserError("base_url: contains a password. Put it into an environment variable (api_key_variable).")
    if taken := {"model", "messages", "temperature", "stream", "n", "max_tokens"} & config.parameters.keys():
        raise UserError(
            f"parameters.{min(taken)}: cannot be set here. Use the keys model, temperature, max_tokens and template."
        )


def _check_folder(config: JudgeConfig) -> None:
    if not config.model_folder:
        raise UserError("model_folder: is empty. Set it to a directory.")
    if config.max_tokens is None:
        raise UserError("max_tokens: is null, which only an endpoint supports. Set it for model_folder.")
    for name in config.parameters:
        if name not in PARAMETERS_OF_FOLDER:
            raise UserError(
                f"parameters.{name}: does not apply to model_folder. Use one of {', '.join(PARAMETERS_OF_FOLDER)}."
            )


def _api_key(config: JudgeConfig, path: str) -> str | None:
    name = config.api_key_variable
    if name is None:
        return None
    api_key = os.environ.get(name, "").strip()
    if not api_key:
        raise UserError(f"{path}: api_key_variable={name}: this environment variable is not set. Export it.")
    if not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
        raise UserError(
            f"{path}: api_key_variable={name}: contains characters that no key has (spaces, line breaks). "
            "Export it again."
        )
    return api_key
