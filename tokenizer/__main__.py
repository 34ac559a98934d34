"""Command line of the tokenizers: train one, encode text, decode ids."""

import argparse
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from tokenizer import Tokenizer, byte_tokenizer, decode_utf8, train_bpe

TINYGPT_VERBS = {"train": "train-tokenizer", "encode": "tokenize", "decode": "detokenize"}
"""The commands, and their names under `tinygpt`."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports errors in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        self.exit(2, f"{self.prog}: {message} (--help explains)\n")


def _parser(prog: str) -> Parser:
    parser = Parser(prog=prog, description="Train a tokenizer, encode text, decode ids.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(
        name: str, text: str, details: str, run: Callable[[argparse.Namespace], None]
    ) -> Parser:
        verb = TINYGPT_VERBS[name] if prog == "tinygpt" else name
        description = f"{text[0].upper()}{text[1:]}{details}."
        command = commands.add_parser(verb, help=text, description=description)
        command.set_defaults(run=run)
        return command

    train = add("train", "train a byte-level BPE tokenizer on text files", "", _train)
    train.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a UTF-8 text file")
    train.add_argument(
        "--vocab-size", type=int, default=4096, metavar="N", help="number of ids (default: 4096)"
    )
    train.add_argument(
        "--output",
        type=Path,
        default=Path("tokenizer.json"),
        metavar="PATH",
        help="file to write (default: tokenizer.json)",
    )
    encode = add("encode", "print the ids of a text", ", separated by spaces", _encode)
    decode = add("decode", "print the text of ids", "", _decode)
    for command in (encode, decode):
        tokenizer_help = "a tokenizer.json, a run directory that holds one, or `bytes`"
        command.add_argument("tokenizer", metavar="TOKENIZER", help=tokenizer_help)
    encode.add_argument("text", nargs="?", metavar="TEXT", help="default: standard input")
    decode.add_argument("ids", nargs="*", metavar="ID", help="default: standard input")
    return parser


def _load(name: str) -> Tokenizer:
    return byte_tokenizer() if name == "bytes" else Tokenizer.load(name)


def _stdin() -> str:
    """Read standard input without newline translation."""
    return decode_utf8(sys.stdin.buffer.read(), "standard input")


def _train(options: argparse.Namespace) -> None:
    texts = (decode_utf8(file.read_bytes(), str(file)) for file in options.files)
    tokenizer = train_bpe(texts, options.vocab_size)
    tokenizer.save(options.output)
    print(f"{options.output}: {tokenizer.vocab_size} ids", file=sys.stderr)
    if tokenizer.vocab_size < options.vocab_size:
        print(
            f"fewer than {options.vocab_size}: the text has no more pairs to merge",
            file=sys.stderr,
        )


def _encode(options: argparse.Namespace) -> None:
    text = _stdin() if options.text is None else options.text
    tokenizer = _load(options.tokenizer)
    ids = tokenizer.encode(text)
    print(*ids)
    if loss := tokenizer.find_loss(text, ids):
        print(f"the ids do not hold the whole text: {loss}", file=sys.stderr)


def _decode(options: argparse.Namespace) -> None:
    tokenizer = _load(options.tokenizer)
    ids = options.ids or _stdin().split()
    invalid = next((word for word in ids if not re.fullmatch(r"[0-9]{1,18}", word)), None)
    if invalid is not None:
        raise ValueError(f"{invalid!r} is not a token id; expected whole numbers between spaces")
    sys.stdout.buffer.write(tokenizer.decode(map(int, ids)).encode())


def main(prog: str = "python -m tokenizer", arguments: Sequence[str] | None = None) -> None:
    """Run one command; a user's mistake is reported in one line, with exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for what its encoding lacks
    parser = _parser(prog)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader (`| head`) has exited. Python would report it again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{prog} {options.command}: {error}\n")


if __name__ == "__main__":
    main()
