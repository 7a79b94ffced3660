"""Whole networks of the kinds of KernelBench's level 3: convolutional, recurrent, of chunks and of attention.

Shape legend: B batch, S sequence, N positions of an image or a set, C channels or chunks, D width, K clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from blocks import GPTBlock
from sizes import ids, sized, values, workload
from torch import Tensor, nn
from torch.nn import functional as F

from agnitra_lab.contracts.workload import Workload

BF16, FP32 = torch.bfloat16, torch.float32
Fire = tuple[int, int]
"""Channels of the squeeze, and of each half of the expansion."""


# --- convolutions ----------------------------------------------------------------------------------------------------


class AlexNet(nn.Module):
    """Five convolutions, three overlapping poolings, three linear layers (Krizhevsky et al. 2012)."""

    def __init__(self, widths: Sequence[int], hidden: int, classes: int, side: int) -> None:
        super().__init__()
        a, b, c, d, e = widths
        self.features = nn.Sequential(
            nn.Conv2d(3, a, 11, 4, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
            nn.Conv2d(a, b, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
            nn.Conv2d(b, c, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(c, d, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(d, e, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Linear(e * side * side, hidden), nn.ReLU(), nn.Dropout(0.0),
            nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(0.0), nn.Linear(hidden, classes),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class Inception(nn.Module):
    """Kernels of one, three and five and a pooling side by side, put together by `cat` (Szegedy et al. 2014)."""

    def __init__(self, inputs: int, one: int, three: tuple[int, int], five: tuple[int, int], pooled: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(inputs, one, 1)
        self.three_less, self.three = nn.Conv2d(inputs, three[0], 1), nn.Conv2d(*three, 3, padding=1)
        self.five_less, self.five = nn.Conv2d(inputs, five[0], 1), nn.Conv2d(*five, 5, padding=2)
        self.pool, self.pooled = nn.MaxPool2d(3, 1, 1), nn.Conv2d(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        three, five = F.relu(self.three_less(x)), F.relu(self.five_less(x))
        branches = self.one(x), self.three(three), self.five(five), self.pooled(self.pool(x))
        return torch.cat([F.relu(branch) for branch in branches], 1)


class FireModule(nn.Module):
    """Few channels, then many: half of them from a kernel of one, half from a kernel of three."""

    def __init__(self, inputs: int, squeezed: int, half: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeezed, 1)
        self.one, self.three = nn.Conv2d(squeezed, half, 1), nn.Conv2d(squeezed, half, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.one(x)), F.relu(self.three(x))], 1)


class SqueezeNet(nn.Module):
    """SqueezeNet 1.0: a pooling before each stage, and classes that are channels (Iandola et al. 2016)."""

    def __init__(self, stem: int, stages: Sequence[Sequence[Fire]], classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, stem, 7, 2), nn.ReLU(inplace=True)]
        channels = stem
        for stage in stages:
            layers.append(nn.MaxPool2d(3, 2, ceil_mode=True))
            for squeezed, half in stage:
                layers.append(FireModule(channels, squeezed, half))
                channels = 2 * half
        layers += [nn.Dropout(0.0), nn.Conv2d(channels, classes, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(self.layers(x), 1)


class ShuffleUnit(nn.Module):
    """Grouped pointwise, shuffle, depthwise, grouped pointwise (Zhang et al. 2017).

    A unit of stride two joins its pooled input by `cat`, another by a sum.
    """

    def __init__(self, inputs: int, outputs: int, groups: int, stride: int) -> None:
        super().__init__()
        self.groups, self.stride, hidden = groups, stride, outputs // 4
        made = outputs - inputs if stride == 2 else outputs
        self.first, self.first_norm = self._pointwise(inputs, hidden), nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(hidden)
        self.last, self.last_norm = self._pointwise(hidden, made), nn.BatchNorm2d(made)

    def _pointwise(self, inputs: int, outputs: int) -> nn.Conv2d:
        return nn.Conv2d(inputs, outputs, 1, groups=self.groups, bias=False)

    def _shuffle(self, x: Tensor) -> Tensor:
        B, C, Y, X = x.shape
        return x.view(B, self.groups, C // self.groups, Y, X).transpose(1, 2).contiguous().view(B, C, Y, X)

    def forward(self, x: Tensor) -> Tensor:
        y = self._shuffle(F.relu(self.first_norm(self.first(x))))
        y = self.last_norm(self.last(self.depthwise_norm(self.depthwise(y))))
        return F.relu(torch.cat([F.avg_pool2d(x, 3, 2, 1), y], 1) if self.stride == 2 else x + y)


class RegNet(nn.Module):
    """Stages of two normed convolutions and a pooling, as KernelBench has it after Radosavovic et al. 2020."""

    def __init__(self, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        sizes = [3, *widths]
        self.stages = nn.Sequential(*(self._stage(*pair) for pair in pairwise(sizes)))
        self.head = nn.Linear(widths[-1], classes)

    @staticmethod
    def _stage(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2, 2),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.mean(self.stages(x), dim=[2, 3]))


class SoftmaxUNet(nn.Module):
    """A U-Net (Ronneberger et al. 2015) with a softmax along each line where ReLU would be.

    A softmax divides its values by about the length of a line. The norms must undo that: with weights of one, each
    softmax would see less to tell apart than the one before, and the output would be the same for all inputs.
    """

    def __init__(self, inputs: int, outputs: int, width: int, depth: int) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(depth + 1)]
        self.down = nn.ModuleList(self._double(*pair) for pair in pairwise([inputs, *widths]))
        self.enlarge = nn.ModuleList(nn.ConvTranspose2d(2 * half, half, 2, 2) for half in widths[-2::-1])
        self.up = nn.ModuleList(self._double(2 * half, half) for half in widths[-2::-1])
        self.head = nn.Conv2d(width, outputs, 1)

    @staticmethod
    def _double(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.Softmax(dim=-1),
            nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.Softmax(dim=-1),
        )  # fmt: skip

    @torch.no_grad()
    def sharpen(self, line: int) -> None:
        """Multiply the norms' weights by the length of the lines whose softmax they follow; the first follows none.

        And by three tenths: with much more, a difference in the last bits grows from step to step.
        """
        depth = len(self.up)
        lengths = [line // 2**level for level in (*range(depth + 1), *reversed(range(depth))) for _ in range(2)]
        norms = [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm, length in zip(norms, [1, *lengths[1:]], strict=True):
            norm.weight.mul_(0.3 * length)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for level, down in enumerate(self.down):
            x = down(F.max_pool2d(x, 2) if level else x)
            skips.append(x)
        for enlarge, up, skip in zip(self.enlarge, self.up, skips[-2::-1], strict=True):
            x = up(torch.cat([enlarge(x), skip], 1))
        return self.head(x)


# --- recurrences -----------------------------------------------------------------------------------------------------


class VanillaRNN(nn.Module):
    """One linear layer of input and state together, tanh, and an output at each step (Elman 1990)."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.step, self.head = nn.Linear(inputs + hidden, hidden), nn.Linear(hidden, outputs)

    def forward(self, x_SBD: Tensor, state: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        for step in range(x_SBD.size(0)):
            state = torch.tanh(self.step(torch.cat([x_SBD[step], state], 1)))
            outputs.append(self.head(state))
        return torch.stack(outputs)


class GatedCell(nn.Module):
    """A gated recurrent unit in single steps (Cho et al. 2014)."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.of_input, self.of_state = nn.Linear(inputs, 3 * hidden), nn.Linear(hidden, 3 * hidden)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        reset, update, new = self.of_input(x).chunk(3, 1)
        old_reset, old_update, old = self.of_state(state).chunk(3, 1)
        reset, update = torch.sigmoid(reset + old_reset), torch.sigmoid(update + old_update)
        return (1 - update) * torch.tanh(new + reset * old) + update * state


class RecurrentDecoder(nn.Module):
    """Gated units one on the other; each step reads what the last one gave (Sutskever et al. 2014)."""

    def __init__(self, width: int, hidden: int, depth: int, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.cells = nn.ModuleList(GatedCell(hidden if index else width, hidden) for index in range(depth))
        self.head = nn.Linear(hidden, width)

    def forward(self, x: Tensor, states: Tensor) -> Tensor:
        kept = list(states.unbind(0))
        outputs: list[Tensor] = []
        for _ in range(self.steps):
            for index, cell in enumerate(self.cells):
                x = kept[index] = cell(x, kept[index])
            x = self.head(x)
            outputs.append(x)
        return torch.stack(outputs, 1)


class StateSpaceDual(nn.Module):
    """Mamba-2's recurrence as products within chunks and a scan over chunks (Dao and Gu 2024, listing 1).

    Letters of the einsums: b batch, c and z chunks, l and s positions of a chunk, h heads, p head size, n state.
    """

    def __init__(self, heads: int, chunk: int) -> None:
        super().__init__()
        self.chunk = chunk
        self.log_decay = nn.Parameter(torch.empty(heads))

    @staticmethod
    def _decays(logs: Tensor) -> Tensor:
        """Return how much of each position is left at each later one: the last dimension twice."""
        size = logs.size(-1)
        later = torch.tril(torch.ones(size, size, dtype=torch.bool, device=logs.device), -1)
        sums = torch.cumsum(logs[..., None].expand(*logs.shape, size).masked_fill(~later, 0), -2)
        reached = torch.tril(torch.ones(size, size, dtype=torch.bool, device=logs.device))
        return torch.exp(sums.masked_fill(~reached, float("-inf")))

    def forward(self, x: Tensor, steps: Tensor, into: Tensor, out: Tensor) -> Tensor:
        """Map x [b, S, h, p] by step sizes [b, S, h], and what goes into and out of the state [b, S, h, n]."""
        steps = F.softplus(steps - 4.0)
        x, into, out = (part.unflatten(1, (-1, self.chunk)) for part in (x * steps[..., None], into, out))
        logs = (-torch.exp(self.log_decay) * steps).unflatten(1, (-1, self.chunk)).permute(0, 3, 1, 2)
        sums = torch.cumsum(logs, -1)
        within = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", out, into, self._decays(logs), x)
        states = torch.einsum("bclhn,bhcl,bclhp->bchpn", into, torch.exp(sums[..., -1:] - sums), x)
        states = torch.cat([torch.zeros_like(states[:, :1]), states], 1)
        states = torch.einsum("bhzc,bchpn->bzhpn", self._decays(F.pad(sums[..., -1], (1, 0))), states)[:, :-1]
        before = torch.einsum("bclhn,bchpn,bhcl->bclhp", out, states, torch.exp(sums))
        return (within + before).flatten(1, 2)


# --- sets and attention ----------------------------------------------------------------------------------------------


class NetVLAD(nn.Module):
    """Residuals to soft clusters, each normed, then all of them (Arandjelovic et al. 2015)."""

    def __init__(self, width: int, clusters: int) -> None:
        super().__init__()
        self.assign, self.norm = nn.Parameter(torch.empty(width, clusters)), nn.BatchNorm1d(clusters)
        self.centres = nn.Parameter(torch.empty(1, width, clusters))

    def forward(self, x_BND: Tensor) -> Tensor:
        B, N, D = x_BND.shape
        scores = self.norm(torch.matmul(x_BND.view(-1, D), self.assign))
        weights_BNK = F.softmax(scores, dim=1).view(B, N, -1)
        offsets = weights_BNK.sum(1, keepdim=True) * self.centres
        sums_BDK = torch.matmul(weights_BNK.transpose(1, 2), x_BND).transpose(1, 2) - offsets
        return F.normalize(F.normalize(sums_BDK, dim=1).reshape(B, -1), dim=1)


class EncoderViT(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2020) of torch's own encoder layers, which have a fast path."""

    def __init__(self, side: int, patch: int, width: int, heads: int, depth: int, classes: int) -> None:
        super().__init__()
        self.patch, self.proj = patch, nn.Linear(3 * patch * patch, width)
        self.first = nn.Parameter(torch.empty(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, (side // patch) ** 2 + 1, width))
        self.layers = nn.Sequential(
            *(nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True) for _ in range(depth))
        )
        self.head = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, classes))

    def forward(self, x: Tensor) -> Tensor:
        patches = x.unfold(2, self.patch, self.patch).unfold(3, self.patch, self.patch)
        x = self.proj(patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2))
        x = torch.cat([self.first.expand(x.size(0), -1, -1), x], 1) + self.positions
        return self.head(self.layers(x)[:, 0])


