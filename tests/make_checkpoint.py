"""A randomly filled checkpoint, for tests and for trying the chain without published weights.

    python -m tests.make_checkpoint --model blip-retrieval-base-coco --out model.pth
    python -m tests.make_checkpoint --model blip2-stage1-vit-g --half --without-vit --out blip2_pretrained.pth
    python -m tests.make_checkpoint --model blip2-opt-2.7b --half --out blip2_pretrained_opt2.7b.pth
    python -m tests.make_checkpoint --model blip2-opt-125m --vision-depth 1 --out blip2_opt125m.pth

Of BLIP in the original layout: at base size the file has 1.9 GB, half of it momentum copies, as the published ones. Of BLIP-2
in any layout: tensors are filled one by one, and memory holds them once. Of models that write words: tests.make_generator.
What deviates from the preset, a shallower image encoder or fewer words, is written to <name>.json, for blip-export's --config.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
from torch import Tensor, nn

from models.blip import BlipRetrieval
from models.blip2 import Blip2Stage1
from models.config import CLIP, Blip2Config, Blip2LlmConfig, BlipVqaConfig, Config, RetrievalConfig
from models.config_file import to_dict
from models.conversion import Wish, convert
from models.errors import Command, Misuse
from models.presets import preset
from tests import make_generator
from tests.mindspore_file import mindspore_items, write_ckpt
from tests.tiny import random_model

QUEUE = 57600  # embeddings that the original keeps while it trains on COCO (configs/retrieval_coco.yaml)
COPIED = ("visual_encoder", "text_encoder", "vision_proj", "text_proj")
ENCODER = "visual_encoder."
LAVIS, HF, OURS, MINDSPORE = LAYOUTS = ("lavis", "hf", "ours", "mindspore")


def checkpoint(model: BlipRetrieval, momentum: bool = True, queue: int = QUEUE) -> dict[str, Any]:
    """What salesforce/BLIP train_retrieval.py saves of `model`: its tensors, copies, queues and the state of training."""
    state: dict[str, Tensor] = dict(model.state_dict())
    state["text_encoder.embeddings.position_ids"] = torch.arange(model.cfg.text.positions).unsqueeze(0)  # (1, positions)
    if momentum:
        for name, tensor in list(state.items()):
            part, dot, rest = name.partition(".")
            if part in COPIED:
                state[f"{part}_m{dot}{rest}"] = tensor.clone()
        state["temp"] = torch.tensor(0.07)
        state["image_queue"] = torch.nn.functional.normalize(torch.randn(model.cfg.embed, queue), dim=0)
        state["text_queue"] = torch.nn.functional.normalize(torch.randn(model.cfg.embed, queue), dim=0)
        state["idx_queue"] = torch.full((1, queue), -100)
        state["ptr_queue"] = torch.zeros(1, dtype=torch.long)
    return {"model": state, "optimizer": {"state": {}, "param_groups": []}, "config": {"image_size": 384}, "epoch": 5}


def stage1_state(config: Blip2Config, seed: int = 0, std: float = 0.02, half: bool = False) -> dict[str, Tensor]:
    """What salesforce/LAVIS saves of a first stage that was trained with its image encoder, filled as tests.tiny fills it.

    With `half` the matrices and convolutions of the image encoder are float16, as `vit_precision: fp16` leaves them.
    """
    with torch.device("meta"):
        model = Blip2Stage1(config)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    halved = {f"{name}.{leaf}" for name in linear if name.startswith(ENCODER) for leaf in ("weight", "bias")} if half else set()
    random = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensor = nn.init.trunc_normal_(torch.empty(parameter.shape), std=std, generator=random)
        if "norm" in name.lower() and name.endswith("weight"):
            tensor += 1.0
        state[name] = tensor.half() if name in halved else tensor
    state["temp"] = torch.tensor(0.07)
    state["Qformer.bert.embeddings.position_ids"] = torch.arange(config.qformer.positions).unsqueeze(0)  # (1, positions)
    state["Qformer.cls.predictions.decoder.weight"] = state["Qformer.bert.embeddings.word_embeddings.weight"]
    state["Qformer.cls.predictions.decoder.bias"] = state["Qformer.cls.predictions.bias"]
    return state


def encoder_file(state: Mapping[str, Tensor], config: Blip2Config) -> dict[str, Tensor]:
    """The image encoder alone, as eva_vit_g.pth and clip_vit_L.pth hold it: without a prefix, with one block more than BLIP-2
    has, and with what follows the last block."""
    bare = {name.removeprefix(ENCODER): tensor for name, tensor in state.items() if name.startswith(ENCODER)}
    last, width = f"blocks.{config.vision.depth - 1}.", config.vision.width
    more = {name.replace(last, f"blocks.{config.vision.depth}."): tensor for name, tensor in bare.items() if last in name}
    if config.vision.kind == CLIP:
        end = {"ln_post.weight": torch.ones(width), "ln_post.bias": torch.zeros(width), "proj": torch.zeros(width, 8)}
    else:
        end = {"fc_norm.weight": torch.ones(width), "fc_norm.bias": torch.zeros(width), "head.weight": torch.zeros(8, width)}
    return bare | more | end


def without_encoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What LAVIS saves when the image encoder is frozen."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(ENCODER)}


def write(
    config: RetrievalConfig, out: Path, seed: int = 0, momentum: bool = True, queue: int = QUEUE, std: float = 0.02
) -> None:
    """Fill a model of `config`, with the spread that the original starts training from, and save it as its authors do."""
    if isinstance(config, Blip2Config):
        write_stage1(config, out, stage1_state(config, seed, std))
    else:
        torch.save(checkpoint(random_model(config, seed, std), momentum, queue), out)


def write_stage1(config: Blip2Config, out: Path, state: Mapping[str, Tensor], layout: str = LAVIS) -> None:
    """Save the state of a first stage in one of LAYOUTS."""
    if layout == LAVIS:
        training = {"optimizer": {"state": {}, "param_groups": []}, "config": {"run": {}}, "scaler": {}, "epoch": 9}
        torch.save({"model": dict(state), **training}, out)
    elif layout == MINDSPORE:
        write_ckpt(out, mindspore_items(state, crossed=True))
    else:
        with TemporaryDirectory(dir=out.parent) as folder:
            path = Path(folder) / "lavis.pth"
            write_stage1(config, path, state)
            convert(Wish(path, layout, out, config=config), lambda line: None)


@click.command(cls=Command, context_settings={"show_default": True})
@click.option("--model", default="blip-retrieval-base-coco", help="Preset whose sizes the checkpoint has.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The file to write, a folder for hf.")
@click.option("--seed", default=0, help="Equal seeds give equal weights.")
@click.option("--momentum/--no-momentum", default=True, help="Of BLIP, with momentum copies and queues, as the published files.")
@click.option("--layout", type=click.Choice(LAYOUTS), default=LAVIS, help="Of BLIP-2.")
@click.option(
    "--half", is_flag=True, help="In float16: the image encoder's matrices of BLIP-2's first stage, the language model."
)
@click.option("--bfloat16", is_flag=True, help="The language model in bfloat16.")
@click.option(
    "--vision-depth", type=click.IntRange(min=1), default=None, help="Blocks of the image encoder.  [default: the preset's]"
)
@click.option("--vocab", type=click.IntRange(min=1), default=None, help="Words of what writes them.  [default: the preset's]")
@click.option(
    "--without-vit", is_flag=True, help="Of BLIP-2, the image encoder in a file of its own, <name>_vit.pth beside --out."
)
def main(
    model: str,
    out: Path,
    seed: int,
    momentum: bool,
    layout: str,
    half: bool,
    bfloat16: bool,
    vision_depth: int | None,
    vocab: int | None,
    without_vit: bool,
) -> None:
    """Write a randomly filled checkpoint."""
    config = preset(model)
    if vision_depth or vocab:
        config = _changed(config, vision_depth, vocab)
        out.with_suffix(".json").write_text(json.dumps(to_dict(config), indent=1) + "\n", "utf-8")
    if bfloat16 and (half or not isinstance(config, Blip2LlmConfig)):
        raise Misuse("--bfloat16 is for language models, and not with --half.")
    if not isinstance(config, RetrievalConfig):
        if layout != LAVIS or without_vit or (half and not isinstance(config, Blip2LlmConfig)):
            raise Misuse("--layout and --without-vit are for BLIP-2's first stage, --half for BLIP-2.")
        make_generator.write(config, out, seed, torch.float16 if half else torch.bfloat16 if bfloat16 else torch.float32)
    elif not isinstance(config, Blip2Config):
        if layout != LAVIS or half or without_vit:
            raise Misuse("--layout, --half and --without-vit are for BLIP-2.")
        write(config, out, seed, momentum)
    else:
        state = stage1_state(config, seed, half=half)
        if without_vit:
            torch.save(encoder_file(state, config), out.with_name(f"{out.stem}_vit.pth"))
            state = without_encoder(state)
        write_stage1(config, out, state, layout)
    files = [file for file in out.rglob("*") if file.is_file()] if out.is_dir() else [out]
    click.echo(f"{out}: {sum(file.stat().st_size for file in files) / 1e9:.1f} GB")


def _changed(config: Config, vision_depth: int | None, vocab: int | None) -> Config:
    """`config` with an image encoder of so many blocks, and so many words in what writes them. Raises Misuse where words are
    read alone."""
    if vision_depth:
        config = replace(config, vision=replace(config.vision, depth=vision_depth))
    if not vocab:
        return config
    if isinstance(config, RetrievalConfig):
        raise Misuse("--vocab is for models that write words.")
    if isinstance(config, Blip2LlmConfig):
        return replace(config, llm=replace(config.llm, vocab=vocab))
    read = {"text": replace(config.text, vocab=vocab)} if isinstance(config, BlipVqaConfig) else {}
    return replace(config, decoder=replace(config.decoder, vocab=vocab), **read)


if __name__ == "__main__":
    main()
