"""Write OUT_DIR/report.html, one page about a run: python assets/report.py --out_dir=out"""
import codecs
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data
from data import Corpus
from eval import Parser, evaluate, exits_on_input_error, generate, load_run, score


def write_report(run, split):
    """Fill in the page's data and write it to out_dir. Returns its path."""
    text = json.dumps(report_data(run, split), ensure_ascii=False, allow_nan=False)
    # No text of the corpus can end the element that holds it.
    text = text.replace("<", "\\u003c")
    page = (ROOT / "assets" / "report.html").read_text("utf-8")
    path = run.out_dir / "report.html"
    with data.replacing(path) as working:
        working.write_text(page.replace("__REPORT_DATA__", text), "utf-8")
    return path


def report_data(run, split):
    """All that the page shows."""
    corpus = run.split(split)
    results = evaluate(run, corpus, split)
    examples = run.labeler.label(example_documents(corpus, run.tokenizer))
    labels, variance = label_map(run)
    options = vars(run.config) | {"data": Path(run.config.data).name}
    for name in ("cache_dir", "out_dir"):
        del options[name]
    return {
        "results": results,
        "config": options,
        "labels": labels,
        "variance": variance,
        "documents": scored(run, examples, results["plans"]),
        "sample": sample(run, examples, results["plans"]),
        "curves": read_curves(run.out_dir / "metrics.jsonl"),
    }


def example_documents(corpus, tokenizer):
    """The first twelve documents of 10 to 40 sentences, or of any length if there are none."""
    sizes = np.diff(corpus.documents)
    # Document 0 is the opening <|endoftext|> alone.
    chosen = np.flatnonzero((sizes >= 10) & (sizes <= 40))
    if len(chosen) == 0:
        chosen = np.arange(1, len(sizes))
    cuts = corpus.sentences[corpus.documents]
    parts = [corpus.tokens[:1]]
    for d in chosen[:12]:
        parts.append(corpus.tokens[cuts[d]:cuts[d + 1]])
    return Corpus.from_tokens(np.concatenate(parts)[:8000], tokenizer)


def scored(run, corpus, plans):
    """The tokens, sentences and documents of a corpus, and what each plan makes of them.

    top and prob: the three likeliest labels of each sentence and their probabilities.
    """
    # A character may span several tokens; it is shown with the last of them.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = []
    for token in corpus.tokens.tolist():
        raw = run.tokenizer.decode_single_token_bytes(token)
        texts.append(decoder.decode(raw))
    nll = {}
    top = {}
    prob = {}
    for plan in plans:
        token_nll, label_log_probs = score(run.model(plan), corpus, run.autocast)
        nll[plan] = token_nll.round(4).tolist()                             # (N-1,)
        if label_log_probs is not None:
            # A stable sort takes the same one of two equal labels as argmax.
            order = (-label_log_probs).argsort(1, kind="stable")[:, :3]     # (n, 3)
            log_probs = np.take_along_axis(label_log_probs, order, 1)
            top[plan] = order.tolist()
            prob[plan] = np.nan_to_num(np.exp(log_probs)).tolist()
    return {
        "tokens": texts,
        "sentences": corpus.sentences.tolist(),
        "documents": corpus.documents.tolist(),
        "labels": corpus.labels.tolist(),
        "nll": nll,
        "top": top,
        "prob": prob,
    }


def sample(run, corpus, plans):
    """The first sentence of a corpus, continued by the run itself; None if only oracle is there."""
    writers = [plan for plan in plans if plan != "oracle"]
    if not writers:
        return None
    plan = "soft" if "soft" in writers else writers[-1]
    # Sentence 0 is the opening <|endoftext|>.
    tokens = corpus.tokens[corpus.sentences[1]:corpus.sentences[2]]
    prompt = run.tokenizer.decode(tokens.tolist()).removesuffix(data.EOT)
    return {"plan": plan, "sentences": generate(run, plan, prompt, n_tokens=160)}


def label_map(run):
    """What the page says about each label, and the share of variance that the map of them keeps."""
    centroids = run.labeler.centroids.cpu().double()                        # (K, E)
    # The map: the first two principal components. A single label has only one.
    centered = centroids - centroids.mean(0)
    left, singular, _ = torch.linalg.svd(centered, full_matrices=False)
    places = np.pad(left * singular, ((0, 0), (0, 1)))[:, :2].round(4)      # (K, 2)
    squares = singular.square()
    kept = squares[:2].sum() / squares.sum().clamp(min=1e-12)
    # The five nearest labels, without the label itself.
    distances = torch.cdist(centroids, centroids).fill_diagonal_(-1)        # (K, K)
    near = distances.argsort()[:, 1:6]                                      # (K, 5)
    # The three labels that follow most often, and how often they do.
    after = run.bigram[:-2].exp()                                           # (K, K)
    shares, following = after.topk(min(3, len(after)))                      # (K, 3)
    labels = []
    for k, description in enumerate(run.descriptions):
        labels.append(description | {
            "place": places[k].tolist(),
            "near": near[k].tolist(),
            "next": list(zip(following[k].tolist(), shares[k].tolist())),
        })
    return labels, kept.item()


def read_curves(path, limit=200):
    """stage -> quantity -> at most `limit` of its [step, value], from the lines of train.py."""
    if not path.exists():
        return {}
    curves = {}
    lowest = {}
    # Backwards: if a stage went back to an earlier step, its lines before that don't count.
    for line in reversed(path.read_text("utf-8").splitlines()):
        try:
            entry = json.loads(line)
        except ValueError:
            # A crash can leave half a line.
            continue
        stage = entry["stage"]
        step = entry["step"]
        if step >= lowest.get(stage, math.inf):
            continue
        lowest[stage] = step
        quantities = curves.setdefault(stage, {})
        for name in ("loss", "val_nll", "val_label_nats"):
            # Without a planner, val_label_nats is None.
            if entry.get(name) is not None:
                quantities.setdefault(name, []).append([step, round(entry[name], 5)])
    for quantities in curves.values():
        for name, points in quantities.items():
            every = 1 + len(points) // limit
            quantities[name] = points[::every][::-1]
    return curves


@exits_on_input_error()
def main(argv=None):
    parser = Parser("report.py", description=__doc__)
    add = parser.add_argument
    add("--out_dir", type=Path, default=Path("out"), help="a run of train.py [out]")
    add("--split", choices=data.SPLITS, default="val", help="what to show [val]")
    add("--device", default="", help="auto, cuda, mps or cpu [the run's own option]")
    arguments = parser.parse_args(argv)
    run = load_run(arguments.out_dir, arguments.device)
    path = write_report(run, arguments.split)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
