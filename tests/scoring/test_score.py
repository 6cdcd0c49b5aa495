"""The command on rules and columns: what is written, read back, standardized, counted and refused."""

from __future__ import annotations

import gzip
import json
import math
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_rao.demo.synthetic import write_preferences
from nemo_rao.rows.reading import read_rows
from tests.scoring.conftest import read_lines, write_lines, write_rows

Command = Callable[..., tuple[int, str, str]]
TRUTH = "rule:nemo_rao.demo.synthetic:ground_truth_reward"
RATED = [
    {"prompt": "p", "responses": [{"content": "a", "r_1": 1.0, "r_2": 30}, {"content": "b", "r_1": 3.0, "r_2": 10}]},
    {"prompt": "q", "responses": [{"content": "c", "r_1": 5.0, "r_2": 20}, {"content": "d", "r_1": 5.0, "r_2": 60}]},
]


def column(name: str, path: str = "out.jsonl") -> list[list[float | None]]:
    return [[response[name] for response in row["responses"]] for row in read_lines(path)]


def flat(name: str) -> list[float | None]:
    return [value for row in column(name) for value in row]


def test_a_rule_scores_each_response_and_the_rows_keep_their_order(command: Command) -> None:
    write_preferences("in.jsonl.gz", 70, seed=3)
    code, output, message = command("in.jsonl.gz", "out.jsonl.gz", "--scorer", TRUTH)
    assert code == 0, message
    before, after = list(read_rows("in.jsonl.gz")), list(read_rows("out.jsonl.gz"))
    assert [row.prompt for row in after] == [row.prompt for row in before] and len(after) == 70
    for old, new in zip(before, after, strict=True):
        assert [one.content for one in new.responses] == [one.content for one in old.responses]
        assert [one.reward for one in new.responses] == pytest.approx([one.reward for one in old.responses], abs=1e-6)
    assert gzip.decompress(Path("out.jsonl.gz").read_bytes()).endswith(b"\n") and "ground_truth_reward" in output
    assert sorted(path.name for path in Path().iterdir()) == ["in.jsonl.gz", "out.jsonl.gz", "out.jsonl.gz.stats.json"]


def test_columns_are_read_back_as_an_ensemble_whose_mean_is_the_reward(command: Command) -> None:
    write_preferences("in.jsonl", 5)
    Path("rules_of_length.py").write_text("def words(prompt, response):\n    return len(response.split())\n")
    code, _, message = command(
        "in.jsonl", "out.jsonl", "--scorer", f"r_1={TRUTH}", "--scorer", "r_2=rule:rules_of_length.words"
    )
    assert code == 0, message
    plain = [[one.reward for one in row.responses] for row in read_rows("out.jsonl")]
    for at, row in enumerate(read_rows("out.jsonl", reward_field=["r_1", "r_2"])):
        for k, response in enumerate(row.responses):
            assert response.ensemble[1] == len(response.content.split())
            assert response.reward == pytest.approx(sum(response.ensemble) / 2) == pytest.approx(plain[at][k])
    assert str(Path.cwd()) not in sys.path


def test_weights_make_the_mean_and_a_weight_of_0_leaves_a_column_out_of_it(command: Command) -> None:
    write_lines("in.jsonl", *RATED)
    both = ("--scorer", "column:r_1", "--scorer", "column:r_2")
    assert command("in.jsonl", "out.jsonl", *both, "--weight", "r_2=0.25", "--weight", "r_1=0.75")[0] == 0
    assert column("reward") == [[0.75 + 7.5, 2.25 + 2.5], [3.75 + 5, 3.75 + 15]]
    assert command("in.jsonl", "out.jsonl", *both, "--weight", "r_2=0", "--overwrite")[0] == 0
    assert column("reward") == column("r_1") == [[1, 3], [5, 5]] and column("r_2") == [[30, 10], [20, 60]]


