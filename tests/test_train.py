"""Properties of whole runs: options, bad input, continuing, kills, and what a run leaves behind."""
import functools
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
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

import data
import eval as evaluation
import train
from data import EOT
from model import END_TO_END, PLANS
from planner import build_model

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A file of 60 documents, each a few sentences of made-up words."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=5)) for _ in range(60)]
    texts = []
    for _ in range(60):
        sentences = [" ".join(draw.choices(words, k=7)) for _ in range(draw.randint(3, 7))]
        texts.append(". ".join(sentences) + ".")
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text(f"\n{EOT}\n".join(texts), "utf-8")
    return path


def options(corpus, out, **more):
    """Command-line arguments of a run that takes a fraction of a second."""
    chosen = dict(
        preset="tiny", data=corpus, out_dir=out, cache_dir=Path(corpus).parent / "cache",
        vocab_size=300, n_embd=16, block_size=16, n_labels=4, planner_reach=4, lm_steps=6,
        planner_steps=6, joint_steps=6, plans="none,gumbel,soft", eval_every=2, eval_tokens=256,
        device="cpu", dtype="float32")
    return [f"--{name}={value}" for name, value in (chosen | more).items()]


def run(corpus, out, **more):
    train.main(options(corpus, out, **more))
    return out


@pytest.fixture(scope="session")
def trained(corpus, tmp_path_factory):
    """A finished run of all plans."""
    return run(corpus, tmp_path_factory.mktemp("trained") / "out", plans="all")


def act_at(patch, module, name, n, act):
    """Call act() before the n-th call of a function."""
    original = getattr(module, name)
    calls = itertools.count(1)

    def wrapped(*arguments, **named):
        if next(calls) == n:
            act(*arguments)
        return original(*arguments, **named)
    patch.setattr(module, name, wrapped)


@pytest.fixture(scope="session")
def half(corpus, tmp_path_factory):
    """A run that was interrupted in the middle of stage lm."""
    out = tmp_path_factory.mktemp("half") / "out"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="130"):
        act_at(patch, train, "make_batch", 3, lambda *_: signal.raise_signal(signal.SIGINT))
        run(corpus, out)
    return out


