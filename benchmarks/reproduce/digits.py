"""Bags of digits: is training by parts the same as training on the whole bag, and what do sampling, coupling and freezing cost?

Two protocols. `acc` is that of gradient accumulation for attention MIL (Andersson et al. 2022, arXiv:2203.03981): the key digit is 9, a
positive bag of n digits has ceil(5 % of n) nines, a negative one none; 150 + 150 training bags. Full and sampled once more with a
single nine, which a sample seldom has, in bags of n / 2 and twice as many of them, as it is harder to find. `ilse` is that of
attention-based MIL (Ilse et al. 2018, arXiv:1802.04712): bags of N(10, 2) digits, positive if one of them is a 9.

Regimes, all with the same network, batches and optimiser:
- full: the whole bag in memory, plain autograd;
- replay: gigamil's exact step, no graph kept, on 1, 2 and 4 ranks;
- sampled: the exact step on 30 % of the digits of a bag, drawn anew in each step;
- frozen: random encoder, bag classifier only;
- coupled: frozen, then the classifier teaches the encoder tile by tile, then a new classifier (Wang et al. 2023, arXiv:2303.15749).

First the curves: the first 20 losses with SGD in float64 from one start, of full and of replay on each number of ranks. Then, for each
seed, training with AdamW in float32, every run in a process of its own: AUC of the test bags, AUC of their digits by attention
(9 or not), tiles through the encoder, peak memory.

    python benchmarks/reproduce/digits.py [--digits FOLDER] [--protocol acc] [--bag 50] [--seeds 3] [--epochs 20] [--out DIR]

FOLDER holds mnist.npz (train_images, train_labels, test_images, test_labels). Writes digits.png and digits.json (of every run) into
DIR. The last line is JSON: auc_full, auc_replay, auc_sampled, auc_coupled, auc_frozen (means over seeds), one_nine (the same of full
and sampled, with a single nine), max_curve_difference (largest relative difference of those 20 losses), auc_difference (of the means
of replay on 1 and 2 ranks from full's), auc_seed_spread (largest range over seeds of one of these), seeds, ...
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from gigamil.data.augment import to_float
from gigamil.data.images import HeldImages
from gigamil.data.pipeline import DrawKeys, StepTiles
from gigamil.evaluate.style import class_style, drawing
from gigamil.metrics.classification import auc
from gigamil.models.aggregator import build_aggregator
from gigamil.models.bag import Bag, LocalPool
from gigamil.models.encoder import TileEncoder
from gigamil.models.slide_model import SlideModel
from gigamil.parallel.topology import Topology
from gigamil.partition.choose import uniform_tiles
from gigamil.partition.schedule import StepPlan, plan_steps
from gigamil.testing.exactness import World
from gigamil.testing.ranks import run_on_ranks
from gigamil.train.loss import losses
from gigamil.train.memory import MemoryMeter
from gigamil.train.plain import PlainEngine
from gigamil.train.step import ExactStep, Ranks, attention_of
from gigamil.train.taught import TaughtStep

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from options import need_file, real_data
from origin import origin

KEY = 9
SHARE_SAMPLED = 0.3
CURVE_STEPS, CURVE_RANKS = 20, (1, 2, 4)
BAGS_PER_STEP, CHUNK = 10, 64
REGIMES = ("full", "replay", "sampled", "frozen", "coupled")


@dataclass(frozen=True)
class Setting:
    """What is run.

    Attributes:
        digits: folder of mnist.npz.
        protocol, bag: acc or ilse; digits per bag (its mean for ilse).
        train, test: bags.
        epochs: over the training bags; of each classifier, for coupled.
        teach_epochs: of teaching.
        lr, lr_head: of AdamW.
        nines: of a positive bag, for acc; None: 5 %.
    """

    digits: str
    protocol: str = "acc"
    bag: int = 50
    train: int = 300
    test: int = 200
    epochs: int = 12
    teach_epochs: int = 3
    lr: float = 1e-3
    lr_head: float = 1e-3
    regime: str = "full"
    seed: int = 0
    nines: int | None = None


class Bags(NamedTuple):
    """Bags of digits, uint8 RGB (n, 28, 28, 3) each, their labels, and which digits are the key."""

    images: list[Tensor]
    label_N: Tensor
    is_key: list[np.ndarray]

    @property
    def sizes(self) -> list[int]:
        """Digits of each bag."""
        return [len(bag) for bag in self.images]


class LeNet(nn.Module):
    """As the encoder of Ilse et al., smaller: two convolutions, and a layer to 64 numbers."""

    dim = 64

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 5), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.last = nn.Sequential(nn.Linear(32 * 4 * 4, self.dim), nn.ReLU())

    def forward(self, image_nCHW: Tensor, tile_key_n: Tensor | None) -> Tensor:
        """Digits (n, 3, 28, 28) -> (n, 64)."""
        embedding_nD: Tensor = self.last(self.features(image_nCHW).flatten(1))
        return embedding_nD


def make_bags(setting: Setting, side: str, count: int, seed: int) -> Bags:
    """Bags of a side of MNIST; the same for every regime."""
    with np.load(Path(setting.digits) / "mnist.npz") as arrays:
        images, labels = arrays[f"{side}_images"], arrays[f"{side}_labels"]
    rng = np.random.default_rng([seed, side == "test"])
    keys, others = np.flatnonzero(labels == KEY), np.flatnonzero(labels != KEY)
    bags, bag_labels, is_key = [], [], []
    for number in range(count):
        if setting.protocol == "acc":
            most = math.ceil(0.05 * setting.bag) if setting.nines is None else setting.nines
            nines = most if number % 2 else 0
            chosen = np.concatenate([rng.choice(keys, nines, False), rng.choice(others, setting.bag - nines, False)])
        else:
            size = max(1, int(rng.normal(setting.bag, setting.bag / 5)))
            chosen = rng.choice(len(labels), size, replace=False)
        chosen = rng.permutation(chosen)
        bags.append(torch.from_numpy(images[chosen])[..., None].expand(-1, -1, -1, 3).contiguous())
        is_key.append(labels[chosen] == KEY)
        bag_labels.append(int((labels[chosen] == KEY).any()))
    return Bags(bags, torch.tensor(bag_labels), is_key)


def make_model(seed: int) -> SlideModel:
    """The network of all regimes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = TileEncoder(LeNet(), (0.13,) * 3, (0.31,) * 3)
        return SlideModel(encoder, build_aggregator("gated_attention", encoder.dim, 2, {"hidden": 64}), 2)


