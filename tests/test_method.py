"""The method: no logit sees the future, the LM loss trains what the plan says, and scoring and
generation agree with each other and with the naive way.

On fresh models the plan maps are zero, and most of this would hold whatever the code does. So every
model here is drawn at random, in float64, and the properties of causality carry controls that
break them.
"""
import itertools
import re
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import labels as labelling
from eval import Stream, score
from model import END_TO_END, GPT, PLANS, MeanCrossEntropy, mix_labels
from planner import PlannedGPT, Planner

T, C, K, REACH = 16, 16, 5, 3
VIEWS = ("document", "window")
WORDS = "We They Birds Stones the a of red blue tree stone river bird small walks sings".split()


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def made_tokenizer():
    rng = np.random.default_rng(0)
    ends = [" ", " ", ". ", "! ", '?" ', ".\n    "]
    text = "".join(rng.choice(WORDS) + rng.choice(ends) for _ in range(3000))
    return data.bpe_tokenizer(data.train_bpe([text], 400))


TOKENIZER = made_tokenizer()
V, EOT = TOKENIZER.n_vocab, TOKENIZER.eot_token
LABELER = labelling.Labeler(draw(V, C, seed=1), None, mean=draw(C, seed=2) / 10,
                            centroids=draw(K, C, seed=4).float())


def draw_tokens(seed, n=100):
    """(n,) many sentence and document ends, tokens that straddle a boundary, stray bytes."""
    text = [TOKENIZER.decode_single_token_bytes(t) for t in range(V - 1)]
    pools = [[t for t in range(V - 1) if re.fullmatch(kind, text[t], re.DOTALL)]
             for kind in (rb"[A-Za-z]{3,} ", rb"\W*[.!?]\W*", rb"\n +", rb".*")] + [[EOT]]
    rng = np.random.default_rng(seed)
    kinds = rng.choice(5, n, p=[0.65, 0.18, 0.04, 0.07, 0.06])
    return np.array([EOT] + [rng.choice(pools[kind]) for kind in kinds[1:]])


def draw_model(plan, block_size=T, n_layer=2, n_head=2, n_labels=K, maps=True):
    """With N(0, 0.2^2) added to all weights, to plan maps if `maps`; the same for each plan."""
    gpt = GPT(V, block_size, n_layer, n_head, C, n_labels)
    planner = Planner(C, n_labels, n_layer, n_head, C, REACH)
    random = torch.Generator().manual_seed(1)
    for module in (gpt.double(), planner.double()):
        for name, p in module.named_parameters():
            noise = 0.2 * torch.randn(p.shape, generator=random, dtype=p.dtype)
            p.data += noise if maps or "plan_map" not in name else 0
    # batches hold vectors in float32
    planner.register_forward_pre_hook(lambda _, args: (args[0].double(), *args[1:]))
    return PlannedGPT(gpt, planner, plan)


def read(tokens):
    """tokens -> corpus, vectors, labels: all that a model is told about a text."""
    corpus = data.Corpus.from_tokens(tokens, TOKENIZER)
    vectors = labelling.embed_corpus(LABELER, corpus)
    return corpus, vectors, labelling.label_corpus(LABELER, vectors)


def sentence_of(corpus, at):
    return np.searchsorted(corpus.sentences, at, side="right") - 1


def read_batch(tokens, starts=(0, 5, 21, 38), width=T, view="document"):
    corpus, vectors, labels = read(tokens)
    return data.window_batch(corpus, np.array(starts), width, vectors, labels, REACH, view)


def run(model, batch, generator=None):
    """-> logits (B, T, V)"""
    rows, _ = model.rows(batch, generator)
    return model.gpt(batch.tokens, None, rows, batch.sentence_id)


# --- no logit sees the future ---------------------------------------------------------------------

STARTS = np.arange(0, 95, 5)                         # of windows that overlap, most not at 0


@torch.no_grad()
def all_logits(model, tokens, view="document", held=None):
    """tokens -> sentences -> vectors -> planner -> plan -> GPT -> logits (windows, T, V). held: the
    labels of the sentences, whatever they are."""
    batch = read_batch(tokens, STARTS, view=view)
    if held is not None:
        touched = sentence_of(data.Corpus.from_tokens(tokens, TOKENIZER), STARTS + 1)
        batch.labels = held[touched[:, None] + np.arange(batch.labels.shape[1])]
    return run(model, batch)


