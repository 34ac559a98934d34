"""Find documents of train that are in validation or test too: a low loss on these may be memorized.

Documents are compared as wholes, by their prepared tokens.

    exact   the same tokens
    near    at least half of their shingles in common: Jaccard similarity, estimated by MinHash
            (Broder 1997) from a quarter of the shingles, chosen by their hashes; locality-sensitive
            hashing (LSH) finds the candidates

A shingle is any 50 characters of a document, in lower case and with single spaces. Documents of
under 50 characters can be in both by chance, and are no duplicates.
Memory: 150 bytes for each held-out document, 9 kB for those that near duplicates are looked for of,
and a byte for each document of train.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from datasketch import MinHash, MinHashLSH
from tqdm import tqdm

from tokenizer import Tokenizer
from training.data.corpus import Tokens, release_pages

SHINGLE = 50
"""Characters of a shingle."""
SAMPLE_EVERY, MIN_SAMPLE = 4, 32
"""One shingle in 4 is sampled; documents with under 32 of these, of about 200 characters, have no near duplicates."""
THRESHOLD = 0.5
"""Jaccard similarity of near duplicates, at least."""
MAX_NEAR_TOKENS = 2**16
"""Near duplicates are compared by at most this many tokens from their beginning."""
MAX_NEAR_DOCUMENTS = 20_000
"""Near duplicates are looked for of at most this many documents of each held-out split."""
MAX_NEAR_BYTES = 100_000_000
"""Near duplicates are looked for without being asked in a train split of at most this many bytes."""
BLOCK = 2**22
"""Tokens that are read at once."""

_WEIGHTS = np.random.default_rng(0).integers(2**64, size=SHINGLE, dtype=np.uint64)
_EMPTY = MinHash(num_perm=128, hashfunc=int)


class Duplicates(NamedTuple):
    """What train and the held-out splits have in common."""

    held_out: dict[str, dict[str, int]]
    """Of each held-out split the documents with an exact and those with only a near duplicate in train."""
    is_dropped: bytearray
    """Of each document of train whether it is a duplicate of a held-out one."""


def find_duplicates(
    splits: Mapping[str, Tokens], tokenizer: Tokenizer, sentence_pairs: bool, near: bool
) -> Duplicates:
    """Compare the documents of train, or its sentence pairs, with those of every other split.

    Near duplicates are looked for only if `near`.
    """
    held_out = {
        name: _HeldOut(_documents(tokens, tokenizer, sentence_pairs), tokenizer, near)
        for name, tokens in splits.items()
        if name != "train"
    }
    is_dropped = bytearray()
    documents = _documents(splits["train"], tokenizer, sentence_pairs)
    for document in tqdm(documents, "looking for duplicates", delay=1, leave=False, disable=None):
        digest = _digest(document)
        minhash = _minhash(document, tokenizer) if near else None
        found = [split.find(digest, minhash) for split in held_out.values()]
        is_dropped.append(any(found))
    return Duplicates({name: split.counts() for name, split in held_out.items()}, is_dropped)


class _HeldOut:
    """The documents of a held-out split, and which of them were found in train."""

    def __init__(self, documents: Iterator[Tokens], tokenizer: Tokenizer, near: bool) -> None:
        self.documents: Counter[bytes] = Counter()
        self.minhashes: dict[bytes, MinHash] = {}
        self.index, self.near = MinHashLSH(THRESHOLD, num_perm=_EMPTY.num_perm), near
        self.found: dict[str, set[bytes]] = {"exact": set(), "near": set()}
        for document in documents:
            # A character has at most four bytes, and a byte at most one token.
            if len(tokenizer.decode(document[: 4 * SHINGLE].tolist())) < SHINGLE:
                continue
            digest = _digest(document)
            self.documents[digest] += 1
            if near and len(self.minhashes) < MAX_NEAR_DOCUMENTS and digest not in self.minhashes:
                minhash = _minhash(document, tokenizer)
                if minhash is not None:
                    self.minhashes[digest] = minhash
                    self.index.insert(digest, minhash)

    def find(self, digest: bytes, minhash: MinHash | None) -> bool:
        """Note what a document of train is a duplicate of; return whether it is one."""
        exact = {digest} & self.documents.keys()
        candidates = () if minhash is None else self.index.query(minhash)
        near = {it for it in candidates if self.minhashes[it].jaccard(minhash) >= THRESHOLD}
        self.found["exact"] |= exact
        self.found["near"] |= near
        return bool(exact or near)

    def counts(self) -> dict[str, int]:
        """Return how many documents have an exact duplicate, and how many only a near one."""
        exact, near = self.found["exact"], self.found["near"] - self.found["exact"]
        found = {"exact": exact, "near": near} if self.near else {"exact": exact}
        return {kind: sum(self.documents[it] for it in them) for kind, them in found.items()}


def _documents(tokens: Tokens, tokenizer: Tokenizer, sentence_pairs: bool) -> Iterator[Tokens]:
    """Yield the tokens of each document, or of each sentence pair with the EOS token in it."""
    start, borders, ids = 0, 0, np.asarray(tokens)  # slices of a memory map are slow
    for offset in range(0, len(tokens), BLOCK):
        block = ids[offset : offset + BLOCK]
        for border in (offset + np.flatnonzero(block == tokenizer.eos_token)).tolist():
            if not (sentence_pairs and borders % 2):
                if borders:
                    yield ids[start:border]
                start = border + 1
            borders += 1
        release_pages(tokens)
    yield ids[start:]


def _digest(document: Tokens) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for offset in range(0, len(document), BLOCK):
        digest.update(document[offset : offset + BLOCK].data)
        if len(document) > BLOCK:  # one document can be all of a large corpus
            release_pages(document)
    return digest.digest()


def _minhash(document: Tokens, tokenizer: Tokenizer) -> MinHash | None:
    """Return the MinHash of a document's sampled shingles; None if they are too few."""
    text = " ".join(tokenizer.decode(document[:MAX_NEAR_TOKENS].tolist()).lower().split())
    if len(text) < SHINGLE + MIN_SAMPLE:
        return None
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4").astype(np.uint64)
    # A polynomial of random weights, modulo 2^64; its high bits depend on all characters.
    hashes = np.convolve(codes, _WEIGHTS, "valid") >> np.uint64(32)
    sample = np.unique(hashes[hashes % SAMPLE_EVERY == 0])
    if len(sample) < MIN_SAMPLE:
        return None
    minhash = _EMPTY.copy()
    minhash.update_batch(sample.tolist())
    return minhash
