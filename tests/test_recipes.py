"""The published experiments have the numbers that their authors state, and nothing besides."""

import re
import shlex
from pathlib import Path

import pytest

from flaxcls import config, main
from flaxcls.experiment.recipe import weights_source
from flaxcls.models import model_options

CONFIGS = Path(__file__).parents[1] / "configs"

# Copied by hand from the papers' and reports' own tables, not from the configs. What is not named
# here is the default of `config.default()`.

PRODUCT_PHOTOS = {
    "seed": 42,
    "data.source": "image_folder",
    "data.channels": 3,
    "data.image_size": 224,
    "data.crop_fraction": 0.8,
    "data.crop_order": "before",
    "data.per_class": 500.0,
    "data.val_fraction": 0.1,
    "data.test_fraction": 0.2,
    "train.batch_size": 32,
    "train.epochs": 30,
    "optimizer.name": "adam",
    "optimizer.learning_rate": 4e-4,
    "eval.top_k": 3,
    "model.init": "pytorch",
}

CALTECH = {
    "data.source": "image_folder",
    "data.channels": 3,
    "data.image_size": 256,
    "data.val_fraction": 0.4,
    "data.test_fraction": 0.0,
    "loss.class_weights": "complement",
    "optimizer.name": "sgd",
    "optimizer.momentum": 0.0,
    "model.init": "pytorch",
}
EXPANDING = CALTECH | {"model.name": "expanding_cnn", "train.batch_size": 128, "train.epochs": 20}
EXPANDING_RATES = {1: 1e-4, 2: 2e-3, 3: 3.5e-3, 4: 1e-2}
VGG = CALTECH | {
    "train.batch_size": 16,
    "train.epochs": 30,
    "optimizer.learning_rate": 1e-3,
}

PETS = {
    "data.source": "image_files",
    "data.channels": 3,
    "data.label_pattern": r"(.+)_\d+\.jpg",
    "data.parents": ("[A-Z].*=cat", "[a-z].*=dog"),
    "data.image_size": 224,
    "data.resize": "crop",
    "data.crop_fraction": 224 / 256,
    "data.val_fraction": 0.33,
    "data.test_fraction": 0.0,
    "augment.random_resized_crop": True,
    "augment.horizontal_flip": 0.5,
    "model.name": "hierarchical_resnet18",
    "model.pretrained": "hf-hub:timm/resnet18.tv_in1k",  # brings ImageNet's mean and std
    "model.frozen": ("trunk/*",),
    "loss.name": "hierarchical",
    "loss.kl_reduction": "batchmean",
    "loss.child_weight": 1.0,
    "loss.parent_weight": 1.0,
    "loss.kl_weight": 1.0,
    "train.batch_size": 64,
    "train.epochs": 5,
    "optimizer.name": "adam",
    "optimizer.learning_rate": 1e-3,
}

QUICKDRAW = {
    "data.source": "npy",
    "data.image_size": 28,
    "data.num_classes_drawn": 200,
    "data.per_class": 0.01,
    "data.val_fraction": 0.2,
    "data.test_fraction": 0.0,
    "train.batch_size": 64,
    "train.epochs": 100,
    "train.patience": 7,
    "train.stop_by": "val/accuracy",
    "train.best_by": "val/loss",
    "optimizer.learning_rate": 1e-3,
}
# Experiments 2 and 3.
ON_IMAGENET = QUICKDRAW | {
    "data.image_size": 32,
    "data.channels": 3,
    "optimizer.name": "adam",
    "model.init": "torchvision",
}
LIKE_VGG = {"model.name": "like_vgg", "model.init": "kaiming_uniform"}
LIKE_VGG_RECIPES = {
    "adam": {"optimizer.name": "adam"},
    "focal": {
        "optimizer.name": "adam",
        "loss.name": "focal",
        "loss.form": "sigmoid",
        "loss.alpha": (0.25,),
        "loss.gamma": 2.0,
        "loss.reduction": "sum",
    },
    "rmsprop": {"optimizer.name": "rmsprop"},
    "adamw": {"optimizer.name": "adamw", "optimizer.weight_decay": 1e-2},
}

