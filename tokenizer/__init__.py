"""Tokenizers: byte-level BPE, plain bytes, characters, whole words, or any tokenizer.json.

Byte-pair encoding (Gage 1994; Sennrich et al. 2016) starts with the 256 bytes and repeatedly
merges the most frequent pair of neighbors until the vocabulary is full. On bytes instead of
characters (Radford et al. 2019) it can encode any text. Plain bytes are BPE before the first
merge. Both are lossless. Whole words, with the space before them, were the tokens of the first
language models: a word that is not among the most frequent becomes ` <unk>` and is lost.
Characters are learned in the same way; a small alphabet makes a small vocabulary. In all of them
`<|endoftext|>` is the last id; text that contains these letters is never encoded as it.

A tokenizer.json that was made elsewhere may be of any kind: byte-level, BPE with byte fallback
(Llama), WordPiece (BERT), Unigram (T5). Each of its tokens stands for the same bytes everywhere, except
that the first token of a text loses the space before it. Such a tokenizer may lose text: it may write
everything in lower case, drop spaces, or not know every character. `Tokenizer.lost_text` and `find_loss`
tell what. Its EOS token is the one that it, or a tokenizer_config.json beside it, names as others do.

This is the only file that imports the `tokenizers` library. Its tokenizer.json is our file format.
"""

import codecs
import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

# If it is set, the library does not warn when a process that has used its threads forks.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

END_OF_TEXT = "<|endoftext|>"
"""The EOS token of our own tokenizers: it precedes every document, and so ends the one before."""

END_OF_TEXT_NAMES = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|im_end|>",
    "[EOS]",
    "[SEP]",
)
"""What special token is the EOS token of a tokenizer.json if nothing else says so; the first that it has."""

CONFIG = "tokenizer_config.json"
"""The file beside a tokenizer.json in which `transformers` keeps the name of the EOS token."""

GPT2_BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
"""BPE merges only within what GPT-2's pattern matches: a word, a number or signs, each with the space
before it, or white space up to the last space. Other programs know this pattern by its name. Text can
be cut between two lines, if there is no other white space, and between a letter or digit and white
space, without changing its tokens."""

WORD_PATTERN = rf"<(?={re.escape(END_OF_TEXT[1:])}(?!\S))| ?\S+| ?\n|\s"
"""A word or a line end, with the space before it. A word that spells the EOS token is cut in two."""

CHARACTER_PATTERN = r"[\s\S]"
"""Any one character."""

UNK_TOKEN = " <unk>"
"""Replaces words and characters that are not in the vocabulary; spelled as in the Penn Treebank."""

CHUNK_SIZE = 2**14
"""Characters of one input to the library, its unit of parallel work."""

BATCH_SIZE = 2**19
"""Characters of one call to the library: an encoding takes about 100 bytes per token."""

_SAFE_CUT = re.compile(r"(?<=[^\W_])(?=\s)|(?<=\S\n)(?=\S)")


_PRINTABLE, _OTHERS = {*range(33, 127), *range(161, 173), *range(174, 256)}, itertools.count(256)
BYTE_TO_UNICODE = [chr(byte if byte in _PRINTABLE else next(_OTHERS)) for byte in range(256)]
"""The library's character for each byte: itself if printable, else one from 256 on."""
UNICODE_TO_BYTE = {character: byte for byte, character in enumerate(BYTE_TO_UNICODE)}
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

PROBES = {
    "plain words": "hello",
    "capital letters": "HELLO",
    "spaces": "hello world",
    "spaces at the ends": " hello ",
    "white space": "a  b\tc\n\n    d\r\n",
    "digits and signs": "0123456789!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
    "accents": "naïve cafe\u0301",
    "other scripts": "привет東京👍",
    "character variants": "ﬁ½①ＡÅ\u200d\u00ad",
    "control characters": "".join(map(chr, [*range(32), 127])),
    # Every byte that UTF-8 can contain is in one of these characters.
    "other characters": "".join(
        map(chr, [*range(256), *range(256, 2048, 64), *range(2048, 0xD800, 4096)])
    )
    + "\ud000\ue000\uf000\U00010000\U00040000\U00080000\U000c0000\U00100000",
}
"""What a tokenizer may lose, and text with which it shows; the first are the simplest."""

