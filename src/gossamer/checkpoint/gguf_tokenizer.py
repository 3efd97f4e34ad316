"""tokenizer.json and tokenizer_config.json from the vocabulary of a GGUF file.

Two kinds of vocabulary are known: "llama" (SentencePiece's BPE: the piece of the best score is merged first;
unknown characters become bytes) and "gpt2" (byte-level BPE with a list of merges, after splits that
tokenizer.ggml.pre names). Source of both and of the splits: llama.cpp's src/llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gossamer.checkpoint.json_file import parse_json_object
from gossamer.checkpoint.safetensors import short
from gossamer.errors import TokenizerError

__all__ = [
    "ADDS_BOS",
    "SPLITS",
    "bpe_tokenizer",
    "spm_merges",
    "spm_tokenizer",
    "tokenizer_config",
    "tokenizer_json",
]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3, _QWEN2 = _CL100K.format(digits="{1,3}"), _CL100K.format(digits="")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The first name of equal splits is the one that is written.
SPLITS: Mapping[str, tuple[str, ...]] = {
    "gpt-2": (GPT2_SPLIT,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2_SPLIT, r"\p{N}+", r"[0-9][0-9][0-9]"),
    **dict.fromkeys(("mpt", "olmo", "jais", "phi-2", "gpt-neox"), (GPT2_SPLIT,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "command-r"), (_DIGIT, GPT2_SPLIT)),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", GPT2_SPLIT, r"[0-9][0-9][0-9]"),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "smaug-bpe", "dbrx"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), (_QWEN2,)),
    "tekken": (_TEKKEN,),
}
"""tokenizer.ggml.pre -> the regular expressions that cut a text, one after the other."""
ADDS_BOS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")
"""Splits whose models begin a text with BOS unless the file says otherwise."""
_WHOLE_FIRST = (
    "llama-bpe",
    "llama3",
    "llama-v3",
    "falcon3",
    "tekken",
)  # a word that is a token is not merged
_NFC = ("qwen2", "deepseek-r1-qwen")
_NAMES = ("bos", "eos", "unknown", "padding")
_KEY = "tokenizer.ggml."


def tokenizer_json(metadata: Mapping[str, Any], source: str) -> dict[str, Any]:
    """tokenizer.json. source: names the file in messages.

    tokenizer.huggingface.json, where the file has it, is what it holds; else it is made of the vocabulary.
    Raises TokenizerError for a vocabulary that is damaged, of another kind or split in an unknown way.
    """
    whole = metadata.get("tokenizer.huggingface.json")
    if whole is not None:
        if not isinstance(whole, str):
            raise TokenizerError(f"{source}: tokenizer.huggingface.json is no text; convert the model again")
        return parse_json_object(whole, f"tokenizer.huggingface.json of {source}", error=TokenizerError)
    kind = metadata.get(_KEY + "model")
    tokens = _list(metadata, "tokens", str, source)
    types = _list(metadata, "token_type", int, source, len(tokens), [NORMAL] * len(tokens))
    padding = next((n for n, i in enumerate(reversed(range(len(tokens)))) if not _pads(tokens, types, i)), 0)
    tokens, types = tokens[: len(tokens) - padding], types[: len(tokens) - padding]
    if len(set(tokens)) != len(tokens):
        twice = next(text for i, text in enumerate(tokens) if text in tokens[:i])
        raise TokenizerError(f"{source}: the token {short(twice)} is there twice; convert the model again")
    special = {name: _token(metadata, name, tokens) for name in _NAMES}
    added = _added(metadata, tokens, types, special)
    match kind:
        case "llama":
            scores = _list(metadata, "scores", float, source, len(tokens) + padding)
            made = spm_tokenizer(
                tokens,
                spm_merges(tokens, scores, types),
                added,
                unknown=special["unknown"],
                prefix=_flag(metadata, "add_space_prefix", True),
                squeeze=_flag(metadata, "remove_extra_whitespaces", False),
            )
        case "gpt2":
            pre = metadata.get(_KEY + "pre", "default")
            if not isinstance(pre, str) or pre not in SPLITS:
                raise TokenizerError(
                    f"{source}: how the tokenizer splits text is named {short(pre)}, which is not known; "
                    f"known are {', '.join(SPLITS)}. Take the original model's directory, or set the right "
                    "one of these with gguf-set-metadata"
                )
            made = bpe_tokenizer(tokens, _merges(metadata, source), added, pre=pre)
        case _:
            raise TokenizerError(
                f"{source} has a tokenizer of the kind {short(kind)}; llama (SentencePiece BPE) and gpt2 "
                "(byte-level BPE) are read: take the original model's directory"
            )
    return made | {"post_processor": _affixes(metadata, special)}


def tokenizer_config(metadata: Mapping[str, Any], source: str) -> dict[str, Any]:
    """tokenizer_config.json: names of special tokens and chat templates. Raises TokenizerError."""
    tokens = _list(metadata, "tokens", str, source)
    named = {"unknown": "unk_token", "padding": "pad_token", "bos": "bos_token", "eos": "eos_token"}
    special = {named[n]: t for n in _NAMES if (t := _token(metadata, n, tokens)) is not None}
    templates = {"default": metadata.get("tokenizer.chat_template")}
    names = metadata.get("tokenizer.chat_templates", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TokenizerError(
            f"{source}: tokenizer.chat_templates is {short(names)}; a list of names is right"
        )
    templates |= {name: metadata.get(f"tokenizer.chat_template.{name}") for name in names}
    if any(not isinstance(t, str | None) for t in templates.values()):
        raise TokenizerError(f"{source}: a chat template is no text; convert the model again")
    found = [{"name": n, "template": t} for n, t in templates.items() if t]
    chat: Any = found[0]["template"] if len(found) == 1 and templates["default"] else found
    return (
        {"tokenizer_class": "PreTrainedTokenizerFast"} | special | ({"chat_template": chat} if found else {})
    )


def spm_merges(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[list[str]]:
    """The merges that SentencePiece's scores imply: of every piece all its halves that are pieces, the best
    score first, and of one piece in the order of its halves."""
    usable = (NORMAL, USER_DEFINED, UNUSED)
    ids = {text: i for i, text in enumerate(tokens) if types[i] in usable}
    found = []
    for text, token in ids.items():
        for cut in range(1, len(text)):
            left, right = ids.get(text[:cut]), ids.get(text[cut:])
            if left is not None and right is not None:
                found.append((-scores[token], token, left, right))
    found.sort()
    return [[tokens[left], tokens[right]] for _, _, left, right in found]


def spm_tokenizer(
    tokens: Sequence[str],
    merges: list[list[str]],
    added: list[dict[str, Any]],
    *,
    unknown: str | None,
    prefix: bool,
    squeeze: bool = False,
) -> dict[str, Any]:
    """tokenizer.json of SentencePiece's BPE. prefix: every text begins with a space that is not shown;
    squeeze: of several spaces one is left, of those at both ends none."""
    fewer = [
        {"type": "Replace", "pattern": {"Regex": regex}, "content": content}
        for regex, content in ((" {2,}", " "), ("^ +| +$", ""))
    ]
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    begin = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    model = {"unk_token": unknown, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False}
    return _file(
        tokens,
        merges,
        added,
        model,
        normalizer={"type": "Sequence", "normalizers": [*(fewer if squeeze else []), *begin, spaces]},
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": decoders},
    )


def bpe_tokenizer(
    tokens: Sequence[str], merges: list[list[str]], added: list[dict[str, Any]], *, pre: str
) -> dict[str, Any]:
    """tokenizer.json of byte-level BPE whose text is cut as `SPLITS` says."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        for regex in SPLITS[pre]
    ]
    model = {
        "unk_token": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": pre in _WHOLE_FIRST,
    }
    return _file(
        tokens,
        merges,
        added,
        model,
        normalizer={"type": "NFC"} if pre in _NFC else None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [*steps, level]},
        decoder=level | {"add_prefix_space": True, "use_regex": True},
    )


