"""Trains the demo's BLIP-2 again, upon the image encoder of the demo's BLIP: the recipe that made demo/blip2.safetensors.

python -m demo.train_blip2 --out build/demo/training-blip2
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import click
import torch
from safetensors.torch import load_file
from torch import Tensor

from demo.captions import names
from demo.scenes import scenes
from demo.train import DRAWN_WITH, TOKENIZER, draw_pictures
from models import manifest
from models.blip2 import Blip2Stage1
from models.errors import Command
from models.presets import BLIP2_DEMO
from preprocess.workers import usable_cpus
from training.initial import initialise, start_queries_as_text
from training.options import Files, Options
from training.run import run
from training.stage1 import freeze_image_encoder, losses_of

WEIGHTS = Path(__file__).parent / "weights.safetensors"  # of the demo's BLIP
# The image encoder sees already and the words are known: what is learnt is to look, and what goes with what.
RECIPE = Options(steps=7_500, batchsize=40, together=5, easy=10_000, easy_steps=500, itm_after=500, lr=1e-3, validate_every=1_500)


@click.command(cls=Command, context_settings={"show_default": True})
@click.option(
    "--out", type=click.Path(path_type=Path), default="build/demo/training-blip2", help="Folder for pictures, weights and log."
)
@click.option("--seed", type=click.IntRange(min=0), default=RECIPE.seed, help="Of the training; the pictures stay the same.")
@click.option("--steps", type=click.IntRange(min=1), default=RECIPE.steps, help="Fewer than the recipe's give a worse model.")
def main(out: Path, seed: int, steps: int) -> None:
    """Draw the pictures and train the demo's BLIP-2 on them."""
    pictures = draw_pictures(out)
    files = Files(TOKENIZER, with_names(pictures), pictures, pictures / "test.json", out / "weights.safetensors")
    model = Blip2Stage1(BLIP2_DEMO)
    initialise(model, seed)
    start_from_blip(model, load_file(WEIGHTS))
    freeze_image_encoder(model)
    command = f"python -m demo.train_blip2 --seed {seed} --steps {steps}"
    run(model, losses_of, files, min(usable_cpus(), 16), replace(RECIPE, seed=seed, steps=steps), command)


def with_names(pictures: Path) -> Path:
    """Annotations that give the simple scenes short captions too, as a label is one: the five forms all say where it is."""
    entries = json.loads((pictures / "train.json").read_text("utf-8"))
    for entry, (scene, _, _) in zip(entries, scenes("train", len(entries), DRAWN_WITH), strict=True):
        entry["caption"] += names(scene) if scene.simple else []
    named = pictures / "train_with_names.json"
    manifest.write_text(named, json.dumps(entries))
    return named


def start_from_blip(model: Blip2Stage1, blip: dict[str, Tensor]) -> None:
    """What BLIP-2 takes from trained encoders, taken from the demo's BLIP: the image encoder, and BERT in the Q-Former.

    EVA's keys have no bias. Leaving BLIP's out changes nothing: it adds the same to all scores of a query, and softmax
    does not see that. The norm at the end of BLIP's ViT becomes `ln_vision`.
    """
    width = model.cfg.vision.width
    state = {}
    for name, tensor in blip.items():
        if name.endswith("attn.qkv.bias"):
            state[name.replace("qkv.bias", "q_bias")] = tensor[:width]
            state[name.replace("qkv.bias", "v_bias")] = tensor[-width:]
        elif name.startswith("visual_encoder.norm."):
            state[name.replace("visual_encoder.norm", "ln_vision")] = tensor
        elif name.startswith("visual_encoder."):
            state[name] = tensor
        elif name.startswith("text_encoder.") and ".crossattention." not in name:
            ours = name.replace("text_encoder.", "Qformer.bert.")
            state[ours] = tensor[: model.cfg.qformer.vocab] if "word_embeddings" in name else tensor  # there is no [ENC]
    unknown = model.load_state_dict(state, strict=False).unexpected_keys
    assert not unknown, unknown
    with torch.no_grad():
        start_queries_as_text(model)


if __name__ == "__main__":
    main()
