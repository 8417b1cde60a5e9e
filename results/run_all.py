"""Makes the figures of the README from scratch, a part at a time, resumably.

    python results/run_all.py                    # every part; hours on a laptop
    python results/run_all.py default            # one part: results/default.json
    python results/run_all.py --table            # the README's tables, from the JSON files

Each part is some runs of train.py that differ in the seed alone, and writes results/NAME.json: the
command, the machine, versions, and for each seed the results.json of its run, with its seconds.
`test` is read by the parts that say so, once all is decided on validation.
"""
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# name: (options of train.py, seeds, split)
PARTS = {
    "default": ("", (0, 1, 2), "test"),
    # against `soft` of default's seed 0: the vectors are chosen on validation
    "vectors_hidden": ("--plans=soft --vectors=hidden", (0,), "val"),
}


def machine() -> str:
    import torch                                     # not needed for --table
    device = (torch.cuda.get_device_name() if torch.cuda.is_available()
              else f"{os.cpu_count()} CPU cores")
    return f"{device}, {platform.system()} {platform.machine()}"


def run_part(name: str) -> None:
    options, seeds, split = PARTS[name]
    path = ROOT / "results" / f"{name}.json"
    part = json.loads(path.read_text()) if path.exists() else {"runs": []}
    for seed in seeds:
        if any(run["seed"] == seed for run in part["runs"]):
            continue
        out = ROOT / f"out-results/{name}-{seed}"
        begun = time.time()
        command = [sys.executable, "train.py", *shlex.split(options), f"--seed={seed}",
                   f"--out_dir={out}", "--resume"]
        subprocess.run(command, cwd=ROOT, check=True)
        seconds = time.time() - begun
        results = json.loads((out / "results.json").read_text())
        if split == "test":
            command = [sys.executable, "eval.py", f"--out_dir={out}", "--split=test"]
            subprocess.run(command, cwd=ROOT, check=True)
            results["test"] = json.loads((out / "eval.json").read_text())["plans"]
        part["runs"].append(results | {"seconds": round(seconds)})
        part |= {"command": f"python train.py {options} --seed=SEED".replace("  ", " "),
                 "split": split, "machine": machine(), "versions": results["versions"]}
        path.write_text(json.dumps(part, indent=1) + "\n")


def table(name: str) -> str:
    """A part as a Markdown table: means over seeds, and the paired change against `none`."""
    part = json.loads((ROOT / "results" / f"{name}.json").read_text())
    key = "test" if part["split"] == "test" else "plans"
    runs = [run[key] for run in part["runs"]]
    rows = ["| plan | perplexity | against `none` | each seed, % | bits per byte |",
            "|---|---|---|---|---|"]
    for plan in runs[0]:
        mean = lambda quantity: statistics.mean(run[plan][quantity] for run in runs)
        change = each = ""
        if plan != "none" and "none" in runs[0]:
            changes = [100 * math.expm1(run[plan]["nll"] - run["none"]["nll"]) for run in runs]
            change = f"{statistics.mean(changes):+.2f} %"
            each = ", ".join(f"{c:+.2f}" for c in changes)
        rows.append(f"| `{plan}` | {mean('ppl'):.2f} | {change} | {each} | "
                    f"{mean('bits_per_byte'):.4f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    if "--table" in sys.argv:
        for name in PARTS:
            if (ROOT / "results" / f"{name}.json").exists():
                print(f"{name}\n{table(name)}\n")
    else:
        for name in sys.argv[1:] or PARTS:
            run_part(name)
