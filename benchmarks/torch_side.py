"""PyTorch's side of throughput.py: a step of one network in one of the forms that users give it."""

import importlib
import json
import sys
import time
from functools import partial
from typing import Any

import sides
import torch
import torch_networks
from torch.nn import functional

VARIANT = json.loads(sys.argv[1])["variant"]
if VARIANT["compile"]:
    importlib.import_module("torch._inductor.compile_fx")  # before memory's level is taken

LEARNING_RATE = 1e-3


class TorchSide:
    """A step of one network on one batch that stays on the device, as floats and normalised.

    The variant of the task is a dict: `compile`, the mode of torch.compile or None; `layout`,
    `contiguous` or `channels_last`; `tuned`, whether what costs a user a line or two is done: the
    fused optimizer and, on a GPU, cuDNN's search for the fastest convolutions.
    """

    def __init__(self, task: dict[str, Any]):
        self.task, variant = task, task["variant"]
        self.device = task["device"]
        self.memory = sides.Memory()
        torch.manual_seed(0)
        if self.device == "cpu":
            torch.set_num_threads(task["threads"])
        else:
            torch.backends.cudnn.benchmark = variant["tuned"]
            # JAX rounds the factors of float32 products so by default.
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        channels, classes = task["channels"], task["classes"]
        net = torch_networks.create(
            task["model"], classes, task["size"], channels, **task["options"]
        ).to(self.device)
        shape = (task["batch"], channels, task["size"], task["size"])
        images = torch.randn(shape, device=self.device)
        if variant["layout"] == "channels_last":
            net = net.to(memory_format=torch.channels_last)
            images = images.to(memory_format=torch.channels_last)
        self.net = net.train(task["mode"] == "train")
        self.images = images
        self.labels = torch.randint(0, classes, (task["batch"],), device=self.device)
        self.forward: Any = self._loss if task["mode"] == "train" else self.net
        if variant["compile"]:
            self.forward = torch.compile(self.forward, mode=variant["compile"])
        self.optimizer = torch.optim.SGD(
            self.net.parameters(),
            lr=LEARNING_RATE,
            momentum=0.9,
            fused=True if variant["tuned"] else None,
        )

    def about(self) -> dict[str, Any]:
        """Facts of the network and of the device."""
        gpu = self.device != "cpu"
        return {
            "device": torch.cuda.get_device_name() if gpu else "cpu",
            "parameters": sum(p.numel() for p in self.net.parameters()),
        }

    def compile(self) -> dict[str, float]:
        """Takes the first steps, and returns their seconds and the peak of memory, in bytes."""
        began = time.perf_counter()
        self.steps(1)
        seconds = time.perf_counter() - began
        self.steps(2)  # a graph is recorded in the second
        return {"seconds": seconds, "peak": self._peak()}

    def steps(self, count: int) -> float:
        """Returns the seconds that so many steps take."""
        return sides.seconds_of(partial(self._run, count))

    def _run(self, count: int) -> None:
        run = self._train if self.task["mode"] == "train" else self._infer
        for _ in range(count):
            run()
        if self.device != "cpu":
            torch.cuda.synchronize()

    def _train(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            loss = self.forward(self.images, self.labels)
        loss.backward()
        self.optimizer.step()

    def _infer(self) -> None:
        with torch.inference_mode(), self._autocast():
            self.forward(self.images)

    def _loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(self.net(images), labels)

    def _autocast(self) -> Any:
        enabled = self.task["dtype"] == "bfloat16"
        return torch.autocast(self.device, torch.bfloat16, enabled=enabled)

    def peak(self) -> int:
        """Bytes that steps alone take above the level after the imports, at their peak."""
        self.memory.forget_peak()
        if self.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        self.steps(2)
        return self._peak()

    def _peak(self) -> int:
        return self.memory.peak() if self.device == "cpu" else torch.cuda.max_memory_allocated()

    def ceiling(self, size: int) -> dict[str, float]:
        """The device's speed: multiply-adds of a square matmul, and bytes read and written."""
        x = torch.randn(size, size, dtype=getattr(torch, self.task["dtype"]), device=self.device)
        big = torch.ones(64 * 2**20, device=self.device)
        other = torch.empty_like(big)
        return {
            "matmul_gflops": 2 * size**3 / self._fastest(lambda: x @ x) / 1e9,
            "copy_gbs": 2 * big.nbytes / self._fastest(lambda: other.copy_(big)) / 1e9,
        }

    def _fastest(self, function: Any) -> float:
        def synchronised() -> None:
            function()
            if self.device != "cpu":
                torch.cuda.synchronize()

        return min(sides.seconds_of(synchronised) for _ in range(6))


if __name__ == "__main__":
    sides.serve(TorchSide)
