"""The example in docs/extending.md is what it claims to be: parts that register, fit the YAML, and are exact."""

import importlib
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from gigamil.cli import main
from gigamil.config.schema import RunConfig
from gigamil.data.pipeline import DrawKeys
from gigamil.errors import ConfigError
from gigamil.models.aggregator import aggregators
from gigamil.models.bag import Bag, LocalPool
from gigamil.models.encoder import DenseEncoder, encoders
from gigamil.models.slide_model import SlideModel, build_model
from gigamil.parallel.halo import ShardedNetwork
from gigamil.parallel.topology import Topology
from gigamil.partition.schedule import plan_steps
from gigamil.registry import Registry
from gigamil.testing.compare import gradient_error, relative_error
from gigamil.testing.exactness import RecordingPlainEngine, own_tiles
from gigamil.testing.ranks import run_on_ranks
from gigamil.train.dense import dense_geometry
from gigamil.train.engine import make_ranks
from gigamil.train.loss import losses
from gigamil.train.step import ExactStep, Ranks

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "extending.md").read_text()
SIZES = (7, 1, 4)
NAMES = {"encoder": "two_layers", "aggregator": "plain_mean", "loss": "smoothed"}


def block(language: str) -> str:
    """The first code block of a language on the page."""
    found = re.search(rf"^```{language}\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert found is not None
    return found.group(1)


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """my_parts.py of the page in the working directory; what it registers is forgotten afterwards."""
    (tmp_path / "my_parts.py").write_text(block("python"))
    (tmp_path / "my.yaml").write_text(block("yaml"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for registry in (encoders, aggregators, losses):
        monkeypatch.setattr(registry, "_factories", dict(registry._factories))
    yield tmp_path
    sys.modules.pop("my_parts", None)


def test_the_command_line_imports_the_module_that_is_named(plugin: Path) -> None:
    assert not set(NAMES.values()) & {*encoders.names(), *aggregators.names(), *losses.names()}
    with pytest.raises(SystemExit) as stopped:
        main(["train", "my.yaml", "--plugin", "my_parts", "--print_config"])
    assert stopped.value.code == 0
    assert "two_layers" in encoders.names()
    assert "plain_mean" in aggregators.names()
    assert "smoothed" in losses.names()


def test_a_module_that_is_not_there_is_named(plugin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "my.yaml", "--plugin", "no_parts"]) == 2
    assert "--plugin no_parts: No module named 'no_parts'" in capsys.readouterr().err


def test_options_of_the_yaml_reach_the_parts(plugin: Path) -> None:
    model = example_model(torch.float32)
    assert model.encoder.dim == 24
    assert model.head.in_features == 24


def test_options_that_do_not_fit_are_refused(plugin: Path) -> None:
    importlib.import_module("my_parts")
    science = RunConfig.model_validate(
        {"science": {"encoder": {"name": "two_layers", "options": {"depth": 3}}, "aggregator": {"name": "plain_mean"}}}
    ).science
    with pytest.raises(ConfigError, match="science.encoder.options do not fit encoder 'two_layers'.*depth"):
        build_model(science, 2)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_chunked_step_has_the_gradient_of_the_whole_bag(plugin: Path, num_ranks: int) -> None:
    # Float64: only the order of sums differs, so the bound is that of benchmarks/exactness.py.
    folder = str(plugin)
    errors = [errors_of(1, 0)] if num_ranks == 1 else run_on_ranks(errors_on_rank, num_ranks, folder, num_ranks)
    for loss_error, worst_gradient_error in errors:
        assert loss_error <= 1e-12
        assert worst_gradient_error <= 1e-12


def test_entry_points_on_the_page_are_those_that_are_searched() -> None:
    groups = tomllib.loads(block("toml"))["project"]["entry-points"]
    registries: tuple[Registry, ...] = (encoders, aggregators, losses)
    assert [*groups] == [registry._group for registry in registries]
    assert [*groups.values()] == [
        {"two_layers": "my_package.parts:TwoLayers"},
        {"plain_mean": "my_package.parts:PlainMean"},
        {"smoothed": "my_package.parts:smoothed"},
    ]


def example_model(dtype: torch.dtype) -> SlideModel:
    """The model of the page's YAML."""
    importlib.import_module("my_parts")
    science = RunConfig.model_validate(yaml.safe_load(block("yaml"))).science
    return build_model(science, num_classes=3).to(dtype)


def example_tiles() -> tuple[list[Tensor], Tensor]:
    """uint8 tiles of each slide, and labels."""
    generator = torch.Generator().manual_seed(3)
    images = [torch.randint(0, 256, (size, 32, 32, 3), dtype=torch.uint8, generator=generator) for size in SIZES]
    return images, torch.tensor([0, 1, 2])


def reference() -> tuple[float, dict[str, Tensor]]:
    """Mean loss and gradients by autograd over all tiles at once."""
    model, (images, label_B) = example_model(torch.float64), example_tiles()
    bag = Bag(
        embedding_nD=model.encode(torch.cat(images).permute(0, 3, 1, 2).double() / 255, None),
        position_n2=torch.zeros(sum(SIZES), 2),
        sizes=SIZES,
        pool=LocalPool(sum(SIZES)),
    )
    logits_BK, pooled = model.classify(bag)
    for size, attention_N1 in zip(SIZES, pooled.attention_nA.split(SIZES), strict=True):
        assert torch.equal(attention_N1, torch.full((size, 1), 1 / size, dtype=torch.float64))
    loss = losses["smoothed"](logits_BK, label_B).mean()
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def step_of(num_ranks: int, rank: int) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the training step on this rank: chunks of two tiles, one graph kept, the others not."""
    topology = Topology(num_ranks, rank, rank, num_ranks, num_ranks)
    ranks = make_ranks(topology) if num_ranks > 1 else Ranks(topology)
    model, (images, label_B) = example_model(torch.float64), example_tiles()
    engine = RecordingPlainEngine(model, torch.optim.SGD(model.parameters(), lr=0.1), world=ranks.world)
    plan = plan_steps(range(len(SIZES)), SIZES, len(SIZES), 1, num_ranks)[0]
    keys = DrawKeys(0, [f"slide-{number}" for number in range(len(SIZES))])
    step = ExactStep(engine, ranks, losses["smoothed"], chunk=2, num_keep=1, keys=keys)
    weight_B = torch.ones(len(SIZES), dtype=torch.float64)
    result = step.train(plan, own_tiles(images, plan, topology), label_B, weight_B, step=0, learning_rates=[0.1])
    return result.loss, engine.gradients


def errors_of(num_ranks: int, rank: int) -> tuple[float, float]:
    """Relative errors of loss and gradients of the step against the whole bag."""
    (loss, gradients), (true_loss, true_gradients) = step_of(num_ranks, rank), reference()
    return relative_error(loss, true_loss), gradient_error(gradients, true_gradients)


def errors_on_rank(rank: int, folder: str, num_ranks: int) -> tuple[float, float]:
    """As `errors_of`, in a process of its own."""
    sys.path.insert(0, folder)
    return errors_of(num_ranks, rank)


def test_the_dense_example_sees_the_whole_slide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = re.search(r"^```python\n(.*?)^```", PAGE.partition("## A dense encoder")[2], re.DOTALL | re.MULTILINE)
    assert example is not None
    (tmp_path / "dense_example.py").write_text(example[1])
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("dense_example")
    config = RunConfig.model_validate({"science": {"encoder": {"name": "dense_two_layers"}}, "slides": {"tile_px": 64}})
    encoder = build_model(config.science, 2).encoder
    assert isinstance(encoder, DenseEncoder)
    assert dense_geometry(encoder, config.slides) is not None
    image_1CHW = torch.rand(1, 3, 128, 192)
    grid_1Dhw = ShardedNetwork(encoder.network, None)(image_1CHW, (0, 128))[0]
    assert torch.equal(grid_1Dhw, encoder.network(image_1CHW))
    assert grid_1Dhw.shape == (1, encoder.dim, 2, 3)
