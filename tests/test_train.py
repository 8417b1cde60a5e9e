"""Properties of whole runs: options, bad input, resuming, kills, and what a run leaves behind."""
import importlib
import itertools
import json
import math
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import eval as evaluation
import train
import data
from data import EOT
from model import END_TO_END, PLANS

ROOT = Path(__file__).parent.parent
SHARED = ("lm", "labels", "planner")                # the stages that all plans start from


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):                       # documents of a few sentences of made-up words
    draw, texts = random.Random(0), []
    words = ["".join(draw.choices("abcdefghijklmnop", k=5)) for _ in range(60)]
    for _ in range(60):
        sentences = [" ".join(draw.choices(words, k=7)) for _ in range(draw.randint(3, 7))]
        texts.append(". ".join(sentences) + ".")
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text(f"\n{EOT}\n".join(texts), "utf-8")
    return path


def options(corpus, out, **more):
    """Command-line arguments of a run of a fifth of a second."""
    chosen = dict(preset="tiny", data=corpus, out_dir=out, cache_dir=Path(corpus).parent / "cache",
                  vocab_size=300, n_embd=16, block_size=16, n_labels=4, planner_reach=4,
                  lm_steps=6, planner_steps=6, joint_steps=6, plans="none,gumbel,soft",
                  eval_every=2, eval_tokens=256, device="cpu", dtype="float32")
    return [f"--{name}={value}" for name, value in (chosen | more).items()]


def run(corpus, out, **more):
    train.main(options(corpus, out, **more))
    return out


@pytest.fixture(scope="session")
def trained(corpus, tmp_path_factory):              # a finished run of all plans
    return run(corpus, tmp_path_factory.mktemp("trained") / "out", plans="all")


def act_at(patch, module, name, n, act=lambda *_: signal.raise_signal(signal.SIGINT)):
    """Does something, a Ctrl-C unless told, before the n-th call of a function."""
    original, calls = getattr(module, name), itertools.count(1)

    def wrapped(*arguments, **named):
        if next(calls) == n:
            act(*arguments)
        return original(*arguments, **named)

    patch.setattr(module, name, wrapped)


@pytest.fixture(scope="session")
def half(corpus, tmp_path_factory):                 # a run that ended in the midst of stage lm
    out = tmp_path_factory.mktemp("half") / "out"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="130"):
        act_at(patch, train, "make_batch", 3)
        run(corpus, out)
    return out


