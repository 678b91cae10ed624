"""The configuration of a run: frozen pydantic models, one YAML, unknown keys are errors.

Sections by consequence: `cohort`, `slides`, `data` and `science` change results; `execution` must not (toggling a key there
changes nothing, or nothing beyond a stated tolerance: tests/equivalence/test_execution_keys.py); `bookkeeping` says where
things go. docs/configuration.md has a row per key.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Url = Annotated[str, Field(pattern=r"^[a-z0-9]+://")]


def _or_empty(data: Any) -> Any:
    """A section of a YAML whose keys are all comments has the value null."""
    return {} if data is None else data


Options = Annotated[dict[str, Any], BeforeValidator(_or_empty)]


class Section(BaseModel):
    """Base of every section: immutable, and a key that is not declared is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, data: Any) -> Any:
        return _or_empty(data)


class Columns(Section):
    """Names of the columns in the slide table, for tables that call them otherwise."""

    slide_id: str = "slide_id"
    path: str = "path"
    patient_id: str = "patient_id"
    label: str = "label"
    mpp: str = "mpp"
    site: str = "site"
    split: str = "split"


class Cohort(Section):
    """Which slides, their labels, and how they are split."""

    table: Path = Field(
        Path("slides.csv"), description="CSV with slide_id, path, patient_id, label[, mpp, site, split]"
    )
    root: Path | None = Field(None, description="folder that relative slide paths start from; default: the table's")
    columns: Columns = Columns()
    classes: tuple[str, ...] | None = Field(
        None, description="class names in order, the positive one last; default: sorted labels"
    )
    patient_is_slide: bool = Field(
        False, description="true: there are no patient ids and each slide is its own patient"
    )
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(0.3, description="share of patients held out for test")
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(0.15, description="share of patients for validation")
    split_seed: int = Field(0, description="seed of the split")
    split_method: Literal["holdout", "kfold", "monte_carlo"] = Field("holdout", description="one split, or folds")
    folds: Annotated[int, Field(ge=2, le=100)] = Field(5, description="number of folds, of inner folds, or of draws")
    fold: Annotated[int, Field(ge=0)] = Field(0, description="the fold that this run uses, from 0")
    inner_fold: Annotated[int, Field(ge=0)] | None = Field(
        None, description="nested: validate on this inner fold of the training part; null: on val_fraction"
    )
    preserve_sites: bool = Field(False, description="true: all slides of a site are on one side of the split")
    splits: Path | None = Field(None, description="folds.json, CLAM splits_k.csv or Patho-Bench .tsv to take over")
    near_duplicates: Literal["refuse", "ignore"] = Field("refuse", description="slides on two sides that look the same")

    @model_validator(mode="after")
    def _fold_is_there(self) -> "Cohort":
        if self.splits is None and self.split_method == "holdout" and (self.fold or self.inner_fold is not None):
            raise ValueError("cohort.fold and cohort.inner_fold need cohort.split_method kfold, or cohort.splits")
        if self.splits is None and self.split_method != "holdout" and self.fold >= self.folds:
            raise ValueError(
                f"cohort.fold={self.fold} is none of the {self.folds} of cohort.folds: 0..{self.folds - 1}"
            )
        if self.splits is None and self.split_method == "monte_carlo" and self.inner_fold is not None:
            raise ValueError("cohort.inner_fold needs cohort.split_method kfold; Monte-Carlo draws have no inner folds")
        if self.inner_fold is not None and self.splits is None and self.inner_fold >= self.folds:
            raise ValueError(f"cohort.inner_fold={self.inner_fold} is none of the {self.folds} of cohort.folds")
        return self


