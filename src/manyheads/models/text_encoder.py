# SPDX-License-Identifier: Apache-2.0
"""An encoder of texts: a model of transformers, a pooler of its states, and perhaps a head that says class or score.

    encoder = TextEncoder.load("encoder")
    encoder.encode(["a text", "another"])    # [2, D]

A folder of one is a model of sentence-transformers as well: ``SentenceTransformer("encoder")`` gives the same vectors.
Poolers that sentence-transformers has no name for are modules of this package, for which it asks to be given
``trust_remote_code=True``.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..conversion import EncoderDesign
from ..errors import UserError
from ..files import write_asked
from ..integrations.bidirectional import is_bidirectional

__all__ = ["FILE", "SentencePooler", "TextEncoder", "made_pooler"]

FILE = "encoder.json"
_POOLING, _NORMALIZE, _HEAD = "1_Pooling", "2_Normalize", "head.safetensors"
_THEIRS = "sentence_transformers.models."
_STANDARD = {"cls": "cls_token", "mean": "mean_tokens", "lasttoken": "lasttoken"}  # as all their versions have it
Texts = Sequence[str] | Sequence[tuple[str, str]]


class TextEncoder(nn.Module):
    """See the head of this file.

    Args:
        model: a model without an output layer, shared.
        tokenizer: its own; a copy is kept.
        design: of what reads its states.
        outputs: of the head; 0 for none.
        length: tokens of a text at most.
        pooler: of the design, where it is there already.
    """

    def __init__(
        self, model: Any, tokenizer: Any, design: EncoderDesign, outputs: int = 0, length: int = 512,
        pooler: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model, self.design, self.outputs, self.length = model, design, outputs, length
        self.pooler: Any = pooler or made_pooler(design.pooler, design.config)
        self.tokenizer = _prepared(tokenizer, design.eos)
        width = int(model.config.hidden_size)
        self.head: nn.Module | None = None
        if outputs:
            first = (nn.Linear(width, design.hidden), nn.GELU()) if design.hidden else ()
            last = nn.Linear(design.hidden or width, outputs)
            self.head = nn.Sequential(*first, nn.Dropout(design.dropout), last)
        for part in (self.pooler, self.head):  # the model itself stays: its rotary frequencies are no weights
            if part is not None:
                part.to(next(model.parameters()))

    def read(self, texts: Texts) -> dict[str, Tensor]:
        """Ids and mask ``[B, T]`` of texts on the model's device; two of a pair after each other, as one text."""
        given: tuple[Any, ...] = (list(texts),)
        if texts and not isinstance(texts[0], str):
            first, second = map(list, zip(*texts, strict=True))
            divided = self.tokenizer.sep_token is not None
            given = (first, second) if divided else ([f"{a}\n{b}" for a, b in zip(first, second, strict=True)],)
        found = self.tokenizer(*given, padding=True, truncation=True, max_length=self.length, return_tensors="pt")
        if not bool(found["attention_mask"].any(1).all()):
            raise UserError("a text without a token cannot be encoded; leave empty texts out")
        kept = {name: found[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in found}
        if self.tokenizer.padding_side == "left":
            kept["position_ids"] = (kept["attention_mask"].cumsum(1) - 1).clamp(min=0)
        return {name: x.to(next(self.model.parameters()).device) for name, x in kept.items()}

    def embed(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Vectors ``[B, D]`` of what :meth:`read` gave."""
        more = {"use_cache": False} if hasattr(self.model.config, "use_cache") else {}
        every = bool(self.pooler.all_layers)
        found = self.model(**batch, **more, output_hidden_states=every)
        states = torch.stack(found.hidden_states, 1) if every else found.last_hidden_state
        vectors: Tensor = self.pooler(states, batch["attention_mask"].bool())
        return nn.functional.normalize(vectors, dim=-1) if self.design.normalize else vectors

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What the head says ``[B, outputs]``; vectors without a head."""
        vectors = self.embed(batch)
        return vectors if self.head is None else self.head(vectors)

    @torch.no_grad()
    def encode(self, texts: Texts, batch: int = 32) -> Tensor:
        """Vectors ``[N, D]``, float32 on the CPU, in the order of the texts."""
        return self._each(texts, batch, self.embed)

    @torch.no_grad()
    def predict(self, texts: Texts, batch: int = 32) -> Tensor:
        """What the head says of each, ``[N, outputs]``."""
        return self._each(texts, batch, self)

    def _each(self, texts: Texts, batch: int, compute: Any) -> Tensor:
        was = self.training
        self.eval()
        try:
            order = sorted(range(len(texts)), key=lambda i: len("".join(texts[i])))
            found = torch.cat([compute(self.read(part)).float().cpu() for part in _parts(texts, order, batch)])
        finally:
            self.train(was)
        back = torch.empty(len(order), dtype=torch.long)
        back[order] = torch.arange(len(order))
        return found[back]

    def save(self, folder: Path | str, about: Mapping[str, Any] | None = None) -> None:
        """Write it, as a model of sentence-transformers with a head beside it.

        Raises:
            UserError: the config of the model's class cannot say what the model is.
        """
        from ..integrations.surgery_files import forget, plain

        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        for old in (_HEAD, f"{_POOLING}/model.safetensors", f"{_NORMALIZE}/config.json"):  # of one that was here
            (place / old).unlink(missing_ok=True)
        stock = plain(self.model)
        if stock is None:
            raise UserError(
                "a model that needs its plan of surgery is no encoder: convert the model as it was published"
            )
        forget(place)
        config = stock.config
        if self.pooler.all_layers:
            config.output_hidden_states = True  # where sentence-transformers learns that they are wanted
        stock.save_pretrained(place)
        self.tokenizer.save_pretrained(place)
        SentencePooler(self.design.pooler, self.design.config, self.pooler).save(place / _POOLING)
        own = self.pooler.standard is None
        kind = f"{__name__}.{SentencePooler.__name__}" if own else f"{_THEIRS}Pooling"
        if not own:
            said = {"word_embedding_dimension": int(config.hidden_size)} | {
                f"pooling_mode_{name}": kind == self.pooler.standard for kind, name in _STANDARD.items()
            }
            write_asked(place / _POOLING / "config.json", json.dumps(said) + "\n")
        modules = [("", f"{_THEIRS}Transformer"), (_POOLING, kind)]
        if self.design.normalize:
            (place / _NORMALIZE).mkdir(exist_ok=True)
            modules.append((_NORMALIZE, f"{_THEIRS}Normalize"))
        listed = [{"idx": i, "name": f"{i}", "path": path, "type": kind} for i, (path, kind) in enumerate(modules)]
        write_asked(place / "modules.json", json.dumps(listed, indent=2) + "\n")
        write_asked(place / "sentence_bert_config.json", json.dumps({"max_seq_length": self.length}) + "\n")
        if self.head is not None:
            save_file({name: x.contiguous() for name, x in self.head.state_dict().items()}, place / _HEAD)
        written = {
            "design": asdict(self.design), "outputs": self.outputs, "length": self.length,
            "bidirectional": is_bidirectional(self.model), "about": dict(about or {}),
        }  # fmt: skip
        write_asked(place / FILE, json.dumps(written, indent=2) + "\n")

    @classmethod
    def load(
        cls, folder: Path | str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> TextEncoder:
        """What :meth:`save` wrote, in evaluation mode.

        Raises:
            UserError: there is none, or its tokens do not see what they saw when it was saved.
        """
        from . import load_reader

        place = Path(folder)
        try:
            held = json.loads((place / FILE).read_text(encoding="utf-8"))
            design = EncoderDesign(**held["design"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder} holds no encoder of texts that can be read ({error}); make it again") from error
        model, tokenizer = load_reader(place, device, dtype)
        if is_bidirectional(model) != held["bidirectional"]:
            raise UserError(
                f"tokens of {folder} saw {'both sides' if held['bidirectional'] else 'what is before them'} when it "
                "was saved and do not here: this transformers reads its config otherwise, install a newer one"
            )
        made = cls(model, tokenizer, design, held["outputs"], held["length"])
        weights = place / _POOLING / "model.safetensors"
        if weights.is_file():
            made.pooler.load_state_dict(load_file(weights))
        if made.head is not None:
            made.head.load_state_dict(load_file(place / _HEAD))
        return made.eval()


class SentencePooler(nn.Module):
    """A pooler as sentence-transformers calls, saves and loads one.

    Args:
        pooler: the module of this package, see :class:`manyheads.conversion.EncoderDesign`.
        config: its keyword arguments.
        made: it, if it is there already.
    """

    def __init__(self, pooler: str, config: Mapping[str, Any], made: nn.Module | None = None) -> None:
        super().__init__()
        self.pooler, self.config = pooler, dict(config)
        self.made: Any = made or made_pooler(pooler, config)

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Add ``sentence_embedding`` to what their modules hand on."""
        if self.made.all_layers:
            states = torch.stack(tuple(features["all_layer_embeddings"]), 1)
        else:
            states = features["token_embeddings"]
        return {**features, "sentence_embedding": self.made(states, features["attention_mask"].bool())}

    def save(self, output_path: str | Path, *_: Any, **__: Any) -> None:
        """Write ``config.json`` and, where it has any, weights."""
        place = Path(output_path)
        place.mkdir(parents=True, exist_ok=True)
        write_asked(place / "config.json", json.dumps({"pooler": self.pooler, "config": self.config}) + "\n")
        if weights := {name: x.contiguous() for name, x in self.made.state_dict().items()}:
            save_file(weights, place / "model.safetensors")

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **_: Any) -> SentencePooler:
        """What :meth:`save` wrote."""
        place = Path(model_name_or_path) / subfolder
        made = cls(**json.loads((place / "config.json").read_text(encoding="utf-8")))
        if (weights := place / "model.safetensors").is_file():
            made.made.load_state_dict(load_file(weights))
        return made


def made_pooler(module: str, config: Mapping[str, Any]) -> Any:
    """A new pooler.

    Raises:
        UserError: it is none of this package.
    """
    home, _, name = module.partition(":")
    if not home.startswith("manyheads.convert."):
        raise UserError(f"{module} is no pooler of this package; nothing else is loaded")
    return getattr(import_module(home), name)(**config)


def _prepared(tokenizer: Any, eos: bool) -> Any:
    """A copy that pads on the right unless it is told otherwise, with a token to pad by, and perhaps one at the end."""
    made = copy.deepcopy(tokenizer)
    if made.pad_token is None:
        made.pad_token = made.eos_token
    if eos:
        from tokenizers.processors import TemplateProcessing

        end = made.eos_token
        made.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"$A {end}", pair=f"$A $B:1 {end}:1", special_tokens=[(end, made.eos_token_id)]
        )
    return made


def _parts(texts: Any, order: Sequence[int], size: int) -> Iterator[Any]:
    for start in range(0, len(order), size):
        yield [texts[i] for i in order[start : start + size]]
