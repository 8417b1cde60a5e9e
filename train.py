"""Train a language model that plans, end to end: python train.py [--name=value ...]

Four stages, each with a checkpoint in out_dir:
  lm       a GPT without a plan, on the next-token loss              -> lm.pt
  labels   a vector and a label for every sentence                   -> labels.pt
  planner  the planner alone, to predict the label that comes next   -> planner.pt
  joint    for each plan, the GPT, and the planner if the plan is
           trained end to end, on the next-token loss                -> joint_<plan>.pt
The same command continues a run: finished stages are loaded, an unfinished one (NAME.partial.pt)
goes on from its last checkpoint. Batches and noise are functions of (seed, stage, step), so on a
CPU a run that was interrupted ends bit for bit like one that was not.
"""
import argparse
import contextlib
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import labels
from data import InputError
from eval import (Parser, choose_autocast, choose_device, evaluate, exits_on_input_error, load_run,
                  score, summary, table)
from model import END_TO_END, PLANS
from planner import build_model, label_loss


ALL_PLANS = ",".join(PLANS)
# Spans of sentences in a micro-batch of stage planner. Each is twice planner_reach long if the text
# is long enough, so half of its sentences have a full reach before them.
SPANS = 32


def opt(default, text, least=1, choices=None):
    """An option: its default, its help text, its minimum, its choices."""
    return field(default=default, metadata={"help": text, "least": least, "choices": choices})


@dataclass
class Config:
    """Every option. The command line is made from these fields."""
    # What, and where.
    data: str = opt("docstrings", "docstrings, or a path to UTF-8 text")
    tokenizer: str = opt("bpe", "bpe: trained on the text; gpt2: downloaded",
                         choices=("bpe", "gpt2"))
    vocab_size: int = opt(4096, "tokens of the bpe tokenizer, 257 to 65536; gpt2 has 50257", 257)
    cache_dir: str = opt("cache", "folder for prepared texts")
    out_dir: str = opt("out", "folder of this run")
    seed: int = opt(0, "seed of initialisation, batches, k-means and noise", 0)
    device: str = opt("auto", "auto (cuda, else mps, else cpu), cuda, mps or cpu")
    dtype: str = opt("auto", "auto: bfloat16 if this hardware is fast at it",
                     choices=("auto", "bfloat16", "float32"))
    preset: str = opt("laptop", "a set of defaults", choices=("laptop", "gpu", "tiny"))
    compile: bool = opt(False, "torch.compile the models: a slow start, then faster steps on a GPU",
                        choices=(False, True))
    plans: str = opt("none,hard,soft", f"plans to train: all, or some of {ALL_PLANS}")
    # Sizes.
    n_layer: int = opt(2, "blocks of the GPT")
    n_head: int = opt(2, "attention heads of GPT and planner")
    n_embd: int = opt(128, "C: width of the GPT")
    block_size: int = opt(64, "T: window of the GPT in tokens")
    n_labels: int = opt(256, "K: labels, the clusters of k-means")
    planner_embd: int = opt(64, "width of the planner")
    planner_layer: int = opt(1, "blocks of the planner")
    planner_reach: int = opt(16, "sentences before the window that the planner reads")
    planner_view: str = opt("document", "document: the planner reads what precedes a sentence in "
                            "its document; equal: only what lies wholly in the block_size tokens "
                            "before the sentence; needs planner_layer=1",
                            choices=("document", "equal"))
    # Training.
    batch_size: int = opt(32, "windows in a micro-batch")
    grad_accum: int = opt(1, "micro-batches in a step, a multiple of the number of processes")
    lm_steps: int = opt(450, "steps of stage lm")
    planner_steps: int = opt(300, "steps of stage planner")
    joint_steps: int = opt(200, "steps of stage joint, for each plan")
    muon_lr: float = opt(0.02, "peak learning rate of the blocks' matrices (Muon); 0: AdamW", 0)
    lm_lr: float = opt(2e-2, "peak learning rate of everything else in stage lm (AdamW)", 1e-9)
    planner_lr: float = opt(4e-3, "peak AdamW learning rate in stage planner", 0)
    joint_lr: float = opt(5e-3, "peak AdamW learning rate in stage joint; Muon's is multiplied by "
                          "joint_lr / lm_lr", 0)
    joint_planner_lr: float = opt(1e-3, "peak learning rate of the planner in stage joint", 0)
    weight_decay: float = opt(0.1, "weight decay of all matrices but label_emb", 0)
    eval_every: int = opt(200, "steps between validations, and between checkpoints")
    eval_tokens: int = opt(16384, "validation tokens used during training; the table uses all", 16)

    def __post_init__(self):
        """Check the options; raise InputError with a readable message."""
        for option in fields(self):
            value = getattr(self, option.name)
            least = option.metadata["least"]
            if option.type in (int, float) and not least <= value < math.inf:
                raise InputError(f"{option.name}={value}: must be finite and at least {least}")
        if self.plans == "all":
            self.plans = ALL_PLANS
        # Each plan once.
        self.plans = ",".join(dict.fromkeys(self.plans.split(",")))
        for plan in self.plans.split(","):
            if plan not in PLANS:
                raise InputError(f"plans={self.plans}: choose from {ALL_PLANS}, or all")
        if self.vocab_size > 65536:
            raise InputError(f"vocab_size={self.vocab_size}: must be at most 65536")
        for name in ("n_embd", "planner_embd"):
            width = getattr(self, name)
            if width % (2 * self.n_head):
                raise InputError(f"{name}={width} must be a multiple of {2 * self.n_head}, twice "
                                 f"n_head={self.n_head}")
        if self.planner_view == "equal" and self.planner_layer > 1:
            raise InputError("planner_view=equal needs planner_layer=1: with each extra layer, "
                             "the planner would see further back")