def test_global_standardization_has_mean_0_and_sd_1_and_can_be_applied_to_another_file(command: Command) -> None:
    write_lines("in.jsonl", *RATED)
    both = ("--scorer", "column:r_1", "--scorer", "column:r_2", "--standardize", "global")
    assert command("in.jsonl", "out.jsonl", *both)[0] == 0
    for name in ("r_1", "r_2"):
        raw = [response[name] for row in RATED for response in row["responses"]]  # type: ignore[attr-defined]
        mean, sd = statistics.fmean(raw), statistics.pstdev(raw)
        assert flat(name) == pytest.approx([(value - mean) / sd for value in raw], abs=1e-12)
    means = [(a + b) / 2 for a, b in zip(flat("r_1"), flat("r_2"), strict=True) if a is not None and b is not None]
    assert flat("reward") == pytest.approx(means)
    write_lines("other.jsonl", RATED[0])
    stated = ("--statistics", "out.jsonl.stats.json")
    assert command("other.jsonl", "applied.jsonl", *both, *stated)[0] == 0
    assert column("r_1", "applied.jsonl")[0] == pytest.approx(column("r_1")[0])


def test_standardization_by_prompt_and_shift_and_scale(command: Command) -> None:
    write_lines("in.jsonl", *RATED)
    given = ("--scorer", "column:r_1", "--standardize", "prompt")
    assert command("in.jsonl", "out.jsonl", *given)[0] == 0
    assert column("reward") == [[-1, 1], [0, 0]]  # where all are equal, 0
    assert command("in.jsonl", "out.jsonl", *given, "--shift=-1", "--scale=4", "--overwrite")[0] == 0
    assert column("reward") == [[0, 0.5], [0.25, 0.25]]
    assert command("in.jsonl", "out.jsonl", "--scorer", "column:r_1", "--shift", "3", "--overwrite")[0] == 0
    assert column("reward") == [[-2, 0], [2, 2]]


def test_the_statistics_are_those_of_numpy_and_are_written_and_printed(command: Command) -> None:
    import numpy as np

    draw = random.Random(0)
    values = [[draw.gauss(5, 2) for _ in range(3)] for _ in range(101)]
    rows = [
        {"prompt": f"p{i}", "responses": [{"content": f"{k}", "reward": value} for k, value in enumerate(row)]}
        for i, row in enumerate(values)
    ]
    write_lines("in.jsonl", *rows)
    code, output, _ = command("in.jsonl", "out.jsonl", "--scorer", "column")
    found = json.loads(Path("out.jsonl.stats.json").read_text())["columns"]["given"]
    flat = np.array(values).ravel()
    wanted = [flat.mean(), flat.std(), *np.quantile(flat, [0, 0.25, 0.5, 0.75, 1])]
    assert [found[name] for name in ("mean", "sd", "min", "q1", "median", "q3", "max")] == pytest.approx(wanted)
    assert code == 0 and found["count"] == 303 and f"{flat.mean():.4g}" in output


def test_a_rule_is_given_the_fields_of_a_row_that_it_asks_for(command: Command) -> None:
    rows = [{**row, "answer": number, "source": "s"} for number, row in enumerate(RATED)]
    write_lines("in.jsonl", *rows)
    Path("rules_of_fields.py").write_text("def is_answer(prompt, response, answer):\n    return answer\n")
    given = ("in.jsonl", "out.jsonl", "--scorer", "r=rule:rules_of_fields:is_answer")
    code, output, message = command(*given)
    assert code == 0, message
    assert column("r") == [[0, 0], [1, 1]]
    assert ", source (2 rows)" in output and "answer" not in output
    del rows[1]["answer"]
    write_lines("in.jsonl", *rows)
    code, _, message = command(*given, "--overwrite")
    assert code == 2 and "in.jsonl line 2: rule rules_of_fields:is_answer requires the field 'answer'" in message
    assert column("r") == [[0, 0], [1, 1]]


def test_agreement_with_labels_and_between_columns(command: Command) -> None:
    pairs = [("good", "bad"), ("bad", "good"), ("good", "good"), ("good", "bad")]
    write_lines("in.jsonl", *({"prompt": "p", "chosen": f"{a} a", "rejected": f"{b} b"} for a, b in pairs))
    Path("rules_of_words.py").write_text(
        "def good(prompt, response):\n    return 'good' in response\n\n"
        "def first(prompt, response):\n    return -ord(response[-1])\n"
    )
    scorers = ("--scorer", "rule:rules_of_words:good", "--scorer", "rule:rules_of_words:first")
    code, output, message = command("in.jsonl", "out.jsonl", *scorers)
    assert code == 0, message
    found = json.loads(Path("out.jsonl.stats.json").read_text())
    assert found["agreement_with_labels"]["good"] == {"pairs": 4, "agreement": 0.5, "ties": 0.25}
    assert found["agreement_with_labels"]["first"]["agreement"] == 1.0
    assert found["agreement_between"]["good / first"] == {"pairs": 4, "agreement": 0.5, "ties": 0.25}
    assert "chosen above rejected" in output and "25.0%" in output
    assert all(row["ranked"] for row in read_lines("out.jsonl"))