def error_line(main, arguments, capsys):
    """The one line, apart from progress bars, with which a command ends at exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(arguments)
    printed = capsys.readouterr().err.splitlines()
    lines = [line for line in printed if line.strip() and not line.rstrip().endswith("]")]
    assert end.value.code == 2 and len(lines) == 1, lines
    assert ": error: " in lines[0]
    return lines[0]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def checkpoint(path):
    return torch.load(path, weights_only=True)


def read_json(out, name="results.json"):
    return json.loads((out / name).read_text())


def curves(out):
    """{(stage, step): figures} of metrics.jsonl; of lines that were written twice, the last."""
    found = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        del entry["per_second"]
        found[entry["stage"], entry["step"]] = entry
    return found


def assert_same_run(out, expected, plans="none,gumbel,soft"):
    """Bit for bit: each checkpoint, the results, and the curve of each stage."""
    for stage in ["lm", "labels", "planner", *(f"joint_{plan}" for plan in plans.split(","))]:
        assert (out / f"{stage}.pt").read_bytes() == (expected / f"{stage}.pt").read_bytes(), stage
    assert not list(out.glob("*.partial.pt"))
    found = read_json(out)
    wanted = read_json(expected)
    wanted["plans"] = {plan: wanted["plans"][plan] for plan in plans.split(",")}
    assert found == wanted
    ours = curves(out)
    theirs = curves(expected)
    assert ours and ours == {key: theirs[key] for key in ours}


# --- options and bad input ------------------------------------------------------------------------
@pytest.mark.parametrize("argument, message", [
    ("--lm_step=5", "unknown option --lm_step=5"),
    ("--lm_steps=many", "argument --lm_steps: invalid int value: 'many'"),
    ("--compile=maybe", "argument --compile"),
    ("--planner_lr=nan", "planner_lr=nan: must be finite and at least 0"),
    ("--n_head=16", "n_embd=16 must be a multiple of"),
    ("--plans=soft,sof", "plans=soft,sof: choose from none,fixed"),
    ("--preset=huge", "argument --preset: invalid choice: 'huge'"),
    ("--data=/no/such/file", "data=/no/such/file: no such file"),
    ("--device=tpu", "device=tpu is not available"),
    ("--n_labels=100000", "n_labels=100000: there are"),
    ("--block_size=100000", "a window of 100000 is too long"),
    ("--out_dir=/dev/null/out", "/dev/null/out can't be created")])
def test_a_bad_option_ends_in_one_line_and_exit_code_2(argument, message, corpus, tmp_path, capsys):
    line = error_line(train.main, [*options(corpus, tmp_path / "out"), argument], capsys)
    assert message in line
    assert not list(tmp_path.glob("out/*.pt"))


@pytest.mark.parametrize("name, content, message", [
    ("empty.txt", b"", "fewer than two sentences"),
    ("latin.txt", b"Gr\xfc\xdfe. " * 100, "is not valid UTF-8"),
    ("short.txt", f"One sentence alone.\n{EOT}\n".encode() * 20, "fewer than two sentences"),
    ("broken.jsonl", b'{"text": "A text."\n', "broken.jsonl:1 is not a JSON object")])
def test_a_bad_text_ends_in_one_line(name, content, message, trained, tmp_path, capsys):
    path = tmp_path / name
    path.write_bytes(content)
    assert message in error_line(train.main, options(path, tmp_path / "out"), capsys)
    if name != "short.txt":
        # A short text can still be scored.
        for option in ("--text", "--score"):
            arguments = [f"--out_dir={trained}", f"{option}={path}"]
            assert name in error_line(evaluation.main, arguments, capsys)


def test_a_preset_for_large_texts_is_refused_without_one(capsys):
    assert "500 MB of text" in error_line(train.main, ["--preset=gpu"], capsys)


def test_a_text_read_more_than_20_times_is_mentioned(corpus, tmp_path, capsys):
    for lm_steps, expected in ((6, False), (6000, True)):
        config = train.parse_config(options(corpus, tmp_path / "out", lm_steps=lm_steps))
        train.set_up(config)
        assert ("times over" in capsys.readouterr().out) == expected


def test_a_bug_shows_its_traceback(corpus, tmp_path, monkeypatch):
    def buggy(*_):
        raise ValueError("a bug")
    monkeypatch.setattr(train, "learning_rate", buggy)
    with pytest.raises(ValueError, match="a bug"):
        run(corpus, tmp_path / "out")


# --- nothing that was saved is lost ---------------------------------------------------------------
def refused(corpus, out, capsys, **more):
    """The line with which train.py refuses to continue a run; it leaves every file as it was."""
    before = contents(out)
    line = error_line(train.main, options(corpus, out, plans="all", **more), capsys)
    assert contents(out) == before
    return line


@pytest.mark.parametrize("name", ["lm.pt", "labels.pt", "planner.pt", "joint_soft.pt"])
def test_a_truncated_checkpoint_is_named(name, corpus, trained, tmp_path, capsys):
    out = shutil.copytree(trained, tmp_path / "out")
    os.truncate(out / name, (out / name).stat().st_size // 2)
    line = refused(corpus, out, capsys)
    assert f"torch can't read {out / name}" in line and "move it away" in line


def test_a_changed_model_and_another_version_are_named(corpus, trained, tmp_path, capsys):
    out = shutil.copytree(trained, tmp_path / "out")
    saved = checkpoint(out / "lm.pt")
    saved["model"]["gpt.renamed"] = saved["model"].pop("gpt.ln_f.weight")
    torch.save(saved, out / "lm.pt")
    line = error_line(train.main, options(corpus, out), capsys)
    assert "does not fit the model" in line and "gpt.renamed" in line and "another out_dir" in line
    del saved["options"]["muon_lr"]
    torch.save(saved, out / "lm.pt")
    line = refused(corpus, out, capsys)
    assert "made by another version, without the option muon_lr" in line
    assert "another --out_dir" in line


def test_weights_that_a_plan_lacks_are_not_ignored(corpus, tmp_path, monkeypatch):
    """At the start of stage joint, a weight of stage lm that has no place is an error."""
    build_model = train.build_model

    def renamed(config, plan, vocab_size):
        model = build_model(config, plan, vocab_size)
        if plan == "hard":
            model.gpt.final_norm = model.gpt.ln_f
            del model.gpt.ln_f
        return model
    monkeypatch.setattr(train, "build_model", renamed)
    with pytest.raises(RuntimeError, match="gpt.ln_f.weight"):
        run(corpus, tmp_path / "out", plans="hard")


def test_a_run_goes_on_with_its_own_options_alone(corpus, trained, capsys):
    """A new option has to be put into STAGE_OPTIONS or into this list."""
    free = set("cache_dir out_dir device preset compile plans eval_every eval_tokens".split())
    stages = {option: stage for stage, names in train.STAGE_OPTIONS.items() for option in names}
    # The text and its tokens are known by their fingerprint.
    assert {*stages, "data", *free} == {option.name for option in fields(train.Config)}
    assert not free & stages.keys()
    words = dict(tokenizer="gpt2", dtype="bfloat16", planner_view="window")
    saved = read_json(trained, "config.json")
    for option in stages.keys() - {"tokenizer", "vocab_size"}:
        other = words.get(option) or saved[option] * 2 or 1
        line = refused(corpus, trained, capsys, **{option: other})
        assert f"{option}={other}, but " in line and f"was made with {saved[option]}" in line
    # Another vocabulary makes another text of the same documents.
    assert "vocab_size=299, but" in refused(corpus, trained, capsys, vocab_size=299)


def test_another_text_is_refused(trained, tmp_path, capsys):
    path = tmp_path / "other.txt"
    path.write_text("Some other text, in sentences of some length. " * 200)
    assert "fingerprint of the text" in refused(path, trained, capsys)


# --- interrupted and continued --------------------------------------------------------------------
def live(arguments, module, name, n):
    """train.py in a process that is killed at the n-th call of a function; inside it if a save."""
    save = torch.save

    def kill(*arguments):
        if name == "save":
            save(*arguments)
            os.truncate(arguments[1], os.path.getsize(arguments[1]) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    act_at(pytest.MonkeyPatch(), importlib.import_module(module), name, n, kill)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    torch.set_num_threads(1)
    train.main(arguments)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_anywhere_and_continued_equals_undisturbed(corpus, trained, tmp_path, monkeypatch):
    """At a drawn step, inside a drawn save, before a file is moved into place."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    # Forks from a process that has imported everything.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_train", "torch._dynamo"])
    draw = random.Random(0)
    out = tmp_path / "out"
    arguments = options(corpus, out, plans="none,gumbel,soft", cache_dir=tmp_path / "cache")
    for module, name, *calls in [
            ("os", "rename", 1, 1), ("train", "make_batch", 2, 5), ("torch", "save", 1, 3),
            ("labels", "nearest", 1, 2), ("os", "replace", 3, 7), ("torch", "save", 1, 3),
            ("train", "make_batch", 1, 4), ("torch", "save", 100, 100)]:
        process = context.Process(target=live, args=(arguments, module, name, draw.randint(*calls)))
        process.start()
        process.join()
        assert process.exitcode == (0 if calls[0] == 100 else -signal.SIGKILL)
    assert_same_run(out, trained)


