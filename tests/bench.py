"""Measures what nanoplan promises of speed, memory and growth. No test depends on it.

    python tests/bench.py                  # all benchmarks
    python tests/bench.py step kmeans      # these two
    python tests/bench.py --quick          # small sizes, nothing written: to try the script

Each prints its tables and writes them to results/bench.json, beside what that holds of the others.
A speed is a ratio of two things measured in turn (A B A B ...) in one process, and the median over
the rounds, so that the noise of a shared machine cancels. Memory is read where Linux or CUDA tell.
"""
import argparse
import contextlib
import ctypes
import functools
import importlib
import importlib.metadata
import itertools
import json
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
import torch.nn as nn
import torch.nn.functional as F

import data
import eval as evaluation
import labels as labelling
import train
from model import END_TO_END, GPT
from planner import PlannedGPT, Planner, label_loss
from run_all import machine

DEVICE = evaluation.choose_device("auto")
CUDA = DEVICE.type == "cuda"
OPTIONS = SimpleNamespace(quick=False, cache_dir="cache")


def sized(full, quick):
    """A size, and the one that --quick takes instead."""
    return quick if OPTIONS.quick else full


# --- measuring ------------------------------------------------------------------------------------

def now() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def in_turn(functions: dict, rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """{name: function} -> {name: seconds in each round}."""
    seconds = {name: [] for name in functions}
    for i in range(-warm_up, sized(rounds, 1)):
        for name, function in functions.items():
            begun = now()
            function()
            if i >= 0:
                seconds[name].append(now() - begun)
    return seconds


def ratio(a: list[float], b: list[float]) -> float:
    """How many times as fast b is as a."""
    return statistics.median(x / y for x, y in zip(a, b))


def matrix_rate(dtype: torch.dtype) -> float:
    """Operations a second of a large square product."""
    n = sized(8192 if CUDA else 2048, 512)
    a, b = torch.randn(2, n, n, device=DEVICE).to(dtype)
    return 2 * n ** 3 / statistics.median(in_turn({"product": lambda: a @ b}, 9)["product"])


def status(field: str) -> float:
    """VmRSS, this process's memory, or VmHWM, its peak, in megabytes; -1 where nobody tells.
    (The peak of getrusage begins at that of the process which started this one.)"""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(x for x in lines if x.startswith(field)).split()[1]) * 1.024e-3
    return -1.0


def peak_mb(function) -> float:
    """Megabytes that a call needs for a while, beyond what is held before and after."""
    function()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - held) / 1e6
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)             # what was freed goes back to the system
        Path("/proc/self/clear_refs").write_text("5")            # the peak is counted from here
    held = status("VmRSS")
    function()
    return status("VmHWM") - held


def aim(value: float, sign: str, bound: float, unit: str = "") -> dict:
    met = value >= bound if sign == ">=" else value <= bound
    return {"reached": value, "aim": f"{sign} {bound:.3g}{unit}", "met": "yes" if met else "no"}


