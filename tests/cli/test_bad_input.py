"""Bad input, through the command: one line that names file, row or key and what to do; exit code 2; nothing written,
but for tokenized data where all of it is right, which the next start, put right, need not read again.

Most cases are found before NeMo is imported, which a case of its own holds; checkpoints and sizes that a model class
brings along need it.
"""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from nemo_rao.cli import main
from nemo_rao.demo.synthetic import write_preferences
from nemo_rao.demo.tokenizer_training import train_tokenizer
from tests.engines import needs_bridge, needs_nemo
from tests.megatron_ranks import import_once

TINY = (
    *("model.arch.num_layers=2", "model.arch.hidden_size=32", "model.arch.ffn_hidden_size=64", "model.seq_length=128"),
    *("model.global_batch_size=2", "model.micro_batch_size=1", "trainer.max_steps=1"),
)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prefs.jsonl and three tokenizers: whole, without a beginning token, without an end token."""
    folder = tmp_path_factory.mktemp("inputs")
    write_preferences(folder / "prefs.jsonl", 4)
    train_tokenizer([(folder / "prefs.jsonl").read_text()], folder / "tokenizer", 300)
    for name, lacks in (("no_beginning", "bos_token"), ("no_end", "eos_token")):
        shutil.copytree(folder / "tokenizer", folder / name)
        settings = json.loads((folder / name / "tokenizer_config.json").read_text())
        settings[lacks] = None
        (folder / name / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / name / "special_tokens_map.json").unlink(missing_ok=True)  # not written by transformers 5
        (folder / name / "chat_template.jinja").unlink(missing_ok=True)
        written = json.loads((folder / name / "tokenizer.json").read_text())
        written["post_processor"] = None
        (folder / name / "tokenizer.json").write_text(json.dumps(written))
    return folder


@pytest.fixture
def refused(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs ``nemo-rao train`` in an empty folder; returns the one line with which it refused."""

    def no_rank(*_: Any, **__: Any) -> None:
        raise AssertionError("ranks were started")

    def run(*overrides: str, recipe: str = "gpt_rao", tokenizer: str = "tokenizer") -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("nemo_rao.training.train.launch", no_rank)
        before = contents(tmp_path)
        given = (f"data.train_path={inputs}/prefs.jsonl", f"data.tokenizer={inputs}/{tokenizer}")
        code = main(["train", "--config-name", recipe, *TINY, *given, *overrides])
        output, message = capfd.readouterr()
        assert code == 2, output + message
        message = "".join(line for line in message.splitlines(True) if not line.startswith("warning: model.config_cl"))
        assert message.startswith("error: ") and message.endswith("\n") and message.count("\n") == 1, message
        assert "?." not in message and "?;" not in message, message
        assert contents(tmp_path) == before, "something was written"
        return message

    return run


def contents(folder: Path) -> dict[str, bytes | None]:
    """Files and folders with what is in them, tokenized data left out."""
    tokenized = folder / "runs" / "tokenised"
    data = {tokenized.parent, tokenized, *tokenized.rglob("*")} if any(tokenized.glob("*/data.json")) else set()
    paths = sorted(set(folder.rglob("*")) - data)
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def has(message: str, *parts: str) -> None:
    assert all(part in message for part in parts), message


def row(*responses: Any, prompt: Any = "Sort: b a") -> dict:
    return {"prompt": prompt, "responses": [{"content": text, "reward": reward} for text, reward in responses]}


