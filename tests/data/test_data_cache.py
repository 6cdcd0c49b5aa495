"""Tokenized data on disk: the same samples, found again only where nothing that decides them has changed."""

import json
import multiprocessing
import os
import pickle
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from nemo_rao.batch import Sample
from nemo_rao.data import cache as cache_module
from nemo_rao.data.cache import READ_FROM_CACHE, DataCache
from nemo_rao.data.dataset import load_preferences
from nemo_rao.data.encode import load_tokenizer
from nemo_rao.data.mismatched import mismatched
from nemo_rao.data.store import PreferenceData, open_data
from nemo_rao.errors import UserError
from nemo_rao.runtime.files import one_at_a_time


def answer(number, **rewards):
    return {"content": f"Hello there {number}", **rewards}


SCORED = [
    {"prompt": "a", "responses": [answer(1, reward=1), answer(2, reward=0.5), answer(3, reward=0)]},
    {"prompt": "b c d", "responses": [answer(1, reward=0.25)]},
]
PAIRS = [{"prompt": "Which dog is it?", "chosen": "good", "rejected": "bad"}] * 2
ENSEMBLES = [{"prompt": "a", "responses": [answer(1, a=1, b=0), answer(2, a=0.5, b=3)]}] * 3
REFERENCE_REWARDS = [SCORED[0] | {"reference_rewards": [0.5, 1.5]}, SCORED[1], SCORED[0] | {"reference_rewards": [2]}]
TURNS = [
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Hello there 1"},
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Hello there 2"},
]
CONVERSATIONS = [{"messages": TURNS}, SCORED[0], {"messages": TURNS[:2]}, {"messages": TURNS}]
LONG = [{"prompt": "word " * 80, "responses": [answer(1, reward=1)]}]
KINDS = {
    "scored": (SCORED, {}),
    "pairs": (PAIRS, {}),
    "ensembles": (ENSEMBLES, {"reward_field": ["a", "b"]}),
    "reference rewards": (REFERENCE_REWARDS, {}),
    "conversations": (CONVERSATIONS, {}),
    "dropped rows": (SCORED + LONG, {}),
}


@pytest.fixture
def data_cache(tokenizers, tmp_path):
    return DataCache(tmp_path / "cache", tokenizers["own"])


def names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def assert_same(ours, theirs):
    assert len(ours) == len(theirs) and ours.num_responses == theirs.num_responses
    for a, b in zip(ours, theirs, strict=True):
        assert (a.ranked, a.location, a.answers is None) == (b.ranked, b.location, b.answers is None)
        for name in ("prompt", "rewards", "ensemble", "reference_rewards"):
            mine, other = getattr(a, name), getattr(b, name)
            assert mine.dtype == other.dtype and mine.shape == other.shape
            assert np.array_equal(mine, other, equal_nan=mine.dtype.kind == "f"), name
        for mine, other in zip((*a.responses, *(a.answers or ())), (*b.responses, *(b.answers or ())), strict=True):
            assert mine.dtype == other.dtype and np.array_equal(mine, other)
    assert (ours.report, str(ours.report)) == (theirs.report, str(theirs.report))
    assert ours.reward_summary() == theirs.reward_summary()
    assert ours.fingerprint() == theirs.fingerprint()
    assert ours.lengths.tolist() == [len(s.prompt) + max(map(len, s.responses)) for s in theirs]
    assert [ours.response_offset(i) for i in range(len(ours))] == [theirs.response_offset(i) for i in range(len(ours))]


# ------------------------------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_back_is_what_was_loaded_sample_by_sample(kind, data_cache, tokenizers, write_lines):
    records, options = KINDS[kind]
    path = write_lines(records)
    loaded = load_preferences(path, tokenizers["own"], seq_length=64, **options)
    first, said_first = data_cache.load(path, seq_length=64, **options)
    again, said_again = data_cache.load(path, seq_length=64, **options)
    assert (said_first, said_again) == ("", READ_FROM_CACHE)
    assert_same(first, loaded)
    assert_same(again, loaded)
    assert (
        mismatched(again, seq_length=64, seed=1).fingerprint()
        == mismatched(loaded, seq_length=64, seed=1).fingerprint()
    )


