"""VGG variant C with batch normalisation: the experiment of configs/vgg13.py with another depth.

python -m flaxcls.main --config=configs/vgg16c.py
python -m flaxcls.main --config=configs/vgg16c.py:caltech101_3 --config.data.path=DIR
"""

from ml_collections import ConfigDict

from flaxcls.configs import vgg13


def get_config(dataset: str = "digits") -> ConfigDict:
    c = vgg13.get_config(dataset)
    c.model.name = "vgg16c"
    return c
