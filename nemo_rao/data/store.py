"""All samples of a data set as a few flat arrays, in memory or memory-mapped from a directory.

    <directory>/<array>.npy    one for each array of :class:`Arrays`
    <directory>/data.json      format, sizes and digests of these files, the report, the fingerprint

Processes that open the same directory share its pages and read only what they use, so opening takes milliseconds,
whatever the number of rows. A directory is first written under a temporary name; an incomplete one is never opened.
"""

from __future__ import annotations

import array
import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemo_rao.batch import RewardSummary, Sample
from nemo_rao.data.report import LoadReport
from nemo_rao.runtime.files import folder_written_atomically

FORMAT = "nemo_rao preference data 3"  # increment it also if rows are read, checked or counted differently
_RECORD = "data.json"
_END = 1 << 20  # bytes at each end of a large file that are checked when it is opened


@dataclass(frozen=True)
class Arrays:
    """N samples; 4 bytes per token and a few hundred bytes per sample. All arrays are read-only: samples are views.

    A sample's segments, its prompt and then its responses, are contiguous. ``*_ends`` begin with 0.

    Attributes:
        tokens: ``[tokens]`` int32, segment after segment.
        segment_ends: ``[segments + 1]`` int64, offsets into ``tokens``.
        first_segment: ``[N + 1]`` int64, index of the segment that is each sample's prompt.
        rewards: ``[all responses]`` float64.
        ensemble: ``[all responses, M]`` float64.
        reference_rewards: float64, sample after sample, delimited by ``reference_reward_ends`` ``[N + 1]`` int64.
        ranked: ``[N]`` bool.
        prompt_digests: ``[N]`` uint64, digest of each prompt's tokens.
        locations: uint8, the samples' locations as UTF-8, delimited by ``location_ends`` ``[N + 1]`` int64.
        answers: bool, true for tokens of an answer, only for segments that need such a mask (conversations), delimited
            by ``answer_ends``; ``answer_segments`` are the indices of these segments, int64, ascending.
    """

    tokens: np.ndarray
    segment_ends: np.ndarray
    first_segment: np.ndarray
    rewards: np.ndarray
    ensemble: np.ndarray
    reference_rewards: np.ndarray
    reference_reward_ends: np.ndarray
    ranked: np.ndarray
    prompt_digests: np.ndarray
    locations: np.ndarray
    location_ends: np.ndarray
    answers: np.ndarray
    answer_ends: np.ndarray
    answer_segments: np.ndarray


_LARGE = ("tokens", "answers")  # proportional to the tokens; the others to the rows


