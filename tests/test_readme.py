"""The README's worked example is computed again; its quotation, commands and links are right."""
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import eval as evaluation
import train
from model import mix_labels

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
TIMELINE, MIXTURES = README.split("## A worked example")[1].split("\n## ")[0].split("In numbers,")
TEXTS = ["Horticulturists celebrated. Meteorologists complained. Strawberries drowned.",
         "Mathematicians multiplied. Rabbits multiplied."]
# The length of each of the two windows.
T = 7
NUMBER = re.compile(r"-?\d+\.\d+")


def table(text):
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in re.findall(r"^\|.*", text, re.M)[2:]]
    return [[cell.strip().replace("\\|", "|") for cell in row] for row in rows]


def test_the_timeline_is_what_the_code_makes_of_its_tokens():
    # Each word becomes one token.
    tokenizer = data.bpe_tokenizer(data.train_bpe(TEXTS * 2, 4096))
    corpus = data.Corpus.from_texts(TEXTS, tokenizer)
    corpus.vectors = np.eye(corpus.n_sentences)
    # A label tells its sentence.
    corpus.labels = np.arange(corpus.n_sentences)
    batch = data.window_batch(corpus, np.array([0, T]), T, 48)
    S = batch.labels.shape[1]
    rows = table(TIMELINE)
    assert len(rows) == 5
    for cells in rows:
        n = int(cells[0])
        window, t = divmod(n, T)
        # Counted from the end, because vectors have more slots than labels.
        slot = int(batch.sentence_id[window, t]) - S
        planned = int(batch.labels[window, slot])
        own = int(corpus.sentence_of(n))
        token = tokenizer.decode([int(batch.tokens[window, t])]).replace(" ", "␣")
        target = tokenizer.decode([int(batch.targets[window, t])]).replace(" ", "␣")
        shown = str(planned) if planned == own else f"**{planned}**"
        # Sentence i has the i-th unit vector.
        seen = batch.vectors[window, batch.opening[window, slot]:slot].argmax(1).tolist()
        read = ", ".join(f"v{i}" for i in seen) or "nothing yet"
        assert cells[1:] == [str(window), f"`{token}`", f"`{target}`", shown, read]


def test_three_labels_mix_and_learn_as_shown():
    shown = torch.tensor([float(x) for x in NUMBER.findall(MIXTURES.split("|")[0])]).double()
    logits, probabilities, label_emb, loss_gradient = shown.split([3, 3, 6, 2])
    assert logits.softmax(0).tolist() == pytest.approx(probabilities.tolist(), abs=0.005)
    leaves = [logits.view(1, 1, 3).requires_grad_(), label_emb.view(3, 2).requires_grad_()]
    found = {}
    for name, *cells in table(MIXTURES):
        plan = mix_labels(*leaves, name.strip("`"))[0, 0]
        gradients = torch.autograd.grad(plan @ loss_gradient, leaves, materialize_grads=True)
        found[name.strip("`")] = gradients
        for computed, cell in zip([plan, *gradients], cells, strict=True):
            figures = [float(x) for x in NUMBER.findall(cell)]
            assert computed.flatten().tolist() == pytest.approx(figures, abs=0.005), (name, cell)
    torch.testing.assert_close(found["straight_through"], (found["soft"][0], found["hard"][1]))


def test_the_programs_understand_the_commands(monkeypatch):
    # Their options are read before a run is opened.
    monkeypatch.setattr(evaluation, "load_run", None)
    commands = re.findall(r"(?:python|torchrun \S+) (\S+\.py[^`\n]*)", README)
    assert len(commands) > 5
    for command in commands:
        script, *options = shlex.split(command, comments=True)
        assert (ROOT / script).exists(), command
        if script == "train.py":
            train.parse_config(options)
        if script == "eval.py":
            with pytest.raises(TypeError, match="not callable"):
                evaluation.main(options)


def test_the_quotation_and_the_links_are_right():
    quote = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1].splitlines()
    # In order, but a plan may be added in between.
    source = iter((ROOT / "model.py").read_text("utf-8").splitlines())
    for line in quote:
        if line != "...":
            assert (line and f"    {line}") in source, line
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []
