"""Items made on a thread: in their order, no more than asked for, and no thread left behind."""

import threading
import traceback

import pytest

from nemo_rao.data.prefetch import Prefetcher


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not prefetch_threads()


@pytest.mark.parametrize("num_ahead", [1, 2, 7])
@pytest.mark.parametrize("size", [0, 1, 5, 200])
def test_every_item_comes_once_in_order_and_then_the_end_again_and_again(size, num_ahead):
    with Prefetcher(iter(range(size)), num_ahead) as ahead:
        assert list(ahead) == list(range(size))
        assert list(ahead) == []


def test_items_are_made_on_another_thread_before_they_are_asked_for_and_no_more_than_so_many():
    made, makers, enough = [], set(), threading.Event()

    def items():
        for number in range(10):
            made.append(number)
            makers.add(threading.current_thread().name)
            if len(made) == limit:
                enough.set()
            yield number

    limit = 3
    with Prefetcher(items(), num_ahead=3) as ahead:
        assert enough.wait(10)
        enough.clear()
        limit = 4
        assert next(ahead) == 0
        assert enough.wait(10)
    assert made == [0, 1, 2, 3] and makers == {"prefetch"}


def test_nothing_is_made_before_the_block_begins():
    made = []
    ahead = Prefetcher(made.append(number) or number for number in range(3))
    assert made == [] and not prefetch_threads()
    with ahead:
        assert list(ahead) == [0, 1, 2]


def test_what_the_iterator_raises_comes_in_its_place_with_its_traceback_and_again():
    def items():
        yield 1
        yield 2
        a_mistake_in_the_data()

    def a_mistake_in_the_data():
        raise KeyError("row 3")

    with Prefetcher(items()) as ahead:
        assert [next(ahead), next(ahead)] == [1, 2]
        for _ in range(2):
            with pytest.raises(KeyError, match="row 3") as caught:
                next(ahead)
            assert "a_mistake_in_the_data" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]


def test_what_cannot_be_iterated_raises_for_its_consumer():
    with Prefetcher(None) as ahead, pytest.raises(TypeError, match="not iterable"):
        next(ahead)


def test_the_thread_ends_with_the_block_however_it_is_left():
    def forever():
        while True:
            yield 0

    with pytest.raises(KeyboardInterrupt), Prefetcher(forever()) as ahead:
        next(ahead)
        raise KeyboardInterrupt
    assert not prefetch_threads()

    def generator():
        with Prefetcher(forever()) as ahead:
            yield from ahead

    running = generator()
    next(running)
    assert len(prefetch_threads()) == 1
    running.close()
    assert not prefetch_threads()


def test_closing_in_the_midst_of_an_item_waits_for_it_and_who_asks_then_is_not_kept_waiting():
    begun, go_on = threading.Event(), threading.Event()

    def slow():
        yield 0
        begun.set()
        go_on.wait(10)
        yield 1
        raise AssertionError("asked for more")

    ahead = Prefetcher(slow(), num_ahead=2)
    with ahead:
        assert begun.wait(10)
        threading.Timer(0.05, go_on.set).start()
        ahead.close()
        assert not prefetch_threads()
        assert list(ahead) == [0, 1]
    ahead.close()
