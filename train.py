"""Trains a language model that plans, end to end: `python train.py [--name=value ...]`.

Four stages, each with a checkpoint in out_dir:
  lm       the GPT alone                                        -> lm.pt
  labels   a vector and a label for every sentence              -> labels.pt
  planner  the planner alone, to predict the next label         -> planner.pt
  joint    once for each plan: GPT, label embeddings and (for the plans that are end to end) planner
           together on the next-token loss                      -> joint_<plan>.pt
All plans start from the same three files and see the same batches in the same order, so their
differences are paired. Batches, and gumbel's noise, are functions of (seed, stage, step): there is
no random state to save, and a resumed run ends bit for bit like an undisturbed one on the CPU.

Under `torchrun --nproc_per_node=N train.py ...` the same loop runs data-parallel: each of the N
processes (ranks) takes its share of every batch, the gradients are averaged, and rank 0 writes.
"""
import contextlib
import ctypes
import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

try:
    import fcntl
except ImportError:                                  # not on Windows
    fcntl = None

import data
import eval as evaluation
import labels as labelling
from model import END_TO_END, GPT, PLANS
from planner import PlannedGPT, Planner, label_loss


# --- options --------------------------------------------------------------------------------------

def opt(default, text):
    """An option's default and what --help says of it."""
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """Every option. The command line is made from these fields."""
    # what, where
    data: str = opt("docstrings", "docstrings, wikitext103, tinystories, or a path to UTF-8 text")
    tokenizer: str = opt("bpe", "bpe (trained on the corpus) or gpt2 (downloaded once by tiktoken)")
    vocab_size: int = opt(4096, "tokens of the bpe tokenizer; gpt2 has its own 50257")
    cache_dir: str = opt("cache", "where prepared corpora and downloads are kept")
    out_dir: str = opt("out", "where this run's files go")
    seed: int = opt(0, "of initialisation, batches, k-means and noise")
    device: str = opt("auto", "auto (cuda, then mps, then cpu), cuda, mps or cpu")
    dtype: str = opt("auto", "auto (bfloat16 where that is faster here), bfloat16 or float32")
    preset: str = opt("laptop", "a set of defaults: laptop, gpu, or tiny (to try things out)")
    resume: bool = opt(False, "go on in an out_dir that holds stages already")
    compile: bool = opt(False, "torch.compile the models; minutes at first, faster steps on a GPU")
    plans: str = opt("none,hard,soft", f"the joint stages, of {','.join(PLANS)}; or all")
    # GPT
    n_layer: int = opt(4, "blocks of the GPT")
    n_head: int = opt(3, "attention heads of the GPT")
    n_embd: int = opt(192, "width of the GPT")
    block_size: int = opt(64, "window of the GPT in tokens")
    # labels
    vectors: str = opt("sif", "sif (weighted token embeddings) or hidden (hidden states)")
    n_labels: int = opt(256, "K: labels, the clusters of k-means")
    kmeans_iters: int = opt(50, "iterations of k-means at most")
    # planner
    planner_layer: int = opt(2, "blocks of the planner")
    planner_head: int = opt(3, "attention heads of the planner")
    planner_embd: int = opt(192, "width of the planner")
    planner_reach: int = opt(48, "how many sentences before the window the planner can look back")
    planner_view: str = opt("document", "document; or window: only what the GPT sees, too")
    # training
    batch_size: int = opt(32, "windows in a micro-batch")
    grad_accum: int = opt(1, "micro-batches in a step")
    planner_batch: int = opt(32, "rows of 2 planner_reach sentences in a step, stage planner")
    lm_steps: int = opt(1000, "steps of stage lm")
    planner_steps: int = opt(150, "steps of stage planner")
    joint_steps: int = opt(800, "steps of stage joint, for each plan")
    lm_lr: float = opt(2e-3, "peak learning rate of stage lm")
    planner_lr: float = opt(1e-3, "peak learning rate of stage planner")
    joint_lr: float = opt(2e-3, "peak learning rate of the GPT in stage joint")
    joint_planner_lr: float = opt(5e-4, "peak learning rate of the planner in stage joint")
    unfreeze_step: int = opt(0, "step of stage joint from which the planner is trained")
    label_loss_weight: float = opt(0.0, "of the label loss beside the LM loss, stage joint")
    gumbel_tau: float = opt(1.0, "temperature of the plan gumbel")
    warmup: float = opt(0.05, "share of a stage's steps in which the learning rate rises")
    min_lr: float = opt(0.1, "share of the peak learning rate at a stage's end")
    weight_decay: float = opt(0.1, "AdamW's, of matrices; not of label_emb")
    beta2: float = opt(0.95, "AdamW's second beta")
    grad_clip: float = opt(1.0, "largest gradient norm")
    # watching
    eval_every: int = opt(200, "steps between validations; each stage's end is one in any case")
    eval_tokens: int = opt(16384, "validation tokens of those; the final table takes all")
    save_every: int = opt(100, "steps between checkpoints")

    def check(self) -> None:
        """Raises ValueError for a value, or a combination, that can't be."""
        choices = {"tokenizer": ("bpe", "gpt2"), "dtype": ("auto", "bfloat16", "float32"),
                   "preset": tuple(PRESETS), "vectors": labelling.VECTORS,
                   "planner_view": ("document", "window")}
        for name, allowed in choices.items():
            if (given := getattr(self, name)) not in allowed:
                raise ValueError(f"{name}={given}: choose {' or '.join(allowed)}")
        positive = ("n_layer n_head n_embd block_size n_labels kmeans_iters planner_layer "
                    "planner_head planner_embd planner_reach batch_size grad_accum planner_batch "
                    "lm_steps planner_steps joint_steps gumbel_tau grad_clip eval_every "
                    "eval_tokens save_every")
        for name in positive.split():
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0")
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.type is float and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{f.name}={value}: must be finite and not below 0")
        for n_head, n_embd in (("n_head", "n_embd"), ("planner_head", "planner_embd")):
            if getattr(self, n_embd) % getattr(self, n_head):
                raise ValueError(f"{n_head}={getattr(self, n_head)} does not divide "
                                 f"{n_embd}={getattr(self, n_embd)}: choose one that does")
        if self.vocab_size < 257:
            raise ValueError(f"vocab_size={self.vocab_size}: must be at least 257, a token for "
                             "each byte and one for <|endoftext|>")
        if self.beta2 >= 1:
            raise ValueError(f"beta2={self.beta2}: must be below 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: must not be below 0")
        self.plan_names                              # raises, too

    @property
    def plan_names(self) -> list[str]:
        """--plans as a list, in the order given."""
        names = PLANS if self.plans == "all" else self.plans.split(",")
        for name in names:
            if name not in PLANS:
                raise ValueError(f"plans={self.plans}: {name!r} is not one of {', '.join(PLANS)}, "
                                 "all")
        return list(dict.fromkeys(names))


