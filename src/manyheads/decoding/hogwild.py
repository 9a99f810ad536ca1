# SPDX-License-Identifier: Apache-2.0
r"""Several workers of one model write at once and read each other's tokens the moment they are written.

Hogwild! Inference: Parallel LLM Generation via Concurrent Attention (arXiv 2504.06261). All workers share the weights
and one cache of blocks: the prompt, what has been finished, and the text that each is at. A worker's own text comes
last in what it sees, so that the others' new tokens move it on: positions are those of its own view at every step,
reached by turning queries and not keys (``writing.BlockCache``). A step feeds one token of every
worker, in one batch; a worker whose paragraph ends reads the heading of its next one with it. By ``layout`` it sees

    contiguous   prompt | texts of the others, each as a whole | own text
    interleaved  prompt | finished paragraphs of all, in the order in which they ended | own paragraph
    combined     prompt | finished paragraphs | unfinished ones of the others | own paragraph

A paragraph ends with a blank line behind the end of a sentence; it moves to what is finished with its keys turned on.
Two workers or more are told of each other, by rules, headings and their first words; about every ``remind`` tokens the
one that begins a paragraph is asked whether it repeats what others do. They write no headings and no end of the text,
and end at ``\boxed{...}`` in a finished paragraph, or with their tokens; then an answer of up to ``finish`` tokens is
drawn out of all texts, read once more as one (as the released code does). Keys and values of a token are as it saw the
world when it was written: reading the whole text again would give others.

The released code has the combined layout, for two; the other layouts are as the paper describes them. Ours beside it:
rules are in words of our own, without worked examples, and stand behind the user's words in place of before them, so
that a prompt that has been read serves as it is; ``told=False``, ``others=False`` and ``answer=vote`` make the
controls: workers that know of no others, that see none, and a majority of their answers.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..attention.shared_block import Block
from ..errors import UserError
from ..writing import BlockCache, DecodingLoop, ModelAccess, Request, Written

__all__ = ["Hogwild"]

NAMES = ("Alice", "Bob", "Carol", "Dave", "Erin", "Frank", "Grace", "Heidi")
_RULES = """

Several assistants work on this at the same time: {names}. Each writes its own thoughts and sees at once what the \
others write. Paragraphs that are finished stand under "### Past steps", each as **name [number]:**. Those that others \
are still writing stand under "### Work in progress (others)" and grow while you write; the last of their words stand \
before <...>. What you write yourself stands under "### Work in progress (own)".

- Divide the work, say what you will do next, and do what nobody else is doing.
- Look at what the others write. Correct their mistakes, and answer when you are asked.
- When you see that another does or did the same as you, stop in the middle and take something else.
- Whoever has the final answer writes it as \\boxed{{answer}}."""
_HISTORY = "### Past steps\n\n"
_OTHERS = "### Work in progress (others)\n\n"
_OWN = "<...>\n\n### Work in progress (own)\n\n"
_LEAD = "I am {name}. We can divide the work like this: "
_JOIN = "I am {name}. "
_REMINDER = "Quick check: is somebody else doing what I do? (yes/no): "
_FINISHER = "\n\nThere is no time left, and one answer has to be given now. From all of this, the final answer is"
_ENDED = re.compile(r"[.?!…。？！।]\s*\n\s*\n\s*$")
_TITLES = 128  # tokens at most of headings and first words, beside the rules
_TAIL = 16  # tokens in which the end of a paragraph shows
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


@dataclass(slots=True)
class _Worker:
    """A worker: what it is to read next, its paragraph, and all that it wrote."""

    name: str
    fed: list[int]
    block: Block = field(default_factory=Block)
    step: list[int] = field(default_factory=list)
    text: list[int] = field(default_factory=list)
    number: int = 1
    ended: bool = False


@dataclass(frozen=True, kw_only=True)
class Hogwild(DecodingLoop):
    """Workers that write side by side and see each other's tokens; ``max_new_tokens`` are of each, answer included."""

    workers: int = field(default=2, metadata={"help": "how many write at once, 1 to 8"})
    layout: Literal["contiguous", "interleaved", "combined"] = field(
        default="combined", metadata={"help": "what of the others stands where: contiguous, interleaved or combined"}
    )
    remind: int = field(
        default=256, metadata={"help": "tokens of all between two questions of redundant work; 0: none"}
    )
    finish: int = field(default=16, metadata={"help": "tokens of the answer at the end, half of all at most"})
    temperature: float = field(default=0.0, metadata={"help": "of what is drawn; 0 takes the likeliest token"})
    same_step: bool = field(default=True, metadata={"help": "others' tokens of the same step are seen, too"})
    told: bool = field(default=True, metadata={"help": "workers are told of each other; false is a control"})
    others: bool = field(default=True, metadata={"help": "workers see each other; false is a control"})
    answer: Literal["joint", "vote"] = field(
        default="joint", metadata={"help": "out of all texts, or the majority of an answer out of each (vote)"}
    )

    def __post_init__(self) -> None:
        if not 1 <= self.workers <= len(NAMES):
            raise UserError(f"workers={self.workers}: 1 to {len(NAMES)} can write at once")
        if self.temperature < 0 or self.remind < 0 or self.finish < 1:
            raise UserError(f"{self.spec}: temperature and remind are not negative, finish is at least 1")
        if self.layout not in ("contiguous", "interleaved", "combined") or self.answer not in ("joint", "vote"):
            raise UserError(f"{self.spec}: layout is contiguous, interleaved or combined, answer is joint or vote")

    def write(self, request: Request, access: ModelAccess) -> Written:
        told = self.told and self.workers > 1
        if request.given:
            raise UserError(f"{self.spec} reads blocks of words alone, and this prompt has an image: leave it away")
        if told and request.tokenizer is None:
            raise UserError(f"{self.spec} tells its workers of each other in words: give a tokenizer, or told=false")
        with access.blocks() as blocks, torch.inference_mode():
            blocks.check(request.ids[0].tolist())
            return _Room(self, request, blocks, told, access.max_positions).write()


