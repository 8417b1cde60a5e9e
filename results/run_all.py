"""Makes the figures of the README from scratch, a part at a time, resumably.

    python results/run_all.py                    # every part: many hours on a laptop
    python results/run_all.py claims traps_end   # some
    python results/run_all.py claims --seed=3    # one seed of it
    python results/run_all.py comparisons inside generation      # made from the runs of the others
    python results/run_all.py --table            # the README's tables, from the JSON files

A part is some runs of train.py that differ in the seed alone. results/NAME.json holds its command,
options, commit, machine, versions, and for each seed the results.json of its run (validation) and,
where all was decided on validation, `test`. The runs themselves stay under out-results/.
"""
import json
import math
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
MAIN = ("none", "hard", "soft_frozen", "soft", "oracle")


@dataclass
class Part:
    options: str                                     # of train.py
    seeds: tuple = (0, 1, 2)
    split: str = "test"                              # val: a choice, so test is not read
    start: str = ""                                  # stages that it starts from ...
    base: str = "claims"                             # ... of this part
    traps: str = ""                                  # left open: see `open_traps`


STAGES = "lm labels planner"
PARTS = {
    "claims": Part("--plans=all", (0, 1, 2, 3, 4)),
    # claim 3: a frozen planner with as many more steps of label loss
    "frozen_longer": Part("--plans=soft_frozen --planner_steps=950", start="lm labels"),
    # ... and one whose steps are those with the least label loss on validation
    "planner_400": Part("--plans=hard,soft_frozen,soft --planner_steps=400", start="lm labels"),
    # ... and one that saw no label at all
    "untrained": Part("--plans=soft --planner_steps=1 --planner_lr=0", start="lm labels"),
    # claim 4: the grid of learning rates (claims itself is its middle)
    "rate_low": Part("--plans=hard,straight_through,soft --joint_lr=1e-3 --joint_planner_lr=2.5e-4",
                     (0,), "val", STAGES),
    "rate_high": Part("--plans=hard,straight_through,soft --joint_lr=4e-3 --joint_planner_lr=1e-3",
                      (0,), "val", STAGES),
    # ... where hard and soft are best on validation, on fresh seeds; straight_through is at claims
    "rate_best": Part("--plans=hard,soft --joint_lr=4e-3 --joint_planner_lr=1e-3", (1, 2),
                      start=STAGES),
    # claim 5: three times the joint steps
    "longer": Part("--plans=none,hard,soft --joint_steps=2400", start=STAGES),
    # claim 6: the planner sees what the GPT sees; a window that covers most documents whole
    "view": Part("--plans=soft --planner_view=window", start=STAGES),
    "window": Part("--plans=none,hard,soft_frozen,soft --block_size=256 --batch_size=8",
                   (0, 1, 2, 3, 4)),
    "window_view": Part("--plans=soft --block_size=256 --batch_size=8 --planner_view=window",
                        (0, 1, 2, 3, 4), start=STAGES, base="window"),
    # claim 7: what the traps are worth
    "traps_end": Part("--plans=none,hard,soft", start="lm joint_none", traps="end"),
    "traps_all": Part("--plans=none,hard,soft", start="lm joint_none", traps="end ahead"),
    # inside: what a label loss beside the LM loss costs or gives
    "label_loss": Part("--plans=soft --label_loss_weight=0.1", start=STAGES, split="val"),
    # another corpus
    "wikipedia": Part("--data=cache/wikipedia.jsonl --plans=" + ",".join(MAIN)),
    "wikipedia_view": Part("--data=cache/wikipedia.jsonl --plans=soft --planner_view=window",
                           start=STAGES, base="wikipedia"),
    "wikipedia_window": Part("--data=cache/wikipedia.jsonl --plans=none,hard,soft_frozen,soft "
                             "--block_size=256 --batch_size=8"),
    "wikipedia_window_view": Part("--data=cache/wikipedia.jsonl --plans=soft --block_size=256 "
                                  "--batch_size=8 --planner_view=window",
                                  start=STAGES, base="wikipedia_window"),
    # another kind of sentence vectors
    "vectors_hidden": Part("--plans=soft --vectors=hidden", (0,), "val", "lm"),
}

