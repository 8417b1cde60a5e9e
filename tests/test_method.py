"""Properties of the method, each with a control that shows that its test can fail.

A new plan in model.py is covered by one entry in MIXTURES. Models are drawn at random: on a fresh
one the plan maps are zero, and most properties would hold whatever the code does.
"""
import re
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import data
import train
from eval import choose_autocast, follow, next_logits, score, summary
from labels import Labeler
from model import END_TO_END, GPT, PLANS, mix_labels, rotary_table
from planner import build_model

N, T, C, K, REACH = 70, 16, 16, 5, 3
# Windows that overlap, most of them not at a multiple of the stride.
STARTS = np.arange(0, N, 7)
CPU = torch.device("cpu")

# For each plan, the weights (K,) that it gives the labels for one sentence, from the planner's
# probabilities p (K,), the sentence's label and the label before it. A label of -1 is none.
ONE_HOT = np.eye(K + 1, K)
MIXTURES = {
    "fixed": lambda p, label, before: ONE_HOT[0],
    "previous": lambda p, label, before: ONE_HOT[before],
    "hard": lambda p, label, before: ONE_HOT[p.argmax()],
    "straight_through": lambda p, label, before: ONE_HOT[p.argmax()],
    "gumbel": lambda p, label, before: p,
    "soft_frozen": lambda p, label, before: p,
    "soft": lambda p, label, before: p,
    "oracle": lambda p, label, before: ONE_HOT[label],
}
every_plan = pytest.mark.parametrize("plan", PLANS)
both_views = pytest.mark.parametrize("view", ["document", "equal"])
# The oracle is told the future.
causal_plans = pytest.mark.parametrize("plan", [plan for plan in PLANS if plan != "oracle"])


# --- texts and models, drawn at random ------------------------------------------------------------
def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The tokens are the 256 bytes and some words, each with a space or the end of a sentence.
WORDS = b"We They Birds the blue tree stone river small walks sings".split()
PIECES = [word + end for word in WORDS for end in (b" ", b". ", b'?" ', b".\n    ")]
PIECES = [bytes([b]) for b in range(256)] + PIECES
TOKENIZER = data.bpe_tokenizer({piece: rank for rank, piece in enumerate(PIECES)})
V, EOT = TOKENIZER.n_vocab, TOKENIZER.eot_token
LABELER = Labeler(V, C, K)
LABELER.table = draw(V, C, seed=1).float()
LABELER.centroids = draw(K, C, seed=38).float() / 10

# Words and some stray bytes, in three documents.
TOKENS = np.random.default_rng(0).integers(250, EOT, size=N)
TOKENS[[0, 9, 50]] = EOT


def read(tokens):
    """tokens -> labelled corpus: all that a model is told about a text."""
    return LABELER.label(data.Corpus.from_tokens(tokens, TOKENIZER))


CORPUS = read(TOKENS)


def draw_model(plan, view="document", maps=True, **options):
    """Weights from N(0, 0.2^2), plan maps only if `maps`; the same weights for each plan."""
    planner_layer = 1 if view == "equal" else 2
    sizes = dict(block_size=T, n_layer=2, n_head=2, n_embd=C, n_labels=K, planner_reach=REACH,
                 planner_layer=planner_layer, planner_view=view)
    model = build_model(train.Config(**sizes | options), plan, V).double().eval()
    for name, p in model.named_parameters():
        if maps or "plan_map" not in name:
            # Norms start at 1 and everything else near 0.
            p.data = p.data.round() + 0.2 * draw(*p.shape, seed=zlib.crc32(name.encode()))
    for rotary in model.buffers():
        rotary.copy_(rotary_table(*rotary.shape[1:], torch.float64))
    return model


def token_nll(model):
    """The loss of each target in the windows from STARTS, computed on the model's device."""
    batch = model.batch(CORPUS, STARTS).to(model.gpt.wte.weight.device)
    return model(batch)[0]


# --- no logit sees the future ---------------------------------------------------------------------
@torch.no_grad()
def influence(plan, view="document"):
    """How far the tokens after t move a logit up to t, at most, over all t."""
    model = draw_model(plan, view)
    positions = STARTS[:, None] + np.arange(T)                              # (windows, T)

    def logits(tokens):
        batch = model.batch(read(tokens), STARTS)
        plan_vectors, _ = model.plan_vectors(batch)
        return model.gpt(batch.tokens, None, plan_vectors, batch.sentence_id)

    base = logits(TOKENS)
    gaps = []
    for t in range(N - 2):
        # The next token made or unmade <|endoftext|>; all later tokens reversed; none at all.
        other = 0 if TOKENS[t + 1] == EOT else EOT
        for future in ([other, *TOKENS[t + 2:]], TOKENS[:t:-1], []):
            changed = logits(np.array([*TOKENS[:t + 1], *future]))
            gaps.append(float((changed - base)[positions <= t].abs().max()))
    return max(gaps)


