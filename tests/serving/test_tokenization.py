import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.tokenization import IncrementalDetokenizer, tokenize_prompt
from tokenizer import byte_tokenizer, train_bpe

BYTES = byte_tokenizer()
BPE = train_bpe(["the cat sat on the mat, naïve 👩‍👩‍👧 日本語 the end " * 20], 320)


class Chunks:
    """A tokenizer whose tokens are any given chunks of bytes: every split of a text can be tried."""

    def __init__(self, chunks):
        self.chunks = chunks
        self.bytes = BYTES.stream()
        self.flush = self.bytes.flush

    def stream(self):
        return self

    def push(self, index):
        return "".join(map(self.bytes.push, self.chunks[index]))


def through(tokenizer, ids, stops):
    text = IncrementalDetokenizer(tokenizer, stops)
    parts = [text.push(token) for token in ids]
    return [*parts, text.flush()], text.stopped


def cut(text, stops):
    """The definition: read one character more at a time until some stop string is complete."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


SOME = st.text("ab\n é👩", max_size=12)
STOPS = st.lists(st.text("ab\n é👩", min_size=1, max_size=4), max_size=4)


@given(SOME, STOPS, st.data())
def test_any_split_of_any_text_gives_the_text_up_to_the_first_stop(text, stops, data):
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(raw)), max_size=len(raw))))
    chunks = [raw[a:b] for a, b in itertools.pairwise([0, *cuts, len(raw)])]
    parts, stopped = through(Chunks(chunks), range(len(chunks)), stops)
    assert ("".join(parts), stopped) == cut(text, stops)


@pytest.mark.parametrize("stop", ["\n\n", "END", "aab", "👩‍👩‍👧", "日本"])
def test_every_split_of_a_stop_string_is_found_and_none_of_it_leaks(stop):
    raw = f"aaa {stop} tail".encode()
    for size in range(4):
        for cuts in itertools.combinations(range(1, len(raw)), size):
            chunks = [raw[a:b] for a, b in itertools.pairwise([0, *cuts, len(raw)])]
            parts, stopped = through(Chunks(chunks), range(len(chunks)), [stop])
            assert ("".join(parts), stopped) == ("aaa ", True)


def test_what_might_have_become_a_stop_string_is_not_lost():
    parts, stopped = through(BYTES, BYTES.encode("wait: EN"), ["END"])
    assert ("".join(parts), stopped) == ("wait: EN", False)
    assert parts[-1] == "EN"
    parts, _ = through(BYTES, BYTES.encode("EENEND!"), ["END"])
    assert "".join(parts) == "EEN"


@given(st.lists(st.integers(0, BPE.vocab_size - 1), max_size=30), STOPS)
def test_any_tokens_read_as_they_decode(ids, stops):
    parts, stopped = through(BPE, ids, stops)
    assert ("".join(parts), stopped) == cut(BPE.decode(ids), stops)


def test_characters_are_whole():
    parts, _ = through(BYTES, BYTES.encode("é👩"), [])
    assert parts == ["", "é", "", "", "", "👩", ""]
    parts, _ = through(BYTES, BYTES.encode("é👩")[:-1], [])
    assert parts[-1] == "\N{REPLACEMENT CHARACTER}"


def test_a_prompt_begins_where_a_document_does():
    assert tokenize_prompt(BYTES, "").ids == [256]
    assert tokenize_prompt(BYTES, "<|e").ids == [256, *b"<|e"]
    with pytest.raises(ValueError, match="surrogate"):
        tokenize_prompt(BYTES, "\ud800")
    with pytest.raises(ValueError, match="stop string is empty"):
        IncrementalDetokenizer(BYTES, [""])


def test_a_space_at_the_end_is_left_to_the_first_token():
    """Whichever way the user's space falls, what follows begins with one and it is shown once."""
    ids, space, first, *_ = tokenize_prompt(BPE, "def ")
    assert [BPE.eos_token, *BPE.encode("def")] == ids
    assert space == " "
    assert set(first) == {i for i in range(BPE.vocab_size) if BPE.token_bytes(i)[:1] == b" "}
    text = IncrementalDetokenizer(BPE, (), space)
    word = max(first, key=lambda token: len(BPE.token_bytes(token)))
    follow = [word, BPE.encode("x")[0]]
    shown = "".join(map(text.push, follow)) + text.flush()
    assert "def " + shown == "def" + BPE.decode(follow)
    # Where a space is always a token by itself there is nothing to leave.
    assert tokenize_prompt(BYTES, "def ")[:3] == ([256, *b"def "], "", ())
    assert tokenize_prompt(BPE, "def\n").space == ""