def test_a_tokenizer_that_cannot_be_saved_is_reported_and_nothing_is_cached(
    tokenizers, tmp_path, write_lines, monkeypatch
):
    def refuse(folder):
        raise ValueError("no vocabulary\nfile")

    monkeypatch.setattr(tokenizers["own"], "save_pretrained", refuse)
    data_cache, path = DataCache(tmp_path / "cache", tokenizers["own"]), write_lines(SCORED)
    for _ in range(2):
        data, remark = data_cache.load(path, seq_length=64)
        assert remark == " (not cached: the tokenizer cannot be saved, ValueError: no vocabulary file)"
        assert_same(data, load_preferences(path, tokenizers["own"], seq_length=64))
    assert names(tmp_path / "cache") == []


def test_fingerprints_are_those_that_reference_sums_on_disk_were_stored_under(tmp_path):
    """Of these samples it was computed by the package before data was kept on disk."""

    def sample(prompt, *responses, answers=None):
        arrays = tuple(np.array(response, np.int32) for response in responses)
        masks = None if answers is None else tuple(np.array(mask, bool) for mask in answers)
        nothing = np.zeros((len(arrays), 0)), np.zeros(0)
        return Sample(np.array(prompt, np.int32), arrays, np.zeros(len(arrays)), False, "p", *nothing, masks)

    samples = [sample([1, 2], [3, 4], [5]), sample([1], [6, 7, 8], answers=[[1, 0, 1]])]
    samples.append(sample([1, 300], [6] * 9, answers=[[1] * 4 + [0] * 4 + [1]]))
    data = PreferenceData(samples)
    assert data.fingerprint() == "b09484ece7e1495e56fd4604f5ea29d309b316477e1a25d71dc7e403af0d7c86"
    data.save(tmp_path / "data")
    assert_same(open_data(tmp_path / "data"), data)


def test_places_keep_what_is_no_text(tmp_path, tokenizers, write_lines):
    folder = tmp_path / os.fsdecode(b"caf\xe9 \xc3\xa9")  # a byte that is no UTF-8
    folder.mkdir()
    path = shutil.move(write_lines(SCORED), folder)
    data_cache = DataCache(tmp_path / "cache", tokenizers["own"])
    assert [data_cache.load(path, seq_length=64)[0][i].location for i in (0, 1)] == [f"{path} line {n}" for n in (1, 2)]


def test_it_is_memory_mapped_read_only_and_opened_not_sent_to_a_spawned_process(data_cache, write_lines):
    path = write_lines(SCORED * 200)
    for data, _ in (data_cache.load(path, seq_length=64), data_cache.load(path, seq_length=64)):
        maps = Path("/proc/self/maps").read_text()
        assert data.folder is not None and str(data.folder / "tokens.npy") in maps
        for values in vars(data._arrays).values():
            assert not values.flags.writeable and type(values) is np.ndarray
        with pytest.raises(ValueError, match="read-only"):
            data[0].prompt[0] = 5
        sent = pickle.dumps(data)
        assert len(sent) < 1000
        assert_same(pickle.loads(sent), data)


def test_data_in_memory_is_pickled_whole(tokenizers, write_lines):
    data = load_preferences(write_lines(CONVERSATIONS), tokenizers["own"], seq_length=64)
    assert_same(pickle.loads(pickle.dumps(data)), data)


# ------------------------------------------------------------------------------------------------------- the key


OPTIONS = {
    "seq_length": 32,
    "num_responses": 2,
    "min_responses": 0,
    "needs_rewards": True,
    "needs_preference": True,
    "needs_pairs": True,
    "needs_shared_first_token": True,
    "responses": "best_worst",
    "pairs_by": "reward",
    "seed": 1,
    "strict": True,
    "bad_rows": "drop",
    "max_bad_rows": 0.5,
    "truncated": "without_end",
    "chat_template": "never",
    "template_arguments": {"enable_thinking": False},
    "answers": "verbatim",
    "reward_field": "reward",
    "columns": {"prompt": "prompt"},
    "ignore_fields": ["source"],
    "max_rows": 1,
}


def test_another_option_is_other_data(data_cache, write_lines):
    path = write_lines(SCORED[:1])
    assert data_cache.load(path, seq_length=64)[1] == ""
    for name, value in OPTIONS.items():
        assert data_cache.load(path, **({"seq_length": 64} | {name: value}))[1] == "", name
    for name, value in OPTIONS.items():
        assert data_cache.load(path, **({"seq_length": 64} | {name: value}))[1] == READ_FROM_CACHE, name


def test_every_option_of_loading_is_one_of_these():
    import inspect

    others = {"paths", "tokenizer", "progress", "observer", "needed_by"}
    assert set(inspect.signature(load_preferences).parameters) == set(OPTIONS) | others


