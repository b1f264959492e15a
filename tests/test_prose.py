"""What slimdit.report.prose promises: every place gets its number, and one that has none is an error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from slimdit.report.contrast import Contrast
from slimdit.report.prose import update_prose
from slimdit.report.record import BASELINE, Value

from .example_records import METRICS, made_up

ROUTED = [{"method": "finetune", "routing": {"blocks.0": {"dropped": 0.031}, "blocks.1": {"dropped": 0.07}}}]
RECORDS = [made_up(BASELINE, 38.2, 1.0, size=1e7),
           replace(made_up("small", 39.0, 1.5, size=2.5e6), witness=ROUTED)]
CONTRASTS = [Contrast("small", "other", ("", ""), {"fd_lite0_difference": Value(-2.0, -3.0, -1.0, 512)})]


@pytest.mark.parametrize(("asked", "said"), [
    ("small throughput_ratio", "1.50x [1.46, 1.56]"), ("small saved size", "75 %"), ("small worst dropped", "7 %"),
    ("small size", "2.50 MB"), ("small/other fd_lite0_difference", "-2.0 [-3.0, -1.0]")])
def test_a_place_gets_its_number(asked: str, said: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"It is <!-- study: {asked} -->old<!-- / -->, and <!-- else: {asked} -->kept<!-- / -->.")
    assert update_prose(page, "study", RECORDS, CONTRASTS, METRICS) == 1
    assert page.read_text() == (f"It is <!-- study: {asked} -->{said}<!-- / -->, and <!-- else: {asked} -->kept"
                                "<!-- / -->.")
    again = page.read_text()
    update_prose(page, "study", RECORDS, CONTRASTS, METRICS)
    assert page.read_text() == again


@pytest.mark.parametrize("asked", ["nobody size", "small beauty", "small saved beauty", "baseline worst dropped",
                                   "small/nobody fd_lite0_difference"])
def test_what_was_not_measured_is_refused_and_the_page_stays(asked: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"<!-- study: {asked} -->old<!-- / -->")
    with pytest.raises(ValueError, match="have no"):
        update_prose(page, "study", RECORDS, CONTRASTS, METRICS)
    assert page.read_text() == f"<!-- study: {asked} -->old<!-- / -->"


def test_a_page_without_places_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- table:study -->\n<!-- /table -->\n")
    before = page.stat().st_mtime_ns
    assert update_prose(page, "study", RECORDS, CONTRASTS, METRICS) == 0
    assert page.stat().st_mtime_ns == before
