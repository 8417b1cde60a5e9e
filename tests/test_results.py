"""The README's table is what results/ holds, and results/ holds what its command made."""
import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("run_all", ROOT / "results" / "run_all.py")
run_all = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(run_all)


def test_the_readme_shows_the_table_of_the_results():
    assert run_all.table("default") in (ROOT / "README.md").read_text()


def test_results_say_how_they_were_made():
    for name in run_all.PARTS:
        part = json.loads((ROOT / "results" / f"{name}.json").read_text())
        assert {"command", "machine", "versions", "runs"} <= part.keys()
        assert [run["seed"] for run in part["runs"]] == list(run_all.PARTS[name][1])
        assert len({run["data"] for run in part["runs"]}) == 1      # all of one corpus


def test_the_claim_of_the_readme_holds_in_the_results():
    """soft is the lowest for each seed, and hard is below none on average, on validation."""
    runs = [run["plans"] for run in json.loads(
        (ROOT / "results" / "default.json").read_text())["runs"]]
    assert all(min(run, key=lambda plan: run[plan]["nll"] if plan != "oracle" else 99) == "soft"
               for run in runs)
    assert sum(run["hard"]["nll"] - run["none"]["nll"] for run in runs) < 0
