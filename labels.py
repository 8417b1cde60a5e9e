"""Sentence vectors, k-means, and what the labels mean. Nobody labels anything by hand.

A sentence's vector is the mean of its token embeddings in the GPT of stage lm, weighted by
a / (a + p(token)), which tones down frequent tokens. The mean of all training sentences is
subtracted and the result scaled to unit length. Source: SIF, Arora, Liang and Ma, "A Simple but
Tough-to-Beat Baseline for Sentence Embeddings", ICLR 2017, which removes a principal component
instead of the mean. NOTE(paper): the paper's vectors are those of a pretrained sentence encoder.
"""

import itertools
import math
import re
from collections import Counter

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import EOT

# The constant a; the source found 1e-4 to 1e-3 equally good.
SIF_A = 1e-3
# Sentences embedded at a time.
CHUNK = 4096
# k-means is fitted on at most this many sampled vectors.
MOST_POINTS = 1 << 18


class Labeler(nn.Module):
    """Gives sentences their vectors and labels.

    Self-contained: it holds weighted token embeddings (V, E), the mean (E,) and the centroids
    (K, E), so training the GPT further never changes a label.
    """

    def __init__(self, vocab_size, n_vector, n_labels):
        super().__init__()
        self.register_buffer("table", torch.zeros(vocab_size, n_vector))
        self.register_buffer("mean", torch.zeros(n_vector))
        self.register_buffer("centroids", torch.zeros(n_labels, n_vector))

    def fit_vectors(self, token_emb, corpus):
        """Set table and mean from token embeddings (V or more, E) and the training split."""
        V = len(self.table)
        counts = np.bincount(corpus.tokens, minlength=V)
        shares = counts / len(corpus.tokens)
        p = torch.from_numpy(shares).float()                            # (V,)
        weights = SIF_A / (SIF_A + p)
        self.table = token_emb[:V].float() * weights[:, None]           # (V, E)
        means = torch.cat(list(self._weighted_means(corpus)))           # (n, E)
        self.mean = means.mean(0)                                       # (E,)

    def label(self, corpus):
        """Set the vectors and labels of a corpus's finished sentences, and return it."""
        corpus.vectors = self.embed(corpus)
        labels, _ = nearest(corpus.vectors, self.centroids)
        corpus.labels = labels.cpu().numpy()
        return corpus

    def embed(self, corpus):
        """Vectors (n, E) of a corpus's finished sentences: unit length, half precision."""
        shape = (corpus.n_sentences, len(self.mean))
        vectors = np.empty(shape, np.float16)                           # (n, E)
        done = 0
        for means in self._weighted_means(corpus):
            unit = F.normalize(means - self.mean, dim=1)
            vectors[done : done + len(unit)] = unit.half().cpu()
            done += len(unit)
        return vectors

    def _weighted_means(self, corpus):
        """Yield weighted means of token embeddings (n, E), a few thousand sentences at a time."""
        device = self.table.device
        for i in range(0, corpus.n_sentences, CHUNK):
            starts = corpus.sentences[i : i + CHUNK + 1]
            first, last = starts[0], starts[-1]
            tokens = torch.tensor(
                corpus.tokens[first:last].astype(np.int64),
                device=device,
            )
            offsets = torch.tensor(starts[:-1] - first, device=device)
            yield F.embedding_bag(tokens, self.table, offsets, mode="mean")