PRESETS = {
    "laptop": {},
    "tiny": dict(vocab_size=512, n_layer=1, n_head=2, n_embd=32, block_size=32, n_labels=8,
                 planner_layer=1, planner_head=2, planner_embd=32, planner_reach=16, batch_size=8,
                 planner_batch=8, lm_steps=20, planner_steps=20, joint_steps=20, eval_tokens=2048),
    # a GPT of 124 M parameters; a step is 0.5 M tokens
    "gpu": dict(tokenizer="gpt2", n_layer=12, n_head=12, n_embd=768, block_size=1024, n_labels=1024,
                planner_layer=4, planner_head=12, planner_embd=768, planner_reach=128,
                batch_size=32, grad_accum=16, planner_batch=128, lm_steps=2000, planner_steps=4000,
                joint_steps=1000, lm_lr=6e-4, planner_lr=3e-4, joint_lr=3e-4, joint_planner_lr=3e-4,
                eval_every=250, eval_tokens=262144, save_every=250, compile=True),
}

# What each stage depends on, beside what the stages before it do. A finished stage is reused if
# none of these changed; `plans`, what is watched, and where files lie change nothing.
STAGE_OPTIONS = {
    "lm": "fingerprint tokenizer vocab_size seed dtype n_layer n_head n_embd block_size batch_size "
          "grad_accum lm_steps lm_lr warmup min_lr weight_decay beta2 grad_clip",
    "labels": "vectors n_labels kmeans_iters",
    "planner": "planner_layer planner_head planner_embd planner_reach planner_batch planner_steps "
               "planner_lr",
    "joint": "planner_view joint_steps joint_lr joint_planner_lr unfreeze_step label_loss_weight "
             "gumbel_tau",
}


