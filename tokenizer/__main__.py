"""The command line of the tokenizer: train one, encode text, decode ids."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tokenizer import Tokenizer, byte_tokenizer, from_utf8, train_bpe


class Parser(argparse.ArgumentParser):
    """argparse, with one line for a mistake instead of a usage block."""

    def error(self, message: str) -> NoReturn:
        """Leave with exit code 2."""
        self.exit(2, f"{self.prog}: {message} (--help explains)\n")


def _parser(prog: str) -> Parser:
    parser = Parser(prog=prog, description="Text to token ids and back.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    which = "a tokenizer.json, a run directory that holds one, or `bytes`"

    train = commands.add_parser(
        "train",
        aliases=["train-tokenizer"],
        help="learn a byte-level BPE tokenizer from text files",
        description="Learn a byte-level BPE tokenizer from text files.",
    )
    train.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a UTF-8 text file")
    train.add_argument(
        "--vocab-size", type=int, default=4096, metavar="N", help="number of ids (default: 4096)"
    )
    train.add_argument(
        "--output",
        type=Path,
        default=Path("tokenizer.json"),
        metavar="PATH",
        help="where to write it (default: tokenizer.json)",
    )
    encode = commands.add_parser(
        "encode",
        aliases=["tokenize"],
        help="print the ids of a text",
        description="Print the ids of a text, separated by spaces.",
    )
    encode.add_argument("tokenizer", metavar="TOKENIZER", help=which)
    encode.add_argument("text", nargs="?", metavar="TEXT", help="default: standard input")

    decode = commands.add_parser(
        "decode",
        aliases=["detokenize"],
        help="print the text of ids",
        description="Print the text of ids.",
    )
    decode.add_argument("tokenizer", metavar="TOKENIZER", help=which)
    decode.add_argument("ids", nargs="*", metavar="ID", help="default: standard input")
    return parser


def _open(name: str) -> Tokenizer:
    return byte_tokenizer() if name == "bytes" else Tokenizer.load(name)


def _stdin() -> str:
    """Standard input as it is: no newline translated, nothing replaced."""
    return from_utf8(sys.stdin.buffer.read(), "standard input")


def _train(files: list[Path], vocabulary: int, output: Path) -> None:
    texts = (from_utf8(file.read_bytes(), str(file)) for file in files)
    tokenizer = train_bpe(texts, vocabulary)
    tokenizer.save(output)
    print(f"{output}: {tokenizer.vocab_size} ids", file=sys.stderr)
    if tokenizer.vocab_size < vocabulary:
        print(f"fewer than {vocabulary}: the text has no more pairs to merge", file=sys.stderr)


def _decode(tokenizer: Tokenizer, ids: list[str]) -> None:
    wrong = next((word for word in ids if not re.fullmatch(r"[0-9]{1,18}", word)), None)
    if wrong is not None:
        raise ValueError(f"{wrong!r} is not a token id; expected whole numbers between spaces")
    sys.stdout.buffer.write(tokenizer.decode(map(int, ids)).encode())


def main(prog: str = "python -m tokenizer", arguments: Sequence[str] | None = None) -> None:
    """Run one command; a mistake of the user's is one line and exit code 2."""
    parser = _parser(prog)
    options = parser.parse_args(arguments)
    try:
        if options.command in ("train", "train-tokenizer"):
            _train(options.files, options.vocabulary, options.output)
        elif options.command in ("encode", "tokenize"):
            text = _stdin() if options.text is None else options.text
            print(*_open(options.tokenizer).encode(text))
        else:
            _decode(_open(options.tokenizer), options.ids or _stdin().split())
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader (`| head`) has gone. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
