"""What is shown is what is trained on, and nothing from the data acts on the terminal or the page."""

import base64
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from nemo_rao.cli import main
from nemo_rao.config.compose import compose
from nemo_rao.data.store import PreferenceData
from nemo_rao.show.inspection import Inspection
from nemo_rao.show.page import page
from nemo_rao.show.pieces import Kind
from nemo_rao.show.report import charts, remarks
from nemo_rao.show.rows import ShownRow
from nemo_rao.show.terminal import Writer, can_show_color
from nemo_rao.training.loading import drawn, load_data

Look = Callable[..., Inspection]
HOSTILE = "</div><script>alert(1)</script>\x1b[31m\u202e\"'<img src=x onerror=y> 日本語 👩\u200d👧"


def pair(number: int, chosen: str = "It is seven.", rejected: str = "No.", **fields: object) -> dict[str, object]:
    return {
        "prompt": [{"role": "user", "content": f"Question {number}?"}],
        "chosen": [{"role": "assistant", "content": f"{chosen} {number}"}],
        "rejected": [{"role": "assistant", "content": f"{rejected} {number}"}],
        **fields,
    }


def several(number: int, rewards: tuple[float, ...]) -> dict[str, object]:
    responses = [{"content": f"answer {number} {'so ' * at}", "reward": reward} for at, reward in enumerate(rewards)]
    return {"prompt": f"Name number {number}.", "responses": responses}


def ids(row: ShownRow) -> list[list[int]]:
    """Of a row's prompt and of its responses that are used."""
    parts = [row.prompt, *(response.pieces for response in row.responses if response.left_out is None)]
    return [[one for piece in part for one in piece.ids] for part in parts]


def text(row: ShownRow, kind: Kind) -> str:
    pieces = [*row.prompt, *(piece for response in row.responses for piece in response.pieces)]
    return "".join(piece.text for piece in pieces if piece.kind is kind)


def test_rows_and_numbers_are_those_that_training_loads(
    look: Look, write_lines: Callable[..., str], tokenizer: str, tmp_path: Path
) -> None:
    path = write_lines([several(number, (number % 7, 1, 0.5, 3)) for number in range(40)])
    keys = ["data.responses=best_random", "data.num_responses=3", "data.num_prompts=12", "model.seq_length=60"]
    seen = look(path, "gpt_dpo", *keys, rows=12)
    config = compose("gpt_dpo", [f"data.train_path={path}", f"data.tokenizer={tokenizer}", "data.cache=false", *keys])
    trained: PreferenceData = drawn(config, load_data(config))
    assert len(trained) == 12 and seen.num_trained == 12
    for row, sample in zip(seen.rows, trained, strict=True):
        in_order = [sample.prompt.tolist(), *(response.tolist() for response in sample.responses)]
        assert row.location == sample.location and sorted(ids(row)) == sorted(in_order)
        rewards = {response.role: response.reward for response in row.responses if response.left_out is None}
        assert rewards == {"chosen": sample.rewards.max(), "rejected": sample.rewards.min()}
        assert {response.left_out for response in row.responses} == {
            *(None, "data.num_responses=3", "data.responses=best_random")
        }
    totals = [len(sample.prompt) + len(response) for sample in trained for response in sample.responses]
    assert seen.numbers.totals.tolist() == totals
    assert np.array_equal(seen.numbers.margins(), [np.ptp(sample.rewards) for sample in trained])


