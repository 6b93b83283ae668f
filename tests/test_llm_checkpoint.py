"""Models of transformers, whole or a language model alone, compute with our code what they compute there.

Tolerances: over all cases here, and five seeds of each, the largest difference is 4.1e-6 of the largest logit (about 5).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from models.blip2_llm import Blip2Llm
from models.checkpoint import LoadReport, load_generator
from models.config import Blip2LlmConfig, BlipVqaConfig, GenerationConfig
from models.fit import Generator
from models.layouts import Source
from models.llm_checkpoint import _in_order
from models.llm_config import BAICHUAN, GELU_TANH, VICUNA, LlmConfig
from models.weights_file import Weights
from tests.make_generator import State, llm_settings, llm_state, ours, stage2_state, write_llm
from tests.test_generator_checkpoint import refusal
from tests.their_generators import far, our_logits, their_generator, their_llm_config, their_logits, untied
from tests.tiny import TINY, TINY_CAPTION, TINY_LLAMA, TINY_OPT, TINY_OPT_350M, TINY_T5, fill, tiny_llm

CLOSE = 2e-5
# In transformers one configuration is for questions and answers, and both look at something as wide as pictures.
SQUARE_VQA = BlipVqaConfig(dataclasses.replace(TINY.vision, width=40, heads=4), TINY.text, TINY.text)
VICUNA_LLM = dataclasses.replace(TINY_LLAMA, family=VICUNA)
BAICHUAN_LLM = dataclasses.replace(TINY_LLAMA, family=BAICHUAN)
WHOLE: dict[str, GenerationConfig] = {
    "captions": TINY_CAPTION,
    "answers": SQUARE_VQA,
    "opt": tiny_llm(TINY_OPT),
    "llama": tiny_llm(TINY_LLAMA),
    "t5": tiny_llm(TINY_T5),
    "t5 by tanh": tiny_llm(dataclasses.replace(TINY_T5, activation=GELU_TANH)),
}


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.utils.logging.disable_progress_bar()


# Whole models


@pytest.mark.parametrize("form", ["one file", "shards", "published"])
@pytest.mark.parametrize("name", WHOLE)
def test_first_word(tmp_path: Path, name: str, form: str) -> None:
    """As save_pretrained of today writes it, and as folders were published: tied tensors twice, position ids, .bin files."""
    config = WHOLE[name]
    theirs = their_generator(config)
    theirs.save_pretrained(tmp_path, max_shard_size="100KB" if form == "shards" else "1GB")
    assert (len(list(tmp_path.glob("model*.safetensors"))) > 1) == (form == "shards")
    ids = 0
    if form == "published":
        (tmp_path / "model.safetensors").unlink()
        state = theirs.state_dict()
        tables = [n for n in state if n.endswith("position_embeddings.weight") or n == "qformer.layernorm.weight"]
        state |= {n.rpartition(".")[0].rpartition(".")[0] + ".position_ids": torch.arange(9)[None] for n in tables}
        ids = len(tables)
        half = len(state) // 2
        for n, part in enumerate((list(state)[:half], list(state)[half:])):
            torch.save({key: state[key] for key in part}, tmp_path / f"pytorch_model-{n}.bin")
        where = {key: f"pytorch_model-{n >= half:d}.bin" for n, key in enumerate(state)}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    model, report = load_generator(config, tmp_path)
    found, wanted = our_logits(model, config), their_logits(theirs, config)
    assert far(found, wanted) < CLOSE
    assert (report.layout, report.unexpected, report.llm) == ("huggingface", (), None)
    assert report.ignored.get("position ids", 0) == ids
    # The check can fail: with other words, or one weight changed.
    bias = next(p for n, p in model.named_parameters() if n.endswith("attention.self.query.bias"))
    bias[0] += 0.5
    assert far(our_logits(model, config), wanted) > 10 * CLOSE


@pytest.mark.parametrize("name", ["t5", "t5 by tanh"])
def test_a_head_of_its_own(tmp_path: Path, name: str) -> None:
    """As FlanT5 has. Where there is none, and transformers says that it is the words, so it is."""
    theirs = untied(their_generator(WHOLE[name]))
    theirs.save_pretrained(tmp_path)
    assert "language_model.lm_head.weight" in load_file(tmp_path / "model.safetensors")
    model, report = load_generator(WHOLE[name], tmp_path)
    assert far(our_logits(model, WHOLE[name]), their_logits(theirs, WHOLE[name])) < CLOSE
    assert report.notes == ()
    tied = their_generator(WHOLE[name])
    tied.save_pretrained(tmp_path)
    assert load_generator(WHOLE[name], tmp_path)[1].notes == ("the language model's head is its word embeddings",)
    (tmp_path / "config.json").unlink()
    assert "language_model.lm_head.weight is missing" in refusal(WHOLE[name], tmp_path)


def test_activation_is_compared(tmp_path: Path) -> None:
    their_generator(WHOLE["t5"]).save_pretrained(tmp_path)
    assert "dense_act_fn is 'gelu', expected 'gelu_new'" in refusal(WHOLE["t5 by tanh"], tmp_path)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path: Path, half: torch.dtype) -> None:
    """What is in half precision computes in float32, as the same model there does when it is widened."""
    config = WHOLE["opt"]
    theirs = their_generator(config).to(half)
    theirs.save_pretrained(tmp_path)
    model, _ = load_generator(config, tmp_path)
    assert isinstance(model, Blip2Llm)
    assert {p.dtype for p in model.llm_model.parameters()} == {half}
    assert {p.dtype for n, p in model.named_parameters() if not n.startswith("llm_model.")} == {torch.float32}
    assert far(our_logits(model, config), their_logits(theirs.float(), config)) < CLOSE


def test_words_that_transformers_added(tmp_path: Path) -> None:
    """Published folders have rows for a picture's placeholder, rounded up to a multiple of 64."""
    llm = dataclasses.replace(TINY_OPT, vocab=60)
    theirs = their_generator(tiny_llm(dataclasses.replace(llm, vocab=64)))
    theirs.save_pretrained(tmp_path)
    model, report = load_generator(tiny_llm(llm), tmp_path)
    assert report.notes == ("the last 4 rows of model.decoder.embed_tokens.weight, which are of no word, are left out",)
    want = theirs.state_dict()["language_model.model.decoder.embed_tokens.weight"]
    assert torch.equal(model.state_dict()["llm_model.model.decoder.embed_tokens.weight"], want[:60])
    other = tiny_llm(dataclasses.replace(TINY_OPT, vocab=61))
    their_generator(other).save_pretrained(tmp_path)
    assert "llm.vocab: the checkpoint has 61, the configuration has 60" in refusal(tiny_llm(llm), tmp_path)