def write_rows(path: Path, *rows: Any) -> str:
    """JSON Lines; text stands as it is. Returns the override that names the file."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in rows))
    return f"data.train_path={path}"


GOOD = row(("a b", 1.0), ("b a", 0.0))

# --------------------------------------------------------------------------------------------------- keys and sizes


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("model.rao.bta=0.1", ("unknown key model.rao.bta", "did you mean model.rao.beta?")),
        ("model.rao.beta=0", ("model.rao.beta=0", "> 0")),
        ("trainer.max_steps=0", ("trainer.max_steps=0", ">= 1")),
        ("model.optim.lr=fast", ("model.optim.lr='fast'", "must be a number")),
        ("precision.params=fp17", ("precision.params='fp17'", "'fp32', 'bf16', 'fp16'")),
        ("precision=bf17", ("precision=bf17: no such file", "bf16_mixed, fp16_mixed, fp32, fp8_blockwise")),
        ("exp_manager.exp_dir=/dev/null/runs", ("exp_manager.exp_dir=/dev/null/runs", "/dev/null is not a directory")),
    ],
)
def test_a_wrong_key_or_value_is_named_with_what_is_allowed(
    refused: Callable[..., str], override: str, parts: Sequence[str]
) -> None:
    has(refused(override), *parts)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ("model.tensor_model_parallel_size=3", "trainer.devices=3"),
            ("model.arch.num_attention_heads=4", "model.tensor_model_parallel_size=3", "change one"),
        ),
        (
            ("model.pipeline_model_parallel_size=4", "trainer.devices=4"),
            ("model.arch.num_layers=2", "model.pipeline_model_parallel_size=4", "change one"),
        ),
        (
            ("model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2", "trainer.devices=6"),
            ("trainer.devices=6", "2 x 2", "set trainer.devices"),
        ),
        (("trainer.num_nodes=2",), ("trainer.num_nodes=2", "srun", "torchrun")),
        (("precision=fp8_delayed",), ("precision.fp8=hybrid", "no CUDA device", "precision.fp8_simulation=true")),
    ],
)
def test_sizes_that_do_not_divide_are_named_with_both_keys(
    refused: Callable[..., str], overrides: Sequence[str], parts: Sequence[str]
) -> None:
    has(refused(*overrides), *parts)


def test_ranks_that_a_launcher_started_in_another_number_are_refused(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    has(refused("trainer.devices=2"), "are 2 ranks, but torchrun started 3", "trainer.devices=2")


# ------------------------------------------------------------------------------------------------------------ files


def test_a_missing_file_is_named(refused: Callable[..., str]) -> None:
    has(refused("data.train_path=nope.jsonl"), "data.train_path", "nope.jsonl: no such file")
    has(refused("data.validation_path=nope.jsonl"), "data.validation_path", "nope.jsonl: no such file")
    has(refused("data.tokenizer=./nope"), "data.tokenizer=./nope: no such directory")


def test_a_truncated_gz_file_is_named_with_its_last_whole_line(refused: Callable[..., str], tmp_path: Path) -> None:
    # Incompressible text, so that half of the bytes hold some of the lines.
    lines = [json.dumps(row((f"{number * 7919 % 99991:x}", 1.0), ("b", 0.0))) for number in range(500)]
    whole = gzip.compress("\n".join(lines).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    message = refused(f"data.train_path={tmp_path}/cut.jsonl.gz")
    has(message, f"{tmp_path}/cut.jsonl.gz: truncated .gz file", "after line", "Copy or download it again")


@pytest.mark.parametrize(
    ("recipe", "second", "parts"),
    [
        ("gpt_rao", '{"prompt": ', ("line 2", "invalid JSON", "column", "one JSON object per line")),
        ("gpt_rao", {"prompt": "Sort: b a"}, ("line 2", "unknown format with the fields prompt")),
        ("gpt_rao", {"responses": GOOD["responses"]}, ("line 2", "field 'prompt' is missing", "Add it")),
        (
            "gpt_rao",
            {"prompt": "p", "responses": [{"reward": 1.0}]},
            ("line 2", "'responses[0].content' is missing", "Add it"),
        ),
        ("gpt_rao", row(("a b", 1.0), ("b a", None)), ("line 2", "response 2 has no reward", "objective rao")),
        ("gpt_rao", row(("a b", 1.0), (" ", 0.0)), ("line 2", "'responses[1].content' is empty", "Drop the row")),
        ("gpt_rao", row(("a b", 1.0), ("b", float("nan"))), ("line 2", "'responses[1].reward'", "nan", "finite")),
        ("gpt_rao", row(("a b", "good"), ("b", 0.0)), ("line 2", "'responses[0].reward'", "a number", "'good'")),
        ("gpt_dpo", row(("a b", 1.0)), ("line 2", "1 responses", "objective dpo needs at least 2")),
    ],
)
def test_a_wrong_row_is_named_with_its_line_and_field(
    refused: Callable[..., str], tmp_path: Path, recipe: str, second: Any, parts: Sequence[str]
) -> None:
    message = refused(write_rows(tmp_path / "rows.jsonl", GOOD, second, GOOD), recipe=recipe)
    has(message, f"{tmp_path}/rows.jsonl line 2", *parts)


def test_prompts_that_do_not_begin_with_one_token_are_refused_for_rao_alone(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", GOOD, row(("a b", 1.0), ("b a", 0.0), prompt="Copy: a b"))
    message = refused(rows, "data.chat_template=never", tokenizer="no_beginning")
    has(message, "objective rao", "rows.jsonl line 1 begins with", "line 2 with", "Use a chat template")


def test_rows_that_are_too_long_are_refused_where_asked_or_where_none_is_left(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    long = row(("a b", 1.0), ("b a", 0.0), prompt="Sort: " + "b a " * 200)
    some = write_rows(tmp_path / "some.jsonl", GOOD, long)
    has(refused(some, "data.strict=true"), "some.jsonl line 2", "seq_length is 128", "no row may be dropped")
    none = write_rows(tmp_path / "none.jsonl", long, long)
    has(refused(none), "none.jsonl: no rows left", "2 dropped", "none.jsonl line 1", "seq_length is 128")


def test_a_row_that_is_too_long_is_dropped_and_counted(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import_once()
    monkeypatch.chdir(tmp_path)
    started: list[Any] = []
    monkeypatch.setattr("nemo_rao.training.train.launch", lambda _, args, **__: started.append(args))
    long = row(("a b", 1.0), ("b " * 200, 0.0))
    rows = write_rows(tmp_path / "rows.jsonl", GOOD, long, GOOD)
    assert main(["train", *TINY, rows, f"data.tokenizer={inputs}/tokenizer"]) == 0
    [(_, prepared, *_)] = started
    output = capfd.readouterr().out
    assert len(prepared.train) == 2
    has(output, "2 of 3 rows kept", "1 dropped", f"{tmp_path}/rows.jsonl line 2", "response 2")


def test_a_tokenizer_without_an_end_token_is_named(refused: Callable[..., str], inputs: Path) -> None:
    message = refused("data.chat_template=never", tokenizer="no_end")
    has(message, f"tokenizer {inputs}/no_end", "has no end token", "Set its eos_token")


def test_whatever_needs_no_model_class_is_reported_before_nemo_or_megatron_is_imported(
    inputs: Path, tmp_path: Path
) -> None:
    cases = [
        ["model.rao.bta=1"],
        ["data.train_path=nope.jsonl"],
        ["trainer.devices=3", "model.tensor_model_parallel_size=2"],
        [write_rows(tmp_path / "rows.jsonl", GOOD, "{")],
        [f"data.tokenizer={inputs}/no_end"],
        [f"model.restore_from_path={inputs}"],
    ]
    code = (
        "import json, sys\nfrom nemo_rao.cli import main\n"
        "for case in json.loads(sys.argv[1]):\n"
        "    assert main(['train', *case]) == 2, case\n"
        "    heavy = {name.partition('.')[0] for name in sys.modules} & {'nemo', 'megatron', 'lightning'}\n"
        "    assert not heavy, (case, heavy)\n"
    )
    given = [f"data.train_path={inputs}/prefs.jsonl", f"data.tokenizer={inputs}/tokenizer", *TINY]
    arguments = json.dumps([given + case for case in cases])
    done = subprocess.run([sys.executable, "-c", code, arguments], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == len(cases), done.stderr


# ------------------------------------------------------------------------------ what an objective asks of keys and data

PAIR = {"prompt": "Sort: b a", "chosen": "a b", "rejected": "b a"}
SCORED = PAIR | {"score_chosen": 7.0, "score_rejected": 0.5}
UNPAIRED = {"prompt": "Sort: b a", "completion": "a b", "label": True}
NEITHER = row(("a b", None), ("b a", None))


@pytest.fixture
def refused_early(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """As ``refused``, for an objective, before anything of a model is made."""

    def no_model(*_: Any) -> None:
        raise AssertionError("a model's config was made")

    monkeypatch.setattr("nemo_rao.training.prepare.check_model", no_model)
    return lambda objective, *overrides: refused(f"model.objective={objective}", *overrides, recipe="gpt_dpo")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("model.ipo.lambda=1", ("unknown key model.ipo.lambda;", "the keys of model.ipo are", "length_normalized")),
        ("model.simpo.bta=1", ("unknown key model.simpo.bta", "did you mean model.simpo.beta?")),
        ("model.ipo.sft_wieght=1", ("unknown key model.ipo.sft_wieght", "did you mean model.ipo.sft_weight?")),
        ("model.kto.desirable_wieght=1", ("unknown key", "did you mean model.kto.desirable_weight?")),
        ("model.dpop=0.1", ("model.dpop=0.1", "is a group of keys", "model.dpop.")),
        ("model.rpo.beta=0", ("model.rpo.beta=0", "> 0")),
        ("model.rpo.eta=0", ("model.rpo.eta=0", "> 0")),
        ("model.rpo.distance=kl", ("model.rpo.distance='kl'", "'bwd', 'fwd', 'sq', 'sqloo'")),
        ("model.sppo.eta=-1", ("model.sppo.eta=-1", "> 0")),
        ("model.sppo.win_probability=scores", ("model.sppo.win_probability='scores'", "'labels'", "'bradley_terry'")),
        ("model.ipo.beta=0", ("model.ipo.beta=0", "> 0")),
        ("model.cal_dpo.beta=-0.1", ("model.cal_dpo.beta=-0.1", "> 0")),
        ("model.simpo.beta=0", ("model.simpo.beta=0", "> 0")),
        ("model.robust_po.beta=-1", ("model.robust_po.beta=-1", "> 0")),
        ("model.nca.alpha=0", ("model.nca.alpha=0", "> 0")),
        ("model.dro.tau=0", ("model.dro.tau=0", "> 0")),
        ("model.kimi.tau=-0.5", ("model.kimi.tau=-0.5", "> 0")),
        ("model.rpo_partition.tau=0", ("model.rpo_partition.tau=0", "> 0")),
        ("model.orpo.lam=-1", ("model.orpo.lam=-1", ">= 0")),
        ("model.dpo_shift.f=0", ("model.dpo_shift.f=0", "> 0")),
        ("model.dpo_shift.f=1.5", ("model.dpo_shift.f=1.5", "<= 1")),
        ("model.dpo.label_smoothing=0.5", ("model.dpo.label_smoothing=0.5", "< 0.5")),
        ("model.ipo.length_normalized=maybe", ("model.ipo.length_normalized='maybe'", "true or false")),
        ("data.responses=worst", ("data.responses='worst'", "null, 'all', 'best_worst', 'best_random'")),
        ("data.pairs_by=rewards", ("data.pairs_by='rewards'", "'auto', 'label', 'reward'")),
        ("data.reward_field=[]", ("data.reward_field=[]", "names no field", "null")),
    ],
)
def test_a_wrong_key_or_value_of_an_objective_or_of_what_it_compares_is_named(
    refused_early: Callable[..., str], override: str, parts: Sequence[str]
) -> None:
    has(refused_early("dpo", override), *parts)


def test_a_score_head_cannot_be_trained_beside_adapters(refused_early: Callable[..., str]) -> None:
    message = refused_early("rm", "model.peft.scheme=lora")
    has(message, "model.peft.scheme=lora", "objective rm also trains a head", "set it to none")


@pytest.mark.parametrize("objective", ["orpo", "simpo", "sppo", "robust_po", "agro", "nca"])
@pytest.mark.parametrize("single", [row(("a b", 1.0)), UNPAIRED], ids=["canonical", "unpaired"])
def test_objectives_that_compare_responses_refuse_a_prompt_with_one(
    refused_early: Callable[..., str], tmp_path: Path, objective: str, single: Any
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", GOOD, single)
    has(refused_early(objective, rows), "rows.jsonl line 2: has 1 responses", f"objective {objective} needs at least 2")


def test_as_many_responses_as_an_objective_compares_must_be_asked_for(refused_early: Callable[..., str]) -> None:
    has(refused_early("simpo", "data.num_responses=1"), "data.num_responses is 1", "simpo needs at least 2", "Raise it")


@pytest.mark.parametrize("objective", ["dpo", "orpo", "simpo", "sppo", "nca", "kto"])
def test_objectives_of_labels_refuse_a_prompt_with_neither_labels_nor_rewards(
    refused_early: Callable[..., str], tmp_path: Path, objective: str
) -> None:
    message = refused_early(objective, write_rows(tmp_path / "rows.jsonl", PAIR, NEITHER))
    has(message, "rows.jsonl line 2", "neither an order (chosen, rejected) nor a reward", f"objective {objective}")
    has(message, "Add rewards", "data.reward_field")


@pytest.mark.parametrize(
    ("objective", "overrides"),
    [(name, ()) for name in ("robust_po", "kimi", "agro", "dro", "qrpo", "rpo", "rpo_partition", "rao")]
    + [("sppo", ("model.sppo.win_probability=bradley_terry",)), ("kto", ("model.kto.threshold=0.5",))],
)
def test_objectives_of_rewards_refuse_pairs_without_scores(
    refused_early: Callable[..., str], tmp_path: Path, objective: str, overrides: Sequence[str]
) -> None:
    message = refused_early(objective, write_rows(tmp_path / "rows.jsonl", SCORED, PAIR), *overrides)
    has(message, "rows.jsonl line 2: response 1 has no reward", f"objective {objective} needs")
    has(message, "Add score_chosen and score_rejected")


def test_rewards_that_are_no_probabilities_are_refused_where_they_are_to_be(
    refused_early: Callable[..., str], tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", PAIR | {"score_chosen": 1, "score_rejected": 0}, SCORED)
    message = refused_early("sppo", "model.sppo.win_probability=rewards", rows)
    has(message, "model.sppo.win_probability=rewards", "a reward of 7", "not a probability", "bradley_terry or labels")


def test_rewards_that_are_no_labels_are_refused_by_kto_without_a_threshold(
    refused_early: Callable[..., str], tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", UNPAIRED, row(("a b", 0.5), prompt="Sort: c b"))
    has(
        refused_early("kto", rows),
        "model.kto.threshold is null",
        "not labels (1 or 0)",
        "Set it to the reward above which",
    )


def test_one_prompt_is_too_few_for_responses_to_others(refused_early: Callable[..., str], tmp_path: Path) -> None:
    has(
        refused_early("kto", write_rows(tmp_path / "rows.jsonl", PAIR)),
        "rows.jsonl line 1: the only prompt",
        "Add data",
    )


@pytest.mark.parametrize(
    ("pairs_by", "first", "second", "parts"),
    [
        ("label", PAIR, GOOD, ("has no labels (chosen, rejected)", "Set it to reward or auto")),
        ("label", PAIR, UNPAIRED, ("has no labels (chosen, rejected)", "Set it to reward or auto")),
        ("reward", SCORED, PAIR, ("response 1 has no reward", "Add score_chosen and score_rejected")),
        ("reward", SCORED, NEITHER, ("response 1 has no reward", "data.reward_field")),
    ],
)
def test_what_is_to_tell_the_better_response_must_be_there(
    refused_early: Callable[..., str], tmp_path: Path, pairs_by: str, first: Any, second: Any, parts: Sequence[str]
) -> None:
    message = refused_early("dpo", f"data.pairs_by={pairs_by}", write_rows(tmp_path / "rows.jsonl", first, second))
    has(message, "rows.jsonl line 2", f"data.pairs_by is {pairs_by}", *parts)


def test_data_in_which_no_response_is_better_is_refused(refused_early: Callable[..., str], tmp_path: Path) -> None:
    equal = row(("a b", 1.0), ("b a", 1.0))
    message = refused_early("ipo", write_rows(tmp_path / "rows.jsonl", equal, equal))
    has(message, "rows.jsonl: no rows left", "2 dropped", "no response better than another", "line 1")
    message = refused_early("ipo", "data.strict=true", write_rows(tmp_path / "rows.jsonl", GOOD, equal))
    has(message, "rows.jsonl line 2: all responses have the same reward", "no row may be dropped")


@pytest.mark.parametrize(
    ("second", "part"),
    [
        (("kind",), "line 2: field 'responses[0].honest' is missing (fields found: content, kind)"),
        ((), "line 2: field 'responses[0].kind' is missing"),
    ],
)
def test_a_member_of_a_reward_ensemble_that_is_missing_is_named(
    refused_early: Callable[..., str], tmp_path: Path, second: Sequence[str], part: str
) -> None:
    def rated(*names: str) -> dict:
        answers = [{"content": text} | dict.fromkeys(names, number) for number, text in enumerate(("b a", "a b"))]
        return {"prompt": "Sort: b a", "responses": answers}

    rows = write_rows(tmp_path / "rows.jsonl", rated("kind", "honest"), rated(*second))
    has(refused_early("robust_po", "data.reward_field=[kind,honest]", rows), "rows.jsonl", part, "Add it")


def test_an_ensemble_cannot_be_named_for_pairs(refused_early: Callable[..., str], tmp_path: Path) -> None:
    message = refused_early("robust_po", "data.reward_field=[kind,honest]", write_rows(tmp_path / "rows.jsonl", SCORED))
    has(
        message,
        "rows.jsonl line 1: reward field 'kind', 'honest' cannot be used for pairs",
        "Leave data.reward_field",
    )


# ------------------------------------------------------------------------------------------- what needs a model class


@pytest.fixture(scope="module")
def trained(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder ``runs`` with one run, ``gpt_sft``, of one step."""
    import_once()
    folder = tmp_path_factory.mktemp("trained")
    given = [f"data.train_path={inputs}/prefs.jsonl", f"data.tokenizer={inputs}/tokenizer"]
    keys = [f"exp_manager.exp_dir={folder}/runs", "exp_manager.checkpoint_callback_params.every_n_train_steps=1"]
    # In a process of its own: Megatron's process groups last as long as theirs.
    from multiprocessing import get_context

    rank = get_context("fork").Process(
        target=_train, args=(["train", "--config-name", "gpt_sft", *TINY, *given, *keys],)
    )
    rank.start()
    rank.join(120)
    assert rank.exitcode == 0
    return folder / "runs"


