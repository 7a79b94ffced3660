"""Losses over large inputs, each one number: what is summed, and how, decides its last digit."""

from __future__ import annotations

import torch
from sizes import Formula, ids, sized, values, workload
from torch import Tensor, nn
from torch.nn import functional as F

from agnitra_lab.contracts.workload import Workload

FP32 = torch.float32


def mean_squared_error() -> Workload:
    """The mean of squared differences."""
    shape = sized((8192, 8192), (4, 64))
    return workload("mean-squared-error", lambda: Formula(lambda a, b: torch.mean((a - b) ** 2)), values(*shape),
                    values(*shape), dtype=FP32)  # fmt: skip


def huber_loss() -> Workload:
    """Squares near zero, absolute values beyond."""
    shape = sized((8192, 8192), (4, 64))
    return workload("huber-loss", lambda: Formula(F.smooth_l1_loss), values(*shape), values(*shape), dtype=FP32)


def hinge_loss() -> Workload:
    """A margin of one, targets given once a row."""
    rows, columns = sized((16_384, 4096), (4, 64))

    def hinge(scores: Tensor, target: Tensor) -> Tensor:
        return torch.mean(torch.clamp(1 - scores * torch.sign(target), min=0))

    return workload("hinge-loss", lambda: Formula(hinge), values(rows, columns), values(rows, 1), dtype=FP32)


def triplet_loss() -> Workload:
    """Distances of anchors to what is alike and what is not."""
    shape = sized((8192, 4096), (4, 64))
    return workload("triplet-loss", lambda: nn.TripletMarginLoss(margin=1.0), values(*shape), values(*shape),
                    values(*shape), dtype=FP32)  # fmt: skip


def cross_entropy_of_few_classes() -> Workload:
    """Many rows of few logits."""
    rows, classes = sized((1_048_576, 32), (8, 4))
    return workload("cross-entropy-of-few-classes", lambda: Formula(F.cross_entropy), values(rows, classes),
                    ids(rows, below=classes), dtype=FP32)  # fmt: skip


def divergence_of_given_logits() -> Workload:
    """Distillation: Kullback-Leibler divergence of a student's logits from a teacher's, at a temperature."""
    shape = sized((4096, 32_000), (4, 64))

    def distil(student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = F.log_softmax(student.float() / 2.0, -1), F.softmax(teacher.float() / 2.0, -1)
        return F.kl_div(student, teacher, reduction="batchmean") * 4.0

    return workload("divergence-of-given-logits", lambda: Formula(distil), values(*shape), values(*shape),
                    dtype=torch.bfloat16)  # fmt: skip


def contrastive_loss() -> Workload:
    """CLIP's: both ways of a similarity matrix of unit rows (Radford et al. 2021)."""
    shape = sized((8192, 512), (4, 16))

    def contrast(images: Tensor, texts: Tensor) -> Tensor:
        scores = 14.0 * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).t()
        labels = torch.arange(scores.shape[0], device=scores.device)
        return (F.cross_entropy(scores, labels) + F.cross_entropy(scores.t(), labels)) / 2

    return workload("contrastive-loss", lambda: Formula(contrast), values(*shape), values(*shape), dtype=FP32)