def ends(main, arguments, capsys, code=2):
    """The one line on stderr with which a command ends; beside it are only progress bars."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(arguments)
    printed = capsys.readouterr().err.splitlines()
    lines = [line for line in printed if line.strip() and not line.rstrip().endswith("]")]
    assert end.value.code == code and len(lines) == 1, lines
    assert lines[0].startswith(("train.py: ", "eval.py: "))
    return lines[0]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def checkpoint(path):
    return torch.load(path, weights_only=True)


def curves(out):
    """{(stage, step): figures} of metrics.jsonl; of lines that were written twice, the last."""
    found = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        entry.pop("per_second", None)
        found.setdefault((entry["stage"], entry["step"]), {}).update(entry)
    return found


def results_of(out, name="results.json"):
    return json.loads((out / name).read_text())


def assert_same_run(out, expected, plans="none,gumbel,soft"):
    """Bit for bit: each checkpoint, the results, and the curve of each stage."""
    for stage in [*SHARED, *(f"joint_{plan}" for plan in plans.split(","))]:
        assert (out / f"{stage}.pt").read_bytes() == (expected / f"{stage}.pt").read_bytes(), stage
    a, b = results_of(out), results_of(expected)
    assert a == b | {"plans": {plan: b["plans"][plan] for plan in plans.split(",")}}
    ours, theirs = curves(out), curves(expected)
    assert ours and ours == {key: theirs[key] for key in ours}


# --- options and bad input ------------------------------------------------------------------------
@pytest.mark.parametrize("argument, message", [
    ("--lm_step=5", "unknown option --lm_step=5: --help lists all"),
    ("--lm_steps=many", "argument --lm_steps: invalid int value: 'many'"),
    ("--planner_lr=nan", "planner_lr=nan: must be finite and at least 0"),
    ("--n_head=16", "n_embd=16 must be a multiple of"),
    ("--plans=soft,sof", "plans=soft,sof: choose of none,fixed"),
    ("--preset=huge", "argument --preset: invalid choice: 'huge' (choose from"),
    ("--data=/no/such/file", "data=/no/such/file"),
    ("--device=tpu", "device=tpu is not available"),
    ("--n_labels=100000", "n_labels=100000"),
    ("--block_size=100000", "a window of 100000 is too long"),
    ("--out_dir=/dev/null/out", "/dev/null"),
    ("--start=/no/such/run", "/no/such/run"),
    ("--resume", "config.json")])
def test_a_bad_option_ends_in_one_line_and_exit_code_2(argument, message, corpus, tmp_path, capsys):
    line = ends(train.main, [*options(corpus, tmp_path / "out"), argument], capsys)
    assert line.startswith("train.py: error: ") and message in line
    assert not list(tmp_path.glob("out/*.pt"))


@pytest.mark.parametrize("name, content, message", [
    ("empty.txt", b"", "fewer than two sentences"),
    ("latin.txt", b"Gr\xfc\xdfe. " * 100, "is not valid UTF-8"),
    ("short.txt", f"One sentence alone.\n{EOT}\n".encode() * 20, "fewer than two sentences"),
    ("broken.jsonl", b'{"text": "A text."\n', "broken.jsonl:1 is not a JSON object")])
def test_a_bad_text_ends_in_one_line(name, content, message, trained, tmp_path, capsys):
    path = tmp_path / name
    path.write_bytes(content)
    assert message in ends(train.main, options(path, tmp_path / "out"), capsys)
    if name != "short.txt":                         # which can be scored
        for option in ("--text", "--score"):
            arguments = [f"--out_dir={trained}", f"{option}={path}"]
            assert name in ends(evaluation.main, arguments, capsys)


# --- nothing that was saved is lost ---------------------------------------------------------------
@pytest.mark.parametrize("how", ["truncated", "foreign", "copied", "of another run"])
@pytest.mark.parametrize("name", ["lm", "labels", "planner", "joint_soft"])
def test_a_damaged_checkpoint_is_refused_in_one_line(how, name, corpus, trained, tmp_path, capsys):
    out = shutil.copytree(trained, tmp_path / "out")
    path = out / f"{name}.pt"
    if how == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    else:
        found = {"foreign": {"weights": torch.zeros(3)},
                 "copied": checkpoint(out / "joint_hard.pt"),
                 "of another run": {"stage": name, "model": {}}}
        torch.save(found[how], path)
    before = contents(out)
    del before["config.json"]                       # whose `resume` changes
    line = ends(train.main, options(corpus, out, plans="all", resume=True), capsys)
    assert f"{name}.pt is truncated or of another run" in line
    if name in ("labels", "joint_soft"):
        assert f"{name}.pt" in ends(evaluation.main, [f"--out_dir={out}", "--prompt=a"], capsys)
    assert before.items() <= contents(out).items()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("name", ["config.json", "lm.pt", "labels.pt", "joint_soft.pt",
                                  "results.json"])
def test_a_full_disk_is_one_line_and_the_run_goes_on_with_room(
        name, corpus, half, trained, tmp_path, capsys):
    out = shutil.copytree(half, tmp_path / "out")
    before = contents(out)
    (out / f"{name}.tmp").symlink_to("/dev/full")
    line = ends(train.main, options(corpus, out, resume=True, plans="soft"), capsys)
    assert f"could not write {out / name} (" in line and "what was saved before is intact" in line
    assert name not in before or contents(out)[name] == before[name]
    assert not list(out.glob("*.tmp"))
    assert_same_run(run(corpus, out, resume=True, plans="soft"), trained, "soft")


# --- interrupted and resumed ----------------------------------------------------------------------
def live(arguments, module, name, n):
    """train.py in a process that is killed at the n-th call of a function; a save, in its midst."""
    save = torch.save

    def kill(*arguments):
        if name == "save":
            save(*arguments)
            os.truncate(arguments[1], os.path.getsize(arguments[1]) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    act_at(pytest.MonkeyPatch(), importlib.import_module(module), name, n, kill)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    torch.set_num_threads(1)                        # as conftest.py does here
    train.main(arguments)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_anywhere_and_resumed_equals_undisturbed(corpus, trained, tmp_path, monkeypatch):
    """At a drawn step; in the midst of a drawn save; before a file is moved into place."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    context = multiprocessing.get_context("forkserver")     # forks from one that has imported all
    context.set_forkserver_preload(["test_train", "torch._dynamo"])
    draw, out = random.Random(0), tmp_path / "out"
    for module, name, *calls in [
            ("os", "rename", 1, 1), ("train", "make_batch", 2, 5), ("torch", "save", 1, 3),
            ("labels", "nearest", 1, 2), ("os", "replace", 3, 7), ("torch", "save", 1, 3),
            ("train", "make_batch", 1, 4), ("torch", "save", 100, 100)]:
        arguments = options(corpus, out, plans="none,soft", cache_dir=tmp_path / "cache",
                            resume=(out / "config.json").exists())
        process = context.Process(target=live, args=(arguments, module, name, draw.randint(*calls)))
        process.start()
        process.join()
        assert process.exitcode == (0 if calls[0] == 100 else -signal.SIGKILL)
    assert_same_run(out, trained, "none,soft")


