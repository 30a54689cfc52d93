"""Product photos of nine classes with the plain CNN.

Published: 64.56 % test accuracy (seed 42); also the share of photos whose class is within three.
Not measured by us: the photos are not public. Any folder with a folder of images a class will do.

    python -m flaxcls.main --config=shopee/baseline_cnn --config.data.path=DIR
"""

from ml_collections import ConfigDict

from flaxcls import config


def get_config() -> ConfigDict:
    c = config.for_dataset("product_photos")
    c.seed = 42
    c.model.name = "baseline_cnn"

    c.train.batch_size = 32
    c.train.epochs = 30
    c.optimizer.name = "adam"
    c.optimizer.learning_rate = 4e-4
    c.eval.top_k = 3
    return c
