"""Sentence vectors, k-means, and what the labels mean (step 2). Nobody labels anything by hand.

A sentence's vector is the mean of its token embeddings in the GPT of stage lm, weighted by
a / (a + p(token)), which tones down frequent tokens (SIF: Arora, Liang and Ma, "A Simple but
Tough-to-Beat Baseline for Sentence Embeddings", ICLR 2017, which then removes a component, not, as
here, the mean); the length is made 1. NOTE(paper): a pretrained sentence encoder's vectors.
"""
import math
import re
from collections import Counter

import numpy as np
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import Corpus

SIF_A = 1e-3                            # a; the source finds anything from 1e-4 to 1e-3 as good
CHUNK = 4096                            # sentences embedded at a time
MOST_POINTS = 1 << 18                   # k-means iterates over so many drawn vectors at most


class Labeler(nn.Module):
    """Embeds sentences and names their labels. Holds all that it needs, whatever becomes of the
    GPT: weighted token embeddings (V, E), the mean (E,), centroids (K, E)."""

    def __init__(self, vocab_size: int, n_vector: int, n_labels: int):
        super().__init__()
        self.register_buffer("table", torch.zeros(vocab_size, n_vector))    # (V, E)
        self.register_buffer("mean", torch.zeros(n_vector))
        self.register_buffer("centroids", torch.zeros(n_labels, n_vector))

    @torch.no_grad()
    def fit_vectors(self, wte: torch.Tensor, corpus: Corpus) -> None:
        """Sets table and mean from token embeddings (V, E) and the training split's frequencies."""
        V = len(self.table)             # without the rows that only pad the matrix
        p = torch.from_numpy(np.bincount(corpus.tokens, minlength=V) / len(corpus.tokens))
        self.table = wte[:V].float() * (SIF_A / (SIF_A + p.float()))[:, None]           # (V, E)
        self.mean = torch.cat(list(self.weighted_means(corpus))).mean(0)                # (E,)

    def weighted_means(self, corpus: Corpus):
        """Yields (n, E) for some thousand finished sentences at a time."""
        for i in range(0, corpus.n_sentences, CHUNK):
            starts = corpus.sentences[i:min(i + CHUNK, corpus.n_sentences) + 1]         # (n+1,)
            tokens = torch.from_numpy(corpus.tokens[starts[0]:starts[-1]].astype(np.int64))
            offsets = torch.from_numpy(starts[:-1] - starts[0])
            yield F.embedding_bag(tokens.to(self.table.device), self.table,
                                  offsets.to(self.table.device), mode="mean")           # (n, E)

    @torch.no_grad()
    def embed(self, corpus: Corpus) -> np.ndarray:
        """The vectors (n, E) of a corpus's finished sentences: unit length, half precision."""
        parts = [F.normalize(means - self.mean, dim=1).half().cpu()
                 for means in self.weighted_means(corpus)]
        return torch.cat(parts).numpy()     # 2 E bytes a sentence, so all of them stay in memory


# --- k-means --------------------------------------------------------------------------------------
def kmeans(x, k: int, seed: int = 0, iters: int = 50, tol: float = 1e-4,
           device: str | torch.device = "cpu", start: torch.Tensor | None = None,
           history: list | None = None):
    """Lloyd's algorithm on x (N, E), an array or tensor -> centroids (K, E), labels (N,), inertia.
    Starts from k-means++ or from `start` (K, E). Stops when an iteration lowers the inertia (the
    sum of squared distances) by less than `tol` of it; `history` receives each. An empty cluster
    takes the point farthest from its centroid. Raises ValueError for N < K."""
    if not 1 <= k <= len(x):
        raise ValueError(f"n_labels={k} must lie between 1 and the {len(x)} sentences of the "
                         "training split: ask for fewer labels, or give more text")
    generator = torch.Generator().manual_seed(seed)     # no global random state is read
    drawn = torch.randperm(len(x), generator=generator)[:MOST_POINTS]   # unsorted: see `start`
    points = torch.as_tensor(x)[drawn].to(device).float()                   # (n, E)
    if start is None:
        start = plus_plus(points[:max(1 << 14, 8 * k)], k, generator)   # a sample of all the text
    centroids = start.to(device).float()
    history = [] if history is None else history
    for _ in range(iters):
        label, distance, sums = nearest(points, centroids)                  # (n,), (n,), (K, E)
        history.append(float(distance.sum(dtype=torch.float64)))            # the inertia
        if len(history) > 1 and history[-2] - history[-1] <= tol * history[-1]:
            break
        counts = torch.bincount(label, minlength=k)                         # (K,)
        moved = (sums / counts.clamp(min=1)[:, None]).float()               # to the means
        empty = (counts == 0).nonzero()[:, 0]   # their sums are 0, which is no centroid
        moved[empty] = centroids[empty]
        far, index = distance.topk(len(empty))
        index = index[far > 1e-10]              # not a point that a centroid already sits on
        moved[empty[:len(index)]] = points[index]
        centroids = moved
    labels, distance, _ = nearest(x, centroids)     # of all N, drawn or not
    return centroids, labels, float(distance.sum(dtype=torch.float64))


