"""A compiled encoder: the same numbers under the same names, by a backend that needs no compiler."""

import copy

import pytest
import torch
from torch import nn

from gigamil import keyed
from gigamil.config.schema import Encoder
from gigamil.errors import EnvironmentFault
from gigamil.models.compiled import compile_encoder
from gigamil.models.encoder import TileEncoder, build_encoder

# Programs are of one encoder each: with a graph and without.
ENCODERS = [
    Encoder(name="small_cnn", options={"width": 4, "dropout": 0.5}),
    Encoder(name="resnet18", freeze_blocks=1),
    Encoder(name="timm/test_vit", options={"img_size": 32, "depth": 2}, lora_rank=2),
]


@pytest.fixture(autouse=True)
def _no_programs_of_others():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def encoders(part: Encoder) -> tuple[TileEncoder, TileEncoder]:
    """One as it is and its compiled copy."""
    torch.manual_seed(0)
    eager = build_encoder(part).double().train()
    for name, parameter in eager.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1)
    compiled = copy.deepcopy(eager)
    compile_encoder(compiled.backbone, backend="aot_eager")
    return eager, compiled


@pytest.mark.parametrize("part", ENCODERS, ids=lambda part: part.name)
def test_it_computes_the_same_function_and_gradient(part: Encoder) -> None:
    eager, compiled = encoders(part)
    image_nCHW = torch.rand(4, 3, 32, 32, dtype=torch.float64)
    key_n = keyed.fold(keyed.root_key(0), torch.arange(4))
    with torch.no_grad():
        torch.testing.assert_close(compiled(image_nCHW, key_n), eager(image_nCHW, key_n), rtol=1e-12, atol=1e-12)
    outputs = [encoder(image_nCHW, key_n) for encoder in (eager, compiled)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-12, atol=1e-12)
    cotangent_nD = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(cotangent_nD)
    for (name, a), (_, b) in zip(eager.named_parameters(), compiled.named_parameters(), strict=True):
        assert (b.grad is not None) == a.requires_grad, name
        if a.requires_grad:
            assert (b.grad - a.grad).norm() <= 1e-12 * a.grad.norm() + 1e-14, name


@pytest.mark.parametrize("part", ENCODERS[:1], ids=lambda part: part.name)
def test_names_stay_and_a_checkpoint_of_either_fits_the_other(part: Encoder) -> None:
    eager, compiled = encoders(part)
    assert list(compiled.state_dict()) == list(eager.state_dict())
    assert [name for name, _ in compiled.named_modules()] == [name for name, _ in eager.named_modules()]
    image_nCHW = torch.rand(4, 3, 32, 32, dtype=torch.float64)
    compiled.eval()(image_nCHW, None)  # there is a program now: it must see the new weights
    with torch.no_grad():
        for parameter in eager.parameters():
            parameter.mul_(1.5)
    compiled.load_state_dict(eager.state_dict())
    torch.testing.assert_close(compiled(image_nCHW, None), eager.eval()(image_nCHW, None), rtol=1e-12, atol=1e-12)


def test_one_shape_of_chunk_is_compiled_once_per_mode() -> None:
    programs = []

    def count(graph: torch.fx.GraphModule, inputs: object):
        programs.append(graph)
        return graph.forward

    encoder = build_encoder(Encoder(name="small_cnn", options={"width": 4}))
    compile_encoder(encoder.backbone, backend=count)
    for _ in range(3):
        encoder(torch.rand(4, 3, 32, 32), torch.arange(4)).sum().backward()
        with torch.no_grad():
            encoder(torch.rand(4, 3, 32, 32), torch.arange(4))
    assert len(programs) == 2


def test_without_a_compiler_the_cure_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CXX", "my-g++")
    with pytest.raises(
        EnvironmentFault, match=r"needs a C\+\+ compiler, and none of \['my-g\+\+'.*apt-get install g\+\+"
    ):
        compile_encoder(nn.Linear(1, 1))
    compile_encoder(nn.Linear(1, 1), backend="aot_eager")