def _file(
    tokens: Sequence[str],
    merges: list[list[str]],
    added: list[dict[str, Any]],
    model: dict[str, Any],
    **parts: Any,
) -> dict[str, Any]:
    model = {"type": "BPE", "dropout": None} | model
    model |= {"continuing_subword_prefix": None, "end_of_word_suffix": None}
    model |= {"vocab": {text: i for i, text in enumerate(tokens)}, "merges": merges}
    head = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    return head | parts | {"post_processor": None, "model": model}


def _added(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], special: Mapping[str, str | None]
) -> list[dict[str, Any]]:
    """Tokens that are found in raw text: special ones, and those that users defined."""
    # As llama.cpp does: Phi-3's end a line, except those that its own file does not give the flag.
    stripping = metadata.get("general.architecture") == "phi3"
    found = []
    for i, (text, kind) in enumerate(zip(tokens, types, strict=True)):
        is_special = kind == CONTROL or text in special.values()
        if text and (is_special or kind == USER_DEFINED):
            found.append(
                {
                    "id": i,
                    "content": text,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": stripping and text not in ("<unk>", "<s>", "<|endoftext|>"),
                    "normalized": False,
                    "special": is_special,
                }
            )
    return found


def _affixes(metadata: Mapping[str, Any], special: Mapping[str, str | None]) -> dict[str, Any] | None:
    """The post-processor that adds BOS and EOS."""
    spm = metadata.get(_KEY + "model") == "llama"
    begins = _flag(metadata, "add_bos_token", spm or metadata.get(_KEY + "pre") in ADDS_BOS)
    names = ["bos"] if begins else []
    names += ["eos"] if _flag(metadata, "add_eos_token", False) else []
    texts = {name: text for name in names if (text := special[name]) is not None}
    if not texts:
        return None
    tokens = {text: metadata[f"{_KEY}{name}_token_id"] for name, text in texts.items()}

    def around(letter: str, kind: int) -> list[dict[str, Any]]:
        named = {n: {"SpecialToken": {"id": t, "type_id": kind}} for n, t in texts.items()}
        inner = {"Sequence": {"id": letter, "type_id": kind}}
        return [each for each in (named.get("bos"), inner, named.get("eos")) if each is not None]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": around("A", 0) + around("B", 1),
        "special_tokens": {t: {"id": t, "ids": [i], "tokens": [t]} for t, i in tokens.items()},
    }


