"""Make the evidence of results/README.md: train, score on the test split, write the tables.

    python results/run.py                    # all parts, seed by seed; again: it goes on
    python results/run.py claims --seed=6    # one seed of one part
    python results/run.py --table            # write the tables into results/README.md

Runs lie in cache/results, and a stage that several of them share is trained once. results/PART.json
holds an entry for each seed. The part `wikipedia` needs WIKIPEDIA=PATH in the environment.
"""
import argparse
import math
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

import data
import train
from eval import bits_per_byte, count_bytes, follow, load_run, score, summary, versions
from labels import label_before
from model import PLANS

WORK = ROOT / "cache" / "results"
C = train.Config()
# Seconds of a step of `soft`, and of stages labels and planner, in steps of `none`
# (tests/bench.py default; the last line of train.py).
SOFT_STEP = 1.12
OTHER_STAGES = 145


@dataclass
class Part:
    """Runs that are made with each of some seeds."""
    seeds: tuple
    variants: dict[str, str]                # name -> options of train.py
    strides: tuple = (1/2,)                 # of the windows that score, in windows
    follows: bool = False


def longer(factor, plans):
    """Options that train stages lm and joint for `factor` times as many steps."""
    joint_steps = round(factor * C.joint_steps)
    return f"--lm_steps={round(factor * C.lm_steps)} --joint_steps={joint_steps} --plans={plans}"


def as_long(factor=1, more=0):
    """Options for `none` with the seconds of stage joint that `soft` takes."""
    steps = round(factor * C.joint_steps * SOFT_STEP) + more
    return f"--lm_steps={round(factor * C.lm_steps)} --joint_steps={steps} --plans=none"


def window(block_size, more):
    """Options for longer windows, with as many tokens in a step."""
    batch_size = C.batch_size * C.block_size // block_size
    return f"--block_size={block_size} --batch_size={batch_size} {more}"


FIVE = (6, 7, 8, 9, 10)
THREE = (6, 7, 8)
EQUAL = "--planner_view=equal"
# Window -> where its runs are.
WINDOWS = {
    64: {"none": "claims::none", "document": "claims::soft", "equal": "view::soft"},
    128: {"none": "window_128::none", "document": "window_128::soft",
          "equal": "window_128:equal:soft"},
    256: {"none": "window_256::none", "document": "window_256::soft",
          "equal": "window_256:equal:soft"},
}
PARTS = {
    "claims": Part(FIVE, {
        "": "--plans=all",
        "as long": as_long(),
        "as long as all stages": as_long(more=OTHER_STAGES),
    }, strides=(1, 1/2, 1/8)),
    "view": Part(FIVE, {"": f"--plans=hard,soft {EQUAL}"}, strides=(1, 1/2, 1/8)),
    "longer_4": Part(THREE, {
        "": longer(4, "none,soft"),
        "as long": as_long(4),
        "equal": f"{longer(4, 'soft')} {EQUAL}",
    }),
    "longer_16": Part(THREE, {
        "": longer(16, "none,soft"),
        "as long": as_long(16),
        "equal": f"{longer(16, 'soft')} {EQUAL}",
    }),
    "follow": Part(THREE, {"": "--plans=hard,soft,oracle"}, follows=True),
    "window_128": Part(THREE, {
        "": window(128, "--plans=none,hard,soft"),
        "equal": window(128, f"--plans=soft {EQUAL}"),
    }, strides=(1, 1/2)),
    "window_256": Part(THREE, {
        "": window(256, "--plans=none,hard,soft"),
        "equal": window(256, f"--plans=soft {EQUAL}"),
    }, strides=(1, 1/2)),
    "wikipedia": Part(THREE, {
        "": "--plans=none,previous,hard,soft_frozen,soft,oracle",
        "equal": f"--plans=soft {EQUAL}",
    }),
}


# --- making the runs ------------------------------------------------------------------------------
def make_seed(name, seed):
    """Train and score all variants of a part with one seed -> its entry in results/NAME.json."""
    part = PARTS[name]
    variants = {}
    for variant, text in part.variants.items():
        out = WORK / f"{name}-{seed}-{variant}".replace(" ", "_")
        argv = [*text.split(), f"--seed={seed}", f"--cache_dir={ROOT / 'cache'}"]
        if name == "wikipedia":
            argv.append(f"--data={every_fourth(Path(os.environ['WIKIPEDIA']))}")
        share_stages(out, train.parse_config(argv))
        command = [sys.executable, "train.py", *argv, f"--out_dir={out}"]
        subprocess.run(command, cwd=ROOT, check=True)
        variants[variant] = measure(out, part) | {"options": text}
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()
    return {"seed": seed, "commit": commit, "variants": variants}


