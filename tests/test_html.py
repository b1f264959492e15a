"""What slimdit.report.html promises: one file that loads nothing, escapes everything and draws its plot."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from slimdit.report.charts import grid_png
from slimdit.report.html import html, pareto_figure, summary
from slimdit.report.record import BASELINE, Record, Value

from .example_records import METRICS, example_records

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    images = {}
    for place, record in enumerate(example_records()):
        if record.status == "done":
            images[record.name] = folder / f"{place}.png"
            grid_png(np.full((4, 8, 8, 1), 20 * place, np.uint8), 2, images[record.name])
    images["lean"] = folder / "missing.png"
    path = folder / "report.html"
    path.write_text(html(example_records(), "A <made-up> run", images, METRICS), encoding="utf-8")
    return path


class Tags(HTMLParser):
    """Tags with their attributes, and text outside scripts and styles."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.inside = ""
        self.feed(document)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside not in ("script", "style"):
            self.text.append(data)


def test_nothing_is_loaded_from_anywhere(report: Path) -> None:
    tags = Tags(report.read_text(encoding="utf-8")).tags
    for tag, attributes in tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "a")
        for name in ("src", "href", "srcset", "data", "poster", "action"):
            assert (attributes.get(name) or "data:image/png;base64,").startswith("data:image/png;base64,")
    policy = next(a["content"] for t, a in tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    style = re.search(r"<style>(.*?)</style>", report.read_text(encoding="utf-8"), re.S)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]


def test_routing_is_drawn_for_every_method_that_told_of_it() -> None:
    told = {"blocks.<0>": {"load": [[0.25, 0.75], [0.5, 0.5]]}}
    records = [replace(record, witness=[{"method": "sparse_experts", "routing": told}, {"method": "finetune"},
                                        {"method": "finetune", "routing": told}])
               if record.name == "lean" else record for record in example_records()]
    drawn = html(records, "run", {}, METRICS)
    assert drawn.count("Share of uses by expert</title>") == 2 and "blocks.&lt;0&gt;, t 500..999" in drawn
    assert "Share of uses" not in html(example_records(), "run", {}, METRICS)


def test_what_records_say_is_text_never_markup(report: Path) -> None:
    document = report.read_text(encoding="utf-8")
    assert "<script>alert" not in document
    assert "<made-up>" not in document
    assert sum(tag == "script" for tag, _ in Tags(document).tags) == 3  # the figures, plotly, and ours
    evil = "</script><script>alert(2)</script>"
    rows = [*example_records(), Record(evil, metrics={"fd_lite0": Value(40.0, 39.0, 41.0, 10)},
                                       against_baseline={"throughput_ratio": Value(1.5, 1.4, 1.6)},
                                       recipe={evil: evil}, protocol={evil: evil}, provenance={"command": evil})]
    assert "<script>alert" not in html(rows, evil, {}, METRICS)


def test_every_row_number_image_and_command_is_there(report: Path) -> None:
    parsed = Tags(report.read_text(encoding="utf-8"))
    text = " ".join(parsed.text)
    for record in example_records():
        assert text.count(record.name) >= 2
    for expected in ("38.2", "[36.8, 39.8]", "+33.3", "2.36x", "N = 2,000", "slower", "out of memory", "ab" * 32,
                     "slimdit bench --images 2000 --seed 0", "refused: prune_width needs float weights",
                     "0123456789abcdef"):
        assert expected in text, expected
    images = [attributes for tag, attributes in parsed.tags if tag == "img"]
    assert len(images) == 2 * 5  # five rows beside the baseline; the sheet of one is missing
    assert all(image["alt"] for image in images)
    assert all("scope" in attributes for tag, attributes in parsed.tags if tag == "th")


def test_the_summary_names_the_fastest_row_without_loss() -> None:
    said = summary(example_records())
    assert said[0] == ("lean is the fastest row that shows no loss: 2.36x [2.29, 2.45] the baseline's throughput; "
                       "quality: no loss within 2.0.")
    assert "Lost quality: two-steps." in said
    assert "Slower than the baseline: int8-weight-only." in said
    assert "Not finished: wide (refused), <script>alert(1)</script> (out of memory)." in said
    doubtful = [replace(record, verdict="too few images: 9 more") for record in example_records()]
    assert summary(doubtful)[0] == "No row is clearly faster than the baseline and shows no loss."


def test_the_figure_is_what_plotly_accepts_with_the_baseline_at_one() -> None:
    import plotly.graph_objects as go

    figure = pareto_figure(example_records(), "throughput_ratio", "fd_lite0", METRICS)
    go.Figure(figure)  # refuses an unknown property
    line, hollow, filled = figure["data"]
    assert hollow["text"] == ["int8-weight-only"]
    assert set(filled["text"]) == {"baseline", "A/A", "fewer-steps", "int8-dynamic", "lean", "two-steps"}
    assert filled["x"][filled["text"].index(BASELINE)] == 1.0
    place = filled["text"].index("lean")
    assert filled["error_y"]["array"][place] == pytest.approx(1.6)
    assert filled["error_x"]["arrayminus"][place] == pytest.approx(2.36 * 0.03)
    assert line["x"] == sorted(line["x"], reverse=True)
    axis = figure["layout"]["xaxis"]
    assert axis["type"] == "log"  # 0.91 to 6.2
    assert {"0.7", "1", "2"} <= set(axis["ticktext"])
    assert 10 ** axis["range"][0] < 0.91 * 0.97
    assert 10 ** axis["range"][1] > 6.2 * 1.04


def test_infinite_values_and_few_records_still_make_a_report() -> None:
    one = Record("alone", metrics={"psnr": Value(math.inf, unit="dB")},
                 against_baseline={"throughput_ratio": Value(2.0)})
    document = html([one], "one", {}, METRICS)
    assert "∞ dB" in document
    assert 'id="plot"' not in document
    figure = pareto_figure([one], "throughput_ratio", "psnr", METRICS)
    json.dumps(figure, allow_nan=False)
    with pytest.raises(ValueError, match="at least one record"):
        html([], "none", {}, METRICS)


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_chromium_draws_the_plot_and_shows_all_rows(report: Path, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         f"--user-data-dir={tmp_path}", "--virtual-time-budget=10000", "--dump-dom", report.as_uri()],
        capture_output=True, text=True, timeout=120)
    drawn = Tags(done.stdout)
    classes = [attributes.get("class") or "" for _, attributes in drawn.tags]
    assert any("main-svg" in name for name in classes), done.stderr[-2000:]
    assert sum(name == "point" for name in classes) == 7  # a dot each
    assert sum("xerror" in name for name in classes) >= 6
    text = " ".join(drawn.text)
    for record in example_records():
        assert record.name in text
    assert "Refused" not in done.stderr  # the content policy stopped nothing of our own
