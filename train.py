"""Trains a language model that plans, end to end: `python train.py [--name=value ...]`.

Four stages, each with a checkpoint in out_dir:
  lm       the GPT alone, on the next-token loss                -> lm.pt
  labels   a vector and a label for every sentence              -> labels.pt
  planner  the planner alone, to predict the next label         -> planner.pt
  joint    for each plan, the GPT or both, on lm's loss         -> joint_<plan>.pt
All plans see the same batches, which follow from seed and step, as does gumbel's noise: no random
state is saved, and --resume ends bit for bit like an undisturbed run on the CPU.
"""
import argparse
import contextlib
import math
import os
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import labels
from eval import Parser, Run, evaluate, one_line_errors, summary, table, versions
from model import END_TO_END, PLANS
from planner import Planner, label_loss


def opt(default, text, least=None, choices=()):
    """An option: its default, what --help says of it, and the values that it can have."""
    return field(default=default, metadata={"help": text, "least": least, "choices": choices})


@dataclass
class Config:
    """Every option. The command line is made from these fields."""
    # what, where
    data: str = opt("docstrings", "docstrings, wikitext103, tinystories, or a path to UTF-8 text")
    tokenizer: str = opt("bpe", "trained on the corpus, or downloaded", choices=("bpe", "gpt2"))
    vocab_size: int = opt(4096, "tokens of the bpe tokenizer, 257 to 65536; gpt2 has 50257", 257)
    cache_dir: str = opt("cache", "where prepared corpora and downloads are kept")
    out_dir: str = opt("out", "where this run's files go")
    seed: int = opt(0, "of initialisation, batches, k-means and noise", 0)
    device: str = opt("auto", "auto (cuda, then mps, then cpu), cuda, mps or cpu")
    dtype: str = opt("auto", "auto is the faster here", choices=("auto", "bfloat16", "float32"))
    preset: str = opt("laptop", "a set of defaults", choices=("laptop", "gpu", "tiny"))
    resume: bool = opt(False, "continue the run in out_dir, with its options")
    start: str = opt("", "an out_dir whose options and finished stages this run begins with")
    compile: bool = opt(False, "torch.compile the models; minutes at first, faster steps on a GPU")
    plans: str = opt("none,hard,soft", f"the joint stages, of {','.join(PLANS)}; or all")
    # sizes
    n_layer: int = opt(4, "blocks of the GPT", 1)
    n_head: int = opt(3, "attention heads, of GPT and planner", 1)
    n_embd: int = opt(192, "C: width, of GPT and planner", 1)
    block_size: int = opt(64, "T: window of the GPT in tokens", 1)
    n_labels: int = opt(256, "K: labels, the clusters of k-means", 1)
    planner_layer: int = opt(2, "blocks of the planner", 1)
    planner_reach: int = opt(16, "sentences before the window that the planner can look back", 1)
    planner_view: str = opt("document", "window: what the GPT sees", choices=("document", "window"))
    # training
    batch_size: int = opt(32, "windows in a micro-batch; rows of sentences in stage planner", 1)
    grad_accum: int = opt(1, "micro-batches in a step", 1)
    lm_steps: int = opt(1000, "steps of stage lm", 1)
    planner_steps: int = opt(300, "steps of stage planner", 1)
    joint_steps: int = opt(600, "steps of stage joint, for each plan", 1)
    muon_lr: float = opt(0.02, "peak learning rate of the blocks' matrices (Muon); 0: AdamW", 0)
    lm_lr: float = opt(1e-2, "peak learning rate of stage lm, of the rest (AdamW)", 1e-9)
    planner_lr: float = opt(1e-3, "peak learning rate of stage planner", 0)
    joint_lr: float = opt(4e-3, "peak learning rate of stage joint; Muon's falls in proportion", 0)
    joint_planner_lr: float = opt(2e-4, "peak learning rate of the planner in stage joint", 0)
    unfreeze_step: int = opt(0, "step of stage joint from which the planner is trained", 0)
    gumbel_tau: float = opt(1.0, "temperature of the plan gumbel", 1e-3)
    weight_decay: float = opt(0.1, "of matrices; not of label_emb", 0)
    eval_every: int = opt(200, "steps between validations, and between checkpoints", 1)
    eval_tokens: int = opt(16384, "validation tokens of those; the final table takes all", 16)

    @property
    def plan_names(self) -> list[str]:                  # in the order given, each once
        return list(PLANS) if self.plans == "all" else list(dict.fromkeys(self.plans.split(",")))

    def check(self) -> None:
        """Raises ValueError for a value, or a combination, that can't be."""
        for f in fields(self):
            value, least = getattr(self, f.name), f.metadata["least"]
            if least is not None and not least <= value < math.inf:     # nan is refused here, too
                raise ValueError(f"{f.name}={value}: must be finite and at least {least}")
        if not set(self.plan_names) <= set(PLANS):
            raise ValueError(f"plans={self.plans}: choose of {','.join(PLANS)}; or all")
        if self.vocab_size > 1 << 16:                   # the store keeps a token in two bytes
            raise ValueError(f"vocab_size={self.vocab_size}: must be at most 65536")
        if self.n_embd % (2 * self.n_head):             # each head has C / H entries, in pairs
            raise ValueError(f"n_embd={self.n_embd} must be a multiple of {2 * self.n_head}, twice "
                             f"n_head={self.n_head}")


