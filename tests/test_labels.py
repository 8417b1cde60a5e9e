"""Sentence vectors, k-means, and what the labels mean."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import labels as labelling
from labels import Labeler, describe, embed_corpus, fit_vectors, kmeans
from model import GPT

HALF = 2 ** -10                                      # a step of half precision just below 1


# --- k-means --------------------------------------------------------------------------------------

def points(n, width=6, seed=0):
    """(n, width) float32: lumps of unequal size and spread, on which Lloyd takes a while."""
    rng = np.random.default_rng(seed)
    centre, spread = rng.normal(size=(7, width)), rng.uniform(0.2, 0.8, 7)
    lump = rng.choice(7, n, p=np.arange(1, 8) / 28)
    return (centre[lump] + spread[lump, None] * rng.normal(size=(n, width))).astype(np.float32)


def blobs(k, n, seed=0, width=8):
    """k tight blobs of n / k points, far apart, shuffled -> points (n, width), their blobs (n,)."""
    rng = np.random.default_rng(seed)
    blob = rng.permutation(np.arange(n) % k)
    centres = 10 * rng.normal(size=(k, width))
    return (centres[blob] + 0.01 * rng.normal(size=(n, width))).astype(np.float32), blob


def distances(x, centroids):
    """(N, K) squared, in float64."""
    x, centroids = np.asarray(x, np.float64), np.asarray(centroids, np.float64)
    return np.stack([np.square(x - c).sum(1) for c in centroids], 1)


def naive_lloyd(x, centroids, iters=1000):
    """Lloyd's algorithm as books have it -> centroids, labels, inertia."""
    x, centroids = x.astype(np.float64), centroids.astype(np.float64)
    for _ in range(iters):
        labels = distances(x, centroids).argmin(1)
        moved = np.stack([x[labels == j].mean(0) for j in range(len(centroids))])
        if np.array_equal(moved, centroids):
            break
        centroids = moved
    return centroids, labels, distances(x, centroids).min(1).sum()


def assert_nearest(x, centroids, labels, atol=1e-4):
    """Each label is that of a nearest centroid."""
    found = distances(x, centroids)
    assert (found[np.arange(len(x)), labels] <= found.min(1) + atol).all()


def same_partition(labels, other):
    """The labels are those of other, under other names."""
    pairs = set(zip(np.asarray(labels).tolist(), np.asarray(other).tolist()))
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


@pytest.mark.parametrize("seed", range(4))
def test_kmeans_is_naive_lloyd_from_the_same_start(seed):
    x = points(500, seed=seed)
    start = x[np.random.default_rng(seed).choice(500, 9, replace=False)]
    centroids, labels, inertia = kmeans(x, 9, start=torch.from_numpy(start), iters=200, tol=0)
    expected = naive_lloyd(x, start)
    assert np.array_equal(labels, expected[1]) and inertia == pytest.approx(expected[2], rel=1e-5)
    assert np.abs(centroids.numpy() - expected[0]).max() < 1e-5