def every_fourth(path):
    """A file with every fourth document of a text."""
    chosen = WORK / "wikipedia.txt"
    data.make_folder(WORK)
    texts = list(data.read_documents(path))[::4]
    text = f"\n{data.EOT}\n".join(texts)
    if not chosen.exists():
        chosen.write_text(text, "utf-8")
    return chosen


def share_stages(out, config):
    """Copy finished stages of other runs that were made with the options of this one."""
    data.make_folder(out)
    names = ["data"]
    for stage, more in train.STAGE_OPTIONS.items():
        names += more
        wanted = [getattr(config, name) for name in names]
        for path in WORK.glob(f"*/{stage}*.pt"):
            if path.parent == out:
                continue
            other = data.read_json(path.parent / "config.json")
            is_wanted = [other[name] for name in names] == wanted and "partial" not in path.name
            if is_wanted and not (out / path.name).exists():
                shutil.copy(path, out)


def measure(out, part):
    """Score the plans of a run on its test split."""
    run = load_run(out)
    corpus = run.split("test")
    n_bytes = count_bytes(corpus, run.tokenizer)
    # The first token is not scored.
    sentence = corpus.sentence_of(np.arange(1, len(corpus.tokens)))
    document = np.searchsorted(corpus.documents, sentence, side="right") - 1
    costs = run.bigram[label_before(corpus, run.config.n_labels), corpus.labels]
    figures = {
        "tokens": np.bincount(document).tolist(),
        "sentences": corpus.n_sentences,
        "bytes": n_bytes,
        "seconds": data.read_json(out / "results.json")["seconds"],
        "unigram_ce": -float(run.bigram[-1, corpus.labels].mean()),
        "bigram_ce": -float(costs.mean()),
        "plans": {},
    }
    for plan in run.config.plans.split(","):
        model = run.model(plan)
        sums = {}
        # At a stride of 1/8, scoring takes four times as long, so some plans do without.
        shares = part.strides if plan in ("none", "hard", "soft") else (1/2,)
        for share in shares:
            stride = round(share * run.config.block_size)
            nll, label_log_probs = score(model, corpus, run.autocast, stride=stride)
            sums[share] = np.bincount(document, nll).round(2).tolist()
            if share == 1/2:
                entry = summary(nll, label_log_probs, corpus)
                entry["bits_per_byte"] = bits_per_byte(nll, n_bytes)
                entry |= places(run, corpus, nll)
                if plan == "soft_frozen":
                    entry |= explained(run, corpus, label_log_probs)
        entry["sums"] = sums
        if part.follows:
            entry["follow"] = follow_figures(run, plan)
        figures["plans"][plan] = entry
    return figures


