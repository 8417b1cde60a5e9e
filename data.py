"""Causal sentences, batches, tokenizer, the store on disk, corpora (step 1 of the method).

Three decisions shape this file.
- A sentence boundary is a function of the bytes before it, never of those after it. A splitter that
  looks ahead tells the model, by the moment at which the plan changes, what the next token will be.
- Our tokenizer glues a space to the word *before* it ("end. " + "Next "): a boundary falls between
  two tokens. GPT-2's glues it to the word after, which then closes the old sentence.
- A corpus is a stream `<|endoftext|> document <|endoftext|> document <|endoftext|> ...`; its tokens
  alone say where sentences and documents start (`Corpus.from_tokens`).
"""
import ast
import contextlib
import functools
import gc
import hashlib
import heapq
import itertools
import json
import re
import warnings
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

EOT = "<|endoftext|>"
SPLITS = ("train", "val", "test")
MIN_BYTES = 24                          # at least, but for a document's last sentence
SOFT_BYTES = 240                        # from here on, any space ends it
HARD_BYTES = 320                        # here it ends, behind a whole character
# Each alternative ends at the byte that it consumes and looks only backwards, so the leftmost match
# is also the first boundary, whatever follows. In order: a space after a stop; the same with a
# closing quote or bracket between; the end of a line shorter than 60 bytes (a heading, list item,
# doctest or verse, for lines wrapped at a margin are longer); a full-width stop.
STOP = re.compile(rb"""[ \n](?<=[.!?].)|[ \n](?<=[.!?]["')\]`*].)|\n(?<![^\n]{60}\n)"""
                  rb"""|\xe3\x80\x82|\xef\xbc[\x81\x9f]""", re.DOTALL)
SPACE = re.compile(rb"[ \n]|\xe3\x80\x82|\xef\xbc[\x81\x9f]")
CHARACTER = re.compile(rb"[\x00-\x7f]|[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}"
                       rb"|[\xf0-\xf4][\x80-\xbf]{3}")         # a stray byte is none, and waits


def boundaries(text: bytes) -> list[int]:
    """Byte offsets just after each finished sentence of a document; text[:n] gives those <= n."""
    ends, start = [], 0
    while match := (STOP.search(text, start + MIN_BYTES - 1, start + SOFT_BYTES)
                    or SPACE.search(text, start + SOFT_BYTES, start + HARD_BYTES)
                    or CHARACTER.search(text, start + HARD_BYTES - 1)):     # never half of one
        start = match.end()
        ends.append(start)
    return ends                         # the end of the input is not a boundary


def segment(text: str) -> list[str]:
    """Cuts text into sentences, causally and without loss: ''.join(segment(text)) == text."""
    raw = text.encode()
    cuts = [0, *boundaries(raw), len(raw)]
    return [raw[a:b].decode() for a, b in itertools.pairwise(cuts) if a < b]


def sentence_ends(tokens: np.ndarray, tokenizer: tiktoken.Encoding) -> np.ndarray:
    """tokens (T,) -> bool (T,): whether a sentence ends in each, as in `<|endoftext|>`. It never
    looks ahead: sentence_ends(tokens[:n]) == sentence_ends(tokens)[:n]."""
    every_token = tokenizer.decode_tokens_bytes(range(tokenizer.n_vocab))
    sizes = np.array([len(token) for token in every_token])                 # (V,) in bytes
    ends = np.asarray(tokens) == tokenizer.eot_token                        # (T,)
    start = 0
    for stop in [*np.flatnonzero(ends).tolist(), len(tokens)]:
        document = tokens[start:stop]
        cuts = boundaries(tokenizer.decode_bytes(document.tolist()))        # in bytes
        ends[start + np.searchsorted(sizes[document].cumsum(), cuts)] = True    # holds the last one
        start = stop + 1                # behind <|endoftext|>
    return ends


