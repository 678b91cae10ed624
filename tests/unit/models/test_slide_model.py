"""The model is a function of its configuration: same seed, same parameters, and nobody else's generator is touched."""

import pytest
import torch

from gigamil import keyed
from gigamil.config.schema import Science
from gigamil.errors import ConfigError
from gigamil.models.bag import Bag, LocalPool
from gigamil.models.slide_model import SlideModel, build_model


def science(seed: int = 0, **changed: object) -> Science:
    part = {"seed": seed, "encoder": {"name": "small_cnn", "options": {"width": 4}}, "dropout": 0.5}
    return Science.model_validate(part | changed)


def make_bag(model: SlideModel, num_slides: int, draws: bool) -> Bag:
    key_B = keyed.fold(keyed.root_key(0), torch.arange(num_slides))
    return Bag(
        embedding_nD=torch.ones(num_slides, model.encoder.dim),
        position_n2=torch.zeros(num_slides, 2, dtype=torch.float64),
        sizes=(1,) * num_slides,
        pool=LocalPool(num_slides),
        tile_key_n=key_B if draws else None,
        slide_key_B=key_B if draws else None,
    )


def test_parameters_are_a_function_of_the_seed() -> None:
    torch.manual_seed(123)
    first = build_model(science(0), 2).state_dict()
    torch.manual_seed(321)
    again = build_model(science(0), 2).state_dict()
    other = build_model(science(1), 2).state_dict()
    assert first.keys() == again.keys() == other.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    build_model(science(), 2)
    assert torch.equal(torch.get_rng_state(), state)


def test_both_halves_go_through_forward() -> None:
    model = build_model(science(), 3)
    image_nCHW = torch.rand(2, 3, 32, 32)
    assert torch.equal(model("encode", image_nCHW, None), model.encode(image_nCHW, None))
    logits_BK, pooled = model("classify", make_bag(model, 2, draws=False))
    assert (logits_BK.shape, pooled.attention_nA.shape) == ((2, 3), (2, 1))


def test_an_aggregator_that_gives_logits_has_no_head_after_it() -> None:
    model = build_model(science(dropout=0.0, aggregator={"name": "mean"}), 3)
    assert model.head is None
    logits_BK, pooled = model("classify", make_bag(model, 2, draws=False))
    assert torch.equal(logits_BK, pooled.slide_BX)
    assert logits_BK.shape == (2, 3)
    with pytest.raises(
        ConfigError, match=r"science.dropout=0.5 is for a slide embedding, but MeanPooling gives logits"
    ):
        build_model(science(aggregator={"name": "mean"}), 3)


def test_head_dropout_is_keyed_by_slide() -> None:
    model = build_model(science(dropout=0.5), 3)
    drawn = model.classify(make_bag(model, 4, draws=True))[0]
    assert torch.equal(model.classify(make_bag(model, 4, draws=True))[0], drawn)
    assert len({tuple(row) for row in drawn.tolist()}) == 4  # equal slides, masks of their own
    assert len({tuple(row) for row in model.classify(make_bag(model, 4, draws=False))[0].tolist()}) == 1


def test_the_head_is_float32_under_autocast() -> None:
    model = build_model(science(), 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embedding_nD = model("encode", torch.rand(1, 3, 32, 32), None)
        logits_BK, pooled = model("classify", make_bag(model, 1, draws=False))
    assert logits_BK.dtype == pooled.attention_nA.dtype == torch.float32
    assert embedding_nD.shape == (1, 16)
