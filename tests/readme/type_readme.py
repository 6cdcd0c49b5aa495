"""Type README.md's commands in order into a clean clone of this repository.

    python -m tests.readme.type_readme /tmp/typed                          # installs: several minutes and gigabytes
    python -m tests.readme.type_readme /tmp/typed --venv /path/to/.venv    # uses an environment that has the packages

One bash runs all blocks of shell commands. Only the reader's own files are replaced: ``prefs.jsonl``, the tokenizer,
``/models``, ``/data`` and ``/checkpoints`` become the demo's preferences and tokenizer and a toy model. Keys appended
to the commands shorten runs, and reduce those for eight GPUs to toy size; ``launch`` prints its batch script. The exit
code is that of the first failing command, or 0.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from .blocks import PAGES, ROOT, blocks

# Functions that wrap the commands. Later keys take precedence; options of nemo-rao may be in any position.
PRELUDE = """
set -e -u -o pipefail
PS1=
cd {clone}
{make}
nemo-rao() {{
  echo "README: nemo-rao $*" >&2
  case "$1 $*" in
    train*gpt_rao_llama3_8b*)
      command nemo-rao "$@" --config-dir llama model=imported {small} ;;
    train*) command nemo-rao "$@" trainer.max_steps=5 data.num_prompts=100 ;;
    launch*) command nemo-rao "$@" --dry-run model=imported {small} ;;
    *) command nemo-rao "$@" ;;
  esac
}}
"""
# Two CPU ranks instead of eight GPUs.
SMALL = (
    "trainer.accelerator=cpu trainer.devices=2 model.tensor_model_parallel_size=2 model.seq_length=128 "
    "model.global_batch_size=4 model.micro_batch_size=2 trainer.max_steps=2 data.num_prompts=32"
)
# An existing environment is not installed into: it is older than the clone's files, which is disregarded.
MAKE = 'export PYTHONPATH={clone}\nmake() {{ command make --old-file .venv/.installed "$@"; }}'
# After the demo: the reader's own files.
OWN_FILES = """
cp runs/demo/data/train.jsonl prefs.jsonl
mkdir -p {folder}/data {folder}/models {folder}/checkpoints my_recipes/cluster my_recipes/model
cp prefs.jsonl {folder}/data/prefs.jsonl
python -c 'import sys
from pathlib import Path
from nemo_rao.demo.tokenizer_training import texts_of_rows, train_tokenizer
from nemo_rao.rows.reading import read_rows
from tests.hugging_face.models import make_model
train_tokenizer(texts_of_rows(read_rows("prefs.jsonl")), Path("toy_tokenizer"), 300)
make_model("llama", Path("toy_tokenizer"), Path(sys.argv[1]))' {folder}/models/Meta-Llama-3-8B-Instruct
echo "partition: gpu" > my_recipes/cluster/my_cluster.yaml
"""
BEFORE_LAUNCH = """
ln -sfn "$PWD/llama" {folder}/checkpoints/llama3_8b
cp llama/model/imported.yaml my_recipes/model/imported.yaml
"""


def script(folder: Path, venv: Path | None) -> str:
    """The bash script: the README's blocks, with the preparations between them."""
    clone = folder / "nemo_rao"
    parts = [PRELUDE.format(clone=clone, small=SMALL, make=MAKE.format(clone=clone) if venv else "")]
    for block in blocks(PAGES[0]):
        for path in ("/models/", "/data/", "/checkpoints/"):
            block = block.replace(f" {path}", f" {folder}{path}").replace(f"={path}", f"={folder}{path}")
        block = block.replace("/path/to/tokenizer", "runs/demo/data/tokenizer")
        if "nemo-rao launch" in block:
            parts.append(BEFORE_LAUNCH.format(folder=folder))
        parts.append(block)
        if "make demo" in block:
            parts.append(OWN_FILES.format(folder=folder))
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="directory to create")
    parser.add_argument("--venv", type=Path, help="an environment with the pinned packages, instead of installing one")
    given = parser.parse_args()
    folder = given.folder.resolve()
    folder.mkdir(parents=True)
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder / "nemo_rao")], check=True)
    if given.venv:
        (folder / "nemo_rao" / ".venv").symlink_to(given.venv.resolve())
    bash = shutil.which("bash")
    assert bash is not None
    return subprocess.run([bash, "-c", script(folder, given.venv)]).returncode


if __name__ == "__main__":
    sys.exit(main())
