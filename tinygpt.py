"""The `tinygpt` command: all verbs of the four packages. A package is imported when it is used."""

import difflib
import importlib
import sys
from importlib.metadata import version
from typing import NamedTuple


class Verb(NamedTuple):
    """Where a verb is implemented."""

    module: str
    """Module whose `main(prog, arguments)` runs it."""
    help: str


VERBS = {
    "train": Verb("training.cli", "train a model, or --resume a run"),
    "prepare": Verb("training.cli", "tokenize a text once, into a folder for many runs"),
    "eval": Verb("training.cli", "score a run: loss, perplexity, bits per byte"),
    "compare": Verb("training.cli", "compare runs on one text, with a significance test"),
    "lm-eval": Verb("training.cli", "run tasks of EleutherAI's evaluation harness"),
    "sample-quality": Verb("training.cli", "measure sampled text beside real text, by temperature"),
    "sample": Verb("serving.cli", "generate text in the terminal"),
    "serve": Verb("serving.cli", "serve runs over HTTP, with an OpenAI-compatible API"),
    "ladder": Verb("training.cli", "train and compare every language model"),
    "plan": Verb("training.cli", "estimate a run's memory, time and FLOPs"),
    "presets": Verb("training.cli", "list the presets of `train`"),
    "chapters": Verb("gpt.__main__", "list the models"),
    "chapter": Verb("training.cli", "print the worked examples of a chapter"),
    "describe": Verb("training.cli", "count a model's parameters by kind"),
    "plot": Verb("training.cli", "draw the loss curves of runs"),
    "xray": Verb("training.cli", "draw a model's attention maps, gates or experts"),
    "nearest": Verb("training.cli", "list the words with the most similar vectors"),
    "translators": Verb("training.cli", "compare translation runs by BLEU"),
    "figures": Verb("training.cli", "draw the figures of docs/chapters/"),
    "export": Verb("training.cli", "write a run for transformers, vLLM or llama.cpp"),
    "import": Verb("training.cli", "make a run of a GPT-2 or Qwen3 model"),
    "tokenize": Verb("tokenizer.__main__", "turn text into token ids"),
    "detokenize": Verb("tokenizer.__main__", "turn token ids into text"),
    "train-tokenizer": Verb("tokenizer.__main__", "train a tokenizer on text files"),
}


def main() -> None:
    """Run the verb that is the first argument."""
    verb, *arguments = sys.argv[1:] or ["--help"]
    if verb in ("-h", "--help"):
        print("usage: tinygpt VERB [OPTIONS]    (tinygpt VERB --help lists the options)\n")
        for name, (_, text) in VERBS.items():
            print(f"  {name:<17}{text}")
    elif verb == "--version":
        print(f"tinygpt {version('tinygpt')}")
    elif verb in VERBS:
        importlib.import_module(VERBS[verb].module).main("tinygpt", [verb, *arguments])
    else:
        similar = difflib.get_close_matches(verb, VERBS, n=3)
        hint = f" (did you mean {' or '.join(similar)}?)" if similar else ""
        print(f"tinygpt: no verb is named {verb!r}{hint}; --help lists them", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
