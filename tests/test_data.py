"""Data: no boundary sees the future, no byte is lost, a window knows its targets' sentences."""
import importlib
import itertools
import json
import random
import re
import sys
import weakref
from collections import Counter

import numpy as np
import pytest

import data
from data import EOT, SPLITS, Corpus, InputError

FRAGMENTS = [
    "The cat sat on the mat. ", "No? ", 'He said "yes." ', "e.g. ", "(see Fig. 3) ", "3.14 ",
    "word ", "word\n", f"Returns\n{20 * '-'}\n", ">>> f(x)\n3\n", "\n\n", " \n\r\n", 50 * " ",
    "a line that is wrapped at a margin, as docstrings are, goes on\n", 70 * "x", 400 * "w", EOT,
    10 * "\n", "。", "！", "你好世界", "今天天气很好我们去公园玩。", "Привет. ", "é", "😀", "\0\x1b\t"]
PLANES = [(0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]


def draw_text(seed, n=40):
    """What a splitter may trip over, and characters of every plane, in any order."""
    rng = random.Random(seed)
    strange = "".join(chr(rng.randint(*rng.choice(PLANES))) for _ in range(20))
    parts = rng.choices(FRAGMENTS, k=n) + list(strange)
    return "".join(rng.sample(parts, len(parts)))


def draw_prose(seed, n=4):
    rng = random.Random(seed)
    words = "time planner token vector label of and the a sees writes finds".split()
    return "".join(" ".join(rng.choices(words, k=8)) + rng.choice([". ", ".\n"]) for _ in range(n))


TEXTS = [draw_text(seed) for seed in range(8)]
NO_BLANK = ["a" + 9999 * character for character in "xé天😀"]
DOCUMENTS = [draw_prose(seed) for seed in range(80)]


def one_line_error(name):
    """An error that a user can act on: one line, which names the file, folder or address."""
    return pytest.raises(InputError, match=rf"\A[^\n]*{re.escape(str(name))}[^\n]*\Z")


# --- sentences, tokens, tokenizer -----------------------------------------------------------------
def test_segments_lose_nothing_and_keep_to_their_sizes():
    for text in TEXTS + NO_BLANK:                    # a cut within a character can't be decoded
        sentences = data.segment(text)
        sizes = [len(sentence.encode()) for sentence in sentences]
        assert "".join(sentences) == text and min(sizes[:-1]) >= data.MIN_BYTES
        assert max(sizes) <= data.HARD_BYTES + 6     # two characters that lie across it
    text = 'The cat sat on the mat. She said: "Oh, come in." 今天天气很好我们去公园玩。e.g. so'
    assert [len(sentence) for sentence in data.segment(text)] == [24, 25, 13, 7]


RANKS = data.train_bpe(TEXTS, 500)
for token in (b". Th", b"?\nA", b"\xe3\x80\x82x", b"\x80\x82A", b"\xff. \xff"):
    RANKS.setdefault(token, len(RANKS))              # a boundary falls within, as in GPT-2's
TOKENIZER = data.bpe_tokenizer(RANKS)


def draw_tokens(seed):
    """Text, any ids at all, those above most of all, and `<|endoftext|>` anywhere."""
    rng, n = np.random.default_rng(seed), TOKENIZER.n_vocab
    tokens = np.array(TOKENIZER.encode_ordinary(draw_text(seed, 15)))
    for new in (rng.integers(n, size=40), rng.integers(n - 6, n, size=40)):
        tokens = np.insert(tokens, rng.integers(len(tokens), size=len(new)), new)
    return tokens


STREAMS = [draw_tokens(seed) for seed in range(8)]
STREAMS += [np.array(TOKENIZER.encode_ordinary(text[:400])) for text in NO_BLANK]
# No blank, and hardly a character: where the hard cut falls, most bytes stand astray.
STREAMS += [np.random.default_rng(seed).choice([*b"x\xc3\xe3\xf0\x80"], 900) for seed in range(8)]


def test_sentence_ends_of_a_prefix_are_a_prefix_of_sentence_ends():
    for tokens in STREAMS:
        whole = data.sentence_ends(tokens, TOKENIZER)
        for n in range(len(tokens)):
            assert np.array_equal(data.sentence_ends(tokens[:n], TOKENIZER), whole[:n])


def test_a_sentence_ends_with_the_token_that_holds_the_last_byte_before_its_boundary():
    for tokens in STREAMS:
        tokens = tokens[tokens != TOKENIZER.eot_token]
        pieces = [TOKENIZER.decode_single_token_bytes(token) for token in tokens]
        holder = np.repeat(np.arange(len(tokens)), [len(piece) for piece in pieces])    # of a byte
        last_bytes = np.array(data.boundaries(b"".join(pieces)), int) - 1
        closing = np.flatnonzero(data.sentence_ends(tokens, TOKENIZER))
        assert np.array_equal(closing, np.unique(holder[last_bytes]))


def slow_bpe(texts, vocab_size):
    """Counts all pairs anew for each merge; of equally frequent ones the first in bytes wins."""
    words = [word for text in texts for word in re.findall(data.PATTERN, text)]
    words = [[bytes([b]) for b in word.encode()] for word in words]
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < vocab_size - 1:
        pairs = Counter(a + b for word in words for a, b in zip(word, word[1:]))
        often = [(-n, pair) for pair, n in pairs.items() if n > 1 and pair not in ranks]
        if not often:
            break
        token = min(often)[1]
        ranks[token] = len(ranks)
        for word in words:
            for i in range(len(word)):
                if b"".join(word[i:i + 2]) == token and len(word) > i + 1:
                    word[i:i + 2] = [token]
    return ranks


def test_bpe_merges_what_counting_anew_merges():
    for seed in range(32):                           # few letters: many ties and overlaps
        rng = random.Random(seed)
        letters = ["ab", "abc. \n", "aé天 ", "ab😀12_"][seed % 4]
        texts = ["".join(rng.choices(letters, k=40)) for _ in range(4)]
        for size in (262, 400):
            assert list(data.train_bpe(texts, size).items()) == list(slow_bpe(texts, size).items())


# --- store and corpora ----------------------------------------------------------------------------
def write_corpus(path, texts):
    path.parent.mkdir(exist_ok=True)
    lines = [json.dumps({"text": text}) if path.suffix == ".jsonl" else text + "\n" + EOT
             for text in texts]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def prepare(path, vocab_size=300):
    return data.prepare(str(path), "bpe", vocab_size, path.parent / "cache")


@pytest.mark.parametrize("texts", [["".join(DOCUMENTS)], DOCUMENTS], ids=["one", "many"])
def test_a_prepared_split_is_the_corpus_of_its_texts(tmp_path, texts):
    path = tmp_path / "folder"
    write_corpus(path / "a.txt", texts[::2])
    write_corpus(path / "b.jsonl", texts[1::2])
    store = prepare(path)
    for split in SPLITS:
        texts = [text for name, text in data.documents(str(path)) if name == split]
        stored, expected = store.split(split), Corpus.from_texts(texts, store.tokenizer)
        for name in ("tokens", "sentences", "documents"):
            assert np.array_equal(getattr(stored, name), getattr(expected, name))
        assert store.bytes[split] == sum(len(text.encode()) for text in texts if text.strip()) > 0


def test_a_store_is_prepared_once_for_each_state_of_its_source(tmp_path, monkeypatch):
    source = write_corpus(tmp_path / "a.txt", DOCUMENTS)
    first, other = prepare(source), prepare(source, vocab_size=290)
    write_corpus(source, DOCUMENTS[::-1])            # of the same size
    assert len({first.path, other.path, prepare(source).path}) == 3
    monkeypatch.setattr(data, "documents", None)     # any call fails
    assert prepare(source).fingerprint != first.fingerprint


def test_preparation_interrupted_and_run_again_makes_the_same_store(tmp_path, monkeypatch):
    def cut_short(texts, **_):                       # in the midst of tokenizing
        yield from itertools.islice(texts, 30)
        raise KeyboardInterrupt

    source = write_corpus(tmp_path / "a.txt", DOCUMENTS)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "tqdm", cut_short)
        prepare(source)
    undisturbed = data.prepare(str(source), "bpe", 300, tmp_path / "other_cache").path
    for file in prepare(source).path.iterdir():
        assert file.read_bytes() == (undisturbed / file.name).read_bytes()