def test_a_response_that_lacks_a_column_has_no_reward_unless_that_weighs_nothing(command: Command) -> None:
    write_lines("in.jsonl", {"prompt": "p", "responses": [{"content": "a", "reward": 2}, {"content": "b"}]})
    Path("rules_of_one.py").write_text("def one(prompt, response):\n    return 1\n")
    given = ("in.jsonl", "out.jsonl", "--scorer", "column", "--scorer", "rule:rules_of_one.one")
    code, _, message = command(*given, "--max-missing", "0.4")
    assert code == 1 and message.count("\n") == 1 and "1 of 2 rows" not in message, message
    assert "given: 1 of 2 responses have no score" in message and "1 null or missing in the input" in message
    assert command(*given, "--max-missing", "0.5")[0] == 0
    assert column("reward") == [[1.5, None]] and column("given") == [[2, None]]
    assert json.loads(Path("out.jsonl.stats.json").read_text())["reward"]["missing"] == 1
    again = (*given, "--max-missing", "0.5", "--overwrite")
    assert command(*again, "--weight", "given=0")[0] == 0
    assert column("reward") == [[1, 1]]
    code, _, message = command(*again, "--strict")
    assert code == 1 and "in.jsonl line 1, response 2: given gave no score" in message


def test_nothing_of_a_row_is_lost(command: Command) -> None:
    row = {
        "prompt": [{"role": "user", "content": "u", "name": "Ann"}],
        "responses": [
            {"content": "a", "reward": 2.0, "truncated": True},
            {"content": "b", "reward": 1.0, "weight": 0, "reasoning_content": "why"},
        ],
        "ranked": True,
        "reference_rewards": [1.0, 2.0],
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}],
        "source": "somewhere",
    }
    write_lines("in.jsonl", row)
    code, output, message = command("in.jsonl", "same.jsonl", "--scorer", "column")
    assert code == 0, message
    assert "unused fields: source (1 row)" in output and "reference_rewards" not in output
    [before], [after] = read_rows("in.jsonl"), read_rows("same.jsonl")
    assert replace(after, location="", unused=()) == replace(before, location="", unused=())
    # Rewards of another scorer are not on the scale of the reference policy's.
    Path("rules_of_a.py").write_text("def is_a(prompt, response):\n    return response == 'a'\n")
    code, output, _ = command("in.jsonl", "out.jsonl", "--scorer", "rule:rules_of_a:is_a")
    assert code == 0 and "rewards or labels of 2 responses in the input are replaced" in output
    assert "reference_rewards of 1 rows are kept as input_reference_rewards" in output
    assert "rule:" not in output and "1 responses with reasoning_content, which is not passed to a rule" in output
    [written], [read] = read_lines("out.jsonl"), list(read_rows("out.jsonl"))
    assert written["input_reference_rewards"] == [1.0, 2.0] and read.reference_rewards == ()
    assert [one.reward for one in read.responses] == [1.0, 0.0] and read.template_fields == before.template_fields


