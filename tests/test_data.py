"""Data: no boundary sees the future, no byte is lost, a window knows its targets' sentences."""
import itertools
import json
import random
import re
import weakref
from collections import Counter

import numpy as np
import pytest

import data
from data import EOT, SPLITS, Corpus, InputError

# What a splitter may trip over.
FRAGMENTS = [
    "The cat sat on the mat. ", 'He said "yes." ', "Returns\n-------\n", "\n\n", " \n\r\n",
    "a line that is wrapped at a margin, as docstrings are, goes on\n", 50 * " ", 400 * "w", EOT,
    "！", "你好世界", "今天天气很好我们去公园玩。", "Привет. ", 99 * "é天😀",
]
TEXTS = ["".join(random.Random(seed).choices(FRAGMENTS, k=60)) for seed in range(8)]

# The tokens are single bytes, fragments, and some like GPT-2's: a sentence ends within the token,
# or a character is split between two tokens.
PIECES = [bytes([b]) for b in range(256)]
PIECES += [fragment.encode() for fragment in FRAGMENTS]
PIECES += [b". Th", b"?\nA", b"\xe3\x80\x82x", b"\x80\x82A", b"\xff. \xff"]
TOKENIZER = data.bpe_tokenizer({piece: rank for rank, piece in enumerate(PIECES)})


def draw_streams():
    """Streams of tokens that no text would give, with `<|endoftext|>` anywhere."""
    rng = np.random.default_rng(0)
    for _ in range(8):
        # The first stream consists mostly of single bytes, the second mostly of fragments.
        yield rng.integers(TOKENIZER.n_vocab, size=300)
        yield rng.integers(250, TOKENIZER.n_vocab, size=200)
        # The third has no blanks, and most of its bytes do not form characters.
        yield rng.choice([*b"x\xc3\xe3\xf0\x80"], 900)


# --- sentences and tokenizer ----------------------------------------------------------------------
def test_segments_lose_nothing_and_keep_to_their_sizes():
    for text in TEXTS:
        sentences = data.segment(text)
        sizes = [len(sentence.encode()) for sentence in sentences]
        assert "".join(sentences) == text
        assert min(sizes[:-1]) >= data.MIN_BYTES
        # The hard limit may fall within a character; the sentence ends after the next one.
        assert max(sizes) <= data.HARD_BYTES + 6
    text = 'The cat sat on the mat. She said: "Oh, come in." 今天天气很好我们去公园玩。'
    text += 99 * "word "
    assert [len(sentence) for sentence in data.segment(text)] == [24, 25, 13, 245, 245, 5]


def test_sentence_ends_of_a_prefix_are_a_prefix_of_sentence_ends():
    for tokens in draw_streams():
        ends = data.sentence_ends(tokens, TOKENIZER)
        for n in range(len(tokens)):
            assert np.array_equal(data.sentence_ends(tokens[:n], TOKENIZER), ends[:n])


def test_a_sentence_ends_with_the_token_that_holds_its_last_byte():
    for tokens in draw_streams():
        document = tokens[tokens != TOKENIZER.eot_token]
        boundaries = data.boundaries(TOKENIZER.decode_bytes(document))
        _, *ends = data.sentence_ends([TOKENIZER.eot_token, *document], TOKENIZER)
        stop = 0
        for token, is_end in zip(document, ends):
            start = stop
            stop += len(PIECES[token])
            assert is_end == any(start < boundary <= stop for boundary in boundaries)


def naive_bpe(texts, n_merges):
    """Count all pairs anew for each merge."""
    words = []
    for text in texts:
        for word in re.findall(data.PATTERN, text):
            words.append([bytes([b]) for b in word.encode()])
    merges = []
    while len(merges) < n_merges:
        pairs = Counter(a + b for word in words for a, b in itertools.pairwise(word))
        frequent = [(-n, pair) for pair, n in pairs.items() if n > 1 and pair not in merges]
        if not frequent:
            break
        _, token = min(frequent)
        merges.append(token)
        for word in words:
            for i in range(len(word)):
                if b"".join(word[i:i + 2]) == token:
                    word[i:i + 2] = [token]
    return merges


# A few different letters give many ties and overlaps.
@pytest.mark.parametrize("letters", ["ab", "abc. \n", "ab😀12天_"])
def test_bpe_equals_a_naive_one(letters):
    for seed in range(8):
        rng = random.Random(seed)
        texts = ["".join(rng.choices(letters, k=80)) for _ in range(2)]
        n_merges = rng.randrange(40)
        # The 256 bytes come first, and one id is left for EOT.
        ranks = data.train_bpe(texts, 257 + n_merges)
        assert sorted(ranks, key=ranks.get) == PIECES[:256] + naive_bpe(texts, n_merges)


# --- store and corpora ----------------------------------------------------------------------------
DOCUMENTS = [f"This is document number {i}. It has two sentences.\n" for i in range(300)]


