# SPDX-License-Identifier: Apache-2.0
"""A model that says what it is told to, with a chat template: replies are known, whatever the cache holds."""

import torch
from transformers import LlamaForCausalLM

from manyheads.data.texts import Text
from manyheads.experiment import CausalLM
from manyheads.experiment.arms import Arm
from manyheads.experiment.task import RunContext
from tiny.compare import make_tokenizer, tiny

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>\n{{ message['content'] }}</{{ message['role'] }}>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


def village(number):
    """A name in small letters, another one for every number."""
    return "".join("ba do ki lu me".split()[number // 5**i % 5] for i in range(4))


PROSE = [
    Text(
        f"story {k}",
        " ".join(
            f"On day {i} the {noun} of {village(48 * k + i)} was seen near the {place}, and nobody said why."
            for i, (noun, place) in enumerate(
                (noun, place)
                for noun in "miller baker smith tailor weaver hunter".split()
                for place in "river bridge tower market forest church harbour meadow".split()
            )
        ),
    )
    for k in range(3)
]


def tokenizer(chat=True):
    made = make_tokenizer(PROSE)
    made.chat_template = TEMPLATE if chat else None
    return made


class Scripted(LlamaForCausalLM):
    """Goes on with ``script`` from the end of what was asked, then ends; attention and cache run as ever.

    ``asked`` gets the tokens of every forward, in their order.
    """

    script = ()

    def forward(self, input_ids=None, **kwargs):
        out = super().forward(input_ids=input_ids, **kwargs)
        self.asked.append(input_ids[0].tolist())
        if input_ids.shape[1] > 1:
            self.left = list(self.script)
        out.logits = torch.zeros_like(out.logits)
        out.logits[:, -1, self.left.pop(0) if self.left else 0] = 1.0
        return out


def scripted(script=()):
    model = tiny()
    model.__class__ = Scripted
    model.script, model.asked, model.left = list(script), [], []
    return model


def context(model, reader, *arms, texts=PROSE):
    """A run of one subject in this process."""
    return RunContext(CausalLM("tiny", model, reader), (Arm("full"), *arms), data={"texts": texts})


def rows(task, run, sample=0):
    """Rows of one unit of a task."""
    return task.measure(run, task.units(run)[sample])
