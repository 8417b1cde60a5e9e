"""Labels: a vector depends on its own sentence alone, and k-means is Lloyd's algorithm."""
import numpy as np
import pytest
import torch

import data
import labels
from labels import Labeler, kmeans

TOKENIZER = data.bpe_tokenizer({bytes([b]): b for b in range(256)})
V, E = TOKENIZER.n_vocab, 16
WTE = torch.randn(V, E, generator=torch.Generator().manual_seed(0))
HALF = 2 ** -10                                      # a step of half precision just below 1


def draw_corpus(seed):
    rng = np.random.default_rng(seed)
    words = ["tide ", "Sand ", "shell ", "wave ", "gull. ", "reef! ", "The ", "a ", "of ", "and. "]
    return data.Corpus.from_texts(["".join(rng.choice(words, 200)) for _ in range(3)], TOKENIZER)


def sentences(corpus):
    return [np.asarray(corpus.tokens[a:b]) for a, b in zip(corpus.sentences, corpus.sentences[1:])]


def fit(corpus, k=1):
    labeler = Labeler(V, E, k)
    labeler.fit_vectors(WTE, corpus)
    return labeler


@pytest.mark.parametrize("chunk", [labels.CHUNK, 7])  # sentences at a time
def test_a_vector_is_its_tokens_weighted_mean_less_the_training_mean(chunk, monkeypatch):
    monkeypatch.setattr(labels, "CHUNK", chunk)
    train = draw_corpus(0)
    p = np.bincount(train.tokens, minlength=V) / len(train.tokens)
    table = WTE.double().numpy() * (1e-3 / (1e-3 + p))[:, None]
    mean = np.mean([table[tokens].mean(0) for tokens in sentences(train)], 0)
    for corpus in (train, draw_corpus(1)):           # the statistics stay those of training
        expected = np.stack([table[tokens].mean(0) - mean for tokens in sentences(corpus)])
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        assert np.abs(fit(train).embed(corpus) - expected).max() < 2 * HALF


# --- k-means --------------------------------------------------------------------------------------
def lumps(n, seed=0):
    """(n, 6) float32: seven lumps that overlap, so that Lloyd takes a while."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(7, 6))
    return (centres[rng.integers(7, size=n)] + 0.5 * rng.normal(size=(n, 6))).astype(np.float32)


def distances(x, centroids):
    """(N, K) squared, in float64."""
    return np.square(np.float64(x)[:, None] - np.float64(centroids)).sum(2)


def lloyd_step(x, label, k):
    """The labels of the means of the labels, as books have it, and the inertia."""
    apart = distances(x, np.stack([x[label == j].mean(0, np.float64) for j in range(k)]))
    return apart.argmin(1), apart.min(1).sum()


def is_fixed_point(seed, **options):
    """On points of a line, from a start at one of its ends, from where it takes many steps."""
    x = np.sort(np.random.default_rng(seed).random((150, 1)), 0).astype(np.float32)
    label = kmeans(x, 4, start=torch.from_numpy(x[:4]), iters=1000, **options)[1].numpy()
    return np.array_equal(lloyd_step(x, label, 4)[0], label)


def test_kmeans_stops_at_a_fixed_point_of_lloyd():
    assert all(is_fixed_point(seed) for seed in range(10))
    assert not all(is_fixed_point(seed, tol=1e-2) for seed in range(10))


@pytest.mark.parametrize("seed, shift", [(0, 0), (1, 0), (2, 1000)])     # far from the origin, too
def test_each_iteration_is_a_step_of_lloyd_and_lowers_the_inertia(seed, shift):
    x, history = lumps(500, seed) + np.float32(shift), []
    start = x[np.random.default_rng(seed).choice(500, 9, replace=False)]
    kmeans(x, 9, start=torch.from_numpy(start), iters=200, tol=0, history=history)
    label = distances(x, start).argmin(1)
    for before, inertia in zip(history, history[1:]):
        label, expected = lloyd_step(x, label, 9)
        assert inertia <= before * (1 + 1e-6)
        assert inertia == pytest.approx(expected, rel=1e-3 if shift else 1e-5)


@pytest.mark.parametrize("most", [100, 1 << 18])     # of 1500 vectors, and all of them
def test_labels_and_inertia_are_those_of_the_centroids_returned(monkeypatch, most):
    monkeypatch.setattr(labels, "MOST_POINTS", most)
    x, history = lumps(1500), []
    centroids, label, inertia = kmeans(x, 20, iters=3, history=history)
    apart = distances(x, centroids)
    assert (apart[np.arange(1500), label] <= apart.min(1) + 1e-4).all()
    assert inertia == pytest.approx(apart.min(1).sum(), rel=1e-5)
    assert (history[-1] < inertia / 2) == (most < 1500)         # iterated over those alone


def test_the_start_is_drawn_in_proportion_to_the_squared_distance():
    x = np.float32([[0]] * 5000 + [[1], [-3]])       # so the second one is -3 nine times of ten
    drawn = [kmeans(x, 2, seed, iters=0)[0].min() for seed in range(300)]
    assert 0.85 < np.mean([centroid == -3 for centroid in drawn]) < 0.95
    rng, blob = np.random.default_rng(0), np.arange(600) % 9        # each of 9 far blobs gets one
    blobs = 10 * rng.normal(size=(9, 8))[blob] + 0.01 * rng.normal(size=(600, 8))
    label = kmeans(blobs.astype(np.float32), 9, iters=0)[1]
    assert len(set(zip(blob.tolist(), label.tolist()))) == 9


def test_an_empty_label_takes_the_farthest_point_if_none_sits_there():
    x = lumps(300)
    start = x[[0, 0, 1]]                             # the second gets nothing
    centroids, _, _ = kmeans(x, 3, start=torch.from_numpy(start), iters=1)
    assert np.array_equal(centroids[1], x[distances(x, start).min(1).argmax()])
    x = x[:5][np.arange(200) % 5]                    # five points, many times
    centroids, label, inertia = kmeans(x, 8)
    assert len(label.unique()) == 5 and inertia < 1e-4 and centroids.isfinite().all()
    with pytest.raises(ValueError, match=r"\An_labels=201 .* 200 .*\Z"):
        kmeans(x, 201)


# --- what the labels mean -------------------------------------------------------------------------
def draw_labelled(seed, k, order):
    """One-token sentences; a share `order` of the labels count up, the rest are drawn."""
    rng = np.random.default_rng(seed)
    opens = np.append(0, np.cumsum(rng.integers(1, 15, 60)))
    drawn = rng.choice(k, opens[-1], p=rng.dirichlet(np.ones(k)))
    drawn = np.where(rng.random(opens[-1]) < order, np.arange(opens[-1]) % k, drawn)
    return data.Corpus(np.zeros(opens[-1], int), np.arange(opens[-1] + 1), opens, labels=drawn)


def naive_bigram(pairs, k, weight):
    """Log probabilities from (the label before, label); the last row's without the one before."""
    frequency = [(sum(b == label for _, b in pairs) + 1) / (len(pairs) + k) for label in range(k)]
    rows = [[(pairs.count((a, b)) + weight * frequency[b])
             / (sum(before == a for before, _ in pairs) + weight) for b in range(k)]
            for a in range(k + 1)]
    return np.log([*rows, frequency])


