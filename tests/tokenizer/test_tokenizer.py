import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from tests.tokenizer.kinds import KINDS, TEXT
from tokenizer import (
    BYTE_TO_UNICODE,
    CHUNK_SIZE,
    END_OF_TEXT,
    Tokenizer,
    byte_tokenizer,
    split_text,
    train_bpe,
    train_characters,
    train_words,
)

CODE = Path(json.__file__).read_text("utf-8") + Path(subprocess.__file__).read_text("utf-8")
BPE = train_bpe([CODE], 1000)
BYTES = byte_tokenizer()
LOSSLESS = pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "bytes"])

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
# Hypothesis rarely generates the white space that breaks regular expressions.
AWKWARD = st.lists(
    st.sampled_from([*"\n\r\t \x0b\x0c\x1c\x85\u2028_aé1½#́👍\0", "  ", "\n\n", "ab", "12345"]),
    max_size=40,
).map("".join)


@LOSSLESS
@settings(deadline=None, max_examples=300)
@given(text=ANY_TEXT | AWKWARD)
def test_decode_inverts_encode(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, "x"]) == [ids, tokenizer.encode("x")]
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


@LOSSLESS
@settings(deadline=None, max_examples=300)
@given(ids=st.lists(st.integers(0, 256), max_size=50))
def test_stream_equals_decode(tokenizer, ids):
    stream = tokenizer.stream()
    chunks = [stream.push(token) for token in ids]
    assert "".join(chunks) + stream.flush() == tokenizer.decode(ids)


@LOSSLESS
def test_stream_returns_complete_characters(tokenizer):
    stream = tokenizer.stream()
    text = "naïve 👩‍🚀 日本"
    chunks = [stream.push(token) for token in tokenizer.encode(text)]
    assert "�" not in "".join(chunks)
    assert "".join(chunks) == text
    assert stream.flush() == ""


def test_incomplete_character_is_flushed_as_replacement_character():
    stream = BYTES.stream()
    assert [stream.push(byte) for byte in "👍".encode()[:2]] == ["", ""]
    assert stream.flush() == "�"


@settings(deadline=None, max_examples=500)
@given(before=AWKWARD | ANY_TEXT, after=AWKWARD | ANY_TEXT)
def test_cut_between_two_lines_changes_no_token(before, after):
    before, after = f"{before.rstrip()}\n".lstrip(), after.lstrip()
    assert BPE.encode(before) + BPE.encode(after) == BPE.encode(before + after)


@settings(deadline=None, max_examples=500)
@given(text=AWKWARD | ANY_TEXT, size=st.integers(1, 20))
def test_chunks_join_to_the_text(text, size):
    chunks = list(split_text(text, size))
    assert "".join(chunks) == text
    assert all(len(chunk) <= 2 * size for chunk in chunks)


def test_chunks_are_encoded_as_the_whole():
    text = CODE[: 2 * CHUNK_SIZE]  # `encode` itself splits only longer texts.
    chunks = list(split_text(text, 2000))
    assert len(chunks) > 10
    assert list(itertools.chain.from_iterable(map(BPE.encode, chunks))) == BPE.encode(text)


@LOSSLESS
def test_eos_token_is_the_last_id_and_no_text_is_encoded_as_it(tokenizer):
    assert tokenizer.eos_token == tokenizer.vocab_size - 1
    ids = tokenizer.encode(f"a{END_OF_TEXT}b")
    assert tokenizer.eos_token not in ids
    assert tokenizer.decode(ids) == f"a{END_OF_TEXT}b"
    assert tokenizer.decode([*ids, tokenizer.eos_token]) == f"a{END_OF_TEXT}b"
    assert tokenizer.token_bytes(tokenizer.eos_token) == b""


SPELLED = f"{END_OF_TEXT}\n {END_OF_TEXT} a{END_OF_TEXT}b {END_OF_TEXT}{END_OF_TEXT} <|\n"


