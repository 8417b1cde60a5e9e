"""Nothing breaks a run, and nothing makes its results wrong without a word: kills at any write or
step, damaged files, full disks, a second run in the same folder, odd texts, odd numbers.

What is killed or limited runs in a process of its own: forked from one that has imported all, so
that it starts at once. Draws come from seeded generators; NANOPLAN_THOROUGH=1 draws far more, which
takes about half an hour.
"""
import builtins
import contextlib
import importlib
import io
import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]          # for the helper, which is no pytest

import data
import eval as evaluation
import labels as labelling
import train
from data import EOT, Corpus

test_data, test_train = map(importlib.import_module, ("test_data", "test_train"))   # our siblings
PLANES, draw_text, our_tokenizer = test_data.PLANES, test_data.draw_text, test_data.our_tokenizer
Harm, made_up_text = test_train.Harm, test_train.made_up_text
options, tensors = test_train.options, test_train.tensors

THOROUGH = os.environ.get("NANOPLAN_THOROUGH") == "1"
PLANS = "none,soft"
STAGES = ("lm", "planner", "joint_none", "joint_soft")


# --- processes that end early ---------------------------------------------------------------------

class Scythe:
    """Kills this process with SIGKILL at the n-th write to out_dir ("write") or to a corpus that is
    prepared ("store"), or at the n-th step of a stage: before a write, in the midst of it, or after
    it; at a file's opening, or at its move into place."""

    def __init__(self, at: dict[str, int]):
        self.at, self.seen, self.stage = at, Counter(), ""
        fit, rate, save = train.fit, train.learning_rate, torch.save
        opened, replace, rename = io.open, os.replace, os.rename

        def staged(job, stage, saved):
            self.stage = stage.name
            fit(job, stage, saved)

        def step(*arguments):
            self.passes(self.stage)
            return rate(*arguments)

        def saves(content, path):
            save(content, path)
            if self.is_next("write"):
                os.truncate(path, os.path.getsize(path) // 2)
            self.passes("write")

        def opens(file, mode="r", *arguments, **named):
            found = opened(file, mode, *arguments, **named)
            if set(mode) & set("wax+"):
                kind = "store" if "cache" in str(file) else "write"
                self.passes(kind)
                return Written(found, self, kind)
            return found

        def moves(move):
            def moved(source, target):
                kind = "store" if "cache" in str(target) else "write"
                self.passes(kind)
                move(source, target)
                self.passes(kind)
            return moved

        train.fit, train.learning_rate, torch.save = staged, step, saves
        io.open = builtins.open = opens
        os.replace, os.rename = moves(replace), moves(rename)

    def is_next(self, kind: str) -> bool:
        return self.seen[kind] + 1 == self.at.get(kind)

    def passes(self, kind: str) -> None:
        if self.is_next(kind):
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen[kind] += 1


class Written:
    """A file each of whose writes may be cut in two."""

    def __init__(self, file, scythe: Scythe, kind: str):
        self.file, self.scythe, self.kind = file, scythe, kind

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, content):
        if self.scythe.is_next(self.kind):
            self.file.write(content[:len(content) // 2])
            self.file.flush()
        self.scythe.passes(self.kind)
        return self.file.write(content)


def live(task: dict) -> None:
    """train.py with a task's arguments, in a forked process, until it ends or is ended."""
    scythe = Scythe(task["die"])
    if task["limit"]:                                # a file's bytes; beyond, a write fails
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (task["limit"], task["limit"]))
    code = 0
    try:
        train.main(task["arguments"])
        print(json.dumps(scythe.seen))
    except SystemExit as end:
        code = end.code
    except BaseException:
        code = 1
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    os._exit(code)


def serve() -> None:
    """Forks a process for each task, a line of JSON, and answers with its id; answers the line
    {"wait": id} with how it ended, as subprocess's returncode, and all that it printed."""
    torch.set_num_threads(1)
    weight = torch.nn.Parameter(torch.zeros(1))      # the first step of AdamW imports 800 modules,
    weight.grad = torch.zeros(1)                     # which takes longer than a run
    torch.optim.AdamW([weight]).step()
    pipes = {}
    for line in sys.stdin:
        task = json.loads(line)
        if pid := task.get("wait"):
            with open(pipes.pop(pid)) as pipe:
                printed = pipe.read()
            answer = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), printed
        else:
            ours, its = os.pipe()                    # not a file, which could be full
            if not (answer := os.fork()):
                os.dup2(its, 1)
                os.dup2(its, 2)
                live(task)
            os.close(its)
            pipes[answer] = ours
        print(json.dumps(answer), flush=True)