# (what is claimed, the lower one, the higher one). Written down before this code was read on test;
# an earlier version had been, with three seeds of none, hard and soft.
COMPARISONS = (
    ("1. a plan helps", "claims hard", "claims none"),
    ("2. the whole distribution helps", "claims soft_frozen", "claims hard"),
    ("3. training end to end helps", "claims soft", "claims soft_frozen"),
    ("3. it is not the extra training of the planner", "claims soft", "frozen_longer soft_frozen"),
    ("3. the label stage helps", "claims soft", "untrained soft"),
    ("4. the straight-through gradient helps", "claims straight_through", "claims hard"),
    ("4. the mixture is better than it", "claims soft", "claims straight_through"),
    ("5. the method against the earlier one", "claims soft", "claims hard"),
    ("5. the method against no plan", "claims soft", "claims none"),
    ("5. the same, three times the steps", "longer soft", "longer hard"),
    ("5. the same, three times the steps", "longer soft", "longer none"),
    ("6. it is not the longer view", "view soft", "claims none"),
    ("6. nor that the window is short", "window soft", "window none"),
)
# Asked later, when the first of these runs had been read on test: to be taken as a hint.
LATER = (
    ("4. each at its best learning rate", "rate_best soft", "claims straight_through"),
    ("4. each at its best learning rate", "claims straight_through", "rate_best hard"),
    ("2. a better planner: the whole distribution", "planner_400 soft_frozen", "planner_400 hard"),
    ("3. ... training end to end", "planner_400 soft", "planner_400 soft_frozen"),
    ("5. ... the method against the earlier one", "planner_400 soft", "planner_400 hard"),
    ("5. ... the method against no plan", "planner_400 soft", "claims none"),
    ("6. in a window of 256: a plan helps", "window hard", "window none"),
    ("6. ... the whole distribution helps", "window soft_frozen", "window hard"),
    ("6. ... training end to end helps", "window soft", "window soft_frozen"),
    ("6. ... the method against the earlier one", "window soft", "window hard"),
    ("6. ... the planner sees only the window", "window_view soft", "window none"),
    ("6. Wikipedia: the planner sees only the window", "wikipedia_view soft", "wikipedia none"),
    ("6. Wikipedia, in a window of 256", "wikipedia_window soft", "wikipedia_window none"),
    ("6. ... the method against the earlier one", "wikipedia_window soft", "wikipedia_window hard"),
    ("6. ... the planner sees only the window", "wikipedia_window_view soft",
     "wikipedia_window none"),
)
# Parameters alone explain nothing: these intervals should lie within 20 % of hard's gain.
EQUAL = (("1. parameters alone", "claims fixed", "claims none"),
         ("1. parameters alone", "claims uniform", "claims none"))


# --- runs -----------------------------------------------------------------------------------------

def machine() -> str:
    import torch                                     # not needed for --table
    device = (torch.cuda.get_device_name() if torch.cuda.is_available()
              else f"{os.cpu_count()} CPU cores")
    return f"{device}, {platform.system()} {platform.machine()}"


def folder(name: str, seed: int) -> Path:
    return ROOT / f"out-results/{name}-{seed}"


def commit() -> str:
    """The commit that this checkout is at, and whether its files are others."""
    said = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True,
                          capture_output=True)
    return said.stdout.strip()


def run_part(name: str, only_seed: int | None = None) -> None:
    part, path = PARTS[name], ROOT / "results" / f"{name}.json"
    found = re.search(r"--data=(cache/\S+)", part.options)
    if found and not (ROOT / found[1]).exists():
        return print(f"{name}: passed over, for {found[1]} is not there: see the README")
    for seed in part.seeds if only_seed is None else [only_seed]:
        if path.exists() and seed in [run["seed"] for run in json.loads(path.read_text())["runs"]]:
            continue
        begun = time.time()
        subprocess.run([sys.executable, __file__, "--one", name, str(seed)], cwd=ROOT, check=True)
        result = json.loads((folder(name, seed) / "part.json").read_text())
        result["seconds"] = round(time.time() - begun)
        # read again: another seed may have been finished meanwhile
        saved = json.loads(path.read_text()) if path.exists() else {"runs": []}
        saved["runs"] = sorted([*saved["runs"], result], key=lambda run: run["seed"])
        saved |= {"command": f"python results/run_all.py {name} --seed=SEED",
                  "options": part.options, "split": part.split, "commit": commit(),
                  "machine": machine(), "versions": result["versions"]}
        path.write_text(json.dumps(saved, indent=1) + "\n")