@pytest.mark.parametrize("which", [0, 1])
def test_resuming_needs_the_state_of_both_muon_and_adamw(which, corpus, half, trained, tmp_path):
    out = shutil.copytree(half, tmp_path / "out")
    saved = checkpoint(out / "lm.pt")
    saved["optimizers"][which]["state"] = {}        # else it would be as `trained`: see above
    torch.save(saved, out / "lm.pt")
    run(corpus, out, resume=True, plans="none")
    assert (out / "lm.pt").read_bytes() != (trained / "lm.pt").read_bytes()


def test_resume_takes_the_options_of_the_run_and_not_of_a_preset(corpus, half):
    expected = train.parse_config(options(corpus, half, resume=True))
    resume = [f"--out_dir={half}", "--preset=tiny", "--resume"]
    assert train.parse_config(resume) == train.parse_config([resume[0], resume[2]]) == expected
    assert train.parse_config(resume[:2]).lm_steps == 20                    # the control


def test_a_run_is_continued_by_resume_alone_and_with_its_own_options(trained, capsys):
    """Each option is one or the other; a new one has to be put into a stage, or into this list."""
    free = set("cache_dir out_dir device resume start compile plans eval_every eval_tokens".split())
    fixed = set(" ".join(train.STAGE_OPTIONS.values()).split()) | {"preset"}
    assert fixed | free == {f.name for f in fields(train.Config)} and not fixed & free
    saved, before, resume = results_of(trained, "config.json"), contents(trained), "--resume"
    words = dict(preset="gpu", data="docstrings", tokenizer="gpt2", dtype="bfloat16",
                 planner_view="window")
    for name in fixed:
        other = words.get(name) or saved[name] + 1
        line = ends(train.main, [f"--out_dir={trained}", resume, f"--{name}={other}"], capsys)
        assert f"{name}={other}" in line and f"has {name}={saved[name]}" in line
    for more in ([], [f"--start={trained}"]):
        line = ends(train.main, [f"--out_dir={trained}", *more], capsys)
        assert "holds a run: choose another, or continue by --resume" in line
    assert contents(trained) == before


