"""PyTorch twins of the published networks besides VGG, with the names of flaxcls's modules."""

import itertools

import torch
from reference_torch import Classifier, Trunk, flatten
from torch import nn
from torch.nn import functional


def gap(x):
    return x.mean((2, 3))


class Plain(nn.Module):
    """A trunk, what comes after it in words of dense layers, and the head."""

    def __init__(self, trunk, reduce, dense, num_classes):
        super().__init__()
        self.trunk, self.reduce, self.count = trunk, reduce, len(dense) - 1
        for i, (before, after) in enumerate(itertools.pairwise(dense), 1):
            self.add_module(f"dense{i}", nn.Linear(before, after))
        self.head = nn.Linear(dense[-1], num_classes)

    def forward(self, x):
        x = self.reduce(self.trunk(x))
        for i in range(1, self.count + 1):
            x = getattr(self, f"dense{i}")(x).relu()
        return self.head(x)


class Sequence(nn.Module):
    """Layers in a row, some with names: a list of modules and (name, module)."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = []
        for layer in layers:
            if isinstance(layer, tuple):
                self.add_module(*layer)
                layer = layer[1]
            self.layers.append([layer])

    def forward(self, x):
        for (layer,) in self.layers:
            x = layer(x)
        return x


def conv(name, before, after, kernel, padding=0, **options):
    return (name, nn.Conv2d(before, after, kernel, padding=padding, **options))


def norm(name, channels):
    return (name, nn.BatchNorm2d(channels))


def crb(number, before, after):
    return (
        conv(f"conv{number}", before, after, 3, 1),
        nn.ReLU(),
        norm(f"norm{number}", after),
    )


POOL = nn.MaxPool2d(2)


def baseline_layers(last_pool=True):
    widths = (3, 16, 16, 32, 32, 64, 64, 128, 128)
    for i in range(1, 9):
        yield from crb(i, widths[i - 1], widths[i])
        if i % 2 == 0 and (i < 8 or last_pool):
            yield POOL


def baseline_cnn(num_classes):
    return Plain(Sequence(*baseline_layers()), gap, [128], num_classes)


class LSTMCNN(nn.Module):
    def __init__(self, num_classes, last_pool=True):
        super().__init__()
        self.trunk = Sequence(*baseline_layers(last_pool))
        self.lstm = nn.LSTM(4, 4, num_layers=2, batch_first=True)
        self.head = nn.Linear(128, num_classes)

    def forward(self, x):
        x = self.trunk(x)
        n, c, h, w = x.shape
        # The patches of one channel after the other, each row by row.
        patches = [
            x[:, k, i : i + 2, j : j + 2].reshape(n, 1, 4)
            for k in range(c)
            for i in range(0, h, 2)
            for j in range(0, w, 2)
        ]
        outputs, _ = self.lstm(torch.cat(patches, 1))
        # The mean over a channel's patches and over their pixels.
        return self.head(outputs.reshape(n, c, -1).mean(2))


class Attend(nn.Module):
    def __init__(self, channels, last):
        super().__init__()
        self.local = nn.Conv2d(channels, channels, 1, bias=False)
        self.last = nn.Conv2d(last, channels, 1, bias=False)
        self.score = nn.Conv2d(channels, 1, 1)

    def forward(self, local, last):
        other = functional.interpolate(
            self.last(last), size=local.shape[2:], mode="bilinear", align_corners=False
        )
        scores = self.score((self.local(local) + other).relu())
        weights = scores.flatten(1).softmax(1).view_as(scores)
        return (weights * local).sum((2, 3)), weights[:, 0]


class AttentionCNN(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        layers = [layer for layer in baseline_layers(last_pool=False)]
        self.trunk = Sequence(*layers)
        self.attend1, self.attend2 = Attend(32, 128), Attend(64, 128)
        self.head = nn.Linear(224, num_classes)
        self.maps = {}

    def forward(self, x):
        maps, convs = [], 0
        for (layer,) in self.trunk.layers:
            x = layer(x)
            if isinstance(layer, nn.BatchNorm2d):
                convs += 1
                if convs in (4, 6, 8):
                    maps.append(x)
        early, middle, last = maps
        attended1, self.maps["attention1"] = self.attend1(early, last)
        attended2, self.maps["attention2"] = self.attend2(middle, last)
        return self.head(torch.cat([gap(POOL(last)), attended1, attended2], 1))


class LocalAttention(nn.Module):
    """Straight from the definition: every neighbour is gathered."""

    def __init__(self, channels, heads=None):
        super().__init__()
        self.heads = heads or channels
        for name in ("query", "key", "value"):
            self.add_module(name, nn.Conv2d(channels, channels, 1, bias=False))
        self.row_offsets = nn.Parameter(torch.zeros(channels // 2, 3))
        self.column_offsets = nn.Parameter(torch.zeros(channels // 2, 3))

    def forward(self, x):
        n, c, h, w = x.shape

        def neighbours(x):
            return functional.unfold(x, 3, padding=1).view(n, c, 3, 3, h, w)

        offsets = torch.cat(
            [
                self.row_offsets[:, :, None].expand(-1, 3, 3),
                self.column_offsets[:, None, :].expand(-1, 3, 3),
            ]
        )
        keys = neighbours(self.key(x)) + offsets[None, :, :, :, None, None]
        products = self.query(x)[:, :, None, None] * keys
        scores = products.view(n, self.heads, -1, 9, h, w).sum(2, keepdim=True)
        values = neighbours(self.value(x)).view(n, self.heads, -1, 9, h, w)
        return (scores.softmax(3) * values).sum(3).view(n, c, h, w)


def local_attention_cnn(num_classes, heads=None):
    *before, conv8, relu, norm8, pool = baseline_layers()
    attention = (("attention", LocalAttention(128, heads)), nn.ReLU(), norm("attention_norm", 128))
    return Plain(Sequence(*before, *attention, conv8, relu, norm8, pool), gap, [128], num_classes)


def expanding_cnn(num_classes, size, widths):
    layers = []
    for i, (before, after) in enumerate(zip((3, *widths), widths, strict=False), 1):
        layers += [conv(f"conv{i}", before, after, 5, 2), nn.ReLU(), norm(f"norm{i}", after), POOL]
    side = size // 2 ** len(widths)
    return Plain(Sequence(*layers), flatten, [widths[-1] * side**2, 256], num_classes)


class ConvNorm(nn.Module):
    def __init__(self, before, after, kernel, stride=1, torchvision=False):
        super().__init__()
        self.conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=not torchvision)
        self.norm = nn.BatchNorm2d(after, eps=1e-3 if torchvision else 1e-5)

    def forward(self, x):
        return self.norm(self.conv(x)).relu()


class Inception(nn.Module):
    def __init__(self, before, widths, torchvision):
        super().__init__()
        one, three_reduced, three, five_reduced, five, pooled = widths

        def add(name, before, after, kernel):
            self.add_module(name, ConvNorm(before, after, kernel, torchvision=torchvision))

        add("one", before, one, 1)
        add("three_reduced", before, three_reduced, 1)
        add("three", three_reduced, three, 3)
        add("five_reduced", before, five_reduced, 1)
        add("five", five_reduced, five, 3 if torchvision else 5)
        add("pooled", before, pooled, 1)

    def forward(self, x):
        branches = [
            self.one(x),
            self.three(self.three_reduced(x)),
            self.five(self.five_reduced(x)),
            self.pooled(functional.max_pool2d(x, 3, 1, 1)),
        ]
        return torch.cat(branches, 1)


INCEPTIONS = {
    "3a": (192, (64, 96, 128, 16, 32, 32)),
    "3b": (256, (128, 128, 192, 32, 96, 64)),
    "4a": (480, (192, 96, 208, 16, 48, 64)),
    "4b": (512, (160, 112, 224, 24, 64, 64)),
    "4c": (512, (128, 128, 256, 24, 64, 64)),
    "4d": (512, (112, 144, 288, 32, 64, 64)),
    "4e": (528, (256, 160, 320, 32, 128, 128)),
    "5a": (832, (256, 160, 320, 32, 128, 128)),
    "5b": (832, (384, 192, 384, 48, 128, 128)),
}


def googlenet(num_classes, variant="published"):
    torchvision = variant == "torchvision"

    def pool(window):
        if torchvision:
            return nn.MaxPool2d(window, 2, ceil_mode=True)
        return nn.MaxPool2d(3, 2, 1)

    layers = [("stem1", ConvNorm(3, 64, 7, 2, torchvision)), pool(3)]
    if torchvision:
        layers.append(("stem2", ConvNorm(64, 64, 1, 1, torchvision)))
    layers += [("stem3", ConvNorm(64, 192, 3, 1, torchvision)), pool(3)]
    for name, (before, widths) in INCEPTIONS.items():
        layers.append((f"inception{name}", Inception(before, widths, torchvision)))
        if name == "3b":
            layers.append(pool(3))
        if name == "4e":
            layers.append(pool(2))
    return Plain(Sequence(*layers), gap, [1024], num_classes)


class Block(nn.Module):
    def __init__(self, before, width, stride, bottleneck):
        super().__init__()
        after = 4 * width if bottleneck else width
        if bottleneck:
            plan = [(before, width, 1, 1), (width, width, 3, stride), (width, after, 1, 1)]
        else:
            plan = [(before, width, 3, stride), (width, width, 3, 1)]
        self.count = len(plan)
        for i, (a, b, kernel, step) in enumerate(plan, 1):
            self.add_module(f"conv{i}", nn.Conv2d(a, b, kernel, step, kernel // 2, bias=False))
            self.add_module(f"norm{i}", nn.BatchNorm2d(b))
        if stride != 1 or before != after:
            self.conv_shortcut = nn.Conv2d(before, after, 1, stride, bias=False)
            self.norm_shortcut = nn.BatchNorm2d(after)

    def forward(self, x):
        shortcut = x
        if hasattr(self, "conv_shortcut"):
            shortcut = self.norm_shortcut(self.conv_shortcut(x))
        for i in range(1, self.count + 1):
            x = getattr(self, f"norm{i}")(getattr(self, f"conv{i}")(x))
            x = x.relu() if i < self.count else x
        return (x + shortcut).relu()


def resnet_trunk(blocks, bottleneck):
    layers = [
        conv("conv1", 3, 64, 7, 3, stride=2, bias=False),
        norm("norm1", 64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    before = 64
    for stage, (width, count) in enumerate(zip((64, 128, 256, 512), blocks, strict=True), 1):
        for i in range(1, count + 1):
            stride = 2 if stage > 1 and i == 1 else 1
            layers.append((f"stage{stage}_block{i}", Block(before, width, stride, bottleneck)))
            before = 4 * width if bottleneck else width
    return Sequence(*layers)


RESNETS = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
}


def resnet(num_classes, name):
    features = 2048 if RESNETS[name][1] else 512
    return Plain(resnet_trunk(*RESNETS[name]), gap, [features], num_classes)


class Headless(nn.Module):
    """A network without its last layer."""

    def __init__(self, network):
        super().__init__()
        del network.head
        for name, module in network.named_children():
            self.add_module(name, module)
        network.head = nn.Identity()
        self.network = [network]

    def forward(self, x):
        return self.network[0](x)


class Hierarchical(nn.Module):
    def __init__(self, num_classes, num_parents, trunk, features):
        super().__init__()
        self.trunk = Headless(trunk)
        self.parent_head = nn.Linear(features, num_parents)
        self.own = nn.Linear(features, 512)
        self.from_parent = nn.Linear(num_parents, 128)
        self.head = nn.Linear(640, num_classes)

    def forward(self, x):
        x = self.trunk(x)
        parent = self.parent_head(x)
        return self.head(torch.cat([self.own(x), self.from_parent(parent)], 1)), parent


def ts_cnn(num_classes):
    trunk = Sequence(
        conv("conv1", 1, 96, 5),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        conv("conv2", 96, 192, 5),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        conv("conv3", 192, 192, 3),
        nn.ReLU(),
        conv("conv4", 192, 200, 1),
        nn.ReLU(),
    )
    return Plain(trunk, lambda x: x.flatten(1), [200], num_classes)


def like_vgg(num_classes, channels=1):
    layers = []
    for i, (before, after) in enumerate(((channels, 32), (32, 32), (32, 64), (64, 64)), 1):
        layers += [conv(f"conv{i}", before, after, 3), norm(f"norm{i}", after), nn.ReLU()]
        if i % 2 == 0:
            layers.append(POOL)
    return Plain(Sequence(*layers), flatten, [1024, 1024], num_classes)


def ai_inno_cnn(num_classes):
    layers, before = [], 1
    for group, widths in enumerate(((32, 64), (64, 128), (256,)), 1):
        for i, after in enumerate(widths, 1):
            layers += [conv(f"conv{group}_{i}", before, after, 3), nn.ReLU()]
            before = after
        layers += [norm(f"norm{group}", before), *([POOL] if group < 3 else [])]
    return Plain(Sequence(*layers), gap, [256, 200], num_classes)


def fashion_net1(num_classes):
    layers = []
    for i, (before, after) in enumerate(((1, 32), (32, 64)), 1):
        layers += [conv(f"conv{i}", before, after, 5), norm(f"norm{i}", after), nn.ReLU(), POOL]
    return Plain(Sequence(*layers), flatten, [1024, 120, 84], num_classes)


class FashionNet2(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.trunk = Sequence(
            conv("conv1", 1, 32, 5), nn.ReLU(), POOL, conv("conv2", 32, 64, 3), nn.ReLU()
        )
        self.dense1 = nn.Linear(6400, 2048)
        self.head = nn.Linear(2048, num_classes)
        self.cam_head = nn.Linear(64, num_classes)

    def forward(self, x):
        x = self.trunk(x)
        return self.cam_head(gap(x)) * self.head(self.dense1(flatten(x)))


class ResidualCAM(nn.Module):
    def __init__(self, num_classes, width, trunk=None, features=512, pool_size=7):
        super().__init__()
        self.trunk = trunk or Trunk((2, 2, 3, 3, 3))
        self.pool = nn.AdaptiveAvgPool2d(pool_size)
        self.classifier = Classifier(features * pool_size**2, width, num_classes)
        self.cam_head = nn.Linear(features, num_classes)

    def forward(self, x):
        x = self.pool(self.trunk(x))
        return self.classifier(flatten(x)) * self.cam_head(gap(x))