class Slides(Section):
    """How slides become tiles. A change here makes new shards."""

    tile_px: Annotated[int, Field(ge=16, le=4096)] = Field(224, description="tile side in pixels")
    tile_mpp: Positive = Field(0.5, description="micron per pixel of a tile")
    default_mpp: Positive | None = Field(None, description="mpp of slides that carry none; default: refuse them")
    min_tissue: Fraction = Field(0.25, description="tiles with a smaller tissue fraction are dropped")
    tissue_mpp: Positive = Field(8.0, description="micron per pixel at which tissue is sought")
    min_tissue_area_um2: NonNegative = Field(20_000.0, description="smaller specks are not tissue")
    max_hole_area_um2: NonNegative = Field(20_000.0, description="smaller holes are filled")
    jpeg_quality: Annotated[int, Field(ge=50, le=100)] = Field(90, description="quality of stored tiles")
    stride_px: Count | None = Field(None, description="distance of neighbouring tiles; default: tile_px, no overlap")
    extra_mpp: tuple[Positive, ...] = Field((), description="more spacings to tile at, each in shards of its own")
    raw_tolerance: Fraction | None = Field(
        0.02, description="copy the file's own JPEG tiles if their mpp differs by at most this share; null: never"
    )
    icc: Literal["ignore", "apply"] = Field("ignore", description="apply: colours to sRGB by the file's ICC profile")
    masks: Path | None = Field(None, description="folder of tissue masks, SLIDE_ID.png, .geojson or .xml (ASAP)")
    coords: Path | None = Field(None, description="folder of TRIDENT's or CLAM's coordinates (.h5) to tile at")
    dark_field: Literal["refuse", "tissue"] = Field("refuse", description="slides with a dark background")
    max_pen: Fraction | None = Field(None, description="tiles with a larger share of pen marks are dropped")
    min_sharpness: NonNegative | None = Field(None, description="less sharp tiles are dropped")
    max_failed: Annotated[int, Field(ge=0)] = Field(0, description="`run` goes on while at most so many slides fail")


class Data(Section):
    """Where tiles come from in training and prediction. A change here changes results."""

    source: Literal["shards", "slides", "features"] = Field(
        "shards", description="slides: no shards, tiles are read from the slide files; features: of a frozen encoder"
    )
    features: Path | None = Field(None, description="folder of one .h5 per slide, in TRIDENT's layout")


class Encoder(Section):
    """Tile -> embedding."""

    name: str = Field("resnet18", description="small_cnn, a torchvision ResNet, timm/NAME, or a registered name")
    weights: Path | None = Field(None, description="local state_dict (.safetensors, .pt); default: random start")
    mean: tuple[Fraction, Fraction, Fraction] = Field((0.485, 0.456, 0.406), description="input mean, RGB in 0..1")
    std: tuple[Positive, Positive, Positive] = Field((0.229, 0.224, 0.225), description="input standard deviation")
    options: Options = Field(default_factory=dict, description="keyword arguments of the encoder")
    dense: Literal["layer1", "layer2", "layer3", "layer4"] | None = Field(
        None, description="a grid of features of the whole slide up to this layer, in place of tiles one by one"
    )
    pool: Count = Field(1, description="pool so many cells of the grid along each side to one")
    pool_kind: Literal["mean", "max"] = "mean"
    freeze_blocks: int = Field(0, description="so many blocks, from the input on, stay fixed; -k: all but the last k")
    lora_rank: Count | None = Field(None, description="train low-rank updates of the linears; the rest stays fixed")
    lora_alpha: Positive = Field(16.0, description="updates are scaled by alpha / rank")


class Aggregator(Section):
    """Embeddings of a slide -> slide embedding."""

    name: str = Field("gated_attention", description="one of docs/aggregators.md, or a registered name")
    options: Options = Field(default_factory=dict, description="keyword arguments of the aggregator")


_OF_REGIMES = {
    "blocks": ("last_blocks",),
    "tiles": ("sampled", "select", "coupled", "taught"),
    "rounds": ("coupled",),
    "tile_epochs": ("coupled",),
    "confidence": ("coupled", "taught"),
}