PRESETS = {
    # The defaults.
    "laptop": {},
    # A minute, to try things out.
    "tiny": dict(
        vocab_size=512, n_layer=1, n_head=2, n_embd=32, block_size=32, n_labels=8, planner_embd=32,
        batch_size=8, lm_steps=20, planner_steps=20, joint_steps=20, eval_tokens=2048),
    # The blocks of GPT-2, 0.5 M tokens a step.
    "gpu": dict(
        tokenizer="gpt2", n_layer=12, n_head=12, n_embd=768, block_size=1024, n_labels=1024,
        planner_embd=768, planner_layer=4, planner_reach=128, grad_accum=16,
        lm_steps=2000, lm_lr=6e-4, planner_steps=1000, planner_lr=3e-4, joint_steps=1000,
        joint_lr=3e-4, joint_planner_lr=3e-4, compile=True, eval_every=250, eval_tokens=262144),
}
# Options that a stage depends on, in addition to those of earlier stages.
STAGE_OPTIONS = {
    "lm": ["tokenizer", "vocab_size", "seed", "dtype", "n_layer", "n_head", "n_embd", "block_size",
           "batch_size", "grad_accum", "lm_steps", "muon_lr", "lm_lr", "weight_decay"],
    "labels": ["n_labels"],
    "planner": ["planner_embd", "planner_layer", "planner_reach", "planner_view", "planner_steps",
                "planner_lr"],
    "joint": ["joint_steps", "joint_lr", "joint_planner_lr"],
}


