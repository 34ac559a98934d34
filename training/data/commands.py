"""The command `prepare`: text as a folder of tokens, for several runs, machines and programs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from gpt.cli import OptionalInt, OptionalText
from training.config import TrainingConfig
from training.data.corpus import is_prepared
from training.data.mixture import parse_data
from training.data.sources import resolve_tokenizer, source_of


@dataclass(frozen=True)
class Prepare:
    """Tokenize a text once, into a folder that `train --data` and other programs read."""

    data: Positional[str]
    """Corpus, as in `train --data`."""
    directory: Annotated[Positional[Path], arg(metavar="DIR")]
    """Folder to write: corpus.json, a .bin file of token ids for each split, tokenizer.json."""
    data_config: OptionalText = None
    """Configuration of a Hugging Face dataset that has several."""
    data_revision: OptionalText = None
    """Branch, tag or commit of a Hugging Face dataset."""
    data_split: OptionalText = None
    """Split to train on, or a part of it such as train[:10%]."""
    text_column: OptionalText = None
    """Column that contains the text."""
    languages: OptionalText = None
    """Source and target language of sentence pairs, such as en-fr."""
    streaming: bool = False
    """Stream a Hugging Face dataset instead of downloading it."""
    shuffle_buffer: OptionalInt = None
    """Stream the files in random order, and their documents through a buffer of this many."""
    data_limit: OptionalInt = None
    """Read at most this many bytes of text from each split."""
    drop_duplicates: bool = False
    """Drop from train the documents that are in validation or test too, exactly or nearly."""
    tokenizer: str = TrainingConfig.tokenizer
    """Tokenizer, as in `train`; that of a run or of another prepared folder if it is their path."""
    end_of_text: OptionalText = None
    """Token of a tokenizer.json that ends a document, as in `train`."""
    vocab_size: int = TrainingConfig.vocab_size
    """Number of tokens that the tokenizer learns."""
    task: Literal["text", "translation"] = "text"
    """What the tokens are for: text, or translation of sentence pairs."""

    def __call__(self) -> None:
        """Prepare, and print what was written."""
        config = TrainingConfig(**{k: v for k, v in vars(self).items() if k != "directory"})
        if self.task == "text" and self.languages:
            raise ValueError("--languages is of sentence pairs: add --task translation")
        (source, *others) = parse_data(self.data)
        if others:
            raise ValueError(
                f"prepare each source of the mixture alone, all with one --tokenizer, and mix the "
                f"folders: tinygpt train --data DIR:{others[0].weight} …"
            )
        if is_prepared(source.data):
            raise ValueError(f"{self.data} holds prepared tokens already: nothing is to be done")
        directory = self.directory.expanduser()
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise ValueError(f"{directory} exists and is not empty: choose another folder")
        from training.data.prepare import prepare_corpus

        corpus = prepare_corpus(
            source_of(config, source.data),
            resolve_tokenizer(self.tokenizer, self.end_of_text) or self.tokenizer,
            self.vocab_size,
            sentence_pairs=self.task == "translation",
            directory=directory,
        )
        print(f"data: {corpus.description}")
        for line in corpus.size_lines():
            print(f"  {line}")
        print(
            f"tokenizer: {corpus.tokenizer.vocab_size:,} ids\nnext: tinygpt train --data {directory}"
        )
