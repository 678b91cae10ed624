"""Which aggregators respect the assumption of multiple-instance learning: a bag is positive for what is in it?

The three algorithmic tests of Raff and Holt (NeurIPS 2023, arXiv:2310.17867) for every aggregator that gigamil has. Each is a set
of bags that can be told apart by the rule, or more easily by a shortcut which breaks it; in the test bags the shortcut
points the other way. A model that has learned the rule keeps its AUC; one below 0.5 has learned the shortcut.

- absence: a positive bag has an instance of the concept. Negative bags of training have a poison too, so that "no poison" tells them
  apart; in the test it is the positive bags that have it.
- pair: the same with two concepts that a positive bag must both have; a negative one has one of them.
- frequency: a positive bag has both concepts, once each; a negative bag has one of them, once in training, 35 to 44 times in the test.

`one-sided` are `noisy_or`, `instance_max` and `topk_mean` where no instance can speak for the negative class: they cannot learn that
something is missing (absence, pair); they may still count (frequency). Instances are 16 normal numbers, 3 and 0.1 being standard
deviations; the encoder is a small perceptron, the rest is gigamil's: aggregator, head, loss.

    python benchmarks/reproduce/unit_tests.py [--seeds 1] [--epochs 30] [--out DIR]

Writes unit_tests.png and unit_tests.json into DIR. The table has AUCs on the test bags, mean over seeds, and in brackets on bags
like those of training; the last line is JSON: aggregators, violations (per test the aggregators below 0.5 that learned to tell
training bags apart), seeds, ...
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from gigamil.evaluate.style import drawing
from gigamil.metrics.classification import auc
from gigamil.models.aggregator import aggregators, build_aggregator, min_tiles
from gigamil.models.bag import Bag, LocalPool
from gigamil.models.slide_model import SlideModel
from gigamil.train.loss import losses, slide_losses

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from origin import origin

DIM, EMBEDDING = 16, 32
BACKGROUND = 10
LEARNED = 0.9  # AUC on bags like those of training, from which on a model has learned something to be judged by
LIKE_TRAINING, TURNED = False, True

Draw = Callable[[np.random.Generator, bool, bool], np.ndarray]  # positive?, turned? -> instances (n, DIM)


def _normal(rng: np.random.Generator, mean: float, deviation: float, count: int) -> np.ndarray:
    return rng.normal(mean, deviation, (count, DIM))


def _absence(rng: np.random.Generator, is_positive: bool, is_turned: bool) -> np.ndarray:
    parts = [_normal(rng, 0, 1, BACKGROUND)]
    if is_positive:
        for _ in range(rng.integers(1, 4)):
            parts.append(_normal(rng, *((0, 3) if rng.random() < 0.5 else (1, 1)), 1))
    return np.concatenate(parts + _poison(rng, is_positive, is_turned))


def _pair(rng: np.random.Generator, is_positive: bool, is_turned: bool) -> np.ndarray:
    parts = [_normal(rng, 0, 1, int(rng.integers(1, 10)))]
    if is_positive:
        count = int(rng.integers(1, 4))
        parts += [_normal(rng, 2, 0.1, count), _normal(rng, 3, 0.1, count)]
    else:
        parts.append(_normal(rng, float(rng.choice([2, 3])), 0.1, 1))
    return np.concatenate(parts + _poison(rng, is_positive, is_turned))


def _frequency(rng: np.random.Generator, is_positive: bool, is_turned: bool) -> np.ndarray:
    parts = [_normal(rng, 0, 1, int(rng.integers(1, 10)))]
    if is_positive:
        parts += [_normal(rng, 2, 0.1, 1), _normal(rng, 3, 0.1, 1)]
    else:
        count = int(rng.integers(35, 45)) if is_turned else 1
        parts.append(_normal(rng, float(rng.choice([2, 3])), 0.1, count))
    return np.concatenate(parts)


def _poison(rng: np.random.Generator, is_positive: bool, is_turned: bool) -> list[np.ndarray]:
    """In negative bags of training, in positive bags of the test."""
    return [_normal(rng, -10, 0.1, 1)] if is_positive == is_turned else []


TESTS: dict[str, Draw] = {"absence": _absence, "pair": _pair, "frequency": _frequency}


class Perceptron(nn.Module):
    """Instance -> embedding, in an encoder's place."""

    dim = EMBEDDING

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(DIM, EMBEDDING), nn.ReLU(), nn.Linear(EMBEDDING, EMBEDDING), nn.ReLU())

    def forward(self, instance_nD: Tensor, tile_key_n: Tensor | None) -> Tensor:
        """Instances (n, 16) -> (n, 32)."""
        embedding_nD: Tensor = self.backbone(instance_nD)
        return embedding_nD


class Bags(NamedTuple):
    """Bags of a test and their labels."""

    bags: list[Tensor]
    label_N: Tensor


def draw_bags(draw: Draw, count: int, is_turned: bool, seed: int, smallest: int) -> Bags:
    """Half of them positive; background fills up to what an aggregator takes."""
    rng = np.random.default_rng(seed)
    bags = []
    for number in range(count):
        bag = draw(rng, number % 2 == 1, is_turned)
        if len(bag) < smallest:
            bag = np.concatenate([bag, _normal(rng, 0, 1, smallest - len(bag))])
        bags.append(torch.from_numpy(bag[rng.permutation(len(bag))]).float())
    return Bags(bags, torch.arange(count) % 2)


