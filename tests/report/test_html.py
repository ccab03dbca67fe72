from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from adaptrain import ConfigurationError
from adaptrain.report import Constraint, svg, write_html
from tests.report.samples import DECISIONS, decision, plain_summary, run_folder, summary


class Page(HTMLParser):
    """The elements and the visible text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def written(folder: Path, **settings: object) -> Page:
    run_folder(folder, **settings)  # type: ignore[arg-type]
    return Page(write_html(folder))


def test_the_page_of_a_finished_run(tmp_path: Path) -> None:
    page = written(tmp_path, summary=summary())
    assert "quickstart" in page.text
    assert "budget met finished, seed 1, started 2026-01-31 12:00 UTC" in page.text
    assert "✓ latency 0.49x (limit 0.50x): met" in page.text
    assert "accuracy (val) 61.2% 88.1% +26.9 points" in page.text
    assert "before the first structural event." in page.text
    assert "All 5 decisions" in page.text
    assert page.tags["svg"] == 6
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".partial"] == []


def test_the_page_is_well_formed_and_its_ids_are_unique(tmp_path: Path) -> None:
    page = written(tmp_path, summary=summary())
    tree = ET.fromstring(page.source.replace("<!DOCTYPE html>", ""))
    ids = [element.get("id") for element in tree.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    for target in re.findall(r'(?:href="#|url\(#)([^")]+)', page.source):
        assert target in ids


def test_the_page_needs_no_network_and_no_script(tmp_path: Path) -> None:
    page = written(tmp_path, summary=summary())
    assert not page.tags.keys() & {"script", "link", "iframe", "img", "object"}
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert all((value or "").startswith("#") for value in links)
    assert "@import" not in page.source
    assert "url(http" not in page.source


def test_pictures_have_names_and_take_the_colours_of_the_page(tmp_path: Path) -> None:
    page = written(tmp_path, summary=summary())
    assert page.tags["title"] == 1 + page.tags["svg"]
    assert page.tags["desc"] == page.tags["svg"]
    assert "stroke: var(--series-1)" in page.source
    assert not re.search(r"#0[1-7]0[1-7]0[1-7]", page.source)


def test_text_from_outside_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script> & \"quoted\" \x1b[2J"
    bad = decision(3, evil, evil, evil, evil, readings={evil: evil}, source=evil)
    page = written(
        tmp_path,
        summary=summary(
            experiment=evil, dense_source=evil, status=evil, started=evil, data={evil: [evil]}, hardware={"cpu": evil}
        ),
        decisions=[bad],
    )
    assert page.tags["script"] == 0
    assert "<script>alert('x')</script> & \"quoted\"" in page.text
    assert "\x1b" not in page.source
    ET.fromstring(page.source.replace("<!DOCTYPE html>", ""))


def test_a_missed_limit_is_said_in_words(tmp_path: Path) -> None:
    missed = Constraint(name="latency", limit=0.5, value=0.61, met=False)
    page = written(tmp_path, summary=summary(constraints=(missed,)))
    assert "budget NOT met (1 of 1 limits)" in page.text
    assert "✗ latency 0.61x (limit 0.50x): NOT met" in page.text


def test_a_plain_run_has_one_column(tmp_path: Path) -> None:
    page = written(tmp_path, summary=plain_summary(), decisions=[])
    assert "change" not in page.text
    assert "Dense column" not in page.text
    assert "No knob moved." in page.text


def test_an_interrupted_run_shows_what_there_is(tmp_path: Path) -> None:
    page = written(tmp_path / "half", summary=None)
    assert "half" in page.text
    assert "interrupted or is still going: it has no summary yet" in page.text
    assert "micro-batch size" in page.text
    assert page.tags["svg"] == 6


@pytest.mark.parametrize("left", ["summary.json", "decisions.jsonl", "metrics.csv"])
def test_one_file_of_a_run_is_enough(tmp_path: Path, left: str) -> None:
    run_folder(tmp_path, summary=summary())
    for path in tmp_path.iterdir():
        if path.name != left:
            path.unlink()
    ET.fromstring(Page(write_html(tmp_path)).source.replace("<!DOCTYPE html>", ""))


def test_a_decision_cut_short_by_a_crash_is_left_out(tmp_path: Path) -> None:
    run_folder(tmp_path, summary=None)
    with (tmp_path / "decisions.jsonl").open("a") as file:
        file.write('{"step": 300, "kno')
    assert f"All {len(DECISIONS)} decisions" in Page(write_html(tmp_path)).text


def test_a_file_of_other_lines_is_refused_by_line(tmp_path: Path) -> None:
    run_folder(tmp_path, summary=None)
    lines = (tmp_path / "decisions.jsonl").read_text()
    (tmp_path / "decisions.jsonl").write_text("hello\n" + lines)
    with pytest.raises(ConfigurationError, match="line 1 is not a decision"):
        write_html(tmp_path)


def test_without_matplotlib_the_page_names_the_missing_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(svg, "can_draw", lambda: False)
    page = written(tmp_path, summary=summary())
    assert page.tags["svg"] == 0
    assert "matplotlib is not installed: Loss, val/accuracy, Effective learning rate" in page.text
    assert 'pip install "adaptrain[report]"' in page.text


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    first = written(tmp_path, summary=summary()).source
    assert Page(write_html(tmp_path)).source == first


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"is no run: it holds none of summary\.json"):
        write_html(tmp_path)
    with pytest.raises(ConfigurationError, match="there is no such folder"):
        write_html(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []
