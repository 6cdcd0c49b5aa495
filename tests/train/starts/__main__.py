import os
import tempfile
from pathlib import Path

from nemo_rao.config.engine_choice import installed_engine

from . import write

os.environ["TOKENIZERS_PARALLELISM"], os.environ["OMP_NUM_THREADS"] = "false", "1"
engine = installed_engine()
assert engine is not None
with tempfile.TemporaryDirectory() as folder:
    write(engine, Path(folder))