def run_one(name: str, seed: int) -> None:
    """One run, in a process of its own: trains, and reads the test split where the part says so."""
    import eval as evaluation
    import train
    part, out = PARTS[name], folder(name, seed)
    open_traps(part.traps)
    if part.start and not out.exists():              # train.py looks whether their options agree
        draft = out.with_suffix(".draft")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        for file in [f"{stage}.pt" for stage in part.start.split()] + ["config.json"]:
            shutil.copy(folder(part.base, seed) / file, draft / file)
        draft.rename(out)
    # finished stages are reused, if they were made with these options
    train.main([*shlex.split(part.options), f"--seed={seed}", f"--out_dir={out}", "--resume"])
    result = json.loads((out / "results.json").read_text())
    result["dtype"] = json.loads((out / "config.json").read_text())["dtype"]
    if part.split == "test":
        run, found = scores(out, "test")
        result["test"] = {plan: evaluation.summary(s, run.bytes) for plan, s in found.items()}
        if name == "claims" or part.traps:
            result["no_overlap"] = {p: no_overlap(run, p) for p in ("none", "hard", "soft")}
    (out / "part.json").write_text(json.dumps(result))


def scores(out: Path, split: str):
    """A finished run with its corpus open, and {plan: Scores}, kept in out/scores.SPLIT.npz."""
    import eval as evaluation
    run, path = evaluation.Run.open(out), out / f"scores.{split}.npz"
    run.split, run.opened = split, run.corpus(split)
    trained = max(file.stat().st_mtime for file in out.glob("joint_*.pt"))
    if not path.exists() or path.stat().st_mtime < trained:
        sentences = run.sentences(run.opened, split)
        arrays = {f"{plan}.{kind}": array for plan in run.plans for kind, array in
                  vars(run.score(plan, run.opened, *sentences, bar=plan)).items()}
        np.savez(path, **arrays)
    arrays = np.load(path)
    plans = dict.fromkeys(key.split(".")[0] for key in arrays)
    return run, {plan: evaluation.Scores(*(arrays[f"{plan}.{kind}"] for kind in
                 ("nll", "ce", "rank", "entropy", "top", "prob"))) for plan in plans}


# --- the traps, which stay out of the product -----------------------------------------------------

def open_traps(names: str) -> None:
    """`end`: <|endoftext|> counts to the next document's first sentence. `ahead`: no sentence ends
    where a small letter follows, so that the moment of a new plan tells what comes next."""
    import data
    right, causal = data.Store.split, data.boundaries

    def ahead(text):
        return [b for b in causal(text) if not text[b:b + 1].islower()]

    def split(store, name):                          # the store itself stays as it is
        tokens = np.asarray(right(store, name).tokens)
        with mock.patch.object(data, "boundaries", ahead if "ahead" in names else causal):
            corpus = data.Corpus.from_tokens(tokens, store.tokenizer)
        ends = np.flatnonzero(tokens == store.tokenizer.eot_token)
        sentences = np.unique(corpus.sentences - np.isin(corpus.sentences, ends + 1))
        return data.Corpus(tokens, sentences, np.searchsorted(sentences, ends))

    if names:
        data.Store.split = split