def test_preparation_holds_a_few_documents_at_a_time(tmp_path, monkeypatch):
    class Text(str):
        """Unlike a str, it can be referred to weakly."""

    def read_documents(path):
        for seed in range(500):
            text = Text(draw_prose(seed))
            living.add(id(text))
            weakref.finalize(text, living.remove, id(text))
            yield text
            most.append(len(living))

    living, most = set(), []
    monkeypatch.setattr(data, "read_documents", read_documents)
    prepare(write_corpus(tmp_path / "a.txt", []))
    assert len(most) >= 500 and max(most) <= 8


@pytest.mark.parametrize("n", [200, 600])
def test_a_document_and_its_copies_fall_whole_into_one_split_and_none_stays_empty(tmp_path, n):
    texts = [draw_prose(seed, 30) for seed in range(n)]
    path = write_corpus(tmp_path / "a.jsonl", texts + texts[::-3])
    pairs = [pair for pair in data.documents(str(path)) if pair[1].strip()]
    assert sorted(text for _, text in pairs) == sorted(texts + texts[::-3])     # none is cut
    assert len(set(pairs)) == n                      # each on one side
    counts = Counter(split for split, _ in set(pairs))
    assert set(counts) == set(SPLITS) and 0.8 * n <= counts["train"] <= 0.97 * n


