"""Measure speed and memory, and compare them with what nanoplan aims at. No test depends on it.

    python tests/bench.py                  # all benchmarks
    python tests/bench.py loss kmeans      # these two
    python tests/bench.py --quick          # small sizes, writes nothing: to try the script

Each benchmark replaces its entry in results/bench.json. `kmeans` needs scikit-learn installed.
"""
import argparse
import contextlib
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["TQDM_DISABLE"] = "1"

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import labels
import train
from eval import choose_autocast, choose_device, versions
from model import END_TO_END, init_weights
from planner import build_model

ON_GPU = torch.cuda.is_available()
# Whether the option dtype=auto means bfloat16 here.
FAST_BFLOAT16 = isinstance(choose_autocast("auto", choose_device("auto")), torch.autocast)
QUICK = "--quick" in sys.argv
YARDSTICK_LR = 4e-3     # the best of 1e-3, 2e-3 and 4e-3
YARDSTICK_STEPS = 1800
DEFAULT_SEEDS = (3, 4, 5)   # these chose nothing
LM_STEPS = 370          # enough for the yardstick's final loss
# Run in a process of its own, this prints the seconds from nothing to a first batch, and the peak
# memory in MB. Only Linux has /proc.
CHILD = """
import re, sys, time
from pathlib import Path
import data
begun = time.perf_counter()
corpus = data.prepare(sys.argv[1], "bpe", 4096, Path(sys.argv[2])).split("train")
data.window_batch(corpus, data.batch_starts(len(corpus.tokens), 64, 32, (0,), 0), 64)
seconds = time.perf_counter() - begun
peak = re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())
print(seconds, int(peak[1]) / 1000)
"""


# --- measuring ------------------------------------------------------------------------------------
def timed(function):
    """The seconds that a function takes, including what it started on the GPU."""
    wait = torch.cuda.synchronize if ON_GPU else int
    wait()
    begun = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - begun


def in_turn(functions, rounds, warm_up=3):
    """{name: function} -> {name: its seconds in each round}, after some rounds that don't count.

    The functions take turns, so that the noise of a shared machine meets all of them.
    """
    if QUICK:
        rounds = warm_up = 1
    seconds = {name: [] for name in functions}
    for i in range(warm_up + rounds):
        for name, function in functions.items():
            taken = timed(function)
            if i >= warm_up:
                seconds[name].append(taken)
    return seconds


def ratio(seconds, others):
    """The median over all rounds of seconds / others."""
    return statistics.median(a / b for a, b in zip(seconds, others))


def aim(reached, sign, bound, unit):
    """The columns of a row that has an aim."""
    met = reached >= bound if sign == ">=" else reached <= bound
    return {"reached": reached, "aim": f"{sign} {bound:.4g} {unit}", "met": met}


def line(row):
    """A row in one line of text."""
    columns = []
    for name, value in row.items():
        columns.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(columns)


def matrix_rate(dtype):
    """Operations a second in the product of two large matrices."""
    n = 8192 if ON_GPU else 1024
    square = torch.randn(n, n, device=choose_device("auto")).to(dtype)
    seconds = in_turn({"product": lambda: square @ square}, 9)["product"]
    return 2 * n ** 3 / statistics.median(seconds)


# --- training -------------------------------------------------------------------------------------
def docstrings():
    """The default corpus, prepared."""
    return data.prepare("docstrings", "bpe", 4096, ROOT / "cache")


def label_at_random(store, c):
    """The training split with vectors and labels made from random token embeddings."""
    corpus = store.split("train")
    V = store.tokenizer.n_vocab
    labeler = labels.Labeler(V, c.n_embd, c.n_labels)
    labeler.fit_vectors(torch.randn(V, c.n_embd), corpus)
    labeler.centroids = torch.from_numpy(labeler.embed(corpus)[:c.n_labels]).float()
    return labeler.label(corpus)


