"""The report page holds a run's own figures, needs no other file, and shows any text as text."""
import importlib
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import train
from eval import Run, evaluate
from model import PLANS

sys.path.append(str(Path(__file__).parent.parent / "assets"))
report = importlib.import_module("report")

MARKUP = ["</script><script>alert(1)</script>", "<!-- never closed", "<b class='x'>\"bold\"</b> &",
          "\u2028 café 日本 \U0001f600 \x01"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """All plans, trained for a few steps on documents full of markup, and their page."""
    folder = tmp_path_factory.mktemp("report")
    documents = [f"Sentence number {i} of a small text. It quotes {' and also '.join(MARKUP)} and "
                 f"goes on for a while.\nThe end of document number {i}." for i in range(80)]
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(documents), "utf-8")
    options = dict(preset="tiny", data=folder / "text.txt", out_dir=folder / "out", plans="all",
                   cache_dir=folder / "cache", vocab_size=300, device="cpu", dtype="float32")
    train.main([f"--{name}={value}" for name, value in options.items()])
    report.main([f"--out_dir={folder / 'out'}", "--device=cpu"])
    return Run.open(folder / "out", "cpu")


class Page(HTMLParser):
    """A run's page as a browser reads it: names of elements and attributes, styles, data, code."""

    def __init__(self, run: Run):
        super().__init__()
        self.names, self.texts = set(), []
        self.feed((run.out / "report.html").read_text("utf-8"))
        self.styles, json_text, self.code = self.texts
        self.data = json.loads(json_text, parse_constant=pytest.fail)       # NaN is not JSON

    def handle_starttag(self, tag, attributes):
        self.names |= {tag, *dict(attributes)}
        if tag in ("script", "style"):
            self.texts.append("")

    def handle_data(self, text):
        if self.lasttag in ("script", "style"):
            self.texts[-1] += text


def test_the_page_loads_nothing(run):
    page = Page(run)
    assert not page.names & {"link", "iframe", "object", "base", "src"}
    assert not re.search(r"\b(fetch|XMLHttp|import|innerHTML|url)\b", page.styles + page.code)


def test_no_text_of_the_corpus_ends_the_element_that_holds_it(run):
    assert all(markup in "".join(Page(run).data["documents"]["tokens"]) for markup in MARKUP)


def test_the_figures_are_evals_and_every_token_has_the_nats_of_every_plan(run):
    shown = Page(run).data
    assert shown["results"] == evaluate(run, run.corpus("val"), run.store().bytes["val"], "val")
    documents = shown["documents"]
    corpus = run.label(report.example_documents(run.corpus("val"), run.tokenizer))
    assert list(documents["nll"]) == list(PLANS) and documents["labels"] == corpus.labels.tolist()
    for plan, nll in documents["nll"].items():
        scores = run.score(run.model(plan), corpus)
        assert nll == pytest.approx(scores.nll, abs=1e-4)
        said = scores.label_log_probs
        assert (plan in documents["top"]) == (said is not None)
        if said is not None:
            assert [top[0] for top in documents["top"][plan]] == [
                0 if row[0] != row[0] else row.argmax() for row in said]


def test_curves_take_the_last_line_of_a_step_and_pass_over_damaged_ones(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "lm", "step": 10, "loss": 9.5}\n{"stage": "lm", "step": 20, "loss": '
                    'NaN}\nnot json\n[1]\n{"step": 3}\n{"stage": "lm", "step": 30, "loss": 7}\n'
                    '{"stage": "lm", "step": 10, "loss": 8.5}\n{"stage": "lm", "step": 40, "lo')
    assert report.read_curves(path) == {"lm": {"loss": [(10, 8.5), (30, 7)]}}