@pytest.mark.parametrize("seed, order", [(0, 0.9), (1, 0)])
def test_the_bigram_is_the_one_that_is_counted_one_by_one(seed, order):
    corpus, k = draw_labelled(seed, 6, order), 7     # one label does not occur
    before = np.append(k, corpus.labels[:-1])
    before[corpus.documents[:-1]] = k                # at the start of a document
    expected = naive_bigram(list(zip(before.tolist(), corpus.labels.tolist())), k, 128)
    assert np.abs(labels.label_bigram(corpus, k).numpy() - expected).max() < 1e-6


def test_descriptions_name_the_topics_of_a_made_corpus():
    topics = [["tide", "reef", "gull", "salt"], ["loaf", "yeast", "oven", "flour"]]
    rng = np.random.default_rng(0)
    texts = [" ".join(["the", *rng.permutation(topics[j]), f"and the fooBar {i // 10}. "])
             for i, j in enumerate(rng.integers(2, size=100))]
    texts[:40] = [text.replace("gull", "gull zebra") for text in texts[:40]]     # of one document
    documents = [texts[:40], *(texts[i:i + 10] for i in range(40, 100, 10))]
    corpus = data.Corpus.from_texts(["".join(document) for document in documents], TOKENIZER)
    texts = [data.EOT, *(text for document in documents for text in [*document, data.EOT])]
    corpus.labels = np.array(["oven" in text for text in texts]).astype(int)
    labeler = fit(corpus, 3)
    corpus.vectors = labeler.embed(corpus)
    means = [corpus.vectors[corpus.labels == j].mean(0) for j in (0, 1, 1)]
    labeler.centroids = torch.from_numpy(np.float32(means))
    found = labels.describe(labeler, corpus, TOKENIZER)
    assert [d["size"] for d in found] == [*np.bincount(corpus.labels), 0]
    for j in (0, 1):
        assert set(found[j]["words"][:4]) == set(topics[j])          # and not "the", "and"
        assert not {"zebra", "foobar"} & set(found[j]["words"])
        assert set(found[j]["sentences"]) < {t.strip() for t in texts if ("oven" in t) == j}
        assert len({text.split()[-1] for text in found[j]["sentences"]}) == 2       # documents
    assert found[2] == {"size": 0, "words": [], "sentences": []}