def bag_of(embedding_nD: Tensor, sizes: Sequence[int]) -> Bag:
    """Bags that lie in one process."""
    nowhere_n2 = torch.zeros((len(embedding_nD), 2), dtype=torch.float64)
    return Bag(embedding_nD, nowhere_n2, tuple(sizes), LocalPool(sum(sizes)))


def own_tiles(bags: Bags, plan: StepPlan, topology: Topology) -> StepTiles:
    """What this rank owns of a step."""
    group = plan.groups[topology.group]
    images, slides, numbers = [torch.zeros((0, 28, 28, 3), dtype=torch.uint8)], [], []
    for span in plan.spans(topology.group, topology.group_rank):
        position = group[span.slide]
        chosen = None if plan.tiles is None else plan.tiles[position]
        number_n = torch.arange(span.start, span.stop)
        if chosen is not None:
            number_n = torch.tensor(chosen, dtype=torch.int64)[span.start : span.stop]
        images.append(bags.images[plan.slides[position]][number_n])
        slides.append(torch.full((span.num_tiles,), span.slide))
        numbers.append(number_n)
    none = torch.zeros(0, dtype=torch.int64)
    number_n = torch.cat([none, *numbers])
    place_n2 = torch.zeros((len(number_n), 2), dtype=torch.float64)
    return StepTiles(HeldImages(torch.cat(images)), torch.cat([none, *slides]), number_n, place_n2)