def show(title: str, rows: list[dict]) -> list[dict]:
    """Prints a table, and returns its rows with its title in each."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = lambda x: x if isinstance(x, str) else f"{x:.4g}" if abs(x) < 1e4 else f"{x:,.0f}"
    cells = [names] + [[text(row.get(name, "")) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    print(f"\n{title}")
    for line in cells:
        print("  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths)))
    return [{"table": title} | row for row in rows]


# --- training step --------------------------------------------------------------------------------

class Plain(nn.Module):
    """The yardstick, a GPT as one writes it in plain PyTorch: tokens, targets (B, T) -> loss."""

    def __init__(self, V, T, L, H, C):
        super().__init__()
        linear = functools.partial(nn.Linear, bias=False)
        self.H, self.wte, self.wpe = H, nn.Embedding(V, C), nn.Embedding(T, C)
        self.blocks = nn.ModuleList(nn.ModuleDict({
            "ln_1": nn.LayerNorm(C), "qkv": linear(C, 3 * C), "proj": linear(C, C),
            "ln_2": nn.LayerNorm(C), "up": linear(C, 4 * C), "down": linear(4 * C, C)})
            for _ in range(L))
        self.ln_f, self.head = nn.LayerNorm(C), linear(C, V)
        self.head.weight = self.wte.weight
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens, targets):
        B, T = tokens.shape
        x = self.wte(tokens) + self.wpe.weight[:T]
        for block in self.blocks:
            qkv = block["qkv"](block["ln_1"](x)).view(B, T, 3, self.H, -1).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(*qkv, is_causal=True).transpose(1, 2)
            x = x + block["proj"](y.reshape(x.shape))
            x = x + block["down"](F.gelu(block["up"](block["ln_2"](x))))
        return F.cross_entropy(self.head(self.ln_f(x)).flatten(0, 1), targets.flatten())


def trainer(model: nn.Module, optimizer, backward):
    """-> a function that trains by a step; `backward` leaves the gradients of a step's number in
    the parameters, and returns the loss."""
    numbers = itertools.count()

    def step():
        loss = backward(next(numbers))
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if torch.isfinite(norm) and torch.isfinite(loss):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def plain_step(corpus: data.Corpus, c: train.Config, dtype: str):
    """-> a function that trains the yardstick by a step."""
    model = Plain(c.vocab_size, c.block_size, c.n_layer, c.n_head, c.n_embd).to(DEVICE)

    def backward(number):
        starts = data.batch_starts(len(corpus.tokens), c.block_size, c.batch_size, (0, 2), number)
        batch = data.window_batch(corpus, starts, c.block_size).to(DEVICE)
        with evaluation.autocast(DEVICE, dtype):
            loss = model(batch.tokens, batch.targets)
        loss.backward()
        return loss
    return trainer(model, torch.optim.AdamW(model.parameters(), lr=1e-4), backward)


def planned_model(plan: str, c: train.Config) -> PlannedGPT:
    """A PlannedGPT with drawn matrices, for fresh ones hold zeros."""
    gpt = GPT(c.vocab_size, c.block_size, c.n_layer, c.n_head, c.n_embd,
              0 if plan == "none" else c.n_labels)
    planner = Planner(c.n_embd, c.n_labels, c.planner_layer, c.planner_head, c.planner_embd,
                      c.planner_reach)
    model = PlannedGPT(gpt, planner, plan).to(DEVICE)
    for p in model.parameters():
        if p.dim() == 2:
            nn.init.normal_(p, std=0.02)
    return model


def planned_step(plan: str, corpus: data.Corpus, c: train.Config, dtype: str):
    """-> a function that trains a plan by a step, with train.py's batches, gradients and optimizer.
    The sentences' vectors and labels are drawn: a step takes as long whatever they hold."""
    random, n, model = np.random.default_rng(0), corpus.n_sentences, planned_model(plan, c)
    vectors = random.standard_normal((n, c.n_embd), dtype=np.float32).astype(np.float16)
    labels, run = random.integers(c.n_labels, size=n), torch.compile(model) if c.compile else model
    job = SimpleNamespace(config=c, device=DEVICE, dtype=dtype, train=corpus, rank=0, world=1,
                          stop=False, averaged=lambda values: values)

    def losses(run, batch, noise):
        loss, logits = run(batch, noise)
        if plan not in END_TO_END:
            return {"loss": loss}
        label = label_loss(logits, batch.labels)
        return {"loss": loss + c.label_loss_weight * label, "lm_loss": loss, "label_loss": label}
    stage = SimpleNamespace(losses=losses, batches=lambda number: train.window_batches(
        job, number, "joint", vectors, labels))
    parts = [(model.gpt, 0.0)] + [(model.planner, 0.0)] * (plan in END_TO_END)
    optimizer = train.make_optimizer(c, parts, fused=DEVICE.type in ("cpu", "cuda"))
    return trainer(model, optimizer,
                   lambda number: train.gradients(job, stage, run, number)[0]["loss"])


def config(**changes) -> train.Config:
    """The sizes of the models measured: on a GPU its preset's, with GPT-2's number of tokens."""
    sizes = dict(block_size=256, batch_size=sized(16, 2))
    if CUDA:
        sizes = train.PRESETS["gpu"] | dict(vocab_size=50257, grad_accum=1, compile=False)
    return train.Config(**sizes | changes)


def docstrings() -> data.Store:
    return data.prepare("docstrings", "bpe", 4096, Path(OPTIONS.cache_dir))


