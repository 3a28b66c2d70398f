"""The options of a pre-training recipe, by purpose. `--help`, checks and error messages are made from this file."""

from dataclasses import dataclass
from typing import Literal

from ..options import option
from ..reporting import UsageError


@dataclass(frozen=True)
class PlanOptions:
    """Automatic plan, without --recipe"""

    size: Literal["nano", "tiny", "small", "base", "large"] | None = option(
        None, "size of the ViT; by default the backbone is chosen for the images and the device"
    )
    time_budget: str | None = option(
        None,
        "time in which the run ends, such as 8h or 1h30m: its first steps are measured for the length of the schedule;"
        " also with --recipe",
        metavar="TIME",
    )


@dataclass(frozen=True)
class DataOptions:
    """Data"""

    dataset_name: str | None = option(
        None,
        "folder of images, archives, parquet or CSV files or a saved data set, one such file, or a Hub id",
        metavar="FOLDER|HUB_ID",
    )
    dataset_config_name: str | None = option(None, "configuration of a Hub data set that has several", metavar="NAME")
    train_split: str = option("train", "split to train on; several are joined by +", metavar="SPLIT")
    image_column: str | None = option(None, "column with the images; found if there is only one", metavar="NAME")
    streaming: bool = option(False, "read the data set shard by shard, without downloading it")
    steps_per_epoch: int | None = option(
        None, "length of an epoch, needed if the length of a stream is unknown", at_least=1, advanced=True
    )
    num_train_images: int | None = option(
        None,
        "number of images that --dry_run plans with if the data set is not on this machine",
        at_least=1,
        advanced=True,
    )
    on_bad_image: Literal["skip", "stop"] = option(
        "skip",
        "replace images that cannot be decoded and list them in bad_images.jsonl, or stop",
        old_values={"error": "stop"},
        advanced=True,
    )
    max_bad_fraction: float = option(
        0.01, "fraction of bad images at which the run stops", at_least=0, at_most=1, advanced=True
    )
    cache_images_on_device: bool = option(
        False, "keep all decoded images on the device and crop them there: for small data sets", advanced=True
    )
    num_channels: int | None = option(
        None,
        "channels of the images; defaults to those of the data, for grayscale and RGB images to those of the model",
        at_least=1,
        at_most=10_000,
    )
    pixel_range: list[float] | Literal["auto"] = option(
        "auto",
        "values of images with more than 8 bits that become 0 and 1, for all channels or a pair for each; auto: from a"
        " sample, percentiles 0.5 and 99.5; 8-bit images are always scaled from 0..255",
        metavar="auto|LOW HIGH",
    )
    nodata: float | None = option(
        None, "value of pixels without data, besides NaN, infinities and what GeoTIFFs declare", advanced=True
    )
    input_data_format: Literal["channels_first", "channels_last"] | None = option(
        None, "axis of the channels of arrays, where the number of channels does not decide", advanced=True
    )
    image_mean: list[float] | Literal["auto"] | None = option(
        None,
        "mean of each channel for pixels in 0..1, or auto to estimate it from a sample; defaults to ImageNet's for"
        " 8-bit RGB, else to auto",
        metavar="auto|VALUE ...",
        advanced=True,
    )
    image_std: list[float] | Literal["auto"] | None = option(
        None, "standard deviation of each channel, as image_mean", metavar="auto|VALUE ...", advanced=True
    )


@dataclass(frozen=True)
class ViewOptions:
    """Views"""

    image_size: int = option(224, "height and width of a view in pixels", at_least=1, at_most=10_000)
    crop_scale: list[float] = option(
        [0.08, 1.0], "smallest and largest area of the random crop (ResNet: 0.2 1.0)", above=0, at_most=1
    )
    crop_ratio: list[float] = option(
        [3 / 4, 4 / 3], "smallest and largest aspect ratio of the random crop", above=0, advanced=True
    )
    flip_probability: float = option(0.5, "probability of the horizontal flip", at_least=0, at_most=1)
    vertical_flip_probability: float = option(
        0.0, "probability of the vertical flip, for images without an upper side", at_least=0, at_most=1, advanced=True
    )
    rotation_probability: float = option(
        0.0, "probability of a rotation by 90, 180 or 270 degrees", at_least=0, at_most=1, advanced=True
    )
    channel_drop_probability: float = option(
        0.0, "probability of replacing one channel by its mean over the data set", at_least=0, at_most=1, advanced=True
    )
    jitter_probability: float = option(0.8, "probability of color jitter", at_least=0, at_most=1, advanced=True)
    brightness: float = option(0.4, "strength of the brightness jitter", at_least=0, advanced=True)
    contrast: float = option(0.4, "strength of the contrast jitter", at_least=0, advanced=True)
    saturation: float = option(0.2, "strength of the saturation jitter", at_least=0, advanced=True)
    hue: float = option(0.1, "strength of the hue jitter, in turns", at_least=0, advanced=True)
    grayscale_probability: float = option(
        0.2, "probability of conversion to grayscale", at_least=0, at_most=1, advanced=True
    )
    blur_sigma: list[float] = option(
        [0.1, 2.0], "smallest and largest sigma of the Gaussian blur in pixels", above=0, advanced=True
    )
    blur_probability_1: float = option(1.0, "probability of blur in view 1", at_least=0, at_most=1, advanced=True)
    blur_probability_2: float = option(0.1, "probability of blur in view 2", at_least=0, at_most=1, advanced=True)
    solarize_probability_1: float = option(
        0.0, "probability of solarization in view 1", at_least=0, at_most=1, advanced=True
    )
    solarize_probability_2: float = option(
        0.2, "probability of solarization in view 2", at_least=0, at_most=1, advanced=True
    )

    def __post_init__(self):
        for name in ("crop_scale", "crop_ratio", "blur_sigma"):
            value = getattr(self, name)
            if len(value) != 2 or value[0] > value[1]:
                raise UsageError(f"--{name} takes two positive numbers, the smaller first, got {value}")


