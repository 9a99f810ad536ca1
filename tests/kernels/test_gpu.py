# SPDX-License-Identifier: Apache-2.0
"""The kernels on a GPU: bfloat16, the PTX that reads codes, torch.compile, CUDA graphs over changing lengths."""

import pytest
import torch

import tolerance
from kernels.cases import agrees, build, errors, mass_truth
from manyheads import kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not kernels.available(), reason="needs a CUDA device and triton"),
]

CODECS = ["plain", "int4", "k8v4", "fp8"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LENGTHS = [[0, 1, 63, 64], [65, 200, 1000, 4097]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("group", "dim"), [(1, 32), (4, 64), (4, 128), (8, 128), (20, 128), (2, 256)])
def test_formula(codec, dtype, group, dim):
    assert agrees(build(codec, dtype, LENGTHS, group=group, dim=dim, device="cuda"))
    assert agrees(build(codec, dtype, LENGTHS, group=group, dim=dim, device="cuda", recent=[12, 5], capacity=100_000))
    assert agrees(build(codec, dtype, [[90]] * 300, group=group, dim=dim, device="cuda"))  # more heads than programs


@pytest.mark.parametrize("codec", CODECS)
def test_wrong_variants_fail(codec):
    case = build(codec, torch.bfloat16, LENGTHS, recent=[7, 12], group=4, dim=128, device="cuda")
    given = case.given
    wrong = [{name: given[name] - 1} for name in ("lengths", "offsets", "recent_length")] + [{"scale": 1.0}]
    if codec != "plain":
        wrong += [{"k_scale": given["v_scale"]}, {"v_scale": given["k_scale"]}]
    if codec == "int4":
        wrong += [{name: (given[name] >> 4) | (given[name] << 4)} for name in "kv"]
    assert agrees(case)
    for change in wrong:
        assert not agrees(case.but(**change)), change


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("way", ["graph", "compile", "both"])
def test_lengths_change_between_replays(codec, way):
    """One captured graph: other lengths, other offsets, other recent tokens, no capture again."""
    from manyheads.kernels.decode import decode_attention

    rounds = [
        build(codec, torch.bfloat16, lengths, recent=recent, group=4, dim=128, device="cuda", capacity=3000)
        for lengths, recent in (
            ([[2000, 5], [64, 900]], [3]),
            ([[0, 2955], [1, 13]], [12]),
            ([[700, 700], [800, 769]], [0]),
        )
    ]
    held = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in rounds[0].given.items()}
    query = rounds[0].q.clone()
    call = decode_attention if way == "graph" else torch.compile(decode_attention, fullgraph=True)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(query, **held)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    if way != "compile":
        with torch.cuda.graph(graph):
            out, lse = call(query, **held)
    for i, case in enumerate([*rounds, *rounds]):
        query.copy_(case.q)
        for name, x in case.given.items():
            if isinstance(x, torch.Tensor):
                held[name].copy_(x)
        if way == "compile":
            out, lse = call(query, **held)
        else:
            graph.replay()
        want = case.truth()
        assert tolerance.error(out.cpu(), want[0]) <= tolerance.HALF[torch.bfloat16]
        assert tolerance.error(lse.cpu(), want[1]) <= tolerance.HALF[torch.bfloat16]
        stale = rounds[(i + 1) % 3].truth()
        assert tolerance.error(out.cpu(), stale[0]) > 0.1


@pytest.mark.parametrize("codec", CODECS)
def test_no_wait_and_the_same_bits(codec):
    """The host waits for nothing, and programs that overlap do not race."""
    from manyheads.kernels.decode import decode_attention

    case = build(codec, torch.bfloat16, [[3000, 2000, 2500, 1]], recent=[9], group=4, dim=128, device="cuda")
    first = decode_attention(case.q, **case.given)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [decode_attention(case.q, **case.given) for _ in range(200)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for out, lse in again:
        assert torch.equal(out, first[0]) and torch.equal(lse, first[1])


def test_errors_are_those_of_the_dtype():
    """Over many tokens: bfloat16 over codes errs no more than twice plain torch over the numbers they stand for."""
    for codec in CODECS:
        case = build(codec, torch.bfloat16, [[8192]], group=4, dim=128, device="cuda")
        q = case.q[:, :, None]
        keys, values = (x[0][0].bfloat16().cuda()[None, None].expand(1, 4, -1, -1) for x in (case.keys, case.values))
        torch_out = torch.nn.functional.scaled_dot_product_attention(q, keys, values)[:, :, 0]
        assert errors(case)[0] <= tolerance.HALF_FACTOR * tolerance.error(torch_out.cpu(), case.truth()[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("length", "size", "group", "dim"),
    [(1, 5000, 4, 128), (300, 300, 1, 64), (700, 1500, 4, 128), (33, 1000, 3, 80), (200, 513, 2, 256)],
)
def test_mass(dtype, length, size, group, dim):
    from manyheads.kernels.accumulated_attention import accumulated_attention, lse

    q = torch.randn(2, length, 2 * group, dim).to(dtype).transpose(1, 2)
    k = torch.randn(2, 2, size, dim).to(dtype)
    mass, sums = mass_truth(q, k, dim**-0.5)
    got = accumulated_attention(q.cuda(), k.cuda(), scale=dim**-0.5).cpu()
    assert tolerance.error(got, mass) <= 1e-5
    assert tolerance.error(lse(q.cuda(), k.cuda(), scale=dim**-0.5).cpu(), sums) <= 1e-5
    assert tolerance.error(got, mass_truth(q.roll(1, 1), k, dim**-0.5)[0]) > 1e-3


@pytest.mark.parametrize("codec", CODECS[1:])
def test_compiled_encoding_writes_the_same_bytes(codec):
    """Codes are made with the scale as it is stored, also where casts are fused away; control: with another scale."""
    from manyheads.attention.codec import kv_codec

    packing, x = kv_codec(codec).keys, torch.randn(20_000, 128, device="cuda")
    codes, scale = packing.encode(x)
    fused, fused_scale = torch.compile(packing.encode)(x)
    other, _ = packing.encode(x * 1.003)  # off by as much as a rounding to bfloat16

    def differ(a, b):
        return float((a.view(torch.uint8) != b.view(torch.uint8)).float().mean())

    assert (scale != fused_scale).float().mean() < 1e-3  # a division may round otherwise
    assert differ(codes, fused) < 1e-4 < differ(codes, other)
