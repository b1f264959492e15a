"""What slimdit.report.charts promises: sheets that hold every image to the pixel, and curves that are whole SVG."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from slimdit.report.charts import Point, Series, curve_svg, grid_png, heat_map_svg, label_places, overlap, plot_svg


@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_is_on_the_sheet_to_the_pixel(channels: int, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 6, 7, channels), dtype=np.uint8)
    grid_png(images, 3, tmp_path / "sheet.png", scale=2, gap=2)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png")).reshape(2 * 14 + 2, 3 * 16 + 2, channels)
    for place, image in enumerate(images):
        row, column = divmod(place, 3)
        y, x = 2 + row * 14, 2 + column * 16
        assert (sheet[y:y + 12, x:x + 14] == image.repeat(2, 0).repeat(2, 1)).all()
    assert (sheet[16:28, 34:48] == 255).all()  # the sixth place is empty


def test_labels_are_drawn_under_the_images(tmp_path: Path) -> None:
    images = np.zeros((2, 32, 32, 1), np.uint8)
    grid_png(images, 2, tmp_path / "sheet.png", labels=["bag", "coat"])
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (2 + 32 + 2 + 14, 2 * 34 + 2)
    for x in (2, 36):
        assert (sheet[34:48, x:x + 32] < 128).any()


@pytest.mark.parametrize(("images", "options", "said"), [
    (np.zeros((2, 4, 4, 1), np.float32), {}, "uint8"), (np.zeros((2, 4, 4, 4), np.uint8), {}, "1 or 3"),
    (np.zeros((0, 4, 4, 1), np.uint8), {}, "needs"), (np.zeros((2, 4, 4, 1), np.uint8), {"scale": 0}, "scale"),
    (np.zeros((2, 4, 4, 1), np.uint8), {"labels": ["one"]}, "labels"),
])
def test_what_makes_no_sheet_is_refused(images: np.ndarray, options: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        grid_png(images, 2, tmp_path / "sheet.png", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("log_y", [False, True])
def test_a_curve_is_whole_svg_that_rises_where_the_numbers_rise(log_y: bool) -> None:
    points = [(0.0, 1.0), (1e6, 0.1), (2e6, 0.2)]
    root = ElementTree.fromstring(curve_svg(points, title="loss <of> a & b", log_y=log_y))
    space = "{http://www.w3.org/2000/svg}"
    line = root.find(f"{space}polyline")
    assert line is not None
    drawn = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
    assert [x for x, _ in drawn] == sorted(x for x, _ in drawn)
    heights = [y for _, y in drawn]
    assert heights[0] < heights[2] < heights[1]  # down the page is down in value
    assert all(0 <= x <= 640 and 0 <= y <= 320 for x, y in drawn)
    texts = [element.text for element in root.iter(f"{space}text")]
    assert "loss <of> a & b" in texts
    assert "1M" in texts
    assert {"0.1", "1"} <= set(texts) if log_y else {"0.2", "1"} <= set(texts)


@pytest.mark.parametrize(("points", "log_y"), [([], False), ([(0.0, 1.0), (1.0, float("nan"))], False),
                                               ([(0.0, 1.0), (1.0, 0.0)], True)])
def test_what_makes_no_curve_is_refused(points: list, log_y: bool) -> None:
    with pytest.raises(ValueError, match="plot"):
        curve_svg(points, log_y=log_y)


def test_one_point_is_a_curve_too() -> None:
    for points in ([(1.0, 2.0)], [(1.0, 2.0), (1.0, 2.0)]):
        line = ElementTree.fromstring(curve_svg(points, x="steps", y="rate")).find("{http://www.w3.org/2000/svg}polyline")
        assert line is not None
        assert len(line.attrib["points"].split()) == 2


def test_a_heat_map_shades_by_size_and_leaves_zero_blank() -> None:
    root = ElementTree.fromstring(
        heat_map_svg(["a<b", "c"], ["x", "y"], [[0.0, 1e-6], [1e-3, 1.0]], title="t & u"))
    space = "{http://www.w3.org/2000/svg}"
    shades = [float(cell.attrib["fill-opacity"]) for cell in root.iter(f"{space}rect")]
    assert shades == [0, 0.08, 0.54, 1]
    assert {"a<b", "c", "x", "y", "t & u", "1e-06"} <= {element.text for element in root.iter(f"{space}text")}
    assert heat_map_svg(["a"], ["x"], [[0.0]]).count("<rect") == 1


@pytest.mark.parametrize(("values", "said"), [
    ([[1.0]], "a value for each cell"), ([[1.0, -1.0]], "at least 0"), ([[1.0, float("nan")]], "finite")])
def test_a_heat_map_needs_a_sound_value_in_each_cell(values: list, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        heat_map_svg(["a"], ["x", "y"], values)


def test_a_plot_has_every_point_with_its_bars_and_its_name_inside_the_page() -> None:
    points = [Point(1.0, 20.0, (0.9, 1.2), (18.0, 23.0), "base <1>"), Point(3.0, 60.0, None, (50.0, 70.0), "fast"),
              Point(2.0, 40.0, name="behind", hollow=True)]
    series = [Series(points), Series(points[:2], name="front", line="dotted", marks=False)]
    root = ElementTree.fromstring(plot_svg(series, x="speed", y="distance", log_x=True, log_y=True, title="a plot"))
    space = "{http://www.w3.org/2000/svg}"
    circles = [(float(circle.attrib["cx"]), float(circle.attrib["cy"])) for circle in root.iter(f"{space}circle")]
    assert circles[0][0] < circles[2][0] < circles[1][0] and circles[0][1] > circles[2][1] > circles[1][1]
    assert all(0 <= x <= 760 and 0 <= y <= 440 for x, y in circles)
    texts = [element.text for element in root.iter(f"{space}text")]
    assert {"base <1>", "fast", "speed", "distance", "a plot"} <= set(texts) and "behind" not in texts
    bars = [line for line in root.iter(f"{space}line") if "stroke-opacity" in line.attrib]
    assert len(bars) == 3
    assert "stroke-dasharray" in root.find(f"{space}polyline").attrib  # type: ignore[union-attr]


def test_several_series_have_a_legend_and_colors_of_their_own() -> None:
    series = [Series([Point(1, 1), Point(2, 2)], name=name, line="solid") for name in ("one", "two")]
    root = ElementTree.fromstring(plot_svg(series))
    space = "{http://www.w3.org/2000/svg}"
    assert len({line.attrib["stroke"] for line in root.iter(f"{space}polyline")}) == 2
    assert {"one", "two"} <= {element.text for element in root.iter(f"{space}text")}


def test_names_keep_clear_of_each_other_where_there_is_room() -> None:
    places = {str(number): (100.0, 100.0 + 9 * number) for number in range(4)}
    found = label_places(places, dict.fromkeys(places, "a name"), 6.0, 12.0)
    boxes = []
    for x, y, anchor in found.values():
        left = x - {"start": 0, "end": 36, "middle": 18}[anchor]
        boxes.append((left, y - 9, left + 36, y + 3))
    assert sum(overlap(one, other) for one in boxes for other in boxes if one is not other) < 36 * 12
