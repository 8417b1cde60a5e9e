"""Makes the evidence, a part at a time, and writes it up.

    python results/run_all.py claims             # some parts, by name; without a name all: hours
    python results/run_all.py claims --seed=3    # one seed of them
    python results/run_all.py comparisons        # from the parts that are finished
    python results/run_all.py --table            # results/README.md, from results/*.json

A part is a few runs of train.py that differ in the seed alone. They lie in cache/results/NAME-SEED,
and can be interrupted at any time: the same command continues. results/NAME.json holds, for each
seed, the run's results.json (validation: "plans"), the same on the test split ("test"), and how it
was made. results/NAME.npz holds the sums of nats of the test tokens, by document and stratum.
"""
import ast
import json
import math
import operator
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
sys.path.insert(0, str(ROOT))

import torch

import data
import eval as evaluation
import train

# --- what is run ----------------------------------------------------------------------------------

@dataclass
class Part:
    purpose: str
    options: str                # of train.py, beside plans and seed
    plans: str
    seeds: tuple = (0, 1, 2)
    start: str = ""             # each seed begins with the stages that it shares with this part
    split: str = "test"         # val: a choice is made here, so test is not looked at
    traps: str = ""             # left open: "document_end", "no_overlap"


FIVE, THREE = (1, 2, 3, 4, 5), (1, 2, 3)                # seed 0 chose the defaults
RATED = "none,hard,straight_through,soft"
FROZEN_AND_SOFT = "none,previous,hard,soft_frozen,soft"
WIDE = "--block_size=256 --batch_size=8"                # as many tokens a step as by default
PARTS = {
    "default": Part("the default run, on seeds that chose nothing", "", "none,hard,soft", THREE,
                    split="val"),
    "default_seconds": Part("`none` for as many seconds as `soft`", "--joint_steps=693", "none",
                            THREE, start="default", split="val"),
    "default_view": Part("the planner sees what the GPT sees, in its own stage, too",
                         "--planner_view=window", "soft", THREE, start="default", split="val"),
    "default_256": Part("a window of 256", WIDE, "none,soft", (1,), split="val"),
    "claims": Part("the nine plans of the default run", "", "all", FIVE, traps="no_overlap"),
    # learning rates of stage joint; those between are the default's, so of claims
    "rates_low": Part("half the learning rates", "--joint_lr=2e-3 --joint_planner_lr=1e-4", RATED,
                      THREE, start="claims", split="val"),
    "rates_high": Part("twice the learning rates", "--joint_lr=8e-3 --joint_planner_lr=4e-4",
                       RATED, THREE, start="claims", split="val"),
    "seconds": Part("`none` for as many seconds as `soft`", "--joint_steps=693", "none", FIVE,
                    start="claims"),
    "seconds_all": Part("and for those of the stages labels and planner", "--joint_steps=900",
                        "none", FIVE, start="claims"),
    "parameters": Part("`none` with as many parameters as `soft`", "--n_layer=7", "none", FIVE),
    "memory": Part("the planner sees what the GPT sees, from its own stage on",
                   "--planner_view=window", "previous,hard,soft_frozen,soft", FIVE, start="claims"),
    "traps_end": Part("<|endoftext|> counts to the next document", "", "none,hard,soft", THREE,
                      traps="document_end no_overlap"),
    "window_128": Part("a window of 128", "--block_size=128 --batch_size=16", "none,hard,soft",
                       THREE),
    "window_256": Part("a window of 256", WIDE, "none,hard,soft", THREE),
    # every fourth of the articles that results/README.md names, as JSON lines
    "wikipedia": Part("another corpus", "--data=cache/wikipedia.jsonl",
                      f"{FROZEN_AND_SOFT},oracle", THREE),
    "wikipedia_256": Part("another corpus in a window of 256",
                          f"--data=cache/wikipedia.jsonl {WIDE}", FROZEN_AND_SOFT, THREE),
}

