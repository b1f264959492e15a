"""What slimdit.compiling promises: compiled where it pays, all that a run calls compiled before it, and it is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slimdit import compiling, pipeline
from slimdit.compiling import COLD, OPENVINO, SAVED, WARM, as_asked, choose, decide, marker, shapes, warm_up
from slimdit.pipeline import Pipeline, Runtime
from slimdit.sampling.settings import Caching, Sampling

from .test_methods import small_pipeline


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What a compiled model was called with: its function's name and the rows; nothing is compiled."""
    calls: list[tuple[str, int]] = []

    def compiled(function: Any) -> Any:
        def wrapped(x: torch.Tensor, t: torch.Tensor, *others: Any) -> Any:
            calls.append((function.__name__, len(t)))
            return function(x, t, *others)
        return wrapped

    monkeypatch.setattr(pipeline, "compiled", compiled)
    return calls


def compiled_pipeline(**sampling: Any) -> Pipeline:
    return small_pipeline().replace(runtime=Runtime(compile=True), sampling=Sampling(**sampling))


@pytest.mark.parametrize("known", [False, True])
def test_it_pays_from_where_what_is_saved_is_more_than_compiling_takes(known: bool) -> None:
    once, each = WARM if known else COLD
    enough = (once + each * 12) / SAVED / 0.1
    assert not decide(int(enough) - 1, 0.1, 12, known=known).pays
    assert decide(int(enough) + 2, 0.1, 12, known=known).pays
    assert decide(1000, 0.1, 12, known=True).compiling < decide(1000, 0.1, 12, known=False).compiling
    in_openvino = decide(1000, 0.1, 12, known=known, engine="openvino")
    assert in_openvino.compiling == OPENVINO[0] + 12 * OPENVINO[1] < decide(1000, 0.1, 12, known=True).compiling


def test_a_short_run_is_left_as_it_is_and_a_long_one_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compiled_pipeline(steps=10, guidance=1.5)
    ticks = iter(range(100))
    monkeypatch.setattr(compiling.time, "perf_counter", lambda: float(next(ticks)))  # every call takes a second
    short, long = choose(model, 1, 1), choose(model, 200, 10)
    assert (short.evaluations, long.evaluations, short.seconds) == (10, 200, 1.0)
    assert long.pays and short.pays is (short.compiling < 10 * SAVED)
    assert "not compiled" in decide(1, 0.1, 2, known=False).sentence() and long.sentence().startswith("compiled")


def test_what_is_compiled_before_is_known_for_the_same_model_batch_and_runtime(called: list) -> None:
    model = compiled_pipeline(steps=4, guidance=1.5)
    assert not marker(model, 2).exists()
    assert warm_up(model, 2) > 0 and marker(model, 2).exists()
    others = [(model, 3), (model.replace(runtime=Runtime("bfloat16", compile=True)), 2),
              (model.replace(sampling=Sampling(steps=4, guidance=1.0)), 2)]
    assert not any(marker(other, batch).exists() for other, batch in others)


@pytest.mark.parametrize(("sampling", "expected"), [
    ({"steps": 4, "guidance": 1.5}, [("step", 4)]), ({"steps": 4, "guidance": 1.0}, [("step", 2)]),
    ({"steps": 4, "guidance": 1.5, "solver": "ddpm"}, [("step", 4)]),
    ({"steps": 4, "guidance": 1.5, "solver": "unipc"}, [("step", 4)]),
    ({"steps": 4, "guidance": 1.5, "guidance_interval": (0, 500)}, [("step", 4), ("step", 2)]),
    ({"steps": 4, "guidance": 1.0, "cache": Caching((0, 2))}, [("with_change", 2), ("without_blocks", 2)])])
def test_all_that_a_run_calls_is_called_before_it(sampling: dict, expected: list, called: list) -> None:
    model = compiled_pipeline(**sampling)
    assert shapes(model, 2) == list(dict.fromkeys(rows for _, rows in expected))
    warm_up(model, 2)
    assert called == expected
    called.clear()
    model.sample([0, 1], batch=2)
    assert set(called) <= set(expected)


def test_a_model_that_is_not_compiled_is_not_warmed_up(called: list) -> None:
    model = compiled_pipeline(steps=4)
    assert warm_up(model.replace(runtime=Runtime()), 2) == 0 and called == []


def test_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compiled_pipeline(steps=4)
    said: list[str] = []
    assert as_asked(model, None, 1, 1, said.append) is model
    assert as_asked(model, "yes", 1, 1, said.append).runtime.compile and said == []
    assert not as_asked(model, "no", 1, 1, said.append).runtime.compile and said == []
    for pays in (True, False):
        monkeypatch.setattr(compiling, "choose", lambda *_, pays=pays: replace(decide(1, 1.0, 1, known=True),
                                                                                pays=pays))
        assert as_asked(model, "auto", 1, 1, said.append).runtime.compile is pays
    assert len(said) == 2
    asked = as_asked(model, "openvino", 1, 1, said.append).runtime
    assert asked.compile and asked.engine == "openvino"
    with pytest.raises(ValueError, match="use yes, no, auto for where it pays, or openvino"):
        as_asked(model, "maybe", 1, 1, said.append)
