"""Evaluate a run of train.py, score any text, or generate with the plan of each sentence.

Perplexity is computed in windows that advance by half a window, and each token is scored once. Only
the first window scores tokens that have less than half a window before them. Windows are never
shifted back at the end, so a prefix of a text scores the same as within the longer text.
"""
import argparse
import contextlib
import json
import math
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

import data
from data import Corpus, InputError
from labels import Labeler, label_before
from model import PLANS
from planner import build_model


# --- perplexity -----------------------------------------------------------------------------------
def window_starts(n_tokens, block_size, stride=None):
    """Where windows start so that every token but the first is a target.

    They advance by `stride` tokens: half a window unless told otherwise.
    """
    stride = stride or max(1, block_size // 2)
    context = block_size - stride
    # Every window after the first starts early enough to have a new token to score.
    return np.arange(0, max(1, n_tokens - 1 - context), stride)


@torch.no_grad()
def score(
    model,
    corpus,
    autocast=contextlib.nullcontext(),
    max_tokens=math.inf,
    batch_size=None,
    stride=None,
):
    """Score tokens 1 to max_tokens - 1; by default, all but the first.

    Returns the nll in nats (N-1,) and, for each sentence up to the last one scored, the planner's
    log probabilities of its label (n, K), before it begins: NaN if its first token is not scored,
    None without a planner. Leaves the model and the random state as they were.
    """
    T = model.gpt.block_size
    N = min(len(corpus.tokens), max_tokens)
    device = model.gpt.wte.weight.device
    # A token that no window scores would make every figure NaN.
    nll = np.full(N - 1, np.nan)
    label_log_probs = None
    if model.planner is not None:
        n_scored = int(corpus.sentence_of(N - 1)) + 1
        shape = (n_scored, len(model.gpt.label_emb))
        label_log_probs = np.full(shape, np.nan, np.float32)                # (n, K)

    starts = window_starts(N, T, stride)
    # A window scores the targets that lie after those of the window before it.
    first_new = np.append(1, starts[:-1] + T + 1)
    batch_size = batch_size or max(1, 8192 // T)
    was_training = model.training
    model.eval()
    for i in range(0, len(starts), batch_size):
        rows = slice(i, i + batch_size)
        batch = model.batch(corpus, starts[rows])
        with autocast:
            token_nll, label_logits = model(batch.to(device))               # (B, T), (B, S, K)
        targets = starts[rows, None] + 1 + np.arange(T)                     # (B, T) positions
        is_new = (targets >= first_new[rows, None]) & (targets < N)
        nll[targets[is_new] - 1] = token_nll.cpu().numpy()[is_new]
        if model.planner is not None:
            # A label prediction is taken from the window that scores the sentence's first token.
            sentence = corpus.sentence_of(targets)                          # (B, T)
            opens = is_new & (corpus.sentences[sentence] == targets)
            row, t = np.nonzero(opens)
            slot = batch.sentence_id[row, t]
            log_probs = label_logits[row, slot].float().log_softmax(-1)     # (m, K)
            label_log_probs[sentence[opens]] = log_probs.cpu()
    model.train(was_training)
    return nll, label_log_probs


def summary(nll, label_log_probs, corpus):
    """The figures of one plan, from the results of `score`."""
    mean = float(nll.mean())
    figures = {
        "nll": mean,                                            # nats per token
        "ppl": math.exp(min(mean, 700)),                        # exp(710) overflows
        "planner_ce": None,                                     # nats per label
        "planner_acc": None,                                    # top-1
    }
    if label_log_probs is not None:
        # The last sentence may be unfinished; then it has no label.
        log_probs = label_log_probs[:corpus.n_sentences]                    # (n, K)
        predicted = np.flatnonzero(~np.isnan(log_probs[:, 0]))              # (m,)
        log_probs = log_probs[predicted]                                    # (m, K)
        labels = corpus.labels[predicted]                                   # (m,)
        true_log_probs = log_probs[np.arange(len(labels)), labels]
        figures["planner_ce"] = -float(true_log_probs.mean(dtype=np.float64))
        figures["planner_acc"] = float((log_probs.argmax(1) == labels).mean())
    return figures


def bits_per_byte(nll, n_bytes):
    """The cost of a text of n_bytes in UTF-8, which does not depend on the tokenizer."""
    return float(nll.sum()) / math.log(2) / n_bytes


def count_bytes(corpus, tokenizer):
    """The number of bytes of a corpus's text in UTF-8."""
    is_text = corpus.tokens != tokenizer.eot_token
    return len(tokenizer.decode_bytes(corpus.tokens[is_text].tolist()))


def evaluate(run, corpus, split):
    """The content of results.json and eval.json: every finished plan on a labelled corpus."""
    n_bytes = count_bytes(corpus, run.tokenizer)
    plans = {}
    for plan in tqdm(run.plans(), "evaluate", leave=False):
        nll, label_log_probs = score(run.model(plan), corpus, run.autocast)
        plans[plan] = summary(nll, label_log_probs, corpus)
        plans[plan]["bits_per_byte"] = bits_per_byte(nll, n_bytes)
    # What a label costs without a planner: by its frequency, and by the label before it.
    before = label_before(corpus, run.bigram.shape[1])
    return {
        "plans": plans,
        "tokens": len(corpus.tokens) - 1,
        "bytes": n_bytes,
        "sentences": corpus.n_sentences,
        "split": split,
        "unigram_ce": -float(run.bigram[-1, corpus.labels].mean()),
        "bigram_ce": -float(run.bigram[before, corpus.labels].mean()),
        "seed": run.config.seed,
        "fingerprint": run.config.fingerprint,
        "versions": versions(),
    }


def table(results):
    """The results as the lines that train.py and eval.py print."""
    lines = [
        "{split}: {tokens:,} tokens, {bytes:,} bytes, {sentences:,} sentences",
        "plan              perplexity   vs none  bits/byte  label nats   top-1",
    ]
    none = results["plans"].get("none")
    for plan, figures in results["plans"].items():
        change = f"{figures['ppl'] / none['ppl'] - 1:+.2%}" if none else ""
        line = "{:<17}{ppl:11.3f}{:>10}{bits_per_byte:11.4f}"
        if figures["planner_ce"] is not None:
            line += "{planner_ce:12.3f}{planner_acc:8.1%}"
        lines.append(line.format(plan, change, **figures))
    lines.append("label nats without a planner: {unigram_ce:.3f} from label frequencies, "
                 "{bigram_ce:.3f} from the label before")
    return "\n".join(lines).format(**results)


def print_scores(run, plan, path):
    """Print one JSON line for each token of a text."""
    model = run.model(plan)
    corpus = run.read_text(path)
    nll, label_log_probs = score(model, corpus, run.autocast)
    for i, token in enumerate(corpus.tokens[1:].tolist()):
        # A token may be part of a character, so its bytes are printed too.
        raw = run.tokenizer.decode_single_token_bytes(token)
        j = int(corpus.sentence_of(i + 1))
        line = {
            "token": raw.decode("utf-8", "replace"),
            "hex": raw.hex(),
            "nll": nll[i],
            "sentence": j,
            "planned": None,
        }
        if label_log_probs is not None:
            line["planned"] = int(label_log_probs[j].argmax())
        print(json.dumps(line))


# --- generation -----------------------------------------------------------------------------------
@torch.no_grad()
def next_logits(run, model, tokens, n_prompt=0, label=None):
    """The logits (V,) of the token after `tokens`, using the same window as `score`.

    With a label, every sentence that goes on after the first n_prompt tokens is planned with it.
    Recomputes sentences and labels for every new token: slow but simple, and correct because
    nothing looks ahead.
    """
    corpus = run.labeler.label(Corpus.from_tokens(np.array(tokens), run.tokenizer))
    start = window_starts(len(tokens) + 1, model.gpt.block_size)[-1]
    batch = model.batch(corpus, np.array([start])).to(run.device)
    with run.autocast:
        plan_vectors, _ = model.plan_vectors(batch)                         # (1, S, C)
        if label is not None:
            first_written = batch.sentence_id[0, max(0, n_prompt - 1 - start)]
            plan_vectors[:, first_written:] = model.gpt.label_emb[label]
        logits = model.gpt(batch.tokens, None, plan_vectors, batch.sentence_id)
    # What comes after this position is padding.
    return logits[0, len(tokens) - 1 - start].float().cpu()


def generate(
    run,
    plan,
    prompt,
    n_tokens=200,
    temperature=0.7,
    seed=0,
    label=None,
):
    """Continue a prompt, up to n_tokens tokens or the end of the document.

    Returns for each sentence {"text", "written": whether the model wrote some of it, "planned": the
    label planned for it, "prob": the planner's probability of that, "label": its own label};
    missing values are None. With a label, it is the plan of every sentence written. Raises
    InputError if the plan and the label don't go together.
    """
    n_labels = run.config.n_labels
    if label is None:
        if plan == "oracle":
            raise InputError("plan=oracle needs --label=K: a text yet to be written has no labels")
    elif plan == "none" or not 0 <= label < n_labels:
        raise InputError(f"label={label}: must lie between 0 and {n_labels - 1}, and plan=none "
                         "takes no label")
    model = run.model(plan).eval()
    tokens = [run.tokenizer.eot_token, *run.tokenizer.encode_ordinary(prompt)]
    n_prompt = len(tokens)
    # The CPU's generator gives the same draws on every device.
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n_tokens):
        logits = next_logits(run, model, tokens, n_prompt, label)           # (V,)
        # At a temperature of 0 the likeliest token gets everything.
        probs = (logits / max(temperature, 1e-6)).softmax(0)
        tokens.append(torch.multinomial(probs, 1, generator=generator).item())
        if tokens[-1] == run.tokenizer.eot_token:
            break
    return describe_sentences(run, model, tokens, n_prompt, label)


def describe_sentences(run, model, tokens, n_prompt, label):
    """The sentences of a text whose tokens after the first n_prompt were generated."""
    # One pass over the whole text finds what was planned: no plan depends on later tokens.
    corpus = run.labeler.label(Corpus.from_tokens(np.array(tokens), run.tokenizer))
    _, label_log_probs = score(model, corpus, run.autocast)
    sentences = []
    end = 0
    for j, part in enumerate(np.split(corpus.tokens, corpus.sentences[1:])):
        end += len(part)
        text = run.tokenizer.decode(part.tolist()).removesuffix(data.EOT)
        if not text:
            continue
        sentence = dict(text=text, written=end > n_prompt, planned=None, prob=None, label=None)
        if label is not None and sentence["written"]:
            sentence["planned"] = label
        elif label_log_probs is not None:
            sentence["planned"] = int(label_log_probs[j].argmax())
            sentence["prob"] = math.exp(label_log_probs[j].max())
        # The last sentence is unfinished, so it has no label.
        if j < corpus.n_sentences:
            sentence["label"] = int(corpus.labels[j])
        sentences.append(sentence)
    return sentences


def follow(run, plan, prompts, labels, n_tokens=60, seed=0):
    """How often the GPT follows a plan given by hand: each prompt is continued under its label.

    Of the finished sentences written under a label, the share that has it; and, averaged over the
    same sentences, how frequent the label is among the training sentences.
    """
    followed = []
    expected = []
    for prompt, label in zip(prompts, labels):
        for sentence in generate(run, plan, prompt, n_tokens, seed=seed, label=label):
            if sentence["written"] and sentence["label"] is not None:
                followed.append(sentence["label"] == label)
                expected.append(math.exp(run.bigram[-1, label]))
    return float(np.mean(followed)), float(np.mean(expected))


def print_generated(run, sentences):
    """Print each sentence and its labels; `>` marks what the model wrote."""
    names = []
    for label, description in enumerate(run.descriptions):
        names.append(f"{label} ({', '.join(description['words'][:4])})")
    for sentence in sentences:
        mark = ">" if sentence["written"] else " "
        note = "not finished"
        if sentence["label"] is not None:
            note = f"label {names[sentence['label']]}"
        if sentence["prob"] is not None:
            note += f"; planned {names[sentence['planned']]} at {sentence['prob']:.0%}"
        elif sentence["planned"] is not None:
            note += f"; asked for {names[sentence['planned']]}"
        print(f"{mark} {sentence['text'].rstrip()}\n    [{note}]")


# --- runs and machines ----------------------------------------------------------------------------
@dataclass
class Run:
    """A run of train.py whose labels are made."""
    out_dir: Path
    config: SimpleNamespace                 # the options of train.Config, and the fingerprint
    device: torch.device
    autocast: contextlib.AbstractContextManager
    tokenizer: tiktoken.Encoding
    labeler: Labeler
    bigram: torch.Tensor                    # (K+2, K), see labels.label_bigram
    descriptions: list[dict]                # of each label, see labels.describe

    def plans(self):
        """The plans whose joint stage is finished. Raises InputError if none is."""
        finished = [plan for plan in PLANS if (self.out_dir / f"joint_{plan}.pt").exists()]
        if not finished:
            raise InputError(f"{self.out_dir} has no finished plan yet: run its train.py command "
                             "again to continue")
        return finished

    def model(self, plan):
        """The trained model of a plan. Raises InputError if its training is not finished."""
        model = build_model(self.config, plan, self.tokenizer.n_vocab)
        data.load_weights(model, self.out_dir / f"joint_{plan}.pt")
        return model.to(self.device)

    def split(self, name):
        """A labelled split of the run's corpus. Raises InputError if it changed."""
        c = self.config
        store = data.prepare(c.data, c.tokenizer, c.vocab_size, Path(c.cache_dir))
        if store.fingerprint != c.fingerprint:
            raise InputError(f"data={c.data} has changed since {self.out_dir} was trained on it")
        return self.labeler.label(store.split(name))

    def read_text(self, path):
        """A file's text as a labelled corpus. Raises InputError if it has none."""
        texts = list(data.read_documents(path))
        if not texts:
            raise InputError(f"{path} contains no text")
        return self.labeler.label(Corpus.from_texts(texts, self.tokenizer))


def load_run(out_dir, device=""):
    """Open a run, with its own option `device` unless another one is given.

    Raises InputError if there is none or its labels are not made yet.
    """
    config = SimpleNamespace(**data.read_json(out_dir / "config.json"))
    device = choose_device(device or config.device)
    autocast = choose_autocast(config.dtype, device)
    tokenizer = data.load_tokenizer(out_dir / "tokenizer.json")
    labeler = Labeler(tokenizer.n_vocab, config.n_embd, config.n_labels).to(device)
    saved = data.load_weights(labeler, out_dir / "labels.pt")
    return Run(
        out_dir,
        config,
        device,
        autocast,
        tokenizer,
        labeler,
        saved["bigram"],
        saved["descriptions"],
    )


def choose_device(name):
    """`auto` is cuda, else mps, else cpu. Raises InputError for a device that isn't there."""
    if name == "auto":
        # torch.accelerator would name what this build of torch supports, not what is there.
        name = "cpu"
        if torch.backends.mps.is_available():
            name = "mps"
        if torch.cuda.is_available():
            name = "cuda"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise InputError(f"device={name} is not available here: choose auto") from None


def choose_autocast(dtype, device):
    """A context that computes in bfloat16, or one that does nothing.

    auto: bfloat16 if this hardware is fast at it.
    """
    is_fast = False
    if device.type == "cuda":
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # Intel's CPUs need AMX: their avx512_bf16 is slow.
        flags = torch.cpu.get_capabilities()
        is_intel = "Intel" in flags.get("cpu_name", "")
        x86_flag = "amx_bf16" if is_intel else "avx512_bf16"
        is_fast = flags.get(x86_flag) or flags.get("bf16")
    if dtype == "bfloat16" or (dtype == "auto" and is_fast):
        # With its cache of weights, the chunks of GPT.loss would sum their gradients in bfloat16.
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
    return contextlib.nullcontext()


def versions():
    """The versions of Python and of the packages that compute a run's figures."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "tiktoken": tiktoken.__version__,
    }


# --- command line ---------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    """Raises InputError for a wrong command line, where argparse would print its usage first."""

    def error(self, message):
        raise InputError(f"{message}; --help lists all options")


@contextlib.contextmanager
def exits_on_input_error():
    """Decorates a main function: it ends a user error with one line and exit code 2."""
    try:
        yield
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)


@exits_on_input_error()
def main(argv=None):
    parser = Parser("eval.py", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--out_dir", type=Path, default=Path("out"), help="a run of train.py [out]")
    add("--split", choices=data.SPLITS, default="val", help="evaluate on this split [val]")
    add("--text", type=Path, help="evaluate on this .txt or .jsonl file instead")
    add("--score", type=Path, help="print one JSON line for each token of this file")
    add("--prompt", help="continue this text")
    add("--plan", choices=PLANS, default="soft", help="for --score and --prompt [soft]")
    add("--label", type=int, help="for --prompt: use this label as the plan of what is written")
    add("--max_tokens", type=int, default=200, help="for --prompt: write at most this many [200]")
    add("--temperature", type=float, default=0.7, help="for --prompt; 0: the likeliest token [0.7]")
    add("--seed", type=int, default=0, help="for --prompt [0]")
    add("--device", default="", help="auto, cuda, mps or cpu [the run's own option]")
    c = parser.parse_args(argv)
    # Written this way because a NaN compares as false.
    if not c.temperature >= 0:
        raise InputError(f"temperature={c.temperature}: must be at least 0")

    run = load_run(c.out_dir, c.device)
    if c.score:
        print_scores(run, c.plan, c.score)
    elif c.prompt is not None:
        sentences = generate(run, c.plan, c.prompt, c.max_tokens, c.temperature, c.seed, c.label)
        print_generated(run, sentences)
    else:
        # If no plan is finished, this says so before a corpus is prepared.
        run.plans()
        if c.text:
            results = evaluate(run, run.read_text(c.text), "text")
        else:
            results = evaluate(run, run.split(c.split), c.split)
        data.write_json(c.out_dir / "eval.json", results)
        print(table(results))


if __name__ == "__main__":
    main()
