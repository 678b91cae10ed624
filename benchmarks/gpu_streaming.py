"""How near does streaming a network over a whole slide on one NVIDIA GPU come to what the GPU can do?

ResNet-34 up to layer4 under bfloat16 autocast, BatchNorm folded, channels last, cells of 256 px, gated attention; steps over
slides of 16,384 and of 65,536 px, all of it tissue. First the 16,384 px with blocks of several sizes: larger blocks compute
less twice and take more memory. Then 65,536 px with the block that was fastest. Pixels lie in main memory as one image of 2048
px that the slide repeats; blocks of them are put together and copied while others compute, in both passes.

Expected on an H200: a step is 8 FLOP for each multiply-add of each pixel that a block computes (forward, forward again, and a
backward of two), 1.2 to 1.5 times the slide's pixels, so some 3 PFLOP for 65,536 px: 16 seconds at a quarter of the compute
roof. Memory is that of one block and does not grow with the slide.

    share_of_roof    4 F P / (R seconds)   F: forward FLOPs of a pixel, counted; P: pixels that blocks compute; R: bf16 FLOP/s
                                           of this GPU, measured as in gpu_step.py (H200: about 790e12)
    useful_share     3 F S / (R seconds)   S: pixels of the slide: what the whole image in one graph would take, if it fitted

Before anything is timed, the gradient of blocks is compared with one graph of the whole image on a small slide: in float64
(convolutions as they are and folded), and in float32 with TF32 off. How far bfloat16 is from float64, in blocks and whole, is
printed.

    python benchmarks/gpu_streaming.py --out FOLDER     # minutes on an H200
    python benchmarks/gpu_streaming.py --tiny           # that it runs, on the CPU: no figure of it means anything

Writes gpu_streaming.json into the folder. The last line is JSON: by slide seconds, peak_gb, share_of_roof, useful_share; the
block (px) that was chosen; gradient errors.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from gpu_step import count, forget, measured_ceilings, peak_of
from gradients import checked
from origin import origin
from streaming import BASE_PX, Problem, SmallerBlocks, blocks, cells_of, make_problem, painted, planned_pixels, whole

from gigamil.models.fold import fold_batchnorm
from gigamil.parallel.speed import seconds_of
from gigamil.partition.blocks import block_side
from gigamil.testing.compare import gradient_error

BOUND_FLOAT64 = 1e-10  # sums on a GPU have no fixed order, and folding multiplies in another one
BOUND_FLOAT32 = 1e-3  # as in gpu_step.py: TF32 off, a hundred layers


@dataclass(frozen=True)
class Sizes:
    """How large the measurement is.

    Attributes:
        net: as of streaming.py.
        side: of the slide on which blocks of `chunks` cells are tried.
        large: of the slide that is measured with the fastest of them.
        rounds: steps timed of each, after one that warms up; of the large slide one alone.
        checked: side of the slide and cells of a block where gradients are compared.
    """

    net: str = "resnet34"
    side: int = 16384
    large: int = 65536
    chunks: tuple[int, ...] = (64, 256, 1024)
    rounds: int = 3
    checked: tuple[int, int] = (2048, 4)


TINY = Sizes(net="thin", side=128, large=256, chunks=(4, 16), rounds=1, checked=(64, 4))


@dataclass(frozen=True)
class Outcome:
    """Steps over one slide with blocks of one size.

    Attributes:
        side, block_px: of the slide and of what a block owns, in pixels.
        seconds: of each step.
        peak_bytes: allocated at most; 0 on a CPU.
        planned_pixels: that blocks compute in a pass, over those of the slide.
        share_of_roof, useful_share: as the docstring says.
    """

    side: int
    chunk: int
    block_px: int
    seconds: tuple[float, ...]
    peak_bytes: int
    planned_pixels: float
    share_of_roof: float
    useful_share: float

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    def line(self) -> str:
        """For the table."""
        shares = f"{self.share_of_roof:14.3f} {self.useful_share:13.3f}"
        return f"{self.side:6} {self.block_px:9} {self.median:8.2f} {self.peak_bytes / 1e9:8.2f} {self.planned_pixels:8.3f} {shares}"


def tuned(problem: Problem) -> Problem:
    """The same with BatchNorm folded and channels last, as training on a GPU has it."""
    fold_batchnorm(problem.encoder)
    problem.model.to(memory_format=torch.channels_last)
    return problem


def check(sizes: Sizes, device: torch.device) -> dict[str, float]:
    """Errors of gradients against one graph of the whole image: of blocks, and how far bfloat16 is from float64.

    Raises:
        SystemExit: blocks are more than rounding away.
    """
    side, chunk = sizes.checked
    base_HW3 = painted(min(side, BASE_PX))

    def made(dtype: torch.dtype) -> Problem:
        problem = make_problem(sizes.net, base_HW3, side, dtype=dtype)
        problem.model.to(device)
        return problem

    exact = made(torch.float64)
    truth = whole(exact)
    errors = {
        "float64": checked("blocks, float64", blocks(exact, chunk), truth, BOUND_FLOAT64),
        "float64 folded": checked("folded blocks, float64", blocks(tuned(exact), chunk), truth, BOUND_FLOAT64),
    }
    del exact
    plain = made(torch.float32)
    truth_32 = whole(plain)
    errors["float32"] = checked("blocks, float32", blocks(plain, chunk), truth_32, BOUND_FLOAT32)
    errors["bfloat16 whole"] = gradient_error(whole(plain, bfloat16=True), truth)
    errors["bfloat16"] = gradient_error(blocks(tuned(plain), chunk, bfloat16=True), truth)
    return errors


def measure(problem: Problem, chunk: int, rounds: int, device: torch.device, roof: float) -> Outcome | None:
    """Steps over a slide with blocks of `chunk` cells; None if the GPU has no memory for them.

    Args:
        roof: pixels per second of one forward at the measured FLOP/s.
    """
    try:
        peak = peak_of(lambda: blocks(problem, chunk, bfloat16=True), device)  # warms up
        spent = tuple(seconds_of(lambda: blocks(problem, chunk, bfloat16=True), device) for _ in range(rounds))
    except SmallerBlocks:
        return None
    factor, pixels = planned_pixels(problem, chunk), problem.side**2
    unit = pixels / (roof * statistics.median(spent))
    block_px = block_side(chunk) * problem.encoder.cell_px
    return Outcome(problem.side, chunk, block_px, spent, peak, factor, 4 * factor * unit, 3 * unit)


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print, return 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder (%(default)s)")
    parser.add_argument("--net", choices=["resnet18", "resnet34"], help="(resnet34)")
    parser.add_argument("--tiny", action="store_true", help="tiny, on the CPU, no figures")
    arguments = parser.parse_args(words)
    sizes = TINY if arguments.tiny else Sizes()
    if not arguments.tiny and not torch.cuda.is_available():
        raise SystemExit("no NVIDIA GPU is visible to torch. `--tiny` shows that the script runs, without figures.")
    if arguments.net:
        sizes = replace(sizes, net=arguments.net)
    device = torch.device("cpu" if arguments.tiny else "cuda")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # cuDNN has it on by default
    flops_s = measured_ceilings(device)["flops"]

    errors = check(sizes, device)
    print("gradient errors: " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items()) + "\n", flush=True)
    forget(device)
    problem = tuned(make_problem(sizes.net, painted(min(sizes.side, BASE_PX)), sizes.side))
    problem.model.to(device)
    counted_px = 4 * problem.encoder.cell_px
    flops, _ = count(problem.model, counted_px, device)
    roof = flops_s / (flops / counted_px**2)

    print(" slide  block px  seconds  peak GB   pixels  share of roof  useful share")
    outcomes = []
    for chunk in sizes.chunks:
        outcome = measure(problem, chunk, sizes.rounds, device, roof)
        if outcome is None:
            print(f"{sizes.side:6} {block_side(chunk) * problem.encoder.cell_px:9} no memory for it", flush=True)
        else:
            outcomes.append(outcome)
            print(outcome.line(), flush=True)
    if not outcomes:
        raise SystemExit("the GPU has no memory for any of these blocks")
    best = min(outcomes, key=lambda outcome: outcome.median)
    large = replace(problem, grid=cells_of(sizes.large // problem.encoder.cell_px))
    last = measure(large, best.chunk, 1, device, roof)
    assert last is not None, "a block of this size had memory before"
    print(last.line() + "\n", flush=True)
    if arguments.tiny:
        print(json.dumps({"smoke": True, "figures": None, "gradient_errors": errors}))
        return 0

    result = {
        str(outcome.side): {
            "seconds": round(outcome.median, 2),
            "peak_gb": round(outcome.peak_bytes / 1e9, 2),
            "share_of_roof": round(outcome.share_of_roof, 3),
            "useful_share": round(outcome.useful_share, 3),
        }
        for outcome in (best, last)
    }
    gpu = torch.cuda.get_device_name(device)
    about = origin(__file__, words, gpu=gpu, torch=torch.__version__, cuda=torch.version.cuda)
    rows = [asdict(outcome) for outcome in (*outcomes, last)]
    raw = about | {"net": sizes.net, "bf16_flops": flops_s, "flops_per_pixel": flops / counted_px**2}
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(raw | {"errors": errors, "result": result, "steps": rows}, indent=1)
    (arguments.out / "gpu_streaming.json").write_text(text + "\n")
    print(json.dumps(result | {"net": sizes.net, "block_px": best.block_px, "gradient_errors": errors}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
