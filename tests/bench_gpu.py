"""The parts of tests/gpu.sh: each function prints rows of JSON, and `report` gathers them."""
import functools
import importlib
import itertools
import json
import os
import sys
from pathlib import Path

import torch

# This puts the repository's root on the path, so it comes first.
bench = importlib.import_module("bench")

import data
import train
from eval import choose_autocast, choose_device, versions
from model import PLANS
from planner import build_model

DRY = os.environ["DRY"] == "1"
if DRY:
    # The usual backend takes a minute for each graph on a CPU.
    torch.compile = functools.partial(torch.compile, backend="aot_eager")


def text(c):
    """Prepare the text. If there is none, write the docstrings to a file first."""
    path = Path(c.data)
    if not path.exists():
        documents = itertools.islice(data.documents("docstrings"), 300 if DRY else None)
        path.write_text("".join(json.dumps({"text": text}) + "\n" for _, text in documents))
    store = open_store(c)
    yield {"text": path.name, "vocabulary": c.vocab_size,
           "training tokens": len(store.split("train").tokens)}


def open_store(c):
    """The prepared text. The models get a vocabulary of its size."""
    store = data.prepare(c.data, c.tokenizer, c.vocab_size, Path(c.cache_dir))
    c.vocab_size = store.tokenizer.n_vocab
    return store


def plans(c):
    """The loss and the gradients of every plan, against those in float32 on the CPU."""
    c.n_layer = c.planner_layer = c.batch_size = 2
    corpus = bench.label_at_random(open_store(c), c)
    starts = data.batch_starts(len(corpus.tokens), c.block_size, c.batch_size, (0,), 0)
    batch = data.window_batch(corpus, starts, c.block_size, c.planner_reach)
    # A CPU would spend minutes on 50,257 token embeddings.
    c.vocab_size = min(c.vocab_size, 4096)
    batch.tokens %= c.vocab_size
    batch.targets %= c.vocab_size
    # In bfloat16 another label may be the likeliest, which moves rows of a gradient.
    bounds = {"float32": (1e-4, 1e-3), "bfloat16": (0.02, 0.5)}
    for plan in PLANS:
        exact_loss, exact = gradients(c, plan, batch, "cpu", "float32")
        row = {"plan": plan, "loss": exact_loss, "ok": True}
        for dtype, (loss_bound, gradient_bound) in bounds.items():
            loss, found = gradients(c, plan, batch, c.device, dtype)
            errors = {}
            for name, g in exact.items():
                # The planner's start vector has no gradient if no document opens in these windows.
                size = g.norm().clamp(min=1e-12)
                errors[name] = ((found[name] - g).norm() / size).item()
            worst = max(errors, key=errors.get)
            row |= {dtype: loss - exact_loss, f"{dtype} {worst}": errors[worst]}
            # A NaN fails as well.
            row["ok"] &= abs(loss - exact_loss) < loss_bound
            row["ok"] &= all(error < gradient_bound for error in errors.values())
        yield row


def gradients(c, plan, batch, device, dtype):
    """The loss of a batch, and {name: the gradient of a parameter}."""
    device = choose_device(device)
    # In evaluation `gumbel` draws no noise, which would differ between devices.
    model = build_model(c, plan, c.vocab_size).eval()
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        # Zeros would hide all that a plan does.
        if "plan_map" in name or "label_emb" in name:
            torch.nn.init.normal_(p, std=0.05)
    model.to(device)
    with choose_autocast(dtype, device):
        nll, _ = model(batch.to(device))
    nll.mean().backward()
    grads = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return nll.mean().item(), grads


def steps(c):
    """The speed and the memory of a step without a plan and under `soft`."""
    corpus = bench.label_at_random(open_store(c), c)
    for plan in ("none", "soft"):
        [row] = bench.step_table([plan], c, corpus, {}, rounds=4)
        if bench.ON_GPU:
            row["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
            torch.cuda.reset_peak_memory_stats()
        yield row


def stages(c):
    """All stages of train.py, and what came out."""
    train.train(c)
    out = Path(c.out_dir)
    yield from map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    for plan, figures in data.read_json(out / "results.json")["plans"].items():
        yield {"plan": plan} | figures


def report():
    """Write and print the rows of all parts. Returns whether every part passed."""
    work = Path(os.environ["WORK"])
    results = {"command": os.environ["COMMAND"], "machine": bench.machine(),
               "versions": versions() | {"cuda": torch.version.cuda}, "parts": {}}
    print(results["machine"], results["versions"])
    for line in (work / "parts.txt").read_text().splitlines():
        name, code, seconds = line.split()
        log = (work / f"{name}.log").read_text(errors="replace").splitlines()
        part = {"passed": code == "0", "seconds": int(seconds)}
        if name == "stages_compiled":
            part["recompilations"] = sum("Recompiling function" in entry for entry in log)
            part["hits of the limit"] = sum("torch._dynamo hit config." in entry for entry in log)
            part["passed"] &= part["hits of the limit"] == 0
        print(f"{name}: {bench.line(part)}")
        part["rows"] = [json.loads(entry) for entry in log if entry.startswith('{"')]
        for row in part["rows"]:
            print(f"    {bench.line(row)}")
        if not part["passed"] or not part["rows"]:
            print("    " + "\n    ".join(log[-5:]))
        results["parts"][name] = part
    data.write_json(Path(os.environ["RESULTS"]), results)
    return all(part["passed"] for part in results["parts"].values())


if __name__ == "__main__":
    if sys.argv[1] == "report":
        sys.exit(not report())
    passed = True
    for row in globals()[sys.argv[1]](train.parse_config(sys.argv[2:])):
        print(json.dumps(row), flush=True)
        passed &= row.get("ok", True)
    sys.exit(not passed)
