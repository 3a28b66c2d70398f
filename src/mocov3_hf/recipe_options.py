"""The options of a recipe, group by group. Every option is documented here, where it is declared: `--help` and the
error messages are made from that.
"""

import json
from dataclasses import dataclass, field
from typing import Any, Literal


class Mapping(dict):
    """A dictionary that can be read from JSON on the command line; given twice, the keys are merged."""

    def __init__(self, value: str | dict = ()):
        super().__init__(json.loads(value) if isinstance(value, str) else value)


def option(default: Any, help: str) -> Any:
    """A documented field; a list or mapping is copied for every recipe."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class ModelRecipe:
    """What is trained."""

    backbone_config: Mapping = option(
        Mapping({"model_type": "mocov3_vit"}),
        "Configuration of the backbone as a mapping (JSON on the command line): model_type is mocov3_vit, resnet or"
        " any vision model that AutoModel builds. Keys given on the command line are merged into the recipe's.",
    )
    model_name_or_path: str | None = option(
        None, "Folder or Hub id of weights to start from; its configuration replaces the recipe's model options."
    )
    projection_dim: int = option(256, "Width of the vectors that the loss compares.")
    head_hidden_size: int = option(4096, "Width of the hidden layers of projector and predictor.")
    num_projector_layers: int = option(3, "Linear layers of the projector: 3 for ViT, 2 for ResNet.")
    num_predictor_layers: int = option(2, "Linear layers of the predictor; 0 for none.")
    predictor_final_norm: bool = option(True, "Whether the predictor ends in batch normalisation: not for ResNet.")
    head_batch_norm: bool = option(True, "Whether projector and predictor have batch normalisation at all.")
    temperature: float = option(0.2, "Temperature of the loss: 0.2 for ViT, 1.0 for ResNet.")
    zero_init_residual: bool = option(True, "Whether a ResNet's residual blocks start as the identity.")


@dataclass(frozen=True)
class DataRecipe:
    """Which images, in what order."""

    dataset_name: str | None = option(
        None, "Hub id, or folder of images, parquet files, webdataset tars, or an Arrow data set saved to disk."
    )
    dataset_config_name: str | None = option(None, "Configuration of the data set, where it has several.")
    train_split: str = option("train", "Split to train on; several are joined by '+'.")
    image_column: str | None = option(None, "Column of the images; found by itself where there is only one.")
    streaming: bool = option(False, "Read the data set in place, shard by shard, where it does not fit on the disk.")
    steps_per_epoch: int | None = option(
        None, "Steps of an epoch where they shall be fewer than the data give, or a stream does not tell its length."
    )
    num_train_images: int | None = option(
        None, "Number of images for planning with --dry_run; the data set's own length counts when it is there."
    )
    on_bad_image: Literal["skip", "error"] = option(
        "skip", "Whether an image that cannot be decoded is replaced by a neighbour and listed, or ends the run."
    )
    max_bad_fraction: float = option(0.01, "Share of bad images beyond which the run ends all the same.")
    cache_images_on_device: bool = option(
        False, "Keep all images decoded on the device and crop them there: for small data sets and models."
    )
    dataloader_num_workers: int | None = option(
        None, "Processes that decode and crop, per training process; by default its share of the machine's cores."
    )

    knn_steps: int | None = option(
        None, "Steps between two measurements of the nearest neighbour accuracy on labelled images."
    )
    knn_dataset_name: str | None = option(None, "Data set of those images; by default dataset_name.")
    knn_train_split: str = option("train", "Split whose labels vote.")
    knn_test_split: str = option("test", "Split that is classified.")
    knn_k: int = option(20, "Number of neighbours.")


@dataclass(frozen=True)
class ViewRecipe:
    """The augmentation (BYOL's, as MoCo v3 uses it). Fields ending in _1 and _2 differ between the two views."""

    image_size: int = option(224, "Height and width of a view in pixels.")
    crop_scale: list[float] = option([0.08, 1.0], "Smallest and largest area of the random crop: from 0.2 for ResNet.")
    crop_ratio: list[float] = option([3 / 4, 4 / 3], "Smallest and largest aspect ratio of the random crop.")
    jitter_probability: float = option(0.8, "Probability of the colour jitter.")
    brightness: float = option(0.4, "Strength of the jitter of brightness.")
    contrast: float = option(0.4, "Strength of the jitter of contrast.")
    saturation: float = option(0.2, "Strength of the jitter of saturation.")
    hue: float = option(0.1, "Strength of the jitter of hue, in turns.")
    grayscale_probability: float = option(0.2, "Probability of dropping the colours.")
    blur_sigma: list[float] = option([0.1, 2.0], "Smallest and largest sigma of the Gaussian blur in pixels.")
    blur_probability_1: float = option(1.0, "Probability of the blur in view 1.")
    blur_probability_2: float = option(0.1, "Probability of the blur in view 2.")
    solarize_probability_1: float = option(0.0, "Probability of solarization in view 1.")
    solarize_probability_2: float = option(0.2, "Probability of solarization in view 2.")
    flip_probability: float = option(0.5, "Probability of the horizontal flip.")


@dataclass(frozen=True)
class OptimizationRecipe:
    """How it is trained."""

    optimizer: Literal["adamw", "lars"] = option("adamw", "adamw for ViT, lars for ResNet.")
    base_learning_rate: float = option(1.5e-4, "Learning rate per 256 images of the global batch.")
    learning_rate: float | None = option(
        None, "Peak learning rate as it is, instead of the scaled base_learning_rate."
    )
    weight_decay: float = option(0.1, "Weight decay; with adamw on everything trainable, with lars on matrices.")
    exclude_norms_and_biases: bool = option(False, "Whether adamw leaves norms, biases, CLS and positions undecayed.")
    adam_beta1: float = option(0.9, "First beta of adamw.")
    adam_beta2: float = option(0.999, "Second beta of adamw.")
    adam_epsilon: float = option(1e-8, "Epsilon of adamw.")
    lars_momentum: float = option(0.9, "Momentum of lars.")
    trust_coefficient: float = option(0.001, "Trust coefficient of lars.")
    max_grad_norm: float | None = option(None, "Largest L2 norm of all gradients together; larger ones are scaled.")
    train_batch_size: int = option(4096, "Images per step over all processes together.")
    per_device_train_batch_size: int | None = option(
        None, "Images per step and process, instead of train_batch_size; the learning rate scales along."
    )
    gradient_cache_chunk_size: int | None = option(
        None,
        "Images per pass of the backbone, for batches larger than memory; exact, for backbones without batch norm.",
    )
    num_train_epochs: int = option(300, "Passes over the data.")
    warmup_epochs: float = option(40, "Epochs of linear warm-up.")
    max_steps: int | None = option(
        None, "Length of the run in steps, instead of num_train_epochs; warm-up keeps its share of the run."
    )
    momentum: float = option(0.99, "Momentum of the moving average at the start.")
    momentum_schedule: Literal["cosine", "constant"] = option("cosine", "Whether the momentum rises to 1 or stays.")


@dataclass(frozen=True)
class AccelerationRecipe:
    """What makes a step fast. What is left open is chosen for device, precision and backbone, as --dry_run shows."""

    tf32: bool | None = option(
        None, "Matrix products of float32 in TF32; by default where the GPU can and mixed_precision is no."
    )
    channels_last: bool | None = option(
        None, "Convolutions with the channels innermost in memory; by default for backbones made of them."
    )
    in_place_relu: bool | None = option(
        None, "ReLUs that overwrite their input, which nothing else reads in a resnet; by default there."
    )
    attn_implementation: str | None = option(
        None,
        "sdpa, eager, flash_attention_2 or another that transformers knows; by default, for mocov3_vit, sdpa, and"
        " eager with bf16 on CPUs.",
    )
    views_in_one_pass: bool | None = option(
        None,
        "Both views in one batch through an encoder; not for backbones with batch normalisation. By default for"
        " mocov3_vit on GPUs.",
    )
    pooled_query_only: bool | None = option(
        None, "The last block of mocov3_vit for the CLS token alone, which is all that the loss reads; by default so."
    )
    keep_freed_memory: bool | None = option(
        None,
        "The process keeps the memory that it frees instead of fetching it from the system anew in every step (glibc's"
        " mallopt); by default on CPUs where the C library is glibc.",
    )
    deterministic: bool | None = option(
        None,
        "Only algorithms that give the same bits every time, so that a run that was interrupted ends in the same"
        " weights as one that was not; by default on GPUs, which have faster ones besides.",
    )
    torch_compile: bool = option(
        False,
        "Compile both encoders and, on GPUs, the augmentation: faster after the first half minute, worth it there for"
        " all but short runs.",
    )
    gradient_checkpointing: bool = option(
        False, "Recompute the encoder's activations in the backward pass: less memory, a quarter more work."
    )
    fsdp: bool = option(
        False,
        "Spread weights, gradients and optimizer over the processes (FSDP2) instead of a copy on each (DDP): less"
        " memory, more communication; of no effect on a single process.",
    )


@dataclass(frozen=True)
class RunRecipe:
    """Where it runs and what it leaves behind."""

    output_dir: str | None = option(None, "Folder for weights, metrics and the resolved recipe.")
    seed: int = option(0, "Seed of initial weights, order of images and augmentation.")
    mixed_precision: Literal["no", "bf16", "fp16"] = option("bf16", "Precision of the forward pass.")
    logging_steps: int = option(10, "Steps between two lines of metrics.jsonl.")
    save_steps: int = option(500, "Steps between two checkpoints; the last step is always saved.")
    save_total_limit: int | None = option(3, "Number of checkpoints to keep; older ones are deleted.")
    resume_from_checkpoint: str | None = option(
        None, "auto for the newest whole checkpoint in output_dir (a fresh start where there is none), or a folder."
    )
    allow_recipe_change: bool = option(False, "Resume although the recipe differs from the checkpoint's.")
    overwrite_output_dir: bool = option(False, "Start again in a folder that holds a run, deleting its checkpoints.")
    on_save_error: Literal["stop", "continue"] = option(
        "stop", "What a run does when a checkpoint cannot be written, as on a full disk."
    )
    communication_timeout: int = option(
        600,
        "Seconds that a process waits for the others before the run ends: longer than the slowest save or preparation"
        " of data.",
    )
    on_instability: Literal["warn", "skip", "rollback"] = option(
        "warn",
        "What a run does when the gradient norm spikes or the loss gives up what it had gained. warn tells and records"
        " it in events.jsonl; skip also leaves out the steps that spike; rollback returns to the last checkpoint and"
        " goes on with other images. A step whose gradient is not finite is left out in any case, and is followed by"
        " a rollback where that is chosen.",
    )
    spike_factor: float = option(
        2.0, "How many times the usual gradient norm a spike is at least; it must also stand out of the noise."
    )
    rollback_learning_rate_factor: float = option(
        1.0, "What the learning rate is multiplied by after every rollback, for the rest of the run."
    )
    max_rollbacks: int = option(10, "Number of rollbacks that are tried before the run ends.")
    report_to: list[str] = option(["none"], "Trackers: tensorboard, trackio, wandb or none.")
    push_to_hub: bool = option(False, "Push the output folder to the Hub after every save, in the background.")
    hub_model_id: str | None = option(None, "USER/NAME of the repository; by default the name of output_dir.")
    hub_private_repo: bool = option(False, "Whether the repository is made private.")
    hub_revision: str | None = option(None, "Branch to push to.")
    dry_run: bool = option(False, "Print the plan (parameters, FLOPs, steps, memory) and stop.")
