"""The weights that a training ends with, as a checkpoint that blip-export and other people's code take."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor, nn

from models import config_file, manifest
from models.blip2 import Blip2Stage1
from models.blip2_llm import Blip2Llm
from models.config import Config
from models.errors import UserError
from models.layouts import ENCODER
from models.llm_checkpoint import LLM
from models.write_weights import write_safetensors
from training.lora import merged
from training.settings import Settings
from training.whole import by_the_first, gathered, tensors_of

WEIGHTS = "weights.safetensors"  # at the end
BEST = "best.safetensors"  # when they were measured to be the best so far


def write_weights(model: nn.Module, config: Config, settings: Settings, name: str = WEIGHTS) -> Path:
    """Write `name` into `run.out`, beside and renamed, and return its path. All processes call it; LoRA is merged there, and not
    in `model`. Raises UserError, on every process, when it cannot be written: what was there before stays.

    A language model that stays as it is stays in its own folder, as LAVIS leaves it: `--llm-checkpoint` names it again. With
    `run.trainable_only` so does BLIP-2's frozen image encoder, for which there is `--vit-checkpoint`.
    """
    tensors: dict[str, Tensor] = merged(model, gathered(tensors_of(model)))
    if settings.model.llm_checkpoint and settings.model.lora is None:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(LLM)}
    if settings.run.trainable_only and settings.model.freeze_vit and isinstance(model, Blip2Stage1 | Blip2Llm):
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(ENCODER)}
    path = settings.run.out / name
    about = {"config": json.dumps(config_file.to_dict(config)), "task": settings.task, "seed": str(settings.run.seed)}
    about |= {"command": manifest.command()}

    def write() -> None:
        beside = path.with_name(f".{path.name}.part")
        try:
            write_safetensors(beside, tensors, about)
            beside.replace(path)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path} cannot be written: {' '.join(str(error).split()).rstrip('.')}. Is the disk full? States are as they "
                "were: make room, and go on with --resume."
            ) from error
        finally:
            beside.unlink(missing_ok=True)

    by_the_first(write)
    return path