class Regime(Section):
    """Which part of the encoder learns, and from which tiles."""

    name: Literal["end_to_end", "frozen", "last_blocks", "lora", "sampled", "select", "coupled", "taught"] = Field(
        "end_to_end", description="frozen: on cached features; sampled, select: some tiles; coupled: ICMIL's rounds"
    )
    blocks: Count = Field(1, description="last_blocks: so many blocks of the encoder learn")
    tiles: Count = Field(512, description="sampled, select, coupled: tiles of a slide in a step, at most")
    how: Literal["uniform", "regions", "top", "weighted"] | None = Field(
        None, description="sampled: uniform or regions; select, by attention: top or weighted; null: the first of them"
    )
    rounds: Count = Field(1, description="coupled: times that the bag classifier teaches the encoder")
    tile_epochs: Count = Field(1, description="coupled: epochs of each teaching")
    confidence: NonNegative = Field(
        0.0, description="coupled: exponent of |2 a - 1|, by which tiles are trusted; 0: all"
    )

    @model_validator(mode="before")
    @classmethod
    def _may_be_a_name(cls, data: Any) -> Any:
        return {"name": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _how_is_its_own(self) -> "Regime":
        own = {"sampled": ("uniform", "regions"), "select": ("top", "weighted")}.get(self.name, ())
        if self.how is not None and self.how not in own:
            words = f"it is one of {', '.join(own)}" if own else "only sampled and select choose tiles"
            raise ValueError(f"science.regime.how={self.how} with {self.name}: {words}")
        for key, regimes in _OF_REGIMES.items():
            value = getattr(self, key)
            if value != type(self).model_fields[key].default and self.name not in regimes:
                raise ValueError(f"science.regime.{key}={value} with {self.name}: it is of {', '.join(regimes)}")
        return self


class Task(Section):
    """What is predicted of a slide."""

    name: Literal["binary", "multiclass", "multilabel", "ordinal", "regression", "survival"] = Field(
        "multiclass", description="binary is multiclass with two classes; ordinal: classes ascend"
    )
    columns: tuple[str, ...] | None = Field(
        None, description="of the slide table; default: cohort.columns.label of classes, time and event of survival"
    )
    classes: tuple[str, ...] | None = Field(
        None, description="of a class task in also, in order; default: numbers by size, words by the alphabet"
    )
    loss: str | None = Field(
        None, description="cross_entropy or a registered name; regression: huber, mae, mse; survival: discrete, cox"
    )
    bins: Annotated[int, Field(ge=2, le=100)] = Field(4, description="of time, for survival with loss discrete")
    label_smoothing: BelowOne = Field(0.0, description="share of a class label that is spread over all classes")
    focal_gamma: NonNegative = Field(0.0, description="mutes slides that are easy: exponent of 1 - p; 0: none")
    weight: Positive = Field(1.0, description="of its loss, where science.also names more")

    @model_validator(mode="before")
    @classmethod
    def _may_be_a_name(cls, data: Any) -> Any:
        return {"name": data} if isinstance(data, str) else data


class Augment(Section):
    """Tile augmentation in training; the parameters of a tile depend on (seed, step, slide, tile) only."""

    flips: bool = Field(True, description="horizontal and vertical flips")
    turns: bool = Field(True, description="turns by 90 degrees")
    brightness: Fraction = Field(0.1, description="largest relative change")
    contrast: Fraction = Field(0.1, description="largest relative change")
    saturation: Fraction = Field(0.1, description="largest relative change")
    stain: Fraction = Field(0.05, description="largest relative change of each of hematoxylin, eosin and residual")


class Optim(Section):
    """AdamW with warm-up and cosine."""

    lr_encoder: NonNegative = 1e-4
    lr_head: NonNegative = 3e-4
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="factor of lr_encoder per block, from its output towards its input"
    )
    weight_decay: NonNegative = 1e-2
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    final_lr_fraction: Fraction = Field(0.01, description="the cosine ends at this share of each learning rate")
    clip_norm: Positive | None = Field(1.0, description="largest norm of the whole gradient; null: no clipping")
    freeze_encoder_epochs: Annotated[int, Field(ge=0)] = Field(0, description="epochs that train the head only")
    ema: BelowOne | None = Field(
        None, description="decay of a moving average of the weights, which is validated and kept; null: none"
    )


