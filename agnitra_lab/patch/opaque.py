"""Library calls as single opaque operations, which Inductor neither takes apart nor lays out anew.

Shape legend: B batch, T steps, I features, H hidden, P output of one direction, N directions, K layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

RECURRENT = {"lstm": torch.lstm, "gru": torch.gru, "rnn_tanh": torch.rnn_tanh, "rnn_relu": torch.rnn_relu}


@torch.library.custom_op(
    "agnitra::recurrent",
    mutates_args=(),
    schema="(Tensor x, Tensor[] states, Tensor[] weights, str kind, bool has_biases, int num_layers, float dropout, "
    "bool train, bool bidirectional, bool batch_first) -> Tensor[]",
)
def recurrent(
    x: Tensor,
    states: list[Tensor],
    weights: list[Tensor],
    kind: str,
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> list[Tensor]:
    """Run a whole recurrent layer as one call of the library (cuDNN, oneDNN).

    Args:
        x: [B, T, I] with `batch_first`, else [T, B, I].
        states: the first hidden state [K * N, B, P], and for an LSTM the cell state [K * N, B, H].
        weights: as `nn.LSTM._flat_weights`; on CUDA parts of one buffer, which they stay as inputs of a graph.
        kind: a key of `RECURRENT`.

    Returns:
        Outputs [.., .., N * P], dense with the steps outermost, and the last states.
    """
    first = states if kind == "lstm" else states[0]
    results = RECURRENT[kind](x, first, weights, has_biases, num_layers, dropout, train, bidirectional, batch_first)  # type: ignore[operator]
    expected = _results_like(x, states, weights, bidirectional, batch_first)
    return [
        result if result.stride() == like.stride() else like.copy_(result)
        for result, like in zip(results, expected, strict=True)
    ]


@recurrent.register_fake
def _(x, states, weights, kind, has_biases, num_layers, dropout, train, bidirectional, batch_first):  # type: ignore[no-untyped-def]
    return _results_like(x, states, weights, bidirectional, batch_first)


def _results_like(
    x: Tensor, states: list[Tensor], weights: list[Tensor], bidirectional: bool, batch_first: bool
) -> list[Tensor]:
    steps, batch = (x.shape[1], x.shape[0]) if batch_first else (x.shape[0], x.shape[1])
    width = states[0].shape[-1] * (2 if bidirectional else 1)
    out = x.new_empty((steps, batch, width))
    return [out.transpose(0, 1) if batch_first else out, *(state.new_empty(state.shape) for state in states)]


@torch.library.custom_op(
    "agnitra::conv_as_is",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, int[] stride, int[] padding, int[] dilation, bool transposed, "
    "int[] output_padding, int groups) -> Tensor",
)
def conv_as_is(
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Tensor:
    """Run aten's convolution in the layout that its arguments have; arguments as `aten.convolution`, without bias."""
    return torch.ops.aten.convolution.default(
        x, weight, None, stride, padding, dilation, transposed, output_padding, groups
    )


@conv_as_is.register_fake
def _(x, weight, stride, padding, dilation, transposed, output_padding, groups):  # type: ignore[no-untyped-def]
    return torch.ops.aten.convolution.default(
        x, weight, None, stride, padding, dilation, transposed, output_padding, groups
    )
