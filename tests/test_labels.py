"""Labels: a vector depends on its own sentence alone, and k-means is Lloyd's algorithm."""
import numpy as np
import pytest
import torch

import data
import labels
from data import InputError
from labels import Labeler, kmeans, plus_plus

TOKENIZER = data.bpe_tokenizer({bytes([b]): b for b in range(256)})
V, E = TOKENIZER.n_vocab, 16
TOKEN_EMB = torch.randn(V, E, generator=torch.Generator().manual_seed(0))
# The step of half precision just below 1.
HALF = 2 ** -10


def draw_corpus(seed):
    rng = np.random.default_rng(seed)
    words = ["tide ", "Sand ", "shell ", "wave ", "gull. ", "reef! ", "The ", "a ", "of ", "and. "]
    return data.Corpus.from_texts(["".join(rng.choice(words, 200)) for _ in range(3)], TOKENIZER)


def sentences(corpus):
    return [np.asarray(corpus.tokens[a:b]) for a, b in zip(corpus.sentences, corpus.sentences[1:])]


@pytest.mark.parametrize("chunk", [labels.CHUNK, 7])
def test_a_vector_is_its_tokens_weighted_mean_less_the_training_mean(chunk, monkeypatch):
    monkeypatch.setattr(labels, "CHUNK", chunk)
    train = draw_corpus(0)
    p = np.bincount(train.tokens, minlength=V) / len(train.tokens)
    table = TOKEN_EMB.double().numpy() * (1e-3 / (1e-3 + p))[:, None]
    mean = np.mean([table[tokens].mean(0) for tokens in sentences(train)], 0)
    labeler = Labeler(V, E, 1)
    labeler.fit_vectors(TOKEN_EMB, train)
    # The statistics stay those of training.
    for corpus in (train, draw_corpus(1)):
        expected = np.stack([table[tokens].mean(0) - mean for tokens in sentences(corpus)])
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        assert np.abs(labeler.embed(corpus) - expected).max() < 2 * HALF


# --- k-means --------------------------------------------------------------------------------------
def lumps(n, seed=0):
    """(n, 6) float32: seven lumps that overlap, so that Lloyd takes a while."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(7, 6))
    return (centres[rng.integers(7, size=n)] + 0.5 * rng.normal(size=(n, 6))).astype(np.float32)


def distances(x, centroids):
    """(N, K) squared, in float64."""
    return np.square(np.float64(x)[:, None] - np.float64(centroids)).sum(2)


def test_kmeans_takes_the_steps_of_lloyd_from_its_start(monkeypatch):
    """Each further iteration lowers the inertia to what the textbook's next step has."""
    x = lumps(500)
    start = x[np.random.default_rng(0).choice(500, 9, replace=False)]
    monkeypatch.setattr(labels, "plus_plus", lambda *_: torch.from_numpy(start))
    centroids = start
    inertias = []
    for n in range(30):
        found, label, inertia = kmeans(x, 9, max_iters=n, tol=0)
        assert np.abs(found.numpy() - centroids).max() < 1e-5
        apart = distances(x, centroids)
        assert np.array_equal(label, apart.argmin(1))
        assert inertia == pytest.approx(apart.min(1).sum(), rel=1e-5)
        inertias.append(inertia)
        centroids = np.stack([x[label == j].mean(0, np.float64) for j in range(9)])
    assert all(b <= a * (1 + 1e-6) for a, b in zip(inertias, inertias[1:]))
    assert inertias[-1] < 0.8 * inertias[0]


def test_kmeans_stops_when_an_iteration_gains_less_than_tol():
    x = lumps(2000)
    _, _, at_last = kmeans(x, 20, max_iters=1000, tol=0)
    _, _, early = kmeans(x, 20, max_iters=1000, tol=0.05)
    assert at_last < early < 1.3 * at_last


@pytest.mark.parametrize("most", [100, 1 << 18])
def test_labels_and_inertia_are_those_of_the_centroids_returned(monkeypatch, most):
    """Also if k-means is fitted on 100 of the 1500 vectors."""
    monkeypatch.setattr(labels, "MOST_POINTS", most)
    x = lumps(1500)
    centroids, label, inertia = kmeans(x, 20, max_iters=3)
    apart = distances(x, centroids)
    assert (apart[np.arange(1500), label] <= apart.min(1) + 1e-4).all()
    assert inertia == pytest.approx(apart.min(1).sum(), rel=1e-5)


