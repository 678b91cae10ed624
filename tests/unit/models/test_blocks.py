"""Blocks: every parameter of a built-in encoder has one; the first stay fixed, and the later learn faster."""

import pytest
import torch
from torch import nn

from gigamil.config.schema import Encoder, RunConfig
from gigamil.errors import ConfigError
from gigamil.models.blocks import block_numbers, freeze_blocks, parameters_by_rate
from gigamil.models.encoder import SmallCNN, build_encoder
from gigamil.models.networks import FrozenStatistics
from gigamil.models.slide_model import build_model
from gigamil.train.engine import make_optimizer
from gigamil.train.schedule import learning_rates

VIT = Encoder(name="timm/test_vit", options={"img_size": 32, "depth": 3})


def numbers(part: Encoder) -> dict[str, int]:
    found = block_numbers(build_encoder(part).backbone, "a test")
    return {name.removeprefix("network."): number for name, number in found.items()}


def trained(encoder: nn.Module) -> set[str]:
    return {name.removeprefix("backbone.network.") for name, p in encoder.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("name", "options", "last"),
    [
        ("small_cnn", {}, 3),
        ("resnet18", {}, 4),
        ("timm/test_resnet", {}, 4),
        ("timm/test_vit", {"depth": 3}, 3),
        ("timm/test_convnext", {}, 10),
        ("timm/mobilenetv3_small_050", {}, 13),
    ],
)
def test_every_parameter_has_a_block_and_every_block_a_parameter(name: str, options: dict, last: int) -> None:
    found = numbers(Encoder(name=name, options=options))
    assert sorted(set(found.values())) == list(range(last + 1))


def test_blocks_are_those_of_the_architecture() -> None:
    found = numbers(Encoder(name="resnet18"))
    assert all(number == (int(name[5]) if name.startswith("layer") else 0) for name, number in found.items())
    found = numbers(VIT)
    assert found["cls_token"] == found["pos_embed"] == found["patch_embed.proj.weight"] == 0
    assert [found[f"blocks.{i}.attn.qkv.bias"] for i in range(3)] == [1, 2, 3]
    assert found["norm.weight"] == 3
    found = numbers(Encoder(name="timm/test_convnext"))
    assert found["stem.0.weight"] == 0
    assert found["stages.0.blocks.0.gamma"] == found["stages.0.blocks.0.conv_dw.weight"] == 1
    assert found["head.norm.weight"] == 10


def test_a_parameter_is_of_the_longest_name_that_it_begins_with() -> None:
    # Only whole parts of a name count: "a.1" is no beginning of "a.10".
    network = nn.ModuleDict({"a": nn.Sequential(*[nn.Linear(1, 1, bias=False) for _ in range(11)])})
    backbone = FrozenStatistics(network, 1, [["a.10"], ["a"], ["a.1"]])
    found = block_numbers(backbone, "a test")
    assert [found[f"network.a.{i}.weight"] for i in (0, 1, 2, 10)] == [1, 2, 1, 0]


def test_the_first_blocks_want_no_gradient() -> None:
    layers = {"layer2", "layer3", "layer4"}
    assert {
        name.partition(".")[0] for name in trained(build_encoder(Encoder(name="resnet18", freeze_blocks=2)))
    } == layers
    frozen = build_encoder(VIT.model_copy(update={"freeze_blocks": 2}))
    assert {name.rpartition("blocks.")[2][0] for name in trained(frozen) if name.startswith("blocks.")} == {"1", "2"}
    assert {name for name in trained(frozen) if not name.startswith("blocks.")} == {"norm.weight", "norm.bias"}
    frozen(torch.rand(2, 3, 32, 32), None).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in frozen.parameters())


def test_all_but_the_last_blocks() -> None:
    last = trained(build_encoder(Encoder(name="resnet18", freeze_blocks=-1)))
    assert {name.partition(".")[0] for name in last} == {"layer4"}
    assert trained(build_encoder(Encoder(name="small_cnn", freeze_blocks=-4))) == trained(
        build_encoder(Encoder(name="small_cnn"))
    )