def step() -> list[dict]:
    """Tokens a second in training, against the yardstick."""
    torch.backends.cuda.matmul.allow_tf32 = True     # as train.Job
    c, corpus, fast = config(compile=CUDA), docstrings().split("train"), train.faster_dtype(DEVICE)
    seconds = in_turn({"yardstick": plain_step(corpus, c, "float32"),
                       "yardstick, bfloat16": plain_step(corpus, c, "bfloat16"),
                       **{plan: planned_step(plan, corpus, c, fast)
                          for plan in ("none", "hard", "soft")}}, 12)
    rate, tokens, rows = matrix_rate(getattr(torch, fast)), c.batch_size * c.block_size, []
    matrices = 12 * c.n_layer * c.n_embd ** 2 + c.vocab_size * c.n_embd
    operations = 6 * matrices + 12 * c.n_layer * c.n_embd * c.block_size         # of a token
    for name, times in seconds.items():
        median = statistics.median(times)
        row = {"step": name, "ms": 1000 * median, "tokens/s": tokens / median,
               "x yardstick": ratio(seconds["yardstick"], times),
               "x none": ratio(seconds["none"], times),
               "share of matrix rate": operations * tokens / median / rate}
        if CUDA and name == "none":
            row |= aim(row["share of matrix rate"], ">=", 0.4, " of the rate")
        elif CUDA and name == "soft":
            row |= aim(row["x none"], ">=", 0.95, " x none")
        elif name in ("none", "soft"):
            row |= aim(row["x yardstick"], ">=", {"none": 2.4, "soft": 2.0}[name], " x yardstick")
        rows.append(row)
    return show(f"step: {c.n_layer} layers of width {c.n_embd}, vocabulary {c.vocab_size}, window "
                f"{c.block_size}, batch {c.batch_size}, K={c.n_labels}, nanoplan in {fast}"
                f"{', compiled' * c.compile}; operations of a token: 6 * (block and head matrices) "
                f"+ 12 * layers * width * window = {operations / 1e6:.1f} M, the planner's not "
                f"counted; matrix rate: {rate / 1e12:.3f} T/s in {fast}", rows)


# --- k-means --------------------------------------------------------------------------------------