class MobileViTBlock(nn.Module):
    """Convolutions, then attention among like pixels of all patches, then both by `cat` (Mehta and Rastegari 2021)."""

    def __init__(self, channels: int, width: int, heads: int, depth: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.local, self.into = self._conv(channels, channels, 3), nn.Conv2d(channels, width, 1, bias=False)
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(width, heads, 2 * width, 0.0, F.silu, batch_first=True, norm_first=True)
                for _ in range(depth)
            ),
            nn.LayerNorm(width),
        )
        self.back, self.fuse = self._conv(width, channels, 1), self._conv(2 * channels, channels, 3)

    @staticmethod
    def _conv(inputs: int, outputs: int, kernel: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.SiLU()
        )

    def forward(self, image: Tensor) -> Tensor:
        x, p = self.into(self.local(image)), self.patch
        B, D, Y, X = x.shape
        x = x.reshape(B, D, Y // p, p, X // p, p).permute(0, 3, 5, 2, 4, 1).reshape(B * p * p, -1, D)
        x = self.layers(x).view(B, p, p, Y // p, X // p, D).permute(0, 5, 3, 1, 4, 2).reshape(B, D, Y, X)
        return self.fuse(torch.cat([image, self.back(x)], 1))


class MinGPT(nn.Module):
    """minGPT from ids to logits, its head apart from its table (Radford et al. 2019)."""

    def __init__(self, width: int, heads: int, depth: int, longest: int, vocabulary: int) -> None:
        super().__init__()
        self.embed, self.position_embed = nn.Embedding(vocabulary, width), nn.Embedding(longest, width)
        self.layers = nn.ModuleList(GPTBlock(width, heads, longest, is_relu=False) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        x = self.embed(tokens_BS) + self.position_embed(torch.arange(tokens_BS.size(1), device=tokens_BS.device)[None])
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


FIRES = [[(16, 64), (16, 64), (32, 128)], [(32, 128), (48, 192), (48, 192), (64, 256)], [(64, 256)]]


def alexnet() -> Workload:
    """Kernels of eleven and five, and a linear layer of 9216 inputs."""
    widths, hidden, classes, last = sized(([96, 256, 384, 384, 256], 4096, 1000, 6), ([8, 8, 8, 8, 8], 16, 10, 1))
    batch, side = sized((256, 224), (2, 63))
    return workload("alexnet", lambda: AlexNet(widths, hidden, classes, last), values(batch, 3, side, side), dtype=FP32,
                    items=batch, unit="images")  # fmt: skip


def inception_module() -> Workload:
    """The block 4a of GoogLeNet over larger images."""
    widths = sized((480, 192, (96, 208), (16, 48), 64), (8, 4, (4, 8), (2, 4), 4))
    batch, side = sized((64, 56), (1, 8))
    return workload("inception-module", lambda: Inception(*widths), values(batch, widths[0], side, side), dtype=FP32,
                    items=batch, unit="images")  # fmt: skip


def squeezenet() -> Workload:
    """Eight fire modules: small convolutions in pairs that read the same channels."""
    stem, stages, classes = sized((96, FIRES, 1000), (8, [[(2, 4)], [(4, 4)]], 10))
    batch, side = sized((64, 224), (1, 48))
    return workload("squeezenet", lambda: SqueezeNet(stem, stages, classes), values(batch, 3, side, side), dtype=FP32,
                    items=batch, unit="images")  # fmt: skip


def shufflenet_units() -> Workload:
    """A unit of stride two and three that keep the shape."""
    inputs, outputs, groups, batch, side = sized((240, 480, 3, 128, 56), (12, 24, 3, 1, 8))

    def build() -> nn.Module:
        units = (ShuffleUnit(outputs, outputs, groups, 1) for _ in range(3))
        return nn.Sequential(ShuffleUnit(inputs, outputs, groups, 2), *units)

    return workload("shufflenet-units", build, values(batch, inputs, side, side), dtype=FP32, items=batch,
                    unit="images")  # fmt: skip


def regnet() -> Workload:
    """Three stages of dense convolutions of three by three."""
    widths, classes, batch, side = sized(([64, 128, 256], 10, 32, 224), ([8, 8], 4, 1, 16))
    return workload("regnet", lambda: RegNet(widths, classes), values(batch, 3, side, side), dtype=FP32, items=batch,
                    unit="images")  # fmt: skip


def unet_with_softmax() -> Workload:
    """Wide low images; rows of 512 down to 32 values."""
    inputs, outputs, width, depth = sized((8, 4, 64, 4), (3, 2, 4, 2))
    batch, height, line = sized((8, 64, 512), (1, 8, 16))
    made = workload("unet-with-softmax", lambda: SoftmaxUNet(inputs, outputs, width, depth),
                    values(batch, inputs, height, line), dtype=FP32, items=batch, unit="images")  # fmt: skip
    assert isinstance(made.model, SoftmaxUNet)
    made.model.sharpen(line)
    return made


def vanilla_rnn() -> Workload:
    """A loop of 64 steps in Python, every output kept."""
    steps, batch, inputs, hidden, outputs = sized((64, 128, 512, 1024, 512), (4, 2, 8, 16, 4))
    return workload("vanilla-rnn", lambda: VanillaRNN(inputs, hidden, outputs), values(steps, batch, inputs),
                    values(batch, hidden), dtype=FP32, items=batch, unit="samples")  # fmt: skip


def recurrent_decoder() -> Workload:
    """Two gated layers that go on by themselves for 64 steps: some thousand small kernels."""
    steps, batch, width, hidden, depth = sized((64, 64, 256, 512, 2), (4, 2, 8, 16, 2))
    return workload("recurrent-decoder", lambda: RecurrentDecoder(width, hidden, depth, steps), values(batch, width),
                    values(depth, batch, hidden), dtype=FP32, items=batch, unit="samples")  # fmt: skip


def mamba2_chunks() -> Workload:
    """32 chunks of 64 positions, in einsums of two to four operands."""
    batch, sequence, heads, size, state, chunk = sized((16, 2048, 24, 64, 64, 64), (1, 16, 2, 4, 4, 4))
    return workload("mamba2-chunks", lambda: StateSpaceDual(heads, chunk), values(batch, sequence, heads, size),
                    values(batch, sequence, heads), values(batch, sequence, heads, state),
                    values(batch, sequence, heads, state), dtype=FP32, items=batch, unit="samples")  # fmt: skip


def net_vlad() -> Workload:
    """A hundred features of each image to 64 clusters."""
    batch, features, width, clusters = sized((3072, 100, 512, 64), (2, 6, 8, 4))
    return workload("net-vlad", lambda: NetVLAD(width, clusters), values(batch, features, width), dtype=FP32,
                    items=batch, unit="images")  # fmt: skip


def transformer_encoder_vit() -> Workload:
    """Six layers of 512 over 196 patches, norms after the residuals."""
    side, patch, width, heads, depth, classes = sized((224, 16, 512, 8, 6, 10), (16, 8, 16, 2, 1, 4))
    batch = sized(32, 2)
    return workload("transformer-encoder-vit", lambda: EncoderViT(side, patch, width, heads, depth, classes),
                    values(batch, 3, side, side), dtype=FP32, items=batch, unit="images")  # fmt: skip


def mobile_vit_block() -> Workload:
    """The first block of MobileViT-S for images of 256 by 256."""
    channels, width, heads, depth, patch = sized((96, 144, 4, 2, 2), (8, 16, 2, 1, 2))
    batch, side = sized((128, 32), (1, 8))
    return workload("mobile-vit-block", lambda: MobileViTBlock(channels, width, heads, depth, patch),
                    values(batch, channels, side, side), dtype=FP32, items=batch, unit="images")  # fmt: skip


def mingpt() -> Workload:
    """Four layers of GPT-2's width, attention by hand, logits of every position."""
    width, heads, depth, longest, vocabulary = sized((768, 12, 4, 1024, 50_257), (16, 2, 2, 16, 64))
    shape = sized((8, 1024), (1, 12))
    return workload("mingpt", lambda: MinGPT(width, heads, depth, longest, vocabulary), ids(*shape, below=vocabulary),
                    dtype=BF16, items=shape[0] * shape[1], unit="tokens", phase="prefill")  # fmt: skip
