"""Caltech-101's airplanes, Motorbikes and schooner with GoogLeNet at 256 pixels.

No accuracy is known: the "99.000" once published is the index of the last epoch, and the branches
of its inception blocks were never trained. Here they are. Ours: not measured yet;
`python benchmarks/caltech_grid.py --path=DIR --only=googlenet` does. Data as for
caltech/expanding_cnn; made for a GPU.

    python -m flaxcls.main --config=caltech/googlenet --config.data.path=DIR
"""

from ml_collections import ConfigDict

from flaxcls import config


def get_config() -> ConfigDict:
    c = config.for_dataset("caltech101_3")
    c.data.image_size = 256
    c.model.name = "googlenet"

    c.train.batch_size = 64
    c.train.epochs = 100
    c.loss.class_weights = "complement"
    c.optimizer.name = "sgd"
    c.optimizer.momentum = 0.0
    c.optimizer.learning_rate = 1e-3
    return c