# (what is claimed, the lower one, the higher one), each a part, a plan and, if not on all tokens, a
# stratum: written down before anyone looks at a test score of this version. A later change of the
# list is told in results/README.md, with its reason.
COMPARISONS = (
    ("1. a plan helps", "claims hard", "claims none"),
    ("2. the whole distribution helps", "claims soft_frozen", "claims hard"),
    ("3. training end to end helps", "claims soft", "claims soft_frozen"),
    ("4. the straight-through gradient helps", "claims straight_through", "claims hard"),
    ("4. the mixture is better than it", "claims soft", "claims straight_through"),
    ("4. and than a relaxed sample", "claims soft", "claims gumbel"),
    ("5. the method against the earlier one", "claims soft", "claims hard"),
    ("5. the method against no plan", "claims soft", "claims none"),
    ("5. on sentences that the training text has not", "claims soft new", "claims none new"),
    ("6. it is not only the longer view", "memory soft", "claims none"),
    ("6. it predicts, and does not only remember", "claims soft", "claims previous"),
    ("6. the same, where the planner sees only the window", "memory soft", "memory previous"),
    ("7. better than plain training for as many seconds", "claims soft", "seconds none"),
    ("7. and for those of labels and planner", "claims soft", "seconds_all none"),
    ("7. better than as many parameters", "claims soft", "parameters none"),
    ("8. in a window of 128", "window_128 soft", "window_128 none"),
    ("8. in a window of 256", "window_256 soft", "window_256 none"),
    ("9. on another corpus", "wikipedia soft", "wikipedia none"),
)


PLACES = (1, 2, 3, 5, 9, 17)            # in a sentence, from 1: the first of each group of tokens
# name -> what its tokens are, and where they stand in a table of strata()
STRATA = {
    "": ("all", np.s_[:]),
    "inside": ("their document began in the window", np.s_[:, :, 0]),
    "older": ("it began before the window", np.s_[:, :, 1]),
    "new": ("of sentences that the training text does not have", np.s_[..., 0]),
    "copied": ("of sentences that stand there word for word", np.s_[..., 1]),
    "1": ("first of their sentence", np.s_[:, 0]),
    "2": ("second", np.s_[:, 1]),
    "3": ("3rd and 4th", np.s_[:, 2]),
    "5": ("5th to 8th", np.s_[:, 3]),
    "9": ("9th to 16th", np.s_[:, 4]),
    "17": ("later ones", np.s_[:, 5]),
}


# --- runs -----------------------------------------------------------------------------------------

def run_part(name: str, only_seed: int | None) -> None:
    """Runs the seeds of a part that are not finished, and writes results/NAME.json after each."""
    part = PARTS[name]
    corpus = re.search(r"--data=(\S+)", part.options)
    if corpus and not Path(corpus[1]).exists():
        print(f"{name}: left out, {corpus[1]} is not there")
        return
    for seed in part.seeds if only_seed is None else [only_seed]:
        if seed not in [run["seed"] for run in finished(name)]:
            run = run_seed(name, seed)
            others = [other for other in finished(name) if other["seed"] != seed]
            data.write_json(RESULTS / f"{name}.json", {
                "command": f"python results/run_all.py {name}", "purpose": part.purpose,
                "split": part.split, "machine": machine(), "versions": evaluation.versions(),
                "runs": sorted([*others, run], key=operator.itemgetter("seed"))})


def finished(name: str) -> list[dict]:
    """The runs in results/NAME.json that have the part's options: others are made anew."""
    path, options = RESULTS / f"{name}.json", options_of(PARTS[name])
    runs = load(name)["runs"] if path.exists() else []
    return [run for run in runs if run.get("options") == options]


def options_of(part: Part) -> str:
    return f"{part.options} --plans={part.plans}".strip()


def folder(name: str, seed: int) -> Path:
    return Path(f"cache/results/{name}-{seed}")         # below ROOT, see main


def run_seed(name: str, seed: int) -> dict:
    """One run, trained and scored: an entry of "runs"."""
    part, out = PARTS[name], folder(name, seed)
    arguments = [*options_of(part).split(), f"--seed={seed}", f"--out_dir={out}"]
    begun = begin(out)
    if (out / "config.json").exists():
        arguments.append("--resume")
    elif part.start and shared(folder(part.start, seed)):
        arguments.append(f"--start={folder(part.start, seed)}")
        begun["start"] = shared(folder(part.start, seed))
    split = leaky_split if "document_end" in part.traps else causal_split
    started = time.time()
    data.write_json(out / "begun.json", begun)
    try:
        with mock.patch.object(data.Store, "split", split):
            train.main(arguments)
            run = data.read_json(out / "results.json", "plans")
            if part.split == "test":
                run |= score_test(name, seed)
    finally:
        begun["seconds"] += round(time.time() - started)
        data.write_json(out / "begun.json", begun)
    return run | begun | {"command": " ".join(["python train.py", *arguments]),
                          "options": options_of(part), "traps": part.traps, "machine": machine()}