class Processes:
    """The tests' side of `serve`."""

    def __init__(self):
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})

    def ask(self, **task):
        print(json.dumps(task), file=self.server.stdin, flush=True)
        return json.loads(self.server.stdout.readline())

    def start(self, arguments, die=None, limit=0) -> int:
        """The id of a process that runs train.py."""
        return self.ask(arguments=arguments, die=die or {}, limit=limit)

    def run(self, arguments, **how) -> tuple[int, list[str]]:
        """Its return code, and the lines that it printed."""
        code, printed = self.ask(wait=self.start(arguments, **how))
        return code, printed.strip().splitlines()


@pytest.fixture(scope="module")
def processes():
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    found = Processes()
    yield found
    found.server.stdin.close()
    found.server.wait()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text(made_up_text(240))
    return path


def tiny(corpus, out, **more):
    """A run of four stages, with its own prepared corpus, in half a second."""
    given = dict(plans=PLANS, cache_dir=out / "cache", eval_tokens=256) | more
    return options(corpus, out, **given)


@pytest.fixture(scope="module")
def undisturbed(corpus, processes, tmp_path_factory):
    """The folder of a run that nothing disturbed, how often it wrote what, and its seconds."""
    out, begun = tmp_path_factory.mktemp("undisturbed") / "out", time.perf_counter()
    code, printed = processes.run(tiny(corpus, out))
    assert code == 0, printed
    return out, json.loads(printed[-1]), time.perf_counter() - begun


def contents(out: Path) -> dict:
    """All that a run leaves, without what differs between equal runs: versions, paths, speed."""
    found = {path.name: path.read_bytes() for path in out.iterdir()
             if path.suffix in (".npy", ".tmp") or path.name == "tokenizer.json"}
    for path in out.glob("*.pt"):
        found |= {name: x.numpy().tobytes() for name, x in tensors(path).items()}
    for path in out.glob("*.json"):
        whole = json.loads(path.read_text())
        found[path.name] = {name: value for name, value in whole.items()
                            if name not in ("versions", "digest", "out_dir", "cache_dir", "resume")}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = [{k: v for k, v in entry.items() if k != "per_second"} for entry in lines]
    found["stores"] = [{path.name: path.read_bytes() for path in (out / "cache").glob("*/*")
                        if not path.parent.name.endswith(".tmp")}]
    return found


