# SPDX-License-Identifier: Apache-2.0
"""Which calls the kernels for Hopper take, without a GPU; what they compute: test_block_sparse_gpu.py."""

from types import SimpleNamespace

import pytest
import torch

from manyheads import kernels
from manyheads.attention import patterns
from manyheads.attention.block_pattern import BlockPattern, Rule
from manyheads.attention.sparse import Call, choose

triton = pytest.importorskip("triton", reason="triton is not installed")
from manyheads.kernels import block_sparse_hopper  # noqa: E402 - imports Triton

HOPPER = "compute capability 9.0 under Triton 3.6"
ROWS = "multiples of 16 bytes"


class OnGPU(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


def drawn(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape).to(dtype).as_subclass(OnGPU)


def asked(width=128, columns=None, dtype=torch.bfloat16, block_q=128, block_k=128, dout=None, given=(), **views):
    """What ``refusal`` says of 4 heads over 2 and 256 tokens; ``views`` put others for q, k and v."""
    columns = width if columns is None else columns
    q, k, v = drawn(1, 4, 256, width), drawn(1, 2, 256, width), drawn(1, 2, 256, columns)
    q, k, v = (views.get(name, x.to(dtype)) for name, x in (("q", q), ("k", k), ("v", v)))
    pattern = patterns.dense(256, 256, block_q=block_q, block_k=block_k)
    return block_sparse_hopper.refusal(q, k, v, Call(pattern, Rule(), 0.1, *given), dout)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(block_sparse_hopper, "_device", lambda index: (True, 132))


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, None),
        ({"dtype": torch.float16, "width": 64}, None),
        ({"block_q": 256, "block_k": 512}, None),
        ({"dtype": torch.float32}, "16 bits"),
        ({"width": 96}, "64 or 128 channels"),
        ({"width": 256}, "64 or 128 channels"),
        ({"width": 128, "columns": 64}, "64 or 128 channels"),
        ({"block_q": 64}, "multiple of 128"),
        ({"block_k": 64}, "multiple of 128"),
        ({"block_k": 1}, "multiple of 128"),
        ({"block_q": 192}, "multiple of 128"),
        ({"given": (torch.zeros(1, 1, 256),)}, "no bias"),
        ({"given": (None, (torch.zeros(1, 256), torch.zeros(1, 256)))}, "documents"),
    ],
    ids=lambda x: x if isinstance(x, str) else ", ".join(x or ["taken"]),
)
def test_reasons(given, reason):
    found = asked(**given)
    assert found is None if reason is None else reason in found


@pytest.mark.usefixtures("hopper")
def test_rows_that_cannot_be_fetched():
    """Views as calls have them: heads before or after tokens, packed q, k and v, a cut; and those off by an element."""
    room = drawn(1, 256, 4, 3 * 128)
    for view in (room[..., :128].transpose(1, 2), drawn(1, 4, 259, 136)[:, :, 2:258, 8:]):
        assert asked(q=view) is None
        assert asked(dout=view) is None
    odd = {
        "begins off by an element": drawn(1, 4, 256, 136)[..., 1:129],
        "rows off by an element": drawn(1, 4, 256, 129)[..., :128],
        "heads off by four": drawn(4 * (256 * 128 + 4)).as_strided((1, 4, 256, 128), (0, 256 * 128 + 4, 128, 1)),
        "one row for all": drawn(1, 4, 1, 128).expand(1, 4, 256, 128),
        "no row": drawn(1, 4, 0, 128),
    }
    for name, view in odd.items():
        assert ROWS in asked(q=view), name
        assert ROWS in asked(dout=view), name
    for name in ("k", "v"):
        assert ROWS in asked(**{name: drawn(1, 2, 256, 136)[..., 1:129]})
    one = drawn(1, 4, 1, 128).expand(3, 4, 1, 128)[:1]  # of what there is one there is no step
    assert asked(q=one) is None


@pytest.mark.parametrize(
    ("version", "capability", "hip", "known"),
    [
        ("3.6.0", (9, 0), None, True),
        ("3.7.0", (9, 0), None, False),
        ("4.6.0", (9, 0), None, False),
        ("3.6.0", (8, 0), None, False),
        ("3.6.0", (9, 4), "6.2", False),
        ("3.6.0", (9, 0), "6.2", False),
        ("3.6.0", (10, 0), None, False),
    ],
)
def test_devices(monkeypatch, version, capability, hip, known):
    found = SimpleNamespace(major=capability[0], minor=capability[1], multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(triton, "__version__", version)
    asks = block_sparse_hopper._device.__wrapped__
    assert asks(0) == (known, 132)
    monkeypatch.setattr(block_sparse_hopper, "_device", asks)
    assert asked() is None if known else HOPPER in asked()


def test_a_cpu_is_none(monkeypatch):
    monkeypatch.setattr(block_sparse_hopper, "_device", lambda index: pytest.fail("asked of a CPU"))
    assert HOPPER in asked(q=torch.randn(1, 4, 256, 128).bfloat16())


def test_dense_attention_is_taken_where_nothing_is_left_out(monkeypatch):
    """At density 1 alone: where a block is missing dense attention is another function, however few there are."""
    monkeypatch.setattr(kernels, "available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(block_sparse_hopper, "_device", lambda index: (False, 132))
    q = drawn(1, 2, 512, 64)
    blocks = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()

    def way():
        pattern = BlockPattern.from_blocks(blocks, 512, 512)
        return choose(q, q, q, Call(pattern, Rule(), 0.1))

    assert way().impl == "flash"
    blocks[..., 0, 3] = True  # no pair of it is allowed
    assert way().impl == "flash"
    blocks[..., 3, 0] = False
    assert way().impl == "triton" and HOPPER in way().reason
    monkeypatch.setattr(block_sparse_hopper, "_device", lambda index: (True, 132))
    assert "the kernels for Hopper" in way().reason
