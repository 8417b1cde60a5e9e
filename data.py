"""Corpora, causal sentences, the tokenizer, the store on disk, and batches (DESIGN step 1).

Three decisions shape this file.
- A sentence boundary is a function of the bytes before it, never of those after it. A splitter that
  looks ahead tells the model, by the moment at which the plan changes, what the next token will be.
- Our tokenizer glues a space to the word *before* it ("end. " + "Next "), so that the
  boundary after "end. " falls between two tokens. GPT-2's glues it to the word after, which
  then closes the old sentence.
- Nothing here holds a corpus in memory: preparation streams, training reads memory maps.

A stream of tokens is `<|endoftext|> document <|endoftext|> document <|endoftext|> ...`; the
sentence and document structure of any stream follows from its tokens alone (`Corpus.from_tokens`).
"""
import ast
import contextlib
import functools
import gc
import gzip
import hashlib
import heapq
import http.client
import importlib.metadata
import importlib.util
import io
import json
import lzma
import os
import re
import shutil
import urllib.request
import warnings
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

EOT = "<|endoftext|>"
SPLITS = ("train", "val", "test")

# --- sentences ------------------------------------------------------------------------------------

MIN_BYTES, SOFT_BYTES, HARD_BYTES = 24, 240, 320  # of a sentence; from SOFT on, any space will do
# Each alternative ends at the byte that it consumes and looks only backwards, so the leftmost match
# is also the first boundary, whatever follows. In order: a space after a stop; the same with a
# closing quote or bracket between; the end of a line shorter than 60 bytes (a heading, list item,
# doctest or verse, for lines wrapped at a margin are longer); a full-width stop.
STOP = re.compile(rb"""[ \n](?<=[.!?].)|[ \n](?<=[.!?]["')\]`*].)|\n(?<![^\n]{60}\n)"""
                  rb"""|\xe3\x80\x82|\xef\xbc[\x81\x9f]""", re.DOTALL)
SPACE = re.compile(rb"[ \n]|\xe3\x80\x82|\xef\xbc[\x81\x9f]")


def _character_end(data: bytes, position: int) -> int:
    """The first position at or after `position` at which no UTF-8 character is cut in two."""
    for lead in range(position - 1, max(position - 4, -1), -1):
        if data[lead] >= 0xC0:                   # a lead byte says how many bytes its character has
            return max(position, lead + (2 if data[lead] < 0xE0 else 3 if data[lead] < 0xF0 else 4))
        if data[lead] < 0x80:
            break
    return position


def boundaries(data: bytes, start: int = 0) -> list[int]:
    """Byte offsets just after each finished sentence of one document, or each after the one that
    ended at `start`; data[:n] gives those <= n."""
    ends = []
    while start + MIN_BYTES <= len(data):
        soft, hard = start + SOFT_BYTES, start + HARD_BYTES
        match = STOP.search(data, start + MIN_BYTES - 1, soft) or SPACE.search(data, soft, hard)
        if match is None and len(data) < hard:
            break                                    # the end of the input is not a boundary
        start = match.end() if match else _character_end(data, hard)
        if start <= len(data):
            ends.append(start)
    return ends


def segment(text: str) -> list[str]:
    """Cuts text into sentences, causally and without loss: ''.join(segment(text)) == text."""
    data = text.encode()
    cuts = [0, *boundaries(data), len(data)]
    return [data[a:b].decode() for a, b in zip(cuts, cuts[1:]) if a < b]


def sentence_ends(tokens: np.ndarray, tokenizer: tiktoken.Encoding) -> np.ndarray:
    """tokens (T,) -> bool (T,): whether a sentence ends with each token. Causal: a boundary
    belongs to the token that holds its last byte, `<|endoftext|>` always ends one, and the end of
    the input never does."""
    tokens = np.asarray(tokens, dtype=np.int64)
    ends = tokens == tokenizer.eot_token
    start = 0
    for stop in [*np.flatnonzero(ends).tolist(), len(tokens)]:
        document = tokens[start:stop]
        cuts = boundaries(tokenizer.decode_bytes(document.tolist()))
        byte_ends = np.cumsum(token_bytes(tokenizer)[document])
        ends[start + np.searchsorted(byte_ends, cuts)] = True
        start = stop + 1
    return ends


