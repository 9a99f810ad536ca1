# SPDX-License-Identifier: Apache-2.0
"""A model, a text or images, and a conversion: calibrate, cut, recover, and say what each of it cost."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .conversion import Conversion, EncoderConversion, SurgeryPlan
from .errors import UserError
from .files import write_asked
from .material import Material, Pictures

if TYPE_CHECKING:
    from .models.text_encoder import TextEncoder
    from .progress import Progress
    from .strategy import Strategy
    from .training import TrainState

__all__ = [
    "Converted", "Material", "Pictures", "as_conversion", "calibrated", "convert_model", "encoder_of", "measured",
]  # fmt: skip


@dataclass
class Converted:
    """What a conversion made.

    Attributes:
        model: after it, in evaluation mode.
        plan: of the surgery.
        spec: of the conversion.
        parameters, bytes: before and after.
        measure: what ``losses`` are: ``nats/token``, or for encoders the distance of last states from the model's.
        losses: means over the windows held out, by stage: ``before``, ``after surgery``, ``after recovery``; without
            those at which states of an encoder have another width, and cannot be compared.
        windows: the values that the means are of.
        state: of the recovery, None without.
        before: config of the model that it was made of.
    """

    model: Any
    plan: SurgeryPlan
    spec: str
    parameters: tuple[int, int]
    bytes: tuple[int, int]
    measure: str
    windows: dict[str, list[float]]
    before: Any
    state: TrainState | None = None
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def losses(self) -> dict[str, float]:
        return {stage: sum(values) / len(values) for stage, values in self.windows.items() if values}

    @property
    def compared(self) -> bool:
        """Whether its loss could be measured."""
        return all(self.windows.values())

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        recovered = self.state and {
            "steps": self.state.step, "tokens": self.state.tokens, "seconds": round(self.state.seconds, 2),
        }  # fmt: skip
        return {
            "spec": self.spec, "parameters": dict(zip(("before", "after"), self.parameters, strict=True)),
            "bytes": dict(zip(("before", "after"), self.bytes, strict=True)), "measure": self.measure,
            "losses": self.losses, "windows": self.windows, "recovery": recovered, **self.about,
        }  # fmt: skip

    def save(self, folder: Path, tokenizer: Any = None) -> bool:
        """Write it; whether it is a plain checkpoint, which any transformers loads."""
        from .integrations.surgery_files import save

        plain = save(self.model, folder, self.plan, self.before, self.document())
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return plain


def convert_model(
    model: Any, conversion: Conversion | str, material: Material | Pictures, *, recover: str | int | None = None,
    sequences: int = 32, batch: int = 4, seed: int = 0, folder: Path | None = None, progress: Progress | None = None,
    stages: bool = True,
) -> Converted:  # fmt: skip
    """Convert a model of transformers, which stays as it is.

    Args:
        model: in evaluation mode, on the device to use; decoders, and encoders of texts or images.
        conversion: or its spec.
        material: what is read: of a model of images, pictures.
        recover: budget of a training afterwards, as ``10m``, ``2M`` or a number of steps; none when None.
        sequences: of the calibration.
        batch: sequences of a forward.
        seed: of the batches of the recovery.
        folder: of the recovery's checkpoints; a training that was cut off goes on there, and they are removed at its
            end.
        progress: is told how far the work is.
        stages: measure the loss before and after surgery too, and not at the end alone.

    Raises:
        UserError: the strategy converts nothing, does not fit the model, or has not enough text.
    """
    from .integrations.anatomy import ModelAnatomy
    from .training import Budget

    strategy = as_conversion(conversion)
    if recover is not None:
        Budget.of(recover)  # one that cannot be read is refused before anything is done
    if isinstance(strategy, EncoderConversion):
        raise UserError(
            f"{strategy.slug} makes an encoder, which has no loss of a text: encoder_of(model, ...) makes it"
        )
    anatomy = ModelAnatomy(model)
    _check_family(strategy, anatomy)
    _check_reads(model, material)
    device = next(model.parameters()).device
    made, plan = calibrated(model, strategy, material.calibration(sequences, batch, device), progress)
    if recover is not None and not anatomy.causal and not _comparable(made, model, material):
        raise UserError(
            "states of another width cannot be compared with the model's, nor trained to be them: cut an encoder by "
            "axis=neurons or axis=layers, or leave --recover away"
        )
    result = Converted(
        made, plan, strategy.spec, (_count(model), _count(made)), (_bytes(model), _bytes(made)),
        "nats/token" if anatomy.causal else "distance of last states",
        {},
        copy.deepcopy(model.config),
    )  # fmt: skip
    if stages:
        result.windows["before"] = measured(model, model, material, batch)
    if stages or recover is None:
        result.windows["after surgery"] = measured(made, model, material, batch)
    if recover is not None:
        result.state = _recovered(result, model, strategy, anatomy, material, recover, seed, folder, progress)
        result.windows["after recovery"] = measured(result.model, model, material, batch)
    return result


def calibrated(
    model: Any, strategy: Conversion, batches: Sequence[Tensor], progress: Progress | None = None
) -> tuple[Any, SurgeryPlan]:
    """A model after surgery, and the plan of it.

    Args:
        model: stays as it is.
        strategy: what is done.
        batches: what it is calibrated on: token ids ``[B, T]``, or images ``[B, C, h, w]``, on the model's device.
        progress: is told of batches.

    Raises:
        UserError: the strategy does not fit the model.
    """
    from .integrations.anatomy import ModelAnatomy
    from .integrations.calibrate import calibrate
    from .integrations.surgery import converted

    anatomy = ModelAnatomy(model)
    _check_family(strategy, anatomy)
    plan = strategy.plan(anatomy, calibrate(model, batches, strategy.wants(anatomy), progress))
    return converted(model, plan), plan


def encoder_of(
    model: Any, tokenizer: Any, conversion: Conversion | str, *, outputs: int = 0, length: int = 512
) -> TextEncoder:
    """An encoder of texts made of a decoder, which stays as it is; nothing is trained, and weights are shared.

    Args:
        model: of transformers, with its output layer, which the encoder has not, or without.
        tokenizer: its own.
        conversion: or its spec.
        outputs: of a head, which begins with random weights; 0 for none.
        length: tokens of a text at most.

    Raises:
        UserError: the strategy makes no encoder, does not fit the model, or the model does not heed the mask.
    """
    from .calls.calibration import Statistics
    from .integrations.anatomy import ModelAnatomy
    from .integrations.bidirectional import is_bidirectional
    from .integrations.surgery import converted
    from .models.text_encoder import TextEncoder

    strategy = as_conversion(conversion)
    if not isinstance(strategy, EncoderConversion):
        raise UserError(f"{strategy.slug} makes no encoder of texts; gemma_encoder and pooling do")
    anatomy = ModelAnatomy(model)
    _check_family(strategy, anatomy)
    plan = strategy.plan(anatomy, Statistics({}, 0, None))
    made = converted(model.base_model, plan)
    if plan.steps and not is_bidirectional(made):
        raise UserError(
            f"{type(model).__name__} does not heed the mask that its config asks for; install a newer transformers"
        )
    return TextEncoder(made, tokenizer, strategy.design(anatomy), outputs, length)


def _check_family(strategy: Conversion, anatomy: Any) -> None:
    if strategy.families and anatomy.family not in strategy.families:
        known = ", ".join(sorted(strategy.families))
        raise UserError(f"{strategy.slug} converts models of {known}, and this one is of {anatomy.family}")


def as_conversion(given: Strategy | str) -> Conversion:
    """A strategy or its spec as the conversion that it is.

    Raises:
        UserError: it is none, or the spec cannot be read.
    """
    from .spec import parse

    strategy = parse(given) if isinstance(given, str) else given
    if not isinstance(strategy, Conversion):
        raise UserError(f"{strategy.slug} is no conversion; `manyheads list --category convert` shows those there are")
    return strategy


def _recovered(
    result: Converted, model: Any, strategy: Conversion, anatomy: Any, material: Material | Pictures,
    recover: str | int, seed: int, folder: Path | None, progress: Progress | None,
) -> TrainState:  # fmt: skip
    from .training.recovery import recover as train

    how = strategy.recovery(anatomy)
    if folder is not None:
        begun = [_digest([material.train]), _digest(result.model.parameters())]
        _claim(folder, [strategy.spec, seed, material.length, *begun])
    result.model = own = copy.deepcopy(result.model)  # parameters of its own
    batches: Callable[[int], Tensor] = material.batches(how.batch, seed, next(model.parameters()).device)

    def told(state: TrainState) -> None:
        if progress is not None:
            progress(min(state.progress, 1.0), 1.0, f"recovery, step {state.step}")

    state = train(own, model, batches, recover, how, folder=folder, on_step=told)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    return state


def _check_reads(model: Any, material: Material | Pictures) -> None:
    """Raise where the model reads something else, or no windows so long, or has shapes that its config does not say."""
    from .integrations.surgery_files import stock_config
    from .lens import max_positions

    sees = hasattr(model.config, "image_size")
    if sees != isinstance(material, Pictures):
        raise UserError(f"{type(model).__name__} reads {'images, not text' if sees else 'text, not images'}")
    most = max_positions(model.config)
    if isinstance(material, Material) and most is not None and material.length > most:
        raise UserError(f"the model reads {most} tokens at most, and the windows have {material.length}: give --length")
    if stock_config(model) is None:
        raise UserError(
            "the model has other tensors than its config says, as one has that was cut by a plan: convert the one that "
            "it was made of"
        )


def _claim(folder: Path, whose: list[Any]) -> None:
    """Keep a folder of checkpoints for one training, by all that it begins with.

    Raises:
        UserError: there is something else in it.
    """
    own, said = folder / "training.json", json.dumps(whose)
    if own.is_file() and own.read_text(encoding="utf-8") == said:
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} holds another training, or something else: remove it, or give another --out")
    write_asked(own, said)


def _digest(tensors: Iterable[Tensor]) -> str:
    """A text that is another for tensors of other shapes, or other numbers at one of a thousand places of each."""
    found = hashlib.sha256()
    for x in tensors:
        flat = x.detach().flatten()
        found.update(repr(tuple(x.shape)).encode())
        found.update(flat[:: max(1, len(flat) // 1000)].double().cpu().numpy().tobytes())
    return found.hexdigest()


def _comparable(made: Any, model: Any, material: Material | Pictures) -> bool:
    """Whether two encoders give states of one shape."""
    return bool(measured(made, model, replace(material, held_out=material.held_out[:1])))


@torch.inference_mode()
def measured(model: Any, original: Any, material: Material | Pictures, batch: int = 4) -> list[float]:
    """Of each window or image held out: nats per token, or for encoders 1 - cosine of last states to the original's.

    Nothing where an encoder's states are of another width, which have no angle with the original's.
    """
    from .integrations.anatomy import ModelAnatomy
    from .integrations.calibrate import nats

    device, dtype, found = next(model.parameters()).device, next(model.parameters()).dtype, list[float]()
    causal = ModelAnatomy(original).causal
    for rows in material.held_out.split(batch):
        ids = rows.to(device, dtype if rows.is_floating_point() else None)
        if causal:
            found += nats(model, ids).mean(1).tolist()
        else:
            given = {"pixel_values": ids} if isinstance(material, Pictures) else {"input_ids": ids[:, :-1]}
            own, theirs = (each.base_model(**given)[0].float() for each in (model, original))
            if own.shape != theirs.shape:
                return []
            found += (1 - torch.cosine_similarity(own, theirs, dim=-1)).mean(1).tolist()
    return found


def _count(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def _bytes(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())