class _Room:
    """What the workers of one text share."""

    def __init__(
        self, strategy: Hogwild, request: Request, blocks: BlockCache, told: bool, longest: int | None
    ) -> None:
        self.strategy, self.request, self.blocks, self.told = strategy, request, blocks, told
        self.generator = request.generator()
        ids: list[int] = request.ids[0].tolist()
        kept, self.rules = _asked(request.tokenizer, ids, strategy.workers) if told else (len(ids) - 1, [])
        limit = longest or 2**40
        if (most := len(ids) + len(self.rules) + strategy.workers * request.most + _TITLES) > limit:
            raise UserError(f"{strategy.spec} may come to {most} positions, and the model has {limit}: write less")
        self.finish = 0
        if strategy.workers > 1 and request.tokenizer is not None:
            self.finish = max(1, min(strategy.finish, request.most // 2))
        self.last = ids[kept:]  # read by every worker that is told nothing
        self.head = self._head(ids[:kept])
        self.common, self.titles = Block(), (Block(), Block())
        self.past: list[int] = []
        self.since = 0
        self.workers = [_Worker(name, list(self.last)) for name in NAMES[: strategy.workers]]
        self.forbidden = request.ends
        if told:
            self.forbidden |= {self._ids(text)[0] for text in ("#", "##", "###", " #", " ##", " ###")}
            blocks.read_long([self.head, self.common], self.rules)
            if strategy.layout == "combined":
                for title, text in zip(self.titles, (_OTHERS, _OWN), strict=True):
                    blocks.read([([self.head, self.common, title], self._ids(text))])
            for worker in self.workers:
                first = worker is self.workers[0]
                worker.fed = self._ids(_heading(worker.name, 1) + (_LEAD if first else _JOIN).format(name=worker.name))
                worker.step = list(worker.fed)

    def _head(self, ids: list[int]) -> Block:
        block = self.blocks.of(self.request.cache, len(ids))
        if block is None:  # windows have let go of what comes before the rules
            block = Block()
            self.blocks.read_long([block], ids)
        return block

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.request.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def view(self, worker: _Worker) -> list[Block]:
        """What a worker sees, its own text last."""
        layout = self.strategy.layout
        seen = layout != "interleaved" and self.strategy.others
        others = [each.block for each in self.workers if each is not worker] if seen else []
        return [self.head, self.common, self.titles[0], *others, self.titles[1], worker.block]

    def write(self) -> Written:
        """All of it."""
        request, boxed, steps = self.request, None, 0
        while steps < request.most - self.finish and boxed is None and not all(worker.ended for worker in self.workers):
            boxed = self._step()
            steps += 1
        texts = {worker.name: worker.text for worker in self.workers}
        notes: dict[str, Any] = {"steps": steps}
        if request.tokenizer is not None and len(texts) > 1:
            notes["texts"] = {name: str(request.tokenizer.decode(ids)) for name, ids in texts.items()}
        if not self.finish:
            tokens = self.workers[0].text
        elif boxed is not None:
            tokens = self._ids(boxed)
        else:
            tokens, notes["answers"] = self._answer()
        held = [self.head, self.common, *self.titles, *(worker.block for worker in self.workers)]
        return Written(tokens, self.blocks.forwards, notes, held=self.blocks.nbytes(*held))

    def _step(self) -> str | None:
        """One token of every worker that goes on; the final answer, where one wrote it."""
        going = [worker for worker in self.workers if not worker.ended]
        rows = [(self.view(worker), worker.fed) for worker in going]
        logits = self.blocks.read(rows, same_step=self.strategy.same_step).float()
        self.since += sum(len(worker.fed) for worker in going)
        if self.told:
            logits[:, list(self.forbidden)] = -torch.inf
        boxed = None
        for worker, token in zip(going, self._chosen(logits), strict=True):
            worker.fed = [token]
            if token in self.request.ends:
                worker.ended = True
                continue
            worker.step.append(token)
            worker.text.append(token)
            if self.told and _ENDED.search(self.request.tokenizer.decode(worker.step[-_TAIL:])):
                found = _BOXED.findall(self.request.tokenizer.decode(worker.step))
                boxed = found[-1] if found and boxed is None else boxed
                self._next(worker)
        return boxed

    def _chosen(self, logits: Tensor) -> list[int]:
        if not self.strategy.temperature:
            likeliest: list[int] = logits.argmax(-1).tolist()
            return likeliest
        shares = (logits / self.strategy.temperature).softmax(-1)
        drawn: list[int] = torch.multinomial(shares, 1, generator=self.generator)[:, 0].tolist()
        return drawn

    def _next(self, worker: _Worker) -> None:
        """A worker's paragraph is finished: it joins the others', and the next one begins with its heading."""
        worker.number += 1
        heading = _heading(worker.name, worker.number)
        if self.strategy.remind and self.since > self.strategy.remind:
            heading, self.since = heading + _REMINDER, 0
        if self.strategy.layout != "contiguous" and self.strategy.others:
            self.blocks.move(worker.block, self.common)  # but the last token, which is read with what follows
            self.past += worker.step
            worker.step = []
        more = self._ids(heading)
        worker.fed += more
        worker.step += more
        worker.text += more

    def _answer(self) -> tuple[list[int], list[str]]:
        """Tokens of the answer that counts, and every answer."""
        end, texts = self._ids(_FINISHER), [worker.step if self.told else worker.text for worker in self.workers]
        begun = [*self.rules, *self.past] if self.told else self.last
        if self.strategy.answer == "vote":
            tails = [[*begun, *text, *end] for text in texts]
        else:
            between = self._ids("<...>\n\n" if self.told else "\n\n")
            titled = self._ids(_OTHERS) if self.told and self.strategy.layout == "combined" else []
            tails = [[*begun, *titled, *(token for text in texts for token in [*text, *between]), *end]]
        made = _continued(self.blocks, self.head, tails, self.finish, self.request.ends)
        said = [str(self.request.tokenizer.decode(tokens, skip_special_tokens=True)).strip() for tokens in made]
        most = Counter(said).most_common(1)[0][0]  # of equals the first
        return made[said.index(most)], said


def _continued(
    blocks: BlockCache, head: Block, tails: Sequence[list[int]], most: int, ends: frozenset[int]
) -> list[list[int]]:
    """The likeliest tokens, up to ``most``, after each tail behind what all begin with."""
    own = [Block() for _ in tails]
    logits = torch.stack([blocks.read_long([head, block], tail) for block, tail in zip(own, tails, strict=True)])
    made: list[list[int]] = [[] for _ in tails]
    going = list(range(len(tails)))
    for _ in range(most):
        chosen = dict(zip(going, logits.argmax(-1).tolist(), strict=True))
        going = [row for row in going if chosen[row] not in ends]
        for row in going:
            made[row].append(chosen[row])
        if not going or len(made[going[0]]) == most:
            break
        logits = blocks.read([([head, own[row]], [chosen[row]]) for row in going])
    return made


def _heading(name: str, number: int) -> str:
    """What a paragraph begins with."""
    return f"**{name} [{number}]:** "


def _asked(tokenizer: Any, ids: list[int], workers: int) -> tuple[int, list[int]]:
    """How many tokens of the prompt stand before the rules, and the rules with all that follows them.

    In a chat template the rules end the user's turn, and the model's begins behind them; else they follow the prompt.
    """

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    names = ", ".join(NAMES[: workers - 1]) + f" and {NAMES[workers - 1]}"
    rules, close = _RULES.format(names=names), list[int]()
    if getattr(tokenizer, "chat_template", None):
        mark = "QUESTION"
        messages = [{"role": "user", "content": mark}]
        said = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        close = encode(said.rpartition(mark)[2])
    if not close or ids[-len(close) :] != close:
        return len(ids) - 1, [ids[-1], *encode(rules + "\n\n"), *encode(_HISTORY)]
    return len(ids) - len(close), [*encode(rules), *close, *encode(_HISTORY)]
