"""Trains the demo's small language model from nothing: the recipe that made demo/llm.

python -m demo.train_llm --out build/demo/llm

It learns to foretell the words of the demo's captions and sees no picture. A page of its text holds the five captions of one
scene, a line each, so that it learns to look up what a line says in those before it. BLIP-2's second stage then writes such a
line, as vectors, before the caption. The folder is as facebook/opt-* is published: config.json, model.safetensors (half
precision), vocab.json, merges.txt, and the log of the training.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import click
import numpy as np
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from demo.captions import captions
from demo.scenes import scenes
from models import manifest
from models.caches import Before, Bias, bias_after
from models.errors import Command, Misuse
from models.llm_config import OptConfig
from models.opt import Opt
from models.presets import OPT_DEMO
from models.write_weights import write_shards
from preprocess.bpe_words import OPT, BpeWords
from training.losses import IGNORED, next_word
from training.optimizer import make_optimizer, set_learning_rate, take_step
from training.schedule import Length, Schedule, learning_rate
from training.settings import Optimizer

SCENES, DRAWN_WITH = 30_000, 1  # those of the training pictures
HELD_OUT = 500
SIMPLE = 10
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # OPT's, whose numbers are 0 to 3
PAGES = 32  # in a batch
STEPS = 2_400
LOG_EVERY = 50
SPREAD = 0.1  # standard deviation of the first embeddings
WAVELENGTH = 100.0  # ratio of the longest of the positions' sines to the shortest
OPTIMIZER = Optimizer(betas=(0.9, 0.98), weight_decay=0.05, clip=1.0)
SCHEDULE = Schedule("cosine", lr=3e-3, min_lr=6e-5, warmup_steps=100)
UNSEEN = 4  # batches that the held-out loss is measured on
LOG = "training.log"


@click.command(cls=Command, context_settings={"show_default": True})
@click.option("--out", type=click.Path(path_type=Path), default="build/demo/llm", help="New folder for the model and its log.")
@click.option("--seed", type=click.IntRange(min=0), default=1, help="Of the first weights and the order of the pages.")
@click.option("--steps", type=click.IntRange(min=1), default=STEPS, help="Fewer than the recipe's give a worse model.")
def main(out: Path, seed: int, steps: int) -> None:
    """Train the demo's language model on the captions of the demo's training pictures."""
    if out.exists():
        raise Misuse(f"{out} is there already. Choose another --out, or remove it.")
    part = out.with_name(f".{out.name}.part")
    part.mkdir(parents=True, exist_ok=True)
    try:
        manifest.empty(part)
        learnt, held_out = texts("train", SCENES), texts("test", HELD_OUT)
        write_words(part, [caption for scene in learnt for caption in scene])
        words = BpeWords.load((part / "vocab.json", part / "merges.txt"))
        train(part, words, OPT_DEMO, learnt, held_out, seed, steps)
        part.rename(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def texts(split: str, count: int) -> list[list[str]]:
    """The five captions of each of `count` scenes, but of one in SIMPLE of those that show one group alone: what their lines
    share is found without looking up what belongs to what."""
    return [
        captions(scene, np.random.default_rng(wording))
        for number, (scene, _, wording) in enumerate(scenes(split, count, DRAWN_WITH))
        if not scene.simple or number % SIMPLE == 0
    ]


def write_words(out: Path, lines: list[str]) -> None:
    """vocab.json and merges.txt of a byte-level BPE that has a token for each word of `lines`; the same for the same lines."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=OPT_DEMO.vocab, special_tokens=[*SPECIAL], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.model.save(str(out))


