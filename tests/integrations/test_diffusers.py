# SPDX-License-Identifier: Apache-2.0
"""The port of diffusers over tiny denoisers of ten classes: all attention is seen, and nothing changes by that."""

import threading
from dataclasses import dataclass

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs the extra [diffusion]")

import manyheads  # noqa: E402
from manyheads.errors import UserError  # noqa: E402
from manyheads.integrations import diffusers as port_  # noqa: E402
from manyheads.strategy import AttentionCompute, AttentionEdit, AttentionPatch, AttentionWatch  # noqa: E402
from oracles import diffusion as tiny  # noqa: E402
from tolerance import CLOSE, SAME, assert_close, error, nearly  # noqa: E402


class Watch(AttentionWatch):
    def watch(self, call, out):
        call.state.setdefault("calls", []).append((call, out))


class Reference(AttentionCompute):
    def attend(self, call):
        return call.attend()


class Copy(AttentionEdit):
    def edit(self, call):
        return call.replace(q=call.q.clone())


@dataclass(frozen=True, kw_only=True)
class Mute(AttentionPatch):
    head: int = 0

    def patch(self, call, out):
        made = out.clone()
        made[:, :, self.head] = 0
        return made


def calls(port, strategy):
    return {site: kept[branch]["calls"] for site, kept in port.state(strategy).items() for branch in kept}


@pytest.mark.parametrize("name", tiny.ALL)
def test_identity_is_bit_exact_and_every_site_is_seen(name):
    model = tiny.tiny(name)
    plain = tiny.forward(name, model)
    before = torch.nn.functional.scaled_dot_product_attention
    watch = Watch()
    for strategies in [(), (watch,), (Copy(),)]:
        with manyheads.use(model, *strategies) as port:
            assert torch.equal(tiny.forward(name, model), plain)
            assert torch.equal(tiny.forward(name, model), plain)
        if strategies == (watch,):
            seen = calls(port, watch)
            assert len(seen) == len(port_.find_sites(model)) and all(len(each) == 2 for each in seen.values())
            for both in seen.values():
                for call, out in both:
                    assert_close(call.attend(), out, CLOSE)
                    assert error(call.replace(scale=call.scale * 1.1).attend(), out) > SAME
    assert torch.nn.functional.scaled_dot_product_attention is before
    assert not any(m._forward_hooks or m._forward_pre_hooks or "_manyheads" in vars(m) for m in model.modules())
    assert torch.equal(tiny.forward(name, model), plain)


@pytest.mark.parametrize("name", tiny.ALL)
def test_what_acts_changes_something_at_every_site(name):
    model = tiny.tiny(name)
    plain = tiny.forward(name, model)
    layers = {site.layer for site, _ in port_.find_sites(model)}
    for layer in layers:
        with manyheads.use(model, Mute(layers=(layer,))):
            first = tiny.forward(name, model)
            assert torch.equal(tiny.forward(name, model), first)
        assert error(first, plain) > 1e-6, layer
    with manyheads.use(model, Reference()):
        assert_close(tiny.forward(name, model), plain, SAME)


@pytest.mark.parametrize("name", tiny.ALL)
def test_facts_of_a_call(name):
    """Kind, step, token layout and axis, told by inputs and modules."""
    model = tiny.tiny(name)
    watch = Watch()
    with manyheads.use(model, watch) as port:
        tiny.forward(name, model)
    seen = {site: each[0][0] for site, each in calls(port, watch).items()}
    kinds = {site: call.site.kind for site, call in seen.items()}
    step = next(iter(seen.values())).diffusion
    frames = 3 if name in ("wan", "cogvideox", "latte", "ltx", "hunyuan") else 1
    size = 8 if name == "unet" else 4
    assert (step.layout.frames, step.layout.height, step.layout.width) == (frames, size, size)
    assert step.index is None and step.branches == ("all",) and step.timestep == nearly(0.5 if name == "flux" else 500)
    wanted = {
        "dit": {"self"}, "unet": {"self", "cross"}, "pixart": {"self", "cross"}, "wan": {"self", "cross"},
        "latte": {"self", "cross"}, "ltx": {"self", "cross"}, "sd3": {"joint"}, "flux": {"joint"},
        "cogvideox": {"joint"}, "hunyuan": {"self", "joint"},
    }[name]  # fmt: skip
    assert set(kinds.values()) == wanted
    for site, call in seen.items():
        if call.site.kind == "joint":
            image = step.layout.image(call.q.shape[2])
            assert image.stop - image.start == step.layout.tokens == call.q.shape[2] - 6
        elif name != "hunyuan":
            assert call.diffusion.axis != "text"
        if name == "latte" and call.site.kind == "self":
            assert call.diffusion.axis == ("time" if "temporal" in site else "space")
    if name == "hunyuan":
        text = {site for site, call in seen.items() if call.site.kind == "self"}
        assert all("refiner" in site and seen[site].diffusion.axis == "text" for site in text)


@pytest.mark.parametrize("name", [name for name in tiny.CONFIGS if name != "latte"])
def test_layers_are_numbered_as_they_run(name):
    """Also the middle of a UNet, which its class defines last; of Latte first the spatial blocks, then the temporal."""
    ran = []

    class Order(AttentionWatch):
        def watch(self, call, out):
            ran.append(call.site.layer)

    with manyheads.use(tiny.tiny(name), Order()):
        tiny.forward(name, tiny.tiny(name))
    assert ran == sorted(ran) and len(set(ran)) > 1


