"""Text into causal sentences, windows for training, the tokenizer, corpora and files.

Three decisions shape this file:
- Whether a sentence ends at a byte depends on the bytes before it, never on those after it. A
  splitter that looks ahead would tell the model, through the moment at which the plan changes,
  what the next token will be.
- Our tokenizer glues a space to the word before it ("end. " + "Next "), so a sentence boundary
  falls between two tokens. GPT-2's glues it to the word after, which then falls into the old
  sentence.
- A corpus is a stream `<|endoftext|> document <|endoftext|> document <|endoftext|> ...`. Its tokens
  alone say where sentences and documents start.
"""
import ast
import contextlib
import functools
import gc
import hashlib
import heapq
import itertools
import json
import pickle
import re
import tempfile
import warnings
from array import array
from collections import Counter, defaultdict
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

EOT = "<|endoftext|>"
SPLITS = ("train", "val", "test")
PARTS = ("tokens", "sentences", "documents")    # of a Corpus, each in a file of its own


class InputError(Exception):
    """A user error. The command line prints it as one line and exits with code 2."""


@contextlib.contextmanager
def as_input_error(message, *errors):
    """Turn errors of these types into an InputError: the message, then the reason, in one line."""
    try:
        yield
    except errors as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{message} ({reason:.200})")


# --- sentences ------------------------------------------------------------------------------------
MIN_BYTES = 24          # a sentence is at least this long, unless it is the last of its document
SOFT_BYTES = 240        # from this length on, any space or full-width stop ends it
HARD_BYTES = 320        # at this length it ends after the next whole character
# Each alternative ends at the byte that it consumes and looks only backwards, so the leftmost match
# is also the first boundary, whatever follows. In order: a space after a stop; the same with a
# closing quote or bracket in between; the end of a line shorter than 60 bytes (a heading, a list
# item, a line of code: prose is wrapped later than that); a full-width stop.
STOP = re.compile(
    rb"""[ \n](?<=[.!?].)"""
    rb"""|[ \n](?<=[.!?]["')\]`*].)"""
    rb"""|\n(?<![^\n]{60}\n)"""
    rb"""|\xe3\x80\x82|\xef\xbc[\x81\x9f]""",
    re.DOTALL,
)
SPACE = re.compile(rb"[ \n]|\xe3\x80\x82|\xef\xbc[\x81\x9f]")
# One whole UTF-8 character. A stray byte is not one, so the sentence goes on past it.
CHARACTER = re.compile(
    rb"[\x00-\x7f]|[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}"
)


def boundaries(text):
    """Yield the byte offset just after each finished sentence of a document.

    boundaries(text[:n]) are the offsets of boundaries(text) up to n. The end of the input is not a
    boundary.
    """
    start = 0
    while True:
        match = (
            STOP.search(text, start + MIN_BYTES - 1, start + SOFT_BYTES)
            or SPACE.search(text, start + SOFT_BYTES, start + HARD_BYTES)
            or CHARACTER.search(text, start + HARD_BYTES - 1)
        )
        if match is None:
            return
        start = match.end()
        yield start


def segment(text):
    """Cut text into sentences, causally and without loss: ''.join(segment(text)) == text."""
    raw = text.encode()
    cuts = [0, *boundaries(raw), len(raw)]
    return [raw[a:b].decode() for a, b in itertools.pairwise(cuts) if a < b]


def sentence_ends(tokens, tokenizer):
    """tokens (T,) -> bool (T,): whether a sentence ends with each token.

    It never looks ahead: sentence_ends(tokens[:n]) == sentence_ends(tokens)[:n].
    """
    ends = tokens == tokenizer.eot_token
    start = 0
    for stop in [*np.flatnonzero(ends), len(tokens)]:
        pieces = tokenizer.decode_tokens_bytes(tokens[start:stop].tolist())
        cuts = list(boundaries(b"".join(pieces)))
        # A sentence ends with the token that contains the last byte before the boundary.
        piece_ends = np.cumsum([len(piece) for piece in pieces])
        ends[start + np.searchsorted(piece_ends, cuts)] = True
        start = stop + 1
    return ends