def other_futures(tokens, seed):
    """(t, the same tokens up to t with others after it): the next one made or unmade <|endoftext|>,
    all drawn anew, none at all; at drawn t, and at those where the traps lie."""
    rng = np.random.default_rng(seed)
    ends = np.flatnonzero(data.sentence_ends(tokens, TOKENIZER)[:-2])
    spots = [np.arange(len(tokens) - 2), np.flatnonzero(tokens[1:-1] == EOT), ends, ends[1:] - 1]
    for t in np.unique(np.concatenate([rng.choice(spot, 4) for spot in spots])).tolist():
        next_one = tokens.copy()
        next_one[t + 1] = EOT if tokens[t + 1] != EOT else TOKENIZER.encode_single_token("the ")
        yield t, next_one
        yield t, np.concatenate([tokens[:t + 1], draw_tokens(seed + t + 1, len(tokens))[t + 1:]])
        yield t, tokens[:t + 1]


def influence(plan, view="document", seed=0, held=None):
    """How far other futures after t move the logits at or before t, and those after it, at most."""
    model, tokens = draw_model(plan), draw_tokens(seed)
    base, at = all_logits(model, tokens, view, held), STARTS[:, None] + np.arange(T)
    before, after = [], []
    for t, changed in other_futures(tokens, seed):
        gap = (all_logits(model, changed, view, held) - base).abs().amax(-1)
        before.append(float(gap[at <= t].max()))
        after.append(float(gap[at > t].max()))
    return max(before), min(after)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("plan", [p for p in PLANS if p != "oracle"])
def test_no_token_changes_a_logit_before_it(plan, view):
    before, after = influence(plan, view)
    assert before < 1e-10 and after > 1e-3


@pytest.mark.parametrize("seed", range(1, 5))
def test_no_token_changes_a_logit_before_it_in_other_streams(seed):
    before, after = influence("soft", seed=seed)
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
        batch.sentence_id = torch.cat([batch.sentence_id[:, 1:], batch.sentence_id[:, -1:]], 1)
        return batch
    monkeypatch.setattr(data, "window_batch", early)


def end_opens_document(monkeypatch):
    """<|endoftext|> counts to the first sentence of the next document."""
    right = data.Corpus.from_tokens

    def leaky(tokens, tokenizer):
        corpus, ends = right(tokens, tokenizer), np.flatnonzero(tokens == EOT)
        sentences = np.unique(corpus.sentences - np.isin(corpus.sentences, ends + 1))
        return data.Corpus(tokens, sentences, np.searchsorted(sentences, ends))
    monkeypatch.setattr(data.Corpus, "from_tokens", leaky)


@pytest.mark.parametrize("leak", [look_ahead, plan_early, end_opens_document])
def test_that_check_finds(leak, monkeypatch):
    leak(monkeypatch)
    before, _ = influence("soft")
    assert before > 1e-3


def test_oracle_sees_of_the_future_its_label_alone():
    held = torch.from_numpy(np.random.default_rng(0).integers(K, size=200))
    before, after = influence("oracle", held=held)
    assert before < 1e-10 and after > 1e-3


def test_a_label_moves_oracle_from_the_token_before_its_sentence_on():
    held, tokens, model = torch.zeros(200, dtype=torch.long), draw_tokens(0), draw_model("oracle")
    base, at = all_logits(model, tokens, held=held), STARTS[:, None] + np.arange(T)
    sentences = data.Corpus.from_tokens(tokens, TOKENIZER).sentences
    for j in range(1, len(sentences) - 1):
        relabelled = held.index_fill(0, torch.tensor(j), 1)
        moved = (all_logits(model, tokens, held=relabelled) != base).any(-1)
        touches = (at[:, -1:] + 1 >= sentences[j]) & (at[:, :1] + 1 < sentences[j + 1])
        assert np.array_equal(moved.numpy(), touches & (at + 1 >= sentences[j]))


def view_begins(corpus, start, j, view):
    """The first sentence that the planner may read for sentence j, in the window from `start`."""
    document = corpus.documents[corpus.documents <= j].max()
    begins = max(document, sentence_of(corpus, start + 1) - REACH)
    if view == "window":
        begins = max(begins, np.searchsorted(corpus.sentences, start))
    return min(begins, j)


