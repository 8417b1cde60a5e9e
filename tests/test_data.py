"""Data: no boundary sees the future, no byte is lost, a store is whole or absent, and a window
knows the sentences of its targets.

Inputs are drawn from seeded generators. Where an implementation that many write would break a
property (a splitter that looks ahead, a planner that reads across documents), it is the control.
"""
import gzip
import hashlib
import json
import lzma
import random
import re
import shutil
import socket
import threading
import zipfile
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer

import numpy as np
import pytest
import tiktoken

import data
from data import EOT, SPLITS, Corpus

FRAGMENTS = [
    "The cat sat on the mat. ", "No? ", "Yes! ", 'He said "yes." ', "e.g. ", "(see Fig. 3) ",
    "3.1415 ", "word ", "word\n", f"Returns\n{20 * '-'}\n", "- item one\n", ">>> f(x)\n3\n", "\n\n",
    "    ", " \n\r\n", "a line that is wrapped at a margin, as docstrings are, goes on\n", 50 * " ",
    10 * "\n", 70 * "x", 400 * "w", "。", "！", "？", "你好世界", "今天天气很好我们去公园玩。", "Привет. ",
    "é", "😀", "\0\x1b\t", "”", EOT]
PLANES = [(0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]


def draw_text(seed, n=40):
    """What a splitter may trip over, and characters of every plane, in any order."""
    rng = random.Random(seed)
    strange = "".join(chr(rng.randint(*rng.choice(PLANES))) for _ in range(20))
    parts = rng.choices(FRAGMENTS, k=n) + list(strange)
    rng.shuffle(parts)
    return "".join(parts)


def draw_prose(seed, n_sentences):
    """One line of sentences; whether it ends at a boundary is drawn, too."""
    rng = random.Random(seed)
    words = "time planner token vector label of and the a sees writes finds".split()
    sentences = (" ".join(rng.choices(words, k=8)).capitalize() + "." for _ in range(n_sentences))
    return " ".join(sentences) + rng.choice(["\n", " \n"])


TEXTS = [draw_text(seed) for seed in range(10)]


def one_line_error(path, error=ValueError):
    """An error that a user can act on: one line, which names the file or address."""
    return pytest.raises(error, match=rf"\A[^\n]*{re.escape(str(path))}[^\n]*\Z")


def looks_ahead(text):
    """The control: a full stop and a space, if a capitalised word follows."""
    return [match.end() for match in re.finditer(rb"[.!?] (?=[A-Z]\w*\W)", text)]


# --- sentences ------------------------------------------------------------------------------------

def is_causal(boundaries, text):
    whole = boundaries(text)
    return all(boundaries(text[:n]) == [end for end in whole if end <= n] for n in range(len(text)))


def test_a_boundary_depends_on_the_bytes_before_it_alone():
    without_space = ["天" * 250, "a" + "😀" * 200]     # HARD_BYTES falls within a character
    assert all(is_causal(data.boundaries, text.encode()) for text in TEXTS + without_space)
    assert not all(is_causal(looks_ahead, text.encode()) for text in TEXTS)   # the check can fail


def test_segments_lose_nothing_and_keep_to_their_sizes():
    for text in TEXTS:
        sentences = data.segment(text)
        sizes = [len(sentence.encode()) for sentence in sentences]
        assert "".join(sentences) == text
        assert min(sizes[:-1]) >= data.MIN_BYTES and max(sizes) <= data.HARD_BYTES + 3


@pytest.mark.parametrize("character", ["x", "é", "天", "😀"])
def test_a_text_without_a_space_is_cut_between_characters(character):
    text = character * ((1 << 20) // len(character.encode()))
    sentences = data.segment(text)                   # a cut within a character could not be decoded
    assert "".join(sentences) == text
    sizes = {len(sentence.encode()) for sentence in sentences[:-1]}
    assert sizes <= set(range(data.HARD_BYTES, data.HARD_BYTES + 4))


@pytest.mark.parametrize("sentences", [
    ["The cat sat on the mat. ", "It slept."],
    ["Is this where the cat sat?\n", "It is."],
    ['She said: "Come in, please." ', "Then she sat."],
    ["It calls `numpy.linalg.svd.` ", "See there."],
    ["e.g. this is too short to be one. ", "And so on."],     # MIN_BYTES spares most of these
    ["Parameters of the function\n", "--------------------------\n", "x : int"],
    [">>> import networkx as nx\n", ">>> G = nx.path_graph(4)\n", ">>> len(G)"],
    ["A line that is wrapped at the margin of its paragraph goes on\nin the next. ", "So it ends."],
    ["今天天气很好我们去公园玩。", "明天你也会来公园里玩吗？", "好"],
], ids=lambda sentences: sentences[0][:12].strip())
def test_examples_of_sentences(sentences):
    assert data.segment("".join(sentences)) == sentences


def test_the_end_of_the_input_is_not_a_boundary():
    assert data.boundaries(b"The cat sat on the mat.") == []
    assert data.boundaries(b"The cat sat on the mat. ") == [24]


# --- tokens ---------------------------------------------------------------------------------------

def space_first_tokenizer():
    """Like GPT-2's: the space goes to the word after it, so a token straddles most boundaries."""
    pattern = r" ?[^ \n]+|[ \n]"
    ranks = {bytes([b]): b for b in range(256)}
    words = " The cat sat on the mat. No? Yes! (see Fig. 3) " + draw_prose(0, 9)
    for word in re.findall(pattern, words):
        for end in range(2, len(word) + 1):
            ranks.setdefault(word[:end].encode(), len(ranks))
    return tiktoken.Encoding("space_first", pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={EOT: len(ranks)})


@pytest.fixture(scope="module", params=["ours", "space_first"])
def tokenizer(request):
    return our_tokenizer() if request.param == "ours" else space_first_tokenizer()


def our_tokenizer():
    return data.bpe_tokenizer(data.train_bpe(TEXTS, 500))


def draw_tokens(seed, tokenizer):
    """Text, any ids at all (so bytes that are no UTF-8), and `<|endoftext|>` anywhere."""
    rng = np.random.default_rng(seed)
    tokens = np.array(tokenizer.encode_ordinary(draw_text(seed, 15)))
    for new in (rng.integers(tokenizer.n_vocab, size=40), [tokenizer.eot_token] * 6):
        tokens = np.insert(tokens, rng.integers(len(tokens), size=len(new)), new)
    return tokens


def prefixes_agree(tokens, tokenizer):
    whole = data.sentence_ends(tokens, tokenizer)
    return all(np.array_equal(data.sentence_ends(tokens[:n], tokenizer), whole[:n])
               for n in range(len(tokens) + 1))


def test_sentence_ends_of_a_prefix_are_a_prefix_of_sentence_ends(tokenizer, monkeypatch):
    streams = [draw_tokens(seed, tokenizer) for seed in range(6)]
    assert all(prefixes_agree(tokens, tokenizer) for tokens in streams)
    monkeypatch.setattr(data, "boundaries", looks_ahead)
    assert not all(prefixes_agree(tokens, tokenizer) for tokens in streams)


def test_a_sentence_ends_with_the_token_that_holds_the_last_byte_before_its_boundary(tokenizer):
    straddled = 0
    for text in TEXTS:
        tokens = tokenizer.encode_ordinary(text)
        sizes = [len(tokenizer.decode_single_token_bytes(token)) for token in tokens]
        holder = np.repeat(np.arange(len(tokens)), sizes)           # byte -> token that holds it
        ends = data.boundaries(text.encode())
        found = np.flatnonzero(data.sentence_ends(tokens, tokenizer))
        assert found.tolist() == sorted({holder[end - 1] for end in ends})
        straddled += sum(end < len(holder) and holder[end - 1] == holder[end] for end in ends)
    assert straddled                                 # or it shows nothing of tokens that do


def test_in_prose_our_tokens_end_where_sentences_end():
    """So the plan changes with the first word of a sentence; GPT-2's space makes it the second."""
    def boundaries_within_tokens(tokenizer):
        ends = np.cumsum(data.token_bytes(tokenizer)[tokenizer.encode_ordinary(text)])
        return set(data.boundaries(text.encode())) - set(ends)

    text = draw_prose(0, 50)
    assert not boundaries_within_tokens(data.bpe_tokenizer(data.train_bpe([text], 500)))
    assert boundaries_within_tokens(space_first_tokenizer())


def test_token_bytes_add_up_to_the_text(tokenizer):
    tokens = Corpus.from_texts(TEXTS, tokenizer).tokens
    assert data.token_bytes(tokenizer)[tokens].sum() == sum(len(text.encode()) for text in TEXTS)


def test_endoftext_closes_the_open_sentence_or_is_one_of_its_own(tokenizer):
    ended, begun = "The cat sat on the mat.\n", "The cat sat on"
    corpus = Corpus.from_texts([ended, begun, ended + begun, " \n"], tokenizer)
    sentences = [tokenizer.decode(corpus.tokens[a:b])
                 for a, b in zip(corpus.sentences, corpus.sentences[1:])]
    assert sentences == [EOT, ended, EOT, begun + EOT, ended, begun + EOT]
    assert corpus.documents.tolist() == [0, 1, 3, 4, 6]


def test_documents_start_after_each_endoftext_and_nowhere_else(tokenizer):
    for seed in range(6):
        corpus = Corpus.from_tokens(draw_tokens(seed, tokenizer), tokenizer)
        closed = np.flatnonzero(corpus.tokens == tokenizer.eot_token)
        assert corpus.sentences[corpus.documents].tolist() == [0, *(closed + 1)]


def test_no_sentence_or_document_depends_on_later_tokens(tokenizer):
    for seed in range(3):
        corpus = Corpus.from_tokens(draw_tokens(seed, tokenizer), tokenizer)
        for n in range(1, len(corpus.tokens)):
            prefix = Corpus.from_tokens(corpus.tokens[:n], tokenizer)
            assert np.array_equal(prefix.sentences, corpus.sentences[corpus.sentences <= n])
            known = corpus.sentences[corpus.documents] <= n
            assert np.array_equal(prefix.documents, corpus.documents[known])


# --- tokenizer ------------------------------------------------------------------------------------

def test_worked_example_of_bpe():
    """As in minbpe: aa is the commonest pair, then aaa (before ab, as common), then aaab."""
    ranks = data.train_bpe(["aaabdaaabac"], 256 + 3 + 1)
    assert list(ranks)[256:] == [b"aa", b"aaa", b"aaab"]
    assert data.bpe_tokenizer(ranks).encode_ordinary("aaabdaaabac") == [258, 100, 258, 97, 99]


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
        _, token = min(often)
        ranks[token] = len(ranks)
        for word in words:
            for i in range(len(word)):
                if b"".join(word[i:i + 2]) == token and len(word) > i + 1:
                    word[i:i + 2] = [token]
    return ranks


@pytest.mark.parametrize("letters", ["ab", "abc. \n", "aé天 ", "ab😀12_"])
def test_bpe_agrees_with_counting_anew(letters):
    for seed in range(8):                            # few letters: many ties and overlaps
        rng = random.Random(seed)
        texts = ["".join(rng.choices(letters, k=40)) for _ in range(4)]
        for size in (262, 400):
            assert list(data.train_bpe(texts, size).items()) == list(slow_bpe(texts, size).items())


def test_bpe_stops_when_no_pair_occurs_twice():
    assert list(data.train_bpe(["abab xyz"], 10**6))[256:] == [b"ab"]


def test_encoding_loses_no_character():
    tokenizer = our_tokenizer()
    for seed in range(20):
        rng = random.Random(seed)
        text = "".join(chr(rng.randint(*rng.choice(PLANES))) for _ in range(300)) + draw_text(seed)
        assert tokenizer.decode_bytes(tokenizer.encode_ordinary(text)) == text.encode()


def test_pattern_means_the_same_to_re_and_to_tiktoken():
    """With each of re's pieces a token, tiktoken returns these only if it cuts the text so, too."""
    for text in TEXTS + [draw_text(seed, 0) for seed in range(100, 140)]:
        pieces = re.findall(data.PATTERN, text)
        assert "".join(pieces) == text
        ranks = {bytes([b]): b for b in range(256)}
        for piece in pieces:
            ranks.setdefault(piece.encode(), len(ranks))
        tokenizer = data.bpe_tokenizer(ranks)
        found = map(tokenizer.decode_single_token_bytes, tokenizer.encode_ordinary(text))
        assert list(found) == [piece.encode() for piece in pieces]


def test_a_saved_tokenizer_is_the_same(tmp_path):
    tokenizer = our_tokenizer()
    data.save_tokenizer(tmp_path / "tokenizer.json", tokenizer)
    loaded = data.load_tokenizer(tmp_path / "tokenizer.json")
    assert (loaded.n_vocab, loaded.eot_token) == (tokenizer.n_vocab, tokenizer.eot_token)
    for text in TEXTS:
        assert loaded.encode_ordinary(text) == tokenizer.encode_ordinary(text)


@pytest.mark.parametrize("damaged", [
    b"", b"\xff", b'{"name": "nanoplan", "ranks": ["00", "0', b"[]", b'{"name": "nanoplan"}',
    b'{"name": "nanoplan", "ranks": [0]}',
    b'{"name": "nanoplan", "ranks": ["0g"]}',
    b'{"name": "nanoplan", "ranks": []}',
])
def test_a_damaged_tokenizer_is_named(tmp_path, damaged):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(damaged)
    with one_line_error(path):
        data.load_tokenizer(path)


# --- store ----------------------------------------------------------------------------------------

def write_corpus(path, documents):
    path.parent.mkdir(parents=True, exist_ok=True)
    opened = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opened(path, "wt", encoding="utf-8", newline="\n") as file:
        for text in documents:
            line = json.dumps({"text": text}) if ".jsonl" in path.name else text + EOT
            file.write(line + "\n")
    return path


DOCUMENTS = [draw_prose(seed, 4) for seed in range(80)]


def prepare(path, vocab_size=300):
    return data.prepare(str(path), "bpe", vocab_size, path.parent / "cache")


@pytest.fixture
def source(tmp_path):
    return write_corpus(tmp_path / "source.txt", DOCUMENTS)


@pytest.mark.parametrize("names", [
    ["a.txt"], ["a.jsonl"], ["a.txt.gz"], ["a.txt.xz"], ["a.jsonl.gz"],
    ["folder/a.txt", "folder/deeper/b.jsonl.xz"],
], ids=" ".join)
def test_the_splits_together_hold_each_document_once(tmp_path, names):
    for i, name in enumerate(names):
        write_corpus(tmp_path / name, DOCUMENTS[i::len(names)])
    store = prepare(tmp_path / names[0].split("/")[0])
    found = []
    for split in SPLITS:
        corpus = store.split(split)
        opening, *texts, rest = store.tokenizer.decode(corpus.tokens).split(EOT)
        assert opening == rest == "" and texts
        assert store.meta["splits"][split]["bytes"] == sum(len(text.encode()) for text in texts)
        found += texts
    assert sorted(found) == sorted(DOCUMENTS)


def test_the_store_has_the_structure_that_its_tokens_have(source):
    store = prepare(source)
    for split in SPLITS:
        stored = store.split(split)
        computed = Corpus.from_tokens(stored.tokens, store.tokenizer)
        assert np.array_equal(stored.sentences, computed.sentences)
        assert np.array_equal(stored.documents, computed.documents)


def test_a_store_is_prepared_once_for_each_source_and_vocabulary(source):
    first = prepare(source)
    written = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in first.path.iterdir()}
    again = prepare(source)
    assert again.path == first.path and again.meta == first.meta
    assert written == {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in written}
    other = prepare(source, vocab_size=290)
    assert (first.tokenizer.n_vocab, other.tokenizer.n_vocab) == (300, 290)
    write_corpus(source, DOCUMENTS[1:])
    assert len({first.path, other.path, prepare(source).path}) == 3


@pytest.mark.parametrize("killed", [
    False,
    True,
], ids=["interrupted", "killed"])
def test_an_interrupted_preparation_leaves_nothing_that_looks_finished(source, killed):
    add, calls = data._Writer.add, []

    def breaks(writer, *arguments):
        calls.append(add(writer, *arguments))
        if len(calls) > 40:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data._Writer, "add", breaks)
        if killed:                                   # SIGKILL: nobody cleans up
            patch.setattr(data.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            prepare(source)
    cache = source.parent / "cache"
    assert not list(cache.glob("*/meta.json")) and (killed or not list(cache.iterdir()))
    store = prepare(source)
    assert sum(len(store.split(split).documents) - 2 for split in SPLITS) == len(DOCUMENTS)


def test_of_two_runs_that_prepare_the_same_store_the_quicker_one_wins(source, monkeypatch):
    write = data._write_store

    def overtaken(working, *arguments):
        write(working, *arguments)
        shutil.copytree(working, working.with_suffix("").with_suffix(""))   # NAME.PID.tmp -> NAME

    monkeypatch.setattr(data, "_write_store", overtaken)
    store = prepare(source)
    assert list(store.path.parent.iterdir()) == [store.path]


@pytest.mark.parametrize("kind", ["tokens", "sentences", "documents"])
def test_a_truncated_store_is_named(source, kind):
    store = prepare(source)
    path = store.path / f"val.{kind}"
    path.write_bytes(path.read_bytes()[:-1])
    with one_line_error(path):
        store.split("val")
    path.unlink()
    with one_line_error(path):
        store.split("val")


def test_a_damaged_description_of_a_store_is_named(source):
    path = prepare(source).path / "meta.json"
    path.write_text(path.read_text()[:-9])
    with one_line_error(path):
        prepare(source)


# --- corpora --------------------------------------------------------------------------------------

def splits_of_each(path):
    found = defaultdict(set)
    for split, text in data.documents(str(path), path.parent):
        found[text].add(split)
    return found


def test_copies_fall_on_one_side_unless_the_corpus_is_small(tmp_path):
    texts = [draw_prose(seed, 110) for seed in range(300)]
    large = write_corpus(tmp_path / "large.jsonl", texts + texts[::-1] + texts)
    assert large.stat().st_size >= 4 << 20
    found = splits_of_each(large)
    assert {len(splits) for splits in found.values()} == {1}
    assert set.union(*found.values()) == set(SPLITS)
    small = write_corpus(tmp_path / "small.jsonl", DOCUMENTS + DOCUMENTS[::-1])
    assert max(len(splits) for splits in splits_of_each(small).values()) > 1    # the check can fail



# than the limit; so val and test hold one piece each or none (always none of Russian and Chinese).
@pytest.mark.parametrize("letters", ["abc", "абв", "天地人"])
@pytest.mark.parametrize("longest", [80, 800], ids=["wrapped", "paragraphs"])
def test_a_single_document_is_dealt_to_every_split(tmp_path, letters, longest):
    for seed in range(5):
        rng = random.Random(seed)
        sizes = rng.choices(range(longest // 4, longest), k=5000 // longest)
        text = "".join("".join(rng.choices(letters, k=size)) + ".\n" for size in sizes)
        path = tmp_path / f"{seed}.txt"
        path.write_text(text, encoding="utf-8")
        pieces = list(data.documents(str(path), tmp_path))
        assert "".join(piece for _, piece in pieces) == text
        counts = Counter(split for split, _ in pieces)
        assert counts["val"] >= 2 and counts["test"] >= 2


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_cutting_a_document_loses_nothing(tmp_path, name):
    for seed, limit in enumerate([20, 100, 1000]):
        text = draw_text(seed).replace("\r", "").replace(EOT, "") + "\n"    # line ends become \n
        pieces = list(data.read_documents(write_corpus(tmp_path / name, [text]), limit))
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= limit


BROKEN = {
    "empty.txt": b"",
    "blank.txt": b" \n" * 1000,
    "one_sentence.txt": b"One sentence is not a corpus.\n",
    "one_long_sentence.txt": b"This file holds a single sentence and is no corpus, though long.\n",
    "latin1.txt": "Un café et un thé.\n".encode("latin-1") * 100,
    "late_latin1.txt": b"Un cafe et un the.\n" * 50_000 + b"\xe9",
    "broken.jsonl": b'{"text": "Well."}\n{"text": "We\n',
    "no_text.jsonl": b'{"title": "Well."}\n',
    "number.jsonl": b'{"text": 1}\n',
    "null.jsonl": b'{"text": null}\n',
    "list.jsonl": b'["text"]\n',
    "deep.jsonl": b'{"text": ' + b"[" * 100_000 + b"\n",
    "cut.txt.gz": gzip.compress("".join(DOCUMENTS).encode())[:-9],
    "cut.txt.xz": lzma.compress("".join(DOCUMENTS).encode())[:-9],
    "overwritten.txt.gz": gzip.compress("".join(DOCUMENTS).encode())[:100] + bytes(5000),
    "not_packed.txt.gz": b"Well.\n", "not_packed.txt.xz": b"Well.\n",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_source_is_named_and_leaves_no_store(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(BROKEN[name])
    with one_line_error(path):
        prepare(path)
    assert not list(tmp_path.glob("cache/*"))


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_bytes(BROKEN["broken.jsonl"])
    with one_line_error(f"{path}:2"):
        list(data.read_documents(path))


@pytest.mark.parametrize("name", ["missing.txt", "."])
def test_a_missing_file_and_an_empty_folder_are_named(tmp_path, name):
    with one_line_error(tmp_path / name, FileNotFoundError):
        prepare(tmp_path / name)



def test_a_folder_with_the_name_of_a_file_is_walked(tmp_path):
    path = write_corpus(tmp_path / "stories.txt" / "a.txt", DOCUMENTS)
    assert data.corpus_files(tmp_path) == [path]


@pytest.mark.parametrize("n", [1, 10, 100])
def test_a_line_endoftext_separates_documents_in_a_file_of_any_size(tmp_path, n):
    path = write_corpus(tmp_path / "a.txt", ["Well.\n"] * n)
    assert [text for _, text in data.documents(str(path), tmp_path)] == ["Well.\n"] * n


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("Well.\n", encoding="utf-8-sig")
    assert list(data.read_documents(tmp_path / "a.txt")) == ["Well.\n"]


def test_half_a_surrogate_pair_becomes_a_replacement_character(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(r'{"text": "a\ud83db \ude00 \ud83d\ude00 \ufeff\ud83d"}')
    assert list(data.read_documents(path)) == ["a\ufffdb \ufffd 😀 \ufeff\ufffd"]


def test_docstrings_are_found_wherever_a_definition_may_stand(tmp_path):
    said = '"""' + "What it says is long enough to be kept. " * 6 + '{}"""'
    path = tmp_path / "module.py"
    path.write_text(f"""{said.format("module")}
x = 1 if 2 else 3
class A:
    {said.format("class")}
    async def method(self):
        {said.format("method")}
        def inner(): {said.format("inner")}
try:
    import missing
except ImportError:
    def handler(): {said.format("handler")}
else:
    if x:
        def branch(): {said.format("branch")}
    else:
        def otherwise(): {said.format("otherwise")}
finally:
    with open(x) as file:
        def last(): {said.format("last")}
def short(): "Too short to be kept."
def invalid_escape(): "\\d"
y = {said.format("not a docstring")}
""")
    found = {text.rsplit(". ", 1)[1] for text in data._file_docstrings(path)}
    assert found == {"module", "class", "method", "inner", "handler", "branch", "otherwise", "last"}


def test_a_file_that_this_python_cannot_parse_has_no_docstrings(tmp_path):
    for source in (b"def {{ template }}(): pass", b"x = '\0'", b"\xff\xfe"):
        (tmp_path / "a.py").write_bytes(source)
        assert data._file_docstrings(tmp_path / "a.py") == []


def test_an_article_of_wikitext_is_one_document(tmp_path):
    archive = tmp_path / "wikitext.zip"
    articles = [" = Title = \n text \n = = Section = = \n text \n", " = Another = \n text \n"]
    with zipfile.ZipFile(archive, "w") as bundle:
        for name in ("train", "valid", "test"):
            bundle.writestr(f"wikitext-103-raw/wiki.{name}.raw", " \n" + "".join(articles))
    found = [(split, text) for split, text in data._wikitext(archive) if text.strip()]
    assert found == [(split, text) for split in SPLITS for text in articles]


# --- download -------------------------------------------------------------------------------------

BODY = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(BODY).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves BODY from the byte asked for; the next of server.moods says how."""
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
        self.server.asked.append(start)
        mood = self.server.moods.pop(0) if self.server.moods else "well"
        body = BODY if mood == "no ranges" else BODY[start:]
        self.send_response(200 if mood == "no ranges" else 206)
        if mood == "cut chunks":
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if mood == "cut chunks":
            self.wfile.write(b"%x\r\n" % len(body))
        self.wfile.write(body[:len(body) // 2] if "cut" in mood else body)
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingTCPServer(("127.0.0.1", 0), Handler) as http:
        http.asked, http.moods = [], []
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        http.url = f"http://127.0.0.1:{http.server_address[1]}/file.bin"
        http.folder = tmp_path / "cache"
        yield http
        http.shutdown()
        thread.join()


def fetch(server, size=len(BODY), sha256=SHA256):
    return data.download(server.url, size, sha256, server.folder)


def test_a_download_is_whole_and_made_once(server):
    assert fetch(server).read_bytes() == BODY
    assert fetch(server).read_bytes() == BODY
    assert server.asked == [0]
    assert [path.name for path in server.folder.iterdir()] == ["file.bin"]


@pytest.mark.parametrize("mood", [
    "cut",
    "cut chunks",
])
def test_a_cut_download_continues_where_it_broke_off(server, mood):
    server.moods.append(mood)
    with one_line_error(server.url):
        fetch(server)
    assert not (server.folder / "file.bin").exists()
    have = (server.folder / "file.bin.part").stat().st_size
    assert fetch(server).read_bytes() == BODY
    assert server.asked == [0, have] and (have == len(BODY) // 2 or mood == "cut chunks")


def test_a_download_starts_again_where_the_server_ignores_ranges(server):
    server.moods += ["cut", "no ranges"]
    with one_line_error(server.url):
        fetch(server)
    assert fetch(server).read_bytes() == BODY
    assert server.asked == [0, len(BODY) // 2]


def test_a_download_that_ended_before_it_was_moved_is_not_repeated(server):
    server.folder.mkdir()
    (server.folder / "file.bin.part").write_bytes(BODY)
    assert fetch(server).read_bytes() == BODY
    assert server.asked == []


@pytest.mark.parametrize("size, sha256", [
    (len(BODY), "0" * 64), (len(BODY) - 1, SHA256), (len(BODY) + 1, SHA256),
], ids=["other", "longer", "shorter"])
def test_a_download_that_is_not_what_was_expected_is_refused(server, size, sha256):
    with one_line_error(server.url):
        fetch(server, size, sha256)
    assert not (server.folder / "file.bin").exists()


def test_a_server_that_does_not_answer_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))                 # but does not listen
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/file.bin"
        with one_line_error(url):
            data.download(url, len(BODY), SHA256, tmp_path)


# --- batches --------------------------------------------------------------------------------------

def test_an_epoch_visits_disjoint_windows_once_in_an_order_of_its_own():
    length, width, n = 1003, 10, 99                  # n: one window less than fit, for the offset
    steps = [data.batch_starts(length, width, 6, (3, 1), step) for step in range(33)]
    epochs = np.concatenate(steps).reshape(2, n)     # one step takes rows from both
    assert epochs[0].min() != epochs[1].min()        # the windows do not lie where they lay
    for starts in epochs:
        ordered = np.sort(starts)
        assert (np.diff(ordered) == width).all()
        assert 0 <= ordered[0] and ordered[-1] + width < length     # the last target is in the text
    assert not np.array_equal(*(np.argsort(starts) for starts in epochs))


def test_batch_starts_are_a_function_of_seed_and_step_alone():
    def starts(seed, step):
        return data.batch_starts(1003, 10, 6, seed, step).tolist()

    forward = [starts((3, 1), step) for step in range(60)]
    data._epoch.cache_clear()
    np.random.seed(0)
    assert [starts((3, 1), step) for step in reversed(range(60))] == forward[::-1]
    assert starts((4, 1), 0) != forward[0] != starts((3, 2), 0)


def test_a_window_longer_than_the_corpus_is_refused():
    assert data.batch_starts(20, 10, 3, (0,), 0).max() < 10
    with pytest.raises(ValueError, match=r"\A.*block_size.*\Z"):
        data.batch_starts(19, 10, 3, (0,), 0)


def draw_corpus(seed):
    """Short sentences and documents, many of one token; the last sentence may be open or empty."""
    rng = np.random.default_rng(seed)
    sentences = np.cumsum([0, *rng.choice([1, 1, 2, 3, 9], 60)])
    documents = np.flatnonzero(rng.random(61) < rng.choice([0.1, 0.5, 1]))
    return Corpus(rng.integers(99, size=sentences[-1] + rng.integers(4)), sentences,
                  np.unique([0, *documents]))


def draw_windows(seed, view):
    """(corpus, starts, width, reach, view); some windows reach beyond the end of the text."""
    corpus, rng = draw_corpus(seed), np.random.default_rng((seed, 1))
    starts = rng.integers(len(corpus.tokens), size=4)
    return corpus, starts, int(rng.choice([1, 2, 10, 40])), int(rng.integers(6)), view


def window(corpus, starts, width, reach, view):
    numbers = np.arange(corpus.n_sentences)          # sentence i has vector i + 1 and label i
    return data.window_batch(corpus, starts, width, numbers[:, None] + 1.0, numbers, reach, view)


def sentence_of(corpus, position):
    return int((corpus.sentences <= position).sum()) - 1


DRAWS = [draw_windows(seed, view) for seed in range(60) for view in ("document", "window")]


def test_targets_are_the_next_tokens_and_unknown_beyond_the_end():
    for corpus, starts, width, *_ in DRAWS:
        batch = data.window_batch(corpus, starts, width)
        at = starts[:, None] + np.arange(width)
        assert np.array_equal(batch.tokens, np.append(corpus.tokens, [0] * width)[at])

        assert np.array_equal(batch.targets, np.append(corpus.tokens, [-1] * width)[at + 1])


def test_sentence_id_is_the_slot_of_the_sentence_that_holds_the_target():
    for draw in DRAWS:
        corpus, starts, width, *_ = draw
        batch = window(*draw)
        for row, start in enumerate(starts):
            expected = [sentence_of(corpus, start + 1 + t) for t in range(width)]
            slots = batch.sentence_id[row]
            unknown = [-1 if j == corpus.n_sentences else j for j in expected]
            assert batch.labels[row, slots].tolist() == unknown
            packed = batch.vectors.flatten()[batch.slots[row]]
            assert packed[slots].tolist() == [j + 1 for j in unknown]
            assert (np.diff(slots) == np.diff(expected)).all()      # in order, the open one too


def planner_sees(batch, slot):
    """What planner.Planner reads for a slot: the vectors before it, back to one marked `first`."""
    row, slot = divmod(int(slot), batch.vectors.shape[1])
    opening = max(p for p in range(slot + 1) if batch.first[row, p])
    return [int(x) - 1 for x in batch.vectors[row, opening:slot, 0]]


def may_see(corpus, start, low, j, view):
    """The sentences that sentence j may be planned from, by the definition."""
    begun = max(low, corpus.documents[corpus.documents <= j].max())
    return [i for i in range(begun, j) if view == "document" or corpus.sentences[i] >= start]


def sees_what_it_may(batch, corpus, starts, width, reach, view):
    for row, start in enumerate(starts):
        touched, last = sentence_of(corpus, start + 1), sentence_of(corpus, start + width)
        begun = corpus.documents[corpus.documents <= touched].max()
        low = max(begun, touched - reach) if view == "document" else touched
        for j in range(touched, last + 1):
            seen = planner_sees(batch, batch.slots[row, j - touched])
            if seen != may_see(corpus, start, low, j, view):
                return False
    return True


def test_views_are_packed_whole_and_apart():
    rng = np.random.default_rng(0)
    for sizes in ([1], [3, 3, 3], *(rng.integers(1, 30, size=rng.integers(1, 40))
                                    for _ in range(50))):
        begins, R, P = data._pack(np.array(sizes))
        assert max(sizes) <= P < max(sizes) + 16
        assert (begins // P == (begins + sizes - 1) // P).all()     # each within a row
        taken = np.concatenate([np.arange(b, b + size) for b, size in zip(begins, sizes)])
        assert len(np.unique(taken)) == sum(sizes) and taken.max() < R * P
        assert R < 2 * -(-sum(sizes) // P) + 4       # no two rows could be one: half full at least


@pytest.mark.parametrize("view", ["document", "window"])
def test_a_sentence_is_planned_from_those_before_it_within_document_reach_and_view(view):
    draws = [draw for draw in DRAWS if draw[-1] == view]
    assert all(sees_what_it_may(window(*draw), *draw) for draw in draws)
    # Controls: documents forgotten, reach too long, the other view.
    forgotten = [(Corpus(c.tokens, c.sentences, np.array([0])), *rest) for c, *rest in draws]
    farther = [(*rest, reach + 1, view) for *rest, reach, view in draws]
    other = [(*rest, {"document": "window", "window": "document"}[view]) for *rest, view in draws]
    for wrong in (forgotten, other, *([farther] if view == "document" else [])):
        assert not all(sees_what_it_may(window(*w), *draw) for w, draw in zip(wrong, draws))


def test_a_row_of_sentences_starts_anew_with_each_document():
    for seed in range(10):
        corpus = draw_corpus(seed)
        numbers, starts = np.arange(corpus.n_sentences), np.array([0, 7, corpus.n_sentences - 12])
        batch = data.sentence_batch(corpus, starts, 12, numbers[:, None] + 1.0, numbers)
        expected = starts[:, None] + np.arange(12)
        assert np.array_equal(batch.labels, expected)
        assert np.array_equal(batch.vectors[..., 0], expected + 1)
        opens = np.isin(expected, corpus.documents)
        opens[:, 0] = True                           # nothing is known of what precedes the row
        assert np.array_equal(batch.first, opens)
