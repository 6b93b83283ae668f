"""The published models, by name: sizes and protocol of their files. Imports no torch.

Sources: salesforce/BLIP models/vit.py, configs/med_config.json, configs/{retrieval_coco,retrieval_flickr,caption_coco,vqa}.yaml;
salesforce/LAVIS models/eva_vit.py, models/clip_vit.py, models/blip2_models/Qformer.py, configs/models/blip2.
"""

from __future__ import annotations

import dataclasses
import difflib

from models.config import (
    CLIP,
    EVA,
    STAGE1,
    STAGE2,
    Blip2Config,
    Blip2LlmConfig,
    BlipCaptionConfig,
    BlipConfig,
    BlipVqaConfig,
    Config,
    Protocol,
    QformerConfig,
    TextConfig,
    VisionConfig,
)
from models.errors import Misuse
from models.llm_config import BAICHUAN, VICUNA, LlamaConfig, LlmConfig, OptConfig, T5Config

VIT_B = VisionConfig(image_size=384, patch=16, width=768, depth=12, heads=12, mlp=3072)
VIT_L = VisionConfig(image_size=384, patch=16, width=1024, depth=24, heads=16, mlp=4096)
MED = TextConfig(vocab=30524, width=768, depth=12, heads=12, ffn=3072, positions=512)
FLICKR = Protocol(k_test=128)
EVA_G = VisionConfig(image_size=224, patch=14, width=1408, depth=39, heads=16, mlp=6144, kind=EVA)
EVA_G_364 = dataclasses.replace(EVA_G, image_size=364)
CLIP_L = VisionConfig(image_size=224, patch=14, width=1024, depth=23, heads=16, mlp=4096, eps=1e-5, kind=CLIP)
QFORMER = QformerConfig(vocab=30523, width=768, depth=12, heads=12, ffn=3072, positions=512)
PRETRAINED = Protocol(max_length=30)  # salesforce/BLIP configs/pretrain.yaml, models/blip_pretrain.py

OPT_125M = OptConfig(vocab=50272, width=768, depth=12, heads=12, ffn=3072, embed=768)
OPT_350M = OptConfig(vocab=50272, width=1024, depth=24, heads=16, ffn=4096, embed=512, pre_norm=False)
OPT_1_3B = OptConfig(vocab=50272, width=2048, depth=24, heads=32, ffn=8192, embed=2048)
OPT_2_7B = OptConfig(vocab=50272, width=2560, depth=32, heads=32, ffn=10240, embed=2560)
OPT_6_7B = OptConfig(vocab=50272, width=4096, depth=32, heads=32, ffn=16384, embed=4096)
LLAMA_7B = LlamaConfig(vocab=32000, width=4096, depth=32, heads=32, ffn=11008)
VICUNA_7B = dataclasses.replace(LLAMA_7B, vocab=32001, family=VICUNA)  # LAVIS adds [PAD]
BAICHUAN_7B = dataclasses.replace(LLAMA_7B, vocab=64000, positions=4096, family=BAICHUAN)
FLAN_T5_XL = T5Config(vocab=32128, width=2048, depth=24, heads=32, head_width=64, ffn=5120)
FLAN_T5_XXL = T5Config(vocab=32128, width=4096, depth=24, heads=64, head_width=64, ffn=10240)
VICUNA_PROTOCOL = dataclasses.replace(STAGE2, max_length=128)  # salesforce/LAVIS models/blip2_models/blip2_vicuna_instruct.py
T5_PROTOCOL = dataclasses.replace(
    STAGE2, max_length=512
)  # LAVIS cuts none of FlanT5's prompts; this is what FlanT5 was trained with