def test_chunks_change_nothing():
    k, n = 2900, 3000                                # the smallest that a chunk does not hold
    assert (1 << 23) // k < n
    x = points(n, 4)
    centroids, labels, inertia = kmeans(x, k, start=torch.from_numpy(x[:k]), iters=1)
    assert torch.equal(centroids, torch.from_numpy(x[:k]))
    found = distances(x, x[:k])
    assert np.array_equal(labels, found.argmin(1))
    assert inertia == pytest.approx(found.min(1).sum(), rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_the_inertia_never_rises(seed):
    history = []
    _, _, inertia = kmeans(points(2000, seed=seed), 30, seed, tol=0, history=history)
    assert len(history) > 5 and history[-1] == inertia
    assert all(after <= before * (1 + 1e-6) for before, after in zip(history, history[1:]))


@pytest.mark.parametrize("mini_batch", [None, True])
@pytest.mark.parametrize("seed", range(3))
def test_blobs_far_apart_are_recovered(seed, mini_batch):
    x, blob = blobs(9, 600, seed)
    _, labels, _ = kmeans(x, 9, seed, mini_batch=mini_batch, iters=5)
    assert same_partition(labels, blob)


@pytest.mark.parametrize("seed", range(3))
def test_points_far_from_the_origin_lose_no_digits(seed):
    x = points(500, seed=seed) + np.float32(1000)
    start = x[np.random.default_rng(seed).choice(500, 9, replace=False)]
    _, _, inertia = kmeans(x, 9, start=torch.from_numpy(start), iters=200, tol=0)
    assert inertia == pytest.approx(naive_lloyd(x, start)[2], rel=1e-3)


@pytest.mark.parametrize("mini_batch", [None, True])
def test_labels_are_nearest_to_the_centroids_returned(mini_batch):
    x = points(1500)
    centroids, labels, inertia = kmeans(x, 20, mini_batch=mini_batch, iters=3)
    assert_nearest(x, centroids, labels)
    assert inertia == pytest.approx(distances(x, centroids).min(1).sum(), rel=1e-5)


def test_an_empty_label_takes_the_point_farthest_from_its_centroid():
    x = points(300)
    start = torch.from_numpy(x[[0, 0, 1]])           # the second gets nothing
    far = distances(x, start).min(1).argmax()
    centroids, _, _ = kmeans(x, 3, start=start, iters=2)
    assert np.array_equal(centroids[1], x[far])


@pytest.mark.parametrize("seed", range(3))
def test_fewer_distinct_points_than_labels_leave_the_surplus_empty_and_say_so_once(seed, capsys):
    rng = np.random.default_rng(seed)                # of unit length, and their products are exact
    distinct = rng.choice(np.float32([-0.25, 0.25]), (5, 16))
    x = distinct[rng.integers(5, size=200)]
    centroids, labels, inertia = kmeans(x, 8, seed)
    assert len(labels.unique()) == 5 and inertia < 1e-4
    assert_nearest(x, centroids, labels)
    assert capsys.readouterr().out.count("3 of 8 labels stay empty") == 1


def test_more_labels_than_points_are_refused():
    with pytest.raises(ValueError, match="n_labels=11.* 10 "):
        kmeans(points(10), 11)


def test_one_label_is_the_mean_and_a_label_a_point_is_exact():
    x = points(40)
    centroids, labels, inertia = kmeans(x, 1)
    assert np.abs(centroids[0].numpy() - x.mean(0)).max() < 1e-5 and not labels.any()
    assert inertia == pytest.approx(40 * x.var(0).sum(), rel=1e-5)
    _, labels, inertia = kmeans(x, 40)
    assert len(labels.unique()) == 40 and inertia < 1e-4


def test_a_mini_batch_centroid_is_the_mean_of_all_batches():
    x = points(40)
    centroids, _, _ = kmeans(x, 1, mini_batch=True)              # 200 batches of 16384 points
    assert (np.abs(centroids[0].numpy() - x.mean(0)) < 0.003 * x.std(0)).all()


@pytest.mark.parametrize("mini_batch", [None, True])
def test_kmeans_is_a_function_of_its_seed_whatever_holds_the_points(mini_batch, tmp_path):
    x = points(900).astype(np.float16)
    np.save(tmp_path / "x.npy", x)
    mapped, state = np.load(tmp_path / "x.npy", mmap_mode="r"), torch.get_rng_state()
    fit = lambda x, seed: kmeans(x, 12, seed, mini_batch=mini_batch, iters=3)
    centroids, labels, inertia = fit(x, 5)
    for same in (x, mapped, torch.from_numpy(x.astype(np.float32))):
        again = fit(same, 5)
        assert torch.equal(again[0], centroids) and torch.equal(again[1], labels)
        assert again[2] == inertia
    assert not torch.equal(fit(x, 6)[0], centroids)
    assert torch.equal(torch.get_rng_state(), state)


# --- vectors --------------------------------------------------------------------------------------

TOKENIZER = data.bpe_tokenizer({bytes([b]): b for b in range(256)})
V, C, BLOCK = TOKENIZER.n_vocab, 16, 40


def draw_text(seed, n_words=300):
    rng = np.random.default_rng(seed)
    words = "tide Sand shell wave gull reef The a of and Salt wind".split()
    ends = [" ", " ", " ", ". ", "! "]
    return "".join(rng.choice(words) + rng.choice(ends) for _ in range(n_words))


def draw_corpus(seed):
    """Sentences of 24 bytes up to beyond BLOCK, in three documents."""
    return data.Corpus.from_texts([draw_text(seed + i) for i in range(3)], TOKENIZER)


def draw_gpt():
    gpt, random = GPT(V, BLOCK, 2, 2, C), torch.Generator().manual_seed(0)
    for p in gpt.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=random)
    return gpt


def sentences(corpus):
    return [np.asarray(corpus.tokens[a:b]) for a, b in zip(corpus.sentences, corpus.sentences[1:])]


KINDS = pytest.mark.parametrize("kind", ["sif", "hidden"])


