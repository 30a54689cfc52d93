"""Networks with torchvision's names of layers and tensors, written after its documented layout."""

import torch
from torch import nn
from torch.nn import functional

VGG_CONVS = {"vgg13": (2, 2, 2, 2, 2), "vgg16": (2, 2, 3, 3, 3)}


def vgg_features(convs, batch_norm):
    layers, before = [], 3
    for width, count in zip((64, 128, 256, 512, 512), convs, strict=True):
        for _ in range(count):
            layers.append(nn.Conv2d(before, width, 3, padding=1))
            layers += [nn.BatchNorm2d(width), nn.ReLU()] if batch_norm else [nn.ReLU()]
            before = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


class VGG(nn.Module):
    def __init__(self, num_classes, convs, batch_norm, width):
        super().__init__()
        self.features = vgg_features(convs, batch_norm)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        dense = [nn.Linear(512 * 49, width), nn.ReLU(), nn.Dropout(0.5)]
        dense += [nn.Linear(width, width), nn.ReLU(), nn.Dropout(0.5)]
        self.classifier = nn.Sequential(*dense, nn.Linear(width, num_classes))

    def forward(self, x):
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


class ConvMlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Conv2d(512, width, 7)
        self.fc2 = nn.Conv2d(width, width, 1)

    def forward(self, x):
        return self.fc2(self.fc1(x).relu()).relu()


class TimmVGG(nn.Module):
    def __init__(self, num_classes, convs, batch_norm, width):
        super().__init__()
        self.features = vgg_features(convs, batch_norm)
        self.pre_logits = ConvMlp(width)
        self.head = nn.Module()
        self.head.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        x = functional.adaptive_avg_pool2d(self.features(x), 7)
        return self.head.fc(self.pre_logits(x).mean((2, 3)))


class Block(nn.Module):
    def __init__(self, before, width, stride, bottleneck):
        super().__init__()
        after = 4 * width if bottleneck else width
        if bottleneck:
            self.conv1 = nn.Conv2d(before, width, 1, bias=False)
            self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
            self.conv3 = nn.Conv2d(width, after, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(after)
        else:
            self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
            self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.downsample = None
        if stride != 1 or before != after:
            conv = nn.Conv2d(before, after, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(after))

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        if hasattr(self, "conv3"):
            y = self.bn3(self.conv3(y.relu()))
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


class ResNet(nn.Module):
    def __init__(self, num_classes, blocks, bottleneck):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        before = 64
        for stage, (width, count) in enumerate(zip((64, 128, 256, 512), blocks, strict=True), 1):
            layers = []
            for i in range(count):
                stride = 2 if i == 0 and stage > 1 else 1
                layers.append(Block(before, width, stride, bottleneck))
                before = 4 * width if bottleneck else width
            self.add_module(f"layer{stage}", nn.Sequential(*layers))
        self.fc = nn.Linear(before, num_classes)

    def forward(self, x):
        x = functional.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        for stage in (1, 2, 3, 4):
            x = getattr(self, f"layer{stage}")(x)
        return self.fc(x.mean((2, 3)))


class BasicConv2d(nn.Module):
    def __init__(self, before, after, **options):
        super().__init__()
        self.conv = nn.Conv2d(before, after, bias=False, **options)
        self.bn = nn.BatchNorm2d(after, eps=0.001)

    def forward(self, x):
        return self.bn(self.conv(x)).relu()


class Inception(nn.Module):
    def __init__(self, before, one, reduced3, three, reduced5, five, pooled):
        super().__init__()
        self.branch1 = BasicConv2d(before, one, kernel_size=1)
        self.branch2 = nn.Sequential(
            BasicConv2d(before, reduced3, kernel_size=1),
            BasicConv2d(reduced3, three, kernel_size=3, padding=1),
        )
        self.branch3 = nn.Sequential(
            BasicConv2d(before, reduced5, kernel_size=1),
            BasicConv2d(reduced5, five, kernel_size=3, padding=1),
        )
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(3, 1, 1, ceil_mode=True), BasicConv2d(before, pooled, kernel_size=1)
        )

    def forward(self, x):
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class InceptionAux(nn.Module):
    """A head that training uses and evaluation does not."""

    def __init__(self, before, num_classes):
        super().__init__()
        self.conv = BasicConv2d(before, 128, kernel_size=1)
        self.fc1, self.fc2 = nn.Linear(2048, 1024), nn.Linear(1024, num_classes)


class GoogLeNet(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv1 = BasicConv2d(3, 64, kernel_size=7, stride=2, padding=3)
        self.conv2 = BasicConv2d(64, 64, kernel_size=1)
        self.conv3 = BasicConv2d(64, 192, kernel_size=3, padding=1)
        self.inception3a = Inception(192, 64, 96, 128, 16, 32, 32)
        self.inception3b = Inception(256, 128, 128, 192, 32, 96, 64)
        self.inception4a = Inception(480, 192, 96, 208, 16, 48, 64)
        self.inception4b = Inception(512, 160, 112, 224, 24, 64, 64)
        self.inception4c = Inception(512, 128, 128, 256, 24, 64, 64)
        self.inception4d = Inception(512, 112, 144, 288, 32, 64, 64)
        self.inception4e = Inception(528, 256, 160, 320, 32, 128, 128)
        self.inception5a = Inception(832, 256, 160, 320, 32, 128, 128)
        self.inception5b = Inception(832, 384, 192, 384, 48, 128, 128)
        self.aux1, self.aux2 = InceptionAux(512, num_classes), InceptionAux(528, num_classes)
        self.fc = nn.Linear(1024, num_classes)

    def forward(self, x):
        x = functional.max_pool2d(self.conv1(x), 3, 2, ceil_mode=True)
        x = functional.max_pool2d(self.conv3(self.conv2(x)), 3, 2, ceil_mode=True)
        x = self.inception3b(self.inception3a(x))
        x = functional.max_pool2d(x, 3, 2, ceil_mode=True)
        for letter in "abcde":
            x = getattr(self, f"inception4{letter}")(x)
        x = functional.max_pool2d(x, 2, 2, ceil_mode=True)
        x = self.inception5b(self.inception5a(x))
        return self.fc(x.mean((2, 3)))
