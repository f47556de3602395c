"""Adapters of PEFT: a base model is loaded with its adapter, and which of its layers were trained is kept.

LoRA and DoRA stay beside their base layers, so that gradients can be taken of their own weights (scope ``adapter``).
What they add to a base layer's output is computed without that output and with a copy of its weight W_0: so the
gradient of W_0 is that of the merged weight, which W_0 and what is added make together, and the other scopes are those
of the merged model. Adapters of other kinds are merged into the base.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from forebear.errors import ModelError, first_line, is_out_of_memory
from forebear.indexer.model.network.layers import Scale, is_layer
from forebear.indexer.model.network.pretrained import ADAPTER_CONFIG, holds_adapter, load_pretrained, quiet_transformers

ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """What LoRA or DoRA put into a network.

    Attributes:
        kind: ``LoRA`` or ``DoRA``.
        trained: Dotted names of the modules that were trained: the adapter's own, and those saved whole with it.
        added: Of these, the adapter's own: A, B, and DoRA's magnitudes.
        replaced: Modules of the base that no longer run, because trained copies do.
        untold: A parameter that was trained and is no whole layer's; None where there is none.
    """

    kind: str
    trained: frozenset[str]
    added: frozenset[str]
    replaced: frozenset[str]
    untold: str | None


class DoraLayer(nn.Module):
    """DoRA's part of a layer, as PEFT computes it, with the product by the magnitudes as a layer of its own.

    y = m * (W_0 + s B A) x / n + b, n the norms of the rows of W_0 + s B A, which are constants for gradients (Liu et
    al., "DoRA", 2024, section 4.3). PEFT adds what this returns, y - W_0 x - b, to the base layer's output. W_0 x is
    computed anew, so that the gradient at the base layer's output is that at y.
    """

    def __init__(self, magnitude: nn.Parameter, is_transposed: bool) -> None:
        """Magnitudes m, ``(n_out,)``, and whether the base layer's weight is ``(n_in, n_out)``."""
        super().__init__()
        self.magnitude = Scale(magnitude)
        self._is_transposed = is_transposed

    def forward(
        self, x: torch.Tensor, *, lora_A: Any, lora_B: Any, scaling: float, base_layer: Any, **_: Any
    ) -> torch.Tensor:
        """What DoRA adds to the base layer's output at ``x``."""
        base = base_layer.weight.detach()
        base = base.T if self._is_transposed else base
        with torch.no_grad():
            norms = torch.linalg.norm(base + scaling * lora_B.weight @ lora_A.weight, dim=1)
        straight = nn.functional.linear(x, base)
        added: torch.Tensor = self.magnitude((straight + scaling * lora_B(lora_A(x))) / norms) - straight
        return added


def is_adapter(name: str) -> bool:
    """Whether a folder or hub name holds an adapter and no whole model."""
    if Path(name).exists():
        return holds_adapter(Path(name))
    from transformers.utils import find_adapter_config_file

    try:
        return find_adapter_config_file(name) is not None
    except OSError:  # nothing of that name is found, which loading says
        return False


