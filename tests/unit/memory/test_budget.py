"""What a graph costs is counted, not guessed; what fits is kept."""

import psutil
import pytest
import torch
from torch import nn

from gigamil.memory.budget import SavedBytes, chunks_to_keep, memory_budget


def test_one_linear_layer_saves_its_input() -> None:
    layer = nn.Linear(8, 4)
    with SavedBytes(layer) as saved:
        layer(torch.rand(10, 8))
    assert saved.total == 10 * 8 * 4  # the weight is a parameter: there anyway


def test_a_tensor_that_two_layers_save_counts_once() -> None:
    layers = nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 4)])
    image = torch.rand(10, 8)
    with SavedBytes(layers) as saved:
        layers[0](image), layers[1](image)
        first = saved.total
        layers[0](torch.rand(10, 8))
    assert (first, saved.total) == (320, 640)


def test_an_activation_is_counted_besides_the_input() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    with SavedBytes(model) as saved:
        model(torch.rand(10, 8))
    assert saved.total == 10 * (8 + 4) * 4  # the ReLU's output, which it shares with the last layer


def test_nothing_is_saved_without_a_graph_and_buffers_are_free() -> None:
    model = nn.BatchNorm1d(3).eval()
    with SavedBytes(model) as saved, torch.no_grad():
        model(torch.rand(5, 3))
    assert saved.total == 0
    with SavedBytes(model) as saved:
        model(torch.rand(5, 3))
    assert saved.total == 5 * 3 * 4  # its statistics are buffers


def test_the_graph_still_works_and_counting_ends() -> None:
    layer = nn.Linear(2, 1)
    with SavedBytes(layer) as saved:
        out = layer(torch.ones(3, 2))
    out.sum().backward()
    assert layer.weight.grad.tolist() == [[3.0, 3.0]]
    layer(torch.rand(4, 2))
    assert saved.total == 24


def test_a_budget_is_bytes_or_a_share_of_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Free:
        available = 1000

    monkeypatch.setattr(psutil, "virtual_memory", Free)
    cpu = torch.device("cpu")
    assert memory_budget(5e9, cpu, 2) == 5_000_000_000
    assert memory_budget(None, cpu, 2) == 250
    assert memory_budget(0.2, cpu, 2) == 100
    assert memory_budget(1, cpu, 1) == 1000  # everything, not one byte


@pytest.mark.parametrize(
    ("strategy", "chunk_bytes", "budget", "kept"),
    [
        ("replay", 10, 100, 0),
        ("keep", 10, 0, 2**31 - 1),
        ("auto", 10, 100, 10),
        ("auto", 10, 99, 9),
        ("auto", 10, 9, 0),
        ("auto", 0, 100, 100),
    ],
)
def test_chunks_to_keep(strategy: str, chunk_bytes: int, budget: int, kept: int) -> None:
    assert chunks_to_keep(strategy, chunk_bytes, budget) == kept
