"""Measures speed and memory, and sets them against what nanoplan aims at. No test depends on it.

    python tests/bench.py                  # all benchmarks
    python tests/bench.py step kmeans      # these two
    python tests/bench.py --quick          # small sizes, nothing written: to try the script
"""
import contextlib
import functools
import importlib.metadata
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]
os.environ["TQDM_DISABLE"] = "1"

import numpy as np
import torch
from torch import nn

import data
import labels
import train
from eval import Parser, Run, choose_device, versions
from model import END_TO_END
from run_all import machine

DEVICE = choose_device("auto")
ON_GPU = DEVICE.type == "cuda"
VERSIONS = versions()
OPTIONS = SimpleNamespace(quick=False, cache_dir="cache")


def sized(full, quick):
    return quick if OPTIONS.quick else full


# --- measuring ------------------------------------------------------------------------------------

def in_turn(functions: dict, rounds: int, warm_up: int = 3) -> dict[str, list[float]]:
    """{name: function} -> {name: its seconds in each round}, after some that do not count. A ratio
    of two in one round (times_as_fast) is free of most of a shared machine's noise."""
    seconds = {name: [] for name in functions}
    wait = torch.cuda.synchronize if ON_GPU else int
    for i in range(-sized(warm_up, 1), sized(rounds, 1)):
        for name, function in functions.items():
            wait()
            begun = time.perf_counter()
            function()
            wait()
            if i >= 0:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def times_as_fast(mine: list[float], other: list[float]) -> float:
    return statistics.median(b / a for a, b in zip(mine, other))


def aim(reached: float, sign: str, bound: float, unit: str) -> dict:
    """The columns of a row that has an aim."""
    return {"reached": reached, "aim": f"{sign} {bound:.3g} {unit}",
            "met": reached >= bound if sign == ">=" else reached <= bound}


def show(title: str, rows: list[dict]) -> list[dict]:
    """Prints the rows, and returns them with the title in each."""
    print(title)
    for row in rows:
        print("   ", *(f"{name}: {x:,.4g}; " if isinstance(x, float) else f"{name}: {x}; "
                       for name, x in row.items()))
    return [{"table": title} | row for row in rows]


# --- training step --------------------------------------------------------------------------------

def step() -> list[dict]:
    """A training step: against the yardstick, of the default run, and of GPT-2's size on a GPU."""
    aims = {} if ON_GPU else {"none": ("x yardstick", 2.4), "soft": ("x yardstick", 2.0)}
    rows = step_table(("yardstick", "none", "soft"), aims, block_size=256, batch_size=sized(16, 2))
    rows += step_table(("none", "hard", "soft"), {})
    if ON_GPU:
        aims = {"none": ("x matrix rate", 0.4), "soft": ("x none", 0.95)}
        sizes = train.PRESETS["gpu"] | {"vocab_size": 50257, "grad_accum": 1}
        rows += step_table(("none", "soft"), aims, **sizes)
    return rows


def step_table(names: tuple, aims: dict, **sizes) -> list[dict]:
    """Times steps in turn. `aims` says of a row which column must reach what."""
    seconds = in_turn({name: training_step(name, sizes) for name in names}, 12)
    c, rows, n = train.Config(**sizes), [], 8192 if ON_GPU else 2048
    dtype = "bfloat16" if Run(c).autocast()._enabled else "float32"
    square = torch.randn(n, n, device=DEVICE).to(getattr(torch, dtype))
    product = in_turn({"product": functools.partial(torch.mm, square, square)}, 9)["product"]
    # of a token, without the planner's: 6 for each weight of a matrix, and attention's
    weights = 12 * c.n_layer * c.n_embd ** 2 + c.vocab_size * c.n_embd
    operations = 6 * weights + 12 * c.n_layer * c.n_embd * c.block_size
    for name, times in seconds.items():
        speed = c.batch_size * c.block_size / statistics.median(times)
        rate = 2 * n ** 3 / statistics.median(product)
        row = {"step": name, "tokens/s": speed, "x matrix rate": speed * operations / rate}
        row |= {f"x {other}": times_as_fast(times, seconds[other])
                for other in ("yardstick", "none") if other in seconds}
        if name in aims:
            column, bound = aims[name]
            row |= aim(row[column], ">=", bound, column)
        rows.append(row)
    return show(f"step: width {c.n_embd}, window {c.block_size}, batch {c.batch_size}, plans in "
                f"{dtype}{', compiled' * c.compile}; {operations:.3g} operations a token", rows)


