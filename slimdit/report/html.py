"""A benchmark as one HTML file that needs nothing else: no network, no fonts, no folder beside it.

The plot's library is written into the file; a content policy in its head forbids the page to load anything.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from .charts import overlap, routing_svg
from .page import SCRIPT, STYLE
from .pareto import front
from .record import AA, BASELINE, Record, Value, in_order
from .render import ARROWS, COLUMNS, Metrics, Table, better, heading, note, number, table, title

POLICY = "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
SPEEDS = ("throughput_ratio", "latency_ratio_batch1")
COSTS = ("size", "peak_memory", "run_macs")


def html(records: Sequence[Record], heading_text: str, images: Mapping[str, Path], metrics: Metrics,
         controls: Table | None = None) -> str:
    """The report of a benchmark's records.

    Args:
        heading_text: what the report is called.
        images: a PNG sheet of samples for each row's name, the same ids in every sheet; a missing file is left out.
        metrics: what is known of each metric; see `render.Metrics`.
        controls: the rows beside their controls, as `contrast.contrast_table` has them.

    Returns:
        The whole document; everything that came from a record is escaped.

    Raises:
        ValueError: there are no records.
        OSError: an image cannot be read.
    """
    if not records:
        raise ValueError("a report needs at least one record")
    records = in_order(records)
    body = "\n".join(part for part in (
        _header(records, heading_text), _table(records, metrics), _controls(controls), _plot(records, metrics),
        _costs(records, metrics), _samples(records, images), _details(records, metrics), _provenance(records)) if part)
    return (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n'
            f"<title>{escape(heading_text)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
            "</body>\n</html>\n")


def summary(records: Sequence[Record]) -> list[str]:
    """What the records say, in a few sentences: the fastest row at no loss, what cost quality, what did not finish."""
    rows = [record for record in records if record.name not in (BASELINE, AA)]
    done = [record for record in rows if record.status == "done"]
    kept = [(speed.value, record) for record in done
            if record.verdict.startswith("no loss") and (speed := _clearly_faster(record))]
    said = []
    if kept:
        best = max(kept, key=lambda pair: pair[0])[1]
        speed = best.quantity("throughput_ratio")
        assert speed is not None
        said.append(f"{best.name} is the fastest row that shows no loss: {' '.join(number(speed, unit='x'))} the "
                    f"baseline's throughput; quality: {best.verdict}.")
    elif done:
        said.append("No row is clearly faster than the baseline and shows no loss.")
    for what, names in (("Lost quality", [r.name for r in done if r.verdict.startswith("loss")]),
                        ("Too few images to judge", [r.name for r in done if r.verdict.startswith("too few")]),
                        ("Slower than the baseline", [r.name for r in done if "slower" in r.remarks]),
                        ("Not finished", [f"{r.name} ({r.status.replace('_', ' ')})" for r in rows if r not in done])):
        if names:
            said.append(f"{what}: {', '.join(names)}.")
    return said


def pareto_figure(records: Sequence[Record], x: str, y: str, metrics: Metrics) -> dict[str, Any]:
    """The plot of y over x with error bars, as plotly's JSON: rows on the front filled, dominated rows hollow."""
    records = [with_unity(record, x) for record in records]
    records = [record for record in records if _finite(record.quantity(x)) and _finite(record.quantity(y))]
    shown = [(record, value_x, value_y) for record in records
             if (value_x := record.quantity(x)) is not None and (value_y := record.quantity(y)) is not None]
    better_x, better_y = better(x, metrics) or "higher", better(y, metrics) or "lower"
    plain = front(records, x, y, better_x, better_y)
    unbeaten = front(records, x, y, better_x, better_y, clearly=True)
    places = {record.name: (value_x.value, value_y.value) for record, value_x, value_y in shown}
    scales = [_scale([place[0] for place in places.values()], "x"),
              _scale([place[1] for place in places.values()], shown[0][2].unit if shown else "")]
    positions = _label_positions({name: tuple(math.log(value) if scale == "log" else value  # type: ignore[misc]
                                              for value, scale in zip(place, scales))
                                  for name, place in places.items()})
    line = {"type": "scatter", "mode": "lines", "x": [places[name][0] for name in plain],
            "y": [places[name][1] for name in plain], "line": {"color": "#2a78d6", "width": 1, "dash": "dot"},
            "hoverinfo": "skip", "name": "front"}
    dots = [_dots([point for point in shown if (point[0].name in unbeaten) is on_front], on_front, positions, x, y)
            for on_front in (False, True)]
    x_axis = {**_axis(x, scales[0], [value for _, value, _ in shown], metrics),
              **_range([value for _, value, _ in shown], scales[0])}
    return {"data": [line, *dots],
            "layout": _layout(x_axis, _axis(y, scales[1], [value for _, _, value in shown], metrics))}


