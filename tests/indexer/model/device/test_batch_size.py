"""Batches where the user does not say how large: by the memory of a GPU and the width of the model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from forebear.indexer.model.device.batch_size import batch_tokens_on, vector_bytes_on

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
GIB = 1 << 30


def model(width: int, layers: int) -> torch.nn.Module:
    network = torch.nn.Module()
    network.config = SimpleNamespace(hidden_size=width, num_hidden_layers=layers)
    return network


@pytest.mark.parametrize(
    ("gib", "width", "layers", "expected"),
    [
        (139, 384, 6, 65_536),
        (139, 768, 12, 65_536),
        (80, 768, 12, 45_056),  # 40 GiB / (4 x 24 x 768 x 12) = 48,545 word pieces
        (24, 768, 12, 12_288),
        (4, 1024, 24, 4096),
    ],
)
def test_a_gpu_gets_what_half_of_its_memory_holds(gib, width, layers, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (1 * GIB, gib * GIB))
    assert batch_tokens_on(CUDA, model(width, layers), 7) == expected


def test_a_network_that_names_no_width_has_that_of_its_feature(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (1 * GIB, 80 * GIB))
    assert batch_tokens_on(CUDA, torch.nn.Linear(2, 2), 768) == 45_056


def test_the_cpu_gets_what_its_caches_like():
    assert batch_tokens_on(CPU, model(768, 12), 768) == 4096
    assert batch_tokens_on(CPU, model(768, 12), 768, on_cpu=2048) == 2048


def test_a_gpu_holds_gradients_in_an_eighth_of_its_memory(monkeypatch):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _device: (0, 16 << 30))
    assert vector_bytes_on(CUDA, 1 << 30) == 2 << 30
    assert vector_bytes_on(CUDA, 4 << 30) == 4 << 30
    assert vector_bytes_on(CPU, 1 << 30) == 1 << 30