def no_overlap(run, plan: str) -> float:
    """Nats a token in windows that do not overlap, as most evaluations have it: just after a
    window's start the planner sees what the GPT does not."""
    import torch
    import data
    c, model, T = run.config, run.model(plan), run.config["block_size"]
    vectors, labels = run.sentences(run.opened, run.split)
    starts, total = np.arange(0, len(run.opened.tokens) - 1, T), 0.0
    for at in np.array_split(starts, -(-len(starts) // 64)):
        batch = data.window_batch(run.opened, at, T, vectors, labels, c["planner_reach"],
                                  c["planner_view"]).to(run.device)
        with torch.no_grad(), run.autocast():
            total += float(model(batch, reduction="none")[0].double().sum())
    return total / (len(run.opened.tokens) - 1)


# --- statistics -----------------------------------------------------------------------------------

def t_test(differences: list[float]) -> tuple[float, float, float]:
    """Paired: mean, half the width of the 95 % interval, two-sided p of Student's t; nan for the
    last two where there is but one difference."""
    n, mean = len(differences), statistics.mean(differences)
    if n < 2:
        return mean, math.nan, math.nan
    error = statistics.stdev(differences) / math.sqrt(n)
    # with t = sqrt(n - 1) tan(angle), the density of the angle is that of cos^(n - 2)
    angle = np.linspace(0, math.pi / 2, 200_001)
    weight = np.cos(angle) ** (n - 2)
    inside = np.concatenate([[0], np.cumsum((weight[1:] + weight[:-1]) / 2)])
    inside /= inside[-1]                             # share of |t| below each angle's
    critical = math.sqrt(n - 1) * math.tan(np.interp(0.95, inside, angle))
    reached = math.atan2(abs(mean), error * math.sqrt(n - 1))
    return mean, critical * error, 1 - float(np.interp(reached, angle, inside))


def holm(p_values: list[float]) -> list[float]:
    """Holm's correction: the i-th smallest of m is multiplied by m - i, and none may fall."""
    order, corrected, least = np.argsort(p_values), [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order.tolist()):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = least
    return corrected


def bootstrap(lower: np.ndarray, higher: np.ndarray, tokens: np.ndarray) -> list[float]:
    """95 % interval of the difference in nats a token, over drawn sets of documents: sums of nats
    (documents,), averaged over seeds, and their tokens."""
    random, n = np.random.default_rng(0), len(tokens)
    times = random.multinomial(n, np.full(n, 1 / n), size=2000)                 # (draws, documents)
    return np.quantile((times @ (lower - higher)) / (times @ tokens), [0.025, 0.975]).tolist()


def by_document(name: str, plan: str, seeds: list[int]):
    """Sums of test nats (documents,), averaged over seeds, and numbers of tokens."""
    sums = []
    for seed in seeds:
        run, found = scores(folder(name, seed), "test")
        cuts = run.opened.sentences[run.opened.documents][1:-1] - 1   # nll's first is of token 1
        sums.append(np.add.reduceat(found[plan].nll, cuts))
        tokens = np.diff(np.append(cuts, len(found[plan].nll)))
    return np.mean(sums, 0), tokens


def make_comparisons() -> None:
    rows, listed = [], []
    for claim, *pair in COMPARISONS + EQUAL + LATER:
        (part, plan), (part_2, plan_2) = (side.split() for side in pair)
        if not all((ROOT / "results" / f"{p}.json").exists() for p in (part, part_2)):
            continue
        a, b = nll(part, plan), nll(part_2, plan_2)
        seeds = sorted(a.keys() & b.keys())
        mean, half, p = t_test([a[seed] - b[seed] for seed in seeds])
        low, tokens = by_document(part, plan, seeds)
        high, _ = by_document(part_2, plan_2, seeds)
        known = len(seeds) > 1                       # else no spread over seeds
        rows.append({"claim": claim, "lower": pair[0], "higher": pair[1], "seeds": seeds,
                     "nats": mean, "interval": [mean - half, mean + half] if known else None,
                     "p": p if known else None,
                     "documents": bootstrap(low, high, tokens),
                     "later": (claim, *pair) in LATER})
        if known and (claim, *pair) in COMPARISONS:
            listed.append(rows[-1])
        print(rows[-1])
    # one that has but one seed counts as p = 1, so that the list is as long as it was written
    p_values = [row["p"] for row in listed] + [1.0] * (len(COMPARISONS) - len(listed))
    for row, p in zip(listed, holm(p_values)):
        row["p_holm"] = p
    (ROOT / "results" / "comparisons.json").write_text(json.dumps(
        {"command": "python results/run_all.py comparisons", "rows": rows}, indent=1) + "\n")


# --- what happens inside --------------------------------------------------------------------------

POSITIONS = ((0, 1), (1, 2), (2, 4), (4, 8), (8, 16), (16, 1 << 30))


def make_inside() -> None:
    seeds = [run["seed"] for run in load("claims")["runs"]]
    found = {"command": "python results/run_all.py inside", "seeds": seeds,
             "positions": positions(seeds), "drift": drift(seeds), "labels": gaining(seeds[0]),
             "account": account(seeds)}
    (ROOT / "results" / "inside.json").write_text(json.dumps(found, indent=1) + "\n")


def make_generation() -> None:
    found = {"command": "python results/run_all.py generation", "seed": 0, **generation(0)}
    (ROOT / "results" / "generation.json").write_text(json.dumps(found, indent=1) + "\n")


def positions(seeds: list[int]) -> list[dict]:
    """Nats a test token against `none`, by its place in its sentence; the share of tokens."""
    rows = []
    for seed in seeds:
        run, found = scores(folder("claims", seed), "test")
        corpus = run.opened
        at = np.arange(1, len(corpus.tokens))
        place = at - corpus.sentences[np.searchsorted(corpus.sentences, at, side="right") - 1]
        for i, (first, end) in enumerate(POSITIONS):
            here = (place >= first) & (place < end)
            rows.append({"place": i, "share": here.mean(), **{
                plan: (found[plan].nll - found["none"].nll)[here].mean()
                for plan in found if plan != "none"}})
    mean = lambda i, key: float(np.mean([row[key] for row in rows if row["place"] == i]))
    return [{key: mean(i, key) for key in rows[0] if key != "place"} for i in range(len(POSITIONS))]


def drift(seeds: list[int]) -> dict[str, list]:
    """What the planner says of validation, over the joint steps: means over seeds."""
    curves = {}
    for name, plan in (("claims", "hard"), ("claims", "soft"), ("claims", "straight_through"),
                       ("untrained", "soft"), ("label_loss", "soft")):
        seen = []
        for seed in seeds:
            path = folder(name, seed) / "metrics.jsonl"
            lines = [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []
            seen += [line for line in lines if line["stage"] == f"joint_{plan}"
                     and "val_label_nats" in line]
        curves[f"{name} {plan}"] = [
            {"step": step, **{key: statistics.mean(x[key] for x in seen if x["step"] == step)
                              for key in ("val_nll", "val_label_nats", "val_top1", "val_entropy")}}
            for step in sorted({line["step"] for line in seen})]
    return curves


def gaining(seed: int, show: int = 4, least: int = 1000) -> list[dict]:
    """The labels whose sentences gain most and least from `soft`, in nats a token, among those with
    at least `least` tokens."""
    run, found = scores(folder("claims", seed), "test")
    _, labels = run.sentences(run.opened, "test")
    at = np.arange(1, len(run.opened.tokens))
    sentence = np.searchsorted(run.opened.sentences, at, side="right") - 1
    finished = sentence < len(labels)
    own, saved = labels[sentence[finished]], (found["soft"].nll - found["none"].nll)[finished]
    tokens = np.bincount(own, minlength=run.config["n_labels"])
    mean = np.bincount(own, saved, len(tokens)) / tokens.clip(1)
    order = [j for j in np.argsort(mean).tolist() if tokens[j] >= least]
    return [{"label": j, "nats": float(mean[j]), "tokens": int(tokens[j]),
             "words": run.saved_labels["descriptions"][j]["words"]}
            for j in order[:show] + order[-show:]]


def account(seeds: list[int]) -> dict[str, float]:
    """DESIGN section 6, in nats a test token: what the true label gives, what naming it costs."""
    runs = [run for run in load("claims")["runs"] if run["seed"] in seeds]
    mean = lambda plan, key: statistics.mean(run["test"][plan][key] for run in runs)
    run, found = scores(folder("claims", seeds[0]), "test")
    length = len(found["none"].nll) / run.opened.n_sentences
    nats = {plan: mean(plan, "nll") for plan in ("none", "soft", "oracle")}
    return nats | {"tokens": length, "naming": mean("hard", "planner_ce") / length}


def generation(seed: int, n_documents: int = 100, given: int = 3, wanted: int = 5) -> dict:
    """Continues documents after their first sentences; the labels of what is written against those
    of the true continuation: Levenshtein distance as a share of the length, and nats a label under
    the bigrams of the training split. Means and standard errors over documents."""
    import eval as evaluation
    import labels as labelling
    run = evaluation.Run.open(folder("claims", seed))
    corpus = run.corpus("val")
    _, labels = run.sentences(corpus, "val")
    _, bigram = labelling.label_frequencies(run.saved_labels["transitions"])
    sizes, chosen = np.diff(corpus.documents), []
    for document in np.flatnonzero(sizes >= given + wanted)[:n_documents]:
        j = int(corpus.documents[document])
        tokens = corpus.tokens[corpus.sentences[j]:corpus.sentences[j + given]]
        chosen.append((j, run.tokenizer.decode(tokens.tolist())))
    result = {"documents": len(chosen), "given": given, "wanted": wanted}
    for plan in ("true", "none", "hard", "soft"):
        distances, nats = [], []
        for number, (j, prompt) in enumerate(chosen):
            true = labels[j + given:j + given + wanted].tolist()
            written = true if plan == "true" else []
            if plan != "true":
                for s in evaluation.generate(run, plan, prompt, 64 * wanted, 1.0, 0, number):
                    if s["written"] and s["label"] is not None and len(written) < wanted:
                        written.append(s["label"])
            before = [int(labels[j + given - 1]), *written]
            distances.append(levenshtein(written, true) / wanted)
            if written:
                nats.append(-float(bigram[before[:-1], written].log().mean()))
        error = lambda x: statistics.stdev(x) / math.sqrt(len(x))
        result[plan] = {"levenshtein": statistics.mean(distances), "levenshtein_error":
                        error(distances), "nats": statistics.mean(nats), "nats_error": error(nats)}
        print(plan, result[plan])
    return result


def levenshtein(a: list, b: list) -> int:
    """The fewest insertions, deletions and substitutions that turn one into the other."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, previous = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (x != y)))
    return row[-1]


# --- tables ---------------------------------------------------------------------------------------

def load(name: str) -> dict:
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


def nll(name: str, plan: str) -> dict[int, float]:
    """seed -> nats a token, on the part's split"""
    part = load(name)
    key = "test" if part["split"] == "test" else "plans"
    return {run["seed"]: run[key][plan]["nll"] for run in part["runs"]}


def percent(nats: float) -> str:
    """A difference in nats a token as one of perplexity."""
    return f"{100 * math.expm1(nats):+.2f}"


def plans_table(name: str) -> str:
    """A part's plans: means over seeds, and the paired change against `none`."""
    part = load(name)
    key = "test" if part["split"] == "test" else "plans"
    runs = [run[key] for run in part["runs"]]
    rows = ["| plan | perplexity | against `none` | each seed, % | bits per byte | label nats |",
            "|---|---|---|---|---|---|"]
    for plan in runs[0]:
        mean = lambda quantity: statistics.mean(run[plan][quantity] for run in runs)
        change = each = ""
        if plan != "none":
            changes = [run[plan]["nll"] - run["none"]["nll"] for run in runs]
            change = f"{statistics.mean(100 * math.expm1(c) for c in changes):+.2f} %"
            each = ", ".join(map(percent, changes))
        label = "" if runs[0][plan]["planner_ce"] is None else f"{mean('planner_ce'):.2f}"
        rows.append(f"| `{plan}` | {mean('ppl'):.2f} | {change} | {each} | "
                    f"{mean('bits_per_byte'):.4f} | {label} |")
    return "\n".join(rows)


def comparisons_table(later: bool = False) -> str:
    rows = ["| claim | compared | change, % | over seeds (n) | over documents |"
            + ("" if later else " p, Holm |"), "|---|---|---|---|---|" + ("" if later else "---|")]
    for row in load("comparisons")["rows"]:
        if row["later"] != later:
            continue
        name = lambda side: "`" + side.removeprefix("claims ").replace(" ", ": ") + "`"
        span = lambda ends: " to ".join(map(percent, ends))
        p = "" if later else "  |"
        if "p_holm" in row:
            p = " <0.001 |" if row["p_holm"] < 0.0005 else f" {row['p_holm']:.3f} |"
        over_seeds = span(row["interval"]) if row["interval"] else "-"
        rows.append(f"| {row['claim']} | {name(row['lower'])} - {name(row['higher'])} | "
                    f"{percent(row['nats'])} | {over_seeds} ({len(row['seeds'])}) | "
                    f"{span(row['documents'])} |{p}")
    return "\n".join(rows)


def traps_table() -> str:
    end = "`<\\|endoftext\\|>` in the next document's first sentence"
    rows = [("none", "claims", "test"), (end, "traps_end", "test"),
            ("scored in windows without overlap", "claims", "overlap"),
            (f"both: without overlap, and {end}", "traps_end", "overlap"),
            ("both, and a splitter that looks ahead", "traps_all", "overlap")]
    rows = [row for row in rows if (ROOT / "results" / f"{row[1]}.json").exists()]
    seeds = set.intersection(*({run["seed"] for run in load(name)["runs"]} for _, name, _ in rows))

    def change(name, plan, key):
        changes = []
        for run in load(name)["runs"]:
            if run["seed"] in seeds:
                a, b = (run["test"][p]["nll"] if key == "test" else run["no_overlap"][p]
                        for p in (plan, "none"))
                changes.append(100 * math.expm1(a - b))
        each = f" ({', '.join(f'{c:+.2f}' for c in changes)})" if len(changes) > 1 else ""
        return f"{statistics.mean(changes):+.2f} %{each}"
    return "\n".join([
        "| traps left open | `hard` against `none` | `soft` against `none` |", "|---|---|---|",
        *(f"| {text} | {change(name, 'hard', key)} | {change(name, 'soft', key)} |"
          for text, name, key in rows)])


def rates_table() -> str:
    """Validation perplexity of seed 0 over the grid of claim 4."""
    rows = ["| `joint_lr`, `joint_planner_lr` | `hard` | `straight_through` | `soft` |",
            "|---|---|---|---|"]
    for name, text in (("rate_low", "1e-3, 2.5e-4"), ("claims", "2e-3, 5e-4"),
                       ("rate_high", "4e-3, 1e-3")):
        plans = next(run["plans"] for run in load(name)["runs"] if run["seed"] == 0)
        rows.append(f"| {text} | " + " | ".join(
            f"{plans[plan]['ppl']:.2f}" for plan in ("hard", "straight_through", "soft")) + " |")
    return "\n".join(rows)


def positions_table() -> str:
    plans = ("hard", "soft_frozen", "soft", "oracle")
    rows = ["| token of its sentence | share | " + " | ".join(f"`{p}`" for p in plans) + " |",
            "|---|---|" + "---|" * len(plans)]
    for (first, end), row in zip(POSITIONS, load("inside")["positions"]):
        name = f"{first + 1}" if end == first + 1 else (
            f"{first + 1} to {end}" if end < 1 << 30 else f"from {first + 1}")
        rows.append(f"| {name} | {row['share']:.0%} | "
                    + " | ".join(f"{row[plan]:+.3f}" for plan in plans) + " |")
    return "\n".join(rows)


def drift_table() -> str:
    curves = load("inside")["drift"]
    names = {"claims soft": "`soft`", "claims straight_through": "`straight_through`",
             "untrained soft": "`soft`, planner never trained before",
             "label_loss soft": "`soft`, label loss times 0.1 beside the LM loss"}
    start = curves["claims hard"][-1]
    show = lambda x: f"{x['val_label_nats']:.2f} / {x['val_top1']:.1%} / {x['val_entropy']:.2f}"
    steps = [line["step"] for line in curves["claims soft"]]
    rows = ["| label nats / top-1 / entropy after joint steps | "
            + " | ".join(map(str, steps)) + " |", "|---|" + "---|" * len(steps),
            f"| the frozen planner | {show(start)} |" + " |" * (len(steps) - 1)]
    for key, name in names.items():
        if curves.get(key):
            rows.append(f"| {name} | " + " | ".join(show(line) for line in curves[key]) + " |")
    return "\n".join(rows)


def labels_table() -> str:
    rows = ["| label | its words | `soft` - `none`, nats a token |", "|---|---|---|"]
    for row in load("inside")["labels"]:
        words = re.sub(r"[|`*_]", "", ", ".join(row["words"][:5]))
        rows.append(f"| {row['label']} | {words} | {row['nats']:+.3f} |")
    return "\n".join(rows)


def generation_table() -> str:
    found = load("generation")
    rows = ["| continuation by | distance to the true labels | nats a label under true bigrams |",
            "|---|---|---|"]
    for plan in ("none", "hard", "soft", "true"):
        x = found[plan]
        name = "the true text" if plan == "true" else f"`{plan}`"
        rows.append(f"| {name} | {x['levenshtein']:.3f} ± {x['levenshtein_error']:.3f} | "
                    f"{x['nats']:.2f} ± {x['nats_error']:.2f} |")
    return "\n".join(rows)


def speed_table() -> str:
    """What tests/bench.py reached, where there is an aim; of growth, from each table's first size
    to its last."""
    what = {"step": lambda row: f"`{row['step']}`",
            "kmeans": lambda row: f"K = {row['K']}, against {row['by']}",
            "prepare": lambda row: (f"{row['MB']:.0f} MB of text, memory against that of a tenth"
                                    if "peak MB" in row else row["what"]),
            "generate": lambda row: f"`soft`, tokens: {row['tokens']}",
            "growth": lambda row: row["table"].removeprefix("growth: ") + next(
                f": {key[2:]} x {value:.3g}" for key, value in row.items() if key[:2] == "x ")}
    rows = ["| benchmark | of | reached | aim |", "|---|---|---|---|"]
    for name, found in load("bench").items():
        for row, after in zip(found["rows"], [*found["rows"][1:], {}]):
            if "aim" in row and not (name == "growth" and after.get("table") == row["table"]):
                rows.append(f"| {name} | {what[name](row)} | {row['reached']:.3g} | {row['aim']} |")
    return "\n".join(rows)


TABLES = {                                           # name: (function, the files that it reads)
    "claims": (lambda: plans_table("claims"), ["claims"]),
    "comparisons": (comparisons_table, ["comparisons"]),
    "later": (lambda: comparisons_table(later=True), ["comparisons"]),
    "window": (lambda: plans_table("window"), ["window"]),
    "traps": (traps_table, ["claims", "traps_end"]),
    "rates": (rates_table, ["claims", "rate_low", "rate_high"]),
    "wikipedia": (lambda: plans_table("wikipedia"), ["wikipedia"]),
    "positions": (positions_table, ["inside"]), "drift": (drift_table, ["inside"]),
    "labels": (labels_table, ["inside"]), "generation": (generation_table, ["generation"]),
    "speed": (speed_table, ["bench"]),
}


def tables() -> dict[str, str]:
    """Those whose figures have been made, as Markdown."""
    return {name: make() for name, (make, files) in TABLES.items()
            if all((ROOT / "results" / f"{file}.json").exists() for file in files)}


if __name__ == "__main__":
    names = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    seeds = [int(argument[7:]) for argument in sys.argv if argument.startswith("--seed=")]
    made = {"comparisons": make_comparisons, "inside": make_inside, "generation": make_generation}
    if "--table" in sys.argv:
        for name, text in tables().items():
            print(f"{name}\n{text}\n")
    elif "--one" in sys.argv:
        run_one(names[0], int(names[1]))
    else:
        for name in names or [*PARTS, *made]:
            made[name]() if name in made else run_part(name, *seeds)
