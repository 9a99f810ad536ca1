# SPDX-License-Identifier: Apache-2.0
"""Train a language model on problems whose answers can be checked, with the credit of ``reasoning_rhythm``.

    python -m manyheads.recipes.reasoning_rhythm --model MODEL --out FOLDER [--problems FILE] [--credit coupled]

It is GRPO (:mod:`manyheads.training.policy_gradient`): a response is worth 1 if the last number in it is the result,
and the tokens that the lens's credit names have more of a positive advantage. Other credits are for comparison:
``uniform``, as many tokens ``random`` or of the greatest ``entropy``. ``FILE`` has a JSON object a line, ``question``
and ``answer``, whose last number is the result; without one there are sums of three numbers. A group whose responses
are all right or all wrong teaches nothing: ``--warm 0.4`` imitates the worked answers first, until so many responses
are right. The folder is a plain checkpoint. The same command goes on with a training that was cut off.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

import manyheads
from manyheads.data.word_problems import last_number, worked_sum
from manyheads.errors import UserError
from manyheads.experiment import CausalLM
from manyheads.lenses.reasoning_rhythm import ReasoningRhythm, peaks, weigh
from manyheads.models.chat import rendered
from manyheads.progress import time_left
from manyheads.training import Checkpoint, TrainState, decay, fit, next_token_loss, optimizers_of
from manyheads.training.checkpoint import newest
from manyheads.training.policy_gradient import Credit, Prompt, Rollout, ends_of, sample, train_policy

__all__ = [
    "Problem", "Way", "drawn_sums", "imitation", "problems_in", "prompts_of", "rhythm_credit", "right", "warm_up",
]  # fmt: skip

Way = Literal["coupled", "local", "global", "entropy", "random", "uniform"]
LENS = "reasoning_rhythm:middle=5"
_LOOK = 10  # steps of imitation between two looks at how many responses are right
_ROWS = 256  # responses drawn at once where nothing is trained


@dataclass(frozen=True)
class Problem:
    """A question, its worked answer, and the whole number that it comes to."""

    question: str
    answer: str
    result: int


def drawn_sums(count: int, rng: np.random.Generator, terms: int = 3, largest: int = 99) -> list[Problem]:
    """Sums of ``terms`` numbers up to ``largest``, of which later ones may be taken away where enough is there."""
    made = []
    for _ in range(count):
        numbers = [int(n) for n in rng.integers(1, largest + 1, terms)]
        for i in range(1, terms):
            if rng.random() < 0.5 and sum(numbers[:i]) >= numbers[i]:
                numbers[i] = -numbers[i]
        made.append(Problem(*worked_sum(numbers), sum(numbers)))
    return made


def problems_in(path: Path) -> list[Problem]:
    """Problems of a file of JSON lines.

    Raises:
        UserError: it cannot be read, or an answer names no number.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        found = [(row["question"], row["answer"], last_number(row["answer"])) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} has no problems ({error}); give JSON lines with question and answer") from error
    if not found or any(result is None for _, _, result in found):
        raise UserError(f"{path} has {'an answer without a whole number' if found else 'no problems'}")
    return [Problem(question, answer, int(result or 0)) for question, answer, result in found]


def prompts_of(tokenizer: Any, problems: Sequence[Problem]) -> list[Prompt]:
    """Problems as a policy answers them; 1 for a response whose last number is the result."""

    def prompt(problem: Problem) -> Prompt:
        text = rendered(tokenizer, [{"role": "user", "content": problem.question}])
        return Prompt(
            tokenizer.encode(text, add_special_tokens=False),
            lambda ids: float(last_number(tokenizer.decode(ids, skip_special_tokens=True)) == problem.result),
        )

    return list(map(prompt, problems))


