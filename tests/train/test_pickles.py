"""No checkpoint runs code by being read: pickles that could are refused before anything else reads them."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_rao.checkpoint.find import check_checkpoint, resolve_checkpoint
from nemo_rao.checkpoint.pickles import refuse_code
from nemo_rao.errors import UserError

from .runs import in_fork


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._path),)


@pytest.fixture
def checkpoint(start: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "checkpoint"
    shutil.copytree(resolve_checkpoint(str(start), "start"), copy, symlinks=False)
    return copy


def test_a_checkpoint_of_ours_passes(checkpoint: Path) -> None:
    assert list((checkpoint / "weights").glob("*.distcp"))
    refuse_code(checkpoint, "KEY")


def in_metadata(checkpoint: Path, bomb: Any) -> None:
    file = checkpoint / "weights" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    metadata.planner_data = bomb
    file.write_bytes(pickle.dumps(metadata))


def in_common(checkpoint: Path, bomb: Any) -> None:
    file = common(checkpoint)
    torch.save(torch.load(file) | {"callbacks": bomb}, file)


def common(checkpoint: Path) -> Path:
    """Step numbers and the like, which megatron-core keeps elsewhere since 0.19, and still reads."""
    file = checkpoint / "weights" / "common.pt"
    if not file.exists():
        torch.save({"step": 2}, file)
    return file


def in_bytes(checkpoint: Path, bomb: Any) -> None:
    """As Transformer Engine keeps its state: a tensor of bytes, which it unpickles."""
    in_object(checkpoint, as_bytes({"scale_fwd": torch.ones(3), "extra_fp8_variables": bomb}))


def as_bytes(state: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)


def in_object(checkpoint: Path, bomb: Any) -> None:
    """An ``_extra_state``: at the end of a file, where the metadata says it is."""
    file = checkpoint / "weights" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    index = next(index for index in metadata.storage_data if "_extra_state" in index.fqn)
    location = metadata.storage_data[index]
    held = io.BytesIO()
    torch.save(bomb, held)
    shard = checkpoint / "weights" / location.relative_path
    location.offset, location.length = shard.stat().st_size, len(held.getvalue())
    with shard.open("ab") as opened:
        opened.write(held.getvalue())
    file.write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("plant", [in_metadata, in_common, in_object, in_bytes])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(plant: Any, checkpoint: Path, tmp_path: Path) -> None:
    in_fork(plant, checkpoint, Bomb(tmp_path / "ran"))
    in_fork(_refused, checkpoint)
    assert not (tmp_path / "ran").exists()


def test_what_transformer_engine_remembers_passes(checkpoint: Path) -> None:
    state = {
        "scale_fwd": torch.ones(3),
        "amax_history_fwd": torch.zeros(1024, 3),
        "extra_fp8_variables": {"num_gemms": 1},
    }
    in_fork(in_object, checkpoint, as_bytes(state))
    refuse_code(checkpoint, "KEY")


def _refused(checkpoint: Path) -> None:
    with pytest.raises(UserError, match=r"KEY: .* is a pickle that names posix.mkdir.* model.allow_pickle=true"):
        check_checkpoint(checkpoint, None, 0, key="KEY", remedy="")


def test_a_name_that_walks_to_another_module_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "weights" / ".metadata").write_bytes(
        b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x08os.mkdir\x93\x8c"
        + bytes([len(str(tmp_path / "ran"))])
        + str(tmp_path / "ran").encode()
        + b"\x85R."
    )
    with pytest.raises(UserError, match=r"names torch\.distributed\.checkpoint\.metadata\.os\.mkdir"):
        refuse_code(checkpoint, "KEY")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
def test_a_damaged_pickle_is_reported(name: str, checkpoint: Path) -> None:
    file = common(checkpoint).with_name(name)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=rf"KEY: .*{name} cannot be read .*. Name a complete checkpoint"):
        refuse_code(checkpoint, "KEY")