def begin(out: Path) -> dict:
    """The commit at which a run began, and its seconds so far. Ends the program where files were
    changed since the last commit, or a run was begun with other code."""
    changed = git("status", "--porcelain", "--", ".", ":!results")
    if changed:
        sys.exit(f"run_all.py: commit first, outside results/ these are changed:\n{changed}")
    if not (out / "begun.json").exists():
        out.mkdir(parents=True, exist_ok=True)
        return {"commit": git("rev-parse", "HEAD"), "seconds": 0}
    begun = data.read_json(out / "begun.json", "commit", "seconds")
    if not same_code(begun["commit"]):
        sys.exit(f"run_all.py: {out} was begun with other code ({begun['commit']}): delete it")
    return begun


def shared(source: Path) -> str:
    """The commit of a finished run whose stages may be shared; "" where it is of other code."""
    if not (source / "results.json").exists():
        return ""
    commit = data.read_json(source / "begun.json", "commit")["commit"]
    return commit if same_code(commit) else ""


def same_code(commit: str) -> bool:
    """Whether another commit had the same packages and, but for words, the same six files."""
    files = [*ROOT.glob("*.py"), ROOT / "requirements.txt"]
    return all(code(git("show", f"{commit}:{file.name}")) == code(file.read_text("utf-8"))
               for file in files)


def code(text: str) -> str:
    """A Python file without its comments and docstrings; any other as it is."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return text.strip()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = node.body[bool(ast.get_docstring(node)):]
    return ast.dump(tree)


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, text=True, capture_output=True,
                          check=True).stdout.strip()


def machine() -> str:
    device = f"{os.cpu_count()} CPU cores"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return f"{device}, {platform.system()} {platform.machine()}"


def score_test(name: str, seed: int) -> dict:
    """Scores the test split as eval.py does, and keeps the sums of each stratum."""
    run, sums = evaluation.Run.open(folder(name, seed)), {}
    corpus, score = run.corpus("test"), run.score

    def score_and_keep(model, corpus, **options):
        scores = score(model, corpus, **options)
        sums[f"{seed} {model.plan}"] = np.bincount(stratum, scores.nll, cells)
        return scores

    stratum, shape = strata(run, corpus)
    cells = math.prod(shape)
    run.score = score_and_keep
    results = evaluation.evaluate(run, corpus, run.store().bytes["test"], "test")
    sums[f"{seed} tokens"] = np.bincount(stratum, minlength=cells)
    sums = {key: values.reshape(shape).astype(np.float32) for key, values in sums.items()}
    path = RESULTS / f"{name}.npz"
    np.savez_compressed(path, **((dict(np.load(path)) if path.exists() else {}) | sums))
    plans = run.finished_plans() if "no_overlap" in PARTS[name].traps else []
    return {"test": results["plans"], "no_overlap": {plan: no_overlap(run, plan) for plan in plans},
            "stream": {plan: stream(run, plan) for plan in results["plans"]}}


def stream(run, plan: str) -> float:
    """Nats a token over the last third of stage joint, in windows not met before in it."""
    lines = map(json.loads, (run.out / "metrics.jsonl").read_text("utf-8").splitlines())
    losses = {line["step"]: line["loss"] for line in lines
              if line["stage"] == f"joint_{plan}" and "loss" in line}      # of a step, the last
    return statistics.mean(loss for step, loss in losses.items()
                           if step > run.config.joint_steps * 2 / 3)


def strata(run, corpus) -> tuple[np.ndarray, tuple]:
    """The stratum of each token but the first, as an index into a table of the returned shape:
    document, place in the sentence, whether the document began before the window in which the token
    is scored, and whether the sentence stands in the training text, too."""
    target = np.arange(1, len(corpus.tokens))
    sentence = np.searchsorted(corpus.sentences, target, side="right") - 1
    document = np.searchsorted(corpus.documents, sentence, side="right") - 1
    place = np.searchsorted(PLACES, 1 + target - corpus.sentences[sentence], side="right") - 1
    T = run.config.block_size
    window = T // 2 * np.maximum(0, -(-(target - T) // (T // 2)))       # where it starts: see score
    older = corpus.sentences[corpus.documents[document]] < window
    known = {text.tobytes() for text in texts_of(run.corpus("train"))}
    copied = np.array([text.tobytes() in known for text in texts_of(corpus)])[sentence]
    document -= document[0]                             # the opening <|endoftext|> has no target
    shape = document.max() + 1, len(PLACES), 2, 2
    index = document, place, older.astype(int), copied.astype(int)
    return np.ravel_multi_index(index, shape), shape


def texts_of(corpus) -> list[np.ndarray]:
    """The tokens of each sentence."""
    return np.split(corpus.tokens, corpus.sentences[1:])


# --- traps, which stay out of the six files -------------------------------------------------------

causal_split = data.Store.split


def leaky_split(store: data.Store, name: str) -> data.Corpus:
    """The trap `document_end`: <|endoftext|> belongs to the next document's first sentence, in
    training and in scoring."""
    corpus = causal_split(store, name)
    ends = np.flatnonzero(corpus.tokens == store.tokenizer.eot_token)
    # A sentence that starts behind an <|endoftext|> starts with it instead.
    sentences = np.unique(corpus.sentences - np.isin(corpus.sentences, ends + 1))
    return data.Corpus(corpus.tokens, sentences, np.searchsorted(sentences, ends))


@torch.no_grad()
def no_overlap(run, plan: str) -> float:
    """The trap `no_overlap`: nats a test token in windows that do not overlap, as most evaluations
    have it. Just after a window's start the planner sees what the GPT does not."""
    corpus, c, model = run.corpus("test"), run.config, run.model(plan)
    starts, total = np.arange(0, len(corpus.tokens) - 1, c.block_size), 0.0
    for some in np.array_split(starts, math.ceil(len(starts) / 64)):
        batch = data.window_batch(corpus, some, c.block_size, c.planner_reach, c.planner_view)
        with run.autocast():
            nll, _ = model(batch.to(run.device), reduction="none")
        total += float(nll.double().sum())              # 0 beyond the end
    return total / (len(corpus.tokens) - 1)