@both_views
@causal_plans
def test_no_token_changes_a_logit_before_it(plan, view):
    assert influence(plan, view) < 1e-10


def look_ahead(monkeypatch):
    """A sentence ends where a capital follows a stop."""
    monkeypatch.setattr(data, "STOP", re.compile(rb"[.!?] (?=[A-Z])"))


def plan_early(monkeypatch):
    """Position t gets the plan of the sentence of token t + 2."""
    right = data.Corpus.sentence_of
    monkeypatch.setattr(data.Corpus, "sentence_of", lambda corpus, t: right(corpus, t + 1))


def end_opens_document(monkeypatch):
    """<|endoftext|> belongs to the first sentence of the next document."""
    right = data.Corpus.from_tokens

    def leaky(tokens, tokenizer):
        corpus = right(tokens, tokenizer)
        corpus.sentences[corpus.documents[1:]] -= 1
        return corpus
    monkeypatch.setattr(data.Corpus, "from_tokens", leaky)


@pytest.mark.parametrize("leak", [look_ahead, plan_early, end_opens_document])
def test_that_check_finds(leak, monkeypatch):
    leak(monkeypatch)
    assert influence("soft") > 1e-3


@torch.no_grad()
def excess_probability(plan, view="document"):
    """How far from 1 the probabilities of all V next tokens sum, at most, after some positions t.

    Each of the V tokens is scored in a text of its own, which it ends.
    """
    model = draw_model(plan, view)
    gaps = []
    for t in range(0, N - 1, 9):
        texts = np.tile(TOKENS[:t + 2], (V, 1))                             # (V, t+2)
        texts[:, -1] = np.arange(V)
        start = max(0, t + 1 - T)
        nll, _ = model(model.batch(read(texts.flatten()), start + np.arange(V) * (t + 2)))
        gaps.append(abs(float((-nll[:, t - start]).exp().sum()) - 1))
    return max(gaps)


@both_views
@causal_plans
def test_the_probabilities_of_all_next_tokens_sum_to_one(plan, view):
    assert excess_probability(plan, view) < 1e-10


def test_both_checks_find_the_oracle():
    assert influence("oracle") > 1e-3
    assert excess_probability("oracle") > 1e-3


# --- what the next-token loss trains --------------------------------------------------------------
@every_plan
def test_the_loss_reaches_the_planner_end_to_end_and_label_embeddings_under_any_plan(plan, device):
    for maps in (True, False):
        model = draw_model(plan, maps=maps).train().to(device)
        if model.planner is not None:
            # Would the loss reach a frozen planner?
            model.planner.requires_grad_(True)
        token_nll(model).mean().backward()
        for name, p in model.named_parameters():
            is_reached = True
            # Plan maps of zero stop the gradient.
            if name == "gpt.label_emb":
                is_reached = maps
            if name.startswith("planner"):
                is_reached = maps and plan in END_TO_END
            has_gradient = p.grad is not None and bool(p.grad.any())
            assert has_gradient == is_reached, name


