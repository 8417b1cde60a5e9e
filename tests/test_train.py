"""Properties of whole runs: resuming, bad input, what a run leaves behind, and a corpus whose
best possible score is known. Runs are made in this process where they can be, and by the real
command where that matters.
"""
import dataclasses
import json
import math
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import eval as evaluation
import labels as labelling
import train

ROOT = Path(__file__).parent.parent


def made_up_text(n_documents: int, seed: int = 0) -> str:
    """Documents of two to six sentences with a little structure, separated as in a .txt corpus."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(3, 7))) for _ in range(60)]
    sentence = lambda: " ".join(draw.choices(words, k=draw.randint(5, 9))).capitalize() + "."
    document = lambda: " ".join(sentence() for _ in range(draw.randint(2, 6)))
    return "\n<|endoftext|>\n".join(document() for _ in range(n_documents)) + "\n"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text(made_up_text(300))
    return path


def options(corpus, out, **more):
    """Command-line arguments of a run of a second or two."""
    given = dict(preset="tiny", data=corpus, out_dir=out, cache_dir=Path(corpus).parent / "cache",
                 vocab_size=300, lm_steps=6, planner_steps=6, joint_steps=6, eval_every=3,
                 save_every=2, device="cpu", dtype="float32") | more
    return [f"--{name}={value}" for name, value in given.items()]


def run(corpus, out, **more):
    return train.run(train.parse_config(options(corpus, out, **more)))


@pytest.fixture(scope="session")
def trained(corpus, tmp_path_factory):
    """A finished run of all nine plans."""
    out = tmp_path_factory.mktemp("trained") / "out"
    run(corpus, out, plans="all")
    return out


def tensors(path):
    """All tensors of a checkpoint, flattened to {name: tensor}."""
    def walk(value, name):
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, dict):
            for key, inner in value.items():
                yield from walk(inner, f"{name}.{key}")
    return dict(walk(evaluation.load_checkpoint(path), path.name))


# --- resuming -------------------------------------------------------------------------------------

class Interrupted(Exception):
    pass


@pytest.mark.parametrize("stage", ["lm", "planner", "joint_none", "joint_gumbel", "joint_soft"])
def test_interrupted_and_resumed_equals_undisturbed(stage, corpus, trained, tmp_path, monkeypatch):
    out, log = tmp_path / "out", train.Job.log

    def failing(self, **entry):              # at a validation, which does not coincide with a save
        if entry["stage"] == stage and entry["step"] == 3:
            raise Interrupted
        log(self, **entry)

    monkeypatch.setattr(train.Job, "log", failing)
    plans = "none,gumbel,soft"
    with pytest.raises(Interrupted):
        run(corpus, out, plans=plans)
    assert evaluation.load_checkpoint(out / f"{stage}.pt")["step"] == 2
    monkeypatch.setattr(train.Job, "log", log)
    run(corpus, out, plans=plans, resume=True)
    for name in ("lm", "labels", "planner", "joint_none", "joint_gumbel", "joint_soft"):
        expected, got = tensors(trained / f"{name}.pt"), tensors(out / f"{name}.pt")
        assert expected.keys() == got.keys() and all(torch.equal(expected[k], got[k]) for k in got)
    curves = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
              for folder in (trained, out)]
    of_stage = [[{k: v for k, v in entry.items() if k != "per_second"} for entry in curve
                 if entry["stage"] == stage and entry["step"] > 2] for curve in curves]
    assert of_stage[0] == of_stage[1]


def test_another_seed_gives_another_model(corpus, trained, tmp_path):
    """The control of the test above: equality is not for want of randomness."""
    run(corpus, tmp_path / "out", plans="none", seed=1)
    a, b = tensors(trained / "joint_none.pt"), tensors(tmp_path / "out" / "joint_none.pt")
    assert not any(torch.equal(a[k], b[k]) for k in a if k.endswith("qkv.weight"))


def test_finished_stages_are_reused_and_changed_ones_named(corpus, tmp_path, capsys):
    out = tmp_path / "out"
    run(corpus, out, plans="none")
    before = {f.name: f.stat().st_mtime_ns for f in out.glob("*.pt")}
    capsys.readouterr()
    run(corpus, out, plans="none,uniform", resume=True)            # a new plan is not a change
    assert {f.name: f.stat().st_mtime_ns for f in out.glob("*.pt") if f.name in before} == before
    assert (out / "joint_uniform.pt").exists()
    capsys.readouterr()
    run(corpus, out, plans="none,uniform", resume=True, n_labels=4)
    printed = capsys.readouterr().out
    assert "labels: done anew, for n_labels was 8, is 4" in printed
    assert "lm: finished before, reused" in printed
    assert "joint_none: finished before, reused" in printed
    assert (out / "lm.pt").stat().st_mtime_ns == before["lm.pt"]


def test_stages_after_one_of_other_content_are_done_anew(corpus, trained, tmp_path, capsys):
    """The options are equal, but the labels are others: made on another machine, say."""
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    saved = evaluation.load_checkpoint(out / "labels.pt")
    before, centroids = saved["id"], saved["labeler"]["centroids"]
    assert before == labelling.digest(evaluation.load_labeler(saved).state_dict())
    train.save_checkpoint(out / "labels.pt", saved | {
        "labeler": saved["labeler"] | {"centroids": centroids.flip(0)}, "id": "another"})
    assert evaluation.Run.open(out, "cpu").plans == ["none"]
    assert f"joint_soft: passed over, was made with labels.pt={before}" in capsys.readouterr().out
    run(corpus, out, plans="none,soft", resume=True)
    printed = capsys.readouterr().out
    assert f"planner: done anew, for labels.pt was {before}, is another" in printed
    assert "joint_soft: done anew" in printed and "joint_none: finished before, reused" in printed


def test_resume_takes_what_is_not_given_from_the_run(corpus, trained, tmp_path, capsys):
    before = train.parse_config(options(corpus, trained, plans="all"))
    bare = [f"--out_dir={trained}", "--resume"]
    assert train.parse_config(bare) == dataclasses.replace(before, resume=True)
    assert train.parse_config([*bare, "--lm_steps=7"]) == dataclasses.replace(
        before, resume=True, lm_steps=7)
    assert train.parse_config([f"--out_dir={trained}"]) == train.Config(out_dir=str(trained))
    content, path = (trained / "config.json").read_text(), tmp_path / "config.json"
    for damaged in ("", "[]", "{}", content.replace('"lm_steps": 6', '"lm_steps": 7')):
        path.write_text(damaged)
        with pytest.raises(SystemExit):
            train.parse_config([f"--out_dir={tmp_path}", "--resume"])
        assert capsys.readouterr().err == (
            f"train.py: error: {path} is damaged: delete it, and run train.py with --resume and "
            "all the options that the run had\n")
    path.write_text(content)
    assert train.parse_config([f"--out_dir={tmp_path}", "--resume"]).lm_steps == 6


def test_a_labeler_of_ones_own(corpus, tmp_path, monkeypatch):
    """As the README says: a name in VECTORS, and vectors from Labeler.raw."""
    monkeypatch.setattr(labelling, "VECTORS", (*labelling.VECTORS, "mine"))
    monkeypatch.setattr(labelling.Labeler, "raw", lambda self, tokens, offsets: F.embedding_bag(
        tokens, self.gpt.wte.weight, offsets, mode="max"))
    results = run(corpus, tmp_path / "out", plans="soft", vectors="mine")
    opened = evaluation.Run.open(tmp_path / "out", "cpu")
    assert evaluation.evaluate(opened, opened.corpus("val"), opened.bytes, "val") == results


def test_an_out_dir_with_stages_is_refused_without_resume(corpus, trained):
    before = {f.name: f.read_bytes() for f in trained.glob("*.pt")}
    with pytest.raises(ValueError, match="holds .* already: go on with --resume"):
        run(corpus, trained)
    assert {f.name: f.read_bytes() for f in trained.glob("*.pt")} == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(number, corpus, tmp_path):
    out = tmp_path / "out"
    arguments = options(corpus, out, lm_steps=100_000, save_every=100_000)
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *arguments],
                               stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not (out / "metrics.jsonl").exists() and process.poll() is None:
        pass                                         # until the loop has begun
    process.send_signal(number)
    _, message = process.communicate()
    assert process.returncode == 130 and "--resume" in message.splitlines()[-1]
    saved = evaluation.load_checkpoint(out / "lm.pt")
    assert saved["step"] > 0 and not saved["done"]


def test_a_failed_save_leaves_the_last_checkpoint_intact(tmp_path, monkeypatch):
    path = tmp_path / "lm.pt"
    train.save_checkpoint(path, {"step": 1})
    whole = torch.save

    def full_disk(content, file):
        whole(content, file)
        with open(file, "r+b") as written:
            written.truncate(100)
        raise RuntimeError("PytorchStreamWriter failed writing file: No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="could not write .*No space left.*--resume"):
        train.save_checkpoint(path, {"step": 2})
    assert evaluation.load_checkpoint(path)["step"] == 1 and list(tmp_path.iterdir()) == [path]


# --- training -------------------------------------------------------------------------------------

def test_every_plan_has_the_same_loss_at_the_start_of_the_joint_stage(
        corpus, trained, tmp_path, monkeypatch):
    """Same batch, maps of zero: the plan changes nothing yet. After some steps it does."""
    first = {}

    def only_look(job, stage, saved):
        with torch.no_grad():
            first[stage.name] = float(stage.losses(stage.model, stage.batches(0)[0], None)["loss"])

    shutil.copytree(trained, tmp_path / "out", ignore=shutil.ignore_patterns("joint_*"))
    job = train.Job(train.parse_config(options(corpus, tmp_path / "out", plans="all", resume=True)))
    labeler = evaluation.load_labeler(evaluation.load_checkpoint(tmp_path / "out" / "labels.pt"))
    monkeypatch.setattr(train, "fit", only_look)
    for plan in train.PLANS:
        train.train_joint(job, plan, labeler)
    assert len(first) == 9 and max(first.values()) - min(first.values()) < 1e-6
    results = json.loads((trained / "results.json").read_text())["plans"]
    assert len({r["nll"] for r in results.values()}) == 9


def test_non_finite_steps_are_skipped_and_counted_and_five_end_the_run(
        corpus, tmp_path, monkeypatch):
    original, bad_steps = torch.nn.utils.clip_grad_norm_, {2, 4}
    calls = []

    def injected(parameters, limit):
        parameters = list(parameters)
        if len(calls) in bad_steps:
            next(p for p in parameters if p.grad is not None).grad.view(-1)[0] = math.nan
        calls.append(0)
        return original(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", injected)
    run(corpus, tmp_path / "a", plans="none")
    saved = evaluation.load_checkpoint(tmp_path / "a" / "lm.pt")
    assert saved["skipped"] == 2 and all(x.isfinite().all() for x in saved["model"].values())
    calls.clear()
    bad_steps.update(range(100))
    with pytest.raises(ValueError, match="not finite in 5 steps"):
        run(corpus, tmp_path / "b", plans="none", save_every=1)


def test_the_planner_rests_until_it_is_unfrozen(corpus, tmp_path):
    run(corpus, tmp_path / "a", plans="soft", unfreeze_step=6)
    run(corpus, tmp_path / "b", plans="soft", unfreeze_step=3)
    planner = tensors(tmp_path / "a" / "planner.pt")
    for folder, moved in (("a", False), ("b", True)):
        joint = tensors(tmp_path / folder / "joint_soft.pt")
        within = "joint_soft.pt.model.planner"
        changed = [not torch.equal(value, joint[key.replace("planner.pt.model", within)])
                   for key, value in planner.items()]
        assert all(changed) if moved else not any(changed)


def test_gradient_accumulation_sees_the_same_batch(corpus, tmp_path):
    """Two micro-batches of 4 give the losses of one batch of 8, to rounding."""
    curves = []
    for name, more in (("one", dict(batch_size=8)), ("two", dict(batch_size=4, grad_accum=2))):
        run(corpus, tmp_path / name, plans="soft", **more)
        log = (tmp_path / name / "metrics.jsonl").read_text()
        entries = [json.loads(line) for line in log.splitlines()]
        curves.append([e["loss"] for e in entries if "loss" in e])
    assert np.allclose(*curves, rtol=1e-5)


def test_learning_rate_rises_then_falls_to_its_floor():
    rates = [train.learning_rate(step, 100, 0.1, 0.2) for step in range(101)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert all(a >= b for a, b in zip(rates[9:], rates[10:])) and rates[100] == pytest.approx(0.2)


# --- what a run leaves ----------------------------------------------------------------------------

def test_a_run_leaves_the_files_and_fields_that_others_rely_on(trained):
    names = {f.name for f in trained.iterdir()}
    assert {"config.json", "metrics.jsonl", "lm.pt", "labels.pt", "planner.pt",
            "results.json"} <= names
    assert {f"joint_{plan}.pt" for plan in train.PLANS} <= names
    results = json.loads((trained / "results.json").read_text())
    assert list(results["plans"]) == list(train.PLANS)
    assert {"tokens", "bytes", "seed", "versions"} <= results.keys()
    soft = results["plans"]["soft"]
    assert soft["ppl"] == pytest.approx(math.exp(soft["nll"]))
    bits = soft["nll"] * results["tokens"] / results["bytes"] / math.log(2)
    assert soft["bits_per_byte"] == pytest.approx(bits)
    assert soft["planner_ce"] > 0 and 0 <= soft["planner_acc"] <= 1
    assert results["plans"]["none"]["planner_ce"] is None


def test_evaluating_in_between_leaves_training_untouched(corpus, trained, tmp_path):
    """Also how often it is saved: what is watched changes nothing."""
    run(corpus, tmp_path / "out", plans="gumbel,soft", eval_every=1, save_every=1, eval_tokens=100)
    for plan in ("gumbel", "soft"):
        a, b = (tensors(folder / f"joint_{plan}.pt") for folder in (trained, tmp_path / "out"))
        assert all(torch.equal(a[k], b[k]) for k in a)


def command(*arguments, **environment):
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | environment)


def test_eval_commands(trained, tmp_path, capsys):
    text = tmp_path / "new.txt"
    text.write_text("A first document. It has two sentences.\n<|endoftext|>\n"
                    "And a second: <b>one</b>.\n")
    evaluation.main([f"--out_dir={trained}", f"--text={text}"])
    assert "straight_through" in capsys.readouterr().out
    saved = json.loads((trained / "eval.json").read_text())
    assert list(saved["plans"]) == list(train.PLANS) and saved["split"] == "text"

    evaluation.main([f"--out_dir={trained}", f"--score={text}", "--plan=soft"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0].keys() == {"token", "nll", "sentence", "label"}
    assert np.mean([line["nll"] for line in lines]) == pytest.approx(saved["plans"]["soft"]["nll"])
    assert "".join(line["token"] for line in lines).count("<|endoftext|>") == 2

    evaluation.main([f"--out_dir={trained}", "--prompt=A first", "--plan=soft", "--max_tokens=40"])
    printed = capsys.readouterr().out
    assert "A first" in printed and "planned" in printed
    evaluation.main([f"--out_dir={trained}", "--prompt=A first", "--plan=soft", "--max_tokens=40"])
    assert capsys.readouterr().out == printed        # seeded


def test_the_readme_commands_run(corpus, tmp_path):
    """Each `python train.py`'s options fit together; each `python eval.py` runs, on a small run."""
    readme = (ROOT / "README.md").read_text()
    lines = [line.split("#")[0].strip() for line in readme.splitlines()]
    trains = [line for line in lines if line.startswith("python train.py")]
    evals = [line for line in lines if line.startswith("python eval.py")]
    assert len(trains) >= 2 and len(evals) >= 4
    for line in trains:
        if "--help" not in line:
            assert train.parse_config(shlex.split(line)[2:]).check() is None
    out = tmp_path / "out"
    run(corpus, out)
    for line in evals:
        arguments = [a.replace("FILE", str(corpus))
                     for a in shlex.split(line)[2:] if "out_dir" not in a]
        arguments = [a.replace("report.html", str(tmp_path / "report.html")) for a in arguments]
        evaluation.main([f"--out_dir={out}", *arguments])