def with_unity(record: Record, ratio: str) -> Record:
    """The record; the baseline gets the ratio 1 to itself, which nobody measures."""
    if record.name != BASELINE or "_ratio" not in ratio or record.quantity(ratio):
        return record
    return replace(record, against_baseline={**record.against_baseline, ratio: Value(1.0, unit="x")})


def _header(records: Sequence[Record], heading_text: str) -> str:
    machine = records[0].provenance
    where = [str(machine[key]) for key in ("gpu", "cpu", "dtype") if machine.get(key)]
    where += [f"{machine['threads']} threads"] if machine.get("threads") else []
    where += [str(machine["date"])[:10]] if machine.get("date") else []
    sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in summary(records))
    return (f'<header>\n<h1>{escape(heading_text)}</h1>\n<p class="quiet">{escape(" · ".join(where))}</p>\n'
            f'<ul class="summary">{sentences}</ul>\n</header>')


def _table(records: Sequence[Record], metrics: Metrics) -> str:
    sheet = _sheet(table(records, metrics), [_badge(record) for record in records], "verdict")
    return (f'<section aria-labelledby="results">\n<h2 id="results">Results</h2>\n{sheet}'
            '<p class="quiet">In brackets: the interval of each number. N: the images, or rounds of the clock. '
            "Δ: the paired difference to the baseline. Ratios are to the baseline. ↑ higher, ↓ lower is better.</p>\n"
            "</section>")


def _controls(content: Table | None) -> str:
    """Rows beside their controls, where there are any."""
    if content is None or not content.rows:
        return ""
    sheet = _sheet(content, [escape(row.note) for row in content.rows], "it is")
    return (f'<section aria-labelledby="controls">\n<h2 id="controls">Beside their controls</h2>\n{sheet}'
            '<p class="quiet">Δ: the row minus its control, image by image. Costs: the row / its control.</p>\n'
            "</section>")


def _sheet(content: Table, said: Sequence[str], last: str) -> str:
    """A table, with what is said of each row in a last column."""
    heads = "".join(f'<th scope="col" class="number">{escape(str(replace(head, n=None)))}'
                    f"<small>{'' if head.n is None else f'N = {head.n:,}'}</small></th>" for head in content.headings)
    lines = []
    for row, saying in zip(content.rows, said):
        cells = "".join(f'<td class="number">{escape(cell.text)}<small>{escape(cell.interval)}</small></td>'
                        for cell in row.cells)
        told = f"{cells}<td>{saying}</td>" if any(cell.text for cell in row.cells) else (
            f'<td colspan="{len(row.cells) + 1}">{saying}</td>')
        lines.append(f'<tr><th scope="row">{escape(row.name)}</th>{told}</tr>')
    return ('<div class="wide"><table>\n'
            f'<thead><tr><th scope="col">row</th>{heads}<th scope="col">{last}</th></tr></thead>\n'
            f"<tbody>{''.join(lines)}</tbody>\n</table></div>\n")


def _badge(record: Record) -> str:
    kind = ("bad" if record.status != "done" or record.verdict.startswith("loss")
            else "good" if record.verdict.startswith("no loss") else "plain")
    first, *others = note(record).split("; ")
    rest = f"<small>{escape('; '.join(others))}</small>" if others else ""
    return f'<span class="badge {kind}">{escape(first)}</span>{rest}' if first else ""