@pytest.mark.parametrize("seed", range(20 if THOROUGH else 3))
def test_killed_anywhere_and_resumed_ends_with_the_results_of_the_undisturbed_run(
        seed, corpus, processes, undisturbed, tmp_path):
    """In each stage at a drawn step, and at a drawn write before and after each of those."""
    whole, seen, _ = undisturbed
    rng, out, killed = random.Random(seed), tmp_path / "out", []
    draws = [{"store": rng.randint(1, seen["store"])}]
    for i in range(len(STAGES)):                     # in this stage; in the next, if this has ended
        draws += [{"write": rng.randint(1, seen["write"] // 5)},
                  {stage: rng.randint(1, 6) for stage in STAGES[i:]}]
    for die in [*draws, {}]:
        code, printed = processes.run(tiny(corpus, out, resume=out.exists()), die=die)
        if code == 0:
            break
        assert code == -signal.SIGKILL, (die, printed)
        killed.append(die)
    assert code == 0 and len(killed) >= 4
    assert contents(out) == contents(whole), killed


@pytest.mark.skipif(not THOROUGH, reason="NANOPLAN_THOROUGH=1 does it")
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_any_time_and_resumed_ends_with_the_results_of_the_undisturbed_run(
        seed, corpus, processes, undisturbed, tmp_path):
    whole, _, seconds = undisturbed
    rng, out, killed = random.Random(seed), tmp_path / "out", 0
    while killed < 6:
        process = processes.start(tiny(corpus, out, resume=True))
        time.sleep(rng.uniform(0, 0.7 * seconds))
        os.kill(process, signal.SIGKILL)             # a child not waited for keeps its id
        code, printed = processes.ask(wait=process)
        assert code in (0, -signal.SIGKILL), printed
        if code == 0 and killed:
            break
        if code == 0:                                # this machine is quicker now
            shutil.rmtree(out)
            seconds /= 2
        else:
            killed += 1
    assert processes.run(tiny(corpus, out, resume=True))[0] == 0
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("seed", range(20 if THOROUGH else 2))
def test_a_disk_that_fills_is_one_line_and_the_run_goes_on_with_room(
        seed, corpus, processes, undisturbed, tmp_path):
    """A limit on a file's size, so that real writes fail, in Python's files and in torch's."""
    pytest.importorskip("resource")
    whole, rng, out = undisturbed[0], random.Random(seed), tmp_path / "out"
    sizes = sorted(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    for _ in range(3):
        limit = rng.choice(sizes[1:]) - 1
        code, printed = processes.run(tiny(corpus, out, resume=True), limit=limit)
        assert code == 2 and printed[-1].startswith("train.py: error: "), printed
        assert not any(line.startswith(("Traceback", "Exception")) for line in printed)
    assert processes.run(tiny(corpus, out, resume=True))[0] == 0
    assert contents(out) == contents(whole)


# --- a disk that fills ----------------------------------------------------------------------------

@contextlib.contextmanager
def disk_of(size: int):
    """No file can grow beyond `size` bytes."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Job(train.Job):
    """A Job of which no more than the log is there."""

    def __init__(self, out):
        self.out, self.rank = out, 0


def write_vectors(path):
    labeler = labelling.Labeler(torch.ones(our_tokenizer().n_vocab, 8), None, torch.zeros(8))
    corpus = Corpus.from_texts([draw_text(0)], our_tokenizer())
    labelling.embed_corpus(labeler, corpus, path)


def write_log(path):
    job = Job(path.parent)
    if not path.exists():
        for step in range(50):
            job.log(stage="lm", step=step, loss=5.4321)
    job.forget("planner", 0)


WRITERS = {
    "lm.pt": lambda path: train.save_checkpoint(path, {"model": {"x": torch.ones(5000)}}),
    "results.json": lambda path: evaluation.write_json(path, {"plans": {"none": [1.5] * 500}}),
    "tokenizer.json": lambda path: data.save_tokenizer(path, our_tokenizer()),
    "vectors.train.0.npy": write_vectors, "metrics.jsonl": write_log}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_last_file_as_it_was(name, tmp_path):
    path, write = tmp_path / name, WRITERS[name]
    write(path)
    size = path.stat().st_size
    if name.startswith("vectors"):
        path.write_bytes(path.read_bytes()[:-1])     # else they would be read, not written
    before = path.read_bytes()
    for share in (0, 1 / 3, 1):
        message = rf"\Acould not write {path} \(.+\): what was saved before is intact; make room .*"
        with disk_of(int((size - 1) * share)), pytest.raises(OSError, match=message) as error:
            write(path)
        assert "\n" not in str(error.value)
        assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_line_where_a_file_grows_as_well(tmp_path):
    """metrics.jsonl, and the files of a store."""
    with disk_of(100), pytest.raises(OSError, match=r"\Acould not write .+metrics.jsonl \(.+\Z"):
        for step in range(50):
            Job(tmp_path).log(stage="lm", step=step)
    (tmp_path / "a.txt").write_text("A sentence of some words, and more. \n" * 10_000)
    with disk_of(100_000), pytest.raises(OSError, match=r"\Acould not write .+train\.\w+ \(.+\Z"):
        data.prepare(str(tmp_path / "a.txt"), "bpe", 300, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


# --- two runs in one folder -----------------------------------------------------------------------

def test_a_second_run_in_an_out_dir_is_refused_until_the_first_has_ended(
        corpus, processes, undisturbed, tmp_path):
    pytest.importorskip("fcntl")
    out = tmp_path / "out"
    long = tiny(corpus, out, lm_steps=10 ** 6, save_every=10 ** 6)
    first = processes.start(long)
    try:
        while not (out / "metrics.jsonl").exists():
            time.sleep(0.01)
        before = (out / "config.json").read_bytes()
        for more in ({}, {"resume": True}):
            code, (line,) = processes.run(tiny(corpus, out, **more))
            assert code == 2 and f"out_dir={out} is in use by another run" in line
        assert (out / "config.json").read_bytes() == before
    finally:
        os.kill(first, signal.SIGKILL)
        processes.ask(wait=first)
    code, printed = processes.run(tiny(corpus, out, resume=True))
    assert code == 0, printed                        # a killed run leaves no lock
    assert contents(out) == contents(undisturbed[0])


# --- damaged files --------------------------------------------------------------------------------

def end_of(main, arguments, capsys) -> str:
    """How a command ended: "" as it should, or the one line with which it refused."""
    capsys.readouterr()
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as error:
        printed = capsys.readouterr().err.strip().splitlines()
        assert error.code == 2 and printed[-1].split(": ")[1] == "error"
        return printed[-1]
    return ""


@pytest.fixture(scope="module")
def trained(corpus, undisturbed, tmp_path_factory):
    """A finished run in a folder that tests may spoil."""
    out = tmp_path_factory.mktemp("trained") / "out"
    shutil.copytree(undisturbed[0], out)
    train.main(tiny(corpus, out, resume=True))
    evaluation.main([f"--out_dir={out}"])
    return out


@pytest.fixture
def spoilt(trained):
    """The same, made whole again after the test."""
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    yield trained
    for path in trained.rglob("*"):
        if path.is_file() and path not in before:
            path.unlink()
    for path, content in before.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


def flat(saved, name="") -> dict:
    """All that a checkpoint holds, as name -> bytes or value."""
    if isinstance(saved, torch.Tensor):
        return {name: saved.numpy().tobytes()}
    if isinstance(saved, dict):
        inner = [flat(value, f"{name}.{key}") for key, value in saved.items()]
        return {key: value for found in inner for key, value in found.items()}
    return {name: saved}


def test_a_flipped_bit_in_a_checkpoint_is_refused_or_changes_nothing(tmp_path):
    """Most in the zip's own headers, of which check sums know nothing."""
    path, rng = tmp_path / "lm.pt", random.Random(0)
    train.save_checkpoint(path, {"depends": {"seed": 1}, "model": {
        str(i): torch.randn(40, generator=torch.Generator().manual_seed(i)) for i in range(6)}})
    content, whole = path.read_bytes(), flat(evaluation.load_checkpoint(path))
    heads = [at + i for at in range(len(content)) for i in range(60)
             if content.startswith((b"PK\1\2", b"PK\3\4", b"PK\5\6"), at) and at + i < len(content)]
    assert len(heads) > 20 * 60
    # the compressed size and the attributes of an entry: zipfile reads neither, torch both
    central = [at for at in range(len(content)) if content.startswith(b"PK\1\2", at)]
    bits = [(at + field, 4) for at in central for field in (20, 21, 38)]
    places = [heads] * 3 + [range(len(content))]
    bits += [(rng.choice(rng.choice(places)), rng.randrange(8))
             for _ in range(20_000 if THOROUGH else 300)]
    refused = 0
    for at, bit in bits:
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1:])
        try:
            assert flat(evaluation.load_checkpoint(path)) == whole, (at, bit)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert len(central) * 3 <= refused < len(bits)


@pytest.mark.parametrize("source, target", [
    ("joint_none", "lm"), ("joint_soft", "joint_none"), ("planner", "lm"), ("lm", "labels")])
def test_a_checkpoint_under_the_name_of_another_is_refused(source, target, corpus, spoilt, capsys):
    shutil.copy(spoilt / f"{source}.pt", spoilt / f"{target}.pt")
    line = end_of(train.main, tiny(corpus, spoilt, resume=True), capsys)
    assert f"{target}.pt is a copy of {source}.pt" in line


def test_a_checkpoint_of_a_newer_format_is_refused(corpus, spoilt, capsys):
    saved = torch.load(spoilt / "lm.pt", weights_only=True)
    torch.save(saved | {"format": "nanoplan-99"}, spoilt / "lm.pt")
    line = end_of(train.main, tiny(corpus, spoilt, resume=True), capsys)
    assert "lm.pt is not a checkpoint of this version ('nanoplan-99', not 'nanoplan-1')" in line


def damages(content: bytes, harm: Path, rng: random.Random) -> dict[str, bytes]:
    """Ways to spoil a file; "code" and "zip" would make the folder `harm`, were they unpickled."""
    Harm.folder = str(harm)
    archive = io.BytesIO()
    torch.save({"format": evaluation.FORMAT, "harm": Harm()}, archive)
    at = rng.randrange(len(content))
    flipped = content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1:]
    return {"truncated": content[:rng.randrange(1, len(content))], "flipped": flipped,
            "longer": content + b"\0", "empty": b"", "bytes": rng.randbytes(100), "list": b"[]",
            "object": b"{}", "code": pickle.dumps(Harm()), "zip": archive.getvalue()}