# --- bad input ------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, message", [
    (["--lm_step=5"], "unknown option --lm_step=5: did you mean --lm_steps?"),
    (["--lm_steps=many"], "argument --lm_steps: invalid int value: 'many'"),
    (["--resume=maybe"], "argument --resume: invalid boolean value: 'maybe'"),
    (["--lm_lr=nan"], "lm_lr=nan: must be finite"),
    (["--n_head=5"], "n_head=5 does not divide n_embd=32"),
    (["--planner_head=5"], "planner_head=5 does not divide planner_embd=32"),
    (["--plans=soft,sof"], "'sof' is not one of none, fixed"),
    (["--preset=huge"], "preset=huge: choose laptop or tiny or gpu"),
    (["--vocab_size=100"], "vocab_size=100: must be at least 257"),
    (["--batch_size=0"], "batch_size=0: must be above 0"),
    (["--data=/no/such/file"], "data=/no/such/file does not exist"),
    (["--device=tpu"], "device=tpu is not available: this machine has"),
    (["--device=cpu:x"], "device=cpu:x: choose auto, cuda, mps or cpu"),
    (["--n_labels=100000"], "n_labels=100000: the training split has but"),
    (["--block_size=100000"], "a window of 100000 is too long"),
])
def test_bad_options_end_in_one_line_and_exit_code_2(arguments, message, corpus, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        train.main(options(corpus, tmp_path / "out") + arguments)
    printed = capsys.readouterr().err.strip().splitlines()
    assert error.value.code == 2
    assert message in printed[-1] and printed[-1].startswith("train.py: error: ")
    assert not any(line.startswith("Traceback") for line in printed)


def test_the_command_itself_ends_with_one_line_and_exit_code_2(tmp_path):
    result = command("train.py", "--dat=x")
    assert result.returncode == 2
    assert result.stderr == "train.py: error: unknown option --dat=x: did you mean --data?\n"
    result = command("eval.py", f"--out_dir={tmp_path}")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "holds no trained run" in result.stderr


def test_an_out_dir_that_cannot_be_written_is_one_line(corpus, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit) as error:
        train.main(options(corpus, tmp_path / "file" / "out"))
    assert error.value.code == 2 and "out_dir" in capsys.readouterr().err


def damaged(path, how):
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[:len(content) // 2])
    elif how == "bit_flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1:])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("not a checkpoint")
    elif how == "foreign":
        torch.save({"weights": torch.zeros(3)}, path)
    elif how == "older":
        torch.save({**torch.load(path, weights_only=True), "format": "nanoplan-0"}, path)
    elif how == "code":
        torch.save({"format": evaluation.FORMAT, "harm": Harm()}, path)


class Harm:
    def __reduce__(self):
        return os.mkdir, (Harm.folder,)


@pytest.mark.parametrize(
    "how", ["truncated", "bit_flipped", "empty", "text", "foreign", "older", "code"])
@pytest.mark.parametrize("name", ["lm", "labels", "planner", "joint_none"])
def test_damaged_checkpoints_are_refused_in_one_line(how, name, corpus, trained, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    Harm.folder = str(tmp_path / "harm")
    damaged(out / f"{name}.pt", how)
    with pytest.raises(SystemExit) as error:
        train.main(options(corpus, out, plans="none", resume=True))
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.value.code == 2 and f"{name}.pt" in printed and "train" in printed
    assert not (tmp_path / "harm").exists()          # no code of the file was run


def test_an_undamaged_copy_is_accepted(corpus, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "out")
    run(corpus, tmp_path / "out", plans="none", resume=True)


# --- a corpus whose best score is known -----------------------------------------------------------

TRANSITION, N_TOPICS, N_WORDS, P_END = (0.7, 0.2, 0.05, 0.05), 4, 4, 0.05


class KnownCorpus:
    """Four topics; a sentence is three words of its topic and two that all topics share. Its
    topic depends on the topic of the sentence before, which a GPT with a window of three tokens
    can't see when a sentence begins, but a planner can.
    """

    def __init__(self, seed=0, n_documents=1200):
        draw = random.Random(seed)
        word = lambda: "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=6))
        self.words = [[[word() for _ in range(N_WORDS)] for _ in range(3)] for _ in range(N_TOPICS)]
        self.common = [[word() for _ in range(N_WORDS)] for _ in range(2)]
        self.topic_of = {w: k for k, slots in enumerate(self.words) for slot in slots for w in slot}
        self.documents = []
        for _ in range(n_documents):
            topics = []
            while not topics or draw.random() > P_END:
                step = draw.choices(range(N_TOPICS), TRANSITION)[0]
                topics.append((topics[-1] + step) % N_TOPICS if topics
                              else draw.randrange(N_TOPICS))
            sentences = [" ".join(draw.choice(slot) for slot in self.words[k] + self.common)
                         for k in topics]
            self.documents.append(". ".join(sentences) + ".")

    def nats(self, text):
        """-log p of a document's topics and of the whole, under the process that wrote it."""
        topics = [self.topic_of[s.split()[0]] for s in text.removesuffix(".").split(". ")]
        of_topics = sum(-math.log(TRANSITION[(b - a) % N_TOPICS])
                        for a, b in zip(topics, topics[1:]))
        of_topics += math.log(N_TOPICS)
        ends = -math.log(P_END) - (len(topics) - 1) * math.log(1 - P_END)
        return of_topics, of_topics + 5 * len(topics) * math.log(N_WORDS) + ends


def test_known_corpus_is_learned_to_its_bounds(tmp_path, capsys):
    known = KnownCorpus()
    path = tmp_path / "known.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in known.documents))
    config = train.parse_config([
        f"--data={path}", f"--out_dir={tmp_path / 'out'}", f"--cache_dir={tmp_path / 'cache'}",
        "--preset=tiny", "--block_size=3", f"--n_labels={N_TOPICS}", "--vocab_size=700",
        "--batch_size=256", "--n_embd=64", "--planner_batch=32", "--lm_steps=200",
        "--planner_steps=250", "--joint_steps=250", "--lm_lr=1e-2", "--planner_lr=1e-2",
        "--joint_lr=1e-2", "--plans=none,soft", "--vectors=hidden", "--device=cpu",
        "--dtype=float32"])
    results = train.run(config)
    found = evaluation.Run.open(tmp_path / "out")
    corpus = found.corpus("val")
    _, labels = found.sentences(corpus, "val")
    texts = [found.tokenizer.decode(corpus.tokens[a:b].tolist())
             for a, b in zip(corpus.sentences, corpus.sentences[1:])][1:]
    pairs = {(known.topic_of[text.split()[0]], label)
             for text, label in zip(texts, labels[1:].tolist())}
    assert len(pairs) == N_TOPICS                    # k-means found the topics, one label for each
    documents = "".join(texts).split("<|endoftext|>")[:-1]
    topic_nats, all_nats = np.sum([known.nats(text.strip()) for text in documents], axis=0)
    entropy, bound = topic_nats / len(texts), all_nats / results["tokens"]
    soft, none = results["plans"]["soft"], results["plans"]["none"]
    assert abs(soft["nll"] - bound) < 0.05
    assert none["nll"] - bound > 0.05                # what the window can't see, no GPT can know
    planner_ce = train_stage_ce(found, corpus)
    assert abs(planner_ce("planner") - entropy) < 0.05
    assert planner_ce("untrained") - entropy > 0.05
    untrained = evaluation.score(fresh_model(found), corpus, *found.sentences(corpus, "val"),
                                 16, "document")
    assert untrained.nll.mean() - bound > 0.05


def fresh_model(found):
    saved = evaluation.load_checkpoint(found.out_dir / "joint_soft.pt")
    return evaluation.PlannedGPT(evaluation.GPT(**saved["gpt_args"]),
                                 evaluation.Planner(**saved["planner_args"]), "soft")


def train_stage_ce(found, corpus):
    """The label cross-entropy of the planner after its own stage, or before it."""
    def ce(which):
        model = fresh_model(found)
        if which == "planner":
            saved = evaluation.load_checkpoint(found.out_dir / "planner.pt")
            model.planner.load_state_dict(saved["model"])
        scores = evaluation.score(model, corpus, *found.sentences(corpus, "val"), 16, "document")
        return np.nanmean(scores.ce)
    return ce


# --- several processes ----------------------------------------------------------------------------

def torchrun(corpus, out, n=2, **more):
    """The run of `options`, data-parallel in n processes on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={n}", "train.py", *options(corpus, out, **more)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


def losses(out):
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {(line["stage"], line["step"]): line["loss"] for line in lines if "loss" in line}


def test_two_processes_train_as_one_does_with_the_same_batches(corpus, tmp_path):
    one, two, more = tmp_path / "one", tmp_path / "two", dict(grad_accum=2, plans="none,soft")
    run(corpus, one, **more)
    done = torchrun(corpus, two, **more)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("perplexity") == 1      # rank 0 alone speaks
    assert losses(two).keys() == losses(one).keys() and len(losses(one)) == 4
    for key, loss in losses(one).items():
        assert losses(two)[key] == pytest.approx(loss, rel=1e-5)
    # Control: with other batches, a different loss. And one process can go on where two ended.
    run(corpus, tmp_path / "other", plans="none", seed=1)
    assert losses(tmp_path / "other")["lm", 6] != pytest.approx(losses(one)["lm", 6], rel=1e-4)
    run(corpus, two, **more | {"plans": "none,soft,hard"}, resume=True)
    assert ("joint_hard", 6) in losses(two)


def test_batches_that_processes_can_not_share_are_refused(corpus, tmp_path):
    done = torchrun(corpus, tmp_path / "out", batch_size=3)
    assert done.returncode != 0
    assert "train.py: error: batch_size=3 can't be shared by 2 processes" in done.stderr
    assert not list((tmp_path / "out").glob("*.pt"))