@pytest.mark.parametrize(
    "tokenizer",
    [BPE, BYTES, train_bpe([SPELLED * 99], 300), train_words([SPELLED], 100), train_characters([SPELLED], 100)],
    ids=["bpe", "bytes", "bpe of it", "words of it", "characters of it"],
)  # fmt: skip
def test_text_that_spells_the_eos_token_is_text(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    for same in (tokenizer, Tokenizer.load(tmp_path)):
        ids = same.encode(SPELLED)
        assert not {same.eos_token, same.unk_token} & set(ids)
        assert same.decode(ids) == SPELLED
        assert same.encode_batch([SPELLED]) == [ids]
        assert same.decode([same.eos_token]) == ""


def test_training_on_the_eos_string_does_not_learn_it():
    tokenizer = train_bpe([END_OF_TEXT * 100], 300)
    assert tokenizer.eos_token == tokenizer.vocab_size - 1
    assert tokenizer.eos_token not in tokenizer.encode(END_OF_TEXT)


def test_byte_ids_are_byte_values():
    assert BYTES.vocab_size == 257
    assert BYTES.encode("aé\0") == list("aé\0".encode())


def test_bpe_has_the_requested_size_and_shortens_text():
    assert BPE.vocab_size == 1000
    assert len(BPE.encode(CODE)) < len(CODE) / 2
    assert train_bpe(["hm"], 1000).vocab_size == 257


@LOSSLESS
@pytest.mark.parametrize("unit", ["x", " ", "\n", "#", "7", "日", "\0", "ab_"])
def test_millions_of_characters_on_one_line(tokenizer, unit):
    text = unit * (1_000_000 // len(unit))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_on_one_very_long_line():
    text = "".join(chr(97 + i * i % 7 % 5) for i in range(500_000))
    tokenizer = train_bpe([text], 600)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", ["a\ud83d", "\udc00"])
def test_a_lone_surrogate_is_refused(text):
    for call in (
        lambda: BPE.encode(text),
        lambda: BPE.encode_batch(["fine", text]),
        lambda: train_bpe([text], 300),
    ):
        with pytest.raises(ValueError, match=r"U\+D[8C].., half of a surrogate pair"):
            call()


@pytest.mark.parametrize("token", [-1, 1000])
def test_an_id_outside_the_vocabulary_is_refused(token):
    with pytest.raises(ValueError, match=f"from 0 to 999, not {token}"):
        BPE.decode([token])


def test_a_vocabulary_too_small_for_bytes_is_refused():
    with pytest.raises(ValueError, match="257, not 256"):
        train_bpe(["text"], 256)


@LOSSLESS
def test_save_and_load_round_trip(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.encode(CODE + END_OF_TEXT) == tokenizer.encode(CODE + END_OF_TEXT)
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]
    assert BPE.fingerprint != BYTES.fingerprint


def test_transformers_loads_tokenizer_json(tmp_path):
    transformers = pytest.importorskip("transformers")
    BPE.save(tmp_path / "tokenizer.json")
    loaded = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert loaded.encode(CODE, add_special_tokens=False) == BPE.encode(CODE)
    assert loaded.encode(END_OF_TEXT) == [BPE.eos_token]


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ValueError, match=r"no such file"):
        Tokenizer.load(tmp_path)
    BPE.save(path)
    content = path.read_text()
    for damaged, message in {
        "": "damaged",
        content[: len(content) // 2]: "damaged",
        content.replace("endoftext", "eot"): "which token ends a document",
        "[]": "damaged",
    }.items():
        path.write_text(damaged)
        with pytest.raises(ValueError, match=message) as error:
            Tokenizer.load(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
    path.write_bytes(b'{\n"\xff')
    with pytest.raises(ValueError, match="line 2: byte 0xff is not UTF-8"):
        Tokenizer.load(path)


def byte_level(split=None, normalizer=None, alphabet=BYTE_TO_UNICODE, **model):
    """A BPE tokenizer of the library, as others train them; `split` comes before the bytes."""
    library = tokenizers.Tokenizer(models.BPE(**model))
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes]) if split else to_bytes
    if normalizer:
        library.normalizer = normalizer
    unk_token = model.get("unk_token", END_OF_TEXT)
    affixes = {k: v for k, v in model.items() if k not in ("unk_token", "dropout")}
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=alphabet,
        special_tokens=list(dict.fromkeys([END_OF_TEXT, unk_token])),
        show_progress=False,
        **affixes,
    )
    library.train_from_iterator(["hello world, the cat sat on the mat"] * 9, trainer)
    library.decoder = decoders.ByteLevel()
    return library