PRESETS = {             # laptop: the defaults; gpu: 124 M parameters, 0.5 M tokens a step
    "tiny": dict(vocab_size=512, n_layer=1, n_head=2, n_embd=32, block_size=32, n_labels=8,
                 planner_layer=1, planner_reach=16, batch_size=8, lm_steps=20, planner_steps=20,
                 joint_steps=20, eval_tokens=2048),     # seconds: to try things out
    "gpu": dict(tokenizer="gpt2", n_layer=12, n_head=12, n_embd=768, block_size=1024, n_labels=1024,
                planner_layer=4, planner_reach=128, grad_accum=16, lm_steps=2000, lm_lr=6e-4,
                planner_steps=1000, planner_lr=3e-4, joint_steps=1000, joint_lr=3e-4, compile=True,
                joint_planner_lr=3e-4, eval_every=250, eval_tokens=262144),
}
STAGE_OPTIONS = {       # what a stage depends on, beside what those before it do; --resume keeps it
    "lm": "data tokenizer vocab_size seed dtype n_layer n_head n_embd block_size batch_size "
          "grad_accum lm_steps muon_lr lm_lr weight_decay",
    "labels": "n_labels",
    "planner": "planner_layer planner_reach planner_view planner_steps planner_lr",
    "joint": "joint_steps joint_lr joint_planner_lr unfreeze_step gumbel_tau",
}


# --- the four stages ------------------------------------------------------------------------------
def train(c: Config) -> None:
    """All stages, one after the other, and the table of all plans on validation."""
    run = begin(c)                                      # step 1: corpus and sentences
    gpt = run.new_model("none")                         # every plan starts from it
    fit(run, "lm", gpt, [(gpt, c.muon_lr, c.lm_lr)], c.lm_steps)
    with rank_0_first(run):                             # the other ranks read what it fitted
        make_labels(run)                                # step 2
    planner = run.new_model("soft").planner             # step 3
    fit(run, "planner", planner, [(planner, c.muon_lr, c.planner_lr)], c.planner_steps)
    for plan in c.plan_names:                           # steps 4 and 5
        train_joint(run, plan)
    if run.rank == 0:
        results = evaluate(run, run.corpus("val"), run.store().bytes["val"], "val")
        data.write_json(run.out / "results.json", results)
        print(table(results))
    if run.world > 1:
        dist.destroy_process_group()