@pytest.mark.parametrize("which", [0, 1])
def test_continuing_needs_the_state_of_both_muon_and_adamw(which, corpus, half, trained, tmp_path):
    out = shutil.copytree(half, tmp_path / "out")
    saved = checkpoint(out / "lm.partial.pt")
    saved["optimizers"][which]["state"] = {}
    torch.save(saved, out / "lm.partial.pt")
    run(corpus, out, plans="none")
    assert (out / "lm.pt").read_bytes() != (trained / "lm.pt").read_bytes()


def test_the_same_command_adds_a_plan_to_a_finished_run(corpus, half, trained, tmp_path):
    out = shutil.copytree(half, tmp_path / "out")
    for plans in ("none", "gumbel,soft"):
        run(corpus, out, plans=plans)
    assert_same_run(out, trained)


# --- training -------------------------------------------------------------------------------------
def test_each_tensor_has_its_optimizer_rate_and_decay(corpus, trained, tmp_path, monkeypatch):
    asked = {}
    fit = train.fit

    def record(c, s, name, model, steps, parts):
        if "joint" not in name:
            fit(c, s, name, model, steps, parts)
        asked[name] = (model, train.make_optimizers(parts, c.weight_decay, s.device))
    out = shutil.copytree(trained, tmp_path / "out")
    for path in out.glob("joint_*.pt"):
        path.unlink()
    rates = dict(joint_lr=3e-3, joint_planner_lr=4e-4)
    monkeypatch.setattr(train, "fit", record)
    monkeypatch.setattr(train, "evaluate", lambda *_: {})
    monkeypatch.setattr(train, "table", str)
    run(corpus, out, plans="all", **rates)
    assert list(asked) == ["lm", "planner", *(f"joint_{plan}" for plan in PLANS)]
    config = train.Config(**rates)
    for stage, (model, optimizers) in asked.items():
        names = {p: name for name, p in model.named_parameters()}
        found = set()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for name in [names[p] for p in group["params"]]:
                    found.add(name)
                    ends = ("qkv.weight", "proj.weight", "up.weight", "down.weight")
                    # In its own stage, the planner's matrices are trained by Muon.
                    if name.startswith("planner."):
                        expected = config.joint_planner_lr
                    elif name.endswith(ends):
                        expected = config.muon_lr * (0.3 if "joint" in stage else 1)
                    else:
                        expected = getattr(config, f"{stage.split('_')[0]}_lr")
                    by_muon = name.endswith(ends) and not name.startswith("planner.")
                    assert isinstance(optimizer, train.Muon) == by_muon, name
                    assert group["peak_lr"] == pytest.approx(expected), name
                    spared = name.endswith(("label_emb", "start")) or "ln_" in name
                    assert group["weight_decay"] == (0.0 if spared else 0.1), name
        rests = stage.startswith("joint") and stage[6:] not in END_TO_END
        assert found == {name for name in names.values() if not (rests and "planner." in name)}
        # What was trained is what changed in the finished run.
        before = model.state_dict()
        after = checkpoint(trained / f"{stage}.pt")["model"]
        if "joint" in stage:
            assert found == {name for name in before if not torch.equal(before[name], after[name])}
        if "joint" in stage and stage != "joint_none":
            centroids = checkpoint(trained / "labels.pt")["model"]["centroids"]
            assert torch.equal(model.gpt.label_emb, centroids)


