import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch

import train
from data import EOT

# The tensors in these tests are too small for more threads to pay.
torch.set_num_threads(1)

@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """The CPU and, on a machine that has one, the GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device(request.param)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A file of 300 documents, each of drawn words and some markup."""
    draw = random.Random(0)
    words = ("alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu omicron rho "
             "sigma tau upsilon phi. chi. psi. omega.")
    markup = "</script><script>alert(1)</script> <!-- <b class='x'>\"bold\"</b> & \u2028 \x01 日本."
    texts = [" ".join([*draw.choices(words.split(), k=20), markup]) for _ in range(300)]
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text(f"\n{EOT}\n".join(texts), "utf-8")
    return path


@pytest.fixture(scope="session")
def options(corpus):
    """The command line of a run that takes a second or two: a function of out_dir and options."""
    small = ("--preset=tiny --vocab_size=300 --n_embd=16 --block_size=16 --n_labels=4 "
             "--planner_reach=4 --lm_steps=6 --planner_steps=6 --joint_steps=6 --plans=all "
             "--eval_every=2 --eval_tokens=256 --device=cpu --dtype=float32")
    common = [*small.split(), f"--data={corpus}", f"--cache_dir={corpus.parent}/cache"]
    return lambda out, *more: [*common, f"--out_dir={out}", *more]


@pytest.fixture(scope="session")
def run(options):
    """Train with these options, and return out_dir."""
    def train_and_return(out, *more):
        train.main(options(out, *more))
        return out
    return train_and_return


@pytest.fixture(scope="session")
def trained(run, tmp_path_factory):
    """A finished run of all plans."""
    return run(tmp_path_factory.mktemp("trained") / "out")