def test_who_asks_is_no_part_of_the_data(data_cache, write_lines):
    path = write_lines(SCORED)
    data_cache.load(path, seq_length=64, needed_by="objective rao")
    assert data_cache.load(path, seq_length=64, needed_by="objective dpo")[1] == READ_FROM_CACHE


def test_a_file_with_other_content_is_other_data_even_with_its_old_size_and_time(data_cache, write_lines):
    path = Path(write_lines(SCORED))
    before, _ = data_cache.load(path, seq_length=64)
    stamp, text = path.stat(), path.read_text()
    path.write_text(text.replace("there 1", "there 7"))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert path.stat().st_size == stamp.st_size
    after, said = data_cache.load(path, seq_length=64)
    assert said == "" and after.fingerprint() != before.fingerprint()
    path.write_text(text)
    assert data_cache.load(path, seq_length=64)[1] == READ_FROM_CACHE


def test_the_same_files_in_another_order_or_under_another_name_are_other_data(data_cache, write_lines):
    a, b = write_lines(SCORED, "a.jsonl"), write_lines(PAIRS, "b.jsonl")
    assert data_cache.load([a, b], seq_length=64)[1] == ""
    assert data_cache.load([b, a], seq_length=64)[1] == ""
    shutil.copy(a, Path(a).with_name("c.jsonl"))
    assert data_cache.load(str(Path(a).with_name("c.jsonl")), seq_length=64)[0][0].location.endswith("c.jsonl line 1")
    assert data_cache.load(str(Path(a).with_name("[ab].jsonl")), seq_length=64)[1] == READ_FROM_CACHE  # these two


def test_another_tokenizer_is_other_data_and_the_same_one_elsewhere_is_not(tmp_path, tokenizer_folder, write_lines):
    path, folder = write_lines(SCORED), tmp_path / "cache"

    def load(name=None, change=None):
        copy = tmp_path / "tokenizer"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(tokenizer_folder, copy)
        if name is not None:
            before = (copy / name).read_text()
            (copy / name).write_text(change(before))
            assert (copy / name).read_text() != before
        return DataCache(folder, load_tokenizer(copy)).load(path, seq_length=64)[1]

    def without_a_merge(text):
        settings = json.loads(text)
        settings["model"]["merges"].pop()
        return json.dumps(settings)

    own = DataCache(folder, load_tokenizer(tokenizer_folder))
    assert own.load(path, seq_length=64)[1] == ""
    assert load() == READ_FROM_CACHE
    assert load("chat_template.jinja", lambda text: text.replace("{{ bos_token }}", "{{ bos_token }}Hi ")) == ""
    assert (
        load("tokenizer_config.json", lambda text: text.replace('"eos_token": "<|end|>"', '"eos_token": "<|pad|>"'))
        == ""
    )
    assert load("tokenizer.json", without_a_merge) == ""
    assert load() == READ_FROM_CACHE


def test_what_a_tokenizer_was_used_for_makes_no_other_tokenizer_of_it(tmp_path, tokenizer_folder, write_lines):
    """Its file may ask for padding, which the first call takes back: training data would be found, validation not."""
    copy = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_folder, copy)
    settings = json.loads((copy / "tokenizer.json").read_text())
    settings["padding"] = {
        "strategy": "BatchLongest",
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|pad|>",
    }
    (copy / "tokenizer.json").write_text(json.dumps(settings))
    a, b = write_lines(SCORED, "a.jsonl"), write_lines(PAIRS, "b.jsonl")
    for said in ("", READ_FROM_CACHE):
        data_cache = DataCache(tmp_path / "cache", load_tokenizer(copy))
        assert [data_cache.load(path, seq_length=64)[1] for path in (a, b)] == [said, said]


@pytest.mark.parametrize("what", ["_version", "_code_digest"])
def test_another_version_of_what_tokenizes_makes_other_data(what, data_cache, write_lines, monkeypatch):
    path = write_lines(SCORED)
    data_cache.load(path, seq_length=64)
    monkeypatch.setattr(cache_module, what, lambda *_: "another")
    assert data_cache.load(path, seq_length=64)[1] == ""


def test_a_saved_data_set_is_known_by_its_files(data_cache, tmp_path):
    import datasets

    folder = tmp_path / "saved"
    for number, said in ((1, ""), (1, READ_FROM_CACHE), (2, "")):
        if said == "":
            shutil.rmtree(folder, ignore_errors=True)
            datasets.Dataset.from_list([{"prompt": "p", "responses": [answer(number, reward=1)]}]).save_to_disk(folder)
        assert data_cache.load(str(folder), seq_length=64)[1] == said


