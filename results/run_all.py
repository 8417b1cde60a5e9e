"""Makes the evidence, a part at a time, and writes it up.

    python results/run_all.py claims             # some parts, by name; without a name all: hours
    python results/run_all.py claims --seed=3    # one seed of them
    python results/run_all.py --table            # results/README.md, from what is finished

A part is a few runs of train.py that differ in the seed alone. They lie in cache/results/NAME-SEED,
and can be interrupted at any time: the same command continues. results/NAME.json holds, for each
seed, the run's results.json (validation: "plans"), the same on the test split ("test"), and how it
was made. results/NAME.npz holds the sums of nats of the test tokens, by document and stratum.
"""
import ast
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

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
    options: str                # of train.py, beside the seed
    seeds: tuple = (1, 2, 3)
    start: str = ""             # each seed begins with the stages that it shares with this part
    split: str = "test"         # val: a choice is made here, so test is not looked at
    traps: str = ""             # left open: "document_end", "no_overlap"


THREE, FIVE = (1, 2, 3), (1, 2, 3, 4, 5)                # seed 0 chose most of the defaults
RATED = "--plans=none,hard,straight_through,soft"       # at half and at twice stage joint's rates
FROZEN_AND_SOFT = "--plans=none,previous,hard,soft_frozen,soft"
WIKIPEDIA = "--data=cache/wikipedia.jsonl"              # see results/README.md
WIDE = "--block_size=256 --batch_size=8"                # as many tokens a step as by default
PARTS = {
    "claims": Part("--plans=all", FIVE, traps="no_overlap"),
    "rates_low": Part(f"--joint_lr=2e-3 --joint_planner_lr=1e-4 {RATED}", THREE, "claims", "val"),
    "rates_high": Part(f"--joint_lr=8e-3 --joint_planner_lr=4e-4 {RATED}", THREE, "claims", "val"),
    # for as many seconds as `soft`, with those of stages labels and planner, and as many parameters
    "seconds": Part("--joint_steps=693 --plans=none", FIVE, "claims"),
    "seconds_all": Part("--joint_steps=800 --plans=none", FIVE, "claims"),
    "parameters": Part("--n_layer=7 --plans=none", FIVE),
    # the planner sees what the GPT sees, from its own stage on; then trained on as many labels, too
    "memory": Part("--planner_view=window --plans=previous,hard,soft_frozen,soft", FIVE, "claims"),
    "memory_long": Part("--planner_view=window --planner_steps=2400 --plans=soft", FIVE, "claims"),
    "traps_end": Part("--plans=none,hard,soft", traps="document_end no_overlap"),
    "window_128": Part("--block_size=128 --batch_size=16 --plans=none,hard,soft"),
    "window_256": Part(f"{WIDE} --plans=none,hard,soft"),
    "memory_256": Part(f"{WIDE} --planner_view=window --planner_steps=750 --plans=soft",
                       start="window_256"),
    "wikipedia": Part(f"{WIKIPEDIA} {FROZEN_AND_SOFT},oracle"),
    "wikipedia_256": Part(f"{WIKIPEDIA} {WIDE} {FROZEN_AND_SOFT}"),
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

# groups of tokens by their place in the sentence: the first place, from 1 -> what they are
PLACES = {1: "1", 2: "2", 3: "3 or 4", 5: "5 to 8", 9: "9 to 16", 17: "17 or later"}
# name -> what its tokens are, and where they stand in a table of strata()
STRATA = {
    "": ("all", np.s_[:]),
    "inside": ("their document began in the window", np.s_[:, :, 0]),
    "older": ("it began before the window", np.s_[:, :, 1]),
    "new": ("of sentences that the training text does not have", np.s_[..., 0]),
    "copied": ("of sentences that stand there word for word", np.s_[..., 1]),
} | {str(first): (f"token {group} of a sentence", np.s_[:, i])
     for i, (first, group) in enumerate(PLACES.items())}


# --- runs -----------------------------------------------------------------------------------------

def run_part(name: str, only_seed: int | None) -> None:
    """Runs the seeds of a part that are not finished, and writes results/NAME.json after each."""
    for seed in PARTS[name].seeds:
        if only_seed in (None, seed) and seed not in finished(name):
            # `finished` comes last: another process may have added a seed in the meantime.
            runs = {seed: run_seed(name, seed)} | finished(name)
            data.write_json(RESULTS / f"{name}.json", {
                "command": f"python results/run_all.py {name}", "machine": machine(),
                "versions": evaluation.versions(), "runs": [runs[seed] for seed in sorted(runs)]})


def finished(name: str) -> dict[int, dict]:
    """seed -> its run in results/NAME.json, if it had the part's options: others don't count."""
    path = RESULTS / f"{name}.json"
    runs = json.loads(path.read_text("utf-8"))["runs"] if path.exists() else []
    return {run["seed"]: run for run in runs if run.get("options") == PARTS[name].options}


def run_seed(name: str, seed: int) -> dict:
    """One run, trained and scored: an entry of "runs"."""
    part, started = PARTS[name], time.time()
    out, start = (Path(f"cache/results/{of}-{seed}") for of in (name, part.start))  # below ROOT
    arguments = [*part.options.split(), f"--seed={seed}", f"--out_dir={out}"]
    begun, wanted = begin(out), train.parse_config(arguments)
    if (out / "config.json").exists():
        arguments.append("--resume")
    elif part.start and (start / "results.json").exists():
        arguments.append(f"--start={start}")
        begun["start"] = begin(start)["commit"]
    # What the options leave open, train.py takes from the run that it continues or starts from.
    if replace(train.parse_config(arguments), resume=False, start="") != wanted:
        sys.exit(f"run_all.py: {out} has other options by {arguments[-1]}: delete that run")
    data.write_json(out / "begun.json", begun)
    data.Store.split = leaky_split if "document_end" in part.traps else causal_split
    try:
        train.main(arguments)
        run, opened = data.read_json(out / "results.json", "plans"), evaluation.Run.open(out)
        run["dtype"] = "bfloat16" if opened.autocast()._enabled else "float32"
        if part.split == "test":
            run |= score_test(name, opened)
    finally:
        begun["seconds"] += round(time.time() - started)
        data.write_json(out / "begun.json", begun)
    return run | begun | {"command": " ".join(["python train.py", *arguments]),
                          "options": part.options, "traps": part.traps, "machine": machine()}


def begin(out: Path) -> dict:
    """The commit at which a run began, and its seconds so far. Ends the program where files are not
    committed, or packages or code, but for comments and docstrings, have changed since then."""
    made = [f":!results/*.{kind}" for kind in ("json", "npz", "md")]
    if changed := git("status", "--porcelain", "--", ".", *made):
        sys.exit(f"run_all.py: commit first, these are changed:\n{changed}")
    if not (out / "begun.json").exists():
        out.mkdir(parents=True, exist_ok=True)
        return {"commit": git("rev-parse", "HEAD"), "seconds": 0}
    begun = data.read_json(out / "begun.json", "commit", "seconds")
    commit = begun["commit"]
    same = all(code(git("show", f"{commit}:{file.name}")) == code(file.read_text("utf-8"))
               for file in ROOT.glob("*.py"))
    if not same or git("diff", commit, "--", "requirements.txt"):
        sys.exit(f"run_all.py: {out} was begun with other code ({commit}): delete it")
    return begun


def code(text: str) -> str:
    """A Python file without its comments and docstrings."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = node.body[bool(ast.get_docstring(node)):]
    return ast.dump(tree)


def git(*arguments: str) -> str:
    return subprocess.check_output(["git", *arguments], cwd=ROOT, text=True).strip()


def machine() -> str:
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} CPU cores"
    return f"{device}, {platform.system()} {platform.machine()}"


def score_test(name: str, run: evaluation.Run) -> dict:
    """Scores the test split as eval.py does, and keeps the sums of each stratum."""
    path, corpus = RESULTS / f"{name}.npz", run.corpus("test")
    stratum, shape = strata(run, corpus)
    sums = {"tokens": np.bincount(stratum, minlength=math.prod(shape))}
    scored = {"test": {}, "no_overlap": {}, "stream": {}}
    for plan in run.finished_plans():
        scores = run.score(run.model(plan), corpus, desc=f"test {plan}")
        sums[plan] = np.bincount(stratum, scores.nll, math.prod(shape))
        scored["test"][plan] = evaluation.summary(scores, corpus, run.store().bytes["test"])
        scored["stream"][plan] = stream(run, plan)
        if "no_overlap" in PARTS[name].traps:
            scored["no_overlap"][plan] = no_overlap(run, plan)
    kept = dict(np.load(path)) if path.exists() else {}
    kept |= {f"{run.config.seed} {of}": x.reshape(shape).astype("f4") for of, x in sums.items()}
    with data.replacing(path) as working, open(working, "wb") as file:
        np.savez_compressed(file, **kept)
    return scored


def stream(run, plan: str) -> float:
    """Nats a token in each tenth step of stage joint's last third, in windows that are new to that
    stage and do not overlap: to be compared with no_overlap."""
    lines = map(json.loads, (run.out / "metrics.jsonl").read_text("utf-8").splitlines())
    losses = {line["step"]: line["loss"] for line in lines      # of a step done twice, the last
              if line["stage"] == f"joint_{plan}" and "loss" in line}
    return statistics.mean(losses[i] for i in losses if i > run.config.joint_steps * 2 / 3)


def strata(run, corpus) -> tuple[np.ndarray, tuple]:
    """The stratum of each token but the first, as an index into a table of the returned shape:
    document, place in the sentence, whether the document began before the window in which the token
    is scored, and whether the sentence stands in the training text, too."""
    target = np.arange(1, len(corpus.tokens))
    sentence = np.searchsorted(corpus.sentences, target, side="right") - 1
    document = np.searchsorted(corpus.documents, sentence, side="right") - 1
    place = np.searchsorted([*PLACES], 1 + target - corpus.sentences[sentence], side="right") - 1
    T = run.config.block_size
    window = T // 2 * np.maximum(0, -(-(target - T) // (T // 2)))       # where it starts: see score
    older = corpus.sentences[corpus.documents[document]] < window
    texts = [[text.tobytes() for text in np.split(of.tokens, of.sentences[1:])]
             for of in (corpus, run.corpus("train"))]                   # of each sentence
    known = set(texts[1])
    copied = np.array([text in known for text in texts[0]])[sentence]
    document -= document[0]                             # the opening <|endoftext|> has no target
    shape = document.max() + 1, len(PLACES), 2, 2
    index = document, place, older.astype(int), copied.astype(int)
    return np.ravel_multi_index(index, shape), shape


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

def nats(side: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A "PART PLAN STRATUM", the last being left out where it is all tokens -> its sums of nats
    over each test document, and the numbers of its tokens."""
    part, plan, stratum = f"{side} ".split(" ")[:3]
    file = np.load(RESULTS / f"{part}.npz")
    tables = [file[f"{seed} {key}"].astype(float)[STRATA[stratum][1]] for key in (plan, "tokens")]
    return tuple(table.reshape(len(table), -1).sum(1) for table in tables)


def paired(lower: str, higher: str) -> tuple[list[np.ndarray], np.ndarray]:
    """For each seed that both sides have, their sums of nats over each test document, one less the
    other; and the documents' numbers of tokens."""
    each, tokens = [], None
    seeds = finished(lower.split()[0]).keys() & finished(higher.split()[0]).keys()
    for seed in sorted(seeds):
        (some, tokens), (others, same) = nats(lower, seed), nats(higher, seed)
        assert np.array_equal(tokens, same), f"{lower} and {higher} have different test documents"
        each.append(some - others)
    return each, tokens


def t_test(differences: list[float]) -> tuple[float, float, float]:
    """Paired: mean, half the width of the 95 % interval, two-sided p of Student's t."""
    n, mean = len(differences), statistics.mean(differences)
    error = statistics.stdev(differences) / math.sqrt(n)
    # with t = sqrt(n - 1) tan(angle), the density of the angle is that of cos^(n - 2)
    angle = np.linspace(0, math.pi / 2, 200_001)
    weight = np.cos((angle[1:] + angle[:-1]) / 2) ** (n - 2)
    within = np.append(0, weight.cumsum()) / weight.sum()       # share of |t| below each angle's
    critical = math.sqrt(n - 1) * math.tan(np.interp(0.95, within, angle))
    reached = math.atan2(abs(mean), error * math.sqrt(n - 1))
    return mean, critical * error, 1 - float(np.interp(reached, angle, within))


def holm(p_values: list[float]) -> list[float]:
    """Holm's correction: the smallest of m times m, the next times m - 1, and so on; none falls."""
    times = np.arange(len(p_values), 0, -1)
    corrected = np.maximum.accumulate(np.sort(p_values) * times).clip(max=1)
    return corrected[np.argsort(np.argsort(p_values))].tolist()         # in the order given


def bootstrap(differences: np.ndarray, tokens: np.ndarray) -> list[float]:
    """95 % interval of the difference in nats a token, from its sums over each document and their
    numbers of tokens: over sets of documents drawn with replacement."""
    n = len(tokens)
    times = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=2000)   # (draws, n)
    return np.quantile((times @ differences) / (times @ tokens), [0.025, 0.975]).tolist()


