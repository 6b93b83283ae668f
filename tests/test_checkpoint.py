"""Every layout a checkpoint comes in gives the same model, and every way it can be wrong gives one sentence."""

from __future__ import annotations

import dataclasses
import operator
import pickle
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor

from models.blip import BlipPretrain, BlipRetrieval
from models.checkpoint import load_model
from models.config import BlipConfig
from models.errors import UserError
from models.huggingface import huggingface_config, to_huggingface, to_our_name, to_their_name
from models.manifest import file_record
from models.presets import preset
from tests.make_checkpoint import checkpoint, main
from tests.tiny import TINY, random_model

WORDS = "text_encoder.embeddings.word_embeddings.weight"


def original(path: Path, model: BlipRetrieval, change: Callable[[dict[str, Any]], object] = lambda state: None) -> Path:
    """The .pth of `model` after `change` was made to its state."""
    content = checkpoint(model, queue=64)
    change(content["model"])
    torch.save(content, path)
    return path


def refusal(path: Path, config: BlipConfig = TINY) -> str:
    """What the user reads when `path` is refused."""
    with pytest.raises(UserError) as caught:
        load_model(config, path)
    assert caught.value.exit_code == 1
    assert str(path) in caught.value.message
    assert caught.value.message.endswith(".")
    assert "\n" not in caught.value.message
    return caught.value.message


def assert_equal(found: torch.nn.Module, want: torch.nn.Module) -> None:
    state, expected = found.state_dict(), want.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert not found.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in found.parameters())


# Layouts


def test_original(tmp_path: Path, tiny_model: BlipRetrieval) -> None:
    path = original(tmp_path / "model.pth", tiny_model)
    model, report = load_model(TINY, path)
    assert_equal(model, tiny_model)
    assert (report.path, report.layout, report.unexpected, report.interpolated) == (path, "original", (), None)
    assert report.sha256 == file_record(path)["sha256"]
    assert report.ignored == {
        "position ids": 1,
        "momentum copies": len(tiny_model.state_dict()) - 2 + 1,  # no itm_head_m, but text_encoder_m has position ids
        "training queues": 4,
        "records of the training run": 3,
    }
    assert report.lines() == [
        f"checkpoint {path} (original layout, sha256 {report.sha256[:12]})",
        "temperature 0.07",
        "ignored: 1 position ids, 103 momentum copies, 4 training queues, 3 records of the training run",
    ]
    assert report.temperature == pytest.approx(0.07)


def test_file_of_the_pretraining(tmp_path: Path) -> None:
    model = BlipPretrain(TINY)
    state = model.state_dict() | {"queue_ptr": torch.zeros(1)}
    words = model.text_encoder.embeddings.word_embeddings.weight
    state |= {"text_decoder.cls.predictions.decoder.weight": words.data}
    torch.save({"model": state}, tmp_path / "model.pth")
    loaded, report = load_model(TINY, tmp_path / "model.pth")
    assert torch.equal(loaded.text_encoder.embeddings.word_embeddings.weight, words)
    assert report.unexpected == ()


@pytest.mark.parametrize("mapped", [True, False], ids=["zip", "before PyTorch 1.6"])
def test_bare_state(tmp_path: Path, tiny_model: BlipRetrieval, mapped: bool) -> None:
    torch.save(tiny_model.state_dict(), tmp_path / "model.pth", _use_new_zipfile_serialization=mapped)
    model, report = load_model(TINY, tmp_path / "model.pth")
    assert_equal(model, tiny_model)
    assert report.layout == "original"
    assert len(report.lines()) == 1


def test_our_safetensors(tmp_path: Path) -> None:
    """Training saves tied tensors once, and the decoder with them."""
    trained = BlipPretrain(TINY).eval()
    save_file({name: p.data for name, p in trained.named_parameters()}, tmp_path / "weights.safetensors")
    model, report = load_model(TINY, tmp_path / "weights.safetensors")
    want = BlipRetrieval(TINY)
    want.load_state_dict({name: trained.state_dict()[name] for name in want.state_dict()})
    assert_equal(model, want.eval())
    assert report.layout == "ours"
    assert report.ignored == {"text decoder": 10 * TINY.text.depth + 5}
    assert report.unexpected == ()