@every_plan
def test_the_gradient_is_exact_but_for_straight_through(plan, device):
    """The derivative of the loss in a drawn direction, against finite differences."""
    model = draw_model(plan).train().to(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    weights = parameters_to_vector(parameters).detach()
    direction = draw(len(weights)).to(device)

    def loss(step):
        vector_to_parameters(weights + step * direction, parameters)
        # The same noise each time.
        torch.manual_seed(0)
        return token_nll(model).mean()

    gradients = torch.autograd.grad(loss(0), parameters)
    exact = (torch.cat([g.flatten() for g in gradients]) @ direction).item()
    finite = (loss(1e-6) - loss(-1e-6)).item() / 2e-6
    assert (finite == pytest.approx(exact, rel=1e-5)) == (plan != "straight_through")


@every_plan
def test_fresh_plan_maps_change_nothing_and_drawn_ones_do(plan):
    none = token_nll(draw_model("none"))
    fresh = token_nll(draw_model(plan, maps=False))
    drawn = token_nll(draw_model(plan))
    torch.testing.assert_close(fresh, none)
    assert plan == "none" or (drawn - none).abs().max() > 1e-3


def test_cold_gumbel_draws_labels_with_the_planners_probabilities():
    logits = draw(K)
    torch.manual_seed(0)
    drawn = mix_labels(logits.expand(9000, K), torch.eye(K).double(), "gumbel", tau=1e-3,
                       training=True)
    # Nearly one label each.
    assert drawn.amax(1).mean() > 0.99
    torch.testing.assert_close(drawn.mean(0), logits.softmax(0), rtol=0, atol=0.015)


def test_the_plan_is_added_before_the_output_projection():
    gpt = draw_model("soft").gpt
    attn = gpt.blocks[0].attn
    x = draw(1, T, C)
    plan_vectors = draw(1, T, C, seed=1)
    without = attn(x, gpt.rotary)
    planned = attn(x, gpt.rotary, plan_vectors, torch.arange(T)[None])
    mapped = attn.plan_map(plan_vectors)
    torch.testing.assert_close(planned, without + attn.proj(mapped))


# --- the GPT and the planner ----------------------------------------------------------------------
def test_the_loss_sums_the_gradients_of_its_chunks_in_float32():
    gpt = GPT(4096, T, 1, 2, C)
    x = draw(16, 256, C).float()
    targets = torch.arange(4096).view(16, 256) % 30

    def gradient(autocast):
        with autocast:
            loss = gpt.loss(x, targets).mean()
        return torch.autograd.grad(loss, gpt.head.weight)[0]

    exact = gradient(choose_autocast("float32", CPU))
    found = gradient(choose_autocast("bfloat16", CPU))
    sums_in_bfloat16 = gradient(torch.autocast("cpu", torch.bfloat16))
    assert (found - exact).norm() < 0.004 * exact.norm()
    assert (sums_in_bfloat16 - exact).norm() > 0.005 * exact.norm()


@torch.no_grad()
def test_the_planner_notices_the_order_of_sentences_by_rotation_alone(monkeypatch):
    planner = draw_model("soft", planner_layer=1).planner
    vectors = draw(1, 4, C)
    opening = torch.zeros(1, 4)

    def moved_by_order():
        # The last slot itself reads the third vector; it attends to the first two.
        logits = planner(vectors, opening)
        swapped = planner(vectors[:, [1, 0, 2, 3]], opening)
        return (swapped - logits)[:, -1].abs().max()
    assert moved_by_order() > 1e-3
    monkeypatch.setattr("model.rotate", lambda x, rotary: x)
    assert moved_by_order() < 1e-12


# --- scoring --------------------------------------------------------------------------------------
def naive_plan(model, touched, j):
    """The plan (C,) of sentence j in a window that touches sentences from `touched` on, and the
    label probabilities (K,).
    """
    opening = max(CORPUS.documents[CORPUS.documents <= j].max(), touched - REACH)
    if model.view_tokens is not None:
        # The first sentence that lies wholly within that many tokens before sentence j.
        edge = CORPUS.sentences[j] - model.view_tokens
        opening = max(opening, np.searchsorted(CORPUS.sentences, edge))
    p = torch.zeros(K)
    if model.planner is not None:
        vectors = torch.from_numpy(np.append(CORPUS.vectors[opening:j], np.zeros((1, C)), axis=0))
        opening_slot = torch.zeros(1, len(vectors), dtype=torch.long)
        p = model.planner(vectors[None], opening_slot)[0, -1].softmax(0)
    # The unfinished sentence has no label.
    labels = np.append(CORPUS.labels, -1)
    before = labels[j - 1] if j > opening else -1
    weights = MIXTURES[model.plan](p.numpy(), labels[j], before)
    return torch.from_numpy(weights) @ model.gpt.label_emb, p


@torch.no_grad()
def naive_score(model):
    """What `score` returns, one token at a time."""
    block_size = model.gpt.block_size
    nll = []
    label_log_probs = np.full((CORPUS.n_sentences + 1, K), np.nan)
    for t in range(N - 1):
        # The first window that has t, of those that advance by half their length.
        start = max(0, data.round_up(t + 1 - block_size, block_size // 2))
        targets = np.arange(start, t + 1) + 1
        sentences = np.searchsorted(CORPUS.sentences, targets, side="right") - 1
        touched = sentences[0]
        plan_vectors = None
        if model.plan != "none":
            plans = []
            for j in range(touched, sentences[-1] + 1):
                plan, p = naive_plan(model, touched, j)
                plans.append(plan)
            plan_vectors = torch.stack(plans)[None]                         # (1, S, C)
            if CORPUS.sentences[j] == t + 1:
                label_log_probs[j] = p.log()
        tokens = torch.from_numpy(TOKENS[None, start:t + 1])
        logits = model.gpt(tokens, None, plan_vectors, torch.from_numpy(sentences - touched))
        nll.append(-float(logits[0, -1].log_softmax(0)[TOKENS[t + 1]]))
    return np.array(nll), label_log_probs


@pytest.mark.parametrize("view, block_size", [("document", T), ("equal", T), ("document", 11)])
@every_plan
def test_score_is_what_the_naive_way_finds_and_training_can_go_on(plan, view, block_size, device):
    model = draw_model(plan, view, block_size=block_size)
    naive_nll, naive_log_probs = naive_score(model)
    nll, label_log_probs = score(model.train().to(device), CORPUS, batch_size=3)
    assert model.training
    assert nll == pytest.approx(naive_nll)
    if model.planner is not None:
        assert label_log_probs == pytest.approx(naive_log_probs, abs=1e-5, nan_ok=True)


def test_a_planner_that_sees_one_sentence_more_scores_differently(monkeypatch):
    model = draw_model("soft", "equal")
    naive_nll, _ = naive_score(model)
    opening_of = data.Corpus.opening_of
    monkeypatch.setattr(
        "data.Corpus.opening_of", lambda *values: np.maximum(opening_of(*values) - 1, 0))
    nll, _ = score(model, CORPUS)
    assert abs(nll - naive_nll).max() > 1e-3


@causal_plans
def test_scores_depend_neither_on_the_batch_size_nor_on_what_follows(plan):
    model = draw_model(plan)
    nll, _ = score(model, CORPUS, batch_size=1)
    for n in range(2, N + 1, 3):
        prefix, _ = score(model, read(TOKENS[:n]))
        assert prefix == pytest.approx(nll[:n - 1])


def test_the_planners_figures_are_those_of_its_log_probabilities():
    # No window scored the first token of sentence 0, and sentence 3 is not finished.
    log_probs = np.log([[np.nan] * 3, [0.2, 0.5, 0.3], [0.1, 0.7, 0.2], [0.6, 0.3, 0.1]])
    corpus = SimpleNamespace(n_sentences=3, labels=np.array([0, 1, 2]))
    figures = summary(np.array([1.0, 4.0]), log_probs, corpus)
    assert figures["planner_ce"] == pytest.approx(-(np.log(0.5) + np.log(0.2)) / 2)
    assert figures["planner_acc"] == 0.5
    assert figures["ppl"] == pytest.approx(np.exp(2.5))


# --- generation -----------------------------------------------------------------------------------
# What generation needs of a run.
RUN = SimpleNamespace(labeler=LABELER, tokenizer=TOKENIZER, device=CPU,
                      autocast=choose_autocast("float32", CPU), bigram=draw(1, K))


def generation_nll(model, t, *prompt_and_label):
    """What token t + 1 costs when generation has come to it."""
    logits = next_logits(RUN, model, TOKENS[:t + 1].tolist(), *prompt_and_label)
    return -float(logits.log_softmax(0)[TOKENS[t + 1]])


@both_views
@causal_plans
def test_generation_has_the_logits_of_score(plan, view):
    model = draw_model(plan, view)
    nll, _ = score(model, CORPUS)
    for t in range(N - 1):
        assert generation_nll(model, t) == pytest.approx(nll[t], abs=1e-5)


def test_a_label_given_by_hand_is_the_plan_of_every_sentence_written():
    """Under the oracle: a text is written again if each of its labels is asked for in turn."""
    model = draw_model("oracle")
    nll, _ = score(model, CORPUS)
    for t in range(CORPUS.sentences[-1] - 1):
        # The sentence of token t + 1 is the only one written.
        j = CORPUS.sentence_of(t + 1)
        for label in range(K):
            found = generation_nll(model, t, CORPUS.sentences[j], label)
            is_close = found == pytest.approx(nll[t], abs=1e-5)
            assert is_close == (label == CORPUS.labels[j]), (t, label)


def test_follow_counts_the_finished_sentences_that_were_written(monkeypatch):
    # A prompt, two finished sentences, one unfinished.
    labels = [0, 1, 4, None]
    sentences = [{"written": label != 0, "label": label} for label in labels]
    monkeypatch.setattr("eval.generate", lambda *_, **named: sentences)
    frequency = RUN.bigram[0, [1, 4]].exp().mean().item()
    assert follow(RUN, "soft", ["a", "b"], [1, 4]) == (1 / 2, pytest.approx(frequency))
