"""Whether a checkpoint fits a model: its parts, its sizes, every tensor, every number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.blip import BlipRetrieval
from models.blip2 import Blip2Retrieval, Retrieval
from models.blip2_llm import Blip2Llm
from models.captioner import BlipCaptioner
from models.config import Blip2Config, BlipCaptionConfig, BlipConfig, BlipVqaConfig, Config, GenerationConfig, RetrievalConfig
from models.errors import Misuse, UserError
from models.layouts import ENCODER, HUGGINGFACE, Source, has
from models.llm_checkpoint import LLM, shown_kind
from models.llm_config import LlamaConfig, LlmConfig, OptConfig, T5Config
from models.sizes import LLM_KINDS, check_sizes
from models.vqa import BlipVqa
from models.weights_file import is_plain, listed

Shape = tuple[int, ...]
Generator = BlipCaptioner | BlipVqa | Blip2Llm  # writes words


@dataclass(frozen=True)
class Wanted:
    """What a file is to hold, for messages, and the name of a published one."""

    what: str
    such: str


BLIP = Wanted("BLIP for retrieval", "model_base_retrieval_coco.pth")
CAPTIONS = Wanted("BLIP for captions", "model_base_caption_capfilt_large.pth")
ANSWERS = Wanted("BLIP for answers", "model_base_vqa_capfilt_large.pth")
BLIP2 = Wanted("BLIP-2's first stage", "blip2_pretrained.pth")
STAGE2: dict[type[LlmConfig], Wanted] = {
    OptConfig: Wanted("BLIP-2's second stage", "blip2_pretrained_opt2.7b.pth"),
    LlamaConfig: Wanted("BLIP-2's second stage", "what LAVIS saves of blip2_vicuna_instruct with qformer_text_input false"),
    T5Config: Wanted("BLIP-2's second stage", "blip2_pretrained_flant5xl.pth"),
}
ENCODER_ALONE = Wanted("BLIP-2's image encoder", "eva_vit_g.pth")


def shapes_of(model: nn.Module) -> dict[str, Shape]:
    """The tensors that a model consists of."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def retrieval_of(config: Config) -> Retrieval:
    """A model for retrieval. Raises Misuse when `config` is of one that writes words."""
    if isinstance(config, BlipConfig):
        return BlipRetrieval(config)
    if isinstance(config, Blip2Config):
        return Blip2Retrieval(config)
    raise Misuse("This configuration is of a model that writes words; retrieval needs one of BLIP or of BLIP-2's first stage.")


def generator_of(config: GenerationConfig) -> Generator:
    """A model that writes words."""
    if isinstance(config, BlipCaptionConfig):
        return BlipCaptioner(config)
    return BlipVqa(config) if isinstance(config, BlipVqaConfig) else Blip2Llm(config)


def wanted_shapes(config: Config) -> dict[str, Shape]:
    """The tensors that a model of `config` needs."""
    with torch.device("meta"):
        return shapes_of(retrieval_of(config) if isinstance(config, RetrievalConfig) else generator_of(config))


def shared_out(expected: Mapping[str, Shape], sources: list[Source]) -> list[dict[str, Shape]]:
    """What is expected of each source: of one that is for a part, that part; of the first, all the rest."""
    parts = tuple(source.part for source in sources if source.part)
    return [
        {n: shape for n, shape in expected.items() if (n.startswith(source.part) if source.part else not n.startswith(parts))}
        for source in sources
    ]


def check_model(source: Source, config: Config, expected: Mapping[str, Shape], begins: bool = False) -> None:
    """Raises UserError when the source is of another model, or lacks whole parts, or shows other sizes than `config`.

    `begins`: a training begins with it, which for answers may be BLIP's pretraining (salesforce/BLIP configs/vqa.yaml)."""
    wanted = wanted_of(config, expected)
    if isinstance(config, Blip2Config):
        _refuse_without_head(source, expected)
    _check_parts(source, expected, wanted)
    _refuse_other_task(source, config, wanted, begins)
    check_sizes(source.path, config, source.tensors, shown_kind(source))


def check_shapes(source: Source, config: Config, expected: Mapping[str, Shape], tensors: Mapping[str, Tensor]) -> None:
    """Raises UserError when one of `tensors`, made from the source's, is missing, misshaped or holds no numbers."""
    found = [p for name, shape in expected.items() if (p := _problem(source.spell(name), tensors.get(name), shape))]
    if found:
        raise UserError(
            f"{source.path} does not fit the model: {listed(found, '; ')}. "
            f"Give a complete checkpoint of {wanted_of(config, expected).what}."
        )