# --- the four stages ------------------------------------------------------------------------------
def train(c):
    """All stages, one after the other, and the table of all plans on validation."""
    s = set_up(c)
    with s.bar:
        vocab_size = s.store.tokenizer.n_vocab
        lm = build_model(c, "none", vocab_size)
        fit(c, s, "lm", lm, c.lm_steps, [(lm, c.muon_lr, c.lm_lr)])

        make_labels(c, s, lm)
        if s.world > 1:
            # The other processes read what the first one made.
            dist.barrier()
        run = load_run(s.out, str(s.device))
        run.labeler.label(s.train)
        run.labeler.label(s.val)

        # All plans start from the same GPT, the same label embeddings and the same planner. E = C,
        # so a centroid can be a label embedding.
        base = build_model(c, "soft", vocab_size)
        base.load_state_dict(base.state_dict() | lm.state_dict())
        base.gpt.label_emb.data.copy_(run.labeler.centroids)
        fit(c, s, "planner", base, c.planner_steps, [(base.planner, c.muon_lr, c.planner_lr)])

        for plan in c.plans.split(","):
            model = build_model(c, plan, vocab_size)
            # Some plans have no planner, and `none` has no label embeddings either.
            weights = base.state_dict()
            model.load_state_dict({name: weights[name] for name in model.state_dict()})
            # Muon's rate falls with AdamW's, or the stage would begin by unlearning.
            parts = [(model.gpt, c.muon_lr * c.joint_lr / c.lm_lr, c.joint_lr)]
            if plan in END_TO_END:
                # AdamW only: the planner should change slowly, and Muon's steps do not shrink with
                # the gradient.
                parts.append((model.planner, 0.0, c.joint_planner_lr))
            fit(c, s, f"joint_{plan}", model, c.joint_steps, parts)

    if s.rank == 0:
        started = time.perf_counter()
        results = evaluate(run, s.val, "val")
        s.seconds["evaluation"] = time.perf_counter() - started
        data.write_json(s.out / "results.json", results | {"seconds": s.seconds})
        print(table(results))
        print("seconds: " + ", ".join(f"{name} {x:.0f}" for name, x in s.seconds.items()))
    if s.world > 1:
        dist.barrier()
        dist.destroy_process_group()


def make_labels(c, s, lm):
    """Stage labels: sentence vectors and k-means, fitted on the training split alone."""
    finished = s.out / "labels.pt"
    if s.rank > 0 or finished.exists():
        return
    started = time.perf_counter()
    s.bar.set_description("labels")
    labeler = labels.Labeler(s.store.tokenizer.n_vocab, c.n_embd, c.n_labels)
    labeler.fit_vectors(lm.gpt.wte.weight.detach().cpu(), s.train)
    s.train.vectors = labeler.embed(s.train)                                # (n, E)
    device = "cuda" if s.device.type == "cuda" else "cpu"
    centroids, clusters, _ = labels.kmeans(s.train.vectors, c.n_labels, c.seed, device=device)
    labeler.centroids = centroids.cpu()                                     # (K, E)
    s.train.labels = clusters.cpu().numpy()                                 # (n,)
    save(
        s, finished, labeler,
        bigram=labels.label_bigram(s.train, c.n_labels),
        descriptions=labels.describe(labeler, s.train, s.store.tokenizer),
    )
    s.seconds["labels"] = time.perf_counter() - started