class Training:
    """Steps as train.fit does them. name: a plan, or `yardstick`.

    Under `none`, on a corpus without labels, they are those of stage lm.
    """

    def __init__(self, name, c, corpus, n_steps):
        self.c = c
        self.n_steps = n_steps
        self.n_done = 0
        self.device = choose_device(c.device)
        if name == "yardstick":
            self.autocast = contextlib.nullcontext()
            self.model = Plain(c)
            # At a rate of 0 for Muon, AdamW trains everything.
            parts = [(self.model, 0.0, YARDSTICK_LR)]
        else:
            self.autocast = choose_autocast(c.dtype, self.device)
            self.model = build_model(c, name, c.vocab_size)
            parts = [(self.model.gpt, c.muon_lr, c.lm_lr)]
        if name in END_TO_END:
            parts.append((self.model.planner, 0.0, c.joint_planner_lr))
        self.setup = SimpleNamespace(rank=0, world=1, train=corpus)
        self.model.to(self.device)
        self.optimizers = train.make_optimizers(parts, c.weight_decay)
        self.net = torch.compile(self.model) if c.compile else self.model

    def make_batch(self, micro=0):
        return train.make_batch(self.c, self.setup, self.model, "joint", self.n_done, micro)

    def to_device(self, batch):
        batch = batch.to(self.device)
        if self.c.compile:
            batch.mark_dynamic()
        return batch

    def forward_backward(self, batch):
        with self.autocast:
            nll, _ = self.net(batch)
        (nll.mean() / self.c.grad_accum).backward()

    def update(self, optimizer):
        with self.autocast:
            optimizer.step()

    def step(self):
        """One step: grad_accum micro-batches, then one update."""
        share = train.lr_share(self.n_done, self.n_steps)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = share * group["peak_lr"]
        for micro in range(self.c.grad_accum):
            self.forward_backward(self.to_device(self.make_batch(micro)))
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            self.update(optimizer)
            optimizer.zero_grad()
        self.n_done += 1

    def part_times(self):
        """The milliseconds of each part of a step; all but the optimizers are of a micro-batch."""
        muon, adamw = self.optimizers
        made = self.make_batch()
        moved = self.to_device(made)
        seconds = in_turn({
            "make_batch": self.make_batch,
            "to(device)": lambda: self.to_device(made),
            "forward+backward": lambda: self.forward_backward(moved),
            "Muon": lambda: self.update(muon),
            "AdamW": lambda: self.update(adamw),
        }, 5)
        return {f"ms {part}": 1000 * statistics.median(times) for part, times in seconds.items()}


class Plain(nn.Module):
    """The yardstick: the same GPT in plain PyTorch, with learned positions, as nanoGPT has it."""

    def __init__(self, c):
        super().__init__()
        C = c.n_embd
        self.n_head = c.n_head
        self.wte = nn.Embedding(c.vocab_size, C)
        self.wpe = nn.Embedding(c.block_size, C)
        self.blocks = nn.ModuleList()
        for _ in range(c.n_layer):
            self.blocks.append(nn.ModuleDict({
                "ln_1": nn.LayerNorm(C),
                "qkv": nn.Linear(C, 3 * C, bias=False),
                "proj": nn.Linear(C, C, bias=False),
                "ln_2": nn.LayerNorm(C),
                "up": nn.Linear(C, 4 * C, bias=False),
                "down": nn.Linear(4 * C, C, bias=False),
            }))
        self.ln_f = nn.LayerNorm(C)
        init_weights(self, c.n_layer, c.seed)

    def batch(self, corpus, starts):
        return data.window_batch(corpus, starts, self.wpe.num_embeddings)

    def forward(self, batch):
        B, T = batch.tokens.shape
        x = self.wte(batch.tokens) + self.wpe.weight[:T]                    # (B, T, C)
        for block in self.blocks:
            qkv = block["qkv"](block["ln_1"](x)).view(B, T, 3, self.n_head, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)                            # (B, H, T, D) each
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block["proj"](y.transpose(1, 2).reshape(x.shape))
            x = x + block["down"](F.gelu(block["up"](block["ln_2"](x))))
        logits = F.linear(self.ln_f(x), self.wte.weight)                    # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()), None


