"""Cache of tokenised data on disk: data loaded before, from the same files in the same way, is not loaded again.

    <folder>/<key>/    a data set, see :mod:`nemo_rao.data.store`

The key is a digest of all that decides the outcome: the names and contents of the data files, the tokenizer's files,
how the data is loaded, the versions of the libraries that do it, and this package's code that does. An entry is
therefore never stale, and the folder may be removed at any time. Only what was loaded without an error is kept.

Not kept is what has no content to take a digest of: ``hf:`` names, which may mean other data tomorrow, and prompts into
which the chat template writes the day's date.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nemo_rao.batch
from nemo_rao.data.dataset import load_preferences
from nemo_rao.data.encode import depends_on_the_day
from nemo_rao.data.store import FORMAT, PreferenceData, open_data
from nemo_rao.errors import UserError
from nemo_rao.rows.reading import Paths, expand_paths, is_saved_dataset
from nemo_rao.runtime.files import one_at_a_time, remove_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LIBRARIES = ("transformers", "tokenizers", "sentencepiece", "tiktoken", "jinja2", "datasets", "pyarrow")
READ_FROM_CACHE = " (read from cache)"
_BLOCK = 1 << 20  # bytes


class DataCache:
    """Loads data with one tokenizer, or reads it back.

    Args:
        folder: made when something is to be kept.
        tokenizer: before it is used: that changes what its files would hold.
    """

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self._folder = folder
        self._tokenizer = tokenizer
        self._tokenizer_digest = _tokenizer_digest(tokenizer)

    def load(
        self,
        paths: Paths,
        *,
        progress: Callable[[int], None] | None = None,
        waiting: Callable[[], None] = lambda: None,
        **options: Any,
    ) -> tuple[PreferenceData, str]:
        """The data, memory-mapped where it is kept, and what is to be said of where it comes from.

        Processes that come at once with the same data load it once: one does, the others wait.

        Args:
            paths, progress, options: see :func:`nemo_rao.data.dataset.load_preferences`, whose errors this raises.
            waiting: called where another process is loading the same.
        """
        key = self._key(paths, options)
        if key is None:
            return load_preferences(paths, self._tokenizer, progress=progress, **options), ""
        folder = self._folder / key
        if (found := open_data(folder)) is not None:
            return found, READ_FROM_CACHE
        with one_at_a_time(folder, waiting) as alone:
            if (found := open_data(folder)) is not None:
                return found, READ_FROM_CACHE
            remove_folder(folder, unfinished=alone)  # it is damaged, if it is there at all
            data = load_preferences(paths, self._tokenizer, progress=progress, **options)
            if self._key(paths, options) != key:
                return data, " (not kept: the files changed while they were read)"
            try:
                data.save(folder)
            except UserError as error:
                return data, f" (not kept: {error})"
        return open_data(folder) or data, ""

    def _key(self, paths: Paths, options: Mapping[str, Any]) -> str | None:
        """``None``: not to be kept."""
        if self._tokenizer_digest is None or depends_on_the_day(self._tokenizer, options.get("chat_template", "auto")):
            return None
        try:
            sources = [(source, _source_digest(source)) for source in expand_paths(paths)]
        except (OSError, UserError):  # whoever loads it says what is wrong
            return None
        if any(digest is None for _, digest in sources):
            return None
        parts = {
            "format": FORMAT,
            "code": _code_digest(),
            "libraries": {library: _version(library) for library in LIBRARIES},
            "sources": sources,  # by name too: samples tell their places
            "tokenizer": self._tokenizer_digest,
            "options": {name: value for name, value in options.items() if name != "needed_by"},  # for messages alone
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()[:32]


def _source_digest(source: str) -> str | None:
    """Of a source's content; ``None`` where it cannot be told."""
    if os.path.isfile(source):
        return _digest([source])
    if os.path.isdir(source) and is_saved_dataset(source):
        return _digest(_files_below(source), relative_to=source)
    return None


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Of the files that the tokenizer would be saved as: vocabulary, chat template, special tokens, settings. ``None``
    where it cannot be saved."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer.save_pretrained(folder)
        except Exception:  # of many kinds: slow tokenizers copy files of their own
            return None
        return _digest(_files_below(folder), relative_to=folder) + f" {type(tokenizer).__qualname__}"


@functools.cache
def _code_digest() -> str:
    """Of the modules between a file and a sample: nobody is to remember to make a change of theirs known."""
    package = Path(nemo_rao.batch.__file__).parent
    modules = [str(path) for room in ("rows", "data") for path in sorted((package / room).glob("*.py"))]
    return _digest([nemo_rao.batch.__file__, *modules], relative_to=str(package))


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _files_below(folder: str) -> list[str]:
    return sorted(str(path) for path in Path(folder).rglob("*") if path.is_file())


def _digest(files: list[str], relative_to: str | None = None) -> str:
    """Of the files' contents, and of their names where these are relative to a folder."""
    digest = hashlib.blake2b(digest_size=32)
    for name in files:
        if relative_to is not None:
            digest.update(os.path.relpath(name, relative_to).encode("utf-8", "surrogateescape"))
        digest.update(b"\0%d\0" % os.path.getsize(name))
        with open(name, "rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()
