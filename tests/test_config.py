"""The config: a locked tree that checks itself, says what has no effect, and survives JSON."""

import ast
import dataclasses
import inspect
import math
from pathlib import Path

import pytest

import flaxcls
from flaxcls import config, losses, main, models, optimizers
from flaxcls.augment import Augmentation
from flaxcls.data import load as load_module
from flaxcls.data import splits
from flaxcls.data.dataset import SPLITS
from flaxcls.errors import InputError, did_you_mean
from flaxcls.experiment.recipe import model_options as model_options_of
from flaxcls.losses import distance, entropy
from flaxcls.models.registry import model_options
from flaxcls.ops.backend import BACKENDS

PACKAGE = Path(flaxcls.__file__).parent
SHIPPED = sorted(main.shipped_configs())
# Those whose text after the colon is a data set, and those that are one published experiment each.
CONFIGS = [name for name in SHIPPED if "/" not in name]
PUBLISHED = [name for name in SHIPPED if "/" in name]
SEVERAL = {
    "caltech/expanding_cnn": [
        f"{d}-{e}" for d in (1, 2, 3, 4) for e in ("add13", "double", "triple")
    ],
    "caltech/vgg": ["vgg11", "vgg13", "vgg16c", "vgg16", "vgg19"],
    "quickdraw/like_vgg": ["adam", "focal", "rmsprop", "adamw"],
    "fashion/like_vgg": ["adam", "focal", "rmsprop", "adamw"],
    "fashion/hierarchical": ["hierarchical", "flat"],
}
EXPERIMENTS = [(name, "") for name in PUBLISHED]
EXPERIMENTS += [(name, f":{one}") for name, several in SEVERAL.items() for one in several]


def parsed(*arguments):
    """The resolved config of a command line, and its notes."""
    command = main.parse(["flaxcls", *arguments])
    return command.config, command.notes


def lenet(**values):
    """The unresolved config of lenet on digits, with keys such as train__epochs set."""
    c = config.from_file(PACKAGE.parent / "configs" / "lenet.py")
    for path, value in values.items():
        group, _, key = path.partition("__")
        (c[group] if key else c)[key or group] = value
    return c


def config_file(folder, *lines):
    """Writes a config file whose `get_config` has these lines, the first of which is line 5."""
    body = "\n".join(f"    {line}" for line in lines)
    path = folder / "mine.py"
    path.write_text(
        "from flaxcls import config\n\ndef get_config(dataset='digits'):\n"
        f"    c = config.for_dataset(dataset)\n{body}\n    return c\n"
    )
    return path


# The tree is locked, in a file and on the command line.


@pytest.mark.parametrize(
    ("line", "key", "nearest"),
    [
        ("c.train.bacth_size = 1", "bacth_size", "batch_size"),
        ("c['train']['bacth_size'] = 1", "bacth_size", "batch_size"),
        ("c.train.update({'bacth_size': 1})", "bacth_size", "batch_size"),
        ("c.update({'train': {'bacth_size': 1}})", "bacth_size", "batch_size"),
        ("c.train.epochs = c.train.bacth_size", "bacth_size", "batch_size"),
        ("c.tarin = 1", "tarin", "train"),
        ("c.tarin.epochs = 1", "tarin", "train"),
        ("c.precison = 'float64'", "precison", "precision"),
    ],
)
def test_a_misspelt_key_in_a_file_is_named_with_its_line(tmp_path, line, key, nearest):
    path = config_file(tmp_path, line)
    with pytest.raises(InputError) as caught:
        config.from_file(path)
    assert str(caught.value) == (
        f"{path}, line 5: {key!r} is not a key of the config; did you mean {nearest!r}?"
    )


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("train.bacth_size=3", "train.bacth_size is .*; did you mean 'batch_size'"),
        ("trian.batch_size=3", r"did you mean 'train.batch_size'\?"),
        ("optimiser.name=adam", r"did you mean 'optimizer.name'\?"),
        ("data.learning_rate=3", r"did you mean 'optimizer.learning_rate'\?"),
        ("seeds.name=adam", "did you mean 'data.name' or 'loss.name' or "),
        ("learning_rate=3", "learning_rate is .*; did you mean 'optimizer.learning_rate'"),
        ("optimizr.nestero=True", "did you mean 'optimizer.nesterov'"),
        ("model.width=3", r"did you mean 'head_width' or model\.options=width=VALUE\?$"),
        ("model.stages=3", r"choose one of .* or model\.options=stages=VALUE$"),
        ("optimizer.lr=3", "optimizer.lr is not a key of the config; choose one of accumulate, b1"),
        ("data.classes[0]=a", "is not a key of the config"),
        ("train=3", "train is a group of keys"),
    ],
)
def test_a_misspelt_key_on_the_command_line_is_named(flag, said):
    with pytest.raises(InputError, match=said):
        parsed("--config=lenet", f"--config.{flag}")


