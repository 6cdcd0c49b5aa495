"""`nemo-rao generate`: rows for training, the same whatever the batches and however often it was killed."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_rao.cli import main
from nemo_rao.data.encode import Encoder, load_tokenizer
from nemo_rao.generation.progress import work_through
from nemo_rao.generation.with_transformers import TransformersEngine
from nemo_rao.rows.reading import read_rows
from nemo_rao.runtime.part_file import PartFile
from tests.engines import needs_transformers_4
from tests.generation.conftest import read_lines

OPTIONS = ("--num-responses=3", "--max-new-tokens=16", "--engine=transformers")


def generate(model: Path, prompts: str, output: Path, *options: str) -> int:
    return main(["generate", str(model), prompts, str(output), *OPTIONS, *options])


class Killed(BaseException):
    """Nothing catches it, like a signal."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The streams of all responses that engines were asked for."""
    streams: list[tuple[int, ...]] = []
    original = TransformersEngine.generate

    def counting(self: TransformersEngine, requests: Any) -> Any:
        streams.extend(request.stream for request in requests)
        return original(self, requests)

    monkeypatch.setattr(TransformersEngine, "generate", counting)
    return streams


def test_responses_are_rows_that_training_reads(
    model_folder: Path, prompts: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert generate(model_folder, prompts, tmp_path / "out.jsonl", "--system", "Be kind.") == 0
    report = capfd.readouterr().out
    assert "5 prompts, 15 responses, mean length" in report
    rows = list(read_rows(tmp_path / "out.jsonl"))
    written = [response for row in read_lines(tmp_path / "out.jsonl") for response in row["responses"]]
    num_cut = sum(response.get("truncated", False) for response in written)
    num_special = sum("<|" in response["content"] for response in written)
    assert f"{100 * num_cut / 15:.1f} % cut at --max-new-tokens" in report and 0 < num_cut < 15
    assert f"{num_special} responses contain special tokens" in report and num_special
    assert [response.truncated for row in rows for response in row.responses] == [
        response.get("truncated", False) for response in written
    ]
    encoder = Encoder(load_tokenizer(model_folder))
    for row in rows:
        sample = encoder.encode(row)
        assert len(sample.responses) == 3
    assert [row.prompt[0]["content"] for row in rows] == ["Be kind.", "Be brief.", "Be kind.", "Be kind.", "Be kind."]
    assert read_lines(tmp_path / "out.jsonl")[2]["answer"] == "a b c d"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "prompts.jsonl"]


def test_responses_do_not_depend_on_the_batch_size_but_on_the_seed(
    model_folder: Path, prompts: str, tmp_path: Path
) -> None:
    made = []
    for number, option in enumerate(["--batch-size=1", "--batch-size=4", "--batch-size=64", "--seed=9"]):
        assert generate(model_folder, prompts, tmp_path / f"{number}.jsonl", option) == 0
        made.append((tmp_path / f"{number}.jsonl").read_bytes())
    assert made[0] == made[1] == made[2] != made[3]
    contents = [response["content"] for row in read_lines(tmp_path / "0.jsonl") for response in row["responses"]]
    assert len(set(contents)) == len(contents)


