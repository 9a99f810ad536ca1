# SPDX-License-Identifier: Apache-2.0
"""What processes do that share the tokens of a model: each function runs in all of them, and gives errors by name."""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import init_device_mesh
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import manyheads
from manyheads import UserError
from manyheads.integrations import shared_decoding
from manyheads.parallel import ContextParallel, _context, keep_attention, sum_gradients
from manyheads.parallel.loongtrain import LoongTrain, shard_parameters
from manyheads.tasks.parallel._held import Held
from oracles.strategies import Watch

VOCAB, SIZE = 61, 23
BASE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
CONFIGS = {
    "llama": lambda: LlamaConfig(**BASE),
    "smollm2": lambda: LlamaConfig(**BASE, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**BASE),
    "gemma3": lambda: Gemma3TextConfig(**BASE, sliding_window=5, layer_types=LAYERS),
    "mistral": lambda: MistralConfig(**BASE, sliding_window=6),
}


def build(kind, **more):
    """A model in float64 whose norms do not all weigh alike."""
    torch.manual_seed(0)
    config = CONFIGS[kind]() if isinstance(kind, str) else kind
    model = AutoModelForCausalLM.from_config(config, **more).double().eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p) if p.ndim == 1 else 0
    return model


def warm(world):
    """Import all that is imported later."""
    for kind in CONFIGS:
        build(kind)


@contextmanager
def wide():
    """Norms and losses of transformers stay in float64, which they leave for float32 whatever the model's dtype is."""
    narrow, torch.Tensor.float = torch.Tensor.float, torch.Tensor.double
    try:
        yield
    finally:
        torch.Tensor.float = narrow


def drawn(size=SIZE, seed=1):
    return torch.randint(3, VOCAB, (2, size), generator=torch.Generator().manual_seed(seed))