def raw_vector(kind, gpt, corpus, sentence):
    """The definition, for one sentence alone (n,) -> (E,) in float64."""
    with torch.no_grad():
        if kind == "hidden":
            return gpt.hidden(torch.from_numpy(sentence[None, :BLOCK]))[0].double().mean(0).numpy()
        frequency = np.bincount(corpus.tokens, minlength=V) / len(corpus.tokens)
        return np.mean([1e-3 / (1e-3 + frequency[t]) * gpt.wte.weight[t].double().numpy()
                        for t in sentence], 0)


@KINDS
def test_vectors_are_what_their_definition_says(kind):
    gpt, train, other = draw_gpt(), draw_corpus(0), draw_corpus(10)
    labeler = fit_vectors(kind, gpt, train, V)
    raw = np.stack([raw_vector(kind, gpt, train, s) for s in sentences(train)])
    mean = raw.mean(0)
    assert np.abs(labeler.mean.numpy() - mean).max() < 1e-5
    for corpus in (train, other):                    # the statistics stay those of training
        vectors = embed_corpus(labeler, corpus).astype(np.float64)
        x = np.stack([raw_vector(kind, gpt, train, s) for s in sentences(corpus)]) - mean
        assert np.abs(vectors - x / np.linalg.norm(x, axis=1, keepdims=True)).max() < 2 * HALF
        assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < HALF
    assert max(map(len, sentences(train))) > BLOCK   # a longer sentence gives its beginning


@KINDS
def test_vectors_depend_on_no_other_sentence(kind):
    corpus = draw_corpus(0)
    labeler = fit_vectors(kind, draw_gpt(), corpus, V)
    rng, every = np.random.default_rng(0), sentences(corpus)
    alone = torch.cat([labeler.embed(s, np.array([0])) for s in every])
    for size in (2, 7, len(every)):
        chosen = rng.permutation(len(every))[:size]
        offsets = np.cumsum([0] + [len(every[j]) for j in chosen])[:-1]
        together = labeler.embed(np.concatenate([every[j] for j in chosen]), offsets)
        assert (together - alone[chosen]).abs().max() <= HALF     # float32 may round either way
    assert (alone - alone.roll(1, 0)).abs().amax(1).median() > 100 * HALF


@KINDS
def test_vectors_are_the_same_in_memory_on_disk_and_one_at_a_time(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(labelling, "CHUNK", 7)
    corpus = draw_corpus(0)
    labeler = fit_vectors(kind, draw_gpt(), corpus, V)
    memory, disk = embed_corpus(labeler, corpus), embed_corpus(labeler, corpus, tmp_path / "x.npy")
    alone = torch.cat([labeler.embed(s, np.array([0])) for s in sentences(corpus)])
    assert np.array_equal(memory, disk) and isinstance(disk, np.memmap)
    assert torch.equal(alone, alone.half().float())  # so nothing is lost on disk
    assert np.abs(alone.numpy() - memory).max() <= HALF
    labeler.centroids = torch.from_numpy(memory[::9].astype(np.float32))
    named = labelling.label_corpus(labeler, disk)
    assert named.tolist() == labeler.assign(torch.from_numpy(memory).float()).tolist()
    assert_nearest(memory, labeler.centroids, named)


def test_vectors_on_disk_are_read_again_unless_they_are_of_another_corpus(tmp_path, monkeypatch):
    corpus, path = draw_corpus(0), tmp_path / "x.npy"
    labeler = fit_vectors("sif", draw_gpt(), corpus, V)
    np.save(path, np.zeros((3, C), np.float16))
    written = np.array(embed_corpus(labeler, corpus, path))
    assert np.array_equal(written, embed_corpus(labeler, corpus))
    monkeypatch.setattr(Labeler, "embed", None)      # any call fails
    assert np.array_equal(embed_corpus(labeler, corpus, path), written)


def test_an_interrupted_embed_corpus_leaves_no_finished_file(tmp_path, monkeypatch):
    monkeypatch.setattr(labelling, "CHUNK", 7)
    corpus, path = draw_corpus(0), tmp_path / "x.npy"
    labeler = fit_vectors("sif", draw_gpt(), corpus, V)
    embed, calls = Labeler.embed, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return embed(*arguments)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Labeler, "embed", interrupted)
        embed_corpus(labeler, corpus, path)
    assert not path.exists()
    assert np.array_equal(embed_corpus(labeler, corpus, path), embed_corpus(labeler, corpus))