@pytest.mark.parametrize("change, copied", [
    (dict(muon_lr=0.01), []), (dict(lm_lr=1e-3), []), (dict(n_labels=3), ["lm"]),
    (dict(planner_lr=1e-2), ["lm", "labels"]), (dict(planner_view="window"), ["lm", "labels"]),
    (dict(joint_lr=1e-3), [*SHARED]), (dict(eval_every=5), [*SHARED, "joint_none", "joint_soft"])])
def test_start_copies_finished_stages_up_to_the_first_that_an_option_changes(
        change, copied, corpus, trained, half, tmp_path):
    before, out = contents(trained), tmp_path / "out"
    given = dict(start=trained, out_dir=out, plans="none,soft") | change    # else the start's
    train.begin(train.parse_config([f"--{name}={value}" for name, value in given.items()]))
    assert {file.stem for file in out.glob("*.pt")} == set(copied)
    assert all((out / f"{stage}.pt").read_bytes() == before[f"{stage}.pt"] for stage in copied)
    assert contents(trained) == before
    train.begin(train.parse_config(options(corpus, tmp_path / "new", start=half, **change)))
    assert not list((tmp_path / "new").glob("*.pt"))            # stage lm of `half` is not finished


# --- training -------------------------------------------------------------------------------------
def test_each_tensor_has_its_optimizer_rate_and_decay(corpus, trained, tmp_path, monkeypatch):
    asked, rates = {}, dict(joint_lr=3e-3, joint_planner_lr=4e-4)       # trained anew with these
    monkeypatch.setattr(train, "fit", lambda run, name, *rest: asked.update({name: (run, *rest)}))
    monkeypatch.setattr(train, "evaluate", lambda *_: {})
    monkeypatch.setattr(train, "table", str)
    run(corpus, tmp_path / "out", start=trained, plans="all", **rates)
    assert list(asked) == ["lm", "planner", *(f"joint_{plan}" for plan in PLANS)]
    for stage, (opened, model, parts, _) in asked.items():
        names, found = {p: name for name, p in model.named_parameters()}, set()
        optimizers = train.make_optimizers(parts, 0.1, opened.device)
        for optimizer, group in [(x, group) for x in optimizers for group in x.param_groups]:
            name, = (names[p] for p in group["params"])
            found.add(name)
            of_block = name.endswith(("qkv.weight", "proj.weight", "up.weight", "down.weight"))
            joint_planner = name.startswith("planner.")         # Muon trains it in its own stage
            kind = "joint_planner" if joint_planner else "muon" if of_block else stage.split("_")[0]
            assert isinstance(optimizer, train.Muon) == (kind == "muon"), name
            share = 0.3 if kind == "muon" and "joint" in stage else 1       # joint_lr / lm_lr
            expected = share * getattr(opened.config, f"{kind}_lr")
            assert group["peak_lr"] == pytest.approx(expected), name
            spared = name.endswith(("label_emb", "start")) or "ln_" in name
            assert group["weight_decay"] == (0.0 if spared else 0.1), name
        rests = stage.startswith("joint") and stage[6:] not in END_TO_END
        assert found == {name for name in names.values() if not (rests and "planner." in name)}
        before, after = model.state_dict(), checkpoint(trained / f"{stage}.pt")["model"]
        assert found == {name for name in before if not torch.equal(before[name], after[name])}
        assert len(train.make_optimizers([(model, 0.0, 1e-3)], 0.1, opened.device)) == 1    # AdamW
        if stage.startswith("joint") and stage != "joint_none":
            assert torch.equal(model.gpt.label_emb, opened.labeler.centroids)