FASHION_DATA = {
    "data.source": "idx",
    "data.image_size": 28,
    "data.val_fraction": 0.3,
    "data.test_fraction": 0.0,  # the test images are their own file
    "normalize.name": "values",
    "normalize.mean": (0.1307,),
    "normalize.std": (0.3081,),
    "train.best_by": "val/f1_weighted",
}
FASHION_SGD = {
    "optimizer.name": "sgd",
    "optimizer.momentum": 0.9,
    "optimizer.weight_decay": 5e-4,
    "schedule.name": "step",
    "schedule.step_epochs": 7,
    "schedule.gamma": 0.1,
    "train.epochs": 35,
    "model.init": "pytorch",
}
# The batch of 8 with its learning rate, 1e-3, both times 32.
FASHION = FASHION_DATA | FASHION_SGD | {"train.batch_size": 256, "optimizer.learning_rate": 0.032}
FASHION_VGG = {
    **FASHION_DATA,
    **FASHION_SGD,
    "data.image_size": 224,
    "data.channels": 3,
    "normalize.mean": (0.1307,) * 3,
    "normalize.std": (0.3081,) * 3,
    "augment.horizontal_flip": 0.5,
    "augment.vertical_flip": 0.5,
    "augment.erasing": 0.5,
    "augment.erasing_area": (0.02, 0.4),
    "augment.erasing_ratio": (0.3, 3.3),
    "augment.erasing_value": 0.4914,
    "train.batch_size": 8,
    "optimizer.learning_rate": 1e-3,
    "model.pool_size": 7,
    "model.dropout": 0.5,
    "model.pretrained": "hf-hub:timm/vgg16_bn.tv_in1k",
}
# Ours: no such experiments were published.
FASHION_FAST = {
    **LIKE_VGG,
    "data.source": "idx",
    "data.image_size": 28,
    "data.val_fraction": 0.0,
    "data.test_fraction": 0.0,
    "augment.horizontal_flip": 0.5,
    "augment.crop_padding": 2,
    "train.batch_size": 128,
    "train.epochs": 12,
    "train.best_by": "train/loss",
    "loss.label_smoothing": 0.1,
    "optimizer.name": "adamw",
    "optimizer.learning_rate": 3e-3,
    "optimizer.weight_decay": 0.05,
    "schedule.name": "one_cycle",
}
FASHION_LIKE_VGG = {
    **FASHION_DATA,
    **LIKE_VGG,
    "train.batch_size": 256,
    "train.epochs": 8,
    "optimizer.learning_rate": 1e-3,
    "schedule.name": "cosine",
}
FLAT = {**FASHION_LIKE_VGG, "optimizer.name": "adam", "train.best_by": "val/accuracy"}