@functools.lru_cache(maxsize=8)
def token_bytes(tokenizer: tiktoken.Encoding) -> np.ndarray:
    """(V,) the number of bytes of each token; 0 for `<|endoftext|>`, which is no text."""
    sizes = [len(tokenizer.decode_single_token_bytes(t)) for t in range(tokenizer.n_vocab)]
    sizes[tokenizer.eot_token] = 0
    return np.array(sizes, dtype=np.int64)


# --- tokenizer ------------------------------------------------------------------------------------

# A word, number or run of signs with the space after it; a line end with the next line's
# indentation. Plain character ranges mean the same to Python's re and to tiktoken's; bounds keep
# the longest piece short.
PATTERN = (r"[A-Za-z\u0080-\U0010FFFF]{1,40} ?|[0-9]{1,3} ?|\n{1,8} {0,40}| {1,40}"
           r"|[^A-Za-z0-9\u0080-\U0010FFFF \n]{1,16} ?")


def train_bpe(texts: Iterable[str], vocab_size: int) -> dict[bytes, int]:
    """Byte-level BPE: merges the most frequent pair of neighbours until there are vocab_size - 1
    tokens (one id is left for `<|endoftext|>`), or no pair occurs twice.
    Returns token -> rank, for tiktoken.

    A pair is identified by its concatenation, as tiktoken does. Each merge touches only the
    words that contain it; stale heap entries are skipped when they surface.
    Source: Sennrich et al., arXiv 1508.07909.
    """
    counts = Counter()
    for text in texts:
        counts.update(re.findall(PATTERN, text))
    words = [([bytes([b]) for b in word.encode()], n) for word, n in counts.items()]
    pairs, where = Counter(), defaultdict(set)   # concatenation -> frequency, -> indices of words
    for i, (word, n) in enumerate(words):
        for a, b in zip(word, word[1:]):
            pairs[a + b] += n
            where[a + b].add(i)
    heap = [(-n, pair) for pair, n in pairs.items()]
    heapq.heapify(heap)
    ranks = {bytes([b]): b for b in range(256)}
    while heap and len(ranks) < vocab_size - 1:
        n, token = heapq.heappop(heap)
        if -n != pairs[token] or -n < 2 or token in ranks:
            continue                                 # out of date, too rare, or a token already
        ranks[token] = len(ranks)
        changed = Counter()
        for i in where.pop(token):
            word, count = words[i]
            merged = _merge(word, token)
            for a, b in zip(word, word[1:]):
                changed[a + b] -= count
            for a, b in zip(merged, merged[1:]):
                changed[a + b] += count
                where[a + b].add(i)
            words[i] = (merged, count)
        for pair, change in changed.items():
            if change:
                pairs[pair] += change
                heapq.heappush(heap, (-pairs[pair], pair))
    return ranks


def _merge(word: list[bytes], token: bytes) -> list[bytes]:
    """The word with each neighbouring pair that makes up the token replaced by it,
    from the left."""
    merged, i = [], 0
    while i < len(word):
        pair = i + 1 < len(word) and word[i] + word[i + 1] == token
        merged.append(token if pair else word[i])
        i += 2 if pair else 1
    return merged


