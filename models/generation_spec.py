"""The graphs that write words, in two forms.

Dynamic, for ONNX Runtime: a decoder takes the keys and values of what came before, one tensor a layer, any number of
words and any number of rows; `beam_index` says which of those rows each row goes on from, so that nothing but an index
leaves the session when beams are sorted, or when one that has ended is dropped. The prompt and the words after it go
through one graph, which holds the weights once; what it gives for the prompt, all sequences of the prompt share from then on.

Static, for Ascend's converter: a buffer of S slots for what came before, whatever of it is masked out counting nothing;
only the keys and values of the new words come back, and the caller writes them into the next slot.

Axes: B prompts, M sequences of one prompt, L words, P words before them, R rows of these, Q queries of the Q-Former (0
after the prompt), C positions that all sequences of a prompt look at (of the picture, of the question, or of the prompt
itself), S slots, T image tokens, H heads, K head width, V words.
`positions` counts what is not masked, from 0. Prompts of unequal length are padded on the left, where the mask is 0.
"""

from __future__ import annotations

from models.config import Blip2LlmConfig, BlipCaptionConfig, BlipVqaConfig, GenerationConfig
from models.llm_config import LlmConfig, T5Config, words_width
from models.spec import BATCH, LENGTH, Dim, GraphSpec, TensorSpec, picture_tensors

BEAMS, PAST, ROWS, QUERIES, CROSS, SLOTS = "M", "P", "R", "Q", "C", "S"
PROMPT_KV, PROMPT_MASK = "prompt_kv", "prompt_mask"
KEY, VALUE = "key", "value"


def generation_specs(config: GenerationConfig, static: bool) -> tuple[GraphSpec, ...]:
    """Every graph of a model that writes words, in the order they are used."""
    if isinstance(config, BlipCaptionConfig):
        return _caption_specs(config, static)
    if isinstance(config, BlipVqaConfig):
        return _vqa_specs(config, static)
    return _t5_specs(config, config.llm, static) if isinstance(config.llm, T5Config) else _llm_specs(config, static)


def layer_names(prefix: str, layers: int) -> list[str]:
    """Names of the keys and values of every layer: past.0.key, past.0.value, past.1.key, ..."""
    return [f"{prefix}.{n}.{part}" for n in range(layers) for part in (KEY, VALUE)]


