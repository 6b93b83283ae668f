"""What the config.json of a language model says of it, beside its tensors, compared with the configuration.

The keys and their defaults are transformers' (OPTConfig, LlamaConfig, T5Config) and Baichuan-7B's. What is not said is the
default; where there is none, the tensors show it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from models.errors import UserError
from models.llm_config import BAICHUAN, GELU, LLAMA, OPT, T5, VICUNA, LlamaConfig, LlmConfig, OptConfig, T5Config
from models.weights_file import AGAIN

NAME = "config.json"
TYPES = {OPT: ("opt",), LLAMA: ("llama",), VICUNA: ("llama",), BAICHUAN: ("baichuan", "llama"), T5: ("t5",)}  # model_type
BAICHUAN2_VOCAB = 125696
SHOWN = 40  # letters of a value in a message
OPT_VOCAB, T5_VOCAB = 50272, 32128  # rows of the published tables of words
# Of the published BLIP-2 folders (Salesforce/blip2-opt-2.7b, blip2-flan-t5-xl). OPT ends at a line's end, as in LAVIS.
OPT_IDS = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
LLAMA_IDS = {"bos_token_id": 1, "eos_token_id": 2}
T5_IDS = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0, "decoder_start_token_id": 0}
LINE_END_OF_OPT, PICTURE_OF_OPT, PICTURE_OF_T5, UNKNOWN_OF_LLAMA = 50118, 50265, 32100, 0


@dataclass(frozen=True)
class Settings:
    """The part of a config.json that is the language model's."""

    path: Path
    values: Mapping[str, object]

    @property
    def same_head(self) -> bool:
        """Whether T5's words are its head too, unscaled: what transformers 5 makes of a T5 that has no head of its own."""
        return self.values.get("scale_decoder_outputs") is False


def settings_of(path: Path, part: str | None = None) -> Settings | None:
    """What stands in the config.json of the folder `path`, or in its object `part`; None when there is none. Raises UserError
    when it cannot be read."""
    file = path / NAME
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({type(error).__name__}: {error}). {AGAIN}") from error
    if not isinstance(values, dict) or (part and not isinstance(values.get(part, {}), dict)):
        raise UserError(f"{file} is damaged: expected an object{f' with an object {part!r}' if part else ''}. {AGAIN}")
    return Settings(file, values.get(part, {}) if part else values)


def check_settings(settings: Settings, llm: LlmConfig, of_blip2: bool) -> None:
    """Raises UserError when `settings` are of another model than `llm`, or of one that is not built here. `of_blip2` when they
    stand in the config.json of a whole BLIP-2: then what it runs the language model with counts."""
    _refuse_kind(settings, llm)
    values = {**settings.values, **_rotation(settings.values)}
    wrong = []
    for key, (expected, default) in _expected(llm, of_blip2).items():
        found = values.get(key)
        found = default if found is None else found
        # True is 1 in Python; in a config.json it is not.
        if found is not None and (found != expected or isinstance(found, bool) != isinstance(expected, bool)):
            wrong.append(f"{key} is {_shown(found)}, expected {expected!r}")
    if wrong:
        raise UserError(
            f"{settings.path}: {'; '.join(wrong)}. Give the language model of this configuration, or a configuration of this "
            "model with --config."
        )


def settings_to_write(llm: LlmConfig) -> dict[str, object]:
    """The `text_config` of a whole BLIP-2 in transformers, complete where its defaults are others: `check_settings` takes it."""
    said = {key: value for key, (value, _) in _expected(llm, of_blip2=True).items()}
    said |= {"model_type": TYPES[llm.family][-1], "vocab_size": llm.vocab}
    if isinstance(llm, OptConfig):
        return said | OPT_IDS | ({"eos_token_id": LINE_END_OF_OPT} if llm.vocab == OPT_VOCAB else {})
    if isinstance(llm, T5Config):
        # transformers 4 leaves FlanT5 its own head because of this; transformers 5 does not scale what reaches it.
        return said | T5_IDS | {"tie_word_embeddings": False}
    rotation = {"rope_type": said.pop("rope_type"), "rope_theta": llm.theta}  # transformers 5's form; 4 reads rope_theta
    return said | LLAMA_IDS | {"max_position_embeddings": llm.positions, "rope_parameters": rotation}


def picture_id(llm: LlmConfig) -> int | None:
    """The word that holds a picture's place in transformers' BLIP-2, a row of the table that no prompt reads; None where the
    vocabulary is not a published one."""
    if isinstance(llm, LlamaConfig):
        return UNKNOWN_OF_LLAMA
    return {(OPT, OPT_VOCAB): PICTURE_OF_OPT, (T5, T5_VOCAB): PICTURE_OF_T5}.get((llm.family, llm.vocab))


