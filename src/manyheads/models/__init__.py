# SPDX-License-Identifier: Apache-2.0
"""Load the models that ship with the package, or any causal language model, with an answer in one line when it fails.

Weights are read from safetensors alone, and no code of a checkpoint's own is ever run.
"""

import os
import tomllib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyheads.errors import UserError
from manyheads.formatting import first_line as _line
from manyheads.models.merges import check_merges

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CACHE = "~/.cache/manyheads/models"
_DTYPES = ("float32", "bfloat16", "float16")


@cache
def published() -> dict[str, dict[str, str]]:
    """Published models that claims are checked on, by name: ``hub`` name, ``licence`` and ``what`` it is.

    ``load`` takes such a name: from a folder of that name in the folder that ``MANYHEADS_MODELS`` names or in
    ``~/.cache/manyheads/models``, else from the hub.
    """
    return tomllib.loads((Path(__file__).parent / "published.toml").read_text(encoding="utf-8"))


def default_path() -> Path:
    """Folder of the default model: 19 million parameters, Python source, made by ``recipes/default_model.py``."""
    return Path(__file__).parent / "default"


def recall_path() -> Path:
    """Folder of the RECALL fixture: recalls 100 key-value pairs, made by ``recipes/recall.py``."""
    return Path(__file__).parent / "recall"


_SHIPPED = {"default": default_path, "recall": recall_path}


def shipped_pipelines() -> list[str]:
    """Names of the pipelines of diffusers that ship, made by ``recipes/scenes.py``; imports nothing."""
    return sorted(path.parent.name for path in (Path(__file__).parent / "pipelines").glob("*/model_index.json"))


def config(path_or_name: str | Path) -> Any:
    """Configuration of a causal language model, ``default`` and ``recall`` for those that ship; loads no weights.

    Raises UserError as ``load`` does.
    """
    from transformers import AutoConfig

    name = source(path_or_name)
    _check_architecture(name)
    return AutoConfig.from_pretrained(name, trust_remote_code=False)


def count_parameters(config: Any) -> int:
    """Parameters of a causal language model of ``config``; none is made."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config, trust_remote_code=False).parameters())


def load_default(
    device: "str | torch.device" = "cpu", dtype: "torch.dtype | None" = None
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load the default model and its tokenizer, in float32 on a CPU and bfloat16 on a GPU; else as ``load``."""
    return load(default_path(), *placed(device, dtype))


def load_recall(device: "str | torch.device" = "cpu", dtype: "torch.dtype | None" = None) -> "PreTrainedModel":
    """Load the RECALL fixture (token ids are its language, so it has no tokenizer); as ``load_default``."""
    return _load_model(str(recall_path()), *placed(device, dtype))


def load(
    path_or_name: str | Path, device: "str | torch.device" = "cpu", dtype: "torch.dtype | None" = None
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a causal language model, in evaluation mode, and its tokenizer.

    ``path_or_name``: a folder with config.json and safetensors weights, a name on the Hugging Face hub, one of
    ``published``, or ``default``.
    ``dtype``: that of the checkpoint when not given, so that its cache takes the bytes that it takes in use; bfloat16
    for a float16 one on a CPU, which is slow at float16.
    Raises UserError, in one line with what to do next, when that cannot be had.
    """
    place, _ = placed(device, dtype)
    if path_or_name == "default":
        return load_default(device, dtype)
    name = source(path_or_name)
    _check_architecture(name)
    return _load_model(name, place, dtype or _own_dtype(name, place)), tokenizer(name)


def tokenizer(path_or_name: str | Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a model alone; raises UserError as ``load`` does."""
    from transformers import AutoTokenizer

    name = source(path_or_name)
    try:
        made = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"{name} has no tokenizer that can be read ({_line(error)}); put tokenizer.json beside its weights"
        ) from error
    return check_merges(made, str(path_or_name), str(path_or_name) in published())


