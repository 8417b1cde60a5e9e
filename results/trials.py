"""Trials of the learner: what would make stage `lm` better in as many seconds?

    python results/trials.py                        # every trial, seed 0; results/trials.json
    python results/trials.py relu_squared --seed=1  # one of them

Each trial changes one thing of the code of the commit that added this file: rotary positions, Muon
at 0.02 and AdamW at 0.002 (in the second round, `more_*`, 0.008). It trains for as many seconds as
350 steps of `base` take, by the ratio of their steps, and is scored on the first 100,000 tokens of
validation. What was kept is in the code since: an embedding norm, and higher rates for AdamW.
Check out that commit to run it again.
"""
import argparse
import inspect
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]
os.environ["TQDM_DISABLE"] = "1"

import torch
import torch.nn.functional as F
from torch import nn

import data
import model
import train
from eval import versions
from run_all import machine

STEPS = 350                             # of base


# --- the changes ----------------------------------------------------------------------------------
def qk_norm():
    """Queries and keys of length sqrt(D) before they are turned."""
    turn = model.rotate
    model.rotate = lambda x: turn(F.rms_norm(x, x.shape[-1:]))


def relu_squared():
    model.F = Functional(gelu=lambda x: F.relu(x).square())


def rms_norm():
    """RMSNorm for LayerNorm, everywhere."""
    nn.LayerNorm = nn.RMSNorm


def embedding_norm():
    """A norm without weights behind the token embedding."""
    model.F = Functional()
    model.GPT.forward = changed(model.GPT.forward, "self.wte(tokens)", "norm(self.wte(tokens))")


def own_head():
    """An output matrix of its own."""
    def build(self, *arguments, **options):
        start(self, *arguments, **options)
        self.head = nn.Linear(self.wte.weight.shape[1], len(self.wte.weight), bias=False)
        nn.init.normal_(self.head.weight, std=0.02)
    start = model.GPT.__init__
    model.GPT.__init__ = build
    model.GPT.logits = lambda self, x: self.head(x)[..., :self.vocab_size]


def zero_residual():
    """What is added to the residual stream begins at zero."""
    def init(module, n_layer, seed):
        start(module, n_layer, seed)
        for name, p in module.named_parameters():
            if name.endswith(("proj.weight", "down.weight")):
                nn.init.zeros_(p)
    start = model.init_weights
    model.init_weights = init


