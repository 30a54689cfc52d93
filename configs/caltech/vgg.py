"""Caltech-101's airplanes, Motorbikes and schooner with VGG at 256 pixels.

The text after the colon is the model: vgg11, vgg13, vgg16c, vgg16 or vgg19.

Published validation accuracy at the last epoch: 99.398, 99.549, 99.098, 98.647, 98.496 %. Ours:
not measured yet; `python benchmarks/caltech_grid.py --path=DIR --only=vgg` does. Data as for
caltech/expanding_cnn. 160 to 171 million parameters; made for a GPU. At 64 pixels:
--config=vgg13:caltech101_3.

    python -m flaxcls.main --config=caltech/vgg:vgg13 --config.data.path=DIR
"""

from ml_collections import ConfigDict

from flaxcls import config

MODELS = ("vgg11", "vgg13", "vgg16c", "vgg16", "vgg19")


def get_config(model: str = "vgg13") -> ConfigDict:
    c = config.for_dataset("caltech101_3")
    c.data.image_size = 256
    c.model.name = config.choose(model, {name: name for name in MODELS})
    c.model.init = "pytorch"

    c.train.batch_size = 16
    c.train.epochs = 30
    c.loss.class_weights = "complement"
    c.optimizer.name = "sgd"
    c.optimizer.momentum = 0.0
    c.optimizer.learning_rate = 1e-3
    return c
