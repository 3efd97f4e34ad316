"""Checkpoint to model: scores the shipped weights on the held-out books and writes a Hugging Face directory.

Everything said in the card is measured here, on the weights as they ship (rounded to bfloat16).
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from card import Facts, model_card
from evaluate import Score, score_books
from model import PocketConfig, build
from plot import loss_curve
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import save_file
from sample import continuation
from text import END_OF_BOOK
from tokenizers import Tokenizer

WORK = Path(__file__).parent / "work"
OUT = Path(__file__).resolve().parents[2] / "src" / "gossamer" / "models" / "pocket"
GENERATION = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}
PROMPTS = ("Once upon a time", "The old man shut the door and turned to the stranger.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """A checkpoint of `train.py`, as far as the export needs it."""

    config: PocketConfig
    weights: dict[str, torch.Tensor]  # rounded to bfloat16, held as float32
    state: dict[str, Any]
    finished: bool
    optimizer: str
    workers: int


def load_checkpoint(path: Path) -> Trained:
    """Reads a training checkpoint.

    Raises:
        FileNotFoundError: if there is none yet.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; run train.py first")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    progress = saved["schedule"]["decay_progress"]
    return Trained(
        config=PocketConfig.from_hf(saved["config"]),
        weights={name: w.bfloat16().float() for name, w in saved["model"].items()},
        state=saved["state"],
        finished=progress is not None and progress >= 1.0 - 1e-9,
        optimizer=saved["args"]["optimizer"],
        workers=int(saved["args"]["workers"]),
    )


def write_json(path: Path, value: object) -> None:
    """Readable JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(source: Path, out: Path, *, context: int) -> int:
    """Copies the tokenizer with its Hugging Face companions; returns the end-of-book id."""
    end_of_book = Tokenizer.from_file(str(source)).token_to_id(END_OF_BOOK)
    shutil.copyfile(source, out / "tokenizer.json")
    special = {"bos_token": END_OF_BOOK, "eos_token": END_OF_BOOK, "pad_token": END_OF_BOOK}
    write_json(out / "special_tokens_map.json", special)
    described = {
        "content": END_OF_BOOK,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "added_tokens_decoder": {str(end_of_book): described},
            **special,
            "clean_up_tokenization_spaces": False,
            "model_max_length": context,
        },
    )
    return int(end_of_book)


def write_model(trained: Trained, tokenizer: Path, out: Path) -> int:
    """Writes configuration, weights and tokenizer; returns the end-of-book id."""
    out.mkdir(parents=True, exist_ok=True)
    end_of_book = write_tokenizer(tokenizer, out, context=trained.config.max_position_embeddings)
    write_json(out / "config.json", trained.config.to_hf(end_of_book=end_of_book))
    write_json(
        out / "generation_config.json",
        {"bos_token_id": end_of_book, "eos_token_id": end_of_book, "pad_token_id": end_of_book, **GENERATION},
    )
    weights = {name: weight.bfloat16().contiguous() for name, weight in trained.weights.items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    return end_of_book


def evaluate(trained: Trained, tokenizer: Path, books: list[Path], end_of_book: int) -> list[Score]:
    """Scores the held-out books under a progress bar."""
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("held-out books", total=sum(path.stat().st_size for path in books))
        return score_books(
            books,
            trained.config,
            trained.weights,
            tokenizer,
            end_of_book=end_of_book,
            on_book=lambda score: bar.update(task, advance=score.size_bytes),
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--books", type=Path, required=True, help="folder with held-out/*.txt")
    parser.add_argument("--work", type=Path, default=WORK, help="where train.py left its checkpoint")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--unfinished", action="store_true", help="export although the decay is not over")
    args = parser.parse_args()

    trained = load_checkpoint(args.work / "checkpoint.pt")
    if not (trained.finished or args.unfinished):
        parser.error("the run is not over (its learning rate has not decayed); --unfinished exports it")
    books = sorted((args.books / "held-out").glob("*.txt"))
    if not books:
        parser.error(f"no *.txt in {args.books / 'held-out'}")
    tokenizer = args.work / "tokenizer.json"
    end_of_book = write_model(trained, tokenizer, args.out)
    loss_curve(args.out / "loss.png", trained.state["train_loss"], trained.state["valid_loss"])
    scores = evaluate(trained, tokenizer, books, end_of_book)

    model = build(trained.config, trained.weights)
    context = trained.config.max_position_embeddings
    words = Tokenizer.from_file(str(tokenizer))
    samples = [(prompt, continuation(model, words, prompt, seed=1, context=context)) for prompt in PROMPTS]
    facts = Facts(
        config=trained.config,
        parameters=sum(w.numel() for w in trained.weights.values()),
        steps=trained.state["step"],
        tokens=trained.state["tokens"],
        minutes=trained.state["seconds"] / 60,
        optimizer=trained.optimizer,
        workers=trained.workers,
        finished=trained.finished,
        data=json.loads((args.work / "data.json").read_text()),
    )
    (args.out / "README.md").write_text(model_card(facts, scores, samples), encoding="utf-8")
    size = sum(path.stat().st_size for path in args.out.iterdir() if path.is_file())
    print(f"{args.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