@dataclass
class Corpus:
    """A stream of N tokens, cut into n finished sentences and d documents."""
    tokens: np.ndarray                      # (N,) <|endoftext|> first, then after each document
    sentences: np.ndarray                   # (n+1,) first token of each; the last one is unfinished
    documents: np.ndarray                   # (d,) first sentence of each
    vectors: np.ndarray = None              # (n, E) float16, once stage labels is done
    labels: np.ndarray = None               # (n,) likewise

    @classmethod
    def from_tokens(cls, tokens, tokenizer):
        """Find sentences and documents in a stream of tokens (N,), without looking ahead."""
        ends = np.flatnonzero(sentence_ends(tokens, tokenizer))
        # <|endoftext|> belongs to the document that it ends, so the next one starts after it.
        document_ends = np.flatnonzero(tokens[ends] == tokenizer.eot_token)
        return cls(tokens, np.append(0, ends + 1), np.append(0, document_ends + 1))

    @classmethod
    def from_texts(cls, texts, tokenizer):
        """The stream of these documents: `<|endoftext|>`, then each document followed by one."""
        # An array takes two bytes a token; a list would take twenty times as much.
        tokens = array("H", [tokenizer.eot_token])
        for text in texts:
            tokens.extend(tokenizer.encode_ordinary(text))
            tokens.append(tokenizer.eot_token)
        return cls.from_tokens(np.asarray(tokens), tokenizer)

    @property
    def n_sentences(self):
        """The number of finished sentences."""
        return len(self.sentences) - 1

    def sentence_of(self, positions):
        """The sentence that contains each token position; any shape."""
        return np.searchsorted(self.sentences, positions, side="right") - 1

    def opening_of(self, sentences, n_tokens=None):
        """The first sentence of the document that contains each sentence; any shape.

        With n_tokens, the first that lies wholly within that many tokens before the sentence.
        """
        document = np.searchsorted(self.documents, sentences, side="right") - 1
        opening = self.documents[document]
        if n_tokens is not None:
            edge = self.sentences[sentences] - n_tokens
            opening = np.maximum(opening, np.searchsorted(self.sentences, edge))
        return opening


# --- batches --------------------------------------------------------------------------------------
@dataclass
class Batch:
    """B windows of T tokens; for each, the P sentences that the planner reads.

    The last S of the P slots hold the sentences that the targets touch, which need a plan.
    """
    tokens: torch.Tensor = None                     # (B, T)
    targets: torch.Tensor = None                    # (B, T) the next token; -1 past the end
    sentence_id: torch.Tensor = None                # (B, T) in 0..S-1: the sentence of the target
    vectors: torch.Tensor = None                    # (B, P, E) float16; empty slots hold any vector
    opening: torch.Tensor = None                    # (B, P) the first slot that each may see
    labels: torch.Tensor = None                     # (B, S) -1: not touched, or unfinished
    previous: torch.Tensor = None                   # (B, S) the label before; -1: out of view

    def to(self, device):
        """The same batch on a device."""
        moved = {}
        for name, x in vars(self).items():
            if x is not None:
                if device.type == "cuda":
                    # A copy from pinned memory doesn't wait for the GPU.
                    x = x.pin_memory()
                moved[name] = x.to(device, non_blocking=True)
        return Batch(**moved)

    def mark_dynamic(self):
        """Tell torch.compile that P and S vary, so that it compiles once for all of them."""
        for x in (self.vectors, self.opening, self.labels, self.previous):
            if x is not None:
                torch._dynamo.maybe_mark_dynamic(x, 1)


