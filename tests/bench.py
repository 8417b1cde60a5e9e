"""Measures speed and memory, and sets them against what nanoplan aims at. No test depends on it.

    python tests/bench.py                  # all benchmarks
    python tests/bench.py loss kmeans      # these two; of `loss`, assets/loss.svg is drawn, too
    python tests/bench.py --quick          # small sizes, nothing written: to try the script
"""
import contextlib
import functools
import importlib.metadata
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results"), str(ROOT / "assets")]
os.environ["TQDM_DISABLE"] = "1"

import numpy as np
import torch
from torch import nn

import data
import labels
import train
from eval import Parser, Run, choose_device, versions
from loss import draw
from model import END_TO_END
from run_all import machine

DEVICE = choose_device("auto")
ON_GPU = DEVICE.type == "cuda"
VERSIONS = versions()
QUICK = "--quick" in sys.argv
docstrings = functools.partial(data.prepare, "docstrings", "bpe", 4096, ROOT / "cache")
YARDSTICK_STEPS, YARDSTICK_LR, LOSS_STEPS = 1800, 4e-3, 470     # the best rate of 1, 2 and 4e-3
CHILD = """import sys, time, data
begun = time.perf_counter()
corpus = data.prepare(sys.argv[1], "bpe", 4096, data.Path(sys.argv[2])).split("train")
data.window_batch(corpus, data.batch_starts(len(corpus.tokens), 64, 32, (0,), 0), 64)
status = open("/proc/self/status").read()                   # Linux's
print(time.perf_counter() - begun, int(status.split("VmHWM:")[1].split()[0]) / 1000)"""


def timed(function) -> float:                   # its seconds
    wait = torch.cuda.synchronize if ON_GPU else int
    wait()
    begun = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - begun


def in_turn(functions: dict, rounds: int, warm_up: int = 3) -> dict[str, list[float]]:
    """{name: function} -> {name: its seconds in each round}, after some that do not count. A ratio
    of two in one round (times_as_fast) is free of most of a shared machine's noise."""
    rounds, warm_up = (1, 1) if QUICK else (rounds, warm_up)
    taken = [{name: timed(f) for name, f in functions.items()} for _ in range(warm_up + rounds)]
    return {name: [seconds[name] for seconds in taken[warm_up:]] for name in functions}


def times_as_fast(mine: list[float], other: list[float]) -> float:
    return statistics.median(b / a for a, b in zip(mine, other))


def aim(reached: float, sign: str, bound: float, unit: str) -> dict:
    """The columns of a row that has an aim."""
    return {"reached": reached, "aim": f"{sign} {bound:.4g} {unit}",
            "met": reached >= bound if sign == ">=" else reached <= bound}


def show(title: str, rows: list[dict]) -> list[dict]:
    """Prints the rows, and returns them with the title in each."""
    print(title, *rows, sep="\n    ")
    return [{"table": title} | row for row in rows]


def step() -> list[dict]:
    """A training step: against the yardstick, of the default run, and of GPT-2's size on a GPU."""
    aims = {"none": (">=", 2.4, "x yardstick"), "soft": (">=", 2.0, "x yardstick")}
    rows = step_table(("yardstick", "none", "soft"), {} if ON_GPU else aims, block_size=256,
                      batch_size=2 if QUICK else 16)
    rows += step_table(("none", "hard", "soft"), {})
    if ON_GPU:
        aims = {"none": (">=", 0.4, "x matrix rate"), "soft": (">=", 0.95, "x none")}
        sizes = train.PRESETS["gpu"] | {"vocab_size": 50257, "grad_accum": 1}
        rows += step_table(("none", "soft"), aims, **sizes)
    return rows