def _train(arguments: list[str]) -> None:
    sys.exit(main(arguments))


def test_a_model_that_there_is_not_is_named_with_the_nearest(refused: Callable[..., str]) -> None:
    has(refused("model.family=lama"), "model.family='lama'", "must be one of 'llama', 'mistral'")
    message = refused("model.arch.extra={qk_layernrm: true}")
    has(message, "model.arch.extra.qk_layernrm", "did you mean qk_layernorm?")


@needs_nemo
def test_a_model_that_nemo_does_not_have_is_named(refused: Callable[..., str]) -> None:
    has(
        refused("model.family=gpt_oss"),
        "model.family=gpt_oss: is not supported by NeMo's engine. It supports llama, mis",
    )
    has(refused("model.config_class=LlamaConfg"), "model.config_class", "'LlamaConfg'", "did you mean LlamaConfig?")


@needs_bridge
def test_a_class_of_nemo_is_refused_without_it(refused: Callable[..., str]) -> None:
    message = refused("model.config_class=LlamaConfig")
    has(message, "model.config_class=LlamaConfig", "no NeMo classes", "set model.family and model.arch")


@needs_nemo
def test_sizes_of_the_model_class_itself_are_checked(refused: Callable[..., str]) -> None:
    sizes = [f"model.arch.{name}=null" for name in ("num_layers", "hidden_size", "ffn_hidden_size")]
    heads = [f"model.arch.{name}=null" for name in ("num_attention_heads", "num_query_groups")]
    message = refused(
        *(*sizes, *heads, "model.config_class=Llama3Config8B", "model.allow_random_weights=true"),
        *("model.tensor_model_parallel_size=3", "trainer.devices=3"),
    )
    has(
        message,
        "model.arch.num_attention_heads=32 (of model.config_class=Llama3Config8B)",
        "model.tensor_model_parallel_size=3",
    )