def boolean(text: str) -> bool:
    """true, false, 1 or 0; ValueError for anything else, which argparse reports."""
    if text.lower() not in ("true", "false", "1", "0"):
        raise ValueError
    return text.lower() in ("true", "1")


def saved_options(out_dir: Path) -> dict:
    """The options in an out_dir's config.json, but for where it lies; none where there is none.
    Raises ValueError where it is damaged."""
    saved = evaluation.read_config(out_dir) if (out_dir / "config.json").exists() else {}
    return {f.name: saved[f.name] for f in dataclasses.fields(Config)
            if f.name not in ("out_dir", "resume") and type(saved.get(f.name)) is f.type}


def parse_config(argv=None) -> Config:
    """The command line over the preset over the defaults; with --resume over what the run in
    out_dir was started with, so that a forgotten option does not undo its stages."""
    parser = evaluation.Parser(prog="train.py", description=__doc__)
    for f in dataclasses.fields(Config):
        kind = boolean if f.type is bool else f.type
        bare = dict(nargs="?", const=True) if f.type is bool else {}
        parser.add_argument(f"--{f.name}", type=kind, metavar=f.type.__name__, default=None, **bare,
                            help=f"{f.metadata['help'].replace('%', '%%')} [{f.default}]")
    given = {k: value for k, value in vars(parser.parse_args(argv)).items() if value is not None}
    preset = given.get("preset", Config.preset)
    if preset not in PRESETS:
        parser.error(f"preset={preset}: choose {' or '.join(PRESETS)}")
    out_dir = Path(given.get("out_dir", Config.out_dir))
    try:
        before = saved_options(out_dir) if given.get("resume") else {}
        config = Config(**(before | PRESETS[preset] | given))
        config.check()
    except ValueError as error:
        parser.error(str(error))
    return config


# --- checkpoints ----------------------------------------------------------------------------------

def save_checkpoint(path: Path, saved: dict) -> None:
    """A failed save leaves the last one intact."""
    with data.replacing(path) as working:
        try:
            torch.save({"format": evaluation.FORMAT, "stage": path.stem, **saved}, working)
        except RuntimeError as error:                # as which torch reports a full disk
            raise OSError(str(error).splitlines()[0]) from None