@dataclass
class Corpus:
    """A stream of N tokens in n finished sentences and d documents."""
    tokens: np.ndarray                      # (N,) <|endoftext|> first, then after each document
    sentences: np.ndarray                   # (n+1,) where each starts; the last is not finished
    documents: np.ndarray                   # (d,) where each starts, in sentences
    vectors: np.ndarray | None = None       # (n, E) of the finished sentences; None before step 2
    labels: np.ndarray | None = None        # (n,) the same

    @classmethod
    def from_tokens(cls, tokens: np.ndarray, tokenizer: tiktoken.Encoding) -> "Corpus":
        """Step 1: the structure of any stream, from its tokens alone; none of it looks ahead."""
        ends = np.flatnonzero(sentence_ends(tokens, tokenizer))             # (n,)
        # <|endoftext|> belongs to the document that it ends: the next one starts behind it.
        closed = np.flatnonzero(tokens[ends] == tokenizer.eot_token)        # (d-1,)
        return cls(tokens, np.append(0, ends + 1), np.append(0, closed + 1))

    @classmethod
    def from_texts(cls, texts: Iterable[str], tokenizer: tiktoken.Encoding) -> "Corpus":
        """`<|endoftext|>`, then each document with one behind it."""
        eot = [tokenizer.eot_token]
        parts = [tokenizer.encode_ordinary(text) + eot for text in texts]
        return cls.from_tokens(np.concatenate([eot, *parts]), tokenizer)    # (N,)

    @property
    def n_sentences(self) -> int:
        return len(self.sentences) - 1      # finished ones


# --- batches --------------------------------------------------------------------------------------
@dataclass
class Batch:
    """Windows of tokens; for each, the P sentences that the planner may read. The last S are those
    that the targets touch or, where these are fewer, some before. README: "A worked example"."""
    tokens: torch.Tensor                            # (B, T)
    targets: torch.Tensor                           # (B, T) the next token, -1 beyond the end
    sentence_id: torch.Tensor | None = None         # (B, T) in 0..S-1, of the target
    vectors: torch.Tensor | None = None             # (B, P, E)
    first: torch.Tensor | None = None               # (B, P) whether the view starts anew there
    labels: torch.Tensor | None = None              # (B, S) -1: not touched, or not finished
    previous: torch.Tensor | None = None            # (B, S) of the sentence before; -1: not in view

    def to(self, device: torch.device) -> "Batch":
        present = {name: x for name, x in vars(self).items() if x is not None}
        if device.type == "cuda":                   # from pinned memory, the copy does not wait
            present = {name: x.pin_memory() for name, x in present.items()}
        return Batch(**{name: x.to(device, non_blocking=True) for name, x in present.items()})


