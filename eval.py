"""What a trained run is worth: perplexity of every plan, scores of any text, and generated text.

Perplexity is taken in windows that start at 0 and advance by half a window, each token scored once:
only the first window scores tokens with less than half a window behind them, and a prefix of a text
scores as it does within the whole. The `<|endoftext|>` before the first document is not scored.
"""
import argparse
import contextlib
import difflib
import importlib.metadata
import json
import math
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

import data
from labels import Labeler, label_before
from model import GPT, PLANS
from planner import PlannedGPT, Planner


# --- perplexity -----------------------------------------------------------------------------------

@dataclass
class Scores:
    """nll (N-1,): nats of each token but the first. label_log_probs (n+1, K): what the planner says
    of each sentence before it begins; NaN where it says nothing, None where there is no planner."""
    nll: np.ndarray
    label_log_probs: np.ndarray | None = None


@torch.no_grad()
def score(model: PlannedGPT, corpus: data.Corpus, reach: int, view: str, autocast=None,
          max_tokens: int | None = None, batch_size: int | None = None, desc: str = "") -> Scores:
    """Scores each of the (first max_tokens) tokens but the first once, in windows that overlap by
    half. Leaves the model, and every random state, as they were."""
    T = model.gpt.block_size
    n = min(len(corpus.tokens), max_tokens or len(corpus.tokens))
    scores = Scores(np.full(n - 1, np.nan))
    if model.planner is not None:
        shape = len(corpus.sentences), len(model.gpt.label_emb)
        scores.label_log_probs = np.full(shape, np.nan, np.float32)
    stride = max(1, T // 2)
    starts = np.arange(0, max(n - 1 - (T - stride), 1), stride)     # each has a token to score
    batch_size = batch_size or max(1, 8192 // T)
    was_training = model.training
    model.eval()
    for i in tqdm(range(0, len(starts), batch_size), desc=desc, leave=False, disable=not desc):
        start = starts[i:i + batch_size, None]                              # (B, 1)
        batch = data.window_batch(corpus, start[:, 0], T, reach, view)
        with autocast or contextlib.nullcontext():
            nll, label_logits = model(batch.to(model.gpt.wte.weight.device), reduction="none")
        target = start + 1 + np.arange(T)                                   # (B, T)
        # The second half of a window is new; of the first window, all of it.
        new = ((np.arange(T) >= T - stride) | (start == 0)) & (target < n)
        scores.nll[target[new] - 1] = nll.double().cpu().numpy()[new]
        if model.planner is not None:
            # What is said of a sentence counts in the window that scores its first token.
            sentence = np.searchsorted(corpus.sentences, target, side="right") - 1      # (B, T)
            opens = new & (corpus.sentences[sentence] == target)
            row, slot = np.nonzero(opens)[0], batch.sentence_id.numpy()[opens]          # (n,)
            log_probs = label_logits.float().log_softmax(-1).cpu().numpy()              # (B, S, K)
            scores.label_log_probs[sentence[opens]] = log_probs[row, slot]
    model.train(was_training)
    return scores


def summary(scores: Scores, corpus: data.Corpus, n_bytes: int) -> dict:
    """The figures of one plan: nll in nats a token, ppl = exp(nll), bits per UTF-8 byte; and of its
    planner, or None: nats a label, the share of labels that are its likeliest, its entropy."""
    nll = float(scores.nll.mean())
    figures = {"nll": nll, "ppl": math.exp(min(nll, 700)),
               "bits_per_byte": float(scores.nll.sum()) / math.log(2) / n_bytes,
               "planner_ce": None, "planner_acc": None, "planner_entropy": None}
    if scores.label_log_probs is not None and corpus.n_sentences:
        said = np.flatnonzero(~np.isnan(scores.label_log_probs[:corpus.n_sentences, 0]))
        log_probs = scores.label_log_probs[said].astype(np.float64)         # (n, K)
        label = corpus.labels[said]
        entropy = -(np.exp(log_probs) * log_probs).sum(1)                   # (n,) in nats
        figures |= {"planner_ce": -float(log_probs[np.arange(len(said)), label].mean()),
                    "planner_acc": float((log_probs.argmax(1) == label).mean()),
                    "planner_entropy": float(entropy.mean())}
    return figures


def evaluate(run: "Run", corpus: data.Corpus, n_bytes: int, split: str) -> dict:
    """The content of results.json and eval.json: every finished plan on a corpus; and what a label
    costs by its frequency (`unigram_ce`) and by the label before it, in nats."""
    plans = {plan: summary(run.score(run.model(plan), corpus, desc=f"evaluate {plan}"), corpus,
                           n_bytes) for plan in run.finished_plans()}
    bigram, label = run.saved_labels["bigram"], corpus.labels               # (K+2, K), (n,)
    return {"plans": plans, "tokens": len(corpus.tokens) - 1, "bytes": n_bytes, "split": split,
            "sentences": corpus.n_sentences, "unigram_ce": -float(bigram[-1, label].mean()),
            "bigram_ce": -float(bigram[label_before(corpus, bigram.shape[1]), label].mean()),
            "seed": run.config.seed, "fingerprint": run.fingerprint, "versions": versions()}


def table(results: dict) -> str:
    """Results as the lines that train.py and eval.py print."""
    lines = ["{split}: {tokens:,} tokens, {bytes:,} bytes, {sentences:,} sentences",
             "plan              perplexity   vs none  bits/byte  label nats   top-1"]
    none = results["plans"].get("none", {"ppl": math.nan})["ppl"]
    for plan, f in results["plans"].items():
        line = f"{plan:<17}{f['ppl']:11.3f}{f['ppl'] / none - 1:+10.2%}{f['bits_per_byte']:11.4f}"
        if f["planner_ce"] is not None:
            line += f"{f['planner_ce']:12.3f}{f['planner_acc']:8.1%}"
        lines.append(line)
    lines.append("Without a planner, a label costs {unigram_ce:.3f} nats by its frequency, "
                 "{bigram_ce:.3f} by the label before it.")
    return "\n".join(lines).format(**results)


def score_file(run: "Run", plan: str, path: Path) -> None:
    """Prints one JSON line a token: the token, its bytes in hex (a character may span tokens), its
    nll, its sentence and the planner's likeliest label there."""
    corpus, _ = run.read_file(path)
    scores = run.score(run.model(plan), corpus)
    sentence = np.searchsorted(corpus.sentences, np.arange(1, len(corpus.tokens)), side="right") - 1
    for token, nll, j in zip(corpus.tokens[1:].tolist(), scores.nll.tolist(), sentence.tolist()):
        raw = run.tokenizer.decode_single_token_bytes(token)
        label = None
        if scores.label_log_probs is not None:
            label = int(scores.label_log_probs[j].argmax())
        print(json.dumps({"token": raw.decode("utf-8", "replace"), "hex": raw.hex(), "nll": nll,
                          "sentence": j, "label": label}))


# --- generation -----------------------------------------------------------------------------------

@torch.no_grad()
def next_logits(run: "Run", model: PlannedGPT, tokens: list[int]) -> torch.Tensor:
    """The logits (V,) of the token after `tokens`, in the window in which `score` would score it:
    so generation agrees with scoring."""
    corpus = run.label(data.Corpus.from_tokens(np.array(tokens), run.tokenizer))
    T = model.gpt.block_size
    stride = max(1, T // 2)
    start = stride * max(0, math.ceil((len(tokens) - T) / stride))
    batch = data.window_batch(corpus, np.array([start]), T, run.config.planner_reach,
                              run.config.planner_view).to(run.device)
    with run.autocast():
        rows, _ = model.plan_rows(batch)
        logits = model.gpt(batch.tokens, plan=rows, sentence_id=batch.sentence_id)      # (1, T, V)
    return logits[0, len(tokens) - 1 - start].float().cpu()


def sample(logits: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """One token from logits (V,); temperature 0 takes the likeliest, top_k 0 draws among all."""
    if temperature == 0:
        return int(logits.argmax())
    if top_k:
        least = logits.topk(min(top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < least, -math.inf)
    return int(torch.multinomial((logits / temperature).softmax(0), 1, generator=generator))


def generate(run: "Run", plan: str, prompt: str, n_tokens: int, temperature: float, top_k: int,
             seed: int) -> list[dict]:
    """Continues a prompt -> of each sentence: its text, whether the model wrote (a part of) it, the
    label planned for it with its probability, or None, and its own label, None where it is not
    finished. Raises ValueError for `oracle`: a text to be written has no labels."""
    if plan == "oracle":
        raise ValueError("plan=oracle needs the true labels, which a text to be written has not")
    model, eot = run.model(plan), run.tokenizer.eot_token
    generator = torch.Generator().manual_seed(seed)
    tokens = [eot] + run.tokenizer.encode_ordinary(prompt)
    n_prompt = len(tokens)
    while len(tokens) < n_prompt + n_tokens and (len(tokens) == n_prompt or tokens[-1] != eot):
        tokens.append(sample(next_logits(run, model, tokens), temperature, top_k, generator))
    corpus = run.label(data.Corpus.from_tokens(np.array(tokens), run.tokenizer))
    said, sentences = run.score(model, corpus).label_log_probs, []
    for j, start in enumerate(corpus.sentences.tolist()):
        end, label, planned = len(tokens), None, None
        if j < corpus.n_sentences:
            end, label = int(corpus.sentences[j + 1]), int(corpus.labels[j])
        if said is not None and not np.isnan(said[j, 0]):
            planned = [int(said[j].argmax()), math.exp(said[j].max())]
        text = run.tokenizer.decode([t for t in tokens[start:end] if t != eot])
        if text:
            sentences.append({"text": text, "written": end > n_prompt, "planned": planned,
                              "label": label})
    return sentences


def print_generated(run: "Run", sentences: list[dict]) -> None:
    """Prints each sentence with its label and the planned one; `>` marks what the model wrote."""
    words = [", ".join(d["words"][:4]) for d in run.saved_labels["descriptions"]]
    for sentence in sentences:
        label, planned = sentence["label"], sentence["planned"]
        note = "not finished" if label is None else f"label {label} ({words[label]})"
        if planned:
            note += f"; planned {planned[0]} ({words[planned[0]]}) at {planned[1]:.0%}"
        print(f"{'>' if sentence['written'] else ' '} {sentence['text'].rstrip()}\n    [{note}]")


# --- a run ----------------------------------------------------------------------------------------

class Run:
    """One out_dir and all that belongs to it: options, device, tokenizer, corpus, labels, models.
    train.py makes one from its options, `Run.open` from what lies in an out_dir."""

    def __init__(self, config, device: str = ""):
        self.config = config                        # the options of train.Config, as attributes
        self.out = Path(config.out_dir)
        self.device = choose_device(device or config.device)
        self.rank, self.world = 0, 1                # train.py sets others under torchrun
        self.tokenizer = self.labeler = self.saved_labels = self.fingerprint = None
        self.corpora = {}

    @classmethod
    def open(cls, out_dir: Path, device: str = "") -> "Run":
        """A run whose labels are made. Raises FileNotFoundError where there is none."""
        options = data.read_json(out_dir / "config.json", "out_dir", "device", "fingerprint")
        run = cls(SimpleNamespace(**options | {"out_dir": str(out_dir)}), device)
        run.fingerprint = options["fingerprint"]
        run.tokenizer = data.load_tokenizer(out_dir / "tokenizer.json")
        run.use_labels()
        return run

    def load(self, name: str, model: torch.nn.Module | None = None) -> dict:
        """The checkpoint NAME.pt, its weights in `model`. Runs no code from the file. Raises
        FileNotFoundError where there is none, ValueError where it is truncated or foreign."""
        path = self.out / f"{name}.pt"
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist: python train.py --resume "
                                    f"--out_dir={self.out} makes it (joint_PLAN.pt: --plans=PLAN)")
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            if saved["stage"] != name:
                raise ValueError(f"it is a copy of {saved['stage']}.pt")
            if model is not None:
                model.load_state_dict(saved["model"])
            return saved
        except Exception as error:                  # a damaged file can raise anything
            reason = (str(error) or type(error).__name__).splitlines()[-1].strip()[:80]
            raise ValueError(f"{path} is truncated or of another run ({reason}): delete it and "
                             f"run train.py --resume --out_dir={self.out}") from None

    def has(self, name: str) -> bool:
        return (self.out / f"{name}.pt").exists()

    def save(self, name: str, content: dict) -> None:
        """Writes the checkpoint NAME.pt; a failed write leaves the last one intact."""
        with data.replacing(self.out / f"{name}.pt") as working:
            torch.save({"stage": name, **content}, working)

    def log(self, **entry) -> None:
        """Adds a line to metrics.jsonl. Of a stage and step that are done again after an
        interruption, the last line counts."""
        with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def use_labels(self) -> None:
        """Takes the labeler from labels.pt."""
        c = self.config
        self.labeler = Labeler(self.tokenizer.n_vocab, c.n_embd, c.n_labels)
        self.saved_labels = self.load("labels", self.labeler)
        self.labeler.to(self.device)
        self.corpora.clear()                        # those had no labels

    def label(self, corpus: data.Corpus) -> data.Corpus:
        """Gives a corpus its vectors and labels."""
        corpus.vectors = self.labeler.embed(corpus)
        corpus.labels = self.labeler.assign(corpus.vectors)
        return corpus

    def store(self) -> data.Store:
        """The run's prepared corpus. Raises ValueError where its text is another by now."""
        c = self.config
        store = data.prepare(c.data, c.tokenizer, c.vocab_size, Path(c.cache_dir))
        if self.fingerprint not in (None, store.fingerprint):
            raise ValueError(f"data={c.data} has changed since {self.out} was begun: choose "
                             "another out_dir")
        return store

    def corpus(self, split: str) -> data.Corpus:
        """A split of the run's corpus, with vectors and labels once the labels are made."""
        if split not in self.corpora:
            corpus = self.store().split(split)
            self.corpora[split] = self.label(corpus) if self.labeler else corpus
        return self.corpora[split]

    def read_file(self, path: Path) -> tuple[data.Corpus, int]:
        """A file's text as a corpus, and its bytes. Raises ValueError where it holds none."""
        texts = [text for text in data.read_documents(path) if text.strip()]
        if not texts:
            raise ValueError(f"{path} holds no text")
        corpus = data.Corpus.from_texts(texts, self.tokenizer)
        return self.label(corpus), sum(len(text.encode()) for text in texts)

    def finished_plans(self) -> list[str]:
        """The plans whose joint stage is finished. Raises FileNotFoundError where none is."""
        plans = [p for p in PLANS if self.has(f"joint_{p}") and self.load(f"joint_{p}")["done"]]
        if not plans:
            raise FileNotFoundError(f"{self.out} holds no finished plan: "
                                    f"python train.py --resume --out_dir={self.out}")
        return plans

    def new_model(self, plan: str) -> PlannedGPT:
        """An untrained model for a plan, with the run's sizes."""
        c = self.config
        gpt = GPT(self.tokenizer.n_vocab, c.block_size, c.n_layer, c.n_head, c.n_embd,
                  0 if plan == "none" else c.n_labels, c.seed)
        planner = Planner(c.n_embd, c.n_labels, c.planner_layer, c.n_head, c.n_embd,
                          c.planner_reach, c.seed)
        return PlannedGPT(gpt, planner, plan, c.gumbel_tau)

    def model(self, plan: str) -> PlannedGPT:
        """The trained model of a plan. Raises ValueError where its training is not finished."""
        model = self.new_model(plan)
        if not self.load(f"joint_{plan}", model)["done"]:
            raise ValueError(f"{self.out}/joint_{plan}.pt is not finished: "
                             f"python train.py --resume --out_dir={self.out}")
        return model.to(self.device).eval()

    def autocast(self):
        """Mixed precision in bfloat16 where the run asks for it, or the hardware is fast at it. No
        cache: with one, the chunks of GPT.loss would add up their gradients in bfloat16."""
        dtype, flags = self.config.dtype, torch.cpu.get_capabilities()
        fast = {"cpu": any(flags.get(f) for f in ("amx_bf16", "bf16")),
                "cuda": torch.cuda.is_available() and torch.cuda.is_bf16_supported(), "mps": False}
        enabled = dtype == "bfloat16" or dtype == "auto" and fast[self.device.type]
        return torch.autocast(self.device.type, torch.bfloat16, enabled, cache_enabled=False)

    def score(self, model: PlannedGPT, corpus: data.Corpus, **options) -> Scores:
        """`score` with the run's view of the planner and precision."""
        return score(model, corpus, self.config.planner_reach, self.config.planner_view,
                     self.autocast(), **options)


def choose_device(name: str) -> torch.device:
    """`auto` is cuda, else mps, else cpu. Raises ValueError for one that this machine has not."""
    if name == "auto":
        name = str(torch.accelerator.current_accelerator() or "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name} is not available ({str(error).splitlines()[0]}): choose "
                         "auto, or one that this machine has") from None


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that compute a run's figures."""
    packages = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "tiktoken")}
    return {"python": platform.python_version(), **packages}


# --- command line ---------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse that answers a mistake with one line, naming the nearest option."""

    def error(self, message):
        if message.startswith("unrecognized arguments:"):
            name = message.split(": ", 1)[1].split()[0]
            options = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(name.split("=")[0], options, 1, 0.5) or ["--help"]
            message = f"unknown option {name}: did you mean {near[0]}?"
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def one_line_errors(program: str):
    """Bad input ends with one line and exit code 2; a traceback is for bugs alone (or for
    NANOPLAN_DEBUG=1)."""
    try:
        yield
    except (ValueError, OSError, importlib.metadata.PackageNotFoundError) as error:
        if os.environ.get("NANOPLAN_DEBUG"):
            raise
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def main(argv=None):
    parser = Parser(prog="eval.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--out_dir", type=Path, default=Path("out"), help="a run of train.py")
    add("--split", choices=data.SPLITS, default="val", help="what to evaluate on")
    add("--text", type=Path, help="evaluate on this UTF-8 text instead: documents are separated by "
                                  "a line <|endoftext|>; a .jsonl has one {\"text\": ...} a line")
    add("--score", type=Path, help="write one JSON line a token of this text")
    add("--prompt", help="continue this text")
    add("--plan", choices=PLANS, default="soft", help="of --score and --prompt")
    add("--max_tokens", type=int, default=200, help="of --prompt: how many to write at most")
    add("--temperature", type=float, default=0.8, help="of --prompt: 0 takes the likeliest token")
    add("--top_k", type=int, default=50, help="of --prompt: draw among so many; 0 is all")
    add("--seed", type=int, default=0, help="of --prompt")
    add("--device", default="", help="auto, cuda, mps or cpu; as in training unless given")
    args = parser.parse_args(argv)
    if args.max_tokens < 1 or not 0 <= args.temperature < math.inf or args.top_k < 0:
        parser.error("max_tokens must be at least 1, temperature and top_k at least 0")
    with one_line_errors("eval.py"):
        run = Run.open(args.out_dir, args.device)
        if args.score:
            return score_file(run, args.plan, args.score)
        if args.prompt is not None:
            return print_generated(run, generate(run, args.plan, args.prompt, args.max_tokens,
                                                 args.temperature, args.top_k, args.seed))
        if args.text:
            results = evaluate(run, *run.read_file(args.text), "text")
        else:
            n_bytes = run.store().bytes[args.split]
            results = evaluate(run, run.corpus(args.split), n_bytes, args.split)
        data.write_json(args.out_dir / "eval.json", results)
        print(table(results))


if __name__ == "__main__":
    main()