class Job:
    """What all stages share: options, device, corpus, files."""

    def __init__(self, config: Config):
        self.config, self.out = config, Path(config.out_dir)
        self.device = evaluation.choose_device(config.device)
        self.rank, self.world = (int(os.environ.get(name, default))      # as torchrun sets them
                                 for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        if self.world > 1:
            self._join()
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = True
        stages = sorted(self.out.glob("*.pt"))
        if stages and not config.resume:
            raise ValueError(f"out_dir={self.out} holds {stages[0].name} already: go on with "
                             "--resume, or choose another --out_dir")
        with self.rank_0_first():
            self.out.mkdir(parents=True, exist_ok=True)
            if self.rank == 0:
                self.lock = self._lock()
                for left in self.out.glob("*.tmp"):  # by a run that was killed while it wrote
                    left.unlink(missing_ok=True)
            self.dtype = self._dtype()
            self.store = data.prepare(config.data, config.tokenizer, config.vocab_size,
                                      Path(config.cache_dir))
            self.options = dataclasses.asdict(config) | {
                "dtype": self.dtype, "fingerprint": self.store.meta["fingerprint"]}
            if self.rank == 0:
                data.save_tokenizer(self.out / "tokenizer.json", self.store.tokenizer)
                content = self.options | {"versions": evaluation.versions()}
                evaluation.write_json(self.out / "config.json",
                                      content | {"digest": data.digest_of(content)})
        self.train, self.val = self.store.split("train"), self.store.split("val")
        if config.n_labels > self.train.n_sentences:
            raise ValueError(f"n_labels={config.n_labels}: the training split has but "
                             f"{self.train.n_sentences} sentences; ask for fewer labels, or give "
                             "more text")
        data.batch_starts(len(self.train.tokens), config.block_size, 1, (0,), 0)    # does it fit?
        self.stop, self.known, self.ids = False, {}, {}

    def _join(self) -> None:
        """Joins the other processes that torchrun started."""
        for name in ("batch_size", "planner_batch"):
            if getattr(self.config, name) % self.world:
                raise ValueError(f"{name}={getattr(self.config, name)} can't be shared by "
                                 f"{self.world} processes: choose a multiple")
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        # rank 0 may prepare a corpus, or fit k-means, for long while the others wait
        dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo",
                                timeout=timedelta(hours=12))
        if self.rank:
            sys.stdout = open(os.devnull, "w")       # one screen, one voice

    @contextlib.contextmanager
    def rank_0_first(self):
        """Rank 0 goes through the block, and then the others, who find its files written."""
        if self.rank:
            dist.barrier()
        yield
        if self.world > 1 and self.rank == 0:
            dist.barrier()

    def averaged(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The means over ranks of some scalars; of the label loss, the mean of the ranks' means."""
        if self.world == 1:
            return values
        stacked = torch.stack([value.float() for value in values.values()])
        dist.all_reduce(stacked)
        return dict(zip(values, stacked / self.world))

    def _lock(self):
        """The open file whose lock keeps a second process out; it ends with this process, however
        that ends. Where there is no such lock (Windows, some network disks), nothing is kept."""
        file = open(self.out / ".lock", "a")
        try:
            fcntl and fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"out_dir={self.out} is in use by another run of train.py: wait for "
                             "it, or choose another --out_dir") from None
        except OSError:
            pass
        return file

    def _dtype(self) -> str:
        """The option, or what an earlier start of this run found out, or what is faster here."""
        if self.config.dtype != "auto":
            return self.config.dtype
        try:
            before = evaluation.read_config(self.out)["dtype"]
        except (OSError, ValueError):
            before = None
        return before if before in ("bfloat16", "float32") else faster_dtype(self.device)

    def depends(self, name: str) -> dict:
        """What a stage's result depends on: options with their values, and the content of the
        stages before it."""
        stages = list(STAGE_OPTIONS)
        needs = stages[:stages.index(name.split("_")[0]) + 1]
        if name == "joint_none":                     # the plain GPT knows no labels, no planner
            needs = ["lm", "joint"]
        options = {option: self.options[option] for stage in needs
                   for option in STAGE_OPTIONS[stage].split()}
        return options | {f"{stage}.pt": self.ids[stage] for stage in needs
                          if stage != name and stage in self.ids}

    def load(self, name: str) -> dict | None:
        """The checkpoint `name`, or None where there is none or its options changed."""
        path = self.out / f"{name}.pt"
        if not path.exists():
            return None
        saved = evaluation.load_checkpoint(path)
        before = saved["depends"]
        changed = [f"{key} was {before.get(key)}, is {value}"
                   for key, value in self.depends(name).items() if before.get(key) != value]
        if changed:
            print(f"{name}: done anew, for {'; '.join(changed)}")
            return None
        if saved["done"]:
            self.ids[name] = saved.get("id")         # the first runs' files have none
        done = "finished before, reused" if saved["done"] else f"goes on at step {saved['step']}"
        print(f"{name}: {done}")
        return saved

    def sentences(self, split: str, labeler: labelling.Labeler) -> tuple[np.ndarray, np.ndarray]:
        """Vectors (n, E), a memory map, and labels (n,) of a split."""
        if split not in self.known:
            path = self.out / f"vectors.{split}.{labeler.fingerprint()}.npy"
            vectors = labelling.embed_corpus(labeler, self.store.split(split), path)
            labels = None if labeler.centroids is None else labelling.label_corpus(labeler, vectors)
            self.known[split] = vectors, labels
        return self.known[split]

    def log(self, **entry) -> None:
        """Adds a line to metrics.jsonl."""
        if self.rank:
            return
        path = self.out / "metrics.jsonl"
        with data.writing(path), open(path, "a") as file:
            file.write(json.dumps(entry) + "\n")

    def forget(self, name: str, step: int) -> None:
        """Drops what metrics.jsonl has of a stage after a step: that is about to be done again;
        and lines that are cut or damaged."""
        path, kept = self.out / "metrics.jsonl", []
        if self.rank or not path.exists():
            return
        for line in path.read_text("utf-8", "replace").split("\n")[:-1]:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                if entry["stage"] != name or entry["step"] <= step:
                    kept.append(line + "\n")
        with data.replacing(path) as working:
            working.write_text("".join(kept), "utf-8")


