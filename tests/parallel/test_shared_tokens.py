# SPDX-License-Identifier: Apache-2.0
"""Decoders whose tokens processes share: loss, logits, gradients and what is written are those of one process."""

import pytest
import torch

import manyheads
from manyheads import UserError
from manyheads.parallel._runs import causal_runs

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

from parallel import shared_worker as worker

EXACT, FAR = 1e-10, 1e-3  # relative to the largest entry: float64 through a tiny model and back; what is wrong
WAYS = {
    2: ("loongtrain", "loongtrain:heads=2"),
    4: ("loongtrain:heads=2", "loongtrain:window=2", "loongtrain:heads=4", "loongtrain:heads=2,place=context"),
}
KINDS = {2: ("llama", "gemma3", "mistral"), 4: ("smollm2", "qwen3", "gemma3")}


@pytest.mark.parametrize(("size", "kind"), [(size, kind) for size, kinds in KINDS.items() for kind in kinds])
def test_training_is_that_of_one_process(processes, size, kind):
    """Batches of two with an odd number of tokens: plain, texts in a row, padding; in each process the same."""
    tokens = 0
    for found in processes(size).run(worker.training, kind, WAYS[size]):
        assert found.pop("off") is True
        tokens += found["plain"]["tokens"]
        for which, one in found.items():
            wrong = {name: e for name, e in one.items() if name != "tokens" and not e <= EXACT}
            assert not wrong, which
    assert tokens == worker.SIZE


def test_controls(processes):
    for found in processes(2).run(worker.controls):
        right = found["LoongTrain"]
        assert max(right["loss"], right["logits"], right["gradients"]) <= EXACT
        for name in ("Mislabelled", "Misplaced"):
            assert min(found[name][what] for what in ("logits", "gradients")) > FAR, name
        assert found["apart"]["gradients"] > FAR and found["apart"]["logits"] <= EXACT
        assert found["unmerged"]["logits"] > FAR


@pytest.mark.parametrize(("kind", "spec", "padded"), [
    ("llama", "loongtrain:heads=2", True), ("gemma3", "loongtrain", False), ("gemma3", "loongtrain:heads=2", True),
])  # fmt: skip
def test_tokens_are_written_that_one_process_writes(processes, kind, spec, padded):
    """Each process holds keys of its part of the prompt; windows let go of the first of them meanwhile."""
    for found in processes(4).run(worker.generated, kind, spec, padded):
        assert found["same"] and found["logits"] <= EXACT


def test_sinks(processes):
    for found in processes(2).run(worker.sinks):
        assert max(found["loss"], found["logits"], found["gradients"]) <= EXACT and found["without"] > FAR


def test_a_mesh_of_batches_and_tokens(processes):
    for found in processes(4).run(worker.meshed):
        assert max(found["loss"], found["logits"], found["gradients"]) <= EXACT
        assert "along one dimension of a mesh" in found["refused"] and "mesh['sequence']" in found["refused"]


def test_what_is_refused_is_said_in_a_line(processes):
    says = {
        "layers": "leave layers away", "watcher": "loongtrain and strategies", "nested": "loongtrain and strategies",
        "cache": "loongtrain and snapkv", "heads": "do not divide into 3", "mask": "attention_mask as [B, S]",
        "weights": "leave output_attentions away", "filled": "logits_to_keep=1", "dropout": "with dropout",
        "softcap": "with softcap", "encoder": "finds no attention|not causal", "alibi": "AttentionInterface",
        "strange": "how tokens share token_type_ids", "kept": "without a loss", "short": "cannot be shared by 2",
        "own": "a function of your own|an attention function of your own",
    }  # fmt: skip
    for found in processes(2).run(worker.refused):
        assert found.pop("after") is None and found.pop("kept its name")
        for name, words in says.items():
            line = found.pop(name)
            assert line is not None and "\n" not in line, name
            assert any(some in line.lower() for some in words.lower().split("|")), (name, line)
        assert not found


def test_without_processes():
    with pytest.raises(UserError, match="start with torchrun"):
        manyheads.use(torch.nn.Linear(1, 1), "loongtrain")
    with pytest.raises(UserError, match="no strategy does"):
        manyheads.use(torch.nn.Linear(1, 1), "snapkv", mesh=object())


def test_masks_of_runs():
    """Against the rule, token by token: texts in a row, padding anywhere, windows shorter and longer than runs."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.arange(11)
    q, k = tokens[:, None], tokens[None]
    for _ in range(60):
        ends = torch.randint(0, 12, (6,), generator=generator).sort().values.tolist()
        runs = [(a, b) for a, b in zip(ends[::2], ends[1::2], strict=True) if a < b]
        run = torch.full((11,), -1)
        for i, (a, b) in enumerate(runs):
            run[a:b] = i
        for before in (None, 0, 2, 5, 20):
            seen = (k <= q) & (run[k] >= 0) & (q - k <= (11 if before is None else before))
            assert torch.equal(causal_runs(11, runs, before, apart=False).dense(tokens, tokens), seen)
            assert torch.equal(causal_runs(11, runs, before).dense(tokens, tokens), seen & (run[q] == run[k]))


def test_torch_fails_on_a_cpu(processes):
    """torch 2.13 has no strategy for the attention of its CPU; one that has it may take a test of speed as well."""
    for found in processes(4).run(worker.beside_torch):
        assert found["a CPU"] is not None


def test_torch_balances_causal_attention_alone(processes):
    """Another mask has to be given up or left unbalanced; ours has layouts for any."""
    for found in processes(4).run(worker.beside_torch):
        assert "Load balancing requires `is_causal=True`" in found["balanced, not causal"]


def test_torch_shares_no_heads(processes):
    """It moves keys round or gathers them, along one dimension: neither Ulysses nor a grid."""
    for found in processes(4).run(worker.beside_torch):
        assert found["moves"] == ["ALL_GATHER", "ALL_TO_ALL"] and "single dimension" in found["a grid"]
