# SPDX-License-Identifier: Apache-2.0
"""What is measured on: a language model, an encoder of images, a pipeline of diffusers, or what is trained for it.

A subject names itself and loads its parts when they are first asked for, so that listing and planning stay quick and a
worker process can be sent one.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..causal_lens import CausalLens
from ..conditioning import DenoiserWeights
from ..conversion import Conversion
from ..errors import UserError
from ..parallelism import ContextParallelism
from ..strategy import (
    Attention,
    Cache,
    Denoiser,
    ImagePositions,
    LinearCompute,
    MidBlock,
    Mixer,
    Ranker,
    Residual,
    Strategy,
)
from ..text_reducing import TextReducer
from ..unlearning import Unlearning
from ..writing import Decoding

if TYPE_CHECKING:
    import torch

__all__ = [
    "CausalLM",
    "Convertible",
    "ConvertibleVision",
    "Machine",
    "Pipeline",
    "Processes",
    "Subject",
    "Trainable",
    "Vision",
    "subject",
]


class Subject(ABC):
    """Base of all subjects.

    Attributes:
        kind: as tasks ask for it.
        name: as a person names it.
    """

    kind: ClassVar[str]
    kinds: ClassVar[tuple[type, ...]]  # of strategies that can act on it
    name: str

    @abstractmethod
    def load(self, device: str | torch.device) -> None:
        """Load the parts to ``device``; once."""

    def unsupported_reason(self, strategy: Strategy) -> str | None:
        """Why ``strategy`` cannot act on this subject, None if it can."""
        if isinstance(strategy, self.kinds):
            return None
        return f"{strategy.slug} does not act on {self.kind.replace('_', ' ')}: {_where(strategy)}"

    def described(self) -> dict[str, Any]:
        """What tells it from any other, as ``run.json`` has it."""
        return {"kind": self.kind, "name": self.name}


class CausalLM(Subject):
    """A causal language model and its tokenizer.

    Args:
        name: ``default`` and ``recall`` (they ship), a folder, or a name on the hub.
        model, tokenizer: already loaded, on the device to use; the name is then what a report calls them.
        dtype: to load in, as ``float32``; as :func:`manyheads.models.load` when None.
    """

    kind = "causal_lm"
    kinds: ClassVar[tuple[type, ...]] = (Attention, Cache, Decoding, LinearCompute, MidBlock, Residual)

    def __init__(
        self, name: str = "default", model: Any = None, tokenizer: Any = None, dtype: str | None = None
    ) -> None:
        from ..models import named_dtype

        named_dtype(dtype)
        self.name, self.dtype = name, dtype
        self._parts: tuple[Any, Any] | None = None if model is None else (model, tokenizer)
        self._given = model is not None

    def __getstate__(self) -> dict[str, Any]:
        if self._given:
            raise UserError("a model that is already loaded cannot be sent to workers; give its folder or hub name")
        return {**self.__dict__, "_parts": None}

    def load(self, device: str | torch.device) -> None:
        if self._parts is not None:
            return
        from .. import models

        dtype = models.named_dtype(self.dtype)
        if self.name == "recall":
            self._parts = models.load_recall(device, dtype), None
        else:
            self._parts = models.load(self.name, device, dtype)
            if self.model.config.is_encoder_decoder:
                raise UserError(f"{self.name} reads with an encoder; give a decoder-only language model")

    @property
    def model(self) -> Any:
        """The model, in evaluation mode."""
        return self._loaded[0]

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer; None where token ids are the language."""
        return self._loaded[1]

    @property
    def chats(self) -> bool:
        """Whether its tokenizer has a chat template. Loads no weights."""
        from .. import models
        from ..models.chat import chats

        if self._parts is None and self.name in ("default", "recall"):
            return False
        tokenizer = self.tokenizer if self._parts is not None else models.tokenizer(self.name)
        return chats(tokenizer)

    @property
    def fills_masks(self) -> bool:
        """Whether it is a masked diffusion language model, by its config. Loads no weights."""
        from .. import models
        from ..integrations.masked_diffusion import mask_token

        config = getattr(self.model, "config", None) if self._parts is not None else models.config(self.name)
        return mask_token(config) is not None

    @property
    def max_context(self) -> int:
        """Tokens that the model reads, by its config; 2**40 where that does not say. Loads no weights."""
        from ..lens import max_positions

        if self._parts is not None:
            config: Any = getattr(self.model, "config", None)
        else:
            from .. import models

            config = models.config(self.name)
        return max_positions(config) or 2**40

    @property
    def _loaded(self) -> tuple[Any, Any]:
        if self._parts is None:
            raise RuntimeError("load the subject first")
        return self._parts

    def identity(self) -> dict[str, Any]:
        """Class, size, and hashes of config and weights of the loaded model."""
        import torch

        model, weights = self.model, hashlib.sha256()
        for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
            weights.update(name.encode())
            weights.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        config: Any = getattr(model, "config", None)
        text = config.to_json_string() if config is not None else ""
        return {
            "name": self.name, "class": type(model).__name__,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "config_sha256": hashlib.sha256(text.encode()).hexdigest(), "weights_sha256": weights.hexdigest(),
        }  # fmt: skip