@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (16, 16)])
def test_a_step_of_muon_is_nearly_orthogonal_and_what_numpy_finds(shape):
    gradients = np.random.default_rng(0).normal(size=(3, *shape))
    p = torch.nn.Parameter(torch.ones(shape).double())
    muon = train.Muon([{"params": [p], "lr": 0.02, "weight_decay": 0.1}], {})
    expected, momentum = np.ones(shape), 0
    for gradient in gradients:
        p.grad = torch.from_numpy(gradient)
        muon.step()
        momentum = 0.95 * momentum + 0.05 * gradient
        ahead = 0.95 * momentum + 0.05 * gradient   # Nesterov's
        x = ahead / np.linalg.norm(ahead)
        for _ in range(5):
            x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
        expected = expected * (1 - 0.02 * 0.1) - 0.02 * max(1, shape[0] / shape[1]) ** 0.5 * x
        assert np.abs(p.detach().numpy() - expected).max() < 1e-6
        u, _, v = np.linalg.svd(ahead, full_matrices=False)
        turned = u.T @ train.orthogonal(torch.from_numpy(ahead)).numpy() @ v.T
        values = turned.diagonal()                  # the singular vectors stay as they were
        assert np.abs(turned - np.diag(values)).max() < 1e-6
        assert 0.6 < values.min() and values.max() < 1.3


def test_the_planner_rests_until_it_is_unfrozen(corpus, tmp_path):
    out = run(corpus, tmp_path / "out", plans="soft", unfreeze_step=6)
    before, after = (checkpoint(out / f"{name}.pt")["model"] for name in ("planner", "joint_soft"))
    assert all(torch.equal(p, after[f"planner.{name}"]) for name, p in before.items())


@pytest.mark.parametrize("view", ["document", "window"])
def test_planner_view_holds_in_each_stage_and_validation(view, corpus, tmp_path, monkeypatch):
    """Rows of sentences, of which no window holds all, are for the view of the document alone."""
    views, rows, window_batch = set(), [], data.window_batch
    monkeypatch.setattr(data, "window_batch", lambda *a: views.add(a[4]) or window_batch(*a))
    act_at(monkeypatch, data, "sentence_batch", 1, lambda *_: rows.append(1))
    run(corpus, tmp_path / "out", plans="soft", planner_view=view)
    assert views == {view} and bool(rows) == (view == "document")


def test_the_learning_rate_is_logged_as_it_is(trained):
    assert [train.learning_rate(step, 100) for step in (0, 4, 100)] == pytest.approx([0.2, 1, 0.1])
    config = results_of(trained, "config.json")
    for (stage, step), entry in curves(trained).items():
        peak = config[f"{stage.split('_')[0]}_lr"]
        assert entry["lr"] == pytest.approx(peak * train.learning_rate(step - 1, 6))


