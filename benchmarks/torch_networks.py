"""The networks of flaxcls as a PyTorch user would write them: the peers of throughput.py.

`create` has every registered model but the hierarchical ones and `residual_cam`, of which it has
`vgg16_residual_cam`. Each has as many parameters as flaxcls's.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

VGG_WIDTHS = (64, 128, 256, 512, 512)
VGG_CONVS = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg16c": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
RESNETS = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
}
# (1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection), None a pool.
INCEPTIONS = (
    (64, 96, 128, 16, 32, 32),
    (128, 128, 192, 32, 96, 64),
    None,
    (192, 96, 208, 16, 48, 64),
    (160, 112, 224, 24, 64, 64),
    (128, 128, 256, 24, 64, 64),
    (112, 144, 288, 32, 64, 64),
    (256, 160, 320, 32, 128, 128),
    None,
    (256, 160, 320, 32, 128, 128),
    (384, 192, 384, 48, 128, 128),
)
EXPANSIONS: dict[str, Callable[[int], int]] = {
    "add13": lambda c: c + 13,
    "double": lambda c: 2 * c if c < 20 else c + c // 2,
    "triple": lambda c: 3 * c if c < 50 else c + c // 6,
}


def relu() -> nn.Module:
    return nn.ReLU(inplace=True)


def conv_norm_relu(
    before: int, after: int, kernel: int, stride: int = 1, padding: int = 0, **options: Any
) -> list[nn.Module]:
    conv = nn.Conv2d(before, after, kernel, stride, padding, **options)
    return [conv, nn.BatchNorm2d(after), relu()]


def conv_relu_norm(before: int, after: int, kernel: int, padding: int) -> list[nn.Module]:
    return [nn.Conv2d(before, after, kernel, 1, padding), relu(), nn.BatchNorm2d(after)]


def lenet(classes: int, size: int, channels: int) -> nn.Module:
    side = ((size - 4) // 2 - 4) // 2
    return nn.Sequential(
        *(nn.Conv2d(channels, 6, 5), relu(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), relu(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(16 * side**2, 256), relu(), nn.Linear(256, classes)),
    )


def fashion_net0(classes: int, size: int, channels: int) -> nn.Module:
    side = ((size - 4) // 2 - 2) // 2
    return nn.Sequential(
        *(nn.Conv2d(channels, 32, 5), relu(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3), relu(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * side**2, 4096), relu(), nn.Linear(4096, classes)),
    )


def fashion_net1(classes: int, size: int, channels: int, dropout: float = 0.4) -> nn.Module:
    side = ((size - 4) // 2 - 4) // 2
    return nn.Sequential(
        *(*conv_norm_relu(channels, 32, 5), nn.MaxPool2d(2)),
        *(*conv_norm_relu(32, 64, 5), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * side**2, 120), nn.Dropout(dropout), relu()),
        *(nn.Linear(120, 84), nn.Dropout(dropout / 2), relu(), nn.Linear(84, classes)),
    )


class FashionNet2(nn.Module):
    def __init__(self, classes: int, size: int, channels: int, dropout: float = 0.3):
        super().__init__()
        side = (size - 4) // 2 - 2
        self.trunk = nn.Sequential(
            nn.Conv2d(channels, 32, 5), relu(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3), relu()
        )
        self.dense = nn.Linear(64 * side**2, 2048)
        self.head = nn.Linear(2048, classes)
        self.cam_head = nn.Linear(64, classes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.trunk(x)
        factor = self.cam_head(self.dropout(x.mean((2, 3))))
        return factor * self.head(self.dropout(self.dense(x.flatten(1))))


def vgg_trunk(name: str, channels: int, batch_norm: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    before = channels
    for stage, (width, count) in enumerate(zip(VGG_WIDTHS, VGG_CONVS[name], strict=True), 1):
        for i in range(1, count + 1):
            kernel = 1 if name == "vgg16c" and stage >= 3 and i == count else 3
            layers.append(nn.Conv2d(before, width, kernel, padding=kernel // 2))
            layers += [nn.BatchNorm2d(width), relu()] if batch_norm else [relu()]
            before = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def vgg_classifier(features: int, width: int, classes: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(features, width), relu(), nn.Dropout(dropout)),
        *(nn.Linear(width, width), relu(), nn.Dropout(dropout), nn.Linear(width, classes)),
    )


def vgg(
    name: str,
    classes: int,
    size: int,
    channels: int,
    batch_norm: bool = True,
    head_width: int = 4096,
    dropout: float = 0.0,
    pool_size: int | None = None,
) -> nn.Module:
    pool = nn.Identity() if pool_size is None else nn.AdaptiveAvgPool2d(pool_size)
    features = 512 * (pool_size or size // 32) ** 2
    classifier = vgg_classifier(features, head_width, classes, dropout)
    return nn.Sequential(vgg_trunk(name, channels, batch_norm), pool, classifier)


class VGG16ResidualCAM(nn.Module):
    def __init__(self, classes: int, size: int, channels: int, dropout: float = 0.5):
        super().__init__()
        self.trunk = nn.Sequential(vgg_trunk("vgg16", channels), nn.AdaptiveAvgPool2d(7))
        self.classifier = vgg_classifier(512 * 49, 4096, classes, dropout)
        self.cam_head = nn.Sequential(nn.Dropout(0.3), nn.Linear(512, classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.trunk(x)
        return self.classifier(x) * self.cam_head(x.mean((2, 3)))


class Mean(nn.Module):
    """The mean over space."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))