def window_batch(corpus: Corpus, starts: np.ndarray, width: int, reach: int = 0,
                 view: str = "document") -> Batch:
    """The windows of T = width inputs from each of `starts` (B,). The planner reads at most `reach`
    sentences of the document before those touched; with view="window", only those wholly within."""
    at = starts[:, None] + np.arange(width + 1)                             # (B, T+1)
    inside = at < len(corpus.tokens)
    tokens = corpus.tokens[np.where(inside, at, 0)].astype(np.int64)
    arrays = {"tokens": tokens[:, :-1], "targets": np.where(inside, tokens, -1)[:, 1:]}
    if corpus.vectors is None:
        return _batch(**arrays)             # nobody plans before step 2
    # Position t predicts token t+1, so it gets the plan of the sentence that holds token t+1.
    sentence = np.searchsorted(corpus.sentences, at[:, 1:], side="right") - 1           # (B, T)
    touched, last = sentence[:, :1], sentence[:, -1:]                       # (B, 1)
    own = np.searchsorted(corpus.documents, touched, side="right") - 1      # (B, 1) document
    context = reach if view == "document" else 0
    earliest = np.maximum(corpus.documents[own], touched - context)         # (B, 1) in view
    # Few different shapes: each new one costs memory, and time where the model is compiled.
    S = 8 * -(-np.max(last - touched + 1) // 8)
    P = 8 * -(-max(S, np.max(last - earliest + 1)) // 8)
    index = last + np.arange(1 - P, 1)      # (B, P) the sentence in each slot, the last one last
    in_view = index >= earliest
    finished = in_view & (index < corpus.n_sentences)       # an unfinished one has no vector
    known = np.where(finished, index, 0)                    # any valid index: it is masked below
    document = np.searchsorted(corpus.documents, index, side="right")       # (B, P)
    first = ~in_view | (index == earliest) | (np.diff(document, axis=1, prepend=-1) > 0)
    if view == "window":                    # the one before holds tokens that the GPT can't see
        first |= corpus.sentences[np.maximum(index - 1, 0)] < starts[:, None]
    labels = np.where(finished, corpus.labels[known], -1)                   # (B, P)
    before = np.where(first, -1, np.roll(labels, 1, axis=1))
    vectors = np.where(finished[..., None], corpus.vectors[known], 0).astype("f4")      # (B, P, E)
    labels = np.where(index < touched, -1, labels)          # there is no loss on mere context
    return _batch(**arrays, sentence_id=sentence - last + S - 1, vectors=vectors, first=first,
                  labels=labels[:, -S:], previous=before[:, -S:])


def sentence_batch(corpus: Corpus, starts: np.ndarray, width: int) -> Batch:
    """P = S = width sentences in a row from each of `starts` (B,), to train the planner alone."""
    index = starts[:, None] + np.arange(width)                              # (B, S)
    document = np.searchsorted(corpus.documents, index, side="right")       # (B, S)
    first = np.diff(document, axis=1, prepend=-1) > 0       # in slot 0 too: left of it is nothing
    none = np.zeros((len(starts), 0), np.int64)                             # (B, 0) no tokens
    return _batch(tokens=none, targets=none, first=first,
                  vectors=corpus.vectors[index].astype("f4"), labels=corpus.labels[index])


def _batch(**arrays: np.ndarray) -> Batch:
    return Batch(**{name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in arrays.items()})


def batch_starts(length: int, width: int, rows: int, seed: tuple, step: int) -> np.ndarray:
    """(rows,) where a step's windows start, from (seed, step) alone: each epoch visits the disjoint
    windows once, in a new order and with a new offset. Raises ValueError where none fits."""
    n = (length - width) // width           # one window less, for the offset
    if n < 1:
        raise ValueError(f"a window of {width} is too long for a training split of {length}: "
                         "lower block_size (or planner_reach), or give more text")
    epoch, place = np.divmod(np.arange(step * rows, (step + 1) * rows), n)  # (rows,), (rows,)
    return np.array([_epoch(seed, e, n, width)[p] for e, p in zip(epoch.tolist(), place)])


@functools.lru_cache(maxsize=4)             # the same for all steps of an epoch
def _epoch(seed: tuple, epoch: int, n: int, width: int) -> np.ndarray:
    random = np.random.default_rng((*seed, epoch))
    return random.integers(width) + width * random.permutation(n)           # (n,)


# --- tokenizer ------------------------------------------------------------------------------------
# A word, number or run of signs with the space after it; a line end with the next line's
# indentation. Plain character ranges mean the same to Python's re and to tiktoken's; bounds keep
# the longest piece short.
PATTERN = (r"[A-Za-z\u0080-\U0010FFFF]{1,40} ?|[0-9]{1,3} ?|\n{1,8} {0,40}| {1,40}"
           r"|[^A-Za-z0-9\u0080-\U0010FFFF \n]{1,16} ?")


def train_bpe(texts: Iterable[str], vocab_size: int) -> dict[bytes, int]:
    """Byte-level BPE: merges the most frequent pair of neighbours until there are vocab_size - 1
    tokens (one id is left for `<|endoftext|>`), or no pair occurs twice. Returns token -> rank.
    Source: Sennrich et al., arXiv 1508.07909."""
    counts = Counter()
    for text in texts:
        counts.update(re.findall(PATTERN, text))
    words = [([bytes([b]) for b in word.encode()], n) for word, n in counts.items()]
    pairs = Counter()                       # a pair, known by its concatenation -> its frequency
    words_with = defaultdict(set)           # the same -> indices of the words that contain it
    for i, (word, n) in enumerate(words):
        for a, b in itertools.pairwise(word):
            pairs[a + b] += n
            words_with[a + b].add(i)
    heap = sorted((-n, pair) for pair, n in pairs.items())  # of equals, the first in bytes wins
    ranks = {bytes([b]): b for b in range(256)}             # any text can be encoded
    while heap and len(ranks) < vocab_size - 1:
        n, token = heapq.heappop(heap)
        if -n != pairs[token] or -n < 2 or token in ranks:
            continue                        # out of date, too rare, or there already
        ranks[token] = len(ranks)
        changed = set()
        for i in words_with.pop(token):     # the other words stay as they are
            word, n = words[i]
            merged = word[:1]
            for piece in word[1:]:          # from the left: in "aaa", the first "aa"
                merged.append(piece)
                if merged[-2] + piece == token:
                    merged[-2:] = [token]
            words[i] = merged, n
            for sign, pieces in ((-n, word), (n, merged)):
                for a, b in itertools.pairwise(pieces):
                    pairs[a + b] += sign
                    words_with[a + b].add(i)
                    changed.add(a + b)
        for pair in changed:                # once each; once a word is three times as slow
            heapq.heappush(heap, (-pairs[pair], pair))
    return ranks


def bpe_tokenizer(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    """A tiktoken.Encoding from the result of `train_bpe`."""
    return tiktoken.Encoding("nanoplan", pat_str=PATTERN, mergeable_ranks=ranks,
                             special_tokens={EOT: len(ranks)})


def save_tokenizer(path: Path, tokenizer: tiktoken.Encoding) -> None:
    """Writes what `load_tokenizer` reads: the name gpt2, or our tokens in hex, by rank."""
    ids = range(0 if tokenizer.name == "gpt2" else tokenizer.eot_token)
    tokens = [tokenizer.decode_single_token_bytes(t).hex() for t in ids]
    write_json(path, {"name": tokenizer.name, "tokens": tokens})


def load_tokenizer(path: Path) -> tiktoken.Encoding:
    """Reads the file of `save_tokenizer`. Raises ValueError where it is damaged."""
    saved = read_json(path, "name", "tokens")
    if saved["name"] == "gpt2":
        return tiktoken.get_encoding("gpt2")            # downloaded once
    return bpe_tokenizer({bytes.fromhex(t): rank for rank, t in enumerate(saved["tokens"])})


# --- the store on disk ----------------------------------------------------------------------------
@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` when that is done: a write that fails, or
    a process that is killed, leaves what was there. Raises OSError where the disk is full."""
    working = path.with_name(path.name + ".tmp")
    try:
        yield working
        working.replace(path)
    except (OSError, RuntimeError) as error:            # torch reports a full disk as the latter
        working.unlink(missing_ok=True)
        raise OSError(f"could not write {path} ({str(error).splitlines()[0]}): what was saved "
                      "before is intact; make room and run again (train.py: --resume)") from None


def write_json(path: Path, content: dict) -> None:
    """Writes all of it or, where the disk is full, nothing: OSError."""
    with replacing(path) as working:
        working.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def read_json(path: Path, *keys: str) -> dict:
    """A JSON object that has these keys. Raises ValueError where it is damaged."""
    try:
        content = json.loads(path.read_text("utf-8"))
        for key in keys:
            content[key]                                # a KeyError, or a list's TypeError
        return content
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path} is damaged: delete {path.parent} and run again") from None


@dataclass
class Store:
    """A prepared corpus on disk."""
    path: Path
    tokenizer: tiktoken.Encoding
    fingerprint: str                        # a hash of the tokens
    bytes: dict[str, int]                   # of text, in each split

    def split(self, name: str) -> Corpus:
        """One split, its tokens as a memory map. Raises ValueError where a file is cut short."""
        file = self.path / f"{name}.tokens"
        try:
            with np.load(file.with_suffix(".npz")) as arrays:
                tokens = np.memmap(file, np.uint16, "r", 0, int(arrays["sentences"][-1]))
                return Corpus(tokens, arrays["sentences"], arrays["documents"])
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{file} is damaged ({error}): delete {self.path}") from None


def prepare(name: str, tokenizer: str, vocab_size: int, cache_dir: Path) -> Store:
    """Tokenizes a corpus, or opens it where that was done before, with the same sources, tokenizer
    and data.py. It reads one document at a time. Raises ValueError where a split stays empty."""
    sources = [metadata.version(package) for package in DOCSTRING_PACKAGES]
    if name != "docstrings":
        files = [(path.resolve(), path.stat()) for path in corpus_files(name, cache_dir)]
        sources = [f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in files]
    identity = json.dumps([sources, tokenizer, vocab_size, Path(__file__).read_text("utf-8")])
    key = hashlib.sha256(identity.encode()).hexdigest()[:12]
    path = cache_dir / f"{Path(name).name}-{key}"
    if not path.exists():
        working = path.with_name(path.name + ".tmp")
        working.mkdir(parents=True, exist_ok=True)      # one killed left files: all are made anew
        if tokenizer == "gpt2":
            encoding = tiktoken.get_encoding("gpt2")
        else:                               # from 20,000 documents; a second pass tokenizes all
            training = (text for split, text in documents(name, cache_dir) if split == "train")
            encoding = bpe_tokenizer(train_bpe(itertools.islice(training, 20_000), vocab_size))
        save_tokenizer(working / "tokenizer.json", encoding)
        _write_splits(working, name, cache_dir, encoding)
        working.rename(path)                            # only now is it there, and whole
    meta = read_json(path / "meta.json", "fingerprint", "bytes")
    return Store(path, load_tokenizer(path / "tokenizer.json"), **meta)


def _write_splits(path: Path, name: str, cache_dir: Path, tokenizer: tiktoken.Encoding) -> None:
    fingerprint, n_bytes = hashlib.sha256(), dict.fromkeys(SPLITS, 0)
    with contextlib.ExitStack() as stack:
        files = {s: stack.enter_context(open(path / f"{s}.tokens", "wb")) for s in SPLITS}
        opening = [(split, "") for split in SPLITS]     # a split begins with <|endoftext|>
        texts = itertools.chain(opening, documents(name, cache_dir))
        for split, text in tqdm(texts, desc="tokenize", unit=" documents", leave=False):
            tokens = [*tokenizer.encode_ordinary(text), tokenizer.eot_token]
            files[split].write(np.array(tokens, np.uint16).tobytes())       # 65,536 ids at most
            n_bytes[split] += len(text.encode())
    for split in SPLITS:                    # step 1: sentences and documents of all tokens
        corpus = Corpus.from_tokens(np.fromfile(path / f"{split}.tokens", np.uint16), tokenizer)
        if corpus.n_sentences < 3:                      # <|endoftext|>, and two
            raise ValueError(f"{name} has fewer than two sentences for {split}: give more text")
        np.savez(path / f"{split}.npz", sentences=corpus.sentences, documents=corpus.documents)
        fingerprint.update(corpus.tokens)
    write_json(path / "meta.json", {"fingerprint": fingerprint.hexdigest()[:16], "bytes": n_bytes})


# --- corpora --------------------------------------------------------------------------------------
DOCSTRING_PACKAGES = ("torch", "sympy", "networkx", "numpy")
STORY = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-"
WIKITEXT = "https://wikitext.smerity.com/wikitext-103-raw-v1.zip"
DOWNLOADS = {                               # name -> [(address, sha256)]
    "tinystories": [
        (STORY + "train.txt", "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443"),
        (STORY + "valid.txt", "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d")],
    "wikitext103": [(WIKITEXT, "91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794")],
}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
FOLDS = [*18 * ["train"], "val", "test"]    # 90/5/5, by a number modulo 20


def documents(name: str, cache_dir: Path) -> Iterator[tuple[str, str]]:
    """Yields (split, text) for each document, that is not blank, of a corpus: `docstrings`, a name
    in DOWNLOADS, or a path. Raises FileNotFoundError or ValueError for one that can't be read."""
    if name == "docstrings":
        yield from _docstrings()
    elif name == "wikitext103":
        archive = zipfile.ZipFile(*corpus_files(name, cache_dir))
        for split, part in zip(SPLITS, ("train", "valid", "test")):
            text = archive.read(f"wikitext-103-raw/wiki.{part}.raw").decode()
            for article in re.split(r"(?m)^(?= = [^=].* = $)", text)[1:]:   # " = Title = " opens
                yield split, article
    else:
        parts = _split_files(corpus_files(name, cache_dir))
        yield from ((split, text) for split, text in parts if text.strip())


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


@functools.lru_cache(maxsize=1)             # `prepare` reads a corpus twice; this takes 15 s
def _docstrings() -> list[tuple[str, str]]:
    """A document for each source file of the packages in requirements.txt: its docstrings of 200
    characters or more that no file before it has. Sources are parsed, nothing is imported."""
    seen, found = set(), []
    gc.disable()                            # it would take two thirds of the time, for no cycle
    warnings.simplefilter("ignore", SyntaxWarning)      # old sources hold invalid escapes
    for package in DOCSTRING_PACKAGES:
        root = Path(util.find_spec(package).submodule_search_locations[0])
        for path in tqdm(sorted(root.rglob("*.py")), f"read {package}", leave=False):
            split = FOLDS[_hash(path.relative_to(root.parent).as_posix()) % 20]
            nodes, texts = [], {}                       # line -> docstring
            with contextlib.suppress(SyntaxError, ValueError):  # templates, newer Pythons' syntax
                nodes = [ast.parse(path.read_bytes())]
            for node in nodes:              # grows; ast.walk goes into expressions, too: slow
                nodes += [x for x in ast.iter_child_nodes(node) if not isinstance(x, ast.expr)]
                text = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
                if text and len(text) >= 200:
                    texts[node.body[0].lineno] = text
            texts = dict.fromkeys(texts[line] for line in sorted(texts) if texts[line] not in seen)
            seen.update(texts)              # without copies: of other files', or of its own
            if texts:
                found.append((split, "\n\n".join(texts)))
    gc.enable()
    return sorted(found, key=lambda document: _hash(document[1]))


def corpus_files(name: str, cache_dir: Path) -> list[Path]:
    """The files of a name in DOWNLOADS, the file at a path, or a folder's .txt and .jsonl files."""
    if name in DOWNLOADS:
        return [download(*source, cache_dir) for source in DOWNLOADS[name]]
    if Path(name).is_file():
        return [Path(name)]                 # whatever its suffix
    files = sorted(f for f in Path(name).rglob("*") if f.suffix in (".txt", ".jsonl"))
    if not files:
        raise FileNotFoundError(f"data={name} is neither a text nor a folder with .txt or .jsonl "
                                "files, nor docstrings, tinystories, wikitext103")
    return files


def download(url: str, sha256: str, folder: Path) -> Path:
    """Fetches a file once; it is moved into place when it is whole and its sha256 is right."""
    path = folder / url.rsplit("/", 1)[-1]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if not path.exists():
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
    except (OSError, RuntimeError) as error:            # a wrong hash is a RuntimeError
        raise ValueError(f"download of {url} failed ({error}): run again") from None
    return path


def _split_files(files: list[Path]) -> Iterator[tuple[str, str]]:
    """90/5/5: documents are dealt out in the order of their hashes, so that copies fall on one side
    and no split stays empty; each of fewer than 20 is cut into three."""
    hashes = (_hash(text) for path in files for text in read_documents(path) if text.strip())
    hashes = np.unique(np.fromiter(hashes, np.uint64))      # (n,) sorted: 8 bytes a document
    for text in itertools.chain.from_iterable(map(read_documents, files)):
        if len(hashes) >= 20:
            yield FOLDS[np.searchsorted(hashes, np.uint64(_hash(text))) % 20], text
        else:
            cuts = [0, int(0.9 * len(text)), int(0.95 * len(text)), len(text)]
            yield from zip(SPLITS, (text[a:b] for a, b in itertools.pairwise(cuts)))


def read_documents(path: Path) -> Iterator[str]:
    """The documents of one file: .jsonl has one {"text": ...} a line, in any other file a line
    `<|endoftext|>` separates them. Raises ValueError where it can't be read."""
    number = 0
    try:
        with open(path, encoding="utf-8-sig") as lines:     # a byte order mark is no text
            if path.suffix == ".jsonl":
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield json.loads(line)["text"].encode().decode()    # \ud800 fails
            else:
                groups = itertools.groupby(lines, lambda line: line.strip() == EOT)
                yield from ("".join(group) for separates, group in groups if not separates)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid UTF-8 ({error.reason}): convert it first") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(f'{path}:{number} is not a JSON object with a string "text"') from None