@pytest.mark.parametrize(
    ("options", "loss"),
    [
        ({}, ""),
        ({"unk_token": END_OF_TEXT}, ""),  # as CLIP; never used, since all bytes are known
        ({"alphabet": []}, "capital letters ('HELLO' becomes '')"),
        ({"normalizer": normalizers.Lowercase()}, "capital letters ('HELLO' becomes 'hello')"),
        ({"normalizer": normalizers.Strip()}, "spaces at the ends (' hello ' becomes 'hello')"),
        ({"normalizer": normalizers.NFC()}, "accents ('naïve café' becomes 'naïve café')"),
        ({"normalizer": normalizers.NFKC()}, "accents"),
        ({"normalizer": normalizers.StripAccents()}, "accents"),
        ({"normalizer": normalizers.Prepend("_")}, "plain words ('hello' becomes '_hello')"),
        ({"normalizer": normalizers.Replace("\n", " ")}, "white space"),
        ({"split": pre_tokenizers.WhitespaceSplit()}, "spaces ('hello world' becomes 'helloworld')"),
        ({"split": pre_tokenizers.ByteLevel(add_prefix_space=True)}, "plain words ('hello' becomes"),
        ({"end_of_word_suffix": "</w>", "alphabet": []}, "capital letters"),
    ],
)  # fmt: skip
def test_what_an_imported_tokenizer_loses_is_named(tmp_path, options, loss):
    byte_level(**options).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.lost_text.startswith(loss)
    assert bool(tokenizer.lost_text) == bool(loss)
    ids = tokenizer.encode("hello world, the cat sat on the mat")
    assert bool(tokenizer.find_loss("hello world, the cat sat on the mat", ids)) == (
        loss.startswith(("plain words", "spaces ("))
    )


def test_own_tokenizers_lose_no_text():
    for tokenizer in (BPE, BYTES, train_words([CODE], 1000), train_characters([CODE], 1000)):
        assert tokenizer.lost_text == ""


def test_the_mark_of_a_word_end_is_not_part_of_the_text(tmp_path):
    for options, text in (
        ({}, "hello the cat"),
        ({"split": pre_tokenizers.WhitespaceSplit()}, "hello the cat "),
    ):
        byte_level(end_of_word_suffix="</w>", **options).save(str(tmp_path / "tokenizer.json"))
        tokenizer = Tokenizer.load(tmp_path)
        assert tokenizer.decode(tokenizer.encode("hello the cat")) == text


def test_an_imported_tokenizer_encodes_the_spelled_eos_token_as_text(tmp_path):
    not_special = byte_level()
    not_special.add_tokens([AddedToken(END_OF_TEXT, special=False)])
    words = {"[UNK]": 0, END_OF_TEXT: 1, "Ġ": 2, "<": 3, END_OF_TEXT[1:]: 4, "a": 5}
    word_level = tokenizers.Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    word_level.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    word_level.decoder = decoders.ByteLevel()
    merged = byte_level(normalizer=normalizers.Lowercase())
    for library in (byte_level(), not_special, word_level, merged):
        library.save(str(tmp_path / "tokenizer.json"))
        tokenizer = Tokenizer.load(tmp_path)
        text = f"a {END_OF_TEXT} a"
        ids = tokenizer.encode(text)
        assert tokenizer.eos_token not in ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([tokenizer.eos_token]) == ""
    assert tokenizer.eos_token not in tokenizer.encode(END_OF_TEXT.upper())


