"""On-disk cache of tokenized data.

    <directory>/<key>/    a data set, see :mod:`nemo_rao.data.store`

The key is a digest of everything that determines the result: names and contents of the data files, the tokenizer's
files, the loading options, library versions and the source of this package's loading code. An entry is therefore never
stale, and the directory may be removed at any time. Only data that loaded without an error is cached.

Two kinds of data are not cached, because their content cannot be digested in advance: ``hf:`` names, which may resolve
to different data tomorrow, and prompts into which the chat template writes the current date. Nor is data cached if the
tokenizer cannot be saved, which the remark of :meth:`DataCache.load` reports.
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
    """Load data with one tokenizer, or read it back from the cache.

    Args:
        folder: cache directory, created on the first write.
        tokenizer: not used for encoding yet, since encoding changes the files that it would be saved as.
    """

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self._folder = folder
        self._tokenizer = tokenizer
        self._not_saved = ""
        try:
            self._tokenizer_digest: str | None = _tokenizer_digest(tokenizer)
        except Exception as error:  # slow tokenizers copy extra files and may raise anything
            self._tokenizer_digest = None
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            self._not_saved = f" (not cached: the tokenizer cannot be saved, {reason})"

    def load(
        self,
        paths: Paths,
        *,
        progress: Callable[[int], None] | None = None,
        waiting: Callable[[], None] = lambda: None,
        **options: Any,
    ) -> tuple[PreferenceData, str]:
        """Return the data, memory-mapped if it is cached, and a remark on its origin for the report.

        Of several processes that load the same data at the same time, one loads it and the others wait.

        Args:
            paths, progress, options: see :func:`nemo_rao.data.dataset.load_preferences`, whose errors are raised here.
            waiting: called if another process is already loading the same data.
        """
        key = self._key(paths, options)
        if key is None:
            return load_preferences(paths, self._tokenizer, progress=progress, **options), self._not_saved
        folder = self._folder / key
        if (found := open_data(folder)) is not None:
            return found, READ_FROM_CACHE
        with one_at_a_time(folder, waiting) as alone:
            if (found := open_data(folder)) is not None:
                return found, READ_FROM_CACHE
            remove_folder(folder, unfinished=alone)  # an existing entry that could not be opened is damaged
            data = load_preferences(paths, self._tokenizer, progress=progress, **options)
            if self._key(paths, options) != key:
                return data, " (not cached: the files changed while they were read)"
            try:
                data.save(folder)
            except UserError as error:
                return data, f" (not cached: {error})"
        return open_data(folder) or data, ""

    def _key(self, paths: Paths, options: Mapping[str, Any]) -> str | None:
        """Cache key, or ``None`` for data that must not be cached."""
        if self._tokenizer_digest is None or depends_on_the_day(self._tokenizer, options.get("chat_template", "auto")):
            return None
        try:
            sources = [(source, _source_digest(source)) for source in expand_paths(paths)]
        except (OSError, UserError):  # loading reports the error
            return None
        if any(digest is None for _, digest in sources):
            return None
        parts = {
            "format": FORMAT,
            "code": _code_digest(),
            "libraries": {library: _version(library) for library in LIBRARIES},
            "sources": sources,  # names too: samples carry the file names of their rows
            "tokenizer": self._tokenizer_digest,
            "options": {name: value for name, value in options.items() if name != "needed_by"},  # used in messages only
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()[:32]


def _source_digest(source: str) -> str | None:
    """Digest of a source's content, or ``None`` if it has none that can be read."""
    if os.path.isfile(source):
        return _digest([source])
    if os.path.isdir(source) and is_saved_dataset(source):
        return _digest(_files_below(source), relative_to=source)
    return None


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of the files that the tokenizer would be saved as: vocabulary, chat template, special tokens, settings."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return _digest(_files_below(folder), relative_to=folder) + f" {type(tokenizer).__qualname__}"


@functools.cache
def _code_digest() -> str:
    """Digest of the modules between file and sample, so that code changes invalidate the cache by themselves."""
    package = Path(nemo_rao.batch.__file__).parent
    modules = [str(path) for part in ("rows", "data") for path in sorted((package / part).glob("*.py"))]
    return _digest([nemo_rao.batch.__file__, *modules], relative_to=str(package))


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _files_below(folder: str) -> list[str]:
    return sorted(str(path) for path in Path(folder).rglob("*") if path.is_file())


def _digest(files: list[str], relative_to: str | None = None) -> str:
    """Digest of the files' contents, and of their names if ``relative_to`` is given."""
    digest = hashlib.blake2b(digest_size=32)
    for name in files:
        if relative_to is not None:
            digest.update(os.path.relpath(name, relative_to).encode("utf-8", "surrogateescape"))
        digest.update(b"\0%d\0" % os.path.getsize(name))
        with open(name, "rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()
