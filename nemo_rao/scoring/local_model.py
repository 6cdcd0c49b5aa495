"""A chat model in a local Hugging Face directory as judge, run in this process by ``transformers`` or vLLM.

Its weights are loaded for the first question. Only safetensors are read, and remote code is never run. At temperature 0
an answer is a function of the question, up to rounding: bf16 weights may give another answer in another batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nemo_rao.batch import Row
from nemo_rao.errors import UserError
from nemo_rao.generation.policy import Policy, Question
from nemo_rao.generation.progress import print_notes
from nemo_rao.generation.settings import PolicySettings
from nemo_rao.generation.thinking import opened_thinking
from nemo_rao.keys import check
from nemo_rao.rows.option_names import OptionNames
from nemo_rao.runtime.progress import Progress
from nemo_rao.scoring.chat import CUT_OFF, ChatAnswer, ChatQuestion
from nemo_rao.scoring.judge_config import JudgeConfig


class JudgeSettings(PolicySettings):
    """Settings for loading and sampling from a judge's model."""

    OPTIONS = OptionNames({"template_arguments": "parameters.template_arguments"})


class LocalModel:
    """See :class:`nemo_rao.scoring.chat.Chat`.

    Args:
        config: checked configuration with model_folder and max_tokens.

    Raises:
        UserError: the directory has no complete chat model, or its chat template rejects the judge's messages.
    """

    def __init__(self, config: JudgeConfig) -> None:
        assert config.model_folder is not None and config.max_tokens is not None
        settings = JudgeSettings(
            batch_size=config.batch_size, engine=config.engine, chat_template="always", **config.parameters
        )
        check(settings, "parameters")
        self._policy = Policy(config.model_folder, settings)
        print_notes(self._policy)
        self._batch_size, self._max_tokens, self._temperature = config.batch_size, config.max_tokens, config.temperature
        self.name = self._policy.folder.name
        self.identity: Mapping[str, Any] = {"model": self._policy.fingerprint, "engine": self._policy.engine_name}
        self.varies = config.temperature > 0
        self.num_requests = 0
        try:
            prompt = self._policy.encoder.encode(Row(config.messages("a question"), (), "system and template")).prompt
        except UserError as error:
            raise UserError(f"{error}{' Or set system to null.' if config.system else ''}") from None
        # A thinking block opened by the generation prompt is part of the answer: if it does not end, there is no score.
        self._opened = opened_thinking(str(self._policy.tokenizer.decode(prompt.tolist())))

    def ask(self, questions: Sequence[ChatQuestion], keep: Callable[[int, ChatAnswer], None]) -> None:
        # Batch questions of similar length, to reduce padding; the longest first, since they need most memory.
        order = sorted(range(len(questions)), key=lambda at: -len(questions[at].messages[-1]["content"]))
        with Progress("answers", unit="answer", total=len(questions), stays=False, position=1) as progress:
            for start in range(0, len(order), self._batch_size):
                batch = order[start : start + self._batch_size]
                with JudgeSettings.OPTIONS.in_errors():
                    answers = self._policy.answer([self._question(questions[at]) for at in batch], self._max_tokens)
                self.num_requests += len(batch)
                for at, answer in zip(batch, answers, strict=True):
                    if answer is None:
                        keep(at, ChatAnswer("", "question without room for an answer in the model's context"))
                    else:
                        keep(at, ChatAnswer(self._opened + answer.text, CUT_OFF if answer.cut else ""))
                progress.advance(len(batch))

    def _question(self, asked: ChatQuestion) -> Question:
        return Question(asked.messages, asked.location, asked.stream, self._temperature)

    def close(self) -> None:
        pass
