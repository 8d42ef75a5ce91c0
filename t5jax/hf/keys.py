"""The keys of a config.json: those that are read, those that have no effect, and all others.

A key that is not known is never passed over in silence.
"""

import dataclasses
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

# Names of the same function in transformers' ACT2FN, of which the first is the usual one.
GELU_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate")
GELU_EXACT = ("gelu", "gelu_python")
SILU = ("silu", "swish")

# Keys of any config.json that do not affect the network: the origin of a file, settings of training
# and of former users, of other libraries, labels of other heads, defaults of generation.
BOOKKEEPING = frozenset(
    re.findall(
        r"[\w.]+",
        """
        _name_or_path _commit_hash _attn_implementation_autoset _attn_implementation
        _attn_implementation_internal _experts_implementation _flash_attn_2_enabled
        attn_implementation architectures auto_map model_type name license language revision
        transformers.js_config unsloth_version unsloth_fixed unsloth_traced_weights
        tokenizer_model_max_length tokenizer_padding_side model_max_length max_sequence_length
        neftune_noise_alpha is_llama_config is_composition tf_legacy_loss use_return_dict
        cross_attention_hidden_size summary_type summary_use_proj summary_activation
        summary_proj_to_labels summary_first_dropout n_special predict_special_tokens
        _num_labels xla_device
        transformers_version torch_dtype dtype torchscript use_bfloat16 gradient_checkpointing
        return_dict output_attentions output_hidden_states output_past use_cache
        chunk_size_feed_forward task_specific_params finetuning_task problem_type id2label label2id
        num_labels tokenizer_class prefix bos_token_id sep_token_id unk_token_id mask_token_id
        begin_suppress_tokens suppress_tokens forced_bos_token_id forced_eos_token_id bad_words_ids
        max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups
        diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
        no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences output_scores
        return_dict_in_generate remove_invalid_values exponential_decay_length_penalty
        _from_model_config assistant_confidence_threshold assistant_early_exit
        assistant_lookbehind target_lookbehind cache_config cache_implementation
        compile_config disable_compile constraints force_words_ids dola_layers
        encoder_repetition_penalty epsilon_cutoff eta_cutoff guidance_scale is_assistant low_memory
        max_cache_len max_matching_ngram_size max_time min_new_tokens min_p num_assistant_tokens
        num_assistant_tokens_schedule output_logits penalty_alpha prefill_chunk_size
        prompt_lookup_num_tokens renormalize_logits return_legacy_cache sequence_bias stop_strings
        token_healing top_h watermarking_config
        """,
    )
)


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of config.json that is read."""

    kind: type
    """The type of its value; an int is accepted for a float."""
    default: Any = None
    """Its value if it is absent, as in transformers."""
    may_be_null: bool = False
    """Whether null is a value; otherwise it means that the key is absent."""


def read_keys(
    raw: Mapping[str, Any], keys: Mapping[str, Key], harmless: Iterable[str] = ()
) -> dict[str, Any]:
    """Returns the values of the keys, which have their type or are None.

    Args:
      harmless: further keys that are allowed and have no effect.
    Raises:
      ValueError: if a value has another type.
    """
    warn_unknown(raw, (*keys, *harmless))
    values = {}
    for name, key in keys.items():
        value = raw.get(name)
        if value is None and not (key.may_be_null and name in raw):
            value = key.default
        if key.kind is float and type(value) is int:
            value = float(value)
        if value is not None and type(value) is not key.kind:
            raise ValueError(
                f"config.json: {name} is {value!r}; expected a value of type {key.kind.__name__}"
            )
        values[name] = value
    return values


def check_required(given: Mapping[str, Any], required: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises ValueError for a key whose value means a network that is not implemented here.

    Args:
      required: the allowed values of each key; none if the key must be absent.
    """
    for key, allowed in required.items():
        if given.get(key) is not None and given[key] not in allowed:
            expected = f"expected {allowed[0]!r}" if allowed else "expected plain float weights"
            raise ValueError(
                f"config.json: {key} is {given[key]!r}, which is not implemented; {expected}"
            )


def warn_unknown(raw: Mapping[str, Any], known: Iterable[str]) -> None:
    """Warns about keys of config.json that are neither read nor known to be harmless."""
    unknown = sorted(set(raw) - set(known) - BOOKKEEPING)
    if unknown:
        warnings.warn(
            f"config.json has keys that are not known here and change nothing: "
            f"{', '.join(f'{key}={raw[key]!r}' for key in unknown)}; if one of them changes the "
            "network, the result will differ from transformers'",
            stacklevel=3,
        )