def bpe_tokenizer(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    """A tiktoken.Encoding from the result of `train_bpe`."""
    return tiktoken.Encoding("nanoplan", pat_str=PATTERN, mergeable_ranks=ranks,
                             special_tokens={EOT: len(ranks)})


def encode(tokenizer: tiktoken.Encoding, text: str) -> np.ndarray:
    """The tokens (n,) of a text. Raises ValueError where tiktoken can't cut it into words."""
    try:
        # one by one is faster than tiktoken's batches, which make lists
        return tokenizer.encode_to_numpy(text, disallowed_special=())
    except ValueError as error:                      # GPT-2's pattern, on half a million blanks
        raise ValueError(f"tokenizer={tokenizer.name} fails on a text of {len(text):,} characters "
                         f"({error}): take out its longest run of blanks") from None


def save_tokenizer(path: Path, tokenizer: tiktoken.Encoding) -> None:
    """Writes what `load_tokenizer` reads: the name of a tokenizer of tiktoken's,
    or our ranks as hex."""
    ranks = []
    if tokenizer.name != "gpt2":
        ranks = [tokenizer.decode_single_token_bytes(t).hex() for t in range(tokenizer.n_vocab - 1)]
    saved = {"name": tokenizer.name, "ranks": ranks}
    with replacing(path) as working:
        working.write_text(json.dumps(saved | {"digest": digest_of(saved)}))


def digest_of(content: dict) -> str:
    """Of what a JSON file holds: a flipped bit in a file that is valid all the same is found."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def load_tokenizer(path: Path) -> tiktoken.Encoding:
    """Reads the file of `save_tokenizer`. Raises ValueError where it is damaged."""
    try:
        saved = json.loads(path.read_text())
        digest = saved.pop("digest", None)
        if digest not in (None, digest_of(saved)):   # None: a file of an earlier commit
            raise ValueError("its digest is another")
        if saved["name"] != "gpt2":
            ranks = {bytes.fromhex(token): rank for rank, token in enumerate(saved["ranks"])}
            return bpe_tokenizer(ranks)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): run train.py with --resume where this is "
                         "an out_dir; delete the folder where it is a prepared corpus") from None
    return gpt2_tokenizer()


def gpt2_tokenizer() -> tiktoken.Encoding:
    """GPT-2's tokenizer. Raises ValueError where tiktoken can't download it."""
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:           # requests' errors are OSErrors
        raise ValueError("tokenizer=gpt2 could not be downloaded: connect once, or point "
                         f"TIKTOKEN_CACHE_DIR to its files ({type(error).__name__})") from None


# --- corpora --------------------------------------------------------------------------------------

DOCSTRING_PACKAGES = ("torch", "sympy", "networkx", "numpy")
HUB = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-"
DOWNLOADS = {                                        # name -> [(address, bytes, sha256)]
    "tinystories": [
        (HUB + "train.txt", 2_227_753_162,
         "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443"),
        (HUB + "valid.txt", 22_502_601,
         "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d")],
    "wikitext103": [
        ("https://wikitext.smerity.com/wikitext-103-raw-v1.zip", 191_984_949,
         "91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794")],
}


def documents(name: str, cache_dir: Path) -> Iterator[tuple[str, str]]:
    """Yields (split, text) for each document of a corpus: `docstrings`, a name in
    DOWNLOADS, or a path. Raises FileNotFoundError or ValueError for a source that is
    missing, empty or can't be decoded."""
    if name == "docstrings":
        yield from _docstrings()
    elif name == "tinystories":
        train, valid = (download(*source, cache_dir) for source in DOWNLOADS[name])
        yield from (("train", text) for text in read_documents(train))
        yield from (("val" if _hash(text) % 2 else "test", text) for text in read_documents(valid))
    elif name == "wikitext103":
        yield from _wikitext(download(*DOWNLOADS[name][0], cache_dir))
    else:
        yield from _split_files(corpus_files(Path(name)))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _file_docstrings(path: Path) -> list[str]:
    """The docstrings of a Python file, wherever a class or function may be defined.
    Nothing is imported."""
    with warnings.catch_warnings(action="ignore"):   # old sources hold invalid escapes
        try:
            todo = [ast.parse(path.read_bytes())]
        except (SyntaxError, ValueError):        # a template, or syntax newer than this Python's
            return []
    found = []
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            found.append(ast.get_docstring(node) or "")
        for block in ("body", "orelse", "handlers", "finalbody", "cases"):
            nested = getattr(node, block, [])        # a conditional expression's body is no list
            todo += nested if isinstance(nested, list) else []
    return [text for text in found if len(text) >= 200]


def _docstrings() -> Iterator[tuple[str, str]]:
    """Docstrings of the packages in requirements.txt, shuffled by their hash;
    one file, one split."""
    files = []
    for package in DOCSTRING_PACKAGES:
        spec = importlib.util.find_spec(package)     # finds, does not import
        if spec is None:
            raise FileNotFoundError(f"data=docstrings reads the sources of {package}, which is not "
                                    "installed: pip install -r requirements.txt")
        root = Path(spec.submodule_search_locations[0])
        files += [(path.relative_to(root.parent).as_posix(), path) for path in root.rglob("*.py")]
    unique = {}
    # Spawned, not forked: torch's threads may be running. Parsing is most of the preparation's
    # time; two thirds of that would go to the garbage collector, and a syntax tree has no cycles.
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1), mp_context=get_context("spawn"),
                             initializer=gc.disable) as pool:
        paths = [path for _, path in sorted(files)]
        parsed = pool.map(_file_docstrings, paths, chunksize=64)
        for (relative, _), texts in zip(sorted(files), parsed):
            split = {18: "val", 19: "test"}.get(_hash(relative) % 20, "train")
            for text in texts:
                unique.setdefault(_hash(text), (split, text))
    yield from (unique[key] for key in sorted(unique))