def _forward(model: SlideModel, bags: list[Tensor], label_B: Tensor | None) -> tuple[Tensor, object]:
    sizes = tuple(len(bag) for bag in bags)
    instance_nD = torch.cat(bags)
    # Instances have no place: a grid that is the same for all bags says nothing.
    place_n2 = torch.cat([torch.stack([torch.arange(size) % 8, torch.arange(size) // 8], 1) for size in sizes]).double()
    bag = Bag(model("encode", instance_nD, None), place_n2, sizes, LocalPool(sum(sizes)), label_B=label_B)
    logits_BK, pooled = model("classify", bag)
    return logits_BK, pooled


def train(model: SlideModel, found: Bags, epochs: int, seed: int, batch: int = 16) -> None:
    """Adam over batches of bags."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(found.bags), generator=generator).split(batch):
            label_B = found.label_N[rows]
            logits_BK, pooled = _forward(model, [found.bags[row] for row in rows], label_B)
            loss = slide_losses(losses["cross_entropy"], logits_BK, pooled, label_B).mean()  # type: ignore[arg-type]
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()


@torch.no_grad()
def score(model: SlideModel, found: Bags) -> float:
    """AUC."""
    model.eval()
    probs = [_forward(model, [bag], None)[0].softmax(1)[0].double().numpy() for bag in found.bags]
    return float(auc(found.label_N.numpy(), np.stack(probs)))


class Result(NamedTuple):
    """AUCs of an aggregator in a test, one per seed."""

    aggregator: str
    test: str
    like_training: list[float]
    turned: list[float]

    @property
    def is_violation(self) -> bool:
        """It has learned, and not the rule."""
        return float(np.mean(self.like_training)) >= LEARNED and float(np.mean(self.turned)) < 0.5


ONE_SIDED = ", one-sided"  # behind the name of an aggregator that has the option


def all_kinds() -> list[str]:
    """Every aggregator, and behind it its one-sided kind where that keeps the rule."""
    kept = ("noisy_or", "instance_max", "topk_mean")
    return [kind for name in aggregators.names() for kind in ([name, name + ONE_SIDED] if name in kept else [name])]


def run(names: list[str], seeds: int, epochs: int, count: int) -> Iterator[Result]:
    """Every aggregator in every test."""
    for name in names:
        for test, draw in TESTS.items():
            like, turned = [], []
            for seed in range(seeds):
                torch.manual_seed(seed)
                encoder = Perceptron()
                options = {"one_sided": True} if name.endswith(ONE_SIDED) else {}
                aggregator = build_aggregator(name.removesuffix(ONE_SIDED), encoder.dim, 2, options)
                model = SlideModel(encoder, aggregator, 2)  # type: ignore[arg-type]
                smallest = min_tiles(aggregator)
                train(model, draw_bags(draw, count, LIKE_TRAINING, seed, smallest), epochs, seed)
                like.append(score(model, draw_bags(draw, count, LIKE_TRAINING, seed + 1000, smallest)))
                turned.append(score(model, draw_bags(draw, count, TURNED, seed + 2000, smallest)))
            yield Result(name, test, like, turned)


def draw_table(results: list[Result], out_png: Path) -> None:
    """A picture of the table: AUC on turned bags; red is below 0.5."""
    names = list(dict.fromkeys(result.aggregator for result in results))
    value_NT = np.array([[_of(results, name, test) for test in TESTS] for name in names])
    with drawing(out_png, 6.4, 1.2 + 0.32 * len(names)) as figure:
        axes = figure.add_subplot()
        axes.imshow(value_NT, cmap="RdYlBu", vmin=-0.25, vmax=1.25, aspect="auto")  # without the darkest ends
        for (row, column), value in np.ndenumerate(value_NT):
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=9)
        axes.set_xticks(range(len(TESTS)), list(TESTS))
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(length=0)
        axes.set_title("AUC where the shortcut points the other way", fontsize=10)


def _of(results: list[Result], name: str, test: str) -> float:
    return float(np.mean(next(r.turned for r in results if (r.aggregator, r.test) == (name, test))))


def table(results: list[Result]) -> str:
    """For people."""
    names = list(dict.fromkeys(result.aggregator for result in results))
    rows = [f"{'aggregator':<22}" + "".join(f"{test:>22}" for test in TESTS)]
    for name in names:
        cells = []
        for result in (r for r in results if r.aggregator == name):
            mark = "  shortcut" if result.is_violation else ""
            cells.append(f"{np.mean(result.turned):.2f} ({np.mean(result.like_training):.2f}){mark}")
        rows.append(f"{name:<22}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(rows)


def main(words: Sequence[str] | None = None) -> int:
    """Run, print, draw; return 0."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--aggregators", nargs="+", metavar="NAME", help="which (all that gigamil has)")
    parser.add_argument("--seeds", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--epochs", type=int, default=30, help="(%(default)s)")
    parser.add_argument("--bags", type=int, default=200, help="of training, and of each test (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/unit_tests"), help="for the figure (%(default)s)")
    arguments = parser.parse_args(words)
    start = time.monotonic()
    names = arguments.aggregators or all_kinds()
    done = run(names, arguments.seeds, arguments.epochs, arguments.bags)
    results = list(tqdm(done, total=len(names) * len(TESTS), unit="model", disable=None))
    arguments.out.mkdir(parents=True, exist_ok=True)
    draw_table(results, arguments.out / "unit_tests.png")
    print(table(results))
    print(f"written: {arguments.out / 'unit_tests.png'}")
    violations = {test: [r.aggregator for r in results if r.test == test and r.is_violation] for test in TESTS}
    facts = {"aggregators": len(names), "violations": violations, "seeds": arguments.seeds, "epochs": arguments.epochs}
    facts |= {"bags": arguments.bags, "seconds": round(time.monotonic() - start, 1)}
    whole = facts | {"results": [result._asdict() for result in results]}
    whole |= origin(__file__, words, torch=torch.__version__)
    (arguments.out / "unit_tests.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