def make_labels(run: Run) -> None:
    """Step 2: sentence vectors and k-means, fitted on the training split alone."""
    c, corpus = run.config, run.corpus("train")
    if not run.has("labels"):
        labeler = labels.Labeler(run.tokenizer.n_vocab, c.n_embd, c.n_labels)
        labeler.fit_vectors(run.load("lm")["model"]["gpt.wte.weight"], corpus)      # (V, E)
        corpus.vectors = labeler.embed(corpus)                              # (n, E)
        device = run.device if run.device.type == "cuda" else "cpu"         # mps has no float64
        centroids, label, loss = labels.kmeans(corpus.vectors, c.n_labels, c.seed, device=device)
        labeler.centroids = centroids.cpu()                                 # (K, E)
        corpus.labels = label.cpu().numpy()                                 # (n,)
        print(f"labels: k-means of {len(label):,} sentences into {c.n_labels}, inertia {loss:.0f}")
        run.save("labels", {"model": labeler.state_dict(), "inertia": loss, "done": True,
                            "bigram": labels.label_bigram(corpus, c.n_labels),      # (K+2, K)
                            "descriptions": labels.describe(labeler, corpus, run.tokenizer)})
    run.use_labels()                                    # from the file, first time or not


def train_joint(run: Run, plan: str) -> None:
    """Steps 4 and 5: the GPT under a plan, and end to end the planner, on the next-token loss."""
    c, model = run.config, run.new_model(plan)
    model.load_state_dict(run.load("lm")["model"], strict=False)    # plan maps stay 0
    if plan != "none":
        model.gpt.label_emb.data = run.labeler.centroids.cpu().clone()      # (K, C): here E = C
    if model.planner is not None:                       # it predicts labels already
        run.load("planner", model.planner)
    parts = [(model.gpt, c.muon_lr * c.joint_lr / c.lm_lr, c.joint_lr)]     # both fall alike
    if plan in END_TO_END:                              # elsewhere the planner keeps its weights
        parts.append((model.planner, 0.0, c.joint_planner_lr))     # all by AdamW
    fit(run, f"joint_{plan}", model, parts, c.joint_steps)


# --- the loop -------------------------------------------------------------------------------------
def fit(run: Run, name: str, model: torch.nn.Module, parts: list, steps: int) -> None:
    """Trains a model's parts, [(module, Muon's peak rate, AdamW's)], from the checkpoint NAME.pt if
    there is one, and leaves it finished. Raises ValueError where a gradient is not finite."""
    c, device, stage = run.config, run.device, name.split("_")[0]           # joint_soft -> joint
    optimizers = make_optimizers(parts, c.weight_decay, device)
    first_step = 0
    if run.has(name):
        saved = run.load(name, model)
        print(f"{name}: " + ("finished before" if saved["done"] else f"from step {saved['step']}"))
        if saved["done"]:
            return
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        first_step = saved["step"]                  # nothing else: batches follow from the step
    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools")  # rotary_table's
    net = torch.compile(model) if c.compile else model
    if run.world > 1:                               # averages gradients over ranks, in backward()
        net = torch.nn.parallel.DistributedDataParallel(net)
    tokens, since = 0, time.perf_counter()
    bar = tqdm(range(first_step, steps), name, steps, initial=first_step, disable=run.rank > 0)

    for step in bar:
        # 1. The learning rate rises over a twentieth of the steps, then falls along a cosine.
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["lr"] = group["peak_lr"] * learning_rate(step, steps)
        # 2. Gradients, summed over the micro-batches of this step.
        loss = torch.zeros((), device=device)
        for micro in range(run.grad_accum):
            net.require_backward_grad_sync = micro == run.grad_accum - 1    # ranks talk once a step
            batch = make_batch(run, stage, step, micro).to(device)
            noise = torch.Generator(device).manual_seed(hash((c.seed, step, micro, run.rank)))
            with run.autocast():
                if stage == "planner":                                      # nats a label
                    label_logits = net(batch.vectors, batch.first, batch.labels.shape[1])
                    micro_loss = label_loss(label_logits, batch.labels)
                else:                                                       # nats a token
                    micro_loss, _ = net(batch, noise)
            (micro_loss / run.grad_accum).backward()    # their sum is the gradient of the mean
            loss += micro_loss.detach() / run.grad_accum
            tokens += run.world * (batch.tokens.numel() or batch.labels.numel())
        if stage == "joint" and step < c.unfreeze_step and model.planner is not None:
            model.planner.zero_grad()               # without a gradient there is no step
        # 3. Clip and step.
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)     # of both parts
        for optimizer in optimizers:
            with run.autocast():                        # of Muon's products
                optimizer.step()
            optimizer.zero_grad()
        # 4. Log, validate, save. Not in every step: to read the loss makes a GPU wait.
        done, last = step + 1, step + 1 == steps
        saving = last or done % c.eval_every == 0
        if not (saving or done % 10 == 0):
            continue
        if not math.isfinite(grad_norm):            # all later ones are not, either: none is missed
            raise ValueError(f"{name}: the gradient is not finite by step {done}; the last "
                             "checkpoint is intact: lower the learning rate (with --start)")
        if run.world > 1:
            dist.all_reduce(loss)                   # a sum over ranks
        loss, speed = float(loss) / run.world, tokens / (time.perf_counter() - since)
        bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f}/s")
        if run.rank == 0:
            run.log(stage=name, step=done, loss=loss, grad_norm=float(grad_norm),
                    lr=optimizer.param_groups[0]["lr"], per_second=speed)      # AdamW's
            if saving:                              # on rank 0 alone: the others wait
                run.log(stage=name, step=done, **validate(run, model))
                run.save(name, {"step": done, "done": last, "model": model.state_dict(),
                                "optimizers": [] if last else [x.state_dict() for x in optimizers]})
        tokens, since = 0, time.perf_counter()      # the speed is that of training alone
    if run.world > 1:
        dist.barrier()                              # the last checkpoint is there for all


