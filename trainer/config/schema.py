"""The schema of the configuration's fixed groups: one frozen dataclass each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class ModelConfig:
    """A model folder, or an architecture to start from scratch (exactly one of the two)."""

    name: str
    path: str | None = None
    architecture: dict[str, Any] | None = None  # keyword arguments of the transformers config class
    pad_vocab_to: int = 64  # from scratch: rows of both vocabulary matrices are a multiple of this
    trust_remote_code: bool = False  # run the folder's own code, if it is that of revision
    revision: str | None = None  # SHA-256 over the folder's .py files


@dataclass(frozen=True)
class TokenizerConfig:
    """A tokenizer folder or SentencePiece ``.model``; null means the model folder's own."""

    path: str | None = None


@dataclass(frozen=True)
class SourceConfig:
    """One data source: files, how to read them, how often to draw from it."""

    paths: list[str]  # files, folders or globs
    weight: float = 1.0  # relative share of training rows
    format: str = "auto"  # auto | txt | lines | jsonl | json | csv | tsv | parquet | arrow
    text_columns: list[str] = field(default_factory=lambda: ["text"])  # joined by a newline
    holdout_share: float | None = None  # share of documents held out; null = data.holdout_share
    encoding: str = "auto"  # auto | utf-8 | cp950 | utf-16 | any Python codec
    sheet: str | None = None  # xlsx, xls: null = the first sheet with rows
    # Conversations, preferences and prompts:
    schema: str = "auto"  # auto | alpaca | sharegpt | messages | prompt_response | squad
    columns: dict[str, str] | None = None  # our column name -> the file's, over the guess
    datasets: list[str] = field(default_factory=list)  # names in a LLaMA-Factory dataset_info.json
    dataset_info: str | None = None  # that file; null = the one in the folder of paths
    ranked_pairs: Literal["all", "best"] = "all"  # of a ranked list: all pairs, or best with rest


@dataclass(frozen=True)
class DataConfig:
    """Sources and how documents become training rows."""

    sources: dict[str, SourceConfig]
    # Set by the stage's option; preferences: pairs of answers; prompts: no answers.
    content: Literal["documents", "conversations", "preferences", "prompts"] = "documents"
    weights_are: Literal["rows", "epochs"] = "rows"  # source weights: shares of rows, or of passes
    template: str = "auto"  # conversations: auto = the tokenizer's own; a name; a .jinja file
    train_on: Literal["assistant", "last", "everything"] = "assistant"
    system: str | None = None  # conversations without a system message get this one
    store_dir: str = "runs/store"  # prepared token stores, one folder per content key
    max_length: int = 512  # tokens a row
    packing: bool = True  # false: one document piece a row, padded
    isolate_documents: bool = True  # packed documents do not attend to each other
    holdout_share: float = 0.01
    min_chars: int = 1  # shorter documents are counted and left out
    max_bad_row_share: float = 0.01  # abort above this share of rejected rows
    num_processes: int = 0  # prepare: 0 = one per CPU core


@dataclass(frozen=True)
class EngineConfig:
    """DeepSpeed ZeRO, offload and precision."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    offload_params: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: str | None = None  # node-local folder for nvme offload
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    activation_checkpointing: bool = False
    compile: bool = False
    initial_loss_scale_power: int = 16  # fp16: first loss scale is 2**this
    loss_scale_window: int = 1000  # fp16: steps without overflow before the scale doubles
    min_loss_scale: int = 1  # fp16: 8 overflows in a row at this scale stop the run


@dataclass(frozen=True)
class OptimConfig:
    """AdamW; norms, biases and other one-dimensional parameters get no weight decay."""

    lr: float = 3e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float = 1.0  # 0 = off


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning-rate schedule as a factor of ``optim.lr``."""

    name: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    warmup_share: float = 0.0  # of the run's steps; the longer of the two counts
    min_lr_ratio: float = 0.1
    decay_share: float = 0.2  # wsd: last share of the steps that decays


@dataclass(frozen=True)
class PeftConfig:
    """Which parameters are trained."""

    mode: Literal["full", "freeze", "lora", "qlora"] = "full"
    trainable: str | None = None  # freeze: regex searched in parameter names
    trainable_layers: int = 0  # freeze: the last layers of the model
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False  # scale by alpha / sqrt(rank) instead of alpha / rank
    dora: bool = False  # train each output's length apart from its direction
    b_lr_ratio: float = 1.0  # LoRA+: learning rate of the B matrices over that of the A matrices
    target_modules: list[str] | Literal["auto", "all-linear"] = "auto"
    train_embeddings: bool = False  # lora: train input and output embeddings as well
    adapter: str | None = None  # lora: folder of an adapter to continue; it sets rank and modules
    quantization: Literal["nf4", "int8"] = "nf4"  # qlora: storage of the frozen linear layers


