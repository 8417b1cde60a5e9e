"""Data: no boundary sees the future, no byte is lost, a window knows its targets' sentences."""
import itertools
import json
import random
import re
import tracemalloc
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
BYTES = [bytes([b]) for b in range(256)]
PIECES = BYTES + [fragment.encode() for fragment in FRAGMENTS]
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


def test_sentences_end_with_the_token_that_holds_their_last_byte_whatever_follows():
    for tokens in draw_streams():
        ends = data.sentence_ends(tokens, TOKENIZER)
        for n in range(len(tokens)):
            assert np.array_equal(data.sentence_ends(tokens[:n], TOKENIZER), ends[:n])
        document = tokens[tokens != TOKENIZER.eot_token]
        ends = data.sentence_ends(document, TOKENIZER)
        # For each byte, the place of the token that holds it.
        places = [i for i, token in enumerate(document) for _ in PIECES[token]]
        boundaries = data.boundaries(TOKENIZER.decode_bytes(document))
        assert set(np.flatnonzero(ends)) == {places[boundary - 1] for boundary in boundaries}


def naive_bpe(texts, n_merges):
    """Count all pairs anew for each merge."""
    words = [
        [bytes([b]) for b in word.encode()]
        for text in texts
        for word in re.findall(data.PATTERN, text)
    ]
    merges = []
    for _ in range(n_merges):
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


def test_bpe_equals_a_naive_one():
    # A few different letters give many ties and overlaps.
    for letters in ["ab", "abc. \n", "ab😀12天_"]:
        for seed in range(8):
            rng = random.Random(seed)
            texts = ["".join(rng.choices(letters, k=80)) for _ in range(2)]
            n_merges = rng.randrange(40)
            # The 256 bytes come first, and one id is left for EOT.
            ranks = data.train_bpe(texts, 257 + n_merges)
            assert sorted(ranks, key=ranks.get) == BYTES + naive_bpe(texts, n_merges)


# --- store and corpora ----------------------------------------------------------------------------
DOCUMENTS = [f"This is document number {i}. It has two sentences.\n" for i in range(300)]


def write_corpus(path, texts):
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))


def prepare(folder, vocab_size=300):
    return data.prepare(folder, "bpe", vocab_size, folder / "cache")


def test_each_state_of_a_source_is_prepared_once_into_the_corpus_of_its_texts(
        tmp_path, monkeypatch):
    write_corpus(tmp_path / "a.jsonl", DOCUMENTS)
    # The first preparation ends where it would write an array.
    monkeypatch.setattr(np, "save", None)
    with pytest.raises(TypeError):
        prepare(tmp_path)
    monkeypatch.undo()
    store = prepare(tmp_path)
    for split in SPLITS:
        texts = [text for name, text in data.documents(tmp_path) if name == split]
        expected = Corpus.from_texts(texts, store.tokenizer)
        for name, array in vars(store.split(split)).items():
            assert np.array_equal(array, getattr(expected, name))
    # The changed file has the same size.
    write_corpus(tmp_path / "a.jsonl", DOCUMENTS[::-1])
    changed = prepare(tmp_path)
    other = prepare(tmp_path, 290)
    assert len({store.path, changed.path, other.path}) == 3
    # Preparing the corpus again would fail from here on.
    monkeypatch.setattr(data, "documents", None)
    assert prepare(tmp_path).path == changed.path


def test_preparation_does_not_hold_the_text_in_memory(tmp_path):
    # The tokens of so long words take far less memory than the text, which has 3 MB.
    texts = [f"{i} " + 10_000 * "w" for i in range(300)]
    write_corpus(tmp_path / "a.jsonl", texts)
    tracemalloc.start()
    prepare(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6


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
    texts = [text.replace("\r", "").replace(EOT, "x" + EOT) + "\n" for text in TEXTS]
    path = tmp_path / "a.txt"
    # The file begins with a byte order mark, and a blank document, which is skipped.
    path.write_text(f"{EOT}\n".join(["\n", *texts]), "utf-8-sig")
    assert list(data.read_documents(path)) == texts


def test_unreadable_input_is_named_in_one_line(tmp_path):
    for place, content in [
            ("a.jsonl:1", b'{"text": "We'),
            ("a.jsonl:1", b'{"title": ""}'),
            ("a.jsonl:1", b'{"text": 1}'),
            ("a.jsonl:1", b'["text"]'),
            ("a.jsonl:2", b'{"text": "Well."}\n' + rb'{"text": "\ud83d"}'),
            ("a.jsonl:1", b'{"text": ' + 100_000 * b"["),
            ("a.txt", b"Not UTF-8: \xe9"),
            ("a.txt", b"One sentence.\n")]:
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


def draw_corpus(seed, view_tokens):
    """60 short sentences in several documents, then an unfinished sentence of 3 tokens.

    Token i is i; sentence j has the label j and the vector [j + 1]. Returns also, for each
    sentence, the first one that the planner may read for it, or itself.
    """
    rng = np.random.default_rng(seed)
    sentences = np.cumsum([0, *rng.integers(1, 6, 60)])
    tokens = np.arange(sentences[-1] + 3)
    documents = np.unique([0, *rng.integers(61, size=20)])
    labels = np.arange(60)
    first = []
    for j in range(61):
        opening = max(i for i in documents if i <= j)
        # The corpus is shorter than 999 tokens.
        edge = sentences[j] - (view_tokens or 999)
        first.append(next(i for i in range(opening, 61) if sentences[i] >= edge))
    return Corpus(tokens, sentences, documents, labels[:, None] + 1, labels), first


def assert_slots(batch, row, sentences, reach, first):
    """Compare one row of a batch with what going through its slots one by one gives."""
    touched = sentences[0]
    last = sentences[-1]
    earliest = max(first[touched], touched - reach)
    P = batch.vectors.shape[1]
    S = batch.labels.shape[1]
    assert batch.sentence_id[row].tolist() == [S + j - last - 1 for j in sentences]
    for slot in range(-P, 0):
        # The last sentence is in slot -1.
        j = last + 1 + slot
        # A slot without a sentence may see nothing.
        opening = max(earliest, first[max(j, 0)])
        if earliest <= j < 60:
            assert batch.vectors[row, slot] == j + 1
        assert batch.opening[row, slot] == P + opening - last - 1
        if slot >= -S:
            label = j if touched <= j < 60 else -1
            previous = j - 1 if j > opening else -1
            assert batch.labels[row, slot] == label
            assert batch.previous[row, slot] == previous


@pytest.mark.parametrize("view_tokens", [None, 1, 9])
@pytest.mark.parametrize("T, reach", [(1, 0), (40, 5)])
def test_batches_hold_what_going_through_their_sentences_one_by_one_finds(view_tokens, T, reach):
    corpus, first = draw_corpus(T, view_tokens)
    N = len(corpus.tokens)
    # Some windows reach beyond the end of the text.
    batch = data.window_batch(corpus, np.arange(N), T, reach, view_tokens)
    for start in range(N):
        positions = range(start + 1, start + T + 1)
        assert batch.tokens[start].tolist() == [min(i, N) - 1 for i in positions]
        assert batch.targets[start].tolist() == [i if i < N else -1 for i in positions]
        sentences = [sum(corpus.sentences <= i) - 1 for i in positions]
        assert_slots(batch, start, sentences, reach, first)
    # Stage planner trains on spans of sentences alone.
    batch = data.sentence_batch(corpus, np.arange(49), 12, view_tokens)
    for start in range(49):
        assert_slots(batch, start, range(start, start + 12), 0, first)
