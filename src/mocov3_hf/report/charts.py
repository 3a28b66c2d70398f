"""The charts about training: which metrics they show, and what they look like in a healthy run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LineChart:
    """
    Metrics over steps. Discarded lines are dashed, and the steps that they cover are shaded.

    Attributes:
        name, title, caption: as in `Chart`.
        panels: for each panel, one above the other, the labels of its lines and their keys in the logs.
        percent, log, from_zero: format and range of the y axes.
    """

    name: str
    title: str
    caption: str
    panels: tuple[dict[str, str], ...]
    percent: bool = False
    log: bool = False
    from_zero: bool = False


LOSS = LineChart(
    "loss",
    "Contrastive loss",
    "InfoNCE loss. Healthy: leaves chance during warmup, then falls steadily and slowly towards the floor.",
    ({"loss": "loss"},),
)
# Comparable across batch sizes and temperatures.
NORMALIZED_LOSS = LineChart(
    "loss", "Normalized contrastive loss", "0 is chance, 1 the floor.", ({"normalized loss": "loss_normalized"},)
)
GRADIENTS = LineChart(
    "gradients",
    "Gradient norm",
    "L2 norm of all gradients, mean since the previous log line; spikes are single steps. Healthy: falls or stays"
    " within a factor of 2 of its usual value, without spikes (▼), skipped steps (×) or rollbacks (shaded).",
    ({"gradient norm": "grad_norm"},),
    log=True,
)
KNN = LineChart(
    "knn",
    "kNN accuracy",
    "Top-1 on labeled images during training. Healthy: rises throughout. A dip indicates instability (paper §4):"
    " it follows a spike in the gradient, and the run ends with lower accuracy.",
    ({"kNN top-1": "knn_top1"},),
    percent=True,
)
PRETRAINING_CHARTS = (
    LOSS,
    KNN,
    LineChart(
        "positives",
        "Contrastive accuracy",
        "Share of queries whose positive is the most similar of all keys in the batch; chance is 1 in the global batch"
        " size. Healthy: rises as the loss falls.",
        ({"positive top-1": "positive_top1"},),
        percent=True,
    ),
    GRADIENTS,
    LineChart(
        "layers",
        "Largest gradient, first and last layer",
        "Largest gradient component since the previous log line. Healthy: level. In an unstable run the first layer"
        " spikes tens of steps before the last layer (paper §4.2, figure 4).",
        ({"first layer": "first_layer_grad_max", "last layer": "last_layer_grad_max"},),
        log=True,
    ),
    LineChart(
        "schedule",
        "Learning rate and EMA decay",
        "Healthy: linear warmup of the learning rate, then cosine decay; the EMA decay of the momentum encoder rises"
        " to 1 at the end. A step down that the recipe does not contain is a rollback with a lower learning rate.",
        ({"learning rate": "learning_rate"}, {"EMA decay": "ema_decay"}),
    ),
    LineChart(
        "collapse",
        "Spread and rank of the projections",
        "Spread: standard deviation of the L2-normalized projections times the square root of their dimension; 1 if"
        " uniform on the sphere, 0 if collapsed. Effective rank: number of directions in use. Healthy: spread near 1"
        " and rank well above 1. A fall towards 0 and 1 is collapse.",
        ({"spread": "projection_std_ratio"}, {"effective rank": "projection_effective_rank"}),
        from_zero=True,
    ),
    LineChart(
        "throughput",
        "Throughput and data-loading stall",
        "Stall: share of the time spent waiting for data. Healthy: constant throughput and a stall below 0.1. A larger"
        " stall means that decoding is the bottleneck: raise --dataloader_num_workers.",
        ({"images/s": "images_per_second"}, {"stall": "data_wait_fraction"}),
        from_zero=True,
    ),
)
CLASSIFIER_CHARTS = (
    LineChart(
        "loss",
        "Training loss",
        "Cross-entropy on augmented images (of regression the squared error of standardized targets). Healthy: falls"
        " fast, then slowly, without jumps. Mixup and label smoothing keep it well above 0.",
        ({"training loss": "loss"},),
    ),
    LineChart(
        "accuracy",
        "Test accuracy",
        "Top-1 after every epoch. Healthy: still rising slightly at the end of the schedule; a decline from the middle"
        " on is overfitting. The EMA of the weights usually leads until the end.",
        ({"weights": "eval_top1", "EMA of the weights": "eval_top1_ema"},),
        percent=True,
    ),
    LineChart(
        "map",
        "Mean average precision",
        "Mean average precision (mAP) after every epoch. Healthy: still rising slightly at the end of the schedule.",
        ({"weights": "eval_map", "EMA of the weights": "eval_map_ema"},),
        percent=True,
    ),
    LineChart(
        "r2",
        "R²",
        "R² after every epoch: 1 is exact, 0 no better than the mean of the targets. Healthy: still rising slightly at"
        " the end of the schedule.",
        ({"weights": "eval_r2", "EMA of the weights": "eval_r2_ema"},),
    ),
    LineChart(
        "gradients",
        "Gradient norm",
        "L2 norm of all gradients. Healthy: stays within a small factor of its usual value.",
        ({"gradient norm": "grad_norm"},),
        log=True,
    ),
    LineChart(
        "schedule",
        "Learning rate",
        "Healthy: the schedule of the recipe, ending near 0.",
        ({"learning rate": "learning_rate"},),
    ),
)
