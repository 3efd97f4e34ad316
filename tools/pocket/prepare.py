"""Books to tokens: trains the byte-level BPE tokenizer, then writes every training book as uint16 ids.

Reads only `train-*.txt.xz`; the `held-out/` folder is never opened here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from text import END_OF_BOOK, books_of, training_parts
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

WORK = Path(__file__).parent / "work"

# Words keep their leading space and contractions stay apart (GPT-2); digits come one at a time, so that
# the small vocabulary is not spent on numbers.
SPLIT = Regex(r"'(?:s|t|re|ve|m|ll|d)\b| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE without unknown tokens: any text encodes, and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(SPLIT, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_BOOK],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def sample(books: list[str], every: int) -> Iterator[str]:
    """Every `every`-th paragraph of every book, so that all authors shape the vocabulary."""
    for book in books:
        yield "\n\n".join(book.split("\n\n")[::every])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--books", type=Path, required=True, help="folder with train-*.txt.xz")
    parser.add_argument("--work", type=Path, default=WORK, help="where tokenizer and tokens go")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--sample-every", type=int, default=4, help="tokenizer sees one paragraph in so many")
    args = parser.parse_args()

    console = Console(stderr=True)
    args.work.mkdir(parents=True, exist_ok=True)
    parts = training_parts(args.books)
    books = [book for part in track(parts, "reading", console=console) for book in books_of(part)]
    console.print(f"{len(books)} books, {sum(map(len, books)) / 1e6:.0f} M characters; training tokenizer")
    tokenizer = train_tokenizer(sample(books, args.sample_every), args.vocab_size)
    tokenizer.save(str(args.work / "tokenizer.json"))

    end = tokenizer.token_to_id(END_OF_BOOK)
    size_bytes = total = 0
    with (args.work / "tokens.u16.partial").open("wb") as file:
        for book in track(books, "tokenising", console=console):
            ids = np.array([end, *tokenizer.encode(book).ids], dtype=np.uint16)
            ids.tofile(file)
            total += len(ids)
            size_bytes += len(book.encode())
    (args.work / "tokens.u16.partial").rename(args.work / "tokens.u16")
    facts = {"books": len(books), "bytes": size_bytes, "tokens": total, "bytes_per_token": size_bytes / total}
    (args.work / "data.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts), file=sys.stdout)


if __name__ == "__main__":
    main()