@dataclass(frozen=True)
class ModelOptions:
    """Model"""

    model: str | None = option(
        None,
        "weights to start from: folder, Hub id or published name; its configuration replaces the recipe's",
        old=("model_name_or_path",),
        metavar="FOLDER|NAME",
    )
    adapt_input_channels: bool = option(
        False,
        "start from --model with another number of channels: sum the weights of its first layer for one channel, else"
        " repeat them",
        advanced=True,
    )
    backbone_config: dict = option(
        {"model_type": "mocov3_vit"},
        "configuration of the backbone: model_type is mocov3_vit, resnet or another vision model of AutoModel"
        " (docs/backbones.md); keys are merged into the recipe's",
    )
    pooling: Literal["auto", "cls", "mean"] = option(
        "auto",
        "how the backbone's output becomes one vector per image: its own pooled output, otherwise the CLS token or the"
        " mean; always the CLS token; or always the mean over the patches or the feature map",
        advanced=True,
    )
    projection_dim: int = option(
        256, "width of the embeddings that InfoNCE compares", at_least=1, at_most=10**6, advanced=True
    )
    head_hidden_size: int = option(
        4096, "width of the hidden layers of projector and predictor", at_least=1, at_most=10**6, advanced=True
    )
    num_projector_layers: int = option(
        3, "linear layers of the projector (ViT: 3, ResNet: 2)", at_least=1, at_most=1000, advanced=True
    )
    num_predictor_layers: int = option(
        2, "linear layers of the predictor; 0 for no predictor", at_least=0, at_most=1000, advanced=True
    )
    predictor_final_norm: bool = option(
        True, "whether the predictor ends with batch normalization (ViT: true, ResNet: false)", advanced=True
    )
    head_batch_norm: bool = option(True, "whether projector and predictor have batch normalization", advanced=True)
    zero_init_residual: bool = option(
        True, "whether the residual blocks of a ResNet start as the identity", advanced=True
    )
    temperature: float = option(0.2, "temperature of InfoNCE (ViT: 0.2, ResNet: 1.0)", above=0)


@dataclass(frozen=True)
class OptimizationOptions:
    """Optimization"""

    optimizer: Literal["adamw", "lars"] = option("adamw", "adamw for ViT, lars for ResNet")
    base_learning_rate: float = option(
        1.5e-4, "learning rate per 256 images of the global batch (linear scaling rule)", at_least=0
    )
    learning_rate: float | None = option(None, "peak learning rate, instead of scaling base_learning_rate", at_least=0)
    weight_decay: float = option(
        0.1, "weight decay: with adamw of all trained parameters, with lars of matrices", at_least=0
    )
    train_batch_size: int = option(4096, "images per step over all processes (global batch)", at_least=1)
    per_device_train_batch_size: int | None = option(
        None, "images per step and process, instead of train_batch_size", at_least=1
    )
    num_train_epochs: int = option(300, "epochs", at_least=1)
    warmup_epochs: float = option(40.0, "epochs of linear warmup", at_least=0)
    max_steps: int | None = option(
        None, "steps, instead of num_train_epochs; warmup keeps its fraction of the run", at_least=1
    )
    ema_decay: float = option(
        0.99, "EMA decay of the momentum encoder at the start", at_least=0, at_most=1, old=("momentum",)
    )
    ema_schedule: Literal["cosine", "constant"] = option(
        "cosine", "raise ema_decay to 1 by a cosine, or keep it", old=("momentum_schedule",)
    )
    max_grad_norm: float | None = option(None, "clip the L2 norm of the gradient", above=0)
    exclude_norms_and_biases: bool = option(
        False, "exclude norms, biases, CLS token and position embeddings from the weight decay of adamw", advanced=True
    )
    adam_beta1: float = option(0.9, "first beta of adamw", at_least=0, below=1, advanced=True)
    adam_beta2: float = option(0.999, "second beta of adamw", at_least=0, below=1, advanced=True)
    adam_epsilon: float = option(1e-8, "epsilon of adamw", at_least=0, advanced=True)
    lars_momentum: float = option(0.9, "SGD momentum of lars", at_least=0, below=1, advanced=True)
    trust_coefficient: float = option(0.001, "trust coefficient of lars", at_least=0, advanced=True)
    trust_clip: bool = option(
        False, "divide the trust ratio of lars by the learning rate and clip it at 1 (LARC)", advanced=True
    )