@dataclass(frozen=True)
class LoopConfig:
    """Length and rhythm of a run."""

    max_steps: int = 100  # at most; 0 = as many as epochs take
    epochs: float | None = None  # passes over the data; null = as many as max_steps make
    micro_batch_size: int = 1  # rows a rank holds at once
    global_batch_tokens: int = 8192  # tokens of one optimizer step over all ranks
    log_every: int = 1
    eval_every: int = 0  # 0 = at the end only
    eval_chars: int = 100_000  # per source, at most; 0 = no evaluation
    save_every: int = 0  # 0 = at the end only
    keep_last: int = 2  # checkpoints kept, newest first
    keep_every: int = 0  # steps; checkpoints at multiples are never deleted (0 = none)
    keep_gb: float | None = None  # of all checkpoints, the one being written included
    save_async: bool = True  # false: training stands still until a checkpoint is on the disk
    staging_dir: str | None = None  # node-local folder that takes the copy in place of host memory
    damaged: Literal["walk_back", "refuse"] = "walk_back"  # when the newest checkpoint is
    seed: int = 0


@dataclass(frozen=True)
class GuardConfig:
    """What is done about numbers that are not finite, spikes, and replicas that differ."""

    non_finite: Literal["stop", "skip", "roll_back"] = "stop"  # a loss or gradient is NaN or Inf
    spikes: Literal["off", "stop", "skip", "roll_back"] = "off"  # of loss and gradient norm
    spike_factor: float = 10.0  # deviations above the median of the steps before that make one
    spike_window: int = 128  # steps that median is of; none is a spike before there were as many
    max_skips: int = 4  # within skip_window; then it rolls back, or stops
    skip_window: int = 1000  # steps
    max_roll_backs: int = 2  # of the run; 0: none, also not after too many skips
    compare_every: int = 100  # steps between comparisons of the ranks' replicas; 0 = never


@dataclass(frozen=True)
class LogConfig:
    """Where metrics go besides ``metrics.jsonl`` and the console."""

    wandb: Literal["off", "offline", "online"] = "off"
    wandb_project: str = "kuroshio"
    tensorboard: bool = False


@dataclass(frozen=True)
class PartitionConfig:
    """Limits of one Slurm partition; null is unknown, and then nothing is checked."""

    max_hours: float | None = None  # of one job
    min_gpus: int = 1  # of one job
    max_gpus: int | None = None  # of one user at once, and so of one job
    max_jobs: int | None = None  # of one user at once
    gpu: str | None = None  # where its nodes differ from the site's
    gpu_memory_gb: float | None = None
    arch: str | None = None
    who: str = "all"  # whose projects may use it
    account_pattern: str | None = None  # regular expression of their whole account names


@dataclass(frozen=True)
class PriceConfig:
    """What a GPU costs one kind of project."""

    who: str
    currency: str
    per_gpu_hour: float
    source: str
    date: str | None  # of the source; null: it has none


@dataclass(frozen=True)
class SiteConfig:
    """Facts of a machine; null or empty is unknown, never guessed."""

    name: str = "local"  # its environment is slurm/env/NAME.sh
    scheduler: Literal["none", "slurm"] = "none"
    gpu: str | None = None
    gpu_memory_gb: float | None = None
    gpus_per_node: int | None = None  # of a whole node; 0: ranks run on CPU
    cpus_per_gpu: int | None = None  # cores a job gets with each GPU, at most
    memory_gb_per_gpu: float | None = None  # host memory a job gets with each GPU, at most
    cpus_per_node: int | None = None
    memory_gb_per_node: float | None = None
    gres: str = ""  # sbatch --gres of a node, {n} is its GPUs; empty: none is asked for
    precisions: list[str] = field(default_factory=list)  # what its GPUs compute natively
    partitions: dict[str, PartitionConfig] = field(default_factory=dict)
    default_partition: str | None = None
    account_required: bool = False
    account_pattern: str | None = None  # regular expression of a whole account name
    interface: str | None = None  # network interface of the collectives' sockets
    local_scratch: str | None = None  # node-local folder; null: the job looks for one
    internet: bool | None = None  # whether compute nodes reach it
    quota_gb: float | None = None  # of the file system that runs are written to
    mpi: str | None = None  # srun --mpi; null: none, which the project's own ranks need
    arch: str | None = None  # uname -m of the compute nodes
    intra_node_gb_per_s: float | None = None  # per GPU and direction, to the GPUs of its node
    inter_node_gb_per_s: float | None = None  # per GPU and direction, to other nodes
    prices: list[PriceConfig] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)  # where the facts come from, with date


@dataclass(frozen=True)
class ClusterConfig:
    """Machines of a run, and what is asked of their scheduler."""

    nodes: int = 1
    gpus_per_node: int = 1  # ranks a node; on a CPU machine, processes
    timeout_s: int = 1800  # collective timeout
    partition: str | None = None  # null: the site's default
    account: str | None = None  # project that pays
    time: str | None = None  # D-HH:MM:SS or HH:MM:SS; null: the partition's limit
    max_lives: int = 20  # starts of one job's ranks
    max_lives_without_progress: int = 3  # lives in a row without a newer checkpoint
    exclude: str | None = None  # nodes to stay away from, such as gn1001,gn[1003-1005]
    image: str | None = None  # Singularity or Apptainer image that holds the environment
    share_with_group: bool = False  # your Unix group may read run folders and token stores
    site: SiteConfig = field(default_factory=SiteConfig)


@dataclass(frozen=True)
class RunConfig:
    """A whole run. ``stage`` stays plain data: the stage's own dataclass reads it."""

    name: str
    run_dir: str
    stage: dict[str, Any]
    model: ModelConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    engine: EngineConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    peft: PeftConfig
    loop: LoopConfig
    log: LogConfig
    cluster: ClusterConfig
    guard: GuardConfig = field(default_factory=GuardConfig)
