"""Properties of whole runs: options, bad input, continuing, kills, and what a run leaves behind."""
import contextlib
import functools
import itertools
import json
import math
import multiprocessing
import os
import pkgutil
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import data
import eval as evaluation
import train
from data import EOT
from model import END_TO_END, PLANS
from planner import build_model


def act_before(patch, name, act, n=None):
    """Patch a function so that act is called before its n-th call, or before every call."""
    original = pkgutil.resolve_name(name)
    calls = itertools.count(1)

    def wrapped(*arguments, **named):
        if n in (None, next(calls)):
            act(*arguments)
        return original(*arguments, **named)
    patch.setattr(name, wrapped)


class Stop(Exception):
    pass


def stop(*_):
    raise Stop


def error_line(main, arguments, capsys):
    """The only line, apart from progress bars, that a command prints before exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="^2$"):
        main(arguments)
    lines = []
    for line in capsys.readouterr().err.splitlines():
        # A progress bar says for how long it has been running.
        if line.strip() and "[00:" not in line:
            lines.append(line)
    assert len(lines) == 1 and ": error: " in lines[0], lines
    return lines[0]


def contents(paths):
    return {path.name: path.read_bytes() for path in paths}


def read_json(path):
    return json.loads(path.read_text())


def weights(path):
    return torch.load(path)["model"]


def curves(out):
    """{(stage, step, name): figure} of metrics.jsonl. The last line counts for a repeated step."""
    found = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        for name, x in entry.items():
            if isinstance(x, float):
                found[entry["stage"], entry["step"], name] = x
    return found


def outcome(out):
    """Everything in which two equal runs agree bit for bit."""
    results = read_json(out / "results.json")
    del results["seconds"]
    return curves(out), contents(out.glob("*.pt")), results


# --- options and bad input ------------------------------------------------------------------------
@pytest.mark.parametrize("arguments, message", [
    ("--lm_step=5", "unrecognized arguments: --lm_step=5; --help lists all options"),
    ("--compile=maybe", "argument --compile"),
    ("--planner_lr=nan", "planner_lr=nan: must be finite and at least 0"),
    ("--n_head=16", "n_embd=16 must be a multiple of"),
    ("--plans=soft,sof", "plans=soft,sof: choose from none,fixed"),
    ("--data=/no/such/file", "data=/no/such/file: no such file"),
    ("--device=tpu", "device=tpu is not available"),
    ("--n_labels=100000", "n_labels=100000: there are"),
    ("--block_size=100000", "a window of 100000 is too long"),
    ("--out_dir=/dev/null/out", "/dev/null/out can't be created")])
def test_a_bad_option_ends_in_one_line_and_exit_code_2(
        arguments, message, options, tmp_path, capsys):
    command = options(tmp_path / "out", *arguments.split())
    assert message in error_line(train.main, command, capsys)


# --- nothing that was saved is lost ---------------------------------------------------------------
def refused(options, out, capsys, *more):
    """The line with which train.py refuses to continue a run. No file may change."""
    before = contents(out.iterdir())
    line = error_line(train.main, options(out, *more), capsys)
    assert contents(out.iterdir()) == before
    return line


def test_a_checkpoint_that_can_not_be_continued_is_named(options, trained, tmp_path, capsys):
    out = shutil.copytree(trained, tmp_path / "out")
    path = out / "lm.pt"
    saved = torch.load(path)
    # The model has changed since.
    saved["model"]["gpt.renamed"] = saved["model"].pop("gpt.ln_f.weight")
    torch.save(saved, path)
    line = error_line(train.main, options(out), capsys)
    assert f"{path} does not fit the model" in line and "gpt.renamed" in line
    # The version that made it lacked an option.
    del saved["options"]["muon_lr"]
    torch.save(saved, path)
    assert f"{path} was made with another version" in refused(options, out, capsys)
    os.truncate(path, 1000)
    assert f"torch can't read {path}" in refused(options, out, capsys)


def test_a_run_continues_only_with_its_own_options_and_text(options, trained, capsys):
    """Add a new option to train.STAGE_OPTIONS, or here if it changes no checkpoint."""
    free = "data cache_dir out_dir device preset compile plans eval_every eval_tokens"
    needed = sum(train.STAGE_OPTIONS.values(), [])
    assert sorted(needed + free.split()) == sorted(option.name for option in fields(train.Config))
    words = {"dtype": "bfloat16", "planner_view": "equal"}
    saved = read_json(trained / "config.json")
    # The tokenizer gpt2 would have to be downloaded.
    needed.remove("tokenizer")
    for option in needed:
        other = words.get(option) or saved[option] * 2 or 1
        line = refused(options, trained, capsys, f"--{option}={other}")
        assert f"{option}={other}, but " in line and f"was made with {saved[option]}" in line
    # The source of train.py is another text.
    line = refused(options, trained, capsys, f"--data={train.__file__}")
    assert "fingerprint of the text" in line


# --- interrupted and continued --------------------------------------------------------------------
def killed_run(arguments, name, n):
    """Run train.py, but kill this process at the n-th call of a function."""
    def kill(*values):
        if name == "torch.save":
            values[1].write_bytes(b"half a checkpoint")
        os.kill(os.getpid(), signal.SIGKILL)
    act_before(pytest.MonkeyPatch(), name, kill, n)
    torch.set_num_threads(1)
    train.main(arguments)


def test_killed_anywhere_and_continued_equals_undisturbed(options, trained, tmp_path):
    # Fork each process from a server that has already imported torch, to save time.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo"])
    draw = random.Random(0)
    out = tmp_path / "out"
    arguments = options(out, f"--cache_dir={tmp_path}/cache")
    for name, n in [
            ("os.rename", 1), ("train.make_batch", draw.randint(2, 6)), ("torch.save", 2),
            ("labels.nearest", 2), ("os.replace", 5),
            ("torch.nn.functional.gumbel_softmax", draw.randint(3, 6)), ("torch.save", 1)]:
        process = context.Process(target=killed_run, args=(arguments, name, n))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    train.main(arguments)
    assert outcome(out) == outcome(trained)


def test_a_run_that_ended_early_continues_and_takes_more_plans(
        options, run, trained, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    interrupt = lambda *_: signal.raise_signal(signal.SIGINT)
    act_before(monkeypatch, "train.make_batch", interrupt, n=5)
    with pytest.raises(SystemExit, match="130"):
        run(out, "--plans=none")
    # In the fifth step.
    make_infinite = lambda logits, _: logits.detach().fill_(math.inf)
    act_before(monkeypatch, "train.label_loss", make_infinite, n=5)
    line = error_line(train.main, options(out, "--plans=none"), capsys)
    assert "planner: the gradient is not finite by step 6" in line
    run(out, "--plans=none")
    assert outcome(run(out)) == outcome(trained)


# --- training -------------------------------------------------------------------------------------
def test_each_tensor_has_its_optimizer_rate_and_decay(run, tmp_path, monkeypatch):
    models = {}
    found = {}

    def begin(c, s, stage, model, *_):
        models[stage] = model

    def keep(optimizer):
        for group in optimizer.param_groups:
            # The peak, from the rate of the last step.
            peak = group["lr"] / train.lr_share(5, 6)
            for p in group["params"]:
                found[p] = (type(optimizer), pytest.approx(peak), group["weight_decay"])
    act_before(monkeypatch, "train.fit", begin)
    act_before(monkeypatch, "train.Muon.step", keep)
    act_before(monkeypatch, "torch.optim.AdamW.step", keep)
    run(tmp_path / "out")

    assert [train.lr_share(step, 100) for step in (0, 4, 100)] == pytest.approx([0.2, 1, 0.1])
    trains_planner = ["planner", *(f"joint_{plan}" for plan in END_TO_END)]
    for stage, model in models.items():
        kind = stage.split("_")[0]
        for name, p in model.named_parameters():
            optimizer = torch.optim.AdamW
            rate = getattr(train.Config, f"{kind}_lr")
            is_planner = name.startswith("planner.")
            if kind == "joint" and is_planner:
                rate = train.Config.joint_planner_lr
            elif name.endswith(("qkv.weight", "proj.weight", "up.weight", "down.weight")):
                optimizer = train.Muon
                # Muon's rate falls with AdamW's.
                rate = 0.005 if kind == "joint" else 0.02
            decays = p.dim() > 1 and name != "gpt.label_emb"
            expected = (optimizer, rate, 0.1 if decays else 0.0)
            is_trained = stage in trains_planner if is_planner else stage != "planner"
            assert found.get(p) == (expected if is_trained else None), (stage, name)


@pytest.mark.parametrize("M, N", [(64, 16), (16, 64)])
def test_muon_takes_the_steps_that_numpy_takes_and_they_are_nearly_orthogonal(M, N):
    matrices = [torch.nn.Parameter(ones) for ones in torch.ones(2, M, N).double()]
    muon = train.Muon([{"params": matrices, "lr": 0.02}], {"weight_decay": 0.1})
    expected = np.ones((2, M, N))
    momentum = 0
    for gradient in np.random.default_rng(0).normal(size=(3, 2, M, N)):
        for p, g in zip(matrices, gradient):
            p.grad = torch.from_numpy(g)
        muon.step()
        momentum = 0.95 * momentum + 0.05 * gradient
        # The Newton-Schulz steps change the singular values alone.
        u, s, v = np.linalg.svd(0.95 * momentum + 0.05 * gradient, full_matrices=False)
        s /= np.linalg.norm(s, axis=1, keepdims=True)
        for _ in range(4):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        assert 0.6 < s.min() and s.max() < 1.3
        update = u * s[:, None] @ v
        expected = expected * (1 - 0.02 * 0.1) - 0.02 * max(1, M / N) ** 0.5 * update
    assert np.allclose(torch.stack(matrices).detach(), expected, atol=1e-6)


def test_stage_joint_starts_from_earlier_stages(run, trained, tmp_path):
    out = run(tmp_path / "out", "--plans=soft", "--joint_lr=0", "--joint_planner_lr=0")
    # Stage planner trains the planner alone.
    before = weights(out / "planner.pt") | weights(out / "lm.pt")
    before["gpt.label_emb"] = weights(out / "labels.pt")["centroids"]
    for folder, rests in ((out, True), (trained, False)):
        after = weights(folder / "joint_soft.pt")
        for name, p in before.items():
            assert torch.equal(p, after[name]) == rests, name


@pytest.mark.parametrize("view, view_tokens", [("document", None), ("equal", 16)])
def test_planner_view_holds_everywhere_and_stage_planner_has_spans_of_twice_the_reach(
        view, view_tokens, run, tmp_path, monkeypatch):
    found = []
    n_labels = []
    act_before(monkeypatch, "data._fill_slots", lambda *values: found.append(values[4]))
    count = lambda _, labels: n_labels.append(int((labels >= 0).sum()))
    act_before(monkeypatch, "train.label_loss", count)
    run(tmp_path / "out", "--plans=soft", f"--planner_view={view}")
    assert len(found) > 12 and set(found) == {view_tokens}
    assert n_labels == 6 * [train.SPANS * 2 * 4]


def test_a_step_must_have_as_many_micro_batches_for_each_process(
        options, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    arguments = options(tmp_path / "out", "--grad_accum=4")
    assert "must be a multiple of 3" in error_line(train.main, arguments, capsys)


def test_on_gpus_the_device_is_set_before_anything_touches_it(run, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(train, "choose_device", calls.append)
    join = lambda backend, **_: calls.append(backend)
    monkeypatch.setattr(train.dist, "init_process_group", join)
    monkeypatch.setattr(train.dist, "barrier", stop)
    with pytest.raises(Stop):
        run(tmp_path / "out", "--grad_accum=4", "--device=auto")
    assert calls == [3, "auto", "nccl"]


def test_two_processes_with_two_micro_batches_train_as_one_does_with_one(
        options, run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    # Not gumbel, because its noise depends on the number of micro-batches.
    sizes = ["--plans=none,soft", "--grad_accum=4", "--batch_size=2"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               train.__file__, *options(out, *sizes)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Only process 0 prints.
    assert done.stdout.count("fingerprint") == 1
    monkeypatch.setattr(train, "SPANS", 4 * train.SPANS)
    alone = curves(run(tmp_path / "alone", "--plans=none,soft"))
    for key, figure in curves(out).items():
        assert figure == pytest.approx(alone[key], rel=1e-4), key


# --- what a run leaves ----------------------------------------------------------------------------
def test_eval_gives_the_table_of_the_run(trained, capsys):
    results = read_json(trained / "results.json")
    del results["seconds"]
    evaluation.main([f"--out_dir={trained}"])
    assert read_json(trained / "eval.json") == results and list(results["plans"]) == list(PLANS)
    assert capsys.readouterr().out.strip() == evaluation.table(results)
    evaluation.main([f"--out_dir={trained}", "--split=test"])
    assert read_json(trained / "eval.json")["tokens"] != results["tokens"]


def test_eval_names_what_it_can_not_do(trained, tmp_path, capsys):
    text = tmp_path / "latin.txt"
    text.write_bytes(b"Gr\xfc\xdfe.")
    for arguments, message in [
            (f"--out_dir={tmp_path}", "config.json"),
            (f"--text={text}", "latin.txt is not valid UTF-8"),
            (f"--score={os.devnull}", f"{os.devnull} contains no text"),
            ("--plan=oracle --prompt=a", "plan=oracle needs --label=K"),
            ("--plan=none --prompt=a --label=1", "plan=none takes no label"),
            ("--prompt=a --label=4", "label=4: must lie between 0 and 3"),
            ("--prompt=a --temperature=-1", "temperature")]:
        command = [f"--out_dir={trained}", *arguments.split()]
        assert message in error_line(evaluation.main, command, capsys)


def test_a_prompt_is_continued_with_the_plan_of_each_sentence(trained, capsys):
    command = [f"--out_dir={trained}", "--prompt=Some words of a prompt. ", "--max_tokens=60"]
    evaluation.main([*command, "--plan=oracle", "--label=2"])
    printed = capsys.readouterr().out
    assert printed.startswith("  Some words") and "> " in printed and "asked for 2" in printed
    evaluation.main(command)
    assert "planned" in capsys.readouterr().out


def test_scores_contain_the_whole_text_and_add_up_to_its_table(trained, tmp_path, capsys):
    text = f"""你好，世界。這是第二句話，比第一句長一些。 \0\x1b[31m \u2028 \ufeff \u202e\u05d0
{EOT}
In a line {EOT} is text. {"A full stop. " * 30}"""
    path = tmp_path / "odd.txt"
    path.write_text(text, "utf-8")
    evaluation.main([f"--out_dir={trained}", f"--text={path}"])
    results = read_json(trained / "eval.json")
    # The line that separates the documents belongs to neither.
    assert results["bytes"] == len(text.encode()) - len(f"{EOT}\n")
    for plan in ("soft", "none"):
        capsys.readouterr()
        evaluation.main([f"--out_dir={trained}", f"--score={path}", f"--plan={plan}"])
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        raw = bytes.fromhex("".join(line["hex"] for line in lines))
        assert raw.decode() == text.replace(f"{EOT}\n", EOT) + EOT
        nats = results["plans"][plan]["nll"] * results["tokens"]
        assert sum(line["nll"] for line in lines) == pytest.approx(nats)
        bits = results["plans"][plan]["bits_per_byte"] * results["bytes"]
        assert bits == pytest.approx(nats / math.log(2))


# --- devices that CI does not have ----------------------------------------------------------------
class NoFloat64(TorchDispatchMode):
    """Like MPS, the meta device has no float64."""

    def __torch_dispatch__(self, function, types, arguments, named):
        result = function(*arguments, **named)
        if isinstance(result, torch.Tensor) and result.is_meta:
            assert result.dtype != torch.float64
        return result


@pytest.mark.parametrize("stage, plan", [
    ("lm", "none"), ("planner", "soft"), *(("joint", plan) for plan in PLANS)])
def test_everything_that_a_step_needs_is_on_the_device(
        stage, plan, options, trained, tmp_path, monkeypatch):
    """On the meta device, up to the first optimizer step: a tensor left on the CPU would raise."""
    config = train.parse_config(options(trained))
    setup = replace(train.set_up(config), device=torch.device("meta"), out=tmp_path)
    evaluation.load_run(trained).labeler.label(setup.train)
    model = build_model(config, plan, 300)
    part = model.planner if stage == "planner" else model.gpt
    monkeypatch.setattr(train.Muon, "step", stop)
    with pytest.raises(Stop), NoFloat64():
        train.fit(config, setup, stage, model, 6, [(part, 0.02, 1e-3)])


def test_scores_are_on_the_cpu_before_they_become_float64(trained):
    opened = evaluation.load_run(trained)
    corpus = opened.split("val")
    model = opened.model("none").to("meta")
    # A meta tensor can't be copied to the CPU, so this is as far as it gets.
    with pytest.raises(NotImplementedError, match="Cannot copy"), NoFloat64():
        evaluation.score(model, corpus)


def test_auto_looks_at_the_machine_and_not_at_the_build(monkeypatch):
    build = lambda *_, **named: torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", build)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert evaluation.choose_device("auto").type == "cpu"


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("is_native", [True, False])
def test_auto_does_not_take_emulated_bfloat16(is_native, monkeypatch):
    supported = lambda including_emulation=True: including_emulation or is_native
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    found = evaluation.choose_autocast("auto", torch.device("cuda"))
    assert isinstance(found, contextlib.nullcontext) != is_native


def test_two_preparations_at_once_share_one_store(corpus, tmp_path, monkeypatch):
    prepare = functools.partial(data.prepare, str(corpus), "bpe", 300, tmp_path)
    stores = []
    # Meanwhile, another process prepares the same text from start to end.
    act_before(monkeypatch, "data._write_store", lambda *_: stores.append(prepare()), n=1)
    assert prepare().path == stores[0].path
    assert list(tmp_path.iterdir()) == [stores[0].path]


def test_compiled_plans_are_compiled_once_each_and_lose_what_eager_ones_do(
        run, tmp_path, monkeypatch):
    # At these sizes P and S vary from batch to batch.
    sizes = "--plans=none,previous,hard,gumbel,soft,oracle --block_size=80 --planner_reach=9"
    eager = curves(run(tmp_path / "eager", *sizes.split()))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    counters = torch._dynamo.utils.counters
    counters.clear()
    n_graphs = []
    count = lambda *_: n_graphs.append(counters["stats"]["unique_graphs"])
    act_before(monkeypatch, "train.fit", count)
    compiled = curves(run(tmp_path / "compiled", "--compile=true", *sizes.split()))
    count()
    # One graph each for stages lm and planner and for six plans. At the limit of recompilations, a
    # plan would run without one.
    assert n_graphs == list(range(9))
    assert compiled == pytest.approx(eager, rel=1e-4)