def rhythm_credit(way: Way, lens: str = LENS, seed: int = 0) -> Credit | None:
    """How the tokens of a response share its advantage, as ``way`` says; None where each has the whole.

    ``random`` and ``entropy`` amplify as many tokens as there are anchors, out of those that have a FAI. The entropy is
    that of the distribution that a token was drawn from.

    Args:
        way: what names the tokens.
        lens: a spec of ``reasoning_rhythm``; its field ``by`` is overruled.
        seed: of random tokens.
    """
    if way == "uniform":
        return None
    by = way if way in ("coupled", "local", "global") else "global"
    parsed = manyheads.parse(lens)
    if not isinstance(parsed, ReasoningRhythm):
        raise UserError(f"the credit is read from reasoning_rhythm, not from {lens}")
    rhythm = replace(parsed, by=by)

    @torch.no_grad()
    def credit(model: Any, rollout: Rollout) -> Tensor:
        start, kept = rollout.start, rollout.ids.shape[1] - rollout.start
        spans = [[(start, start + count)] for count in rollout.response.sum(1).tolist()]
        with manyheads.watch(model, rhythm, roles=manyheads.TokenSpans({"response": spans})) as seen:
            logits = model(**rollout.inputs(), use_cache=False, logits_to_keep=kept + 1).logits[:, :-1].float()
        series = seen.compute().series
        gamma = torch.from_numpy(np.stack(series["gamma"]))
        if way in ("entropy", "random"):
            if way == "entropy":
                score = torch.special.entr(logits.softmax(-1)).sum(-1).cpu()
            else:
                draws = torch.Generator().manual_seed((seed * 1_000_003 + rollout.number) % 2**63)
                score = torch.rand(len(spans), kept, generator=draws)
            score = torch.nn.functional.pad(score.double(), (start, 0))
            known = torch.from_numpy(np.isfinite(np.stack(series["fai"]))) & rollout.response.cpu()
            gamma = 1 + (rhythm.amplify - 1) * peaks(score.masked_fill(~known, torch.nan), rhythm.share)
        return weigh(rollout.advantages, gamma.to(rollout.ids.device))

    return credit