@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (16, 16)])
def test_a_step_of_muon_is_nearly_orthogonal_and_what_numpy_finds(shape):
    gradients = np.random.default_rng(0).normal(size=(3, 2, *shape))
    matrices = [torch.nn.Parameter(torch.ones(shape).double()) for _ in range(2)]
    muon = train.Muon([{"params": matrices, "lr": 0.02}], {"weight_decay": 0.1})
    expected = np.ones((2, *shape))
    momentum = 0
    for gradient in gradients:
        for p, g in zip(matrices, gradient):
            p.grad = torch.from_numpy(g)
        muon.step()
        momentum = 0.95 * momentum + 0.05 * gradient
        ahead = 0.95 * momentum + 0.05 * gradient
        for i, update in enumerate(ahead):
            x = update / np.linalg.norm(update)
            for _ in range(5):
                x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
            scale = 0.02 * max(1, shape[0] / shape[1]) ** 0.5
            expected[i] = expected[i] * (1 - 0.02 * 0.1) - scale * x
            assert np.abs(matrices[i].detach().numpy() - expected[i]).max() < 1e-6
        u, _, v = np.linalg.svd(ahead, full_matrices=False)
        turned = train.orthogonalize(torch.from_numpy(ahead)).numpy()
        turned = u.swapaxes(1, 2) @ turned @ v.swapaxes(1, 2)
        # The singular vectors stay as they were.
        for matrix in turned:
            assert np.abs(matrix - np.diag(matrix.diagonal())).max() < 1e-6
            assert 0.6 < matrix.diagonal().min() and matrix.diagonal().max() < 1.3