def check_numbers(source: Source, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raises UserError when one of `tensors` holds NaN or infinity."""
    # A sum is finite only if all its terms are, and needs no second tensor. It may overflow, so look again.
    bad = [name for name, t in tensors if not bool(t.sum().isfinite()) and not bool(t.isfinite().all())]
    if bad:
        raise UserError(
            f"{source.path} holds NaN or infinity in {listed([source.spell(name) for name in bad])}. "
            "Its training failed or the file is damaged; use another one."
        )


def wanted_of(config: Config, expected: Mapping[str, Shape]) -> Wanted:
    """What a file is called of which these tensors are expected."""
    if isinstance(config, BlipConfig):
        return BLIP
    if isinstance(config, BlipCaptionConfig):
        return CAPTIONS
    if isinstance(config, BlipVqaConfig):
        return ANSWERS
    if all(name.startswith(ENCODER) for name in expected):
        return ENCODER_ALONE
    if isinstance(config, Blip2Config):
        return BLIP2
    if all(name.startswith(LLM) for name in expected):
        return Wanted(f"a language model of this size ({LLM_KINDS[type(config.llm)]})", "its published Hugging Face folder")
    return STAGE2[type(config.llm)]


def temperature_of(source: Source) -> float | None:
    """What the checkpoint divides similarities by; None when it does not say."""
    held = source.tensors.get("temp")
    if held is None:
        return None
    value = float(held) if held.numel() == 1 and is_plain(held) else float("nan")
    if not 0 < value < float("inf"):
        said = f"{value:.4g}" if held.numel() == 1 else str(tuple(held.shape))
        raise UserError(f"{source.path}: temp, the temperature, is {said}, expected one number above 0. Use another checkpoint.")
    return value


def _check_parts(source: Source, expected: Mapping[str, Shape], wanted: Wanted) -> None:
    """A checkpoint of another model lacks whole parts: say so, instead of listing hundreds of names."""
    parts = dict.fromkeys(name.split(".")[0] for name in expected)
    lacking = [part for part in parts if not has(source.tensors, part)]
    if not lacking:
        return
    held = list(dict.fromkeys(name.split(".")[0] for name in [*source.weights.tensors, *source.weights.beside]))
    raise UserError(
        f"{source.path} is not a checkpoint of {wanted.what}: it has no {', '.join(lacking)}. "
        f"It holds {listed(held) or 'nothing'}. Give one, such as {wanted.such}."
    )


def _refuse_other_task(source: Source, config: Config, wanted: Wanted, begins: bool) -> None:
    """BLIP's decoder has the same shapes in three models, and was trained to look at pictures or at questions."""
    pretrained = has(source.tensors, "itm_head")
    if isinstance(config, BlipCaptionConfig) and has(source.tensors, "text_encoder") and not pretrained:
        raise UserError(
            f"{source.path} is a checkpoint of {ANSWERS.what}: its decoder looks at questions, not at pictures. Try --model "
            f"blip-vqa-base, or give a checkpoint of {wanted.what}, such as {wanted.such}."
        )
    if isinstance(config, BlipVqaConfig) and pretrained and not begins:
        raise UserError(
            f"{source.path} is a checkpoint of BLIP's pretraining: its decoder looks at pictures, not at questions. Give a "
            f"checkpoint of {wanted.what}, such as {wanted.such}."
        )


def _refuse_without_head(source: Source, expected: Mapping[str, Shape]) -> None:
    if source.layout == HUGGINGFACE and "temp" in expected and "temp" not in source.tensors:
        raise UserError(
            f"{source.path} has neither a head over the vocabulary nor a temperature: Hugging Face's layout has no place for "
            f"them. Give LAVIS's checkpoint, such as {BLIP2.such}."
        )


def _problem(name: str, tensor: Tensor | None, shape: Shape) -> str | None:
    if tensor is None:
        return f"{name} is missing"
    if tuple(tensor.shape) != shape:
        return f"{name} is {tuple(tensor.shape)}, expected {shape}"
    if not is_plain(tensor):
        kind = f"{tensor.dtype} {tensor.layout} on {tensor.device}".replace("torch.", "")
        return f"{name} holds {kind}, expected floating-point numbers"
    return None