# --- k-means --------------------------------------------------------------------------------------
def kmeans(
    x,
    k,
    seed=0,
    max_iters=50,
    tol=1e-4,
    device="cpu",
):
    """Lloyd's algorithm on x (N, E), from k-means++ -> centroids (K, E), labels (N,), inertia.

    The inertia is the sum of squared distances. Stops when an iteration lowers it by less than
    a fraction `tol`. An empty cluster moves to the point that is farthest from its own centroid.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    sample = torch.as_tensor(x)[order[:MOST_POINTS]]
    points = sample.to(device).float()                                  # (n, E)
    n_candidates = max(1 << 14, 8 * k)
    centroids = plus_plus(points[:n_candidates], k, generator)
    inertia = math.inf
    for _ in range(max_iters):
        last_inertia = inertia
        labels, distances = nearest(points, centroids)
        inertia = distances.sum().item()
        if last_inertia - inertia <= tol * inertia:
            break
        counts = torch.bincount(labels, minlength=k)                    # (K,)
        sums = torch.zeros_like(centroids).index_add_(0, labels, points)
        centroids = sums / counts[:, None]
        empty = counts == 0
        farthest = distances.topk(int(empty.sum())).indices
        centroids[empty] = points[farthest]
    # Assign all N points, sampled or not.
    labels, distances = nearest(x, centroids)
    inertia = distances.sum().item()
    return centroids, labels, inertia


def nearest(x, centroids):
    """x (N, E), an array or tensor -> the nearest centroid of each row and its squared distance."""
    on_cpu = centroids.device.type == "cpu"
    # |x - c|^2 = |x|^2 - 2 x.c + |c|^2, a chunk at a time: N x K numbers are never held at once.
    squares = centroids.square().sum(1)                                 # (K,)
    most_scores = 1 << 19 if on_cpu else 1 << 26
    chunk = max(256, most_scores // len(centroids))
    labels = []
    distances = []
    for part in torch.as_tensor(x).split(chunk):
        part = part.to(centroids.device).float()                        # (n, E)
        scores = torch.addmm(squares, part, centroids.T, alpha=-2)      # (n, K)
        if on_cpu:
            # numpy's argmin is several times as fast as torch's on a CPU.
            index = torch.from_numpy(scores.numpy().argmin(1))
        else:
            index = scores.argmin(1)
        lowest = scores.gather(1, index[:, None])[:, 0]                 # (n,)
        labels.append(index)
        squared_norms = part.square().sum(1)                            # (n,)
        distances.append((squared_norms + lowest).clamp(min=0))
    return torch.cat(labels), torch.cat(distances)


def plus_plus(x, k, generator):
    """k-means++ (Arthur and Vassilvitskii, 2007): K rows of x (N, E) to start from.

    Each is drawn in proportion to its squared distance from the nearest one drawn before.
    """
    chosen = []
    new = torch.randint(len(x), (1,), generator=generator).item()
    distances = torch.full_like(x[:, 0], math.inf)                      # (N,)
    for _ in range(k):
        chosen.append(new)
        to_new = (x - x[new]).square().sum(1)
        distances = torch.minimum(distances, to_new)
        # The small number matters only when every point has been chosen.
        weights = distances.double().cpu() + 1e-30
        draw = torch.multinomial(weights, 1, generator=generator)
        new = draw.item()
    return x[chosen]


# --- what the labels mean -------------------------------------------------------------------------
def label_before(corpus, k):
    """int64 (n,): the label of the sentence before each one; K at the start of a document."""
    before = np.append(k, corpus.labels[:-1])
    opens_document = corpus.documents[corpus.documents < len(before)]
    before[opens_document] = k
    return before


def label_bigram(corpus, k):
    """(K+2, K) log probabilities of the next label, which a planner must beat.

    Row i: after label i; row K: at the start of a document; row K+1: by frequency alone. Each of
    the first K+1 rows gets 128 pseudo-counts, spread by label frequency; 128 was the best power of
    two on the validation split of an earlier default.
    """
    pairs = label_before(corpus, k) * k + corpus.labels
    counts = np.bincount(pairs, minlength=(k + 1) * k)
    counts = counts.reshape(k + 1, k)
    frequency = (counts.sum(0) + 1) / (counts.sum() + k)                # (K,)
    row_sums = counts.sum(1, keepdims=True)                             # (K+1, 1)
    bigram = (counts + 128 * frequency) / (row_sums + 128)
    rows = np.vstack([bigram, frequency])
    return torch.from_numpy(np.log(rows))


def describe(labeler, corpus, tokenizer):
    """For each label {"size", "words", "sentences"}, from a sample of the training sentences.

    size: how many sentences have the label. words: the six that are most over-represented, by the
    share of the label's sentences that contain the word minus that share among all sentences.
    sentences: the two nearest to the centroid.
    """
    centroids = labeler.centroids.cpu().numpy()
    step = 1 + corpus.n_sentences // 60_000
    sample = np.arange(0, corpus.n_sentences, step)
    own_centroids = centroids[corpus.labels[sample]]                    # (n, E)
    distances = np.square(corpus.vectors[sample] - own_centroids).sum(1)
    # The nearest to their centroid first.
    sample = sample[distances.argsort()]
    texts = []
    words = []
    for j in sample:
        start, end = corpus.sentences[j : j + 2]
        tokens = corpus.tokens[start:end].tolist()
        text = tokenizer.decode(tokens)
        text = text.replace(EOT, "")
        texts.append(" ".join(text.split()))
        # Words of three letters or more, but no identifiers such as fooBar or foo_bar.
        found = re.findall(r"\b[^\W\d_][^\W\d_A-Z]{2,}\b", text)
        words.append({word.lower() for word in found})
    everywhere = Counter(itertools.chain.from_iterable(words))

    descriptions = []
    sizes = np.bincount(corpus.labels, minlength=len(centroids))
    for label, size in enumerate(sizes):
        members = np.flatnonzero(corpus.labels[sample] == label)
        within = Counter(itertools.chain.from_iterable(words[i] for i in members))
        excess = {}
        for word, n in within.items():
            share_everywhere = everywhere[word] / len(sample)
            excess[word] = n / len(members) - share_everywhere
        top_words = sorted(excess, key=lambda word: (-excess[word], word))
        # Each text once; a sentence may be nothing but <|endoftext|>.
        nearest_texts = dict.fromkeys(texts[i] for i in members if texts[i])
        descriptions.append(
            {
                "size": int(size),
                "words": top_words[:6],
                "sentences": list(nearest_texts)[:2],
            }
        )
    return descriptions