# Trained from nothing on the drawn pictures of demo/shapes.py; the vocabulary is demo/tokenizer/vocab.txt.
BLIP_DEMO = BlipConfig(
    VisionConfig(image_size=48, patch=8, width=128, depth=4, heads=4, mlp=512),
    TextConfig(vocab=85, width=128, depth=3, heads=4, ffn=512, positions=40),
    embed=64,
    protocol=Protocol(k_test=32),
)
# The same pictures and the same image encoder, with a Q-Former on top.
BLIP2_DEMO = Blip2Config(
    dataclasses.replace(BLIP_DEMO.vision, kind=EVA),
    QformerConfig(vocab=84, width=128, depth=4, heads=4, ffn=512, positions=40, queries=8),
    embed=64,
    protocol=dataclasses.replace(STAGE1, k_test=32),
)
# The demo's BLIP again, as it describes pictures: the same weights hold both.
BLIP_CAPTION_DEMO = BlipCaptionConfig(BLIP_DEMO.vision, BLIP_DEMO.text)
# BLIP-2's second stage upon it, before a language model of the captions' words, demo/llm.
OPT_DEMO = OptConfig(vocab=464, width=96, depth=3, heads=4, ffn=352, embed=96, positions=96)
BLIP2_OPT_DEMO = Blip2LlmConfig(BLIP2_DEMO.vision, BLIP2_DEMO.qformer, OPT_DEMO)


def _at(size: int, vision: VisionConfig) -> VisionConfig:
    return dataclasses.replace(vision, image_size=size)


def _second(vision: VisionConfig, llm: LlmConfig, protocol: Protocol = STAGE2) -> Blip2LlmConfig:
    return Blip2LlmConfig(vision, QFORMER, llm, protocol)