def test_a_config_file_that_unlocks_the_tree_gains_nothing(tmp_path):
    path = config_file(tmp_path, "c.unlock()", "c.train.bacth_size = 1")
    with pytest.raises(InputError, match=r"train\.bacth_size is not .*; did you mean 'batch_size'"):
        config.resolve(config.from_file(path))
    path = config_file(tmp_path, "c.unlock()", "del c.train.epochs")
    with pytest.raises(InputError, match=r"train\.epochs is missing"):
        config.resolve(config.from_file(path))


# Types.


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("c.train.batch_size = 'many'", "batch_size: 'many' is not an int; give a whole number"),
        ("c.train.batch_size = 1.5", r"batch_size: '1\.5' is not an int"),
        ("c.model.batch_norm = 1", "batch_norm: '1' is not a bool; give True or False"),
        ("c.data.path = 3", "path: '3' is not a str"),
        ("c.optimizer.learning_rate = '1e-3'", "learning_rate: '1e-3' is not a float"),
        ("c.augment.crop_area = 1", "crop_area: '1' is not a tuple"),
        ("c.train = 3", "train: '3' is not a group of keys"),
    ],
)
def test_a_value_of_the_wrong_type_in_a_file_is_named_with_its_line(tmp_path, line, said):
    with pytest.raises(InputError, match=f"mine.py, line 5: {said}"):
        config.from_file(config_file(tmp_path, line))


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("train__epochs", True, "True is not an int"),
        ("train__epochs", None, "None is not an int"),
        ("model__head_width", True, "True is not an int"),
        ("data__classes", (3, 5), r"3 in \(3, 5\) is not a str; give text in quotes"),
        ("schedule__milestones", (1, 2.5), r"2.5 in \(1, 2.5\) is not an int"),
        ("normalize__mean", ("a",), "'a' in .* is not a float"),
        ("loss__class_weight_values", (True,), "True in .* is not a float"),
    ],
)
def test_what_ml_collections_lets_pass_is_refused(path, value, said):
    with pytest.raises(InputError, match=f"{path.replace('__', '.')}: {said}"):
        config.resolve(lenet(**{path: value}))


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("train.batch_size", "x", "an int"),
        ("train.batch_size", "3.5", "an int"),
        ("train.batch_size", "", "an int"),
        ("train.epochs", "True", "an int"),
        ("data.stratify", "maybe", "a bool"),
        ("model.batch_norm", "3", "a bool"),
        ("model.dropout", "x", "a float"),
        ("optimizer.momentum", "x", "a float"),
    ],
)
def test_a_value_of_the_wrong_type_on_the_command_line_is_named(key, value, kind):
    with pytest.raises(InputError, match=f"--config.{key}: '{value}' is not {kind}; give "):
        parsed("--config=lenet", f"--config.{key}={value}")


def test_a_whole_number_serves_as_a_float_and_a_list_as_a_tuple():
    c, _ = config.resolve(lenet(optimizer__learning_rate=1, data__classes=["0", "1"]))
    assert c.optimizer.learning_rate == 1.0
    assert c.data.classes == ("0", "1")