# --- statistics -----------------------------------------------------------------------------------

def make_comparisons() -> None:
    """Writes results/comparisons.json: those of COMPARISONS whose parts are run."""
    rows = []
    for claim, lower, higher in COMPARISONS:
        runs = [{run["seed"] for run in finished(side.split()[0])} for side in (lower, higher)]
        seeds = sorted(runs[0] & runs[1])
        if len(seeds) > 1:                              # else there is no spread over seeds
            rows.append(compare(lower, higher, seeds) | {"claim": claim, "later": False})
    if not rows:
        sys.exit("run_all.py: run the parts of COMPARISONS first")
    # one that is not yet run counts as p = 1, so that the list stays as long as it was written
    missing = [1.0] * (len(COMPARISONS) - len(rows))
    for row, p in zip(rows, holm([row["p"] for row in rows] + missing)):
        row["p_holm"] = p
    data.write_json(RESULTS / "comparisons.json", {
        "command": "python results/run_all.py comparisons", "rows": rows})


def nats(side: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A "PART PLAN STRATUM", the last being left out where it is all tokens -> its sums of nats
    over each test document, and the numbers of its tokens."""
    part, plan, stratum = f"{side} ".split(" ")[:3]
    file = np.load(RESULTS / f"{part}.npz")
    tables = [file[f"{seed} {key}"].astype(float)[STRATA[stratum][1]] for key in (plan, "tokens")]
    return tuple(table.reshape(len(table), -1).sum(1) for table in tables)


def compare(lower: str, higher: str, seeds: list[int]) -> dict:
    """Two "PART PLAN STRATUM" in nats a test token: over seeds, and over documents."""
    pairs = [[nats(side, seed) for side in (lower, higher)] for seed in seeds]
    tokens = pairs[0][0][1]                             # (documents,) the same for all
    differences = [(a - b).sum() / tokens.sum() for (a, _), (b, _) in pairs]
    mean, half, p = t_test(differences)
    return {"lower": lower, "higher": higher, "seeds": seeds, "nats": mean,
            "interval": [mean - half, mean + half], "p": p,
            "documents": bootstrap(np.mean([a - b for (a, _), (b, _) in pairs], 0), tokens)}


def t_test(differences: list[float]) -> tuple[float, float, float]:
    """Paired: mean, half the width of the 95 % interval, two-sided p of Student's t."""
    n, mean = len(differences), statistics.mean(differences)
    error = statistics.stdev(differences) / math.sqrt(n)
    # with t = sqrt(n - 1) tan(angle), the density of the angle is that of cos^(n - 2)
    angle = np.linspace(0, math.pi / 2, 200_001)
    weight = np.cos(angle) ** (n - 2)
    within = np.concatenate([[0], np.cumsum((weight[1:] + weight[:-1]) / 2)])
    within /= within[-1]                                # the share of |t| below each angle's
    critical = math.sqrt(n - 1) * math.tan(np.interp(0.95, within, angle))
    reached = math.atan2(abs(mean), error * math.sqrt(n - 1))
    return mean, critical * error, 1 - float(np.interp(reached, angle, within))


def holm(p_values: list[float]) -> list[float]:
    """Holm's correction: the i-th smallest of m is multiplied by m - i, and none may fall."""
    order, corrected, least = np.argsort(p_values), [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order.tolist()):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = least
    return corrected


def bootstrap(differences: np.ndarray, tokens: np.ndarray) -> list[float]:
    """95 % interval of the difference in nats a token, from its sums over each document and their
    numbers of tokens: over sets of documents drawn with replacement."""
    n = len(tokens)
    times = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=2000)   # (draws, n)
    return np.quantile((times @ differences) / (times @ tokens), [0.025, 0.975]).tolist()