class Convertible(CausalLM):
    """A causal language model that every arm is made of anew, by a conversion."""

    kinds = (Conversion,)


class Pipeline(Subject):
    """A pipeline of diffusers: one that ships (``scenes``, ``unet``, ``moving``) or a folder."""

    kind = "pipeline"
    kinds = (Attention, Denoiser)

    def __init__(self, name: str = "scenes", pipe: Any = None, dtype: str | None = None) -> None:
        self.name, self.dtype = name, dtype
        self._pipe, self._given = pipe, pipe is not None

    def __getstate__(self) -> dict[str, Any]:
        if self._given:
            raise UserError("a pipeline that is already loaded cannot be sent to workers; give its folder")
        return {**self.__dict__, "_pipe": None}

    def load(self, device: str | torch.device) -> None:
        if self._pipe is None:
            from ..models.pipeline import load

            self._pipe = load(self.name, str(device), self.dtype)

    @property
    def pipe(self) -> Any:
        """The pipeline."""
        if self._pipe is None:
            raise RuntimeError("load the subject first")
        return self._pipe


class Vision(Subject):
    """An encoder of images: ViT, DINOv2, SegFormer.

    Args:
        name: a folder, or a name of :func:`manyheads.models.published`.
        model: already loaded, on the device to use.
        dtype: to load in, as ``float32``; that of the checkpoint when None.
    """

    kind = "vision"
    kinds: ClassVar[tuple[type, ...]] = (Attention, LinearCompute, MidBlock, Residual)

    def __init__(self, name: str, model: Any = None, dtype: str | None = None) -> None:
        self.name, self.dtype = name, dtype
        self._model, self._given = model, model is not None

    def __getstate__(self) -> dict[str, Any]:
        if self._given:
            raise UserError("a model that is already loaded cannot be sent to workers; give its folder")
        return {**self.__dict__, "_model": None}

    def load(self, device: str | torch.device) -> None:
        if self._model is None:
            from .. import models

            self._model = models.load_vision(self.name, device, models.named_dtype(self.dtype))[0]

    @property
    def model(self) -> Any:
        """The model, in evaluation mode."""
        if self._model is None:
            raise RuntimeError("load the subject first")
        return self._model

    def encode(self, images: torch.Tensor) -> Any:
        """What the model says of images ``[B, 3, h, w]``.

        Raises:
            UserError: it takes no images of that size.
        """
        try:
            return self.model(pixel_values=images)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{self.name} takes no images of {images.shape[-1]} pixels: {error}") from error

    @property
    def folder(self) -> str:
        """Where its weights are, or its name on the hub."""
        from .. import models

        return models.source(self.name)


class ConvertibleVision(Vision):
    """An encoder of images that every arm is made of anew, by a conversion."""

    kinds = (Conversion,)


