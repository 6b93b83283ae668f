"""A randomly filled checkpoint in the original layout, for tests and for trying the chain without published weights.

    python -m tests.make_checkpoint --model blip-retrieval-base-coco --out model.pth

At base size the file has 1.9 GB, half of it momentum copies, as the published ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from models.blip import BlipRetrieval
from models.config import BlipConfig, preset
from models.errors import Command
from tests.tiny import random_model

QUEUE = 57600  # embeddings that the original keeps while it trains on COCO (configs/retrieval_coco.yaml)
COPIED = ("visual_encoder", "text_encoder", "vision_proj", "text_proj")


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


def write(config: BlipConfig, out: Path, seed: int = 0, momentum: bool = True, queue: int = QUEUE, std: float = 0.02) -> None:
    """Fill a model of `config`, with the spread that the original starts training from, and save it."""
    torch.save(checkpoint(random_model(config, seed, std), momentum, queue), out)


@click.command(cls=Command, context_settings={"show_default": True})
@click.option("--model", default="blip-retrieval-base-coco", help="Preset whose sizes the checkpoint has.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The .pth to write.")
@click.option("--seed", default=0, help="Equal seeds give equal weights.")
@click.option("--momentum/--no-momentum", default=True, help="With momentum copies and queues, as the published files.")
def main(model: str, out: Path, seed: int, momentum: bool) -> None:
    """Write a randomly filled checkpoint in the original layout."""
    write(preset(model), out, seed, momentum)
    click.echo(f"{out}: {out.stat().st_size / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
