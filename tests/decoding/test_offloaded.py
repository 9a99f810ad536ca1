# SPDX-License-Identifier: Apache-2.0
"""Every loop and chooser writes with a model whose weights accelerate fetches what it writes with the model itself."""

import tempfile

import pytest
import torch
from accelerate import cpu_offload, disk_offload

import manyheads
from manyheads import UserError, parse
from manyheads.integrations import decoding, shared_blocks
from manyheads.integrations.decoding import write
from manyheads.integrations.transformers import new_cache, prefill
from manyheads.writing import Request
from tiny import chat, denoisers, vision
from tiny.compare import tiny

IDS = torch.tensor([[5, 7, 9, 11, 3, 8, 2]])
CPU = torch.device("cpu")


def text(model, spec):
    with manyheads.use(model):
        cache = new_cache(model, parse("full"))
        prefill(model, IDS, cache)
        return write(parse(spec), Request(model, None, IDS, 3, seed=1, cache=cache)).tokens


def image(model, spec):
    ids = torch.tensor([vision.prompt(2, (4, 4), 5)])
    return write(parse(spec), Request(model, None, ids, 3, given={"pixel_values": vision.pixels(1, 4, 4)})).tokens


def masks(model, spec):
    return write(parse(spec), Request(model, None, denoisers.PROMPT, 6)).tokens


CASES = [
    (tiny, text, ("sampling", "green_list:message=1011", "lnd:top_k=3,particles=4", "lnd.rejection:batch=8",
                  "hogwild:told=false")),
    (vision.llava, image, ("vcd", "pai:start_layer=0,alpha=2", "conscious_gaze:gate=always,target=0.9")),
    (denoisers.model, masks, ("dpad:block=3,window=2",)),
]  # fmt: skip


@pytest.mark.parametrize("how", ["cpu", "disk"])
@pytest.mark.parametrize(("make", "run", "specs"), CASES, ids=["text", "image", "masks"])
def test_what_is_written_is_the_same(make, run, specs, how):
    want = [run(make(), spec) for spec in specs]
    with tempfile.TemporaryDirectory() as folder:
        model = cpu_offload(make(), CPU) if how == "cpu" else disk_offload(make(), folder, CPU)
        assert {x.device.type for x in model.parameters()} == {"meta"}
        assert [run(model, spec) for spec in specs] == want


def test_a_reply_is_the_same_and_where_weights_stand_is_not_where_tokens_go(monkeypatch):
    reader = chat.tokenizer()
    for spec in ("full", "hogwild:finish=2"):
        want, got = (
            manyheads.reply(m, reader, "Who was", spec, max_new_tokens=4) for m in (tiny(), cpu_offload(tiny()))
        )
        assert got == want
    for module, spec in ((decoding, "full"), (shared_blocks, "hogwild:finish=2")):  # controls
        monkeypatch.setattr(module, "device_of", lambda model: next(model.parameters()).device)
        with pytest.raises(NotImplementedError, match="meta"):
            manyheads.reply(cpu_offload(tiny()), reader, "Who was", spec, max_new_tokens=4)


def test_blocks_on_several_devices_are_refused():
    model = tiny()
    model.hf_device_map = {"model.embed_tokens": 0, "model.layers.0": "cpu", "model.layers.1": 0}
    shared_blocks.SharedBlocks(model)  # what is offloaded to the processor is computed where the rest is
    model.hf_device_map["model.layers.1"] = 1
    with pytest.raises(UserError, match="several devices"):
        shared_blocks.SharedBlocks(model)
