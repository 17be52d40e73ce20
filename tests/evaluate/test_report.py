"""The page: whole, self-contained, escaped, and the same twice."""

import dataclasses
import html
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from effjax.errors import EffjaxError
from effjax.evaluate.record import Corpus, Device, Energy, Status
from effjax.evaluate.report import report, write_report

TITLE = "Which method pays?"
HOSTILE = (
    '<script>alert("x")</script>&amp; $x^2$ \' ]]> --> url(http://x.y/z) \x00\x1b\ud800 ünï 模型'
)
VOID = {"meta", "br", "hr", "link", "img"}


class Page(HTMLParser):
    """Checks that tags nest, and collects what a page would load or run."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.loads, self.ids, self.text = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            assert not name.startswith("on"), name
            if name in ("src", "href", "xlink:href", "action", "data"):
                self.loads.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def page(records, unfinished):
    rows = [*records, unfinished]
    return report(rows, title=TITLE, sample="def f(x):\n    return <x>")


def test_the_page_is_well_formed_and_self_contained(page):
    parsed = Page(page)
    assert not {"script", "iframe", "object", "embed", "link", "img"} & set(parsed.tags)
    assert all(load.startswith("#") for load in parsed.loads)
    assert parsed.tags.count("svg") > 4
    assert len(set(parsed.ids)) == len(parsed.ids)
    assert not re.search(r"url\((?!#)", page)
    assert "@import" not in page
    used = {load[1:] for load in parsed.loads} | set(re.findall(r"url\(#([^)]+)\)", page))
    assert used
    assert used <= set(parsed.ids)


def test_the_page_shows_every_row_and_section(page, records):
    text = html.unescape(" ".join(Page(page).text))
    for wanted in (
        TITLE,
        "1 x cpu, 2 cores",
        "jax 0.10.2",
        records[0].corpus.digest[:16],
        "2.00 T model FLOPs a row",
        "python 3.11.9",
        "What it says",
        "Best quality: switch, 2.158",
        "Quality against cost",
        "Every row",
        "long window: needs about 95 s",
        "nothing is trained (int8, int4 groups, magnitude 50%, 2:4, svd)",
        "Where costs disagree",
        "return <x>",
        "How to read this",
        "stored, saving simulated",
        "estimated (range)",
        "Scored on another text",
        "lora on python topics",
        "Equal by construction",
        "+0.001",
    ):
        assert wanted in text, wanted
    for record in records:
        assert record.method in text


def test_optimal_rows_are_marked(page):
    found = re.findall(r'<tr( class="optimal")?><th scope="row">.*?</svg>([^<]*)</th>', page)
    rows = {name: mark for mark, name in found}
    assert rows["switch"]
    assert rows["int8"]
    assert not rows["2:4"]
    assert not rows["magnitude 50%"]
    assert not rows["lora on python topics"]
    assert page.count('won"') >= 10


def test_simulated_is_hollow_and_realised_is_filled(page):
    head = r'<th scope="row"><svg[^>]*><[^>]*style="fill:([^;]*);[^>]*></svg>(.*?)</th>'
    fills = {name: fill for fill, name in re.findall(head, page)}
    assert fills["magnitude 50%"] == "var(--paper)"
    assert fills["int8"] == "var(--transformed)"
    assert fills["window"] == "var(--trained)"
    assert fills["softmax, seed 1"] == "var(--baseline)"


def test_every_colour_is_a_variable_of_the_page(page):
    svg = "".join(re.findall(r"<figure>.*?</figure>", page, re.DOTALL))
    assert not re.search(r"#[0-9a-fA-F]{6}", svg)
    assert set(re.findall(r"var\((--[a-z]+)\)", svg)) <= set(re.findall(r"(--[a-z]+):", page))
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_the_same_records_give_the_same_page(page, records, unfinished):
    rows = [*records, unfinished]
    again = report(rows, title=TITLE, sample="def f(x):\n    return <x>")
    assert again == page


def test_everything_is_escaped(records):
    rows = [
        dataclasses.replace(
            record,
            method=HOSTILE + str(i),
            corpus=Corpus(HOSTILE, HOSTILE, 5),
            device=Device(HOSTILE, 1, 1),
            versions={HOSTILE: HOSTILE},
            energy=Energy(),
            reasons={"energy": HOSTILE},
        )
        for i, record in enumerate((records[0], records[7]))
    ]
    failed = dataclasses.replace(records[-1], status=Status(False, HOSTILE))
    page = report([*rows, failed], title=HOSTILE, header={HOSTILE: HOSTILE}, sample=HOSTILE)
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert "<script" not in page
    assert not {"\x00", "\x1b", "\ud800"} & set(page)
    page.encode("utf-8")
    assert all(load.startswith("#") for load in parsed.loads)
    assert "x^2" in page


def test_a_header_stands_in_for_the_records_facts(unfinished):
    page = report([unfinished], title=TITLE, header={"minutes <asked>": "5"})
    assert "<dt>minutes &lt;asked&gt;</dt><dd>5</dd>" in page
    assert "<dt>corpus digest" not in page


def test_few_rows_and_none(records, unfinished):
    for rows in ([], [unfinished], records[:1]):
        page = report(rows, title=TITLE)
        Page(page)
        assert ("No row is finished yet" in page) == (rows != records[:1])
        assert page.count("<figure>") == (4 if rows == records[:1] else 0)


def test_the_page_is_written_atomically(records, tmp_path):
    path = tmp_path / "runs" / "report.html"
    write_report(records[:1], path, title=TITLE)
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    with pytest.raises(EffjaxError, match="cannot write"):
        write_report([], path / "in a file", title=TITLE)


def test_importing_the_report_does_not_import_matplotlib():
    code = (
        "import sys, effjax.evaluate.report, effjax.evaluate.table\n"
        "print(sorted({'matplotlib', 'rich', 'flax', 'tyro'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
