"""The report page holds a run's own figures, loads nothing, and shows any text as text."""
import importlib
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from data import EOT
from eval import evaluate, load_run, score
from model import PLANS

sys.path.append(str(Path(__file__).parent.parent / "assets"))
report = importlib.import_module("report")

@pytest.fixture(scope="module")
def opened(trained):
    """A run of all plans on documents full of markup, with its report."""
    report.main([f"--out_dir={trained}"])
    return load_run(trained)


class Page(HTMLParser):
    """A report as a browser reads it."""

    def __init__(self, opened):
        super().__init__()
        self.names = set()                  # of all elements and attributes
        self.texts = []                     # of the elements that are not shown
        self.feed((opened.out_dir / "report.html").read_text("utf-8"))
        self.styles, json_text, self.code = self.texts
        # NaN is not JSON.
        self.data = json.loads(json_text, parse_constant=pytest.fail)

    def handle_starttag(self, tag, attributes):
        self.names |= {tag, *dict(attributes)}
        if tag in ("script", "style"):
            self.texts.append("")

    def handle_data(self, text):
        if self.lasttag in ("script", "style"):
            self.texts[-1] += text


def test_the_page_loads_nothing_and_shows_markup_as_text(corpus, opened):
    page = Page(opened)
    assert not page.names & {"link", "iframe", "object", "base", "src"}
    assert not re.search(r"\b(fetch|XMLHttp|import|innerHTML|url)\b", page.styles + page.code)
    shown = "".join(page.data["documents"]["tokens"]).split(EOT)[1:-1]
    text = corpus.read_text("utf-8")
    assert shown
    assert all(document in text for document in shown)


def test_the_figures_are_evals_and_every_token_has_the_nats_of_every_plan(opened):
    shown = Page(opened).data
    corpus = opened.split("val")
    assert shown["results"] == evaluate(opened, corpus, "val")
    documents = shown["documents"]
    corpus = opened.labeler.label(report.example_documents(corpus, opened.tokenizer))
    assert list(documents["nll"]) == list(PLANS)
    assert documents["labels"] == corpus.labels.tolist()
    for plan in PLANS:
        nll, label_log_probs = score(opened.model(plan), corpus)
        assert documents["nll"][plan] == pytest.approx(nll, abs=1e-4)
        assert (plan in documents["top"]) == (label_log_probs is not None)
        if label_log_probs is not None:
            likeliest = [top[0] for top in documents["top"][plan]]
            assert likeliest == label_log_probs.argmax(1).tolist()


def test_curves_take_the_last_line_of_a_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    # Training was killed after step 20, went on from step 10, and was killed within a line.
    path.write_text('{"stage": "lm", "step": 10, "loss": 9.0, "val_nll": 8.0}\n'
                    '{"stage": "lm", "step": 20, "loss": 7.0, "val_label_nats": null}\n'
                    '{"stage": "lm", "step": 20, "loss": 6.0, "val_label_nats": null}\n'
                    '{"stage": "lm", "step": 30, "lo')
    curves = {"loss": [[10, 9.0], [20, 6.0]], "val_nll": [[10, 8.0]]}
    assert report.read_curves(path) == {"lm": curves}