class Learner:
    """One network, its optimiser, and how a step is made; counts tiles that go through the encoder."""

    def __init__(self, setting: Setting, ranks: Ranks, model: SlideModel, *, sgd: bool = False) -> None:
        self.setting, self.ranks, self.model = setting, ranks, model
        self.forwards = 0
        self._rates = [0.05, 0.05] if sgd else [setting.lr, setting.lr_head]
        encoder = list(model.encoder.parameters())
        head = [p for name, p in model.named_parameters() if not name.startswith("encoder.")]
        groups = [{"params": encoder}, {"params": head}]
        kind: Any = torch.optim.SGD if sgd else torch.optim.AdamW
        self.engine = PlainEngine(model, kind(groups, lr=self._rates[0]), None if sgd else 1.0, ranks.world)

    def run(self, bags: Bags, epochs: int, regime: str, *, steps: int | None = None) -> list[float]:
        """Train; the losses of all steps."""
        found: list[float] = []
        for epoch in range(epochs):
            order = np.random.default_rng([self.setting.seed, epoch]).permutation(len(bags.images))
            for plan in self._plans(bags, order, regime, epoch):
                found.append(self._step(bags, plan, regime, len(found)))
                if steps is not None and len(found) >= steps:
                    return found
        return found

    def teach(self, teacher: SlideModel, bags: Bags, epochs: int) -> None:
        """Tiles learn from a bag classifier."""
        names = [str(number) for number in range(len(bags.images))]
        step = TaughtStep(self.engine, self.ranks, teacher, chunk=CHUNK, keys=DrawKeys(0, names))
        nothing = torch.zeros(0)
        for epoch in range(epochs):
            order = np.random.default_rng([self.setting.seed, 100 + epoch]).permutation(len(bags.images))
            for number, plan in enumerate(self._plans(bags, order, "full", epoch)):
                tiles = own_tiles(bags, plan, self.ranks.topology)
                step.train(plan, tiles, nothing, nothing, step=number, learning_rates=self._rates)
                self.forwards += 2 * sum(plan.sizes)

    def embed(self, bags: Bags) -> list[Tensor]:
        """Features of all digits, by the encoder as it is."""
        self.forwards += sum(bags.sizes)
        with torch.no_grad():
            return [self.model("encode", to_float(bag, self.engine.dtype), None) for bag in bags.images]

    def fit_features(self, features: list[Tensor], bags: Bags) -> None:
        """Train the bag classifier alone."""
        for epoch in range(self.setting.epochs):
            order = np.random.default_rng([self.setting.seed, epoch]).permutation(len(features))
            for start in range(0, len(order), BAGS_PER_STEP):
                rows = order[start : start + BAGS_PER_STEP]
                logits, _ = self.model(
                    "classify", bag_of(torch.cat([features[i] for i in rows]), [len(features[i]) for i in rows])
                )
                losses["cross_entropy"](logits, bags.label_N[rows]).mean().backward()  # type: ignore[operator]
                for parameter in self.model.encoder.parameters():
                    parameter.grad = torch.zeros_like(parameter)
                self.engine.step([0.0, self._rates[1]])

    def _plans(self, bags: Bags, order: np.ndarray, regime: str, epoch: int) -> list[StepPlan]:
        topology, sizes = self.ranks.topology, bags.sizes
        taken = [max(1, round(SHARE_SAMPLED * size)) for size in sizes] if regime == "sampled" else sizes
        plans = plan_steps(order.tolist(), taken, BAGS_PER_STEP, topology.num_groups, topology.group_size)
        if regime != "sampled":
            return plans
        key = f"{self.setting.seed} {epoch}"
        return [
            replace(p, tiles=tuple(tuple(uniform_tiles(sizes[i], taken[i], f"{key} {i}").tolist()) for i in p.slides))
            for p in plans
        ]

    def _step(self, bags: Bags, plan: StepPlan, regime: str, number: int) -> float:
        label_S, weight_S = bags.label_N[list(plan.slides)], torch.ones(len(plan.slides), dtype=torch.float64)
        if regime == "full":
            self.forwards += sum(plan.sizes)
            image_nCHW = to_float(torch.cat([bags.images[slide] for slide in plan.slides]), self.engine.dtype)
            logits, _ = self.model("classify", bag_of(self.model("encode", image_nCHW, None), plan.sizes))
            loss = losses["cross_entropy"](logits, label_S).mean()  # type: ignore[operator]
            loss.backward()
            self.engine.step(self._rates)
            return loss.item()
        self.forwards += 2 * sum(plan.sizes)
        names = [str(i) for i in range(len(bags.images))]
        step = ExactStep(
            self.engine,
            self.ranks,
            losses["cross_entropy"],  # type: ignore[arg-type]
            chunk=CHUNK,
            num_keep=0,
            keys=DrawKeys(self.setting.seed, names),
        )
        tiles = own_tiles(bags, plan, self.ranks.topology)
        return step.train(plan, tiles, label_S, weight_S, step=number, learning_rates=self._rates).loss