def test_a_tokenizer_that_cannot_be_used_is_refused(tmp_path):
    no_unknown_word = tokenizers.Tokenizer(models.WordLevel({"a": 0, END_OF_TEXT: 1}))
    no_unknown_word.decoder = decoders.ByteLevel()
    nothing = tokenizers.Tokenizer(models.BPE({"a": 0, END_OF_TEXT: 1}, []))
    nothing.pre_tokenizer = pre_tokenizers.Split("a", "removed")
    nothing.decoder = decoders.ByteLevel()
    for library, message in (
        (byte_level(alphabet=[], unk_token=END_OF_TEXT), "encodes what it does not know as <|end"),
        (no_unknown_word, "it cannot encode every text: .*UNK"),
        (nothing, "it encodes no text at all"),
    ):
        library.save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(ValueError, match=message) as error:
            Tokenizer.load(tmp_path)
        assert str(tmp_path) in str(error.value)


@pytest.fixture(scope="module", params=KINDS)
def of_kind(request, tmp_path_factory):
    """The library's tokenizer of a kind, and ours."""
    library, file = KINDS[request.param](), tmp_path_factory.mktemp("kind") / "tokenizer.json"
    library.save(str(file))
    return library, Tokenizer.load(file)


SAMPLES = [
    TEXT,
    "Hello world",
    " the  cat ",
    "日本 naïve 👩‍🚀 ж\n\nthe end",
    "x",
    "</s> a[SEP]b",
    "",
]


@pytest.mark.parametrize("text", SAMPLES)
def test_every_kind_encodes_and_decodes_as_the_library(of_kind, text):
    library, tokenizer = of_kind
    library.encode_special_tokens = True
    ids = tokenizer.encode(text)
    if "<" not in text:  # a word that spells a special token has ids of its own
        assert ids == library.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == library.decode(ids)
    assert tokenizer.eos_token not in ids
    if not tokenizer.lost_text and tokenizer.unk_token not in ids:
        assert tokenizer.decode(ids) == text


def test_every_kind_decodes_any_ids_as_the_library(of_kind):
    library, tokenizer = of_kind
    rng = random.Random(0)
    for _ in range(1000):
        ids = rng.choices(range(tokenizer.vocab_size), k=rng.randrange(9))
        text, stream = tokenizer.decode(ids), tokenizer.stream()
        if "\N{REPLACEMENT CHARACTER}" not in text:
            assert text == library.decode(ids)
        assert "".join(map(stream.push, ids)) + stream.flush() == text


def test_every_kind_streams_whole_characters(of_kind):
    _, tokenizer = of_kind
    stream = tokenizer.stream()
    ids = tokenizer.encode(text := "Hello 日本 👩‍🚀 café")
    chunks = [stream.push(token) for token in ids]
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(chunks)
    assert "".join(chunks) == tokenizer.decode(ids)
    assert stream.flush() == ""
    if not tokenizer.lost_text:
        assert "".join(chunks) == text


def test_every_kind_encodes_pieces_of_a_document_as_the_whole(of_kind):
    """Kinds that write a space before a text write none before its later pieces."""
    library, tokenizer = of_kind
    text = TEXT * (3 * CHUNK_SIZE // len(TEXT))
    whole = library.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text) == whole
    cut = text.index("the", CHUNK_SIZE) - 1
    assert text[cut] == " "
    for pieces in ([text[:cut], text[cut:]], text.splitlines(keepends=True)):
        continues = [number > 0 for number in range(len(pieces))]
        encoded = tokenizer.encode_batch(pieces, continues)
        assert list(itertools.chain.from_iterable(encoded)) == whole
        if not tokenizer.lost_text:
            for piece, ids, continued in zip(pieces, encoded, continues, strict=True):
                assert tokenizer.find_loss(piece, ids, continues=continued) == ""