def untrained_run(**options) -> Run:
    """A run with vectors and labels of ones: a step takes as long whatever they hold."""
    run = Run(train.Config(**options))
    c, corpus = run.config, docstrings().split("train")
    corpus.vectors = np.ones((corpus.n_sentences, c.n_embd), np.float16)
    corpus.labels = np.ones(corpus.n_sentences, int)
    run.corpora["train"] = corpus
    run.tokenizer = SimpleNamespace(n_vocab=c.vocab_size)   # all that a model asks of it
    run.grad_accum = 1
    return run


def training_step(name: str, sizes: dict):
    """-> a function that does what train.fit does in a step, at a learning rate of 0."""
    run = untrained_run(**sizes | {"dtype": "float32" if name == "yardstick" else "auto"})
    c, numbers = run.config, itertools.count()
    if name == "yardstick":
        model = Plain(c.vocab_size, c.block_size, c.n_layer, c.n_head, c.n_embd).to(DEVICE)
        run.corpora["train"].vectors = None                 # it reads tokens alone
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    else:
        model = run.new_model(name).to(DEVICE)
        parts = [(model.gpt, c.joint_lr), (model.planner, c.joint_planner_lr)]
        optimizer = train.make_optimizer(parts[:2 if name in END_TO_END else 1], c.weight_decay,
                                         DEVICE)
    net = torch.compile(model) if c.compile else model

    def train_once():
        batch = train.make_batch(run, "joint", next(numbers), 0).to(DEVICE)
        with run.autocast():
            loss, _ = net(batch, torch.Generator(DEVICE))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return train_once


class Plain(nn.Module):
    """The yardstick: the same GPT in plain PyTorch."""
    def __init__(self, V, T, L, H, C):
        super().__init__()
        linear = functools.partial(nn.Linear, bias=False)
        self.H, self.wte, self.wpe = H, nn.Embedding(V, C), nn.Embedding(T, C)
        self.blocks = nn.ModuleList(nn.ModuleDict({
            "qkv": nn.Sequential(nn.LayerNorm(C), linear(C, 3 * C)), "proj": linear(C, C),
            "mlp": nn.Sequential(nn.LayerNorm(C), linear(C, 4 * C), nn.GELU(), linear(4 * C, C))})
            for _ in range(L))
        self.ln_f = nn.LayerNorm(C)

    def forward(self, batch, noise):
        B, T = batch.tokens.shape
        x = self.wte(batch.tokens) + self.wpe.weight[:T]
        for block in self.blocks:
            q, k, v = block["qkv"](x).view(B, T, 3, self.H, -1).permute(2, 0, 3, 1, 4)
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block["proj"](y.transpose(1, 2).reshape(x.shape))
            x = x + block["mlp"](x)
        logits = nn.functional.linear(self.ln_f(x), self.wte.weight)
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()), None


# --- k-means --------------------------------------------------------------------------------------

def kmeans() -> list[dict]:
    """Ten updates on the CPU and a last assignment, equal in start and inertia, against others."""
    n, rows = sized(200_000, 20_000), []
    functions, aims = {"nanoplan": by_nanoplan}, {"faiss-cpu": 1.0, "scikit-learn": 0.9}
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())    # theirs are as many
    for name, fit in (("faiss-cpu", by_faiss), ("scikit-learn", by_sklearn)):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            VERSIONS[name] = importlib.metadata.version(name)
            functions[name] = fit
    for k in (64, sized(1024, 256)):
        random = np.random.default_rng(0)       # around k means near each other
        means = random.standard_normal((k, 192), dtype=np.float32)[random.integers(k, size=n)] / 2
        x = means + random.standard_normal((n, 192), dtype=np.float32)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        start = x[random.choice(n, k, replace=False)]
        inertia = [float(fit(x, start)) for fit in functions.values()]
        assert max(inertia) < 1.0001 * min(inertia), f"unequal inertia: {inertia}"
        seconds = in_turn({name: functools.partial(fit, x, start)
                           for name, fit in functions.items()}, 5, warm_up=0)
        for name, times in seconds.items():
            rows.append({"K": k, "by": name, "seconds": statistics.median(times)})
            if name in aims:
                faster = times_as_fast(seconds["nanoplan"], times)
                rows[-1] |= aim(faster, ">=", aims[name], "x as fast")
    return show(f"kmeans: {n:,} vectors of width 192, float32", rows)


def by_nanoplan(x, start):
    return labels.kmeans(x, len(start), iters=10, tol=0.0, start=torch.from_numpy(start))[2]