def right(
    model: Any, prompts: Sequence[Prompt], length: int, *, draws: int = 4, temperature: float = 1.0, seed: int = 0
) -> Tensor:  # fmt: skip
    """The share of ``draws`` responses to each prompt that is right, ``[P]`` on the CPU."""
    step = max(1, _ROWS // draws)
    parts = [
        sample(model, prompts[i : i + step], draws, length, seed=seed + i, temperature=temperature)
        for i in range(0, len(prompts), step)
    ]
    return torch.cat([part.rewards.view(-1, draws).mean(1).cpu() for part in parts])


def imitation(model: Any, tokenizer: Any, problems: Sequence[Problem]) -> tuple[Tensor, Tensor]:
    """Problems with their worked answers and the end of a text, ids ``[N, T]`` padded with 0 on the right.

    Beside them which predictions count, bool ``[N, T - 1]``: those of the answer. On the CPU.
    """
    ends, rows = sorted(ends_of(model))[:1], []
    for problem, prompt in zip(problems, prompts_of(tokenizer, problems), strict=True):
        between = "" if getattr(tokenizer, "chat_template", None) else " "
        rows.append((prompt.ids, [*tokenizer.encode(between + problem.answer, add_special_tokens=False), *ends]))
    longest = max(len(asked) + len(answer) for asked, answer in rows)
    ids = [[*asked, *answer] + [0] * (longest - len(asked) - len(answer)) for asked, answer in rows]
    counts = [[len(asked) <= t + 1 < len(asked) + len(answer) for t in range(longest - 1)] for asked, answer in rows]
    return torch.tensor(ids), torch.tensor(counts)


def warm_up(
    model: Any, tokenizer: Any, draw: Callable[[int], Sequence[Problem]], asked: Sequence[Problem], *, until: float,
    lr: float, length: int, most: int = 200, seed: int = 0,
) -> tuple[int, float]:  # fmt: skip
    """Imitate worked answers until a share of the responses to other problems is right.

    Args:
        model: in float32, trained in place.
        tokenizer: its own.
        draw: given the number of a step, problems to imitate.
        asked: problems on which it is looked, every ten steps, two responses to each.
        until: share of right responses at which it ends.
        lr: of AdamW.
        length: of a response at most.
        most: steps.
        seed: of the responses.

    Returns:
        Steps done, and the share that was right last.
    """
    prompts = prompts_of(tokenizer, asked)
    shares = [float(right(model, prompts, length, draws=2, seed=seed).mean())]
    if shares[0] >= until:
        return 0, shares[0]
    device = next(model.parameters()).device

    def get_batch(number: int) -> tuple[Tensor, Tensor]:
        ids, counts = imitation(model, tokenizer, draw(number))
        return ids.to(device), counts.to(device)

    def on_step(state: TrainState) -> bool:
        if state.step % _LOOK == 0:
            shares.append(float(right(model, prompts, length, draws=2, seed=seed).mean()))
        return shares[-1] >= until

    state = fit(
        model, get_batch, next_token_loss, budget=most, optimizers=optimizers_of(model, lr, weight_decay=0.0),
        on_step=on_step,
    )  # fmt: skip
    return state.step, shares[-1]


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="default", help="folder or hub name of a decoder; default: the shipped one")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model; a training cut off goes on there")
    parser.add_argument("--problems", default="sums", help="sums, or a file of JSON lines with question and answer")
    parser.add_argument("--largest", type=int, default=99, help="number in sums")
    parser.add_argument("--credit", choices=get_args(Way), default="coupled", help="what names the tokens of credit")
    parser.add_argument("--lens", default=LENS, help="spec of the lens that is looked through")
    parser.add_argument("--warm", type=float, default=0.0, help="imitate answers until this share is right; 0 for not")
    parser.add_argument("--warm-lr", type=float, default=5e-5, help="rate of that imitation")
    parser.add_argument("--budget", default="60 steps", help="'60 steps', two a rollout, or as 5m, 90s")
    parser.add_argument("--prompts", type=int, default=16, help="of a rollout")
    parser.add_argument("--group", type=int, default=8, help="responses to each")
    parser.add_argument("--tokens", type=int, default=48, help="of a response at most")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--beta", type=float, default=0.0, help="weight of the distance to the model before training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe."""
    parser = argparse.ArgumentParser(
        "python -m manyheads.recipes.reasoning_rhythm", description="Train on checked answers with credit by token."
    )
    _options(parser)
    args = parser.parse_args(arguments)
    if (args.out / "config.json").exists():
        parser.error(f"{args.out} holds a model; name a new folder")
    given = None if args.problems == "sums" else args.problems
    unfinished, curve = args.out / "training", []
    try:
        known = problems_in(Path(given)) if given else []
        credit = rhythm_credit(args.credit, args.lens, args.seed)
        subject = CausalLM(args.model)
        subject.load(args.device)
        model, tokenizer = subject.model, subject.tokenizer
        precision = next(model.parameters()).dtype
        model.float()

        def draw(number: int, use: int = 0, count: int = args.prompts) -> list[Problem]:
            rng = np.random.default_rng([args.seed, use, number])
            if known:
                return [known[i] for i in rng.integers(len(known), size=count)]
            return drawn_sums(count, rng, largest=args.largest)

        def on_rollout(number: int, rollout: Rollout) -> None:
            curve.append({"rollout": number, "reward": float(rollout.rewards.mean())})

        def on_step(state: TrainState) -> None:
            if state.step % 2 == 0:
                done, left = min(1.0, state.progress), time_left(state.seconds, state.progress)
                print(f"{done:4.0%} step {state.step}: reward {curve[-1]['reward']:.3f} {left}", flush=True)

        if args.warm and newest(unfinished) is None:
            steps, share = warm_up(
                model, tokenizer, lambda number: draw(number, 1), draw(0, 2, 32), until=args.warm, lr=args.warm_lr,
                length=args.tokens, seed=args.seed,
            )  # fmt: skip
            print(f"{share:.0%} of responses right after {steps} steps on worked answers", flush=True)
        train_policy(
            model, lambda number: prompts_of(tokenizer, draw(number)), budget=args.budget, lr=args.lr,
            group=args.group, length=args.tokens, updates=2, credit=credit, beta=args.beta, seed=args.seed,
            schedule=decay("none", warmup=4), checkpoint=Checkpoint(unfinished, every=20), on_rollout=on_rollout,
            on_step=on_step,
        )  # fmt: skip
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    model.to(precision).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    about = {name: str(value) for name, value in vars(args).items() if name != "out"}
    (args.out / "rewards.json").write_text(json.dumps({"settings": about, "curve": curve}, indent=1) + "\n")
    shutil.rmtree(unfinished, ignore_errors=True)
    print(f"{args.out}: trained with {args.credit} credit; load it as any model: --model {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