@pytest.mark.parametrize("text", [draw_prose(0, 90), 4000 * "天" + "\n"], ids=["prose", "no blank"])
@pytest.mark.parametrize("n", [1, 19])
def test_each_of_too_few_documents_is_cut_in_three_and_nothing_is_lost(tmp_path, n, text):
    texts = [f"{i} {text}" for i in range(n)]
    path = write_corpus(tmp_path / "a.jsonl", texts)
    pairs = [pair for pair in data.documents(str(path)) if pair[1].strip()]
    assert [split for split, _ in pairs] == list(SPLITS) * n
    assert "".join(part for _, part in pairs) == "".join(texts)
    shares = np.reshape([len(part) / len(texts[0]) for _, part in pairs], (n, 3))
    assert np.abs(shares - [0.9, 0.05, 0.05]).max() < 0.03


def test_documents_are_read_as_they_were_written(tmp_path):
    texts = [text.replace("\r", "").replace(EOT, "") for text in TEXTS]    # \r\n becomes \n
    for name, end in (("a.jsonl", ""), ("a.txt", "\n")):
        read = data.read_documents(write_corpus(tmp_path / name, texts))
        assert [text for text in read if text.strip()] == [text + end for text in texts]


@pytest.mark.parametrize("name, raw, named", [
    *[("a.jsonl", b'{"text": "Well."}\n' + line, ":2") for line in (
        b'{"text": "We', b'{"title": ""}', b'{"text": 1}', b'{"text": null}', b'["text"]', b"1",
        rb'{"text": "\ud83d"}', b'{"text": ' + 100_000 * b"[")],
    ("a.txt", b"One sentence.\n", ""), ("a.txt", 99 * b"So " + b"\xe9", ""),
    ("a.txt", None, "")], ids=range(11))
def test_what_makes_no_corpus_is_named_and_leaves_no_store(tmp_path, name, raw, named):
    if raw is not None:
        (tmp_path / name).write_bytes(raw)
    for _ in range(2):                               # nor is there one the second time
        with one_line_error(f"{tmp_path / name}{named}"):
            prepare(tmp_path / name)


MODULE = '''"""module NN"""
raise ImportError("this file is read, not imported")
try:
    """not a docstring NN"""
except ImportError:
    class A:
        async def method(self): """method NN"""
def late(): """late NN"""
def copy(): """method NN"""
def shared(): """shared by all"""
def short(): """short NN"""
'''


def test_a_file_is_a_document_of_its_long_docstrings_in_order_without_copies(tmp_path, monkeypatch):
    def long(text):                                  # of the fewest characters that count
        return text.ljust(200, ".")
    write_corpus(tmp_path / "made_up/template.py", ["def {{ name }}(): pass"])
    module = re.sub('"""(.*)"""', lambda found: f'"""{long(found[1])}"""', MODULE)
    module = module.replace("short ", "short")       # one character less
    for name in [*range(10, 70), "copy of 69"]:      # they are read in this order
        (tmp_path / f"made_up/{name}.py").write_text(module.replace("NN", str(name)[-2:]))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "data")         # the loaded one may hold the real docstrings
    afresh = importlib.import_module("data")
    afresh.DOCSTRING_PACKAGES = ("made_up",)
    splits, found = zip(*afresh.documents("docstrings"))
    expected = ["\n\n".join(long(f"{kind} {i}") for kind in ("module", "method", "late"))
                for i in range(10, 70)]
    expected[0] += "\n\n" + long("shared by all")
    assert sorted(found) == expected and list(found) != expected        # shuffled
    assert set(splits) == set(SPLITS)