def step_table(names: tuple, aims: dict, **sizes) -> list[dict]:
    """Times steps in turn. `aims` says of a row what it must reach, and in which column."""
    seconds = in_turn({name: training(name, sizes, 1000)[1] for name in names}, 12)
    c, rows, n = train.Config(**sizes), [], 8192 if ON_GPU else 2048
    dtype = "bfloat16" if Run(c).autocast()._enabled else "float32"
    square = torch.randn(n, n, device=DEVICE).to(getattr(torch, dtype))
    matrix_rate = 2 * n ** 3 / statistics.median(timed(lambda: square @ square) for _ in range(12))
    # of a token, without the planner's: 6 for each weight of a matrix, and attention's
    weights = 12 * c.n_layer * c.n_embd ** 2 + c.vocab_size * c.n_embd
    operations = 6 * weights + 12 * c.n_layer * c.n_embd * c.block_size
    for name, times in seconds.items():
        speed = c.batch_size * c.block_size / statistics.median(times)
        row = {"step": name, "tokens/s": speed, "x matrix rate": speed * operations / matrix_rate}
        row |= {f"x {other}": times_as_fast(times, seconds[other])
                for other in ("yardstick", "none") if other in seconds}
        if name in aims:
            row |= aim(row[aims[name][2]], *aims[name])
        rows.append(row)
    return show(f"step: width {c.n_embd}, window {c.block_size}, batch {c.batch_size}, plans in "
                f"{dtype}{', compiled' * c.compile}; {operations:.3g} operations a token", rows)


def training(name: str, sizes: dict, steps: int):
    """The yardstick, the GPT of stage lm, or one under a plan -> the model, and a function that
    does the next of its steps as train.fit does, or of the yardstick's as nanoGPT does."""
    yardstick = name == "yardstick"
    run = Run(train.Config(**sizes | {"dtype": "float32" if yardstick else "auto"}))
    c, corpus, numbers = run.config, docstrings().split("train"), iter(range(steps))
    run.corpora["train"], run.grad_accum, run.tokenizer = corpus, 1, mock.Mock(n_vocab=c.vocab_size)
    model = Plain(c) if yardstick else run.new_model("none" if name == "lm" else name)
    # At a rate of 0 for Muon all of the yardstick is AdamW's, with betas of 0.9 and 0.95.
    parts = [(model, 0.0, YARDSTICK_LR)] if yardstick else [(model.gpt, c.muon_lr, c.lm_lr)]
    if name in END_TO_END:
        parts.append((model.planner, 0.0, c.joint_planner_lr))
    if name not in ("yardstick", "lm"):                 # a step takes as long whatever they hold
        corpus.vectors = np.ones((corpus.n_sentences, c.n_embd), np.float16)
        corpus.labels = np.ones(corpus.n_sentences, int)
    optimizers = train.make_optimizers(parts, c.weight_decay, DEVICE)
    net = torch.compile(model.to(DEVICE)) if c.compile else model.to(DEVICE)

    def train_once():
        step = next(numbers)
        share = train.learning_rate(step, steps)
        if yardstick:                   # up in 100 steps, then along a cosine to a tenth
            fall = max(0, step - 100) / max(1, steps - 100)
            share = min((step + 1) / 100, 0.55 + 0.45 * math.cos(math.pi * fall))
        batch = train.make_batch(run, "lm", step, 0).to(DEVICE)
        with run.autocast():
            loss, _ = net(batch, torch.Generator(DEVICE))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * share
            with run.autocast():
                optimizer.step()
            optimizer.zero_grad()
    return model, train_once


