"""The HTML report as text: whole, escaped, and asking nothing of any network."""

from __future__ import annotations

import base64
import csv
import gzip
import io
import json
import re
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from typing import Any

import pytest

from fullrank.report.comparison import Comparison, compare_runs
from fullrank.report.page import page
from tests.report.invented import invented_run, sweep

pytest.importorskip("plotly", reason="the page carries plotly.js, which fullrank[report] brings")

VOID = {"meta", "link", "input", "br", "path"}
HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "<!--<script>",
    "a&amp;b {{ 7 * 7 }} %{x}",
    "\u2028line\u2029",
]


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    children: list[Element | str] = field(default_factory=list)

    def all(self, tag: str) -> list[Element]:
        own = [self] if self.tag == tag else []
        return own + [found for child in self.children if isinstance(child, Element) for found in child.all(tag)]

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)


class Tree(HTMLParser):
    """A document as a tree; a tag that does not close in its place fails."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]
        self.feed(text)
        self.close()
        assert len(self.open) == 1, f"still open: {[each.tag for each in self.open[1:]]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute twice: {tag} {attrs}"
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def tree(comparison: Comparison) -> Element:
    return Tree(page(comparison)).root


def by_id(root: Element, name: str) -> Element:
    found = [each for each in everything(root) if each.attributes.get("id") == name]
    assert len(found) == 1, name
    return found[0]


def everything(root: Element) -> list[Element]:
    return [root] + [found for child in root.children if isinstance(child, Element) for found in everything(child)]


def rows_of(root: Element, table: str) -> list[list[str]]:
    body = by_id(root, table).all("tbody")[0]
    return [[each.text for each in row.children if isinstance(each, Element)] for row in body.all("tr")]


def data_of(root: Element) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    found: dict[str, Any] = json.loads(by_id(root, "data").text, parse_constant=refuse)
    return found


@pytest.fixture(scope="module")
def whole() -> Element:
    return tree(sweep())


def test_a_comparison_gives_the_same_bytes_every_time() -> None:
    assert page(sweep()) == page(sweep())


def test_nothing_is_asked_of_a_network() -> None:
    text = page(sweep())
    root = Tree(text).root
    for each in everything(root):
        for name in ("src", "href", "action", "data", "poster", "srcset", "formaction", "ping"):
            target = each.attributes.get(name)
            assert target is None or target.startswith(("#", "data:")), (each.tag, name, target)
    for style in root.all("style"):
        assert "@import" not in style.text
        assert "url(" not in style.text
    policy = next(e.attributes["content"] or "" for e in root.all("meta") if "http-equiv" in e.attributes)
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy
    assert "form-action 'none'" in policy
    ours = [each.text for each in root.all("script") if each.attributes.get("id") != "plotly"]
    assert not re.findall(r"https?://|fetch\(|XMLHttpRequest|sendBeacon|import\(", "".join(ours))


def test_plotly_is_in_the_file_packed_to_the_last_letter(whole: Element) -> None:
    from plotly.offline import get_plotlyjs

    packed = base64.b64decode(by_id(whole, "plotly").text)
    assert gzip.decompress(packed).decode() == get_plotlyjs()
    assert packed[4:8] == bytes(4), "the time of packing would make every file different"
    assert len(page(sweep())) < 2.4e6


def test_plotlys_own_buttons_are_named_one_by_one(whole: Element) -> None:
    # "Share chart" uploads the numbers, and plotly.js 4 shows it unless told otherwise.
    script = whole.all("script")[-1].text
    assert "showSendToCloud: false" in script
    assert "modeBarButtons: [[" in script


def test_the_page_can_be_read_by_a_machine_for_people(whole: Element) -> None:
    elements = everything(whole)
    assert [each.text for each in whole.all("h1")] == [sweep().title]
    assert len(whole.all("main")) == 1
    ids = [each.attributes["id"] for each in elements if "id" in each.attributes]
    assert len(ids) == len(set(ids))
    for each in elements:
        for name in ("aria-labelledby", "aria-describedby"):
            assert each.attributes.get(name) is None or each.attributes[name] in ids
    anchors = [each.attributes["href"] or "" for each in whole.all("a")]
    assert {anchor[1:] for anchor in anchors if anchor.startswith("#")} <= set(ids)
    tables = whole.all("table")
    assert len(tables) > 5
    for table in tables:
        assert table.all("caption")[0].text.strip()
        assert all(each.attributes["scope"] in ("col", "row") for each in table.all("th"))
    for box in whole.all("fieldset"):
        assert box.all("legend")[0].text
    assert whole.all("html")[0].attributes["lang"] == "en"


def test_the_table_has_every_row_and_every_number(whole: Element) -> None:
    comparison = sweep()
    rows = rows_of(whole, "results-table")
    assert [row[0] for row in rows] == [row.label for row in comparison.rows]
    heads = [each.text for each in by_id(whole, "results-table").all("th") if each.attributes["scope"] == "col"]
    assert heads == [
        *("Method", "Perplexity, mean", "Seed 1", "Seed 2", "Seed 3", "Of full", "Best rate", "Model memory, MB"),
        *("Weights, MB", "Gradients, MB", "Optimizer state, MB", "Peak, MB", "Step, ms", "Tokens/s"),
    ]
    full = dict(zip(heads, next(row for row in rows if row[0] == "full"), strict=True))
    row = next(row for row in comparison.rows if row.label == "full")
    assert full["Seed 2"] == f"{row.scores[2]:.2f}"
    assert full["Of full"] == "100.0%"
    assert full["Best rate"] == "0.01†", "full was not run at 0.02"
    assert (full["Weights, MB"], full["Optimizer state, MB"], full["Model memory, MB"]) == ("16.9", "33.7", "67.5")
    assert (full["Peak, MB"], full["Step, ms"], full["Tokens/s"]) == ("900.0", "290", "3,531")


def test_every_run_stands_in_the_last_table_with_its_outcome(whole: Element) -> None:
    comparison = sweep()
    rows = rows_of(whole, "runs-table")
    assert {(row[0], float(row[1]), int(row[2]), row[3]) for row in rows} == {
        (run.label, run.lr, run.seed, run.outcome) for run in comparison.runs
    }
    assert ["galore", "0.02", "1", "stopped", "–"] in [row[:5] for row in rows]
    assert "validation loss 7.1 at step 133, 0.9 above the best" in by_id(whole, "runs-table").text


def test_the_grid_names_what_became_of_each_rate(whole: Element) -> None:
    rows = {row[0]: row[1:] for row in rows_of(whole, "grid-table")}
    assert rows["lora"][-1] == "diverged"
    assert rows["relora"][0] == "failed"
    assert rows["full"][-1] == "–"


def test_the_download_is_the_csv(whole: Element) -> None:
    link = next(each for each in whole.all("a") if "download" in each.attributes)
    text = base64.b64decode((link.attributes["href"] or "").partition("base64,")[2]).decode()
    lines = list(csv.DictReader(io.StringIO(text)))
    assert [line["label"] for line in lines] == [row.label for row in sweep().rows]


def test_the_summary_says_who_is_best_and_by_how_much(whole: Element) -> None:
    text = by_id(whole, "summary").text
    best, full = sweep().rows[0], next(row for row in sweep().rows if row.label == "full")
    assert f"fira has the lowest perplexity of the 8 compared: {best.score:.2f} at learning rate 0.01" in text
    assert f"below full ({full.score:.2f}); 4 others are better than full as well." in text
    assert "75% of full's 67.5 MB; sift takes least, 19.4 MB" in text
    assert "every seed of fira is better than every one of galore" in text


def test_seeds_that_overlap_decide_nothing() -> None:
    losses = {("full", 1): 3.0, ("full", 2): 3.2, ("fira", 1): 3.1, ("fira", 2): 3.05}
    runs = [invented_run(label, seed=seed, loss=loss) for (label, seed), loss in losses.items()]
    assert "overlap, so their order may be chance" in by_id(tree(compare_runs(runs, title="t")), "summary").text


def test_settings_are_told_once_where_all_share_them(whole: Element) -> None:
    common = by_id(whole, "common-settings").text
    assert "data.vocab_size" in common
    assert "method.rank" not in common, "full has none"
    own = {each.all("summary")[0].text.split()[0]: each.text for each in by_id(whole, "main").all("details")}
    assert "method.rank" in own["fira"]
    assert "0.0025, 0.005, 0.01, 0.02" in own["fira"], "every rate it ran at"
    assert "vocab_size" not in own["fira"]
    assert "output_dir" not in by_id(whole, "main").text
    assert ["torch", "2.13.0"] in rows_of(whole, "environment-table")


def test_where_runs_differ_in_their_surroundings_both_are_named() -> None:
    other = invented_run("fira")
    assert other.result is not None
    other = replace(other, result={**other.result, "hardware": {"device": "H100"}})
    root = tree(compare_runs([invented_run("full"), other], title="t"))
    assert ["device", "AMD EPYC (full); H100 (fira)"] in rows_of(root, "environment-table")


@pytest.mark.parametrize("label", HOSTILE)
def test_words_of_users_are_text_wherever_they_stand(label: str) -> None:
    runs = [
        invented_run(label, method="fira"),
        invented_run("full"),
        invented_run(label, method="fira", lr=0.02, outcome="failed", note=label),
    ]
    comparison = replace(compare_runs(runs, title=label), notes=[label])
    plain = tree(compare_runs([invented_run("full"), invented_run("fira")], title="t"))
    root = tree(comparison)
    for tag in ("script", "img", "style"):
        assert len(root.all(tag)) == len(plain.all(tag)), tag
    assert root.all("title")[0].text == root.all("h1")[0].text == label
    assert label in {each.text for each in by_id(root, "main").all("li")}
    assert label in {row[0] for row in rows_of(root, "results-table")}
    assert label in {row[-1] for row in rows_of(root, "runs-table")}
    assert label in data_of(root)["labels"]


def test_a_label_cannot_leave_its_attribute() -> None:
    label = '" onclick="alert(1)'
    root = tree(compare_runs([invented_run(label, method="fira"), invented_run("full")], title="t"))
    assert not [each for each in everything(root) if "onclick" in each.attributes]
    assert label in {each.attributes.get("data-label") for each in root.all("th")}


@pytest.mark.parametrize("outcome", ["failed", "diverged", "stopped", "unfinished"])
def test_a_comparison_without_a_result_still_has_a_page(outcome: str) -> None:
    runs = [invented_run(label, outcome=outcome, note="out of memory") for label in ("full", "fira")]
    root = tree(compare_runs(runs, title="none"))
    assert "No run has a score" in by_id(root, "summary").text
    assert [row[1:3] for row in rows_of(root, "results-table")] == [["–", "–"], ["–", "–"]]
    assert [row[3] for row in rows_of(root, "runs-table")] == [outcome] * 2
    assert "No run finished" in root.text
    assert data_of(root)["rows"][0]["score"] is None


def test_one_run_alone_is_compared_with_nothing() -> None:
    root = tree(compare_runs([invented_run("fira")], title="one"))
    assert "fira reaches perplexity" in by_id(root, "summary").text
    assert len(rows_of(root, "results-table")) == len(rows_of(root, "runs-table")) == 1


def test_where_greater_is_better_the_page_says_so() -> None:
    runs = [
        invented_run(label, task="rte", accuracy=accuracy) for label, accuracy in (("full", 0.81), ("fira", 0.8234))
    ]
    root = tree(compare_runs(runs, title="RTE"))
    assert "fira has the highest accuracy of the 2 compared: 82.34" in by_id(root, "summary").text
    assert "1.3 points above full (81.00)" in by_id(root, "summary").text
    assert "Accuracy (%) after training, higher is better" in by_id(root, "results-table").text
    assert "Best is at the top left." in root.text
    assert rows_of(root, "results-table")[0][:2] == ["fira", "82.34"]
    data = data_of(root)
    assert data["metric"] == "accuracy (%)"
    assert data["rows"][0]["score"] == pytest.approx(82.34)
    assert "nats" not in data["loss"]["validation"]


def test_no_number_is_beyond_json() -> None:
    run = invented_run("fira")
    run.train.loss[3] = float("nan")
    run.validation.loss[2] = float("inf")
    comparison = compare_runs([run, invented_run("full")], title="t")
    row = replace(comparison.rows[0], step_time_s=float("nan"), tokens_per_s=float("inf"))
    root = tree(replace(comparison, rows=[row, *comparison.rows[1:]]))
    drawn = next(each for each in data_of(root)["runs"] if each["label"] == "fira")
    assert len(drawn["train"]["loss"]) == len(run.train.loss) - 1
    assert len(drawn["validation"]["tokens"]) == len(run.validation.loss) - 1
    assert rows_of(root, "results-table")[0][-2:] == ["–", "–"]


def test_the_best_runs_are_marked_for_the_charts(whole: Element) -> None:
    best = [(run["label"], run["lr"], run["seed"]) for run in data_of(whole)["runs"] if run["best"]]
    assert len(best) == 8 * 3
    assert all(lr == 0.01 for _, lr, _ in best)


def test_the_papers_stand_beside_with_what_sets_them_apart(whole: Element) -> None:
    rows = rows_of(whole, "papers-table")
    assert any(row[0] == "fira" and row[2] == "31.06" for row in rows)
    assert any(row[0] == "fira-svd" for row in rows), "a variant is of its method"
    assert "What sets them apart" in whole.text
    assert "BPE of 2,048 tokens" in whole.text


def test_a_task_without_published_numbers_has_no_such_section() -> None:
    runs = [invented_run(label, task="rte", accuracy=0.8) for label in ("full", "fira")]
    root = tree(compare_runs(runs, title="RTE"))
    assert not [each for each in everything(root) if each.attributes.get("id") in ("papers", "papers-table")]
    assert not [each for each in root.all("a") if each.attributes["href"] == "#papers"]