def faster_dtype(device: torch.device) -> str:
    """bfloat16 on a GPU that has it, and on a CPU that multiplies it much faster than float32."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    if device.type != "cpu":
        return "float32"
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2048, 256, dtype=dtype), torch.randn(256, 1024, dtype=dtype)
        times = []
        for _ in range(8):
            begun = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - begun)
        seconds[dtype] = min(times)
    return "bfloat16" if seconds[torch.float32] > 1.5 * seconds[torch.bfloat16] else "float32"


# --- the loop -------------------------------------------------------------------------------------

def learning_rate(step: int, steps: int, warmup: float, min_lr: float) -> float:
    """Share of the peak: a linear rise, then a cosine down to min_lr."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    fall = (step - rise) / max(1, steps - rise)
    return min_lr + (1 - min_lr) * 0.5 * (1 + math.cos(math.pi * fall))


def make_optimizer(config: Config, parts: list[tuple[torch.nn.Module, float]], fused: bool):
    """AdamW over (module, peak learning rate); only matrices decay, and of those not label_emb."""
    groups = []
    for module, lr in parts:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        decays = lambda name, p: p.dim() >= 2 and not name.endswith(("label_emb", "start"))
        for decay in (True, False):
            params = [p for name, p in named if decays(name, p) == decay]
            groups.append({"params": params, "peak_lr": lr,
                           "weight_decay": config.weight_decay if decay else 0.0})
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, config.beta2), fused=fused)