MAX_BPE_VOCAB_SIZE = 2**24
"""Largest vocabulary of BPE: the library reserves memory for all of it and aborts if there is too little."""


def split_text(text: str, size: int = CHUNK_SIZE) -> Iterator[str]:
    """Split a text into chunks of at most 2 * `size` characters that are encoded as the whole is.

    A word is cut only where `size` characters contain no end of a word or line.
    """
    start = 0
    while len(text) - start > 2 * size:
        cut = _SAFE_CUT.search(text, start + size, start + 2 * size)
        end = cut.start() if cut else start + size
        yield text[start:end]
        start = end
    yield text[start:]


def decode_utf8(data: bytes, name: str, line: int = 1, offset: int = 0) -> str:
    """Decode UTF-8; a ValueError names the file and the place of the first invalid byte.

    `line` is the number of the first line of `data` in the file, `offset` that of its first byte.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        raise ValueError(
            f"{name}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8 (at offset "
            f"{offset + error.start}); save the file as UTF-8, for example: "
            f"iconv -f {'UTF-16' if is_utf16 else 'LATIN1'} -t UTF-8 FILE > NEW"
        ) from None


def describe_change(before: str, after: str) -> str:
    """Return "'Hello' becomes 'hello'": the first difference of two texts, with what is around it."""
    pairs = enumerate(zip(before, after, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), min(len(before), len(after)))
    start = max(0, same - 10)
    return f"{before[start : start + 24]!r} becomes {after[start : start + 24]!r}"


class Tokenizer:
    """A tokenizer, made by `train_...`, `byte_tokenizer` or `Tokenizer.load`."""

    vocab_size: int
    """Number of ids."""
    eos_token: int
    """The id of the token that ends a document: in our own tokenizers `<|endoftext|>`."""
    special_tokens: dict[int, str]
    """The names of the tokens that stand for no text, `eos_token` among them."""
    unk_token: int | None
    """The id of all unknown words or characters; None if any text can be encoded."""
    fingerprint: str
    """A hash of tokenizer.json."""
    lost_text: str
    """What does not survive `encode` and `decode`, with examples; "" if all text does.

    Unknown words and characters are not meant: `unk_token` stands for them.
    """

    def __init__(self, library: tokenizers.Tokenizer, end_of_text: str = END_OF_TEXT) -> None:
        eos_token = library.token_to_id(end_of_text)
        if eos_token is None:
            raise ValueError(f"the tokenizer has no {end_of_text} token{_list_special(library)}")
        vocabulary = library.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocabulary.values())
        self.eos_token = eos_token
        # Not saved in tokenizer.json: user input is text, even if it spells a special token.
        library.encode_special_tokens = True
        library.no_padding()
        library.no_truncation()
        if isinstance(library.model, models.BPE):
            library.model.dropout = None  # else each call would return other ids
        identity = library.to_str() + end_of_text * (end_of_text != END_OF_TEXT)
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()
        self._library = library
        self.special_tokens = _special_tokens(library) | {eos_token: end_of_text}
        self._token_bytes, self._first_bytes = self._bytes_of_tokens(vocabulary)
        self._probe()

    def _bytes_of_tokens(self, vocabulary: dict[str, int]) -> tuple[list[bytes], dict[int, bytes]]:
        """Return the bytes of each id, and those of ids that have others at the start of a text."""
        model, added = self._library.model, self._library.get_added_tokens_decoder()
        decode = self._library.decoder.decode if self._library.decoder else " ".join
        is_byte_level, has_byte_tokens = decode(["Ã©"]) == "é", decode(["<0x41>"]) == "A"
        prefix = getattr(model, "continuing_subword_prefix", None) or ""
        suffix = getattr(model, "end_of_word_suffix", None) or ""
        before = self._library.pre_tokenizer
        pieces = before.pre_tokenize_str("a b") if before else [("a b", (0, 3))]
        # The suffix of a word stands for the space after it where the pre-tokenizer drops spaces.
        keeps_spaces = len("".join(piece for piece, _ in pieces)) > len("ab")
        word_end = b"" if keeps_spaces else b" "
        token_bytes: list[bytes] = [b""] * self.vocab_size
        first_bytes: dict[int, bytes] = {}
        for token, index in vocabulary.items():
            if index in self.special_tokens:
                continue
            text = token.removesuffix(suffix)
            end = word_end if suffix and token.endswith(suffix) else b""
            if is_byte_level:
                text = text.removeprefix(prefix)
                is_bytes = index not in added and UNICODE_TO_BYTE.keys() >= set(text)
                data = bytes(map(UNICODE_TO_BYTE.__getitem__, text)) if is_bytes else text.encode()
            elif has_byte_tokens and re.fullmatch("<0x[89A-F][0-9A-F]>", token):
                data = bytes.fromhex(token[3:5])  # part of a character
            else:
                data = decode(["x", text])[1:].encode()
                if (first := decode([text]).encode()) != data:
                    first_bytes[index] = first + end
            token_bytes[index] = data + end
        return token_bytes, first_bytes

    def _probe(self) -> None:
        """Encode and decode a few texts: learn what is lost, and which ids need a detour.

        A ValueError if the tokenizer cannot be used at all.
        """
        self._detours: dict[int, list[int]] = {}
        model = self._library.model
        try:
            probes = {name: self.encode(text) for name, text in PROBES.items()}
        except Exception as error:  # The library raises nothing narrower.
            raise ValueError(f"it cannot encode every text: {error}") from error
        if not any(probes.values()):
            raise ValueError("it encodes no text at all: its vocabulary does not fit")
        if any(self.eos_token in ids for ids in probes.values()):
            raise ValueError(
                f"it encodes text, or what it does not know, as {self.special_tokens[self.eos_token]}, "
                "which ends a document: use another token as the end of text or as the unknown one, "
                "or train it with all 256 bytes"
            )
        if isinstance(model, models.Unigram):  # which has no attribute for it
            unk_token = json.loads(self._library.to_str())["model"]["unk_id"]
        else:
            unk_name = getattr(model, "unk_token", None)
            unk_token = self._library.token_to_id(unk_name) if unk_name else None
        is_used = isinstance(model, models.WordLevel) or any(
            unk_token in ids for ids in probes.values()
        )
        self.unk_token = unk_token if is_used and unk_token != self.eos_token else None
        parts = "hello", " world\n", "hello"
        ids_of_parts = list(itertools.chain.from_iterable(map(self.encode, parts)))
        self._needs_anchor = self.encode("".join(parts)) != ids_of_parts
        anchors = {text: self.encode(text) for text in ("a", "a\n")}
        known = {text: ids for text, ids in anchors.items() if self.unk_token not in ids}
        self._anchors: dict[str, list[int]] = {"": [], **known}
        # The library's own protection fails where a special token is also a word of the model.
        for index, token in self.special_tokens.items():
            if index != self.unk_token and index in self.encode(token):
                pieces = [
                    piece
                    for text in (token[:1], token[1:])
                    for piece in self._without_anchor("a", text, self.encode(f"a{text}"))
                ]
                self._detours[index] = [piece for piece in pieces if piece != index]
        losses = []
        for name, text in PROBES.items():
            ids = probes[name]
            change = "" if self.unk_token in ids else self.find_loss(text, ids)
            if change:
                losses.append(f"{name} ({change})")
        # If not even plain words survive, nothing does, and a second example tells no more.
        self.lost_text = ", ".join(
            losses[: 1 if losses[:1] and losses[0].startswith("plain") else 2]
        )

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; a lone surrogate, which UTF-8 cannot hold, is a ValueError."""
        if len(text) > 2 * CHUNK_SIZE:
            return self.encode_batch([text])[0]
        try:
            return self._as_text(self._library.encode(text, add_special_tokens=False).ids)
        except TypeError:
            raise _surrogate_error([text]) from None

    def encode_batch(self, texts: Sequence[str], continues: Sequence[bool] = ()) -> list[list[int]]:
        """Return the ids of each text, computed on all cores.

        `continues` tells for each text whether it continues another, cut as by `split_text`.
        """
        chunks = [list(split_text(text)) for text in texts]
        flat = [
            (self._anchor(chunk) if number or continued else "", chunk)
            for text_chunks, continued in zip(
                chunks, continues or [False] * len(texts), strict=True
            )
            for number, chunk in enumerate(text_chunks)
        ]
        ends = itertools.accumulate(len(chunk) for _, chunk in flat)
        batches = itertools.groupby(zip(flat, ends, strict=True), lambda x: x[1] // BATCH_SIZE)
        encoded: list[list[int]] = []
        try:
            for _, group in batches:
                batch = [anchored for anchored, _ in group]
                inputs = [anchor + chunk for anchor, chunk in batch]
                encodings = self._library.encode_batch_fast(inputs, add_special_tokens=False)
                encoded += [
                    self._without_anchor(anchor, chunk, self._as_text(encoding.ids))
                    for (anchor, chunk), encoding in zip(batch, encodings, strict=True)
                ]
        except TypeError:
            raise _surrogate_error(texts) from None
        ids = iter(encoded)
        return [list(itertools.chain.from_iterable(itertools.islice(ids, len(c)))) for c in chunks]

    def _anchor(self, chunk: str) -> str:
        """Return what to encode before a chunk that continues a text.

        Some tokenizers write a space before all that they encode.
        """
        anchor = "a" if chunk[:1].isspace() else "a\n"
        return anchor if self._needs_anchor and anchor in self._anchors else ""

    def _without_anchor(self, anchor: str, text: str, ids: list[int]) -> list[int]:
        """Return the ids of a text from those of `anchor + text`, or without it if they do not start so."""
        prefix = self._anchors.get(anchor)
        if prefix is None or ids[: len(prefix)] != prefix:
            return self.encode(text)
        return ids[len(prefix) :]

    def _as_text(self, ids: list[int]) -> list[int]:
        """Replace the ids of special tokens, which the text only spelled, with ids of their letters."""
        if not self._detours or self._detours.keys().isdisjoint(ids):
            return ids
        return [piece for token in ids for piece in self._detours.get(token, [token])]

    def find_loss(self, text: str, ids: Iterable[int], *, continues: bool = False) -> str:
        """Return an example of what `decode(ids)` changes in the text that was encoded, or ""."""
        decoded = b"".join(self._bytes_of_text(ids, continues))
        if decoded == text.encode():
            return ""
        return describe_change(text, decoded.decode(errors="replace"))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids: U+FFFD for invalid UTF-8, nothing for special tokens."""
        return b"".join(self._bytes_of_text(ids)).decode(errors="replace")

    def _bytes_of_text(self, ids: Iterable[int], continues: bool = False) -> Iterator[bytes]:
        """Yield the bytes of each token; the first with text is the start of one, if it does not continue it."""
        rest = iter(ids)
        if not continues:
            for token in rest:
                yield self.token_bytes(token, is_first=True)
                if token not in self.special_tokens:
                    break
        yield from map(self.token_bytes, rest)

    def token_bytes(self, token: int, *, is_first: bool = False) -> bytes:
        """Return the bytes of one token: b"" for a special token.

        Where `is_first`, a token that starts with a space may lack it, as at the start of a text.
        """
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token ids go from 0 to {self.vocab_size - 1}, not {token}")
        if is_first and token in self._first_bytes:
            return self._first_bytes[token]
        return self._token_bytes[token]

    def word_token(self, word: str) -> int:
        """Return the token of a word: as in the middle of a text, after a space, or else without one.

        Raises:
            ValueError: The word is empty, unknown, or more than one token.
        """
        if not word:
            raise ValueError("the word is empty: expected one word")
        for text in (f" {word}", word):
            ids = self.encode(text)
            if len(ids) == 1 and ids[0] != self.unk_token:
                return ids[0]
        if self.unk_token in ids:
            raise ValueError(
                f"{word[:40]!r} is not in the vocabulary: choose a word of the training text"
            )
        pieces = " ".join(repr(self.decode([token])) for token in ids[:8])
        raise ValueError(
            f"{word[:40]!r} is {len(ids)} tokens ({pieces}{' …' if len(ids) > 8 else ''}), and only a "
            f"single token has a vector: choose a more frequent word"
        )

    def token_name(self, token: int) -> str:
        """Return what tokenizer.json calls a token, such as <|endoftext|>."""
        return str(self._library.id_to_token(token))

    def padded(self, vocab_size: int) -> "Tokenizer":
        """Return the tokenizer with special tokens up to a model's vocabulary; a ValueError if that is smaller.

        The embeddings of released models often have more rows than there are tokens.
        """
        if vocab_size < self.vocab_size:
            raise ValueError(
                f"the tokenizer has {self.vocab_size} ids, the model only {vocab_size}: "
                "they are not of the same model"
            )
        names = [f"<|unused_{index}|>" for index in range(self.vocab_size, vocab_size)]
        if not names:
            return self
        library = tokenizers.Tokenizer.from_str(self._library.to_str())
        library.add_special_tokens(names)
        return type(self)(library, self.special_tokens[self.eos_token])

    def stream(self, prompt: Iterable[int] = ()) -> "StreamDecoder":
        """Return a decoder for tokens that arrive one by one after those of a prompt."""
        return StreamDecoder(self, prompt)

    def to_json(self) -> str:
        """Return the content of tokenizer.json."""
        return str(self._library.to_str())

    def save(self, path: Path | str) -> None:
        """Write tokenizer.json; if that fails, the previous file stays.

        If the EOS token does not follow from it, tokenizer_config.json beside it names it.
        """
        path, end_of_text = Path(path), self.special_tokens[self.eos_token]
        if _usual_end_of_text(self._library) != end_of_text:
            config = json.dumps({"eos_token": end_of_text}, indent=2)
            path.with_name(CONFIG).write_text(config + "\n", "utf-8")
        temporary = path.with_name(path.name + ".part")
        with temporary.open("w", encoding="utf-8") as file:
            file.write(self._library.to_str(pretty=True))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path | str, end_of_text: str | None = None) -> "Tokenizer":
        """Read a tokenizer.json, or the one in a run directory.

        Its EOS token is `end_of_text`, else what a tokenizer_config.json or special_tokens_map.json
        beside it calls `eos_token`, else the first of `END_OF_TEXT_NAMES` that it has. A file that is
        missing or damaged, or a tokenizer without an EOS token, is a ValueError.
        """
        file = Path(path, "tokenizer.json") if Path(path).is_dir() else Path(path)
        if not file.exists():
            raise ValueError(f"{file}: no such file; expected a tokenizer.json")
        text = decode_utf8(file.read_bytes(), str(file))
        try:
            library = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # The library raises nothing narrower.
            raise ValueError(f"{file}: damaged, or no tokenizer.json: {error}") from error
        try:
            if end_of_text is None:
                end_of_text = _find_end_of_text(library, file.parent)
            return cls(library, end_of_text)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None


class StreamDecoder:
    """Decodes one token at a time into complete characters.

    The results of all `push` calls and of `flush`, joined, equal `Tokenizer.decode`.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.is_first = all(token in tokenizer.special_tokens for token in prompt)
        """Whether the next token starts the text."""

    def push(self, token: int) -> str:
        """Return the characters that this token completes; '' while a character is incomplete."""
        data = self._tokenizer.token_bytes(token, is_first=self.is_first)
        self.is_first = self.is_first and token in self._tokenizer.special_tokens
        return self._decoder.decode(data)

    def flush(self) -> str:
        """Return an incomplete last character as U+FFFD."""
        return self._decoder.decode(b"", final=True)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train BPE with `vocab_size` ids, or fewer if the texts have no more pairs to merge."""
    if vocab_size <= 256:
        raise ValueError(
            f"a vocabulary holds at least 256 bytes and {END_OF_TEXT}: 257, not {vocab_size}"
        )
    if vocab_size > MAX_BPE_VOCAB_SIZE:
        raise ValueError(
            f"a vocabulary of byte pairs holds at most {MAX_BPE_VOCAB_SIZE} ids, not {vocab_size}"
        )
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = GPT2_BYTE_LEVEL
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,
        initial_alphabet=BYTE_TO_UNICODE,
        show_progress=False,
    )
    try:
        library.train_from_iterator(itertools.chain.from_iterable(map(split_text, texts)), trainer)
    except UnicodeEncodeError as error:
        raise _surrogate_error([error.object]) from None
    return _byte_level(library)


def train_words(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a word tokenizer: ` <unk>`, the most frequent words, EOS; at most `vocab_size` ids."""
    if vocab_size < 3:
        raise ValueError(f"a vocabulary of words needs at least 3 ids, not {vocab_size}")
    library = _word_level(WORD_PATTERN, [])
    trainer = trainers.WordLevelTrainer(vocab_size=vocab_size - 1, show_progress=False)
    library.train_from_iterator(itertools.chain.from_iterable(map(split_text, texts)), trainer)
    ids = library.get_vocab(with_added_tokens=False)
    ids.pop(_to_unicode(UNK_TOKEN), None)
    words = sorted(ids, key=lambda word: ids[word])[: vocab_size - 2]
    return _byte_level(_word_level(WORD_PATTERN, words))


def train_characters(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a character tokenizer: ` <unk>`, the most frequent characters, EOS; at most `vocab_size` ids."""
    if vocab_size < 3:
        raise ValueError(f"a vocabulary of characters needs at least 3 ids, not {vocab_size}")
    counts = Counter(itertools.chain.from_iterable(texts))
    characters = [character for character, _ in counts.most_common(vocab_size - 2)]
    try:
        return _byte_level(_word_level(CHARACTER_PATTERN, list(map(_to_unicode, characters))))
    except UnicodeEncodeError:
        raise _surrogate_error(characters) from None


def byte_tokenizer() -> Tokenizer:
    """Return the tokenizer of 256 bytes, each with its value as id, and `<|endoftext|>`."""
    library = tokenizers.Tokenizer(models.BPE(vocab=UNICODE_TO_BYTE, merges=[]))
    library.pre_tokenizer = BYTE_LEVEL
    return _byte_level(library)


def _word_level(pattern: str, tokens: Sequence[str]) -> tokenizers.Tokenizer:
    """Return a model in which each match of `pattern` is one token, or the unknown token, id 0."""
    unk_token = _to_unicode(UNK_TOKEN)
    ids = {token: index for index, token in enumerate([unk_token, *tokens])}
    library = tokenizers.Tokenizer(models.WordLevel(ids, unk_token=unk_token))
    library.pre_tokenizer = _pre_tokenizer(pattern)
    return library


def _pre_tokenizer(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Split text at matches of a pattern, then write the bytes of each part as characters."""
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, BYTE_LEVEL])