class Science(Section):
    """What is learned, and from what. Everything here changes results."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    regime: Regime = Regime()
    encoder: Encoder = Encoder()
    aggregator: Aggregator = Aggregator()
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="dropout on the slide embedding")
    task: Task = Task()
    also: tuple[Task, ...] = Field((), description="further tasks of the same slides, with keys as of task")
    class_weights: Literal["none", "balanced"] | tuple[Positive, ...] = "balanced"
    augment: Augment = Augment()
    optim: Optim = Optim()
    sampling: Literal["uniform", "balanced"] = Field(
        "uniform", description="slides of an epoch: each once, or equally many of each class, some several times"
    )
    bag: Literal["slide", "patient"] = Field(
        "slide", description="what one prediction is about: a slide, or all slides of a patient together"
    )
    epochs: Count = 20
    slides_per_step: Count = Field(4, description="slides whose mean loss makes one optimiser step, over all ranks")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="bfloat16: autocast, softmax in float32")
    select: str | None = Field(
        None,
        description="validation metric that chooses the best epoch; default: auc, kappa, loss, c_index, by task",
    )
    early_stop_epochs: Count | None = Field(None, description="stop after so many epochs without a better validation")
    warm_start: Path | None = Field(None, description="run folder whose best weights are the start")
    bootstrap: Annotated[int, Field(ge=100)] = Field(1000, description="resamples of patients for intervals")

    @model_validator(mode="after")
    def _teachers_take_slides(self) -> "Science":
        if self.bag == "patient" and self.regime.name in ("coupled", "taught"):
            raise ValueError(
                f"science.bag=patient with science.regime={self.regime.name}, which takes slides one by one: set science.bag to slide"
            )
        return self


class Execution(Section):
    """How it is run. Nothing here changes results (docs/configuration.md states the tolerance of each key)."""

    ranks: Count = Field(1, description="processes that `gigamil train` starts on this machine")
    group_size: Count | None = Field(None, description="ranks that pool one set of slides; default: all")
    balance: Literal["even", "speed"] = Field(
        "even", description="tiles of a group's ranks: equally many, or in proportion to their measured speed"
    )
    chunk: Count | None = Field(
        64, description="tiles per encoder call; null: of a dense encoder what computes least within memory_budget"
    )
    memory: Literal["auto", "keep", "replay"] = Field(
        "auto", description="graphs of chunks kept for backward, or encoded again; auto: keep what fits"
    )
    memory_budget: Positive | None = Field(
        None, description="bytes (> 1) or fraction (<= 1) of free memory for kept graphs; default 0.5 of it"
    )
    tile_cache: NonNegative | None = Field(
        None, description="bytes (> 1) or fraction (<= 1) of free memory for decoded tiles; default 0.25"
    )
    # Not "off" and "on": YAML takes these for false and true.
    activation_checkpointing: Literal["none", "blocks", "cpu"] = Field(
        "none", description="recompute blocks of the encoder in backward; cpu: their inputs in main memory"
    )
    halo: Literal["read", "exchange"] = Field(
        "read", description="dense encoders: each block reads what is around it, or ranks exchange rows layer by layer"
    )
    compile: bool = Field(False, description="torch.compile the encoder")
    fold_batchnorm: bool = Field(True, description="compute BatchNorm inside the convolution before it")
    zero_stage: Literal[0, 1, 2, 3] = 1
    offload: bool = Field(False, description="optimiser moments in main memory (ZeRO 1 and 2)")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Count | None = Field(None, description="CPU threads per rank; default: cores / ranks")
    tile_workers: Count | None = Field(None, description="processes of `gigamil tile`; default: all cores")
    tile_memory_gb: Positive = Field(1.5, description="memory that a process of `gigamil tile` may take")
    tile_timeout_s: Positive = Field(1800.0, description="longest time for one piece of a slide in `gigamil tile`")
    prefetch: Annotated[int, Field(ge=0)] = Field(2, description="steps of tiles decoded ahead")
    decode_workers: Annotated[int, Field(ge=0)] = Field(
        1, description="threads per rank that read and decode tiles; 0: the step's own, when it needs them"
    )
    decoder: Literal["auto", "cuda", "simplejpeg", "pillow"] = Field(
        "auto", description="of tiles; auto: simplejpeg, else pillow (same bits); cuda differs by 2 grey levels"
    )
    shard_cache: Path | None = Field(None, description="folder on this node's own disk for copies of the shards")
    shard_cache_gb: Positive = Field(100.0, description="size of shard_cache; what was used longest ago goes")
    timeout_s: Positive = Field(120.0, description="longest wait in a collective before the run is given up")

    @property
    def tiles_per_call(self) -> int:
        """`chunk`; 64 where that is null, and nothing is chosen by memory."""
        return 64 if self.chunk is None else self.chunk

    @model_validator(mode="after")
    def _offload_has_a_stage(self) -> "Execution":
        if self.offload and self.zero_stage not in (1, 2):
            raise ValueError(f"execution.offload needs execution.zero_stage 1 or 2, not {self.zero_stage}")
        return self

    @model_validator(mode="after")
    def _exchange_is_layer_by_layer(self) -> "Execution":
        if self.halo == "exchange" and (self.compile or self.activation_checkpointing != "none"):
            raise ValueError(
                "execution.halo=exchange runs the encoder layer by layer: set execution.compile to false and "
                "execution.activation_checkpointing to none, or execution.halo to read"
            )
        return self

    @model_validator(mode="after")
    def _balance_has_something_to_move(self) -> "Execution":
        if self.balance == "speed" and self.halo == "exchange":
            raise ValueError(
                "execution.balance=speed needs ranks that compute alone, and with execution.halo=exchange they wait for "
                "each other in every layer: set execution.balance to even, or execution.halo to read"
            )
        if self.balance == "speed" and self.group_size == 1:
            raise ValueError(
                "execution.balance=speed moves tiles between the ranks of a group, and with execution.group_size=1 there is "
                "one: set execution.balance to even, or execution.group_size to more"
            )
        return self

    @model_validator(mode="after")
    def _group_divides(self) -> "Execution":
        if self.group_size is not None and self.ranks > 1 and self.ranks % self.group_size:
            fits = [d for d in range(1, self.ranks + 1) if self.ranks % d == 0]
            raise ValueError(
                f"execution.group_size={self.group_size} does not divide execution.ranks={self.ranks}; use one of {fits}"
            )
        return self


class Bookkeeping(Section):
    """Where results go and what is written."""

    out: Path = Field(Path("runs/default"), description="run folder")
    shards: Url | Path | None = Field(
        None,
        union_mode="left_to_right",
        description="folder of the shards, or its URL (s3, gs, az, https) once they are made; default: <out>/shards",
    )
    experiment: str = Field("gigamil", description="MLflow experiment")
    name: str = Field("run", description="MLflow run name")
    mlflow: bool = Field(True, description="log to MLflow (MLFLOW_TRACKING_URI wins over the run's own sqlite file)")
    system_metrics_s: Positive | None = Field(
        30.0, description="seconds between samples of each machine's CPU, memory, disk, network, GPUs; null: none"
    )
    checkpoint_minutes: Positive = Field(10.0, description="a checkpoint at least so often, and each epoch")
    keep_checkpoints: Annotated[int, Field(ge=2)] = Field(2, description="generations kept beside the best")
    log_every: Count = Field(1, description="steps between lines of metrics.jsonl")
    ranks_every: Count = Field(20, description="steps between comparisons of the ranks' times")
    limit: Count | None = Field(None, description="use only the first n slides of each split and class (smoke run)")
    heatmaps: Annotated[int, Field(ge=0)] = Field(4, description="slides drawn by `heatmap` when none is named")
    progress: bool = True

    @property
    def shard_root(self) -> Path | str:
        """Folder of the shards, or its URL."""
        return self.shards if self.shards is not None else self.out / "shards"


class RunConfig(Section):
    """A whole run: what one YAML file describes."""

    cohort: Cohort = Cohort()
    slides: Slides = Slides()
    data: Data = Data()
    science: Science = Science()
    execution: Execution = Execution()
    bookkeeping: Bookkeeping = Bookkeeping()

    @model_validator(mode="before")
    @classmethod
    def _regime_sets_what_it_means(cls, data: Any) -> Any:
        """Frozen encoders read features, LoRA has a rank, and of the last blocks the others are fixed."""
        if not isinstance(data, dict):
            return data
        data = {name: part.model_dump() if isinstance(part, BaseModel) else part for name, part in data.items()}
        science = data.get("science")
        if not isinstance(science, dict) or not science.get("regime"):
            return data
        regime = Regime.model_validate(science["regime"])
        encoder = science.get("encoder") or {}
        if regime.name == "last_blocks":
            if encoder.get("freeze_blocks") not in (None, 0, -regime.blocks):
                raise ValueError(
                    f"science.encoder.freeze_blocks={encoder['freeze_blocks']} and science.regime=last_blocks with {regime.blocks} "
                    "contradict each other: leave the first one out"
                )
            science = science | {"encoder": {**encoder, "freeze_blocks": -regime.blocks}}
        elif regime.name == "lora" and not encoder.get("lora_rank"):
            science = science | {"encoder": {**encoder, "lora_rank": 8}}
        elif regime.name == "frozen":
            source = data.get("data") or {}
            if source.get("source") == "slides":
                raise ValueError(
                    "science.regime=frozen trains on features: set data.source to features, or to shards to make them"
                )
            data = data | {"data": {**source, "source": "features"}}
        return data | {"science": science}