def test_a_killed_run_goes_on_without_generating_twice(
    model_folder: Path, prompts: str, tmp_path: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert generate(model_folder, prompts, tmp_path / "whole.jsonl", "--batch-size=3") == 0
    at_once, output = list(asked), tmp_path / "out.jsonl"
    part = tmp_path / "out.jsonl.part.jsonl"
    asked.clear()
    counting = TransformersEngine.generate

    def killed_at(prompt: int) -> None:
        def killed(self: TransformersEngine, requests: Any) -> Any:
            if requests[0].stream[0] == prompt:
                raise Killed
            return counting(self, requests)

        monkeypatch.setattr(TransformersEngine, "generate", killed)
        with pytest.raises(Killed):
            generate(model_folder, prompts, output, "--batch-size=3")

    killed_at(3)
    assert len(part.read_text().splitlines()) == 1 + 3 and not output.exists()
    with part.open("a") as file:
        file.write('{"item": 3, "rec')  # a kill in the middle of a line
    killed_at(4)
    monkeypatch.setattr(TransformersEngine, "generate", counting)
    assert generate(model_folder, prompts, output, "--batch-size=3") == 0
    assert asked == at_once
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not part.exists()


def test_an_empty_response_is_sampled_again_and_a_prompt_without_any_is_skipped(
    model_folder: Path, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from nemo_rao.generation.engine import Continuation

    def scripted(self: TransformersEngine, requests: Any) -> Any:
        """Prompt 1 is never answered; response 2 of the others is empty at first."""
        empty = [r.stream[0] == 1 or (r.stream[1] == 2 and r.stream[2] < 2) for r in requests]
        return [
            Continuation([] if none else [40 + r.stream[2]], False) for none, r in zip(empty, requests, strict=True)
        ]

    monkeypatch.setattr(TransformersEngine, "generate", scripted)
    assert generate(model_folder, prompts, tmp_path / "out.jsonl", "--resamples=2") == 0
    assert "4 prompts, 12 responses, mean length 1.0 tokens, 0.0 % cut" in (said := capfd.readouterr().out)
    assert "1 skipped for empty responses" in said
    rows = read_lines(tmp_path / "out.jsonl")
    assert len(rows) == 4 and all(row["responses"][2] != row["responses"][0] for row in rows)
    assert generate(model_folder, prompts, tmp_path / "none.jsonl", "--resamples=1") == 2
    assert "no prompt got 3 usable responses (5 skipped for empty responses)" in capfd.readouterr().err


def test_batches_are_the_same_items_wherever_a_run_was_killed(tmp_path: Path) -> None:
    groups: list[list[int]] = []

    def produce(items: Any) -> list[int]:
        groups.append(list(items))
        return [10 * item for item in items]

    with PartFile(tmp_path / "part", {}) as part:
        part.append([0, 10, 20, 30])
    with PartFile(tmp_path / "part", {}) as part:
        work_through(part, range(8), 3, produce, "")
        assert groups == [[3, 4, 5], [6, 7]] and list(part.records()) == [0, 10, 20, 30, 40, 50, 60, 70]


@pytest.mark.parametrize(
    ("option", "part"),
    [
        ("--temperature=0.5", "temperature=1.0, not temperature=0.5"),
        ("--seed=2", "seed=1234"),
        ("--system=x", "prompts"),
    ],
)
def test_a_part_of_other_work_is_refused(
    model_folder: Path, prompts: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], option: str, part: str
) -> None:
    path = begun(model_folder, prompts, tmp_path)
    before = path.read_bytes()
    assert generate(model_folder, prompts, tmp_path / "out.jsonl", option) == 2
    message = one_line(capfd)
    assert "was started with" in message and part in message and f"delete {path} to start over" in message
    assert path.read_bytes() == before


def test_a_part_of_another_model_is_refused_and_of_another_batch_size_is_not(
    model_folder: Path, prompts: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    begun(model_folder, prompts, tmp_path)
    other = shutil.copytree(model_folder, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    assert generate(other, prompts, tmp_path / "out.jsonl") == 2
    assert "was started with a different model" in one_line(capfd)
    copied = shutil.copytree(model_folder, tmp_path / "elsewhere")
    assert generate(copied, prompts, tmp_path / "out.jsonl", "--batch-size=2") == 0


def test_a_damaged_part_is_refused(
    model_folder: Path, prompts: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = begun(model_folder, prompts, tmp_path)
    path.write_text(path.read_text() + "garbage\n" + '{"item": 2, "record": {}}\n')
    assert generate(model_folder, prompts, tmp_path / "out.jsonl") == 2
    assert "line 3: was not written by this command, or is damaged" in one_line(capfd)


def test_a_full_disk_is_reported_and_what_was_finished_is_kept(
    model_folder: Path, prompts: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (900, limits[1]))
        assert generate(model_folder, prompts, tmp_path / "out.jsonl", "--batch-size=3") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = one_line(capfd)
    assert "out.jsonl.part.jsonl: cannot be written" in message and "run the same command again" in message
    kept = (tmp_path / "out.jsonl.part.jsonl").read_bytes().count(b"\n")
    assert kept > 1 and not (tmp_path / "out.jsonl").exists()
    assert generate(model_folder, prompts, tmp_path / "out.jsonl", "--batch-size=3") == 0
    assert generate(model_folder, prompts, tmp_path / "whole.jsonl", "--batch-size=3") == 0
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


# ------------------------------------------------------------------------------------------------------------ bad input


def test_wrong_keys_are_reported_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for options, part in (
        (["--num-responses=0"], "num_responses=0: must be >= 1"),
        (["--temperature=-1"], "temperature=-1.0: must be >= 0"),
        (["--temperature=nan"], "temperature=nan: must be finite"),
        (["--top-p=2"], "top_p=2.0: must be <= 1"),
        (["--temperature=0"], "gives the same response 4 times"),
        (["--engine=vlm"], "--engine: invalid choice: 'vlm'"),
        (["--batch-size=many"], "invalid int value: 'many'"),
        (["--system=x", "--chat-template=never"], "plain text cannot contain --system"),
        (["--template-arguments={a: 1}"], "{a: 1} is not a JSON object"),
        (['--template-arguments={"a": 1}', "--chat-template=never"], "plain text takes no --template-arguments"),
    ):
        assert main(["generate", "nowhere", "nothing.jsonl", "out.jsonl", *options]) == 2
        assert part in one_line(capfd)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("lines", "parts"),
    [
        ([], ("has no rows",)),
        ([{"prompt": "a"}, "{broken"], ("line 2", "invalid JSON")),
        ([{"prompt": "a"}, {"prompt": " "}], ("line 2", "'prompt' is empty")),
        ([{"prompts": "a"}], ("line 1", "unknown format with the fields prompts")),
        ([{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}], ("ends with an",)),
        ([{"prompt": [{"role": "robot", "content": "a"}]}], ("line 1", "chat template", "robot")),
    ],
)
def test_prompts_that_cannot_be_used_are_reported_with_their_line(
    model_folder: Path,
    write_rows: Callable[..., str],
    refused: Callable[..., str],
    lines: list[Any],
    parts: tuple[str, ...],
) -> None:
    message = refused(model_folder, write_rows(*lines))
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        ("nothing there", "no such directory"),
        ("config.json", "has no config.json"),
        ("model.safetensors", "has no weights"),
        ("pickled", "pytorch_model.bin is pickled, and pickles can run code"),
        ("cut", "bytes. Copy, export or download the model again"),
        ("shard", "model-2.safetensors is missing"),
        ("whole beside shards", "has both model.safetensors and model.safetensors.index.json"),
        pytest.param("rotary per layer", "rope_parameters differs by kind of layer", marks=needs_transformers_4),
        pytest.param(
            *("rotary within", "text_config.rope_parameters is ignored by the installed `transformers`"),
            marks=needs_transformers_4,
        ),
        ("tokenizer", "Pass a directory with a Hugging Face tokenizer"),
        ("end token", "has no end token"),
        ("of a kind there is not", "cannot read the configuration of this lama"),
        ("of another task", "t5 is not a causal language model"),
        ("code of its own", "cannot read the configuration of this mine"),
    ],
)
def test_an_incomplete_model_folder_is_reported(
    model_folder: Path, prompts: str, tmp_path: Path, refused: Callable[..., str], damage: str, part: str
) -> None:
    import shutil

    model = tmp_path / "model"
    if damage != "nothing there":
        shutil.copytree(model_folder, model)
    if damage in ("config.json", "model.safetensors"):
        (model / damage).unlink()
    elif damage == "pickled":
        (model / "model.safetensors").rename(model / "pytorch_model.bin")
    elif damage == "cut":
        (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-10])
    elif damage == "shard":
        (model / "model.safetensors").rename(model / "model-1.safetensors")
        index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
    elif damage == "whole beside shards":
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    elif damage.startswith("rotary"):
        found = json.loads((model / "config.json").read_text())
        rope = {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}
        changes = rope if damage == "rotary per layer" else {"text_config": rope}
        (model / "config.json").write_text(json.dumps({**found, **changes}))
    elif damage == "of a kind there is not":
        (model / "config.json").write_text(json.dumps({"model_type": "lama"}))
    elif damage == "of another task":
        (model / "config.json").write_text(json.dumps({"model_type": "t5"}))
    elif damage == "code of its own":
        own = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
        (model / "config.json").write_text(json.dumps(own))
        (model / "mine.py").write_text("raise SystemExit('was run')")
    elif damage == "tokenizer":
        for file in model.glob("*token*"):
            file.unlink()
    elif damage == "end token":
        for name in ("special_tokens_map.json", "chat_template.jinja"):
            (model / name).unlink(missing_ok=True)
        found = json.loads((model / "tokenizer_config.json").read_text())
        (model / "tokenizer_config.json").write_text(json.dumps(found | {"eos_token": None, "chat_template": None}))
    assert part in refused(model, prompts)


