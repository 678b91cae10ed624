"""Encoders: blind to how tiles are chunked, filled from local files that cannot run code, refused with a remedy."""

import os
import pickle
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from gigamil import keyed
from gigamil.config.schema import Encoder, RunConfig
from gigamil.errors import ConfigError, EnvironmentFault
from gigamil.models.encoder import SmallCNN, TileEncoder, build_encoder, encoders, load_backbone_weights
from gigamil.models.networks import RESNETS, FrozenStatistics, has_blank_statistics, refuse_train_batchnorm

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "encoders.md").read_text()
EXAMPLES = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) if "encoder:" in text]
MEAN, STD = (0.7, 0.5, 0.6), (0.2, 0.25, 0.3)
# The smallest of their kind: a Vision Transformer, a ConvNeXt and a ResNet with a deep stem.
TIMM = [("timm/test_vit", {"img_size": 32, "depth": 2}), ("timm/test_convnext", {}), ("timm/test_resnet", {})]


def build(name: str = "small_cnn", weights: Path | None = None, **options: object) -> TileEncoder:
    return build_encoder(Encoder(name=name, weights=weights, mean=MEAN, std=STD, options=options))


class Attack:
    def __reduce__(self):
        return os.mkdir, (self.folder,)

    def __init__(self, folder: str) -> None:
        self.folder = folder


@pytest.mark.parametrize("width", [4, 16, 20])
def test_small_cnn_has_the_width_it_promises(width: int) -> None:
    encoder = build(width=width)
    assert encoder.dim == 4 * width
    assert encoder(torch.rand(2, 3, 32, 48), None).shape == (2, 4 * width)


@pytest.mark.parametrize(
    ("width", "groups"),
    [(4, [1, 1, 2, 2]), (8, [1, 2, 4, 4]), (16, [2, 4, 8, 8]), (11, [1, 2, 4, 4]), (13, [1, 2, 4, 4]), (1, [1] * 4)],
)
def test_groups_divide_every_width(width: int, groups: list[int]) -> None:
    norms = [module for module in build(width=width).modules() if isinstance(module, nn.GroupNorm)]
    assert [norm.num_groups for norm in norms] == groups


def test_small_cnn_sees_one_tile_at_a_time() -> None:
    torch.manual_seed(0)
    encoder = build(width=8, dropout=0.5).double().train()
    image_nCHW = torch.rand(6, 3, 32, 32, dtype=torch.float64)
    key_n = keyed.fold(keyed.root_key(0), torch.arange(6))
    whole_nD = encoder(image_nCHW, key_n)
    single_nD = torch.cat([encoder(image, key) for image, key in zip(image_nCHW.split(1), key_n.split(1), strict=True)])
    torch.testing.assert_close(single_nD, whole_nD, rtol=1e-12, atol=1e-12)
    assert 0 < int((whole_nD == 0).sum()) < whole_nD.numel()


def test_the_input_is_normalised_by_what_travels_with_the_weights() -> None:
    class Look(nn.Module):
        dim = 1

        def forward(self, image_nCHW, tile_key_n):
            self.seen = image_nCHW
            return image_nCHW.mean(dim=(1, 2, 3))[:, None]

    look = Look()
    encoder = TileEncoder(look, MEAN, STD)
    encoder(torch.tensor(MEAN).view(1, 3, 1, 1) + torch.tensor(STD).view(1, 3, 1, 1) * 2, None)
    torch.testing.assert_close(look.seen, torch.full((1, 3, 1, 1), 2.0))
    assert sorted(encoder.state_dict()) == ["mean_C11", "std_C11"]


def test_frozen_statistics_keep_batchnorm_in_evaluation_mode() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))
    frozen = FrozenStatistics(network, dim=4)
    frozen.train()
    assert network[2].training
    assert not network[1].training
    assert network[1].weight.requires_grad
    before = network[1].running_mean.clone()
    frozen(torch.rand(5, 3, 4, 4), None)
    assert torch.equal(network[1].running_mean, before)
    refuse_train_batchnorm(frozen)
    frozen.eval()
    assert not network[2].training


def test_train_mode_batchnorm_is_refused_with_the_remedy() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2)))
    with pytest.raises(ConfigError, match=r"layer '1\.0' is BatchNorm in training mode.*FrozenStatistics"):
        refuse_train_batchnorm(model.train())
    refuse_train_batchnorm(model.eval())
    # Without running statistics, evaluation mode uses those of the chunk too.
    with pytest.raises(ConfigError, match="layer '0' is BatchNorm"):
        refuse_train_batchnorm(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)).eval())


def test_resnet18_is_frozen_trainable_and_blind_to_chunks() -> None:
    encoder = build("resnet18").train()
    refuse_train_batchnorm(encoder)
    assert encoder.dim == 512
    image_nCHW = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    whole_nD = encoder(image_nCHW, None)
    assert whole_nD.shape == (3, 512)
    single_nD = torch.cat([encoder(image, None) for image in image_nCHW.split(1)])
    torch.testing.assert_close(single_nD, whole_nD, rtol=1e-4, atol=1e-5)  # float32; other shapes, other kernels
    whole_nD.sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []
    assert not any("fc" in name for name in encoder.state_dict())