def test_every_tuple_says_what_its_elements_are():
    tuples = {path for path, kind in config.key_types().items() if kind is tuple}
    assert set(config.ELEMENTS) == tuples


# Keys whose default is None.

EXAMPLES = {int: "3", float: "0.25", bool: "True", str: "a", tuple: "(1, 2)"}
BRANCH_KEYS = [
    (selector, choice, key)
    for selector, branches in config.BRANCHES.items()
    for choice, keys in branches.items()
    for key in keys
]


@pytest.mark.parametrize(("selector", "choice", "key"), BRANCH_KEYS)
def test_a_key_of_a_choice_can_be_given_on_the_command_line(selector, choice, key):
    path = f"{selector.partition('.')[0]}.{key}"
    text = {
        "data.on_bad": "skip",
        "data.channels": "3",
        "schedule.monitor": "train/loss",
        "normalize.std": "(0.5,)",
        "loss.form": "sigmoid",
        "loss.kl_reduction": "mean",
        "loss.activation": "softmax",
        "loss.p": "2",
    }.get(path, EXAMPLES[config.key_types()[path]])
    more = ["--config.data.path=x"] if path.startswith("data.") else []
    if selector == "normalize.name":
        more += [f"--config.normalize.{one}=(0.5,)" for one in ("mean", "std") if one != key]
    c, notes = parsed(
        "--config=lenet", f"--config.{selector}={choice}", *more, f"--config.{path}={text}"
    )
    value = config.flatten(c)[path]
    assert isinstance(value, config.key_types()[path])
    assert value == (text if isinstance(value, str) else ast.literal_eval(text))
    assert not any(note.startswith(path) for note in notes)


@pytest.mark.parametrize("key", ["init=pytorch", "batch_norm=False", "head_width=8", "dropout=0.5"])
def test_an_option_of_a_model_can_be_given_on_the_command_line(key):
    c, _ = parsed("--config=vgg13", f"--config.model.{key}")
    name, _, text = key.partition("=")
    assert str(c.model[name]) == text


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        (["head_width=8"], {"head_width": 8}),
        (["head_width=8", "dropout=0.5"], {"head_width": 8, "dropout": 0.5}),
        (["('batch_norm=False', 'init=flax')"], {"batch_norm": False, "init": "flax"}),
        (["pool_size=None"], {"pool_size": None}),
        (["('stages=[1, 2]',)"], {"stages": (1, 2)}),
        (["text='8'"], {"text": "8"}),
        (["rule=a=b"], {"rule": "a=b"}),
    ],
)
def test_any_option_of_a_model_can_be_given_by_its_name(tmp_path, options, taken):
    c, _ = parsed("--config=vgg13", *(f"--config.model.options={one}" for one in options))
    assert model_options_of(c) == taken | {"dtype": "float32", "param_dtype": "float32"}
    config.save(c, tmp_path / "config.json")
    assert model_options_of(config.load(tmp_path / "config.json")) == model_options_of(c)


def test_several_texts_in_one_flag_get_the_form_that_works():
    said = "'a=1,b=2' is not a tuple of texts; give the flag once for each, or all as"
    with pytest.raises(InputError, match=said):
        parsed("--config=vgg13", "--config.model.options=a=1,b=2")
    c, _ = parsed("--config=vgg13", "--config.model.options=('a=1', 'b=2')")
    assert c.model.options == ("a=1", "b=2")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model__options": ("width",)}, "model.options: 'width' is no option; write NAME=VALUE"),
        ({"model__options": ("a b=3",)}, "model.options: 'a b=3' is no option; write NAME=VALUE"),
        ({"model__options": ("a=1,b=2",)}, "'a=1,b=2' holds several options; give the flag once"),
        ({"model__options": ("dtype=1",)}, "dtype is no option of a model; precision decides on"),
        ({"model__options": ("num_classes=3",)}, "num_classes is no option .*; the data decides"),
        ({"model__options": ("name=vgg11",)}, "name is no option of a model; model.name decides"),
        ({"model__options": ("init=flax", "init=flax")}, "init is given twice, 'flax' and 'flax'"),
        (
            {"model__options": ("init=flax",), "model__init": "pytorch"},
            "init is given twice, 'pytorch' and 'flax'; give it once, as model.options or as a key",
        ),
    ],
)
def test_an_option_that_cannot_be_is_named(values, said):
    c, _ = config.resolve(lenet(**values))
    with pytest.raises(InputError, match=said):
        model_options_of(c)