def _pads(tokens: Sequence[str], types: Sequence[int], token: int) -> bool:
    """Whether a token only fills the vocabulary up to the size of the model's matrices."""
    return types[token] == UNUSED and tokens[token] == f"[PAD{token}]"


def _merges(metadata: Mapping[str, Any], source: str) -> list[list[str]]:
    pairs = [text.split(" ") for text in _list(metadata, "merges", str, source)]
    wrong = next((pair for pair in pairs if len(pair) != 2), None)
    if wrong is not None:
        raise TokenizerError(
            f"{source}: the merge {short(wrong)} is not of two pieces; convert the model again"
        )
    return pairs


def _list(
    metadata: Mapping[str, Any],
    name: str,
    kind: type,
    source: str,
    count: int | None = None,
    default: list[Any] | None = None,
) -> list[Any]:
    value = metadata.get(_KEY + name, default)
    if not isinstance(value, list) or not all(type(item) is kind for item in value):
        raise TokenizerError(
            f"{source}: {_KEY}{name} is {short(value)}; a list of {kind.__name__} is right: take the "
            "original model's directory, or convert it again"
        )
    if count is not None and len(value) != count:
        raise TokenizerError(
            f"{source}: {_KEY}{name} has {len(value)} entries and there are {count} tokens; convert it again"
        )
    return value


def _token(metadata: Mapping[str, Any], name: str, tokens: Sequence[str]) -> str | None:
    """Text of a special token; None where the file names none (2**32 - 1 means that too)."""
    token = metadata.get(f"{_KEY}{name}_token_id")
    return tokens[token] if type(token) is int and 0 <= token < len(tokens) and tokens[token] else None


def _flag(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    value = metadata.get(_KEY + name, default)
    return value if isinstance(value, bool) else default
