"""A model's tokenizer as the metadata of a GGUF file; `checkpoint/gguf_tokenizer.py` is the way back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gossamer.checkpoint.chat_template import read_templates
from gossamer.checkpoint.gguf_tokenizer import (
    BYTE,
    CONTROL,
    GPT2_SPLIT,
    NORMAL,
    SPLITS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    bpe_tokenizer,
    tokenizer_json,
)
from gossamer.checkpoint.tokenizer import Tokenizer
from gossamer.errors import TokenizerError, UnsupportedModelError

__all__ = ["OWN_SPLIT", "vocabulary"]

OWN_SPLIT = "gossamer"
"""tokenizer.ggml.pre of a text that is split as no name says: readers that need one refuse it."""
_KEY = "tokenizer.ggml."
_WHOLE = "tokenizer.huggingface.json"


def vocabulary(directory: Path, size: int) -> tuple[dict[str, Any], list[str]]:
    """Metadata of the tokenizer in a model directory, filled up to the size of the model's vocabulary, and
    notes about what other readers will not make of it.

    Raises TokenizerError where there is none, UnsupportedModelError for one that GGUF has no kind for.
    """
    tokenizer = Tokenizer.load(directory)
    whole = tokenizer.to_json()
    keys = _from_pieces(tokenizer) if whole is None else _from_json(whole, tokenizer)
    tokens = keys[_KEY + "tokens"]
    if len(tokens) > size:
        raise TokenizerError(
            f"{directory}: the tokenizer has {len(tokens)} tokens and the model {size}; they do not belong "
            "together"
        )
    keys |= _special(tokenizer, tokens)
    templates = read_templates(directory)
    if "default" in templates:
        keys["tokenizer.chat_template"] = templates.pop("default")
    if templates:
        keys["tokenizer.chat_templates"] = list(templates)
        keys |= {f"tokenizer.chat_template.{name}": text for name, text in templates.items()}
    notes = []
    if whole is not None and not _says_all(keys, whole):
        # https://github.com/ggml-org/ggml/blob/master/docs/gguf.md has this key for such tokenizers.
        keys[_WHOLE] = json.dumps(
            whole | {"post_processor": _affixes(keys)}, ensure_ascii=False, separators=(",", ":")
        )
        if keys.get(_KEY + "pre") == OWN_SPLIT:
            notes.append(
                "the tokenizer splits text as no name of GGUF says: it stands whole in the file for readers "
                "that know tokenizer.huggingface.json, as this one does; llama.cpp will refuse the file "
                "unless it is told to take another split (--override-kv tokenizer.ggml.pre=str:NAME)"
            )
        else:
            notes.append(
                "the tokenizer does more to text than GGUF can say; it stands whole in the file, and readers "
                "that do not look there may encode unusual text otherwise"
            )
    elif keys.get(_KEY + "remove_extra_whitespaces"):
        notes.append(
            "the tokenizer takes several spaces for one, which llama.cpp does not do for this kind: it "
            "encodes such text otherwise"
        )
    kinds = keys[_KEY + "token_type"]
    kinds += [UNUSED] * (size - len(tokens))
    if _KEY + "scores" in keys:
        keys[_KEY + "scores"] += [-1e6] * (size - len(tokens))
    tokens += [f"[PAD{i}]" for i in range(len(tokens), size)]
    return keys, notes


def _from_json(whole: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """Of a tokenizer.json with BPE, byte-level or SentencePiece's."""
    model = whole["model"]
    if model["type"] != "BPE":
        raise UnsupportedModelError(
            f"GGUF has no kind for a tokenizer of the type {model['type']}; BPE is what it has"
        )
    added = {each["id"]: each for each in whole["added_tokens"]}
    ids = dict(model["vocab"]) | {each["content"]: token for token, each in added.items()}
    tokens = [""] * (max(ids.values()) + 1)
    for text, token in ids.items():
        tokens[token] = text
    bytes_level = tokenizer.alphabet == "byte-level"
    unknown = tokenizer.special_tokens.get("unk_token")
    kinds = []
    for token, text in enumerate(tokens):
        if token in added:
            special = added[token]["special"]
            kinds.append(UNKNOWN if special and text == unknown else CONTROL if special else USER_DEFINED)
        else:
            byte = not bytes_level and len(text) == 6 and text.startswith("<0x")
            kinds.append(UNUSED if not text else BYTE if byte else NORMAL)
    for token, text in enumerate(tokens):
        tokens[token] = text or f"[PAD{token}]"
    pairs = [m.split(" ") if isinstance(m, str) else list(m) for m in model["merges"]]
    keys: dict[str, Any] = {_KEY + "tokens": tokens, _KEY + "token_type": kinds}
    if bytes_level:
        if any(" " in piece for pair in pairs for piece in pair):
            raise UnsupportedModelError("a merge of the tokenizer has a space in it, which GGUF cannot say")
        keys |= {_KEY + "model": "gpt2", _KEY + "pre": _split_name(whole)}
        return keys | {_KEY + "merges": [" ".join(pair) for pair in pairs]}
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(pairs):
        ranks.setdefault("".join(pair), rank)
    last = len(pairs)
    scores = [
        -float(ranks.get(text, last + token)) if kind == NORMAL else 0.0
        for token, (text, kind) in enumerate(zip(tokens, kinds, strict=True))
    ]
    keys |= {_KEY + "model": "llama", _KEY + "pre": "default", _KEY + "scores": scores}
    return keys | _spaces(tokenizer)