def make_batch(run: Run, stage: str, step: int, micro: int) -> data.Batch:
    """A rank's micro-batch: a function of seed, stage and step, the same for all plans."""
    c, corpus = run.config, run.corpus("train")
    length, width = len(corpus.tokens), c.block_size
    rows = stage == "planner" and c.planner_view == "document"  # of sentences; windows have fewer
    if rows:                    # twice its reach: half of the slots have as much behind them
        length, width = corpus.n_sentences, min(2 * c.planner_reach, corpus.n_sentences // 2)
    seed = c.seed, list(STAGE_OPTIONS).index(stage)     # each stage draws its own
    starts = data.batch_starts(length, width, c.batch_size * c.grad_accum, seed, step)
    starts = starts.reshape(run.grad_accum, run.world, -1)[micro, run.rank]   # (B,) its share
    if rows:
        return data.sentence_batch(corpus, starts, width)
    return data.window_batch(corpus, starts, width, c.planner_reach, c.planner_view)


def learning_rate(step: int, steps: int) -> float:
    """Share of the peak: up along a line to 1, down along a cosine to 0.1."""
    warmup = max(1, steps // 20)
    fall = max(0, step - warmup) / max(1, steps - warmup)           # 0 before the peak, then to 1
    return min(1, (step + 1) / warmup) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * fall)))


