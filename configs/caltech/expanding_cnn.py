"""Caltech-101's airplanes, Motorbikes and schooner with the twelve expanding CNNs.

The text after the colon is DEPTH-EXPANSION, 1 to 4 and add13, double or triple.

Published validation accuracy at the last epoch, depth 1 to 4:
add13 95.789, 98.797, 98.496, 99.398 %; double 90.376, 98.647, 98.496, 99.398 %;
triple 93.233, 99.098, 98.496, 99.699 %.
Ours, depth 4: add13 99.10 %, double 99.10 %, triple 99.10 % (mean of 2 seeds); 20, 10 and 17 to 21
minutes on one CPU core that did other work besides.

    python -m flaxcls.main --config=caltech/expanding_cnn:4-triple --config.data.path=DIR

Data: DIR holds the folders `airplanes`, `Motorbikes` and `schooner` of Caltech-101
(doi.org/10.22002/D1.20086), and no others; 40 % of each are for validation.
"""

import itertools

from ml_collections import ConfigDict

from flaxcls import config

LEARNING_RATES = {1: 1e-4, 2: 2e-3, 3: 3.5e-3, 4: 1e-2}
EXPERIMENTS = {
    f"{depth}-{expansion}": (depth, expansion)
    for depth, expansion in itertools.product(LEARNING_RATES, ("add13", "double", "triple"))
}


def get_config(experiment: str = "4-triple") -> ConfigDict:
    c = config.for_dataset("caltech101_3")
    c.data.image_size = 256
    c.model.name = "expanding_cnn"
    c.model.depth, c.model.expansion = config.choose(experiment, EXPERIMENTS)

    c.train.batch_size = 128
    c.train.epochs = 20
    c.loss.class_weights = "complement"
    c.optimizer.name = "sgd"
    c.optimizer.momentum = 0.0
    c.optimizer.learning_rate = LEARNING_RATES[c.model.depth]
    return c
