"""fashion_net0 on Fashion-MNIST, the published recipe with the batch scaled from 8 to 256.

Published: 91.37 % test accuracy (batch 8, learning rate 1e-3, 35 epochs, 33 to 39 minutes on a GTX
1080 Ti); the epoch kept is the one with the best support-weighted F1 on validation.
Ours: 91.46 % (mean of 3 seeds, 22 minutes on 2 CPU cores, before there were native operators).

    python -m flaxcls.main --config=configs/fashion_net0.py:fashion_mnist --config.data.path=DIR
    python -m flaxcls.main --config=configs/fashion_net0.py               # digits, no download

Data: DIR holds the four .gz files of github.com/zalandoresearch/fashion-mnist (data/fashion).
The batch as published: --config.train.batch_size=8 --config.optimizer.learning_rate=1e-3
"""

from ml_collections import ConfigDict

from flaxcls import config


def get_config(dataset: str = "digits") -> ConfigDict:
    c = config.for_dataset(dataset, min_size=28)
    c.model.name = "fashion_net0"

    c.train.batch_size = 256
    c.train.epochs = 35
    c.train.best_by = "val/f1_weighted"
    c.optimizer.name = "sgd"
    c.optimizer.learning_rate = 0.032  # 1e-3 times 256 / 8
    c.optimizer.momentum = 0.9
    c.optimizer.weight_decay = 5e-4
    c.schedule.name = "step"
    c.schedule.step_epochs = 7
    c.schedule.gamma = 0.1

    if dataset == "fashion_mnist":
        c.normalize.name = "values"
        c.normalize.mean = (0.1307,)
        c.normalize.std = (0.3081,)
    return c