def test_a_gradient_that_is_not_finite_ends_the_run_with_its_last_checkpoint_intact(
        corpus, trained, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:            # in step 5, after two validations
        act_at(patch, train, "label_loss", 7, lambda logits, _: logits.detach().fill_(math.inf))
        line = ends(train.main, options(corpus, out), capsys)
    assert "planner: the gradient is not finite by step 6; the last checkpoint is intact" in line
    assert_same_run(run(corpus, out, resume=True), trained)


def test_ranks_share_the_accumulation_first_and_then_the_micro_batch(
        corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "8")
    for module, name in ((train.dist, "init_process_group"), (train.dist, "barrier")):
        monkeypatch.setattr(module, name, lambda *_, **options: None)
    for accum, micro_batches in ((16, 2), (4, 1), (8, 1)):
        sizes = dict(batch_size=32, grad_accum=accum)
        opened = train.begin(train.parse_config(options(corpus, tmp_path / str(accum), **sizes)))
        assert opened.grad_accum == micro_batches
        windows = train.make_batch(opened, "lm", 0, 0).tokens
        assert len(windows) * micro_batches * 8 == 32 * accum
    line = ends(train.main, options(corpus, tmp_path / "out", batch_size=3, grad_accum=4), capsys)
    assert "batch_size=3: 8 processes share it, choose a multiple of 2" in line


def keep_gradients(folder, rank=""):
    """What each optimizer is given in its first step, beside a run."""
    def keep(optimizer, *_):
        path = folder / f"{type(optimizer).__name__}{rank}"
        if not path.exists():                       # else it is a later step
            torch.save([p.grad for group in optimizer.param_groups for p in group["params"]], path)
    return register_optimizer_step_pre_hook(keep)


def test_two_processes_with_two_micro_batches_train_as_one_does_with_one(corpus, trained, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               __file__, *options(corpus, out, plans="none,soft", grad_accum=4, batch_size=2)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("perplexity") == 1     # rank 0 alone speaks
    hook = keep_gradients(tmp_path)
    run(corpus, tmp_path / "one", plans="none", lm_steps=1)
    hook.remove()
    for name, rank in itertools.product(("Muon", "AdamW"), (0, 1)):         # to rounding
        found, alone = (checkpoint(tmp_path / f"{name}{x}") for x in (rank, ""))
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-7)
    ours, expected = curves(out), curves(trained)
    assert len(ours) == 4 * 3                       # of each stage steps 2, 4 and 6
    for key, entry in ours.items():
        figures = {name: x for name, x in entry.items() if name != "stage"}
        # Less tightly: Muon enlarges small singular values of a gradient, and rounding.
        assert figures == pytest.approx({name: expected[key][name] for name in figures}, rel=1e-4)


# --- what a run leaves ----------------------------------------------------------------------------
def test_eval_gives_the_table_of_the_run(trained, capsys):
    results = results_of(trained)
    evaluation.main([f"--out_dir={trained}"])
    assert results_of(trained, "eval.json") == results and list(results["plans"]) == list(PLANS)
    assert capsys.readouterr().out.strip() == evaluation.table(results)
    for figures in results["plans"].values():
        assert figures["ppl"] == pytest.approx(math.exp(figures["nll"]))
        bits = figures["nll"] * results["tokens"] / results["bytes"] / math.log(2)
        assert figures["bits_per_byte"] == pytest.approx(bits)
    evaluation.main([f"--out_dir={trained}", "--split=test"])
    assert results_of(trained, "eval.json")["tokens"] != results["tokens"]


def test_eval_names_what_it_can_not_do(half, trained, tmp_path, capsys):
    damaged = shutil.copytree(half, tmp_path / "damaged")
    (damaged / "config.json").write_text('{"preset": "tiny"')
    for folder, arguments, message in [
            (tmp_path, [], "config.json"), (damaged, [], "config.json is damaged"),
            (trained, ["--plan=oracle", "--prompt=a"], "plan=oracle needs the true labels"),
            (half, [], "labels.pt"), (trained, ["--plan=sof"], "invalid choice: 'sof'"),
            (trained, ["--prompt=a", "--temperature=-1"], "temperature")]:
        assert message in ends(evaluation.main, [f"--out_dir={folder}", *arguments], capsys)


def test_scores_hold_the_whole_text_and_add_up_to_its_table(trained, tmp_path, capsys):
    texts = ["你好，世界。這是第二句話，比第一句長一些。", "\0\x1b[31m \u2028 \ufeff \u202e\u05d0",
             "x" * 700, f"in a line {EOT} here", "A full stop. " * 30]
    path = tmp_path / "odd.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    evaluation.main([f"--out_dir={trained}", f"--text={path}"])
    results = results_of(trained, "eval.json")
    for plan in ("soft", "none"):
        capsys.readouterr()
        evaluation.main([f"--out_dir={trained}", f"--score={path}", f"--plan={plan}"])
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        whole = b"".join(bytes.fromhex(line["hex"]) for line in lines).decode()
        assert whole == "".join(text + EOT for text in texts)
        nats = results["plans"][plan]["nll"] * results["tokens"]
        assert sum(line["nll"] for line in lines) == pytest.approx(nats)
        assert all((line["label"] is None) == (plan == "none") for line in lines)


if __name__ == "__main__":                          # train.py, in one of two processes
    keep_gradients(Path.cwd(), os.environ["RANK"])
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
