# SPDX-License-Identifier: Apache-2.0
"""Tiny masked diffusion language models, and a naive decoder of them in float64."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from manyheads import parse
from manyheads.decoding._blocks import shares
from manyheads.integrations.masked_diffusion import TokenDenoiser, predicts_next

MASK, VOCAB = 59, 60
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3, "max_position_embeddings": 256, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
PROMPT = torch.tensor([[5, 7, 9, 11, 3]])


def model(kind=LlamaForCausalLM, config=LlamaConfig, **changes):
    torch.manual_seed(1)
    return kind(config(**SIZES, **{"is_causal": False, "mask_token_id": MASK, **changes})).double().eval()


def written(net, spec, most=24, prompt=PROMPT, seed=0, ends=()):
    return parse(spec).write_rows(TokenDenoiser(net), prompt, most, seed=seed, ends=ends)


def tokens(net, spec, **more):
    return [row.tokens for row in written(net, spec, **more)]


def naive(net, prompt, most, block, steps, kept, end=None):
    """One row, lists and loops: the whole sequence is read each time, what is dropped hidden by the mask."""
    row, length = prompt[0].tolist() + [MASK] * most, prompt.shape[1] + most
    shift, read, forwards = predicts_next(net.config), 0, 0
    for number, start in enumerate(range(prompt.shape[1], length, block)):
        stop = min(start + block, length)
        seen = [*range(stop), *(stop + j for j in kept(length - stop, number))]
        see = torch.zeros(length, dtype=torch.bool)
        see[seen] = True
        for count in shares(stop - start, steps):
            with torch.no_grad():
                logits = net(torch.tensor([row]), attention_mask=see.expand(1, 1, length, length)).logits[0].double()
            sure = []
            for i in range(start, stop):
                if row[i] == MASK:
                    p = logits[i - shift].clone()
                    p[MASK] = -torch.inf
                    p = p.softmax(0)
                    sure.append((-float(p.max()), i, int(p.argmax())))
            for _, i, token in sorted(sure)[:count]:
                row[i] = token
            read, forwards = read + len(seen), forwards + 1
        if end is not None and end in row[start:stop]:
            row = row[:stop]
            break
    return row[prompt.shape[1] :], forwards, read
