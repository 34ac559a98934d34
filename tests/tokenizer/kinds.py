"""One tokenizer.json of each kind, made with the `tokenizers` library as others make them."""

import json

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = "Hello world, the cat sat on the mat. Don't stop! naïve café (1 2 34) 日本 the end.\n"
"""What they are trained on."""


def _train(library, trainer, vocab_size=330, **options):
    trainer = trainer(vocab_size=vocab_size, show_progress=False, **options)
    library.train_from_iterator([TEXT] * 3 + [TEXT.lower()], trainer)
    return library


def byte_level():
    """GPT-2 and RoBERTa: BPE on bytes."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    _train(
        library,
        trainers.BpeTrainer,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
    )
    library.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return library


def byte_fallback():
    """Llama 2 and Mistral: BPE on characters, bytes for those that it does not know."""
    library = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    library.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    # A pre-tokenizer only while it is trained: no token has a space within it.
    library.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special_tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    _train(library, trainers.BpeTrainer, 420, special_tokens=special_tokens)
    state = json.loads(library.to_str())
    state["pre_tokenizer"] = None
    state["added_tokens"] = state["added_tokens"][:3]
    library = tokenizers.Tokenizer.from_str(json.dumps(state))
    library.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    library.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return library


def word_piece():
    """BERT: lower case, without accents; words, and pieces that continue them."""
    library = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer(lowercase=True)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    special_tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    _train(library, trainers.WordPieceTrainer, 100, special_tokens=special_tokens)
    library.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return library


def unigram():
    """T5 and ALBERT: Unigram, a mark for each space and before the text."""
    library = tokenizers.Tokenizer(models.Unigram())
    library.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Strip(left=False, right=True),
            normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
        ]
    )
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    special_tokens = ["<pad>", "</s>", "<unk>"]
    _train(library, trainers.UnigramTrainer, 120, special_tokens=special_tokens, unk_token="<unk>")
    library.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return library


KINDS = {kind.__name__: kind for kind in (byte_level, byte_fallback, word_piece, unigram)}