@pytest.mark.parametrize(
    ("override", "found", "wanted"),
    [
        ("model.arch.num_layers=3", "num_layers 2", "the model 3"),
        ("model.arch.hidden_size=64", "hidden_size 32", "the model 64"),
        ("model.arch.ffn_hidden_size=96", "ffn_hidden_size 64", "the model 96"),
        ("model.arch.num_query_groups=4", "num_query_groups", "96"),
    ],
)
def test_a_checkpoint_of_another_shape_is_named_with_both_sizes(
    refused: Callable[..., str], trained: Path, override: str, found: str, wanted: str
) -> None:
    message = refused(f"model.restore_from_path={trained}/gpt_sft", override)
    has(message, "model.restore_from_path", "step=1-last", found, wanted, "model.arch")


def test_a_run_whose_last_checkpoint_has_another_shape_is_named(refused: Callable[..., str], trained: Path) -> None:
    before = contents(trained)
    message = refused(f"exp_manager.exp_dir={trained}", "model.arch.num_layers=3", recipe="gpt_sft")
    has(message, "gpt_sft resumes from step=1-last", "another exp_manager.name")
    has(message, "model.arch.num_layers from 2 to 3")
    assert contents(trained) == before


def test_a_tokenizer_of_another_model_is_named(refused: Callable[..., str], trained: Path, tmp_path: Path) -> None:
    train_tokenizer([f"word{number}" for number in range(3000)], tmp_path / "larger", 700)
    message = refused(f"model.restore_from_path={trained}/gpt_sft", f"data.tokenizer={tmp_path}/larger")
    has(message, "model.restore_from_path", "token embeddings", "700", "data.tokenizer")