def test_learned_tokens_are_distinguished_from_the_others(look: Look, write_lines: Callable[..., str]) -> None:
    turns = [("user", "Name a prime."), ("assistant", "7"), ("user", "Another."), ("assistant", "It is 11.")]
    path = write_lines([{"messages": [{"role": role, "content": content} for role, content in turns]}] * 8)
    row = look(path, "gpt_sft", rows=1).rows[0]
    assert text(row, Kind.PROMPT) == "Name a prime."
    assert text(row, Kind.RESPONSE) == "7It is 11." and text(row, Kind.END) == "<|im_end|>" * 2
    assert text(row, Kind.TEMPLATE) == (
        "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
        "\n<|im_start|>user\nAnother.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_dropped_rows_are_counted_by_reason_and_the_first_of_each_is_shown(
    look: Look, write_lines: Callable[..., str]
) -> None:
    records = [pair(number, score_chosen=2.0, score_rejected=number % 4, source="web") for number in range(12)]
    records[3] = pair(3, chosen="long " * 400, score_chosen=1.0, score_rejected=0.0)
    path = write_lines([*records, pair(12, "Same", "Same"), "{broken"])
    keys = ["data.bad_rows=drop", "data.max_bad_rows=1", "model.seq_length=200"]
    seen = look(path, "gpt_dpo", *keys, rows=1, row_numbers=(4, 14))
    shown = {row.location.rpartition(" ")[2]: row for row in seen.dropped}
    assert set(shown) == {"4", "13", "14"} and seen.report.rows_read - seen.report.rows_kept == 3
    long, unreadable = shown["4"], shown["14"]
    assert long.problem is not None and "200" in long.problem[1]
    assert long.responses[0].num_tokens is not None and long.responses[0].num_tokens > 400
    assert unreadable.problem is not None and "JSON" in unreadable.problem[1] and not unreadable.responses
    assert [row.location.rpartition(" ")[2] for row in seen.rows] == ["4", "14", "1"]  # those asked for come first
    assert seen.rows[2].unused == ("source",)
    against = next(remark for remark in remarks(seen) if "higher reward" in remark)
    assert against.startswith("2 of 11 pairs")  # rewards 3 of rows 7 and 11: row 3 is dropped
    lengths = charts(seen)[0][1][2].histogram
    assert lengths.counts["trained on"].sum() == 22 and lengths.counts["dropped"].sum() == 4
    for written in ("\n".join(Writer(color=False, width=80).lines(seen)), "".join(page(seen))):
        assert "unused fields: source" in written
        assert all(
            row.problem is not None and row.problem[0][:40] in written.replace("&#x27;", "'") for row in shown.values()
        )


def test_each_response_shows_its_reward_and_why_it_is_not_used(look: Look, write_lines: Callable[..., str]) -> None:
    def row(number: int, *, truncated: bool = False) -> dict[str, object]:
        answers = [{"content": f"answer {number} {'so ' * at}", "a": at, "b": at + 1.0} for at in range(3)]
        return {"prompt": f"Name {number}.", "responses": [*answers[:2], answers[2] | {"truncated": truncated}]}

    path = write_lines([row(1, truncated=True), row(2), row(3), row(4)])
    keys = ["data.reward_field=[a,b]", "data.num_prompts=3", "model.global_batch_size=3", "model.rao.log_z0=0"]
    everything = tuple(range(1, 5))
    written = {
        truncated: [
            "\n".join(Writer(color=False, width=100).lines(seen)),
            re.sub(r"<[^>]*>", "", re.sub(r"</b>|</span>", " · ", "".join(page(seen)))),
        ]
        for truncated in ("drop", "without_end")
        for answers in (["data.answers=verbatim"] if truncated == "without_end" else [],)
        for seen in (look(path, "gpt_rao", *keys, *answers, f"data.truncated={truncated}", row_numbers=everything),)
    }
    for text in written["drop"]:
        assert text.count("reward 0.5 = mean of 0, 1") == 4 and text.count("reward 2.5 = mean of 2, 3") == 4
        assert text.count("left out: data.truncated=drop") == 1 and "no end token" not in text
        assert text.count("kept, but not drawn") == 1
        assert "correlation of a response's reward with its length: +1.00" in text.replace("&#x27;", "'")
    for text in written["without_end"]:
        assert text.count("no end token") == 1 and "left out" not in text
        assert len(re.findall(r"\btruncated\b(?!=)", text)) >= 1


def test_what_is_left_out_of_a_long_text_is_counted_and_all_of_it_can_be_shown(
    look: Look, write_lines: Callable[..., str]
) -> None:
    words = " ".join(f"word{number}" for number in range(2000))
    path = write_lines([pair(1, words), pair(2)])
    keys = ["model.seq_length=60000", "model.global_batch_size=2"]
    some, all_of_it = (look(path, "gpt_dpo", *keys, rows=2, most_tokens=most) for most in (3000, None))
    response = some.rows[0].responses[0]
    assert response.num_tokens is not None and response.num_tokens > 6000
    further = f"[… {response.num_tokens - 3000:,} more tokens; --full shows all …]"
    short = "\n".join(Writer(color=False, width=80).lines(some))
    assert re.search(r"word0 .*\[… [\d,]+ characters; --full shows all …\]", short) and "word1999" not in short
    assert short.count(further) == 1 and "".join(page(some)).count(further) == 1
    for written in ("\n".join(Writer(color=False, width=80, full=True).lines(all_of_it)), "".join(page(all_of_it))):
        assert "1999" in re.sub(r"<[^>]*>", "", written) and "--full" not in written