def by_faiss(x, start):
    import faiss
    fitted = faiss.Kmeans(x.shape[1], len(start), niter=10, max_points_per_centroid=len(x))
    fitted.train(x, init_centroids=start)
    return fitted.assign(x)[0].sum(dtype=np.float64)


def by_sklearn(x, start):
    from sklearn.cluster import KMeans
    return KMeans(len(start), init=start, n_init=1, max_iter=10, tol=0.0).fit(x).inertia_


# --- preparation ----------------------------------------------------------------------------------

CHILD = """import sys, time, data
begun = time.perf_counter()
corpus = data.prepare(sys.argv[1], "bpe", 4096, data.Path(sys.argv[2])).split("train")
data.window_batch(corpus, data.batch_starts(len(corpus.tokens), 64, 32, (0,), 0), 64)
status = open("/proc/self/status").read()                   # Linux's
print(time.perf_counter() - begun, int(status.split("VmHWM:")[1].split()[0]) / 1000)"""


def docstrings() -> data.Store:
    return data.prepare("docstrings", "bpe", 4096, Path(OPTIONS.cache_dir))


def prepare() -> list[dict]:
    """The default corpus from nothing; its text against tiktoken; memory against size."""
    tokens = docstrings().split("train").tokens[1:sized(None, 300_000)]
    text = docstrings().tokenizer.decode(tokens.tolist()).replace(data.EOT, f"\n{data.EOT}\n")
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder) / "small.txt", Path(folder) / "large.txt"
        small.write_text(text, "utf-8")
        large.write_text(10 * text, "utf-8")
        rows = against_tiktoken(small)
        for what, source in (("default corpus, from nothing to a batch", "docstrings"),
                             ("a text", small), ("ten times that text", large)):
            child = [sys.executable, "-c", CHILD, str(source), f"{folder}/stores"]
            said = subprocess.check_output(child, cwd=ROOT, text=True)
            seconds, peak = map(float, said.split())        # some 250 MB of the peak are torch's
            rows.append({"what": what, "seconds": seconds, "peak MB": peak})
    rows[2] |= aim(rows[2]["seconds"], "<=", 25, "s")
    rows[4] |= aim(rows[4]["peak MB"] / rows[3]["peak MB"], "<=", 1.1, "x the peak")
    return show(f"prepare: texts are of {len(text) / 1e6:.3g} MB", rows)


def against_tiktoken(path: Path) -> list[dict]:
    """A text into the store, of given tokens; both in one thread, as the store works."""
    tokenizer, folders = docstrings().tokenizer, (path.parent / str(i) for i in itertools.count())
    ranks = {tokenizer.decode_single_token_bytes(t): t for t in range(tokenizer.n_vocab - 1)}
    texts = list(data.read_documents(path))
    alone = functools.partial(tokenizer.encode_ordinary_batch, texts, num_threads=1)

    def store():
        data.prepare(str(path), "bpe", 4096, next(folders))
    with mock.patch.object(data, "train_bpe", return_value=ranks):
        seconds = in_turn({"tiktoken alone": alone, "a text into the store": store}, 5)
    rows = [{"what": what, "seconds": statistics.median(x)} for what, x in seconds.items()]
    faster = times_as_fast(seconds["a text into the store"], seconds["tiktoken alone"])
    rows[1] |= aim(faster, ">=", 0.5, "x tiktoken")
    return rows


# --- all ------------------------------------------------------------------------------------------

def main() -> None:
    benchmarks = {"step": step, "kmeans": kmeans, "prepare": prepare}
    parser = Parser(prog="bench.py", description=__doc__)
    parser.add_argument("names", nargs="*", default="all", choices=["all", *benchmarks])
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing written")
    parser.add_argument("--cache_dir", default="cache", help="of prepared corpora, as train.py's")
    parser.parse_args(namespace=OPTIONS)
    for name in benchmarks if "all" in OPTIONS.names else OPTIONS.names:
        rows = benchmarks[name]()
        if not OPTIONS.quick:
            path = ROOT / "results" / "bench.json"
            saved = data.read_json(path) if path.exists() else {}
            saved[name] = {"command": f"python tests/bench.py {name}", "versions": VERSIONS,
                           "machine": f"{machine()}, {torch.get_num_threads()} threads",
                           "rows": rows}
            data.write_json(path, {name: saved[name] for name in benchmarks if name in saved})


if __name__ == "__main__":
    main()
