"""Labels: a vector depends on its own sentence alone, and k-means is Lloyd's algorithm."""
import itertools

import numpy as np
import pytest
import torch

import labels
from data import Corpus, bpe_tokenizer
from labels import Labeler, kmeans, plus_plus

TOKENIZER = bpe_tokenizer({bytes([b]): b for b in range(256)})


def draw_corpus(seed):
    """400 tokens, some of them rare, in one document; its last sentence is unfinished."""
    rng = np.random.default_rng(seed)
    tokens = rng.geometric(0.1, size=400)
    sentences = np.unique([0, *rng.integers(400, size=40)])
    return Corpus(tokens, sentences, [0])


def test_a_vector_is_its_tokens_weighted_mean_less_the_training_mean(monkeypatch):
    def naive_means(corpus):
        bounds = itertools.pairwise(corpus.sentences)
        return np.stack([table[corpus.tokens[a:b]].mean(0) for a, b in bounds])

    # Sentences are embedded in several chunks.
    monkeypatch.setattr(labels, "CHUNK", 7)
    train = draw_corpus(0)
    token_emb = np.random.default_rng(0).normal(size=(200, 16))
    p = np.bincount(train.tokens, minlength=200) / 400
    weights = 1e-3 / (1e-3 + p)
    table = token_emb * weights[:, None]
    labeler = Labeler(200, 16, 1)
    labeler.fit_vectors(torch.from_numpy(token_emb), train)
    # Another corpus gets the weights and the mean of the training split.
    for corpus in (train, draw_corpus(1)):
        expected = naive_means(corpus) - naive_means(train).mean(0)
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        # Vectors have half precision.
        assert np.allclose(labeler.embed(corpus), expected, atol=1e-3)


# --- k-means --------------------------------------------------------------------------------------
def draw_points(n):
    return np.random.default_rng(0).normal(size=(n, 6)).astype(np.float32)


def squared_distances(x, centroids):
    """(N, K), in float64."""
    return np.square(np.float64(x)[:, None] - np.float64(centroids)).sum(2)


def test_kmeans_takes_the_steps_of_lloyd_from_its_start(monkeypatch):
    x = draw_points(500)
    centroids = x[:9]
    monkeypatch.setattr(labels, "plus_plus", lambda *_: torch.from_numpy(x[:9]))
    for n in range(30):
        found, label, inertia = kmeans(x, 9, max_iters=n, tol=0)
        assert np.allclose(found, centroids, atol=1e-5)
        distances = squared_distances(x, centroids)
        assert np.array_equal(label, distances.argmin(1))
        assert inertia == pytest.approx(distances.min(1).sum(), rel=1e-5)
        centroids = np.stack([x[label == j].mean(0, np.float64) for j in range(9)])
    # With a higher tolerance, k-means stops earlier, but not at once.
    _, _, early = kmeans(x, 9, tol=0.01)
    assert inertia < early < 1.1 * inertia


def test_labels_are_the_nearest_of_centroids_that_were_fitted_on_a_sample(monkeypatch):
    monkeypatch.setattr(labels, "MOST_POINTS", 100)
    # 30,000 points are labelled in two chunks.
    x = draw_points(30_000)
    centroids, label, inertia = kmeans(x, 20, max_iters=3)
    distances = squared_distances(x, centroids)
    nearest = distances.min(1)
    assert (distances[np.arange(len(x)), label] <= nearest + 1e-4).all()
    assert inertia == pytest.approx(nearest.sum(), rel=1e-5)


def test_the_start_is_drawn_in_proportion_to_the_squared_distance():
    # After a 0, the point at -3 is drawn nine times out of ten. A third draw must find the last.
    x = torch.tensor([[0.0]] * 5000 + [[1.0], [-3.0]])
    generator = torch.Generator().manual_seed(0)
    drawn = [plus_plus(x, 3, generator).flatten().tolist() for _ in range(300)]
    assert 0.85 < drawn.count([0, -3, 1]) / 300 < 0.95


def test_an_empty_label_moves_to_the_farthest_point(monkeypatch):
    x = draw_points(300)
    start = x[[0, 0, 1]]
    monkeypatch.setattr(labels, "plus_plus", lambda *_: torch.from_numpy(start))
    centroids, _, _ = kmeans(x, 3, max_iters=1)
    assert np.array_equal(centroids[1], x[squared_distances(x, start).min(1).argmax()])


def test_more_labels_than_distinct_points():
    x = draw_points(5)[np.arange(200) % 5]
    _, _, inertia = kmeans(x, 8)
    assert inertia < 1e-3


# --- what the labels mean -------------------------------------------------------------------------
def test_the_bigram_is_the_one_that_is_counted_one_by_one():
    # Label 6 does not occur. Row 7 stands for the start of a document.
    k = 7
    opens = np.array([0, 1, 20, 100, 300])
    drawn = np.random.default_rng(0).integers(6, size=300)
    corpus = Corpus([], [], opens, labels=drawn)
    counts = np.zeros((k + 1, k))
    for j, label in enumerate(drawn):
        before = k if j in opens else drawn[j - 1]
        counts[before, label] += 1
    frequency = (counts.sum(0) + 1) / (300 + k)
    expected = (counts + 128 * frequency) / (counts.sum(1, keepdims=True) + 128)
    found = labels.label_bigram(corpus, k).exp().numpy()
    assert np.allclose(found, [*expected, frequency])


def test_a_description_has_the_words_and_the_nearest_sentences_of_its_label():
    # Each sentence occurs twice.
    topics = ["tide reef gull salt", "loaf yeast oven flour"]
    texts = [f"The {topics[i % 2]} and the fooBar {i // 4}." for i in range(100)]
    corpus = Corpus.from_texts([" ".join(texts)], TOKENIZER)
    # The opening <|endoftext|> is a sentence without text, nearest to the centroid of label 0.
    corpus.labels = np.array([0, *np.arange(100) % 2])
    corpus.vectors = np.array([0, *range(100, 0, -1)])[:, None]
    labeler = Labeler(TOKENIZER.n_vocab, 1, 3)
    labeler.centroids[1] = 100
    assert labels.describe(labeler, corpus, TOKENIZER) == [
        {"size": 51, "words": ["gull", "reef", "salt", "tide", "and", "the"],
         "sentences": [texts[98], texts[94]]},
        {"size": 50, "words": ["flour", "loaf", "oven", "yeast", "and", "the"],
         "sentences": [texts[1], texts[5]]},
        {"size": 0, "words": [], "sentences": []},
    ]