# --- the text -------------------------------------------------------------------------------------

def cells(name: str, path: str, *columns: str) -> str:
    """Some values of a JSON file, "PATH:FORMAT" each, below a path like "runs/0"."""
    shown = []
    for column in columns:
        key, _, form = column.partition(":")
        value = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
        for step in f"{path}/{key}".strip("/").split("/"):
            value = value[int(step)] if isinstance(value, list) else value[step]
        shown.append(format(value, form))
    return " | ".join(shown)


def percent(nats: float) -> str:
    """A difference in nats a token as one of perplexity."""
    return f"{100 * math.expm1(nats):+.2f}"


def markdown(header: str, rows: list[str]) -> str:
    return "\n".join([header, "|" + "---|" * (header.count("|") - 1), *rows])


def figures(side: str, split: str, key: str = "nll") -> dict[int, float | None]:
    """seed -> a figure of "PART PLAN" on the split."""
    part, plan = side.split()
    runs = {seed: run["plans" if split == "val" else split] for seed, run in finished(part).items()}
    found = {seed: run[plan] for seed, run in runs.items() if plan in run}
    return {seed: x[key] if isinstance(x, dict) else x for seed, x in found.items()}


def mean(side: str, split: str = "test", key: str = "ppl", form: str = ".2f") -> str:
    values = figures(side, split, key).values()
    if None in values:
        return ""
    return format(statistics.mean(values), form) if values else "not yet run"