class Trainable(Subject):
    """A small model that a task trains from scratch under each arm; the task says which."""

    kind = "trainable"
    kinds = (Mixer, Attention, ImagePositions, Residual, DenoiserWeights, Unlearning, Decoding, TextReducer)
    name = "trained from scratch"

    def load(self, device: str | torch.device) -> None:
        """Nothing: tasks build what they train."""


class Machine(Subject):
    """The machine at hand: tasks time operators on tensors that they draw."""

    kind = "machine"
    kinds = (Strategy,)
    name = "machine"

    def load(self, device: str | torch.device) -> None:
        """Nothing: there is no model."""


class Processes(Subject):
    """Several processes that share one sequence: tasks start them, and say how many."""

    kind = "processes"
    kinds = (Strategy,)
    name = "processes"

    def load(self, device: str | torch.device) -> None:
        """Nothing: tasks build what the processes run."""


def _where(strategy: Strategy) -> str:
    """What a strategy of this kind acts on."""
    if isinstance(strategy, Ranker):
        return f"train it: manyheads compare --train --ranking cranfield --strategies {strategy.slug}"
    if isinstance(strategy, Mixer) and "causal" not in strategy.directions:
        return f"train it: manyheads compare --train --tasks sequence_classification --strategies {strategy.slug}"
    if isinstance(strategy, Mixer):
        return f"train it: manyheads compare --train --strategies {strategy.slug}"
    if isinstance(strategy, CausalLens):
        return f"look with it: manyheads inspect --lens {strategy.slug}"
    if isinstance(strategy, Decoding):
        return f"write with it: manyheads generate --model MODEL --strategy {strategy.slug}"
    if isinstance(strategy, Conversion):
        return f"convert the model first: manyheads convert {strategy.spec} --model MODEL --out FOLDER"
    if isinstance(strategy, TextReducer):
        return f"shorten texts with it: manyheads shorten FILE --strategy {strategy.slug} --model MODEL"
    if isinstance(strategy, Unlearning):
        return f"run it: python -m manyheads.recipes.unlearning_bench --method {strategy.slug}"
    if isinstance(strategy, DenoiserWeights):
        return f"train it: python -m manyheads.recipes.{strategy.recipe} --strategy {strategy.slug}"
    if isinstance(strategy, ContextParallelism):
        return "start processes with torchrun, and use(model, strategy, mesh=mesh) in each (docs/parallel.md)"
    if isinstance(strategy, Denoiser):
        return "open a pipeline of diffusers with it (docs/diffusion.md)"
    if isinstance(strategy, ImagePositions):
        return "open a model that reads images with it (docs/mixers.md, images among text)"
    if isinstance(strategy, Cache):
        return "open a causal language model with it"
    return "give it a model of its kind"


def _reads_images(name: str) -> bool:
    """Whether a folder, or a published model, is an encoder of images, by its config; imports no transformers."""
    from ..models import published, source

    file = Path(source(name) if name in published() else name).expanduser() / "config.json"
    if not file.is_file():
        return name in published() and name.startswith("dinov2")
    config = json.loads(file.read_text(encoding="utf-8"))
    return "num_channels" in config and config.keys().isdisjoint({"vocab_size", "text_config"})


def subject(given: str | Subject, dtype: str | None = None) -> Subject:
    """The subject of that name: a pipeline, an encoder of images, else a causal language model.

    A pipeline ships, or its folder has model_index.json; an encoder of images is one by its config.json. ``dtype`` is
    what its weights are loaded in, as ``float32``. ``trainable`` is a model that the task trains, ``machine`` none at
    all: operators are timed. ``processes`` are several that share a sequence.
    """
    if isinstance(given, Subject):
        return given
    from .. import models

    if given == "trainable":
        return Trainable()
    if given == "machine":
        return Machine()
    if given == "processes":
        return Processes()
    folder = Path(given).expanduser()
    if given in models.shipped_pipelines() or (folder / "model_index.json").is_file():
        return Pipeline(given, dtype=dtype)
    if _reads_images(given):
        return Vision(given, dtype=dtype)
    return CausalLM(given, dtype=dtype)