def make_optimizers(parts: list, weight_decay: float, device: torch.device) -> list:
    """[Muon, AdamW] for [(module, Muon's peak rate, AdamW's)]: Muon for the matrices of the blocks,
    unless its rate is 0, and AdamW for all else. Matrices decay, but not label_emb."""
    muon, adamw = [], []
    for module, muon_lr, lr in parts:
        for name, p in module.to(device).named_parameters():
            inner = "blocks." in name and p.dim() == 2 and "plan_map" not in name
            groups, peak_lr = (muon, muon_lr) if inner and muon_lr else (adamw, lr)
            decays = p.dim() == 2 and not name.endswith("label_emb")        # no norms
            groups.append({"params": [p], "peak_lr": peak_lr,
                           "weight_decay": weight_decay if decays else 0.0})
    adamw = torch.optim.AdamW(adamw, betas=(0.9, 0.95), fused=device.type != "mps")
    return [Muon(muon, {}), adamw] if muon else [adamw]


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are made orthogonal, so that they favour no direction of a matrix.
    Source: Jordan et al., "Muon", 2024. torch's own multiplies in bfloat16: slow on most CPUs."""
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:                 # a matrix each, which has a gradient
            p, lr = group["params"][0], group["lr"]
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            momentum = self.state[p]["momentum"].lerp_(p.grad, 0.05)
            update = orthogonal(p.grad.lerp(momentum, 0.95))        # Nesterov's
            p.mul_(1 - lr * group["weight_decay"])
            p.add_(update, alpha=-lr * max(1, p.shape[0] / p.shape[1]) ** 0.5)  # the source's scale


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """x (M, N), its singular values brought near 1 by five Newton-Schulz iterations."""
    wide = x if x.shape[0] < x.shape[1] else x.T        # the smaller products
    wide = wide / (wide.norm() + 1e-7)                  # no singular value is above 1
    for _ in range(5):
        a = wide @ wide.T
        b = torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315)                # -4.775 a + 2.0315 a a
        wide = torch.addmm(wide, b, wide, beta=3.4445)                      # 3.4445 x + b x
    return wide if x.shape[0] < x.shape[1] else wide.T


@torch.no_grad()
def validate(run: Run, model: torch.nn.Module) -> dict:
    """Nats a token, and the planner's figures, on the first eval_tokens of validation."""
    corpus, n = run.corpus("val"), run.config.eval_tokens
    if isinstance(model, Planner):      # alone, on the sentences that disjoint windows touch
        c = run.config
        starts = np.arange(0, min(n, len(corpus.tokens)), c.block_size)
        batch = data.window_batch(corpus, starts, c.block_size, c.planner_reach, c.planner_view)
        batch = batch.to(run.device)
        label_logits = model(batch.vectors, batch.first, batch.labels.shape[1])
        return {"val_label_nats": label_loss(label_logits, batch.labels).item()}
    figures = summary(run.score(model, corpus, max_tokens=n), corpus, 1)     # no bits per byte
    names = {"nll": "val_nll", "planner_ce": "val_label_nats", "planner_acc": "val_top1"}
    return {new: figures[old] for old, new in names.items() if figures[old] is not None}


def begin(config: Config) -> Run:
    """Opens out_dir for training. Raises ValueError where options do not fit the corpus, or it."""
    run = Run(config)
    run.rank, run.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    common = math.gcd(config.grad_accum, run.world)
    run.grad_accum = config.grad_accum // common        # ranks share a step's micro-batches, and
    share = run.world // common                         # where those are too few, the rows of each
    if config.batch_size % share:                       # else ranks would differ in their rows
        raise ValueError(f"batch_size={config.batch_size}: {run.world} processes share it, choose "
                         f"a multiple of {share}")
    if config.resume:                                   # run.store() looks whether the text is this
        run.fingerprint = data.read_json(run.out / "config.json", "fingerprint")["fingerprint"]
    elif any(run.out.glob("*.pt")):                     # before ranks join: later, rank 0 writes
        raise ValueError(f"out_dir={run.out} holds a run: choose another, or continue by --resume")
    if run.world > 1:                                   # joins the other processes of torchrun
        if run.device.type == "cuda":                   # one GPU for each rank of this machine
            run.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(run.device)
        dist.init_process_group("nccl" if run.device.type == "cuda" else "gloo",
                                timeout=timedelta(hours=12))    # rank 0 may prepare for long
    if run.rank:
        sys.stdout = open(os.devnull, "w")              # one screen, one voice
    with rank_0_first(run):                             # it prepares, the others open
        run.out.mkdir(parents=True, exist_ok=True)
        store = run.store()                             # step 1: the corpus, cut into sentences
        run.fingerprint, run.tokenizer = store.fingerprint, store.tokenizer
        if run.rank == 0:
            data.save_tokenizer(run.out / "tokenizer.json", store.tokenizer)
            data.write_json(run.out / "config.json", asdict(config) | {
                "fingerprint": store.fingerprint, "versions": versions()})
            if config.start and not config.resume:      # a continued run has its own by now
                copy_stages(run, Path(config.start))
    corpus = run.corpus("train")
    if config.n_labels > corpus.n_sentences:
        raise ValueError(f"n_labels={config.n_labels}: there are {corpus.n_sentences} sentences to "
                         "train on; ask for fewer labels, or give more text")
    print(f"data: {config.data}, fingerprint {run.fingerprint}, {len(corpus.tokens):,} training "
          f"tokens; {run.device}, {'bfloat16' if run.autocast()._enabled else 'float32'}")
    return run


