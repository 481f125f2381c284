"""The page, the JSON and the model card say the same, and need nothing from anywhere."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hyconvert.evaluation.card import update_card, without_evaluation
from hyconvert.evaluation.limits import Limits
from hyconvert.evaluation.output import report_files, write
from hyconvert.evaluation.report import layer_map, render_page
from hyconvert.evaluation.run import Evaluation
from hyconvert.evaluation.verdict import Suggestion, Verdict, check_limits
from tests.evaluation.browser import CHROMIUM, Browser

VOID = {"meta"}
FIGURES = {"loss", "kl", "needles", "shares", "ablation", "kv-plot"}
SHOWN = """
[...document.querySelectorAll("svg, table, .map, .facts div")].filter(part => {
  const box = part.getBoundingClientRect(), hidden = part.closest(".arcs, .map");
  return !(hidden && getComputedStyle(hidden).display == "none") && (box.height < 20 || box.width < 60);
}).map(part => part.outerHTML.slice(0, 80))
"""  # what is there but cannot be seen


class Page(HTMLParser):
    """Checks that tags close, and collects ids, tags, references and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: dict[str, int] = {}
        self.references: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.references.append(str(value))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def judged(evaluation: Evaluation) -> Evaluation:
    step = Suggestion(2, "W", 0.5, 4096, 128, 0.75, "F S0 F*2")
    tasks = {"base": {"vt": {"4096": 0.5}}, "converted": {"vt": {"4096": 0.25}}}
    return replace(evaluation, verdict=Verdict(check_limits(evaluation, Limits()), [step]), tasks=tasks)


@pytest.fixture(scope="module")
def data(judged: Evaluation) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(json.dumps(judged.to_dict()))
    return result


def test_the_page_is_whole_and_needs_nothing(data: dict[str, Any]) -> None:
    text = render_page(data)
    page = Page(text)
    assert not page.open and not page.references
    assert not {"script", "link", "img", "iframe", "object"} & page.tags.keys()
    assert "url(" not in text and "@import" not in text and "http" not in text
    assert {*FIGURES, "map", "verdict", "text", "retrieval", "generation", "branches", "kv", "tasks"} <= {
        *page.ids
    }
    assert page.tags["svg"] == 6 + 2 * 4
    assert "prefers-color-scheme: dark" in text and "@media print" in text and "width=device-width" in text
    assert "nan" not in text.lower().split() and "None" not in page.text


def test_the_page_says_what_the_json_says(data: dict[str, Any]) -> None:
    text = Page(render_page(data)).text
    whole = data["text"]["whole"]
    for number in (
        f"{whole['base']:.2f}",
        f"{whole['ratio']:.3f}",
        f"{whole['kl']:.4f}",
        "F S0 F*2",
        "2.00x",
    ):
        assert number in text, number
    assert "Fails its gate" in text and all(reason in text for reason in data["verdict"]["reasons"])


def test_a_page_can_be_made_of_any_part(evaluation: Evaluation) -> None:
    bare = replace(evaluation, text=None, lookup=None, generation=None, branches=None, speed=None)
    page = Page(render_page(bare.to_dict()))
    assert not page.open and page.tags["svg"] == 2


def test_what_a_model_writes_cannot_break_the_page(evaluation: Evaluation) -> None:
    assert evaluation.generation is not None
    nasty = {"prompt": "</pre><script>", "base": "<b>&amp;", "converted": "{{ 7 * 7 }}"}
    page = Page(
        render_page(replace(evaluation, generation=replace(evaluation.generation, samples=[nasty])).to_dict())
    )
    assert not page.open and "script" not in page.tags and "b" not in page.tags
    assert "{{ 7 * 7 }}" in page.text


def test_layer_maps_are_unfolded() -> None:
    layers = layer_map("F*2 S1 R0 W L")
    assert [x["kind"] for x in layers] == ["full", "full", "sparse", "reuse", "window", "sliding"]
    assert layers[2]["source"] == "1" and layers[5]["index"] == 5


def test_page_and_json_are_written_side_by_side(judged: Evaluation, tmp_path: Path) -> None:
    write(judged, "nowhere", tmp_path / "report.html", card=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]
    assert json.loads((tmp_path / "report.json").read_text())["ratio"] == judged.to_dict()["ratio"]
    assert report_files(Path("a/b.c")) == (Path("a/b.c.html"), Path("a/b.c.json"))


def test_the_model_card_gets_its_numbers_once(judged: Evaluation, tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    original = "---\ntags: []\n---\n\n# Model\n\n## Plan\n\nF S0\n"
    card.write_text(original)
    write(judged, str(tmp_path), None, card=True)
    once = card.read_text()
    assert "## Evaluation" in once and once.index("## Evaluation") < once.index("## Plan")
    assert "**Fails its gate:** " in once and "hyconvert eval converted" in once and "F S0\n" in once
    write(judged, str(tmp_path), None, card=True)
    assert card.read_text() == once and [p.name for p in tmp_path.iterdir()] == ["README.md"]
    assert (
        without_evaluation(once) == original
    )  # as healing leaves it: the numbers are not the healed model's
    assert update_card("", judged.to_dict()).count("## Evaluation") == 1


def test_the_terminal_shows_every_part(judged: Evaluation) -> None:
    from rich.console import Console

    console = Console(width=160, record=True, file=io.StringIO())
    judged.render(console)
    text = " ".join(console.export_text().split())
    for words in ("perplexity by", "multikey", "repeated 4-grams", "layer 1", "KV bytes per token", "vt",
                  "FAIL", "make layer 2 (W) full"):  # fmt: skip
        assert words in text, words


@pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium to render the page; on Debian: apt-get install chromium"
)
def test_chromium_renders_the_page_in_light_and_dark_on_a_phone_and_on_paper(
    data: dict[str, Any], tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    page.write_text(render_page(data))
    pictures = {}
    with Browser(tmp_path / "profile") as browser:
        for name, width, dark in (("light", 1000, False), ("dark", 1000, True), ("phone", 360, False)):
            browser.look(width, 800, dark=dark, phone=name == "phone")
            browser.open(page.as_uri())
            assert browser.requested == [page.as_uri()]
            assert browser.evaluate("document.documentElement.scrollWidth") <= width, name
            assert browser.evaluate(SHOWN) == [], name
            pictures[name] = browser.picture()
            assert pictures[name].startswith(b"\x89PNG") and len(pictures[name]) > 50_000
        browser.look(1000, 800)
        paper = browser.paper()
    assert pictures["light"] != pictures["dark"]
    assert paper.startswith(b"%PDF") and 1 <= paper.count(b"/Type /Page\n") <= 8
