"""The tokenizer of the embedded models: byte-level BPE in CLIP's form in which every word of the
world's grammar is one token.

Other words fall back to bytes, so any prompt can be encoded. ``transformers.CLIPTokenizer`` loads
it without our code.
"""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

from diffalign.embedded.world import captions
from diffalign.embedded.world.vocabulary import COLOURS, NUMBERS, OBJECTS, plural

LENGTH = 24
"""Tokens of a prompt, start and end included; the grammar needs at most 17."""

SHIPPED = Path(__file__).parents[1] / "models" / "emoji" / "tokenizer"
"""The tokenizer that the shipped models were trained with.

Its word ids are part of their weights: never train it anew beside them.
"""

START, END = "<|startoftext|>", "<|endoftext|>"


def grammar_words() -> list[str]:
    """All words that a caption of the world can contain, sorted."""
    phrases = [*OBJECTS, *COLOURS, *NUMBERS[1:], *captions.PREFIXES, *captions.BESIDE, "a an and ,"]
    phrases += itertools.chain.from_iterable(
        [*captions.SIDES.values(), *captions.SYNONYMS.values()]
    )
    phrases += captions.PLURALS.values()
    phrases += [
        plural(name)
        for name in (*OBJECTS, *itertools.chain.from_iterable(captions.SYNONYMS.values()))
    ]
    return sorted({word for phrase in phrases for word in captions.words(phrase)})


def merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that make each word one symbol: always the most frequent pair, the
    alphabetically first among equals.

    Written out because the trainer of ``tokenizers`` breaks ties differently in every process
    (measured), which would renumber all words.
    """
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    pairs = []
    while any(len(piece) > 1 for piece in pieces):
        counts = Counter(pair for piece in pieces for pair in itertools.pairwise(piece))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        pairs.append(best)
        for piece in pieces:
            for k in range(len(piece) - 1, 0, -1):
                if k < len(piece) and (piece[k - 1], piece[k]) == best:
                    piece[k - 1 : k + 1] = ["".join(best)]
    return pairs


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Train the merges on the word list, write the tokenizer to ``folder`` and return it; the same
    files every time.

    Raises RuntimeError if a grammar word is not one token.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = merges(grammar_words())
    pieces = [
        START,
        END,
        *alphabet,
        *(f"{symbol}</w>" for symbol in alphabet),
        *("".join(pair) for pair in pairs),
    ]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=pairs, model_max_length=LENGTH)
    if broken := [word for word in grammar_words() if len(tokenizer(word)["input_ids"]) != 3]:
        raise RuntimeError(
            f"The tokenizer must have one token for each grammar word; not for {', '.join(broken)}."
        )
    tokenizer.save_pretrained(folder)
    return tokenizer


def tokenizer_in(folder: Path) -> CLIPTokenizer:
    """The tokenizer of a training folder: the one already there, else a copy of the shipped one,
    else a new one."""
    if not (folder / "tokenizer.json").exists():
        if not SHIPPED.is_dir():
            return build_tokenizer(folder)
        CLIPTokenizer.from_pretrained(SHIPPED).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def encode(vocab: dict[str, int], caption: str) -> list[int]:
    """Token ids of a caption made of grammar words, padded to ``LENGTH`` with the end token; equals
    the tokenizer's own answer."""
    ids = [0, *(vocab[word + "</w>"] for word in captions.words(caption)), 1]
    return ids + [1] * (LENGTH - len(ids))