class Plain(nn.Module):
    """The yardstick: the same GPT in plain PyTorch, with learned positions and GPT-2's start."""
    def __init__(self, c: train.Config):
        super().__init__()
        linear, C, self.H = functools.partial(nn.Linear, bias=False), c.n_embd, c.n_head
        self.wte, self.wpe = nn.Embedding(c.vocab_size, C), nn.Embedding(c.block_size, C)
        self.blocks = nn.ModuleList(nn.ModuleDict({
            "qkv": nn.Sequential(nn.LayerNorm(C), linear(C, 3 * C)), "proj": linear(C, C),
            "mlp": nn.Sequential(nn.LayerNorm(C), linear(C, 4 * C), nn.GELU(), linear(4 * C, C))})
            for _ in range(c.n_layer))
        self.ln_f = nn.LayerNorm(C)
        torch.manual_seed(0)
        for name, p in self.named_parameters():
            residual = name.endswith(("proj.weight", "mlp.3.weight"))
            if p.dim() >= 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.n_layer if residual else 1))

    def forward(self, batch, noise):
        x = self.wte(batch.tokens) + self.wpe.weight[:batch.tokens.shape[1]]
        for block in self.blocks:
            q, k, v = block["qkv"](x).view(*x.shape[:2], 3, self.H, -1).permute(2, 0, 3, 1, 4)
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block["proj"](y.transpose(1, 2).reshape(x.shape))
            x = x + block["mlp"](x)
        logits = nn.functional.linear(self.ln_f(x), self.wte.weight)
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()), None


