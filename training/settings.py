"""What a training is told, as plain data. The names of the fields are the keys of a settings file. Imports no torch.

`Settings` checks itself when it is made: a value out of its range, or two that contradict each other, raise Misuse. Paths
that are relative begin where the command runs, also those that stand in a file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from training.schedule import Schedule
from training.settings_check import BEST, METRICS, check
from training.transforms import RandAugment

Task = Literal["pretrain", "stage1", "stage2", "caption", "retrieval", "vqa"]
Metric = Literal["recall", "caption", "vqa", "none"]


@dataclass(frozen=True)
class Lora:
    """Low-rank additions to the query and value projections of the language model, the only part of it that is trained."""

    rank: int = 16
    alpha: float = 32.0  # the addition counts alpha / rank times
    dropout: float = 0.05  # share of its inputs that is left out


@dataclass(frozen=True)
class Momentum:
    """BLIP's slowly following copies of the encoders, and its queue of their past embeddings."""

    decay: float = 0.995  # share of the copy that a step keeps
    queue: int = 57_600  # embeddings
    alpha: float = 0.4  # share of the copies' own similarities in the targets of ITC
    ramp_epochs: float = 2.0  # in so many epochs alpha rises from 0


@dataclass(frozen=True)
class Model:
    """What is trained, and what it starts from."""

    name: str | None = None  # sizes: a preset of models/presets.py or a name that others have for it ...
    config: Path | None = None  # ... or a JSON file in its place
    checkpoint: Path | None = None  # weights to start from; null: random ones
    vit_checkpoint: Path | None = None  # weights of the image encoder, when `checkpoint` has none
    bert_checkpoint: Path | None = None  # BERT, or a BLIP's, which text encoder, decoder and Q-Former start from
    llm_checkpoint: Path | None = None  # folder of the language model, as its authors publish it
    tokenizer: Path | None = None  # vocabulary, or its folder; null: the demo's, or that of `llm_checkpoint`
    image_size: int | None = None  # pixels; null: that of the sizes. Positions are interpolated
    freeze_vit: bool = True  # the image encoder stays as it is
    freeze_qformer: bool = False  # the Q-Former too: of BLIP-2 LoRA is left, or without it the projection
    prompt: str = ""  # before each caption, with a space between; no part of the loss
    trailing_newline: bool = False  # after each caption, where OPT ends one
    dropout: float = 0.0  # share of BERT's values and attention that is left out while it learns
    drop_path: float = 0.0  # share of the pictures that the last layer of the image encoder leaves as they are; less before
    lora: Lora | None = None
    momentum: Momentum | None = None


@dataclass(frozen=True)
class Source:
    """One set of pictures with their captions, or questions and answers."""

    kind: Literal["karpathy", "flickr8k", "vqa", "shards"] = "karpathy"  # `karpathy`: JSON, also Visual Genome's and Flickr30k's
    annotations: Path | None = None  # captions (flickr8k: Flickr8k.token.txt), or answers
    images: Path | None = None  # folder that the picture paths start from
    questions: Path | None = None  # vqa: VQA v2's file of questions, when `annotations` is its file of answers
    shards: str | None = None  # tar files of WebDataset, such as cc3m-{0000..0331}.tar
    samples: int | None = None  # of the shards, that are an epoch; null: all, counted when a training begins
    split: str | None = None  # of Karpathy's own file, and of Flickr8k's lists; null: train, and val of data.validation
    weight: float = 1.0  # how often an epoch sees each sample
    per_picture: bool = False  # a sample is a picture with one of its captions, instead of a caption with its picture
    transform: Literal["blip2_image_train", "blip_image_train", "blip_image_eval"] | None = None  # null: what data says


@dataclass(frozen=True)
class Data:
    """Pictures and texts, and what is done with them before the model sees them."""

    train: tuple[Source, ...]  # joined
    validation: Source | None = None  # measured on
    crop_scale: tuple[float, float] | None = (0.5, 1.0)  # share of the area that a random crop keeps; null: no crop
    flip: float = 0.5  # share of the pictures that is mirrored
    rand_augment: RandAugment | None = None
    shift: int = 0  # pixels by which pictures are moved, at most
    together: int = 1  # samples that follow one another in the annotations and stay in one batch
    easy: int = 0  # the first so many samples are easy ones ...
    easy_steps: int = 0  # ... and the only ones in so many first steps
    max_words: int | None = None  # captions are cut to; null: the protocol of the sizes
    max_length: int | None = None  # tokens of a caption, with the special ones; null: the protocol of the sizes
    workers: int | None = None  # processes that decode; null: one per CPU, at most 16
    prefetch: int = 2  # batches that each of them makes in advance


@dataclass(frozen=True)
class Optimizer:
    """AdamW. What has one dimension (biases, norms, the temperature) does not decay."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.05
    clip: float | None = None  # largest norm of the gradient; null: any
    accumulate: int = 1  # batches per step


@dataclass(frozen=True)
class Generation:
    """How captions and answers are written when a model is measured. null: as blip-run writes them, which is as the model's
    authors do; so are lengths counted (runtime/generation_presets.py)."""

    num_beams: int | None = None
    max_length: int | None = None
    min_length: int | None = None
    length_penalty: float | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True)
class Run:
    """How long, how precisely, and what is kept."""

    epochs: int | None = None  # one of these two
    steps: int | None = None  # of the optimizer
    batchsize: int = 32  # pictures, of each process
    eval_batchsize: int = 64
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"  # of the matrix products; weights stay float32
    loss_scale: float | None = None  # of fp16; null: found while training
    checkpointing: bool = False  # keep fewer activations and compute them again: less memory, more time
    ema: float | None = None  # share that a moving average of the weights keeps at each step; null: no average
    itm_after: int = 0  # steps without the matching loss, which hardly learns before the others have
    seed: int = 42
    save_every: int | None = None  # steps; null: at the end of each epoch
    keep: int = 3  # checkpoints, beside the best
    trainable_only: bool = False  # checkpoints without what is frozen
    validate: Metric | None = None  # null: the task's own, when there is data.validation
    validate_every: int | None = None  # steps; null: at the end of each epoch
    best: str | None = None  # figure that the best state is chosen by; null: r_mean, agg or accuracy
    generation: Generation = field(default_factory=Generation)
    out: Path = Path("build/train")  # folder
    device: Literal["auto", "cpu", "cuda", "npu"] = "auto"
    cache_features: bool = False  # keep what a frozen image encoder makes of each picture on disk
    log_every: int = 50  # steps


@dataclass(frozen=True)
class Parallel:
    """How processes share the work. torchrun says how many there are."""

    mode: Literal["none", "ddp", "shard_grad_op", "full_shard"] = "ddp"  # alone, `ddp` is `none`
    backend: Literal["auto", "nccl", "hccl", "gloo"] = "auto"
    negatives: Literal["all", "own"] = "all"  # whose pairs the matching loss draws its wrong ones from


@dataclass(frozen=True)
class Settings:
    """All of it. Raises Misuse, with the key, what was found and what was expected."""

    task: Task
    data: Data
    model: Model = field(default_factory=Model)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    run: Run = field(default_factory=Run)
    parallel: Parallel = field(default_factory=Parallel)

    def __post_init__(self) -> None:
        check(self)

    @property
    def metric(self) -> Metric:
        """What the model is measured by."""
        if self.data.validation is None:
            return "none"
        return self.run.validate or METRICS[self.task][0]

    @property
    def best(self) -> str:
        """The figure that the best state is chosen by."""
        return self.run.best or BEST[self.metric][0]
