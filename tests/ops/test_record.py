"""A record must be what a frozen dataclass of keyword arguments is."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict, dataclass, field, fields, is_dataclass, replace

import pytest

from deformconv.ops.record import record


@record(frozen=True, kw_only=True)
class Size:
    """A size."""

    rows: int
    columns: int = 3
    name: str = "none"

    @property
    def area(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True, kw_only=True)
class Plain:
    rows: int
    columns: int = 3
    name: str = "none"


@record(frozen=True, kw_only=True, eq=False)
class Named:
    first: str
    last: str = ""
    whole: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "whole", f"{self.first} {self.last}")


def test_it_is_a_dataclass_to_everybody():
    size, plain = Size(rows=2), Plain(rows=2)
    assert is_dataclass(size)
    assert [one.name for one in fields(size)] == [one.name for one in fields(plain)]
    assert asdict(size) == asdict(plain) == {"rows": 2, "columns": 3, "name": "none"}
    assert repr(size) == repr(plain).replace("Plain", "Size")
    assert size.area == 6
    assert replace(size, columns=5) == Size(columns=5, rows=2) != size
    assert Named(first="Ada").whole == "Ada "
    assert replace(Named(first="Ada"), last="Lovelace").whole == "Ada Lovelace"


def test_records_of_equal_fields_are_equal():
    one, same = Size(rows=2, name="a"), Size(name="a", rows=2)
    assert one == same and hash(one) == hash(same) == hash((2, 3, "a"))
    assert hash(one) == hash(one) and len({one, same}) == 1
    assert one != Size(rows=2) and one != Plain(rows=2, name="a") and one != (2, 3, "a")
    assert hash(replace(one, rows=3)) != hash(one)
    assert Named(first="a") != Named(first="a")
    assert len({Named(first="a"), Named(first="a")}) == 2


def test_copies_leave_the_hash_behind():
    """That of a text is another one in another process."""
    size = Size(rows=2)
    hash(size)
    for made in (pickle.loads(pickle.dumps(size)), copy.copy(size), copy.deepcopy(size)):
        assert made == size and "_hash" not in vars(made)
        assert hash(made) == hash(size)


def test_what_does_not_fit_is_an_error():
    size = Size(rows=2)
    with pytest.raises(FrozenInstanceError, match="`rows` of Size was set; expected no change: make another by `replace`"):
        size.rows = 3  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError, match="`rows` of Size was deleted; expected no change"):
        del size.rows  # type: ignore[misc]
    with pytest.raises(TypeError, match="Size was made of columns; expected rows, columns, name"):
        Size(columns=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="Size was made of rows, depth; expected rows, columns, name"):
        Size(rows=3, depth=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="positional"):
        Size(3)  # type: ignore[misc]
    with pytest.raises(TypeError, match="Named was made of first, whole; expected first, last"):
        Named(first="a", whole="b")  # type: ignore[call-arg]
    assert size.rows == 2


def test_no_method_is_compiled_for_a_record():
    """That is what it is for: `dataclass` calls `exec` for each class."""
    code = (
        "import sys, deformconv.ops.record as module\n"
        "events = []\n"
        "sys.addaudithook(lambda event, _: events.append(event))\n"
        "class Size:\n    'a docstring, else dataclass writes one'\n"
        "Size.__annotations__ = {'rows': int, 'columns': int}\n"
        "module.record(frozen=True, kw_only=True)(Size)\n"
        "compiled = events.count('compile')\n"
        "module.dataclass(frozen=True)(type('Plain', (), {'__annotations__': {'rows': int}}))\n"
        "print(compiled, events.count('compile') > 0, Size(rows=1, columns=2).columns)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["0", "True", "2"]