def test_columns_of_other_names_are_read_and_bad_rows_dropped_and_counted_by_cause(command: Command) -> None:
    rows = [{"ask": f"q{i}", "chosen": "good", "rejected": "bad", "topic": "x", "id": i} for i in range(8)]
    write_lines("in.jsonl", *rows[:4], rows[4] | {"chosen": ""}, {"ask": "q"}, *rows[5:], rows[0] | {"rejected": " "})
    with open("in.jsonl", "a") as file:
        file.write('{"ask": "cut o')
    Path("rules_of_good.py").write_text("def good(prompt, response):\n    return prompt + response == 'q7good'\n")
    given = ("in.jsonl", "out.jsonl", "--scorer", "rule:rules_of_good:good", "--column", "prompt=ask")
    code, _, message = command(*given)
    assert code == 2 and "in.jsonl line 5: field 'chosen' is empty" in message
    code, _, message = command(*given, "--bad-rows", "drop")
    assert code == 2 and message.count("\n") == 1 and not list(Path().glob("out*"))
    assert "4 of 11 rows are bad, more than --max-bad-rows 0.05 allows. Fix them or raise the limit" in message
    code, output, message = command(*given, "--bad-rows", "drop", "--max-bad-rows", "0.4", "--ignore-field", "id")
    assert code == 0, message
    assert output.count("1 bad row dropped") == 4 and "in.jsonl line 5: field 'chosen' is empty" in output, output
    assert "unused fields: topic (7 rows)" in output
    assert [row["prompt"] for row in read_lines("out.jsonl")] == ["q0", "q1", "q2", "q3", "q5", "q6", "q7"]
    assert column("reward") == [[0, 0]] * 6 + [[1, 0]]


def test_a_row_that_is_bad_for_one_column_alone_is_dropped_for_all(command: Command) -> None:
    bad = [{"prompt": "p", "responses": [{"content": "a", "r_1": value, "r_2": 1.0}]} for value in ("high", 2.0)]
    worse = {"prompt": "p", "responses": [{"content": "a", "r_1": 1.0, "r_2": 1.0, "reward": "high"}]}
    write_lines("in.jsonl", RATED[0], bad[0], worse, bad[1], RATED[1])
    given = ("in.jsonl", "out.jsonl", "--scorer", "column:r_1", "--scorer", "column:r_2", "--bad-rows", "drop")
    code, output, message = command(*given, "--max-bad-rows", "0.4")
    assert code == 0, message
    assert column("r_1") == [[1, 3], [2], [5, 5]] and column("r_2") == [[30, 10], [1], [20, 60]]
    assert "line 2" in output and "line 3" in output


def test_a_null_of_a_column_is_no_score(command: Command) -> None:
    answers = [{"content": "a", "r_1": 1.0, "r_2": 2.0}, {"content": "b", "r_1": None, "r_2": 4.0}]
    write_lines("in.jsonl", {"prompt": "p", "responses": answers})
    given = ("in.jsonl", "out.jsonl", "--scorer", "column:r_1", "--scorer", "column:r_2", "--max-missing", "0.5")
    code, output, message = command(*given)
    assert code == 0 and column("r_1") == [[1, None]] and column("reward") == [[1.5, None]], message
    assert "r_1: responses without a score: 1 null or missing in the input (the first: in.jsonl line 1" in output
    found = json.loads(Path("out.jsonl.stats.json").read_text())["without_score"]
    assert found == {"r_1": {"null or missing in the input": 1}}


# -------------------------------------------------------------------------------------------------- what is refused

RULES = """
import math
def fine(prompt, response): return 1.0
def raises(prompt, response): return {}["answer"]
def exits(prompt, response): raise SystemExit(3)
def none(prompt, response): pass
def text(prompt, response): return "1"
def nan(prompt, response): return math.nan
def infinite(prompt, response): return math.inf
def late(prompt, response): return 1 / (int(prompt.split()[1]) - 4)
constant = 3
"""


@pytest.fixture
def rules(folder: Path) -> None:
    Path("bad_rules.py").write_text(RULES)
    Path("broken_rules.py").write_text("def f(:\n")
    Path("needy_rules.py").write_text("import no_such_package_at_all\n")
    write_rows("in.jsonl")


@pytest.mark.usefixtures("rules")
@pytest.mark.parametrize(
    ("rule", "parts"),
    [
        ("raises", ("line 1, response 1", "rule bad_rules:raises raised KeyError", "bad_rules.py line 4")),
        ("exits", ("line 1, response 1", "SystemExit")),
        ("none", ("returned null", "not a number")),
        ("text", ("returned text ('1')", "not a number")),
        ("nan", ("returned nan", "finite")),
        ("infinite", ("returned inf", "finite")),
        ("late", ("in.jsonl line 5, response 1", "ZeroDivisionError", "4 of 6 rows are kept")),
    ],
)
def test_a_rule_that_fails_is_named_with_the_response(command: Command, rule: str, parts: tuple[str, ...]) -> None:
    code, _, message = command("in.jsonl", "out.jsonl", "--scorer", f"rule:bad_rules:{rule}", "--rows-at-once", "1")
    assert code == 1 and message.startswith("error: in.jsonl line") and message.count("\n") == 1
    assert all(part in message for part in parts), message
    assert not Path("out.jsonl").exists()