# --- the loop -------------------------------------------------------------------------------------
def fit(c, s, name, model, steps, parts):
    """Train a stage, or what is left of it, and write NAME.pt to out_dir.

    parts: [(module to train, Muon's peak learning rate, AdamW's)]. Raises InputError if a gradient
    is not finite.
    """
    stage = name.split("_")[0]
    stage_number = list(STAGE_OPTIONS).index(stage)
    # Move the whole model, including what this stage does not train.
    model.to(s.device)
    finished = s.out / f"{name}.pt"
    if finished.exists():
        s.bar.total -= steps
        data.load_weights(model, finished)
        return
    started = time.perf_counter()
    optimizers = make_optimizers(parts, c.weight_decay)
    first_step = 0
    partial = s.out / f"{name}.partial.pt"
    if partial.exists():
        saved = data.load_weights(model, partial)
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        first_step = saved["step"]
        s.bar.total -= first_step

    net = model.planner if stage == "planner" else model
    if c.compile:
        # All plans share one forward: without a reset, later plans hit the limit of recompilations
        # and run eagerly.
        torch.compiler.reset()
        net = torch.compile(net)
    if s.world > 1:
        net = DistributedDataParallel(net)
    n_micro = c.grad_accum // s.world
    s.bar.set_description(name)

    for step in range(first_step, steps):
        # 1. The learning rate rises over a twentieth of the steps, then falls along a cosine.
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_share(step, steps)

        # 2. Gradients, accumulated over the micro-batches of this step.
        loss = 0.0
        for micro in range(n_micro):
            # Synchronise gradients only on the last micro-batch.
            net.require_backward_grad_sync = micro == n_micro - 1
            batch = make_batch(c, s, model, stage, step, micro).to(s.device)
            if c.compile:
                batch.mark_dynamic()
            # For the noise of `gumbel`.
            torch.manual_seed(hash((c.seed, stage_number, step, micro, s.rank)))
            with s.autocast:
                if stage == "planner":
                    label_logits = net(batch.vectors, batch.opening)
                    micro_loss = label_loss(label_logits, batch.labels)     # nats per label
                else:
                    nll, _ = net(batch)                                     # (B, T)
                    micro_loss = nll.mean()                                 # nats per token
            # Scale the loss so that accumulated gradients average over micro-batches.
            (micro_loss / n_micro).backward()
            loss += micro_loss.detach() / n_micro

        # 3. Clip and step.
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            # Muon's products are in bfloat16 too if the model's are.
            with s.autocast:
                optimizer.step()
            optimizer.zero_grad()

        # 4. Log, validate, save. Not every step: reading the loss waits for the GPU.
        s.bar.update()
        done = step + 1
        is_last = done == steps
        save_now = is_last or done % c.eval_every == 0
        log_now = save_now or done % 10 == 0
        if not log_now:
            continue
        # A NaN stays a NaN, so checking every ten steps catches it.
        if not math.isfinite(grad_norm):
            raise InputError(f"{name}: the gradient is not finite by step {done}. Lower this "
                             "stage's learning rate, in another out_dir; the last checkpoint is "
                             "intact")
        if s.world > 1:
            dist.all_reduce(loss)
        if s.rank > 0:
            continue
        figures = {
            "stage": name,
            "step": done,
            "loss": loss.item() / s.world,
            "grad_norm": grad_norm.item(),
        }
        s.bar.set_postfix(loss=figures["loss"])
        if save_now:
            scores = score(model, s.val, s.autocast, c.eval_tokens)
            validation = summary(*scores, s.val)
            figures["val_nll"] = validation["nll"]
            figures["val_label_nats"] = validation["planner_ce"]
        # After an interruption a step can appear twice: its last line counts.
        with open(s.out / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")
        if is_last:
            s.seconds[name] = time.perf_counter() - started
            save(s, finished, model)
            partial.unlink(missing_ok=True)
        elif save_now:
            states = [optimizer.state_dict() for optimizer in optimizers]
            save(s, partial, model, step=done, optimizers=states)


def save(s, path, model, **more):
    """Write a checkpoint, whole or not at all."""
    checkpoint = {"options": s.options, "model": model.state_dict()} | more
    with data.replacing(path) as working:
        torch.save(checkpoint, working)


def make_batch(c, s, model, stage, step, micro):
    """This process's micro-batch: a function of (seed, stage, step), so all plans see the same."""
    if stage == "planner":
        # Spans of sentences give more labels in a batch than windows, at any block_size.
        rows = SPANS
        length = s.train.n_sentences
        width = min(2 * c.planner_reach, length // 2)
    else:
        rows = c.batch_size
        length = len(s.train.tokens)
        width = c.block_size
    seed = (c.seed, list(STAGE_OPTIONS).index(stage))
    starts = data.batch_starts(length, width, rows * c.grad_accum, seed, step)
    starts = starts.reshape(-1, s.world, rows)[micro, s.rank]               # (B,)
    if stage == "planner":
        return data.sentence_batch(s.train, starts, width, model.view_tokens)
    return model.batch(s.train, starts)


def lr_share(step, steps):
    """The share of the peak learning rate: linear warm-up to 1, cosine decay to 0.1."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))


# --- the optimizers -------------------------------------------------------------------------------
def make_optimizers(parts, weight_decay):
    """[Muon, AdamW] for [(module, Muon's peak learning rate, AdamW's)].

    Muon trains the matrices of the blocks but not the plan maps, and nothing if its rate is 0;
    AdamW trains the rest. Matrices decay, except label_emb; norms and single vectors don't.
    """
    muon_groups = []
    adamw_groups = []
    for module, muon_lr, adamw_lr in parts:
        in_blocks = []
        decayed = []
        undecayed = []
        for name, p in module.named_parameters():
            if p.dim() < 2 or name.endswith("label_emb"):
                undecayed.append(p)
            elif "blocks." in name and "plan_map" not in name and muon_lr > 0:
                in_blocks.append(p)
            else:
                decayed.append(p)
        muon_groups.append(dict(params=in_blocks, peak_lr=muon_lr))
        adamw_groups.append(dict(params=decayed, peak_lr=adamw_lr))
        adamw_groups.append(dict(params=undecayed, peak_lr=adamw_lr, weight_decay=0.0))
    defaults = dict(weight_decay=weight_decay)
    adamw = torch.optim.AdamW(adamw_groups, betas=(0.9, 0.95), fused=True, **defaults)
    return [Muon(muon_groups, defaults), adamw]


class Muon(torch.optim.Optimizer):
    """SGD with momentum whose update matrix is orthogonalised: every direction moves equally.

    Source: Jordan et al., "Muon", 2024. torch's own multiplies in bfloat16, slow on most CPUs.
    """
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            # All matrices of one shape are multiplied at once.
            by_shape = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for (M, N), matrices in by_shape.items():
                grads = torch.stack([p.grad for p in matrices])             # (n, M, N)
                state = self.state[matrices[0]]
                momentum = state.setdefault("momentum", torch.zeros_like(grads))
                momentum.lerp_(grads, 0.05)
                # Nesterov momentum. Tall matrices move further, as in the source.
                updates = orthogonalize(grads.lerp(momentum, 0.95))
                updates *= max(1, M / N) ** 0.5
                for p, update in zip(matrices, updates):
                    p.sub_(group["lr"] * (update + group["weight_decay"] * p))


def orthogonalize(x):
    """Bring the singular values of matrices (n, M, N) near 1, by four Newton-Schulz steps."""
    # Work on the wide form, whose products are smaller.
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT
    # No singular value is larger than the Frobenius norm.
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(4):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)              # -4.775 a + 2.0315 a a
        x = torch.baddbmm(x, b, x, beta=3.4445)                             # 3.4445 x + b x
    return x.mT if is_tall else x


# --- set-up ---------------------------------------------------------------------------------------
@dataclass
class Setup:
    """What all stages share. Only process 0 prints and writes."""
    out: Path
    options: dict                           # those on which a checkpoint depends
    store: data.Store
    train: data.Corpus
    val: data.Corpus
    device: torch.device
    autocast: contextlib.AbstractContextManager
    rank: int                               # number of this process
    world: int                              # number of processes
    bar: tqdm                               # progress through the steps of all stages
    seconds: dict[str, float]               # of each part of the run, if this process did it


def set_up(c):
    """Join the other processes, prepare the text, check what is in out_dir, write the options.

    Raises InputError if the options don't fit the text, the machine or the run in out_dir.
    """
    started = time.perf_counter()
    rank, world, device = join_processes(c)
    # Process 0 prepares the text; the others wait, then open it.
    if rank > 0:
        dist.barrier()
    store = data.prepare(c.data, c.tokenizer, c.vocab_size, Path(c.cache_dir))
    if rank == 0 and world > 1:
        dist.barrier()

    out = Path(c.out_dir)
    options = {name: getattr(c, name) for name in sum(STAGE_OPTIONS.values(), [])}
    options["fingerprint of the text"] = store.fingerprint
    check_checkpoints(out, options)
    corpus = store.split("train")
    if c.n_labels > corpus.n_sentences:
        raise InputError(f"n_labels={c.n_labels}: there are {corpus.n_sentences} sentences to "
                         "train on: ask for fewer labels, or give more text")
    if rank == 0:
        data.make_folder(out)
        config = asdict(c) | {"fingerprint": store.fingerprint}
        data.write_json(out / "config.json", config)
        data.save_tokenizer(out / "tokenizer.json", store.tokenizer)
        n_tokens = len(corpus.tokens)
        print(f"data: {c.data}, fingerprint {store.fingerprint}, {n_tokens:,} training tokens; "
              f"device: {device}")
        print(f"steps: {c.lm_steps} in stage lm, {c.planner_steps} in stage planner, and "
              f"{c.joint_steps} in stage joint for each of {c.plans}")
        n_read = max(c.lm_steps, c.joint_steps) * c.grad_accum * c.batch_size * c.block_size
        if n_read > 20 * n_tokens:
            print(f"note: a stage will read its training text {n_read / n_tokens:.0f} times over; "
                  "more text would help (--data=PATH)")
    autocast = choose_autocast(c.dtype, device)
    n_steps = c.lm_steps + c.planner_steps + c.joint_steps * len(c.plans.split(","))
    bar = tqdm(total=n_steps, unit="step", disable=rank > 0)
    val = store.split("val")
    seconds = {"preparation": time.perf_counter() - started}
    return Setup(out, options, store, corpus, val, device, autocast, rank, world, bar, seconds)


def join_processes(c):
    """This process's number, how many there are, and its device. Raises InputError."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if c.grad_accum % world:
        raise InputError(f"grad_accum={c.grad_accum}: must be a multiple of {world}, the number of "
                         "processes")
    on_gpus = world > 1 and c.device != "cpu" and torch.cuda.is_available()
    if on_gpus:
        # One GPU for each process of this machine, before anything touches a GPU.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = choose_device(c.device)
    if world > 1:
        # Process 0 may prepare a text for hours.
        dist.init_process_group("nccl" if on_gpus else "gloo", timeout=timedelta(hours=12),
                                device_id=device if on_gpus else None)
    return rank, world, device


def check_checkpoints(out, options):
    """Raise InputError if a checkpoint in out_dir was made with other options than these."""
    # A checkpoint depends on the options of its stage and of those before it, and on the text.
    checked = []
    for stage, names in STAGE_OPTIONS.items():
        checked += names
        for path in out.glob(f"{stage}*.pt"):
            saved = data.read_checkpoint(path).get("options", {})
            for name in [*checked, "fingerprint of the text"]:
                made_with = saved.get(name, "another version of nanoplan")
                if made_with != options[name]:
                    raise InputError(
                        f"{name}={options[name]}, but {path} was made with {made_with}: use "
                        "another --out_dir, or delete the files of that stage and of later ones "
                        "to train them again")


# --- command line ---------------------------------------------------------------------------------
def boolean(text):
    """Read true or false, as JSON does, for argparse."""
    return json.loads(text.lower())


def parse_config(argv=None):
    """The options on the command line, over those of the preset. Raises InputError."""
    parser = Parser("train.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawTextHelpFormatter,
                    argument_default=argparse.SUPPRESS)
    for option in fields(Config):
        parser.add_argument(
            f"--{option.name}",
            type=boolean if option.type is bool else option.type,
            choices=option.metadata["choices"],
            help=f"{option.metadata['help']} [{option.default}]",
        )
    given = vars(parser.parse_args(argv))
    preset = PRESETS[given.get("preset", Config.preset)]
    return Config(**preset | given)


@exits_on_input_error()
def main(argv=None):
    try:
        train(parse_config(argv))
    except KeyboardInterrupt:
        print("train.py: interrupted; run the same command again to continue", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
