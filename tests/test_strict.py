"""Strict building: what people write is taken as it is, or refused with a sentence that names the place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from slimdit.strict import build, nearest


@dataclass(frozen=True)
class Options:
    steps: int
    rate: float = 1.0
    kind: Literal["a", "b"] = "a"
    names: tuple[str, ...] = ()
    pair: tuple[int, int] | None = None
    margin: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError("steps must be at least 1")


def test_values_arrive_in_their_types() -> None:
    values = {"steps": 2, "rate": 3, "kind": "b", "names": ["x"], "pair": [1, 2], "margin": {"fid": 1}}
    built = build(Options, values, "o")
    assert built == Options(2, 3.0, "b", ("x",), (1, 2), {"fid": 1.0})
    assert isinstance(built.rate, float) and isinstance(built.margin["fid"], float)
    assert build(Options, {"steps": 1, "pair": None}, "o").pair is None


@pytest.mark.parametrize(("values", "said"), [
    ({}, "o: 'steps' is missing"),
    ({"step": 1}, "o: 'step' is not an option; did you mean 'steps'?"),
    ({"steps": True}, "o: steps: expected int, not True"),
    ({"steps": 1.5}, "o: steps: expected int"),
    ({"steps": "1"}, "o: steps: expected int"),
    ({"steps": 0}, "o: steps must be at least 1"),
    ({"steps": 1, "kind": "c"}, "o: kind: 'c' is unknown; use one of: a, b"),
    ({"steps": 1, "names": "x"}, "o: names: expected a list"),
    ({"steps": 1, "names": [1]}, "o: names: expected str"),
    ({"steps": 1, "pair": [1]}, "o: pair: expected 2 values, not 1"),
    ({"steps": 1, "margin": {"fid": "x"}}, "o: margin.fid: expected float"),
    ([1], "o: expected a table of options"),
])
def test_anything_else_is_refused_with_its_place(values: Any, said: str) -> None:
    with pytest.raises(ValueError) as refusal:
        build(Options, values, "o")
    assert said in str(refusal.value)


@dataclass(frozen=True)
class Outer:
    """One dataclass in another."""

    inner: Options | None = None


def test_a_dataclass_within_is_read_as_strictly() -> None:
    assert build(Outer, {"inner": {"steps": 2}}, "o") == Outer(Options(2)) == build(Outer, {"inner": Options(2)}, "o")
    assert build(Outer, {"inner": None}, "o") == Outer()
    for inner, said in (({"step": 2}, "o: inner: 'step' is not an option"), ({"steps": 0}, "steps must be at least 1"),
                        (3, "o: inner: expected Options, not 3")):
        with pytest.raises(ValueError, match=said):
            build(Outer, {"inner": inner}, "o")


def test_nearest() -> None:
    assert nearest("quantise", ["quantize", "compile"]) == "did you mean 'quantize'?"
    assert nearest("zzz", ["b", "a"]) == "use one of: a, b"
    assert nearest("zzz", []) == "use one of: none"
