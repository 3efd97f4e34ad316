"""What a tokenizer class of transformers implies beyond its files: default tokens, BOS and EOS, alphabet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from gossamer.errors import TokenizerError

__all__ = ["SPECIAL_NAMES", "AddedToken", "Family", "family_of"]

SPECIAL_NAMES = frozenset(
    {f"{name}_token" for name in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")}
    | {"additional_special_tokens"}
)


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token matched in raw text before the vocabulary is asked. lstrip/rstrip: it eats spaces beside it."""

    content: str
    special: bool = False
    normalized: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    @classmethod
    def parse(cls, entry: Mapping[str, Any]) -> AddedToken:
        """From a tokenizer_config.json entry. Raises TypeError or ValueError for anything else."""
        content, special = entry.get("content"), entry.get("special", False)
        flags = {name: entry.get(name, False) for name in ("lstrip", "rstrip", "single_word")}
        normalized = entry.get("normalized", not special)
        if not isinstance(content, str) or not content:
            raise ValueError(f"{entry!r} has no content")
        if not all(isinstance(flag, bool) for flag in (special, normalized, *flags.values())):
            raise ValueError(f"{entry!r} has a flag that is neither true nor false")
        return cls(content, special, normalized, **flags)

    def as_special(self) -> AddedToken:
        """The same token, left out of decoded text by default."""
        return replace(self, special=True)


@dataclass(frozen=True, slots=True)
class Family:
    """A tokenizer class. tokens: default special tokens.

    bos: whether BOS is added unless the config says otherwise, None where the class leaves affixes to
    tokenizer.json; slow_bos: the same for vocabularies without tokenizer.json. byte_bpe: how
    vocab.json + merges.txt splits text, None where that is unknown.
    """

    name: str
    tokens: Mapping[str, str] = field(default_factory=dict)
    bos: bool | None = None
    slow_bos: bool = False
    byte_bpe: Literal["gpt2", "qwen2"] | None = None

    def affixes(self, config: Mapping[str, Any], from_file: bool) -> tuple[bool | None, bool]:
        """Whether to add BOS and EOS; BOS None means that tokenizer.json's own post-processor decides."""
        if from_file and self.bos is None:
            return None, False
        default = self.slow_bos if self.bos is None else self.bos
        begin, end = config.get("add_bos_token"), config.get("add_eos_token")
        return bool(default if begin is None else begin), bool(end)


def _tokens(bos: str | None, eos: str, unk: str, pad: str | None = None) -> dict[str, str]:
    named = {"bos_token": bos, "eos_token": eos, "unk_token": unk, "pad_token": pad}
    return {name: text for name, text in named.items() if text is not None}


_LLAMA = _tokens("<s>", "</s>", "<unk>")
_END = "<|endoftext|>"
_FAMILIES = {
    family.name: family
    for family in (
        Family("Llama", _LLAMA, bos=True),
        Family("CodeLlama", _LLAMA, bos=True),
        Family("Gemma", _tokens("<bos>", "<eos>", "<unk>", "<pad>"), bos=True),
        Family("Cohere", _tokens("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<UNK>"), bos=True),
        Family("GPTNeoX", _tokens(_END, _END, _END), bos=False, byte_bpe="gpt2"),
        Family("GPT2", _tokens(_END, _END, _END), byte_bpe="gpt2"),
        Family("Qwen2", _tokens(None, _END, _END, _END), byte_bpe="qwen2"),
    )
}
_BY_MODEL = {
    "llama": "Llama", "mistral": "Llama", "mixtral": "Llama", "phi3": "Llama",
    "gemma": "Gemma", "gemma2": "Gemma", "gemma3": "Gemma", "gemma3_text": "Gemma",
    "qwen2": "Qwen2", "qwen2_moe": "Qwen2", "qwen3": "Qwen2", "qwen3_moe": "Qwen2",
    "gpt2": "GPT2", "gpt_neox": "GPTNeoX", "cohere": "Cohere",
}  # fmt: skip


def family_of(config: Mapping[str, Any], model_config: Mapping[str, Any]) -> Family:
    """Family by tokenizer_config.json's class, else config.json's class or model type.

    A class that is not special here (PreTrainedTokenizerFast) gives an empty family: its files say all.
    Raises TokenizerError for a class that is not a string.
    """
    name = config.get("tokenizer_class") or model_config.get("tokenizer_class")
    if name is None:
        name = _BY_MODEL.get(str(model_config.get("model_type")), "")
    if not isinstance(name, str):
        raise TokenizerError(f"tokenizer_class is {name!r}; the name of a class is needed, or none")
    name = name.removesuffix("Fast").removesuffix("Tokenizer")
    return _FAMILIES.get(name, Family(name))