FINE = ("in.jsonl", "out.jsonl", "--scorer", "rule:bad_rules:fine")


@pytest.mark.usefixtures("rules")
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("in.jsonl", "out.jsonl"), ("--scorer", "nemo-rao score --help")),
        (("in.jsonl", "out.jsonl", "--scorer", "rule:no_rules:f"), ("no module no_rules", "Check the name")),
        (("in.jsonl", "out.jsonl", "--scorer", "rule:bad_rules:nope"), ("bad_rules.py", "has no nope")),
        (("in.jsonl", "out.jsonl", "--scorer", "rule:bad_rules.constant"), ("a number (3)", "not a function")),
        (("in.jsonl", "out.jsonl", "--scorer", "rule:broken_rules.f"), ("cannot be imported", "SyntaxError")),
        (("in.jsonl", "out.jsonl", "--scorer", "rule:needy_rules.f"), ("needs no_such_package_at_all",)),
        (("in.jsonl", "out.jsonl", "--scorer", "x=rule:f"), ("'f' is not an import path", "module:function")),
        (("in.jsonl", "out.jsonl", "--scorer", "jugde:a.yaml"), ("[NAME=]KIND:ARGUMENT", "rule:module:function")),
        (("in.jsonl", "out.jsonl", "--scorer", "reward=column:r"), ("'reward' is reserved",)),
        (("in.jsonl", "out.jsonl", "--scorer", "a b=column:r"), ("'a b' cannot name a column",)),
        ((*FINE, "--scorer", "rule:bad_rules:fine"), ("column 'fine' exists already", "r_1=rule:bad_rules:fine")),
        (("in.jsonl", "out.jsonl", "--scorer", "column:r_1"), ("line 1", "r_1' is missing")),
        (("in.jsonl", "out.jsonl", "--scorer", "column"), ("has no rewards for column",)),
        (("nope.jsonl", *FINE[1:]), ("nope.jsonl: no such file",)),
        (("in.jsonl", "out.txt", *FINE[2:]), ("out.txt", ".jsonl.gz")),
        (("in.jsonl", "in.jsonl", *FINE[2:], "--overwrite"), ("in.jsonl", "Choose another output")),
        (("*.jsonl", *FINE[1:]), ("*.jsonl: matches", "another directory")),
        (("in.jsonl", "bad_rules.py/out.jsonl", *FINE[2:]), ("cannot be written (", "Choose another output")),
        ((*FINE, "--scale", "0"), ("--scale 0", "> 0")),
        ((*FINE, "--shift", "nan"), ("--shift nan", "finite")),
        ((*FINE, "--weight", "fine"), ("--weight fine", "NAME=NUMBER")),
        ((*FINE, "--weight", "fin=1"), ("no such scorer", "fine")),
        ((*FINE, "--weight", "fine=-1"), (">= 0",)),
        ((*FINE, "--weight", "fine=0"), ("all weights are 0",)),
        ((*FINE, "--standardize", "all"), ("--standardize", "global")),
        ((*FINE, "--statistics", "x.json"), ("--standardize global",)),
        ((*FINE, "--standardize", "global", "--statistics", "x.json"), ("x.json", "cannot be read")),
        ((*FINE, "--standardize", "global", "--statistics", "bad_rules.py"), ("bad_rules.py", ".stats.json")),
        ((*FINE, "--rows-at-once", "0"), ("--rows-at-once 0", ">= 1")),
        ((*FINE, "--max-missing", "5"), ("--max-missing 5", "from 0 to 1")),
        ((*FINE, "--max-bad-rows", "nan"), ("--max-bad-rows nan", "from 0 to 1")),
        ((*FINE, "--max-length", "100"), ("--max-length", "model:RUN_FOLDER", "Remove it")),
        ((*FINE, "--column", "prompt"), ("--column prompt", "OURS=THEIRS")),
        ((*FINE, "--column", "promt=prompt"), ("--column promt", "did you mean prompt?")),
        ((*FINE, "--column", "question=ask"), ("line 1: field 'ask', which --column names", "Correct --column")),
        (("in.jsonl", "out.jsonl", "--scorer", "weight=column:r"), ("'weight' is reserved",)),
    ],
)
def test_what_is_known_before_is_refused_with_code_2_and_nothing_written(
    command: Command, arguments: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    before = {path.name for path in Path().iterdir()} | {"__pycache__"}
    code, output, message = command(*arguments)
    assert code == 2 and output == "" and message.startswith("error: ") and message.count("\n") == 1, message
    assert all(part in message for part in parts), message
    assert {path.name for path in Path().iterdir()} <= before


@pytest.mark.usefixtures("rules")
def test_a_row_that_cannot_be_read_is_named_before_anything_is_scored(command: Command) -> None:
    with open("in.jsonl", "a") as file:
        file.write("{\n")
    code, _, message = command(*FINE)
    assert code == 2 and "in.jsonl line 7: invalid JSON" in message and not Path("out.jsonl.part.jsonl").exists()
    write_lines("in.jsonl")
    code, _, message = command(*FINE)
    assert code == 2 and "in.jsonl: has no rows" in message


@pytest.mark.usefixtures("rules")
def test_a_conversation_of_several_answers_is_refused(command: Command) -> None:
    says = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]
    write_lines("in.jsonl", {"messages": says[:2]}, {"messages": says})
    code, _, message = command(*FINE)
    assert code == 2 and "in.jsonl line 2: a conversation with several answers" in message