def copy_stages(run: Run, source: Path) -> None:
    """Copies the finished stages of another run, up to the first that the options change."""
    other = Run(replace(run.config, out_dir=str(source)))
    saved = data.read_json(source / "config.json", "fingerprint")
    wanted = asdict(run.config) | {"fingerprint": run.fingerprint}          # of the text
    for stage, options in STAGE_OPTIONS.items():
        changed = [f"{option}={wanted[option]}" for option in ["fingerprint", *options.split()]
                   if wanted[option] != saved[option]]
        if changed:                                     # the stages after it begin with its result
            return print(f"start: from stage {stage} on all is trained anew: {', '.join(changed)}")
        names = [f"joint_{plan}" for plan in run.config.plan_names] if stage == "joint" else [stage]
        for name in filter(other.has, names):
            if (saved_stage := other.load(name))["done"]:
                run.save(name, saved_stage)


@contextlib.contextmanager
def rank_0_first(run: Run):
    """Rank 0 goes through the block, and then the others, who find its files written."""
    if run.rank:
        dist.barrier()                                  # until rank 0 is through
    yield
    if run.world > 1 and run.rank == 0:
        dist.barrier()                                  # lets the others go


def _boolean(text: str) -> bool:
    return ("false", "0", "true", "1").index(text.lower()) >= 2     # else ValueError, for argparse


def parse_config(argv=None) -> Config:
    """The command line, over the options of another run (--resume, --start), or over a preset."""
    parser = Parser(prog="train.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawTextHelpFormatter,
                    argument_default=argparse.SUPPRESS)     # what is not given is not in the result
    for f in fields(Config):
        kind = {"type": f.type, "metavar": f.type.__name__}
        kind = {"choices": f.metadata["choices"]} if f.metadata["choices"] else kind
        if f.type is bool:
            kind |= {"type": _boolean, "nargs": "?", "const": True}      # --resume is --resume=true
        parser.add_argument(f"--{f.name}", help=f"{f.metadata['help']} [{f.default}]", **kind)
    options = vars(parser.parse_args(argv))
    with one_line_errors("train.py"):
        config = Config(**inherited_options(options) | options)
        config.check()
    return config


def inherited_options(options: dict) -> dict:
    """What `options` leave open, of a run or preset. Raises ValueError for a forbidden change."""
    resume = options.get("resume", False)
    out_dir = options.get("out_dir", Config.out_dir) if resume else options.get("start")
    if not out_dir:                                     # neither --resume nor --start
        return PRESETS.get(options.get("preset"), {})
    names = [f.name for f in fields(Config) if f.name not in ("out_dir", "resume", "start")]
    saved = data.read_json(Path(out_dir) / "config.json", *names)
    stages = STAGE_OPTIONS.values() if resume else []   # a finished stage is not trained again
    for name in ["preset", *" ".join(stages).split()]:
        if name in options and options[name] != saved[name]:
            raise ValueError(f"{name}={options[name]}, but {out_dir} has {name}={saved[name]}: "
                             "keep it, or begin another run in another out_dir (see --start)")
    return {name: saved[name] for name in names}


def main(argv=None):
    config = parse_config(argv)
    try:
        with one_line_errors("train.py"):               # bad input: one line, exit code 2
            train(config)
    except KeyboardInterrupt:
        print("train.py: interrupted; continue with python train.py --resume "
              f"--out_dir={config.out_dir}", file=sys.stderr)
        sys.exit(130)                                   # as shells report an interrupt


if __name__ == "__main__":
    main()