FILES = {"config.json": 4, "tokenizer.json": 4, "metrics.jsonl": 1, "vectors.train.*.npy": 1,
         "vectors.val.*.npy": 1, "cache/*/meta.json": 6, "cache/*/tokenizer.json": 6,
         "cache/*/val.tokens": 1, "cache/*/train.sentences": 1,
         "cache/*/val.documents": 1}


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_refused_or_made_anew(name, corpus, spoilt, tmp_path, capsys):
    """By train.py and eval.py: the results are those of whole files, or a line says what is not;
    and no file's code is run. Bits are flipped several times where most of them mean something."""
    path, = spoilt.glob(name)
    content, rng, ends = path.read_bytes(), random.Random(0), Counter()
    rounds = [damages(content, tmp_path / "harm", rng)]
    rounds += [{"flipped": damages(content, tmp_path / "harm", rng)["flipped"]}
               for _ in range(FILES[name] * (50 if THOROUGH else 1) - 1)]
    before = contents(spoilt)
    commands = {"results.json": (train.main, tiny(corpus, spoilt, resume=True)),
                "eval.json": (evaluation.main, [f"--out_dir={spoilt}"])}
    for kind, damaged in [item for each in rounds for item in each.items()]:
        for result, (main, arguments) in commands.items():
            path.write_bytes(damaged)
            line = end_of(main, arguments, capsys)
            if not line:
                plans = json.loads((spoilt / result).read_text())["plans"]
                said = capsys.readouterr()
                for plan, figures in before[result]["plans"].items():
                    assert plans.get(plan) == figures or (
                        plan not in plans and f"joint_{plan}: passed over" in said.out), kind
            assert not (tmp_path / "harm").exists(), kind
            ends[result, bool(line)] += 1
        path.write_bytes(content)
    refused = name.startswith(("cache", "config"))   # what a run depends on; the rest it makes anew
    assert ends["results.json", refused] >= len(damages(content, tmp_path, rng)) - 1


