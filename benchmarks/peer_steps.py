"""Pre-training steps of peers.py: a ViT-S with MoCo v3, one core, both views in memory.

Ours and the plain step are those of step.py. The others have timm's ViT-S with the head count of MoCo v3 and fixed
position embeddings and patch projection, AdamW as torch constructs it, and autocast for bf16.
"""

import copy
from collections.abc import Callable

import torch
from limits import REHEARSAL
from plain_step import PlainStep
from step import EMA_DECAY, LEARNING_RATE, RECIPES, SIZE, OurStep, fresh_model, random_views
from torch import nn
from torch.nn import functional as F


TEMPERATURE, HIDDEN, DIMENSION = 0.2, 4096, 256
PARAMETERS = 84_266_752  # of the published model, both branches; a batch norm may have more
RECIPE = RECIPES["vit_small"]


def timm_vit() -> nn.Module:
    """timm's ViT-S as the backbone of MoCo v3: 12 heads, frozen patch projection, fixed position embeddings."""
    import timm

    smaller = {"img_size": SIZE, "dynamic_img_size": True} if REHEARSAL else {}
    vit = timm.create_model("vit_small_patch16_224", num_classes=0, num_heads=12, **smaller)
    vit.patch_embed.requires_grad_(False)
    vit.pos_embed.requires_grad_(False)
    return vit


class Step:
    """
    A step of a model that maps two views to a loss; `step()` returns the loss before the weight update.

    Args:
        loss_of: Of both views.
        update: The EMA of the momentum encoder, before the forward pass.
        modules: With the parameters.
    """

    def __init__(self, loss_of: Callable, update: Callable, modules: nn.Module, precision: str, batch: int):
        self.loss_of, self.update, self.modules = loss_of, update, modules.train()
        trained = [parameter for parameter in modules.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, LEARNING_RATE["adamw"], weight_decay=0.1)
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
        self.views = random_views(batch, "cpu")

    def __call__(self) -> float:
        self.update()
        with self.autocast:
            loss = self.loss_of(*self.views)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def lightly_step(precision: str, batch: int) -> Step:
    """MoCo v3 of lightly's heads and EMA, as its examples of MoCo are built. It has no loss of MoCo v3."""
    from lightly.models.modules.heads import MoCoProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    encoder = nn.Sequential(timm_vit(), MoCoProjectionHead(384, HIDDEN, DIMENSION, num_layers=3, batch_norm=True))
    predictor = MoCoProjectionHead(DIMENSION, HIDDEN, DIMENSION, num_layers=2, batch_norm=True)
    momentum = copy.deepcopy(encoder)
    deactivate_requires_grad(momentum)

    def contrast(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        logits = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T / TEMPERATURE
        return 2 * TEMPERATURE * F.cross_entropy(logits, torch.arange(len(query)))

    def loss(view_1: torch.Tensor, view_2: torch.Tensor) -> torch.Tensor:
        query_1, query_2 = predictor(encoder(view_1)), predictor(encoder(view_2))
        with torch.no_grad():
            key_1, key_2 = momentum(view_1), momentum(view_2)
        return contrast(query_1, key_2) + contrast(query_2, key_1)

    modules = nn.ModuleList([encoder, predictor, momentum])
    return Step(loss, lambda: update_momentum(encoder, momentum, m=EMA_DECAY), modules, precision, batch)


def stable_pretraining_step(precision: str, batch: int) -> Step:
    """Its class of MoCo v3, without the trainer. Its loss is the paper's divided by 4 × temperature."""
    from stable_pretraining.methods import MoCov3

    model = MoCov3(timm_vit(), temperature=TEMPERATURE, ema_decay_start=EMA_DECAY)

    def update() -> None:
        model.backbone.update_teacher()
        model.projector.update_teacher()

    def loss(view_1: torch.Tensor, view_2: torch.Tensor) -> torch.Tensor:
        return 4 * TEMPERATURE * model(view_1, view_2).loss

    return Step(loss, update, model, precision, batch)


def our_steps(name: str, precision: str, batch: int) -> Callable[[], float]:
    """Ours, set up as in a run, or the plain step."""
    model, views = fresh_model(RECIPE), random_views(batch, "cpu")
    if name == "ours":
        step = OurStep(model, RECIPE, precision, "cpu")
    else:
        step = PlainStep(model, "adamw", LEARNING_RATE["adamw"], precision, "cpu")
    return lambda: step(views, EMA_DECAY).item()


def make_step(name: str, precision: str, batch: int) -> Callable[[], float]:
    """
    The step of a library in a precision ("no" or "bf16").

    Raises:
        ValueError: The model has another size than the published one.
    """
    others = {"lightly": lightly_step, "stable-pretraining": stable_pretraining_step}
    if name not in others:
        return our_steps(name, precision, batch)
    step = others[name](precision, batch)
    number = sum(parameter.numel() for parameter in step.modules.parameters())
    if not REHEARSAL and abs(number - PARAMETERS) > 0.001 * PARAMETERS:
        raise ValueError(f"{name}: {number:,} parameters instead of {PARAMETERS:,}")
    return step
