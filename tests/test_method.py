"""The method, one property a test, and beside it the control that shows that the test can fail. A
new plan in model.py is covered with one entry in MIXTURES. Models are drawn at random: on a fresh
one the plan maps are zero, so that most properties would hold whatever the code does."""
import copy
import functools
import re
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import train
from eval import Run, next_logits, summary
from labels import Labeler
from model import END_TO_END, GPT, PLANS, mix_labels

T, C, K, REACH = 16, 16, 5, 3
VIEWS = ("document", "window")
STARTS = np.arange(0, 95, 5)                         # of windows that overlap, most not at 0
WORDS = "We They Birds Stones the a of red blue tree stone river bird small walks sings".split()
PIECES = [word + end for word in WORDS for end in (" ", " ", ". ", "! ", '?" ', ".\n    ")]

# What each plan says of one sentence: the weights (K,) of the labels, from the planner's
# probabilities p (K,), the label of the sentence and the one before it; -1, unknown, is no label.
ONE_HOT = np.eye(K + 1, K)                           # its last row, ONE_HOT[-1], is zeros
MIXTURES = {
    "fixed": lambda p, label, before: ONE_HOT[0],
    "previous": lambda p, label, before: ONE_HOT[before],
    "hard": lambda p, label, before: ONE_HOT[p.argmax()],
    "straight_through": lambda p, label, before: ONE_HOT[p.argmax()],
    "gumbel": lambda p, label, before: p,            # in evaluation, where it has no noise
    "soft_frozen": lambda p, label, before: p,
    "soft": lambda p, label, before: p,
    "oracle": lambda p, label, before: ONE_HOT[label],
}
CAUSAL = [plan for plan in PLANS if plan != "oracle"]           # the oracle is told the future
causal_plans_in_both_views = pytest.mark.parametrize(
    "plan, view", [(plan, view) for plan in CAUSAL for view in VIEWS])


def expected_row(plan, p, label_emb, label, before):
    """The plan (C,) of one sentence."""
    assert plan in MIXTURES, f"say in MIXTURES which weights plan {plan} gives to the labels"
    return torch.from_numpy(MIXTURES[plan](p.numpy(), int(label), int(before))) @ label_emb


# --- texts and models, drawn at random ------------------------------------------------------------
def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TEXT = "".join(np.random.default_rng(0).choice(PIECES, 3000))
TOKENIZER = data.bpe_tokenizer(data.train_bpe([TEXT], 400))
V, EOT = TOKENIZER.n_vocab, TOKENIZER.eot_token
LABELER = Labeler(V, C, K)
LABELER.load_state_dict({"table": draw(V, C, seed=1), "mean": draw(C, seed=2) / 10,
                         "centroids": draw(K, C, seed=4)})


@functools.cache
def draw_tokens(seed, n=100):
    """(n,) many sentence and document ends, tokens that straddle a boundary, stray bytes."""
    text = [TOKENIZER.decode_single_token_bytes(t) for t in range(V - 1)]
    pools = [[t for t in range(V - 1) if re.fullmatch(kind, text[t], re.DOTALL)]
             for kind in (rb"[A-Za-z]{3,} ", rb"\W*[.!?]\W*", rb"\n +", rb".*")] + [[EOT]]
    rng = np.random.default_rng(seed)
    kinds = rng.choice(5, n, p=[0.58, 0.24, 0.05, 0.09, 0.04])
    return np.array([EOT] + [rng.choice(pools[kind]) for kind in kinds[1:]])


def make_run(view="document", **options):
    sizes = dict(out_dir="", device="cpu", dtype="float32", block_size=T, n_layer=2, n_head=2,
                 n_embd=C, n_labels=K, planner_layer=2, planner_reach=REACH, planner_view=view)
    run = Run(train.Config(**sizes | options))
    run.tokenizer, run.labeler = TOKENIZER, LABELER
    return run


