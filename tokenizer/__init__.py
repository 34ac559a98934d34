"""Text to token ids and back: byte-level BPE, plain bytes, characters, or whole words.

Byte-pair encoding (Gage 1994; Sennrich et al. 2016) begins with the 256 bytes and merges
the most frequent pair of neighbours, again and again, until the vocabulary is full.
Working on bytes rather than characters (Radford et al. 2019), it can write any text. The
plain bytes are the same thing before the first merge. Both lose nothing. Whole words, with
the space before them, are what language models had first: a word that was not among the most
frequent becomes ` <unk>`, and is lost. Characters are learned in the same way: those of a small alphabet
are a small vocabulary. In all, `<|endoftext|>` is the last id; text that happens to contain those
letters never becomes it.

This is the only file that imports the `tokenizers` library, whose own file format,
tokenizer.json, is ours too.
"""

import codecs
import hashlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

__all__ = [
    "END_OF_TEXT",
    "StreamDecoder",
    "Tokenizer",
    "byte_tokenizer",
    "from_utf8",
    "pieces",
    "train_bpe",
    "train_characters",
    "train_words",
]

# Set at all, it keeps the library from warning when a process that has used its threads forks.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

END_OF_TEXT = "<|endoftext|>"
"""Stands before every document, so that it also says where the last one ended."""

WORDS = (
    r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]{1,64}"  # a word, with the space or sign before it
    r"| ?\p{N}{1,3}"  # up to three digits
    r"| ?[^\s\p{L}\p{M}\p{N}]{1,64}"  # signs
    r"|\s{0,63}[\r\n](?!\s)"  # all white space up to the start of a line
    r"|\s{1,64}(?!\S)"  # or up to the last space, which belongs to the word behind it
    r"|\s"
)
"""What BPE may not merge across. Text can be cut where a line starts with anything but white
space, and between a letter or digit and white space, without a change in its tokens. The
bound of 64 keeps time and memory linear in text without spaces."""

SPACED = r" ?\S+| ?\n|\s"
"""A word or a line end, with the space before it."""

CHARACTER = r"[\s\S]"
"""Any one."""

UNKNOWN = " <unk>"
"""What a word or a character that is not in the vocabulary becomes; the Penn Treebank spells its own so."""

PIECE = 2**14
"""Characters that go to the library at once: the unit of its parallel work."""

_SAFE_CUT = re.compile(r"(?<=[^\W_])(?=\s)|(?<=\S\n)(?=\S)")


def _byte_letters() -> list[str]:
    """The letter by which the library writes each byte: itself if printable, else one from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = itertools.count(256)
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


LETTERS = _byte_letters()
BYTES = {letter: byte for byte, letter in enumerate(LETTERS)}


def pieces(text: str, size: int = PIECE) -> Iterator[str]:
    """Cut a text into pieces of at most 2 * `size` characters that encode as the whole does.

    Only where `size` characters pass without the end of a word or a line is one cut anywhere.
    """
    start = 0
    while len(text) - start > 2 * size:
        cut = _SAFE_CUT.search(text, start + size, start + 2 * size)
        end = cut.start() if cut else start + size
        yield text[start:end]
        start = end
    yield text[start:]


def _groups(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    """The texts in groups of about `size` characters: an encoding weighs 100 bytes a token."""
    group, held = [], 0
    for text in texts:
        group.append(text)
        held += len(text)
        if held >= size:
            yield group
            group, held = [], 0
    if group:
        yield group


def from_utf8(data: bytes, name: str, line: int = 1) -> str:
    """The text of `data`; bytes that are not UTF-8 are a ValueError with `name` and the line."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise ValueError(
            f"{name}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; "
            "save the file as UTF-8 and try again"
        ) from None