def test_what_may_be_other_data_tomorrow_is_not_kept(data_cache, tokenizers, tmp_path, write_lines, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list(SCORED))
    path = write_lines(SCORED)
    today = load_tokenizer(tokenizers["own"].name_or_path)
    today.chat_template = "{{ strftime_now('%d %b %Y') }}" + today.chat_template
    given = load_tokenizer(tokenizers["own"].name_or_path)
    given.chat_template = "{{ date_string or strftime_now('%d %b %Y') }}" + given.chat_template
    for _ in range(2):
        assert data_cache.load("hf:some/name:train", seq_length=64)[1] == ""
        assert DataCache(tmp_path / "cache", today).load(path, seq_length=64)[1] == ""
    assert names(tmp_path / "cache") == []
    said = [DataCache(tmp_path / "cache", given).load(path, seq_length=64)[1] for _ in range(2)]
    assert said == ["", READ_FROM_CACHE]


# --------------------------------------------------------------------------------------------- errors and damage


def test_errors_are_those_of_loading_and_keep_nothing(data_cache, tmp_path, write_lines):
    path = write_lines(SCORED + LONG)
    for given, options, message in (
        (path, {"strict": True}, "strict: no row may be dropped"),
        (path, {"min_responses": 2}, "line 2: has 1 responses, but the objective needs at least 2"),
        (path, {"chat_template": "sometimes"}, "chat_template is 'sometimes'"),
        (path, {"reward_field": []}, "names no field"),
        (str(tmp_path / "nope.jsonl"), {}, "no such file"),
        (str(tmp_path), {}, "not a directory written by"),
        (write_lines(["{"], "broken.jsonl"), {}, "invalid JSON"),
    ):
        for _ in range(2):
            with pytest.raises(UserError, match=message):
                data_cache.load(given, **({"seq_length": 64} | options))
    assert not (tmp_path / "cache").exists()


def test_files_that_change_while_they_are_read_are_not_kept(data_cache, tmp_path, write_lines):
    path = write_lines(SCORED)

    def change(rows):
        with open(path, "a") as file:
            file.write(json.dumps(PAIRS[0]) + "\n")

    assert "changed while they were read" in data_cache.load(path, seq_length=64, progress=change)[1]
    assert names(tmp_path / "cache") == []


def damages():
    def empty(folder, name):
        (folder / name).write_bytes(b"")

    def cut(folder, name):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1])

    def flip(folder, name):
        content = bytearray((folder / name).read_bytes())
        content[-2] ^= 4
        (folder / name).write_bytes(bytes(content))

    def header(folder, name):
        content = bytearray((folder / name).read_bytes())
        content[12] ^= 4
        (folder / name).write_bytes(bytes(content))

    def missing(folder, name):
        (folder / name).unlink()

    return {f.__name__: f for f in (empty, cut, flip, header, missing)}


@pytest.mark.parametrize("damage", damages())
@pytest.mark.parametrize("name", ["data.json", "tokens.npy", "segment_ends.npy", "locations.npy", "answers.npy"])
def test_a_damaged_folder_is_not_opened_but_written_anew(name, damage, data_cache, write_lines, tmp_path):
    path = write_lines(CONVERSATIONS)
    whole, _ = data_cache.load(path, seq_length=64)
    (folder,) = (tmp_path / "cache").iterdir()
    damages()[damage](folder, name)
    assert open_data(folder) is None
    rebuilt, said = data_cache.load(path, seq_length=64)
    assert said == "" and rebuilt.folder == folder
    assert data_cache.load(path, seq_length=64)[1] == READ_FROM_CACHE
    assert rebuilt.fingerprint() == whole.fingerprint()
    assert names(tmp_path / "cache") == [folder.name]