# Ranges and choices.


@pytest.mark.parametrize("path", config.RANGES)
def test_a_number_out_of_its_range_is_named(path):
    low, high, closed = config.RANGES[path]
    kind = config.key_types()[path]
    wrong = [low - 1] + ([] if closed else [low]) + ([] if high == math.inf else [high + 1])
    for value in wrong if kind is int else [*wrong, math.nan, math.inf]:
        c = lenet(**{path.replace(".", "__", 1): kind(value)})
        with pytest.raises(InputError, match=rf"^{path}: .* is out of range; it must be .* and "):
            config.resolve(c)


@pytest.mark.parametrize("path", [*config.CHOICES, *config.BRANCHES])
def test_an_unknown_choice_is_named_with_what_there_is(path):
    if path == "data.channels":
        wrong, near = 2, "choose one of 1, 3"
    elif path == "loss.p":
        wrong, near = 3, "choose one of 1, 2"
    else:
        known = config.CHOICES[path] if path in config.CHOICES else list(config.BRANCHES[path])
        longest = max(known, key=len)
        wrong, near = longest[:-1] + "_", f"did you mean {longest!r}"
    more = {
        "data.on_bad": {"data__source": "image_folder", "data__path": "x"},
        "loss.form": {"loss__name": "focal"},
        "loss.kl_reduction": {"loss__name": "kl_divergence"},
        "loss.activation": {"loss__name": "mse"},
        "loss.p": {"loss__name": "multi_margin"},
    }
    c = lenet(**more.get(path, {}), **{path.replace(".", "__", 1): wrong})
    with pytest.raises(InputError, match=f"^{path}: unknown value {wrong!r}; {near}"):
        config.resolve(c)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model__name": ""}, "model.name is not set; name a model"),
        ({"data__source": "idx"}, "data.path is not set"),
        ({"data__val_fraction": 0.5, "data__test_fraction": 0.5}, "leaves nothing to train on"),
        ({"optimizer__accumulate": 7}, "train.batch_size = 64 does not divide into"),
        ({"normalize__name": "values"}, "normalize.mean and normalize.std must both be given"),
        ({"train__best_by": "accuracy"}, "train.best_by: 'accuracy' is not a monitor"),
        ({"train__stop_by": "test/loss"}, "train.stop_by: 'test/loss' is not a monitor"),
        ({"schedule__warmup_epochs": 31.0}, "is longer than train.epochs"),
        ({"loss__name": "hierarchical", "augment__mixup": 0.2}, "augment.cutmix mix away; set"),
        ({"loss__name": "hierarchical", "augment__cutmix": 1.0}, "augment.cutmix mix away; set"),
    ],
)
def test_impossible_combinations_are_refused(values, said):
    with pytest.raises(InputError, match=said):
        config.resolve(lenet(**values))


# Inactive keys.


def test_the_active_choice_gets_its_defaults():
    c, notes = config.resolve(lenet(optimizer__name="rmsprop", schedule__name="one_cycle"))
    assert (c.optimizer.decay, c.optimizer.momentum, c.optimizer.centered) == (0.99, 0.0, False)
    assert (c.schedule.pct_start, c.schedule.div_factor) == (0.3, 25.0)
    assert c.optimizer.b1 is None
    assert not notes


