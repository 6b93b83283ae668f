"""Checkpoints of the models that write words: every layout gives the same model, mixed-up ones are told apart.

transformers' models, and language models in folders of their own: tests/test_llm_checkpoint.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from models.blip import BlipPretrain, BlipRetrieval
from models.blip2_llm import Blip2Llm
from models.captioner import BlipCaptioner
from models.checkpoint import load_generator, load_model
from models.config import Blip2LlmConfig, BlipCaptionConfig, BlipConfig, BlipVqaConfig, GenerationConfig
from models.errors import Misuse, UserError
from models.fit import Generator, generator_of
from models.llm_checkpoint import PROJECTIONS
from models.llm_config import VICUNA, LlmConfig
from models.manifest import file_record
from models.presets import preset
from tests import make_checkpoint
from tests.make_generator import (
    TRAINED,
    TRAINING,
    State,
    blip_state,
    llm_state,
    ours,
    stage2_state,
    whole,
    without_encoder,
    write_llm,
)
from tests.tiny import (
    TINY,
    TINY2,
    TINY_CAPTION,
    TINY_LLAMA,
    TINY_OPT,
    TINY_OPT_350M,
    TINY_T5,
    TINY_VQA,
    demo_blip,
    fill,
    tiny_llm,
)

BLIPS: dict[str, BlipCaptionConfig | BlipVqaConfig] = {"captions": TINY_CAPTION, "answers": TINY_VQA}
LLMS: dict[str, LlmConfig] = {
    "opt": TINY_OPT,
    "opt-350m": TINY_OPT_350M,
    "llama": TINY_LLAMA,
    "t5": TINY_T5,
}
WORDS = "text_decoder.bert.embeddings.word_embeddings.weight"
HEAD = "text_decoder.cls.predictions.decoder."


def saved(path: Path, state: State) -> Path:
    torch.save({"model": state, **TRAINING}, path)
    return path


def refusal(
    config: GenerationConfig, path: Path, vit: Path | None = None, llm: Path | None = None, kind: type[UserError] = UserError
) -> str:
    """What the user reads when a checkpoint is refused."""
    with pytest.raises(kind) as caught:
        load_generator(config, path, vit, llm)
    assert type(caught.value) is kind
    assert caught.value.message.endswith(".")
    assert "\n" not in caught.value.message
    return caught.value.message


def assert_equal(found: Generator, want: State) -> None:
    """Every tensor of the model, in float32 but for the language model, which is as it was stored."""
    assert not found.training
    for name, tensor in found.state_dict().items():
        kept = name.startswith("llm_model.") and want[name].dtype in (torch.float16, torch.bfloat16)
        assert tensor.dtype == (want[name].dtype if kept else torch.float32), name
        assert torch.equal(tensor, want[name].to(tensor.dtype)), name
    assert not any(p.requires_grad for p in found.parameters())


# BLIP


@pytest.mark.parametrize("name", BLIPS)
def test_original(tmp_path: Path, name: str) -> None:
    state = blip_state(BLIPS[name], std=0.2)
    path = saved(tmp_path / "m.pth", state)
    model, report = load_generator(BLIPS[name], path)
    assert_equal(model, state)
    ids = 1 if name == "captions" else 2
    assert report.ignored == {"position ids": ids, "records of the training run": 4, "tied copies": 2}
    assert report.lines() == [
        f"checkpoint {path} (original layout, sha256 {report.sha256[:12]})",
        f"ignored: {ids} position ids, 4 records of the training run, 2 tied copies",
    ]
    assert report.sha256 == file_record(path)["sha256"]
    assert (report.unexpected, report.temperature, report.vit, report.llm) == ((), None, None, None)


@pytest.mark.parametrize("name", BLIPS)
def test_our_safetensors(tmp_path: Path, name: str) -> None:
    state = {n: t for n, t in blip_state(BLIPS[name], std=0.2).items() if not n.startswith(HEAD) and "position_ids" not in n}
    save_file(state, tmp_path / "m.safetensors")
    model, report = load_generator(BLIPS[name], tmp_path / "m.safetensors")
    assert_equal(model, state)
    assert (report.layout, report.ignored, report.unexpected) == ("ours", {}, ())


def pretrained() -> State:
    """What BLIP's pretraining saves: encoder and decoder complete, heads, momentum copies, queues."""
    model = BlipPretrain(TINY)
    fill(model, 0, 0.2)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return state | {
        f"{HEAD}weight": state[WORDS],
        f"{HEAD}bias": state["text_decoder.cls.predictions.bias"],
        "text_decoder_m.cls.predictions.bias": torch.zeros(60),
        "image_queue": torch.zeros(20, 4),
        "queue_ptr": torch.zeros(1),
    }


