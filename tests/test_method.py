"""Properties of the method, one a test, each with a control that shows that the test can fail.

A new plan in model.py is covered by one entry in MIXTURES. Models are drawn at random: on a fresh
one the plan maps are zero, and most properties would hold whatever the code does.
"""
import copy
import functools
import re
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import train
from eval import choose_autocast, follow, next_logits, score, summary
from labels import Labeler
from model import END_TO_END, GPT, PLANS, mix_labels, rotary_table
from planner import build_model

T, C, K, REACH = 16, 16, 5, 3
VIEWS = ("document", "window")
# Windows that overlap, most of them not at a multiple of the stride.
STARTS = np.arange(0, 95, 5)
WORDS = "We They Birds Stones the a of red blue tree stone river bird small walks sings".split()
PIECES = [word + end for word in WORDS for end in (" ", " ", ". ", "! ", '?" ', ".\n    ")]

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
# The oracle is told the future.
CAUSAL = [plan for plan in PLANS if plan != "oracle"]
causal_plans_in_both_views = pytest.mark.parametrize(
    "plan, view", [(plan, view) for plan in CAUSAL for view in VIEWS])


# --- texts and models, drawn at random ------------------------------------------------------------
def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TEXT = "".join(np.random.default_rng(0).choice(PIECES, 3000))
TOKENIZER = data.bpe_tokenizer(data.train_bpe([TEXT], 400))
V, EOT = TOKENIZER.n_vocab, TOKENIZER.eot_token
LABELER = Labeler(V, C, K)
LABELER.load_state_dict({
    "table": draw(V, C, seed=1), "mean": draw(C, seed=2) / 10, "centroids": draw(K, C, seed=4)})


@functools.cache
def draw_tokens(seed, n=100):
    """(n,) tokens with many sentence and document ends, boundaries inside tokens, stray bytes."""
    text = [TOKENIZER.decode_single_token_bytes(t) for t in range(V - 1)]
    kinds = (rb"[A-Za-z]{3,} ", rb"\W*[.!?]\W*", rb"\n +", rb".*")
    pools = [[t for t in range(V - 1) if re.fullmatch(kind, text[t], re.DOTALL)] for kind in kinds]
    pools.append([EOT])
    rng = np.random.default_rng(seed)
    drawn = rng.choice(5, n - 1, p=[0.58, 0.24, 0.05, 0.09, 0.04])
    return np.array([EOT] + [rng.choice(pools[kind]) for kind in drawn])


def draw_model(plan, view="document", maps=True, **options):
    """Weights from N(0, 0.2^2), plan maps only if `maps`; the same weights for each plan."""
    sizes = dict(block_size=T, n_layer=2, n_head=2, n_embd=C, n_labels=K, planner_layer=2,
                 planner_reach=REACH, planner_view=view)
    model = build_model(train.Config(**sizes | options), plan, V).double().eval()
    for name, p in model.named_parameters():
        if maps or "plan_map" not in name:
            # Norms start at 1 and everything else near 0.
            p.data = p.data.round() + 0.2 * draw(*p.shape, seed=zlib.crc32(name.encode()))
    for part in (model.gpt, model.planner):
        if part is not None:
            _, length, D = part.rotary.shape
            part.rotary = rotary_table(length, D, torch.float64)
    return model


def read(tokens):
    """tokens -> labelled corpus: all that a model is told about a text."""
    return LABELER.label(data.Corpus.from_tokens(tokens, TOKENIZER))