@pytest.mark.usefixtures("rules")
def test_a_finished_output_is_replaced_only_where_asked(command: Command) -> None:
    assert command(*FINE)[0] == 0
    code, _, message = command(*FINE)
    assert code == 2 and "out.jsonl exists. Pass --overwrite" in message
    assert command(*FINE, "--overwrite")[0] == 0


@pytest.mark.usefixtures("rules")
def test_a_field_cannot_be_named_for_pairs_and_the_remedy_is_this_commands(command: Command) -> None:
    pair = {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 2, "score_rejected": 1}
    write_lines("in.jsonl", pair)
    code, _, message = command("in.jsonl", "out.jsonl", "--scorer", "column:score_chosen")
    assert code == 2 and "in.jsonl line 1" in message and "--scorer column, without a field" in message
    assert command("in.jsonl", "out.jsonl", "--scorer", "column")[0] == 0
    assert column("reward") == [[2, 1]]


def test_rewards_that_float32_cannot_hold_are_refused_and_the_scores_kept(command: Command) -> None:
    write_lines("in.jsonl", *RATED)
    code, _, message = command("in.jsonl", "out.jsonl", "--scorer", "column:r_1", "--scale", "1e-39")
    assert code == 1 and "row 1, response 1" in message and "--scale" in message and "2 of 2 rows are kept" in message
    assert command("in.jsonl", "out.jsonl", "--scorer", "column:r_1", "--scale", "2")[0] == 0
    assert math.isclose(column("reward")[0][0] or 0, 0.5)


def test_help_imports_nothing_but_the_standard_library() -> None:
    code = (
        "import sys\nfrom nemo_rao.cli import main\n"
        "try: main(['score', '--help'])\nexcept SystemExit as end: assert not end.code\n"
        "loaded = {name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)\n"
        "assert not loaded & {'torch', 'numpy', 'yaml', 'httpx', 'tqdm', 'rich'}, loaded\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=root, timeout=30)
    assert done.returncode == 0 and done.stdout.startswith("usage: nemo-rao score"), done.stderr


def test_neither_torch_nor_nemo_is_imported() -> None:
    write_preferences("in.jsonl", 3)
    code = (
        "import sys\nfrom nemo_rao.cli import main\n"
        f"assert main(['score', 'in.jsonl', 'out.jsonl', '--scorer', '{TRUTH}']) == 0\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "assert not loaded & {'torch', 'nemo', 'megatron', 'lightning', 'transformers', 'httpx'}, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