RECIPES = {
    **{
        f"shopee/{name}": PRODUCT_PHOTOS | {"model.name": name}
        for name in ("baseline_cnn", "lstm_cnn", "attention_cnn", "local_attention_cnn")
    },
    **{
        f"caltech/expanding_cnn:{depth}-{expansion}": EXPANDING
        | {"model.depth": depth, "model.expansion": expansion, "optimizer.learning_rate": rate}
        for depth, rate in EXPANDING_RATES.items()
        for expansion in ("add13", "double", "triple")
    },
    **{
        f"caltech/vgg:{name}": VGG | {"model.name": name}
        for name in ("vgg11", "vgg13", "vgg16c", "vgg16", "vgg19")
    },
    "caltech/googlenet": CALTECH
    | {
        "model.name": "googlenet",
        "train.batch_size": 64,
        "train.epochs": 100,
        "optimizer.learning_rate": 1e-3,
    },
    "pets/hierarchical_resnet18": PETS,
    "quickdraw/lenet": QUICKDRAW
    | {
        "model.name": "lenet",
        "model.init": "pytorch",
        "optimizer.name": "sgd",
        "optimizer.momentum": 0.0,
        "optimizer.learning_rate": 1e-2,
    },
    "quickdraw/vgg16": ON_IMAGENET
    | {
        "model.name": "vgg16",
        "model.pool_size": 7,
        "model.dropout": 0.5,
        "model.pretrained": "hf-hub:timm/vgg16_bn.tv_in1k",
        "model.frozen": ("trunk/*",),
    },
    "quickdraw/resnet50": ON_IMAGENET
    | {
        "model.name": "resnet50",
        "model.pretrained": "hf-hub:timm/resnet50.tv_in1k",
        "model.trainable": ("head/*",),
    },
    "quickdraw/ts_cnn": QUICKDRAW
    | {
        "model.name": "ts_cnn",
        "model.init": "kaiming_uniform",
        "optimizer.name": "sgd",
        "optimizer.momentum": 0.9,
        "optimizer.weight_decay": 5e-4,
    },
    **{
        f"quickdraw/like_vgg:{name}": QUICKDRAW | LIKE_VGG | recipe
        for name, recipe in LIKE_VGG_RECIPES.items()
    },
    "quickdraw/ai_inno_cnn": QUICKDRAW
    | {
        "model.name": "ai_inno_cnn",
        "model.init": "kaiming_uniform",
        "optimizer.name": "adam",
    },
    "fashion_net0:fashion_mnist": FASHION | {"model.name": "fashion_net0"},
    "fashion/fashion_net0": FASHION | {"model.name": "fashion_net0"},
    "fashion/fashion_net1": FASHION | {"model.name": "fashion_net1"},
    "fashion/fashion_net2": FASHION | {"model.name": "fashion_net2"},
    "fashion/vgg16": FASHION_VGG | {"model.name": "vgg16"},
    "fashion/vgg16_residual_cam": FASHION_VGG | {"model.name": "vgg16_residual_cam"},
    **{
        f"fashion/like_vgg:{name}": FASHION_LIKE_VGG | recipe
        for name, recipe in LIKE_VGG_RECIPES.items()
    },
    "fashion/fast": FASHION_FAST,
    "fashion/hierarchical:flat": FLAT,
    "fashion/hierarchical:hierarchical": FLAT
    | {
        "model.name": "hierarchical",
        "model.trunk": "like_vgg",
        "loss.name": "hierarchical",
        "loss.parent_weight": 0.2,
        "loss.kl_weight": 0.1,
        "data.parents": (
            "T-shirt/top|Pullover|Dress|Coat|Shirt=tops",
            "Trouser=trousers",
            "Sandal|Sneaker|Ankle boot=footwear",
            "Bag=bags",
        ),
        "model.init": None,  # of a hierarchical model: the trunk's own, kaiming_uniform
    },
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_published_experiment_has_its_published_numbers(name):
    given = main.parse(["flaxcls", f"--config={name}", "--config.data.path=x"]).config
    wanted = config.default()
    with wanted.unlocked():
        wanted.update_from_flattened_dict(RECIPES[name] | {"data.path": "x"})
    wanted, _ = config.resolve(wanted)
    ours, theirs = (config.flatten(c) for c in (given, wanted))
    if ours["model.init"] is None:
        ours["model.init"] = model_options(given.model.name)["init"]
    if "model.init" not in RECIPES[name]:
        theirs["model.init"] = ours["model.init"]
    assert ours == theirs


def test_every_published_experiment_is_in_the_table():
    shipped = {name for name in main.shipped_configs() if "/" in name} | {"fashion_net0"}
    assert {name.partition(":")[0] for name in RECIPES} == shipped


@pytest.mark.parametrize("name", sorted({name.partition(":")[0] for name in RECIPES}))
def test_the_command_in_the_head_of_a_recipe_is_one(name):
    head = (CONFIGS / f"{name}.py").read_text().partition('"""\n\n')[0]
    commands = re.findall(r"^    python -m flaxcls.main (--config=\S+ --config.*)$", head, re.M)
    assert commands
    for command in commands:
        shown, *_ = flags = shlex.split(command)
        assert shown.partition(":")[0] in (f"--config={name}", f"--config=configs/{name}.py")
        assert main.parse(["flaxcls", *flags]).config.data.path == "DIR"


@pytest.mark.parametrize("name", [n for n, keys in RECIPES.items() if "model.pretrained" in keys])
def test_what_depends_on_weights_says_how_to_train_it_without(name):
    head = (CONFIGS / f"{name}.py").read_text().partition('"""\n\n')[0]
    (scratch,) = re.findall(r"From scratch.*; the same command with\s(.*)\.\n", head, re.DOTALL)
    c = main.parse(["flaxcls", f"--config={name}", *shlex.split(scratch)]).config
    assert weights_source(c) is None
    assert (c.model.frozen, c.model.trainable) == ((), ())
