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
    for name in (name for name in run_all.PARTS if (ROOT / "results" / f"{name}.json").exists()):
        part = json.loads((ROOT / "results" / f"{name}.json").read_text())
        assert {"command", "machine", "versions", "runs"} <= part.keys()
        assert [run["seed"] for run in part["runs"]] == list(run_all.PARTS[name][1])
        assert len({run["data"] for run in part["runs"]}) == 1      # all of one corpus


def test_soft_is_the_lowest_for_each_seed():
    """On validation, where the plans were compared, and on test, which was read once."""
    part = json.loads((ROOT / "results" / "default.json").read_text())
    for run in part["runs"]:
        for nll in ({plan: r["nll"] for plan, r in run[key].items()} for key in ("plans", "test")):
            assert min(nll, key=nll.get) == "soft"