def test_keys_of_another_choice_are_reported_and_dropped():
    c, notes = config.resolve(lenet(optimizer__momentum=0.5, schedule__gamma=0.1))
    assert notes == [
        "optimizer.momentum = 0.5 has no effect with optimizer.name = 'adam' (only with sgd, "
        "rmsprop)",
        "schedule.gamma = 0.1 has no effect with schedule.name = 'cosine' (only with step, "
        "multi_step)",
    ]
    assert c.optimizer.momentum is None
    assert c.schedule.gamma is None


def test_resolving_twice_changes_nothing():
    once, _ = config.resolve(lenet())
    twice, notes = config.resolve(once)
    assert once.to_dict() == twice.to_dict()
    assert not notes
    assert once.is_locked


# The tree agrees with what the rooms take.


def keywords(function, *without):
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - set(without)


def test_optimizers_have_the_keys_that_they_take():
    branches = config.BRANCHES["optimizer.name"]
    assert set(branches) == set(optimizers.OPTIMIZERS)
    for name, function in optimizers.OPTIMIZERS.items():
        assert set(branches[name]) == keywords(function, "weight_decay"), name


def test_schedules_have_the_keys_that_they_take():
    branches = config.BRANCHES["schedule.name"]
    assert set(branches) == set(optimizers.SCHEDULES)
    for name, function in optimizers.SCHEDULES.items():
        monitor = {"monitor"} if name == "plateau" else set()
        assert set(branches[name]) == keywords(function) | monitor, name
    free = {n for n in optimizers.SCHEDULES if not optimizers.schedule_depends_on_epochs(n)}
    assert set(config.LENGTH_FREE_SCHEDULES) == free


def test_losses_have_the_keys_that_they_take():
    branches = config.BRANCHES["loss.name"]
    assert set(branches) == set(losses.LOSSES)
    for name, function in losses.LOSSES.items():
        assert set(branches[name]) == keywords(function, "class_weights", "parents", "siblings"), (
            name
        )
        for option, value in branches[name].items():
            assert inspect.signature(function).parameters[option].default == value, option
    assert tuple(config.BRANCHES["loss.class_weights"]) == losses.CLASS_WEIGHTS


def test_models_have_the_keys_that_they_take():
    options = {option for name in models.list_models() for option in model_options(name)}
    of_weights = {"pretrained", "init_from", "frozen", "trainable"}
    assert set(config.default().model) == {"name", "options"} | of_weights | options - {
        *("dtype", "param_dtype"),  # of precision
        "num_parents",  # of the data
    }


def test_augmentation_has_the_keys_and_the_defaults_that_it_takes():
    assert config.default().augment.to_dict() == dataclasses.asdict(Augmentation())


def test_sources_have_the_keys_that_they_take():
    branches = config.BRANCHES["data.source"]
    assert list(branches) == list(load_module.SOURCES)
    for source, takes in load_module.SOURCES.items():
        assert set(branches[source]) - {"channels"} == set(takes) & {
            *("name", "on_bad", "label_pattern")
        }, source
    assert keywords(load_module.load_dataset) - {"seed", "spec", "known_classes", "threads"} <= (
        set(config.default().data)
    )


def test_choices_are_those_of_the_rooms():
    assert config.CHOICES["data.split_mode"] == splits.MODES
    assert config.CHOICES["ops.backend"] == BACKENDS
    assert config.CHOICES["loss.form"] == entropy.FOCAL_FORMS
    assert config.CHOICES["loss.kl_reduction"] == entropy.KL_REDUCTIONS
    assert config.CHOICES["loss.activation"] == distance.ACTIVATIONS
    assert config.CHOICES["loss.p"] == distance.MARGIN_POWERS
    assert set(config.CHOICES["eval.split"]) == {*SPLITS, "all"}