def round_up(n, multiple):
    """The smallest multiple of `multiple` that is not below n."""
    return -(-n // multiple) * multiple


def window_batch(corpus, starts, block_size, reach=0, view_tokens=None):
    """The windows of T = block_size tokens that start at `starts` (B,), as a Batch.

    For each window:
      1. Cut out tokens and targets.
      2. Find the sentence of each target. The sentences from the first to the last of them are
         touched by this window; they need a plan.
      3. The planner reads these and up to `reach` sentences before them; for each sentence that it
         plans, only those of its own document. With view_tokens, it reads only those that lie
         wholly within that many tokens before the sentence.
      4. Put them into P slots, the last one into the last slot (see _fill_slots).

    A window that touches sentences 7 to 9, whose document opened with sentence 4, at reach = 2
    (S = 4, P = 8):

        slot         0   1   2   3   4   5   6   7
        sentence     -   -   -   5   6   7   8   9
        opening      3   3   3   3   3   3   3   3
        labels                      -1  l7  l8  l9
        sentence_id                      1   2   3
    """
    positions = starts[:, None] + np.arange(block_size + 1)                 # (B, T+1)
    tokens = corpus.tokens.take(positions, mode="clip").astype(np.int64)
    targets = np.where(positions < len(corpus.tokens), tokens, -1)
    batch = Batch(torch.from_numpy(tokens[:, :-1]), torch.from_numpy(targets[:, 1:]))
    if corpus.labels is None:
        # No labels yet: stage lm trains without plans.
        return batch
    # Position t predicts token t+1, so it gets the plan of the sentence that contains token t+1.
    sentence = corpus.sentence_of(positions[:, 1:])                         # (B, T)
    return _fill_slots(batch, corpus, sentence, reach, view_tokens)


def sentence_batch(corpus, starts, width, view_tokens=None):
    """Spans of `width` consecutive sentences from `starts` (B,), to train the planner alone."""
    sentence = starts[:, None] + np.arange(width)                           # (B, width)
    return _fill_slots(Batch(), corpus, sentence, 0, view_tokens)


def _fill_slots(batch, corpus, sentence, reach, view_tokens):
    """Add the slots to a batch that touches these sentences, and return it.

    sentence (B, N) ascends along each row. The slots also hold up to `reach` sentences before the
    first one. A slot's `opening` is that of its sentence (see Corpus.opening_of), but not before
    the first slot that is filled.
    """
    touched = sentence[:, :1]                                               # (B, 1) the first one
    last = sentence[:, -1:]                                                 # (B, 1)
    earliest = np.maximum(corpus.opening_of(touched, view_tokens), touched - reach)
    # Multiples of 4 keep the number of different shapes small.
    S = round_up((last - touched).max() + 1, 4)
    P = S + round_up((touched - earliest).max(), 4)
    index = last + np.arange(1 - P, 1)                                      # (B, P)
    opening = np.maximum(corpus.opening_of(index.clip(0), view_tokens), earliest)
    # Sentence 0 stands in where there is no finished one; the planner never reads it there.
    finished = (index >= earliest) & (index < corpus.n_sentences)
    known = np.where(finished, index, 0)
    labels = np.where(finished, corpus.labels[known], -1)                   # (B, P)
    previous = np.where(index <= opening, -1, np.roll(labels, 1, axis=1))
    # There is no label loss on sentences that are only context.
    labels[index < touched] = -1
    batch.sentence_id = torch.from_numpy(sentence - last + S - 1)
    batch.opening = torch.tensor(opening - index[:, :1])
    # Copies: torch.compile would compile once more for views.
    batch.labels = torch.tensor(labels[:, -S:])
    batch.previous = torch.tensor(previous[:, -S:])
    batch.vectors = torch.from_numpy(corpus.vectors[known])                 # (B, P, E)
    return batch


def batch_starts(length, width, rows, seed, step):
    """(rows,) where the windows of a step start; a function of (seed, step) alone.

    Each epoch visits disjoint windows once, in an order and with an offset of its own. Raises
    InputError if no window fits.
    """
    # One window fewer than fits, to leave room for the offset.
    n = length // width - 1
    if n < 1:
        raise InputError(f"a window of {width} is too long for a training split of {length}: lower "
                         "block_size (or planner_reach), or give more text")
    rows = range(step * rows, (step + 1) * rows)
    return np.array([_epoch(seed, row // n, n, width)[row % n] for row in rows])


@functools.lru_cache(maxsize=4)
def _epoch(seed, epoch, n, width):
    """(n,) the starts of one epoch; cached, because all of its steps ask for it."""
    random = np.random.default_rng((*seed, epoch))
    return random.integers(width) + width * random.permutation(n)


# --- tokenizer ------------------------------------------------------------------------------------
# A word, a number or a run of punctuation, with the space after it; a newline with the indentation
# of the next line. Plain character ranges mean the same to Python's re and to tiktoken's.
PATTERN = (
    r"[A-Za-z\u0080-\U0010FFFF]{1,40} ?"
    r"|[0-9]{1,3} ?"
    r"|\n{1,8} {0,40}"
    r"| {1,40}"
    r"|[^A-Za-z0-9\u0080-\U0010FFFF \n]{1,16} ?"
)


def train_bpe(texts, vocab_size):
    """Byte-level BPE: the token -> rank table that tiktoken needs.

    Merges the most frequent pair of neighbours again and again, until there are vocab_size - 1
    tokens (one id is left for `<|endoftext|>`) or no pair occurs twice. Of equally frequent pairs
    the first in byte order wins. Source: Sennrich et al., arXiv 1508.07909.
    """
    counts = Counter()
    for text in texts:
        counts.update(re.findall(PATTERN, text))
    words = {word: [bytes([b]) for b in word.encode()] for word in counts}
    # A pair is identified by its concatenation. `places` says which words may contain it.
    pairs = Counter()
    places = defaultdict(set)
    changed = set()

    def count(word, sign):
        """Add the pairs of a word to `pairs`, or take them away."""
        for a, b in itertools.pairwise(words[word]):
            pairs[a + b] += sign * counts[word]
            places[a + b].add(word)
            changed.add(a + b)

    for word in words:
        count(word, 1)
    ranks = {bytes([b]): b for b in range(256)}
    heap = []
    while len(ranks) < vocab_size - 1:
        # Push each changed pair once per merge; once per word would be three times as slow.
        for pair in changed:
            heapq.heappush(heap, (-pairs[pair], pair))
        changed.clear()
        if not heap:
            break
        negative_count, pair = heapq.heappop(heap)
        is_stale = -negative_count != pairs[pair]
        if is_stale or pairs[pair] < 2 or pair in ranks:
            continue
        ranks[pair] = len(ranks)
        for word in places.pop(pair):
            count(word, -1)
            _merge(words[word], pair)
            count(word, 1)
    return ranks


def _merge(word, pair):
    """Join the neighbours that make up `pair`, in place, from the left: in "aaa", the first two."""
    for i in range(len(word)):
        if b"".join(word[i : i + 2]) == pair:
            word[i : i + 2] = [pair]


def bpe_tokenizer(ranks, pattern=PATTERN):
    """A tiktoken.Encoding from the result of `train_bpe`."""
    return tiktoken.Encoding(
        "nanoplan", pat_str=pattern, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)}
    )


def save_tokenizer(path, tokenizer):
    """Write what `load_tokenizer` reads: the pattern of words, and the tokens in hex, by rank."""
    tokens = tokenizer.decode_tokens_bytes(range(tokenizer.eot_token))
    hex_tokens = [token.hex() for token in tokens]
    write_json(path, {"pattern": tokenizer._pat_str, "tokens": hex_tokens})


def load_tokenizer(path):
    """Read the file of `save_tokenizer`."""
    saved = read_json(path)
    ranks = {bytes.fromhex(token): rank for rank, token in enumerate(saved["tokens"])}
    return bpe_tokenizer(ranks, saved["pattern"])


# --- prepared corpora -----------------------------------------------------------------------------
@dataclass
class Store:
    """A prepared corpus on disk."""
    path: Path
    tokenizer: tiktoken.Encoding
    fingerprint: str                        # a hash of the tokens

    def split(self, name):
        """One split. Its arrays stay on disk, as memory maps."""
        return Corpus(*[
            np.load(self.path / f"{name}.{part}.npy", mmap_mode="r")
            for part in PARTS
        ])


def prepare(name, tokenizer, vocab_size, cache_dir):
    """Tokenize a corpus into cache_dir, or open it if that was done before.

    name: `docstrings` or a path; tokenizer: `bpe` or `gpt2`. Reads one document at a time. Raises
    InputError if the text can't be read or a split ends up empty.
    """
    if name == "docstrings":
        sources = [metadata.version(package) for package in DOCSTRING_PACKAGES]
    else:
        sources = [
            f"{file.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns}"
            for file in corpus_files(name)
        ]
    # The folder's name changes with the sources, the tokenizer and this file.
    identity = str([sources, tokenizer, vocab_size, Path(__file__).read_text("utf-8")])
    path = cache_dir / f"{Path(name).name}-{_hash(identity):x}"
    if not path.exists():
        make_folder(cache_dir)
        # A private folder, so that runs that prepare the same corpus at once don't collide.
        with tempfile.TemporaryDirectory(dir=cache_dir) as folder:
            working = Path(folder) / "store"
            working.mkdir()
            _write_store(working, name, tokenizer, vocab_size)
            # If another run was faster, use its store.
            with contextlib.suppress(OSError):
                working.rename(path)
    fingerprint = (path / "fingerprint").read_text()
    return Store(path, load_tokenizer(path / "tokenizer.json"), fingerprint)


def _write_store(path, name, tokenizer, vocab_size):
    """Write the tokenizer, the arrays of each split and the fingerprint."""
    if tokenizer == "gpt2":
        # tiktoken downloads it once.
        encoding = tiktoken.get_encoding("gpt2")
    else:
        # 20,000 documents are enough to train on.
        training = itertools.islice(_texts(name, "train"), 20_000)
        encoding = bpe_tokenizer(train_bpe(training, vocab_size))
    save_tokenizer(path / "tokenizer.json", encoding)
    fingerprint = hashlib.sha256()
    for split in SPLITS:
        # Reading the whole corpus again for each split takes less time than tokenizing it.
        texts = tqdm(_texts(name, split), f"tokenize {split}", unit=" documents", leave=False)
        corpus = Corpus.from_texts(texts, encoding)
        # The opening <|endoftext|> counts as a sentence.
        if corpus.n_sentences < 3:
            raise InputError(f"{name} has fewer than two sentences for {split}: give more text")
        for part in PARTS:
            np.save(path / f"{split}.{part}.npy", getattr(corpus, part))
        fingerprint.update(corpus.tokens)
    (path / "fingerprint").write_text(fingerprint.hexdigest()[:16])


def _texts(name, split):
    """The non-blank documents of one split."""
    return (text for place, text in documents(name) if place == split and text.strip())


# --- corpora --------------------------------------------------------------------------------------
DOCSTRING_PACKAGES = ("torch", "sympy", "networkx", "numpy")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
FOLDS = [*18 * ["train"], "val", "test"]    # 90/5/5, by a number modulo 20


def documents(name):
    """Yield (split, text) for each document of a corpus, 90/5/5.

    A hash of its text decides where a document goes, so that copies share a split. Fewer than 200
    documents could leave a split empty: then each is cut in three, and a part of it may be blank.
    Raises InputError if the corpus can't be read.
    """
    if name == "docstrings":
        yield from _docstrings()
        return
    files = corpus_files(name)
    n_documents = sum(1 for path in files for _ in read_documents(path))
    for path in files:
        for text in read_documents(path):
            if n_documents >= 200:
                yield FOLDS[_hash(text) % 20], text
            else:
                a = int(0.9 * len(text))
                b = int(0.95 * len(text))
                yield "train", text[:a]
                yield "val", text[a:b]
                yield "test", text[b:]


def _hash(text):
    """A 64-bit hash, the same in every process."""
    return int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16)


@functools.cache
def _docstrings():
    """(split, text) of each source file of the packages: its docstrings of 200 characters or more.

    Sources are parsed, never imported. Duplicates of earlier docstrings are dropped. Cached,
    because `prepare` reads a corpus four times.
    """
    seen = set()
    found = []
    # The garbage collector would take two thirds of the time and find nothing.
    gc.disable()
    # Old sources contain invalid escapes.
    warnings.simplefilter("ignore", SyntaxWarning)
    for package in DOCSTRING_PACKAGES:
        root = Path(util.find_spec(package).submodule_search_locations[0])
        for path in tqdm(sorted(root.rglob("*.py")), f"read {package}", leave=False):
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):
                # A template, or the syntax of another Python.
                continue
            texts = []
            for text in _docstrings_below(tree):
                if len(text) >= 200 and text not in seen:
                    seen.add(text)
                    texts.append(text)
            if texts:
                split = FOLDS[_hash(path.relative_to(root.parent).as_posix()) % 20]
                found.append((split, "\n\n".join(texts)))
    gc.enable()
    return sorted(found, key=lambda document: _hash(document[1]))