# A language model alone


def second_stage(tmp_path: Path, config: Blip2LlmConfig) -> tuple[Path, State]:
    """A checkpoint that lacks the language model."""
    state = stage2_state(config, std=0.2)
    torch.save({"model": state}, tmp_path / "m.pth")
    return tmp_path / "m.pth", state


def load(tmp_path: Path, llm: LlmConfig) -> tuple[Generator, LoadReport]:
    """With the folder `llm`."""
    return load_generator(tiny_llm(llm), second_stage(tmp_path, tiny_llm(llm))[0], None, tmp_path / "llm")


def refused(tmp_path: Path, llm: LlmConfig) -> str:
    found = refusal(tiny_llm(llm), second_stage(tmp_path, tiny_llm(llm))[0], None, tmp_path / "llm")
    assert str(tmp_path / "llm") in found
    return found


@pytest.mark.parametrize("form", ["one file", "shards", "bin"])
@pytest.mark.parametrize("llm", [TINY_OPT, TINY_OPT_350M, TINY_LLAMA, TINY_T5], ids=["opt", "opt-350m", "llama", "t5"])
def test_folders_of_transformers(tmp_path: Path, llm: LlmConfig, form: str) -> None:
    kinds: dict[str, Any] = {
        "opt": transformers.OPTForCausalLM,
        "llama": transformers.LlamaForCausalLM,
        "t5": transformers.T5ForConditionalGeneration,
    }
    theirs = kinds[llm.family](their_llm_config(llm))
    fill(theirs, 0, 0.2)
    folder = tmp_path / "llm"
    theirs.save_pretrained(folder, max_shard_size="50KB" if form == "shards" else "1GB")
    if form == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    model, report = load(tmp_path, llm)
    assert isinstance(model, Blip2Llm)
    want = theirs.state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in model.llm_model.state_dict().items())
    assert report.unexpected == ()
    assert report.llm is not None
    copies = {"opt": 1, "llama": 0, "t5": 2}[llm.family] if form == "bin" else 0
    assert report.ignored.get("tied copies", 0) == copies


