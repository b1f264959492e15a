"""What slimdit.report.figures promises: pictures of what the records hold, and none of what they do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from slimdit.report.charts import grid_png
from slimdit.report.figures import extremes, front_svg, pair_png, students_svg, sweeps, write_figures
from slimdit.report.record import BASELINE, Record

from .example_records import METRICS, made_up

SPACE = "{http://www.w3.org/2000/svg}"
ROUTING = {"blocks.0": {"load": [[0.5, 0.5], [0.25, 0.75]]}}


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SPACE}text")]


def student(alpha: float, fd: float) -> Record:
    return made_up(f"alpha-{alpha}", fd, 1.5, recipe={"methods": [{"distill": {"alpha": alpha, "blocks": 3}}]})


def bench() -> list[Record]:
    return [made_up(BASELINE, 38.0, 1.0, size=1e7), made_up("fast", 38.5, 3.0, verdict="no loss within 2"),
            made_up("worse", 60.0, 1.5, verdict="loss"), student(0.0, 50.0), student(0.5, 45.0), student(1.0, 41.0)]


def test_a_front_names_the_rows_on_it_and_draws_the_others_hollow() -> None:
    svg = front_svg(bench(), "throughput_ratio", "fd_lite0", METRICS)
    assert "fast" in texts(svg) and "worse" not in texts(svg)
    hollow = [circle.find(f"{SPACE}title") for circle in ElementTree.fromstring(svg).iter(f"{SPACE}circle")
              if circle.attrib["fill"] == "none"]
    assert any(told is not None and (told.text or "").startswith("worse:") for told in hollow)


def test_a_row_that_is_nothing_like_the_baseline_is_not_on_the_plot() -> None:
    svg = front_svg([*bench(), made_up("noise", 900.0, 9.0)], "throughput_ratio", "fd_lite0", METRICS)
    assert "noise" not in svg


def test_a_front_needs_two_rows() -> None:
    assert front_svg(bench()[:1], "throughput_ratio", "fd_lite0", METRICS) == ""


def test_an_option_that_alone_tells_rows_apart_is_a_sweep_in_its_order() -> None:
    found = sweeps([bench()[4], bench()[3], bench()[5], bench()[1]], "fd_lite0")
    assert list(found) == ["alpha"]
    line = ElementTree.fromstring(found["alpha"]).find(f"{SPACE}polyline")
    assert line is not None
    points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert [y for _, y in points] == sorted(y for _, y in points)  # the distance falls, so the page's y rises
    assert sweeps(bench()[:4], "fd_lite0") == {}


def test_students_stand_beside_the_baseline() -> None:
    assert {"alpha-0.0", "alpha-0.5", "alpha-1.0", BASELINE} <= set(texts(students_svg(bench(), "fd_lite0")))
    assert students_svg(bench()[:3], "fd_lite0") == ""


def test_the_best_is_the_fastest_without_loss_and_the_worst_the_furthest_off() -> None:
    found = extremes(bench(), "fd_lite0")
    assert {name: record.name for name, record in found.items()} == {"best": "fast", "worst": "worse"}


def test_a_pair_is_the_first_lines_of_two_sheets(tmp_path: Path) -> None:
    made = np.random.default_rng(0).integers(0, 256, (2, 20, 8, 8, 1), dtype=np.uint8)
    for number in range(2):
        grid_png(made[number], 10, tmp_path / f"{number}.png", scale=2)
    pair_png(tmp_path / "0.png", tmp_path / "1.png", tmp_path / "pair.png")
    pair = np.asarray(Image.open(tmp_path / "pair.png"))
    for line in range(2):
        for place in range(10):
            y, x = 2 + line * 18, 2 + place * 18
            assert (pair[y:y + 16, x:x + 16] == made[line, place, ..., 0].repeat(2, 0).repeat(2, 1)).all()


def test_all_pictures_that_the_records_give_are_written(tmp_path: Path) -> None:
    for name in (BASELINE, "fast", "worse"):
        grid_png(np.zeros((10, 8, 8, 1), np.uint8), 10, tmp_path / f"{name}.png")
    sheets = {name: tmp_path / f"{name}.png" for name in (BASELINE, "fast", "worse")}
    routed = replace(made_up("experts", 39.0, 0.8), witness=[{"method": "sparse_experts", "routing": ROUTING}])
    written = write_figures([*bench(), routed], sheets, tmp_path / "figures", METRICS)
    assert {path.name for path in written} == {
        "front-throughput_ratio.svg", "front-latency_ratio_batch1.svg", "front-size.svg", "front-peak_memory.svg",
        "sweep-alpha.svg", "students.svg", "routing-experts.svg", "best.png", "worst.png"}
    assert all(path.stat().st_size for path in written)
    assert write_figures([Record("failed", status="failed", reason="x")], {}, tmp_path / "none", METRICS) == []
