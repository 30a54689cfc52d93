"""VGG variant E in the experiment of configs/vgg13.py.

python -m flaxcls.main --config=configs/vgg19.py:image_folder --config.data.path=DIR
"""

from functools import partial

from flaxcls.configs import vgg13

get_config = partial(vgg13.get_config, model="vgg19")