class Tokenizer:
    """A byte-level tokenizer: made by a `train_…` below, `byte_tokenizer` or `Tokenizer.open`."""

    vocab_size: int
    """Number of ids."""
    eos_token: int
    """The id of `<|endoftext|>`."""
    unk_token: int | None
    """The id that stands for all words or characters that have none; None where every text has ids."""
    fingerprint: str
    """The same for two tokenizers that write the same tokenizer.json."""

    def __init__(self, library: Library) -> None:
        end_of_text = library.token_to_id(END_OF_TEXT)
        if end_of_text is None:
            raise ValueError(f"the tokenizer has no {END_OF_TEXT} token")
        vocabulary = library.get_vocab(with_added_tokens=True)
        added = library.get_added_tokens_decoder()
        self.vocab_size = 1 + max(vocabulary.values())
        self.eos_token = end_of_text
        whole_words = isinstance(library.model, models.WordLevel)
        self.unk_token = library.token_to_id(library.model.unk_token) if whole_words else None
        self.fingerprint = hashlib.sha256(library.to_str().encode()).hexdigest()
        self._bytes = [b""] * self.vocab_size
        for token, index in vocabulary.items():
            if index in added:
                self._bytes[index] = b"" if added[index].special else token.encode()
                continue
            try:
                self._bytes[index] = bytes(BYTES[letter] for letter in token)
            except KeyError:
                raise ValueError(
                    f"not a byte-level tokenizer: token {index} is {token!r}"
                ) from None
        # Not part of tokenizer.json: what a user writes is text, even if it spells a special token.
        library.encode_special_tokens = True
        library.no_padding()
        library.no_truncation()
        self._library = library

    def encode(self, text: str) -> list[int]:
        """The ids of a text; a lone surrogate, which no UTF-8 can hold, is a ValueError."""
        if len(text) > 2 * PIECE:
            return self.encode_batch([text])[0]
        try:
            return list(self._library.encode(text, add_special_tokens=False).ids)
        except TypeError:
            raise _surrogate([text]) from None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, on all cores."""
        parts = [list(pieces(text)) for text in texts]
        encoded: list[list[int]] = []
        try:
            for some in _groups(itertools.chain.from_iterable(parts), 2**19):
                batch = self._library.encode_batch_fast(some, add_special_tokens=False)
                encoded += [encoding.ids for encoding in batch]
        except TypeError:
            raise _surrogate(texts) from None
        ids = iter(encoded)
        return [list(itertools.chain.from_iterable(itertools.islice(ids, len(p)))) for p in parts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that are no character read U+FFFD, special tokens nothing."""
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one token stands for: b"" for a special token."""
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token ids go from 0 to {self.vocab_size - 1}, not {token}")
        return self._bytes[token]

    def stream(self) -> "StreamDecoder":
        """Decode tokens as they come."""
        return StreamDecoder(self)

    def save(self, path: Path | str) -> None:
        """Write tokenizer.json, or leave what was there."""
        path = Path(path)
        beside = path.with_name(path.name + ".part")
        with beside.open("w", encoding="utf-8") as file:
            file.write(self._library.to_str(pretty=True))
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Read a tokenizer.json, or the one in a run directory; a ValueError says what is wrong."""
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.exists():
            raise ValueError(f"{file}: no such file; expected a tokenizer.json")
        text = from_utf8(file.read_bytes(), str(file))
        try:
            library = Library.from_str(text)
        except Exception as error:  # The library raises nothing narrower.
            raise ValueError(f"{file}: damaged, or no tokenizer.json: {error}") from error
        try:
            if not isinstance(library.decoder, decoders.ByteLevel):
                raise ValueError("not a byte-level tokenizer")
            return cls(library)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None


class StreamDecoder:
    """Decodes one token at a time into whole characters.

    All the pushes and the flush, joined, are what `Tokenizer.decode` gives.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The characters that this token completes: none while one is incomplete."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """What was left of an incomplete character, as U+FFFD."""
        return self._decoder.decode(b"", final=True)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a tokenizer of `vocabulary` ids, or fewer if the texts have no more pairs to merge."""
    if vocab_size <= 256:
        raise ValueError(
            f"a vocabulary holds at least 256 bytes and {END_OF_TEXT}: 257, not {vocab_size}"
        )
    library = Library(models.BPE())
    library.pre_tokenizer = _cut(WORDS)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, min_frequency=2, initial_alphabet=LETTERS, show_progress=False
    )
    try:
        library.train_from_iterator(itertools.chain.from_iterable(map(pieces, texts)), trainer)
    except UnicodeEncodeError as error:
        raise _surrogate([error.object]) from None
    return _finish(library)


def train_words(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Take the most frequent words, ` <unk>` among them, until there are `vocabulary` ids."""
    if vocab_size < 3:
        raise ValueError(f"a vocabulary of words needs at least 3 ids, not {vocab_size}")
    library = _whole(SPACED, [])
    trainer = trainers.WordLevelTrainer(vocab_size=vocab_size - 1, show_progress=False)
    library.train_from_iterator(itertools.chain.from_iterable(map(pieces, texts)), trainer)
    learned = library.get_vocab(with_added_tokens=False)
    learned.pop(_letters(UNKNOWN), None)
    words = sorted(learned, key=lambda word: learned[word])[: vocab_size - 2]
    return _finish(_whole(SPACED, words))


def train_characters(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Take the most frequent characters, ` <unk>` besides, until there are `vocabulary` ids."""
    if vocab_size < 3:
        raise ValueError(f"a vocabulary of characters needs at least 3 ids, not {vocab_size}")
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    characters = [character for character, _ in counts.most_common(vocab_size - 2)]
    try:
        return _finish(_whole(CHARACTER, list(map(_letters, characters))))
    except UnicodeEncodeError:
        raise _surrogate(characters) from None


def _whole(pattern: str, tokens: Sequence[str]) -> Library:
    """What cuts a text at `pattern`, each part a token or unknown: the first id; then the tokens' own."""
    unknown = _letters(UNKNOWN)
    ids = {token: index for index, token in enumerate([unknown, *tokens])}
    library = Library(models.WordLevel(ids, unk_token=unknown))
    library.pre_tokenizer = _cut(pattern)
    return library


def _cut(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Text at a pattern, then each part to the letters of its bytes."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _letters(text: str) -> str:
    """The letters by which the library writes the bytes of a text."""
    return "".join(LETTERS[byte] for byte in text.encode())


def byte_tokenizer() -> Tokenizer:
    """The 256 bytes, each its own id, and `<|endoftext|>`."""
    library = Library(models.BPE(vocab=BYTES, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _finish(library)


def _finish(library: Library) -> Tokenizer:
    """Give a byte-level model its decoder and its one special token."""
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return Tokenizer(library)


def _surrogate(texts: Iterable[str]) -> ValueError:
    """The complaint about the first lone surrogate in texts that the library refused."""
    lone = next(filter(None, (re.search("[\ud800-\udfff]", text) for text in texts)))
    return ValueError(
        f"character {lone.start()} is U+{ord(lone[0]):04X}, half of a surrogate pair: not text"
    )