def vectors_seen(model, view, seed=0):
    """Which vectors have a gradient from each position's logits, and which should, (T, R, P) each;
    and the gradient to the embeddings of later tokens, as a sum of absolute values."""
    tokens, embedded, seen, later = draw_tokens(seed), [], [], 0.0
    corpus, batch = read(tokens)[0], read_batch(tokens, STARTS, view=view)
    batch.vectors = batch.vectors.double().requires_grad_()
    model.gpt.wte.register_forward_hook(lambda module, args, output: embedded.append(output))
    logits = run(model, batch, torch.Generator().manual_seed(0)) @ draw(V)              # (B, T)
    expected = torch.zeros(T, *batch.first.shape, dtype=torch.bool)
    touched = sentence_of(corpus, STARTS + 1)
    for t in range(T):
        to_vectors, to_tokens = torch.autograd.grad(logits[:, t].sum(), [batch.vectors, *embedded],
                                                    retain_graph=True)
        seen.append(to_vectors.abs().sum(-1) > 0)
        later += float(to_tokens[:, t + 1:].abs().sum())
        for b, start in enumerate(STARTS):
            j = sentence_of(corpus, start + t + 1)
            slot = int(batch.slots[b, j - touched[b]])
            begins = slot - j + view_begins(corpus, start, j, view)
            expected[t:].flatten(1)[:, begins:slot] = True
    return torch.stack(seen), expected, later


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("plan", END_TO_END)
def test_logits_have_a_gradient_to_finished_sentences_in_view_and_to_no_other(plan, view):
    seen, expected, later = vectors_seen(draw_model(plan), view)
    assert torch.equal(seen, expected) and later == 0


def test_that_check_finds_a_planner_that_reads_the_sentence_it_predicts():
    model = draw_model("soft")
    model.planner.register_forward_pre_hook(lambda _, args: (args[0].roll(-1, 1), *args[1:]))
    seen, expected, _ = vectors_seen(model, "document")
    assert (seen & ~expected).any()


# --- what the LM loss trains ----------------------------------------------------------------------

def part_of(name):
    return next(part for part in ("planner", "label_emb", "plan_map", "gpt") if part in name)


def gradients(model, batch):
    """The norm of the LM loss's gradient, by part; that of frozen ones, too, if it reaches them."""
    model.requires_grad_(True).zero_grad()
    model(batch, torch.Generator().manual_seed(0))[0].backward()
    norms = Counter()
    for name, p in model.named_parameters():
        norms[part_of(name)] += 0.0 if p.grad is None else float(p.grad.norm())
    return norms


@pytest.mark.parametrize("plan", PLANS)
def test_the_lm_loss_reaches_the_planner_end_to_end_and_the_label_embeddings_under_any_plan(plan):
    norms = gradients(draw_model(plan), read_batch(draw_tokens(0)))
    assert {part for part in norms if norms[part]} == (
        {"gpt"} | ({"label_emb", "plan_map"} if plan != "none" else set())
        | ({"planner"} if plan in END_TO_END else set()))


@pytest.mark.parametrize("plan", PLANS[1:])
def test_mix_labels_has_a_gradient_to_the_logits_end_to_end_only(plan):
    logits, labels = draw(2, 3, K).requires_grad_(), torch.tensor([[0, 1, -1], [4, 2, 0]])
    label_emb = draw(K, C, seed=1).requires_grad_()
    loss = (mix(plan, logits, label_emb, labels, seed=0) * draw(2, 3, C, seed=2)).sum()
    found, = torch.autograd.grad(loss, [logits], allow_unused=True)
    if plan in END_TO_END:
        assert found.abs().min() > 0
    else:
        assert found is None or not found.any()


def slopes(loss, tensors):
    """The derivative of loss() along a drawn direction: by autograd, and by finite differences."""
    directions = [draw(*x.shape, seed=i) for i, x in enumerate(tensors)]
    found = torch.autograd.grad(loss(), tensors)

    @torch.no_grad()
    def at(step):
        for x, d in zip(tensors, directions):
            x += step * d
        value = loss()
        for x, d in zip(tensors, directions):
            x -= step * d
        return value
    exact = float(sum((g * d).sum() for g, d in zip(found, directions)))
    return exact, float(at(1e-5) - at(-1e-5)) / 2e-5


