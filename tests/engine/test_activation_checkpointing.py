"""Recomputed blocks give the gradients of kept ones, through DeepSpeed at every ZeRO stage, and save less."""

import pytest
import torch
from torch import Tensor, nn

from gigamil.config.schema import RunConfig
from gigamil.errors import ConfigError
from gigamil.memory.checkpointing import checkpoint_blocks
from gigamil.memory.peak import LiveBytes
from gigamil.models.aggregators.attention import GatedAttention
from gigamil.models.encoder import SmallCNN, TileEncoder
from gigamil.models.networks import FrozenStatistics
from gigamil.models.slide_model import SlideModel
from gigamil.testing.ranks import run_on_ranks
from gigamil.train.activation_checkpointing import checkpoint_encoder, deepspeed_recompute
from gigamil.train.engine import DeepSpeedEngine, deepspeed_config, skip_kernel_build

Gradients = dict[str, Tensor]


class Blocks(nn.Module):
    """A stem and three residual blocks of torchvision."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models.resnet import BasicBlock

        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16))
        self.layers = nn.Sequential(*(BasicBlock(16, 16) for _ in range(3)))

    def forward(self, image_nCHW: Tensor, tile_key_n: Tensor | None) -> Tensor:
        return self.layers(self.stem(image_nCHW)).mean((2, 3))


def make(precision: str = "float32", stage: int = 1) -> tuple[SlideModel, RunConfig]:
    config = RunConfig.model_validate(
        {"science": {"precision": precision}, "execution": {"zero_stage": stage, "device": "cpu"}}
    )
    torch.manual_seed(0)
    encoder = TileEncoder(FrozenStatistics(Blocks(), Blocks.dim), (0.5,) * 3, (0.2,) * 3)
    encoder.backbone.forward = encoder.backbone.network.forward  # type: ignore[assignment]  # keys are not used
    return SlideModel(encoder, GatedAttention(Blocks.dim, 8), 2).train(), config


def images(rank: int, chunk: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(10 * rank + chunk)).to(dtype)


def engine_gradients(rank: int, stage: int, setting: str, precision: str, freeze_stem: bool) -> Gradients:
    """Mean over ranks of the gradients of a step of two chunks, the first one kept while the second is encoded."""
    from deepspeed.utils import safe_get_full_grad

    model, config = make(precision, stage)
    checkpoint_encoder(model.encoder.backbone, setting)  # type: ignore[arg-type]
    if freeze_stem:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".layers." in name or "encoder" not in name)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    engine = DeepSpeedEngine(model, optimizer, deepspeed_config(config), torch.device("cpu"))
    with engine.one_reduction():
        graphs = [engine.encode(images(rank, chunk), torch.arange(3)) for chunk in range(2)]
        for graph_cD in graphs:
            engine.backward((graph_cD.float() * torch.linspace(-1, 1, Blocks.dim)).sum())
    wanted = {name: p for name, p in engine.module.named_parameters() if p.requires_grad and "encoder" in name}
    return {name: safe_get_full_grad(parameter).clone().float() for name, parameter in wanted.items()}


def worst_differences(rank: int, stages: list[int], precision: str, freeze_stem: bool) -> dict[str, float]:
    skip_kernel_build()
    worst = {}
    for stage in stages:
        wanted = engine_gradients(rank, stage, "none", precision, freeze_stem)
        size = torch.stack([g.norm() for g in wanted.values()]).norm()
        assert size > 0
        for setting in ("blocks", "cpu"):
            found = engine_gradients(rank, stage, setting, precision, freeze_stem)
            errors = [(found[n] - g).norm() / max(g.norm(), 1e-3 * size) for n, g in wanted.items()]
            worst[f"{stage} {setting}"] = float(max(errors))
    return worst


@pytest.mark.slow
def test_every_zero_stage_gives_the_gradients_of_kept_activations() -> None:
    for worst in run_on_ranks(worst_differences, 2, [0, 1, 2, 3], "float32", False):
        assert len(worst) == 8
        assert max(worst.values()) <= 1e-6, worst  # the same operations on the same numbers


def test_blocks_are_recomputed_under_the_forward_s_autocast() -> None:
    # Recomputed in float32, gradients would differ by some 1e-2.
    (worst,) = run_on_ranks(worst_differences, 1, [1], "bfloat16", False)
    assert max(worst.values()) <= 1e-6, worst


def test_blocks_behind_fixed_layers_get_their_gradients() -> None:
    (worst,) = run_on_ranks(worst_differences, 1, [1], "float32", True)
    assert max(worst.values()) <= 1e-6, worst


def test_float64_gradients_are_those_of_torch() -> None:
    (errors,) = run_on_ranks(float64_errors, 1)
    assert errors.keys() == {"plain", "deepspeed"}
    assert max(errors.values()) <= 1e-12, errors


def float64_errors(_rank: int) -> dict[str, float]:
    def gradients(prepare: object) -> list[Tensor]:
        backbone = make()[0].encoder.backbone.double()
        if prepare is not None:
            prepare(backbone)  # type: ignore[operator]
        (
            backbone(images(0, 0, torch.float64), None) * torch.linspace(-1, 1, Blocks.dim, dtype=torch.float64)
        ).sum().backward()
        return [parameter.grad for parameter in backbone.parameters()]  # type: ignore[misc]

    wanted = gradients(None)
    errors = {}
    ways = {"plain": checkpoint_blocks, "deepspeed": lambda b: checkpoint_blocks(b, deepspeed_recompute(False))}
    _join_deepspeed()
    for name, prepare in ways.items():
        pairs = zip(gradients(prepare), wanted, strict=True)
        errors[name] = max(float((found - grad).norm() / grad.norm()) for found, grad in pairs)
    return errors


def _join_deepspeed() -> None:
    import deepspeed

    skip_kernel_build()
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)


def saved_bytes(_rank: int) -> dict[str, int]:
    _join_deepspeed()
    found = {}
    for setting in ("none", "blocks", "cpu"):
        backbone = make()[0].encoder.backbone
        checkpoint_encoder(backbone, setting)  # type: ignore[arg-type]
        with LiveBytes() as live:
            graph_cD = backbone(torch.rand(2, 3, 64, 64), None)
            found[setting] = live.now
            del graph_cD
            with torch.no_grad():
                backbone(torch.rand(2, 3, 64, 64), None)
            assert live.now == 0, "something outlives its graph"
    return found


def test_less_is_saved_and_given_back() -> None:
    (found,) = run_on_ranks(saved_bytes, 1)
    assert found["blocks"] < 0.45 * found["none"], found  # the stem is kept, and an input per block
    assert found["cpu"] == found["blocks"]  # on a CPU, main memory is where they are already


def test_layers_that_draw_at_random_draw_the_same_again() -> None:
    (pair,) = run_on_ranks(dropout_gradients, 1)
    assert torch.equal(*pair)


class _Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)) for _ in range(3)))

    def forward(self, values: Tensor) -> Tensor:
        return self.rows(values)


def dropout_gradients(_rank: int) -> tuple[Tensor, Tensor]:
    _join_deepspeed()
    gradients = []
    for setting in ("none", "blocks"):
        torch.manual_seed(0)
        model = _Dropping()
        if setting == "blocks":
            assert checkpoint_blocks(model, deepspeed_recompute(False)) == 3
        model(torch.ones(2, 4)).square().sum().backward()
        gradients.append(model.rows[0][0].weight.grad)
    return gradients[0], gradients[1]


def test_an_encoder_without_blocks_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"execution\.activation_checkpointing: SmallCNN has no row of equal blocks"):
        checkpoint_blocks(SmallCNN())