def load_reader(
    path_or_name: str | Path, device: "str | torch.device" = "cpu", dtype: "torch.dtype | None" = None
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """As ``load``, and any other model that reads text: an encoder, or that of an encoder-decoder model.

    Raises UserError also for models that read pictures or sound.
    """
    name = source(path_or_name)
    if (kind := _text_class(name)) is None:
        return load(path_or_name, device, dtype)
    place, _ = placed(device, dtype)
    model: Any = _load_model(name, place, dtype or _own_dtype(name, place), kind=kind)
    return model.get_encoder() if model.config.is_encoder_decoder else model, tokenizer(name)


def load_vision(
    path_or_name: str | Path, device: "str | torch.device" = "cpu", dtype: "torch.dtype | None" = None
) -> "tuple[PreTrainedModel, Any]":
    """As ``load``, a model that reads images alone, and its image processor; None where it has none."""
    from transformers import AutoImageProcessor

    name = source(path_or_name)
    kind, reads, _ = _class_of(name)
    if reads != {"image"}:
        raise UserError(f"{name} is no vision transformer, it reads {_listed(reads)}: leave --image away")
    place, _ = placed(device, dtype)
    model = _load_model(name, place, dtype or _own_dtype(name, place), kind=kind)
    try:
        processor: Any = AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        if (Path(name) / "preprocessor_config.json").is_file():
            raise UserError(f"preprocessor_config.json of {name} cannot be used: {_line(error)}") from error
        processor = None
    return model, processor


def load_vlm(
    path_or_name: str | Path, device: "str | torch.device" = "cpu", dtype: "torch.dtype | None" = None
) -> "tuple[PreTrainedModel, Any]":
    """As ``load``, a model that reads images and text, and its processor."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    name = source(path_or_name)
    if not (reads := _class_of(name)[1]) >= {"image", "text"}:
        raise UserError(f"{name} reads {_listed(reads)}: leave --image away, or name a model as LLaVA")
    try:
        processor: Any = AutoProcessor.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"{name} has no processor that can be read: {_line(error)}") from error
    place, _ = placed(device, dtype)
    return _load_model(name, place, dtype or _own_dtype(name, place), kind=AutoModelForImageTextToText), processor


def load_speech(
    path_or_name: str | Path, device: "str | torch.device" = "cpu", dtype: "torch.dtype | None" = None
) -> "tuple[PreTrainedModel, Any, PreTrainedTokenizerBase]":
    """As ``load``, an encoder-decoder of Whisper's kind that transcribes, its feature extractor and its tokenizer."""
    import transformers

    name = source(path_or_name)
    _, reads, model_type = _class_of(name)
    if model_type != "whisper":
        raise UserError(
            f"{name} is no encoder-decoder of Whisper's kind, it reads {_listed(reads)}: leave --audio away, or look "
            "at it from Python with manyheads.watch(model, ...)"
        )
    place, _ = placed(device, dtype)
    kind = transformers.WhisperForConditionalGeneration
    model = _load_model(name, place, dtype or _own_dtype(name, place), kind=kind)
    try:
        extractor = transformers.AutoFeatureExtractor.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"{name} has no preprocessor_config.json that can be used ({_line(error)})") from error
    return model, extractor, tokenizer(name)


