"""The two procedures of docs/start/whole_procedure.md, taken from its text, run at toy size.

The text is given to bash unchanged but for ``/models/`` and ``/data/``, which are folders of the test. ``nemo-rao`` is
a shim on the PATH that hands each command to this process, whose forks run it (NeMo is imported once), with the
arguments of ``SHORTER`` appended. So a key, path or option that is wrong in the page fails here.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from nemo_rao.demo.synthetic import write_preferences
from nemo_rao.demo.tokenizer_training import train_tokenizer
from nemo_rao.rows.reading import read_rows
from nemo_rao.runtime.metrics_file import read_metrics

from ..hugging_face.models import command, make_model, read_json
from ..megatron_ranks import import_once
from ..train.runs import start_fork
from .blocks import procedure

SHIM = """#!{python}
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    server.sendall(json.dumps([os.getcwd(), sys.argv[1:]]).encode() + b"\\n")
    answer = server.makefile().read()
sys.stderr.write(answer)
sys.exit(1 if answer else 0)
"""
# Appended to each command, by its name: fewer and smaller steps, and a CPU's two ranks.
SHORTER: dict[str, tuple[str, ...]] = {
    "train": (
        *("trainer.accelerator=cpu", "trainer.devices=2", "model.tensor_model_parallel_size=2"),
        *("trainer.max_epochs=null", "trainer.max_steps=2", "model.optim.sched.warmup_steps=0"),
        *("model.seq_length=128", "model.global_batch_size=4", "model.micro_batch_size=2"),
        *("trainer.enable_progress_bar=false", "exp_manager.draw_curves=false"),
    ),
    "generate": ("--max-new-tokens", "4"),
}


def run_procedure(text: str, folder: Path) -> list[list[str]]:
    """Runs a block of the page in ``folder``; returns the commands that it gave, which all succeed."""
    import_once()
    (folder / "bin").mkdir()
    address = str(folder / "s")
    shim = folder / "bin" / "nemo-rao"
    shim.write_text(SHIM.format(python=sys.executable, address=address))
    shim.chmod(0o755)
    text = text.replace("/models/", f"{folder}/models/").replace("/data/", f"{folder}/data/")
    given: list[list[str]] = []
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        script = subprocess.Popen(
            ["bash", "-e", "-u", "-c", text],
            cwd=folder,
            env={**os.environ, "PATH": path},
            stderr=subprocess.PIPE,
            text=True,
        )
        threading.Thread(target=lambda: (script.wait(), _wake(address)), daemon=True).start()
        while script.poll() is None:
            connection, _ = server.accept()
            with connection:
                request = connection.makefile().readline()
                if not request:  # the script has ended
                    break
                cwd, arguments = json.loads(request)
                given.append(arguments)
                process, failure = start_fork(_command_in, cwd, [*arguments, *SHORTER.get(arguments[0], ())])
                process.join()
                if process.exitcode:
                    said = failure.recv() if failure.poll() else f"exit code {process.exitcode}"
                    connection.sendall(f"{arguments}: {said}".encode())
    assert script.wait() == 0, script.stderr and script.stderr.read()
    return given


def _wake(address: str) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(address)


def _command_in(cwd: str, arguments: Sequence[str]) -> None:
    from nemo_rao.cli import main

    os.chdir(cwd)
    code = main(arguments)
    assert code == 0, f"exit code {code}"


def write_lines(path: Path, rows: Sequence[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def steps_of(run: Path) -> list[float]:
    return [record["step"] for record in read_metrics(run / "metrics.jsonl") if "loss" in record]


@pytest.fixture
def preferences(tmp_path: Path) -> list[dict]:
    """Toy preferences, and a tokenizer of them in ``tokenizer``."""
    write_preferences(tmp_path / "prefs.jsonl", 8)
    rows = [json.loads(line) for line in (tmp_path / "prefs.jsonl").read_text().splitlines()]
    texts = [text for row in rows for text in (row["prompt"], *(answer["content"] for answer in row["responses"]))]
    train_tokenizer(texts, tmp_path / "tokenizer", 300)
    return rows


def test_the_procedure_of_eight_gpus(tmp_path: Path, preferences: list[dict]) -> None:
    models, data = tmp_path / "models", tmp_path / "data"
    instruct = make_model("llama", tmp_path / "tokenizer", models / "Meta-Llama-3-8B-Instruct")
    base = make_model("llama", tmp_path / "tokenizer", models / "Meta-Llama-3-8B")
    (base / "chat_template.jinja").unlink(missing_ok=True)  # as the published one, it has none
    settings = read_json(base / "tokenizer_config.json")
    settings.pop("chat_template", None)
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    assert read_json(instruct / "config.json")["vocab_size"] == read_json(base / "config.json")["vocab_size"]
    data.mkdir()
    chats = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["responses"][0]["content"]}]
        for row in preferences
    ]
    write_lines(data / "ultrachat.jsonl", [{"prompt_id": "x", "messages": chat + chat} for chat in chats])
    published = [
        {
            "instruction": row["prompt"],
            "completions": [
                {"response": answer["content"], "overall_score": 10 * answer["reward"]} for answer in row["responses"]
            ],
        }
        for row in preferences
    ]
    write_lines(data / "ultrafeedback.jsonl", published)
    write_lines(data / "prompts.jsonl", [{"prompt": row["prompt"]} for row in preferences[:2]])

    given = run_procedure(procedure("nemo-rao import-hf /models/Meta-Llama-3-8B llama"), tmp_path)
    names = [words[0] for words in given]
    assert names == ["import-hf", "train", "train", "score", "train", "export-hf", "generate"]
    assert all(steps_of(tmp_path / run) == [1, 2] for run in ("sft", "rm", "rao"))
    scored = list(read_rows(str(tmp_path / "scored.jsonl")))
    assert [len(row.responses) for row in scored] == [4] * len(preferences)
    assert json.loads((tmp_path / "rao" / "data.json").read_text())["training"]["report"].startswith("8 of 8 rows kept")
    assert [len(row.responses) for row in read_rows(str(tmp_path / "samples.jsonl"))] == [4, 4]


def test_the_procedure_of_a_laptop(tmp_path: Path, preferences: list[dict]) -> None:
    """What ``make demo`` leaves, made smaller: data, tokenizer and a fine-tuned model."""
    demo, data = tmp_path / "runs" / "demo", tmp_path / "runs" / "demo" / "data"
    data.mkdir(parents=True)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text("")
    (tmp_path / "tokenizer").rename(data / "tokenizer")
    write_lines(data / "train.jsonl", preferences)
    write_preferences(data / "held_out.jsonl", 4, seed=1, split="held_out")
    command(
        *("train", "--config-name", "gpt_sft", "model=demo_llama", f"data.tokenizer={data / 'tokenizer'}"),
        *(f"data.train_path={data / 'train.jsonl'}", f"exp_manager.exp_dir={demo}", "exp_manager.name=sft"),
        *SHORTER["train"],
    )
    given = run_procedure(procedure("source .venv/bin/activate && cd runs/demo"), tmp_path)
    names = [words[0] for words in given]
    assert names == ["train", "score", "train", "export-hf", "generate", "score"]
    assert all(steps_of(demo / run) == [1, 2] for run in ("rm", "rao_of_rm"))
    judged = list(read_rows(str(demo / "judged.jsonl")))
    assert judged and all(response.reward is not None for row in judged for response in row.responses)