class PreferenceData:
    """N samples, see :class:`Arrays`.

    Attributes:
        report: outcome of loading.
        folder: directory that holds the arrays; ``None`` if they are in memory.
    """

    def __init__(self, samples: Iterable[Sample], report: LoadReport | None = None) -> None:
        arrays = _flat(samples)
        num_samples = len(arrays.ranked)
        self._set(arrays, LoadReport(num_samples, num_samples) if report is None else report, None, None)

    def _set(self, arrays: Arrays, report: LoadReport, folder: Path | None, fingerprint: str | None) -> None:
        self._arrays = arrays
        self.report = report
        self.folder = folder
        self._fingerprint = fingerprint

    def __getstate__(self) -> Any:
        # A spawned rank opens the files itself instead of receiving their content through a pipe.
        return vars(self) if self.folder is None else self.folder

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, Path):
            opened = open_data(state)
            assert opened is not None, f"{state} is gone"
            state = vars(opened)
        vars(self).update(state)

    def __len__(self) -> int:
        return len(self._arrays.ranked)

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index = int(index) % len(self)
        arrays = self._arrays
        first, end = arrays.first_segment[index : index + 2].tolist()
        ends = arrays.segment_ends[first : end + 1].tolist()
        prompt, *responses = (arrays.tokens[a:b] for a, b in itertools.pairwise(ends))
        offset = first - index
        return Sample(
            prompt=prompt,
            responses=tuple(responses),
            rewards=arrays.rewards[offset : offset + len(responses)],
            ranked=bool(arrays.ranked[index]),
            location=bytes(arrays.locations[slice(*arrays.location_ends[index : index + 2])]).decode(
                "utf-8", "surrogatepass"
            ),
            ensemble=arrays.ensemble[offset : offset + len(responses)],
            reference_rewards=arrays.reference_rewards[slice(*arrays.reference_reward_ends[index : index + 2])],
            answers=self._answers(first + 1, len(responses)),
        )

    def _answers(self, segment: int, number: int) -> tuple[np.ndarray, ...] | None:
        """Answer masks of a sample's responses, from its first response's segment on. Either all have one or none."""
        arrays = self._arrays
        at = int(np.searchsorted(arrays.answer_segments, segment))
        if at == len(arrays.answer_segments) or arrays.answer_segments[at] != segment:
            return None
        ends = arrays.answer_ends[at : at + number + 1].tolist()
        return tuple(arrays.answers[a:b] for a, b in itertools.pairwise(ends))

    @property
    def num_responses(self) -> int:
        """Number of responses of all samples. Response ids count from 0 in the order of the samples."""
        return len(self._arrays.rewards)

    def response_offset(self, index: int) -> int:
        """Id of a sample's first response in the whole data set (``MicroBatch.response_ids``)."""
        return int(self._arrays.first_segment[index]) - index

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """``[N]`` int64, tokens of each sample's prompt with its longest response."""
        sizes, first = np.diff(self._arrays.segment_ends), self._arrays.first_segment[:-1]
        prompts = sizes[first]
        sizes[first] = 0
        return prompts + np.maximum.reduceat(sizes, first) if len(self) else prompts

    @property
    def max_length(self) -> int:
        """Tokens of the longest prompt with one response; 0 without samples."""
        return int(self.lengths.max(initial=0))

    @property
    def prompt_digests(self) -> np.ndarray:
        """``[N]`` uint64, equal for prompts with the same tokens."""
        return self._arrays.prompt_digests

    def reward_summary(self) -> RewardSummary:
        """Summary of the rewards of all responses."""
        rewards, ranked = self._arrays.rewards, self._arrays.ranked
        num_columns = self._arrays.ensemble.shape[1] or 1
        known = ~np.isnan(rewards)
        if not known.any():
            return RewardSummary(all_ranked=bool(ranked.all()), num_columns=num_columns)
        sample_of = np.repeat(np.arange(len(self)), np.diff(self._arrays.first_segment) - 1)
        counts = np.bincount(sample_of[known], minlength=len(self))
        sums = np.bincount(sample_of[known], weights=rewards[known], minlength=len(self))
        return RewardSummary(
            mean=float(np.mean(sums[counts > 0] / counts[counts > 0])),
            low=float(rewards[known].min()),
            high=float(rewards[known].max()),
            all_labels=bool(np.isin(rewards, (0, 1)).all()),
            all_ranked=bool(ranked.all()),
            num_columns=num_columns,
        )

    def fingerprint(self) -> str:
        """SHA-256 (hex) of tokens and boundaries in order. It identifies reference log-probs, which depend on nothing
        else here, so new rewards for the same responses do not change it."""
        if self._fingerprint is None:
            self._fingerprint = _fingerprint(self._arrays)
        return self._fingerprint

    def contents_fingerprint(self) -> str:
        """SHA-256 (hex) of all training inputs: tokens, and the rewards, labels and ensembles of the responses."""
        digest = hashlib.sha256(f"nemo_rao preference contents 1\n{self.fingerprint()}\n".encode())
        arrays = self._arrays
        digest.update(np.array([arrays.ensemble.shape[1]], dtype="<i8").tobytes())
        for values, kind in (
            (arrays.rewards, "<f8"),
            (arrays.ensemble, "<f8"),
            (arrays.reference_rewards, "<f8"),
            (arrays.reference_reward_ends, "<i8"),
            (arrays.ranked, "<u1"),
        ):
            digest.update(np.ascontiguousarray(values, dtype=kind).reshape(-1).data)
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write the data to a directory that :func:`open_data` can map into memory. An existing one is not replaced.

        Raises:
            UserError: it cannot be written; no partial directory remains.
        """
        with folder_written_atomically(folder) as temporary:
            files = {}
            for name, values in vars(self._arrays).items():
                path = temporary / f"{name}.npy"
                np.save(path, values, allow_pickle=False)
                files[name] = {"bytes": path.stat().st_size, "digest": _digest(path)}
            record = {
                "format": FORMAT,
                "files": files,
                "report": dataclasses.asdict(self.report),
                "fingerprint": self.fingerprint(),
            }
            (temporary / _RECORD).write_text(json.dumps({"digest": _record_digest(record), "record": record}))


def open_data(folder: Path) -> PreferenceData | None:
    """Open what :meth:`PreferenceData.save` wrote, memory-mapped and read-only; ``None`` if missing or damaged.

    The size and digest of every file are checked. The digest covers the whole file if it grows with the rows, but only
    both its ends if it grows with the tokens, so that gigabytes need not be read.
    """
    try:
        text = json.loads((folder / _RECORD).read_text())
        record = text["record"]
        if text["digest"] != _record_digest(record) or record["format"] != FORMAT:
            return None
        arrays = {}
        for name, file in record["files"].items():
            path = folder / f"{name}.npy"
            # Before numpy reads it, since a damaged header could give an arbitrary array.
            if path.stat().st_size != file["bytes"] or _digest(path) != file["digest"]:
                return None
            # A plain ndarray view: slices of np.memmap cost several times as much.
            arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
        data = PreferenceData.__new__(PreferenceData)
        data._set(Arrays(**arrays), LoadReport(**record["report"]), folder, record["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return data


def _flat(samples: Iterable[Sample]) -> Arrays:
    tokens, segment_ends, first_segment = array.array("i"), array.array("q", [0]), array.array("q", [0])
    rewards, reference_rewards, reference_reward_ends = array.array("d"), array.array("d"), array.array("q", [0])
    ensemble: list[np.ndarray] = []
    ranked, locations, location_ends = bytearray(), bytearray(), array.array("q", [0])
    prompt_digests = bytearray()
    answers, answer_ends, answer_segments = bytearray(), array.array("q", [0]), array.array("q")
    for sample in samples:
        for segment in (sample.prompt, *sample.responses):
            tokens.frombytes(segment.astype(np.int32).tobytes())
            segment_ends.append(len(tokens))
        for number, mask in enumerate(sample.answers or (), start=1):
            answers += mask.astype(bool).tobytes()
            answer_ends.append(len(answers))
            answer_segments.append(first_segment[-1] + number)
        rewards.frombytes(sample.rewards.astype(np.float64).tobytes())
        ensemble.append(sample.ensemble)
        reference_rewards.frombytes(sample.reference_rewards.astype(np.float64).tobytes())
        reference_reward_ends.append(len(reference_rewards))
        ranked.append(sample.ranked)
        prompt_digests += hashlib.blake2b(sample.prompt.astype("<i4").tobytes(), digest_size=8).digest()
        locations += sample.location.encode("utf-8", "surrogatepass")
        location_ends.append(len(locations))
        first_segment.append(len(segment_ends) - 1)

    def flat(values: Any, kind: type) -> np.ndarray:
        made: np.ndarray = np.frombuffer(values, dtype=kind) if len(values) else np.zeros(0, kind)
        made.setflags(write=False)
        return made

    stacked = np.concatenate(ensemble) if ensemble else np.zeros((0, 0))
    stacked.setflags(write=False)
    return Arrays(
        tokens=flat(tokens, np.int32),
        segment_ends=flat(segment_ends, np.int64),
        first_segment=flat(first_segment, np.int64),
        rewards=flat(rewards, np.float64),
        ensemble=stacked,
        reference_rewards=flat(reference_rewards, np.float64),
        reference_reward_ends=flat(reference_reward_ends, np.int64),
        ranked=flat(ranked, np.bool_),
        prompt_digests=flat(prompt_digests, np.uint64),
        locations=flat(locations, np.uint8),
        location_ends=flat(location_ends, np.int64),
        answers=flat(answers, np.bool_),
        answer_ends=flat(answer_ends, np.int64),
        answer_segments=flat(answer_segments, np.int64),
    )


def _fingerprint(arrays: Arrays) -> str:
    digest = hashlib.sha256(b"nemo_rao preference data 1\n")  # not FORMAT: it is the key of stored log-probs
    digest.update(np.array([len(arrays.ranked), len(arrays.segment_ends)], dtype="<i8").tobytes())
    for values, kind in ((arrays.first_segment, "<i8"), (arrays.segment_ends, "<i8"), (arrays.tokens, "<i4")):
        digest.update(np.ascontiguousarray(values, dtype=kind).data)
    for at, segment in enumerate(arrays.answer_segments):
        mask = arrays.answers[slice(*arrays.answer_ends[at : at + 2])]
        digest.update(np.array([segment], dtype="<i8").tobytes() + np.packbits(mask).tobytes())
    return digest.hexdigest()


def _digest(path: Path) -> str:
    """Digest of a file's content, or of both its ends if it is large."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        if path.stem in _LARGE:
            digest.update(file.read(_END))
            file.seek(max(0, os.fstat(file.fileno()).st_size - _END))
        while block := file.read(_END):
            digest.update(block)
    return digest.hexdigest()


def _record_digest(record: Any) -> str:
    return hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=16).hexdigest()