def _plot(records: Sequence[Record], metrics: Metrics) -> str:
    x = next((name for name in SPEEDS if any(record.quantity(name) for record in records)), None)
    records = [with_unity(record, x) if x else record for record in records]
    names = [*(name for name in COLUMNS if name not in (*SPEEDS, *COSTS)), "ssim", "kid", "kid_lite0", "class_accuracy"]
    qualities = [name for name in names if x and sum(
        _finite(record.quantity(x)) and _finite(record.quantity(name)) for record in records) >= 2]
    if x is None or not qualities:
        return ""
    figures = {name: pareto_figure(records, x, name, metrics) for name in qualities}
    choices = "".join(f'<option value="{escape(name)}">{escape(title(name))}</option>' for name in qualities)
    choose = f'<label>Quality: <select id="quality">{choices}</select></label>' if len(qualities) > 1 else ""
    return ('<section aria-labelledby="front">\n<h2 id="front">Quality against speed</h2>\n'
            f'{choose}\n<div id="plot" role="img" aria-label="Quality against speed; the numbers are in the table">'
            "</div>\n"
            '<p class="quiet">Bars are intervals. Filled: no row clearly dominates this one, that is, is as good on '
            "both axes and better beyond the intervals on one. Hollow: clearly dominated. Dotted: the front of the "
            "plain values.</p>\n"
            f'<script type="application/json" id="figures">{_json_in_script(figures)}</script>\n'
            f"<script>{_plotly()}</script>\n<script>{SCRIPT}</script>\n</section>")


def _dots(points: Sequence[tuple[Record, Value, Value]], filled: bool, positions: Mapping[str, str],
          x: str, y: str) -> dict[str, Any]:
    # Plotly reads its texts as a kind of HTML.
    names = [escape(record.name) for record, _, _ in points]
    said = [f"<b>{name}</b><br>{escape(title(x))}: {escape(_words(value_x, x))}<br>"
            f"{escape(title(y))}: {escape(_words(value_y, y))}" for name, (_, value_x, value_y) in zip(names, points)]
    return {"type": "scatter", "mode": "markers+text", "x": [value.value for _, value, _ in points],
            "y": [value.value for _, _, value in points], "text": names, "hovertext": said, "hoverinfo": "text",
            "cliponaxis": False,
            "textposition": [positions[record.name] for record, _, _ in points],
            "error_x": _error_bars([value for _, value, _ in points]),
            "error_y": _error_bars([value for _, _, value in points]),
            "marker": {"size": 11, "color": "#2a78d6", "symbol": "circle" if filled else "circle-open",
                       "line": {"width": 2 if not filled else 0}}, "name": "front" if filled else "dominated"}


def _label_positions(places: Mapping[str, tuple[float, float]]) -> dict[str, str]:
    """Where each point's name stands: the first position that covers the least of other names and points."""
    if not places:
        return {}
    lows, highs = ([end(values) for values in zip(*places.values())] for end in (min, max))
    pixels = {name: tuple((value - low) / ((high - low) or 1.0) * size  # as if drawn on some 750 x 340 pixels
                          for value, low, high, size in zip(place, lows, highs, (750, 340)))
              for name, place in places.items()}
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in pixels.values()]
    positions = {}
    for name, (x, y) in sorted(pixels.items(), key=lambda item: item[1]):
        width = 7.5 * len(name)
        boxes = {f"{vertical} {side}": (x + start, y + bottom, x + start + width, y + bottom + 18)
                 for side, start in (("right", 6), ("left", -6 - width), ("center", -width / 2))
                 for vertical, bottom in (("top", 5), ("bottom", -23))}
        positions[name] = min(boxes, key=lambda place: sum(overlap(boxes[place], box) for box in taken))
        taken.append(boxes[positions[name]])
    return positions


def _error_bars(values: Sequence[Value]) -> dict[str, Any]:
    return {"type": "data", "symmetric": False, "thickness": 1.2, "width": 4, "color": "rgba(110,130,160,.75)",
            "array": [_length(value.value, value.high) for value in values],
            "arrayminus": [_length(value.low, value.value) for value in values]}


def _length(low: float | None, high: float | None) -> float:
    # A bootstrap's interval need not hold the value itself: a bar has no negative length, and no infinite one.
    length = 0.0 if low is None or high is None else max(0.0, high - low)
    return length if math.isfinite(length) else 0.0


