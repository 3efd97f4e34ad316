"""Reading config.json so that nothing in it is ignored unnoticed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from sys import float_info
from typing import Any

from gossamer.errors import UnsupportedModelError

__all__ = ["Fields", "with_plain_rotary"]

# fmt: off
# What transformers writes into every config and what says nothing about the numbers of inference.
_INERT = frozenset({
    "_attn_implementation", "_name_or_path", "architectures", "attention_dropout", "auto_map",
    "bos_token_id", "cache_implementation", "chunk_size_feed_forward", "cross_attention_hidden_size",
    "decoder_start_token_id", "dtype", "eos_token_id", "finetuning_task", "gradient_checkpointing",
    "id2label", "initializer_factor", "initializer_range", "is_decoder", "label2id", "model_type",
    "output_attentions", "output_hidden_states", "pad_token_id", "prefix", "problem_type", "return_dict",
    "sep_token_id", "task_specific_params", "tf_legacy_loss", "tokenizer_class", "torch_dtype",
    "torchscript", "transformers.js_config", "transformers_version", "unk_token_id", "unsloth_fixed",
    "unsloth_version", "use_bfloat16", "use_cache",
})
# Generation settings that old configs carry; generation_config.json is where they count.
_GENERATION = frozenset({
    "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id",
    "forced_eos_token_id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "remove_invalid_values",
    "repetition_penalty", "return_dict_in_generate", "suppress_tokens", "temperature", "top_k", "top_p",
    "typical_p",
})
_ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "relu": "relu",
}
# fmt: on


def with_plain_rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json whose rotary fields are those that every release knows: transformers 5 writes rope_theta,
    partial_rotary_factor and the fields of rope_scaling into one object, rope_parameters, or one for each
    kind of layers. It stays as it is where it contradicts the fields beside it or says what they cannot."""
    plain = _plain_rotary(config.get("rope_parameters"))
    if plain is None or any(config.get(name) not in (None, value) for name, value in plain.items()):
        return dict(config)
    return {name: value for name, value in config.items() if name != "rope_parameters"} | plain


def _plain_rotary(given: Any) -> dict[str, Any] | None:
    if not isinstance(given, Mapping):
        return None
    if set(given) == {"full_attention", "sliding_attention"}:
        full, sliding = (_plain_rotary(given[kind]) for kind in ("full_attention", "sliding_attention"))
        if full is None or sliding is None or set(sliding) != {"rope_theta"}:
            return None
        return full | {"rope_local_base_freq": sliding["rope_theta"]}
    plain = {name: given[name] for name in ("rope_theta", "partial_rotary_factor") if name in given}
    scaling = {name: value for name, value in given.items() if name not in plain}
    if scaling.get("rope_type", "default") != "default":
        plain["rope_scaling"] = scaling
    elif set(scaling) - {"rope_type"}:
        return None
    return plain


class Fields:
    """One config.json being read by a family. Every field must be read, inert or off by `finish`.

    A null field counts as absent, except for the `optional_` readers, where null means None. Reading
    raises UnsupportedModelError that names the field, its value and what is right.
    """

    def __init__(self, config: Mapping[str, Any], ignore: Collection[str] = ()) -> None:
        """ignore: fields to treat as absent (`--ignore-config-field`)."""
        kept = {name: value for name, value in config.items() if name not in ignore}
        self._config = with_plain_rotary(kept)
        self._read: set[str] = set()

    def raw(self, name: str) -> Any:
        """The value as it stands; None where absent."""
        self._read.add(name)
        return self._config.get(name)

    def whole(self, name: str, default: int | None = None, *, least: int = 0, most: int = 2**31) -> int:
        """A whole number. default: where absent (None: the field is needed)."""
        value = self._or_default(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self._wrong(name, value, f"a whole number from {least} to {most}")
        return value

    def size(self, name: str, default: int | None = None, *, most: int = 2**31) -> int:
        """A whole number >= 1."""
        return self.whole(name, default, least=1, most=most)

    def optional_size(self, name: str, absent: int | None = None) -> int | None:
        """A whole number >= 1, or None where it is null. absent: the value where it is not there."""
        if self.raw(name) is None and (absent is None or name in self._config):
            return None
        return self.size(name, absent)

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number > 0."""
        value = self._or_default(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= float_info.max:
            raise self._wrong(name, value, "a number above 0")
        return float(value)

    def optional_number(self, name: str, absent: float | None = None) -> float | None:
        """A finite number > 0, or None where it is null."""
        if self.raw(name) is None and (absent is None or name in self._config):
            return None
        return self.number(name, absent)

    def flag(self, name: str, default: bool = False) -> bool:
        """true or false."""
        value = self._or_default(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def activation(self, name: str, default: str) -> str:
        """The activation in the op table's names, from transformers' names."""
        value = self._or_default(name, default)
        if not isinstance(value, str) or value not in _ACTIVATIONS:
            raise self._wrong(name, value, f"one of {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[value]

    def only(self, name: str, allowed: Any) -> None:
        """A field that is understood in this one value, which is its default too."""
        value = self.raw(name)
        if value is not None and value != allowed:
            raise UnsupportedModelError(
                f"config.json: {name} is {value!r}; this family understands {allowed!r} alone "
                f"(--ignore-config-field {name} goes on as if it were that)"
            )

    def finish(self, *inert: str) -> None:
        """Raises UnsupportedModelError naming the fields that were neither read nor inert.

        inert: names of the family's own. A field that is off (null, false, 0, empty) passes.
        """
        unknown = [
            name
            for name, value in self._config.items()
            if value and not (name in self._read or name in _INERT or name in _GENERATION or name in inert)
        ]
        if unknown:
            shown = ", ".join(f"{name}={self._config[name]!r}" for name in unknown[:4])
            raise UnsupportedModelError(
                f"config.json: {shown} {'is' if len(unknown) == 1 else 'are'} not understood, so the model "
                "could compute something else than it should; if it does not matter, pass "
                + " ".join(f"--ignore-config-field {name}" for name in unknown)
            )

    def _or_default(self, name: str, default: Any) -> Any:
        value = self.raw(name)
        if value is None and default is None:
            raise UnsupportedModelError(f"config.json has no {name}, which this architecture needs")
        return default if value is None else value

    def _wrong(self, name: str, value: Any, right: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"config.json: {name} is {value!r}; {right} is right")