# --- the benchmarks -------------------------------------------------------------------------------
def train_run(out, *options):
    """Run train.py in a process of its own -> its results.json."""
    command = [sys.executable, "train.py", f"--out_dir={out}", *options]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return data.read_json(out / "results.json")


def default():
    """`python train.py` from nothing: its time, what plans gain, and `none` for that time."""
    c = train.Config()
    store = docstrings()
    *_, soft = step_table(["none", "soft"], c, label_at_random(store, c), {}, rounds=40)
    # Steps of `none` in the time that `soft` takes for its own.
    steps = round(c.joint_steps / soft["x none"])
    sizes = ["--preset=tiny", f"--joint_steps={steps}"] if QUICK else [f"--joint_steps={steps}"]
    rows = []
    for seed in DEFAULT_SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            options = [f"--seed={seed}", f"--cache_dir={folder}/cache", *sizes[:-1]]
            rates = [matrix_rate(torch.float32)]
            begun = time.perf_counter()
            plans = train_run(out, *options)["plans"]
            seconds = time.perf_counter() - begun
            rates.append(matrix_rate(torch.float32))
            for path in out.glob("joint_*.pt"):
                path.unlink()
            longer = train_run(out, *options, "--plans=none", sizes[-1])["plans"]["none"]
        none = plans["none"]
        row = {"table": "default", "seed": seed, "seconds": seconds,
               "GFLOP/s": statistics.mean(rates) / 1e9, "bits/byte": none["bits_per_byte"]}
        for name, figures in (plans | {f"none, {steps} steps": longer}).items():
            if name != "none":
                row[f"{name} %"] = 100 * (figures["ppl"] / none["ppl"] - 1)
        rows.append(row)

    def mean(column):
        return statistics.mean(row[column] for row in rows)

    costs = [row["seconds"] * row["GFLOP/s"] for row in rows]
    longer = mean(f"none, {steps} steps %")
    aims = {
        "the whole command": (statistics.mean(costs), "<=", 33_000, "s x GFLOP/s"),
        "none": (mean("bits/byte"), "<=", 1.68, "bits/byte"),
        "soft": (mean("soft %"), "<=", -1.5, "% against none"),
        "hard": (mean("hard %"), "<=", 0.0, "% against none"),
        "soft, worst seed": (max(row["soft %"] - min(0, row["hard %"]) for row in rows), "<=", 0.0,
                             "% against the better of none and hard"),
        "soft, equal seconds": (mean("soft %") - longer, "<=", 0.0, "% against none"),
        "step of soft": (1 / soft["x none"], "<=", 1.08, "x none"),
    }
    for what, values in aims.items():
        rows.append({"table": "default", "what": what} | aim(*values))
    return rows


