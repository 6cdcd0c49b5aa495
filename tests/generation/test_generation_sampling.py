"""What is drawn: its distribution, its cut-offs, and that nothing but seed, stream and prompt reaches it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from nemo_rao.generation.engine import Continuation, Request
from nemo_rao.generation.policy import Policy, Question
from nemo_rao.generation.settings import GenerateSettings
from nemo_rao.ops.sampling import draw, uniforms


def drawn(logits: list[float], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, count: int = 20000):
    """Shares of the tokens among ``count`` draws."""
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens = draw(torch.tensor([logits]).expand(count, -1), uniform, torch.full((count, 1), temperature), top_k, top_p)
    return torch.bincount(tokens, minlength=len(logits)).double() / count


def test_tokens_are_drawn_with_their_probabilities() -> None:
    logits = [0.3, -1.0, 2.0, 0.0]
    for temperature in (1.0, 0.5, 2.0):
        expected = (torch.tensor(logits).double() / temperature).softmax(0)
        assert torch.allclose(drawn(logits, temperature), expected, atol=1e-4)


def test_top_k_and_top_p_keep_what_transformers_keeps() -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(5)) * 2
    for top_k, top_p in ((5, 1.0), (0, 0.7), (0, 1e-6), (20, 0.5)):
        kept = logits.clone()
        if top_k:
            kept = transformers.TopKLogitsWarper(top_k)(None, kept)
        if top_p < 1:
            kept = transformers.TopPLogitsWarper(top_p)(None, kept)
        assert torch.allclose(drawn(logits[0].tolist(), 1.0, top_k, top_p), kept[0].double().softmax(0), atol=1e-4)


def test_a_token_without_probability_is_never_drawn() -> None:
    last = np.nextafter(1.0, 0.0)
    for uniform in (0.0, last):
        logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
        token = draw(logits, torch.tensor([uniform], dtype=torch.float64), torch.ones(1, 1), 0, 1.0)
        assert token.item() in (1, 2)


def test_streams_differ_and_a_longer_one_begins_like_a_shorter_one() -> None:
    assert (uniforms(1, (4, 2, 0), 8)[:3] == uniforms(1, (4, 2, 0), 3)).all()
    streams = [(0, (4, 2, 0)), (1, (4, 2, 0)), (1, (2, 4, 0)), (1, (4, 2, 1)), (1, (4, 3, 0))]
    assert len({uniforms(seed, stream, 1)[0] for seed, stream in streams}) == len(streams)


def settings(**keys) -> GenerateSettings:
    return GenerateSettings(engine="transformers", **keys)


def test_greedy_answers_are_those_of_the_model_alone_without_padding(model_folder: Path) -> None:
    policy = Policy(model_folder, settings())
    prompts = ["Name a prime number.", "a", "Sort these letters: d a c b"]
    answers = policy.answer([Question(text, "", (n, 0, 0), 0.0) for n, text in enumerate(prompts)], 24)
    model = transformers.LlamaForCausalLM.from_pretrained(model_folder)
    for text, answer in zip(prompts, answers, strict=True):
        tokens = policy.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        sampled = []
        for _ in range(24):  # the whole text again for each token: no cache, no padding, no generation settings
            token = int(
                model(torch.cat([tokens, torch.tensor([sampled], dtype=torch.long)], 1)).logits[0, -1, :300].argmax()
            )
            if token == policy.encoder.end_token_id:
                break
            sampled.append(token)
        assert answer is not None
        assert answer.num_tokens == len(sampled) and answer.cut == (len(sampled) == 24)
        assert answer.text == policy.tokenizer.decode(sampled).rstrip("\ufffd" if answer.cut else "")


def test_the_end_token_ends_a_response_and_other_special_tokens_stay_in_it(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy(model_folder, settings())
    answers = policy.answer([Question("Name a prime.", "", (0, k, 0), 1.0) for k in range(60)], 12)
    assert any(answer and not answer.cut for answer in answers) and any(answer and answer.cut for answer in answers)
    special = {"<|begin|>", "<|system|>", "<|user|>", "<|assistant|>"}
    for answer in answers:
        assert answer is not None and answer.cut == (answer.num_tokens == 12)
        assert "<|end|>" not in answer.text and "<|pad|>" not in answer.text
        assert answer.has_special_tokens == any(token in answer.text for token in special)

    said = [policy.tokenizer.encode(text, add_special_tokens=False) for text in ("<|user|>a<|pad|> b<|user|>", "a b")]
    monkeypatch.setattr(policy.engine, "generate", lambda _: [Continuation(tokens, False) for tokens in said])
    answers = policy.answer([Question("Name a prime.", "", (0, k, 0), 1.0) for k in range(2)], 12)
    assert [(answer.text, answer.has_special_tokens) for answer in answers if answer] == [
        ("<|user|>a b<|user|>", True),
        ("a b", False),
    ]


def test_tokens_that_the_tokenizer_does_not_have_are_never_drawn(model_folder: Path) -> None:
    policy = Policy(model_folder, settings())
    vocabulary = len(policy.tokenizer)
    head = policy.engine.model.lm_head.weight  # type: ignore[attr-defined]
    with torch.no_grad():
        head[vocabulary:] = 0.0
        head[vocabulary:, 0] = 1000.0
    request = Request(np.array([1, 30, 31], np.int32), (0, 0, 0), 20, 1.0)
    assert len(head) > vocabulary
    assert all(token < vocabulary for token in policy.engine.generate([request])[0].tokens)


def test_the_models_context_is_never_exceeded(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(model_folder, settings())
    limits = []
    original = policy.engine.generate

    def watched(requests):
        limits.extend((len(request.tokens), request.max_new_tokens) for request in requests)
        return original(requests)

    monkeypatch.setattr(policy.engine, "generate", watched)
    texts = ["a", "x " * 50, "x " * 200]
    answers = policy.answer([Question(text, "", (n, 0, 0), 1.0) for n, text in enumerate(texts)], 100)
    assert [answer is None for answer in answers] == [False, False, True]
    assert limits[0][1] == 100 and sum(limits[1]) == 128 and len(limits) == 2


@pytest.mark.parametrize("template", ["auto", "never"])
def test_prompts_are_rendered_as_in_training(
    model_folder: Path, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemo_rao.batch import Response, Row

    policy = Policy(model_folder, settings(chat_template=template))
    question = Question("Sort: b a", "here", (0, 0, 0), 1.0)
    trained = policy.encoder.encode(Row("Sort: b a", (Response("a b"),), "here")).prompt
    asked = []
    monkeypatch.setattr(policy.engine, "generate", lambda requests: asked.extend(requests) or [])
    with pytest.raises(StopIteration):
        policy.answer([question], 8)
    assert asked[0].tokens.tolist() == trained.tolist()