def baseline_groups(channels: int) -> list[nn.Sequential]:
    """The convolutions between two pools, four times."""
    groups = []
    for before, width in itertools.pairwise((channels, 16, 32, 64, 128)):
        layers = conv_relu_norm(before, width, 3, 1) + conv_relu_norm(width, width, 3, 1)
        groups.append(nn.Sequential(*layers))
    return groups


def baseline_cnn(classes: int, size: int, channels: int) -> nn.Module:
    pooled = [layer for group in baseline_groups(channels) for layer in (group, nn.MaxPool2d(2))]
    return nn.Sequential(*pooled, Mean(), nn.Linear(128, classes))


class LSTMCNN(nn.Module):
    def __init__(self, classes: int, size: int, channels: int):
        super().__init__()
        groups = baseline_groups(channels)
        pooled = [layer for group in groups for layer in (group, nn.MaxPool2d(2))]
        self.trunk = nn.Sequential(*pooled)
        self.lstm = nn.LSTM(4, 4, num_layers=2, batch_first=True)
        self.head = nn.Linear(128, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.trunk(x)
        n, c = x.shape[:2]
        patches = x.unfold(2, 2, 2).unfold(3, 2, 2).reshape(n, -1, 4)
        outputs, _ = self.lstm(patches)
        return self.head(outputs.reshape(n, c, -1).mean(2))


class Attend(nn.Module):
    """Attention at one map against the last (Yan et al. 2019)."""

    def __init__(self, channels: int):
        super().__init__()
        self.local = nn.Conv2d(channels, channels, 1, bias=False)
        self.last = nn.Conv2d(128, channels, 1, bias=False)
        self.score = nn.Conv2d(channels, 1, 1)

    def forward(self, local: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        other = functional.interpolate(self.last(last), size=local.shape[2:], mode="bilinear")
        scores = self.score((self.local(local) + other).relu_())
        weights = scores.flatten(1).softmax(1)
        return torch.einsum("np,ncp->nc", weights, local.flatten(2))


class AttentionCNN(nn.Module):
    def __init__(self, classes: int, size: int, channels: int):
        super().__init__()
        first, second, third, fourth = baseline_groups(channels)
        self.early = nn.Sequential(first, nn.MaxPool2d(2), second)
        self.middle = nn.Sequential(nn.MaxPool2d(2), third)
        self.last = nn.Sequential(nn.MaxPool2d(2), fourth)
        self.attend_early, self.attend_middle = Attend(32), Attend(64)
        self.head = nn.Linear(224, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        early = self.early(x)
        middle = self.middle(early)
        last = self.last(middle)
        mean = functional.max_pool2d(last, 2).mean((2, 3))
        attended = [self.attend_early(early, last), self.attend_middle(middle, last)]
        return self.head(torch.cat([mean, *attended], 1))


class LocalAttention(nn.Module):
    """Self-attention among 3x3 neighbours (Ramachandran et al. 2019), a head for each channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.query = nn.Conv2d(channels, channels, 1, bias=False)
        self.key = nn.Conv2d(channels, channels, 1, bias=False)
        self.value = nn.Conv2d(channels, channels, 1, bias=False)
        self.row_offsets = nn.Parameter(torch.randn(channels // 2, 3))
        self.column_offsets = nn.Parameter(torch.randn(channels // 2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        rows = self.row_offsets[:, :, None].expand(-1, 3, 3)
        columns = self.column_offsets[:, None, :].expand(-1, 3, 3)
        offsets = torch.cat([rows, columns]).reshape(1, c, 9, 1)
        keys = functional.unfold(self.key(x), 3, padding=1).view(n, c, 9, h * w) + offsets
        values = functional.unfold(self.value(x), 3, padding=1).view(n, c, 9, h * w)
        weights = (self.query(x).view(n, c, 1, h * w) * keys).softmax(2)
        return (weights * values).sum(2).view(n, c, h, w)


def local_attention_cnn(classes: int, size: int, channels: int) -> nn.Module:
    *groups, _ = baseline_groups(channels)
    pooled = [layer for group in groups for layer in (group, nn.MaxPool2d(2))]
    return nn.Sequential(
        *pooled,
        *conv_relu_norm(64, 128, 3, 1),
        *(LocalAttention(128), relu(), nn.BatchNorm2d(128)),
        *conv_relu_norm(128, 128, 3, 1),
        *(nn.MaxPool2d(2), Mean(), nn.Linear(128, classes)),
    )


def expanding_cnn(
    classes: int, size: int, channels: int, depth: int = 4, expansion: str = "triple"
) -> nn.Module:
    layers: list[nn.Module] = []
    width = 3
    for i in range(depth):
        before, width = (channels if i == 0 else width), EXPANSIONS[expansion](width)
        layers += [*conv_relu_norm(before, width, 5, 2), nn.MaxPool2d(2)]
    features = width * (size // 2**depth) ** 2
    dense = (nn.Flatten(), nn.Linear(features, 256), relu(), nn.Linear(256, classes))
    return nn.Sequential(*layers, *dense)


class Inception(nn.Module):
    def __init__(self, before: int, widths: tuple[int, ...], variant: str):
        super().__init__()
        one, three_reduced, three, five_reduced, five, pooled = widths
        bias, kernel = variant == "published", 5 if variant == "published" else 3
        self.one = nn.Sequential(*conv_norm_relu(before, one, 1, bias=bias))
        self.three = nn.Sequential(
            *conv_norm_relu(before, three_reduced, 1, bias=bias),
            *conv_norm_relu(three_reduced, three, 3, 1, 1, bias=bias),
        )
        self.five = nn.Sequential(
            *conv_norm_relu(before, five_reduced, 1, bias=bias),
            *conv_norm_relu(five_reduced, five, kernel, 1, kernel // 2, bias=bias),
        )
        self.pooled = nn.Sequential(
            nn.MaxPool2d(3, 1, 1), *conv_norm_relu(before, pooled, 1, bias=bias)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pooled(x)], 1)


def googlenet(
    classes: int,
    size: int,
    channels: int,
    variant: str = "published",
    dropout: float | None = None,
) -> nn.Module:
    published = variant == "published"

    def pool(window: int) -> nn.Module:
        return nn.MaxPool2d(3, 2, 1) if published else nn.MaxPool2d(window, 2, ceil_mode=True)

    layers = [*conv_norm_relu(channels, 64, 7, 2, 3, bias=published), pool(3)]
    if not published:
        layers += conv_norm_relu(64, 64, 1, bias=False)
    layers += [*conv_norm_relu(64, 192, 3, 1, 1, bias=published), pool(3)]
    before, pools = 192, iter((3, 2))
    for widths in INCEPTIONS:
        if widths is None:
            layers.append(pool(next(pools)))
            continue
        layers.append(Inception(before, widths, variant))
        before = widths[0] + widths[2] + widths[4] + widths[5]
    if dropout is None:
        dropout = 0.4 if published else 0.2
    net = nn.Sequential(*layers, Mean(), nn.Dropout(dropout), nn.Linear(1024, classes))
    if not published:
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 1e-3
    return net


class Block(nn.Module):
    """A residual block; the stride is in the (first) 3x3 convolution."""

    def __init__(self, before: int, width: int, stride: int, bottleneck: bool):
        super().__init__()
        after = 4 * width if bottleneck else width
        plan = [(before, width, 3, stride), (width, width, 3, 1)]
        if bottleneck:
            plan = [(before, width, 1, 1), (width, width, 3, stride), (width, after, 1, 1)]
        layers: list[nn.Module] = []
        for a, b, kernel, step in plan:
            layers += conv_norm_relu(a, b, kernel, step, kernel // 2, bias=False)
        self.layers = nn.Sequential(*layers[:-1])
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            conv = nn.Conv2d(before, after, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(after))
        self.relu = relu()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.layers(x) + self.shortcut(x))


def resnet(name: str, classes: int, size: int, channels: int) -> nn.Module:
    counts, bottleneck = RESNETS[name]
    layers = [*conv_norm_relu(channels, 64, 7, 2, 3, bias=False), nn.MaxPool2d(3, 2, 1)]
    before = 64
    for stage, (width, count) in enumerate(zip((64, 128, 256, 512), counts, strict=True)):
        for i in range(count):
            layers.append(Block(before, width, 2 if stage and i == 0 else 1, bottleneck))
            before = 4 * width if bottleneck else width
    return nn.Sequential(*layers, Mean(), nn.Linear(before, classes))


def ts_cnn(classes: int, size: int, channels: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(channels, 96, 5), relu(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(96, 192, 5), relu(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 192, 3), relu(), nn.Conv2d(192, 200, 1), relu()),
        *(Mean(), nn.Linear(200, classes)),
    )


def like_vgg(classes: int, size: int, channels: int) -> nn.Module:
    side = ((size - 4) // 2 - 4) // 2
    return nn.Sequential(
        *(*conv_norm_relu(channels, 32, 3), *conv_norm_relu(32, 32, 3), nn.MaxPool2d(2)),
        *(*conv_norm_relu(32, 64, 3), *conv_norm_relu(64, 64, 3), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * side**2, 1024), relu(), nn.Linear(1024, classes)),
    )


def ai_inno_cnn(classes: int, size: int, channels: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(channels, 32, 3), relu(), *conv_relu_norm(32, 64, 3, 0), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 64, 3), relu(), *conv_relu_norm(64, 128, 3, 0), nn.MaxPool2d(2)),
        *(*conv_relu_norm(128, 256, 3, 0), Mean(), nn.Linear(256, 200), relu()),
        nn.Linear(200, classes),
    )


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "ai_inno_cnn": ai_inno_cnn,
    "attention_cnn": AttentionCNN,
    "baseline_cnn": baseline_cnn,
    "expanding_cnn": expanding_cnn,
    "fashion_net0": fashion_net0,
    "fashion_net1": fashion_net1,
    "fashion_net2": FashionNet2,
    "googlenet": googlenet,
    "lenet": lenet,
    "like_vgg": like_vgg,
    "local_attention_cnn": local_attention_cnn,
    "lstm_cnn": LSTMCNN,
    "ts_cnn": ts_cnn,
    "vgg16_residual_cam": VGG16ResidualCAM,
}


def create(name: str, classes: int, size: int, channels: int, **options: Any) -> nn.Module:
    """Makes the twin of a model of flaxcls for images (N, channels, size, size).

    Raises:
      LookupError: there is none.
    """
    if name in VGG_CONVS:
        return vgg(name, classes, size, channels, **options)
    if name in RESNETS:
        return resnet(name, classes, size, channels, **options)
    if name not in NETWORKS:
        raise LookupError(f"no PyTorch twin of {name}")
    return NETWORKS[name](classes, size, channels, **options)