def test_file_of_the_pretraining(tmp_path: Path) -> None:
    """It describes pictures too; its positions are for smaller ones."""
    config = BlipCaptionConfig(dataclasses.replace(TINY.vision, image_size=48), TINY.text)
    state = pretrained()
    model, report = load_generator(config, saved(tmp_path / "m.pth", state))
    state["visual_encoder.pos_embed"] = model.visual_encoder.pos_embed  # type: ignore[assignment]
    assert_equal(model, state)
    assert report.interpolated == (32, 48)
    assert report.unexpected == ()
    assert report.ignored["text encoder"] == 56
    assert report.ignored["heads of retrieval"] == 7
    assert report.ignored["momentum copies"] == 1


def test_the_demo_describes_pictures() -> None:
    """Our training keeps what encoder and decoder share under the encoder's name."""
    path = Path(__file__).parent.parent / "demo" / "weights.safetensors"
    model, report = load_generator(preset("blip-caption-demo"), path)  # type: ignore[arg-type]
    want = demo_blip().state_dict()
    assert_equal(model, want)
    assert "the decoder shares all but its self-attention" in report.lines()[1]
    assert report.ignored == {"heads of retrieval": 7, "text encoder": 30}  # what is left of it: its self-attention
    assert report.unexpected == ()


def test_shared_tensors_are_looked_for_in_our_layout_alone(tmp_path: Path) -> None:
    state = pretrained()
    del state["text_decoder.bert.embeddings.LayerNorm.bias"]
    config = BlipCaptionConfig(TINY.vision, TINY.text)
    found = refusal(config, saved(tmp_path / "m.pth", state))
    assert "text_decoder.bert.embeddings.LayerNorm.bias is missing" in found


def test_shared_tensors_are_spelt_as_in_the_file(tmp_path: Path) -> None:
    state = {n: t for n, t in pretrained().items() if "crossattention" not in n or n.startswith("text_encoder")}
    del state[WORDS], state[f"{HEAD}weight"]
    state["text_encoder.embeddings.word_embeddings.weight"][3] = float("nan")
    save_file({n: t.clone() for n, t in state.items()}, tmp_path / "m.safetensors")
    found = refusal(BlipCaptionConfig(TINY.vision, TINY.text), tmp_path / "m.safetensors")
    assert "holds NaN or infinity in text_encoder.embeddings.word_embeddings.weight." in found


@pytest.mark.parametrize("name", BLIPS)
@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_copies_that_are_none(tmp_path: Path, name: str, leaf: str) -> None:
    state = blip_state(BLIPS[name])
    state[HEAD + leaf] = state[HEAD + leaf] + 1.0
    found = refusal(BLIPS[name], saved(tmp_path / "m.pth", state))
    assert f"{HEAD}{leaf} differs from text_decoder." in found
    state[HEAD + leaf] = state[HEAD + leaf].double()
    assert "differs from" in refusal(BLIPS[name], saved(tmp_path / "m.pth", state))


# BLIP-2's second stage


