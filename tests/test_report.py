"""The report page: it stands alone, holds what it promises, and shows any text as text."""
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import eval as evaluation
import train
from model import PLANS, USES_PLANNER

MARKUP = ["</script><script>alert(1)</script>", "<!-- never closed",
          "<b class='x'>\"bold\"</b> & co", "\u2028 café 日本 \U0001f600 \x01"]
PAGE_LIMIT = 2_000_000


def trained(folder: Path, plans: str) -> tuple[evaluation.Run, dict]:
    """A run of a second or two on documents with markup in every one, and its results."""
    documents = [f"Sentence number {i} of a small text. It quotes {MARKUP[i // 20]} and goes on "
                 f"for a while. {MARKUP[i // 20]} closes document number {i}.\n"
                 "The end of it all, once more."
                 for i in range(80)]
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    options = dict(preset="tiny", data=folder / "text.txt", out_dir=folder / "out",
                   cache_dir=folder / "cache", vocab_size=300, lm_steps=4, planner_steps=4,
                   joint_steps=4, device="cpu", dtype="float32", plans=plans)
    arguments = [f"--{name}={value}" for name, value in options.items()]
    results = train.run(train.parse_config(arguments))
    return evaluation.Run.open(folder / "out", "cpu"), results


@pytest.fixture(scope="module")
def all_plans(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("report"), "all")


def page_of(run, results) -> str:
    path = run.out_dir / "report.html"
    evaluation.write_report(run, path, run.corpus("val"), results)
    assert path.stat().st_size < PAGE_LIMIT
    return path.read_text("utf-8")


@pytest.fixture(scope="module")
def page(all_plans):
    return page_of(*all_plans)


class Elements(HTMLParser):
    """The elements of a page with their attributes, and the text within each script,
    read as a browser does."""

    def __init__(self, text: str):
        super().__init__()
        self.found, self.scripts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, text):
        if self.found and self.found[-1][0] == "script":
            self.scripts[-1] += text


def data_of(page: str) -> dict:
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(Elements(page).scripts[0], parse_constant=refuse)


def test_the_page_fetches_nothing(page):
    for tag, attributes in Elements(page).found:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        for name in ("src", "href", "action", "data", "style"):
            value = attributes.get(name) or ""
            assert not re.match(r"\s*(?!#)\S*(//|url\()", value), (tag, attributes)
    styles = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    assert "url(" not in styles and "@import" not in styles
    code = Elements(page).scripts[1]
    forbidden = (r"\b(fetch|XMLHttpRequest|WebSocket|import|eval|innerHTML|outerHTML"
                 r"|document\.write)\b")
    assert not re.search(forbidden, code)


def test_markup_in_a_corpus_stays_text(all_plans, page):
    elements = Elements(page)
    assert [tag for tag, _ in elements.found].count("script") == 2
    assert "<" not in elements.scripts[0] and "alert" in elements.scripts[0]
    tokens = data_of(page)["documents"]["tokens"]
    text = "".join(tokens)
    for markup in MARKUP:
        assert markup in text, "the page holds another text than the corpus"


def test_the_table_is_evaluates(all_plans, page):
    run, results = all_plans
    fresh = evaluation.evaluate(run, run.corpus("val"), results["bytes"], "val")
    saved = json.loads((run.out_dir / "results.json").read_text())
    assert data_of(page)["results"] == fresh == saved


def test_every_token_has_the_nats_of_every_plan(all_plans, page):
    run, results = all_plans
    found = data_of(page)["documents"]
    corpus = evaluation.example_documents(run.corpus("val"), run.tokenizer)
    assert list(found["nll"]) == list(results["plans"]) == list(PLANS)
    vectors, labels = run.sentences(corpus)
    assert found["labels"] == labels.tolist() and len(found["tokens"]) == len(corpus.tokens)
    for plan, nll in found["nll"].items():
        scored = evaluation.score(run.model(plan), corpus, vectors, labels,
                                  run.config["planner_reach"], run.config["planner_view"])
        assert nll == pytest.approx(scored.nll, abs=1e-4)
    assert set(found["top"]) == set(found["prob"]) == set(USES_PLANNER)
    for rows in found["prob"].values():
        for row in rows[1:len(labels)]:
            assert row == sorted(row, reverse=True) and 0 < sum(row) <= 1.001


