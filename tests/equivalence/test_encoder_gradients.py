"""Encoders through the exact step: kept and replayed chunks have the gradient of autograd over the whole bag.

In float64 and in one process, so that what is compared is the encoder's own: its normalisation layers (LayerNorm,
GroupNorm, BatchNorm with stored statistics, LayerScale), folded or not, with fixed blocks and low-rank updates.
"""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gigamil.config.schema import Encoder
from gigamil.data.augment import augment_tiles, to_float
from gigamil.data.pipeline import DrawKeys
from gigamil.models.aggregators.attention import GatedAttention
from gigamil.models.bag import Bag, LocalPool, Pooled
from gigamil.models.encoder import build_encoder
from gigamil.models.fold import fold_batchnorm
from gigamil.models.slide_model import SlideModel
from gigamil.parallel.topology import Topology
from gigamil.partition.schedule import plan_steps
from gigamil.testing.exactness import AUGMENT, Outcome, compare, own_tiles
from gigamil.train.loss import cross_entropy
from gigamil.train.plain import PlainEngine
from gigamil.train.step import ExactStep, Ranks

BOUND = 1e-12
SEED, STEP = 5, 11
SIZES, CHUNK = (5, 2), 2  # four chunks: the third has tiles of both slides, the last is of one tile
KEEPS = (4, 2, 0)  # chunks: all, half, none
LABEL_S, WEIGHT_S = torch.tensor([2, 0]), torch.tensor([0.5, 2.0], dtype=torch.float64)

VIT = Encoder(name="timm/test_vit", options={"img_size": 32, "depth": 2})  # LayerNorm
CONVNEXT = Encoder(name="timm/test_convnext", options={"ls_init_value": 1e-2})  # LayerNorm2d, LayerScale
RESNET, RESNET_TIMM = Encoder(name="resnet18"), Encoder(name="timm/test_resnet")  # BatchNorm
SMALL = Encoder(name="small_cnn", options={"width": 8, "dropout": 0.25})  # GroupNorm


def case(part: Encoder, tile_px: int, title: str, fold: bool = False, **changes: object):
    return pytest.param(part.model_copy(update=changes), tile_px, fold, id=title)


CASES = [
    case(SMALL, 48, "small_cnn"),
    case(SMALL, 32, "small_cnn-fixed", freeze_blocks=2),
    case(SMALL, 32, "small_cnn-all-fixed", freeze_blocks=4),
    case(VIT, 32, "vit"),
    case(VIT, 32, "vit-fixed", freeze_blocks=2),
    case(VIT, 32, "vit-lora", lora_rank=3),
    case(VIT, 32, "vit-lora-fixed", lora_rank=3, freeze_blocks=2),
    case(CONVNEXT, 64, "convnext"),
    case(CONVNEXT, 32, "convnext-fixed", freeze_blocks=4),
    case(CONVNEXT, 32, "convnext-lora", lora_rank=3),
    case(RESNET, 64, "resnet"),
    case(RESNET, 64, "resnet-folded", fold=True),
    case(RESNET, 32, "resnet-fixed", freeze_blocks=2),
    case(RESNET, 32, "resnet-fixed-folded", freeze_blocks=2, fold=True),
    case(RESNET_TIMM, 32, "timm-resnet-folded", fold=True),
]


@pytest.mark.parametrize(("part", "tile_px", "fold"), CASES)
def test_the_gradient_is_that_of_the_whole_bag(part: Encoder, tile_px: int, fold: bool) -> None:
    images = make_images(tile_px)
    wanted = whole_bag(make_model(part), images)
    for num_keep in KEEPS:
        model = make_model(part)
        assert not fold or fold_batchnorm(model.encoder) > 0
        found = exact_step(model, images, num_keep)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained == found.gradients.keys() == wanted.gradients.keys()
        assert all(bool(gradient.any()) for gradient in found.gradients.values())
        errors = compare(found, wanted)
        assert errors.within(BOUND), (num_keep, errors)


def make_images(tile_px: int) -> list[Tensor]:
    """uint8 tiles of each slide."""
    generator = np.random.default_rng(SEED)
    return [torch.from_numpy(generator.integers(0, 256, (size, tile_px, tile_px, 3), np.uint8)) for size in SIZES]


def make_model(part: Encoder) -> SlideModel:
    torch.manual_seed(SEED)
    encoder = build_encoder(part)
    model = SlideModel(encoder, GatedAttention(encoder.dim, hidden=6, heads=2), num_classes=3).double().train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # a fresh layer's ones and zeros would hide half of a formula
            if name.endswith("lora_B"):
                nn.init.normal_(parameter, std=0.1)
            elif parameter.dim() == 1:
                parameter += torch.empty_like(parameter).uniform_(-0.2, 0.2)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
    return model


def draw_keys() -> DrawKeys:
    return DrawKeys(SEED, [f"slide-{number}" for number in range(len(SIZES))])


def whole_bag(model: SlideModel, images: list[Tensor]) -> Outcome:
    """Autograd over one graph: sum_s w_s l_s / sum_s w_s."""
    slide_key_S = draw_keys().slides(STEP, range(len(SIZES)))
    number_N = torch.cat([torch.arange(size) for size in SIZES])
    tile_key_N = DrawKeys.tiles(slide_key_S, torch.repeat_interleave(torch.tensor(SIZES)), number_N)
    image_NCHW = augment_tiles(to_float(torch.cat(images), torch.float64), tile_key_N, AUGMENT)
    embedding_ND = model.encode(image_NCHW, tile_key_N)
    if not embedding_ND.requires_grad:  # nothing of the encoder is trained
        embedding_ND.requires_grad_()
    embedding_ND.retain_grad()
    position_N2 = torch.zeros((len(number_N), 2), dtype=torch.float64)
    bag = Bag(embedding_ND, position_N2, SIZES, LocalPool(len(number_N)), tile_key_N, slide_key_S, LABEL_S)
    loss_S = nn.functional.cross_entropy(model.classify(bag)[0], LABEL_S, reduction="none")
    loss = (loss_S * WEIGHT_S).sum() / WEIGHT_S.sum()
    loss.backward()
    return Outcome(float(loss.detach()), gradients_of(model), embedding_ND.grad)


def exact_step(model: SlideModel, images: list[Tensor], num_keep: int) -> Outcome:
    """The same by chunks, as training does it."""
    engine = Recorder(model)
    ranks = Ranks(Topology(1, 0, 0, 1, 1))
    plan = plan_steps(range(len(SIZES)), SIZES, len(SIZES), 1, 1)[0]
    step = ExactStep(
        engine,
        ranks,
        cross_entropy,
        chunk=CHUNK,
        num_keep=num_keep,
        keys=draw_keys(),
        augment=lambda image, key: augment_tiles(image, key, AUGMENT),
    )
    is_trained = any(parameter.requires_grad for parameter in model.encoder.parameters())
    tiles = own_tiles(images, plan, ranks.topology)
    result = step.train(plan, tiles, LABEL_S, WEIGHT_S, step=STEP, learning_rates=[], train_encoder=is_trained)
    assert not result.skipped
    return Outcome(result.loss, engine.gradients, engine.bag.embedding_nD.grad)


class Recorder(PlainEngine):
    """Keeps the gradients of the step, and the bag that was pooled."""

    def classify(self, bag: Bag) -> tuple[Tensor, Pooled]:
        self.bag = bag
        return super().classify(bag)

    def step(self, learning_rates: Sequence[float]) -> float:
        self.gradients = gradients_of(self.module)
        return 0.0


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Of the parameters that have one."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
