"""Sentence vectors, k-means, and what the labels mean (DESIGN step 2).
Nobody labels anything by hand.

A sentence's vector depends on its own tokens alone, so that a label is a function of its
sentence. Two kinds, both from the stage-1 GPT, which stays fixed afterwards (the measured
comparison is in the README):
- `sif`: its token embeddings, averaged with weights a / (a + p(token)), which tone down
  frequent tokens (Arora, Liang and Ma, "A Simple but Tough-to-Beat Baseline for Sentence
  Embeddings", ICLR 2017);
- `hidden`: the mean of its final hidden states over the sentence, read alone.
Of either, the training split's mean is removed, and the length is made 1. (SIF's last step, to take
out the first principal component as well, changed nothing here, and ruins a corpus of few topics.)
NOTE(paper): the paper takes its vectors from a pretrained sentence encoder.
"""
import hashlib
import io
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data import Corpus, replacing

SIF_A = 1e-3
CHUNK = 4096                                         # sentences embedded at a time
MINI_BATCH_ABOVE = 1 << 18                           # k-means: vectors
VECTORS = ("sif", "hidden")                          # what --vectors can be


# --- vectors --------------------------------------------------------------------------------------

class Labeler(nn.Module):
    """Embeds sentences and names their labels.
    Holds all that it needs, so it outlives the stage-1 GPT.

    table (V, E): `sif`'s weighted token embeddings, or None where `gpt` gives hidden states
    mean (E,): removed from each vector; centroids (K, E)
    """

    def __init__(self, table: torch.Tensor | None, gpt: nn.Module | None, mean: torch.Tensor,
                 centroids: torch.Tensor | None = None):
        super().__init__()
        self.gpt = gpt
        for name, value in (("table", table), ("mean", mean), ("centroids", centroids)):
            self.register_buffer(name, value)

    def raw(self, tokens: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """tokens (n,), offsets (s,) where each sentence starts in them
        -> (s, E), before normalisation."""
        if self.table is not None:
            return F.embedding_bag(tokens, self.table, offsets, mode="mean")
        ends = torch.cat([offsets[1:], offsets.new_tensor([len(tokens)])])
        # a longer sentence gives its beginning
        sizes = (ends - offsets).clamp(max=self.gpt.block_size)
        order, found = sizes.argsort(), []
        for rows in order.split(256):                # of similar length, so that little is padding
            at = torch.arange(int(sizes[rows].max()), device=tokens.device)
            inside = at < sizes[rows, None]                                             # (s, T)
            index = torch.where(inside, offsets[rows, None] + at, 0)
            states = self.gpt.hidden(tokens[index]).float() * inside[..., None]
            found.append(states.sum(1) / sizes[rows, None])
        return torch.cat(found)[order.argsort()]

    @torch.no_grad()
    def embed(self, tokens: np.ndarray, offsets: np.ndarray) -> torch.Tensor:
        """Sentences as in `raw`, none of them empty -> (s, E) of unit length, in half precision's
        values, so that a vector read back from the store is the same as one made anew."""
        device = self.mean.device
        x = self.raw(torch.as_tensor(np.asarray(tokens, np.int64), device=device),
                     torch.as_tensor(np.asarray(offsets, np.int64), device=device)).to(self.mean)
        return F.normalize(x - self.mean, dim=1).half().float()

    def assign(self, vectors: torch.Tensor) -> torch.Tensor:
        """(n, E) -> (n,) the nearest centroid of each."""
        return _nearest_of(self.centroids)(vectors)[0]

    def fingerprint(self) -> str:
        """A hash of everything that the vectors depend on."""
        return digest({name: value for name, value in self.state_dict().items()
                       if name != "centroids"})


def digest(state: dict[str, torch.Tensor]) -> str:
    """A hash of a module's content."""
    found = hashlib.sha256()
    for value in state.values():
        found.update(value.cpu().numpy().tobytes())
    return found.hexdigest()[:12]


def fit_vectors(kind: str, gpt: nn.Module, corpus: Corpus, vocab_size: int) -> Labeler:
    """A Labeler without centroids, its statistics from the training split: token counts from all
    of it, the mean from 50,000 to 100,000 of its sentences, where it has so many."""
    table = None
    device = gpt.wte.weight.device
    if kind == "sif":
        counts = np.zeros(vocab_size)
        for i in range(0, len(corpus.tokens), 1 << 22):
            counts += np.bincount(corpus.tokens[i:i + (1 << 22)], minlength=vocab_size)
        p = torch.tensor(counts / counts.sum(), dtype=torch.float32, device=device)
        table = gpt.wte.weight.detach()[:vocab_size].float() * (SIF_A / (SIF_A + p))[:, None]
    width = gpt.wte.weight.shape[1]
    labeler = Labeler(table, None if kind == "sif" else gpt, torch.zeros(width, device=device))
    with torch.no_grad():
        chunks = range(0, corpus.n_sentences, CHUNK)
        chunks = chunks[::max(1, len(chunks) * CHUNK // 50_000)]
        sample = torch.cat([labeler.raw(*_sentences(corpus, i, device)) for i in chunks]).cpu()
        labeler.mean = sample.double().mean(0).float().to(device)
    return labeler


def _sentences(corpus: Corpus, i: int, device=None):
    """Tokens and offsets of the chunk of sentences from i on."""
    offsets = np.asarray(corpus.sentences[i:min(i + CHUNK, corpus.n_sentences) + 1])
    tokens = corpus.tokens[offsets[0]:offsets[-1]].astype(np.int64)
    offsets = offsets[:-1] - offsets[0]
    return (tokens, offsets) if device is None else (
        torch.as_tensor(tokens, device=device), torch.as_tensor(offsets, device=device))


def embed_corpus(labeler: Labeler, corpus: Corpus, path: Path | None = None) -> np.ndarray:
    """The vectors (n, E) of a corpus's finished sentences in half precision: in memory, or as a
    memory map under `path`, written once, with a digest behind it; and again where damaged."""
    shape = corpus.n_sentences, len(labeler.mean)
    chunks = range(0, corpus.n_sentences, CHUNK)
    embed = lambda i: labeler.embed(*_sentences(corpus, i)).cpu().numpy().astype(np.float16)
    if path is None:
        vectors = np.empty(shape, np.float16)
        for i in chunks:
            vectors[i:i + CHUNK] = embed(i)
        return vectors
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": np.dtype(np.float16).str, "fortran_order": False, "shape": shape})
    header = buffer.getvalue()
    if not _whole(path, header, 2 * shape[0] * shape[1]):
        # written, not mapped: a map on a full disk ends the process (SIGBUS)
        with replacing(path) as working, open(working, "wb") as file:
            digest = hashlib.sha256(header)
            file.write(header)
            for i in tqdm(chunks, desc="vectors", leave=False):
                content = embed(i).tobytes()
                digest.update(content)
                file.write(content)
            file.write(digest.digest())
    return np.memmap(path, np.float16, "r", len(header), shape)


def _whole(path: Path, header: bytes, size: int) -> bool:
    """Whether a file is a header, `size` bytes and their digest. As with the store, the digest of
    more than 1 GB is not looked at."""
    if not path.exists() or path.stat().st_size != len(header) + size + 32:
        return False
    content = np.memmap(path, np.uint8, "r")
    return content[:len(header)].tobytes() == header and (
        size > 1 << 30 or hashlib.sha256(content[:-32]).digest() == content[-32:].tobytes())


def label_corpus(labeler: Labeler, vectors: np.ndarray) -> np.ndarray:
    """(n, E) -> int32 (n,) labels."""
    device = labeler.mean.device
    parts = [labeler.assign(_rows(vectors, slice(i, i + (1 << 15)), device)).int().cpu().numpy()
             for i in range(0, len(vectors), 1 << 15)]
    return np.concatenate(parts or [np.zeros(0, np.int32)])


# --- k-means --------------------------------------------------------------------------------------

def _rows(x, index, device) -> torch.Tensor:
    """Rows of an array, memory map or tensor, in float32."""
    rows = x[index] if isinstance(x, torch.Tensor) else torch.from_numpy(
        np.require(x[index], requirements="W"))      # a copy of what is read-only
    return rows.to(device).float()


def _nearest_of(centroids: torch.Tensor):
    """centroids (K, E) -> a function of x (n, E):
    (n,) index of the nearest centroid, and (n,) its squared distance."""
    # |x - c|^2 = |x - m|^2 - 2 x.(c - m) + (c - m).(c + m), whose first term is the same for all c;
    # with m amidst the centroids, nothing is lost far from the origin
    middle = centroids.mean(0)
    c = centroids - middle
    weight, bias = -2 * c, (c * (centroids + middle)).sum(1)
    on_cpu = c.device.type == "cpu"
    onednn = on_cpu and torch.backends.mkldnn.is_available()
    if onednn:       # its product is twice as fast as torch's default on some CPUs
        weight, bias = weight.to_mkldnn(), bias.to_mkldnn()

    def nearest(x):
        scores = F.linear(x.to_mkldnn() if onednn else x, weight, bias).to_dense()      # (n, K)
        # numpy's argmin is several times faster
        label = torch.from_numpy(scores.numpy().argmin(1)) if on_cpu else scores.argmin(1)
        distance = torch.linalg.vector_norm(x - F.embedding(label, centroids), dim=1).square()
        return label, distance
    return nearest


def _plus_plus(x: torch.Tensor, k: int, generator: torch.Generator) -> torch.Tensor:
    """Greedy k-means++ start (Arthur and Vassilvitskii, 2007): of a few points drawn in proportion
    to their squared distance from the centroids so far, the one that lowers the inertia most;
    where all points are taken, any point again."""
    centroids, trials = x.new_empty(k, x.shape[1]), 2 + int(math.log(k))
    distance, square = x.new_full((len(x),), math.inf), x.square().sum(1)
    for j in range(k):
        weights = distance if j and distance.sum() > 0 else torch.ones_like(distance)
        ladder = weights.double().cumsum(0)
        draws = torch.rand(trials, generator=generator, dtype=torch.float64).to(x.device)
        picks = torch.searchsorted(ladder, draws * ladder[-1], right=True).clamp(max=len(x) - 1)
        new = torch.addmm(square[:, None], x, x[picks].T, alpha=-2) + square[picks]   # (n, trials)
        new = torch.minimum(distance[:, None], new.clamp(min=0))
        new[picks, range(trials)] = 0                # exactly, whatever the rounding
        best = int(new.sum(0).argmin())
        centroids[j], distance = x[picks[best]], new[:, best]
    return centroids


def kmeans(x, k: int, seed: int = 0, iters: int = 50, tol: float = 1e-4, device: str = "cpu",
           start: torch.Tensor | None = None, mini_batch: bool | None = None,
           history: list | None = None):
    """k-means of x (N, E), an array, memory map or tensor
    -> centroids (K, E), labels (N,), inertia.

    Full Lloyd up to MINI_BATCH_ABOVE vectors, mini-batch above (or as `mini_batch` says), in
    chunks: N x K is never held whole. Stops when an iteration lowers the inertia (the sum of
    squared distances) by less than `tol` of it; `history` receives each iteration's. Empty clusters
    take the points farthest from their centroids; with fewer distinct points than K the surplus
    stays empty. The labels are those of the centroids returned. Raises ValueError for N < K.
    """
    N, E = x.shape
    if not 1 <= k <= N:
        raise ValueError(f"n_labels={k} must lie between 1 and "
                         f"the {N} sentences of the training split")
    generator = torch.Generator().manual_seed(seed)
    if start is None:
        rows = torch.randperm(N, generator=generator)[:max(1 << 14, 8 * k)].sort().values
        pool = _rows(x, rows.numpy(), device)
        start = _plus_plus(pool, k, generator)
    centroids = start.to(device).float().clone()
    if mini_batch if mini_batch is not None else N > MINI_BATCH_ABOVE:
        centroids = _mini_batch(x, centroids, iters, generator)
        iters = 1
    elif centroids.is_cuda:
        x = _rows(x, slice(None), device)            # once, not in each iteration
    previous = math.inf
    for i in range(iters):
        labels, counts, sums, inertia, distance = _lloyd_pass(x, centroids)
        if history is not None:
            history.append(inertia)
        if i == iters - 1 or previous - inertia <= tol * inertia:
            break
        previous = inertia
        updated = (sums / counts.clamp(min=1)[:, None]).float()
        empty = (counts == 0).nonzero()[:, 0]
        if len(empty):
            far, index = distance.topk(min(len(empty), N))
            index = index[far > 1e-10]               # not a point that a centroid already sits on
            points = _rows(x, index.cpu().numpy(), device)
            updated[empty] = centroids[empty]
            updated[empty[:len(index)]] = points
        centroids = updated
    if n_empty := int((counts == 0).sum()):
        print(f"k-means: {n_empty} of {k} labels stay empty (fewer distinct sentences than labels)")
    return centroids, labels, inertia


def _lloyd_pass(x, centroids):
    """One pass over x: labels (N,), counts (K,), sums (K, E), inertia, squared distances (N,)."""
    (k, E), device = centroids.shape, centroids.device
    counts = torch.zeros(k, dtype=torch.float64, device=device)
    sums = torch.zeros(k, E, dtype=torch.float64, device=device)
    labels, distances = [], []
    nearest = _nearest_of(centroids)
    # on a CPU, a chunk stays in the cache
    size = max(256, (1 << 19 if device.type == "cpu" else 1 << 26) // max(k, E))
    for i in range(0, len(x), size):
        chunk = _rows(x, slice(i, i + size), device)
        label, distance = nearest(chunk)
        counts += torch.bincount(label, minlength=k)
        sums += torch.zeros_like(centroids).index_add_(0, label, chunk)
        labels.append(label)
        distances.append(distance)
    distances = torch.cat(distances)
    return torch.cat(labels), counts, sums, float(distances.sum(dtype=torch.float64)), distances


def _mini_batch(x, centroids, iters: int, generator, size: int = 1 << 14):
    """Mini-batch k-means (Sculley, 2010): each centroid moves to the running mean of the points
    that it was given; one that has got none after a batch takes a point of that batch."""
    counts = torch.zeros(len(centroids), device=centroids.device)
    for _ in range(iters * 4):
        rows = torch.randint(len(x), (size,), generator=generator).sort().values.numpy()
        chunk = _rows(x, rows, centroids.device)
        label, _ = _nearest_of(centroids)(chunk)
        got = torch.bincount(label, minlength=len(centroids))
        sums = torch.zeros_like(centroids).index_add_(0, label, chunk)
        counts += got
        centroids = centroids + (sums - got[:, None] * centroids) / counts.clamp(min=1)[:, None]
        empty = (counts == 0).nonzero()[:, 0]
        picks = torch.randint(size, (len(empty),), generator=generator)
        centroids[empty] = chunk[picks.to(chunk.device)]
    return centroids


# --- what the labels mean -------------------------------------------------------------------------

def _before(labels: np.ndarray, corpus: Corpus, k: int) -> np.ndarray:
    """int64 (n,): the label of the sentence before each, K at the start of a document."""
    before = np.concatenate([[k], labels[:-1]]).astype(np.int64)
    before[corpus.documents[corpus.documents < len(labels)]] = k
    return before


def transitions(labels: np.ndarray, corpus: Corpus, k: int) -> torch.Tensor:
    """int64 (K + 1, K): how often label b follows a within a document;
    row K counts the documents' first."""
    counts = np.bincount(_before(labels, corpus, k) * k + labels, minlength=(k + 1) * k)
    return torch.from_numpy(counts).view(k + 1, k)


def label_frequencies(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Transitions (K + 1, K) -> probabilities of a label, (K,), and of a label after the one
    before it, (K + 1, K)."""
    unigram = (counts.sum(0).double() + 1) / (counts.sum() + counts.shape[1])
    # each context is smoothed towards the unigram with the weight of 16 sentences
    return unigram, (counts.double() + 16 * unigram) / (counts.sum(1, keepdim=True) + 16)


def baselines(counts: torch.Tensor, labels: np.ndarray, corpus: Corpus) -> dict[str, float]:
    """Cross-entropy in nats of the label unigram and of the label bigram, both counted on the
    training split, on the sentences of a corpus: what a planner must beat."""
    k = counts.shape[1]
    unigram, bigram = label_frequencies(counts)
    return {"unigram_ce": -float(unigram[labels].log().mean()),
            "bigram_ce": -float(bigram[_before(labels, corpus, k), labels].log().mean())}


def describe(labeler: Labeler, corpus: Corpus, vectors: np.ndarray, labels: np.ndarray,
             tokenizer: tiktoken.Encoding, limit: int = 60_000) -> list[dict]:
    """For each label {"size", "words", "sentences"}: how many training sentences have it, its most
    characteristic words and its most typical sentences, both among the first `limit` sentences."""
    n, k = min(limit, len(labels)), len(labeler.centroids)
    sizes = np.bincount(labels, minlength=k)
    centroids = labeler.centroids.cpu().numpy()
    near = -np.square(vectors[:n].astype(np.float32) - centroids[labels[:n]]).sum(1)
    everywhere, within = Counter(), [Counter() for _ in range(k)]
    sentences = [[] for _ in range(k)]
    for j in np.lexsort((-near, labels[:n])):        # by label, the most typical first
        tokens = corpus.tokens[corpus.sentences[j]:corpus.sentences[j + 1]].tolist()
        text = tokenizer.decode([t for t in tokens if t != tokenizer.eot_token])
        words = set(re.findall(r"[^\W\d_]{3,}", text.lower()))
        everywhere.update(words)
        within[labels[j]].update(words)
        text = " ".join(text.split())
        if text and len(sentences[labels[j]]) < 3 and text not in sentences[labels[j]]:
            sentences[labels[j]].append(text)

    def characteristic(label):                       # frequent here, and seldom elsewhere
        score = {w: c / (everywhere[w] + 10) * math.log1p(c) for w, c in within[label].items()}
        return sorted(score, key=lambda w: (-score[w], w))[:6]

    return [{"size": int(sizes[j]), "words": characteristic(j), "sentences": sentences[j]}
            for j in range(k)]