def corpus_files(path: Path) -> list[Path]:
    """The file itself, or a folder's .txt and .jsonl files (also .gz, .xz), sorted."""
    if not path.exists():
        raise FileNotFoundError(f"data={path} does not exist: give a file, a folder, docstrings, "
                                f"{' or '.join(DOWNLOADS)}")
    if path.is_file():
        return [path]
    files = sorted(f for f in path.rglob("*")
                   if f.is_file() and re.search(r"\.(txt|jsonl)(\.gz|\.xz)?$", f.name))
    if not files:
        raise FileNotFoundError(f"data={path} holds no .txt or .jsonl file (also as .gz or .xz)")
    return files


def _open(path: Path) -> io.BufferedIOBase:
    return {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)(path, "rb")


@contextlib.contextmanager
def _reading(path: Path):
    """Turns what can go wrong while a text is read into one line."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid UTF-8 ({error.reason}): convert it first") from None
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is cut short or damaged ({error})") from None


def read_documents(path: Path, limit: int = 1 << 62) -> Iterator[str]:
    """The documents of one file: .jsonl has one {"text": ...} a line, in any other file a line
    `<|endoftext|>` separates them. Documents are cut where they exceed `limit` characters."""
    with _reading(path), _open(path) as raw:
        text = io.TextIOWrapper(raw, encoding="utf-8-sig")
        if ".jsonl" in path.suffixes[-2:]:
            for number, line in enumerate(text, 1):
                if line.strip():
                    yield from _cut(_json_text(line, f"{path}:{number}"), limit)
            return
        parts, size, longest = [], 0, min(limit, 1 << 20)      # bounded: a line may have no end
        while line := text.readline(longest):
            separates = EOT in line and line.strip() == EOT
            if separates or size + len(line) > limit:
                yield "".join(parts)
                parts, size = [], 0
            if not separates:
                parts.append(line)
                size += len(line)
        yield "".join(parts)


def _json_text(line: str, where: str) -> str:
    try:
        text = json.loads(line)["text"]
        # JSON can escape half a surrogate pair, which UTF-8 can't hold
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(f'{where} is not a JSON object with a string "text"') from None


def _cut(text: str, limit: int) -> Iterator[str]:
    begin = 0
    while len(text) - begin > limit:
        end = text.rfind("\n", begin + 1, begin + limit) + 1 or begin + limit
        yield text[begin:end]
        begin = end
    yield text[begin:]


def _split_files(files: list[Path]) -> Iterator[tuple[str, str]]:
    """90/5/5 by a hash of the text, so that copies fall on one side. A corpus of a few documents is
    cut into at least 40 pieces and dealt out in turn, so that no split is left empty."""
    total = sum(len(text) for path in files for text in read_documents(path, 1 << 20))
    small = total < 4 << 20
    limit = min(max(total // (40 if small else 400), MIN_BYTES), 1 << 20)
    texts = (text for path in files for text in read_documents(path, limit) if text.strip())
    for i, text in enumerate(texts):
        yield {18: "val", 19: "test"}.get((i if small else _hash(text)) % 20, "train"), text


def _wikitext(archive: Path) -> Iterator[tuple[str, str]]:
    """One document for each article of WikiText-103: a line ` = Title = ` opens one."""
    with _reading(archive), zipfile.ZipFile(archive) as bundle:
        for split, name in zip(SPLITS, ("train", "valid", "test")):
            parts = []
            with bundle.open(f"wikitext-103-raw/wiki.{name}.raw") as raw:
                for line in io.TextIOWrapper(raw, encoding="utf-8"):
                    if re.fullmatch(r" = [^=].* = \n", line):
                        yield split, "".join(parts)
                        parts = []
                    parts.append(line)
            yield split, "".join(parts)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(url: str, size: int, sha256: str, folder: Path) -> Path:
    """Fetches a file once: continues a cut download, checks bytes and sha256,
    then moves it into place."""
    path = folder / url.rsplit("/", 1)[-1]
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    if have < size:
        # wikitext.smerity.com refuses urllib's own name
        headers = {"User-Agent": "nanoplan", "Range": f"bytes={have}-"}
        request = urllib.request.Request(url, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                have = have if response.status == 206 else 0         # a server may ignore the range
                bar = tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=path.name)
                with open(part, "ab" if have else "wb") as file, bar:
                    while block := response.read(1 << 20):
                        file.write(block)
                        bar.update(len(block))
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(f"download of {url} broke off ({error}): "
                             "run again to continue") from None
    digest = _sha256(part)
    if (got := part.stat().st_size) < size:
        raise ValueError(f"download of {url} broke off at {got} of {size} bytes: "
                         "run again to continue")
    if got != size or digest != sha256:
        part.unlink()
        raise ValueError(f"{url} has changed: {got} bytes, sha256 {digest}; "
                         f"expected {size}, {sha256}")
    os.replace(part, path)
    return path


# --- store ----------------------------------------------------------------------------------------

@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Makes of a failed write one line that says of which file."""
    try:
        yield
    except OSError as error:
        raise OSError(f"could not write {path} ({error.strerror or error}): what was saved before "
                      "is intact; make room and run again (train.py with --resume)") from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` when that is done: a write that fails, or
    a process that is killed, leaves what was there. Raises OSError where the disk is full."""
    working = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            yield working
            with open(working, "r+b") as file:
                os.fsync(file.fileno())
            os.replace(working, path)
    finally:
        working.unlink(missing_ok=True)


@dataclass
class Corpus:
    """A stream of tokens with its structure. All arrays may be memory maps.

    tokens    (N,)   ids; the first is `<|endoftext|>`, as is the one that closes each document
    sentences (n+1,) where each sentence starts, in tokens;
                     the last one is not finished (it may be empty)
    documents (d,)   where each document starts, in sentences
    """
    tokens: np.ndarray
    sentences: np.ndarray
    documents: np.ndarray

    @classmethod
    def from_tokens(cls, tokens: np.ndarray, tokenizer: tiktoken.Encoding) -> "Corpus":
        """The structure of any stream, from its tokens alone; no entry depends on later tokens."""
        tokens = np.asarray(tokens)
        ends = np.flatnonzero(sentence_ends(tokens, tokenizer))
        closed = np.flatnonzero(tokens[ends] == tokenizer.eot_token)
        return cls(tokens, np.concatenate([[0], ends + 1]), np.concatenate([[0], closed + 1]))

    @classmethod
    def from_texts(cls, texts: Iterable[str], tokenizer: tiktoken.Encoding) -> "Corpus":
        """`<|endoftext|>`, then each document with one behind it."""
        tokens = [tokenizer.eot_token]
        for text in texts:
            if text.strip():
                tokens += encode(tokenizer, text).tolist() + [tokenizer.eot_token]
        return cls.from_tokens(np.array(tokens), tokenizer)

    @property
    def n_sentences(self) -> int:
        return len(self.sentences) - 1               # finished ones


@dataclass
class Store:
    """A prepared corpus: its folder, tokenizer and meta-data (counts, bytes, fingerprint)."""
    path: Path
    tokenizer: tiktoken.Encoding
    meta: dict

    def split(self, name: str) -> Corpus:
        """Opens one split as memory maps. Raises ValueError where a file has not the size, or (up
        to 1 GB, which takes a second) the content that it was written with."""
        arrays = []
        for kind in ("tokens", "sentences", "documents"):
            file, entry = self.path / f"{name}.{kind}", self.meta["splits"][name][kind]
            dtype = np.dtype(entry["dtype"])
            size = entry["length"] * dtype.itemsize
            if not file.exists() or file.stat().st_size != size or (
                    size <= 1 << 30 and _sha256(file) != entry["sha256"]):
                raise ValueError(f"{file} is missing, cut short or damaged: "
                                 f"delete {self.path} and run train.py again")
            arrays.append(np.memmap(file, dtype, mode="r"))
        return Corpus(*arrays)


def prepare(name: str, tokenizer: str, vocab_size: int, cache_dir: Path) -> Store:
    """Tokenizes a corpus into memory maps, or opens it where that was done before. The folder's
    name holds a hash of all it depends on: this file, the sources' identity, the tokenizer. Memory
    does not grow with the corpus. Raises ValueError where a split has fewer than two sentences."""
    if name == "docstrings":
        identity = [f"{p} {importlib.metadata.version(p)}" for p in DOCSTRING_PACKAGES]
    elif name in DOWNLOADS:
        identity = [str(DOWNLOADS[name])]
    else:
        files = corpus_files(Path(name))
        identity = [f"{f.resolve()} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files]
    size = vocab_size if tokenizer == "bpe" else 0
    code = Path(__file__).read_text()
    key = hashlib.sha256(json.dumps([identity, tokenizer, size, code]).encode()).hexdigest()[:12]
    path = cache_dir / f"{Path(name).name}-{key}"
    if not (path / "meta.json").exists():
        working = cache_dir / f"{path.name}.{os.getpid()}.tmp"
        shutil.rmtree(working, ignore_errors=True)   # of a killed process that had the same id
        working.mkdir(parents=True)
        try:
            _write_store(working, name, tokenizer, vocab_size, cache_dir)
            if not path.exists():                    # another run may have been quicker
                os.rename(working, path)
        finally:
            shutil.rmtree(working, ignore_errors=True)
    try:
        meta = json.loads((path / "meta.json").read_text())
        if meta["fingerprint"] != digest_of(meta["splits"]):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{path / 'meta.json'} is missing or damaged: "
                         f"delete {path} and run again") from None
    return Store(path, load_tokenizer(path / "tokenizer.json"), meta)


def _write_store(path: Path, name: str, tokenizer: str, vocab_size: int, cache_dir: Path) -> None:
    texts = documents(name, cache_dir)
    if name == "docstrings":
        texts = list(texts)                          # 13 MB, and slow to collect twice
    if tokenizer == "gpt2":
        encoding = gpt2_tokenizer()
    else:
        training = (text for split, text in texts if split == "train")
        encoding = bpe_tokenizer(train_bpe(_first_bytes(training, 16 << 20), vocab_size))
    save_tokenizer(path / "tokenizer.json", encoding)
    writers = {split: _Writer(path, split, encoding) for split in SPLITS}
    texts = iter(texts if name == "docstrings" else documents(name, cache_dir))
    with tqdm(desc="tokenize", unit="B", unit_scale=True) as done:
        for split, text in texts:
            if text.strip():
                raw = text.encode()
                writers[split].add(raw, encode(encoding, text))
                done.update(len(raw))
    splits = {split: writer.close() for split, writer in writers.items()}
    meta = {"fingerprint": digest_of(splits), "splits": splits}
    for split, counts in splits.items():
        if counts["sentences"]["length"] < 4:    # the opening <|endoftext|>, two sentences, the end
            raise ValueError(f"data={name} leaves {counts['sentences']['length'] - 2} sentences "
                             f"for {split}: give at least 40 lines of text, "
                             "or 20 documents of two sentences")
    (path / "meta.json").write_text(json.dumps(meta, indent=1))


def _first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    size = 0
    for text in texts:
        if size >= limit:
            return
        size += len(text)
        yield text


class _Writer:
    """Appends documents to the three files of one split."""

    def __init__(self, path: Path, split: str, tokenizer: tiktoken.Encoding):
        dtypes = {"tokens": "uint16" if tokenizer.n_vocab <= 1 << 16 else "uint32",
                  "sentences": "int64", "documents": "int64"}
        self.tokenizer, self.dtypes, self.bytes = tokenizer, dtypes, 0
        self.files = {kind: open(path / f"{split}.{kind}", "wb") for kind in dtypes}
        self.length = dict.fromkeys(dtypes, 0)
        self.digest = {kind: hashlib.sha256() for kind in dtypes}
        self._write("sentences", [0])
        self._write("documents", [0])
        self.add(b"", np.zeros(0, int))              # the opening <|endoftext|>

    def _write(self, kind, values):
        content = np.asarray(values).astype(self.dtypes[kind]).tobytes()
        with writing(self.files[kind].name):
            self.files[kind].write(content)
        self.digest[kind].update(content)
        self.length[kind] += len(values)

    def add(self, data: bytes, tokens: np.ndarray) -> None:
        byte_ends = np.cumsum(token_bytes(self.tokenizer)[tokens])
        ends = np.searchsorted(byte_ends, boundaries(data))
        ends = np.unique(np.append(ends, len(tokens)))              # <|endoftext|> ends one, too
        self._write("sentences", self.length["tokens"] + ends + 1)
        self._write("tokens", np.append(tokens, self.tokenizer.eot_token))
        self._write("documents", [self.length["sentences"] - 1])
        self.bytes += len(data)

    def close(self) -> dict:
        for file in self.files.values():
            with writing(file.name):                 # what is still in its buffer
                file.close()
        return {"bytes": self.bytes, **{
            kind: {"dtype": self.dtypes[kind], "length": n, "sha256": self.digest[kind].hexdigest()}
            for kind, n in self.length.items()}}


# --- batches --------------------------------------------------------------------------------------

@dataclass
class Batch:
    """Windows of tokens, the sentences that their targets touch (at most S), and what the planner
    may read to plan those: a window's view is the sentences before it and the touched ones. Views
    differ in length, so they lie packed, several behind one another, in R rows of P slots."""
    tokens: torch.Tensor                         # (B, T)
    targets: torch.Tensor                        # (B, T) the next token
    sentence_id: torch.Tensor | None = None      # (B, T) in 0..S-1: the sentence of the *target*
    vectors: torch.Tensor | None = None          # (R, P, E)
    first: torch.Tensor | None = None            # (R, P) True where the planner's view starts anew
    labels: torch.Tensor | None = None           # (B, S) -1 where padded or unknown
    slots: torch.Tensor | None = None            # (B, S) of the touched sentences, in 0..R*P-1

    def to(self, device: torch.device) -> "Batch":
        pin = device.type == "cuda"
        moved = {name: (x.pin_memory() if pin else x).to(device, non_blocking=True)
                 for name, x in vars(self).items() if x is not None}
        return Batch(**moved)


@functools.lru_cache(maxsize=4)
def _epoch(seed: tuple[int, ...], epoch: int, n: int, width: int) -> tuple[int, np.ndarray]:
    random = np.random.default_rng((*seed, epoch))
    return int(random.integers(width)), random.permutation(n)


def batch_starts(length: int, width: int, rows: int, seed: tuple[int, ...],
                 step: int) -> np.ndarray:
    """(rows,) where the windows of a step start: a function of (seed, step) alone. Each epoch
    visits each of the disjoint windows of `width` once, in a new order and with a new offset."""
    n = (length - width) // width                    # one window less, for the offset
    if n < 1:
        raise ValueError(f"a window of {width} is too long for a training split of {length}: "
                         "lower block_size (or planner_reach), or give more text")
    at = np.arange(step * rows, (step + 1) * rows)
    epochs = {e: _epoch(seed, e, n, width) for e in np.unique(at // n).tolist()}
    return np.array([epochs[p // n][0] + width * epochs[p // n][1][p % n] for p in at.tolist()])


def window_batch(corpus: Corpus, starts: np.ndarray, width: int, vectors: np.ndarray | None = None,
                 labels: np.ndarray | None = None, reach: int = 0, view: str = "document") -> Batch:
    """The windows of `width` inputs from each of `starts` (B,).
    Without vectors, tokens and targets alone.

    The planner may look back `reach` sentences before the window, within the document; with
    view="window" only at sentences that lie wholly in the window's inputs."""
    at = starts[:, None] + np.arange(width + 1)                     # (B, T+1)
    known = np.minimum(at, len(corpus.tokens) - 1)  # targets beyond the end of the text are unknown
    tokens = np.where(at < len(corpus.tokens), corpus.tokens[known].astype(np.int64), -1)
    batch = Batch(torch.from_numpy(tokens[:, :-1].clip(0)), torch.from_numpy(tokens[:, 1:].copy()))
    if vectors is None:
        return batch

    # A position gets the plan of the sentence that holds its target, so the window's first touched
    # sentence is that of its second token.
    sentence = np.searchsorted(corpus.sentences, at[:, 1:], side="right") - 1           # (B, T)
    touched, last = sentence[:, 0], sentence[:, -1]                 # (B,)
    document = corpus.documents[np.searchsorted(corpus.documents, touched, side="right") - 1]
    low = np.maximum(document, touched - reach) if view == "document" else touched
    sizes = last - low + 1
    begins, R, P = _pack(sizes)

    row = np.repeat(np.arange(len(starts)), sizes)   # the window of each sentence of each view
    nth = np.arange(len(row)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    index, slot = low[row] + nth, begins[row] + nth
    document = np.minimum(np.searchsorted(corpus.documents, index), len(corpus.documents) - 1)
    opens = (nth == 0) | (corpus.documents[document] == index)
    if view == "window":                         # its predecessor began before the window's inputs
        opens |= corpus.sentences[np.maximum(index - 1, 0)] < starts[row]
    first = np.ones(R * P, bool)
    first[slot] = opens
    finished = index < corpus.n_sentences            # an unfinished sentence has no vector
    rows = np.zeros((R * P, vectors.shape[1]), np.float32)
    rows[slot[finished]] = vectors[index[finished]]
    batch.vectors = torch.from_numpy(rows.reshape(R, P, -1))
    batch.first = torch.from_numpy(first.reshape(R, P))

    index = touched[:, None] + np.arange((last - touched).max() + 1)                    # (B, S)
    real = index <= last[:, None]
    batch.slots = torch.from_numpy(np.where(real, (begins - low)[:, None] + index, 0))
    batch.sentence_id = torch.from_numpy(sentence - touched[:, None])
    if labels is not None:
        known = real & (index < corpus.n_sentences)
        named = np.where(known, labels[np.where(known, index, 0)], -1)
        batch.labels = torch.from_numpy(named.astype(np.int64))
    return batch


def _pack(sizes: np.ndarray) -> tuple[np.ndarray, int, int]:
    """sizes (B,) -> where each piece begins in the R rows of P that hold them all one behind
    another, R, P: the longest first, each into the first row with room. R and P are rounded up, for
    each new shape costs memory, and time where the model is compiled."""
    begins, P, room = np.zeros_like(sizes), -(-int(sizes.max()) // 16) * 16, []
    for piece in np.argsort(-sizes, kind="stable"):
        row = next((r for r, left in enumerate(room) if left >= sizes[piece]), len(room))
        if row == len(room):
            room.append(P)
        begins[piece] = row * P + P - room[row]
        room[row] -= sizes[piece]
    R = len(room)
    return begins, R if R < 4 else -(-R // 4) * 4, P


def sentence_batch(corpus: Corpus, starts: np.ndarray, width: int, vectors: np.ndarray,
                   labels: np.ndarray) -> Batch:
    """`width` consecutive sentences from each of `starts` (B,), for training the planner alone."""
    slot = starts[:, None] + np.arange(width)                       # (B, S)
    opening = np.searchsorted(corpus.documents, slot)
    first = corpus.documents[np.minimum(opening, len(corpus.documents) - 1)] == slot
    first[:, 0] = True
    none = torch.zeros(len(starts), 0, dtype=torch.long)
    return Batch(none, none, vectors=torch.from_numpy(vectors[slot].astype(np.float32)),
                 first=torch.from_numpy(first),
                 labels=torch.from_numpy(labels[slot].astype(np.int64)))