def refuse_lookalikes(settings: Settings) -> None:
    """Raises UserError when `settings` are of a model whose tensors look like those of one that is built here."""
    values, path = settings.values, settings.path
    kind = values.get("model_type")
    if values.get("quantization_config") is not None:
        raise UserError(f"{path} is of a quantised model, which is not read. Give one in float32, float16 or bfloat16.")
    if kind == "baichuan" and ("z_loss_weight" in values or values.get("vocab_size") == BAICHUAN2_VOCAB):
        raise UserError(
            f"{path} is of Baichuan2, whose head divides its rows by their length (NormHead), which is not built here. "
            "Give baichuan-inc/Baichuan-7B."
        )
    if kind == "baichuan" and "max_position_embeddings" not in values and "model_max_length" in values:
        raise UserError(
            f"{path} is of Baichuan-13B, whose attention adds numbers by distance (ALiBi), which is not built here. "
            "Give baichuan-inc/Baichuan-7B."
        )
    if kind == "t5" and values.get("feed_forward_proj", "relu") == "relu":
        raise UserError(
            f"{path} is of T5 v1.0, which has no gated feed-forward layers and scales what reaches its head. Give FlanT5, such "
            "as google/flan-t5-xl."
        )


def _refuse_kind(settings: Settings, llm: LlmConfig) -> None:
    values, path = settings.values, settings.path
    kind = values.get("model_type")
    if kind is not None and kind not in TYPES[llm.family]:
        raise UserError(
            f"{path} is of a model of type {_shown(kind)}, expected {' or '.join(map(repr, TYPES[llm.family]))}. Give the "
            "language model of this configuration."
        )
    if isinstance(llm, T5Config) and values.get("scale_decoder_outputs", values.get("tie_word_embeddings")) is True:
        raise UserError(
            f"{path} is of a T5 that scales what reaches its head (tie_word_embeddings), which is not built here. Give FlanT5, "
            "such as google/flan-t5-xl."
        )


def _expected(llm: LlmConfig, of_blip2: bool) -> dict[str, tuple[object, object]]:
    """Key -> what it has to be, and what it is when it is not said (None: the tensors tell)."""
    if isinstance(llm, OptConfig):
        return {
            "hidden_size": (llm.width, None),
            "num_hidden_layers": (llm.depth, None),
            "num_attention_heads": (llm.heads, None),
            "ffn_dim": (llm.ffn, None),
            "word_embed_proj_dim": (llm.embed, None),
            "max_position_embeddings": (llm.positions, None),
            "do_layer_norm_before": (llm.pre_norm, True),
            "activation_function": ("relu", "relu"),
            "enable_bias": (True, True),
            "layer_norm_elementwise_affine": (True, True),
            "_remove_final_layer_norm": (False, False),
        }
    if isinstance(llm, T5Config):
        return {
            "d_model": (llm.width, None),
            "num_layers": (llm.depth, None),
            "num_decoder_layers": (llm.depth, None),
            "num_heads": (llm.heads, None),
            "d_kv": (llm.head_width, 64),
            "d_ff": (llm.ffn, None),
            "relative_attention_num_buckets": (llm.buckets, 32),
            "relative_attention_max_distance": (llm.farthest, 128),
            "layer_norm_epsilon": (llm.eps, 1e-6),
            "feed_forward_proj": ("gated-gelu", "relu"),
            # LAVIS replaces what FlanT5's own folder says (models/blip2_models/blip2_t5.py).
            **({"dense_act_fn": (llm.activation, GELU)} if of_blip2 else {}),
        }
    return _expected_of_llama(llm)


def _expected_of_llama(llm: LlamaConfig) -> dict[str, tuple[object, object]]:
    return {
        "hidden_size": (llm.width, None),
        "num_hidden_layers": (llm.depth, None),
        "num_attention_heads": (llm.heads, None),
        "num_key_value_heads": (llm.heads, None),
        "head_dim": (llm.width // llm.heads, None),
        "intermediate_size": (llm.ffn, None),
        "hidden_act": ("silu", "silu"),
        "rms_norm_eps": (llm.eps, 1e-6),
        "rope_theta": (llm.theta, 10000.0),
        "rope_type": ("default", "default"),
        "attention_bias": (False, False),
        "mlp_bias": (False, False),
        "tie_word_embeddings": (False, False),
    }


def _rotation(values: Mapping[str, object]) -> dict[str, object]:
    """How positions are rotated: transformers 5 has an object for it, earlier ones a key, and an object where it is changed."""
    said = values.get("rope_parameters") or values.get("rope_scaling")
    if said is None:
        return {}
    if not isinstance(said, dict):
        return {"rope_type": said}
    kind = said.get("rope_type", said.get("type", "default"))
    return {"rope_type": kind, **({"rope_theta": said["rope_theta"]} if "rope_theta" in said else {})}


def _shown(value: object) -> str:
    said = repr(value)
    return said if len(said) <= SHOWN else f"{said[:SHOWN]}..."
