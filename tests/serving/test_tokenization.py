import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.tokenization import IncrementalDetokenizer, token_text, tokenize_prompt
from tests.tokenizer.kinds import KINDS, TEXT
from tokenizer import Tokenizer, byte_tokenizer, train_bpe

BYTES = byte_tokenizer()
BPE = train_bpe(["the cat sat on the mat, naïve 👩‍👩‍👧 日本語 the end " * 20], 320)


class ChunkTokenizer:
    """A tokenizer whose tokens are the given chunks of bytes: any split of a text can be tried."""

    def __init__(self, chunks):
        self.chunks = chunks
        self.bytes = BYTES.stream()
        self.flush = self.bytes.flush

        self.is_first = False

    def stream(self, prompt):
        return self

    def push(self, index):
        return "".join(map(self.bytes.push, self.chunks[index]))


def detokenize(tokenizer, ids, stops, **options):
    detokenizer = IncrementalDetokenizer(tokenizer, stops, **options)
    parts = [detokenizer.push(token) for token in ids]
    return [*parts, detokenizer.flush()], detokenizer.stopped


def cut_at_stop(text, stops):
    """The definition: add one character at a time until a stop string is complete."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


@given(st.lists(st.text("ab", max_size=4), max_size=6), st.data())
def test_a_stop_string_counts_if_it_is_completed_after_min_tokens(chunks, data):
    stops = data.draw(st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
    min_tokens = data.draw(st.integers(0, 6))
    text, ignored = "".join(chunks), len("".join(chunks[:min_tokens]))
    expected = text, False
    for end in range(ignored + 1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            expected = text[: min(starts)], True
            break
    tokenizer = ChunkTokenizer([chunk.encode() for chunk in chunks])
    parts, stopped = detokenize(tokenizer, range(len(chunks)), stops, min_tokens=min_tokens)
    assert ("".join(parts), stopped) == expected


TEXTS = st.text("ab\n é👩", max_size=12)
STOPS = st.lists(st.text("ab\n é👩", min_size=1, max_size=4), max_size=4)


@given(TEXTS, STOPS, st.data())
def test_any_split_gives_the_text_up_to_the_first_stop_string(text, stops, data):
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(raw)), max_size=len(raw))))
    chunks = [raw[a:b] for a, b in itertools.pairwise([0, *cuts, len(raw)])]
    parts, stopped = detokenize(ChunkTokenizer(chunks), range(len(chunks)), stops)
    assert ("".join(parts), stopped) == cut_at_stop(text, stops)


@pytest.mark.parametrize("stop", ["\n\n", "END", "aab", "👩‍👩‍👧", "日本"])
def test_split_stop_strings_are_found_and_never_emitted(stop):
    raw = f"aaa {stop} tail".encode()
    for size in range(4):
        for cuts in itertools.combinations(range(1, len(raw)), size):
            chunks = [raw[a:b] for a, b in itertools.pairwise([0, *cuts, len(raw)])]
            parts, stopped = detokenize(ChunkTokenizer(chunks), range(len(chunks)), [stop])
            assert ("".join(parts), stopped) == ("aaa ", True)


def test_partial_stop_string_is_emitted_at_the_end():
    parts, stopped = detokenize(BYTES, BYTES.encode("wait: EN"), ["END"])
    assert ("".join(parts), stopped) == ("wait: EN", False)
    assert parts[-1] == "EN"
    parts, _ = detokenize(BYTES, BYTES.encode("EENEND!"), ["END"])
    assert "".join(parts) == "EEN"


@given(st.lists(st.integers(0, BPE.vocab_size - 1), max_size=30), STOPS)
def test_incremental_equals_batch_decoding(ids, stops):
    parts, stopped = detokenize(BPE, ids, stops)
    assert ("".join(parts), stopped) == cut_at_stop(BPE.decode(ids), stops)


def test_only_whole_characters_are_emitted():
    parts, _ = detokenize(BYTES, BYTES.encode("é👩"), [])
    assert parts == ["", "é", "", "", "", "👩", ""]
    parts, _ = detokenize(BYTES, BYTES.encode("é👩")[:-1], [])
    assert parts[-1] == "\N{REPLACEMENT CHARACTER}"


def test_prompt_starts_with_eos():
    assert tokenize_prompt(BYTES, "").ids == [256]
    assert tokenize_prompt(BYTES, "<|e").ids == [256, *b"<|e"]
    with pytest.raises(ValueError, match="surrogate"):
        tokenize_prompt(BYTES, "\ud800")
    with pytest.raises(ValueError, match="stop string is empty"):
        IncrementalDetokenizer(BYTES, [""])


def test_trailing_space_is_left_to_the_first_token():
    """The output starts with the space, which is shown once."""
    prompt = tokenize_prompt(BPE, "def ")
    assert prompt.ids == [BPE.eos_token, *BPE.encode("def")]
    assert prompt.trailing_space == " "
    assert set(prompt.allowed_first_tokens) == {
        i for i in range(BPE.vocab_size) if BPE.token_bytes(i)[:1] == b" "
    }
    detokenizer = IncrementalDetokenizer(BPE, (), prompt.trailing_space)
    word = max(prompt.allowed_first_tokens, key=lambda token: len(BPE.token_bytes(token)))
    output = [word, BPE.encode("x")[0]]
    text = "".join(map(detokenizer.push, output)) + detokenizer.flush()
    assert "def " + text == "def" + BPE.decode(output)
    # Where a space is always a token of its own, it stays in the prompt.
    assert tokenize_prompt(BYTES, "def ")[:3] == ([256, *b"def "], "", ())
    assert tokenize_prompt(BPE, "def\n").trailing_space == ""


@pytest.mark.parametrize("kind", KINDS)
def test_output_continues_the_text_of_its_prompt(kind, tmp_path):
    """The space before a word is dropped only where the word starts the whole text."""
    KINDS[kind]().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    ids = [tokenizer.eos_token, *tokenizer.encode(TEXT)]
    text = tokenizer.decode(ids)
    for cut in range(1, len(ids)):
        if "\N{REPLACEMENT CHARACTER}" in (start := tokenizer.decode(ids[:cut])):
            continue
        parts, _ = detokenize(tokenizer, ids[cut:], [], prompt=ids[:cut])
        assert start + "".join(parts) == text
        names = [token_text(tokenizer, token, is_first=cut == 1) for token in ids[cut:][:1]]
        assert names == parts[:1] or names[0].startswith("bytes:")
    prompt = tokenize_prompt(tokenizer, "Hello ")
    if prompt.trailing_space:
        parts, _ = detokenize(
            tokenizer, prompt.allowed_first_tokens[:1], [], prompt=prompt.ids, omitted_prefix=" "
        )
        assert not "".join(parts).startswith(" ")
