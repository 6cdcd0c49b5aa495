"""All samples of a data set as a few flat arrays, in memory or memory-mapped from a folder.

    <folder>/<array>.npy    one for each array of :class:`Arrays`
    <folder>/data.json      format, sizes and digests of these files, the report, the fingerprint

Processes that open the same folder share its pages, and read no more of it than they use: a start costs milliseconds,
whatever the number of rows. A folder is written under a temporary name first; what is not whole is not opened.
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

FORMAT = "nemo_rao preference data 3"  # counts up when rows are read, checked or counted otherwise, too
_RECORD = "data.json"
_END = 1 << 20  # bytes of each end of a large file that are checked when it is opened


@dataclass(frozen=True)
class Arrays:
    """N samples; 4 bytes a token, and some hundred bytes a sample. All are read-only: samples are views of them.

    A sample's segments, its prompt and then its responses, follow each other. ``*_ends`` begin with 0.

    Attributes:
        tokens: ``[tokens]`` int32, segment after segment.
        segment_ends: ``[segments + 1]`` int64 in ``tokens``.
        first_segment: ``[N + 1]`` int64: the number of each sample's prompt.
        rewards: ``[all responses]`` float64.
        ensemble: ``[all responses, M]`` float64.
        reference_rewards: float64, sample after sample, delimited by ``reference_reward_ends`` ``[N + 1]`` int64.
        ranked: ``[N]`` bool.
        prompt_digests: ``[N]`` uint64, of each prompt's tokens.
        places: uint8, the samples' places as UTF-8, delimited by ``place_ends`` ``[N + 1]`` int64.
        answers: bool, where a token is an answer, of the segments that are told apart so (conversations), delimited by
            ``answer_ends``; ``answer_segments``, int64 and rising, are their numbers.
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
    places: np.ndarray
    place_ends: np.ndarray
    answers: np.ndarray
    answer_ends: np.ndarray
    answer_segments: np.ndarray


_LARGE = ("tokens", "answers")  # grow with the tokens; the others grow with the rows


class PreferenceData:
    """N samples, see :class:`Arrays`.

    Attributes:
        report: what was dropped on the way here.
        folder: where the arrays lie on disk; ``None`` where they lie in memory.
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
        # A rank that is spawned opens the files itself: they are not sent through a pipe.
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
            place=bytes(arrays.places[slice(*arrays.place_ends[index : index + 2])]).decode("utf-8", "surrogatepass"),
            ensemble=arrays.ensemble[offset : offset + len(responses)],
            reference_rewards=arrays.reference_rewards[slice(*arrays.reference_reward_ends[index : index + 2])],
            answers=self._answers(first + 1, len(responses)),
        )

    def _answers(self, segment: int, number: int) -> tuple[np.ndarray, ...] | None:
        """Of the responses from a segment on; they all are conversations, or none is."""
        arrays = self._arrays
        at = int(np.searchsorted(arrays.answer_segments, segment))
        if at == len(arrays.answer_segments) or arrays.answer_segments[at] != segment:
            return None
        ends = arrays.answer_ends[at : at + number + 1].tolist()
        return tuple(arrays.answers[a:b] for a, b in itertools.pairwise(ends))

    @property
    def num_responses(self) -> int:
        """Responses of all samples; they are numbered from 0 in the order of the samples."""
        return len(self._arrays.rewards)

    def response_offset(self, index: int) -> int:
        """The number of a sample's first response in the whole data set (``MicroBatch.response_ids``)."""
        return int(self._arrays.first_segment[index]) - index

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """``[N]`` int64 tokens of each sample's longest row: its prompt with its longest response."""
        sizes, first = np.diff(self._arrays.segment_ends), self._arrays.first_segment[:-1]
        prompts = sizes[first]
        sizes[first] = 0
        return prompts + np.maximum.reduceat(sizes, first) if len(self) else prompts

    @property
    def max_length(self) -> int:
        """Tokens of the longest prompt with one response; 0 where there is no sample."""
        return int(self.lengths.max(initial=0))

    @property
    def prompt_digests(self) -> np.ndarray:
        """``[N]`` uint64, equal for prompts of the same tokens."""
        return self._arrays.prompt_digests

    def reward_summary(self) -> RewardSummary:
        """What is known of the rewards of all responses."""
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
        """SHA-256 (hex) of tokens and boundaries in their order. Reference log-probs depend on nothing else here, so
        new rewards for the same responses leave it as it is."""
        if self._fingerprint is None:
            self._fingerprint = _fingerprint(self._arrays)
        return self._fingerprint

    def contents_fingerprint(self) -> str:
        """SHA-256 (hex) of all that is trained on: tokens, and rewards, labels and ensembles of the responses."""
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
        """Writes all of it to a folder, from which :func:`open_data` maps it into memory. One that is there stays.

        Raises:
            UserError: it cannot be written; nothing is left of it.
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
    """What :meth:`PreferenceData.save` has written there, memory-mapped and read-only; ``None`` unless it is whole.

    Every file has its size and its digest, of its whole content where it grows with the rows, and of both its ends
    where it grows with the tokens: gigabytes are not read to be checked.
    """
    try:
        text = json.loads((folder / _RECORD).read_text())
        record = text["record"]
        if text["digest"] != _record_digest(record) or record["format"] != FORMAT:
            return None
        arrays = {}
        for name, file in record["files"].items():
            path = folder / f"{name}.npy"
            # Before numpy reads it: of a damaged header it would make anything.
            if path.stat().st_size != file["bytes"] or _digest(path) != file["digest"]:
                return None
            # A plain view of the map: slices of numpy's own class for it cost several times as much.
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
    ranked, places, place_ends = bytearray(), bytearray(), array.array("q", [0])
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
        places += sample.place.encode("utf-8", "surrogatepass")
        place_ends.append(len(places))
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
        places=flat(places, np.uint8),
        place_ends=flat(place_ends, np.int64),
        answers=flat(answers, np.bool_),
        answer_ends=flat(answer_ends, np.int64),
        answer_segments=flat(answer_segments, np.int64),
    )


def _fingerprint(arrays: Arrays) -> str:
    digest = hashlib.sha256(b"nemo_rao preference data 1\n")  # not FORMAT: reference log-probs are found by it
    digest.update(np.array([len(arrays.ranked), len(arrays.segment_ends)], dtype="<i8").tobytes())
    for values, kind in ((arrays.first_segment, "<i8"), (arrays.segment_ends, "<i8"), (arrays.tokens, "<i4")):
        digest.update(np.ascontiguousarray(values, dtype=kind).data)
    for at, segment in enumerate(arrays.answer_segments):
        mask = arrays.answers[slice(*arrays.answer_ends[at : at + 2])]
        digest.update(np.array([segment], dtype="<i8").tobytes() + np.packbits(mask).tobytes())
    return digest.hexdigest()


def _digest(path: Path) -> str:
    """Of a file's content, or of both its ends."""
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
