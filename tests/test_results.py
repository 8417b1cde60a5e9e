"""What is written is what results/*.json hold; parts can be run; statistics are the textbooks'."""
import importlib
import math
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "results"))

import data
import train

run_all = importlib.import_module("run_all")
FILES = sorted(ROOT.glob("results/*.json"))
PAGE, TEMPLATE, README = ((ROOT / name).read_text("utf-8") for name in (
    "results/README.md", "results/template.md", "README.md"))


def test_results_readme_is_what_the_json_files_give_and_names_each():
    assert PAGE == run_all.write_readme() and "{{" not in PAGE
    assert [path.name for path in FILES if path.name not in PAGE] == []


def test_no_figure_in_a_table_is_typed_by_hand():
    for line in TEMPLATE.splitlines():
        if line.startswith("| ") and "{{" in line:      # the first cell says what the row is
            typed = re.sub(r"\{\{.*?\}\}", "", line).split("|", 2)[2]
            assert not re.search(r"\d", typed), line


def test_figures_in_sentences_and_in_the_readme_stand_in_the_tables():
    tables = {figure for line in PAGE.splitlines() if line.startswith("|")
              for figure in re.findall(r"\d+\.\d+", line)}
    sentences = " ".join(line for line in PAGE.splitlines() if not line.startswith("|"))
    section = README.split("## What comes out")[1].split("\n#")[0]
    sentences += README.split("## The method")[0] + section + README.split("The paper's claims")[1]
    assert set(re.findall(r"\b\d{1,2}\.\d+", sentences)) <= tables | {"0.05"}     # the level of p
    rows = [line for line in section.splitlines() if re.match(r"\|.*\d\.\d", line)]
    assert len(rows) >= 5 and [row for row in rows if row not in PAGE.splitlines()] == []


def test_a_verdict_is_what_its_comparison_decides():
    compared = re.findall(r"^\| (\d)\. .* \| (\S+) \| .* to .* \| <?(\S+) \|$", PAGE, re.M)
    p_values = {(claim, change): float(p) for claim, change, p in compared}
    verdicts = re.findall(r"\((\d)\) \| .* \| (not held|held)(, the opp)?.*: .*?(\S+) % \(", PAGE)
    assert len(verdicts) == 13
    for claim, verdict, opposite, change in verdicts:
        assert (p_values[claim, change] < 0.05) == (verdict == "held" or opposite != "")


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_a_commit_that_a_file_names_exists(path):
    for commit in set(re.findall(r'"commit": "([0-9a-f]{7,40})', path.read_text("utf-8"))):
        if subprocess.run(["git", "rev-parse", "HEAD^"], cwd=ROOT, capture_output=True).returncode:
            pytest.skip("the history of git is not here")
        assert run_all.git("cat-file", "-t", commit) == "commit"


def test_parts_can_be_run_and_comparisons_are_of_what_they_score_on_test(tmp_path):
    plans, out = {}, f"--out_dir={tmp_path}"
    for name, part in run_all.PARTS.items():
        assert part.start in [*plans, ""]               # run before it
        plans[name] = train.parse_config([*part.options.split(), out]).plan_names
    for part, plan, *of in (side.split() for _, *sides in run_all.COMPARISONS for side in sides):
        assert plan in plans[part] and run_all.PARTS[part].split == "test"
        assert set(of) <= set(run_all.STRATA)


@pytest.mark.parametrize("name", [path.stem for path in ROOT.glob("results/*.npz")])
def test_the_sums_of_nats_are_those_of_the_scores(name):
    for seed, run in run_all.finished(name).items():
        for plan, figures in run["test"].items():
            whole, *parts = (np.array(run_all.nats(f"{name} {plan} {of}", seed))
                             for of in ("", "inside", "older"))
            assert whole[0].sum() / whole[1].sum() == pytest.approx(figures["nll"], rel=1e-5)
            assert sum(parts) == pytest.approx(whole, rel=1e-5)


def test_the_open_trap_gives_an_endoftext_to_the_next_document(tmp_path):
    texts = [f"Number {i} is a sentence of its own. And more" for i in range(60)]
    (tmp_path / "a.txt").write_text(f"\n{data.EOT}\n".join(texts))
    store = data.prepare(str(tmp_path / "a.txt"), "bpe", 300, tmp_path)
    leaky = run_all.leaky_split(store, "train")
    starts = leaky.sentences[leaky.documents]
    assert len(starts) > 40 and (leaky.tokens[starts] == store.tokenizer.eot_token).all()


def test_each_token_has_its_stratum():
    tokenizer = data.bpe_tokenizer(data.train_bpe(["x"], 257))          # a token a byte
    first, second = "Seven is a sentence of its own. ", "Eight is another one of that kind. "
    texts = [first], [first + second, first]
    known, read = (data.Corpus.from_texts(text, tokenizer) for text in texts)
    run = mock.Mock(config=mock.Mock(block_size=16), corpus=lambda split: known)
    document, place, older, copied = np.unravel_index(*run_all.strata(run, read))
    a, b = len(first), len(second)
    assert document.tolist() == [0] * (a + b + 1) + [1] * (a + 1)       # and their <|endoftext|>
    assert place[:a].tolist() == [0, 1, 2, 2, *4 * [3], *8 * [4], *(a - 16) * [5]]
    # windows start at multiples of 8 and score their last 8; the documents at 1 and a + b + 2
    assert older[:a + b].tolist() == [0] * 16 + [1] * (a + b - 16)
    assert np.flatnonzero(older[a + b + 1:])[0] == 17 - (a + b + 2) % 8 == 12
    assert copied.tolist() == [1] * a + [0] * b + [1] * (a + 2)         # <|endoftext|> is one, too


def test_student_holm_and_bootstrap_against_textbooks():
    # of two degrees of freedom, p = 1 - t / sqrt(t^2 + 2), and 95 % lie within 4.302653
    mean, half, p = run_all.t_test([1.0, 2.0, 3.0])
    t = 2 * math.sqrt(3)
    assert (mean, half) == pytest.approx((2, 4.302653 / math.sqrt(3)), rel=1e-5)
    assert p == pytest.approx(1 - t / math.sqrt(t * t + 2), rel=1e-4)
    assert run_all.t_test([0.0, 1, 2, 3, 4])[1] == pytest.approx(2.776445 * math.sqrt(0.5))
    assert run_all.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    draws = np.random.default_rng(1).normal(3, 1, 10_000)       # of documents of one token
    low, high = run_all.bootstrap(draws, np.ones(10_000))
    assert (low, high) == pytest.approx((draws.mean() - 0.0196, draws.mean() + 0.0196), abs=0.002)