@pytest.mark.parametrize("form", ["folder", "shards", "file", "renamed", "bin"])
def test_huggingface(tmp_path: Path, tiny_model: BlipRetrieval, form: str) -> None:
    import transformers

    theirs = transformers.BlipForImageTextRetrieval(transformers.BlipConfig(**huggingface_config(TINY)))
    theirs.load_state_dict(to_huggingface(tiny_model.state_dict(), TINY))
    theirs.save_pretrained(tmp_path, max_shard_size="100KB" if form == "shards" else "1GB")
    single = tmp_path / "model.safetensors"
    path = {"file": single, "renamed": tmp_path / "weights.pth"}.get(form, tmp_path)
    if form == "shards":
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
    elif form == "renamed":
        single.rename(path)
    elif form == "bin":
        single.unlink()
        torch.save(
            theirs.state_dict() | {"text_encoder.embeddings.position_ids": torch.arange(3)}, tmp_path / "pytorch_model.bin"
        )
    model, report = load_model(TINY, path)
    assert_equal(model, tiny_model)
    assert (report.layout, report.unexpected) == ("huggingface", ())
    assert report.ignored == ({"position ids": 1} if form == "bin" else {})
    assert len(report.sha256) == 64


def test_huggingface_names_go_both_ways(tiny_model: BlipRetrieval) -> None:
    names = list(tiny_model.state_dict())
    assert [to_our_name(to_their_name(name)) for name in names] == names
    assert to_our_name("vision_model.encoder.layers.0.{0}.weight") == "vision_model.encoder.layers.0.{0}.weight"


def test_to_huggingface_leaves_the_decoder_out(tiny_model: BlipRetrieval) -> None:
    assert to_huggingface(BlipPretrain(TINY).state_dict(), TINY).keys() == to_huggingface(tiny_model.state_dict(), TINY).keys()


def test_huggingface_config_overrides_the_defaults_that_are_not_blips() -> None:
    found = huggingface_config(preset("blip-retrieval-large-coco"))
    assert (found["text_config"]["num_attention_heads"], found["text_config"]["layer_norm_eps"]) == (12, 1e-12)
    assert (found["vision_config"]["num_attention_heads"], found["vision_config"]["layer_norm_eps"]) == (16, 1e-6)
    assert found["text_config"]["encoder_hidden_size"] == 1024


# What is done to the tensors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(tmp_path: Path, tiny_model: BlipRetrieval, dtype: torch.dtype) -> None:
    torch.save({name: t.to(dtype) for name, t in tiny_model.state_dict().items()}, tmp_path / "model.pth")
    model, _ = load_model(TINY, tmp_path / "model.pth")
    assert_equal(model, tiny_model.to(dtype).to(torch.float32))