def test_the_planner_rests_until_it_is_unfrozen(corpus, tmp_path):
    out = run(corpus, tmp_path / "out", plans="soft", unfreeze_step=6)
    before = checkpoint(out / "planner.pt")["model"]
    after = checkpoint(out / "joint_soft.pt")["model"]
    assert all(torch.equal(p, after[f"planner.{name}"]) for name, p in before.items())


@pytest.mark.parametrize("view", ["document", "window"])
def test_planner_view_holds_in_each_stage_and_validation(view, corpus, tmp_path, monkeypatch):
    """Runs of sentences are for the view of the document alone: no window contains all of one."""
    views = set()
    runs = []
    window_batch = data.window_batch
    monkeypatch.setattr(data, "window_batch", lambda *a: views.add(a[4]) or window_batch(*a))
    act_at(monkeypatch, data, "sentence_batch", 1, lambda *_: runs.append(1))
    run(corpus, tmp_path / "out", plans="soft", planner_view=view)
    assert views == {view} and bool(runs) == (view == "document")


def test_the_learning_rate_is_logged_as_it_is(trained):
    assert [train.learning_rate(step, 100) for step in (0, 4, 100)] == pytest.approx([0.2, 1, 0.1])
    config = read_json(trained, "config.json")
    for (stage, step), entry in curves(trained).items():
        peak = config[f"{stage.split('_')[0]}_lr"]
        assert entry["lr"] == pytest.approx(peak * train.learning_rate(step - 1, 6))