def test_older_names_of_opt(tmp_path: Path) -> None:
    state = {name.removeprefix("model."): t for name, t in llm_state(TINY_OPT).items() if name != "lm_head.weight"}
    state["decoder.version"] = torch.zeros(1)
    write_llm(tmp_path / "llm", TINY_OPT, state)
    model, report = load(tmp_path, TINY_OPT)
    assert torch.equal(model.state_dict()["llm_model.model.decoder.layers.1.fc2.bias"], state["decoder.layers.1.fc2.bias"])
    assert report.ignored["version numbers"] == 1
    del state["decoder.layers.1.fc2.bias"]
    save_file(state, tmp_path / "llm" / "model.safetensors")
    assert "does not fit the model: decoder.layers.1.fc2.bias is missing" in refused(tmp_path, TINY_OPT)


def test_vicuna_gets_a_row_for_its_padding(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.float16):
        folder = tmp_path / str(dtype)
        folder.mkdir()
        state = llm_state(VICUNA_LLM, std=0.2, dtype=dtype)
        write_llm(folder / "llm", VICUNA_LLM, state)
        model, report = load(folder, VICUNA_LLM)
        assert any("[PAD] has no row in model.embed_tokens.weight and lm_head.weight" in note for note in report.notes)
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            table = model.state_dict()[f"llm_model.{name}"]
            assert len(table) == len(state[name]) + 1
            assert torch.equal(table[:-1], state[name])
            assert torch.allclose(table[-1].float(), state[name].float().mean(dim=0), atol=1e-4)
            # As a word to say it is never the likeliest.
            states = torch.randn(50, VICUNA_LLM.width, generator=torch.Generator().manual_seed(0))
            assert int((states @ table.float().t()).argmax(dim=1).max()) < VICUNA_LLM.vocab - 1
    # One that has the row already keeps it; LLaMA gets none.
    whole = llm_state(TINY_LLAMA)
    write_llm(tmp_path / "llm", VICUNA_LLM, whole)
    assert load(tmp_path, VICUNA_LLM)[1].notes == ()
    save_file({n: t[:-1].clone() if len(t) == 71 else t for n, t in whole.items()}, tmp_path / "llm" / "model.safetensors")
    assert "llm.vocab: the checkpoint has 70, the configuration has 71" in refused(tmp_path, TINY_LLAMA)


def test_baichuan_is_taken_apart(tmp_path: Path) -> None:
    state = llm_state(BAICHUAN_LLM, std=0.2)
    write_llm(tmp_path / "llm", BAICHUAN_LLM, state)
    model, _ = load(tmp_path, BAICHUAN_LLM)
    packed = state["model.layers.1.self_attn.W_pack.weight"]
    for n, part in enumerate("qkv"):
        found = model.state_dict()[f"llm_model.model.layers.1.self_attn.{part}_proj.weight"]
        assert torch.equal(found, packed[n * 56 : (n + 1) * 56])
    for bad, said in (
        (packed[:-1], "W_pack.weight is (167, 56), expected three equal parts"),
        (packed[:, :-1], "model.layers.1.self_attn.W_pack.weight is (56, 55), expected (56, 56)"),
        (packed * float("nan"), "NaN or infinity in model.layers.1.self_attn.W_pack.weight"),
    ):
        name = "model.layers.1.self_attn.W_pack.weight"
        save_file({**state, name: bad.contiguous()}, tmp_path / "llm" / "model.safetensors")
        assert said in refused(tmp_path, BAICHUAN_LLM)
    both = {**state, "model.layers.1.self_attn.q_proj.weight": packed[:56].clone()}
    save_file(both, tmp_path / "llm" / "model.safetensors")
    assert "model.layers.1.self_attn.q_proj.weight twice, once within" in refused(tmp_path, BAICHUAN_LLM)