def curve(rank: int, num_ranks: int, setting: Setting) -> list[float]:
    """The first losses, float64 and SGD."""
    ranks = Ranks(Topology()) if setting.regime == "full" else World(rank, num_ranks).ranks(num_ranks)
    learner = Learner(setting, ranks, make_model(setting.seed).double(), sgd=True)
    bags = make_bags(setting, "train", setting.train, setting.seed)
    return learner.run(bags, setting.epochs, setting.regime, steps=CURVE_STEPS)


def trained(rank: int, num_ranks: int, setting: Setting) -> dict[str, float]:
    """Train a regime, and score it on the test bags."""
    torch.set_num_threads(1)
    train = make_bags(setting, "train", setting.train, setting.seed)
    ranks = World(rank, num_ranks).ranks(num_ranks)
    memory = MemoryMeter(torch.device("cpu"))
    start = time.monotonic()
    learner = Learner(setting, ranks, make_model(setting.seed))
    if setting.regime in ("frozen", "coupled"):
        learner.fit_features(learner.embed(train), train)
    else:
        learner.run(train, setting.epochs, setting.regime)
    if setting.regime == "coupled":
        student = make_model(setting.seed)
        student.load_state_dict(learner.model.state_dict())
        teaching = Learner(setting, ranks, student)
        teaching.teach(learner.model, train, setting.teach_epochs)
        joined = make_model(setting.seed)
        joined.load_state_dict(learner.model.state_dict())
        joined.encoder.load_state_dict(student.encoder.state_dict())
        last = Learner(setting, ranks, joined)
        last.fit_features(last.embed(train), train)
        last.forwards += learner.forwards + teaching.forwards
        learner = last
    seconds = time.monotonic() - start
    peak = memory.above_start()
    found = score(learner.model, make_bags(setting, "test", setting.test, setting.seed))
    return found | {"forwards": learner.forwards, "memory_mb": peak / 2**20, "seconds": seconds}


@torch.no_grad()
def score(model: SlideModel, bags: Bags) -> dict[str, float]:
    """AUC of bags, and of the digits of positive bags by attention."""
    model.eval()
    probs, attention = [], []
    for images in bags.images:
        bag = bag_of(model("encode", to_float(images), None), [len(images)])
        logits, pooled = model("classify", bag)
        probs.append(logits.softmax(1)[0].double().numpy())
        weight_n = attention_of(bag, pooled, logits).mean(1).double()
        attention.append((weight_n / weight_n.max()).numpy())
    rows = [i for i, label in enumerate(bags.label_N.tolist()) if label and not bags.is_key[i].all()]
    keys, said = (np.concatenate([part[i] for i in rows]) for part in (bags.is_key, attention))
    return {
        "auc": float(auc(bags.label_N.numpy(), np.stack(probs))),
        "instance_auc": float(auc(keys.astype(np.int64), np.stack([1 - said, said], axis=1))),
    }


def largest_difference(setting: Setting) -> tuple[float, dict[str, list[float]]]:
    """Largest relative difference of the losses of replay on any ranks from the full bag's."""
    curves = {"full": curve(0, 1, replace(setting, regime="full"))}
    for num_ranks in CURVE_RANKS:
        own = replace(setting, regime="replay")
        curves[f"replay on {num_ranks}"] = run_on_ranks(curve, num_ranks, num_ranks, own, timeout_s=600)[0]
    wanted = np.array(curves["full"])
    others = [np.array(values) for name, values in curves.items() if name != "full"]
    return max(float(np.abs(values / wanted - 1).max()) for values in others), curves


