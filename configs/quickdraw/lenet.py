"""QuickDraw, 200 classes: experiment 1, LeNet.

Published: 47.88 % validation accuracy (cross-entropy, SGD 1e-2). Ours: not measured yet. Training
stops after 7 epochs without a better validation accuracy; the epoch kept is the one with the lowest
validation loss, as published.

    python -m flaxcls.main --config=quickdraw/lenet --config.data.path=DIR

Data: DIR holds the `NAME.npy` files of the simplified drawings as bitmaps, one a class
(github.com/googlecreativelab/quickdraw-dataset). The 200 classes are drawn with the seed, and 1/100
of each is used; which classes, and how they were split, was not published.
"""

from ml_collections import ConfigDict

from flaxcls import config


def get_config() -> ConfigDict:
    c = config.for_dataset("quickdraw")
    c.model.name = "lenet"

    c.train.batch_size = 64
    c.train.epochs = 100
    c.train.stop_by = "val/accuracy"
    c.train.patience = 7
    c.train.best_by = "val/loss"
    c.optimizer.name = "sgd"
    c.optimizer.momentum = 0.0
    c.optimizer.learning_rate = 1e-2
    return c
