"""LoRA: starts as the loaded network, trains nothing but its updates, and merges into plain weights."""

import copy

import pytest
import torch
from torch import nn

from gigamil.config.schema import Encoder
from gigamil.errors import ConfigError
from gigamil.models.encoder import TileEncoder, build_encoder
from gigamil.models.lora import LoRALinear, add_lora, merge_lora

VIT = Encoder(name="timm/test_vit", options={"img_size": 32, "depth": 2})


def build(**changes: object) -> TileEncoder:
    torch.manual_seed(0)
    return build_encoder(VIT.model_copy(update=changes)).double().train()


def tiles() -> torch.Tensor:
    return torch.rand(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def update_randomly(encoder: nn.Module) -> None:
    for name, parameter in encoder.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1)


def _backward(embedding_nD: torch.Tensor) -> None:
    # Not the plain sum, nor that of squares: behind a LayerNorm both are constants.
    (embedding_nD * torch.arange(embedding_nD.shape[1])).sum().backward()


def test_a_layer_is_the_formula_of_the_paper() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(5, 4).double()
    layer = LoRALinear(linear, rank=2, alpha=6.0)
    nn.init.normal_(layer.lora_B)
    x = torch.rand(7, 2, 5, dtype=torch.float64)
    wanted = linear(x) + 6.0 / 2 * (x @ layer.lora_A.T @ layer.lora_B.T)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(nn.functional.linear(x, layer.weight, layer.bias), wanted, rtol=1e-12, atol=1e-12)
    assert sorted(layer.state_dict()) == ["bias", "lora_A", "lora_B", "weight"]


def test_it_starts_as_the_network_and_trains_its_updates_only() -> None:
    plain, encoder = build(), build(lora_rank=2)
    state = encoder.state_dict()
    for name, value in plain.state_dict().items():  # the base keeps its names and, drawn first, its values
        assert torch.equal(state[name], value), name
    assert torch.equal(encoder(tiles(), None), plain(tiles(), None))
    trained = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    layers = [f"backbone.network.blocks.{i}.{part}" for i in (0, 1) for part in LAYERS]
    assert sorted(trained) == sorted(f"{layer}.lora_{which}" for layer in layers for which in "AB")
    update_randomly(encoder)
    _backward(encoder(tiles(), None))
    for name, parameter in encoder.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert all(p.grad.abs().max() > 0 for p in encoder.parameters() if p.requires_grad)


LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


@pytest.mark.parametrize("name", ["timm/test_vit", "timm/beit_base_patch16_224"])
def test_merging_keeps_the_function_and_the_names(name: str) -> None:
    # BEiT never calls its qkv layer: it takes the weight.
    small = VIT.model_copy(update={"name": name, "lora_rank": 4})
    encoder = build_encoder(small).double()
    update_randomly(encoder)
    plain = build_encoder(small.model_copy(update={"lora_rank": None})).double()
    whole_nD = encoder(tiles(), None)
    assert not torch.allclose(whole_nD, plain(tiles(), None))
    _backward(whole_nD)
    assert all(p.grad.abs().max() > 0 for n, p in encoder.named_parameters() if n.endswith("lora_A"))
    assert merge_lora(encoder.backbone) == 8
    assert encoder.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(encoder(tiles(), None), whole_nD, rtol=1e-12, atol=1e-12)


def test_weights_of_a_file_are_the_base(tmp_path) -> None:
    source = build()
    torch.save(source.float().backbone.network.state_dict(), tmp_path / "vit.pt")
    torch.manual_seed(5)
    encoder = build_encoder(VIT.model_copy(update={"lora_rank": 2, "weights": tmp_path / "vit.pt"}))
    assert torch.equal(encoder(tiles().float(), None), source(tiles().float(), None))


def test_frozen_blocks_get_no_updates() -> None:
    encoder = build(lora_rank=2, freeze_blocks=2)  # patch embedding and the first of two blocks
    trained = {name.split(".")[3] for name, p in encoder.named_parameters() if p.requires_grad}
    assert trained == {"1"}


def test_layers_no_wider_than_the_rank_stay_as_they_are() -> None:
    network = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    add_lora(network, 3, 1.0)
    assert [type(layer) for layer in network] == [LoRALinear, nn.Linear]


def test_an_attention_module_of_torch_is_not_broken() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True).double().eval()
    plain = copy.deepcopy(layer)
    add_lora(layer, 2, 4.0)
    assert type(layer.linear1) is LoRALinear
    assert type(layer.self_attn.out_proj) is not LoRALinear
    update_randomly(layer)
    x = torch.rand(2, 5, 16, dtype=torch.float64)
    slow = layer(x)
    with torch.no_grad():  # torch's fused path takes the weights of the layers
        fast = layer(x)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(slow, plain(x))


def test_an_encoder_without_linear_layers_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="science.encoder.lora_rank=4: ResNet has no linear layers"):
        build_encoder(Encoder(name="timm/test_resnet", lora_rank=4))
    with pytest.raises(ConfigError, match="lora_rank=64 is not below the width of any linear layer .* has 64"):
        build_encoder(Encoder(name="timm/test_vit", lora_rank=64))