@dataclass(frozen=True)
class HardwareOptions:
    """Hardware and speed"""

    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = option(
        "auto",
        "precision of the forward pass; auto is bf16 or fp16 where the device has instructions for it, else no"
        " (float32); a resumed run keeps its own",
    )
    torch_compile: bool = option(
        False, "compile both encoders and, on GPUs, the augmentation: half a minute more at the start"
    )
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass: less memory, a quarter more computation"
    )
    gradient_cache_chunk_size: int | None = option(
        None,
        "images per pass of the backbone, for batches larger than memory; exact, for backbones without batch"
        " normalization",
        at_least=1,
    )
    dataloader_num_workers: int | None = option(
        None,
        "data-loading workers per process, 0 for none; defaults to a quarter of its cores, beside a GPU all but one",
        at_least=0,
        at_most=10_000,
    )
    attn_implementation: str | None = option(
        None,
        "sdpa, eager, flash_attention_2 or another of transformers; for mocov3_vit, defaults to sdpa",
        advanced=True,
    )
    deterministic: bool | None = option(
        None,
        "deterministic algorithms only, so that a resumed run has bit-identical weights; defaults to true on GPUs",
        advanced=True,
    )
    communication_timeout: int = option(
        600,
        "seconds after which a process that does not respond ends the run",
        at_least=1,
        at_most=10**6,
        advanced=True,
    )


@dataclass(frozen=True)
class RunOptions:
    """Run"""

    output_dir: str | None = option(
        None,
        "folder for weights, checkpoints, metrics and the resolved recipe; without a recipe, defaults to runs/ and the"
        " name of the data",
        metavar="DIR",
    )
    run_name: str | None = option(
        None, "name of the run in the trackers of report_to; defaults to the name of output_dir", metavar="NAME"
    )
    overwrite_output_dir: bool = option(False, "start again in a folder that holds a run, deleting its checkpoints")
    resume_from_checkpoint: str | None = option(
        None,
        "auto for the newest valid checkpoint in output_dir, if there is one, or a checkpoint folder",
        metavar="auto|DIR",
    )
    seed: int = option(0, "seed of initial weights, order of images and augmentation", at_least=0)
    save_steps: int = option(500, "steps between checkpoints; the last step is always saved", at_least=1)
    save_total_limit: int | None = option(3, "checkpoints to keep; older ones are deleted", at_least=1)
    dry_run: bool = option(False, "print the plan (images, parameters, FLOPs, steps, memory) and exit")
    json: bool = option(False, "with --dry_run: print the plan as one JSON object", advanced=True)
    allow_recipe_change: bool = option(
        False, "resume although the recipe differs from the checkpoint's", advanced=True
    )
    allow_data_change: bool = option(
        False,
        "resume although the images differ from the checkpoint's; the run keeps its number of steps",
        advanced=True,
    )
    on_save_error: Literal["stop", "continue"] = option(
        "stop", "if checkpoints or metrics cannot be written, such as on a full disk: stop or continue", advanced=True
    )


@dataclass(frozen=True)
class MonitoringOptions:
    """Monitoring"""

    logging_steps: int = option(10, "steps between lines of metrics.jsonl", at_least=1)
    report_to: list[str] = option(["none"], "trackers: tensorboard, trackio, wandb or none", metavar="NAME ...")
    knn_steps: int | None = option(None, "steps between kNN evaluations on labeled images", at_least=1)
    knn_dataset_name: str | None = option(None, "labeled images; defaults to dataset_name", metavar="FOLDER|HUB_ID")
    knn_train_split: str = option("train", "split of the labeled neighbors", metavar="SPLIT", advanced=True)
    knn_test_split: str = option("test", "split to classify", metavar="SPLIT", advanced=True)
    knn_k: int = option(20, "number of neighbors", at_least=1, advanced=True)
    on_instability: Literal["warn", "skip", "rollback"] = option(
        "warn",
        "if the gradient norm spikes or the loss diverges: warn, skip steps that spike as well, or roll back to the"
        " last checkpoint and skip the offending batches. Steps with a gradient that is not finite are always skipped",
    )
    spike_factor: float = option(
        2.0, "spike threshold, as a multiple of the median gradient norm", above=1, advanced=True
    )
    rollback_learning_rate_factor: float = option(
        1.0, "factor on the learning rate after every rollback", above=0, at_most=1, advanced=True
    )
    max_rollbacks: int = option(10, "rollbacks after which the run ends", at_least=1, advanced=True)


@dataclass(frozen=True)
class HubOptions:
    """Hub"""

    push_to_hub: bool = option(False, "push the output folder to the Hub after every checkpoint, in the background")
    hub_model_id: str | None = option(None, "repository; defaults to the name of output_dir", metavar="USER/NAME")
    hub_private_repo: bool = option(False, "create the repository as private", advanced=True)
    hub_revision: str | None = option(None, "branch to push to", metavar="BRANCH", advanced=True)