def loss():
    """The seconds that stage lm takes to reach the yardstick's final loss. Only steps count."""
    c = train.Config(n_layer=4, n_head=3, n_embd=192, planner_embd=192, block_size=256,
                     batch_size=8)
    store = docstrings()
    corpus = store.split("train")
    trainings = {}
    for name, steps in (("yardstick", YARDSTICK_STEPS), ("none", LM_STEPS)):
        trainings[name] = Training(name, c, corpus, 10 if QUICK else steps)
    seconds = dict.fromkeys(trainings, 0.0)
    # A tenth of each, in turn, so that noise meets both.
    for _ in range(10):
        for name, training in trainings.items():
            for _ in range(training.n_steps // 10):
                seconds[name] += timed(training.step)
    rows = []
    for name, training in trainings.items():
        rows.append({"table": "loss: window 256, batch 8", "what": name, "steps": training.n_steps,
                     "seconds": seconds[name], "nats": held_out(training, store.split("val"))})
    yardstick, lm = rows
    rows.append({"table": lm["table"], "what": "its loss"})
    least = 8 if FAST_BFLOAT16 else 4
    rows[1] |= aim(yardstick["seconds"] / lm["seconds"], ">=", least, "x as fast as the yardstick")
    rows[2] |= aim(lm["nats"], "<=", yardstick["nats"], "nats")
    return rows


@torch.no_grad()
def held_out(training, corpus):
    """Nats per token, in float32, in windows spread evenly over validation."""
    n = 16 if QUICK else 400
    # They are further apart than they are long.
    starts = np.arange(n) * (len(corpus.tokens) // n)
    losses = []
    for window in starts.reshape(-1, 8):
        batch = data.window_batch(corpus, window, training.c.block_size)
        nll, _ = training.model(batch.to(training.device))
        losses.append(nll.mean().item())
    return statistics.mean(losses)


def step():
    """A step against the yardstick's at the default sizes, also with windows of 256 tokens; on a
    GPU, a step of the preset gpu, too.
    """
    store = docstrings()
    rows = []
    # The aims at the default window are for float32, those at 256 tokens for fast bfloat16.
    for block_size, batch_size, least, is_for_bfloat16 in (
            (64, 32, (1.1, 1.0), False), (256, 8, (2.4, 2.0), True)):
        c = train.Config(block_size=block_size, batch_size=2 if QUICK else batch_size)
        aims = {}
        if not ON_GPU and FAST_BFLOAT16 == is_for_bfloat16:
            aims = {name: (">=", x, "x yardstick") for name, x in zip(("none", "soft"), least)}
        corpus = label_at_random(store, c)
        rows += step_table(["yardstick", "none", "hard", "soft"], c, corpus, aims)
    if ON_GPU:
        c = train.Config(**train.PRESETS["gpu"] | {"vocab_size": 50257})
        aims = {"none": (">=", 0.4, "x matrix rate"), "soft": (">=", 0.95, "x none")}
        rows += step_table(["none", "soft"], c, label_at_random(store, c), aims)
    return rows


def step_table(names, c, corpus, aims, rounds=12):
    """Time steps in turn. aims: {name: (sign, bound, the column that has to reach it)}."""
    trainings = {}
    for name in names:
        trainings[name] = Training(name, c, corpus, 1000)
    seconds = in_turn({name: training.step for name, training in trainings.items()}, rounds)
    windows = f"{c.grad_accum} x {c.batch_size} windows of {c.block_size}"
    rows = []
    for name, training in trainings.items():
        row = {"table": f"step: width {c.n_embd}, {windows}", "step": name}
        row |= step_row(training, statistics.median(seconds[name]))
        for other in ("yardstick", "none"):
            if other in names:
                row[f"x {other}"] = ratio(seconds[other], seconds[name])
        if name in aims:
            sign, bound, column = aims[name]
            row |= aim(row[column], sign, bound, column)
        rows.append(row)
    return rows


def step_row(training, seconds):
    """The columns of a step that takes so many seconds."""
    c = training.c
    n_tokens = c.grad_accum * c.batch_size * c.block_size
    # For each token, 6 operations a weight and those of attention; the planner's are left out.
    weights = 12 * c.n_layer * c.n_embd ** 2 + c.vocab_size * c.n_embd
    operations = 6 * weights + 12 * c.n_layer * c.n_embd * c.block_size
    dtype = torch.bfloat16 if isinstance(training.autocast, torch.autocast) else torch.float32
    row = {
        "dtype": str(dtype),
        "tokens/s": n_tokens / seconds,
        "x matrix rate": n_tokens / seconds * operations / matrix_rate(dtype),
    }
    return row | training.part_times()


def kmeans():
    """Ten iterations of k-means on the default corpus's sentence vectors, against scikit-learn."""
    try:
        import sklearn.cluster
    except ImportError:
        print("kmeans: left out, because scikit-learn is not installed")
        return []
    K = 256
    vectors = label_at_random(docstrings(), train.Config()).vectors         # (n, E) float16
    if QUICK:
        vectors = vectors[:20_000]
    x = vectors.astype(np.float32)
    generator = torch.Generator().manual_seed(0)
    start = labels.plus_plus(torch.from_numpy(x[:1 << 14]), K, generator)

    def ours():
        # Both begin with the same centroids.
        with mock.patch.object(labels, "plus_plus", return_value=start):
            _, _, inertia = labels.kmeans(vectors, K, max_iters=10, tol=0.0)
        return inertia

    def theirs():
        fit = sklearn.cluster.KMeans(K, init=start.numpy(), n_init=1, max_iter=10, tol=0.0)
        return fit.fit(x).inertia_

    functions = {"nanoplan": ours, f"scikit-learn {sklearn.__version__}": theirs}
    seconds = in_turn(functions, 5, warm_up=1)
    rows = []
    for name, function in functions.items():
        rows.append({"table": f"kmeans: {len(x):,} vectors of width {x.shape[1]}, K = {K}",
                     "by": name, "seconds": statistics.median(seconds[name]),
                     "inertia": float(function())})
    rows[0] |= aim(ratio(*seconds.values()), "<=", 1.3, "x scikit-learn's time")
    return rows


def prepare():
    """The default corpus from nothing; a text against tiktoken alone; memory against size."""
    texts = [text for _, text in data.documents("docstrings")]
    texts = texts[:300 if QUICK else None]
    text = f"\n{data.EOT}\n".join(texts)
    tokenizer = docstrings().tokenizer
    table = f"prepare: a text is {len(text) / 1e6:.3g} MB"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "small.txt"
        large = Path(folder) / "large.txt"
        small.write_text(text, "utf-8")
        large.write_text(10 * text, "utf-8")

        def prepare_anew():
            # The tokenizer's training is left out.
            ranks = tokenizer._mergeable_ranks
            with mock.patch.object(data, "train_bpe", return_value=ranks):
                data.prepare(str(small), "bpe", 4096, Path(tempfile.mkdtemp(dir=folder)))

        seconds = in_turn({
            "tiktoken alone": lambda: tokenizer.encode_ordinary_batch(texts, num_threads=1),
            "a text, its tokenizer given": prepare_anew,
        }, 5)
        for what, times in seconds.items():
            rows.append({"table": table, "what": what, "seconds": statistics.median(times)})
        rows[1] |= aim(ratio(*seconds.values()), ">=", 0.5, "x tiktoken")

        sources = {"default corpus": "docstrings", "a text": small, "ten times that text": large}
        for what, source in sources.items():
            child = [sys.executable, "-c", CHILD, str(source), f"{folder}/stores"]
            printed = subprocess.check_output(child, cwd=ROOT, text=True).split()
            # Some 250 MB of the peak are torch's.
            rows.append({"table": table, "what": f"{what}, from nothing to a batch",
                         "seconds": float(printed[0]), "peak MB": float(printed[1])})
    rows[2] |= aim(rows[2]["seconds"], "<=", 25, "s")
    rows[4] |= aim(rows[4]["peak MB"] / rows[3]["peak MB"], "<=", 1.1, "x the peak")
    return rows


def machine():
    """The machine in words."""
    name = f"{torch.cuda.get_device_name()}, " if ON_GPU else ""
    name += f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads, "
    return name + f"{platform.system()} {platform.machine()}"


def main():
    functions = default, loss, step, kmeans, prepare
    benchmarks = {function.__name__: function for function in functions}
    parser = argparse.ArgumentParser("bench.py", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="BENCHMARK", help=", ".join(benchmarks))
    parser.add_argument("--quick", action="store_true", help="small sizes, writes nothing")
    names = parser.parse_args().names or benchmarks
    # The libraries that we compare with get as many threads as torch.
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    path = ROOT / "results" / "bench.json"
    for name in names:
        rows = benchmarks[name]()
        for row in rows:
            print(line(row))
        if rows and not QUICK:
            results = data.read_json(path) if path.exists() else {}
            results[name] = {"command": f"python tests/bench.py {name}", "machine": machine(),
                             "versions": versions(), "rows": rows}
            data.write_json(path, results)


if __name__ == "__main__":
    main()