@pytest.mark.parametrize("name", RESNETS)
def test_every_resnet_of_torchvision_builds(name: str) -> None:
    with torch.device("meta"):
        encoder = build(name)
    assert encoder(torch.zeros(2, 3, 32, 32, device="meta"), None).shape == (2, encoder.dim)
    assert not any("fc" in key for key in encoder.state_dict())


def test_the_list_of_resnets_is_that_of_torchvision() -> None:
    models = pytest.importorskip("torchvision.models")
    assert sorted(RESNETS) == sorted(name for name in models.list_models(models) if "resne" in name)


@pytest.mark.parametrize(("name", "options"), TIMM)
def test_networks_of_timm_are_trainable_and_blind_to_chunks(name: str, options: dict) -> None:
    torch.manual_seed(0)
    encoder = build(name, **options).double().train()
    refuse_train_batchnorm(encoder)
    image_nCHW = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    whole_nD = encoder(image_nCHW, None)
    assert whole_nD.shape == (3, encoder.dim)
    single_nD = torch.cat([encoder(image, None) for image in image_nCHW.split(1)])
    torch.testing.assert_close(single_nD, whole_nD, rtol=1e-12, atol=1e-12)
    whole_nD.sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(("name", "options"), TIMM)
def test_weights_of_a_timm_network_go_into_it_without_its_classifier(tmp_path: Path, name: str, options: dict) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(1)
    source = timm.create_model(name.removeprefix("timm/"), num_classes=7, **options)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    torch.manual_seed(2)
    encoder = build(name, tmp_path / "w.safetensors", **options).eval()
    assert len(source.state_dict()) == len(encoder.backbone.network.state_dict()) + 2
    image_nCHW = torch.rand(2, 3, 32, 32)
    source.eval().reset_classifier(0)
    torch.testing.assert_close(encoder.backbone(image_nCHW, None), source(image_nCHW))


def test_weights_for_another_image_size_are_told_so_and_fit_with_the_option(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model("test_vit", img_size=64).state_dict(), tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=r"pos_embed \(1, 17, 64\) for \(1, 5, 64\).*dynamic_img_size: true"):
        build("timm/test_vit", tmp_path / "w.pt", img_size=32)
    encoder = build("timm/test_vit", tmp_path / "w.pt", img_size=64, dynamic_img_size=True)
    assert encoder(torch.rand(2, 3, 32, 32), None).shape == (2, 64)


def test_an_unknown_network_of_timm_lists_near_ones() -> None:
    pytest.importorskip("timm")
    with pytest.raises(ConfigError, match="has no network 'vit_smal_patch16_224'. Near: .*'vit_small_patch16_224'"):
        build("timm/vit_smal_patch16_224")


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("timm/test_vit", {"dept": 2}, "do not fit encoder 'timm/test_vit': .*dept"),
        ("timm/test_vit", {"num_heads": 3}, "do not fit encoder 'timm/test_vit': .*divisible by num_heads"),
        ("timm/test_vit.no_such_tag", {}, "do not fit encoder .*no_such_tag"),
        ("timm/test_vit", {"pretrained": True}, "may not set pretrained"),  # it would download
        ("timm/test_vit", {"checkpoint_path": "x.pth"}, "may not set checkpoint_path"),  # it would be unpickled
        ("timm/test_vit", {"features_only": True}, "may not set features_only"),
        ("resnet18", {"width_per_group": 63}, "do not fit encoder 'resnet18': .*base_width"),
        ("resnet18", {"weights": "DEFAULT"}, "may not set weights"),
    ],
)
def test_options_that_a_library_does_not_take_are_named(name: str, options: dict, reason: str) -> None:
    build(name.partition(".")[0])
    with pytest.raises(ConfigError, match=f"science.encoder.options.*{reason}"):
        build_encoder(Encoder(name=name, options=options))


def test_without_timm_the_cure_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(EnvironmentFault, match=r"encoder 'timm/test_vit' needs timm.*pip install timm"):
        build("timm/test_vit")


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="no encoder 'resnet81'; did you mean 'resnet18'") as caught:
        build("resnet81")
    for name in ("resnet18", "wide_resnet50_2", "small_cnn", "timm/NAME"):
        assert name in str(caught.value)


def test_options_that_do_not_fit_are_named() -> None:
    with pytest.raises(ConfigError, match=r"science.encoder.options do not fit encoder 'small_cnn': .*depth"):
        build(depth=3)