def test_a_gradient_that_is_not_finite_ends_the_run_with_its_last_checkpoint_intact(
        corpus, trained, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        # In step 5, after two validations.
        act_at(patch, train, "label_loss", 7, lambda logits, _: logits.detach().fill_(math.inf))
        line = error_line(train.main, options(corpus, out), capsys)
    assert "planner: the gradient is not finite by step 6" in line
    assert_same_run(run(corpus, out), trained)


def test_processes_share_the_micro_batches_of_a_step(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "8")
    for name in ("init_process_group", "barrier"):
        monkeypatch.setattr(train.dist, name, lambda *_, **options: None)
    config = train.parse_config(options(corpus, tmp_path / "out", grad_accum=16))
    setup = train.set_up(config)
    starts = []
    monkeypatch.setattr(data, "window_batch", lambda corpus, starts_, *_: starts.extend(starts_))
    for setup.rank, micro in itertools.product(range(8), range(2)):
        train.make_batch(config, setup, setup.train, "lm", 0, micro)
    length = len(setup.train.tokens)
    together = data.batch_starts(length, config.block_size, 16 * config.batch_size, (0, 0), 0)
    assert sorted(starts) == sorted(together)
    line = error_line(train.main, options(corpus, tmp_path / "out", grad_accum=4), capsys)
    assert "grad_accum=4: must be a multiple of 8, the number of processes" in line


def test_on_gpus_the_device_is_set_before_anything_touches_it(corpus, tmp_path, monkeypatch):
    for name, value in (("RANK", 3), ("LOCAL_RANK", 3), ("WORLD_SIZE", 4)):
        monkeypatch.setenv(name, str(value))
    calls = []
    device = torch.device("cuda:3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda i: calls.append(("set_device", i)))
    monkeypatch.setattr(train, "choose_device", lambda _: calls.append(("touch",)) or device)
    monkeypatch.setattr(train, "choose_autocast", lambda *_: None)
    monkeypatch.setattr(train.dist, "barrier", lambda: None)
    monkeypatch.setattr(train.dist, "init_process_group", lambda backend, timeout, device_id:
                        calls.append((backend, device_id)))
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    arguments = options(corpus, tmp_path / "out", grad_accum=4, device="auto")
    train.set_up(train.parse_config(arguments))
    assert calls == [("set_device", 3), ("touch",), ("nccl", device)]


def keep_gradients(folder, rank=""):
    """Save what each optimizer is given in its first step, beside a run."""
    def keep(optimizer, *_):
        path = folder / f"{type(optimizer).__name__}{rank}"
        if not path.exists():
            grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
            torch.save(grads, path)
    return register_optimizer_step_pre_hook(keep)


def test_two_processes_with_two_micro_batches_train_as_one_does_with_one(corpus, trained, tmp_path):
    out = tmp_path / "out"
    arguments = options(corpus, out, plans="none,soft", grad_accum=4, batch_size=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               __file__, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    # Process 0 alone speaks.
    assert done.stdout.count("perplexity") == 1
    hook = keep_gradients(tmp_path)
    run(corpus, tmp_path / "one", plans="none", lm_steps=1)
    hook.remove()
    for name, rank in itertools.product(("Muon", "AdamW"), (0, 1)):
        found = checkpoint(tmp_path / f"{name}{rank}")
        alone = checkpoint(tmp_path / name)
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-7)
    ours = curves(out)
    expected = curves(trained)
    # Steps 2, 4 and 6 of each stage.
    assert len(ours) == 4 * 3
    for key, entry in ours.items():
        figures = {name: x for name, x in entry.items() if isinstance(x, float)}
        # Less tightly: Muon enlarges small singular values of a gradient, and rounding with them.
        assert figures == pytest.approx({name: expected[key][name] for name in figures}, rel=1e-4)


# --- what a run leaves ----------------------------------------------------------------------------
def test_eval_gives_the_table_of_the_run(trained, capsys):
    results = read_json(trained)
    evaluation.main([f"--out_dir={trained}"])
    assert read_json(trained, "eval.json") == results and list(results["plans"]) == list(PLANS)
    assert capsys.readouterr().out.strip() == evaluation.table(results)
    evaluation.main([f"--out_dir={trained}", "--split=test"])
    assert read_json(trained, "eval.json")["tokens"] != results["tokens"]


def test_eval_names_what_it_can_not_do(half, trained, tmp_path, capsys):
    for folder, arguments, message in [
            (tmp_path, [], "config.json"), (half, [], "labels.pt"),
            (trained, ["--plan=oracle", "--prompt=a"], "plan=oracle needs --label=K"),
            (trained, ["--plan=none", "--prompt=a", "--label=1"], "plan=none takes no label"),
            (trained, ["--prompt=a", "--label=4"], "label=4: must lie between 0 and 3"),
            (trained, ["--plan=sof"], "invalid choice: 'sof'"),
            (trained, ["--prompt=a", "--temperature=-1"], "temperature")]:
        assert message in error_line(evaluation.main, [f"--out_dir={folder}", *arguments], capsys)


def test_a_prompt_is_continued_with_the_plan_of_each_sentence(trained, capsys):
    prompt = ["--prompt=Some words of a prompt. ", "--max_tokens=60", "--temperature=1"]
    evaluation.main([f"--out_dir={trained}", *prompt, "--plan=oracle", "--label=2"])
    printed = capsys.readouterr().out
    assert printed.startswith("  Some words") and "> " in printed and "asked for 2" in printed
    evaluation.main([f"--out_dir={trained}", *prompt])
    assert "planned" in capsys.readouterr().out


def test_scores_contain_the_whole_text_and_add_up_to_its_table(trained, tmp_path, capsys):
    texts = ["你好，世界。這是第二句話，比第一句長一些。", "\0\x1b[31m \u2028 \ufeff \u202e\u05d0",
             "x" * 700, f"in a line {EOT} here", "A full stop. " * 30]
    path = tmp_path / "odd.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    evaluation.main([f"--out_dir={trained}", f"--text={path}"])
    results = read_json(trained, "eval.json")
    for plan in ("soft", "none"):
        capsys.readouterr()
        evaluation.main([f"--out_dir={trained}", f"--score={path}", f"--plan={plan}"])
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        whole = b"".join(bytes.fromhex(line["hex"]) for line in lines).decode()
        assert whole == "".join(text + EOT for text in texts)
        nats = results["plans"][plan]["nll"] * results["tokens"]
        assert sum(line["nll"] for line in lines) == pytest.approx(nats)
        assert all((line["label"] is None) == (plan == "none") for line in lines)


# --- devices that CI does not have ----------------------------------------------------------------
META = torch.device("meta")


class NoFloat64(TorchDispatchMode):
    """Like MPS, this device has no float64."""

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        if isinstance(result, torch.Tensor) and result.device == META:
            assert result.dtype != torch.float64
        return result


class FirstStepReached(Exception):
    pass


@pytest.mark.parametrize("stage", ["lm", "planner", *(f"joint_{plan}" for plan in PLANS)])
def test_everything_that_a_step_needs_is_on_the_device(stage, corpus, trained, tmp_path):
    """On the meta device, up to the first optimizer step: a tensor left on the CPU would raise."""
    config = train.parse_config(options(corpus, trained))
    setup = replace(train.set_up(config), device=META, out=tmp_path)
    labeler = evaluation.load_run(trained).labeler
    labeler.label(setup.train)
    plan = stage.partition("_")[2] or "none"
    if stage == "planner":
        model = build_model(config, "soft", 300).planner
    else:
        model = build_model(config, plan, 300)

    def stop(*_):
        raise FirstStepReached
    hook = register_optimizer_step_pre_hook(stop)
    parts = [(model if stage == "planner" else model.gpt, 0.02, 1e-3)]
    with pytest.raises(FirstStepReached), NoFloat64():
        train.fit(config, setup, stage, model, 6, parts)
    hook.remove()


class OnDevice(torch.Tensor):
    """A tensor of a device without float64."""

    def double(self):
        raise TypeError("this device has no float64")

    def cpu(self):
        return super().cpu().as_subclass(torch.Tensor)


def test_scores_become_float64_on_the_cpu(corpus, trained, monkeypatch):
    opened = evaluation.load_run(trained)
    labelled, _ = opened.split("val")
    model = opened.model("none")
    expected, _ = evaluation.score(model, labelled)
    forward = model.forward
    model.forward = lambda batch: (forward(batch)[0].as_subclass(OnDevice), None)
    assert np.array_equal(evaluation.score(model, labelled)[0], expected)


def test_auto_looks_at_the_machine_and_not_at_the_build(monkeypatch):
    build = lambda *_, **named: torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", build)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert evaluation.choose_device("auto").type == "cpu"


@pytest.mark.parametrize("is_native", [True, False])
def test_auto_does_not_take_emulated_bfloat16(is_native, monkeypatch):
    supported = lambda including_emulation=True: including_emulation or is_native
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch, "autocast", lambda *_, **named: "bfloat16")
    found = evaluation.choose_autocast("auto", torch.device("cuda"))
    assert (found == "bfloat16") == is_native


def test_two_preparations_at_once_share_one_store(corpus, tmp_path, monkeypatch):
    prepare = functools.partial(data.prepare, str(corpus), "bpe", 300, tmp_path)
    write_splits = data._write_splits
    stores = []

    def overtaken(*arguments):
        # Another process prepares the same text from start to end.
        monkeypatch.setattr(data, "_write_splits", write_splits)
        stores.append(prepare())
        write_splits(*arguments)
    monkeypatch.setattr(data, "_write_splits", overtaken)
    assert prepare().path == stores[0].path
    assert list(tmp_path.iterdir()) == [stores[0].path]


def test_compiled_plans_are_compiled_once_each_and_lose_what_eager_ones_do(
        corpus, tmp_path, monkeypatch):
    # At these sizes P and S vary from batch to batch.
    sizes = dict(plans="all", block_size=64, planner_reach=9, joint_steps=10)
    eager = run(corpus, tmp_path / "eager", **sizes)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    counters = torch._dynamo.utils.counters
    counters.clear()
    graphs = []
    fit = train.fit

    def count(*arguments):
        before = counters["stats"]["unique_graphs"]
        fit(*arguments)
        graphs.append(counters["stats"]["unique_graphs"] - before)
    monkeypatch.setattr(train, "fit", count)
    # A plan would run eagerly, with a warning, at the limit of recompilations.
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    compiled = run(corpus, tmp_path / "compiled", compile=True, **sizes)
    assert graphs == (2 + len(PLANS)) * [1]
    ours = curves(compiled)
    for key, entry in curves(eager).items():
        assert ours[key]["loss"] == pytest.approx(entry["loss"], rel=1e-5), key


if __name__ == "__main__":
    # train.py, in one of two processes.
    keep_gradients(Path.cwd(), os.environ["RANK"])
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
