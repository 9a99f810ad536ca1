# SPDX-License-Identifier: Apache-2.0
"""A converted model in a folder: a plain checkpoint where a stock config can say it, else weights beside the plan.

A plain one is an instance of the stock class, made of its config alone, with equal shapes and equal outputs; any
transformers loads it. Else ``surgery.json`` has the plan and the config of the model before, and the weights are in
``surgery.safetensors``, so that nothing that does not know the plan takes them for its own.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..conversion import SurgeryPlan
from ..errors import UserError
from ..files import write_asked
from .latent_attention import LatentAttention, as_deepseek
from .precision import cast

__all__ = ["FILE", "forget", "load", "load_if_converted", "outputs", "plain", "save", "stock_config"]

FILE, _WEIGHTS, _ABOUT = "surgery.json", "surgery.safetensors", "conversion.json"
_PLAIN = ("model*.safetensors", "model.safetensors.index.json", _ABOUT)  # what a plain one has and the other has not
_OWN = (FILE, _WEIGHTS, _ABOUT)
_ENCODER = (  # what one of texts has in its folder; the folders of its poolers behind what they hold
    "encoder.json", "head.safetensors", "modules.json", "sentence_bert_config.json", "1_Pooling/*", "1_Pooling",
    "2_Normalize/*", "2_Normalize",
)  # fmt: skip
_EQUAL = 1e-5  # relative difference of outputs in float32


def plain(model: Any) -> Any | None:
    """``model`` as an instance of a stock class; None where no config can say what it is.

    The class is the model's own, or DeepSeek's where all its attention was made latent.
    """
    from transformers import GenerationConfig

    latent = any(isinstance(module, LatentAttention) for module in model.modules())
    dtype = next(model.parameters()).dtype
    if latent and dtype.itemsize < 4:  # weights are scaled: equal is said before they are rounded again
        model = copy.deepcopy(model).float()
    made = as_deepseek(model) if latent else _same_class(model)
    if made is None:
        return None
    made.eval()
    with torch.inference_mode():
        got, want = outputs(made), outputs(model)
    if not (got - want).norm() <= _EQUAL * want.norm():
        return None
    if isinstance(getattr(model, "generation_config", None), GenerationConfig):
        made.generation_config = model.generation_config
    return made.to(dtype) if latent else made


def _same_class(model: Any) -> Any | None:
    """``model`` as its own class makes it of the config alone, weights shared."""
    config = stock_config(model)
    if config is None:
        return None
    made: Any = type(model)(config).to(next(model.parameters()).device)
    made.load_state_dict(model.state_dict(), assign=True)
    if getattr(config, "tie_word_embeddings", False):
        made.tie_weights()
    return made


def stock_config(model: Any) -> Any | None:
    """The config of which the stock class makes a model of equal shapes; None where it makes another, or refuses."""
    try:
        config = type(model.config).from_dict(model.config.to_dict())
        config._attn_implementation = model.config._attn_implementation
        with torch.device("meta"):
            made: Any = type(model)(config)
    except Exception:  # a config that the class refuses is one that cannot say it
        return None
    found, held = ({name: x.shape for name, x in each.state_dict().items()} for each in (made, model))
    return config if found == held else None


def outputs(model: Any) -> Tensor:
    """What a model gives for made-up input, ``[N]``: logits, or its last states."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    if hasattr(model.config, "vocab_size"):
        given = {"input_ids": torch.randint(model.config.vocab_size, (2, 12), generator=generator).to(device)}
    else:
        side, dtype = model.config.image_size, next(model.parameters()).dtype
        given = {"pixel_values": torch.randn(1, model.config.num_channels, side, side, generator=generator)}
        given = {name: x.to(device, dtype) for name, x in given.items()}
    found: Any = model.eval()(**given)[0]
    wide = next(model.parameters()).dtype == torch.float64
    return torch.cat([(x if wide else x.float()).flatten() for x in found])  # of a backbone, maps of features


def save(model: Any, folder: Path, plan: SurgeryPlan, before: Any, about: dict[str, Any]) -> bool:
    """Write a converted model; whether it is a plain checkpoint. What an earlier one left in the folder goes.

    Args:
        model: after ``plan``.
        folder: made where it is not there.
        plan: what was done.
        before: config of the model before.
        about: is kept with the plan, such as the command.

    Raises:
        UserError: the folder cannot be written to.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    stock = plain(model)
    _remove(folder, *_ENCODER)
    if stock is not None:
        stock.save_pretrained(folder)
        write_asked(folder / _ABOUT, json.dumps({**about, "plan": plan.plain()}) + "\n")
        _remove(folder, FILE, _WEIGHTS)
        return True
    written = {"about": about, "class": type(model).__name__, "config": before.to_dict(), "plan": plan.plain()}
    before.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, folder / _WEIGHTS)
    write_asked(folder / FILE, json.dumps(written) + "\n")
    _remove(folder, *_PLAIN)
    return False


def forget(folder: Path) -> None:
    """Remove what says how an earlier conversion's weights are read, where an encoder of texts takes its folder."""
    _remove(folder, *_OWN)


def _remove(folder: Path, *patterns: str) -> None:
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        path.rmdir() if path.is_dir() else path.unlink()


def load_if_converted(folder: Path, device: torch.device, dtype: torch.dtype) -> Any | None:
    """As :func:`load`; None where the folder has no plan."""
    return load(folder, device, dtype) if (folder / FILE).is_file() else None


def load(folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Any:
    """A model that :func:`save` wrote with its plan, in evaluation mode.

    Raises:
        UserError: the folder holds none, or a damaged one.
    """
    import transformers
    from safetensors.torch import load_file

    from .surgery import operate

    try:
        written = json.loads((folder / FILE).read_text(encoding="utf-8"))
        weights = load_file(folder / _WEIGHTS)
        kind = getattr(transformers, written["class"])
        config = kind.config_class.from_dict(written["config"])
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{folder} holds no converted model that can be read ({error}); convert it again") from error
    model: Any = cast(kind(config), dtype or next(iter(weights.values())).dtype)
    operate(model, SurgeryPlan.of(written["plan"]))
    missing, unknown = model.load_state_dict(weights, strict=False)
    own = {name for name, _ in model.named_parameters()}
    if unknown or own & set(missing):
        raise UserError(f"the weights in {folder} do not fit its plan; convert the model again")
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    model.name_or_path = str(folder)
    return model.to(device).eval()
