"""Objectives and operations need torch alone."""

import subprocess
import sys

BLOCKED_IMPORT = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in {"nemo", "megatron", "lightning", "pytorch_lightning", "transformers", "omegaconf", "hydra"}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Block())
import nemo_rao.objectives.registry
import nemo_rao.ops.segments
import nemo_rao.ops.vocab_parallel
own = sorted(name for name in sys.modules if name.startswith("nemo_rao."))
print(",".join(own))
"""


def test_objectives_and_ops_import_with_the_stack_blocked() -> None:
    run = subprocess.run([sys.executable, "-c", BLOCKED_IMPORT], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    layers = {name.split(".")[1] for name in run.stdout.strip().split(",")}
    assert layers == {"batch", "errors", "keys", "objectives", "ops", "other_names"}