@pytest.mark.parametrize(
    ("kind", "eos", "lost", "unknown"),
    [
        ("byte_level", "</s>", "", None),
        ("byte_fallback", "</s>", "", None),
        ("word_piece", "[SEP]", "capital letters ('HELLO' becomes 'hello')", "[UNK]"),
        ("unigram", "</s>", "spaces at the ends (' hello ' becomes 'hello')", "<unk>"),
    ],
)
def test_every_kind_knows_its_eos_its_unknown_token_and_what_it_loses(
    tmp_path, kind, eos, lost, unknown
):
    KINDS[kind]().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.token_name(tokenizer.eos_token) == eos
    assert tokenizer.lost_text.startswith(lost)
    assert bool(tokenizer.lost_text) == bool(lost)
    unk_token = tokenizer.unk_token
    assert (None if unk_token is None else tokenizer.token_name(unk_token)) == unknown
    assert (unk_token in tokenizer.encode("Ωξ")) == (unknown is not None)


def test_words_without_a_decoder_are_joined_by_spaces_and_word_ends_are_spaces(tmp_path):
    words = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "cat": 2}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(["[EOS]"])
    words.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("the  cat")) == "the cat"
    suffixed = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    suffixed.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    suffixed.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(
        special_tokens=["<unk>", "</s>"], end_of_word_suffix="</w>", show_progress=False
    )
    suffixed.train_from_iterator(["the cat sat"], trainer)
    suffixed.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.encode("the cat")
    assert tokenizer.decode(ids) == suffixed.decode(ids) + " "