def parts(tmp_path: Path, config: Blip2LlmConfig, dtype: torch.dtype = torch.float32) -> tuple[State, State, Path, Path]:
    """The state without the language model, the language model, and the files of image encoder and language model."""
    state, llm = stage2_state(config, std=0.2), llm_state(config.llm, std=0.2, dtype=dtype)
    encoder = {name.removeprefix("visual_encoder."): t for name, t in state.items() if name.startswith("visual_encoder.")}
    torch.save(encoder, tmp_path / "vit.pth")
    return state, llm, tmp_path / "vit.pth", write_llm(tmp_path / "llm", config.llm, llm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", LLMS)
def test_three_files(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """As LAVIS publishes it: what was trained, and two that were not."""
    config = tiny_llm(LLMS[name])
    state, llm, vit, folder = parts(tmp_path, config, dtype)
    path = saved(tmp_path / "m.pth", without_encoder(state))
    model, report = load_generator(config, path, vit, folder)
    assert_equal(model, ours(config, state, llm))
    assert report.layout == "lavis"
    assert report.unexpected == ()
    assert report.vit == (vit, file_record(vit)["sha256"])
    assert report.llm == (folder, file_record(folder / "model.safetensors")["sha256"])
    assert f"language model {folder} (sha256 {report.llm[1][:12]})" in report.lines()
    kept = [note for note in report.notes if "stay as they are stored" in note]
    said = f"the language model's numbers stay as they are stored, in {dtype}".replace("torch.", "")
    assert kept == ([] if dtype == torch.float32 else [said])


@pytest.mark.parametrize("layout", ["lavis", "ours", "half"])
@pytest.mark.parametrize("name", LLMS)
def test_one_file(tmp_path: Path, name: str, layout: str) -> None:
    """A finetune of everything, in LAVIS's layout and ours; and as converted to float16 throughout."""
    config = tiny_llm(LLMS[name])
    state, llm = stage2_state(config, std=0.2), llm_state(config.llm, std=0.2)
    if layout == "half":
        state, llm = ({name: tensor.half() for name, tensor in held.items()} for held in (state, llm))
    path = tmp_path / ("m.safetensors" if layout == "ours" else "m.pth")
    if layout == "ours":
        save_file({name: tensor.clone() for name, tensor in ours(config, state, llm).items()}, path)
    else:
        saved(path, whole(config, state, llm))
    model, report = load_generator(config, path)
    assert_equal(model, ours(config, state, llm))
    assert report.layout == ("ours" if layout == "ours" else "lavis")
    assert (report.unexpected, report.vit, report.llm) == ((), None, None)


def test_what_lavis_saves_by_mistake(tmp_path: Path) -> None:
    """Its filter knows parameters: what repeats one, and buffers, pass."""
    for llm, leaks in (
        (TINY_OPT, {"opt_model.lm_head.weight": torch.zeros(70, 56)}),
        (TINY_T5, {f"t5_model.{part}coder.embed_tokens.weight": torch.zeros(72, 56) for part in ("en", "de")}),
        (TINY_LLAMA, {f"llm_model.model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.zeros(4) for n in range(2)}),
    ):
        config = tiny_llm(llm)
        (tmp_path / llm.family).mkdir()
        state, held, vit, folder = parts(tmp_path / llm.family, config)
        more = {"llm_proj.note": torch.zeros(1)}
        path = saved(tmp_path / f"{llm.family}.pth", without_encoder(state) | leaks | more)
        model, report = load_generator(config, path, vit, folder)
        assert_equal(model, ours(config, state, held))
        assert sum(n for what, n in report.ignored.items() if "tied copies of the" in what or "wavelengths" in what) >= len(leaks)
        # Under the name that the file has for the projection's part.
        assert report.unexpected == (f"{PROJECTIONS[type(llm)]}.note",)


@pytest.mark.parametrize("pixels", [16, 48])
def test_positions_are_interpolated(tmp_path: Path, pixels: int) -> None:
    config = tiny_llm(TINY_OPT)
    state, _, vit, folder = parts(tmp_path, config)
    path = saved(tmp_path / "m.pth", without_encoder(state))
    other = dataclasses.replace(config, vision=dataclasses.replace(config.vision, image_size=pixels))
    assert load_generator(other, path, vit, folder)[1].interpolated == (32, pixels)


def test_two_of_one_kind(tmp_path: Path) -> None:
    config = tiny_llm(TINY_OPT)
    state, llm, vit, folder = parts(tmp_path, config)
    complete, without = saved(tmp_path / "all.pth", whole(config, state, llm)), saved(tmp_path / "m.pth", without_encoder(state))
    assert "already holds an image encoder. Leave --vit-checkpoint out" in refusal(config, complete, vit, kind=Misuse)
    assert "already holds a language model. Leave --llm-checkpoint out" in refusal(config, complete, None, folder, Misuse)
    assert "holds no image encoder" in refusal(config, without, None, folder)
    found = refusal(config, without, vit)
    assert "holds no language model" in found
    assert "Add --llm-checkpoint with the Hugging Face folder of OPT, such as facebook/opt-2.7b" in found
    blip = saved(tmp_path / "blip.pth", blip_state(TINY_CAPTION))
    assert "--llm-checkpoint is for BLIP-2" in refusal(TINY_CAPTION, blip, None, folder, Misuse)
    assert "--vit-checkpoint is for BLIP-2" in refusal(TINY_CAPTION, blip, vit, None, Misuse)


# Of another model


def retrieval() -> State:
    model = BlipRetrieval(TINY)
    return model.state_dict()


def stage1() -> State:
    return make_checkpoint.stage1_state(TINY2)


def instruct() -> State:
    """InstructBLIP: the Q-Former of the second stage keeps its words."""
    words = {name: tensor for name, tensor in stage1().items() if name.startswith("Qformer.bert")}
    return stage2_state(tiny_llm(dataclasses.replace(TINY_LLAMA, family=VICUNA))) | words


@pytest.mark.parametrize(
    ("config", "state", "said"),
    [
        (TINY_CAPTION, retrieval, "is not a checkpoint of BLIP for captions: it has no text_decoder. It holds visual"),
        (TINY_VQA, retrieval, "is not a checkpoint of BLIP for answers: it has no text_decoder"),
        (TINY_VQA, lambda: blip_state(TINY_CAPTION), "it has no text_encoder. It holds visual_encoder, text_decoder"),
        (TINY_CAPTION, lambda: blip_state(TINY_VQA), "is a checkpoint of BLIP for answers: its decoder looks at questions"),
        (TINY_VQA, pretrained, "is a checkpoint of BLIP's pretraining: its decoder looks at pictures"),
        (TINY_CAPTION, stage1, "it has no text_decoder. It holds query_tokens"),
        (TINY_CAPTION, lambda: stage2_state(tiny_llm(TINY_OPT)), "it has no text_decoder"),
        (tiny_llm(TINY_OPT), stage1, "has no opt_proj, the projection into the language model: it is a checkpoint of"),
        (tiny_llm(TINY_T5), stage1, "has no t5_proj"),
        (tiny_llm(TINY_LLAMA), stage1, "has no llm_proj"),
        (tiny_llm(TINY_LLAMA), instruct, "is a checkpoint of InstructBLIP, whose Q-Former reads the prompt"),
        (tiny_llm(TINY_OPT), retrieval, "is not a checkpoint of BLIP-2's second stage: it has no query_tokens, ln_vision, Qf"),
        (tiny_llm(TINY_OPT), lambda: blip_state(TINY_CAPTION), "it has no query_tokens"),
        (tiny_llm(TINY_OPT), dict, "It holds nothing"),
    ],
    ids=lambda value: "" if callable(value) or isinstance(value, str) else type(value).__name__,
)
def test_checkpoints_of_other_models(tmp_path: Path, config: GenerationConfig, state: Callable[[], State], said: str) -> None:
    path = tmp_path / "m.pth"
    torch.save(state(), path)
    found = refusal(config, path)
    assert str(path) in found
    assert said in found


def test_mindformers_second_stage(tmp_path: Path) -> None:
    torch.save({"qformer.bert.x": torch.zeros(1), "llama_proj.weight": torch.zeros(1)}, tmp_path / "m.ckpt")
    assert "is a checkpoint of mindformers, of which only the first stage" in refusal(tiny_llm(TINY_LLAMA), tmp_path / "m.ckpt")


def test_retrieval_refuses_them(tmp_path: Path) -> None:
    for state in (blip_state(TINY_CAPTION), blip_state(TINY_VQA)):
        with pytest.raises(UserError, match="is not a checkpoint of BLIP for retrieval"):
            load_model(TINY, saved(tmp_path / "m.pth", state))
    with pytest.raises(UserError, match="is a stage-2 checkpoint, which has no text branch"):
        load_model(TINY2, saved(tmp_path / "m.pth", stage2_state(tiny_llm(TINY_OPT))))
    with pytest.raises(Misuse, match="is of a model that writes words"):
        load_model(TINY_CAPTION, tmp_path / "m.pth")


# Sizes


@pytest.mark.parametrize(
    ("given", "held", "said"),
    [
        ("blip-caption-base", "blip-caption-large", "vision.width: the checkpoint has 1024, blip-caption-base has 768"),
        ("blip-vqa-base", "blip-vqa-large", "vision.depth: the checkpoint has 24, blip-vqa-base has 12"),
        ("blip2-opt-2.7b", "blip2-opt-6.7b", "llm.embed: the checkpoint has 4096, blip2-opt-2.7b has 2560"),
        ("blip2-opt-2.7b-coco", "blip2-opt-6.7b-coco", "llm.ffn: the checkpoint has 16384, blip2-opt-2.7b-coco has 10240"),
        ("blip2-flan-t5-xl", "blip2-flan-t5-xxl", "llm.width: the checkpoint has 4096, blip2-flan-t5-xl has 2048"),
        ("blip2-opt-2.7b", "blip2-flan-t5-xl", "llm: the checkpoint has T5, blip2-opt-2.7b has OPT"),
        ("blip2-opt-1.3b", "blip2-flan-t5-xl", "llm: the checkpoint has T5, blip2-opt-1.3b has OPT"),  # equally wide
        ("blip2-flan-t5-xl", "blip2-flan-t5-xl-vit-l", "vision.kind: the checkpoint has clip, blip2-flan-t5-xl has eva"),
        ("blip2-llama-7b", "blip2-baichuan-7b", "llm.vocab: the checkpoint has 64000, blip2-llama-7b has 32000"),
    ],
)
def test_the_preset_that_fits_is_named(tmp_path: Path, given: str, held: str, said: str) -> None:
    wanted, config = preset(given), preset(held)
    assert not isinstance(config, BlipConfig)
    with torch.device("meta"):
        state = generator_of(config).state_dict()  # type: ignore[arg-type]
    if isinstance(config, Blip2LlmConfig):
        other = PROJECTIONS[type(config.llm)].removesuffix("proj")
        state = {name.replace("llm_", other, 1) if name.startswith("llm_") else name: tensor for name, tensor in state.items()}
    # One zero stretched to each shape: the file has the sizes of the large model and only some kilobytes.
    stretched = {name: torch.zeros(()).expand(t.shape) for name, t in state.items()}
    torch.save(stretched, tmp_path / "m.pth")
    found = refusal(wanted, tmp_path / "m.pth")  # type: ignore[arg-type]
    assert said in found
    assert found.endswith(f"Try --model {held}.")


def test_the_projection_alone_tells_the_language_model(tmp_path: Path) -> None:
    """As LAVIS publishes it, without the language model: by its name and its width."""
    state = {"query_tokens": torch.zeros(1, 32, 768), "ln_vision.weight": torch.zeros(1408), "Qformer.bert.x": torch.zeros(1)}
    folder = write_llm(tmp_path / "llm", TINY_OPT, llm_state(TINY_OPT))
    for proj, width, said, fits in (
        ("opt_proj", 4096, "llm.embed: the checkpoint has 4096, blip2-opt-2.7b has 2560", "blip2-opt-6.7b"),
        ("t5_proj", 2048, "llm: the checkpoint has T5, blip2-opt-2.7b has OPT", "blip2-flan-t5-xl"),
    ):
        torch.save(state | {f"{proj}.weight": torch.zeros(()).expand(width, 768)}, tmp_path / "m.pth")
        vit = {"cls_token": torch.zeros(1, 1, 1408)}
        torch.save(vit, tmp_path / "vit.pth")
        found = refusal(preset("blip2-opt-2.7b"), tmp_path / "m.pth", tmp_path / "vit.pth", folder)  # type: ignore[arg-type]
        assert said in found
        assert f"Try --model {fits}" in found


@pytest.mark.parametrize("name", ["captions", "answers", "opt"])
def test_every_tensor_counts(tmp_path: Path, name: str) -> None:
    """One that is missing, misshapen or no number is named, whichever it is."""
    if name in BLIPS:
        config: GenerationConfig = BLIPS[name]
        state = blip_state(BLIPS[name])
    else:
        config = tiny_llm(TINY_OPT)
        state = whole(config, stage2_state(config), llm_state(TINY_OPT))
    optional = {n for n in state if n.endswith((".position_ids", "lm_head.weight")) or n.startswith(HEAD)}
    random = torch.Generator().manual_seed(0)
    names = sorted(state.keys() - optional)
    for n in torch.randperm(len(names), generator=random)[:5].tolist():
        spoilt = dict(state)
        tensor = spoilt.pop(names[n])
        if names[n] not in (WORDS, "text_decoder.cls.predictions.bias", "opt_model.model.decoder.embed_tokens.weight"):
            assert names[n] in refusal(config, saved(tmp_path / "m.pth", spoilt)), "missing"
        for bad in (torch.full_like(tensor, float("nan")), tensor[..., None], tensor.to(torch.int64)):
            copies = {c: bad for c in optional if state[c] is tensor}
            assert names[n] in refusal(config, saved(tmp_path / "m.pth", spoilt | {names[n]: bad} | copies))


# The generator of checkpoints


@pytest.mark.parametrize("half", [False, True])
def test_make_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half: bool) -> None:
    config = tiny_llm(TINY_OPT)
    monkeypatch.setattr(make_checkpoint, "preset", lambda name: config)
    out = tmp_path / "m.pth"
    result = CliRunner().invoke(make_checkpoint.main, ["--out", str(out), *(["--half"] if half else [])])
    assert result.exit_code == 0, result.output
    model, _ = load_generator(config, out, tmp_path / "m_vit.pth", tmp_path / "m_llm")
    assert isinstance(model, Blip2Llm)
    assert {p.dtype for p in model.llm_model.parameters()} == {torch.float16 if half else torch.float32}
    held = torch.load(out, weights_only=True)["model"]
    assert all(name.replace("opt_proj", "llm_proj").startswith(TRAINED) for name in held)


def test_make_checkpoint_of_blip(tmp_path: Path) -> None:
    out = tmp_path / "m.pth"
    result = CliRunner().invoke(make_checkpoint.main, ["--model", "blip-caption-demo", "--out", str(out)])
    assert result.exit_code == 0, result.output
    model, _ = load_generator(preset("blip-caption-demo"), out)  # type: ignore[arg-type]
    assert isinstance(model, BlipCaptioner)
    result = CliRunner().invoke(make_checkpoint.main, ["--model", "blip-caption-demo", "--half", "--out", str(out)])
    assert result.exit_code == 2