def test_output_is_never_overwritten(
    model_folder: Path, prompts: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out.jsonl").write_text("mine")
    assert generate(model_folder, prompts, tmp_path / "out.jsonl") == 2
    assert "exists, and is never overwritten" in one_line(capfd) and (tmp_path / "out.jsonl").read_text() == "mine"
    assert generate(model_folder, prompts, tmp_path / "out.txt") == 2
    assert "Use one of the extensions .jsonl" in one_line(capfd)
    assert generate(model_folder, prompts, tmp_path / "out.jsonl" / "deeper.jsonl") == 2
    assert "is not a directory" in one_line(capfd)


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[[Path, str], str]:
    """Runs the command, which must refuse before weights are loaded and write nothing; returns its line."""

    def no_weights(*_: Any) -> None:
        raise AssertionError("weights were loaded")

    def run(model: Path, prompts: str) -> str:
        monkeypatch.setattr("nemo_rao.generation.with_transformers.load_model", no_weights)
        assert generate(model, prompts, tmp_path / "results" / "out.jsonl") == 2
        assert not (tmp_path / "results").exists()
        return one_line(capfd)

    return run


def one_line(capfd: pytest.CaptureFixture[str]) -> str:
    output, message = capfd.readouterr()
    assert message.startswith("error: ") and message.count("\n") == 1, output + message
    return message


def begun(model: Path, prompts: str, folder: Path) -> Path:
    """A part of two finished prompts."""
    assert generate(model, prompts, folder / "begun.jsonl") == 0
    (folder / "begun.jsonl").unlink()
    from nemo_rao.generation.generate import work_of
    from nemo_rao.generation.policy import Policy
    from nemo_rao.generation.settings import GenerateSettings
    from nemo_rao.rows.prompts import read_prompts

    settings = GenerateSettings(num_responses=3, max_new_tokens=16, engine="transformers")
    path = folder / "out.jsonl.part.jsonl"
    with PartFile(path, work_of(Policy(model, settings), read_prompts(prompts), settings)) as part:
        part.append([{"responses": [["one", 1, False, False]] * 3}])
    return path