def without_special_tokens(path, **beside):
    """A tokenizer.json whose EOS token nothing names, and files beside it."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        initial_alphabet=alphabet, special_tokens=["<fin>", "<stop>"], show_progress=False
    )
    library.train_from_iterator(["a b"], trainer)
    library.save(str(path / "tokenizer.json"))
    for name, content in beside.items():
        (path / f"{name}.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("beside", "eos"),
    [
        ({"tokenizer_config": {"eos_token": "<fin>"}}, "<fin>"),
        ({"tokenizer_config": {"eos_token": {"content": "<stop>", "lstrip": False}}}, "<stop>"),
        ({"tokenizer_config": {}, "special_tokens_map": {"eos_token": "<stop>"}}, "<stop>"),
        ({"tokenizer_config": {"eos_token": "of another model"}}, None),
        ({}, None),
    ],
)
def test_eos_token_is_named_beside_the_file_or_given(tmp_path, beside, eos):
    without_special_tokens(tmp_path, **beside)
    if eos is None:
        with pytest.raises(ValueError, match=r"--end-of-text TOKEN.*special tokens: <fin>, <stop>"):
            Tokenizer.load(tmp_path)
    else:
        tokenizer = Tokenizer.load(tmp_path)
        assert tokenizer.token_name(tokenizer.eos_token) == eos
    given = Tokenizer.load(tmp_path / "tokenizer.json", "<fin>")
    assert given.token_name(given.eos_token) == "<fin>"
    with pytest.raises(ValueError, match="has no <end> token; its special tokens: <fin>, <stop>"):
        Tokenizer.load(tmp_path, "<end>")
    with pytest.raises(ValueError, match=r"encodes text.* as a, which ends a document"):
        Tokenizer.load(tmp_path, "a")


def test_a_saved_tokenizer_keeps_the_eos_token_that_was_given(tmp_path):
    without_special_tokens(tmp_path)
    one, other = (Tokenizer.load(tmp_path, name) for name in ("<fin>", "<stop>"))
    assert one.fingerprint != other.fingerprint  # their prepared tokens differ
    for tokenizer in (one, other, other.padded(400)):
        tokenizer.save(tmp_path / "tokenizer.json")
        loaded = Tokenizer.load(tmp_path)
        assert loaded.eos_token == tokenizer.eos_token
        assert loaded.fingerprint == tokenizer.fingerprint


def test_a_damaged_tokenizer_config_is_named(tmp_path):
    without_special_tokens(tmp_path)
    for damaged in ("{", "[]", '{"eos_token": {}}'):
        (tmp_path / "tokenizer_config.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"tokenizer_config\.json beside it is damaged"):
            Tokenizer.load(tmp_path)


def test_padding_truncation_and_dropout_of_an_imported_tokenizer_are_off(tmp_path):
    library = byte_level(dropout=0.9)
    library.enable_padding(length=100)
    library.enable_truncation(5)
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("hello world, hello cat") == tokenizer.encode("hello world, hello cat")
    assert tokenizer.decode(tokenizer.encode("hello world, hello cat")) == "hello world, hello cat"
    tokenizer.save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint


def test_tokens_of_what_is_unknown_are_counted_as_unknown(tmp_path):
    byte_level(alphabet=[], unk_token="<unk>").save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.unk_token is not None
    assert tokenizer.unk_token in tokenizer.encode("Hello")


def run(*arguments, stdin=b""):
    command = [sys.executable, "-m", "tokenizer", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, timeout=60)


def test_command_line_round_trip(tmp_path):
    text = "def café():\r\n\treturn '👍'\n\n".encode()
    (tmp_path / "a.txt").write_bytes(text * 20)
    trained = run("train", tmp_path / "a.txt", "--vocab-size", 280, "--output", tmp_path / "t.json")
    assert (trained.returncode, trained.stdout) == (0, b"")
    for tokenizer in (tmp_path / "t.json", "bytes"):
        encoded = run("encode", tokenizer, stdin=text)
        assert encoded.returncode == 0
        assert run("decode", tokenizer, stdin=encoded.stdout).stdout == text
    assert run("encode", "bytes", "hi").stdout == b"104 105\n"
    assert run("decode", "bytes", "104", "105").stdout == b"hi"


def test_command_line_tells_what_the_ids_do_not_hold(tmp_path):
    byte_level(normalizer=normalizers.Lowercase()).save(str(tmp_path / "t.json"))
    encoded = run("encode", tmp_path / "t.json", "Hello")
    assert encoded.returncode == 0
    assert encoded.stderr.decode() == (
        "the ids do not hold the whole text: 'Hello' becomes 'hello'\n"
    )
    assert run("encode", tmp_path / "t.json", "hello").stderr == b""


def test_command_line_mistakes_are_one_line(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"fine\nna\xefve\n")
    for arguments, message in (
        (["encode", tmp_path, "x"], b"no such file"),
        (["decode", "bytes", "1", "x2"], b"'x2' is not a token id"),
        (["decode", "bytes", "257"], b"from 0 to 256, not 257"),
        (["train", tmp_path / "latin.txt"], b"latin.txt, line 2: byte 0xef is not UTF-8"),
        (["train", tmp_path / "absent.txt"], b"No such file"),
        (["train", tmp_path / "latin.txt", "--vocab-size", "many"], b"invalid int value"),
        (["encode", "bytes", "--stdin"], b"unrecognized arguments: --stdin"),
        ([], b"COMMAND"),
    ):
        failed = run(*arguments)
        assert failed.returncode == 2
        assert message in failed.stderr
        assert failed.stderr.count(b"\n") == 1


def test_word_vocabulary_is_the_most_frequent_words():
    text = " the cat saw the dog \n the dog \n"
    tokenizer = train_words([text], 5)
    assert tokenizer.decode(tokenizer.encode(text)) == " the <unk> <unk> the dog \n the dog \n"
    assert tokenizer.encode(" the dog \n") == [1, 2, 3]
    assert tokenizer.encode(" mouse") == [tokenizer.unk_token]
    assert tokenizer.encode(" <unk>") == [tokenizer.unk_token]
    assert tokenizer.eos_token == tokenizer.vocab_size - 1 == 4


def test_known_words_are_lossless(tmp_path):
    text = "Some words,\n\n  and  more\tof them; été 東京 \n"
    tokenizer = train_words([text], 1000)
    tokenizer.save(tmp_path / "tokenizer.json")
    for same in (tokenizer, Tokenizer.load(tmp_path)):
        assert same.decode(same.encode(text)) == text
        assert same.unk_token == 0
        assert same.fingerprint == tokenizer.fingerprint
    assert byte_tokenizer().unk_token is None


def test_penn_treebank_has_the_word_counts_of_mikolov(real_data):
    tokenizer = train_words([(real_data / "ptb" / "train.txt").read_text("utf-8")], 10_001)
    text = (real_data / "ptb" / "validation.txt").read_text("utf-8")
    ids = tokenizer.encode(text)
    assert (tokenizer.vocab_size, len(ids)) == (10_001, 73_760)
    assert tokenizer.decode(ids) == text


def test_character_vocabulary_is_the_most_frequent_characters():
    tokenizer = train_characters(["aaab", "bb\nc"], 5)
    assert tokenizer.encode("ab\n") == [1, 2, 3]
    assert tokenizer.encode("ac") == [1, tokenizer.unk_token]
    assert tokenizer.decode(tokenizer.encode("acb")) == "a <unk>b"
    assert tokenizer.eos_token == tokenizer.vocab_size - 1 == 4
    assert train_characters(["abc"], 4096).vocab_size == 5
    with pytest.raises(ValueError, match="at least 3 ids, not 2"):
        train_characters(["abc"], 2)
    with pytest.raises(ValueError, match=r"U\+D83D, half of a surrogate pair"):
        train_characters(["a\ud83d"], 10)


KNOWN = sorted({*"aé1½# \n\r\t\x0b\x85\u2028́👍\0日", *END_OF_TEXT})
CHARACTERS = train_characters(["".join(KNOWN)], 1000)


@settings(max_examples=300)
@given(text=st.text(st.sampled_from(KNOWN), max_size=60))
def test_known_characters_are_lossless_with_one_id_each(text):
    ids = CHARACTERS.encode(text)
    assert len(ids) == len(text)
    assert CHARACTERS.decode(ids) == text
    assert [CHARACTERS.token_bytes(token).decode() for token in ids] == list(text)
    assert CHARACTERS.encode_batch([text, "a"]) == [ids, CHARACTERS.encode("a")]
    stream = CHARACTERS.stream()
    assert [stream.push(token) for token in ids] == list(text)
    assert stream.flush() == ""
    assert not {CHARACTERS.unk_token, CHARACTERS.eos_token} & set(ids)


def test_character_tokenizer_save_and_load_round_trip(tmp_path):
    CHARACTERS.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path)
    assert loaded.fingerprint == CHARACTERS.fingerprint
    assert loaded.unk_token == CHARACTERS.unk_token == 0
    text = "".join(KNOWN) * 5000
    assert loaded.encode(text) == CHARACTERS.encode(text)
    assert loaded.decode(loaded.encode(text)) == text


def test_tinyshakespeare_has_65_characters(real_data):
    text = (real_data / "tinyshakespeare" / "input.txt").read_text("utf-8")
    tokenizer = train_characters([text[: int(0.9 * len(text))]], 4096)
    assert tokenizer.vocab_size == 65 + len(["<unk>", END_OF_TEXT])
    ids = tokenizer.encode(text)
    assert len(ids) == len(text) == 1_115_394
    assert tokenizer.decode(ids) == text


def test_token_of_a_word_is_that_after_a_space_or_the_one_without():
    assert BPE.decode([BPE.word_token("the")]) == " the"
    assert BPE.decode([BPE.word_token(" the")]) == " the"
    assert BPE.decode([BPE.word_token("\n")]) == "\n"
    words = train_words(["one two"], 10)
    assert words.decode([words.word_token("two")]).strip() == "two"


def test_a_word_without_a_token_of_its_own_is_explained():
    with pytest.raises(ValueError, match=r"'xyz' is 3 tokens \('x' 'y' 'z'\).*more frequent word"):
        BYTES.word_token("xyz")
    with pytest.raises(ValueError, match="'three' is not in the vocabulary"):
        train_words(["one two"], 10).word_token("three")
    with pytest.raises(ValueError, match="the word is empty"):
        BPE.word_token("")
    with pytest.raises(ValueError) as error:
        BYTES.word_token("x" * 10_000)
    assert len(str(error.value)) < 300
