"""keys.check and keys.make: every kind of field that configs use."""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pytest

from nemo_rao.errors import UserError
from nemo_rao.keys import check, key, make


@dataclass(frozen=True)
class Inner:
    either: float | Literal["auto"] = key(50.0, "nats")
    positive: float = key(0.1, "weight", low=0, exclusive=True)


@dataclass
class Outer:
    inner: Inner = field(default_factory=Inner)
    number: int | None = key(None, "steps", low=1)
    rates: list[float] = key([0.1, 0.2], "rates", low=0, high=1)
    name: str | None = key(None, "name", choices=(None, "x"))
    always: bool = key(True, "always", choices=(True,))
    extra: dict[str, Any] = key({}, "extra")
    pair: tuple[int, float] = (1, 2.0)
    many: tuple[int, ...] = ()
    anything: Any = key(None, "anything")
    steps: list[int] | None = key(None, "steps", low=1)
    weights: dict[str, float] = key({}, "")


@dataclass
class Texts:
    text: str = ""
    texts: dict[str, str] = key({}, "")


@dataclass
class Names:
    names: list[str] = key([], "names")


@dataclass
class Group:
    group: Names = field(default_factory=Names)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"inner": Inner("auto", 1)},
        {"number": 1, "rates": [0, 1.0], "name": "x", "extra": {"a": [1]}, "many": (1, 2), "anything": object()},
        {"rates": [], "steps": [1], "weights": {"a": 1, "b": -0.5}, "pair": (2, np.float64(0.5))},
    ],
)
def test_allowed_values_pass(keys: dict) -> None:
    check(Outer(**keys), "model")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"inner": Inner("aut")}, "m.inner.either='aut': must be a number or 'auto' (nats)"),
        ({"inner": Inner(True)}, "m.inner.either=True: must be a number or 'auto' (nats)"),
        ({"inner": Inner(float("inf"))}, "m.inner.either=inf: must be finite (nats)"),
        ({"inner": Inner(1.0, 0.0)}, "m.inner.positive=0.0: must be > 0 (weight)"),
        ({"inner": Inner(1.0, float("nan"))}, "m.inner.positive=nan: must be finite (weight)"),
        ({"inner": 3}, "m.inner=3: must be a group of keys"),
        ({"number": 0}, "m.number=0: must be >= 1 (steps)"),
        ({"number": 1.0}, "m.number=1.0: must be an integer or null (steps)"),
        ({"number": True}, "m.number=True: must be an integer or null (steps)"),
        ({"rates": [0.5, 2]}, "m.rates=[0.5, 2]: must be <= 1 (rates)"),
        ({"rates": [0.5, "a"]}, "m.rates=[0.5, 'a']: must be a list, each item a number (rates)"),
        ({"rates": 0.5}, "m.rates=0.5: must be a list, each item a number (rates)"),
        ({"name": "y"}, "m.name='y': must be one of null, 'x' (name)"),
        ({"always": False}, "m.always=False: must be one of True (always)"),
        ({"always": 1}, "m.always=1: must be true or false (always)"),
        ({"extra": {1: 2}}, "m.extra={1: 2}: must be a dictionary, each name text, each value anything (extra)"),
        ({"extra": 3}, "m.extra=3: must be a dictionary, each name text, each value anything (extra)"),
        ({"number": "3"}, "m.number='3': must be an integer or null (steps)"),
        ({"inner": Inner(-1.0, 0.0)}, "m.inner.positive=0.0: must be > 0 (weight)"),
        ({"number": -1, "name": "y"}, "m.number=-1: must be >= 1 (steps)"),
        ({"pair": (1, "a")}, "m.pair=(1, 'a'): must be a list of an integer and a number"),
        ({"many": (1, "a")}, "m.many=(1, 'a'): must be a list, each item an integer"),
        ({"many": {1, 2}}, "m.many={1, 2}: must be a list, each item an integer"),
        ({"pair": (1,)}, "m.pair=(1,): must be a list of an integer and a number"),
        ({"rates": (0.1, 0.2)}, "m.rates=(0.1, 0.2): must be a list, each item a number (rates)"),
        ({"rates": [0.1, True]}, "m.rates=[0.1, True]: must be a list, each item a number (rates)"),
        ({"rates": [0.1, None]}, "m.rates=[0.1, None]: must be a list, each item a number (rates)"),
        ({"rates": [0.1, float("nan")]}, "m.rates=[0.1, nan]: must be finite (rates)"),
        ({"steps": [3, 0]}, "m.steps=[3, 0]: must be >= 1 (steps)"),
        ({"steps": [3, 2.0]}, "m.steps=[3, 2.0]: must be a list, each item an integer or null (steps)"),
        ({"weights": {"a": True}}, "m.weights={'a': True}: must be a dictionary, each name text, each value a number"),
        ({"weights": {"a": None}}, "m.weights={'a': None}: must be a dictionary, each name text, each value a number"),
        ({"weights": {"a": float("inf")}}, "m.weights={'a': inf}: must be finite"),
        ({"weights": {1: 1.0}}, "m.weights={1: 1.0}: must be a dictionary, each name text, each value a number"),
        ({"inner": {"either": 3.0}}, "m.inner={'either': 3.0}: must be a group of keys"),
        ({"inner": Texts()}, "m.inner=Texts(text='', texts={}): must be a group of keys"),
        ({"number": np.int64(3)}, f"m.number={np.int64(3)!r}: must be an integer or null (steps)"),
    ],
)
def test_any_other_value_is_refused_by_its_full_name(keys: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        check(Outer(**keys), "m")
    assert str(error.value) == message


def test_without_a_prefix_names_start_at_the_config() -> None:
    with pytest.raises(UserError, match=r"^number=0"):
        check(Outer(number=0))


def test_a_config_is_made_from_what_yaml_holds() -> None:
    made = make(Outer, {"inner": {"either": 3}, "rates": [1, 0], "pair": [1, 2], "many": [3]})
    assert made == Outer(inner=Inner(3.0), rates=[1.0, 0.0], pair=(1, 2.0), many=(3,))
    assert type(made.inner.either) is float and type(made.pair[1]) is float
    weights = make(Outer, {"weights": {"a": 1}}).weights
    assert weights == {"a": 1.0} and type(weights["a"]) is float
    assert make(Outer, {}) == Outer()


def test_a_single_text_is_made_a_list_in_every_group_and_is_no_list_in_a_config() -> None:
    assert make(Group, {"group": {"names": "a, b"}}) == Group(Names(["a, b"]))
    assert make(Group, {"group": {"names": ["a", "b"]}}) == Group(Names(["a", "b"]))
    keys: dict[str, Any] = {"names": "a"}
    with pytest.raises(UserError, match=r"^names='a': must be a list, each item text \(names\)$"):
        check(Names(**keys))
    with pytest.raises(UserError, match=r"^group\.names=7: must be a list, each item text \(names\)$"):
        make(Group, {"group": {"names": 7}})


def test_numbers_are_text_only_where_that_is_asked_for() -> None:
    assert make(Outer, {"extra": {"a": 1}, "name": None}, numbers_as_text=True).extra == {"a": 1}
    assert make(Texts, {"text": 4, "texts": {"a": 1.5}}, numbers_as_text=True) == Texts("4", {"a": "1.5"})
    for wrong in ({"text": 4}, {"texts": {"a": 1}}):
        with pytest.raises(UserError, match="text"):
            make(Texts, wrong)
    with pytest.raises(UserError, match=r"^text=True: must be text$"):
        make(Texts, {"text": True}, numbers_as_text=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rats": [0.1]}, "unknown key m.rats; did you mean rates?"),
        ({"inner": {"positve": 1}}, "unknown key m.inner.positve; did you mean positive?"),
        ({"inner": {"x": 1}}, "unknown key m.inner.x; there are either, positive"),
        ({"number": 0, "rats": []}, "unknown key m.rats; did you mean rates?"),
        ({"inner": {"positive": "1"}}, "m.inner.positive='1': must be a number (weight)"),
        ({"inner": None}, "m.inner=None: must be a group of keys"),
        ({"inner": {"inner": 3}}, "unknown key m.inner.inner; did you mean either?"),
        ({"inner": {"either": {"either": 3}}}, "m.inner.either={'either': 3}: must be a number or 'auto' (nats)"),
        (
            {1: 2},
            "unknown key m.1; there are inner, number, rates, name, always, extra, pair, many, anything, steps, "
            "weights",
        ),
    ],
)
def test_unknown_keys_and_wrong_values_of_a_mapping_are_refused(values: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        make(Outer, values, "m")
    assert str(error.value) == message