def change(lower: str, higher: str, split: str = "test") -> str:
    """The change of perplexity from one side to another: its mean, and that of each seed."""
    some, others = figures(lower, split), figures(higher, split)
    each = [some[seed] - others[seed] for seed in some if seed in others]
    if not each:
        return "not yet run"
    return f"{percent(statistics.mean(each))} % ({', '.join(map(percent, each))})"


def row(what: str, side: str, against: str, split: str = "test") -> str:
    """A "PART PLAN": means over its seeds, and its change against another's."""
    if not figures(side, split):
        return f"| {what} | not yet run | | | |"
    changed = "" if side == against else change(side, against, split)
    bits, label = mean(side, split, "bits_per_byte", ".4f"), mean(side, split, "planner_ce")
    return f"| {what} | {mean(side, split)} | {changed} | {bits} | {label} |"


def plans(part: str, split: str = "test") -> str:
    """A part's plans, against its own `none`."""
    names = re.search(r"--plans=(\S+)", PARTS[part].options)[1]
    rows = [row(f"`{plan}`", f"{part} {plan}", f"{part} none", split)
            for plan in train.Config(plans=names).plan_names
            if all(plan in run["plans"] for run in finished(part).values())]    # a later one isn't
    columns = "| plan | perplexity | against `none` (each seed) | bits per byte | label nats |"
    return markdown(columns, rows)


