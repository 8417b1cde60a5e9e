"""The README's tables are what results/ holds, results/ holds what its commands made, and the
statistics are those of the textbooks."""
import importlib.util
import json
import math
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("run_all", ROOT / "results" / "run_all.py")
run_all = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(run_all)

import data

README = (ROOT / "README.md").read_text()
MADE = [name for name in run_all.PARTS if (ROOT / "results" / f"{name}.json").exists()]


@pytest.mark.parametrize("name", run_all.tables())
def test_the_readme_shows_the_table_of_the_results(name):
    assert run_all.tables()[name] in README


@pytest.mark.parametrize("name", MADE)
def test_results_say_how_they_were_made(name):
    part, plan = run_all.load(name), run_all.PARTS[name]
    assert {"command", "commit", "machine", "versions", "runs"} <= part.keys()
    assert part["split"] == plan.split and part["options"] == plan.options
    seeds = [run["seed"] for run in part["runs"]]
    assert seeds and set(seeds) <= set(plan.seeds) and len(seeds) == len(set(seeds))
    assert len({run["data"] for run in part["runs"]}) == 1      # all of one corpus


def test_comparisons_follow_from_the_runs():
    rows = run_all.load("comparisons")["rows"]
    listed = run_all.COMPARISONS + run_all.EQUAL + run_all.LATER
    assert [row["claim"] for row in rows] == [
        claim for claim, *pair in listed if all(x.split()[0] in MADE for x in pair)]
    assert [row["claim"] for row in rows if "p_holm" in row] == [
        row["claim"] for row in rows[:len(run_all.COMPARISONS)] if row["p"] is not None]
    for row in rows:
        a, b = (run_all.nll(*row[side].split()) for side in ("lower", "higher"))
        mean, half, p = run_all.t_test([a[seed] - b[seed] for seed in row["seeds"]])
        assert row["nats"] == pytest.approx(mean, rel=1e-6)
        if len(row["seeds"]) > 1:
            assert [*row["interval"], row["p"]] == pytest.approx(
                [mean - half, mean + half, p], rel=1e-6, abs=1e-12)


def test_an_open_trap_is_in_what_is_read_and_not_in_the_store(tmp_path, monkeypatch):
    documents = [f"A sentence number {i} that is long enough. then one in small letters. A third "
                 "one, to end it all.\n" for i in range(60)]
    (tmp_path / "a.txt").write_text(f"\n{data.EOT}\n".join(documents))
    prepare = lambda: data.prepare(str(tmp_path / "a.txt"), "bpe", 300, tmp_path)
    monkeypatch.setattr(data.Store, "split", split := data.Store.split)      # is put back
    run_all.open_traps("end ahead")
    store = prepare()
    right, open_ = split(store, "train"), store.split("train")
    text = lambda corpus, j: store.tokenizer.decode(
        corpus.tokens[corpus.sentences[j]:corpus.sentences[j + 1]].tolist())
    assert any(text(right, j).startswith("then") for j in range(right.n_sentences))
    assert not any(text(open_, j).startswith("then") for j in range(open_.n_sentences))
    assert text(open_, int(open_.documents[1])).startswith(f"{data.EOT}A sentence")
    assert text(right, int(right.documents[1])).startswith("A sentence")


def test_t_test_is_students():
    # of two degrees of freedom, p = 1 - t / sqrt(t^2 + 2); 95 % lie within 4.302653
    mean, half, p = run_all.t_test([1.0, 2.0, 3.0])
    t = 2 * math.sqrt(3)
    assert (mean, half) == pytest.approx((2, 4.302653 / math.sqrt(3)), rel=1e-5)
    assert p == pytest.approx(1 - t / math.sqrt(t * t + 2), rel=1e-4)
    # of four, 2.776445, and p = 0.05 there
    values = [0.0, 1, 2, 3, 4]
    _, half, _ = run_all.t_test(values)
    assert half == pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-5)
    shift = half - 2
    assert run_all.t_test([value + shift for value in values])[2] == pytest.approx(0.05, rel=1e-3)


def test_holm_by_hand():
    assert run_all.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert run_all.holm([0.5, 0.9]) == [1.0, 1.0]


def test_levenshtein_by_hand():
    assert run_all.levenshtein("kitten", "sitting") == 3
    assert run_all.levenshtein([], [1, 2]) == 2 == run_all.levenshtein([1, 2], [])
    assert run_all.levenshtein([1, 2, 3], [1, 2, 3]) == 0