def window_start(position, block_size=T):
    """Where the window starts in which `position` predicts its next token."""
    stride = max(1, block_size // 2)
    return stride * max(0, -(-(position + 1 - block_size) // stride))


# --- no logit sees the future ---------------------------------------------------------------------
def spots(tokens, n):
    """Some positions t, among them those where traps lie: a sentence or document ends near t."""
    documents = np.flatnonzero(tokens == EOT)
    sentences = np.setdiff1d(np.flatnonzero(data.sentence_ends(tokens, TOKENIZER)), documents)
    rng = np.random.default_rng(0)
    drawn = []
    for pool in (np.arange(98), sentences, sentences - 1, documents, documents - 1):
        drawn += rng.choice(pool[(pool > 0) & (pool < 98)], n).tolist()
    return sorted(set(drawn))


@torch.no_grad()
def influence(plan, view="document"):
    """How far tokens after t move the logits up to t (at most) and after t (at least)."""
    model = draw_model(plan, view)
    tokens = draw_tokens(0)
    positions = STARTS[:, None] + np.arange(T)                              # (windows, T)

    def logits(tokens):
        batch = model.batch(read(tokens), STARTS)
        plan_vectors, _ = model.plan_vectors(batch)
        return model.gpt(batch.tokens, None, plan_vectors, batch.sentence_id)

    base = logits(tokens)
    before = []
    after = []
    for t in spots(tokens, 3):
        # The next token made or unmade <|endoftext|>; all later tokens replaced; none at all.
        other = EOT if tokens[t + 1] != EOT else TOKENIZER.encode_single_token("the ")
        for future in ([other, *tokens[t + 2:]], draw_tokens(t + 1)[t + 1:], []):
            changed = logits(np.array([*tokens[:t + 1], *future]))
            gap = (changed - base).abs().amax(-1)                           # (windows, T)
            before.append(float(gap[positions <= t].max()))
            after.append(float(gap[positions > t].max()))
    return max(before), min(after)


@causal_plans_in_both_views
def test_no_token_changes_a_logit_before_it(plan, view):
    before, after = influence(plan, view)
    assert before < 1e-10 and after > 1e-3


def look_ahead(monkeypatch):
    """A sentence ends where a capital follows a stop."""
    stop = re.compile(rb"[.!?] (?=[A-Z])")
    monkeypatch.setattr(data, "boundaries", lambda text: [m.end() for m in stop.finditer(text)])


def plan_early(monkeypatch):
    """Position t gets the plan of the sentence of token t + 2."""
    aligned = data.window_batch

    def early(*arguments):
        batch = aligned(*arguments)
        batch.sentence_id = batch.sentence_id.roll(-1, 1)
        return batch
    monkeypatch.setattr(data, "window_batch", early)


def end_opens_document(monkeypatch):
    """<|endoftext|> belongs to the first sentence of the next document."""
    right = data.Corpus.from_tokens

    def leaky(tokens, tokenizer):
        corpus = right(tokens, tokenizer)
        ends = np.flatnonzero(tokens == EOT)
        is_after_end = np.isin(corpus.sentences, ends[1:] + 1)
        sentences = np.unique(corpus.sentences - is_after_end)
        return data.Corpus(tokens, sentences, np.searchsorted(sentences, ends))
    monkeypatch.setattr(data.Corpus, "from_tokens", leaky)


@pytest.mark.parametrize("leak", [look_ahead, plan_early, end_opens_document])
def test_that_check_finds(leak, monkeypatch):
    leak(monkeypatch)
    assert influence("soft")[0] > 1e-3


@functools.cache
def with_each_next_token(t, view):
    """(V windows) the first t + 1 tokens and each of the V possible next tokens, a text each."""
    texts = [np.append(draw_tokens(5)[:t + 1], token) for token in range(V)]
    start = np.array([window_start(t)])
    batches = [data.window_batch(read(text), start, T, REACH, view) for text in texts]
    columns = zip(*(vars(batch).values() for batch in batches))
    return data.Batch(*(torch.cat(column) for column in columns))


@torch.no_grad()
def total_probability(plan, t, view):
    """Summed over all V next tokens: text + token -> sentences -> vectors -> planner -> score."""
    nll, _ = draw_model(plan, view)(with_each_next_token(t, view))
    return float((-nll[:, t - window_start(t)]).exp().sum())


@causal_plans_in_both_views
def test_the_probabilities_of_all_next_tokens_sum_to_one(plan, view):
    for t in spots(draw_tokens(5), 1):
        assert total_probability(plan, t, view) == pytest.approx(1, abs=1e-10)


def test_both_checks_find_the_oracle():
    assert influence("oracle")[0] > 1e-3
    for t in spots(draw_tokens(5), 1):
        assert abs(total_probability("oracle", t, "document") - 1) > 1e-6


# --- what the next-token loss trains --------------------------------------------------------------
def read_batch(model):
    return model.batch(read(draw_tokens(0)), np.array([0, 5, 21, 38]))


def trained(plan):
    """The parts that a plan's joint stage trains."""
    parts = {"gpt"}
    if plan != "none":
        parts |= {"label_emb", "plan_map"}
    if plan in END_TO_END:
        parts.add("planner")
    return parts


def reached(model):
    """The parts that get a gradient, in every one of their tensors."""
    if model.planner is not None:
        # Would the loss reach a frozen planner?
        model.planner.requires_grad_(True)
    nll, _ = model(read_batch(model))
    nll.mean().backward()
    found = set()
    missed = set()
    for name, p in model.named_parameters():
        part = next(part for part in ("planner", "label_emb", "plan_map", "gpt") if part in name)
        has_gradient = p.grad is not None and p.grad.any()
        (found if has_gradient else missed).add(part)
    assert not found & missed
    return found


@pytest.mark.parametrize("plan", PLANS)
def test_the_loss_reaches_the_planner_end_to_end_and_label_embeddings_under_any_plan(plan):
    assert reached(draw_model(plan).train()) == trained(plan)
    # On fresh plan maps only these learn in the first step.
    assert reached(draw_model(plan, maps=False)) == trained(plan) - {"label_emb", "planner"}


@pytest.mark.parametrize("plan", PLANS)
def test_fresh_plan_maps_change_nothing_and_drawn_ones_do(plan):
    losses = []
    for model in (draw_model("none"), draw_model(plan, maps=False), draw_model(plan)):
        nll, _ = model(read_batch(model))
        losses.append(nll)
    none, fresh, drawn = losses
    assert torch.allclose(fresh, none, rtol=0, atol=1e-12)
    assert plan == "none" or (drawn - none).abs().max() > 1e-3


@pytest.mark.parametrize("plan", PLANS)
def test_the_gradient_is_exact_but_for_straight_through(plan):
    """The derivative of the loss along a drawn direction, by autograd and by finite differences."""
    model = draw_model(plan).train()
    batch = read_batch(model)
    starts = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    directions = {name: draw(*p.shape, seed=len(name)) for name, p in starts.items()}

    def loss(step):
        # The same noise each time.
        torch.manual_seed(0)
        moved = {name: p + step * directions[name] for name, p in starts.items()}
        return torch.func.functional_call(model, moved, (batch,))[0].mean()

    step = torch.zeros((), dtype=torch.float64, requires_grad=True)
    exact = float(torch.autograd.grad(loss(step), [step])[0])
    finite = float(loss(1e-6) - loss(-1e-6)) / 2e-6
    assert abs(exact) > 1e-3
    assert (finite == pytest.approx(exact, rel=1e-5)) == (plan != "straight_through")


def test_cold_gumbel_draws_labels_with_the_planners_probabilities():
    logits = draw(K)
    torch.manual_seed(0)
    drawn = mix_labels(logits.expand(9000, K), torch.eye(K).double(), "gumbel", tau=1e-3,
                       training=True)
    # Nearly one label each.
    assert drawn.max(1).values.mean() > 0.99
    torch.testing.assert_close(drawn.mean(0), logits.softmax(0), rtol=0, atol=0.015)


def test_the_plan_is_added_before_the_output_projection():
    gpt = draw_model("soft").gpt
    attn = gpt.blocks[0].attn
    x = draw(1, T, C)
    plan_vectors = draw(1, 1, C, seed=1)
    index = torch.zeros(1, T, dtype=torch.long)
    added = attn(x, gpt.rotary, plan_vectors, index) - attn(x, gpt.rotary)
    before = attn.proj(attn.plan_map(plan_vectors)).expand(1, T, C)
    torch.testing.assert_close(added, before, rtol=0, atol=1e-12)
    assert not torch.allclose(added, attn.plan_map(plan_vectors))


# --- the GPT --------------------------------------------------------------------------------------
def test_the_loss_is_over_the_tokens_that_there_are():
    """257 tokens, in a matrix of 320 rows; a target of -1 costs nothing."""
    gpt = GPT(257, 8, 1, 2, 8).double()
    tokens = torch.arange(16).view(2, 8)
    log_probs = gpt(tokens).log_softmax(-1)
    assert log_probs.shape == (2, 8, 257)
    expected = -log_probs.gather(2, tokens[..., None])[..., 0]
    torch.testing.assert_close(gpt(tokens, tokens), expected)
    found = gpt(tokens, tokens.masked_fill(tokens > 9, -1))
    torch.testing.assert_close(found, expected.masked_fill(tokens > 9, 0))


def test_the_loss_sums_the_gradients_of_its_chunks_in_float32():
    x = draw(16, 256, C)
    targets = torch.arange(4096).view(16, 256) % 30
    errors = []
    sums_in_bfloat16 = torch.autocast("cpu", torch.bfloat16)
    for autocast in (choose_autocast("bfloat16", torch.device("cpu")), sums_in_bfloat16):
        gpt = GPT(4096, T, 1, 2, C)
        double = copy.deepcopy(gpt).double()
        with autocast:
            loss = gpt.loss(x.float(), targets).mean()
        (loss + double.loss(x, targets).mean()).backward()
        found = gpt.wte.weight.grad
        exact = double.wte.weight.grad
        errors.append(float((found - exact).norm() / exact.norm()))
    assert errors[0] < 0.004 and errors[1] > 0.005


@torch.no_grad()
def test_attention_depends_on_distances_alone_and_so_on_order(monkeypatch):
    attn = draw_model("none").gpt.blocks[0].attn
    x = draw(1, T, C)
    rotary = rotary_table(700, C // 2, torch.float64)
    here = attn(x, rotary[:, :T])
    for n in (1, 7, 600):
        # The same positions, after n others that they don't see.
        unseen = torch.arange(n + T) < n
        mask = (unseen[:, None] == unseen).tril()
        longer = torch.cat([draw(1, n, C, seed=1), x], 1)
        later = attn(longer, rotary[:, :n + T], mask=mask)[:, n:]
        torch.testing.assert_close(later, here, rtol=0, atol=1e-10)

    def moved_by_order():
        swapped = x[:, [*reversed(range(T - 1)), T - 1]]
        gap = attn(x, rotary[:, :T]) - attn(swapped, rotary[:, :T])
        return float(gap[:, -1].abs().max())
    assert moved_by_order() > 1e-3
    monkeypatch.setattr("model.rotate", lambda x, rotary: x)
    assert moved_by_order() < 1e-12


# --- the planner, scoring, generation -------------------------------------------------------------
@torch.no_grad()
def test_empty_slots_before_the_view_change_no_logit_of_the_planner():
    planner = draw_model("soft").planner
    vectors = draw(1, 9, C)
    first = torch.arange(9)[None] % 6 == 0
    expected = planner(vectors, first)
    vectors = torch.cat([draw(1, 7, C, seed=1), vectors], 1)
    first = torch.cat([torch.ones(1, 7, dtype=torch.bool), first], 1)
    torch.testing.assert_close(planner(vectors, first)[:, 7:], expected, rtol=0, atol=1e-10)


def naive_plan(model, corpus, start, j):
    """Sentence j in the window from `start`: its plan (C,) and the planner's probabilities (K,)."""
    touched = np.searchsorted(corpus.sentences, start + 1, side="right") - 1
    opening = max(corpus.documents[corpus.documents <= j].max(), touched - REACH)
    if model.view == "window":
        # The first sentence that lies wholly within the window.
        opening = max(opening, np.searchsorted(corpus.sentences, start))
    p = torch.zeros(K, dtype=torch.float64)
    if model.planner is not None:
        vectors = torch.from_numpy(corpus.vectors[opening:j]).double()
        vectors = torch.cat([vectors, torch.zeros(1, C)])[None]
        first = torch.arange(vectors.shape[1])[None] == 0
        p = model.planner(vectors, first)[0, -1].softmax(0)
    label = int(corpus.labels[j]) if j < corpus.n_sentences else -1
    before = int(corpus.labels[j - 1]) if j > opening else -1
    assert model.plan in MIXTURES, f"say in MIXTURES how plan {model.plan} weights the labels"
    weights = MIXTURES[model.plan](p.numpy(), label, before)
    return torch.from_numpy(weights) @ model.gpt.label_emb, p


@torch.no_grad()
def naive_score(model, corpus):
    """nll (N-1,), and the planner's probabilities where each sentence opens, {j: (K,)}."""
    nll = []
    probs = {}
    plan = functools.cache(functools.partial(naive_plan, model, corpus))
    for t in range(len(corpus.tokens) - 1):
        start = window_start(t, model.gpt.block_size)
        targets = np.arange(start, t + 1) + 1
        sentences = np.searchsorted(corpus.sentences, targets, side="right") - 1
        plan_vectors = None
        if model.plan != "none":
            plan_vectors = torch.stack([plan(start, j)[0] for j in sentences])[None]    # (1, T, C)
        tokens = torch.from_numpy(corpus.tokens[None, start:t + 1])
        logits = model.gpt(tokens, None, plan_vectors, torch.arange(len(sentences)))[0, -1]
        nll.append(-float(logits.log_softmax(0)[int(corpus.tokens[t + 1])]))
        j = sentences[-1]
        if model.planner is not None and corpus.sentences[j] == t + 1:
            probs[j] = plan(start, j)[1]
    return np.array(nll), probs


@pytest.mark.parametrize("view, block_size", [("document", T), ("window", T), ("document", 11)])
@pytest.mark.parametrize("plan", PLANS)
def test_score_is_what_the_naive_way_finds(plan, view, block_size):
    model = draw_model(plan, view, block_size=block_size)
    corpus = read(draw_tokens(6))
    naive, probs = naive_score(model, corpus)
    nll, label_log_probs = score(model, corpus)
    assert nll == pytest.approx(naive, abs=1e-10)
    for j, p in probs.items():
        assert label_log_probs[j] == pytest.approx(np.log(p.numpy()), abs=1e-5)
    if (plan, view) == ("soft", "window"):
        # The control: the other view scores differently.
        assert abs(score(draw_model(plan), corpus)[0] - naive).max() > 1e-3


def test_the_planners_figures_are_those_of_its_log_probabilities():
    corpus = read(draw_tokens(6))
    nll, label_log_probs = score(draw_model("soft"), corpus)
    right = [label_log_probs[j, label] for j, label in enumerate(corpus.labels) if j > 0]
    top1 = [label_log_probs[j].argmax() == label for j, label in enumerate(corpus.labels) if j > 0]
    figures = summary(nll, label_log_probs, corpus, n_bytes=7)
    assert figures["planner_ce"] == pytest.approx(-np.mean(right), abs=1e-6)
    assert figures["planner_acc"] == pytest.approx(np.mean(top1))
    assert figures["bits_per_byte"] == pytest.approx(nll.sum() / np.log(2) / 7)


@pytest.mark.parametrize("plan", PLANS)
def test_scores_depend_neither_on_the_batch_size_nor_on_what_follows(plan):
    tokens = draw_tokens(7)
    model = draw_model(plan)
    nll, label_log_probs = score(model, read(tokens), batch_size=1)
    again, label_again = score(model, read(tokens), batch_size=5)
    assert again == pytest.approx(nll, abs=1e-10)
    if label_log_probs is not None:
        assert label_again == pytest.approx(label_log_probs, abs=1e-5, nan_ok=True)
    if plan in CAUSAL:
        for n in (2, 9, T, T + 1, T + T // 2 + 1, 50, 99):
            prefix, _ = score(model, read(tokens[:n]))
            assert prefix == pytest.approx(nll[:n - 1], abs=1e-10)


@pytest.mark.parametrize("training", [True, False])
def test_scoring_leaves_the_model_and_the_random_state_as_they_were(training):
    corpus = read(draw_tokens(8))
    model = draw_model("gumbel").train(training)
    before = copy.deepcopy(model)
    state = torch.get_rng_state()
    assert np.array_equal(score(model, corpus)[0], score(model, corpus)[0])
    assert torch.equal(state, torch.get_rng_state())
    assert model.training is training
    for p, q in zip(model.parameters(), before.parameters()):
        assert torch.equal(p, q) and p.grad is None


def make_run(model):
    """What generation needs of a run."""
    return SimpleNamespace(
        model=lambda plan: model, labeler=LABELER, tokenizer=TOKENIZER, device=torch.device("cpu"),
        autocast=choose_autocast("float32", torch.device("cpu")),
        config=SimpleNamespace(n_labels=K), bigram=torch.full((K + 2, K), 1 / K).log())


@causal_plans_in_both_views
def test_generation_has_the_logits_of_score(plan, view):
    model = draw_model(plan, view)
    tokens = draw_tokens(9, 70)
    nll, _ = score(model, read(tokens))
    for t in range(len(tokens) - 1):
        logits = next_logits(make_run(model), model, tokens[:t + 1].tolist())
        found = -float(logits.log_softmax(0)[int(tokens[t + 1])])
        assert found == pytest.approx(nll[t], abs=1e-4)


@torch.no_grad()
def test_a_label_given_by_hand_is_the_plan_of_every_sentence_written():
    """Under the oracle: a text is written again if each of its labels is asked for in turn."""
    model = draw_model("oracle")
    run = make_run(model)
    tokens = draw_tokens(9, 70).tolist()
    corpus = read(np.array(tokens))
    nll, _ = score(model, corpus)
    for t in range(40, 69):
        # The sentence of token t + 1 is the only one written.
        j = int(corpus.sentence_of(t + 1))
        if j == corpus.n_sentences:
            break
        n_prompt = max(1, int(corpus.sentences[j]))
        for label in range(K):
            logits = next_logits(run, model, tokens[:t + 1], n_prompt, label)
            found = -float(logits.log_softmax(0)[tokens[t + 1]])
            is_close = found == pytest.approx(nll[t], abs=1e-4)
            assert is_close == (label == corpus.labels[j]), (t, label)


def test_follow_counts_the_finished_sentences_that_were_written(monkeypatch):
    def generate(run, plan, prompt, n_tokens, temperature, seed, label):
        # (whether written, own label): a prompt, two finished sentences, one unfinished.
        found = [(False, label), (True, label), (True, 4), (True, None)]
        return [{"written": written, "label": own} for written, own in found]
    monkeypatch.setattr("eval.generate", generate)
    share, frequency = follow(make_run(None), "soft", ["a", "b"], [1, 4])
    assert (share, frequency) == (3 / 4, pytest.approx(1 / K))