def linear():
    """Down along a line to 0 instead of along a cosine to 0.1."""
    def rate(step, steps):
        warmup = max(1, steps // 20)
        return min((step + 1) / warmup, (steps - step) / (steps - warmup))
    train.learning_rate = rate


def iterations(n):
    """n Newton-Schulz iterations instead of five."""
    def change():
        train.orthogonal = changed(train.orthogonal, "range(5)", f"range({n})")
    return change


def split_qkv():
    """Muon steps the matrices of queries, keys and values each by itself."""
    whole = train.orthogonal
    train.orthogonal = lambda x: (torch.cat([whole(part) for part in x.chunk(3)])
                                  if x.shape[0] == 3 * x.shape[1] else whole(x))


class Functional:
    """torch.nn.functional with some functions replaced."""
    def __init__(self, **replaced):
        vars(self).update(replaced)

    def __getattr__(self, name):
        return getattr(F, name)


def changed(function, old, new):
    """A function with a piece of its source replaced."""
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{old} is not in {function.__name__} once"
    names = function.__globals__
    names["norm"] = lambda x: F.layer_norm(x, x.shape[-1:])
    exec(source.replace(old, new), names)
    return names[function.__name__]


def both(*changes):
    def change():
        for one in changes:
            one()
    return change


def learned_positions():
    """GPT-2's: an embedding of each position, added to the token's, and nothing turned."""
    def build(self, *arguments, **options):
        start(self, *arguments, **options)
        self.wpe = nn.Embedding(self.block_size, self.wte.weight.shape[1])
        nn.init.normal_(self.wpe.weight, std=0.02)
    start = model.GPT.__init__
    model.GPT.__init__ = build
    model.rotate = lambda x: x
    model.GPT.forward = changed(model.GPT.forward, "self.wte(tokens)",
                                "self.wte(tokens) + self.wpe.weight[:T]")


NORMS = both(qk_norm, embedding_norm)
MORE = {"lm_lr": 0.008}                 # the second round: AdamW's rate had been too low by far
TRIALS = {                              # name -> (options of train.py, change)
    "base": ({}, None), "muon_0.04": ({"muon_lr": 0.04}, None), "linear": ({}, linear),
    "relu_squared": ({}, relu_squared), "qk_norm": ({}, qk_norm), "rms_norm": ({}, rms_norm),
    "batch_64": ({"batch_size": 64}, None), "zero_residual": ({}, zero_residual),
    "lm_lr_0.004": ({"lm_lr": 0.004}, None), "lm_lr_0.008": (MORE, None),
    "more_base": (MORE, None), "more_lm_lr_0.016": ({"lm_lr": 0.016}, None),
    "more_muon_0.04": (MORE | {"muon_lr": 0.04}, None), "more_qk_norm": (MORE, qk_norm),
    "more_embedding_norm": (MORE, embedding_norm), "more_own_head": (MORE, own_head),
    "more_norms": (MORE, NORMS), "more_norms_muon_0.04": (MORE | {"muon_lr": 0.04}, NORMS),
    "more_learned_positions": (MORE, learned_positions),
    "adamw_alone": ({"muon_lr": 0.0}, None),
    "more_adamw_alone": (MORE | {"muon_lr": 0.0}, None),
    "more_batch_16": (MORE | {"batch_size": 16}, None), "more_linear": (MORE, linear),
    "more_iterations_3": (MORE, iterations(3)), "more_split_qkv": (MORE, split_qkv),
    "more_decay_0": (MORE | {"weight_decay": 0.0}, None),
}


# --- running them ---------------------------------------------------------------------------------
def trial(name: str, steps: int, seed: int) -> dict:
    """Trains stage lm under a trial -> its figures."""
    with tempfile.TemporaryDirectory() as out:
        options, change = TRIALS[name]
        if change:
            change()
        config = train.Config(**{"out_dir": out, "lm_steps": steps, "seed": seed,
                                 "eval_every": 10 ** 9, "eval_tokens": 1 << 14} | options)
        run = train.begin(config)
        gpt = run.new_model("none")
        train.fit(run, "lm", gpt, [(gpt, config.muon_lr, config.lm_lr)], steps)
        nll = run.score(gpt, run.corpus("val"), max_tokens=100_000).nll.mean()
        return {"trial": name, "seed": seed, "steps": steps, "val_nll": float(nll)}


def step_seconds(name: str, steps: int = 12) -> float:
    """The least seconds of a training step under a trial; the machine does nothing else."""
    options, change = TRIALS[name]
    if change:
        change()
    with tempfile.TemporaryDirectory() as out:
        run = train.begin(train.Config(**{"out_dir": out} | options))
        c, gpt, seconds = run.config, run.new_model("none"), []
        optimizers = train.make_optimizers([(gpt, c.muon_lr, c.lm_lr)], c.weight_decay, run)
        for step in range(steps):
            begun = time.perf_counter()
            gpt(train.make_batch(run, "lm", step, 0))[0].backward()
            torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = 0.0
                optimizer.step()
                optimizer.zero_grad()
            seconds.append(time.perf_counter() - begun)
    return min(seconds)


def child(*arguments: str) -> dict:
    """What this script prints, in a process of its own: a trial changes modules for good."""
    said = subprocess.check_output([sys.executable, __file__, *arguments], cwd=ROOT, text=True)
    return json.loads(said.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(TRIALS), help="of trials")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="trials at a time, one thread each")
    parser.add_argument("--steps", type=int, help="(for itself) train so many")
    parser.add_argument("--time", action="store_true", help="(for itself) time a step")
    args = parser.parse_args()
    if args.time:
        return print(json.dumps(step_seconds(args.names[0])))
    if args.steps:
        return print(json.dumps(trial(args.names[0], args.steps, args.seed)))
    path = ROOT / "results" / "trials.json"
    saved = data.read_json(path) if path.exists() else {"seconds": {}, "runs": []}
    saved |= {"command": "python results/trials.py", "versions": versions(), "machine": machine()}
    seconds = saved["seconds"]                          # of a step of 2,048 tokens, or batch_*
    for name in ["base", *args.names]:
        options, change = TRIALS[name]
        if name not in seconds:                         # rates cost no time
            timed = change or "batch_size" in options or 0.0 in options.values()
            seconds[name] = child(name, "--time") if timed or name == "base" else seconds["base"]
    os.environ["OMP_NUM_THREADS"] = "1"                 # more than one thread each would spin
    done = {(run["trial"], run["seed"]) for run in saved["runs"]}
    todo = [name for name in args.names if (name, args.seed) not in done]
    with ThreadPool(args.jobs) as pool:
        jobs = ((name, f"--steps={round(STEPS * seconds['base'] / seconds[name])}",
                 f"--seed={args.seed}") for name in todo)
        for run in pool.imap(lambda job: child(*job), jobs):
            print(run, flush=True)
            saved["runs"].append(run)
            data.write_json(path, saved)


if __name__ == "__main__":
    main()