def where(part: str, names: str, *strata_names: str) -> str:
    """Where the gain falls: some plans against the part's `none`, by stratum, means over seeds."""
    rows, plans = [], names.split()
    for stratum in strata_names if finished(part) else ():
        _, all_tokens = paired(f"{part} none", f"{part} none")
        pairs = [paired(f"{part} {plan} {stratum}", f"{part} none {stratum}") for plan in plans]
        tokens = pairs[0][1].sum()
        gains = [percent(np.mean(each, 0).sum() / tokens) for each, _ in pairs]
        share = f"{tokens / all_tokens.sum():.1%}"
        rows.append(f"| {' | '.join([STRATA[stratum][0], share, *gains])} |")
    titles = " | ".join(f"`{plan}`, %" for plan in plans)
    return markdown(f"| tokens | share | {titles} |", rows)


def comparisons(_: str) -> str:
    """The rows of COMPARISONS, those with two seeds or more; the others count as p = 1 in Holm's
    correction, so that the list stays as long as it was written."""
    rows, p_values = [], []
    for claim, lower, higher in COMPARISONS:
        each, tokens = paired(lower, higher)            # (documents,) each
        shown, p = "not yet run |  | ", 1.0
        if len(each) > 1:                               # else there is no spread over seeds
            mean, half, p = t_test([x.sum() / tokens.sum() for x in each])
            low, high = bootstrap(np.mean(each, 0), tokens)
            shown = (f"{percent(mean)} | {percent(mean - half)} to {percent(mean + half)} "
                     f"({len(each)}) | {percent(low)} to {percent(high)}")
        rows.append(f"| {claim} | `{lower}` - `{higher}` | {shown}")
        p_values.append(p)
    rows = [f"{row} | {p:.3f} |".replace(" 0.000 |", " <0.001 |")
            for row, p in zip(rows, holm(p_values))]
    return markdown("| claim | compared | change, % | over seeds (n) | over documents | p, Holm |",
                    rows)


def write_readme() -> str:
    """results/template.md, where {{NAME: ARGUMENT, ...}} stands for what that function returns."""
    makers = {make.__name__: make for make in (cells, mean, change, row, plans, where, comparisons)}
    return re.sub(r"\{\{(\w+): (.+?)\}\}", lambda marker: makers[marker[1]](*marker[2].split(", ")),
                  (RESULTS / "template.md").read_text("utf-8"))


# --- command line ---------------------------------------------------------------------------------

def main() -> None:
    parser = evaluation.Parser(prog="run_all.py", description=__doc__)
    parser.add_argument("names", nargs="*", default="all", choices=["all", *PARTS])
    parser.add_argument("--seed", type=int, help="of the parts' seeds, this one alone")
    parser.add_argument("--table", action="store_true", help="write results/README.md")
    args = parser.parse_args()
    os.chdir(ROOT)                                      # so that cache/ is found
    if args.table:
        (RESULTS / "README.md").write_text(write_readme(), "utf-8")
        return
    for name in PARTS if "all" in args.names else args.names:
        run_part(name, args.seed)


if __name__ == "__main__":
    main()