@pytest.mark.parametrize("pixels", [48, 24])
def test_positions_are_interpolated(tmp_path: Path, tiny_model: BlipRetrieval, pixels: int) -> None:
    """transformers interpolates too, when it is asked to, as its picture comes in."""
    import transformers

    config = dataclasses.replace(TINY, vision=dataclasses.replace(TINY.vision, image_size=pixels))
    model, report = load_model(config, original(tmp_path / "model.pth", tiny_model))
    assert report.interpolated == (32, pixels)
    assert report.lines()[1] == f"position embeddings interpolated from 32 to {pixels} pixels"
    theirs = transformers.BlipForImageTextRetrieval(transformers.BlipConfig(**huggingface_config(TINY))).eval()
    theirs.load_state_dict(to_huggingface(tiny_model.state_dict(), TINY))
    image = torch.randn(2, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        got = model.image_feat(image)
        want = theirs.vision_model(image, interpolate_pos_encoding=True).last_hidden_state
    # 2.1e-6 measured on 10 models at both sizes; with align_corners=True it is 0.1.
    assert float((got - want).abs().max()) < 1e-5


def test_extra_entries_are_listed(tmp_path: Path, tiny_model: BlipRetrieval) -> None:
    content = checkpoint(tiny_model, momentum=False)
    extra = ["two\nlines", *(f"extra.{n}" for n in range(11))]
    content["model"] |= dict.fromkeys(extra, torch.zeros(1)) | {"visual_encoder.note": "no tensor"}
    torch.save(content | {"lr": 1e-5}, tmp_path / "model.pth")
    model, report = load_model(TINY, tmp_path / "model.pth")
    assert_equal(model, tiny_model)
    assert report.unexpected == (*extra, "lr", "visual_encoder.note")
    assert report.lines()[-1] == f"unexpected, not used: 'two\\nlines', {', '.join(extra[1:10])}, and 4 more (14 in all)"


def test_unexpected_names_are_spelt_as_in_the_file(tmp_path: Path, tiny_model: BlipRetrieval) -> None:
    state = to_huggingface(tiny_model.state_dict(), TINY) | {"vision_model.encoder.layers.7.layer_norm1.scale": torch.zeros(1)}
    state["vision_model.embeddings.class_token"] = torch.zeros(1)
    save_file(state, tmp_path / "model.safetensors")
    assert "vision.depth" in refusal(tmp_path / "model.safetensors")
    del state["vision_model.encoder.layers.7.layer_norm1.scale"]
    save_file(state, tmp_path / "model.safetensors")
    assert load_model(TINY, tmp_path)[1].unexpected == ("vision_model.embeddings.class_token",)


def test_only_what_is_used_stays_in_memory(tmp_path: Path, tiny_model: BlipRetrieval) -> None:
    load_model(TINY, original(tmp_path / "first.pth", tiny_model))  # torch's own memory
    content = checkpoint(tiny_model, queue=200_000)  # two queues of 16 MB
    content["model"]["visual_encoder_m.cls_token"] *= float("nan")  # not read, not minded
    torch.save(content, tmp_path / "model.pth")
    del content
    before = resident()
    kept = load_model(TINY, tmp_path / "model.pth")
    # 0.9 MB measured, of which the model is 0.5.
    assert resident() - before < 5e6
    # The control: reading a queue is seen.
    before = resident()
    queue = torch.load(tmp_path / "model.pth", mmap=True, weights_only=True)["model"]["image_queue"]
    queue.sum()
    assert resident() - before > 14e6
    del kept


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


# What is refused


def test_missing_and_misshaped_tensors_are_listed(tmp_path: Path, tiny_model: BlipRetrieval) -> None:
    def damage(state: dict[str, Tensor]) -> None:
        del state["itm_head.bias"]
        state["itm_head.weight"] = torch.zeros(3, 40)
        state["visual_encoder.norm.weight"] = torch.zeros(48, dtype=torch.int64)
        state["visual_encoder.norm.bias"] = torch.zeros(48).to_sparse()
        state["text_proj.bias"] = torch.zeros(20, device="meta")

    found = refusal(original(tmp_path / "model.pth", tiny_model, damage))
    for said in (
        "itm_head.bias is missing",
        "itm_head.weight is (3, 40), expected (2, 40)",
        "visual_encoder.norm.weight holds int64 strided on cpu, expected floating-point numbers",
        "visual_encoder.norm.bias holds float32 sparse_coo on cpu",
        "text_proj.bias holds float32 strided on meta",
    ):
        assert said in found


def test_long_lists_are_cut(tmp_path: Path, tiny_model: BlipRetrieval) -> None:
    def damage(state: dict[str, Tensor]) -> None:
        for name in [name for name in state if "crossattention" in name]:
            del state[name]

    found = refusal(original(tmp_path / "model.pth", tiny_model, damage))
    assert found.count("is missing") == 10
    assert "and 10 more (20 in all)" in found


def test_missing_tensors_are_spelt_as_in_the_file(tmp_path: Path, tiny_model: BlipRetrieval) -> None:
    state = to_huggingface(tiny_model.state_dict(), TINY)
    del state["vision_model.post_layernorm.bias"]
    state["vision_model.post_layernorm.weight"][2] = float("inf")
    save_file(state, tmp_path / "model.safetensors")
    assert "vision_model.post_layernorm.bias is missing" in refusal(tmp_path / "model.safetensors")
    state["vision_model.post_layernorm.bias"] = torch.zeros(48)
    save_file(state, tmp_path / "model.safetensors")
    assert "NaN or infinity in vision_model.post_layernorm.weight" in refusal(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("size", "other"),
    [
        ("vision.width", 96),
        ("vision.patch", 16),
        ("vision.mlp", 64),
        ("vision.depth", 4),
        ("text.vocab", 61),
        ("text.width", 48),
        ("text.positions", 50),
        ("text.ffn", 64),
        ("text.depth", 1),
        ("embed", 8),
    ],
)
def test_sizes_that_contradict_the_configuration(tmp_path: Path, tiny_model: BlipRetrieval, size: str, other: int) -> None:
    *part, field = size.split(".")
    config = TINY
    if part:
        changed = dataclasses.replace(getattr(TINY, part[0]), **{field: other})
        config = dataclasses.replace(TINY, **{part[0]: changed})
    else:
        config = dataclasses.replace(TINY, embed=other)
    held = operator.attrgetter(size)(TINY)
    path = original(tmp_path / "model.pth", tiny_model)
    assert refusal(path, config) == (
        f"{path}: {size}: the checkpoint has {held}, the configuration has {other}. "
        "Give its sizes with --config, or a checkpoint of this model."
    )


@pytest.mark.parametrize("protocol", ["coco", "flickr"])
def test_a_large_checkpoint_names_the_large_preset(tmp_path: Path, protocol: str) -> None:
    with torch.device("meta"):
        state = BlipRetrieval(preset("blip-retrieval-large-coco")).state_dict()
    # One zero stretched to each shape: the file has the sizes of the large model and only some kilobytes.
    torch.save({name: torch.zeros(()).expand(t.shape) for name, t in state.items()}, tmp_path / "large.pth")
    found = refusal(tmp_path / "large.pth", preset(f"blip-retrieval-base-{protocol}"))
    assert f"vision.width: the checkpoint has 1024, blip-retrieval-base-{protocol} has 768" in found
    assert found.endswith(f"Try --model blip-retrieval-large-{protocol}.")


@pytest.mark.parametrize(
    ("names", "lacks", "holds"),
    [
        (["bert.embeddings.word_embeddings.weight", "cls.predictions.bias"], "visual_encoder, text_encoder", "bert, cls"),
        (["visual_encoder.cls_token", "text_decoder.bert.x"], "text_encoder, vision_proj, text_proj, itm_head", "visual_encoder"),
        (
            ["vision_model.embeddings.class_embedding", "text_decoder.x"],
            "text_encoder, vision_proj",
            "vision_model, text_decoder",
        ),
        (["visual_encoder.cls_token", "Qformer.bert.x", "vision_proj.weight"], "text_encoder", "visual_encoder, Qformer"),
        ([], "visual_encoder", "nothing"),
    ],
    ids=["BERT", "captioning", "captioning of transformers", "BLIP-2", "no tensors"],
)
def test_checkpoints_of_other_models(tmp_path: Path, names: list[str], lacks: str, holds: str) -> None:
    torch.save({name: torch.zeros(2, 2, 2) for name in names}, tmp_path / "other.pth")
    found = refusal(tmp_path / "other.pth")
    assert f"it has no {lacks}" in found
    assert f"It holds {holds}" in found


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers(tmp_path: Path, tiny_model: BlipRetrieval, value: float) -> None:
    def damage(state: dict[str, Tensor]) -> None:
        state[WORDS][7, 3] = value

    assert f"holds NaN or infinity in {WORDS}." in refusal(original(tmp_path / "model.pth", tiny_model, damage))


def test_finite_weights_whose_sum_overflows_are_numbers(tmp_path: Path, tiny_model: BlipRetrieval) -> None:
    tiny_model.itm_head.bias.data[:] = 3e38
    assert_equal(load_model(TINY, original(tmp_path / "model.pth", tiny_model))[0], tiny_model)


@pytest.mark.parametrize("tokens", [1, 15])
def test_positions_of_no_square(tmp_path: Path, tiny_model: BlipRetrieval, tokens: int) -> None:
    def damage(state: dict[str, Tensor]) -> None:
        state["visual_encoder.pos_embed"] = torch.zeros(1, tokens, 48)

    assert f"are for {tokens} tokens, expected a square" in refusal(original(tmp_path / "model.pth", tiny_model, damage))


class Code:
    """What a hostile pickle holds: restoring it would create the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, tiny_model: BlipRetrieval, zipped: bool) -> None:
    content = checkpoint(tiny_model, queue=4) | {"config": Code(tmp_path / "ran")}
    torch.save(content, tmp_path / "model.pth", _use_new_zipfile_serialization=zipped)
    assert "holds Python objects and was not opened: restoring io.open would run code" in refusal(tmp_path / "model.pth")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "model.pth", weights_only=False)["config"].close()  # the control: it is live
    assert (tmp_path / "ran").exists()


def a_list(path: Path) -> bytes:
    torch.save([1], path)
    return path.read_bytes()


def half(path: Path) -> bytes:
    torch.save({"w": torch.zeros(500)}, path)
    return path.read_bytes()[:1500]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("zero.pth", lambda path: b"", "is empty (0 bytes)"),
        ("zero.safetensors", lambda path: b"", "is empty (0 bytes)"),
        ("truncated.pth", half, "is a damaged or incomplete PyTorch file (PytorchStreamReader failed"),
        ("page.pth", lambda path: b"<html>404 Not Found</html>", "is neither a PyTorch checkpoint nor a safetensors file"),
        ("text.pth", lambda path: b"epoch,loss\n1,2\n", "a safetensors file: it begins with 'epoch,loss\\n1,2\\n'. Copy or"),
        ("noise.pth", lambda path: bytes(range(255, 0, -1)), "is neither a PyTorch checkpoint nor a safetensors file"),
        (
            "pickle.pth",
            lambda path: pickle.dumps({"w": {1}}, protocol=4),
            "is neither a PyTorch checkpoint nor a safetensors file",
        ),
        ("archive.pth", lambda path: b"PK\5\6" + bytes(18), "is a damaged or incomplete PyTorch file"),
        ("cut.safetensors", lambda path: b"\x40" + bytes(7) + b'{"w":', "is a damaged or incomplete safetensors file"),
        ("noise.safetensors", lambda path: b"\xff" * 90, "is a damaged or incomplete safetensors file"),
        ("list.pth", a_list, "holds a list, expected a dictionary"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_damaged_files(tmp_path: Path, name: str, content: Callable[[Path], bytes], said: str) -> None:
    data = content(tmp_path / name)
    (tmp_path / name).write_bytes(data)
    assert said in refusal(tmp_path / name)


def test_nothing_there(tmp_path: Path) -> None:
    assert "There is no checkpoint" in refusal(tmp_path / "none.pth")
    assert "holds no weights: expected model.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("{", "is damaged (JSONDecodeError"),
        ("[]", "is damaged (TypeError"),
        ('{"weight_map": 3}', "is damaged (AttributeError"),
        ("[" * 100_000, "is damaged (RecursionError"),
        ('{"weight_map": {}}', "lists no files"),
        ('{"weight_map": {"a": "../outside.safetensors"}}', "expected files of its own folder"),
        ('{"weight_map": {"a": "one.safetensors"}}', "one.safetensors is missing"),
    ],
    ids=["text", "list", "number", "deep", "empty", "outside", "absent"],
)
def test_damaged_index(tmp_path: Path, index: str, said: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert said in refusal(tmp_path)


# The generator of checkpoints


def test_make_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "model.pth"
    result = CliRunner().invoke(main, ["--model", "blip-demo", "--out", str(out), "--seed", "3", "--no-momentum"])
    assert result.exit_code == 0, result.output
    model, report = load_model(preset("blip-demo"), out)
    assert_equal(model, random_model(preset("blip-demo"), seed=3, std=0.02))
    assert "momentum copies" not in report.ignored