def test_plans_of_other_options_are_passed_over(corpus, spoilt, capsys):
    """Their labels are not today's, so their figures would mean nothing."""
    for n_labels in (4, 16):
        more = dict(plans="none", n_labels=n_labels, resume=True)
        assert end_of(train.main, tiny(corpus, spoilt, **more), capsys) == ""
        results = json.loads((spoilt / "results.json").read_text())
        assert list(results["plans"]) == ["none"]
        line = end_of(evaluation.main, [f"--out_dir={spoilt}", "--prompt=a", "--plan=soft"], capsys)
        assert "joint_soft.pt was made with n_labels=8, labels.pt=" in line


# --- odd texts ------------------------------------------------------------------------------------

needs_timer = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer")
TOKENIZER = our_tokenizer()
ODD = ["\0", "\x1b[31m", "\x0b\x0c\x1c\x1d\x85", "\u2028", "\u2029", "\r\n", "\r", "\n", " ", "\t",
       "\u00a0", "\ufeff", "\u202e\u05d0", "e\u0301\u0323", "\u200d", "\U0001f469\u200d\U0001f467",
       "\U0001f1e7\U0001f1ea", "\ufffe", "\U0010ffff", "\u1100\u1161", "A full stop. ", "No! ",
       EOT, f"\n{EOT}\n", "word ", "2.5 ", "{", '"text"']
