"""Writes OUT_DIR/report.html, one page about a run: python assets/report.py --out_dir=out"""
import codecs
import contextlib
import json
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

import data
from eval import Parser, Run, evaluate, generate, one_line_errors
from model import NO_PLANNER


def write_report(run: Run, split: str) -> None:
    """Fills the page's marker. Raises OSError where it can't be written."""
    text = json.dumps(report_data(run, split), ensure_ascii=False, allow_nan=False)
    text = text.replace("<", "\\u003c")     # so no text can end the element that holds it
    page = (ROOT / "assets" / "report.html").read_text("utf-8")
    with data.replacing(run.out / "report.html") as working:
        working.write_text(page.replace("__REPORT_DATA__", text), "utf-8")


def report_data(run: Run, split: str) -> dict:
    """What the page shows; the last section is a text that the run writes itself."""
    results = evaluate(run, run.corpus(split), run.store().bytes[split], split)
    shown = run.label(example_documents(run.corpus(split), run.tokenizer))
    sample, writers = None, [plan for plan in results["plans"] if plan != "oracle"]
    if writers:
        writer = "soft" if "soft" in writers else writers[-1]
        prompt = run.tokenizer.decode(shown.tokens[1:shown.sentences[2]].tolist())
        prompt = prompt.removesuffix(data.EOT)
        written = generate(run, writer, prompt, 160, temperature=0.7, seed=0)
        sample = {"plan": writer, "sentences": list(written)}
    options = vars(run.config) | {"data": Path(run.config.data).name}
    for name in ("cache_dir", "out_dir", "start", "resume", "versions"):
        del options[name]
    return {"results": results, "config": options, **label_map(run), "sample": sample,
            "curves": read_curves(run.out / "metrics.jsonl"),
            "documents": scored(run, shown, results["plans"])}


def scored(run: Run, corpus: data.Corpus, plans) -> dict:
    """A corpus and what each plan makes of it, in arrays as those of Corpus and Scores."""
    scores = {plan: run.score(run.model(plan), corpus) for plan in plans}
    planned = {}                                        # the three likeliest labels (n+1, 3)
    for plan in [plan for plan in plans if plan not in NO_PLANNER]:
        probs = torch.from_numpy(scores[plan].label_log_probs).exp().nan_to_num()
        planned[plan] = probs.sort(dim=1, descending=True, stable=True)     # ties as argmax
    decoder = codecs.getincrementaldecoder("utf-8")("replace")      # a character may span tokens
    tokens = map(run.tokenizer.decode_single_token_bytes, corpus.tokens.tolist())
    return {"tokens": [decoder.decode(token) for token in tokens],
            "sentences": corpus.sentences.tolist(), "documents": corpus.documents.tolist(),
            "labels": corpus.labels.tolist(),
            "nll": {plan: x.nll.round(4).tolist() for plan, x in scores.items()},
            "top": {plan: top.indices[:, :3].tolist() for plan, top in planned.items()},
            "prob": {plan: top.values[:, :3].tolist() for plan, top in planned.items()}}


def example_documents(corpus: data.Corpus, tokenizer) -> data.Corpus:
    """The first documents of 10 to 40 sentences (of any length where there are none)."""
    sizes = np.diff(corpus.documents)                   # the first is the opening <|endoftext|>
    fit = np.flatnonzero((sizes >= 10) & (sizes <= 40))
    chosen = fit if len(fit) else np.arange(1, len(sizes))
    cuts = corpus.sentences[corpus.documents]
    parts = [corpus.tokens[:1], *(corpus.tokens[cuts[d]:cuts[d + 1]] for d in chosen[:12])]
    return data.Corpus.from_tokens(np.concatenate(parts)[:8000], tokenizer)


def read_curves(path: Path, limit: int = 200) -> dict[str, dict[str, list]]:
    """stage -> quantity -> at most `limit` of its [step, value]; a step's last line counts."""
    curves = {}
    for line in path.read_text("utf-8", "replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):  # damaged
            entry = json.loads(line)
            for name in ("loss", "val_nll", "val_label_nats"):
                if math.isfinite(entry.get(name, math.nan)):
                    values = curves.setdefault(entry["stage"], {}).setdefault(name, {})
                    values[entry["step"]] = round(entry[name], 5)
    return {stage: {name: sorted(values.items())[::-1 - len(values) // limit][::-1]
                    for name, values in lines.items()} for stage, lines in curves.items()}


def label_map(run: Run) -> dict:
    """Each label, its place on the centroids' first two principal components, what follows it."""
    centroids = run.labeler.centroids.cpu().double().numpy()                # (K, E)
    left, singular, _ = np.linalg.svd(centroids - centroids.mean(0), full_matrices=False)
    place = np.pad(left * singular, ((0, 0), (0, 1)))[:, :2].round(4)       # (K, 2)
    bigram = run.saved_labels["bigram"][:-2].exp()                          # (K, K)
    shares, follow = bigram.topk(min(3, len(bigram)))
    near = torch.cdist(run.labeler.centroids, run.labeler.centroids).argsort()[:, 1:6]      # (K, 5)
    labels = [description | {"place": place[i].tolist(), "near": near[i].tolist(),
                             "next": list(zip(follow[i].tolist(), shares[i].tolist()))}
              for i, description in enumerate(run.saved_labels["descriptions"])]
    kept = np.square(singular[:2]).sum() / max(np.square(singular).sum(), 1e-12)
    return {"labels": labels, "variance": float(kept)}


def main(argv=None):
    parser = Parser(prog="report.py", description=__doc__)
    parser.add_argument("--out_dir", type=Path, default=Path("out"), help="a run of train.py")
    parser.add_argument("--split", choices=data.SPLITS, default="val", help="what to show")
    parser.add_argument("--device", default="", help="as in training unless given")
    args = parser.parse_args(argv)
    with one_line_errors("report.py"):
        write_report(Run.open(args.out_dir, args.device), args.split)


if __name__ == "__main__":
    main()
