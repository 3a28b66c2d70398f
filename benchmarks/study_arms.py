"""The arms of the CIFAR-10 study: each changes one setting of a recipe of the package."""

from dataclasses import dataclass, replace


LOGGING = ("--logging_steps", "5")


@dataclass(frozen=True)
class Arm:
    """One setting, run once per seed.

    Attributes:
        name: unique name, as shown in the tables.
        group: table or plot it belongs to.
        recipe: recipe of the package.
        epochs: number of epochs; a tenth of them is warmup.
        options: options of `mocov3 pretrain` that differ from the recipe.
        seeds: number of seeds.
        paper: linear accuracy on ImageNet in %, of the changed and of the original setting, and the setting in the
            paper; None if the paper has no such comparison.
        points: number of evaluations at equal distances, the last one at the end.
        batch_size: images per step.
        num_images: size of the training set.
        max_steps: steps after which the run ends early.
    """

    name: str
    group: str
    recipe: str
    epochs: int = 1
    options: tuple[str, ...] = ()
    seeds: int = 3
    paper: tuple[float, float, str] | None = None
    points: int = 1
    batch_size: int = 64
    num_images: int = 50_000
    max_steps: int | None = None

    @property
    def key(self) -> str:
        """Name of its folder and its result files."""
        return "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in self.name).lower()

    @property
    def steps(self) -> int:
        return self.max_steps or self.epochs * (self.num_images // self.batch_size)


def arguments_of(arm: Arm) -> list[str]:
    """Arguments of `mocov3 pretrain`, without data set, seed and output folder."""
    return [
        *("--recipe", arm.recipe),
        *("--num_train_epochs", str(arm.epochs), "--warmup_epochs", str(arm.epochs / 10)),
        *("--train_batch_size", str(arm.batch_size), "--save_steps", str(-(-arm.steps // arm.points))),
        *(("--max_steps", str(arm.max_steps)) if arm.max_steps else ()),
        *LOGGING,
        *arm.options,
    ]


NANO = "cifar10_vit-nano-p8"
RESNET = "cifar10_resnet10"
TINY = "cifar10_vit-tiny-p4"
ABLATION_BASELINE = "ViT-nano/8"
LONGER_BASELINE = "ViT-nano/8, 4 epochs"
FAILURE = "rate too high, patch projection trained"
TRAINED_PROJECTION = ("--backbone_config", '{"freeze_patch_projection": false}')
POSITION_LEARNED = ("--backbone_config", '{"position_embedding": "learned"}')
TOO_HIGH = ("--learning_rate", "3e-2")
FEW_IMAGES = ("--train_split", "train[:5000]")
IN_MEMORY = ("--mixed_precision", "bf16", "--cache_images_on_device", "--dataloader_num_workers", "0")
TINY_OPTIONS = (*IN_MEMORY, "--learning_rate", "5e-4", "--ema_decay", "0.9")
WATCHED = ("--knn_steps", "40", "--knn_train_split", "train[:5000]", "--knn_test_split", "test[:1000]")
# Settings of the paper's ablations: ViT-B/16, linear accuracy on ImageNet.
IN_100_EPOCHS, IN_300_EPOCHS = "ViT-B, 100 epochs", "ViT-B, 300 epochs"


def ablation(name: str, *options: str, paper: tuple[float, float, str] | None = None, **values) -> Arm:
    return Arm(name, "ablations", NANO, options=options, paper=paper, **values)


def tuning(name: str, recipe: str, *options: str, **values) -> Arm:
    return Arm(name, "tuning", recipe, options=options, seeds=1, **values)


def small_batch(name: str, *options: str) -> Arm:
    return tuning(f"batch 32, {name}", NANO, "--learning_rate", "7e-4", *options, batch_size=32)


def small_data(name: str, *options: str) -> Arm:
    values = {"epochs": 10, "num_images": 5000}
    return tuning(f"5,000 images, {name}", NANO, *FEW_IMAGES, *options, **values)


def resnet(name: str, *options: str) -> Arm:
    return tuning(f"ResNet-10, {name}", RESNET, *options, batch_size=256)


def failure(name: str, *options: str) -> Arm:
    return Arm(name, "failure", NANO, options=(*TOO_HIGH, *WATCHED, *options), seeds=1)


ARMS = [
    Arm("ViT-tiny/4", "curves", TINY, options=TINY_OPTIONS, seeds=2, points=2, max_steps=312),
    Arm("ResNet-10", "curves", RESNET, epochs=2, seeds=2, points=2, batch_size=256),
    ablation(ABLATION_BASELINE),
    ablation("patch projection trained", *TRAINED_PROJECTION, paper=(71.7, 73.4, IN_100_EPOCHS)),
    ablation("position learned", *POSITION_LEARNED, paper=(76.1, 76.5, IN_300_EPOCHS)),
    ablation("no predictor", "--num_predictor_layers", "0", paper=(75.5, 76.5, IN_300_EPOCHS)),
    ablation("no batch norm in heads", "--no_head_batch_norm", paper=(74.4, 76.5, IN_300_EPOCHS)),
    ablation("EMA decay 0", "--ema_decay", "0", "--ema_schedule", "constant", paper=(74.3, 76.5, IN_300_EPOCHS)),
    ablation("EMA decay 0.9", "--ema_decay", "0.9", paper=(75.6, 76.5, IN_300_EPOCHS)),
    ablation("EMA decay 0.999", "--ema_decay", "0.999", paper=(75.0, 76.5, IN_300_EPOCHS)),
    ablation("temperature 0.1", "--temperature", "0.1"),
    ablation("temperature 0.5", "--temperature", "0.5"),
    ablation("batch 256", "--learning_rate", "2e-3", batch_size=256, paper=(69.7, 72.2, IN_100_EPOCHS)),
    failure(FAILURE, *TRAINED_PROJECTION),
    failure(f"{FAILURE[: -len('trained')]}frozen"),
    Arm("the recipe's rate, patch projection frozen", "failure", NANO, options=WATCHED, seeds=1),
    tuning("ViT-nano/8, learning rate 2e-3", NANO, "--learning_rate", "2e-3"),
    small_batch("EMA decay 0.99", "--ema_decay", "0.99"),
    small_batch("EMA decay 0.9", "--ema_decay", "0.9"),
    small_batch("EMA decay 0.9, learning rate 3e-4", "--ema_decay", "0.9", "--learning_rate", "3e-4"),
    small_data("EMA decay 0.99", "--ema_decay", "0.99"),
    small_data("EMA decay 0.9", "--ema_decay", "0.9"),
    small_data("EMA decay 0.9, crops from 0.08", "--ema_decay", "0.9", "--crop_scale", "0.08", "1.0"),
    resnet("temperature 0.2", "--temperature", "0.2"),
    resnet("temperature 1", "--temperature", "1.0"),
    resnet("AdamW", "--optimizer", "adamw", "--learning_rate", "1e-3", "--weight_decay", "0.1"),
]


def in_long_form(arm: Arm) -> Arm:
    """The same comparison on ViT-tiny/4: 200 epochs, batches eight times as large, learning rate of the recipe."""
    options = (*IN_MEMORY, *without(arm.options, "--learning_rate"))
    recipe = TINY if arm.recipe == NANO else arm.recipe
    return replace(arm, recipe=recipe, epochs=200, max_steps=None, options=options, batch_size=8 * arm.batch_size)


def without(options: tuple[str, ...], name: str) -> tuple[str, ...]:
    """`options` without the option `name` and its value."""
    if name not in options:
        return options
    place = options.index(name)
    return options[:place] + options[place + 2 :]


EMA_0 = ("--ema_decay", "0", "--ema_schedule", "constant")
# The settings of solo-learn on CIFAR-10: LARS with a clipped trust ratio, and larger differences between crops.
CLIPPED = ("--base_learning_rate", "0.3", "--trust_coefficient", "0.02", "--trust_clip")


def longer(name: str, *options: str, paper: tuple[float, float, str] | None = None) -> Arm:
    """Ablations whose signs disagreed with the paper after one epoch, over four."""
    options = ("--mixed_precision", "no", *options)
    return Arm(name, "longer", NANO, epochs=4, options=options, seeds=2, paper=paper, points=2)


def lars(name: str, *options: str) -> Arm:
    """Settings for ResNets on CIFAR-10, tried on the small network."""
    options = ("--mixed_precision", "bf16", *options)
    return Arm(f"ResNet-10, {name}", "lars", RESNET, epochs=3, options=options, seeds=1, points=3, batch_size=256)


ARMS += [
    lars("trust 0.005", "--base_learning_rate", "0.8", "--trust_coefficient", "0.005"),
    lars("trust 0.02 clipped", *CLIPPED),
    lars("trust 0.02 clipped, crops from 0.08", *CLIPPED, "--crop_scale", "0.08", "1.0"),
    longer(LONGER_BASELINE),
    longer("no predictor, 4 epochs", "--num_predictor_layers", "0", paper=(75.5, 76.5, IN_300_EPOCHS)),
    longer("EMA decay 0, 4 epochs", *EMA_0, paper=(74.3, 76.5, IN_300_EPOCHS)),
    longer("EMA decay 0.9, 4 epochs", "--ema_decay", "0.9", paper=(75.6, 76.5, IN_300_EPOCHS)),
]

RESNET_14 = Arm(
    "ResNet-14",
    "curves",
    "cifar10_resnet14",
    epochs=300,
    options=("--torch_compile", "--deterministic", "false", "--logging_steps", "48", "--warmup_epochs", "10"),
    seeds=1,
    points=10,
    batch_size=1024,
)
LONG_ARMS = [
    RESNET_14,
    *(in_long_form(arm) for arm in ARMS if arm.group in ("curves", "ablations")),
]