def test_every_key_that_checks_name_exists():
    paths = set(config.key_types())
    named = {*config.CHOICES, *config.RANGES, *config.ELEMENTS, *config.BRANCHES}
    named |= {f"{selector.partition('.')[0]}.{key}" for selector, _, key in BRANCH_KEYS}
    assert named <= paths
    for free in config.MAY_CHANGE:
        assert any(path == free or path.startswith(f"{free}.") for path in paths), free


# JSON, and what may change on resuming.


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_survives_json(tmp_path, name):
    c, _ = parsed(f"--config={name}")
    config.save(c, tmp_path / "config.json")
    again = config.load(tmp_path / "config.json")
    assert config.flatten(again) == config.flatten(c)
    assert {k: type(v) for k, v in config.flatten(again).items()} == {
        k: type(v) for k, v in config.flatten(c).items()
    }
    assert config.differences(again, c) == []
    assert again.is_locked
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting property name"),
        ("", "Expecting value"),
        ("[]", "it is no tree of keys"),
        ('{"train": 3}', "train: '3' is not a group of keys"),
        ('{"train": {"epochs": "x"}}', "epochs: 'x' is not an int"),
        ('{"train": {"bacth_size": 3}}', "'bacth_size' is not a key of the config"),
        ('{"seed": null}', "seed: None is not an int"),
        ('{"data": {"classes": [3]}}', "data.classes: 3 in"),
    ],
)
def test_a_damaged_json_is_named_with_the_reason(tmp_path, text, reason):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"config.json: not a config that .*; restore") as caught:
        config.load(path)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def another(value, kind):
    if kind is bool:
        return not value
    if kind is tuple:
        return (*(value or ()), "x")
    return "x" if kind is str else (value or 0) + 1


@pytest.mark.parametrize("path", config.key_types())
def test_only_some_keys_may_change_on_resuming(path):
    stored, _ = config.resolve(lenet())
    given = config.resolve(lenet())[0].unlock()
    value = another(config.flatten(given)[path], config.key_types()[path])
    given.update_from_flattened_dict({path: value})
    free = {"data.path", "data.workers", "data.placement"}
    free |= {"eval.batch_size", "eval.split", "eval.step"}  # not top_k: an epoch counts with one k
    may_change = path in free or path.split(".")[0] in ("mesh", "log", "checkpoint")
    differing = config.differences(stored, given)
    assert len(differing) == (0 if may_change else 1)
    assert all(line.startswith(f"{path}: ") for line in differing)


@pytest.mark.parametrize("schedule", optimizers.SCHEDULES)
def test_epochs_may_change_where_the_schedule_does_not_depend_on_them(schedule):
    common = {"schedule__name": schedule, "schedule__milestones": (1,)}
    common |= {} if schedule == "multi_step" else {"schedule__milestones": None}
    stored, _ = config.resolve(lenet(**common))
    given, _ = config.resolve(lenet(**common, train__epochs=40))
    depends = optimizers.schedule_depends_on_epochs(schedule)
    assert bool(config.differences(stored, given)) == depends


# Config files.


