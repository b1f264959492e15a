"""What slimdit.report.advice promises: the best row that lost nothing, and none that gains nothing."""

from __future__ import annotations

from dataclasses import replace

from slimdit.report.advice import WISHES, advice_table, relative
from slimdit.report.record import AA, BASELINE, Record
from slimdit.report.render import as_markdown

from .example_records import METRICS, made_up

SAFE = "no loss within 2.0"
TRAINED = [{"method": "finetune", "steps": 400, "images": 25600, "seconds": 9.0}]


def bench() -> list[Record]:
    return [made_up(BASELINE, 38.0, 1.0, size=1e7), made_up(AA, 38.0, 9.0, verdict=SAFE),
            made_up("plain", 38.5, 2.0, size=5e6, verdict=SAFE),
            replace(made_up("learned", 38.9, 3.0, size=8e6, verdict=SAFE), witness=TRAINED),
            made_up("broken", 80.0, 30.0, size=1e6, verdict="loss"),
            made_up("unsure", 39.0, 20.0, size=1e6, verdict="too few images: 100 more")]


def cells(records: list[Record]) -> dict[str, list[str]]:
    return {row.name: [str(cell) for cell in row.cells] for row in advice_table(records, METRICS).rows}


def test_the_best_row_without_loss_is_named_with_and_without_training() -> None:
    found = cells(bench())
    assert list(found) == list(WISHES)
    assert [text.split(":")[0] for text in found["many images an hour"]] == ["`plain`", "`learned`"]
    assert [text.split(":")[0] for text in found["a smaller file"]] == ["`plain`", "`plain`"]
    assert "0.50x" in found["a smaller file"][0] and "Δ fd_lite0" in found["a smaller file"][0]


def test_the_budget_is_the_most_that_a_row_without_loss_took() -> None:
    assert advice_table(bench(), METRICS).headings[1].title == "training on up to 25,600 images"


def test_what_is_slower_or_larger_is_no_advice() -> None:
    records = [made_up(BASELINE, 38.0, 1.0, size=1e7), made_up("slow", 38.0, 0.8, size=2e7, verdict=SAFE)]
    assert cells(records)["many images an hour"] == ["nothing gains", "nothing gains"]
    assert cells(records)["a smaller file"] == ["nothing gains", "nothing gains"]
    assert cells([made_up(BASELINE, 38.0, 1.0)])["less memory"] == ["nothing measured"] * 2


def test_costs_are_shares_of_the_baselines() -> None:
    baseline, _, plain, *_ = bench()
    share, speed = relative(plain, baseline, "size"), relative(plain, baseline, "throughput_ratio")
    assert share is not None and share.value == 0.5
    assert speed == plain.quantity("throughput_ratio")
    assert relative(plain, None, "size") is None


def test_the_table_has_no_verdict() -> None:
    first = as_markdown(advice_table(bench(), METRICS)).splitlines()[0]
    assert first.startswith("| you want |") and "verdict" not in first
