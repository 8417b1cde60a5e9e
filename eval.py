"""What a trained run is worth: perplexity of every plan, scores of any text, and generated text.

    python eval.py --out_dir=out                              # all trained plans, on validation
    python eval.py --out_dir=out --split=test                 # read it once, when all is decided
    python eval.py --out_dir=out --text=FILE                  # the same on any text
    python eval.py --out_dir=out --score=FILE --plan=soft     # JSON lines, one a token
    python eval.py --out_dir=out --prompt="..." --plan=soft   # generate, with its plan
    python eval.py --out_dir=out --report=report.html         # one self-contained page

Perplexity is taken in windows that start at 0 and advance by half a window, each token scored
once, so that only the first window scores tokens with less than half a window behind them,
and a prefix of a text scores as it does within the whole. The `<|endoftext|>` before the
first document is not scored.
"""
import argparse
import codecs
import contextlib
import difflib
import json
import math
import os
import pickle
import platform
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

import data
import labels as labelling
from model import GPT, PLANS, Cache
from planner import PlannedGPT, Planner

FORMAT = "nanoplan-1"


# --- files ----------------------------------------------------------------------------------------

def load_checkpoint(path: Path) -> dict:
    """Reads a file that train.py saved, checks it, and runs no code from it. Raises ValueError for
    a file that is damaged, foreign or of another format, FileNotFoundError where there is none."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: train it first (python train.py --out_dir="
                                f"{path.parent})")
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.load verifies no check sum, and would read past an entry of another size or kind
            odd = [f.filename for f in archive.infolist()
                   if f.compress_type or f.external_attr or f.compress_size != f.file_size]
            damaged = odd[0] if odd else archive.testzip()
        saved = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, OSError,
            ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:80]
        raise ValueError(f"{path} is truncated, damaged or not a checkpoint ({reason}): "
                         "delete it and train again") from None
    if saved is None:
        raise ValueError(f"{path} is damaged (in {damaged}): delete it and train again")
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        found = saved.get("format") if isinstance(saved, dict) else type(saved).__name__
        raise ValueError(f"{path} is not a checkpoint of this version ({found!r}, not {FORMAT!r}): "
                         "train again in another out_dir")
    if (stage := saved.get("stage", path.stem)) != path.stem:    # the first runs' files do not say
        raise ValueError(f"{path} is a copy of {stage}.pt: delete it and train again")
    return saved


def write_json(path: Path, content: dict) -> None:
    """As a whole: a failed write leaves what was there. Raises OSError where the disk is full."""
    with data.replacing(path) as working:
        working.write_text(json.dumps(content, indent=1) + "\n")


def read_config(out_dir: Path) -> dict:
    """A run's options. Raises ValueError where config.json is damaged."""
    path = out_dir / "config.json"
    try:
        config = json.loads(path.read_text())
        digest = config.pop("digest", None)          # an earlier commit's file has none
        if not {"data", "cache_dir", "planner_reach", "device", "dtype"} <= config.keys() or (
                digest not in (None, data.digest_of(config))):
            raise ValueError
        return config
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"{path} is damaged: delete it, and run train.py with --resume and "
                         "all the options that the run had") from None


def load_labeler(saved: dict) -> labelling.Labeler:
    """The Labeler in a labels.pt."""
    state = saved["labeler"]
    gpt = None
    if saved["gpt_args"]:
        gpt = GPT(**saved["gpt_args"])
        gpt.load_state_dict({name[4:]: value for name, value in state.items()
                             if name.startswith("gpt.")})
        gpt.requires_grad_(False)
    return labelling.Labeler(state.get("table"), gpt, state["mean"], state["centroids"])


def differences(saved: dict, config: dict) -> str:
    """What a checkpoint was made with, where config.json, or labels.pt, is another."""
    return ", ".join(f"{name}={value}" for name, value in saved["depends"].items()
                     if config.get(name) != value and name not in ("lm.pt", "planner.pt"))