@pytest.mark.parametrize("dataset", [*(n for n in config.PRESETS if n != "tfds"), "tfds/mnist"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_builds_for_every_data_set(name, dataset):
    c, notes = parsed(f"--config={name}:{dataset}", "--config.data.path=somewhere")
    assert not notes
    assert c.model.name in models.list_models()
    preset = config.PRESETS[dataset.partition("/")[0]]
    assert c.data.source == preset.source
    assert c.data.image_size >= preset.image_size
    assert (c.data.val_fraction, c.data.test_fraction) == (
        preset.val_fraction,
        preset.test_fraction,
    )
    models.create_model(c.model.name, 3)


@pytest.mark.parametrize(("name", "argument"), EXPERIMENTS)
def test_every_published_experiment_sets_keys_that_count(name, argument):
    c, notes = parsed(f"--config={name}{argument}", "--config.data.path=somewhere")
    assert not notes
    options = {k: v for k, v in model_options_of(c).items() if "dtype" not in k}
    models.create_model(c.model.name, 3, **options)
    schedule = optimizers.create_schedule("constant", 0.1, steps_per_epoch=2, epochs=2)
    keys = {k: v for k, v in c.optimizer.items() if v is not None and k in ("momentum", "b1")}
    optimizers.create_optimizer(c.optimizer.name, schedule, **keys)
    if c.loss.name == "hierarchical":
        assert c.data.parents


@pytest.mark.parametrize("name", SEVERAL)
def test_an_unknown_experiment_after_the_colon_is_named(name):
    with pytest.raises(InputError, match="unknown experiment 'resnet' after the colon; "):
        parsed(f"--config={name}:resnet")


@pytest.mark.parametrize("dataset", ["fashion_mist", "imagefolder", "tfds", "", "digits/x"])
def test_an_unknown_data_set_after_the_colon_is_named(dataset):
    with pytest.raises(InputError, match=f"unknown data set '{dataset}' after the colon; "):
        parsed(f"--config=vgg13:{dataset}")


@pytest.mark.parametrize("name", ["vgg13", "vgg13.py", "configs/vgg13.py", "configs/vgg13"])
def test_a_config_that_comes_with_the_package_is_found_anywhere(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    c, _ = parsed(f"--config={name}:fashion_mnist")
    assert c.model.name == "vgg13"
    assert c.data.name == "fashion_mnist"
    assert "vgg13" in main.shipped_configs()


def test_a_file_of_the_working_directory_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config_file(tmp_path, "c.model.name = 'lenet'", "c.data.image_size = 28").rename("vgg13.py")
    c, _ = parsed("--config=vgg13.py")
    assert c.model.name == "lenet"


def test_a_run_gives_its_own_config(tmp_path):
    stored, _ = config.resolve(lenet(train__epochs=7))
    config.save(stored, tmp_path / "config.json")
    for arguments in (
        [f"--workdir={tmp_path}", "--config.eval.split=val"],
        ["--config.eval.split=val", f"--workdir={tmp_path}", "--mode=evaluate"],
        ["--config.eval.split", "val", "--workdir", str(tmp_path), "--mode", "evaluate"],
    ):
        c, _ = parsed(*arguments)
        assert c.train.epochs == 7
        assert c.eval.split == "val"


def test_the_order_of_flags_does_not_matter():
    first, _ = parsed("--config.train.epochs=3", "--noconfig.data.stratify", "--config=lenet")
    then, _ = parsed("--config", "lenet", "--config.train.epochs", "3", "--config.data.stratify=0")
    assert first.to_dict() == then.to_dict()
    assert first.train.epochs == 3
    assert not first.data.stratify


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def get_config(:\n", r"not Python \(.*\); correct the config file"),
        ("x = 3\n", r"no function get_config\(dataset\) in it; define one"),
        ("def get_config():\n    return\n", "get_config returned NoneType, not a config; return"),
        ("def get_config():\n    return 1 / 0\n", "ZeroDivisionError: division by zero"),
        ("import nothing_of_that_name\n", "ModuleNotFoundError: No module named"),
        ("\x00\n", r"not Python \(.*\); correct"),
    ],
)
def test_a_file_that_is_no_config_is_named(tmp_path, text, said):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(InputError, match=f"broken.py[,:] .*{said}") as caught:
        parsed(f"--config={path}")
    assert "\n" not in str(caught.value)


def test_a_config_file_leaves_nothing_beside_it(tmp_path):
    path = config_file(tmp_path, "c.model.name = 'lenet'")
    config.from_file(path)
    path.write_text(path.read_text().replace("lenet", "vgg11"))
    assert config.from_file(path).model.name == "vgg11"  # not compiled code of the file as it was
    assert list(tmp_path.iterdir()) == [path]


# Names.


@pytest.mark.parametrize(
    ("name", "known", "remedy"),
    [
        ("lenat", ["lenet", "vgg13"], "did you mean 'lenet'?"),
        ("LENET", ["lenet", "vgg13"], "did you mean 'lenet'?"),
        ("resnet", ["lenet", "vgg13"], "did you mean 'lenet'?"),
        ("zzz", ["lenet", "vgg13"], "choose one of lenet, vgg13"),
        ("mobilenet", ["lenet", "vgg13"], "choose one of lenet, vgg13"),
        ("densenet", ["resnet18", "resnet50"], "choose one of resnet18, resnet50"),
        ("zzz", map(str, range(40)), f"choose one of {', '.join(map(str, range(30)))}, ... (40 in"),
        ("zzz", [], "there are none"),
    ],
)
def test_did_you_mean_gives_the_nearest_name_or_all(name, known, remedy):
    assert did_you_mean(name, known).startswith(remedy)


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (["--config=lenets"], "lenet"),
        (["--config=VGG13"], "vgg13"),
        (["--config=lenet:fashionmnist"], "fashion_mnist"),
        (["--config=lenet", "--mode=evalute"], "evaluate"),
        (["--config=lenet", "--wrkdir=x"], "workdir"),
        (["--config=lenet", "--config.optimizer.name=adm"], "adam"),
        (["--config=lenet", "--config.schedule.name=cosin"], "cosine"),
        (["--config=lenet", "--config.loss.name=crossentropy"], "cross_entropy"),
        (["--config=lenet", "--config.loss.class_weights=balance"], "balanced"),
        (["--config=lenet", "--config.normalize.name=imagenett"], "imagenet"),
        (["--config=lenet", "--config.data.source=digit"], "digits"),
        (["--config=lenet", "--config.precision=float23"], "float32"),
        (["--config=lenet", "--config.ops.backend=xal"], "xla"),
    ],
)
def test_the_nearest_name_is_suggested(arguments, nearest):
    with pytest.raises(InputError, match=rf"did you mean '{nearest}'\?$"):
        parsed(*arguments)