def _docstrings_below(node):
    """Yield the docstrings of a syntax tree in source order."""
    if isinstance(node, DOCUMENTED):
        yield ast.get_docstring(node) or ""
    for child in ast.iter_child_nodes(node):
        # Expressions contain no docstrings, and are most of the tree.
        if not isinstance(child, ast.expr):
            yield from _docstrings_below(child)


def corpus_files(name):
    """The file at a path, or the .txt and .jsonl files of a folder. Raises InputError if none."""
    path = Path(name)
    if path.is_file():
        return [path]
    files = sorted([*path.rglob("*.txt"), *path.rglob("*.jsonl")])
    if not files:
        raise InputError(f"data={name}: no such file, and no folder with .txt or .jsonl files")
    return files


def read_documents(path):
    """Yield the non-blank documents of a file.

    A .jsonl file has one {"text": ...} on each line; in any other file a line `<|endoftext|>`
    separates documents. Raises InputError if it can't be read.
    """
    read = _read_jsonl if path.suffix == ".jsonl" else _read_text
    with as_input_error(
        f"{path} is not valid UTF-8 (convert it first), or can't be read",
        OSError, UnicodeDecodeError
    ):
        # utf-8-sig drops a byte order mark.
        with open(path, encoding="utf-8-sig") as lines:
            yield from filter(str.strip, read(lines))