def load_translator(
    path_or_name: str | Path, device: "str | torch.device" = "cpu", dtype: "torch.dtype | None" = None
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """As ``load``, an encoder-decoder that writes text for text, as for translation, and its tokenizer."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

    name = source(path_or_name)
    kind, reads, model_type = _class_of(name)
    if reads != {"text"} or model_type not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(f"{name} is no encoder-decoder that writes text for text: leave --translate away")
    place, _ = placed(device, dtype)
    return _load_model(name, place, dtype or _own_dtype(name, place), kind=kind), tokenizer(name)


def _listed(reads: set[str]) -> str:
    return " and ".join(sorted(reads)) or "what transformers does not say"


def _class_of(name: str) -> tuple[Any, set[str], str]:
    """The class of a model, what it reads (nothing where that is not known), and its type."""
    import transformers
    from transformers import PreTrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    try:
        config: dict[str, Any] = PreTrainedConfig.get_config_dict(name)[0]
    except Exception as error:
        raise UserError(f"{name} has no config that can be read ({_line(error)}); give a local folder") from error
    kind, classes = str(config.get("model_type") or ""), config.get("architectures") or []
    if kind not in MODEL_MAPPING_NAMES:
        return None, set(), kind
    known = MODEL_MAPPING_NAMES[kind]
    base = getattr(transformers, known if isinstance(known, str) else known[0])
    reads = {base.input_modalities} if isinstance(base.input_modalities, str) else set(base.input_modalities)
    return (getattr(transformers, str(classes[0]), base) if classes else base), reads, kind


def _text_class(name: str) -> Any:
    """The class of a model that reads text and is no causal language model; None for those."""
    from transformers import PreTrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        classes = PreTrainedConfig.get_config_dict(name)[0].get("architectures") or []
    except Exception:  # told in one line by ``load``
        return None
    made, reads, kind = _class_of(name)
    if made is None or set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()).intersection(classes):
        return None
    if reads != {"text"}:
        told = "--image FILE" if reads == {"image"} else "--audio FILE" if kind == "whisper" else ""
        raise UserError(
            f"{name} reads {_listed(reads)}, and this command was given text: "
            + (f"give {told}" if told else "look at it from Python, with manyheads.watch(model, ...) around its call")
        )
    return made


def named_dtype(name: str | None) -> "torch.dtype | None":
    """The dtype called ``float32``, ``bfloat16`` or ``float16``; None for None. Raises UserError for another name."""
    if name is None:
        return None
    if name not in _DTYPES:
        raise UserError(f"unknown dtype {name!r}; use {', '.join(_DTYPES)}")
    import torch

    found: torch.dtype = getattr(torch, name)
    return found


def placed(device: "str | torch.device", dtype: "torch.dtype | None") -> "tuple[torch.device, torch.dtype]":
    """Device and dtype to load to, checked."""
    import torch

    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"unknown device {str(device)!r}; use cpu, cuda or cuda:0") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda was asked for, but torch sees no GPU; use cpu, or a torch built for your GPU")
    if place.type not in ("cpu", "cuda") and not _usable(place):
        raise UserError(f"device {place} was asked for, but this torch cannot use it; use cpu, cuda or cuda:0")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"there is no {place}; this machine has {torch.cuda.device_count()} GPU(s), counted from cuda:0"
        )
    return place, dtype or (torch.bfloat16 if place.type == "cuda" else torch.float32)


def _own_dtype(name: str, place: "torch.device") -> "torch.dtype":
    """What a checkpoint was saved in, by its config; float32 where that does not say."""
    import torch
    from transformers import AutoConfig

    found = AutoConfig.from_pretrained(name, trust_remote_code=False)
    own = found.get_text_config().dtype or found.dtype or torch.float32
    return torch.bfloat16 if own == torch.float16 and place.type == "cpu" else own


def _usable(place: "torch.device") -> bool:
    """Whether a tensor can be put there and read back."""
    import torch

    try:
        return torch.zeros(1, device=place).tolist() == [0.0]
    except (RuntimeError, NotImplementedError, AssertionError, ImportError):
        return False


def source(path_or_name: str | Path) -> str:
    """The folder or hub name as transformers takes it; UserError for a folder that is missing or holds no model."""
    path = Path(path_or_name).expanduser()
    name = str(path_or_name)
    if name in _SHIPPED:
        return str(_SHIPPED[name]())
    if name in published():
        folders = [Path(root).expanduser() / name for root in (os.environ.get("MANYHEADS_MODELS"), _CACHE) if root]
        return next((str(folder) for folder in folders if (folder / "config.json").is_file()), published()[name]["hub"])
    if not path.exists():
        if isinstance(path_or_name, Path) or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            raise UserError(
                f"no such folder: {name}; give a folder that holds config.json, or a hub name like owner/model"
            )
        return name
    if not path.is_dir():
        raise UserError(f"{name} is a file; give the folder that holds config.json and the weights")
    if not (path / "config.json").is_file():
        raise UserError(f"{name} holds no config.json, so it is no model; give a folder written by save_pretrained")
    if not any(path.glob("*.safetensors")):
        raise UserError(f"{name} holds no safetensors weights; write them with save_pretrained(folder)")
    return str(path)


def _load_model(name: str, place: "torch.device", dtype: "torch.dtype", kind: Any = None) -> "PreTrainedModel":
    """The model with its weights; a causal language model unless its class is given."""
    from transformers import AutoModelForCausalLM

    from ..integrations.surgery_files import load_if_converted

    converted: PreTrainedModel | None = load_if_converted(Path(name), place, dtype)
    if converted is not None:
        return converted
    if kind is None:
        _check_architecture(name)
        from .packed import FILE

        if (Path(name) / FILE).is_file():
            return _load_packed(Path(name), place, dtype)
    try:
        loaded: Any = (kind or AutoModelForCausalLM).from_pretrained(
            name, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:
        raise UserError(f"{name} does not load: {_line(error)}; check that its files are complete") from error
    if missing := sorted(loaded[1]["missing_keys"]):
        raise UserError(
            f"the weights of {name} lack {len(missing)} tensors, {missing[0]} first; fetch or save it again"
        )
    model: PreTrainedModel = loaded[0].to(place).eval()
    return model


def _load_packed(folder: Path, place: "torch.device", dtype: "torch.dtype") -> "PreTrainedModel":
    """A causal language model whose weights are packed, see :mod:`.packed`."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from .packed import load_into

    try:
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
        load_into(model, folder, dtype)
    except Exception as error:
        raise UserError(f"{folder} does not load: {_line(error)}; check that its files are complete") from error
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.name_or_path = str(folder)
    loaded: PreTrainedModel = model.to(place).eval()
    return loaded


def _check_architecture(name: str) -> None:
    """Raise UserError unless the configuration is that of a causal language model built into transformers."""
    from transformers import PreTrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        config: dict[str, Any] = PreTrainedConfig.get_config_dict(name)[0]
    except Exception as error:
        if Path(name).is_dir():
            raise UserError(f"config.json of {name} is no JSON ({_line(error)}); fetch or save it again") from error
        raise UserError(
            f"no model {name}: it is no folder here and cannot be had from the hub ({_line(error)}); "
            "check the spelling and the network, or give a local folder"
        ) from error
    kind = str(config.get("model_type") or "")
    classes = config.get("architectures") or []
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and config.get("auto_map"):
        raise UserError(
            f"{name} needs code from its own folder, which is never run; use a model built into transformers"
        )
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or (classes and not causal.intersection(classes)):
        what = ", ".join(classes) or f"of type {kind or 'unknown'}"
        raise UserError(
            f"{name} is no causal language model ({what}); give one that generates text, such as a Llama or GPT-2"
        )