def _to_unicode(text: str) -> str:
    """Return the characters by which the library writes the bytes of a text."""
    return "".join(BYTE_TO_UNICODE[byte] for byte in text.encode())


def _byte_level(library: tokenizers.Tokenizer) -> Tokenizer:
    """Add the byte-level decoder and the EOS token."""
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return Tokenizer(library)


def _special_tokens(library: tokenizers.Tokenizer) -> dict[int, str]:
    """Return the names of the special tokens by id."""
    added = library.get_added_tokens_decoder().items()
    return {index: token.content for index, token in added if token.special}


def _list_special(library: tokenizers.Tokenizer) -> str:
    """Return the special tokens for an error message."""
    names = list(_special_tokens(library).values())
    return f"; its special tokens: {', '.join(names[:8])}{', …' * (len(names) > 8)}" * bool(names)


def _find_end_of_text(library: tokenizers.Tokenizer, folder: Path) -> str:
    """Return the name of the EOS token by the files in a folder, or the usual one; else a ValueError."""
    for file in (folder / CONFIG, folder / "special_tokens_map.json"):
        if not file.is_file():
            continue
        try:
            token = json.loads(decode_utf8(file.read_bytes(), str(file))).get("eos_token")
            name = token["content"] if isinstance(token, dict) else token
        except (json.JSONDecodeError, AttributeError, KeyError) as error:
            raise ValueError(f"{file.name} beside it is damaged: {error!r}") from None
        if isinstance(name, str) and library.token_to_id(name) is not None:
            return name
    if name := _usual_end_of_text(library):
        return name
    raise ValueError(
        "which token ends a document? Name it with --end-of-text TOKEN, or as eos_token in a "
        f"{CONFIG} beside it{_list_special(library)}"
    )


def _usual_end_of_text(library: tokenizers.Tokenizer) -> str | None:
    """Return the EOS token that a tokenizer has by its name, or None."""
    special_tokens = _special_tokens(library).values()
    if library.token_to_id(END_OF_TEXT) is not None:
        return END_OF_TEXT
    return next((name for name in END_OF_TEXT_NAMES if name in special_tokens), None)


def _surrogate_error(texts: Iterable[str]) -> ValueError:
    """Return the error for the first lone surrogate in texts that the library refused."""
    lone = next(filter(None, (re.search("[\ud800-\udfff]", text) for text in texts)))
    return ValueError(
        f"character {lone.start()} is U+{ord(lone[0]):04X}, half of a surrogate pair: not text"
    )
