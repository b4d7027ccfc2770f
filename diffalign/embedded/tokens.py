"""The tokenizer of the embedded models: byte-level BPE in CLIP's form in which every word of the world's grammar is one token.

Other words fall back to bytes, so any prompt can be encoded. `transformers.CLIPTokenizer` loads it without our code.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from diffalign.embedded import captions
from diffalign.embedded.vocabulary import COLOURS, NUMBERS, OBJECTS, plural

__all__ = ["LENGTH", "build_tokenizer", "encode", "grammar_words"]

LENGTH = 24
"""Tokens of a prompt, start and end included; the grammar needs at most 17."""

START, END = "<|startoftext|>", "<|endoftext|>"


def grammar_words() -> list[str]:
    """All words that a caption of the world can contain, sorted."""
    phrases = [*OBJECTS, *COLOURS, *NUMBERS[1:], *captions.PREFIXES, *captions.BESIDE, "a an and ,"]
    phrases += itertools.chain.from_iterable([*captions.SIDES.values(), *captions.SYNONYMS.values()])
    phrases += captions.PLURALS.values()
    phrases += [plural(name) for name in (*OBJECTS, *itertools.chain.from_iterable(captions.SYNONYMS.values()))]
    return sorted({word for phrase in phrases for word in captions.words(phrase)})


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Train the merges on the word list, write vocab.json and merges.txt to `folder` and return the loaded tokenizer.

    Raises RuntimeError if a grammar word is not one token.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=8_000, min_frequency=1, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator([" ".join(grammar_words())], trainer)
    merges = [tuple(pair) for pair in json.loads(model.to_str())["model"]["merges"]]
    pieces = [START, END, *alphabet, *(f"{symbol}</w>" for symbol in alphabet), *("".join(pair) for pair in merges)]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH)
    if broken := [word for word in grammar_words() if len(tokenizer(word)["input_ids"]) != 3]:
        raise RuntimeError(f"tokenizer: expected one token for each grammar word; not so for {', '.join(broken)}")
    tokenizer.save_pretrained(folder)
    return tokenizer


def encode(vocab: dict[str, int], caption: str) -> list[int]:
    """Token ids of a caption made of grammar words, padded to `LENGTH` with the end token; equals the tokenizer's own answer."""
    ids = [0, *(vocab[word + "</w>"] for word in captions.words(caption)), 1]
    return ids + [1] * (LENGTH - len(ids))