def _layout(x_axis: dict[str, Any], y_axis: dict[str, Any]) -> dict[str, Any]:
    return {"xaxis": x_axis, "yaxis": y_axis, "showlegend": False,
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "#8a94a0", "activecolor": "#2a78d6"},
            "hovermode": "closest", "height": 460, "margin": {"l": 60, "r": 40, "t": 24, "b": 56},
            "font": {"family": "system-ui, sans-serif", "size": 13},
            "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)"}


def _axis(name: str, scale: str, values: Sequence[Value], metrics: Metrics) -> dict[str, Any]:
    way = better(name, metrics)
    said = [f"{ARROWS[way]} {way} is better"] if way else []
    said += ["logarithmic"] if scale == "log" else []
    return {"title": {"text": escape(f"{title(name)} ({', '.join(said)})" if said else title(name))}, "type": scale,
            "gridcolor": "rgba(128,128,128,.18)", "zeroline": False, "linecolor": "rgba(128,128,128,.5)",
            "automargin": True, **(_log_ticks(values) if scale == "log" else {})}


def _log_ticks(values: Sequence[Value]) -> dict[str, Any]:
    # Plotly writes 0.7 on a logarithmic axis as a bare 7.
    decades = range(math.floor(math.log10(min(value.value for value in values))) - 1,
                    math.ceil(math.log10(max(value.value for value in values))) + 1)
    ticks = [step * 10.0 ** decade for decade in decades for step in (1, 1.5, 2, 3, 5, 7)]
    return {"tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def _range(values: Sequence[Value], scale: str) -> dict[str, Any]:
    """A range with room at both sides for the names of the outermost points."""
    ends = [end for value in values for end in (value.value, value.low, value.high) if end is not None]
    places = [math.log10(end) if scale == "log" else end for end in ends
              if math.isfinite(end) and (scale == "linear" or end > 0)]
    if not places:
        return {}
    room = 0.16 * ((max(places) - min(places)) or 1.0)
    return {"range": [min(places) - room, max(places) + room]}


def _scale(values: Sequence[float], unit: str) -> str:
    # One row far away must not push all the others into one corner; decibels are logarithms already.
    return "log" if values and unit != "dB" and min(values) > 0 and max(values) > 2.5 * min(values) else "linear"


def _words(value: Value, name: str) -> str:
    return " ".join(number(value, signed=name.endswith("_difference"))) + (f" (N = {value.n:,})" if value.n else "")


def _costs(records: Sequence[Record], metrics: Metrics) -> str:
    charts = []
    for name in COSTS:
        values = [(record.name, value) for record in records if (value := record.quantity(name)) is not None]
        if len(values) < 2:
            continue
        largest = max(value.value for _, value in values) or 1.0
        bars = "".join(
            f'<tr><th scope="row">{escape(row)}</th><td class="bar">'
            f'<span style="width:{100 * value.value / largest:.1f}%"></span></td>'
            f'<td class="number">{escape(number(value, unit=_unit(value, name, metrics))[0])}</td></tr>'
            for row, value in values)
        charts.append(f"<figure><figcaption>{escape(str(heading(name, [], metrics)))}</figcaption>"
                      f'<table class="bars"><tbody>{bars}</tbody></table></figure>')
    if not charts:
        return ""
    return ('<section aria-labelledby="cost">\n<h2 id="cost">Cost</h2>\n'
            f'<div class="charts">{"".join(charts)}</div>\n</section>')


def _samples(records: Sequence[Record], images: Mapping[str, Path]) -> str:
    sheets = {record.name: _data_url(images[record.name]) for record in records
              if record.name in images and images[record.name].is_file()}
    if not sheets:
        return ""
    reference = sheets.get(BASELINE)
    pairs = []
    for record in records:
        if record.name not in sheets or (record.name == BASELINE and len(sheets) > 1):
            continue
        paired = [(BASELINE, reference)] if reference and record.name != BASELINE else []
        figures = "".join(f'<figure><img src="{url}" alt="Samples of {escape(name)}" loading="lazy">'
                          f"<figcaption>{escape(name)}</figcaption></figure>"
                          for name, url in [*paired, (record.name, sheets[record.name])])
        said = note(record)
        pairs.append(f'<h3>{escape(record.name)}</h3>{f"<p>{escape(said)}</p>" if said else ""}'
                     f'<div class="pair">{figures}</div>')
    return ('<section aria-labelledby="samples">\n<h2 id="samples">Samples</h2>\n'
            '<p class="quiet">Image by image, a row and the baseline start from the same noise and label '
            f"(A/A: from other seeds).</p>\n{''.join(pairs)}\n</section>")


def _details(records: Sequence[Record], metrics: Metrics) -> str:
    blocks = []
    for record in records:
        numbers = [*record.metrics.items(), *record.against_baseline.items()]
        lines = "".join(
            f'<tr><th scope="row">{escape(title(name))}</th>'
            f'<td class="number">{escape(" ".join(number(value, unit=_unit(value, name, metrics))))}</td>'
            f'<td class="number">{f"{value.n:,}" if value.n is not None else ""}</td>'
            f'<td class="number">{f"{value.bias:+.2g}" if value.bias is not None else ""}</td></tr>'
            for name, value in numbers)
        heads = ('<th scope="col">measured</th><th scope="col" class="number">value</th><th scope="col">N</th>'
                 '<th scope="col">bias, of so few images</th>')
        measured = f"<table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table>" if lines else ""
        stages = ", ".join(f"{stage} {' '.join(number(Value(seconds, unit='s')))}"
                           for stage, seconds in record.seconds.items())
        parts = [f"<p>{escape(note(record))}</p>" if note(record) else "", measured,
                 _pre("Recipe", record.recipe), _pre("Witness", record.witness), _routing(record),
                 f"<h4>Time</h4><p>{escape(stages)}</p>" if stages else "",
                 f"<h4>Images</h4><p><code>sha256 {escape(record.images.sha256)}</code></p>" if record.images else ""]
        blocks.append(f"<details><summary>{escape(record.name)}</summary>{''.join(parts)}</details>")
    return (f'<section aria-labelledby="rows">\n<h2 id="rows">Row by row</h2>\n{"".join(blocks)}\n</section>')


def _routing(record: Record) -> str:
    """Heat maps of who uses which expert: as they were made, and after every training since."""
    drawn = [routing_svg(entry["routing"]) for entry in record.witness if entry.get("routing")]
    return "".join(["<h4>Routing</h4>", *drawn]) if drawn else ""


def _pre(name: str, value: Any) -> str:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return f"<h4>{name}</h4><pre>{escape(text)}</pre>" if value else ""


def _provenance(records: Sequence[Record]) -> str:
    commands = list(dict.fromkeys(str(record.provenance["command"]) for record in records
                                  if record.provenance.get("command")))
    again = "<p>Run it again:</p>" + f"<pre>{escape(chr(10).join(commands))}</pre>" if commands else ""
    facts = {**_shared([_flat(record.protocol) for record in records], "protocol: "),
             **_shared([_flat({**record.provenance, "command": None}) for record in records], "")}
    lines = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(text)}</td></tr>'
                    for name, text in facts.items())
    return ('<section aria-labelledby="provenance">\n<h2 id="provenance">Provenance</h2>\n'
            f'{again}\n<div class="wide"><table class="facts"><tbody>{lines}</tbody></table></div>\n</section>')


def _flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in facts.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        elif value is not None:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)
    return flat


def _shared(rows: Sequence[Mapping[str, str]], prefix: str) -> dict[str, str]:
    """Every fact with its value, or its different values: first to last for dates, all of them otherwise."""
    shared = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        values = sorted({row[key] for row in rows if key in row})
        spans = key == "date" and len(values) > 1
        shared[prefix + key] = f"{values[0]} to {values[-1]}" if spans else " / ".join(values)
    return shared


def _finite(value: Value | None) -> bool:
    return value is not None and math.isfinite(value.value)


def _unit(value: Value, name: str, metrics: Metrics) -> str:
    return value.unit or (metrics[name].unit if name in metrics else "")


def _clearly_faster(record: Record) -> Value | None:
    speed = record.quantity("throughput_ratio")
    return speed if speed and (speed.value if speed.low is None else speed.low) > 1 else None


def _data_url(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _json_in_script(value: Any) -> str:
    # No text inside may end the script element or open a comment.
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs().replace("</script", "<\\/script")