def _from_pieces(tokenizer: Tokenizer) -> dict[str, Any]:
    """Of a tokenizer.model."""
    pieces = tokenizer.pieces()
    return {
        _KEY + "model": "llama",
        _KEY + "pre": "default",
        _KEY + "tokens": [text for text, _, _ in pieces],
        _KEY + "scores": [score for _, score, _ in pieces],
        _KEY + "token_type": [kind for _, _, kind in pieces],
        **_spaces(tokenizer),
    }


def _spaces(tokenizer: Tokenizer) -> dict[str, Any]:
    """What SentencePiece does to spaces."""
    squeezes = tokenizer.encode("a  b") == tokenizer.encode("a b")
    return {_KEY + "add_space_prefix": tokenizer.drops_space} | (
        {_KEY + "remove_extra_whitespaces": True} if squeezes else {}
    )


def _split_name(whole: Mapping[str, Any]) -> str:
    """The name of the same splits, before those of the same regular expressions alone."""
    steps = _steps(whole["pre_tokenizer"])
    names = [name for name, split in SPLITS.items() if split == steps]

    def same(name: str) -> bool:
        made = bpe_tokenizer(["a"], [], [], pre=name)
        flag = whole["model"].get("ignore_merges", False)
        return bool(made["normalizer"] == whole["normalizer"] and made["model"]["ignore_merges"] == flag)

    return next((name for name in names if same(name)), names[0] if names else OWN_SPLIT)


def _steps(pre: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The regular expressions of a pre-tokenizer, as `SPLITS` has them."""
    match pre:
        case None:
            return ()
        case {"type": "Sequence", "pretokenizers": inner}:
            return tuple(step for each in inner for step in _steps(each))
        case {"type": "Digits", "individual_digits": True}:
            return (r"\p{N}",)
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": cuts}:
            return (GPT2_SPLIT,) if cuts else ()
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
            return (regex,)
        case _:
            return (f"not known: {json.dumps(pre)}",)


def _says_all(keys: Mapping[str, Any], whole: Mapping[str, Any]) -> bool:
    """Whether the tokenizer made of the metadata is the one it was made of."""
    if keys.get(_KEY + "pre") == OWN_SPLIT:
        return False
    made = tokenizer_json(keys, "the export")

    def essence(file: Mapping[str, Any]) -> tuple[Any, ...]:
        model = file["model"]
        normal = file["normalizer"] or {}
        merges = [m.split(" ") if isinstance(m, str) else list(m) for m in model["merges"]]
        if model["byte_fallback"]:  # the halves of one piece never meet in a text: their order is moot
            merges = sorted(merges, key=lambda pair: (ranks.get("".join(pair), 0), pair))
        flags = [bool(model.get(n)) for n in ("byte_fallback", "ignore_merges", "fuse_unk", "dropout")]
        return (
            normal.get("normalizers", [normal] if normal else []),
            _steps(file["pre_tokenizer"]),
            {text: token for text, token in model["vocab"].items() if not text.startswith("[PAD")},
            merges,
            flags[:2] + (flags[2:] if model.get("unk_token") else flags[3:]),
        )

    scores = keys.get(_KEY + "scores", [])
    ranks = {text: -score for text, score in zip(keys[_KEY + "tokens"], scores, strict=False)}
    # Without a normalizer it is all the same whether it comes before the search for added tokens.
    moot = {} if whole["normalizer"] else {"normalized": None}
    spelled = {each["id"]: each | moot for each in made["added_tokens"]}
    own = {each["id"]: each | moot for each in whole["added_tokens"]}
    vocab = dict(whole["model"]["vocab"]) | {each["content"]: token for token, each in own.items()}
    full = {**whole, "model": {**whole["model"], "vocab": vocab}}
    return spelled == own and essence(made) == essence(full)


def _special(tokenizer: Tokenizer, tokens: Sequence[str]) -> dict[str, Any]:
    """Ids of special tokens, and whether BOS and EOS are added."""
    keys: dict[str, Any] = {}
    for name, key in (("bos", "bos"), ("unk", "unknown"), ("pad", "padding")):
        text = tokenizer.special_tokens.get(f"{name}_token")
        token = tokenizer.id_of(text) if isinstance(text, str) else None
        if token is not None:
            keys[f"{_KEY}{key}_token_id"] = token
    ends = [token for token in tokenizer.eos_ids if token < len(tokens)]
    keys |= {f"{_KEY}{key}_token_id": t for key, t in zip(("eos", "eot", "eom"), ends, strict=False)}
    around = tokenizer.encode("")
    begins = bool(around) and around[0] == tokenizer.bos_id
    keys[_KEY + "add_bos_token"] = begins
    keys[_KEY + "add_eos_token"] = around[1 if begins else 0 :] == ends[:1] != []
    return keys


def _affixes(keys: Mapping[str, Any]) -> Any:
    """The post-processor that the metadata's flags make."""
    plain = {**keys, _KEY + "pre": "gpt-2"} if keys.get(_KEY + "pre") == OWN_SPLIT else keys
    return tokenizer_json(plain, "the export")["post_processor"]