def train(
    out: Path, words: BpeWords, config: OptConfig, learnt: list[list[str]], held_out: list[list[str]], seed: int, steps: int
) -> None:
    """Train an OPT of these sizes, and write it and the log of its loss into `out`."""
    torch.manual_seed(seed)
    model = begun(config)
    optimizer, scaler = make_optimizer(model, OPTIMIZER), GradScaler("cpu", enabled=False)
    schedule = replace(SCHEDULE, warmup_steps=min(SCHEDULE.warmup_steps, steps))
    pages = drawn([encoded(words, lines) for lines in learnt], words.pad_id, config.positions, seed)
    unseen = islice(drawn([encoded(words, lines) for lines in held_out], words.pad_id, config.positions, 0), UNSEEN)
    head = {"command": f"python -m demo.train_llm --seed {seed} --steps {steps}", "seed": seed, "steps": steps}
    head |= {"parameters": sum(weight.numel() for weight in model.parameters()), "scenes": len(learnt)}
    log = [head | {"versions": manifest.versions()}]
    losses = []
    for step, page in enumerate(islice(pages, steps), 1):
        set_learning_rate(optimizer, learning_rate(schedule, Length(steps, steps), 0, step - 1))
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, page, words.pad_id)
        loss.backward()  # type: ignore[no-untyped-call]
        take_step(optimizer, scaler, OPTIMIZER.clip)
        losses.append(loss.item())
        if step % LOG_EVERY == 0 or step == steps:
            log.append({"step": step, "loss": round(float(np.mean(losses)), 4)})
            click.echo(f"step {step:,}/{steps:,}  loss {log[-1]['loss']}")
            losses = []
    model.half().float()  # as it is stored
    with torch.no_grad():
        found = float(np.mean([loss_of(model, page, words.pad_id).item() for page in unseen]))
    log.append({"step": steps, "held_out_loss": round(found, 4)})
    click.echo(f"held-out scenes: loss {found:.4f}")
    manifest.write_text(out / LOG, "".join(json.dumps(line) + "\n" for line in log))
    write_model(out, model)


def begun(config: OptConfig) -> Opt:
    """Random weights, matrices scaled by their widths. Positions begin as sines, of the size of the words: so the word before is
    soon found, and from there what a word meant in an earlier line."""
    model = Opt(config)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=SPREAD)
    places = model.model.decoder.embed_positions.weight
    rates = WAVELENGTH ** -torch.linspace(0, 1, config.width // 2)  # (D / 2,)
    angles = torch.arange(len(places))[:, None] * rates  # (positions, D / 2)
    places.data = SPREAD * 2**0.5 * torch.cat([angles.sin(), angles.cos()], dim=1)
    return model


def encoded(words: BpeWords, lines: list[str]) -> list[list[int]]:
    """Ids of each line as the second stage reads one: `</s>` first, a line break last."""
    ids, mask = words.prompts([f"{line}{OPT.stop}" for line in lines])
    return [[int(i) for i, seen in zip(row, there, strict=True) if seen] for row, there in zip(ids, mask, strict=True)]


def drawn(pages: list[list[list[int]]], pad: int, length: int, seed: int) -> Iterator[Tensor]:
    """Batches (PAGES, length) without end: the lines of a page in any order, from any word of the first on, padded on the
    right."""
    rng = np.random.default_rng(seed)
    while True:
        batch = np.full((PAGES, length), pad, np.int64)
        for row, number in zip(batch, rng.integers(len(pages), size=PAGES), strict=True):
            lines = [pages[number][line] for line in rng.permutation(len(pages[number]))]
            page = [word for line in lines for word in line][rng.integers(len(lines[0])) :][:length]
            row[: len(page)] = page
        yield torch.from_numpy(batch)


def loss_of(model: Opt, ids: Tensor, pad: int) -> Tensor:
    """Cross-entropy of each word of the pages (N, L) after those before it."""
    mask = (ids != pad).long()
    places = torch.arange(ids.shape[1]).expand_as(ids)
    states, _ = model.states(model.embed(ids), places, Bias(bias_after(mask, ids.shape[1], None)), [Before()] * model.cfg.depth)
    return next_word(model.logits(states[:, :-1]), ids[:, 1:].masked_fill(mask[:, 1:] == 0, IGNORED))


def write_model(out: Path, model: Opt) -> None:
    """config.json and model.safetensors, as OPTForCausalLM reads them."""
    cfg = model.cfg
    about = {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": cfg.vocab,
        "hidden_size": cfg.width,
        "word_embed_proj_dim": cfg.embed,
        "num_hidden_layers": cfg.depth,
        "num_attention_heads": cfg.heads,
        "ffn_dim": cfg.ffn,
        "max_position_embeddings": cfg.positions,
        "do_layer_norm_before": cfg.pre_norm,
        "activation_function": "relu",
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "prefix": "</s>",
        "torch_dtype": "float16",
    }
    manifest.write_text(out / "config.json", json.dumps(about, indent=2) + "\n")
    write_shards(out, {name: tensor.half() for name, tensor in model.state_dict().items()})


if __name__ == "__main__":
    main()
