"""A trained model on disk: safetensors with each tensor once, the decoder's shared ones under the text encoder's name."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from models import config_file
from models.blip import BlipPretrain
from models.blip2 import Blip2Stage1
from models.config import Blip2Config, RetrievalConfig
from models.errors import UserError
from training.step import Trainable


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state without its repetitions: of tensors that share their memory the first name stays."""
    seen: set[int] = set()
    state = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            state[name] = tensor.contiguous()
    return state


def save(model: Trainable, path: Path, made_by: dict[str, str]) -> None:
    """Write beside, then rename. The file's metadata hold the configuration and `made_by`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    try:
        save_file(unique_tensors(model), beside, {"config": json.dumps(config_file.to_dict(model.cfg)), **made_by})
        beside.chmod(0o644)  # safetensors leaves it to its owner alone
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def load(path: Path) -> Trainable:
    """The model as `save` wrote it. Raises UserError when the file is of something else."""
    if not path.is_file():
        raise UserError(f"There is no checkpoint {path}. Write one with blip-train.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        values = json.loads(metadata["config"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path} is not a checkpoint of blip-train ({type(error).__name__}: {error}).") from error
    cfg = config_file.from_dict(values, str(path))
    if not isinstance(cfg, RetrievalConfig):
        raise UserError(f"{path} is of a model that writes words, which is not trained. Give a checkpoint of blip-train.")
    model: Trainable = Blip2Stage1(cfg) if isinstance(cfg, Blip2Config) else BlipPretrain(cfg)
    shapes = {name: tuple(tensor.shape) for name, tensor in unique_tensors(model).items()}
    wrong = sorted(n for n in shapes.keys() | tensors.keys() if n not in tensors or shapes.get(n) != tuple(tensors[n].shape))
    if wrong:
        raise UserError(f"{path} does not hold the model that its own configuration describes: {', '.join(wrong[:5])}.")
    model.load_state_dict(tensors, strict=False)  # what is shared stands there once
    return model
