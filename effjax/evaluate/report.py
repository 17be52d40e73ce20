"""The report: one page that holds everything, needs no network, and runs nothing.

Records come from files, and method names, corpora and samples from anywhere: whatever they say is
text, and is escaped.
"""

import os
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files as resources

from effjax.evaluate.columns import DASH, Column, columns, count
from effjax.evaluate.drawing import Kind, Mark, draw
from effjax.evaluate.files import write_text
from effjax.evaluate.fronts import (
    Front,
    baseline,
    better,
    comparable,
    fronts,
    marks,
    names,
    seed_spread,
    seeds,
)
from effjax.evaluate.indicators import Disagreement, disagreements
from effjax.evaluate.record import Record, nulls, reason

SHAPES: dict[Kind, str] = {
    "baseline": '<circle cx="8" cy="8" r="5"',
    "trained": '<rect x="3.5" y="3.5" width="9" height="9"',
    "transformed": '<path d="M8 2.5 13.5 13h-11z"',
}


def write_report(
    records: Sequence[Record],
    path: str | os.PathLike,
    *,
    title: str,
    header: Mapping[str, str] | None = None,
    ties: float | None = None,
    sample: str = "",
) -> None:
    """Writes the report of a comparison as one self-contained HTML page, atomically.

    The first finished record is the baseline; its repeats have its method and recipe and another
    seed. `header` is the facts at the top (device, versions, text and digest, budget), by default
    those that the baseline's record tells. `ties` is the difference in quality that counts as a
    tie, by default the baseline's spread over its seeds. `sample` is text that a model wrote.

    Raises EffjaxError where the page cannot be written, ConfigError for a metric that has no
    direction.
    """
    write_text(path, report(records, title=title, header=header, ties=ties, sample=sample))