@dataclass
class Run:
    """A trained out_dir: its configuration, tokenizer, labeler, and models on demand."""
    out_dir: Path
    device: torch.device
    config: dict
    tokenizer: tiktoken.Encoding
    labeler: labelling.Labeler
    saved_labels: dict

    @classmethod
    def open(cls, out_dir: Path, device: str = "") -> "Run":
        if not (out_dir / "config.json").exists():
            raise FileNotFoundError(f"out_dir={out_dir} holds no trained run: python train.py "
                                    f"--out_dir={out_dir}")
        config = read_config(out_dir)
        where = choose_device(device or config["device"])
        saved = cls.load(out_dir / "labels.pt", config)
        config["labels.pt"] = saved.get("id")
        return cls(out_dir, where, config, data.load_tokenizer(out_dir / "tokenizer.json"),
                   load_labeler(saved).to(where), saved)

    @staticmethod
    def load(path: Path, config: dict) -> dict:
        """A checkpoint of this run. Raises ValueError where config.json has other options: it is
        damaged, or train.py was started with others and has not come so far."""
        saved = load_checkpoint(path)
        if other := differences(saved, config):
            raise ValueError(f"{path} was made with {other}, which is another now: "
                             "run train.py with --resume")
        return saved

    @property
    def plans(self) -> list[str]:
        """The plans whose joint stage is finished,
        in the order of the table in DESIGN section 1."""
        done = []
        for plan in PLANS:
            if not (path := self.out_dir / f"joint_{plan}.pt").exists():
                continue
            saved = load_checkpoint(path)
            if other := differences(saved, self.config):
                print(f"joint_{plan}: passed over, was made with {other}")
            elif saved["done"]:
                done.append(plan)
        if not done:
            raise FileNotFoundError(f"{self.out_dir} holds no finished plan: "
                                    f"python train.py --out_dir={self.out_dir} --resume=true")
        return done

    def model(self, plan: str) -> PlannedGPT:
        saved = self.load(self.out_dir / f"joint_{plan}.pt", self.config)
        gpt, planner = GPT(**saved["gpt_args"]), Planner(**saved["planner_args"])
        model = PlannedGPT(gpt, planner, plan, self.config["gumbel_tau"])
        try:
            model.load_state_dict(saved["model"])
        except RuntimeError as error:
            raise ValueError(f"{self.out_dir}/joint_{plan}.pt does not fit its own sizes: "
                             f"{str(error).splitlines()[-1].strip()}") from None
        return model.to(self.device).eval()

    def corpus(self, split: str) -> data.Corpus:
        c = self.config
        store = data.prepare(c["data"], c["tokenizer"], c["vocab_size"], Path(c["cache_dir"]))
        if store.meta["fingerprint"] != c["fingerprint"]:
            raise ValueError(f"data={c['data']} has changed since {self.out_dir} was trained: "
                             f"the text's fingerprint was {c['fingerprint']}, "
                             f"now {store.meta['fingerprint']}")
        self.bytes = store.meta["splits"][split]["bytes"]
        return store.split(split)

    def sentences(self, corpus: data.Corpus,
                  split: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Vectors (n, E) and labels (n,) of a corpus; those of a split are kept on disk."""
        path = split and self.out_dir / f"vectors.{split}.{self.labeler.fingerprint()}.npy"
        vectors = labelling.embed_corpus(self.labeler, corpus, path)
        return vectors, labelling.label_corpus(self.labeler, vectors)

    def autocast(self):
        return autocast(self.device, self.config["dtype"])

    def score(self, plan: str, corpus: data.Corpus, vectors, labels, bar: str = "") -> "Scores":
        """`score` under a plan, with this run's options."""
        return score(self.model(plan), corpus, vectors, labels, self.config["planner_reach"],
                     self.config["planner_view"], context=self.autocast(), bar=bar)


def autocast(device: torch.device, dtype: str):
    """Mixed precision where dtype is bfloat16; nothing otherwise."""
    if dtype != "bfloat16":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def choose_device(name: str) -> torch.device:
    """`auto` is cuda, else mps, else cpu.
    Raises ValueError for a device that this machine has not."""
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
            "cpu": True}
    if name == "auto":
        name = next(device for device, available in have.items() if available)
    if not have.get(name.split(":")[0]):
        raise ValueError(f"device={name} is not available: this machine has "
                         f"{', '.join(d for d, available in have.items() if available)} (or auto)")
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name}: choose auto, cuda, mps or cpu (or cuda:1 and so on)"
                         ) from None


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that compute a run's figures."""
    return {"python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__,
            "tiktoken": tiktoken.__version__ if hasattr(tiktoken, "__version__") else ""}


