"""37 breeds of Oxford-IIIT Pet under cat and dog, on a frozen ResNet-18 with ImageNet weights.

Only the heads are trained, 287,783 parameters, for 5 epochs. We know of no published
accuracy, and ours is not measured yet. It deviates from the published run in two things: there the
divergence was averaged over all entries (--config.loss.kl_reduction=mean), fed with logits where it
wants log-probabilities, which these are; and the BatchNorms' running statistics moved, which stay
here, as all of the trunk is frozen.

Data: DIR holds the images (robots.ox.ac.uk/~vgg/data/pets, images.tar.gz), all in one folder; their
names tell the breed, and its first letter the kind. The weights, on which the accuracy depends, are
fetched from the Hugging Face hub once; --config.model.pretrained=FILE takes a file.

    python -m flaxcls.main --config=pets/hierarchical_resnet18 --config.data.path=DIR

From scratch, all of it trained: not measured yet; the same command with
--config.model.pretrained= --config.model.frozen='()'.
"""

from ml_collections import ConfigDict

from flaxcls import config


def get_config() -> ConfigDict:
    c = config.for_dataset("pets")
    c.data.label_pattern = r"(.+)_\d+\.jpg"  # Egyptian_Mau_12.jpg is an Egyptian_Mau ...
    c.data.parents = ("[A-Z].*=cat", "[a-z].*=dog")  # ... and that a cat
    c.data.resize = "crop"
    c.data.crop_fraction = 224 / 256
    c.model.name = "hierarchical_resnet18"
    c.model.pretrained = "hf-hub:timm/resnet18.tv_in1k"
    c.model.frozen = ("trunk/*",)
    c.augment.random_resized_crop = True
    c.augment.horizontal_flip = 0.5

    c.train.batch_size = 64
    c.train.epochs = 5
    c.loss.name = "hierarchical"
    c.optimizer.name = "adam"
    c.optimizer.learning_rate = 1e-3
    return c