ODD_LINES = ['{"text": 1}', '{"text": null}', '{"text": ["a"]}', '{"text": {"text": "a"}}', "null",
             '"text"', '{"text": "a"', "[" * 5000, '{"a": ' * 5000, '{"text": "a"} {"text": "b"}',
             '{"text": ' + "9" * 5000 + "}", "\ufeff{}", "\0", "NaN", "{'text': 'a'}"]


def draw_odd(seed: int, size: int) -> tuple[str, bytes]:
    """The suffix and the content of a text file of about `size` bytes, or much less."""
    rng = random.Random(seed)
    character = lambda: rng.choice(ODD + [chr(rng.randint(*rng.choice(PLANES)))])
    text = rng.choice([
        lambda: made_up_text(40, seed), lambda: made_up_text(40, seed).replace("\n", " "),
        lambda: character() * (size // 4), lambda: character(), lambda: "\n" * (size // 4),
        lambda: "".join(character() for _ in range(size // 20)),
        lambda: made_up_text(20, seed) + character() * (size // 8) + made_up_text(20, seed),
        lambda: "\n".join(draw_text(seed + i) for i in range(4))])()
    if rng.random() < 0.3:                           # in JSON, with lines that are none
        pieces = [text[i:i + 500] for i in range(0, min(len(text), 10_000), 500)] + [""]
        lines = [json.dumps({"text": piece}, ensure_ascii=rng.random() < 0.5) for piece in pieces]
        lines += [r'{"text": "\ud83d \udc00 x"}', "", " "]
        if rng.random() < 0.5:
            lines.insert(rng.randrange(len(lines)), rng.choice(ODD_LINES))
        return ".jsonl", "\n".join(lines).encode()
    return ".txt", rng.choice([
        lambda: text.encode(), lambda: text.encode(), lambda: text.encode(),
        lambda: text.encode("utf-8-sig"), lambda: text.encode("utf-16"),
        lambda: text.encode("utf-16-le"), lambda: text.encode("latin-1", "replace"),
        lambda: rng.randbytes(size // 20), lambda: text.encode()[:-1], lambda: b""])()


@contextlib.contextmanager
def within(seconds: int):
    """Fails where its content hangs: takes more time of the processor, however busy that is."""
    def late(*_):
        raise AssertionError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def holds_text(path: Path, seed: int) -> bool:
    """Whether a file can be read; if so, checks that nothing of it is lost or looks ahead."""
    content = path.read_bytes()
    try:
        texts = list(data.read_documents(path))
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return False
    if path.suffix == ".txt" and EOT.encode() not in content:
        read = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        assert "".join(texts) == read
    for text in texts:
        assert "".join(data.segment(text)) == text
        ends = data.boundaries(text.encode())
        for i in random.Random(seed).sample(range(len(ends)), min(4, len(ends))):
            assert data.boundaries(text.encode(), ends[i]) == ends[i + 1:]
        assert TOKENIZER.decode_bytes(TOKENIZER.encode_ordinary(text)) == text.encode()
    corpus = Corpus.from_texts(texts, TOKENIZER)
    kept = [text for text in texts if text.strip()]
    assert TOKENIZER.decode_bytes(corpus.tokens.tolist()) == (
        "".join([EOT, *(text + EOT for text in kept)]).encode())
    ends = data.sentence_ends(corpus.tokens, TOKENIZER)
    for n in random.Random(seed).sample(range(len(ends) + 1), min(4, len(ends))):
        assert np.array_equal(data.sentence_ends(corpus.tokens[:n], TOKENIZER), ends[:n])
    return True


@needs_timer
def test_any_text_is_read_cut_and_tokenized_without_loss_or_refused_in_one_line(tmp_path):
    found = Counter()
    for seed in range(2000 if THOROUGH else 60):
        suffix, content = draw_odd(seed, 20_000)
        path = tmp_path / f"a{suffix}"
        path.write_bytes(content)
        with within(20):
            found[suffix, holds_text(path, seed)] += 1
    assert len(found) == 4 and min(found.values()) >= 3          # each kind is read, and refused


@needs_timer
@pytest.mark.parametrize("character", ["x", "e\u0301", "\U0001f600", "!", "\0", "7", " x", "\n"])
def test_a_word_without_end_takes_time_in_proportion(character, tmp_path):
    size = 10_000_000 if THOROUGH else 200_000
    (tmp_path / "a.txt").write_text(character * (size // len(character.encode())), newline="")
    with within(120 if THOROUGH else 10):
        assert holds_text(tmp_path / "a.txt", 0)


def test_a_text_that_the_tokenizer_gives_up_on_is_one_line():
    """GPT-2's pattern looks ahead for the end of a run of blanks, and keeps track of each."""
    ranks = {bytes([b]): b for b in range(256)}
    tokenizer = tiktoken.Encoding("gpt2", pat_str=r"\S+|\s+(?!\S)|\s+", mergeable_ranks=ranks,
                                  special_tokens={EOT: 256})
    assert data.encode(tokenizer, "a  b").tolist() == [*b"a  b"]
    with pytest.raises(ValueError, match=r"\Atokenizer=gpt2 fails on a text of 1,000,001 .+\Z"):
        Corpus.from_texts([" \n" * 500_000 + "x"], tokenizer)


def odd_run(path: Path, out: Path, capsys) -> bool:
    """Preparation, a step of each stage, the table, scores and the report of a text: whether it
    can be trained on. What can't be done ends in one line."""
    more = dict(lm_steps=1, planner_steps=1, joint_steps=1, block_size=4, batch_size=2,
                vocab_size=270, n_labels=2, planner_batch=2, plans="soft")
    if line := end_of(train.main, tiny(path, out, **more), capsys):
        assert str(path) in line
        return False
    assert end_of(evaluation.main, [f"--out_dir={out}", f"--score={path}"], capsys) == ""
    report = [f"--out_dir={out}", f"--text={path}", f"--report={out / 'report.html'}"]
    assert end_of(evaluation.main, report, capsys) == ""
    assert math.isfinite(json.loads((out / "eval.json").read_text())["plans"]["soft"]["nll"])
    return True


@needs_timer
def test_any_text_is_trained_on_scored_and_reported_or_refused_in_one_line(
        trained, tmp_path, capsys):
    """By a run of its own, and by one that learned from ordinary text."""
    found = Counter()
    for seed in range(2000 if THOROUGH else 8):
        suffix, content = draw_odd(seed, 20_000)
        path = tmp_path / str(seed) / f"a{suffix}"
        path.parent.mkdir()
        path.write_bytes(content)
        prompt = content[:80].decode("utf-8", "surrogateescape")     # as a command line has it
        with within(60):
            found["trained on", odd_run(path, path.parent / "out", capsys)] += 1
            for more in (f"--score={path}", f"--text={path}"):
                line = end_of(evaluation.main, [f"--out_dir={trained}", more], capsys)
                assert not line or str(path) in line
                found["scored", not line] += 1
            more = [f"--out_dir={trained}", f"--prompt={prompt}", "--max_tokens=2"]
            assert end_of(evaluation.main, more, capsys) == ""
        shutil.rmtree(path.parent)
    assert len(found) == 4


# --- odd numbers ----------------------------------------------------------------------------------

@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_overflows_is_skipped_said_and_survived(where, corpus, tmp_path, monkeypatch):
    """The loss alone may be infinite, or the norm of gradients that are each finite."""
    forward, calls = train.PlannedGPT.forward, []

    def overflows(model, *arguments, **named):
        loss, logits = forward(model, *arguments, **named)
        calls.append(1)
        if len(calls) == 3:
            loss = loss + math.inf if where == "loss" else loss * 1e38
        return loss, logits

    monkeypatch.setattr(train.PlannedGPT, "forward", overflows)
    weights = []
    monkeypatch.setattr(train, "learning_rate", lambda *_: weights.append(
        {name: x.clone() for name, x in model_of.gpt.state_dict().items()}) or 1.0)
    fit = train.fit

    class Enough(Exception):
        pass

    def only_lm(job, stage, saved):
        nonlocal model_of
        model_of = stage.model
        fit(job, stage, saved)
        raise Enough

    model_of = None
    monkeypatch.setattr(train, "fit", only_lm)
    with pytest.raises(Enough):
        train.run(train.parse_config(tiny(corpus, tmp_path / "out")))
    same = [all(torch.equal(a[name], b[name]) for name in a) for a, b in zip(weights, weights[1:])]
    assert same == [False, False, True, False, False]
    assert evaluation.load_checkpoint(tmp_path / "out" / "lm.pt")["skipped"] == 1
    last = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-2]
    assert json.loads(last)["skipped"] == 1


def test_a_run_that_diverged_has_a_table(spoilt, capsys):
    """Of more nats a token than exp() can take."""
    saved = evaluation.load_checkpoint(spoilt / "joint_soft.pt")
    saved["model"]["gpt.ln_f.bias"] += 1e5
    train.save_checkpoint(spoilt / "joint_soft.pt", saved)
    assert end_of(evaluation.main, [f"--out_dir={spoilt}"], capsys) == ""
    plans = json.loads((spoilt / "eval.json").read_text())["plans"]
    assert plans["soft"]["nll"] > 800 and plans["soft"]["ppl"] == math.inf > plans["none"]["ppl"]


@pytest.mark.parametrize("collapsed", [True, False])
def test_a_planner_that_collapsed_onto_one_label_is_named(collapsed, spoilt, capsys):
    saved = evaluation.load_checkpoint(spoilt / "joint_soft.pt")
    head = saved["model"]["planner.head.weight"]
    head.normal_(generator=torch.Generator().manual_seed(0))
    if collapsed:
        head.zero_()
    train.save_checkpoint(spoilt / "joint_soft.pt", saved)
    evaluation.main([f"--out_dir={spoilt}"])
    printed = capsys.readouterr().out
    assert ("soft: its planner has collapsed onto one label" in printed) == collapsed


if __name__ == "__main__":
    serve()
