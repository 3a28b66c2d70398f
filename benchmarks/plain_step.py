"""The plain step: MoCo v3 written straight from the paper, without optimization. The reference of step.py.

Two passes per encoder, attention as plain matrix products, loops over parameters (EMA, AdamW, LARS), contiguous
images. A single process, with torch's own batch norm.
"""

import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from mocov3_hf import MoCoV3ForPreTraining


class Attention(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    def __init__(self, width: int, num_heads: int, mlp_width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, num_heads)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_width), nn.GELU(), nn.Linear(mlp_width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Maps images `(B, 3, H, W)` to CLS tokens `(B, D)`."""

    def __init__(self, width: int, depth: int, num_heads: int, mlp_width: int, patch: int, num_patches: int):
        super().__init__()
        self.projection = nn.Conv2d(3, width, patch, patch).requires_grad_(False)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + num_patches, width), requires_grad=False)
        self.blocks = nn.Sequential(*(Block(width, num_heads, mlp_width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.projection(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1) + self.positions
        return self.norm(self.blocks(x))[:, 0]


def mlp(ours: nn.Module) -> nn.Sequential:
    """A head with the sizes and the weights of ours."""
    layers = []
    for layer in ours.layers:
        layers.append(nn.Linear(layer.dense.in_features, layer.dense.out_features, bias=False))
        layers[-1].load_state_dict(layer.dense.state_dict())
        if isinstance(layer.norm, nn.BatchNorm1d):
            layers.append(nn.BatchNorm1d(layer.norm.num_features, affine=layer.norm.affine))
            layers[-1].load_state_dict(layer.norm.state_dict())
        if isinstance(layer.activation_fn, nn.ReLU):
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def plain_vit(ours: nn.Module) -> ViT:
    config = ours.config
    plain = ViT(
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.intermediate_size,
        config.patch_size,
        (config.image_size // config.patch_size) ** 2,
    )
    plain.projection.load_state_dict(ours.embeddings.patch_embeddings.projection.state_dict())
    plain.cls.data.copy_(ours.embeddings.cls_token.data)
    plain.positions.data.copy_(ours.embeddings.position_embeddings.data)
    plain.norm.load_state_dict(ours.layernorm.state_dict())
    for block, layer in zip(plain.blocks, ours.encoder.layer, strict=True):
        attention = layer.attention
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        block.attention.qkv.weight.data.copy_(torch.cat([p.weight.data for p in projections]))
        block.attention.qkv.bias.data.copy_(torch.cat([p.bias.data for p in projections]))
        for target, source in (
            (block.attention.out, attention.o_proj),
            (block.norm1, layer.norm1),
            (block.norm2, layer.norm2),
            (block.mlp[0], layer.mlp.fc1),
            (block.mlp[2], layer.mlp.fc2),
        ):
            target.load_state_dict(source.state_dict())
    return plain


def plain_resnet50(ours: nn.Module) -> nn.Module:
    plain = torchvision.models.resnet50()
    plain.fc = nn.Identity()

    def copy_layer(convolution: nn.Module, norm: nn.Module, source: nn.Module) -> None:
        convolution.load_state_dict(source.convolution.state_dict())
        norm.load_state_dict(source.normalization.state_dict())

    copy_layer(plain.conv1, plain.bn1, ours.embedder.embedder)
    stages = (plain.layer1, plain.layer2, plain.layer3, plain.layer4)
    for stage, source_stage in zip(stages, ours.encoder.stages, strict=True):
        for block, source in zip(stage, source_stage.layers, strict=True):
            for index, layer in enumerate(source.layer, start=1):
                copy_layer(getattr(block, f"conv{index}"), getattr(block, f"bn{index}"), layer)
            if block.downsample is not None:
                copy_layer(*block.downsample, source.shortcut)
    return plain


def plain_encoder(backbone: nn.Module, projector: nn.Module) -> nn.Sequential:
    plain = plain_resnet50(backbone) if backbone.config.model_type == "resnet" else plain_vit(backbone)
    return nn.Sequential(plain, mlp(projector))


class PlainMoCo(nn.Module):
    """Algorithm 1 of the paper, with a copy of the weights of `ours`."""

    def __init__(self, ours: MoCoV3ForPreTraining):
        super().__init__()
        self.base = plain_encoder(ours.mocov3.backbone, ours.projector)
        self.predictor = mlp(ours.predictor)
        momentum = ours.momentum_encoder
        self.momentum = plain_encoder(momentum.encoder.backbone, momentum.projector).requires_grad_(False)
        self.temperature = ours.config.temperature

    @torch.no_grad()
    def update_momentum(self, m: float) -> None:
        for average, parameter in zip(self.momentum.parameters(), self.base.parameters(), strict=True):
            average.data = average.data * m + parameter.data * (1 - m)

    def contrast(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
        logits = q @ k.T / self.temperature
        return 2 * self.temperature * F.cross_entropy(logits, torch.arange(len(q), device=q.device))

    def forward(self, view_1: torch.Tensor, view_2: torch.Tensor, m: float) -> torch.Tensor:
        q1, q2 = self.predictor(self.base(view_1)), self.predictor(self.base(view_2))
        with torch.no_grad():
            self.update_momentum(m)
            k1, k2 = self.momentum(view_1), self.momentum(view_2)
        return self.contrast(q1, k2) + self.contrast(q2, k1)


class PlainLARS(torch.optim.Optimizer):
    def __init__(self, parameters, lr: float, weight_decay: float, momentum: float = 0.9, trust: float = 0.001):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                update = parameter.grad
                if parameter.ndim > 1:
                    update = update + group["weight_decay"] * parameter
                    norms = parameter.norm(), update.norm()
                    if norms[0] > 0 and norms[1] > 0:
                        update = update * (group["trust"] * norms[0] / norms[1])
                state = self.state[parameter]
                if "buffer" not in state:
                    state["buffer"] = torch.zeros_like(parameter)
                state["buffer"].mul_(group["momentum"]).add_(update)
                parameter.add_(state["buffer"], alpha=-group["lr"])


class PlainStep:
    """`step(views)` returns the loss before the weight update."""

    def __init__(self, ours: MoCoV3ForPreTraining, optimizer: str, lr: float, mixed_precision: str, device: str):
        self.model = PlainMoCo(ours).to(device).train()
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=mixed_precision == "bf16")
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if optimizer == "lars":
            self.optimizer = PlainLARS(trained, lr, 1e-6)
        else:
            self.optimizer = torch.optim.AdamW(trained, lr, weight_decay=0.1, foreach=False, fused=False)

    def __call__(self, views: tuple[torch.Tensor, torch.Tensor], ema_decay: float) -> torch.Tensor:
        with self.autocast:
            loss = self.model(*views, ema_decay)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()