def draw(results: dict[str, list[dict[str, float]]], curves: dict[str, list[float]], out_png: Path) -> None:
    """Curves on top of each other, AUCs of every seed."""
    with drawing(out_png, 10.8, 4.2) as figure:
        left, right = figure.subplots(1, 2)
        for number, (name, values) in enumerate(curves.items()):
            width = 5 - number
            left.plot(range(1, len(values) + 1), values, linewidth=width, label=name, **class_style(number))
        left.set(xlabel="Step", ylabel="Loss", title="SGD, float64: the curves lie on each other")
        left.legend(fontsize=9)
        for number, runs in enumerate(results.values()):
            colour = class_style(number)["color"]
            for key, marker in (("auc", "o"), ("instance_auc", "^")):
                own = [run[key] for run in runs]
                right.plot([number] * len(own), own, marker, color=colour, alpha=0.7, markersize=7)
        right.plot([], [], "o", color="grey", label="bags")
        right.plot([], [], "^", color="grey", label="digits, by attention")
        right.axhline(0.5, color="grey", linewidth=1, linestyle=(0, (4, 4)))
        right.set_xticks(range(len(results)), [name.replace(", ", ",\n") for name in results], rotation=30, fontsize=9)
        right.set(ylabel="AUC", ylim=(0.3, 1.02), title="AdamW: every seed")
        right.legend(fontsize=9, loc="lower left")
        for axes in (left, right):
            axes.grid(True, axis="y")


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """For people."""
    lines = [f"{'regime':<20}{'AUC of bags':>18}{'AUC of digits':>18}{'tile forwards':>16}{'memory MB':>12}{'s':>8}"]
    for name, runs in results.items():
        cells = [f"{name:<20}"]
        for key in ("auc", "instance_auc"):
            values = [run[key] for run in runs]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.3f}{spread}".rjust(18))
        for key, width in (("forwards", 16), ("memory_mb", 12), ("seconds", 8)):
            cells.append(f"{statistics.fmean([run[key] for run in runs]):,.0f}".rjust(width))
        lines.append("".join(cells))
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Run, print, draw; return 0."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--digits", type=Path, default=real_data("mnist"), metavar="FOLDER", help="of mnist.npz")
    parser.add_argument("--protocol", choices=("acc", "ilse"), default="acc", help="(%(default)s)")
    parser.add_argument("--bag", type=int, help="digits per bag (50 for acc, 10 for ilse)")
    parser.add_argument("--train", type=int, default=300, help="training bags (%(default)s)")
    parser.add_argument("--test", type=int, default=200, help="test bags (%(default)s)")
    parser.add_argument("--epochs", type=int, default=20, help="(%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/digits"), help="for the figure (%(default)s)")
    arguments = parser.parse_args(words)
    need_file(arguments.digits / "mnist.npz", "--digits")
    start = time.monotonic()
    size = arguments.bag or (50 if arguments.protocol == "acc" else 10)
    sizes = {"bag": size, "train": arguments.train, "test": arguments.test, "epochs": arguments.epochs}
    setting = Setting(str(arguments.digits), arguments.protocol, **sizes)
    difference, curves = largest_difference(setting)
    print(f"largest relative difference of the first {CURVE_STEPS} losses, replay and full bag: {difference:.2e}")
    todo = {name: (1, replace(setting, regime=name)) for name in REGIMES}
    todo["replay on 2"] = 2, replace(setting, regime="replay")
    if arguments.protocol == "acc":
        rare = replace(setting, nines=1, bag=-(-size // 2), train=2 * setting.train)
        todo |= {f"{name}, one nine": (1, replace(rare, regime=name)) for name in ("full", "sampled")}
    results: dict[str, list[dict[str, float]]] = {}
    with tqdm(total=len(todo) * arguments.seeds, unit="run", disable=None) as bar:
        for label, (num_ranks, of_regime) in todo.items():
            for seed in range(arguments.seeds):
                own = replace(of_regime, seed=seed)
                found = run_on_ranks(trained, num_ranks, num_ranks, own, timeout_s=3600)[0]
                results.setdefault(label, []).append(found)
                bar.update()
    arguments.out.mkdir(parents=True, exist_ok=True)
    draw(results, curves, arguments.out / "digits.png")
    print(table(results))
    print(f"written: {arguments.out / 'digits.png'}")
    means = {name: round(statistics.fmean([run["auc"] for run in runs]), 4) for name, runs in results.items()}
    facts: dict[str, Any] = {f"auc_{name}": means[name] for name in REGIMES}
    if arguments.protocol == "acc":
        facts["one_nine"] = {f"auc_{name}": means[f"{name}, one nine"] for name in ("full", "sampled")}
    replayed = ("replay", "replay on 2")
    spread = max(np.ptp([run["auc"] for run in results[name]]) for name in ("full", *replayed))
    gap = max(abs(means[name] - means["full"]) for name in replayed)
    facts |= {"max_curve_difference": difference, "auc_difference": round(gap, 4), "auc_seed_spread": round(spread, 4)}
    facts |= {"seeds": arguments.seeds}
    shown = {key: value for key, value in asdict(setting).items() if key not in ("digits", "regime", "seed", "nines")}
    facts |= shown | {"minutes": round((time.monotonic() - start) / 60, 1)}
    whole = facts | {"runs": results, "curves": curves, **origin(__file__, words, torch=torch.__version__)}
    (arguments.out / "digits.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