PRESETS: dict[str, Config] = {
    "blip-retrieval-base-coco": BlipConfig(VIT_B, MED),
    "blip-retrieval-base-flickr": BlipConfig(VIT_B, MED, protocol=FLICKR),
    "blip-retrieval-large-coco": BlipConfig(VIT_L, MED),
    "blip-retrieval-large-flickr": BlipConfig(VIT_L, MED, protocol=FLICKR),
    "blip-pretrained-base": BlipConfig(_at(224, VIT_B), MED, protocol=PRETRAINED),
    "blip-pretrained-large": BlipConfig(_at(224, VIT_L), MED, protocol=PRETRAINED),
    "blip-caption-base": BlipCaptionConfig(VIT_B, MED),
    "blip-caption-large": BlipCaptionConfig(VIT_L, MED),
    "blip-vqa-base": BlipVqaConfig(_at(480, VIT_B), MED, MED),
    "blip-vqa-large": BlipVqaConfig(_at(480, VIT_L), MED, MED),
    "blip-demo": BLIP_DEMO,
    "blip-caption-demo": BLIP_CAPTION_DEMO,
    "blip2-stage1-vit-g": Blip2Config(EVA_G, QFORMER),
    "blip2-stage1-vit-l": Blip2Config(CLIP_L, QFORMER),
    "blip2-retrieval-coco": Blip2Config(EVA_G_364, QFORMER),
    "blip2-demo": BLIP2_DEMO,
    "blip2-opt-demo": BLIP2_OPT_DEMO,
    "blip2-opt-2.7b": _second(EVA_G, OPT_2_7B),
    "blip2-opt-6.7b": _second(EVA_G, OPT_6_7B),
    "blip2-opt-2.7b-coco": _second(EVA_G_364, OPT_2_7B),
    "blip2-opt-6.7b-coco": _second(EVA_G_364, OPT_6_7B),
    "blip2-flan-t5-xl": _second(EVA_G, FLAN_T5_XL, T5_PROTOCOL),
    "blip2-flan-t5-xl-vit-l": _second(CLIP_L, FLAN_T5_XL, T5_PROTOCOL),
    "blip2-flan-t5-xxl": _second(EVA_G, FLAN_T5_XXL, T5_PROTOCOL),
    "blip2-flan-t5-xl-coco": _second(EVA_G_364, FLAN_T5_XL, T5_PROTOCOL),
    "blip2-vicuna-7b": _second(EVA_G, VICUNA_7B, VICUNA_PROTOCOL),
    "blip2-llama-7b": _second(EVA_G, LLAMA_7B),
    "blip2-baichuan-7b": _second(EVA_G, BAICHUAN_7B),
    # None of these was published with BLIP-2: sizes to train and to measure with.
    "blip2-opt-125m": _second(EVA_G, OPT_125M),
    "blip2-opt-350m": _second(EVA_G, OPT_350M),
    "blip2-opt-1.3b": _second(EVA_G, OPT_1_3B),
}
# What others call them.
ALIASES = {
    # mindformers (mindformers/mindformer_book.py, r1.0)
    **dict.fromkeys(("blip2_stage1_vit_g", "blip2_stage1_classification", "blip2_stage1_evaluator"), "blip2-stage1-vit-g"),
    **dict.fromkeys(("blip2_stage2_vit_g_llama_7b", "itt_blip2_stage2_vit_g_llama_7b"), "blip2-llama-7b"),
    **dict.fromkeys(("blip2_stage2_vit_g_baichuan_7b", "itt_blip2_stage2_vit_g_baichuan_7b"), "blip2-baichuan-7b"),
    # PaddleMIX (its README of BLIP-2, with its spellings)
    "paddlemix/blip2-stage1": "blip2-stage1-vit-g",
    **dict.fromkeys(("paddlemix/blip2-stage2", "paddlemix/blip2-pretrained-opt2.7b"), "blip2-opt-2.7b"),
    "paddlemix/blip2-pretrained-opt6.7b": "blip2-opt-6.7b",
    "paddlemix/blip2_pretrained_flant5xl": "blip2-flan-t5-xl",
    "paddlemix/blip2_pretrained_flant5xxl": "blip2-flan-t5-xxl",
    "paddlemix/blip2-caption-opt2.7b": "blip2-opt-2.7b-coco",
    "paddlemix/blip2-caption-opt6.7b": "blip2-opt-6.7b-coco",
    **dict.fromkeys(("paddlemix/blip2_caption_flant5xl.7b", "paddlemix/blip2_caption_flant5xl"), "blip2-flan-t5-xl-coco"),
    # Hugging Face
    "Salesforce/blip-itm-base-coco": "blip-retrieval-base-coco",
    "Salesforce/blip-itm-base-flickr": "blip-retrieval-base-flickr",
    "Salesforce/blip-itm-large-coco": "blip-retrieval-large-coco",
    "Salesforce/blip-itm-large-flickr": "blip-retrieval-large-flickr",
    "Salesforce/blip-image-captioning-base": "blip-caption-base",
    "Salesforce/blip-image-captioning-large": "blip-caption-large",
    **dict.fromkeys(("Salesforce/blip-vqa-base", "Salesforce/blip-vqa-capfilt-large"), "blip-vqa-base"),
    "Salesforce/blip2-itm-vit-g": "blip2-stage1-vit-g",
    "Salesforce/blip2-itm-vit-g-coco": "blip2-retrieval-coco",
    **{f"Salesforce/{name}": name for name in ("blip2-opt-2.7b", "blip2-opt-6.7b", "blip2-opt-2.7b-coco", "blip2-opt-6.7b-coco")},
    **{f"Salesforce/{name}": name for name in ("blip2-flan-t5-xl", "blip2-flan-t5-xxl", "blip2-flan-t5-xl-coco")},
    # LAVIS (lavis/configs/models/blip2: name/type)
    "blip2/pretrain": "blip2-stage1-vit-g",
    "blip2/pretrain_vitL": "blip2-stage1-vit-l",
    "blip2/coco": "blip2-retrieval-coco",
    "blip2_opt/pretrain_opt2.7b": "blip2-opt-2.7b",
    "blip2_opt/pretrain_opt6.7b": "blip2-opt-6.7b",
    "blip2_opt/caption_coco_opt2.7b": "blip2-opt-2.7b-coco",
    "blip2_opt/caption_coco_opt6.7b": "blip2-opt-6.7b-coco",
    "blip2_t5/pretrain_flant5xl": "blip2-flan-t5-xl",
    "blip2_t5/pretrain_flant5xl_vitL": "blip2-flan-t5-xl-vit-l",
    "blip2_t5/pretrain_flant5xxl": "blip2-flan-t5-xxl",
    "blip2_t5/caption_coco_flant5xl": "blip2-flan-t5-xl-coco",
}


def preset(name: str) -> Config:
    """The configuration called `name`, or that others call so. Raises Misuse with the nearest known name."""
    name = ALIASES.get(name, name)
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, [*PRESETS, *ALIASES], n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise Misuse(f"No model is called {name!r}.{hint} Known models: {', '.join(PRESETS)}.")