def test_a_fingerprint_names_what_the_vectors_depend_on_and_no_more():
    corpus, gpt = draw_corpus(0), draw_gpt()
    for kind in ("sif", "hidden"):
        labeler = fit_vectors(kind, gpt, corpus, V)
        before = labeler.fingerprint()
        labeler.centroids = torch.ones(2, C)
        assert labeler.fingerprint() == before
        for name, value in labeler.state_dict().items():
            if name != "centroids":
                value.view(-1)[0] += 1
                assert labeler.fingerprint() != before
                value.view(-1)[0] -= 1


# --- what the labels mean -------------------------------------------------------------------------

def handmade(lengths):
    """A Corpus of one-token sentences, documents of the given numbers of them."""
    opens = np.concatenate([[0], np.cumsum(lengths)])
    return data.Corpus(np.zeros(opens[-1], int), np.arange(opens[-1] + 1), opens)


def test_transitions_by_hand():
    labels = np.array([0, 1, 1, 2, 0, 1])            # documents 0 1 1 | 2 | 0 1
    assert labelling.transitions(labels, handmade([3, 1, 2]), 3).tolist() == [
        [0, 2, 0], [0, 1, 0], [0, 0, 0], [2, 0, 1]]


@pytest.mark.parametrize("k", [1, 3, 6])
def test_transitions_count_each_sentence_once(k):
    rng = np.random.default_rng(k)
    lengths = rng.integers(1, 9, 40)
    labels = rng.integers(k, size=lengths.sum())
    counts = labelling.transitions(labels, handmade(lengths), k)
    assert torch.equal(counts.sum(0), torch.bincount(torch.from_numpy(labels), minlength=k))
    assert counts[k].sum() == 40


def test_baselines_are_what_a_loop_finds():
    rng, k = np.random.default_rng(0), 4
    draw = lambda lengths: rng.choice(k, sum(lengths), p=[0.7, 0.2, 0.1, 0.0])
    train, val = [5, 1, 9, 30], [7, 2, 6]
    labels = draw(train)
    counts = labelling.transitions(labels, handmade(train), k).numpy()
    named = draw(val)
    named[3] = 3                                     # not seen in training, and yet of finite cost
    unigram = [(counts[:, b].sum() + 1) / (len(labels) + k) for b in range(k)]
    bigram = [[(counts[a, b] + 16 * unigram[b]) / (counts[a].sum() + 16) for b in range(k)]
              for a in range(k + 1)]
    i, unigram_nll, bigram_nll = 0, 0, 0
    for length in val:
        before = k
        for label in named[i:i + length]:
            unigram_nll -= math.log(unigram[label])
            bigram_nll -= math.log(bigram[before][label])
            before = label
        i += length
    found = labelling.baselines(torch.from_numpy(counts), named, handmade(val))
    assert found == pytest.approx({"unigram_ce": unigram_nll / i, "bigram_ce": bigram_nll / i})
    assert sum(unigram) == pytest.approx(1) and all(sum(row) == pytest.approx(1) for row in bigram)


def test_descriptions_name_the_topics_of_a_made_corpus():
    topics = [["tide", "reef", "gull", "salt"], ["loaf", "yeast", "oven", "flour"]]
    rng = np.random.default_rng(0)
    made = [" ".join(["the", *rng.permutation(topics[j]), "and the."])
            for j in rng.integers(2, size=60)]
    corpus = data.Corpus.from_texts([" ".join(made)], TOKENIZER)
    texts = [" ".join(TOKENIZER.decode(s[s < V - 1].tolist()).split()) for s in sentences(corpus)]
    labels = np.array(["oven" in text for text in texts]).astype(int)
    labeler = fit_vectors("sif", draw_gpt(), corpus, V)
    vectors = embed_corpus(labeler, corpus)
    labeler.centroids = torch.from_numpy(vectors[[5, 6, 7]].astype(np.float32))
    found = describe(labeler, corpus, vectors, labels, TOKENIZER)
    assert [d["size"] for d in found] == np.bincount(labels, minlength=3).tolist()
    assert sum(d["size"] for d in found) == corpus.n_sentences
    for j in (0, 1):
        assert set(found[j]["words"][:4]) == set(topics[j])          # and not "the", "and"
        far = distances(vectors, labeler.centroids[j:j + 1])[:, 0]
        typical = [texts[i] for i in np.lexsort((far, labels != j))]
        assert found[j]["sentences"] == list(dict.fromkeys(typical))[:3]
    assert found[2] == {"size": 0, "words": [], "sentences": []}
