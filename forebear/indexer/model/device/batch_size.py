"""How many word pieces a batch holds, padding included, where the user does not say.

On a CPU 4,096: larger batches are no faster there. A GPU is slow with batches that do not fill it. In a pass over
gradients a word piece takes about 24 float32 numbers a dimension and layer: what the backward needs, the inputs and
output gradients of the layers, and their copies. So a batch has

    half of the GPU's memory / (4 bytes x 24 x width x layers)

word pieces, in steps of 4,096, at least 4,096 and at most 65,536. The rule asks for the memory that the GPU has, not
for what is free: the same GPU then gives the same batches, and the same last digits. Where other programs leave less,
batches are halved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

BATCH_TOKENS = 4096
MOST_TOKENS = 65_536
NUMBERS = 24  # of a word piece, a dimension and layer
_LAYERS = 12  # of a network that does not say


def batch_tokens_on(device: torch.device, model: nn.Module, width: int, on_cpu: int = BATCH_TOKENS) -> int:
    """Most word pieces of a batch.

    Args:
        device: Where the model runs.
        model: A transformers model.
        width: Width of its feature, where its configuration names none.
        on_cpu: The number for the CPU, and for devices that do not say how much memory they have.
    """
    import torch  # a manifest is read without it

    if device.type != "cuda":
        return on_cpu
    config: Any = getattr(model, "config", None)
    layers = getattr(config, "num_hidden_layers", None) or _LAYERS
    width = getattr(config, "hidden_size", None) or width
    return _fitting(torch.cuda.mem_get_info(device)[1] // 2, 4 * NUMBERS * width * layers)


def _fitting(n_bytes: int, bytes_a_token: int) -> int:
    steps = n_bytes // bytes_a_token // BATCH_TOKENS
    return min(max(steps, 1) * BATCH_TOKENS, MOST_TOKENS)


def vector_bytes_on(device: torch.device, on_cpu: int) -> int:
    """Most bytes of whole gradients of test rows that are held at once: on a GPU an eighth of its memory.

    Every training row that is scored is run once for all of them, so more of them at once take fewer passes.

    Args:
        device: Where the model runs.
        on_cpu: The number for the CPU, and the least elsewhere.
    """
    import torch

    return max(on_cpu, torch.cuda.mem_get_info(device)[1] // 8) if device.type == "cuda" else on_cpu