def nearest(x, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (N, E), an array or tensor -> the index of each row's nearest centroid and its squared
    distance, (N,) each, and the sum of each centroid's rows (K, E); N x K is never held whole."""
    # |x - c|^2 = |x - m|^2 - 2 x.(c - m) + (c - m).(c + m), whose first term is the same for all c;
    # with m amidst the centroids, nothing is lost far from the origin.
    middle = centroids.mean(0)
    c = centroids - middle                                                  # (K, E)
    weight, bias = -2 * c, (c * (centroids + middle)).sum(1)                # (K, E), (K,)
    on_cpu = centroids.device.type == "cpu"
    size = max(256, (1 << 19 if on_cpu else 1 << 26) // max(centroids.shape))   # fits the cache
    indices, distances, sums = [], [], torch.zeros_like(centroids)
    for i in range(0, len(x), size):
        part = torch.as_tensor(x[i:i + size]).to(centroids.device).float()              # (n, E)
        scores = F.linear(part, weight, bias)                               # (n, K)
        # numpy's argmin is several times as fast on a CPU
        index = torch.from_numpy(scores.numpy().argmin(1)) if on_cpu else scores.argmin(1)
        away = torch.linalg.vector_norm(part - F.embedding(index, centroids), dim=1)
        sums += torch.zeros_like(sums).index_add_(0, index, part)   # exact enough, chunk by chunk
        indices.append(index)
        distances.append(away.square())
    return torch.cat(indices), torch.cat(distances), sums


def plus_plus(x: torch.Tensor, k: int, generator: torch.Generator) -> torch.Tensor:
    """k-means++ (Arthur and Vassilvitskii, 2007): starts from points (K, E) drawn one by one in
    proportion to their squared distance from those so far; where all are taken, any again."""
    chosen = torch.randint(len(x), (1,), generator=generator).tolist()
    distance = (x - x[chosen]).square().sum(1)                              # (N,)
    while len(chosen) < k:                      # a taken point's distance is 0: not drawn again
        weights = distance.double().cpu() + 1e-30       # but where it is 0 for all, any is
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
        distance = torch.minimum(distance, (x - x[chosen[-1]]).square().sum(1))
    return x[chosen]


# --- what the labels mean -------------------------------------------------------------------------
def label_before(corpus: Corpus, k: int) -> np.ndarray:
    """int64 (n,): the label of the sentence before each, K at the start of a document."""
    before = np.append(k, corpus.labels[:-1])                               # (n,)
    before[corpus.documents[corpus.documents < len(before)]] = k            # nothing came before
    return before


def label_bigram(corpus: Corpus, k: int) -> torch.Tensor:
    """(K + 2, K) log probabilities of a label: after each label, at a document's start, and, in the
    last row, by frequency alone. A planner must beat them. They are smoothed as if 128 more labels
    had come after each, by frequency: the best power of two on the default's validation split."""
    pairs = label_before(corpus, k) * k + corpus.labels     # a number for each (before, label)
    counts = np.bincount(pairs, minlength=(k + 1) * k).reshape(k + 1, k)    # (K+1, K)
    frequency = (counts.sum(0) + 1) / (counts.sum() + k)                    # (K,)
    bigram = (counts + 128 * frequency) / (counts.sum(1, keepdims=True) + 128)
    return torch.from_numpy(np.log(np.concatenate([bigram, frequency[None]])))


def describe(labeler: Labeler, corpus: Corpus, tokenizer: tiktoken.Encoding) -> list[dict]:
    """For each label {"size", "words", "sentences"}: how many sentences have it, its six most
    characteristic words, its two most typical sentences; from 60,000 sentences, evenly spread."""
    centroids, labels = labeler.centroids.cpu().numpy(), corpus.labels
    sample = np.arange(0, len(labels), 1 + len(labels) // 60_000)           # (n,)
    away = corpus.vectors[sample] - centroids[labels[sample]]               # (n, E)
    order = sample[np.square(away).sum(1).argsort()]        # the nearest to its centroid first
    # a word counts once a document (a thousand sentences of it): else one file's identifiers win
    places = np.searchsorted(corpus.documents, order, side="right") + order // 1000  # both grow
    holders, typical = [set() for _ in centroids], [{} for _ in centroids]
    for j, label, place in zip(order, labels[order], places.tolist()):
        tokens = corpus.tokens[corpus.sentences[j]:corpus.sentences[j + 1]]
        text = " ".join(tokenizer.decode(tokens[tokens != tokenizer.eot_token].tolist()).split())
        words = set(re.findall(r"\b[^\W\d_][^\W\d_A-Z]{2,}\b", text))         # not fooBar, foo_bar
        holders[label].update((word.lower(), place) for word in words)
        typical[label].setdefault((len(words) < 2, place), text)    # one a place; fragments last
    everywhere = Counter(word for held in holders for word, _ in held)
    descriptions = []
    for size, held, found in zip(np.bincount(labels, minlength=len(centroids)), holders, typical):
        here = Counter(word for word, _ in held)            # many documents here, few elsewhere
        words = sorted(here, key=lambda w: (-here[w] ** 1.5 / (everywhere[w] + 50), w))[:6]
        texts = dict.fromkeys(found[at] for at in sorted(found, key=lambda at: at[0]) if found[at])
        descriptions.append({"size": int(size), "words": words, "sentences": list(texts)[:2]})
    return descriptions