# No code reads a key with a fallback default.

HIDES_A_MISSING_KEY = {"get", "get_oneway_ref", "setdefault", "pop"}


def configs_in(function):
    """The names in a function that hold a config or a group of one."""
    names = {"config", "_config"}
    while True:
        held = {
            target.id
            for node in ast.walk(function)
            if isinstance(node, ast.Assign) and is_config(node.value, names)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        if held <= names:
            return names
        names |= held


def is_config(node, names):
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) in ("config_module.load", "config_module.from_file")
    if isinstance(node, ast.Attribute):
        return node.attr in ("config", "_config") or is_config(node.value, names)
    return isinstance(node, ast.Name) and node.id in names


def fallbacks(tree):
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    for function in functions:
        annotated = {
            a.arg
            for a in function.args.args
            if a.annotation is not None and "ConfigDict" in ast.unparse(a.annotation)
        }
        names = configs_in(function) | annotated
        for call in (n for n in ast.walk(function) if isinstance(n, ast.Call)):
            if isinstance(call.func, ast.Attribute):
                if call.func.attr in HIDES_A_MISSING_KEY and is_config(call.func.value, names):
                    yield call
            elif ast.unparse(call.func) in ("getattr", "hasattr") and is_config(
                call.args[0], names
            ):
                yield call


def test_no_code_reads_a_key_with_a_fallback():
    found = [
        f"{path.name}:{call.lineno}: {ast.unparse(call)}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for call in fallbacks(ast.parse(path.read_text()))
    ]
    assert not found


@pytest.mark.parametrize(
    "line",
    [
        "config.get('seed', 0)",
        "config.train.get('epochs')",
        "self._config.train.get('epochs', 3)",
        "getattr(config.train, 'epochs', 3)",
        "d = config.data\n    return d.get('path', '')",
    ],
)
def test_a_fallback_would_be_found(line):
    tree = ast.parse(f"def function(self, config):\n    {line}\n")
    assert list(fallbacks(tree))


def test_types_of_keys_are_known_to_the_command_line():
    assert set(config.key_types().values()) == set(config.KINDS) == set(EXAMPLES)