def _caption_specs(config: BlipCaptionConfig, static: bool) -> tuple[GraphSpec, ...]:
    image, feat = picture_tensors(config.vision)
    decoder = config.decoder
    sizes = (decoder.depth, decoder.heads, decoder.width // decoder.heads)
    cross = _kept("cross_kv", (BATCH,), config.vision.tokens, sizes, static)
    return (
        GraphSpec("image_feat", (image,), (feat,)),
        GraphSpec("image_kv", (feat,), cross),
        _decoder("text_decoder", cross, sizes, decoder.vocab, static),
    )


def _vqa_specs(config: BlipVqaConfig, static: bool) -> tuple[GraphSpec, ...]:
    image, feat = picture_tensors(config.vision)
    decoder = config.decoder
    sizes = (decoder.depth, decoder.heads, decoder.width // decoder.heads)
    states = TensorSpec("question_states", "float32", (BATCH, LENGTH, config.text.width))
    read = _kept("cross_kv", (BATCH,), LENGTH, sizes, static)
    cross = (_cross_mask(), *_kept("cross_kv", (BATCH,), CROSS, sizes, static))
    return (
        GraphSpec("image_feat", (image,), (feat,)),
        GraphSpec("question_encoder", (*_text((BATCH,)), feat), (states, *read)),
        _decoder("text_decoder", cross, sizes, decoder.vocab, static),
    )


def _llm_specs(config: Blip2LlmConfig, static: bool) -> tuple[GraphSpec, ...]:
    llm, queries = config.llm, config.qformer.queries
    assert not isinstance(llm, T5Config)
    sizes = (llm.depth, llm.heads, llm.width // llm.heads)
    seen = _seeing(config, llm)
    if not static:
        rows = (BATCH, BEAMS)
        queried = TensorSpec("llm_prompt", "float32", (*rows, QUERIES, words_width(llm)))
        words = (*_text(rows), _positions(rows), _past_mask(rows, PAST), _beam_index(rows))
        shared = (TensorSpec(PROMPT_MASK, "int64", (BATCH, CROSS)), *_kept(PROMPT_KV, (BATCH,), CROSS, sizes, static))
        past = _kept("past", (ROWS,), PAST, sizes, static)
        present = _kept("present", (f"{BATCH}*{BEAMS}",), f"{PAST}+{QUERIES}+{LENGTH}", sizes, static)
        logits = TensorSpec("logits", "float32", (*rows, llm.vocab))
        return (*seen, GraphSpec("llm", (queried, *words, *shared, *past), (logits, *present)))
    ids, mask = _text((BATCH,))
    logits = TensorSpec("logits", "float32", (BATCH, llm.vocab))
    prompt = TensorSpec("llm_prompt", "float32", (BATCH, queries, words_width(llm)))
    present = _kept("present", (BATCH,), f"{queries}+{LENGTH}", sizes, static)
    one = TensorSpec(ids.name, ids.dtype, (BATCH, 1))
    position = TensorSpec("positions", "int64", (BATCH, 1))
    past = _kept("past", (BATCH,), SLOTS, sizes, static)
    return (
        *seen,
        GraphSpec("llm_prefill", (prompt, ids, mask, _positions((BATCH,))), (logits, *present)),
        GraphSpec(
            "llm_decode",
            (one, position, _past_mask((BATCH,), SLOTS), *past),
            (logits, *_kept("present", (BATCH,), 1, sizes, static)),
        ),
    )


def _t5_specs(config: Blip2LlmConfig, llm: T5Config, static: bool) -> tuple[GraphSpec, ...]:
    queries = config.qformer.queries
    sizes = (llm.depth, llm.heads, llm.head_width)
    prompt = TensorSpec("llm_prompt", "float32", (BATCH, queries, llm.width))
    read = _kept("cross_kv", (BATCH,), f"{queries}+{LENGTH}", sizes, static)
    cross = (_cross_mask(), *_kept("cross_kv", (BATCH,), CROSS, sizes, static))
    return (
        *_seeing(config, llm),
        GraphSpec("t5_encoder", (prompt, *_text((BATCH,))), read),
        _decoder("t5_decoder", cross, sizes, llm.vocab, static),
    )


def _seeing(config: Blip2LlmConfig, llm: LlmConfig) -> tuple[GraphSpec, GraphSpec]:
    """The graphs that look at the picture, and what the language model gets of it."""
    image, feat = picture_tensors(config.vision)
    query_embed = TensorSpec("query_embed", "float32", (BATCH, config.qformer.queries, config.qformer.width))
    llm_prompt = TensorSpec("llm_prompt", "float32", (BATCH, config.qformer.queries, words_width(llm)))
    return GraphSpec("image_feat", (image,), (feat,)), GraphSpec("qformer", (feat,), (query_embed, llm_prompt))


def _decoder(name: str, cross: tuple[TensorSpec, ...], sizes: tuple[int, int, int], vocab: int, static: bool) -> GraphSpec:
    """A decoder that looks at what was read: M sequences of each of B prompts, which share its keys and values."""
    rows: tuple[Dim, ...] = (BATCH, BEAMS)
    logits = TensorSpec("logits", "float32", (*rows, vocab))
    flat = f"{BATCH}*{BEAMS}"
    if static:
        one = TensorSpec("text_ids", "int64", (*rows, 1))
        position = TensorSpec("positions", "int64", (*rows, 1))
        past = _kept("past", (flat,), SLOTS, sizes, static)
        present = _kept("present", (flat,), 1, sizes, static)
        return GraphSpec(name, (one, position, _past_mask(rows, SLOTS), *cross, *past), (logits, *present))
    past = _kept("past", (ROWS,), PAST, sizes, static)
    present = _kept("present", (flat,), f"{PAST}+{LENGTH}", sizes, static)
    inputs = (*_text(rows), _positions(rows), _past_mask(rows, PAST), _beam_index(rows), *cross, *past)
    return GraphSpec(name, inputs, (logits, *present))


def _kept(prefix: str, rows: tuple[Dim, ...], length: Dim, sizes: tuple[int, int, int], static: bool) -> tuple[TensorSpec, ...]:
    """Keys and values of every layer for `length` positions: a tensor each, or when static all in one."""
    layers, heads, width = sizes
    if static:
        return (TensorSpec(prefix, "float32", (*rows, 2 * layers, heads, length, width)),)
    return tuple(TensorSpec(name, "float32", (*rows, heads, length, width)) for name in layer_names(prefix, layers))


def _text(rows: tuple[Dim, ...]) -> tuple[TensorSpec, TensorSpec]:
    return TensorSpec("text_ids", "int64", (*rows, LENGTH)), TensorSpec("text_atten_mask", "int64", (*rows, LENGTH))


def _positions(rows: tuple[Dim, ...]) -> TensorSpec:
    return TensorSpec("positions", "int64", (*rows, LENGTH))


def _past_mask(rows: tuple[Dim, ...], length: Dim) -> TensorSpec:
    return TensorSpec("past_mask", "int64", (*rows, length))


def _beam_index(rows: tuple[Dim, ...]) -> TensorSpec:
    return TensorSpec("beam_index", "int64", rows)


def _cross_mask() -> TensorSpec:
    return TensorSpec("cross_mask", "int64", (BATCH, CROSS))