@pytest.mark.parametrize("of", ["planner", "logits"])
@pytest.mark.parametrize("plan", END_TO_END)
def test_the_gradient_is_exact_but_for_straight_through(plan, of):
    model, batch = draw_model(plan), read_batch(draw_tokens(0))
    logits = draw(*batch.labels.shape, K).requires_grad_()

    def loss():                                      # with the same noise each time
        rows = (model.rows(batch, torch.Generator().manual_seed(0))[0] if of == "planner" else
                mix(plan, logits, model.gpt.label_emb, tau=0.7, seed=0))
        return model.gpt(batch.tokens, batch.targets, rows, batch.sentence_id)
    exact, finite = slopes(loss, list(model.planner.parameters()) if of == "planner" else [logits])
    assert abs(exact) > 1e-4
    if plan == "straight_through":                   # its forward is flat, its gradient is soft's
        assert finite == 0
    else:
        assert finite == pytest.approx(exact, rel=1e-6)


# --- mix_labels -----------------------------------------------------------------------------------

def mix(plan, logits, label_emb, labels=None, tau=1.0, seed=None):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return mix_labels(logits, label_emb, plan, labels, tau, generator)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@DTYPES
def test_soft_is_hard_where_the_planner_is_certain(dtype):
    logits = draw(3, 7, K).argsort(-1).to(dtype) * 1e4
    label_emb = draw(K, C, seed=1, dtype=dtype)
    assert torch.equal(mix("soft", logits, label_emb), mix("hard", logits, label_emb))
    assert not torch.allclose(mix("soft", logits / 1e4, label_emb), mix("hard", logits, label_emb))


@DTYPES
def test_straight_through_is_hard_forward_bit_for_bit(dtype):
    logits, label_emb = 5 * draw(8, 50, K, dtype=dtype), draw(K, C, seed=1, dtype=dtype)
    hard = mix("hard", logits, label_emb)
    assert torch.equal(mix("straight_through", logits, label_emb), hard)
    assert torch.equal(hard, label_emb[logits.argmax(-1)])


def test_the_rows_of_the_other_plans_are_what_their_table_says():
    logits, label_emb = draw(2, 3, K), draw(K, C, seed=1)
    labels = torch.tensor([[0, 1, 4], [3, 2, -1]])
    probs = logits.exp() / logits.exp().sum(-1, keepdim=True)
    mixture = (probs[..., None] * label_emb).sum(-2)
    expected = {"soft": mixture, "soft_frozen": mixture, "gumbel": mixture,
                "fixed": label_emb[0].expand(2, 3, C), "uniform": label_emb.mean(0).expand(2, 3, C),
                "oracle": label_emb[labels.clamp(min=0)]}
    for plan, rows in expected.items():
        torch.testing.assert_close(mix(plan, logits, label_emb, labels), rows, rtol=0, atol=1e-12)


@pytest.mark.parametrize("plan", ["none", "softer"])
def test_an_unknown_plan_is_refused(plan):
    with pytest.raises(KeyError):
        mix(plan, draw(1, 1, K), draw(K, C))


def test_gumbel_is_noisy_as_its_generator_says():
    logits, label_emb = draw(2, 3, K), draw(K, C, seed=1)
    noisy = mix("gumbel", logits, label_emb, seed=0)
    assert torch.equal(noisy, mix("gumbel", logits, label_emb, seed=0))
    assert not torch.allclose(noisy, mix("gumbel", logits, label_emb, seed=1))
    assert not torch.allclose(noisy, mix("soft", logits, label_emb))


def test_cold_gumbel_draws_labels_with_the_planners_probabilities():
    logits = draw(K)
    drawn = mix("gumbel", logits.expand(1, 20_000, K), torch.eye(K).double(), tau=1e-3, seed=0)[0]
    assert drawn.max(1).values.mean() > 0.99         # nearly one label each
    torch.testing.assert_close(drawn.mean(0), logits.softmax(0), rtol=0, atol=0.015)


def test_gumbel_is_finite_in_bfloat16():
    noisy = mix("gumbel", torch.zeros(1, 20_000, K, dtype=torch.bfloat16), draw(K, C), seed=0)
    assert noisy.isfinite().all()


# --- fresh maps -----------------------------------------------------------------------------------