def test_an_exception_leaves_nothing_and_ports_nest():
    model = tiny.tiny("pixart")
    plain, before = tiny.forward("pixart", model), torch.nn.functional.scaled_dot_product_attention
    with pytest.raises(RuntimeError), manyheads.use(model, Mute()):
        model(**{**tiny.inputs("pixart"), "hidden_states": torch.randn(2, 7, 8, 8)})
    assert torch.nn.functional.scaled_dot_product_attention is before
    with manyheads.use(model, Mute(head=0)) as outer:
        one = tiny.forward("pixart", model)
        with manyheads.use(model, Mute(head=1)):
            both = tiny.forward("pixart", model)
        assert torch.equal(tiny.forward("pixart", model), one)
    with manyheads.use(model, Mute(head=0), Mute(head=1)):
        assert torch.equal(tiny.forward("pixart", model), both)
    assert error(both, one) > 1e-4 and torch.equal(tiny.forward("pixart", model), plain) and not outer.stack()


def test_refusals():
    model = tiny.tiny("dit")
    with pytest.raises(UserError, match="never seen"), manyheads.use(model, Mute(layers=(1,))):
        pass
    with pytest.raises(UserError, match="no attention to act on"), manyheads.use(model, Mute(layers=(9,))):
        pass
    with pytest.raises(UserError, match="does not act on the attention"), manyheads.use(model, "snapkv"):
        pass
    with pytest.raises(UserError, match="cannot hold together"), manyheads.use(model, Reference(), Reference()):
        tiny.forward("dit", model)


def test_two_that_attend_at_different_kinds_hold_together():
    """Which kind a site is shows only when it runs; each computes its own, whatever the order."""
    model = tiny.tiny("pixart")
    plain = tiny.forward("pixart", model)

    class Half(Reference):
        def attend(self, call):
            call.state["seen"] = call.site.kind
            return 0.5 * call.attend()

    class Selves(Half):
        kinds = frozenset({"self"})

    class Crosses(Half):
        kinds = frozenset({"cross"})

    made = {}
    for strategies in ((Selves(), Crosses()), (Crosses(), Selves()), (Half(),), (Selves(),)):
        with manyheads.use(model, *strategies) as port:
            made[strategies] = tiny.forward("pixart", model)
        for strategy in strategies:
            kinds = {kept["seen"] for site in port.state(strategy).values() for kept in site.values()}
            assert kinds == set(strategy.kinds) & {"self", "cross"}
    first, second, both, one = made.values()
    assert torch.equal(first, both) and torch.equal(second, both)
    assert error(one, both) > 1e-4 and error(both, plain) > 1e-4


def test_other_attention_in_the_block_and_in_other_threads_is_left_alone():
    model = tiny.tiny("dit")
    plain = tiny.forward("dit", model)
    q = torch.randn(1, 2, 5, 8)
    want = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    found = []

    def other():
        found.append(tiny.forward("dit", tiny.build("dit")))

    class Meanwhile(Mute):
        def patch(self, call, out):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            return super().patch(call, out)

    with manyheads.use(model, Meanwhile()):
        assert torch.equal(torch.nn.functional.scaled_dot_product_attention(q, q, q), want)
        changed = tiny.forward("dit", model)
    assert all(torch.equal(out, plain) for out in found) and error(changed, plain) > 1e-4


@pytest.mark.parametrize("name", ["flux", "wan", "ltx", "hunyuan"])
def test_other_backends(name):
    """A backend that does not end in SDPA is seen as well (FlexAttention stands for all of them)."""
    model = tiny.tiny(name)
    plain = tiny.forward(name, model)
    registry = diffusers.models.attention_dispatch._AttentionBackendRegistry
    held = dict(registry._backends)

    def strange(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        x = torch.einsum("bthd,bshd->bhts", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None:
            x = x.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else x + attn_mask
        return torch.einsum("bhts,bshd->bthd", x.softmax(-1), value)

    name_ = diffusers.models.attention_dispatch.AttentionBackendName.FLEX
    names, limits = registry._supported_arg_names[name_], registry._constraints[name_]
    registry._backends[name_], registry._constraints[name_] = strange, []
    registry._supported_arg_names[name_] = set(strange.__code__.co_varnames[: strange.__code__.co_argcount])
    try:
        with diffusers.models.attention_dispatch.attention_backend("flex"):
            assert_close(tiny.forward(name, model), plain, CLOSE)
            watch = Watch()
            with manyheads.use(model, watch) as port:
                assert_close(tiny.forward(name, model), plain, CLOSE)
            assert len(calls(port, watch)) == len(port_.find_sites(model))
            with manyheads.use(model, Mute()):
                muted = tiny.forward(name, model)
        with manyheads.use(model, Mute()):
            assert_close(muted, tiny.forward(name, model), SAME)
        assert registry._backends[name_] is strange
    finally:
        registry._backends.clear()
        registry._backends.update(held)
        registry._supported_arg_names[name_], registry._constraints[name_] = names, limits


@pytest.mark.parametrize(
    "name", [n if n in ("unet", "flux") else pytest.param(n, marks=pytest.mark.slow) for n in tiny.ALL]
)
def test_compiled_equals_eager(name):
    torch._dynamo.reset()
    model = tiny.build(name)
    with manyheads.use(model, Mute()):
        eager = tiny.forward(name, model)
        fast = torch.compile(model, backend="eager", fullgraph=True)
        assert_close(tiny.forward(name, fast), eager, CLOSE)
    assert error(tiny.forward(name, model), eager) > 1e-5
    torch._dynamo.reset()