# --- batches --------------------------------------------------------------------------------------
def test_an_epoch_visits_disjoint_windows_once_in_an_order_of_its_own():
    length, width, n = 1003, 10, 99                  # n: one window less than fit, for the offset
    steps = [data.batch_starts(length, width, 6, (3, 1), step) for step in range(33)]
    epochs = np.concatenate(steps).reshape(2, n)     # one step takes rows from both
    for ordered in np.sort(epochs):
        assert (np.diff(ordered) == width).all()
        assert 0 <= ordered[0] and ordered[-1] + width < length     # the last target is in the text
    assert not np.array_equal(*(np.argsort(starts) for starts in epochs))
    for step in reversed(range(33)):                 # a function of seed and step alone
        assert np.array_equal(data.batch_starts(length, width, 6, (3, 1), step), steps[step])


def draw_corpus(rng):
    """Short sentences and documents, many of one token; the last sentence may be unfinished."""
    sentences = np.cumsum([0, *rng.choice([1, 1, 2, 3, 9], 60)])
    tokens = rng.integers(99, size=sentences[-1] + rng.integers(4))
    opens = np.flatnonzero(rng.random(61) < rng.choice([0.1, 0.5, 1]))
    documents = np.unique([0, *opens])
    vectors = rng.normal(size=(60, 3)).astype(np.float16)
    return Corpus(tokens, sentences, documents, vectors, rng.integers(9, size=60))


def slow_window(corpus, start, block_size, reach, view, P, S):
    """One row of a batch, sentence by sentence."""
    tokens = [*corpus.tokens, *[-1] * block_size][start:start + block_size + 1]
    sentence_id = [int((corpus.sentences <= start + 1 + t).sum()) - 1 for t in range(block_size)]
    touched = sentence_id[0]
    last = sentence_id[-1]
    opening = max(j for j in corpus.documents if j <= touched)
    earliest = max(opening, touched - reach) if view == "document" else touched
    vectors = np.zeros((P, 3), np.float16)
    first = [True] * P
    labels = [-1] * P
    previous = [-1] * P
    for j in range(earliest, last + 1):
        slot = P - 1 - last + j
        unseen = view == "window" and corpus.sentences[j - 1] < start
        first[slot] = bool(j == earliest or j in corpus.documents or unseen)
        if not first[slot]:
            previous[slot] = corpus.labels[j - 1]
        if j < corpus.n_sentences:
            vectors[slot] = corpus.vectors[j]
        if touched <= j < corpus.n_sentences:
            labels[slot] = corpus.labels[j]
    return {"targets": tokens[1:], "sentence_id": [j - last - 1 + S for j in sentence_id],
            "vectors": vectors, "first": first, "labels": labels[-S:], "previous": previous[-S:]}


@pytest.mark.parametrize("view", ["document", "window"])
def test_a_window_holds_what_going_through_its_sentences_one_by_one_finds(view):
    for seed in range(60):
        rng = np.random.default_rng(seed)
        corpus = draw_corpus(rng)
        # Some windows reach beyond the end of the text.
        starts = rng.integers(len(corpus.tokens), size=4)
        options = (int(rng.choice([1, 2, 10, 40])), int(rng.integers(6)), view)
        batch = data.window_batch(corpus, starts, *options)
        P = batch.vectors.shape[1]
        S = batch.labels.shape[1]
        rows = [slow_window(corpus, start, *options, P, S) for start in starts]
        for name in rows[0]:
            assert np.array_equal(getattr(batch, name), [row[name] for row in rows]), name
        following = batch.targets[:, :-1]
        assert (batch.tokens[:, 1:] == following)[following >= 0].all()


def test_a_run_of_sentences_starts_afresh_with_each_document():
    for seed in range(10):
        corpus = draw_corpus(np.random.default_rng(seed))
        starts = np.array([0, 7, corpus.n_sentences - 12])
        index = starts[:, None] + np.arange(12)
        batch = data.sentence_batch(corpus, starts, 12)
        # 12 sentences are in the last of 16 slots; the others are empty.
        assert np.array_equal(batch.labels[:, 4:], corpus.labels[index])
        assert np.array_equal(batch.vectors[:, 4:], corpus.vectors[index])
        opens = np.isin(index, corpus.documents)
        opens[:, 0] = True
        assert np.array_equal(batch.first[:, 4:], opens)
        assert (batch.labels[:, :4] == -1).all() and batch.first[:, :4].all()