def write_corpus(path, texts):
    if path.suffix == ".jsonl":
        lines = [json.dumps({"text": text}) for text in texts]
    else:
        lines = [f"{text}\n{EOT}" for text in texts]
    # The file begins with a byte order mark, which is not part of the first document.
    path.write_text("\n".join(lines), encoding="utf-8-sig")


def prepare(folder, vocab_size=300):
    return data.prepare(folder, "bpe", vocab_size, folder / "cache")


def test_a_prepared_split_is_the_corpus_of_its_texts_even_after_an_interruption(
        tmp_path, monkeypatch):
    def interrupted(texts, **_):
        yield from itertools.islice(texts, 30)
        raise KeyboardInterrupt

    write_corpus(tmp_path / "a.txt", DOCUMENTS)
    # The progress bar is drawn while documents are tokenized and written.
    monkeypatch.setattr(data, "tqdm", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path)
    monkeypatch.undo()
    store = prepare(tmp_path)
    for split in SPLITS:
        texts = [text for name, text in data.documents(tmp_path) if name == split]
        expected = Corpus.from_texts(texts, store.tokenizer)
        for name, array in vars(store.split(split)).items():
            assert np.array_equal(array, getattr(expected, name))
        assert store.bytes[split] == len("".join(texts).encode())


def test_a_store_is_prepared_once_for_each_state_of_its_source(tmp_path, monkeypatch):
    write_corpus(tmp_path / "a.txt", DOCUMENTS)
    first = prepare(tmp_path)
    # The changed file has the same size.
    write_corpus(tmp_path / "a.txt", DOCUMENTS[::-1])
    changed = prepare(tmp_path)
    other = prepare(tmp_path, 290)
    assert len({first.path, changed.path, other.path}) == 3
    # Preparing the corpus again would fail from here on.
    monkeypatch.setattr(data, "documents", None)
    assert prepare(tmp_path).path == changed.path


def test_preparation_holds_a_few_documents_in_memory_at_a_time(tmp_path, monkeypatch):
    class Text(str):
        """Unlike str, it allows weak references."""

    def read_documents(path):
        for document in DOCUMENTS:
            text = Text(document)
            living.add(text)
            yield text
            assert len(living) <= 8

    living = weakref.WeakSet()
    monkeypatch.setattr(data, "read_documents", read_documents)
    (tmp_path / "a.txt").touch()
    prepare(tmp_path)


def test_copies_of_a_document_share_a_split_and_no_split_stays_empty(tmp_path):
    # A corpus of 200 documents is large enough to keep each of them whole.
    texts = DOCUMENTS[:150] + DOCUMENTS[:50]
    write_corpus(tmp_path / "a.jsonl", texts)
    documents = list(data.documents(tmp_path))
    assert [text for _, text in documents] == texts
    splits = [split for split, _ in set(documents)]
    assert len(splits) == 150 and set(splits) == set(SPLITS)
    assert 120 < splits.count("train") < 145


def test_each_of_too_few_documents_is_cut_in_three_and_nothing_is_lost(tmp_path):
    texts = [f"{i:04}" + 332 * "天 \n" for i in range(199)]
    write_corpus(tmp_path / "a.jsonl", texts[:99])
    write_corpus(tmp_path / "b.jsonl", texts[99:])
    splits, parts = zip(*data.documents(tmp_path))
    assert splits == SPLITS * 199
    assert "".join(parts) == "".join(texts)
    assert [len(part) for part in parts] == [900, 50, 50] * 199


def test_documents_of_a_text_file_are_read_as_they_were_written(tmp_path):
    # Reading turns every line end into "\n". EOT separates documents only if it fills a line.
    texts = [text.replace("\r", "").replace(EOT, "x" + EOT) for text in TEXTS]
    path = tmp_path / "a.txt"
    # The blank document is skipped.
    write_corpus(path, ["", *texts])
    assert list(data.read_documents(path)) == [text + "\n" for text in texts]


@pytest.mark.parametrize("place, content", [
    ("a.jsonl:1", b'{"text": "We'),
    ("a.jsonl:1", b'{"title": ""}'),
    ("a.jsonl:1", b'{"text": 1}'),
    ("a.jsonl:1", b'["text"]'),
    ("a.jsonl:2", b'{"text": "Well."}\n' + rb'{"text": "\ud83d"}'),
    ("a.jsonl:1", b'{"text": ' + 100_000 * b"["),
    ("a.txt", b"Not UTF-8: \xe9"),
    ("a.txt", b"One sentence.\n"),
], ids=range(8))
def test_unreadable_input_is_named_in_one_line(tmp_path, place, content):
    path = tmp_path / place.partition(":")[0]
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"\A.*{tmp_path / place}.*\Z"):
        data.prepare(path, "bpe", 300, tmp_path)


MODULE = '''"""module NN"""
raise ImportError("this file is read, not imported")
try:
    """not a docstring NN"""
except ImportError:
    class A:
        async def method(self): """method NN"""
def nested(): """nested NN"""
def copy(): """method NN"""
def short(): """short NN"""
'''