def noise_generator(device: torch.device, *key: int) -> torch.Generator:
    """A generator of its own for each key, whatever was drawn before."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> 1))


@dataclass
class Stage:
    """What the loop needs to know of a stage."""
    name: str
    model: torch.nn.Module
    parts: list                                      # [(module, peak learning rate)] to be trained
    steps: int
    batches: Callable                                # step -> [Batch], micro-batches of one size
    losses: Callable                                 # (model, batch, generator) -> {"loss": .., ..}
    validate: Callable                               # () -> {"val_..": number}
    args: dict                                       # how to build the modules again, to be saved


def gradients(job: Job, stage: Stage, run: torch.nn.Module, step: int) -> tuple[dict, int]:
    """Leaves a step's gradients in the parameters; returns its losses, scalars averaged over the
    micro-batches and the ranks, with "stop", above 0 if a rank was told to; and its tokens."""
    batches, tokens = stage.batches(step), 0
    total = {"stop": torch.tensor(float(job.stop), device=job.device)}
    for micro, batch in enumerate(batches):
        noise = noise_generator(job.device, job.config.seed, step, micro, job.rank)
        early = job.world > 1 and micro + 1 < len(batches)       # ranks talk at the last one alone
        with run.no_sync() if early else contextlib.nullcontext():
            with evaluation.autocast(job.device, job.dtype):
                found = stage.losses(run, batch.to(job.device), noise)
            (found["loss"] / len(batches)).backward()
        for key, value in found.items():
            total[key] = total.get(key, 0.0) + value.detach() / len(batches)
        tokens += job.world * (batch.tokens.numel() or batch.labels.numel())
    return job.averaged(total), tokens


def fit(job: Job, stage: Stage, saved: dict | None) -> None:
    """Trains a stage, from its checkpoint `saved` if there is one, and leaves its checkpoint."""
    config, name, model, steps = job.config, stage.name, stage.model, stage.steps
    optimizer = make_optimizer(config, stage.parts, fused=job.device.type in ("cpu", "cuda"))
    first, skipped, in_a_row = 0, 0, 0
    if saved:
        model.load_state_dict(saved["model"])
        if saved["done"]:
            return
        optimizer.load_state_dict(saved["optimizer"])
        first, skipped = saved["step"], saved["skipped"]
    job.forget(name, first)
    run = torch.nn.parallel.DistributedDataParallel(model) if job.world > 1 else model
    run = torch.compile(run) if config.compile else run
    late = list(model.planner.parameters()) if getattr(model, "planner", None) else []
    tokens, begun = 0, time.perf_counter()
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=name, mininterval=0.5,
               disable=job.rank > 0)

    for step in bar:
        # 1. learning rate
        share = learning_rate(step, steps, config.warmup, config.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share

        # 2. gradients
        total, n = gradients(job, stage, run, step)
        stop = bool(total.pop("stop"))               # one rank was told to: all do, at this step
        tokens += n
        if step < config.unfreeze_step:
            for p in late:
                p.grad = None                        # no optimizer step where there is no gradient

        # 3. clip and step; a step that is not finite is skipped, and several in a row end the run
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        if torch.isfinite(norm) and torch.isfinite(total["loss"]):
            optimizer.step()
            in_a_row = 0
        else:
            skipped, in_a_row = skipped + 1, in_a_row + 1
            if in_a_row == 5:
                raise ValueError(f"{name}: the loss or its gradient was not finite in 5 steps, up "
                                 f"to {step + 1}; the last checkpoint is intact: lower the "
                                 "learning rate, or go on with --resume")
        optimizer.zero_grad(set_to_none=True)

        # 4. log, validate, save
        last = step + 1 == steps
        if (step + 1) % 10 == 0 or last:
            speed = tokens / (time.perf_counter() - begun)
            tokens, begun = 0, time.perf_counter()
            entry = {key: float(value) for key, value in total.items()}
            job.log(stage=name, step=step + 1, **entry, lr=share, grad_norm=float(norm),
                    skipped=skipped, per_second=speed)
            unit = "labels" if name == "planner" else "tokens"
            note = f", {skipped} skipped" if skipped else ""
            bar.set_postfix_str(f"loss {entry['loss']:.3f}, {speed:,.0f} {unit}/s{note}")
        if (step + 1) % config.eval_every == 0 or last:
            job.log(stage=name, step=step + 1, **stage.validate())
            tokens, begun = 0, time.perf_counter()   # the speed is that of training alone
        if last:
            job.ids[name] = labelling.digest(model.state_dict())
        saving = last or stop or (step + 1) % config.save_every == 0
        if saving and job.rank == 0:
            save_checkpoint(job.out / f"{name}.pt", {
                "depends": job.depends(name), "id": job.ids.get(name), "step": step + 1,
                "done": last, "skipped": skipped, "model": model.state_dict(), **stage.args,
                "optimizer": None if last else optimizer.state_dict()})
        if stop:
            bar.close()
            raise KeyboardInterrupt
    bar.close()
    if job.world > 1:
        dist.barrier()                               # the last checkpoint is there for all


# --- the stages -----------------------------------------------------------------------------------

STREAMS = {"lm": 0, "planner": 1, "joint": 2}        # of batches: each stage draws its own


def train_lm(job: Job) -> tuple[GPT, dict]:
    """Stage lm: a GPT without plans, and how to build it again."""
    c = job.config
    args = dict(vocab_size=job.store.tokenizer.n_vocab, block_size=c.block_size, n_layer=c.n_layer,
                n_head=c.n_head, n_embd=c.n_embd, seed=c.seed)
    model = PlannedGPT(GPT(**args), None, "none").to(job.device)
    fit(job, Stage(
        "lm", model, [(model, c.lm_lr)], c.lm_steps,
        batches=lambda step: window_batches(job, step, "lm"),
        losses=lambda run, batch, noise: {"loss": run(batch)[0]},
        validate=lambda: validate_lm(job, model), args={"gpt_args": args}), job.load("lm"))
    return model.gpt, args


def make_labels(job: Job, gpt: GPT, gpt_args: dict) -> labelling.Labeler:
    """Stage labels: sentence vectors and k-means, on the training split alone."""
    c = job.config
    if saved := job.load("labels"):
        return evaluation.load_labeler(saved).to(job.device)
    labeler = labelling.fit_vectors(c.vectors, gpt, job.train, job.store.tokenizer.n_vocab)
    vectors, _ = job.sentences("train", labeler)
    # k-means sums in float64, which mps has not
    labeler.centroids, labels, inertia = labelling.kmeans(
        vectors, c.n_labels, c.seed, c.kmeans_iters,
        device="cpu" if job.device.type == "mps" else job.device)
    labeler.to(job.device)
    labels = labels.cpu().numpy()
    job.known.clear()                                # that was without labels
    print(f"labels: k-means of {len(vectors):,} sentences into {c.n_labels}, inertia {inertia:.0f}")
    described = labelling.describe(labeler, job.train, vectors, labels, job.store.tokenizer)
    job.ids["labels"] = labelling.digest(labeler.state_dict())
    save_checkpoint(job.out / "labels.pt", {
        "depends": job.depends("labels"), "id": job.ids["labels"], "done": True,
        "labeler": labeler.state_dict(),
        "gpt_args": gpt_args if labeler.gpt else None, "inertia": inertia,
        "transitions": labelling.transitions(labels, job.train, c.n_labels),
        "descriptions": described})
    return labeler


def train_planner(job: Job, labeler: labelling.Labeler) -> None:
    """Stage planner: to predict the next sentence's label, by cross-entropy."""
    c = job.config
    args = dict(n_vector=len(labeler.mean), n_labels=c.n_labels, n_layer=c.planner_layer,
                n_head=c.planner_head, n_embd=c.planner_embd, reach=c.planner_reach, seed=c.seed)
    planner = Planner(**args).to(job.device)
    # twice its reach, so that its last position, which later sentences share, is trained as well
    width = min(2 * c.planner_reach, job.train.n_sentences // 2)
    vectors, labels = job.sentences("train", labeler)

    def batches(step):
        starts = data.batch_starts(job.train.n_sentences, width, c.planner_batch,
                                   (c.seed, STREAMS["planner"]), step)
        rows = starts[job.rank::job.world]
        return [data.sentence_batch(job.train, rows, width, vectors, labels)]

    def losses(run, batch, noise):
        return {"loss": label_loss(run(batch.vectors, batch.first), batch.labels)}

    fit(job, Stage("planner", planner, [(planner, c.planner_lr)], c.planner_steps, batches, losses,
                   lambda: validate_planner(job, planner, labeler), {"planner_args": args}),
        job.load("planner"))


def train_joint(job: Job, plan: str, labeler: labelling.Labeler) -> None:
    """Stage joint (step 5 of the method): GPT and planner on the next-token loss."""
    c = job.config
    if (saved := job.load(f"joint_{plan}")) and saved["done"]:
        return
    lm, planned = (evaluation.load_checkpoint(job.out / f"{name}.pt") for name in ("lm", "planner"))
    args = {"gpt_args": lm["gpt_args"] | {"n_labels": 0 if plan == "none" else c.n_labels},
            "planner_args": planned["planner_args"]}
    gpt, planner = GPT(**args["gpt_args"]), Planner(**args["planner_args"])
    stage_1 = {name.removeprefix("gpt."): value for name, value in lm["model"].items()}
    gpt.load_state_dict(gpt.state_dict() | stage_1)
    if plan != "none":
        gpt.label_emb.data = initial_label_emb(labeler.centroids.cpu(), c.n_embd)
    planner.load_state_dict(planned["model"])
    model = PlannedGPT(gpt, planner, plan, c.gumbel_tau).to(job.device)
    vectors, labels = job.sentences("train", labeler)
    parts = [(model.gpt, c.joint_lr)]
    if plan in END_TO_END:
        parts.append((model.planner, c.joint_planner_lr))

    def losses(run, batch, noise):
        lm_loss, logits = run(batch, noise)
        if plan not in END_TO_END:
            return {"loss": lm_loss}
        label = label_loss(logits, batch.labels)
        return {"loss": lm_loss + c.label_loss_weight * label,
                "lm_loss": lm_loss, "label_loss": label}

    fit(job, Stage(f"joint_{plan}", model, parts, c.joint_steps,
                   lambda step: window_batches(job, step, "joint", vectors, labels), losses,
                   lambda: validate_lm(job, model, labeler), args), saved)


def initial_label_emb(centroids: torch.Tensor, n_embd: int) -> torch.Tensor:
    """Centroids (K, E) -> (K, C), through a fixed projection where the widths differ. Left as small
    as they are (entries of about 0.05): scaled up to 0.2, wrong choices shout, and `hard` ends
    above `none`."""
    if centroids.shape[1] == n_embd:
        return centroids.clone()                     # to be trained; the labels' own stay fixed
    projection = torch.randn(centroids.shape[1], n_embd, generator=torch.Generator().manual_seed(0))
    return centroids @ projection / n_embd ** 0.5


def window_batches(job: Job, step: int, stage: str, vectors=None, labels=None):
    """The micro-batches of a step, or this rank's share of them: a function of the seed, the stage
    and the step; the same for all plans."""
    c = job.config
    starts = data.batch_starts(len(job.train.tokens), c.block_size, c.batch_size * c.grad_accum,
                               (c.seed, STREAMS[stage]), step)
    return [data.window_batch(job.train, rows, c.block_size, vectors, labels, c.planner_reach,
                              c.planner_view)
            for rows in starts[job.rank::job.world].reshape(c.grad_accum, -1)]


def validate_lm(job: Job, model: PlannedGPT, labeler: labelling.Labeler | None = None) -> dict:
    """Nats a token on the first eval_tokens of validation, and what the planner says there."""
    c = job.config
    vectors, labels = job.sentences("val", labeler) if labeler else (None, None)
    found = evaluation.score(model, job.val, vectors, labels, c.planner_reach, c.planner_view,
                             context=evaluation.autocast(job.device, job.dtype),
                             max_tokens=c.eval_tokens)
    if model.planner is None:
        return {"val_nll": float(found.nll.mean())}
    known = ~np.isnan(found.ce)
    return {"val_nll": float(found.nll.mean()), "val_label_nats": float(found.ce[known].mean()),
            "val_top1": float((found.rank[known] == 0).mean()),
            "val_entropy": float(found.entropy[known].mean())}


@torch.no_grad()
def validate_planner(job: Job, planner: Planner, labeler: labelling.Labeler) -> dict:
    """Nats a label on the first eval_tokens / 16 sentences of validation."""
    vectors, labels = job.sentences("val", labeler)
    width = min(2 * job.config.planner_reach, len(labels))
    end = max(width, min(len(labels), job.config.eval_tokens // 16))
    starts = np.arange(0, end - width + 1, width)
    batch = data.sentence_batch(job.val, starts, width, vectors, labels).to(job.device)
    return {"val_label_nats": float(label_loss(planner(batch.vectors, batch.first), batch.labels))}


def run(config: Config) -> dict:
    """All stages; returns the content of results.json."""
    job = Job(config)
    splits = job.store.meta["splits"]
    print(f"data: {config.data}, fingerprint {job.store.meta['fingerprint']}: "
          + ", ".join(f"{s['tokens']['length']:,} {name} tokens" for name, s in splits.items())
          + f"; {job.device}, {job.dtype}")

    def stop(signum, frame):                         # a second signal ends it at once
        job.stop = True
        signal.signal(signum, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    gpt, gpt_args = train_lm(job)
    with job.rank_0_first():
        labeler = make_labels(job, gpt, gpt_args)
    train_planner(job, labeler)
    for plan in config.plan_names:
        train_joint(job, plan, labeler)
    if job.world > 1:
        dist.destroy_process_group()
    if job.rank:
        return {}
    trained = evaluation.Run.open(job.out, str(job.device))
    results = evaluation.evaluate(trained, job.val, splits["val"]["bytes"], "val")
    evaluation.write_json(job.out / "results.json", results)
    print(evaluation.table(results))
    return results


def keep_memory() -> None:
    """Asks glibc to keep large blocks that are freed: to get them from the system again in each
    step takes a twentieth of its time on a CPU. Where the C library is another, nothing."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        for option, size in ((-1, 1 << 30), (-3, 1 << 25)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(option, size)


def main(argv=None):
    keep_memory()
    config = parse_config(argv)
    with evaluation.one_line_errors("train.py"):
        try:
            run(config)
        except KeyboardInterrupt:
            print("train.py: stopped and saved: go on with python train.py --resume "
                  f"--out_dir={config.out_dir}", file=sys.stderr)
            sys.exit(130)


if __name__ == "__main__":
    main()
