"""A judge that is a model in a folder: real tiny models, held against `transformers`' own `generate`."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from nemo_rao.demo.tokenizer_training import train_tokenizer
from nemo_rao.generation.with_transformers import TransformersEngine
from tests.scoring.conftest import read_lines, write_rows

Command = Callable[..., tuple[int, str, str]]
TEMPLATE = "Rate {response} to {prompt}, 0 1 2 3 4 5 6 7 8 9."
SYSTEM = "You rate."
MAX_TOKENS = 6  # some answers are longer, and cut off
PATTERN, HIGH = r"(\d+)", 99999.0  # the answer's last number
SOME_MISSING = ("--max-missing", "1")


@pytest.fixture(scope="session")
def judge_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model of random weights, most of whose tokens are digits and ends."""
    folder = tmp_path_factory.mktemp("models") / "judge"
    train_tokenizer([f"{SYSTEM} {TEMPLATE} prompt answer of the letters a b c d e f g h"] * 3, folder, 300)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    digits = sorted(number for token, number in tokenizer.get_vocab().items() if re.search(r"\d", token))
    transformers.set_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 3.0  # a coordinate that is positive everywhere ...
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
        draw = torch.Generator().manual_seed(25)  # of those tried, one whose answers differ, and end early or late
        model.lm_head.weight[digits] = torch.randn(len(digits), 48, generator=draw) * 0.45
        model.lm_head.weight[tokenizer.eos_token_id] = torch.randn(48, generator=draw) * 0.8
        model.lm_head.weight[[*digits, tokenizer.eos_token_id], 0] = 7.0  # ... raises the logits of digits and the end
    # Settings of its own, which must not reach what is asked here.
    model.generation_config = transformers.GenerationConfig(do_sample=True, temperature=2.0, repetition_penalty=1.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """The batches that the engine was given."""
    batches: list[list[Any]] = []
    original = TransformersEngine.generate

    def counting(self: TransformersEngine, requests: Any) -> Any:
        batches.append(list(requests))
        return original(self, requests)

    monkeypatch.setattr(TransformersEngine, "generate", counting)
    return batches


def write_judge(folder: Path, path: str = "judge.yaml", **keys: Any) -> str:
    settings = {
        "model_folder": str(folder),
        "engine": "transformers",
        "system": SYSTEM,
        "template": TEMPLATE,
        "pattern": PATTERN,
        "max_tokens": MAX_TOKENS,
        "low": 0,
        "high": HIGH,
    }
    Path(path).write_text(json.dumps(settings | keys))
    return f"judge:{path}"


def rewards(path: str = "out.jsonl") -> list[list[float | None]]:
    return [[response["reward"] for response in row["responses"]] for row in read_lines(path)]


def expected(folder: Path, path: str = "in.jsonl") -> list[list[float | None]]:
    """What `transformers` alone answers, question by question, and the score in it."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    # Given to `generate` instead, it would be filled up with the folder's own settings.
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=MAX_TOKENS, eos_token_id=tokenizer.eos_token_id, pad_token_id=0
    )

    def score(prompt: str, response: str) -> float | None:
        question = TEMPLATE.replace("{prompt}", prompt).replace("{response}", response)
        question += f"\n\nThe score is a number from 0 to {HIGH:g}."
        tokens = tokenizer.apply_chat_template(
            [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=False,
        )
        said = model.generate(tokens, attention_mask=torch.ones_like(tokens))
        if said[0, -1] != tokenizer.eos_token_id:
            return None  # cut off
        found = re.findall(PATTERN, tokenizer.decode(said[0, tokens.shape[1] : -1]))
        return float(found[-1]) if found and float(found[-1]) <= HIGH else None

    return [[score(row["prompt"], one["content"]) for one in row["responses"]] for row in read_lines(path)]


def test_scores_are_those_of_transformers_own_greedy_answers_in_any_batch(
    judge_folder: Path, command: Command, asked: list[list[Any]]
) -> None:
    write_rows("in.jsonl", 8)
    wanted = expected(judge_folder)
    scores = [score for row in wanted for score in row]
    assert len(set(scores) - {None}) > 3 and None in scores, "the model's answers tell nothing"
    for size in (1, 5, 64):
        asked.clear()
        scorer = write_judge(judge_folder, batch_size=size, cache=f"{size}.sqlite")
        code, output, message = command("in.jsonl", f"{size}.jsonl", "--scorer", scorer, *SOME_MISSING)
        assert code == 0, message
        assert rewards(f"{size}.jsonl") == wanted
        assert [len(batch) for batch in asked] == {1: [1] * 16, 5: [5, 5, 5, 1], 64: [16]}[size]
        # Greedy: an answer without a score would come again as it was.
        assert "judge: 16 requests" in output and f"{scores.count(None)} answer cut off (raise max_tokens)" in output


def test_a_run_that_was_killed_asks_nothing_again_that_was_answered(
    judge_folder: Path, command: Command, asked: list[list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """Nothing catches it, like a signal."""

    write_rows("in.jsonl", 8)
    scorer = write_judge(judge_folder, batch_size=3)
    arguments = ("in.jsonl", "out.jsonl", "--scorer", scorer, "--rows-at-once", "4", *SOME_MISSING)
    counting = TransformersEngine.generate

    def killed(self: TransformersEngine, requests: Any) -> Any:
        if len(asked) == 5:  # within the second four rows
            raise Killed
        return counting(self, requests)

    monkeypatch.setattr(TransformersEngine, "generate", killed)
    with pytest.raises(Killed):
        command(*arguments)
    monkeypatch.setattr(TransformersEngine, "generate", counting)
    assert [len(batch) for batch in asked] == [3, 3, 2, 3, 3] and not Path("out.jsonl").exists()
    code, output, message = command(*arguments)
    assert code == 0, message
    assert "resuming after 4 of 8 rows" in output and "judge: 6 questions answered before" in output
    assert [len(batch) for batch in asked[5:]] == [2]
    assert rewards() == expected(judge_folder)


def test_answers_are_kept_for_other_patterns_and_another_place_but_not_for_another_model(
    judge_folder: Path, command: Command, asked: list[list[Any]], tmp_path: Path
) -> None:
    write_rows("in.jsonl", 2)
    assert command("in.jsonl", "out.jsonl", "--scorer", write_judge(judge_folder), *SOME_MISSING)[0] == 0
    elsewhere = shutil.copytree(judge_folder, tmp_path / "elsewhere")
    scorer = write_judge(elsewhere, pattern=r"(\d+)\D*$", batch_size=2)
    assert command("in.jsonl", "again.jsonl", "--scorer", scorer, *SOME_MISSING)[0] == 0
    assert len(asked) == 1 and rewards("again.jsonl") == rewards()
    settings = json.loads((elsewhere / "config.json").read_text())
    (elsewhere / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 1e-3}))
    assert command("in.jsonl", "other.jsonl", "--scorer", scorer, *SOME_MISSING)[0] == 0
    assert len(asked) > 1


def test_above_temperature_0_answers_are_drawn_by_the_seed_and_asked_for_again(
    judge_folder: Path, command: Command, asked: list[list[Any]]
) -> None:
    write_rows("in.jsonl", 12)
    made = []
    for number, seed in enumerate((1, 1, 2)):
        keys = {"temperature": 1.5, "parameters": {"seed": seed}, "attempts": 3, "low": 5, "cache": f"{number}.sqlite"}
        asked.clear()
        scorer = write_judge(judge_folder, **keys)
        assert command("in.jsonl", f"{number}.jsonl", "--scorer", scorer, *SOME_MISSING)[0] == 0
        made.append(rewards(f"{number}.jsonl"))
        requests = [request for batch in asked for request in batch]
        assert len({request.stream for request in requests}) == len(requests)
        assert {request.temperature for request in requests} == {1.5}
        times = Counter(request.stream[0] for request in requests)
        missing = sum(score is None for row in made[-1] for score in row)
        assert len(times) == 24 and set(times.values()) == {1, 2, 3}
        assert 0 < missing <= sum(count == 3 for count in times.values())
    assert made[0] == made[1] != made[2]


def test_a_question_longer_than_the_context_has_no_score_and_the_others_have(
    judge_folder: Path, command: Command
) -> None:
    write_rows("in.jsonl", 2)
    with open("in.jsonl", "a") as file:
        file.write(json.dumps({"prompt": "p", "responses": [{"content": "7 " * 300}, {"content": "a"}]}) + "\n")
    code, _, message = command("in.jsonl", "out.jsonl", "--scorer", write_judge(judge_folder), *SOME_MISSING)
    assert code == 0, message
    Path("in.jsonl").write_text(Path("in.jsonl").read_text().replace("7 " * 300, "-"))
    wanted = expected(judge_folder)
    assert rewards()[:2] == wanted[:2] and rewards()[2] == [None, wanted[2][1]]


def test_thinking_that_the_generation_prompt_opens_is_no_answer_before_it_ends(
    judge_folder: Path, command: Command, tmp_path: Path
) -> None:
    write_rows("in.jsonl", 2)
    thinks = shutil.copytree(judge_folder, tmp_path / "models" / "thinks")
    tokenizer = transformers.AutoTokenizer.from_pretrained(thinks)
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}"
    (thinks / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(thinks)
    code, output, message = command("in.jsonl", "out.jsonl", "--scorer", write_judge(thinks), *SOME_MISSING)
    assert code == 0 and rewards() == [[None, None]] * 2, message
    assert "4 answer cut off" in output and "'<think>" in output


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        ("nothing there", ("no such directory",)),
        ("shard", ("model-2.safetensors is missing", "download the model again")),
        ("pickled", ("pytorch_model.bin is pickled, and pickles can run code",)),
        ("of a kind there is not", ("configuration of this lama",)),
        ("template", ("has no chat template",)),
        ("system", ("the chat template", "rejects messages of system, user", "set system to null")),
    ],
)
def test_a_folder_that_is_no_chat_model_is_named_before_anything_is_asked(
    judge_folder: Path, command: Command, tmp_path: Path, asked: list[list[Any]], damage: str, parts: tuple[str, ...]
) -> None:
    model = tmp_path / "models" / "judge"
    if damage != "nothing there":
        shutil.copytree(judge_folder, model)
    if damage == "shard":
        (model / "model.safetensors").rename(model / "model-1.safetensors")
        index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
    elif damage == "pickled":
        (model / "model.safetensors").rename(model / "pytorch_model.bin")
    elif damage == "of a kind there is not":
        (model / "config.json").write_text(json.dumps({"model_type": "lama"}))
    elif damage in ("template", "system"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        tokenizer.chat_template = None if damage == "template" else refusing + tokenizer.chat_template
        (model / "chat_template.jinja").unlink(missing_ok=True)
        tokenizer.save_pretrained(model)
    write_rows("in.jsonl")
    scorer = write_judge(model)
    before = sorted(Path().iterdir())
    code, output, message = command("in.jsonl", "out.jsonl", "--scorer", scorer)
    assert code == 2 and output == "" and message.count("\n") == 1, message
    assert all(part in message for part in (f"error: --scorer {scorer}: judge.yaml: ", *parts)), message
    assert not asked and sorted(Path().iterdir()) == before


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"model": "small"}, ("model: applies only to an endpoint", "Leave one of them out")),
        ({"concurrency": 4}, ("concurrency: applies only to an endpoint",)),
        ({"model_folder": ""}, ("model_folder: is empty",)),
        ({"model_folder": None}, ("engine: applies only to a model_folder",)),
        ({"max_tokens": None}, ("max_tokens: is null", "Set it")),
        ({"temperature": -1}, ("temperature=-1: must be >= 0",)),
        ({"parameters": {"stop": "a"}}, ("parameters.stop", "seed, top_p, top_k")),
        ({"parameters": {"top_p": 2}}, ("parameters.top_p=2: must be <= 1",)),
        ({"engine": "vlm"}, ("engine='vlm'", "'vllm'")),
        ({"batch_size": 0}, ("batch_size=0: must be >= 1",)),
    ],
)
def test_a_wrong_key_of_a_folders_judge_is_named(
    judge_folder: Path, command: Command, asked: list[list[Any]], keys: dict[str, Any], parts: tuple[str, ...]
) -> None:
    write_rows("in.jsonl")
    code, output, message = command("in.jsonl", "out.jsonl", "--scorer", write_judge(judge_folder, **keys))
    assert code == 2 and output == "" and message.count("\n") == 1, message
    assert all(part in message for part in ("judge.yaml: ", *parts)), message
    assert not asked and sorted(path.name for path in Path().iterdir()) == ["in.jsonl", "judge.yaml"]