def test_an_encoder_without_a_width_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(encoders._factories, "odd", nn.Identity)
    with pytest.raises(ConfigError, match="encoder 'odd' must have an integer attribute `dim` above 0"):
        build("odd")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_of_a_file_are_taken_and_its_classifier_is_left_out(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(1)
    state = SmallCNN(width=4).state_dict() | {"fc.weight": torch.ones(2, 16), "fc.bias": torch.ones(2)}
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    torch.manual_seed(2)
    loaded = build(width=4, weights=path).backbone.state_dict()
    assert loaded.keys() == {key for key in state if not key.startswith("fc.")}
    assert all(torch.equal(loaded[key], state[key]) for key in loaded)


def test_weights_of_a_torchvision_network_go_into_it(tmp_path: Path) -> None:
    encoder = build("resnet18")
    state = {f"{key}": value + 1 for key, value in encoder.backbone.network.state_dict().items()}
    torch.save(state | {"fc.weight": torch.ones(1000, 512), "fc.bias": torch.ones(1000)}, tmp_path / "resnet18.pth")
    load_backbone_weights(encoder, tmp_path / "resnet18.pth")
    found = encoder.backbone.network.state_dict()
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_weights_of_an_encoder_with_a_layer_fc_of_its_own_are_taken(tmp_path: Path) -> None:
    backbone = SmallCNN(width=4)
    backbone.fc = nn.Linear(16, 16)
    encoder = TileEncoder(backbone, MEAN, STD)
    state = {key: value + 1 for key, value in backbone.state_dict().items()}
    torch.save(state, tmp_path / "w.pt")
    load_backbone_weights(encoder, tmp_path / "w.pt")
    assert all(torch.equal(value, state[key]) for key, value in backbone.state_dict().items())
    torch.save({key: value for key, value in state.items() if key != "fc.bias"}, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=r"1 missing \['fc.bias'\], 0 unexpected"):
        load_backbone_weights(encoder, tmp_path / "w.pt")


def test_weights_that_do_not_fit_are_told_apart(tmp_path: Path) -> None:
    state = SmallCNN(width=4).state_dict()
    state["features.0.weight"] = torch.ones(5, 3, 3, 3)
    state["classifier"] = state.pop("features.1.bias")
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ConfigError) as caught:
        build(width=4, weights=tmp_path / "w.pt")
    message = str(caught.value)
    assert f"'{tmp_path / 'w.pt'}' does not fit the encoder" in message
    assert "1 missing ['features.1.bias']" in message
    assert "1 unexpected ['classifier']" in message
    assert "1 of another shape ['features.0.weight (5, 3, 3, 3) for (4, 3, 3, 3)']" in message


def test_a_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="science.encoder.weights: no file '.*none.pt'"):
        build(weights=tmp_path / "none.pt")
    with pytest.raises(ConfigError, match="no file"):
        build(weights=tmp_path)  # a folder is not a file
    for name in ("bad.pt", "bad.safetensors"):
        (tmp_path / name).write_bytes(b"not a state_dict")
        with pytest.raises(ConfigError, match=f"{name}' cannot be read"):
            build(weights=tmp_path / name)
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    with pytest.raises(ConfigError, match="holds a list, not a state_dict"):
        build(weights=tmp_path / "list.pt")
    torch.save({0: torch.ones(1), "features": {"0.weight": torch.ones(1)}}, tmp_path / "nested.pt")
    with pytest.raises(
        ConfigError, match=r"nested.pt' is not a state_dict: \[0, 'features'\] are not names of tensors"
    ):
        build(weights=tmp_path / "nested.pt")


@pytest.mark.parametrize("writer", [pickle.dump, torch.save], ids=["pickle", "torch"])
def test_a_file_that_would_run_code_does_not(tmp_path: Path, writer) -> None:
    path, trace = tmp_path / "attack.pt", tmp_path / "was-here"
    with path.open("wb") as stream:
        writer({"features.0.weight": Attack(str(trace))}, stream)
    with pytest.raises(ConfigError, match="attack.pt' cannot be read"):
        build(weights=path)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Attack(str(trace))))  # noqa: S301 - the attack itself works
    assert trace.exists()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example["science"]["encoder"]["name"])
def test_the_examples_of_the_page_build(example: dict) -> None:
    config = RunConfig.model_validate(example)
    part = config.science.encoder
    with torch.device("meta"):
        encoder = build_encoder(part.model_copy(update={"weights": None}))
    side = min(config.slides.tile_px, 256)
    assert encoder(torch.zeros((1, 3, side, side), device="meta"), None).shape == (1, encoder.dim)


def test_the_page_names_every_encoder() -> None:
    assert len(EXAMPLES) >= 4
    # Not what other tests have registered, nor the stand-in of benchmarks.
    ours = [name for name in encoders.names() if encoders[name].__module__.startswith("gigamil.models.")]
    assert "small_cnn" in ours
    assert [name for name in ours if f"`{name}`" not in PAGE] == []


def test_statistics_that_nobody_ever_set_are_seen() -> None:
    def network(mean: float, var: float) -> FrozenStatistics:
        norm = nn.BatchNorm2d(2)
        norm.running_mean.fill_(mean)
        norm.running_var.fill_(var)
        return FrozenStatistics(nn.Sequential(norm, nn.Flatten()), 2)

    assert has_blank_statistics(network(0, 1))
    assert not has_blank_statistics(network(0.5, 1))
    assert not has_blank_statistics(network(0, 2))
    assert not has_blank_statistics(build())  # GroupNorm has none
