"""PyTorch twins of the models, with the names of flaxcls's modules, and weights to and fro.

Maps are flattened rows first, channels last, as flaxcls does, so that no weight is permuted.
"""

import numpy as np
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from torch import nn

CHANNELS = (64, 128, 256, 512, 512)


def flatten(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1).flatten(1)


class Trunk(nn.Module):
    def __init__(self, convs, pointwise_last=False, batch_norm=True, channels=3):
        super().__init__()
        self.order = []
        for stage, (features, count) in enumerate(zip(CHANNELS, convs, strict=True), 1):
            for i in range(1, count + 1):
                kernel = 1 if pointwise_last and stage >= 3 and i == count else 3
                conv = nn.Conv2d(channels, features, kernel, padding=kernel // 2)
                self.add(f"conv{stage}_{i}", conv)
                if batch_norm:
                    self.add(f"norm{stage}_{i}", nn.BatchNorm2d(features))
                self.order.append(nn.ReLU())
                channels = features
            self.order.append(nn.MaxPool2d(2))

    def add(self, name, module):
        self.add_module(name, module)
        self.order.append(module)

    def forward(self, x):
        for layer in self.order:
            x = layer(x)
        return x


class Classifier(nn.Module):
    def __init__(self, features, width, num_classes):
        super().__init__()
        self.dense1 = nn.Linear(features, width)
        self.dense2 = nn.Linear(width, width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.head(self.dense2(self.dense1(x).relu()).relu())


class VGG(nn.Module):
    def __init__(self, num_classes, convs, head_width, pool_size=None, **trunk):
        super().__init__()
        self.trunk = Trunk(convs, **trunk)
        self.pool = nn.Identity() if pool_size is None else nn.AdaptiveAvgPool2d(pool_size)
        self.classifier = Classifier(512 * (pool_size or 1) ** 2, head_width, num_classes)

    def forward(self, x):
        return self.classifier(flatten(self.pool(self.trunk(x))))


class TwoConvTrunk(nn.Module):
    """Of lenet and fashion_net0."""

    def __init__(self, channels, first, second, second_kernel):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, first, 5)
        self.conv2 = nn.Conv2d(first, second, second_kernel)

    def forward(self, x):
        x = nn.functional.max_pool2d(self.conv1(x).relu(), 2)
        return nn.functional.max_pool2d(self.conv2(x).relu(), 2)


class TwoConvs(nn.Module):
    """lenet and fashion_net0, on 28x28 images of one channel."""

    def __init__(self, num_classes, first, second, second_kernel, width):
        super().__init__()
        self.trunk = TwoConvTrunk(1, first, second, second_kernel)
        side = (12 - second_kernel + 1) // 2
        self.dense1 = nn.Linear(second * side * side, width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.head(self.dense1(flatten(self.trunk(x))).relu())


TORCH_NAMES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
# flax (H, W, in, out) -> torch (out, in, H, W), and flax (in, out) -> torch (out, in); and back.
TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}
FROM_TORCH = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}


def load(module, variables) -> None:
    """Give `module` the parameters and running statistics of flax variables."""
    state = {}
    for path, leaf in flatten_dict({**variables["params"]}).items():
        state[_torch_name(path)] = _to_torch(leaf)
    for path, leaf in flatten_dict({**variables.get("batch_stats", {})}).items():
        state[_torch_name(path)] = _to_torch(leaf)
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)


def gradients(module, params):
    """The gradients of `module`, as a tree like the flax `params`."""
    grads = {name: p.grad.numpy() for name, p in module.named_parameters()}
    flat = {}
    for path in flatten_dict(params):
        grad = grads.pop(_torch_name(path))
        flat[path] = grad.transpose(FROM_TORCH[grad.ndim])
    assert not grads
    return unflatten_dict(flat)


# torch.nn.LSTM counts layers from 0 and calls the input's and the hidden state's parameters so.
for _i in (1, 2):
    for _ours, _theirs in (("input", "ih"), ("hidden", "hh")):
        TORCH_NAMES[f"{_ours}{_i}_kernel"] = f"weight_{_theirs}_l{_i - 1}"
        TORCH_NAMES[f"{_ours}{_i}_bias"] = f"bias_{_theirs}_l{_i - 1}"


def _torch_name(path):
    return ".".join((*path[:-1], TORCH_NAMES.get(path[-1], path[-1])))


def _to_torch(leaf):
    array = np.asarray(leaf)
    return torch.from_numpy(array.transpose(TO_TORCH[array.ndim]).copy())