def mixture(n: int, k: int, width: int = 192) -> np.ndarray:
    """(n, width) float32 of unit length around k means, so near that Lloyd takes a while."""
    random = np.random.default_rng(0)
    means = 0.5 * random.standard_normal((k, width), dtype=np.float32)
    x = means[random.integers(k, size=n)] + random.standard_normal((n, width), dtype=np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def inertia(x: np.ndarray, centroids) -> float:
    """The sum of squared distances to the nearest centroid, in float64."""
    c = torch.as_tensor(centroids).double().cpu()
    return sum(float(torch.cdist(rows.double(), c).amin(1).square().sum())
               for rows in torch.from_numpy(x).split(4096))


def fits(x: np.ndarray, start: np.ndarray, iters: int, rivals: dict) -> dict:
    """{name: function -> centroids, number of iterations}. An iteration assigns and updates; the
    last centroids' labels are found as well."""
    held, k, threads = torch.from_numpy(x).to(DEVICE), len(start), torch.get_num_threads()

    def nanoplan():
        history = []                                 # its last iteration does not update
        found = labelling.kmeans(held, k, iters=iters + 1, tol=0.0, device=DEVICE,
                                 start=torch.from_numpy(start), history=history)
        return found[0], len(history) - 1

    def faiss():
        rivals["faiss-cpu"].omp_set_num_threads(threads)
        fitted = rivals["faiss-cpu"].Kmeans(x.shape[1], k, niter=iters, min_points_per_centroid=1,
                                            max_points_per_centroid=len(x))      # else a sample
        fitted.train(x, init_centroids=start)
        fitted.assign(x)
        return fitted.centroids, len(fitted.obj)

    def sklearn():
        with importlib.import_module("threadpoolctl").threadpool_limits(threads):
            fitted = rivals["scikit-learn"].KMeans(k, init=start, n_init=1, max_iter=iters, tol=0.0,
                                                   algorithm="lloyd").fit(x)
        return fitted.cluster_centers_, fitted.n_iter_

    functions = {"nanoplan": nanoplan, "faiss-cpu": faiss, "scikit-learn": sklearn}
    return {name: functions[name] for name in ("nanoplan", *rivals)}


def kmeans() -> list[dict]:
    """Lloyd's algorithm against faiss and scikit-learn, or against a GPU's floors."""
    torch.backends.cuda.matmul.allow_tf32 = False
    n, iters, rows, rivals = sized(200_000, 20_000), sized(10, 3), [], {}
    modules = {} if CUDA else {"faiss-cpu": "faiss", "scikit-learn": "sklearn.cluster"}
    for package, module in modules.items():
        try:
            rivals[package] = importlib.import_module(module)
        except ImportError:
            print(f"kmeans: {package} is not installed, so not compared with")
    for k in (64, sized(1024, 256)):
        x = mixture(n, k)
        start = x[np.random.default_rng(1).choice(n, k, replace=False)]
        functions = fits(x, start, iters, rivals)
        found = {name: function() for name, function in functions.items()}
        reached = {name: inertia(x, centroids) for name, (centroids, _) in found.items()}
        seconds = in_turn(functions, 5, warm_up=0)
        for name, times in seconds.items():
            row = {"K": k, "by": name, "seconds": statistics.median(times),
                   "iterations": int(found[name][1]), "inertia": reached[name]}
            if name != "nanoplan":
                faster = ratio(times, seconds["nanoplan"])
                row |= aim(faster, ">=", 1.0, " x as fast")
                excess = reached["nanoplan"] / reached[name] - 1             # beyond rounding?
                row |= {"nanoplan's inertia": f"{excess:+.0e}",
                        "not higher": "yes" if excess <= 1e-6 else "no"}
            elif CUDA:
                held = torch.from_numpy(x).to(DEVICE)
                copy = statistics.median(in_turn({"copy": held.clone}, 9)["copy"])
                floors = 2 * n * k * x.shape[1] / matrix_rate(torch.float32), copy / 2
                row["floor"] = (iters + 1) * max(floors)         # a copy reads and writes
                row |= aim(row["seconds"] / row["floor"], "<=", 2.0, " floors")
            rows.append(row)
    return show(f"kmeans: {n:,} vectors of width 192, float32, equal start, "
                f"{torch.get_num_threads()} threads", rows)


# --- preparation ----------------------------------------------------------------------------------

def prepare() -> list[dict]:
    """The default corpus from nothing; tokenizing against tiktoken; memory against size."""
    tokenizer, corpus = docstrings().tokenizer, docstrings().split("train")
    ranks = {tokenizer.decode_single_token_bytes(t): t for t in range(tokenizer.n_vocab - 1)}
    text = tokenizer.decode(corpus.tokens[1:sized(1 << 62, 300_000)].tolist())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        folders = (Path(folder) / str(i) for i in itertools.count())
        path.write_text(text.replace(data.EOT, f"\n{data.EOT}\n"))
        texts, megabytes = list(data.read_documents(path)), path.stat().st_size / 1e6

        def from_nothing():
            found = data.prepare("docstrings", "bpe", 4096, next(folders)).split("train")
            data.window_batch(found, data.batch_starts(len(found.tokens), 64, 32, (0, 0), 0), 64)

        def store():         # reads, tokenizes, cuts into sentences, writes; the tokenizer is given
            with mock.patch.object(data, "train_bpe", lambda texts, size: ranks):
                data.prepare(str(path), "bpe", 4096, next(folders))
        first = in_turn({"default corpus, from nothing to a batch": from_nothing}, 3, warm_up=0)
        times = in_turn({"a text by tiktoken alone": lambda: tokenizer.encode_ordinary_batch(texts),
                         "a text into the store": store}, 5)
    rows = [{"what": what, "seconds": statistics.median(seconds)}
            for what, seconds in (first | times).items()]
    rows[0] |= aim(rows[0]["seconds"], "<=", 25, " s")
    for row in rows[1:]:
        row |= {"MB": megabytes, "MB/s": megabytes / row["seconds"]}
    share = ratio(*times.values())
    rows[2] |= aim(share, ">=", 0.5, " x tiktoken")
    rows += [{"what": "a drawn text, tokenizer trained as well", **row} for row in prepared_texts()]
    share = rows[4]["peak MB"] / rows[3]["peak MB"]  # of the process: 250 MB are torch's
    rows[4] |= aim(share, "<=", 1.1, " x the peak")
    return show("prepare", rows)


CHILD = """
import sys
sys.path.insert(0, "tests")
import bench
begun = bench.now()
bench.data.prepare(sys.argv[1], "bpe", 4096, bench.Path(sys.argv[2]))
print(bench.now() - begun, bench.status("VmHWM"))
"""


@functools.cache
def prepared_texts() -> list[dict]:
    """Prepares a drawn .txt and one ten times as large, each in a process of its own."""
    random, rows = np.random.default_rng(0), []
    words = np.array(["".join(random.choice(list("etaoinshrdlu"), size))
                      for size in random.integers(2, 10, 20_000)])
    chance = 1 / np.arange(1, len(words) + 1)        # as often as words of a language
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        for megabytes in sized((12, 120), (1, 10)):
            with open(path, "a") as file:
                while file.tell() < megabytes * 1e6:
                    for document in random.choice(words, (400, 50, 12), p=chance / chance.sum()):
                        file.writelines(" ".join(sentence) + ".\n" for sentence in document)
                        file.write(data.EOT + "\n")
            child = subprocess.run(
                [sys.executable, "-c", CHILD, str(path), str(Path(folder) / str(megabytes))],
                cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            seconds, peak = map(float, child.stdout.split()[-2:])
            rows.append({"MB": megabytes, "seconds": seconds, "peak MB": peak})
    return rows


# --- generation -----------------------------------------------------------------------------------

class Cached(evaluation.Stream):
    """A Stream that notes the seconds and the logits of each token."""
    read, dtype = evaluation.Stream.append, train.faster_dtype(DEVICE)

    def append(self, token):
        begun = now()
        logits = self.read(token)
        self.__dict__.setdefault("noted", []).append((now() - begun, logits.float().clone()))
        return logits


class Recomputing(Cached):
    """For each token the whole window anew, and the logits of its last position alone."""

    @torch.no_grad()
    def read(self, token):
        gpt = self.model.gpt
        self.tokens.append(token)
        self._close_sentence()
        if len(self.tokens) - self.start > gpt.block_size:
            self.start += gpt.block_size // 2
        with evaluation.autocast(DEVICE, self.dtype):
            batch = self._window().to(DEVICE)
            x = gpt.hidden(batch.tokens, self.model.rows(batch)[0], batch.sentence_id)
            return F.linear(x[0, -1], gpt.wte.weight)[:gpt.vocab_size]


def generate() -> list[dict]:
    """eval.generate reads a prompt of two windows a token at a time, as it does what it writes."""
    T, store = sized(512, 64), docstrings()
    c = config(block_size=T, n_labels=256, vocab_size=store.tokenizer.n_vocab)
    model = planned_model("soft", c).eval()
    labeler = labelling.Labeler(torch.randn(c.vocab_size, c.n_embd), None, torch.zeros(c.n_embd),
                                torch.randn(c.n_labels, c.n_embd)).to(DEVICE)
    streams = [kind(model, labeler, store.tokenizer, c.planner_reach)
               for kind in (Cached, Recomputing)]
    run = SimpleNamespace(config=vars(c), tokenizer=store.tokenizer, labeler=labeler, device=DEVICE,
                          model=lambda plan: model,
                          autocast=lambda: evaluation.autocast(DEVICE, Cached.dtype))
    tokens = np.asarray(store.split("val").tokens[:4 * T])
    prompt = store.tokenizer.decode(tokens[tokens != store.tokenizer.eot_token][:2 * T].tolist())
    with mock.patch.object(evaluation, "Stream", side_effect=streams):
        for _ in zip(*(evaluation.generate(run, "soft", prompt, 1, 0.8, 50, 0) for _ in streams)):
            pass                                     # in turn, a sentence each
    (cached, logits), (anew, expected) = (zip(*stream.noted) for stream in streams)
    logits, expected = torch.stack(logits[:2 * T]), torch.stack(expected[:2 * T])
    assert (logits - expected).norm() < 0.05 * expected.norm(), "the two disagree"
    rows = []
    for what, part in {"of an empty window, until it is full": slice(0, T),
                       "the last eighth of the window": slice(T - T // 8, T),
                       "beyond it, refills included": slice(T, 2 * T)}.items():
        n, a, b = len(cached[part]), sum(cached[part]), sum(anew[part])
        row = {"tokens": what, "number": n, "cached/s": n / a, "recomputed/s": n / b}
        rows.append(row | aim(b / a, ">=", 5.0, " x as fast"))
    return show(f"generate: plan soft, {c.n_layer} layers of width {c.n_embd}, window {T}, "
                f"recomputed in {Cached.dtype}", rows)


# --- growth ---------------------------------------------------------------------------------------

def growth() -> list[dict]:
    """How time and memory grow with each size; `soft` is a training step."""
    tables, fast = [], train.faster_dtype(DEVICE)

    def soft(length=20, **changes):
        """A training step on 2^18 tokens in sentences of `length`, documents of 16 sentences."""
        sentences = np.arange(0, (1 << 18) + 1, length)
        corpus = data.Corpus(np.random.default_rng(0).integers(4096, size=1 << 18), sentences,
                             np.arange(0, len(sentences) - 1, 16))
        return planned_step("soft", corpus, config(**changes), fast)

    def table(title, size, functions, rows=None):
        if rows is None:
            peaks = [peak_mb(function) for function in functions.values()]
            seconds = in_turn(functions, 7, warm_up=1)
            rows = [{size: x, "seconds": statistics.median(times), "peak MB": peak}
                    for (x, times), peak in zip(seconds.items(), peaks)]
        for row in rows[1:]:
            larger, slower, fatter = (row[x] / rows[0][x] if rows[0][x] > 0 else 0.0
                                      for x in (size, "seconds", "peak MB"))
            row |= {f"x {size}": larger, "x seconds": slower, "x peak MB": fatter}
            row |= aim(max(slower, fatter), "<=", 1.1 * larger)  # linear, and a tenth for noise
        tables.extend(show(f"growth: {title}", rows))

    table("preparation of a .txt", "MB", {}, [dict(row) for row in prepared_texts()])
    counts = sized((64, 256, 1024, 4096), (64, 256))
    table("soft, against labels", "K", {k: soft(n_labels=k) for k in counts})
    n = sized(50_000, 5000)
    x = torch.from_numpy(mixture(n, 64)).to(DEVICE)
    fit = lambda k: labelling.kmeans(x, k, iters=3, device=DEVICE, start=x[:k])
    table(f"three iterations of k-means of {n:,} vectors, against labels", "K",
          {k: functools.partial(fit, k) for k in counts})
    c = config()
    tokens = c.batch_size * c.block_size
    table(f"soft, {tokens} tokens a step, against the window", "window",
          {T: soft(block_size=T, batch_size=tokens // T)
           for T in sized((64, 128, 256, 512, 1024), (64, 128))})
    table(f"soft, against sentences in a window of {c.block_size}", "sentences",
          {S: soft(c.block_size // S) for S in sized((4, 8, 16, 32, 64), (4, 8))})
    return tables


# --- all ------------------------------------------------------------------------------------------

BENCHMARKS = {f.__name__: f for f in (step, kmeans, prepare, generate, growth)}


def save(path: Path, name: str, rows: list[dict]) -> None:
    """Puts a benchmark into the file, and leaves the others there."""
    content, versions = json.loads(path.read_text()) if path.exists() else {}, evaluation.versions()
    for package in ("faiss-cpu", "scikit-learn"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    content[name] = {"rows": rows, "command": f"python tests/bench.py {name}",
                     "machine": f"{machine()}, {torch.get_num_threads()} threads",
                     "versions": versions}
    path.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(BENCHMARKS)}")
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing written")
    parser.add_argument("--cache_dir", default="cache", help="of prepared corpora, as train.py's")
    parser.parse_args(namespace=OPTIONS)
    if unknown := [name for name in OPTIONS.names if name not in BENCHMARKS]:
        parser.error(f"{unknown[0]}: choose of {', '.join(BENCHMARKS)}")
    print(f"{machine()}, {torch.get_num_threads()} threads")
    for name in OPTIONS.names or BENCHMARKS:
        rows = BENCHMARKS[name]()
        if not OPTIONS.quick:
            save(ROOT / "results" / "bench.json", name, rows)


if __name__ == "__main__":                           # data.prepare starts processes
    main()