def test_with_fresh_maps_all_plans_have_the_same_loss():
    batch = read_batch(draw_tokens(0))
    fresh, drawn = (torch.stack([draw_model(plan, maps=maps)(batch, torch.Generator())[0]
                                 for plan in PLANS]) for maps in (False, True))
    assert (fresh - fresh[0]).abs().max() < 1e-12
    assert len(drawn.unique()) == len(PLANS) - 2     # hard is straight_through, soft is soft_frozen


def test_from_fresh_maps_the_maps_move_first_and_all_else_after_them():
    model, batch = draw_model("soft", maps=False), read_batch(draw_tokens(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    moved = []                                       # by step, the parts of which all tensors have
    for step in (0, 1):
        norms = gradients(model, batch)
        assert norms["plan_map"] > 0
        assert (norms["label_emb"] > 0) == (norms["planner"] > 0) == (step > 0)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step()
        moved.append({part_of(name) for name, p in before.items()} - {
            part_of(name) for name, p in model.named_parameters() if torch.equal(p, before[name])})
    assert moved == [{"plan_map", "gpt"}, {"plan_map", "gpt", "label_emb", "planner"}]


# --- shapes ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("B, T, S, K", [*itertools.product((1, 2), (1, 4), (1, 3), (1, 5))])
def test_shapes_with_sizes_of_one(B, T, S, K):
    rng = np.random.default_rng(0)
    ids = lambda high, *shape: torch.from_numpy(rng.integers(high, size=shape))
    batch = data.Batch(ids(V, B, T), ids(V, B, T), ids(S, B, T), draw(B, S + 2, C),
                       ids(2, B, S + 2).bool(), ids(K, B, S), ids(B * (S + 2), B, S))
    for plan in PLANS:
        model = draw_model(plan, block_size=T, n_layer=1, n_head=1, n_labels=K)
        loss, label_logits = model(batch)
        assert run(model, batch).shape == (B, T, V) and loss.shape == ()
        assert model(batch, reduction="none")[0].shape == (B, T)
        if plan == "none":
            assert model.rows(batch) == (None, None) and label_logits is None
        else:
            assert model.rows(batch)[0].shape == (B, S, C) and label_logits.shape == (B, S, K)


def test_a_token_gets_the_row_of_its_own_window_and_sentence():
    model, batch = draw_model("soft"), read_batch(draw_tokens(0))
    rows, _ = model.rows(batch)
    by_token = torch.stack([row[ids] for row, ids in zip(rows, batch.sentence_id)])     # (B, T, C)
    logits = run(model, batch)
    for b in range(len(rows)):
        alone = model.gpt(batch.tokens[b:b + 1], None, by_token[b:b + 1], torch.arange(T)[None])
        torch.testing.assert_close(logits[b], alone[0], rtol=0, atol=1e-12)


# --- the loss -------------------------------------------------------------------------------------

@pytest.mark.parametrize("n_vocab", [1 << 18, 7])    # chunks of two rows, one chunk
def test_mean_cross_entropy_is_that_of_torch_with_its_gradients(n_vocab):
    x, weight = draw(10, 3).requires_grad_(), draw(n_vocab, 3, seed=1).requires_grad_()
    targets = torch.from_numpy(np.random.default_rng(0).integers(n_vocab - 2, size=10))
    targets[[0, 5, 9]] = -1
    found = MeanCrossEntropy.apply(x, weight, targets, n_vocab - 2)      # two rows are padding
    expected = F.cross_entropy(F.linear(x, weight[:-2]), targets, ignore_index=-1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for a, b in zip(*(torch.autograd.grad(3 * loss, [x, weight]) for loss in (found, expected))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)


def test_the_loss_is_over_the_tokens_that_there_are():
    """257 tokens, in a matrix of 320 rows."""
    gpt = GPT(257, 8, 1, 2, 8).double()
    tokens = torch.arange(16).view(2, 8)
    expected = -gpt(tokens).log_softmax(-1).gather(2, tokens[..., None])[..., 0]
    torch.testing.assert_close(gpt(tokens, tokens, reduction="none"), expected)
    torch.testing.assert_close(gpt(tokens, tokens), expected.mean())


def test_both_uses_of_the_tied_embedding_have_their_gradient():
    model, batch, embedded = draw_model("none"), read_batch(draw_tokens(0)), []
    wte, states = model.gpt.wte, model.gpt.hidden(batch.tokens).detach().flatten(0, 1)
    loss = F.cross_entropy(states @ wte.weight.T, batch.targets.flatten())
    as_output, = torch.autograd.grad(loss, [wte.weight])
    wte.register_forward_hook(lambda module, args, output: embedded.append(output))
    loss, _ = model(batch)
    whole, to_tokens = torch.autograd.grad(loss, [wte.weight, *embedded])
    as_input = torch.zeros_like(whole)
    as_input.index_add_(0, batch.tokens.flatten(), to_tokens.flatten(0, 1))
    torch.testing.assert_close(whole, as_input + as_output, rtol=0, atol=1e-12)
    assert as_input.norm() > 1e-3 and as_output.norm() > 1e-3


# --- the planner ----------------------------------------------------------------------------------

def draw_planner(reach=REACH):
    planner = Planner(C, K, 2, 2, C, reach).double()
    for i, p in enumerate(planner.parameters()):
        p.data += 0.2 * draw(*p.shape, seed=i)
    return planner


def test_a_slot_sees_the_vectors_before_it_back_to_where_its_view_began():
    vectors = draw(3, 9, C).requires_grad_()
    first = draw(3, 9, seed=1) > 0.8                 # (B, S); a row need not begin with one
    logits = draw_planner()(vectors, first) @ draw(K)                                   # (B, S)
    for j in range(9):
        found, = torch.autograd.grad(logits[:, j].sum(), [vectors], retain_graph=True)
        for b in range(3):
            began = max([i for i in range(j + 1) if first[b, i]], default=0)
            seen = found[b].abs().sum(-1).nonzero()[:, 0].tolist()
            assert seen == list(range(began, j))


def test_sentences_beyond_reach_share_the_last_position():
    near, far = draw_planner(2), draw_planner(8)
    far.load_state_dict(near.state_dict() | {"wpe.weight": near.wpe.weight[[0, 1] + [2] * 7]})
    vectors, first = draw(1, 9, C), torch.tensor([[True] + [False] * 8])
    assert torch.equal(near(vectors, first), far(vectors, first))
    far.wpe.weight.data[8] += 1                      # the last slot has that position, and no other
    assert (near(vectors, first) != far(vectors, first)).any(-1).tolist() == [[False] * 8 + [True]]


def test_planner_logits_depend_on_no_other_row_and_no_padding():
    planner, vectors, first = draw_planner(), draw(3, 6, C), draw(3, 6, seed=1) > 0.5
    alone = torch.cat([planner(vectors[b:b + 1], first[b:b + 1]) for b in range(3)])

    def padded():
        wide, marked = F.pad(vectors, (0, 0, 2, 3), value=9.0), F.pad(first, (2, 3), value=True)
        return planner(wide, marked)[:, 2:-3]
    first[:, 0] = True
    torch.testing.assert_close(padded(), alone, rtol=0, atol=1e-12)
    first[:, 0] = False                              # now the padding is in view
    assert (padded() - alone)[:, 0].abs().min() > 1e-6


# --- scoring --------------------------------------------------------------------------------------

def window_start(position, block_size):
    """Where the window starts in which `position` predicts its next token."""
    stride = max(1, block_size // 2)
    return stride * max(0, -(-(position + 1 - block_size) // stride))


@torch.no_grad()
def naive_score(model, corpus, vectors, labels, view):
    """What score says it does: each token by itself, each plan from the bare list of the vectors
    that it may use. -> nll (N-1,), and the label cross-entropy of each sentence {j: nats}."""
    nll, ce, known = [], {}, {}

    def plan(start, j):
        if (start, j) not in known:
            context = torch.from_numpy(vectors[view_begins(corpus, start, j, view):j])
            first = torch.arange(len(context) + 1)[None] == 0
            known[start, j] = model.planner(F.pad(context, (0, 0, 0, 1))[None], first)[0, -1]
        weights = known[start, j].softmax(0)
        return F.one_hot(weights.argmax(), K).double() if model.plan == "hard" else weights

    for t in range(len(corpus.tokens) - 1):
        start, next_one = window_start(t, model.gpt.block_size), int(corpus.tokens[t + 1])
        ids = [sentence_of(corpus, i + 1) for i in range(start, t + 1)]
        rows = torch.stack([plan(start, j) for j in ids]) @ model.gpt.label_emb         # (T, C)
        tokens = torch.from_numpy(corpus.tokens[None, start:t + 1])
        logits = model.gpt(tokens, None, rows[None], torch.arange(len(ids))[None])[0, -1]
        nll.append(-float(logits.log_softmax(0)[next_one]))
        if corpus.sentences[ids[-1]] == t + 1 and ids[-1] < corpus.n_sentences:
            ce[ids[-1]] = -float(known[start, ids[-1]].log_softmax(0)[labels[ids[-1]]])
    return nll, ce


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("plan, block_size", [("soft", T), ("soft", 11), ("hard", T)])
def test_score_is_what_the_naive_way_finds(plan, block_size, view):
    text, model = read(draw_tokens(6)), draw_model(plan, block_size)
    found, (nll, ce) = score(model, *text, REACH, view), naive_score(model, *text, view)
    assert found.nll == pytest.approx(np.array(nll), abs=1e-10)
    assert {j: x for j, x in enumerate(found.ce) if x == x} == pytest.approx(ce, abs=1e-10)


@pytest.mark.parametrize("plan", [p for p in PLANS if p != "oracle"])
def test_a_prefix_scores_as_it_does_within_the_whole(plan):
    tokens, model = draw_tokens(7), draw_model(plan)
    whole = score(model, *read(tokens), REACH, "document").nll
    assert len(whole) == len(tokens) - 1 and not np.isnan(whole).any()
    for n in (2, 9, T, T + 1, T + T // 2 + 1, 50, 99):
        prefix = score(model, *read(tokens[:n]), REACH, "document").nll
        cut = score(model, *read(tokens), REACH, "document", max_tokens=n).nll
        assert prefix == pytest.approx(whole[:n - 1], abs=1e-10)
        assert cut == pytest.approx(whole[:n - 1], abs=1e-10)


@pytest.mark.parametrize("plan", ["none", "soft", "oracle"])
def test_scores_do_not_depend_on_the_batch_size(plan):
    text, model = read(draw_tokens(8)), draw_model(plan)
    found = [vars(score(model, *text, REACH, "document", size)) for size in (1, 3, 32)]
    for name, other in itertools.product(found[0], found[1:]):
        assert other[name] == pytest.approx(found[0][name], abs=1e-10, nan_ok=True)


@pytest.mark.parametrize("training", [True, False])
def test_scoring_leaves_the_model_and_the_random_state_as_they_were(training):
    text, model = read(draw_tokens(8)), draw_model("gumbel").train(training)
    state = torch.get_rng_state()
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    found = [score(model, *text, REACH, "document").nll for _ in range(2)]
    assert np.array_equal(*found) and torch.equal(state, torch.get_rng_state())
    assert model.training is training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())


# --- generation -----------------------------------------------------------------------------------

def streamed_and_scored(plan, view, block_size):
    """The logits (N, V) that a Stream gives token by token, and those of the windows of `score`."""
    model, tokens = draw_model(plan, block_size), draw_tokens(9, 3 * block_size + 30)
    stream = Stream(model, LABELER, TOKENIZER, REACH, view)
    streamed = torch.stack([stream.append(token) for token in tokens.tolist()])
    starts = [window_start(t, block_size) for t in range(len(tokens))]
    with torch.no_grad():
        logits = run(model, read_batch(tokens, starts, block_size, view))               # (N, T, V)
    return streamed, torch.stack([logits[t, t - start] for t, start in enumerate(starts)])


@pytest.mark.parametrize("block_size", [1, 11, T])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("plan", ["none", "soft", "hard"])
def test_a_stream_has_the_logits_of_score(plan, view, block_size):
    streamed, scored = streamed_and_scored(plan, view, block_size)
    torch.testing.assert_close(streamed, scored, rtol=0, atol=1e-10)


def test_that_check_finds_a_stream_that_keeps_its_plan_at_the_end_of_a_sentence(monkeypatch):
    close = Stream._close_sentence
    monkeypatch.setattr(Stream, "_close_sentence", lambda stream: close(stream) and False)
    streamed, scored = streamed_and_scored("soft", "document", T)
    assert (streamed - scored).abs().max() > 1e-3