def test_what_is_left_of_t5(tmp_path: Path) -> None:
    state = llm_state(TINY_T5)
    state["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.zeros(8, 6)
    (tmp_path / "llm").mkdir()
    torch.save(state, tmp_path / "llm" / "pytorch_model.bin")
    _, report = load(tmp_path, TINY_T5)
    assert report.ignored == {"tied copies": 2, "biases that T5 does not use": 1}
    assert "has no config.json: what no tensor shows" in report.notes[0]
    state["encoder.embed_tokens.weight"] = state["shared.weight"] + 1.0
    torch.save(state, tmp_path / "llm" / "pytorch_model.bin")
    assert "encoder.embed_tokens.weight differs from shared.weight" in refused(tmp_path, TINY_T5)


def test_an_untied_head_of_opt(tmp_path: Path) -> None:
    write_llm(tmp_path / "llm", TINY_OPT, llm_state(TINY_OPT) | {"lm_head.weight": torch.ones(70, 56)})
    assert "lm_head.weight differs from model.decoder.embed_tokens.weight" in refused(tmp_path, TINY_OPT)


# What config.json says


@pytest.mark.parametrize(
    ("llm", "key", "value", "said"),
    [
        (TINY_OPT, "num_attention_heads", 8, "num_attention_heads is 8, expected 7"),
        (TINY_OPT, "num_attention_heads", True, "num_attention_heads is True, expected 7"),
        (TINY_OPT, "do_layer_norm_before", False, "do_layer_norm_before is False, expected True"),
        (TINY_OPT_350M, "do_layer_norm_before", None, "do_layer_norm_before is True, expected False"),
        (TINY_OPT, "activation_function", "gelu", "activation_function is 'gelu', expected 'relu'"),
        (TINY_OPT, "enable_bias", False, "enable_bias is False, expected True"),
        (TINY_OPT, "_remove_final_layer_norm", True, "_remove_final_layer_norm is True"),
        (TINY_OPT, "max_position_embeddings", 2048, "max_position_embeddings is 2048, expected 80"),
        (TINY_OPT, "model_type", "gpt2", "is of a model of type 'gpt2', expected 'opt'"),
        (TINY_OPT, "model_type", ["x"] * 90, "is of a model of type ['x', 'x', 'x', 'x', 'x', 'x', 'x', 'x',..."),
        (TINY_OPT, "quantization_config", {"bits": 4}, "is of a quantised model"),
        (TINY_LLAMA, "rms_norm_eps", 1e-5, "rms_norm_eps is 1e-05, expected 1e-06"),
        (TINY_LLAMA, "rms_norm_eps", float("nan"), "rms_norm_eps is nan"),
        (TINY_LLAMA, "num_key_value_heads", 1, "num_key_value_heads is 1, expected 7"),
        (TINY_LLAMA, "head_dim", 4, "head_dim is 4, expected 8"),
        (TINY_LLAMA, "rope_theta", 500000.0, "rope_theta is 500000.0, expected 10000.0"),
        (TINY_LLAMA, "rope_scaling", {"type": "linear", "factor": 2}, "rope_type is 'linear', expected 'default'"),
        (TINY_LLAMA, "rope_scaling", "linear", "rope_type is 'linear'"),
        (TINY_LLAMA, "rope_parameters", {"rope_type": "default", "rope_theta": 5e5}, "rope_theta is 500000.0"),
        (TINY_LLAMA, "attention_bias", True, "attention_bias is True"),
        (TINY_LLAMA, "mlp_bias", True, "mlp_bias is True"),
        (TINY_LLAMA, "tie_word_embeddings", True, "tie_word_embeddings is True"),
        (TINY_LLAMA, "hidden_act", "gelu", "hidden_act is 'gelu', expected 'silu'"),
        (TINY_LLAMA, "model_type", "mistral", "is of a model of type 'mistral', expected 'llama'"),
        (BAICHUAN_LLM, "z_loss_weight", 0, "is of Baichuan2, whose head divides its rows by their length"),
        (BAICHUAN_LLM, "vocab_size", 125696, "is of Baichuan2"),
        (TINY_T5, "feed_forward_proj", "relu", "is of T5 v1.0"),
        (TINY_T5, "feed_forward_proj", "gated-silu", "feed_forward_proj is 'gated-silu', expected 'gated-gelu'"),
        (TINY_T5, "tie_word_embeddings", True, "is of a T5 that scales what reaches its head"),
        (TINY_T5, "relative_attention_max_distance", None, "relative_attention_max_distance is 128, expected 20"),
        (TINY_T5, "num_decoder_layers", 3, "num_decoder_layers is 3, expected 2"),
        (TINY_T5, "d_kv", "8", "d_kv is '8', expected 8"),
        (TINY_T5, "model_type", "umt5", "is of a model of type 'umt5'"),
    ],
)
def test_settings_of_another_model(tmp_path: Path, llm: LlmConfig, key: str, value: object, said: str) -> None:
    write_llm(tmp_path / "llm", llm, llm_state(llm))
    (tmp_path / "llm" / "config.json").write_text(json.dumps(llm_settings(llm) | {key: value}))
    assert said in refused(tmp_path, llm)


def test_baichuan_13b(tmp_path: Path) -> None:
    write_llm(tmp_path / "llm", BAICHUAN_LLM, llm_state(BAICHUAN_LLM))
    said = llm_settings(BAICHUAN_LLM)
    said["model_max_length"] = said.pop("max_position_embeddings")
    (tmp_path / "llm" / "config.json").write_text(json.dumps(said))
    assert "is of Baichuan-13B, whose attention adds numbers by distance" in refused(tmp_path, BAICHUAN_LLM)


def test_lookalikes_are_told_before_their_sizes(tmp_path: Path) -> None:
    """Baichuan2 has the sizes of Baichuan-7B and more words: other sizes would not help."""
    other = dataclasses.replace(BAICHUAN_LLM, vocab=80)
    write_llm(tmp_path / "llm", other, llm_state(other))
    (tmp_path / "llm" / "config.json").write_text(json.dumps(llm_settings(other) | {"z_loss_weight": 0}))
    assert "is of Baichuan2" in refused(tmp_path, BAICHUAN_LLM)


def test_settings_that_say_nothing(tmp_path: Path) -> None:
    write_llm(tmp_path / "llm", TINY_LLAMA, llm_state(TINY_LLAMA))
    for said in ({}, {"rope_scaling": None}, {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}):
        (tmp_path / "llm" / "config.json").write_text(json.dumps(said))
        assert load(tmp_path, TINY_LLAMA)[1].unexpected == ()


def test_settings_of_a_whole_model(tmp_path: Path) -> None:
    """The language model's part of BLIP-2's own config.json."""
    their_generator(WHOLE["opt"]).save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    said["text_config"]["num_attention_heads"] = 4
    (tmp_path / "config.json").write_text(json.dumps(said))
    assert "num_attention_heads is 4, expected 7" in refusal(WHOLE["opt"], tmp_path)


# Another language model


@pytest.mark.parametrize(
    ("llm", "held", "said"),
    [
        (TINY_OPT, TINY_T5, "llm: the checkpoint has T5, the configuration has OPT"),
        (TINY_T5, TINY_LLAMA, "llm: the checkpoint has LLaMA, the configuration has T5"),
        (TINY_LLAMA, TINY_OPT, "llm: the checkpoint has OPT, the configuration has LLaMA"),
        (TINY_OPT, dataclasses.replace(TINY_OPT, depth=3), "llm.depth: the checkpoint has 3, the configuration has 2"),
        (TINY_OPT, TINY_OPT_350M, "llm.embed: the checkpoint has 36, the configuration has 56"),
        (TINY_LLAMA, dataclasses.replace(TINY_LLAMA, ffn=80), "llm.ffn: the checkpoint has 80, the configuration has 76"),
        (TINY_T5, dataclasses.replace(TINY_T5, heads=7), "llm.heads: the checkpoint has 7, the configuration has 6"),
        (TINY_LLAMA, BAICHUAN_LLM, "is of a model of type 'baichuan', expected 'llama'"),
    ],
)
def test_folders_of_another_one(tmp_path: Path, llm: LlmConfig, held: LlmConfig, said: str) -> None:
    write_llm(tmp_path / "llm", held, llm_state(held))
    assert said in refused(tmp_path, llm)


def test_folders_of_no_language_model(tmp_path: Path) -> None:
    (tmp_path / "llm").mkdir()
    save_file({"bert.x": torch.zeros(1)}, tmp_path / "llm" / "model.safetensors")
    found = refused(tmp_path, TINY_OPT)
    assert "holds no language model of a known kind (OPT, LLaMA, Baichuan-7B, FlanT5). It holds bert" in found


def test_every_name_is_read_back() -> None:
    """Names of a folder become ours, and messages name them as the folder does."""
    for llm in (TINY_OPT, TINY_LLAMA, BAICHUAN_LLM, TINY_T5):
        state = llm_state(llm)
        kept = {n: t for n, t in state.items() if not n.endswith(("inv_freq", "lm_head.weight", "embed_tokens.weight"))}
        kept |= {n: t for n, t in state.items() if n.startswith("model.") and n.endswith("embed_tokens.weight")}
        if llm is not TINY_OPT:
            kept["lm_head.weight"] = state["lm_head.weight"]
        source = _in_order(blank(), kept, llm, None)
        assert {source.spell(name) for name in source.tensors} == kept.keys()
        if llm is TINY_T5:
            assert ours(tiny_llm(llm), {}, kept).keys() == source.tensors.keys()


def blank() -> Source:
    return Source(Path("llm"), Weights((), {}, (), True), "huggingface", {}, lambda name: name.removeprefix("llm_model."), {}, ())
