"""Tasks of lm-evaluation-harness (``lm_eval``), run by that library with the policy's weights.

The RAO paper's Table 3 reports ``mmlu``, ``gsm8k``, ``arc_easy``, ``arc_challenge``, ``mathqa`` and ``social_iqa``.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_rao.errors import UserError
from nemo_rao.generation.policy import Policy
from nemo_rao.generation.settings import EvaluateSettings


def task_manager(tasks: Sequence[str], include_path: str | None) -> Any:
    """Find the tasks. Imports the library but loads neither model nor data.

    Raises:
        UserError: the library is not installed, or has no such task.
    """
    if include_path is not None and not os.path.isdir(include_path):
        raise UserError(f"--include-path {include_path}: no such directory. Pass one with YAML files of tasks.")
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            f"task {tasks[0]}: needs lm-evaluation-harness, which is not installed. "
            "Run pip install 'nemo-rao[eval]' (alpaca_eval and mt_bench do not need it)."
        )
    from lm_eval.tasks import TaskManager

    try:
        manager = TaskManager(include_path=include_path)
    except Exception as error:  # whatever a user's YAML can cause
        raise UserError(f"--include-path {include_path}: lm_eval cannot read it ({_one_line(error)})") from None
    for task in tasks:
        if task not in manager.all_tasks:
            near = ", ".join(name for name in manager.all_tasks if task in name)[:200]
            raise UserError(
                f"task {task}: lm_eval has no task of this name{f' (it has {near})' if near else ''}. `lm_eval ls "
                "tasks` lists them; --include-path adds your own."
            )
    return manager


class Harness:
    """Runs tasks with the policy's weights, which are loaded once for all of them.

    Args:
        policy: a policy whose engine is `transformers`.
        manager: as returned by :func:`task_manager`.
        settings: batch size, number of examples, few-shot examples, chat template.

    Raises:
        UserError: ``apply_chat_template`` is set, but there is no template or it is disabled.
    """

    def __init__(self, policy: Policy, manager: Any, settings: EvaluateSettings) -> None:
        self._policy, self._manager, self._settings = policy, manager, settings
        self._model: Any = None
        if settings.apply_chat_template and not policy.encoder.uses_template:
            raise UserError(
                "apply_chat_template: the tokenizer has no chat template, or chat_template is 'never'. Leave it out."
            )

    def identity(self) -> dict[str, Any]:
        """Everything that the results depend on, besides the model."""
        import lm_eval

        keys = ("limit", "num_fewshot", "apply_chat_template", "system", "seed")
        identity = {name: getattr(self._settings, name) for name in keys} | {"lm_eval": lm_eval.__version__}
        if self._settings.apply_chat_template:
            identity["template_arguments"] = dict(self._policy.rendering.template_arguments)
        return identity

    def run(self, task: str) -> dict[str, Any]:
        """Run a task: ``{"metrics": {...}, "subtasks": {...}, "versions": {...}, "num_fewshot": {...}}``."""
        from lm_eval import simple_evaluate

        settings = self._settings
        try:
            found = simple_evaluate(
                model=self._loaded(),
                tasks=[task],
                num_fewshot=settings.num_fewshot,
                limit=settings.limit,
                batch_size=settings.batch_size,
                apply_chat_template=settings.apply_chat_template,
                system_instruction=settings.system,
                task_manager=self._manager,
                log_samples=False,
                random_seed=settings.seed,
                numpy_random_seed=settings.seed,
                torch_random_seed=settings.seed,
                fewshot_random_seed=settings.seed,
            )
        except UserError:
            raise
        except Exception as error:  # failed downloads, errors in a task, memory
            raise UserError(
                f"task {task}: lm_eval stopped with {type(error).__name__}: {_one_line(error)}. Finished tasks are "
                "kept in results.json."
            ) from None
        results = dict(found["results"]) | dict(found.get("groups") or {})
        return {
            "metrics": _numbers(results.pop(task)),
            "subtasks": {name: _numbers(values) for name, values in results.items()},
            "versions": dict(found.get("versions") or {}),
            "num_fewshot": dict(found.get("n-shot") or {}),
        }

    def _loaded(self) -> Any:
        if self._model is None:
            self._model = _model_class()(self._policy, self._settings)
        return self._model


def _model_class() -> Any:
    """Subclass of the library's model that renders prompts as in training."""
    from lm_eval.models.huggingface import HFLM

    from nemo_rao.generation.with_transformers import TransformersEngine

    class Model(HFLM):  # type: ignore[misc,no-any-unimported]
        def __init__(self, policy: Policy, settings: EvaluateSettings) -> None:
            assert isinstance(policy.engine, TransformersEngine)
            super().__init__(
                pretrained=policy.engine.model,
                tokenizer=policy.tokenizer,
                batch_size=settings.batch_size,
                trust_remote_code=False,
                chat_template_args=dict(policy.rendering.template_arguments),
                # A chat template writes the beginning token itself if needed.
                add_bos_token=False if settings.apply_chat_template else None,
            )
            self._policy = policy

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            """Render as in training. The library's method silently drops a system message that the template rejects."""
            if not add_generation_prompt:  # the task provides the beginning of the answer
                return super().apply_chat_template(chat_history, add_generation_prompt=False)
            return self._policy.prompt_text(tuple(chat_history), "a question of lm_eval")

    return Model


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """``{"acc,none": 0.5, "alias": ...}`` -> ``{"acc": 0.5}``; a filter other than ``none`` stays in the name."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if "," in name and isinstance(value, (int, float)) and math.isfinite(value)
    }


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
