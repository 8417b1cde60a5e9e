"""What a trained run is worth: perplexity of every plan, scores of any text, and generated text.

Each token is scored once, in windows that advance by half a window. Only the first window scores
tokens with less than half a window behind them; a prefix of a text scores as within the whole.
"""
import argparse
import contextlib
import importlib.metadata
import json
import math
import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
from labels import Labeler, label_before, nearest
from model import GPT, PLANS
from planner import PlannedGPT, Planner


@dataclass
class Scores:
    """What a model says of N tokens, and its planner, if any, of n + 1 sentences."""
    nll: np.ndarray                                 # (N-1,) nats of each token but the first
    label_log_probs: np.ndarray | None = None       # (n+1, K) before it begins; NaN: nothing said


@torch.no_grad()
def score(run: "Run", model: PlannedGPT, corpus: data.Corpus, max_tokens: int | None = None,
          batch_size: int | None = None, desc: str = "") -> Scores:
    """Scores each of the first max_tokens tokens but the first. Changes no model, draws nothing."""
    c, T = run.config, model.gpt.block_size
    N = min(len(corpus.tokens), max_tokens or len(corpus.tokens))
    scores = Scores(np.full(N - 1, np.nan))         # a token that is missed makes every figure NaN
    if model.planner is not None:
        shape = len(corpus.sentences), len(model.gpt.label_emb)
        scores.label_log_probs = np.full(shape, np.nan, np.float32)         # (n+1, K)
    stride = max(1, T // 2)
    starts = np.arange(0, max(N - 1 - (T - stride), 1), stride)     # each has a token to score
    batch_size = batch_size or max(1, 8192 // T)    # bounds memory, whatever the window
    for i in tqdm(range(0, len(starts), batch_size), desc=desc, leave=False, disable=not desc):
        start = starts[i:i + batch_size, None]                              # (B, 1)
        batch = data.window_batch(corpus, start[:, 0], T, c.planner_reach, c.planner_view)
        with run.autocast():                                                # steps 3 to 5
            nll, label_logits = model(batch.to(run.device), reduction="none")
        target = start + 1 + np.arange(T)                                   # (B, T)
        second_half = np.arange(T) >= T - stride                            # (T,)
        new = (second_half | (start == 0)) & (target < N)   # of the first window, all of it
        scores.nll[target[new] - 1] = nll.double().cpu().numpy()[new]
        if model.planner is not None:
            # What is said of a sentence counts in the window that scores its first token.
            sentence = np.searchsorted(corpus.sentences, target, side="right") - 1      # (B, T)
            opens = new & (corpus.sentences[sentence] == target)
            row, slot = np.nonzero(opens)[0], batch.sentence_id.numpy()[opens]          # (n,)
            log_probs = label_logits.float().log_softmax(-1).cpu().numpy()              # (B, S, K)
            scores.label_log_probs[sentence[opens]] = log_probs[row, slot]
    return scores


def summary(scores: Scores, corpus: data.Corpus, n_bytes: int) -> dict:
    """The figures of one plan and of its planner (or None) on a text of n_bytes in UTF-8."""
    nll = float(scores.nll.mean())                              # nats a token
    figures = {"nll": nll, "ppl": math.exp(min(nll, 700)),      # exp(710) overflows
               "bits_per_byte": float(scores.nll.sum()) / math.log(2) / n_bytes,
               "planner_ce": None, "planner_acc": None}
    if scores.label_log_probs is not None:                      # the unfinished has no label
        said = np.flatnonzero(~np.isnan(scores.label_log_probs[:corpus.n_sentences, 0]))
        log_probs = scores.label_log_probs[said].astype(np.float64)         # (n, K)
        label = corpus.labels[said]                                         # (n,)
        figures |= {"planner_ce": -float(log_probs[np.arange(len(said)), label].mean()),
                    "planner_acc": float((log_probs.argmax(1) == label).mean())}    # top-1
    return figures


def evaluate(run: "Run", corpus: data.Corpus, n_bytes: int, split: str) -> dict:
    """Every finished plan on a corpus: the content of results.json and eval.json."""
    plans = {plan: summary(run.score(run.model(plan), corpus, desc=f"evaluate {plan}"), corpus,
                           n_bytes) for plan in run.finished_plans()}
    # nats of a label by frequency, or after the one before: what a planner (step 3) has to beat
    bigram, label = run.saved_labels["bigram"], corpus.labels               # (K+2, K), (n,)
    return {"plans": plans, "tokens": len(corpus.tokens) - 1, "bytes": n_bytes, "split": split,
            "sentences": corpus.n_sentences, "unigram_ce": -float(bigram[-1, label].mean()),
            "bigram_ce": -float(bigram[label_before(corpus, bigram.shape[1]), label].mean()),
            "seed": run.config.seed, "fingerprint": run.fingerprint, "versions": versions()}


def table(results: dict) -> str:
    """Results as the lines that train.py and eval.py print."""
    lines = ["{split}: {tokens:,} tokens, {bytes:,} bytes, {sentences:,} sentences",
             "plan              perplexity   vs none  bits/byte  label nats   top-1"]
    none = results["plans"].get("none")             # --plans may leave it out
    for plan, f in results["plans"].items():
        change = f"{f['ppl'] / none['ppl'] - 1:+.2%}" if none else ""
        line = f"{plan:<17}{f['ppl']:11.3f}{change:>10}{f['bits_per_byte']:11.4f}"
        if f["planner_ce"] is not None:
            line += f"{f['planner_ce']:12.3f}{f['planner_acc']:8.1%}"
        lines.append(line)
    lines.append("Without a planner, a label costs {unigram_ce:.3f} nats by its frequency, "
                 "{bigram_ce:.3f} by the label before it.")
    return "\n".join(lines).format(**results)


def score_file(run: "Run", plan: str, path: Path) -> None:
    """Prints a JSON line for each token: its bytes, its nll, its sentence, the planned label."""
    corpus, _ = run.read_file(path)
    scores = run.score(run.model(plan), corpus)
    likeliest = [None] * len(corpus.sentences)
    if scores.label_log_probs is not None:
        likeliest = scores.label_log_probs.argmax(1).tolist()               # (n+1,)
    sentence = np.searchsorted(corpus.sentences, np.arange(1, len(corpus.tokens)), side="right") - 1
    for token, nll, j in zip(corpus.tokens[1:].tolist(), scores.nll.tolist(), sentence.tolist()):
        raw = run.tokenizer.decode_single_token_bytes(token)    # may be a part of a character
        print(json.dumps({"token": raw.decode("utf-8", "replace"), "hex": raw.hex(), "nll": nll,
                          "sentence": j, "label": likeliest[j]}))


@torch.no_grad()
def next_logits(run: "Run", model: PlannedGPT, tokens: list[int]) -> torch.Tensor:
    """The logits (V,) of the token after `tokens`, in the window in which `score` scores it."""
    # steps 1 and 2 again for each token: of a text half written, no entry depends on the rest
    corpus = run.label(data.Corpus.from_tokens(np.array(tokens), run.tokenizer))
    T = model.gpt.block_size
    stride = max(1, T // 2)
    start = stride * max(0, math.ceil((len(tokens) - T) / stride))
    batch = data.window_batch(corpus, np.array([start]), T, run.config.planner_reach,
                              run.config.planner_view).to(run.device)
    with run.autocast():
        rows, _ = model.plan_rows(batch)                                    # (1, S, C) steps 3, 4
        logits = model.gpt(batch.tokens, plan=rows, sentence_id=batch.sentence_id)      # (1, T, V)
    return logits[0, len(tokens) - 1 - start].float().cpu()     # what is behind it is padding


def generate(run: "Run", plan: str, prompt: str, n_tokens: int, temperature: float,
             seed: int) -> list[dict]:
    """Continues a prompt -> each sentence: its text, whether the model wrote (of) it, the label and
    probability planned for it, or None, its own label, or None. ValueError for `oracle`."""
    if plan == "oracle":
        raise ValueError("plan=oracle needs the true labels, which a text to be written has not")
    model, eot = run.model(plan), run.tokenizer.eot_token
    generator = torch.Generator().manual_seed(seed)             # a CPU's: the same on every device
    tokens = [eot] + run.tokenizer.encode_ordinary(prompt)      # as each split begins
    n_prompt = len(tokens)
    for _ in range(n_tokens):
        logits = next_logits(run, model, tokens)                            # (V,)
        probs = (logits / max(temperature, 1e-6)).softmax(0)    # at 0, all is the likeliest's
        tokens.append(int(torch.multinomial(probs, 1, generator=generator)))
        if tokens[-1] == eot:
            break
    # what was planned, from one pass over the whole: no score depends on later tokens
    corpus = run.label(data.Corpus.from_tokens(np.array(tokens), run.tokenizer))
    said, sentences = run.score(model, corpus).label_log_probs, []          # (n+1, K) or None
    ends = [*corpus.sentences[1:].tolist(), len(tokens)]
    labels = [*corpus.labels.tolist(), None]        # the last sentence is not finished
    for j, (start, end, label) in enumerate(zip(corpus.sentences.tolist(), ends, labels)):
        text = run.tokenizer.decode([t for t in tokens[start:end] if t != eot])
        if text:                                    # none in <|endoftext|> alone, or at the end
            planned = None if said is None else [int(said[j].argmax()), math.exp(said[j].max())]
            sentences.append(dict(text=text, written=end > n_prompt, planned=planned, label=label))
    return sentences


def print_generated(run: "Run", sentences: list[dict]) -> None:
    """Prints each sentence with its label and the planned one; `>` marks what the model wrote."""
    words = [", ".join(d["words"][:4]) for d in run.saved_labels["descriptions"]]     # of K labels
    for sentence in sentences:
        label, planned = sentence["label"], sentence["planned"]
        note = "not finished" if label is None else f"label {label} ({words[label]})"
        if planned:
            note += f"; planned {planned[0]} ({words[planned[0]]}) at {planned[1]:.0%}"
        print(f"{'>' if sentence['written'] else ' '} {sentence['text'].rstrip()}\n    [{note}]")


class Run:
    """One out_dir and all that belongs to it: options, device, tokenizer, labels, models."""

    def __init__(self, config, device: str = ""):
        self.config = config                        # the options of train.Config, as attributes
        self.out = Path(config.out_dir)
        self.device = choose_device(device or config.device)
        self.rank, self.world = 0, 1                # train.py sets others under torchrun
        self.tokenizer = self.fingerprint = self.labeler = self.saved_labels = None     # yet
        self.corpora = {}                           # split -> Corpus
        self.remedy = f"run train.py --resume --out_dir={self.out}"     # the end of many errors

    @classmethod
    def open(cls, out_dir: Path, device: str = "") -> "Run":
        """A run whose labels are made. Raises FileNotFoundError where there is none."""
        options = data.read_json(out_dir / "config.json", "out_dir", "device", "fingerprint")
        options["out_dir"] = str(out_dir)           # the folder may have been moved since
        run = cls(argparse.Namespace(**options), device)
        run.fingerprint = options["fingerprint"]
        run.tokenizer = data.load_tokenizer(out_dir / "tokenizer.json")
        run.use_labels()
        return run

    def load(self, name: str, model: torch.nn.Module | None = None) -> dict:
        """The checkpoint NAME.pt, its weights in `model`. Raises FileNotFoundError, ValueError."""
        path = self.out / f"{name}.pt"
        if not path.exists():
            raise FileNotFoundError(f"no {path}: {self.remedy} (for joint_PLAN.pt: --plans=PLAN)")
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)     # runs no code of it
            if saved["stage"] != name:              # a copied joint_*.pt would fit in its shapes
                raise ValueError(f"it is a copy of {saved['stage']}.pt")
            if model is not None:
                model.load_state_dict(saved["model"])
            return saved
        except Exception as error:                  # a damaged file can raise anything
            raise ValueError(f"{path} is truncated or of another run ({error!s:.80}): delete it "
                             f"and {self.remedy}") from None

    def has(self, name: str) -> bool:
        return (self.out / f"{name}.pt").exists()

    def save(self, name: str, content: dict) -> None:
        """Writes the checkpoint NAME.pt; a failed write leaves the last one intact."""
        with data.replacing(self.out / f"{name}.pt") as working:
            torch.save({"stage": name, **content}, working)     # `load` refuses it by another name

    def log(self, **entry) -> None:
        """Adds a line to metrics.jsonl; of a step done twice (--resume), the last line counts."""
        with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def use_labels(self) -> None:
        """Takes the labeler (step 2) from labels.pt."""
        c = self.config
        self.labeler = Labeler(self.tokenizer.n_vocab, c.n_embd, c.n_labels)
        self.saved_labels = self.load("labels", self.labeler)
        self.labeler.to(self.device)
        self.corpora.clear()                        # those had no labels

    def label(self, corpus: data.Corpus) -> data.Corpus:
        """Gives a corpus its vectors and labels."""
        corpus.vectors = self.labeler.embed(corpus)                         # (n, E)
        corpus.labels = nearest(corpus.vectors, self.labeler.centroids)[0].cpu().numpy()    # (n,)
        return corpus

    def store(self) -> data.Store:
        """The run's prepared corpus. Raises ValueError where its text is another by now."""
        c = self.config
        store = data.prepare(c.data, c.tokenizer, c.vocab_size, Path(c.cache_dir))
        if self.fingerprint not in (None, store.fingerprint):   # None: train.py has just begun
            raise ValueError(f"data={c.data} has changed: {self.out} needs the text it began with")
        return store

    def corpus(self, split: str) -> data.Corpus:
        """A split of the run's corpus, with vectors and labels once the labels are made."""
        if split not in self.corpora:
            corpus = self.store().split(split)      # in stage `lm` that is all
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
        if not plans:                               # an interrupted stage has a file, too
            raise FileNotFoundError(f"{self.out} holds no finished plan: {self.remedy}")
        return plans

    def new_model(self, plan: str) -> PlannedGPT:
        """An untrained model for a plan, with the run's sizes."""
        c = self.config
        gpt = GPT(self.tokenizer.n_vocab, c.block_size, c.n_layer, c.n_head, c.n_embd,
                  0 if plan == "none" else c.n_labels, c.seed)
        planner = Planner(c.n_embd, c.n_labels, c.planner_layer, c.n_head, c.n_embd,
                          c.seed)                   # E = C: vectors are means of token embeddings
        return PlannedGPT(gpt, planner, plan, c.gumbel_tau)

    def model(self, plan: str) -> PlannedGPT:
        """The trained model of a plan. Raises ValueError where its training is not finished."""
        model = self.new_model(plan)
        if not self.load(f"joint_{plan}", model)["done"]:
            raise ValueError(f"{self.out}/joint_{plan}.pt is not finished: {self.remedy}")
        return model.to(self.device)

    def autocast(self):
        """Mixed precision in bfloat16 where the run asks for it, or the hardware is fast at it."""
        dtype, flags = self.config.dtype, torch.cpu.get_capabilities()
        intel = "Intel" in flags.get("cpu_name", "")            # its avx512_bf16 is a slow one
        names = ["amx_bf16", "bf16"] if intel else ["avx512_bf16", "bf16"]
        fast = {"cpu": any(flags.get(name) for name in names), "mps": False,
                "cuda": torch.cuda.is_available() and torch.cuda.is_bf16_supported()}
        enabled = dtype == "bfloat16" or dtype == "auto" and fast[self.device.type]
        # With a cache, the chunks of GPT.loss would add up their gradients in bfloat16.
        return torch.autocast(self.device.type, torch.bfloat16, enabled, cache_enabled=False)

    score = score                       # run.score(model, corpus) is score(run, model, corpus)


def choose_device(name: str) -> torch.device:
    """`auto` is cuda, else mps, else cpu. Raises ValueError for one that this machine has not."""
    if name == "auto":
        name = str(torch.accelerator.current_accelerator() or "cpu")
    try:
        return torch.empty(0, device=name).device   # cuda becomes cuda:0
    except (RuntimeError, AssertionError) as error:     # the latter from a build without CUDA
        raise ValueError(f"device={name} is not available ({error!s:.60}): choose auto") from None


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that compute a run's figures."""
    names = ("torch", "numpy", "tiktoken")
    return {"python": platform.python_version()} | {n: importlib.metadata.version(n) for n in names}


class Parser(argparse.ArgumentParser):
    """argparse that answers a mistake with one line."""

    def error(self, message):
        if message.startswith("unrecognized arguments:"):
            message = f"unknown option {message.split()[2]}: --help lists all"
        self.exit(2, f"{self.prog}: error: {message}\n")


@contextlib.contextmanager
def one_line_errors(program: str):
    """Bad input ends with one line and exit code 2; a traceback is for bugs alone."""
    try:
        yield
    except (ValueError, OSError, importlib.metadata.PackageNotFoundError) as error:
        Parser(prog=program).error(" ".join(str(error).split()))


def main(argv=None):
    parser = Parser(prog="eval.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--out_dir", type=Path, default=Path("out"), help="a run of train.py")
    add("--split", choices=data.SPLITS, default="val", help="what to evaluate on")
    add("--text", type=Path, help="evaluate on this .txt or .jsonl instead, as train.py reads it")
    add("--score", type=Path, help="write one JSON line a token of this text")
    add("--prompt", help="continue this text")
    add("--plan", choices=PLANS, default="soft", help="of --score and --prompt")
    add("--max_tokens", type=int, default=200, help="of --prompt: how many to write at most")
    add("--temperature", type=float, default=0.7, help="of --prompt: 0 takes the likeliest token")
    add("--seed", type=int, default=0, help="of --prompt")
    add("--device", default="", help="auto, cuda, mps or cpu; as in training unless given")
    args = parser.parse_args(argv)                  # which checks types, not ranges
    if args.max_tokens < 1 or not 0 <= args.temperature < math.inf:
        parser.error("max_tokens must be at least 1, temperature at least 0")
    with one_line_errors("eval.py"):
        run = Run.open(args.out_dir, args.device)
        if args.score:
            return score_file(run, args.plan, args.score)
        if args.prompt is not None:                 # an empty one begins a document
            return print_generated(run, generate(run, args.plan, args.prompt, args.max_tokens,
                                                 args.temperature, args.seed))
        if args.text:
            results = evaluate(run, *run.read_file(args.text), "text")
        else:
            n_bytes = run.store().bytes[args.split]             # of UTF-8, without <|endoftext|>
            results = evaluate(run, run.corpus(args.split), n_bytes, args.split)
        data.write_json(args.out_dir / "eval.json", results)
        print(table(results))


if __name__ == "__main__":
    main()