def test_labels_curves_and_sample_are_there(all_plans, page):
    run, _ = all_plans
    found = data_of(page)
    assert len(found["labels"]) == run.config["n_labels"] and 0 <= found["variance"] <= 1.000001
    for label, described in zip(found["labels"], run.saved_labels["descriptions"]):
        assert len(label["place"]) == 2 and label["words"] == described["words"]
        assert sum(share for _, share in label["next"]) <= 1.002
    assert set(found["curves"]) == {"lm", "planner", *(f"joint_{plan}" for plan in PLANS)}
    assert [step for step, _ in found["curves"]["joint_soft"]["label_loss"]] == [4]
    assert found["sample"]["plan"] == "soft"
    sentences = found["sample"]["sentences"]
    assert not sentences[0]["written"] and sentences[-1]["written"]


def test_principal_components_keep_distances_within_a_plane(all_plans):
    run, _ = all_plans
    centroids, flat = run.labeler.centroids, run.labeler.centroids.clone()
    flat[:, 2:] = 0
    run.labeler.centroids = flat
    found = evaluation.label_map(run)
    run.labeler.centroids = centroids
    places = flat.new_tensor([label["place"] for label in found["labels"]])
    distances = [(x[:, None] - x).norm(dim=2) for x in (places, flat)]
    assert distances[0] == pytest.approx(distances[1], abs=1e-3)
    assert found["variance"] == pytest.approx(1)


@pytest.mark.parametrize("plans", ["none", "soft", "oracle"])
def test_a_run_of_one_plan_has_a_page(tmp_path, plans):
    run, results = trained(tmp_path, plans)
    (run.out_dir / "metrics.jsonl").unlink()
    found = data_of(page_of(run, results))
    assert list(found["documents"]["nll"]) == [plans] and found["curves"] == {}
    assert (found["sample"] is None) == (plans == "oracle")


def test_a_damaged_line_of_metrics_is_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"stage": "lm", "step": 10, "loss": 2.5, "lr": 1}\nnot json\n[1]\n'
                     b'{"stage": "lm"}\n\xff\xfe\n{"stage": "lm", "step": 20, "loss": NaN}\n'
                     b'{"stage": "lm", "step": 30, "val_nll": 2.25}\n'
                     b'{"stage": "lm", "step": 40, "lo')
    points = evaluation.read_curves(path)["lm"]
    assert points["loss"][0] == [10, 2.5] and len(points["loss"]) == 2
    assert points["val_nll"] == [[30, 2.25]]
    assert evaluation.read_curves(tmp_path / "none.jsonl") == {}


def test_long_curves_are_thinned_and_keep_their_end(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"stage": "lm", "step": step, "loss": 1.0}) + "\n"
             for step in range(1, 5001)]
    path.write_text("".join(lines))
    steps = [step for step, _ in evaluation.read_curves(path, limit=200)["lm"]["loss"]]
    assert len(steps) <= 200 and steps[-1] == 5000 and steps == sorted(steps)


def test_the_command_writes_the_page(all_plans, capsys):
    run, results = all_plans
    path = run.out_dir / "by_command.html"
    evaluation.main([f"--out_dir={run.out_dir}", f"--report={path}", "--device=cpu"])
    assert data_of(path.read_text("utf-8"))["results"] == results
    assert "perplexity" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["missing/report.html", ".", "/dev/null"])
def test_a_path_that_can_not_be_written_is_one_line(all_plans, tmp_path, capsys, where):
    run, _ = all_plans
    with pytest.raises(SystemExit) as stopped:
        evaluation.main([f"--out_dir={run.out_dir}", f"--report={tmp_path / where}"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1 and error.startswith("eval.py: error: ")
    assert str(tmp_path / where) in error
