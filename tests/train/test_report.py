import math
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from PIL import Image

from jobs.lake.storage import Storage
from jobs.train.metrics import EvalMetrics, History, StepMetrics
from jobs.train.report import DataFacts, RunFacts, escape, report_text, write_report
from maskrcnn_core.config import lite
from schemas.specs import StorageSpec

HOSTILE = [
    "| a | b |",
    "<script>alert(1)</script>",
    "[click](http://example.com)",
    "![x](y.png)",
    "**bold** _it_ ~~gone~~ `code` \\",
    "$e^x$ #1 @someone :smile:",
    "&lt; &amp; &#64;",
    "# heading",
]
FACTS = RunFacts(
    "run-1",
    "done",
    {"recipe": "finetune"},
    [DataFacts("train", "coco:/data/train.json", "ab12", 407, {"empty_mask": 3, "bad_polygon": 0})],
    "evaluation",
)


def step(number: int, workers: int = 2, rate: float = 10.0) -> StepMetrics:
    return StepMetrics(
        number, {"loss_mask": 0.5, "loss_box_reg": 0.25}, 0.01, rate, 0.02, 3 << 29, workers, 1.0, 3
    )


def evaluation(number: int, ap: float) -> EvalMetrics:
    figures = {"AP": ap, "AP50": 2 * ap, "AP75": -1.0}
    return EvalMetrics(
        number, figures, figures, {"car": {"bbox_AP": ap, "segm_AP": -1.0}}, 68, {"truncated": 2}
    )


HISTORY = History((step(1), step(2, workers=4, rate=30.0)), (evaluation(1, 0.25), evaluation(2, 0.125)))


def tokens_of(markdown: str) -> list[Token]:
    """All of them, flat, as an independent reader of Markdown sees them."""
    top = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(markdown)
    return [token for outer in top for token in (outer, *(outer.children or []))]


def cells_of(markdown: str) -> list[list[str]]:
    """The rows of all tables, as text."""
    rows: list[list[str]] = []
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(markdown):
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline" and rows and token.level >= 3:
            rows[-1].append("".join(child.content for child in token.children or []))
    return rows


@pytest.mark.parametrize("text", HOSTILE)
def test_escaped_text_reads_as_it_is_and_is_no_markup(text: str) -> None:
    (paragraph,) = [t for t in tokens_of(f"Name: {escape(text)}") if t.type == "inline"]
    children = paragraph.children or []
    assert {child.type for child in children} <= {"text", "text_special"}
    assert "".join(child.content for child in children) == f"Name: {text}"
    assert cells_of(f"| a |\n| --- |\n| {escape(text)} |\n")[1] == [text]


def test_no_url_is_left_that_a_reader_could_make_a_link_of() -> None:
    assert escape("http://example.com") == "http\\://example.com"
    assert escape("www.example.com WWW.example.com") == "www\\.example.com WWW\\.example.com"


def test_line_breaks_controls_and_length_cannot_break_the_page() -> None:
    assert escape("a\nb\t| c") == "a b \\| c"
    assert escape("a\x1b[2Jb\u202e") == "a\ufffd\\[2Jb\ufffd"
    assert escape("") == ""
    assert len(escape("x" * 5000)) == 500


def test_hostile_names_from_everywhere_make_no_markup_in_the_report() -> None:
    name = " ".join(HOSTILE)
    facts = RunFacts(
        name, name, {name: name}, [DataFacts(name, name, name, 1, {name: 1, "empty_mask": 2})], name
    )
    figures = {"AP": 0.5}
    measured = EvalMetrics(1, figures, figures, {name: {"bbox_AP": 0.5, "segm_AP": 0.5}}, 1, {name: 1})
    tokens = tokens_of(report_text(facts, History((step(1),), (measured,))))
    kinds = {token.type for token in tokens}
    assert not kinds & {
        "html_inline",
        "html_block",
        "link_open",
        "em_open",
        "strong_open",
        "s_open",
        "code_inline",
    }
    assert [token.attrs["src"] for token in tokens if token.type == "image"] == ["curves.png", "samples.png"]
    assert [name, name] in cells_of(report_text(facts, History((), ())))


def test_the_report_says_data_result_and_course() -> None:
    rows = cells_of(report_text(FACTS, HISTORY))
    assert ["train", "coco:/data/train.json", "ab12", "407"] in rows
    assert ["train", "empty_mask", "3"] in rows
    assert not any("bad_polygon" in row for row in rows)
    assert ["best", "1", "masks", "25.0", "50.0", "–", "–", "–", "–"] in rows
    assert ["last", "2", "boxes", "12.5", "25.0", "–", "–", "–", "–"] in rows
    assert ["car", "–", "12.5"] in rows
    assert ["workers", "2 to 4"] in rows
    assert ["images/s, median", "20.0"] in rows
    assert ["time waiting for data, mean", "2.00%"] in rows
    assert ["images that could not be read", "6"] in rows
    assert ["memory of worker 0, most", "1.5 GiB"] in rows
    assert "2 truncated" in report_text(FACTS, HISTORY)


def test_a_run_without_steps_evaluations_or_problems_says_so() -> None:
    text = report_text(RunFacts("run-1", "interrupted", {}, [], "train"), History((), ()))
    for part in (
        "AP was not measured.",
        "No step was taken.",
        "Nothing was left out.",
        "Ended: interrupted.",
    ):
        assert part in text


def test_speeds_that_were_not_measured_do_not_hide_the_others() -> None:
    rates = (30.0, math.nan, 10.0, math.nan)
    steps = tuple(step(number, rate=rate) for number, rate in enumerate(rates, start=1))
    assert ["images/s, median", "20.0"] in cells_of(report_text(FACTS, History(steps, ())))
    assert ["images/s, median", "nan"] in cells_of(report_text(FACTS, History(steps[1:2], ())))


def test_three_files_are_written_in_the_place_of_those_that_were_there(tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "curves.png").write_text("of an earlier attempt")
    facts = RunFacts("run-1", "interrupted", {}, [], "train")
    uri = write_report(str(tmp_path), Storage(StorageSpec()), facts, HISTORY, [], lite(((1, "car"),)))
    assert uri == f"file://{tmp_path}/report/report.md"
    text = (tmp_path / "report" / "report.md").read_text()
    assert "Ended: interrupted." in text
    assert "\nOf train:\n" in text
    for name in ("curves.png", "samples.png"):
        with Image.open(tmp_path / "report" / name) as picture:
            picture.load()
            assert picture.width > 800