def test_all_blocks_may_be_fixed_and_no_more() -> None:
    frozen = build_encoder(Encoder(name="small_cnn", freeze_blocks=4))
    assert trained(frozen) == set()
    assert not frozen(torch.rand(2, 3, 32, 32), None).requires_grad
    with pytest.raises(ConfigError, match="freeze_blocks=5: the encoder has 4 blocks; use -4 to 4"):
        build_encoder(Encoder(name="small_cnn", freeze_blocks=5))
    with pytest.raises(ConfigError, match="freeze_blocks=14: the encoder has 11 blocks; use -11 to 11"):
        build_encoder(Encoder(name="timm/test_convnext", freeze_blocks=14))


def test_unknown_blocks_are_refused_with_what_to_define() -> None:
    plain = nn.Conv2d(3, 4, 1)
    freeze_blocks(plain, 0)
    assert parameters_by_rate(plain, 1.0) == {1.0: list(plain.parameters())}
    with pytest.raises(ConfigError, match="freeze_blocks=1 needs the blocks .* Conv2d does not tell .*`block_names`"):
        freeze_blocks(plain, 1)
    with pytest.raises(ConfigError, match=r"science.optim.layer_decay=0.5 needs the blocks .*`block_names`"):
        parameters_by_rate(plain, 0.5)
    backbone = FrozenStatistics(plain, 4, [["weight"]])
    with pytest.raises(
        ConfigError, match="parameter 'network.bias' of FrozenStatistics is in none of its `block_names`"
    ):
        freeze_blocks(backbone, 1)
    assert all(p.requires_grad for p in plain.parameters())  # refused as a whole


def test_shares_fall_towards_the_input() -> None:
    backbone = build_encoder(Encoder(name="resnet18")).backbone
    shares = parameters_by_rate(backbone, 0.5)
    assert list(shares) == [0.5**4, 0.5**3, 0.5**2, 0.5, 1.0]
    names = {id(p): name for name, p in backbone.named_parameters()}
    for share, parameters in shares.items():
        assert {share_of_resnet(names[id(p)]) for p in parameters} == {share}
    every = [p for parameters in shares.values() for p in parameters]
    assert len(every) == len({id(p) for p in every}) == len(list(backbone.parameters()))


def share_of_resnet(name: str) -> float:
    block = int(name[len("network.layer")]) if "layer" in name else 0
    return 0.5 ** (4 - block)


def test_shares_of_fixed_parameters_are_left_out() -> None:
    vit = build_encoder(VIT.model_copy(update={"freeze_blocks": 2})).backbone
    assert list(parameters_by_rate(vit, 0.75)) == [0.75, 1.0]  # blocks 2 and 3 of 0..3
    lora = build_encoder(VIT.model_copy(update={"lora_rank": 2})).backbone
    shares = parameters_by_rate(lora, 0.75)
    assert list(shares) == [0.75**2, 0.75, 1.0]  # the patch embedding has no update
    assert {len(parameters) for parameters in shares.values()} == {8}  # A and B of four layers
    fixed = SmallCNN(4)
    freeze_blocks(fixed, 4)
    assert parameters_by_rate(fixed, 0.75) == parameters_by_rate(fixed, 1.0) == {}


@pytest.mark.parametrize(
    ("changes", "decay", "shares"),
    [
        ({}, 1.0, [1.0]),
        ({}, 0.5, [0.125, 0.25, 0.5, 1.0]),
        ({"freeze_blocks": 2}, 0.5, [0.5, 1.0]),
        ({"freeze_blocks": 4}, 0.5, []),
    ],
)
def test_the_optimizer_has_a_group_per_share_and_the_head_last(changes: dict, decay: float, shares: list) -> None:
    config = RunConfig.model_validate(
        {
            "science": {
                "encoder": {"name": "small_cnn", **changes},
                "optim": {"layer_decay": decay, "lr_encoder": 0.1, "lr_head": 0.3, "warmup_steps": 0},
            },
            "execution": {"device": "cpu"},
        }
    )
    model = build_model(config.science, 2)
    groups = make_optimizer(model, config).param_groups
    assert list(parameters_by_rate(model.encoder.backbone, decay)) == shares
    assert [group["lr"] for group in groups] == [*(0.1 * share for share in shares), 0.3]
    assert [group["lr"] for group in groups] == learning_rates(config.science.optim, 0, 10, True, shares)
    held = [p for group in groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held})
    assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}
    others = [id(p) for name, p in model.named_parameters() if not name.startswith("encoder.")]
    assert [id(p) for p in groups[-1]["params"]] == others
