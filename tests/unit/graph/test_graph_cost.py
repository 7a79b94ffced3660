import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from agnitra_lab.graph.capture import capture


class Products(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 24)
        self.conv = nn.Conv2d(4, 8, 3, stride=2, groups=2)
        self.transposed = nn.ConvTranspose2d(8, 4, 2, stride=2)

    def forward(self, x, image):
        h = self.linear(x)
        scores = h @ h.transpose(-1, -2)
        attended = F.scaled_dot_product_attention(h[:, None], h[:, None], h[:, None])
        added = torch.addmm(h[0], h[0], torch.ones(24, 24))
        return scores, attended, added, self.transposed(self.conv(image))


def test_flops_agree_with_torchs_own_counter():
    model = Products().eval()
    inputs = (torch.randn(2, 10, 16), torch.randn(1, 4, 9, 9))
    with (
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
        nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH),
    ):
        model(*inputs)
    ours = sum(node.flops or 0 for node in capture(model, inputs).graph.nodes)
    assert ours == counter.get_total_flops()


class Moves(nn.Module):
    def forward(self, x):
        return x.view(-1).unsqueeze(0), x.to(torch.float64), x + 1


@settings(max_examples=5, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9))
def test_bytes_are_inputs_plus_outputs_and_views_move_none(rows, columns):
    nodes = {node.op: node.bytes_moved for node in capture(Moves(), (torch.zeros(rows, columns),)).graph.nodes}
    elements = rows * columns
    assert nodes["aten::view"] == nodes["aten::unsqueeze"] == 0
    assert nodes["aten::to"] == elements * (4 + 8)
    assert nodes["aten::add"] == elements * (4 + 4)


def test_a_lookup_reads_the_rows_it_names_and_not_the_table(prefill):
    lookup = prefill.graph.nodes[0]
    assert lookup.bytes_moved == 6 * 8 + 2 * 6 * 32 * 4


def test_a_cache_write_touches_the_written_rows_only(decode):
    write = next(node for node in decode.graph.nodes if node.op == "aten::index_copy_")
    assert write.bytes_moved == 8 + 2 * 32 * 4