def places(run, corpus, nll):
    """Mean nats by a token's place in its sentence, and by where its document began.

    The last of the places stands for itself and all later ones.
    """
    T = run.config.block_size
    position = np.arange(1, len(corpus.tokens))
    sentence = corpus.sentence_of(position)
    place = np.minimum(position - corpus.sentences[sentence], 8)
    window_start = np.maximum(0, data.round_up(position - T, T // 2))
    begins_inside = corpus.sentences[corpus.opening_of(sentence)] >= window_start
    return {
        "by_place": (np.bincount(place, nll) / np.bincount(place)).tolist(),
        "document_begins_inside": float(nll[begins_inside].mean()),
        "document_begins_before": float(nll[~begins_inside].mean()),
        "share_inside": float(begins_inside.mean()),
    }


def explained(run, corpus, label_log_probs):
    """The share of the variance of the next sentence's vector that each kind of plan explains."""
    centroids = run.labeler.centroids.cpu().numpy()
    log_probs = label_log_probs[:corpus.n_sentences]                        # (n, K)
    predicted = ~np.isnan(log_probs[:, 0])
    probs = np.exp(log_probs[predicted])                                    # (m, K)
    vectors = corpus.vectors[predicted].astype(np.float32)                  # (m, E)
    guesses = {
        "likeliest": centroids[probs.argmax(1)],
        "mixture": probs @ centroids,
        "true": centroids[corpus.labels[predicted]],
    }
    variance = np.square(vectors - vectors.mean(0)).sum()
    shares = {}
    for name, guess in guesses.items():
        shares[name] = float(1 - np.square(vectors - guess).sum() / variance)
    return {"explained": shares}


def follow_figures(run, plan, n_prompts=60):
    """Whether sentences follow a label drawn at random; prompts are openings of documents."""
    corpus = run.split("val")
    rng = np.random.default_rng(0)
    labels = rng.integers(run.config.n_labels, size=n_prompts)
    prompts = []
    for j in rng.choice(corpus.documents[:-1], n_prompts, replace=False):
        start, *_, end = corpus.sentences[j:j + 3]
        prompts.append(run.tokenizer.decode(corpus.tokens[start:end].tolist()))
    share, expected = follow(run, plan, prompts, labels.tolist())
    return {"share": share, "expected": expected}


# --- the tables -----------------------------------------------------------------------------------
# Decided on before any of these seeds was scored on the test split.
COMPARISONS = [
    ("claims::hard", "claims::none"),
    ("claims::soft_frozen", "claims::hard"),
    ("claims::soft", "claims::soft_frozen"),
    ("claims::soft", "claims::straight_through"),
    ("claims::soft", "claims::none"),
    ("claims::soft", "claims:as long:none"),
    ("view::soft", "claims::none"),
    ("longer_4::soft", "longer_4:as long:none"),
]


def entries(run):
    """The figures of part:variant:plan for each of its seeds, with the tokens of each document."""
    name, variant, plan = run.split(":")
    found = {}
    for entry in data.read_json(ROOT / "results" / f"{name}.json")["runs"]:
        figures = entry["variants"][variant]
        found[entry["seed"]] = figures["plans"][plan] | {"documents": figures["tokens"]}
    return found


def compare(run, other, share="0.5"):
    """The change of perplexity in percent, its 99 % interval, and whether it is decided.

    The variance is that of the mean over seeds plus that of a bootstrap over documents. Decided:
    all seeds have its sign, and the interval leaves out 0.
    """
    ours = entries(run)
    theirs = entries(other)
    seeds = sorted(ours.keys() & theirs.keys())
    tokens = np.array(ours[seeds[0]]["documents"])                          # (d,)
    changes = []
    for seed in seeds:
        sums = np.array(ours[seed]["sums"][share]) - theirs[seed]["sums"][share]
        changes.append(sums)
    changes = np.array(changes)                                             # (seeds, d)
    by_seed = changes.sum(1) / tokens.sum()                                 # nats per token
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(len(tokens), np.full(len(tokens), 1 / len(tokens)), 2000)
    by_draw = drawn @ changes.mean(0) / (drawn @ tokens)
    variance = by_draw.var()
    if len(seeds) > 1:
        variance += by_seed.var(ddof=1) / len(seeds)
    mean = by_seed.mean()
    ends = mean - 2.576 * math.sqrt(variance), mean + 2.576 * math.sqrt(variance)
    decided = (by_seed > 0).all() and ends[0] > 0 or (by_seed < 0).all() and ends[1] < 0
    percent = [100 * math.expm1(x) for x in (mean, *ends)]
    return percent, bool(decided)


def change(run, other, share="0.5"):
    """A comparison as the text of a cell, in percent."""
    (mean, low, high), decided = compare(run, other, share)
    return f"{mean:+.2f} ({low:+.2f}, {high:+.2f}){'' if decided else ' undecided'}"


def mean_of(run, figure):
    """The mean of a figure over seeds; None if the plan has none."""
    values = [entry[figure] for entry in entries(run).values()]
    return None if None in values else float(np.mean(values))


def row(*cells):
    return " | ".join(cells)


def head(*cells):
    return [row(*cells), row(*("---" for _ in cells))]


def claims():
    """All plans: perplexity, its change, what that is worth in steps, bits per byte, label nats."""
    plans = {f"`{plan}`": f"claims::{plan}" for plan in PLANS}
    plans["`none`, as long as `soft`"] = "claims:as long:none"
    plans["`none`, as long as `soft` and its planner"] = "claims:as long as all stages:none"
    # More steps of stage joint, and what `none` gains from them.
    more_steps = [0, round(C.joint_steps * (SOFT_STEP - 1))]
    more_steps.append(more_steps[1] + OTHER_STAGES)
    none = mean_of("claims::none", "nll")
    gains = [none - mean_of(run, "nll") for run in ("claims::none", *list(plans.values())[-2:])]
    lines = head("plan", "perplexity", "change, %", "worth in plain steps", "bits per byte",
                 "label nats")
    for name, run in plans.items():
        label_nats = mean_of(run, "planner_ce")
        worth = np.interp(none - mean_of(run, "nll"), gains, more_steps)
        lines.append(row(
            name,
            f"{mean_of(run, 'ppl'):.2f}",
            "-" if run == "claims::none" else change(run, "claims::none"),
            f"{worth:.0f}",
            f"{mean_of(run, 'bits_per_byte'):.3f}",
            f"{label_nats:.2f}" if label_nats else "-",
        ))
    return lines


def title(run):
    """What a table calls part:variant:plan."""
    name, variant, plan = run.split(":")
    return ", ".join(filter(None, [f"`{plan}`", variant, "" if name == "claims" else name]))


def comparisons():
    lines = head("plan", "against", "change, %")
    for run, other in COMPARISONS:
        # Those with `none` stand in other tables.
        if other != "claims::none":
            lines.append(row(title(run), title(other), change(run, other)))
    return lines


def memory():
    """Draw the gain of `soft` against what the GPT sees: a colour for each view."""
    def place(seen, percent):
        return round(70 + 2.6 * seen), round(40 - 70 * percent)

    shapes = ['<rect width="640" height="400" rx="10" fill="#f6f8fa"/>',
              '<text x="150" y="388">tokens that the GPT sees before its target, on average</text>']
    for percent in range(-4, 1):
        x, y = place(0, percent)
        shapes.append(f'<path d="M{x} {y}h550" stroke="#d0d7de"/>')
        shapes.append(f'<text x="20" y="{y + 4}">{percent} %</text>')
    for seen in range(0, 201, 25):
        x, y = place(seen, -4)
        shapes.append(f'<text x="{x - 8}" y="{y + 24}">{seen}</text>')
    for view, color in ("document", "#1f5fa8"), ("equal", "#b84c00"):
        x, y = place(60, -3.2 if view == "document" else -3.5)
        shapes.append(f'<text x="{x}" y="{y}" fill="{color}">planner_view={view}</text>')
        for T, runs in WINDOWS.items():
            corners = []
            for share in PARTS[runs["none"].partition(":")[0]].strides:
                (mean, low, high), _ = compare(runs[view], runs["none"], str(share))
                # After the first window, targets see T - stride to T - 1 tokens of their window.
                seen = T * (1 - share / 2)
                x, y = place(seen, mean)
                corners.append(f"{x} {y}")
                bar = f"M{x} {place(0, low)[1]}V{place(0, high)[1]}"
                shapes.append(f'<path d="{bar}" stroke="{color}" opacity=".4"/>')
                shapes.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{color}"/>')
            line = f"M{'L'.join(corners)}"
            shapes.append(f'<path d="{line}" stroke="{color}" fill="none" stroke-width="2"/>')
    drawn = "\n".join(shapes)
    svg = ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 400" font-size="14" '
           f'font-family="sans-serif" fill="#1f2328">\n{drawn}\n</svg>\n')
    (ROOT / "results" / "gain.svg").write_text(svg, "utf-8")
    return ["![What `soft` changes, with windows of 64, 128 and 256 tokens](gain.svg)"]


def training():
    """The gain of `soft` as stages lm and joint get longer, and what plain training gains."""
    lines = head("stages lm and joint", "perplexity of `none`", "`soft`", "`soft`, equal view",
                 "`none`, as long as `soft`")
    for name in ("claims", "longer_4", "longer_16"):
        if not (ROOT / "results" / f"{name}.json").exists():
            continue
        equal = "view::soft" if name == "claims" else f"{name}:equal:soft"
        lines.append(row(
            f"{name.partition('_')[2] or '1'} x",
            f"{mean_of(f'{name}::none', 'ppl'):.2f}",
            change(f"{name}::soft", f"{name}::none"),
            change(equal, f"{name}::none"),
            change(f"{name}:as long:none", f"{name}::none"),
        ))
    return lines


def sentence():
    """What a label costs and saves, in nats a sentence; what plans say of the next vector."""
    names = ["unigram_ce", "bigram_ce", "sentences", "tokens"]
    found = {name: [] for name in names}
    for entry in data.read_json(ROOT / "results" / "claims.json")["runs"]:
        for name in names:
            found[name].append(np.sum(entry["variants"][""][name]))
    unigram, bigram, sentences, tokens = (np.mean(found[name]) for name in names)
    length = tokens / sentences
    saved = {}
    for plan in ("oracle", "soft"):
        saved[plan] = mean_of("claims::none", "nll") - mean_of(f"claims::{plan}", "nll")
    explained = [entry["explained"] for entry in entries("claims::soft_frozen").values()]
    lines = head("what", "nats a sentence")
    lines.append(row("the label, by its frequency", f"{unigram:.2f}"))
    lines.append(row("the label, by the label before", f"{bigram:.2f}"))
    lines.append(row("the label, by the planner", f"{mean_of('claims::hard', 'planner_ce'):.2f}"))
    lines.append(row("what the true label saves the GPT", f"{saved['oracle'] * length:.2f}"))
    lines.append(row("what `soft` saves the GPT", f"{saved['soft'] * length:.2f}"))
    lines += ["", *head("plan vector", "share of the variance of the next sentence's vector")]
    for name in explained[0]:
        share = np.mean([shares[name] for shares in explained])
        lines.append(row(f"embedding of the {name} label" if name != "mixture" else "mixture",
                         f"{share:.2f}"))
    return lines


def place():
    """What `soft` saves, by a token's place in its sentence and by where its document began."""
    ours = list(entries("claims::soft").values())
    theirs = list(entries("claims::none").values())
    lines = head("tokens", "`soft` saves, nats a token")
    for name, label in (("document_begins_inside", "document begins in the window"),
                        ("document_begins_before", "document began before")):
        saved = np.mean([a[name] - b[name] for a, b in zip(theirs, ours)])
        lines.append(row(label, f"{saved:.3f}"))
    by_seed = [np.subtract(a["by_place"], b["by_place"]) for a, b in zip(theirs, ours)]
    saved = np.mean(by_seed, axis=0)
    lines.append(row("first of its sentence", f"{saved[0]:.3f}"))
    lines.append(row("second to eighth", f"{saved[1:8].mean():.3f}"))
    lines.append(row("later", f"{saved[8]:.3f}"))
    return lines


def following():
    lines = head("GPT trained under", "sentences with the label asked for", "by its frequency")
    for plan in ("hard", "soft", "oracle"):
        figures = [entry["follow"] for entry in entries(f"follow::{plan}").values()]
        share = np.mean([entry["share"] for entry in figures])
        expected = np.mean([entry["expected"] for entry in figures])
        lines.append(row(f"`{plan}`", f"{share:.0%}", f"{expected:.1%}"))
    return lines


def others():
    """Longer windows and another text."""
    lines = head("run", "perplexity of `none`", "`soft`", "`soft`, equal view")
    for name in ("window_128", "window_256", "wikipedia"):
        if not (ROOT / "results" / f"{name}.json").exists():
            continue
        none = f"{name}::none"
        lines.append(row(name, f"{mean_of(none, 'ppl'):.2f}", change(f"{name}::soft", none),
                         change(f"{name}:equal:soft", none)))
    return lines


def write_tables():
    """Put each table between its two marks in results/README.md."""
    path = ROOT / "results" / "README.md"
    page = path.read_text("utf-8")
    for table in (claims, comparisons, memory, training, sentence, place, following, others):
        name = table.__name__
        before, begin, rest = page.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- end of {name} -->")
        # A table whose part has not been run has no marks.
        if begin:
            page = before + begin + "\n" + "\n".join(table()) + "\n\n" + end + after
    path.write_text(page, "utf-8")


def read_runs(path):
    """The entries of results/PART.json."""
    return data.read_json(path)["runs"] if path.exists() else []


def main():
    parser = argparse.ArgumentParser("run.py", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--seed", type=int, help="this seed alone")
    parser.add_argument("--table", action="store_true", help="write the tables, train nothing")
    options = parser.parse_args()
    if options.table:
        write_tables()
        return
    for name in options.parts or PARTS:
        path = ROOT / "results" / f"{name}.json"
        for seed in [options.seed] if options.seed else PARTS[name].seeds:
            if seed in [entry["seed"] for entry in read_runs(path)]:
                continue
            entry = make_seed(name, seed)
            # Read again: another process may have added a seed.
            runs = sorted([*read_runs(path), entry], key=lambda entry: entry["seed"])
            results = {"runs": runs}
            results |= {"command": f"python results/run.py {name}", "versions": versions(),
                        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}"}
            data.write_json(path, results)


if __name__ == "__main__":
    main()