def test_a_file_of_that_name_is_no_data(data_cache, write_lines, tmp_path):
    path = write_lines(SCORED)
    (folder,) = [data_cache.load(path, seq_length=64)[0].folder]
    shutil.rmtree(folder)
    folder.write_text("")
    assert data_cache.load(path, seq_length=64)[1] == ""
    assert data_cache.load(path, seq_length=64)[1] == READ_FROM_CACHE


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError])
def test_an_interrupted_write_leaves_nothing(error, data_cache, tmp_path, write_lines, monkeypatch):
    written, save = [], np.save

    def interrupted(path, values, **arguments):
        if len(written) == 3:
            raise error
        written.append(path)
        save(path, values, **arguments)

    monkeypatch.setattr(np, "save", interrupted)
    path = write_lines(SCORED)
    if error is OSError:  # a full disk costs the cache, not the run
        data, said = data_cache.load(path, seq_length=64)
        assert said.startswith(" (not cached: ") and "cannot be written" in said and len(data) == 2
    else:
        with pytest.raises(error):
            data_cache.load(path, seq_length=64)
    assert len(written) == 3 and names(tmp_path / "cache") == []


def test_a_folder_that_cannot_be_written_costs_the_cache_and_not_the_run(tokenizers, tmp_path, write_lines):
    (tmp_path / "file").write_text("")
    data, said = DataCache(tmp_path / "file" / "cache", tokenizers["own"]).load(write_lines(SCORED), seq_length=64)
    assert len(data) == 2 and data.folder is None and "Not a directory" in said


# ------------------------------------------------------------------------------------------------ several processes


def _load(folder, tokenizer, path, results):
    results.put((os.getpid(), DataCache(folder, load_tokenizer(tokenizer)).load(path, seq_length=64)[1]))


def test_of_processes_at_once_one_loads_and_the_others_read(tmp_path, tokenizer_folder, write_lines):
    path = write_lines([{"prompt": f"{n}", "responses": [answer(n, reward=1)]} for n in range(500)])
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    arguments = (tmp_path / "cache", tokenizer_folder, path, results)
    processes = [context.Process(target=_load, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    said = [results.get()[1] for _ in processes]
    for process in processes:
        process.join()
    assert sorted(said) == ["", READ_FROM_CACHE, READ_FROM_CACHE]
    assert len(names(tmp_path / "cache")) == 1


def test_without_locks_whoever_is_first_wins(tmp_path, tokenizers, write_lines, monkeypatch):
    """Both load, and both write: the second finds the first one's folder in its place."""
    import fcntl

    def refuse(*_):
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    path, folder = write_lines(SCORED), tmp_path / "cache"
    first, second = (DataCache(folder, tokenizers["own"]) for _ in range(2))
    seen = []

    def meanwhile(rows):
        seen.append(first.load(path, seq_length=64)[1])

    data, said = second.load(path, seq_length=64, progress=meanwhile)
    assert (seen, said) == ([""], "") and data.folder is not None
    assert len([name for name in names(folder) if not name.endswith(".lock")]) == 1


def test_what_a_killed_process_has_left_is_removed_and_its_lock_is_free(tmp_path, tokenizers, write_lines):
    path, folder = write_lines(SCORED), tmp_path / "cache"
    process = multiprocessing.get_context("fork").Process(
        target=_die_while_saving, args=(folder, tokenizers["own"], path)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert any(name.endswith(".tmp") for name in names(folder)) and any(
        name.endswith(".lock") for name in names(folder)
    )
    data, said = DataCache(folder, tokenizers["own"]).load(path, seq_length=64)
    assert said == "" and names(folder) == [data.folder.name]


def _die_while_saving(folder, tokenizer, path):
    np.save = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    DataCache(folder, tokenizer).load(path, seq_length=64)


def test_a_waiting_process_says_so_and_enters_when_the_other_has_left(tmp_path):
    context = multiprocessing.get_context("fork")
    events, inside = context.SimpleQueue(), tmp_path / "inside"

    def other():
        with one_at_a_time(tmp_path / "key", waiting=lambda: events.put("waiting")) as alone:
            events.put((alone, inside.exists()))

    with one_at_a_time(tmp_path / "key") as alone:
        assert alone
        inside.touch()
        process = context.Process(target=other)
        process.start()
        assert events.get() == "waiting"
        inside.unlink()
    assert events.get() == (True, False)
    process.join()
    assert names(tmp_path) == []


def test_folders_made_for_nothing_are_removed_and_others_stay(tmp_path):
    (tmp_path / "there").mkdir()
    with one_at_a_time(tmp_path / "there" / "runs" / "cache" / "key"):
        assert names(tmp_path / "there" / "runs") == ["cache"]
    assert names(tmp_path) == ["there"] and names(tmp_path / "there") == []
    with one_at_a_time(tmp_path / "there" / "runs" / "cache" / "key"):
        (tmp_path / "there" / "runs" / "mine").touch()
    assert names(tmp_path / "there" / "runs") == ["mine"]