# --- the text -------------------------------------------------------------------------------------

def write_readme() -> str:
    """The text of results/README.md: template.md, in which a marker {{NAME: ARGUMENT, ...}} stands
    for what the function NAME of TABLES returns."""
    def fill(marker):
        try:
            return TABLES[marker[1]](*marker[2].split(", "))
        except FileNotFoundError:
            what = f"| {marker[2].split(', ')[0]} |"
            return f"{what} not yet run |  |  |  |  |" if marker[1] == "row" else "not yet run"
    return re.sub(r"\{\{(\w+): (.+?)\}\}", fill, (RESULTS / "template.md").read_text("utf-8"))


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def follow(tree, path: str):
    """What lies at "a/0/b" in a tree of dictionaries and lists."""
    for key in filter(None, path.split("/")):
        tree = tree[int(key)] if isinstance(tree, list) else tree[key]
    return tree


def cells(name: str, path: str, *columns: str) -> str:
    """Some values, "PATH:FORMAT" each, below one path in a JSON file; of a list of words, five."""
    shown, place = [], follow(load(name), path)
    for column in columns:
        key, _, form = column.partition(":")
        value = follow(place, key)
        if isinstance(value, list):
            value = re.sub(r"[|`*_]", "", ", ".join(value[:5]))
        shown.append(format(value, form))
    return " | ".join(shown)


def figure(side: str, split: str, key: str) -> dict[int, float]:
    """seed -> a figure of "PART PLAN", on the split."""
    part, plan = side.split()
    found = {run["seed"]: run["plans" if split == "val" else split][plan]
             for run in load(part)["runs"]}
    return {seed: x[key] if isinstance(x, dict) else x for seed, x in found.items()}


def mean(side: str, split: str = "test", key: str = "ppl") -> str:
    return f"{statistics.mean(figure(side, split, key).values()):.2f}"


HEADER = ("| plan | perplexity | against `none` | each seed, % | bits per byte | label nats |\n"
          "|---|---|---|---|---|---|")


def percent(nats: float) -> str:
    """A difference in nats a token as one of perplexity."""
    return f"{100 * math.expm1(nats):+.2f}"


def change(lower: str, higher: str, split: str = "test", n_seeds: str = "9") -> str:
    """The change of perplexity from one "PART PLAN" to another: its mean, and each seed's."""
    nats = [figure(side, split, "nll") for side in (lower, higher)]
    seeds = sorted(nats[0].keys() & nats[1].keys())[:int(n_seeds)]
    each = [nats[0][seed] - nats[1][seed] for seed in seeds]
    average = statistics.mean(100 * math.expm1(x) for x in each)
    return f"{average:+.2f} % ({', '.join(map(percent, each))})"