# --- perplexity -----------------------------------------------------------------------------------

@dataclass
class Scores:
    """nll (N-1,): nats of each token but the first. Of the planner, for each sentence j (n,), NaN
    where it has no planner: ce of the true label, its rank (0 is best), the entropy, the top
    labels (n, 3), their probabilities."""
    nll: np.ndarray
    ce: np.ndarray = field(default=None)
    rank: np.ndarray = field(default=None)
    entropy: np.ndarray = field(default=None)
    top: np.ndarray = field(default=None)
    prob: np.ndarray = field(default=None)


@torch.no_grad()
def score(model: PlannedGPT, corpus: data.Corpus, vectors: np.ndarray, labels: np.ndarray,
          reach: int, view: str, batch_size: int = 0, context=None, max_tokens: int = 1 << 62,
          bar: str = "") -> Scores:
    """Scores each of a corpus's (first max_tokens) tokens but the first once, in overlapping
    windows. Leaves the model, and every random state, as they were."""
    context, device = context or contextlib.nullcontext(), model.gpt.wte.weight.device
    T = model.gpt.block_size
    batch_size = batch_size or max(1, 8192 // T)
    stride, n = max(1, T // 2), min(len(corpus.tokens), max_tokens)
    # each has at least one token to score
    starts = np.arange(0, max(n - 1 - (T - stride), 1), stride)
    S = len(corpus.sentences)
    found = Scores(np.full(n - 1, np.nan), *np.full((3, S), np.nan),
                   np.zeros((S, 3), int), np.zeros((S, 3)))
    training = model.training
    model.eval()
    for i in tqdm(range(0, len(starts), batch_size), desc=bar, leave=False, disable=not bar):
        at = starts[i:i + batch_size]
        batch = data.window_batch(corpus, at, T, vectors, labels, reach, view).to(device)
        with context:
            nll, logits = model(batch, reduction="none")
        target = at[:, None] + 1 + np.arange(T)                # (B, T) which token each one scores
        new = ((np.arange(T) >= T - stride) | (at[:, None] == 0)) & (target < n)
        found.nll[target[new] - 1] = nll.cpu().double().numpy()[new]
        if model.planner is not None:
            _score_labels(found, corpus, batch, logits, target, new)
    model.train(training)
    return found


def _score_labels(found: Scores, corpus, batch, logits, target, new) -> None:
    """A sentence counts in the window that scores its first token."""
    begun = corpus.sentences[np.searchsorted(corpus.sentences, target, side="right") - 1]
    opens = new & (begun == target)
    sentence = np.searchsorted(corpus.sentences, target[opens])
    row, slot = np.nonzero(opens)[0], batch.sentence_id.cpu().numpy()[opens]
    log_probs = logits[row, slot].cpu().double().log_softmax(-1)                        # (n, K)
    labels = batch.labels.cpu()[row, slot]
    label = labels.clamp(min=0)[:, None]
    true = log_probs.gather(1, label)
    # of equal ones the first is before the others, as argmax has it
    before = (log_probs > true) | ((log_probs == true) & (torch.arange(len(log_probs.T)) < label))
    top = log_probs.topk(min(3, log_probs.shape[1]))
    known = labels >= 0                          # the last sentence of a text may not be finished
    found.ce[sentence] = torch.where(known, -true[:, 0], torch.nan)
    found.rank[sentence] = torch.where(known, before.sum(1).double(), torch.nan)
    found.entropy[sentence] = -(log_probs.exp() * log_probs).sum(1)
    found.top[sentence, :top.indices.shape[1]] = top.indices
    found.prob[sentence, :top.indices.shape[1]] = top.values.exp()


def summary(found: Scores, n_bytes: int) -> dict:
    """The figures of one plan: nll in nats a token, ppl = exp(nll),
    bits per UTF-8 byte of the text."""
    nll = float(found.nll.mean())
    result = {"nll": nll, "ppl": math.inf if nll > 700 else math.exp(nll),     # a float ends there
              "bits_per_byte": float(found.nll.sum()) / math.log(2) / n_bytes,
              "planner_ce": None, "planner_acc": None,
              "planner_rank": None, "planner_entropy": None, "planner_labels": None}
    known = ~np.isnan(found.ce)
    if known.any():
        result |= {"planner_ce": float(found.ce[known].mean()),
                   "planner_acc": float((found.rank[known] == 0).mean()),
                   "planner_rank": float(found.rank[known].mean() + 1),
                   "planner_entropy": float(np.nanmean(found.entropy)),
                   "planner_labels": len(np.unique(found.top[known, 0]))}
    return result


def evaluate(run: Run, corpus: data.Corpus, n_bytes: int, split: str | None = None) -> dict:
    """The content of results.json and eval.json: every finished plan on a corpus."""
    vectors, labels = run.sentences(corpus, split)
    c, plans = run.config, {}
    for plan in run.plans:
        found = run.score(plan, corpus, vectors, labels, bar=f"evaluate {plan}")
        plans[plan] = summary(found, n_bytes)
    baselines = labelling.baselines(run.saved_labels["transitions"], labels, corpus)
    return {"plans": plans, "tokens": len(corpus.tokens) - 1, "bytes": n_bytes,
            "split": split or "text", "sentences": corpus.n_sentences, "seed": c["seed"],
            "data": c["fingerprint"], **baselines, "versions": versions()}


def table(results: dict) -> str:
    """Results as the lines that train.py and eval.py print."""
    plans = results["plans"]
    base, bound = (plans.get(p, {}).get("nll") for p in ("none", "oracle"))
    lines = [f"{results['split']}: {results['tokens']:,} tokens, {results['bytes']:,} bytes, "
             f"{results['sentences']:,} sentences",
             f"{'plan':<17}{'perplexity':>10}{'vs none':>9}{'gap closed':>12}{'bits/byte':>11}"
             f"{'label nats':>12}{'top-1':>8}{'mean rank':>11}"]
    for plan, r in plans.items():
        change = "" if base is None else f"{100 * math.expm1(min(r['nll'] - base, 700)):+.2f} %"
        gap = "" if None in (base, bound) or base <= bound else (
            f"{(base - r['nll']) / (base - bound):.0%}")
        label = "" if r["planner_ce"] is None else (
            f"{r['planner_ce']:12.3f}{r['planner_acc']:8.1%}{r['planner_rank']:11.1f}")
        lines.append(f"{plan:<17}{r['ppl']:10.3f}{change:>9}{gap:>12}"
                     f"{r['bits_per_byte']:11.4f}{label}")
    for plan, r in plans.items():
        if r["planner_labels"] == 1 and results["sentences"] >= 64:       # in a few, chance does it
            lines.append(f"{plan}: its planner has collapsed onto one label for all sentences")
    lines.append(f"Without a planner, the next label costs {results['unigram_ce']:.3f} nats "
                 f"by its frequency, {results['bigram_ce']:.3f} by the label before it.")
    return "\n".join(lines)


def score_file(run: Run, plan: str, path: Path) -> None:
    """Prints one JSON line a token: the token, its nll, its sentence,
    and the plan's likeliest label."""
    corpus = data.Corpus.from_texts(data.read_documents(path), run.tokenizer)
    check_text(corpus, path)
    vectors, labels = run.sentences(corpus)
    found = run.score(plan, corpus, vectors, labels)
    sentence = np.searchsorted(corpus.sentences, np.arange(1, len(corpus.tokens)), side="right") - 1
    for token, nll, j in zip(corpus.tokens[1:].tolist(), found.nll.tolist(), sentence.tolist()):
        text = run.tokenizer.decode_single_token_bytes(token).decode("utf-8", "replace")
        label = None if np.isnan(found.entropy[j]) else int(found.top[j, 0])
        print(json.dumps({"token": text, "nll": nll, "sentence": j, "label": label}))


def check_text(corpus: data.Corpus, path: Path) -> None:
    """Raises ValueError for a text with nothing to score."""
    if len(corpus.tokens) < 2:
        raise ValueError(f"{path} holds no text")


# --- generation -----------------------------------------------------------------------------------

class Stream:
    """Reads tokens one at a time and plans online; `append` gives the logits of the next token.

    Each forward pass gets the plan of the sentence that the *next* token belongs to, so cached keys
    and values stay valid when a sentence ends. A full window is refilled once from its newer half:
    the windows are those of `score`, and so are the logits.
    """

    def __init__(self, model: PlannedGPT, labeler: labelling.Labeler, tokenizer: tiktoken.Encoding,
                 reach: int, view: str = "document"):
        self.model, self.labeler, self.tokenizer = model, labeler, tokenizer
        self.reach, self.view = reach, view
        self.tokens, self.sentences, self.documents = [], [0], [0]
        self.vectors = np.zeros((0, len(labeler.mean)), np.float32)
        self.text, self.ended = bytearray(), 0       # the open document, its last sentence's end
        self.start, self.cache, self.row = 0, Cache(), None
        self.top = (0, math.nan)             # likeliest label of the open sentence, its probability

    @torch.no_grad()
    def append(self, token: int) -> torch.Tensor:
        """Reads one token -> logits (V,) of the one after it."""
        self.tokens.append(token)
        closed = self._close_sentence()
        T = self.model.gpt.block_size
        if len(self.tokens) - self.start > T:
            self.start += max(1, T // 2)
            self.cache, closed = Cache(), True
        device = self.model.gpt.wte.weight.device
        fresh = self.cache.length == 0
        if closed or fresh:
            batch = self._window().to(device)
            plan, logits = self.model.rows(batch)
            if plan is not None:
                self.row = plan[:, -1:]                                                 # (1, 1, C)
            if self.model.planner is not None:
                p, label = logits[0, -1].softmax(-1).max(0)
                self.top = int(label), float(p)
            if fresh:
                return self.model.gpt(batch.tokens, None, plan, batch.sentence_id,
                                      self.cache)[0, -1]
        new = torch.tensor([[token]], device=device)
        return self.model.gpt(new, None, self.row, torch.zeros_like(new), self.cache)[0, -1]

    def _close_sentence(self) -> bool:
        if self.tokens[-1] == self.tokenizer.eot_token:
            self.text, self.ended = bytearray(), 0
        else:
            self.text += self.tokenizer.decode_single_token_bytes(self.tokens[-1])
            if not (ends := data.boundaries(self.text, self.ended)):
                return False
            self.ended = ends[-1]
        begun = self.sentences[-1]
        vector = self.labeler.embed(np.array(self.tokens[begun:]), np.array([0]))
        self.vectors = np.concatenate([self.vectors, vector.cpu().numpy()])
        self.sentences.append(len(self.tokens))
        if self.tokens[-1] == self.tokenizer.eot_token:
            self.documents.append(len(self.sentences) - 1)
        return True

    def _window(self) -> data.Batch:
        corpus = data.Corpus(np.array(self.tokens), np.array(self.sentences),
                             np.array(self.documents))
        return data.window_batch(corpus, np.array([self.start]), len(self.tokens) - self.start,
                                 self.vectors, None, self.reach, self.view)


def sample(logits: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """One token from logits (V,); temperature 0 takes the likeliest."""
    logits = logits.float().cpu()
    if temperature == 0:
        return int(logits.argmax())
    if top_k:
        logits[logits < logits.topk(min(top_k, len(logits))).values[-1]] = -math.inf
    return int(torch.multinomial((logits / temperature).softmax(0), 1, generator=generator))


def generate(run: Run, plan: str, prompt: str, n_tokens: int, temperature: float, top_k: int,
             seed: int):
    """Yields, for each sentence as it ends (the prompt's included), a dict with its text,
    whether the model wrote it, the label that was planned with its probability (None without a
    planner), and its own label."""
    if plan == "oracle":
        raise ValueError("plan=oracle needs the true labels, "
                         "which a text still to be written has not")
    c, model, eot = run.config, run.model(plan), run.tokenizer.eot_token
    stream = Stream(model, run.labeler, run.tokenizer, c["planner_reach"], c["planner_view"])
    generator = torch.Generator().manual_seed(seed)
    given = [eot] + run.tokenizer.encode_ordinary(prompt)
    token, planned = given[0], None
    for i in range(len(given) + n_tokens):
        before = len(stream.sentences)
        # without autocast, which would convert all weights again for each token
        logits = stream.append(token)
        last = i == len(given) + n_tokens - 1 or (i >= len(given) and token == eot)
        if len(stream.sentences) > before or last:
            ended = len(stream.sentences) > before
            begun = stream.sentences[-2] if ended else stream.sentences[-1]
            text = run.tokenizer.decode([t for t in stream.tokens[begun:] if t != eot])
            label = None
            if ended:
                label = int(run.labeler.assign(torch.as_tensor(stream.vectors[-1:]).to(run.device)))
            if text:
                yield {"text": text, "written": i >= len(given), "planned": planned, "label": label}
            planned = None if math.isnan(stream.top[1]) else stream.top
        if last:
            return
        token = given[i + 1] if i + 1 < len(given) else (
            sample(logits, temperature, top_k, generator))


# --- the report -----------------------------------------------------------------------------------

CURVES = ("loss", "lm_loss", "label_loss", "val_nll", "val_label_nats", "val_entropy")


def report_data(run: Run, corpus: data.Corpus, results: dict) -> dict:
    """What assets/report.html shows: the results, the curves, the labels, a few documents of the
    corpus with what each plan makes of them, and a text that the run itself writes."""
    shown, c, plans = example_documents(corpus, run.tokenizer), run.config, list(results["plans"])
    vectors, labels = run.sentences(shown)
    scores = {plan: run.score(plan, shown, vectors, labels) for plan in plans}
    planned = {plan: found for plan, found in scores.items() if not np.isnan(found.entropy).all()}
    decoder = codecs.getincrementaldecoder("utf-8")("replace")       # a character may span tokens
    documents = {                                    # arrays as those of Corpus and Scores
        "tokens": [decoder.decode(run.tokenizer.decode_single_token_bytes(t))
                   for t in shown.tokens.tolist()],
        "sentences": shown.sentences.tolist(), "documents": shown.documents.tolist(),
        "labels": labels.tolist(),
        "nll": {plan: found.nll.round(4).tolist() for plan, found in scores.items()},
        "top": {plan: found.top.tolist() for plan, found in planned.items()},
        "prob": {plan: found.prob.round(4).tolist() for plan, found in planned.items()}}
    sample = None
    if writers := [plan for plan in plans if plan != "oracle"]:
        opening = shown.tokens[1:shown.sentences[2]].tolist()
        prompt = run.tokenizer.decode(opening).removesuffix(data.EOT)
        sample = {"plan": writers[-1], "sentences": list(
            generate(run, writers[-1], prompt, 160, temperature=0.8, top_k=50, seed=0))}
    options = {name: value for name, value in c.items()
               if name not in ("cache_dir", "out_dir", "versions", "labels.pt")}
    return {"results": results, "config": options | {"data": Path(c["data"]).name},
            **label_map(run), "curves": read_curves(run.out_dir / "metrics.jsonl"),
            "documents": documents, "sample": sample}


def example_documents(corpus: data.Corpus, tokenizer: tiktoken.Encoding, limit: int = 12,
                      max_tokens: int = 8000) -> data.Corpus:
    """The first documents of 3 to 40 sentences
    (of any length where there are none), as a corpus."""
    sizes = np.diff(corpus.documents)                # the first is the opening <|endoftext|> alone
    fit = np.flatnonzero((sizes >= 3) & (sizes <= 40))[:limit]
    chosen = fit if len(fit) else np.arange(1, len(sizes))[:limit]
    cuts = corpus.sentences[corpus.documents]
    parts = [corpus.tokens[:1], *(corpus.tokens[cuts[d]:cuts[d + 1]] for d in chosen)]
    return data.Corpus.from_tokens(np.concatenate(parts)[:max_tokens], tokenizer)


def read_curves(path: Path, limit: int = 200) -> dict[str, dict[str, list]]:
    """metrics.jsonl as stage -> quantity -> [[step, value], ...], thinned to about `limit` points.
    Passes over a line that is cut or damaged; without a file there are no curves."""
    curves = {}
    for line in path.read_text("utf-8", "replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            entry = json.loads(line)
            for name in CURVES:
                if name in entry:
                    points = curves.setdefault(entry["stage"], {}).setdefault(name, [])
                    points.append([int(entry["step"]), round(float(entry[name]), 5)])
    return {stage: {name: points[::-1 - len(points) // limit][::-1]
                    for name, points in quantities.items()}
            for stage, quantities in curves.items()}


def label_map(run: Run) -> dict:
    """Each label's description, its place on the centroids' first two principal components,
    and the labels that most often follow it; and the share of the centroids' variance that
    those components keep."""
    centroids = run.labeler.centroids.cpu().double().numpy()                            # (K, E)
    left, singular, _ = np.linalg.svd(centroids - centroids.mean(0), full_matrices=False)
    place = np.pad(left * singular, ((0, 0), (0, 1)))[:, :2].round(4)                   # (K, 2)
    counts = run.saved_labels["transitions"][:-1].double()                              # (K, K)
    shares, follow = (counts / counts.sum(1, keepdim=True).clamp(min=1)).topk(min(3, len(counts)))
    keep = max(1, min(3, 1024 // len(counts)))       # typical sentences: the page stays below 2 MB
    found = []
    for label, described in enumerate(run.saved_labels["descriptions"]):
        following = zip(follow[label].tolist(), shares[label].tolist())
        found.append(described | {
            "sentences": described["sentences"][:keep], "place": place[label].tolist(),
            "next": [[after, round(p, 3)] for after, p in following if p > 0]})
    kept = np.square(singular[:2]).sum() / max(np.square(singular).sum(), 1e-12)
    return {"labels": found, "variance": float(kept)}


def write_report(run: Run, path: Path, corpus: data.Corpus, results: dict) -> None:
    """Fills the template's one marker.
    No text of the corpus can end the element that holds the data."""
    content = json.dumps(report_data(run, corpus, results))
    content = json.loads(content, parse_constant=lambda name: None)             # JSON has no NaN
    content = json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    template = (Path(__file__).parent / "assets" / "report.html").read_text("utf-8")
    with data.replacing(path.resolve()) as working:  # a link stays one
        working.write_text(template.replace("__REPORT_DATA__", content), "utf-8")


# --- command line ---------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse that answers a mistake with one line, naming the nearest option."""

    def __init__(self, **arguments):
        super().__init__(allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **arguments)

    def error(self, message):
        if message.startswith("unrecognized arguments:"):
            given = message.split(": ", 1)[1].split()[0]
            names = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(given.split("=")[0], names, 1, 0.5)
            message = f"unknown option {given}" + (
                f": did you mean {near[0]}?" if near else ": see --help")
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def one_line_errors(program: str):
    """Bad input ends with one line and exit code 2;
    a traceback is for bugs alone (or for NANOPLAN_DEBUG=1)."""
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("NANOPLAN_DEBUG"):
            raise
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def parse_arguments(argv=None):
    """The options of the command line; a mistake ends with one line and exit code 2."""
    parser = Parser(prog="eval.py", description=__doc__)
    add = parser.add_argument
    add("--out_dir", type=Path, default=Path("out"), help="a run of train.py")
    add("--split", choices=data.SPLITS, default="val", help="what to evaluate on")
    add("--text", type=Path, help="evaluate on this UTF-8 text instead: documents are separated by "
                                  "a line <|endoftext|>; a .jsonl has one {\"text\": ...} a line")
    add("--score", type=Path, help="write one JSON line a token of this text")
    add("--prompt", help="continue this text")
    add("--report", type=Path, help="write one self-contained page")
    add("--plan", choices=PLANS, default="soft", help="of --score and --prompt")
    add("--max_tokens", type=int, default=200, help="of --prompt: how many to write at most")
    add("--temperature", type=float, default=0.8, help="of --prompt: 0 takes the likeliest token")
    add("--top_k", type=int, default=50, help="of --prompt: sample among so many; 0 is all")
    add("--seed", type=int, default=0, help="of --prompt")
    add("--device", default="", help="auto, cuda, mps or cpu; as in training unless given")
    args = parser.parse_args(argv)
    if args.max_tokens < 1 or args.temperature < 0 or args.top_k < 0:
        parser.error("max_tokens must be at least 1, temperature and top_k at least 0")
    return args


def print_generated(run: Run, args) -> None:
    """Prints each sentence with its label and the planned one; `>` marks what the model wrote."""
    described = run.saved_labels["descriptions"]
    name = lambda label: f"{label} ({', '.join(described[label]['words'][:4])})"
    for sentence in generate(run, args.plan, args.prompt, args.max_tokens, args.temperature,
                             args.top_k, args.seed):
        planned = "" if sentence["planned"] is None else (
            f"  planned {name(sentence['planned'][0])} at {sentence['planned'][1]:.0%}")
        got = "not ended" if sentence["label"] is None else f"got {name(sentence['label'])}"
        mark = ">" if sentence["written"] else " "
        print(f"{mark} {sentence['text'].rstrip()}\n    [{got}{planned}]")


def main(argv=None):
    args = parse_arguments(argv)
    with one_line_errors("eval.py"):
        run = Run.open(args.out_dir, args.device)
        if args.score:
            return score_file(run, args.plan, args.score)
        if args.prompt is not None:
            return print_generated(run, args)
        if args.report:                              # where it can't be written, say so first
            if args.report.exists() and not args.report.is_file():
                raise ValueError(f"report={args.report} is not a file: choose another name")
            args.report.open("a").close()
        if args.text:
            if not args.text.is_file():
                raise FileNotFoundError(f"text={args.text} is not a file")
            texts = [t for t in data.read_documents(args.text) if t.strip()]
            corpus = data.Corpus.from_texts(texts, run.tokenizer)
            check_text(corpus, args.text)
            results = evaluate(run, corpus, sum(len(t.encode()) for t in texts))
        else:
            corpus = run.corpus(args.split)
            results = evaluate(run, corpus, run.bytes, args.split)
        write_json(args.out_dir / "eval.json", results)
        print(table(results))
        if args.report:
            write_report(run, args.report, corpus, results)


if __name__ == "__main__":
    main()