def test_a_folder_without_a_checkpoint_is_named(refused: Callable[..., str], inputs: Path) -> None:
    has(refused("model.restore_from_path=./nope"), "model.restore_from_path=./nope: no such directory")
    message = refused(f"model.restore_from_path={inputs}")
    has(message, f"model.restore_from_path: {inputs}", "neither a checkpoint", "nor a run's directory")


def test_a_checkpoint_that_was_interrupted_is_refused_and_never_resumed(
    refused: Callable[..., str], trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained / "gpt_sft", tmp_path / "cut")
    for checkpoint in list((tmp_path / "cut/checkpoints").glob("step=1*")):
        checkpoint.with_name(checkpoint.name + "-unfinished").touch()
    message = refused(f"model.restore_from_path={tmp_path}/cut/checkpoints/step=1-last")
    has(message, "model.restore_from_path", "step=1-last was interrupted", "Name a complete checkpoint")
    has(refused(f"model.restore_from_path={tmp_path}/cut"), f"{tmp_path}/cut is neither", "complete")


def damage_metadata(weights: Path) -> None:
    (weights / ".metadata").write_bytes(b"\x80\x04garbage")


def empty(weights: Path) -> None:
    shutil.rmtree(weights)
    weights.mkdir()


def cut(weights: Path) -> None:
    file = next(weights.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:100])


def lose(weights: Path) -> None:
    next(weights.glob("*.distcp")).unlink()


@pytest.mark.parametrize(
    ("damage", "part"),
    [(damage_metadata, "cannot be read"), (empty, "cannot be read"), (cut, "has 100 of"), (lose, "is missing")],
)
def test_a_damaged_checkpoint_is_refused(
    refused: Callable[..., str], trained: Path, tmp_path: Path, damage: Callable[[Path], None], part: str
) -> None:
    shutil.copytree(trained / "gpt_sft/checkpoints/step=1", tmp_path / "copy", symlinks=False)
    damage(tmp_path / "copy/weights")
    message = refused(f"model.restore_from_path={tmp_path}/copy")
    has(message, f"model.restore_from_path: {tmp_path}/copy", part, "Name a complete checkpoint")
