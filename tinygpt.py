"""The `tinygpt` command: every verb of the four packages, imported only when it is used."""

import importlib
import sys
from typing import NamedTuple


class Verb(NamedTuple):
    """Where a verb is implemented."""

    module: str
    """Module whose `main(prog, arguments)` runs it."""
    command: str
    """Its name there."""
    help: str


VERBS = {
    "train": Verb("training.cli", "train", "train a model, or --resume a run"),
    "eval": Verb("training.cli", "eval", "score a run: loss, perplexity, bits per byte"),
    "sample": Verb("serving.cli", "sample", "generate text in the terminal"),
    "serve": Verb("serving.cli", "serve", "serve runs over HTTP, with an OpenAI-compatible API"),
    "ladder": Verb("training.cli", "ladder", "train and compare every language model"),
    "plan": Verb("training.cli", "plan", "estimate a run's memory, time and FLOPs"),
    "presets": Verb("training.cli", "presets", "list the presets of `train`"),
    "chapters": Verb("gpt.__main__", "chapters", "list the models"),
    "describe": Verb("training.cli", "describe", "count a model's parameters by kind"),
    "plot": Verb("training.cli", "plot", "draw the loss curves of runs"),
    "xray": Verb("training.cli", "xray", "draw a model's attention maps, gates or experts"),
    "translators": Verb("training.cli", "translators", "compare translation runs by BLEU"),
    "figures": Verb("training.cli", "figures", "draw the figures of docs/chapters.md"),
    "tokenize": Verb("tokenizer.__main__", "tokenize", "turn text into token ids"),
    "detokenize": Verb("tokenizer.__main__", "detokenize", "turn token ids into text"),
    "train-tokenizer": Verb(
        "tokenizer.__main__", "train-tokenizer", "train a tokenizer on text files"
    ),
}


def main() -> None:
    """Run the verb that is the first argument."""
    verb, *arguments = sys.argv[1:] or ["--help"]
    if verb in ("-h", "--help"):
        print("usage: tinygpt VERB [OPTIONS]    (tinygpt VERB --help lists the options)\n")
        for name, (_, _, text) in VERBS.items():
            print(f"  {name:<17}{text}")
        return
    if verb not in VERBS:
        sys.exit(f"tinygpt: no verb is named {verb!r}; there are {', '.join(VERBS)}")
    module, command, _ = VERBS[verb]
    importlib.import_module(module).main("tinygpt", [command, *arguments])


if __name__ == "__main__":
    main()