def report(
    records: Sequence[Record],
    *,
    title: str,
    header: Mapping[str, str] | None = None,
    ties: float | None = None,
    sample: str = "",
) -> str:
    """Gives the page that `write_report` writes."""
    tie = seed_spread(records) if ties is None else ties
    found = fronts(records, tie)
    sections = [
        _head(records, title, header or {}),
        _verdict(records, found, tie),
        _figures(records, found, tie),
        _results(records, found, tie),
        _missing(records),
        _indicators(disagreements([records[i] for i in comparable(records, baseline(records))])),
        _sample(sample),
        _legend(records, tie),
    ]
    style = (resources("effjax.evaluate") / "report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )


def kind(record: Record, base: Record | None) -> Kind:
    """Says how a row came about: the baseline and its seeds, another training, or a transform."""
    if record.recipe:
        return "transformed"
    return "baseline" if base is not None and record.method == base.method else "trained"


def _shape(kind: Kind, simulated: str) -> str:
    """The marker of a row as a small drawing, hollow where its saving is simulated."""
    fill = "var(--paper)" if simulated == "simulated" else f"var(--{kind})"
    style = f'style="fill:{fill};stroke:var(--{kind});stroke-width:1.6"'
    return (
        f'<svg class="shape" viewBox="0 0 16 16" aria-hidden="true">{SHAPES[kind]} {style}/></svg>'
    )


def _tag(name: str, text: object, attributes: str = "") -> str:
    """An element whose text is escaped."""
    return f"<{name}{' ' if attributes else ''}{attributes}>{_text(text)}</{name}>"


def _text(text: object) -> str:
    """The text as the page holds it: escaped, and without what no page can hold."""
    return escape("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in str(text)))


def _head(records: Sequence[Record], title: str, header: Mapping[str, str]) -> str:
    first = records[baseline(records) or 0] if records else None
    facts = header or (_facts(first) if first else {})
    ran = sum(record.status.finished for record in records)
    lead = f"{ran} of {len(records)} rows finished." if ran < len(records) else f"{ran} rows."
    items = "".join(f"<div>{_tag('dt', k)}{_tag('dd', v)}</div>" for k, v in facts.items())
    return (
        f"<header>\n{_tag('h1', title)}\n{_tag('p', lead, 'class=lead')}\n"
        f'<dl class="facts">{items}</dl>\n</header>'
    )


def _facts(record: Record) -> dict[str, str]:
    device, corpus = record.device, record.corpus
    return {
        "device": f"{device.count} x {device.kind}, {device.cores} cores",
        "versions": ", ".join(f"{name} {version}" for name, version in record.versions.items()),
        "corpus": f"{corpus.name}, {count(corpus.bytes, 'B')}",
        "corpus digest": corpus.digest[:16],
        "training budget": f"{count(record.flops.train_model) or 'unknown'} model FLOPs a row",
        "configuration": record.config_digest[:16],
    }


def _verdict(records: Sequence[Record], found: Sequence[Front], tie: float) -> str:
    first = baseline(records)
    if first is None:
        return "<section><h2>What it says</h2><p>No row is finished yet.</p></section>"
    named, metric = names(records), records[first].quality.name
    sign = 1 if better(metric) == "min" else -1
    rows = comparable(records, first)
    best = min(rows, key=lambda i: sign * (records[i].quality.value or 0.0))
    unit, value = metric.replace("_", " "), records[best].quality.value
    lines = [f"Best quality: {named[best]}, {value:.3f} {unit}."]
    repeats = seeds(records)
    if len(repeats) > 1:
        lines.append(
            f"{records[first].method} at {len(repeats)} seeds spans {seed_spread(records):.3f}; "
            f"a lead in quality of {tie:.3f} or less is a tie, and beats nothing on its own."
        )
    for front in found:
        if front.rows and not front.equal:
            optimal = ", ".join(named[i] for i in front.optimal)
            lines.append(f"Not beaten in quality and {front.axis.title}: {optimal}.")
    return (
        "<section>\n<h2>What it says</h2>\n<ul>\n"
        + "\n".join(_tag("li", line) for line in lines)
        + "\n</ul>\n</section>"
    )


def _figures(records: Sequence[Record], found: Sequence[Front], tie: float) -> str:
    first = baseline(records)
    if first is None:
        return ""
    metric, named = records[first].quality.name, names(records)
    values = [records[i].quality.value or 0.0 for i in seeds(records)]
    band = (min(values), max(values)) if len(values) > 1 else None
    drawn = []
    for front in found:
        if not front.rows:
            continue
        described = [_mark(records[i], named[i], records[first]) for i in front.rows]
        svg = draw(front, described, metric, band, f"front-{front.axis.key}")
        optimal = ", ".join(named[i] for i in front.optimal)
        caption = f"<b>Not beaten:</b> {_text(optimal)}."
        if front.equal:
            caption = "Equal by construction: every row was trained for the same budget."
        drawn.append(f"<figure>{svg}<figcaption>{caption}</figcaption></figure>")
    figures = '\n<div class="figures">\n' + "\n".join(drawn) + "\n</div>\n"
    return f"<section>\n<h2>Quality against cost</h2>\n{_key(band)}{figures}</section>"


def _mark(record: Record, label: str, base: Record) -> Mark:
    simulated = record.bytes.saving == "simulated"
    return Mark(label, kind(record, base), simulated, record.quality.low, record.quality.high)


def _key(band: tuple[float, float] | None) -> str:
    dashes = '<path d="M1 8h22" style="stroke:var(--muted);stroke-dasharray:4 2.5"/>'
    shade = '<rect y="3" width="24" height="10" style="fill:var(--band)"/>'
    entries = [
        (_shape("baseline", ""), "the baseline"),
        (_shape("trained", ""), "trained from scratch"),
        (_shape("transformed", ""), "the baseline, transformed"),
        (_shape("transformed", "simulated"), "hollow: its saving is simulated"),
        (f'<svg viewBox="0 0 24 16" aria-hidden="true">{dashes}</svg>', "the front"),
    ]
    if band is not None:
        swatch = f'<svg viewBox="0 0 24 16" aria-hidden="true">{shade}</svg>'
        entries.append((swatch, f"the baseline's seeds, {band[0]:.3f} to {band[1]:.3f}"))
    items = "".join(f"<li>{drawing}<span>{_text(text)}</span></li>" for drawing, text in entries)
    return f'<ul class="key">{items}</ul>'


def _results(records: Sequence[Record], found: Sequence[Front], tie: float) -> str:
    first = baseline(records)
    if first is None:
        return ""
    home = comparable(records, first)
    away = [i for i, r in enumerate(records) if r.status.finished and i not in home]
    shown = columns([records[i] for i in (*home, *away)])
    body = [_row(records, found, i, shown, tie) for i in home]
    if away:
        note = "Scored on another text, or by another metric: not on the fronts."
        body.append(f'<tr class="apart"><th colspan="{len(shown) + 2}">{note}</th></tr>')
        body += [_row(records, found, i, shown, tie) for i in away]
    return (
        '<section>\n<h2>Every row</h2>\n<div class="scroll"><table class="results">\n'
        f"<thead>\n{_titles(records[first], shown)}</thead>\n<tbody>\n"
        + "\n".join(body)
        + "\n</tbody>\n</table></div>\n</section>"
    )


def _titles(base: Record, shown: Sequence[Column]) -> str:
    groups: dict[str, int] = {}
    for column in shown:
        groups[column.group] = groups.get(column.group, 0) + 1
    groups["quality"] += 1  # the difference from the baseline
    words = {"quality": base.quality.name.replace("_", " ")}
    over = "".join(
        _tag("th", words.get(group, group), f'class="first" colspan="{n}" scope="colgroup"')
        for group, n in groups.items()
    )
    under = "".join(
        _tag("th", column.title, f'{_edge(shown, at)}scope="col"')
        + (_tag("th", f"against {base.method}", 'scope="col"') if not at else "")
        for at, column in enumerate(shown)
    )
    return f'<tr class="group"><td></td>{over}</tr>\n<tr><th scope="col">method</th>{under}</tr>\n'


def _edge(shown: Sequence[Column], at: int, other: str = "") -> str:
    starts = not at or shown[at].group != shown[at - 1].group
    classes = " ".join(filter(None, ("first" if starts else "", other)))
    return f'class="{classes}" ' if classes else ""


def _row(
    records: Sequence[Record], found: Sequence[Front], i: int, shown: Sequence[Column], tie: float
) -> str:
    record, base = records[i], records[baseline(records) or 0]
    won = marks(found, i)
    cells = []
    for at, column in enumerate(shown):
        cell = column.cell(record)
        why = "" if cell is not None else f'title="{_text(reason(record, column.figure) or "")}"'
        star = "won" if column.axis and column.axis in won else ""
        cells.append(_tag("td", DASH if cell is None else cell, _edge(shown, at, star) + why))
        if not at:
            cells.append(_against(records, i, tie))
    name = f"{_shape(kind(record, base), record.bytes.saving)}{_text(names(records)[i])}"
    optimal = ' class="optimal"' if won else ""
    return f'<tr{optimal}><th scope="row">{name}</th>{"".join(cells)}</tr>'


def _against(records: Sequence[Record], i: int, tie: float) -> str:
    """The difference in quality from the baseline on the same text, muted where it is a tie."""
    method = records[baseline(records) or 0].method
    base = next((j for j in comparable(records, i) if records[j].method == method), None)
    mine = records[i].quality.value
    if base is None or mine is None or not comparable(records, i):
        return "<td></td>"
    lead = mine - (records[base].quality.value or 0.0)
    if base == i:
        return "<td></td>"
    return _tag("td", f"{lead:+.3f}", 'class="tie"' if abs(lead) <= tie else "")


def _missing(records: Sequence[Record]) -> str:
    """The rows that did not run, and why each dash in the table is one."""
    named = names(records)
    skipped = [
        f"{named[i]}: {record.status.reason}"
        for i, record in enumerate(records)
        if not record.status.finished
    ]
    why: dict[tuple[str, str], list[str]] = {}
    for i, record in enumerate(records):
        for name in nulls(record) if record.status.finished else ():
            why.setdefault((name, reason(record, name) or ""), []).append(named[i])
    figures: dict[tuple[str, str], list[str]] = {}
    for (name, text), rows in why.items():
        figures.setdefault((text, ", ".join(rows)), []).append(name.replace("_", " "))
    unknown = [f"{', '.join(f)}: {text} ({rows})" for (text, rows), f in figures.items()]
    return _list("Not run", skipped) + _list("Not known", unknown)


def _list(title: str, lines: Sequence[str]) -> str:
    if not lines:
        return ""
    items = "\n".join(_tag("li", line) for line in lines)
    return f'<section>\n<h2>{title}</h2>\n<ul class="small">\n{items}\n</ul>\n</section>\n'


def _indicators(found: Sequence[Disagreement]) -> str:
    told = [d for d in found if d.correlation is not None and d.pairs]
    if not told:
        return ""
    told.sort(key=lambda d: -d.flips / d.pairs)
    rows = "".join(
        f"<tr>{_tag('th', f'{d.first} and {d.second}', 'scope=row')}"
        f"<td>{d.flips} of {d.pairs}</td><td>{d.correlation:+.2f}</td></tr>"
        for d in told
    )
    return (
        "<section>\n<h2>Where costs disagree</h2>\n<p>Of the pairs of rows that two indicators of "
        "cost both tell apart, how many they put in opposite order. A saving in one is a saving in "
        'the other only where they agree.</p>\n<div class="scroll"><table>\n<thead><tr>'
        '<th scope="col">indicators</th><th scope="col">opposite</th>'
        '<th scope="col">rank correlation</th></tr></thead>\n<tbody>'
        f"{rows}</tbody>\n</table></div>\n</section>"
    )


def _sample(sample: str) -> str:
    if not sample:
        return ""
    return f"<section>\n<h2>What it writes</h2>\n{_tag('div', sample, 'class=sample')}\n</section>"


def _legend(records: Sequence[Record], tie: float) -> str:
    lines = [
        "A star marks a figure on its front: no other row is at least as good in both quality and "
        "that cost, and better in one by more than a tie.",
        f"A tie is a difference in quality of {tie:.3f} or less: what the baseline's own seeds "
        "differ by. Two seeds are a small sample; a verdict wants more.",
        "Stored bytes are what the arrays occupy. A saving that a mask or a fake quantisation only "
        "simulates has its own column, is drawn hollow, and is on no front of bytes.",
        "Model FLOPs are the closed form with exact masks and nothing computed twice, and are what "
        "training is equal in. Done FLOPs are counted from the compiled program.",
        "Times and rates are measured on this machine, compilation apart. Energy is measured where "
        "a counter was read, and otherwise estimated with the range in brackets.",
        "Intervals come from resampling the held-out text; they do not cover another training run.",
        "Results compare only at equal corpus digest and budget. A dash is a figure that is not "
        "known; its reason is listed, and under the pointer.",
    ]
    return _list("How to read this", lines)