def markdown(header: str, rows: list) -> str:
    lines = [header, "|" + "---|" * (header.count("|") - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def row(what: str, side: str, against: str, split: str) -> str:
    """A "PART PLAN": means over its seeds, and each seed's change against another's."""
    average = each = label = ""
    if side != against:
        average, each = change(side, against, split).strip(")").split(" (")
    bits = statistics.mean(figure(side, split, "bits_per_byte").values())
    if None not in figure(side, split, "planner_ce").values():
        label = mean(side, split, "planner_ce")
    return f"| {what} | {mean(side, split)} | {average} | {each} | {bits:.4f} | {label} |"


def plans(name: str, split: str = "test") -> str:
    """A part's plans: means over seeds, and each seed's change against its own `none`."""
    found = load(name)["runs"][0]["plans" if split == "val" else split]
    return "\n".join([HEADER, *(row(f"`{plan}`", f"{name} {plan}", f"{name} none", split)
                                for plan in found)])


def where(part: str, names: str, *strata_names: str) -> str:
    """Where the gain falls: some plans against the part's `none`, by stratum, means over seeds."""
    seeds, rows = [run["seed"] for run in load(part)["runs"]], []
    for name in strata_names:
        what, sums = STRATA[name][0], {}
        for plan in ["none", *names.split()]:
            pairs = [nats(f"{part} {plan} {name}".strip(), seed) for seed in seeds]
            sums[plan] = [total.sum() / tokens.sum() for total, tokens in pairs]
        share = pairs[0][1].sum() / nats(f"{part} none", seeds[0])[1].sum()
        changes = [percent(statistics.mean(sums[plan]) - statistics.mean(sums["none"]))
                   for plan in names.split()]
        rows.append((what, f"{share:.1%}", *changes))
    plans = " | ".join(f"`{plan}`, %" for plan in names.split())
    return markdown(f"| tokens | share | {plans} |", rows)


def comparisons(when: str) -> str:
    """Those written down beforehand ("planned"), or "later"."""
    rows = []
    for row in load("comparisons")["rows"]:
        if row["later"] == (when == "later"):
            sides = ["`" + row[side].removeprefix("claims ").replace(" ", ": ") + "`"
                     for side in ("lower", "higher")]
            seeds, documents = (" to ".join(map(percent, row[key]))
                                for key in ("interval", "documents"))
            p = f"{row['p_holm']:.3f}".replace("0.000", "<0.001") if "p_holm" in row else ""
            rows.append((row["claim"], " - ".join(sides), percent(row["nats"]),
                         f"{seeds} ({len(row['seeds'])})", documents, p))
    return markdown("| claim | compared | change, % | over seeds (n) | over documents | p, Holm |",
                    rows)


def bench(name: str) -> str:
    """Where tests/bench.py has an aim; of several sizes of one thing, the last."""
    rows = {}
    for kind, part in load(name).items():
        for row in part["rows"]:
            if "aim" in row:
                of = [str(row[key]) for key in ("step", "what", "tokens", "K", "by") if key in row]
                rows[kind, ", ".join(of)] = (kind, ", ".join(of), f"{row['reached']:.3g}", row["aim"])
    return markdown("| benchmark | of | reached | aim |", list(rows.values()))


TABLES = {make.__name__: make for make in (cells, mean, change, row, plans, where, comparisons,
                                        bench)}


# --- command line ---------------------------------------------------------------------------------

def main() -> None:
    parser = evaluation.Parser(prog="run_all.py", description=__doc__)
    purposes = "\n".join(f"{name}: {part.purpose}" for name, part in PARTS.items())
    parser.add_argument("names", nargs="*", metavar="NAME", help=purposes)
    parser.add_argument("--seed", type=int, help="of the parts' seeds, this one alone")
    parser.add_argument("--table", action="store_true", help="write results/README.md")
    args = parser.parse_args()
    os.chdir(ROOT)                                      # so that cache/ is found
    if args.table:
        (RESULTS / "README.md").write_text(write_readme(), "utf-8")
        return
    for name in args.names or [*PARTS, "comparisons"]:
        if name == "comparisons":
            make_comparisons()
        elif name in PARTS:
            run_part(name, args.seed)
        else:
            parser.error(f"{name} is no part: choose {', '.join(PARTS)}, comparisons")


if __name__ == "__main__":
    main()