def test_a_file_is_a_document_of_its_long_docstrings_in_order_without_copies(tmp_path, monkeypatch):
    # Make the docstrings 200 characters long, and the short one 199.
    numbers = [str(i) + 191 * "." for i in range(10, 70)]
    for i, number in enumerate(numbers + numbers[:1]):
        (tmp_path / f"{i:02}.py").write_text(MODULE.replace("NN", number))
    (tmp_path / "template.py").write_text("def {{ name }}(): pass")
    # The folder is a package.
    monkeypatch.syspath_prepend(tmp_path.parent)
    monkeypatch.setattr(data, "DOCSTRING_PACKAGES", [tmp_path.name])
    # Bypass the cache, which may hold the docstrings of the real packages.
    splits, texts = zip(*data._docstrings.__wrapped__())
    expected = [f"module {n}\n\nmethod {n}\n\nnested {n}" for n in numbers]
    assert sorted(texts) == expected
    # The documents are shuffled.
    assert list(texts) != expected
    assert set(splits) == set(SPLITS)


# --- batches --------------------------------------------------------------------------------------
def test_an_epoch_visits_disjoint_windows_once_in_an_order_of_its_own():
    # 33 steps make two epochs of 99 windows; one step takes windows from both.
    steps = [data.batch_starts(1003, 10, 6, (3, 1), step) for step in range(33)]
    epochs = np.reshape(steps, (2, 99))
    assert (np.diff(np.sort(epochs)) == 10).all()
    # The text also holds the target of the last token.
    assert epochs.min() >= 0 and epochs.max() + 10 < 1003
    first, second = np.argsort(epochs)
    assert (first != second).any()


def draw_corpus(seed):
    """60 short sentences in several documents, then an unfinished sentence of 3 tokens.

    Token i is i; sentence j has the label j and the vector [j + 1].
    """
    rng = np.random.default_rng(seed)
    sentences = np.cumsum([0, *rng.integers(1, 6, 60)])
    tokens = np.arange(sentences[-1] + 3)
    documents = np.unique([0, *rng.integers(61, size=20)])
    labels = np.arange(60)
    return Corpus(tokens, sentences, documents, labels[:, None] + 1, labels)


def first_in_view(corpus, j, view_tokens):
    """The first sentence before j that the planner may read for it; j where there is none."""
    opening = max(i for i in corpus.documents if i <= j)
    if view_tokens is None:
        return opening
    edge = corpus.sentences[j] - view_tokens
    return next(i for i in range(opening, j + 1) if i == j or corpus.sentences[i] >= edge)


def assert_slots(batch, row, corpus, earliest, touched, last, view_tokens):
    """Compare one row of a batch with what going through its sentences one by one gives."""
    P = batch.vectors.shape[1]
    S = batch.labels.shape[1]
    vectors = [[0]] * P
    openings = [P + earliest - last - 1] * P
    labels = [-1] * P
    previous = [-1] * P
    for j in range(earliest, last + 1):
        # The last sentence is in slot -1.
        slot = j - last - 1
        if j < 60:
            vectors[slot] = [j + 1]
            if j >= touched:
                labels[slot] = j
        opening = max(earliest, first_in_view(corpus, j, view_tokens))
        openings[slot] = P + opening - last - 1
        if opening < j:
            previous[slot] = j - 1
    assert batch.vectors[row].tolist() == vectors
    # A slot without a sentence may see nothing.
    assert batch.opening[row, earliest - last - 1:].tolist() == openings[earliest - last - 1:]
    assert all(batch.opening[row, :P + earliest - last - 1] >= P + earliest - last - 1)
    assert batch.labels[row].tolist() == labels[-S:]
    assert batch.previous[row].tolist() == previous[-S:]


@pytest.mark.parametrize("view_tokens", [None, 1, 9])
@pytest.mark.parametrize("T, reach", [(1, 0), (40, 5)])
def test_a_window_holds_what_going_through_its_sentences_one_by_one_finds(view_tokens, T, reach):
    corpus = draw_corpus(T)
    N = len(corpus.tokens)
    # Some windows reach beyond the end of the text.
    batch = data.window_batch(corpus, np.arange(N), T, reach, view_tokens)
    S = batch.labels.shape[1]
    for start in range(N):
        positions = range(start + 1, start + T + 1)
        assert batch.tokens[start].tolist() == [min(i, N) - 1 for i in positions]
        assert batch.targets[start].tolist() == [i if i < N else -1 for i in positions]
        sentences = [sum(corpus.sentences <= i) - 1 for i in positions]
        touched = sentences[0]
        last = sentences[-1]
        assert batch.sentence_id[start].tolist() == [S + j - last - 1 for j in sentences]
        earliest = max(first_in_view(corpus, touched, view_tokens), touched - reach)
        assert_slots(batch, start, corpus, earliest, touched, last, view_tokens)


@pytest.mark.parametrize("view_tokens", [None, 9])
def test_a_run_of_sentences_starts_afresh_with_each_document(view_tokens):
    corpus = draw_corpus(0)
    batch = data.sentence_batch(corpus, np.arange(49), 12, view_tokens)
    for start in range(49):
        assert_slots(batch, start, corpus, start, start, start + 11, view_tokens)
