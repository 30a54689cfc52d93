"""Fashion-MNIST to 93 % in a few minutes of two CPU cores: like_vgg on all 60,000 images.

A recipe of our own, for where no published number is to be met: flips, crops from a border of two
pixels, smoothed labels and AdamW, whose learning rate rises and falls once over 12 epochs. There is
no validation split: the last epoch is kept, which has the lowest training loss.

Ours: 93.67 % test accuracy (mean of 2 seeds), 232 seconds after the command on two CPU cores; 93 %
is passed after 179 (`python benchmarks/time_to_accuracy.py --config=fashion/fast --path=DIR`).

    python -m flaxcls.main --config=fashion/fast --config.data.path=DIR
"""

from ml_collections import ConfigDict

from flaxcls import config


def get_config() -> ConfigDict:
    c = config.for_dataset("fashion_mnist")
    c.data.val_fraction = 0.0
    c.model.name = "like_vgg"

    c.augment.horizontal_flip = 0.5
    c.augment.crop_padding = 2
    c.train.batch_size = 128
    c.train.epochs = 12
    c.train.best_by = "train/loss"
    c.loss.label_smoothing = 0.1
    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 3e-3
    c.optimizer.weight_decay = 0.05
    c.schedule.name = "one_cycle"
    return c