def _read_text(lines):
    """Yield the groups of lines between lines `<|endoftext|>`."""
    for separates, group in itertools.groupby(lines, lambda line: line.strip() == EOT):
        if not separates:
            yield "".join(group)


def _read_jsonl(lines):
    """Yield the "text" of each line. Raises InputError if one has none."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        with as_input_error(
            f'{lines.name}:{number} is not a JSON object with a string "text"',
            ValueError, TypeError, KeyError, AttributeError, RecursionError
        ):
            text = json.loads(line)["text"]
            # A lone surrogate such as \ud800 is valid JSON but not text.
            text.encode()
        yield text


# --- files ----------------------------------------------------------------------------------------
@contextlib.contextmanager
def replacing(path):
    """Write to a temporary file, then rename it, so that a crash never leaves half a file."""
    working = path.with_name(path.name + ".tmp")
    yield working
    working.replace(path)


def make_folder(path):
    """Create a folder where there is none. Raises InputError if that is not possible."""
    with as_input_error(f"the folder {path} can't be created", OSError):
        path.mkdir(parents=True, exist_ok=True)


def write_json(path, content):
    """Write a JSON file, whole or not at all."""
    with replacing(path) as working:
        working.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def read_json(path):
    """Read a JSON file. Raises InputError if there is none or it is not JSON."""
    with as_input_error(
        f"{path} can't be read: {path.parent} should be the out_dir of a run of train.py",
        OSError, ValueError
    ):
        return json.loads(path.read_text("utf-8"))


def read_checkpoint(path):
    """Read a checkpoint without running code from it. Raises InputError if torch can't read it."""
    with as_input_error(
        f"torch can't read {path}: if it is truncated, move it away; train that stage again",
        OSError, RuntimeError, EOFError, pickle.UnpicklingError
    ):
        return torch.load(path, map_location="cpu", weights_only=True)


def load_weights(module, path):
    """Load a module's weights from a checkpoint, and return the rest of it.

    Raises InputError if they don't fit.
    """
    checkpoint = read_checkpoint(path)
    with as_input_error(
        f"{path} does not fit the model: if you changed the code, use another out_dir",
        RuntimeError
    ):
        module.load_state_dict(checkpoint.pop("model"))
    return checkpoint