def load_adapted(name: str, auto_class: Any) -> tuple[Any, Adapter | None, str]:
    """A base model with its adapter.

    Args:
        name: Folder or hub name of the adapter.
        auto_class: transformers' class for the base.

    Returns:
        The network, what LoRA or DoRA put into it (None: an adapter of another kind, merged), and the folder or hub
        name of the tokenizer.

    Raises:
        ModelError: PEFT is not installed, the adapter or its base cannot be loaded, it cannot be merged, or the two
            together store no weights for the head.
    """
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise ModelError(
            f"{name} is an adapter of PEFT, which is not installed. Run: pip install 'forebear[peft]'"
        ) from error
    config = _loaded(name, PeftConfig.from_pretrained, name)
    base_name = config.base_model_name_or_path
    if not base_name:
        raise ModelError(f"{name}: {ADAPTER_CONFIG} names no base model (base_model_name_or_path). Write it there.")
    if config.is_prompt_learning:
        raise ModelError(
            f"{name} is an adapter of the kind {config.peft_type.value}, which adds inputs to a model and cannot be "
            "merged into its weights. forebear indexes adapters that can: LoRA, DoRA, IA3, LoHa, LoKr, OFT, ..."
        )
    n_labels = _n_labels(Path(name), config.modules_to_save or ())
    choices = {} if n_labels is None else {"num_labels": n_labels, "ignore_mismatched_sizes": True}
    base, info = load_pretrained(auto_class, base_name, output_loading_info=True, dtype=torch.float32, **choices)
    adapted = _loaded(name, PeftModel.from_pretrained, base, name, is_trainable=True)
    model = adapted.base_model.model
    _refuse_random_layers(
        model, {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}, name, base_name
    )
    tokenizer_name = name if (Path(name) / "tokenizer_config.json").is_file() else base_name
    if config.peft_type.value != "LORA":
        return _loaded(name, adapted.merge_and_unload), None, tokenizer_name
    for module in list(model.modules()):
        for key, magnitude in dict(getattr(module, "lora_magnitude_vector", {})).items():
            module.lora_magnitude_vector[key] = DoraLayer(magnitude.weight, bool(module.fan_in_fan_out))
    return model, _adapter(model, "DoRA" if config.use_dora else "LoRA"), tokenizer_name


def _refuse_random_layers(model: nn.Module, unstored: set[str], name: str, base_name: str) -> None:
    """Refuse parameters that the base does not store where the adapter stores no copy of them either."""
    whole = ".original_module"
    saved = tuple(key.removesuffix(whole) + "." for key, _ in model.named_modules() if key.endswith(whole))
    if missing := sorted(key for key in unstored if not key.startswith(saved)):
        raise ModelError(
            f"neither {name} nor its base {base_name} stores weights for {', '.join(missing[:3])}: it would be a "
            "random classifier. Save the adapter with modules_to_save=[every module whose weights begin at random]."
        )


def adapter_settings(model: nn.Module) -> list[Any]:
    """The numbers s by which LoRA layers are scaled, which no stored tensor tells, by the layers' dotted names."""
    layers = [(key, getattr(module, "scaling", None)) for key, module in model.named_modules()]
    return [[key, scaling] for key, scaling in layers if isinstance(scaling, dict)]


def _adapter(model: Any, kind: str) -> Adapter:
    """The modules of LoRA or DoRA, told by what PEFT lets be trained."""
    trained, added, replaced = set(), set(), set()
    untold = None
    for key, module in model.named_modules():
        if "original_module" in key.split("."):
            replaced.add(key)
        if any(part.startswith("lora_") for part in key.split(".")):
            added.add(key)
        own = dict(module.named_parameters(recurse=False))
        asked = [name for name, parameter in own.items() if parameter.requires_grad]
        if not asked:
            continue
        trained.add(key)
        if (len(asked) < len(own) or not is_layer(module)) and untold is None:
            untold = f"{key}.{asked[0]}"
    return Adapter(kind, frozenset(trained), frozenset(added), frozenset(replaced), untold)


def _n_labels(folder: Path, saved: Collection[str]) -> int | None:
    """Rows of the head: of the matrices in the modules that are saved whole with an adapter, the fewest."""
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        return None
    from safetensors import safe_open

    opened: Any = safe_open(file, framework="pt")
    with opened as tensors:
        shapes = {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118
    rows = [shape[0] for key, shape in shapes.items() if len(shape) == 2 and set(saved) & set(key.split("."))]
    return min(rows, default=None)


def _loaded(name: str, function: Any, *args: Any, **kwargs: Any) -> Any:
    """A call of PEFT, with its errors in one line.

    Raises:
        ModelError: It raised anything (PEFT raises many types, all of which mean that the adapter cannot be loaded), or
            warned of weights that are missing.
    """
    try:
        with quiet_transformers(), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            result = function(*args, **kwargs)
    except ModelError:
        raise
    except Exception as error:  # an adapter's files may be damaged in any way
        if is_out_of_memory(error):
            raise
        raise ModelError(f"cannot load the adapter {name}: {first_line(error)}") from error
    if lacking := [str(warning.message) for warning in warned if "missing adapter keys" in str(warning.message)]:
        raise ModelError(f"{name} does not store all weights of its adapter ({lacking[0][:200]}). Save it again.")
    return result