def batches(size=SIZE):
    """Inputs by name: a batch of two, texts in a row (other ones in each row), padding left and right."""
    ids = drawn(size)
    labels = ids.clone()
    labels[0, :3] = -100
    places = torch.stack([torch.cat([torch.arange(n), torch.arange(size - n)]) for n in (9, 15)])
    mask = torch.ones_like(ids)
    mask[0, : size // 5], mask[1, -4:] = 0, 0
    padded = labels.masked_fill(mask == 0, -100)
    padded[0, size // 5] = -100  # what padding predicts
    return {
        "plain": {"input_ids": ids, "labels": labels},
        "packed": {"input_ids": ids, "labels": labels, "position_ids": places, "use_cache": False},
        "restarted, with a cache": {"input_ids": ids, "labels": labels, "position_ids": places},
        "padded": {"input_ids": ids, "labels": padded, "attention_mask": mask},
    }


def trained(model, given):
    """Loss, logits and gradients of one process."""
    out = model(**given)
    out.loss.backward()
    return out.loss.detach(), out.logits.detach(), taken(model)


def taken(model):
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return grads


def apart(got, want):
    """Largest differences, of which those of gradients are in units of the largest gradient."""
    return float((got - want).abs().max() / want.abs().max())


def differences(model, given, strategy, mesh=None, add=True):
    """Of loss, logits and gradients from those of one process."""
    loss, logits, grads = trained(model, given)
    with manyheads.use(model, strategy, mesh=mesh):
        out = model(**given)
        out.loss.backward()
        if add:
            sum_gradients(model, None if mesh is None else mesh.get_group())
    found = out.shared.unshard(out.logits, 1)
    if "attention_mask" in given:  # nobody reads what padding says
        real = given["attention_mask"].bool()
        found, logits = found[real], logits[real]
    mine = taken(model)
    return {
        "loss": apart(out.loss.detach(), loss), "logits": apart(found, logits),
        "gradients": max(apart(mine[name], grads[name]) for name in grads), "tokens": out.logits.shape[1],
    }  # fmt: skip


def training(world, kind, specs):
    found = {}
    with wide():
        model = build(kind)
        before, name = model(input_ids=drawn()).logits, model.config._attn_implementation
        for i, (which, given) in enumerate(batches().items()):
            found[which] = differences(model, given, specs[i % len(specs)])
        after = model(input_ids=drawn()).logits
    found["off"] = torch.equal(before, after) and model.config._attn_implementation == name
    return found


@dataclass(frozen=True, kw_only=True)
class Mislabelled(LoongTrain):
    """Takes the tokens of the next process for its own."""

    def share(self, world, mask, layout=None):
        made = super().share(world, mask, layout)
        made.rows = made.layout.rows[(world.rank + 1) % world.size]
        return made


class FromZero(ContextParallel):
    """Counts positions from 0 in each process."""

    def shard(self, x, dim):
        mine = super().shard(x, dim)
        return torch.arange(mine.shape[1])[None] if x.shape[0] == 1 and torch.equal(x[0], SEQUENCE) else mine


SEQUENCE = torch.arange(24)


@dataclass(frozen=True, kw_only=True)
class Misplaced(LoongTrain):
    """Gives each process's tokens positions from 0."""

    def share(self, world, mask, layout=None):
        return FromZero(world, mask, layout or "zigzag", "ring", self.heads)


def controls(world):
    """What is wrong is found: tokens of others, positions from 0, gradients that nobody adds, parts nobody merges."""
    with wide():
        model, given = build("llama"), batches(24)["plain"]
        found = {type(s).__name__: differences(model, given, s) for s in (LoongTrain(), Mislabelled(), Misplaced())}
        found["apart"] = differences(model, given, LoongTrain(), add=False)
        kept, shared_decoding.merge = (
            shared_decoding.merge,
            lambda one, other: one if one[1].isfinite().all() else other,
        )
        try:
            found["unmerged"] = generated(world, "llama", "loongtrain", False)
        finally:
            shared_decoding.merge = kept
    return found


def generated(world, kind, spec, padded):
    """Whether the tokens are those of one process, and how far the logits are apart."""
    ids = drawn(17)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0 if padded else 1
    model = build(kind)
    asked = {
        "input_ids": ids, "attention_mask": mask, "max_new_tokens": 9, "do_sample": False, "eos_token_id": None,
        "return_dict_in_generate": True, "output_logits": True,
    }  # fmt: skip
    want = model.generate(**asked)
    with manyheads.use(model, spec):
        got = model.generate(**asked)
    return {
        "same": torch.equal(got.sequences, want.sequences),
        "logits": apart(torch.stack(got.logits), torch.stack(want.logits)),
    }


EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}  # what knows sinks, and float64


def sinks(world):
    """gpt-oss: a learned logit more in each softmax."""
    from transformers import GptOssConfig

    config = GptOssConfig(**BASE, layer_types=LAYERS, sliding_window=5, num_local_experts=2, num_experts_per_tok=1)
    with wide():
        model = build(config, **EAGER)
        for name, p in model.named_parameters():
            p.data += torch.randn_like(p) if name.endswith("sinks") else 0
        found = differences(model, batches()["plain"], "loongtrain:heads=2")
        for name, p in model.named_parameters():
            p.data.fill_(-1e9) if name.endswith("sinks") else None
        far = differences_between(model, config)
    return found | {"without": far}


def differences_between(model, config):
    """How much the sinks matter."""
    given = batches()["plain"]
    other = build(config, **EAGER)
    for name, p in other.named_parameters():
        p.data += torch.randn_like(p) if name.endswith("sinks") else 0
    return apart(model(**given).logits, other(**given).logits)


def meshed(world):
    """Two batches, each shared by a row of processes of a mesh."""
    mesh = init_device_mesh("cpu", (2, world.size // 2), mesh_dim_names=("data", "sequence"))
    mine = {"input_ids": drawn(seed=5 + mesh["data"].get_local_rank())}
    mine["labels"] = mine["input_ids"]
    model = build("llama")
    with wide():
        found = differences(model, mine, "loongtrain:heads=2", mesh["sequence"])
    return found | {"refused": said(lambda: manyheads.use(model, "loongtrain", mesh=mesh))}


def stepped(world):
    """Two steps of AdamW with all parameters sharded, against one process with both batches."""
    mesh = init_device_mesh("cpu", (2, world.size // 2), mesh_dim_names=("data", "sequence"))
    texts = [drawn(24, seed=5 + i) for i in range(2)]
    found = {}
    with wide():
        for name in ("one", "sharded", "alone"):
            model = build("llama")
            if name != "one":
                shard_parameters(model, mesh["data", "sequence"])
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            mine = texts if name == "one" else [texts[mesh["data"].get_local_rank()]]
            for _ in range(2):
                if name == "sharded":
                    with manyheads.use(model, "loongtrain:heads=2", mesh=mesh["sequence"]):
                        model(input_ids=mine[0], labels=mine[0]).loss.backward()
                else:  # the control: each process has all tokens of its batch, so that gradients are added twice
                    (sum(model(input_ids=x, labels=x).loss for x in mine) / len(mine)).backward()
                optimizer.step()
                optimizer.zero_grad()
            whole = {k: p.full_tensor() if name != "one" else p for k, p in model.state_dict().items()}
            found[name] = {k: p.clone() for k, p in whole.items()}
            held = sum((p.to_local() if name != "one" else p).numel() for p in model.parameters())
            found[name, "held"] = held
            if name == "sharded":
                found["added"] = said(lambda model=model: sum_gradients(model))
    one = found["one"]
    return {
        "sharded": max(apart(found["sharded"][k], one[k]) for k in one), "held": found["sharded", "held"],
        "whole": found["one", "held"], "wrong": max(apart(found["alone"][k], one[k]) for k in one),
        "added": found["added"],
    }  # fmt: skip


def checkpointed(world, spec):
    """Calls of attention in a step, bytes held after the forward, and gradients, for each kind of checkpointing."""
    found, real = {}, _context.attend
    given = {"input_ids": drawn(48), "labels": drawn(48)}
    kinds = {"none": None, "full": {}, "kept": {"context_fn": keep_attention}}
    for name, more in kinds.items():
        model, calls = build("llama").train(), []
        if more is not None:
            model.gradient_checkpointing_enable({"use_reentrant": False, **more})
        _context.attend = lambda *args, calls=calls: (calls.append(1), real(*args))[1]
        try:
            with manyheads.use(model, spec), Held(*model.parameters()) as held:
                loss = model(**given).loss
                forward, left = len(calls), held.nbytes
                loss.backward()
        finally:
            _context.attend = real
        grads = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
        found[name] = {"forward": forward, "calls": len(calls), "held": left, "grads": grads}
    return {
        name: {**one, "grads": torch.equal(one["grads"], found["none"]["grads"])} for name, one in found.items()
    }  # fmt: skip


def said(action):
    """What an action is refused with, None where it is not."""
    try:
        action()
    except UserError as error:
        return str(error)
    return None


OWN = "own_for_processes"


def sdpa_with_a_name(*args, **kwargs):
    return sdpa_attention_forward(*args, **kwargs)


def refused(world):
    """What cannot be shared, and what is said of it."""
    from transformers import BertConfig, BertModel, BloomConfig, BloomModel, Gemma2Config

    llama, ids = build("llama"), drawn()

    def run(model=llama, spec="loongtrain", *others, **given):
        def action():
            with manyheads.use(model, spec, *others):
                model(**{"input_ids": ids, **given})

        return said(action)

    dropping = build(LlamaConfig(**BASE, attention_dropout=0.5)).train()
    capped = build(Gemma2Config(**BASE, layer_types=LAYERS), attn_implementation="eager")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    cache = llama(input_ids=ids).past_key_values
    AttentionInterface.register(OWN, sdpa_with_a_name)
    own = build("llama")
    own.set_attn_implementation(OWN)
    found = {
        "layers": run(llama, "loongtrain:layers=0-1"), "watcher": run(llama, "loongtrain", Watch()),
        "cache": run(llama, "snapkv:budget=0.5", "loongtrain"), "heads": run(llama, "loongtrain:heads=3"),
        "mask": run(attention_mask=torch.ones(2, 1, SIZE, SIZE, dtype=torch.bool)),
        "weights": run(output_attentions=True), "filled": run(past_key_values=cache), "dropout": run(dropping),
        "softcap": run(capped), "encoder": run(BertModel(BertConfig(**small, vocab_size=VOCAB))),
        "alibi": run(BloomModel(BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=VOCAB))),
        "strange": run(token_type_ids=torch.zeros_like(ids)), "kept": run(labels=ids, logits_to_keep=2),
        "short": run(input_ids=ids[:, :1]), "own": run(own),
    }  # fmt: skip

    def nested():
        with manyheads.use(llama, "loongtrain"), manyheads.use(llama, Watch()):
            pass

    kept = own.config._attn_implementation == OWN
    return found | {"nested": said(nested), "after": run(), "kept its name": kept}


def beside_torch(world):
    """What torch's own context_parallel says to the same attention on this device, by what it is asked for."""
    from torch.distributed.tensor.experimental import _attention, context_parallel

    mesh = init_device_mesh("cpu", (world.size // 2, 2), mesh_dim_names=("heads", "context"))
    q, k, v = (torch.randn(1, 4, 16, 8) for _ in range(3))

    def shared():
        line = mesh["context"]
        own = [x.clone() for x in (q, k, v)]
        with context_parallel(line, buffers=own, buffer_seq_dims=[2, 2, 2]):
            torch.nn.functional.scaled_dot_product_attention(*own, is_causal=True)

    def ring(group, causal):
        _attention._templated_ring_attention(group, 2, None, q, k, v, is_causal=causal)

    def answer(action, *given):
        try:
            action(*given)
        except Exception as error:  # whatever it is
            return f"{type(error).__name__}: {error}"
        return None

    return {
        "a CPU": answer(shared), "balanced, not causal": answer(ring, mesh["context"].get_group(), False),
        "a grid": answer(ring, mesh, True), "moves": sorted(one.name for one in _attention._RotateMethod),
    }  # fmt: skip