class Read(HTMLParser):
    """The page's elements, attributes, and the text of its tokens."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.tokens: list[str] = []
        self._in_token = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)
        if tag == "span" and any(name == "data-t" for name, _ in attrs):
            self.tokens.append("")
            self._in_token = True

    def handle_endtag(self, tag: str) -> None:
        self._in_token = self._in_token and tag != "span"

    def handle_data(self, data: str) -> None:
        if self._in_token:
            self.tokens[-1] += data


def test_nothing_of_the_data_acts_on_page_or_terminal(look: Look, write_lines: Callable[..., str]) -> None:
    path = write_lines([pair(number, f"{HOSTILE} yes", HOSTILE) for number in range(8)], name="a<b>&.jsonl")
    seen = look(path, "gpt_dpo", rows=1)
    html = "".join(page(seen))
    read = Read(html)
    assert not read.tags & {"script", "img", "link", "iframe", "object"}
    assert not {name for name in read.attributes if name.startswith("on")} | (
        read.attributes & {"src", "href", "style"}
    )
    policy = re.search(r"sha256-(\S+)'", html)
    style = html.partition("<style>")[2].partition("</style>")[0]
    assert policy is not None and policy[1] == base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    shown = "".join(read.tokens)
    assert shown.count("<script>alert(1)</script>\\x1b[31m\\u202e") == 2 and "日本語 👩\u200d👧" in shown
    plain = "\n".join(Writer(color=False, width=80).lines(seen))
    assert "\x1b" not in plain and "\u202e" not in plain and "\\x1b[31m\\u202e" in plain
    colored = "\n".join(Writer(color=True, width=80).lines(seen))
    assert set(re.findall(r"\x1b\[[^m]*m", colored)) <= {
        f"\x1b[{code}m" for code in ("0", "1", "2", "31", "32", "36", "7;32")
    }
    unpainted = re.sub(r"\x1b\[[^m]*m", "", colored)
    assert unpainted == plain.replace("⟦", "").replace("⟧", "").replace("⏹", "")


def test_the_command_needs_no_nemo_and_writes_only_the_page(
    write_lines: Callable[..., str], tokenizer: str, tmp_path: Path
) -> None:
    path = write_lines([pair(number) for number in range(9)])
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['nemo', 'megatron', 'lightning', 'nemo_run']))\n"
        "from nemo_rao.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["show", path, "--config-name", "gpt_dpo", f"data.tokenizer={tokenizer}", "--output", "page.html"]
    before = set(tmp_path.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout and "9 of 9 rows kept" in done.stdout and "1 step of 8 prompts" in done.stdout
    assert "response 2 · rejected by label · " in done.stdout and done.stderr == ""
    assert set(tmp_path.iterdir()) - before == {tmp_path / "page.html"}
    assert main(["show", path, "--config-name", "gpt_dpo", f"data.tokenizer={tokenizer}", "--output", path]) == 2
    assert json.loads(Path(path).read_text().splitlines()[0]) == pair(0)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["nope.jsonl"], ("nope.jsonl", "no such file")),
        (["data.train_path=nope.jsonl"], ("nope.jsonl", "no such file")),
        ([], ("data.train_path",)),
        (["FILE", "data.tokenizr=x"], ("data.tokenizr", "data.tokenizer?")),
        (["FILE", "--config-name", "gpt_rao"], ("line 1", "reward")),
        (["FILE", "--row", "17"], ("--row 17", "line 17")),
        (["FILE", "--rows", "-1"], ("--rows -1",)),
        (["FILE", "--first", "0"], ("--first 0",)),
        (["FILE", "--output", "."], ("--output .", "directory")),
        (["FILE", "model.rao.beta=1"], ("model.rao.beta", "dpo")),
        (["FILE", "data.num_prompts=10"], ("data.num_prompts=10", "only 9")),
    ],
)
def test_bad_input_gives_one_line_and_exit_code_2(
    arguments: list[str],
    parts: tuple[str, ...],
    write_lines: Callable[..., str],
    tokenizer: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_lines([pair(number) for number in range(9)])
    given = [path if one == "FILE" else one for one in arguments]
    recipe = [] if "--config-name" in given else ["--config-name", "gpt_dpo"]
    assert main(["show", *given, *recipe, f"data.tokenizer={tokenizer}"]) == 2
    output, message = capfd.readouterr()
    assert output == "" and message.count("\n") == 1 and message.startswith("error: ")
    assert all(part in message for part in parts), message


def test_color_is_for_terminals_that_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert can_show_color()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not can_show_color()
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert not can_show_color()