@torch.no_grad()
def held_out(model: nn.Module, T: int) -> float:
    """Nats a token, in float32, on windows of T that are spread evenly over validation."""
    corpus, n = docstrings().split("val"), 16 if QUICK else 400
    starts = np.arange(n) * (len(corpus.tokens) // n)       # further than T from each other
    batches = (data.window_batch(corpus, row, T).to(DEVICE) for row in starts.reshape(-1, 8))
    return statistics.mean(model(batch, None)[0].item() for batch in batches)


def loss() -> list[dict]:
    """The seconds that stage lm takes to the last loss of the yardstick. Only steps count."""
    sizes, rows, parts = {"block_size": 256, "batch_size": 8}, [], 10 if QUICK else 150
    for name, steps in ("yardstick", YARDSTICK_STEPS), ("lm", LOSS_STEPS):
        rows.append({"what": name, "steps": 10 if QUICK else steps, "seconds": 0.0, "curve": []})
    trainings = [training(row["what"], sizes, row["steps"]) for row in rows]
    for part in range(parts):           # a few steps of each, so that noise meets both alike
        for row, (model, train_once) in zip(rows, trainings):
            first, last = [row["steps"] * i // parts for i in (part, part + 1)]
            row["seconds"] += sum(timed(train_once) for _ in range(first, last))
            if (part + 1) % (parts // 10) == 0:
                row["nats"] = held_out(model, 256)
                row["curve"].append([round(row["seconds"], 2), round(math.exp(row["nats"]), 2)])
    rows[1] |= aim(rows[0]["seconds"] / rows[1]["seconds"], ">=", 8, "x as fast as the yardstick")
    rows.append({"what": "its loss"} | aim(rows[1]["nats"], "<=", rows[0]["nats"], "nats"))
    return show(f"loss: window 256, batch 8; yardstick in float32, rate {YARDSTICK_LR:g}", rows)


def kmeans() -> list[dict]:
    """Ten updates on the CPU and a last assignment, equal in start and inertia, against others."""
    n, rows, names = 20_000 if QUICK else 200_000, [], ["nanoplan"]
    aims = {"faiss-cpu": 1.0, "scikit-learn": 0.9}
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())    # theirs are as many
    for name in aims:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            VERSIONS[name] = importlib.metadata.version(name)
            names.append(name)
    for k in (64, 256 if QUICK else 1024):
        random = np.random.default_rng(0)       # around k means near each other
        means = random.standard_normal((k, 192), dtype=np.float32)[random.integers(k, size=n)] / 2
        x = means + random.standard_normal((n, 192), dtype=np.float32)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        start = x[random.choice(n, k, replace=False)]
        fits = {name: functools.partial(inertia_by, name, x, start) for name in names}
        inertia = [float(fit()) for fit in fits.values()]
        assert max(inertia) < 1.0001 * min(inertia), f"unequal inertia: {inertia}"
        seconds = in_turn(fits, 5, warm_up=0)
        for name, times in seconds.items():
            rows.append({"K": k, "by": name, "seconds": statistics.median(times)})
            if name in aims:
                faster = times_as_fast(seconds["nanoplan"], times)
                rows[-1] |= aim(faster, ">=", aims[name], "x as fast")
    return show(f"kmeans: {n:,} vectors of width 192, float32", rows)


def inertia_by(name: str, x, start) -> float:
    if name == "nanoplan":
        return labels.kmeans(x, len(start), iters=10, tol=0.0, start=torch.from_numpy(start))[2]
    if name == "faiss-cpu":
        import faiss
        fitted = faiss.Kmeans(x.shape[1], len(start), niter=10, max_points_per_centroid=len(x))
        fitted.train(x, init_centroids=start)
        return fitted.assign(x)[0].sum(dtype=np.float64)
    from sklearn.cluster import KMeans
    return KMeans(len(start), init=start, n_init=1, max_iter=10, tol=0.0).fit(x).inertia_


def prepare() -> list[dict]:
    """The default corpus from nothing; its text against tiktoken; memory against size."""
    tokens = docstrings().split("train").tokens[1:300_000 if QUICK else None]
    tokenizer = docstrings().tokenizer
    ranks = {tokenizer.decode_single_token_bytes(t): t for t in range(tokenizer.n_vocab - 1)}
    text = tokenizer.decode(tokens.tolist()).replace(data.EOT, f"\n{data.EOT}\n")
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder) / "small.txt", Path(folder) / "large.txt"
        small.write_text(text, "utf-8")
        large.write_text(10 * text, "utf-8")
        texts = list(data.read_documents(small))
        functions = {           # a text into the store, of given tokens; both in one thread
            "tiktoken alone": lambda: tokenizer.encode_ordinary_batch(texts, num_threads=1),
            "a text into the store": lambda: data.prepare(
                str(small), "bpe", 4096, Path(tempfile.mkdtemp(dir=folder)))}
        with mock.patch.object(data, "train_bpe", return_value=ranks):
            seconds = in_turn(functions, 5)
        rows = [{"what": what, "seconds": statistics.median(x)} for what, x in seconds.items()]
        rows[1] |= aim(times_as_fast(*reversed(seconds.values())), ">=", 0.5, "x tiktoken")
        for what, source in (("default corpus, from nothing to a batch", "docstrings"),
                             ("a text", small), ("ten times that text", large)):
            child = [sys.executable, "-c", CHILD, str(source), f"{folder}/stores"]
            said = subprocess.check_output(child, cwd=ROOT, text=True)
            seconds, peak = map(float, said.split())        # some 250 MB of the peak are torch's
            rows.append({"what": what, "seconds": seconds, "peak MB": peak})
    rows[2] |= aim(rows[2]["seconds"], "<=", 25, "s")
    rows[4] |= aim(rows[4]["peak MB"] / rows[3]["peak MB"], "<=", 1.1, "x the peak")
    return show(f"prepare: texts are of {len(text) / 1e6:.3g} MB", rows)


def main() -> None:
    benchmarks = {"loss": loss, "step": step, "kmeans": kmeans, "prepare": prepare}
    parser = Parser(prog="bench.py", description=__doc__)
    parser.add_argument("names", nargs="*", default="all", choices=["all", *benchmarks])
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing written")
    names = parser.parse_args().names
    for name in benchmarks if "all" in names else names:
        rows = benchmarks[name]()
        if not QUICK:
            path = ROOT / "results" / "bench.json"
            saved = data.read_json(path) if path.exists() else {}
            saved[name] = {"command": f"python tests/bench.py {name}", "versions": VERSIONS,
                           "machine": f"{machine()}, {torch.get_num_threads()} threads",
                           "rows": rows}
            data.write_json(path, {name: saved[name] for name in benchmarks if name in saved})
            if name == "loss":
                draw()


if __name__ == "__main__":
    main()
