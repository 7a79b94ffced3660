"""The demo models at the suite's sizes: BERT, ViT, ResNet and DLRM with the real widths and fewer layers or rows."""

from __future__ import annotations

from dataclasses import replace

import torch

from agnitra_lab.contracts.workload import Inputs, Workload
from agnitra_lab.workloads import dlrm as dlrm_module
from agnitra_lab.workloads import encoder, resnet
from agnitra_lab.workloads.assembly import assemble, seeded
from agnitra_lab.workloads.seeding import normal, token_ids

BERT_SCALES = {**encoder.BERT_SCALES, "full": replace(encoder.BERT_SCALES["full"], num_layers=6)}
VIT_SCALES = {
    **encoder.VIT_SCALES,
    "small": replace(encoder.VIT_SCALES["small"], batch=4),
    "full": replace(encoder.VIT_SCALES["full"], num_layers=6),
}
# Two blocks a stage: every shape of ResNet-50's convolutions occurs, and the tuner compiles each shape once.
RESNET_SCALES = {
    **resnet.SCALES,
    "small": replace(resnet.SCALES["small"], edge=224),
    "full": replace(resnet.SCALES["full"], num_blocks=(2, 2, 2, 2)),
}
# 200,000 rows a table in place of a million: still far more than a cache holds, and drawn in seconds.
DLRM_SCALES = {
    **dlrm_module.SCALES,
    "small": replace(dlrm_module.SCALES["small"], rows=50_000, batch=8192),
    "full": replace(dlrm_module.SCALES["full"], rows=200_000),
}


def bert(scale: str, device: str, dtype: torch.dtype) -> Workload:
    """Encode a batch of equal-length texts with half the layers of BERT-base."""
    config = BERT_SCALES[scale]
    model = seeded(lambda: encoder.TextEncoder(config), device, dtype, num_residual_layers=2 * config.num_layers)

    def make_inputs(seed: int) -> Inputs:
        return (token_ids(seed, (config.batch, config.sequence), config.vocabulary, device),), {}

    return assemble("bert", model, make_inputs, {"scale": scale, **vars(config)},
                    items=config.batch * config.sequence, unit="tokens")  # fmt: skip


def vit(scale: str, device: str, dtype: torch.dtype) -> Workload:
    """Classify a batch of images with half the layers of ViT-B/16."""
    config = VIT_SCALES[scale]
    model = seeded(lambda: encoder.VisionTransformer(config), device, dtype, num_residual_layers=2 * config.num_layers)

    def make_inputs(seed: int) -> Inputs:
        return (normal(seed, (config.batch, 3, config.sequence, config.sequence), device, dtype),), {}

    return assemble("vit", model, make_inputs, {"scale": scale, **vars(config)}, items=config.batch, unit="images")


def resnet50(scale: str, device: str, dtype: torch.dtype) -> Workload:
    """Classify a batch of images with two of ResNet-50's blocks a stage."""
    config = RESNET_SCALES[scale]
    model = seeded(lambda: resnet.ResNet(config), device, dtype)

    def make_inputs(seed: int) -> Inputs:
        return (normal(seed, (config.batch, 3, config.edge, config.edge), device, dtype),), {}

    return assemble("resnet50", model, make_inputs, {"scale": scale, **vars(config)}, items=config.batch, unit="images")


def dlrm(scale: str, device: str, dtype: torch.dtype) -> Workload:
    """Score a batch of samples over 26 tables."""
    config = DLRM_SCALES[scale]
    model = seeded(lambda: dlrm_module.DLRM(config), device, dtype)

    def make_inputs(seed: int) -> Inputs:
        ids_BFL = token_ids(seed, (config.batch, config.num_tables, config.bag), config.rows, device)
        return (normal(seed + 1, (config.batch, config.dense), device, dtype), ids_BFL), {}

    return assemble("dlrm", model, make_inputs, {"scale": scale, **vars(config)}, items=config.batch, unit="samples")