def draw_model(plan, run=None, maps=True):
    """With weights drawn from N(0, 0.2^2), plan maps only if `maps`; the same for each plan."""
    model = (run or make_run()).new_model(plan).double()
    for name, p in model.named_parameters():
        if maps or "plan_map" not in name:           # round: norms start at 1, all else near 0
            p.data = p.data.round() + 0.2 * draw(*p.shape, seed=zlib.crc32(name.encode()))
    if model.planner is not None:                    # batches hold vectors in float32
        model.planner.inp.register_forward_pre_hook(lambda _, args: (args[0].double(),))
    return model


def read(tokens):
    """tokens -> corpus with sentences, vectors and labels: all that a model is told of a text."""
    return make_run().label(data.Corpus.from_tokens(tokens, TOKENIZER))


def read_batch(tokens, starts=(0, 5, 21, 38), view="document"):
    return data.window_batch(read(tokens), np.array(starts), T, REACH, view)


def window_start(position, block_size=T):
    """Where the window starts in which `position` predicts its next token."""
    stride = max(1, block_size // 2)
    return stride * max(0, -(-(position + 1 - block_size) // stride))


# --- no logit sees the future ---------------------------------------------------------------------
def spots(tokens, n):
    """Some t, among them those where the traps lie: a sentence or a document ends at t or t + 1."""
    documents = np.flatnonzero(tokens == EOT)
    sentences = np.setdiff1d(np.flatnonzero(data.sentence_ends(tokens, TOKENIZER)), documents)
    rng, drawn = np.random.default_rng(0), []
    for pool in (np.arange(98), sentences, sentences - 1, documents, documents - 1):
        drawn += rng.choice(pool[(pool > 0) & (pool < 98)], n).tolist()
    return sorted(set(drawn))


@torch.no_grad()
def influence(plan, view="document"):
    """How far tokens after t move the logits up to t at most, and those after it at least."""
    model, tokens, at = draw_model(plan), draw_tokens(0), STARTS[:, None] + np.arange(T)

    def logits(tokens):                                                     # (windows, T, V)
        batch = read_batch(tokens, STARTS, view)
        rows, _ = model.plan_rows(batch)
        return model.gpt(batch.tokens, plan=rows, sentence_id=batch.sentence_id)
    base, before, after = logits(tokens), [], []
    for t in spots(tokens, 3):      # the next token made or unmade <|endoftext|>, all others, none
        next_one = EOT if tokens[t + 1] != EOT else TOKENIZER.encode_single_token("the ")
        for future in ([next_one, *tokens[t + 2:]], draw_tokens(t + 1)[t + 1:], []):
            gap = (logits(np.array([*tokens[:t + 1], *future])) - base).abs().amax(-1)
            before.append(float(gap[at <= t].max()))
            after.append(float(gap[at > t].max()))
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
    """<|endoftext|> counts to the first sentence of the next document."""
    right = data.Corpus.from_tokens

    def leaky(tokens, tokenizer):
        corpus, ends = right(tokens, tokenizer), np.flatnonzero(tokens == EOT)
        sentences = np.unique(corpus.sentences - np.isin(corpus.sentences, ends[1:] + 1))
        return data.Corpus(tokens, sentences, np.searchsorted(sentences, ends))
    monkeypatch.setattr(data.Corpus, "from_tokens", leaky)


@pytest.mark.parametrize("leak", [look_ahead, plan_early, end_opens_document])
def test_that_check_finds(leak, monkeypatch):
    leak(monkeypatch)
    assert influence("soft")[0] > 1e-3


@functools.cache
def with_each_next_token(t, view):
    """(V windows) the first t + 1 tokens and each of the V tokens behind them, a text each."""
    texts = [np.append(draw_tokens(5)[:t + 1], token) for token in range(V)]
    batches = [read_batch(text, [window_start(t)], view) for text in texts]
    return data.Batch(*(torch.cat(parts) for parts in zip(*(vars(b).values() for b in batches))))


@torch.no_grad()
def total_probability(plan, t, view):
    """Of all V next tokens: text + token -> sentences -> vectors -> planner -> plan -> score."""
    nll, _ = draw_model(plan)(with_each_next_token(t, view), reduction="none")
    return float((-nll[:, t - window_start(t)]).exp().sum())


@causal_plans_in_both_views
def test_the_probabilities_of_all_next_tokens_sum_to_one(plan, view):
    for t in spots(draw_tokens(5), 1):
        assert total_probability(plan, t, view) == pytest.approx(1, abs=1e-10)


def test_both_checks_find_the_oracle():
    assert influence("oracle")[0] > 1e-3
    for t in spots(draw_tokens(5), 1):
        assert abs(total_probability("oracle", t, "document") - 1) > 1e-6


# --- what the LM loss trains ----------------------------------------------------------------------
def trained(plan):
    """The parts that a plan's joint stage trains."""
    if plan == "none":
        return {"gpt"}
    return {"gpt", "label_emb", "plan_map"} | ({"planner"} if plan in END_TO_END else set())


def reached(model, batch):
    """The parts to which the LM loss has a gradient, through each of their tensors."""
    if model.planner is not None:                    # would the loss reach a frozen one?
        model.planner.requires_grad_(True)
    model(batch, torch.Generator().manual_seed(0))[0].backward()
    found, missed = set(), set()
    for name, p in model.named_parameters():
        part = next(part for part in ("planner", "label_emb", "plan_map", "gpt") if part in name)
        (missed if p.grad is None or not p.grad.any() else found).add(part)
    assert not found & missed
    return found


@pytest.mark.parametrize("plan", PLANS)
def test_the_lm_loss_reaches_the_planner_end_to_end_and_label_embeddings_under_any_plan(plan):
    batch = read_batch(draw_tokens(0))
    assert reached(draw_model(plan), batch) == trained(plan)
    fresh = draw_model(plan, maps=False)             # the maps learn first, all behind them later
    assert reached(fresh, batch) == trained(plan) - {"label_emb", "planner"}
    none, start, drawn = (model(batch, torch.Generator(), "none")[0] for model in (
        draw_model("none"), fresh, draw_model(plan)))                       # (B, T) each
    assert torch.allclose(start, none, rtol=0, atol=1e-12)
    assert plan == "none" or (drawn - none).abs().max() > 1e-3


@pytest.mark.parametrize("plan", PLANS)
def test_the_gradient_is_exact_but_for_straight_through(plan):
    """The derivative of the loss along a drawn direction, by autograd and by finite differences."""
    model, batch = draw_model(plan), read_batch(draw_tokens(0))
    starts = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    directions = {name: draw(*p.shape, seed=len(name)) for name, p in starts.items()}

    def loss(step):                                  # with the same noise each time
        moved = {name: p + step * directions[name] for name, p in starts.items()}
        inputs = (batch, torch.Generator().manual_seed(0))
        return torch.func.functional_call(model, moved, inputs)[0]
    step = torch.zeros((), dtype=torch.float64, requires_grad=True)
    exact = float(torch.autograd.grad(loss(step), [step])[0])
    finite = float(loss(1e-6) - loss(-1e-6)) / 2e-6
    assert abs(exact) > 1e-3
    assert (finite == pytest.approx(exact, rel=1e-5)) == (plan != "straight_through")


# --- the plan, and the loss -----------------------------------------------------------------------
def test_cold_gumbel_draws_labels_with_the_planners_probabilities():
    logits, one_hot, noise = draw(K), torch.eye(K).double(), torch.Generator().manual_seed(0)
    drawn = mix_labels(logits.expand(9000, K), one_hot, "gumbel", tau=1e-3, generator=noise)
    assert drawn.max(1).values.mean() > 0.99         # nearly one label each
    torch.testing.assert_close(drawn.mean(0), logits.softmax(0), rtol=0, atol=0.015)


def test_the_plan_is_added_before_the_output_projection():
    attn, x, rows = draw_model("soft").gpt.blocks[0].attn, draw(1, T, C), draw(1, 1, C, seed=1)
    added = attn(x, rows, torch.zeros(1, T, dtype=torch.long)) - attn(x)
    before = attn.proj(attn.plan_map(rows)).expand(1, T, C)
    torch.testing.assert_close(added, before, rtol=0, atol=1e-12)
    assert not torch.allclose(added, attn.plan_map(rows))       # as it would be behind it


def test_the_loss_is_over_the_tokens_and_the_targets_that_there_are():
    """257 tokens, in a matrix of 320 rows; a target of -1 is none."""
    gpt, tokens = GPT(257, 8, 1, 2, 8).double(), torch.arange(16).view(2, 8)
    expected = -gpt(tokens)[..., :257].log_softmax(-1).gather(2, tokens[..., None])[..., 0]
    torch.testing.assert_close(gpt(tokens, tokens, reduction="none"), expected)
    loss = gpt(tokens, tokens.masked_fill(tokens > 9, -1))
    torch.testing.assert_close(loss, expected[tokens <= 9].mean())
    assert abs(loss - expected.mean()) > 1e-6


def test_the_loss_sums_the_gradients_of_its_chunks_in_float32():
    x, targets, errors = draw(16, 256, C), torch.arange(4096) % 30, []      # in 32 chunks
    sums_in_bfloat16 = torch.autocast("cpu", torch.bfloat16)
    for autocast in (make_run(dtype="bfloat16").autocast(), sums_in_bfloat16):
        gpt = GPT(4096, T, 1, 2, C)
        double = copy.deepcopy(gpt).double()
        with autocast:
            loss = gpt.loss(x.float(), targets, "mean")
        (loss + double.loss(x, targets, "mean")).backward()
        found, exact = gpt.wte.weight.grad, double.wte.weight.grad
        errors.append(float((found - exact).norm() / exact.norm()))
    assert errors[0] < 0.004 and errors[1] > 0.005


@torch.no_grad()
def test_attention_depends_on_distances_alone_and_so_on_order(monkeypatch):
    gpt, x = draw_model("none").gpt, draw(1, T, C)
    attn = gpt.blocks[0].attn
    planner, first = draw_model("soft").planner, torch.arange(T)[None] % 6 == 0
    for n in (1, 7, 600):                            # positions later, behind as many unseen ones
        unseen = torch.arange(n + T) < n
        mask = (unseen[:, None] == unseen).tril()
        later = attn(torch.cat([draw(1, n, C, seed=1), x], 1), mask=mask)[:, n:]
        torch.testing.assert_close(later, attn(x), rtol=0, atol=1e-10)
        padded = F.pad(x, (0, 0, n, 0)), F.pad(first, (n, 0), value=True)
        torch.testing.assert_close(planner(*padded, T), planner(x, first), rtol=0, atol=1e-10)
    same = gpt(torch.full((1, T), 5))                # nor does the GPT add positions to tokens
    torch.testing.assert_close(same, same[:, :1].expand_as(same), rtol=0, atol=1e-10)

    def moved():                                     # the last position sees the same in any order
        return float((attn(x) - attn(x[:, [*reversed(range(T - 1)), T - 1]]))[:, -1].abs().max())
    assert moved() > 1e-3
    monkeypatch.setattr("model.rotate", lambda x: x)
    assert moved() < 1e-12


# --- the planner, scoring, generation -------------------------------------------------------------
def naive_plan(model, corpus, view, start, j):
    """Of sentence j in the window from `start`: its row (C,), the planner's probabilities (K,)."""
    touched = np.searchsorted(corpus.sentences, start + 1, side="right") - 1    # first
    begins = max(corpus.documents[corpus.documents <= j].max(), touched - REACH)
    if view == "window":                             # sentences that lie wholly in it
        begins = max(begins, np.searchsorted(corpus.sentences, start))
    p = torch.zeros(K)
    if model.planner is not None:
        context = F.pad(torch.from_numpy(corpus.vectors[begins:j]), (0, 0, 0, 1))
        first = torch.arange(len(context))[None] == 0
        p = model.planner(context[None].double(), first)[0, -1].softmax(0)
    label = corpus.labels[j] if j < corpus.n_sentences else -1
    before = corpus.labels[j - 1] if j > begins else -1
    return expected_row(model.plan, p, model.gpt.label_emb, label, before), p


@torch.no_grad()
def naive_score(model, corpus, view):
    """-> nll (N-1,), and the planner's probabilities where each sentence opens, {j: (K,)}."""
    nll, probs = [], {}
    plan = functools.cache(functools.partial(naive_plan, model, corpus, view))
    for t in range(len(corpus.tokens) - 1):
        start, rows = window_start(t, model.gpt.block_size), None
        ids = np.searchsorted(corpus.sentences, np.arange(start, t + 1) + 1, side="right") - 1
        if model.plan != "none":
            rows = torch.stack([plan(start, j)[0] for j in ids])[None]                  # (1, T, C)
        tokens = torch.from_numpy(corpus.tokens[None, start:t + 1])
        logits = model.gpt(tokens, plan=rows, sentence_id=torch.arange(len(ids)))[0, -1]
        nll.append(-float(logits.log_softmax(0)[int(corpus.tokens[t + 1])]))
        if model.planner is not None and corpus.sentences[ids[-1]] == t + 1:
            probs[ids[-1]] = plan(start, ids[-1])[1]
    return np.array(nll), probs


@pytest.mark.parametrize("view, block_size", [("document", T), ("window", T), ("document", 11)])
@pytest.mark.parametrize("plan", PLANS)
def test_score_is_what_the_naive_way_finds(plan, view, block_size):
    run, corpus = make_run(view, block_size=block_size), read(draw_tokens(6))
    model = draw_model(plan, run)
    naive, _ = naive_score(model, corpus, view)
    assert run.score(model, corpus).nll == pytest.approx(naive, abs=1e-10)
    if (plan, view) == ("soft", "window"):           # the control
        assert abs(make_run("document").score(model, corpus).nll - naive).max() > 1e-3


def test_the_planners_figures_are_those_that_the_naive_way_finds():
    tokens, run, model = draw_tokens(6), make_run(), draw_model("soft")
    corpus = read(tokens[:read(tokens).sentences[-1]])          # all its sentences are finished
    _, probs = naive_score(model, corpus, "document")
    sentences, p = list(probs), torch.stack(list(probs.values()))           # (n,), (n, K)
    right = p[range(len(p)), corpus.labels[sentences].tolist()]             # (n,)
    expected = {"planner_ce": -float(right.log().mean()),
                "planner_acc": float((right == p.amax(1)).double().mean())}
    figures = summary(run.score(model, corpus), corpus, 1)
    assert {name: figures[name] for name in expected} == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("plan", PLANS)
def test_scores_depend_neither_on_the_batch_size_nor_on_what_follows(plan):
    run, tokens, model = make_run(), draw_tokens(7), draw_model(plan)
    one, many = (vars(run.score(model, read(tokens), batch_size=n)) for n in (1, 5))
    for name in one:
        assert many[name] == pytest.approx(one[name], abs=1e-6, nan_ok=True)
    for n in (2, 9, T, T + 1, T + T // 2 + 1, 50, 99) if plan in CAUSAL else []:
        prefix = run.score(model, read(tokens[:n])).nll
        assert prefix == pytest.approx(one["nll"][:n - 1], abs=1e-10)


@pytest.mark.parametrize("training", [True, False])
def test_scoring_leaves_the_model_and_the_random_state_as_they_were(training):
    corpus, model = read(draw_tokens(8)), draw_model("gumbel").train(training)
    before, state = copy.deepcopy(model), torch.get_rng_state()
    found = [make_run().score(model, corpus).nll for _ in range(2)]
    assert np.array_equal(*found) and torch.equal(state, torch.get_rng_state())
    assert model.training is training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters()))


@causal_plans_in_both_views
def test_generation_has_the_logits_of_the_windows_of_score(plan, view):
    run, model, tokens = make_run(view), draw_model(plan), draw_tokens(9, 70)
    scored = run.score(model, read(tokens)).nll
    for t in range(len(tokens) - 1):
        logits = next_logits(run, model, tokens[:t + 1].tolist())
        nll = -float(logits.log_softmax(0)[int(tokens[t + 1])])
        assert nll == pytest.approx(scored[t], abs=1e-4)        # the logits come in float32
