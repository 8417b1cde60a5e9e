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

README = (ROOT / "README.md").read_text()
MADE = [name for name in run_all.PARTS if (ROOT / "results" / f"{name}.json").exists()]


@pytest.mark.parametrize("name", run_all.tables())
def test_the_readme_shows_the_table_of_the_results(name):
    assert run_all.tables()[name] in README


@pytest.mark.parametrize("name", MADE)
def test_results_say_how_they_were_made(name):
    part, plan = run_all.load(name), run_all.PARTS[name]
    assert {"command", "machine", "versions", "runs"} <= part.keys() and part["split"] == plan.split
    assert plan.options in part["command"]
    seeds = [run["seed"] for run in part["runs"]]
    assert seeds and set(seeds) <= set(plan.seeds) and len(seeds) == len(set(seeds))
    assert len({run["data"] for run in part["runs"]}) == 1      # all of one corpus


def test_comparisons_follow_from_the_runs():
    rows = run_all.load("comparisons")["rows"]
    assert [row["claim"] for row in rows if not row["equal"]] == [
        claim for claim, *pair in run_all.COMPARISONS if all(x.split()[0] in MADE for x in pair)]
    for row in rows:
        a, b = (run_all.nll(*row[side].split()) for side in ("lower", "higher"))
        mean, half, p = run_all.t_test([a[seed] - b[seed] for seed in row["seeds"]])
        assert row["nats"] == pytest.approx(mean, rel=1e-6)
        if len(row["seeds"]) > 1:
            assert [*row["interval"], row["p"]] == pytest.approx(
                [mean - half, mean + half, p], rel=1e-6, abs=1e-12)


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