def test_the_start_is_drawn_in_proportion_to_the_squared_distance():
    # After a 0, the point at -3 is drawn nine times out of ten.
    x = torch.tensor([[0.0]] * 5000 + [[1.0], [-3.0]])
    generator = torch.Generator().manual_seed(0)
    drawn = [plus_plus(x, 2, generator).min().item() for _ in range(300)]
    assert 0.85 < np.mean([centroid == -3 for centroid in drawn]) < 0.95


def test_an_empty_label_moves_to_the_farthest_point(monkeypatch):
    x = lumps(300)
    start = x[[0, 0, 1]]
    monkeypatch.setattr(labels, "plus_plus", lambda *_: torch.from_numpy(start))
    centroids, _, _ = kmeans(x, 3, max_iters=1)
    assert np.array_equal(centroids[1], x[distances(x, start).min(1).argmax()])


def test_more_labels_than_distinct_points_and_than_points():
    x = lumps(5)[np.arange(200) % 5]
    centroids, _, inertia = kmeans(x, 8)
    assert inertia < 1e-3 and centroids.isfinite().all()
    with pytest.raises(InputError, match="n_labels=201 .* 200"):
        kmeans(x, 201)


# --- what the labels mean -------------------------------------------------------------------------
def draw_labelled(seed, k, order):
    """One-token sentences; a share `order` of the labels count up, the rest are drawn."""
    rng = np.random.default_rng(seed)
    opens = np.append(0, np.cumsum(rng.integers(1, 15, 60)))
    n = opens[-1]
    drawn = rng.choice(k, n, p=rng.dirichlet(np.ones(k)))
    drawn = np.where(rng.random(n) < order, np.arange(n) % k, drawn)
    return data.Corpus(np.zeros(n, int), np.arange(n + 1), opens, labels=drawn)


@pytest.mark.parametrize("seed, order", [(0, 0.9), (1, 0)])
def test_the_bigram_is_the_one_that_is_counted_one_by_one(seed, order):
    # Label 6 does not occur; 7 stands for the start of a document.
    corpus = draw_labelled(seed, 6, order)
    k = 7
    before = np.append(k, corpus.labels[:-1])
    before[corpus.documents[:-1]] = k
    pairs = list(zip(before.tolist(), corpus.labels.tolist()))
    frequency = [(corpus.labels.tolist().count(b) + 1) / (len(pairs) + k) for b in range(k)]
    expected = [[(pairs.count((a, b)) + 128 * frequency[b]) / ((before == a).sum() + 128)
                 for b in range(k)] for a in range(k + 1)]
    found = labels.label_bigram(corpus, k).exp().numpy()
    assert np.abs(found - [*expected, frequency]).max() < 1e-6


def test_descriptions_name_the_topics_of_a_made_corpus():
    topics = [["tide", "reef", "gull", "salt"], ["loaf", "yeast", "oven", "flour"]]
    rng = np.random.default_rng(0)
    texts = []
    for i in range(100):
        topic = topics[rng.integers(2)]
        texts.append(" ".join(["the", *rng.permutation(topic), f"and the fooBar {i}. "]))
    corpus = data.Corpus.from_texts(texts, TOKENIZER)
    labeler = Labeler(V, E, 3)
    labeler.fit_vectors(TOKEN_EMB, corpus)
    corpus.vectors = labeler.embed(corpus)
    words = [TOKENIZER.decode(tokens.tolist()) for tokens in sentences(corpus)]
    corpus.labels = np.array(["oven" in text for text in words]).astype(int)
    means = [corpus.vectors[corpus.labels == j].mean(0) for j in (0, 1, 1)]
    labeler.centroids = torch.from_numpy(np.float32(means))
    found = labels.describe(labeler, corpus, TOKENIZER)
    assert [d["size"] for d in found] == [*np.bincount(corpus.labels), 0]
    for j in (0, 1):
        assert set(found[j]["words"][:4]) == set(topics[j])
        # The two of its sentences that are nearest to the centroid, and have any text.
        apart = distances(corpus.vectors, labeler.centroids[j:j + 1])[:, 0]
        order = [words[i].strip() for i in apart.argsort() if corpus.labels[i] == j]
        assert found[j]["sentences"] == [text for text in order if text != data.EOT][:2]
    assert found[2] == {"size": 0, "words": [], "sentences": []}
