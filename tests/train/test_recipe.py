import dataclasses
from pathlib import Path

import jsonschema
import pytest
import yaml

from cvt import CvtConfig
from cvt.train import Recipe, load_recipe
from cvt.train.recipe import (
    FIELDS,
    SETTLED,
    find_recipe,
    json_schema,
    packaged_recipe,
    packaged_recipes,
    resumed_recipe,
)

RECIPES = packaged_recipes()
EXPERIMENTS = ("cvt-13-224x224", "cvt-13-384x384", "cvt-21-224x224", "cvt-21-384x384")


def test_settings_given_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    (tmp_path / "mine.yaml").write_text("epochs: 7\nlr: 1e-3\nflip: 0\n")
    recipe = load_recipe(tmp_path / "mine.yaml", {"epochs": "9", "ema_decay": 0.9})
    assert (recipe.epochs, recipe.lr, recipe.flip, recipe.ema_decay) == (9, 1e-3, 0.0, 0.9)
    assert recipe.batch_size == Recipe().batch_size
    assert [type(value) for value in (recipe.epochs, recipe.lr, recipe.flip)] == [int, float, float]


@pytest.mark.parametrize(
    ("words", "value"), [("true", True), ("no", False), ("On", True), ("False", False)]
)
def test_words_are_switches(words, value):
    assert load_recipe(changes={"compile": words}).compile is value


@pytest.mark.parametrize("word", ["none", "null", "", None])
def test_none_takes_a_value_away(tmp_path, word):
    (tmp_path / "mine.yaml").write_text("auto_augment: rand-m9\nlr: 0.1\n")
    changes = {"auto_augment": word, "lr": word}
    recipe = load_recipe(tmp_path / "mine.yaml", changes)
    assert recipe.auto_augment is None
    assert recipe.lr is None


def test_an_unknown_key_suggests_the_nearest(tmp_path):
    with pytest.raises(ValueError, match=r"there is no setting epoch; is it epochs\?"):
        load_recipe(changes={"epoch": 3})
    (tmp_path / "mine.yaml").write_text("batchsize: 3\n")
    with pytest.raises(
        ValueError, match=r"mine\.yaml: there is no setting batchsize; is it batch_"
    ):
        load_recipe(tmp_path / "mine.yaml")
    with pytest.raises(ValueError, match="there is no setting qqqqqqq; cvt train -h lists them"):
        load_recipe(changes={"qqqqqqq": 3})


@pytest.mark.parametrize(
    "text", ["epochs: 1\nepochs: 2\n", "", "- a\n- b\n", "epochs: [1\n", "just words\n", "\x00"]
)
def test_a_file_that_is_no_recipe_is_named(tmp_path, text):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"mine\.yaml"):
        load_recipe(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0), ("epochs", 2.5), ("epochs", True), ("epochs", "many"), ("epochs", None),
        ("batch_size", -1), ("lr", 0), ("lr", "nan"), ("lr", [1]), ("crop_scale", 2.0),
        ("crop_pct", 0), ("flip", -0.1), ("optimizer", "adam"), ("compile", 1), ("model", 3),
        ("mixup_mode", "batches"), ("ema_decay", 1.0), ("seed", -1), ("clip_grad", 0),
        ("workers", 10**6), ("batch_size", 10**9), ("lora_r", 10**6), ("image_size", 10**9),
        ("accumulate", 10**9), ("repeats", 10**6), ("epochs", 10**30), ("model", ""),
        ("metric", "accuracy"), ("metric", None), ("patience", 0), ("max_hours", 0),
        ("class_weights", "inverse"), ("sampler", "weighted"), ("lr", "search"), ("lr", "Find"),
    ],
)  # fmt: skip
def test_a_bad_value_is_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} = "):
        load_recipe(changes={name: value})


HARMFUL = {
    "aliases": (
        "data: &a [x, x]\n" + "".join(f"lr: &{b} [{f'*{a}, ' * 9}]\n" for a, b in ("ab", "bc")),
        r"\*a repeats a list or a map",
    ),
    "merged": ("&a lr: 1\n<<: &b {epochs: 3}\nseed: {<<: *b}\n", r"\*b repeats a list or a map"),
    "nested": ("epochs: " + "[" * 10_000 + "]" * 10_000, "nested more than 8 levels deep"),
    "indented": ("".join(" " * i + "a:\n" for i in range(999)), "nested more than 8 levels deep"),
    "digits": ("epochs: " + "9" * 5000, "is not yaml: Exceeds the limit"),
    "date": ("epochs: 2001-13-13", "is not yaml: month must be in 1..12"),
}


@pytest.mark.parametrize(("text", "fault"), HARMFUL.values(), ids=HARMFUL)
def test_a_malicious_file_is_refused_in_one_sentence(tmp_path, text, fault):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(
        ValueError, match=rf"a\.yaml is not yaml: .*{fault}|a\.yaml {fault}"
    ) as raised:
        load_recipe(tmp_path / "a.yaml")
    assert len(str(raised.value)) < 400


def test_a_scalar_may_be_repeated(tmp_path):
    (tmp_path / "a.yaml").write_text("epochs: &e 7\nwarmup_epochs: *e\n")
    recipe = load_recipe(tmp_path / "a.yaml")
    assert recipe.epochs == recipe.warmup_epochs == 7


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mixup": 0.8, "batch_size": 3}, "batch_size"),
        ({"fsdp": True, "ema_decay": 0.9}, "fsdp"),
        ({"fsdp": True, "lora_r": 4}, "fsdp"),
        ({"lora_r": 4, "head_only": True}, "lora_r"),
        ({"lr_updates": "epoch", "warmup_epochs": 0.5}, "warmup_epochs"),
        ({"class_weights": "balanced", "sampler": "balanced"}, "class_weights"),
        ({"class_weights": "balanced", "label_smoothing": 1}, "class_weights"),
    ],
)
def test_settings_that_contradict_each_other_are_named(changes, named):
    with pytest.raises(ValueError, match=named):
        load_recipe(changes=changes)


def test_all_faults_are_listed_at_once():
    with pytest.raises(
        ValueError, match=r"flip = 2: .*\nepochs = 0: .*\nlr = -1: must be above 0$"
    ):
        load_recipe(changes={"epochs": 0, "lr": -1, "flip": 2})
    with pytest.raises(ValueError, match=r"setting epoch; .*\n.*colour; is it color_jitter"):
        load_recipe(changes={"epoch": 1, "colour": 2})
    with pytest.raises(ValueError, match=r"fsdp: .*\nlora_r: "):
        load_recipe(changes={"fsdp": True, "lora_r": 4, "head_only": True})


def test_the_schema_accepts_the_packaged_recipes_and_refuses_what_a_recipe_refuses():
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for path in RECIPES.values():
        validator.validate(yaml.safe_load(path.read_text()))
    assert schema["properties"].keys() == FIELDS.keys()
    validator.validate({name: spec.default for name, spec in FIELDS.items()})
    validator.validate({"lr": "find"})
    for wrong in (
        {"epoch": 1},
        {"epochs": 0},
        {"lr": 0},
        {"lr": "search"},
        {"flip": 2},
        {"optimizer": "adam"},
    ):
        assert not validator.is_valid(wrong)
        with pytest.raises(ValueError, match=next(iter(wrong))):
            load_recipe(changes=wrong)


def test_a_run_may_be_resumed_with_what_its_start_has_settled():
    run = Recipe(head_only=True, views=3, precision="fp32", lr=0.1)
    for name, value in SETTLED.items():
        assert resumed_recipe(run, {name: value}) == run
    assert resumed_recipe(run, {"views": "none", "workers": 2}).views == 3
    with pytest.raises(ValueError, match="views = 0, but the run has 3"):
        resumed_recipe(run, {"views": 0})


def test_large_numbers_in_words_stay_exact():
    assert load_recipe(changes={"seed": "9007199254740993"}).seed == 9007199254740993


def test_the_learning_rate_follows_the_batch_unless_it_is_given():
    assert Recipe().peak_lr(2048) == pytest.approx(0.002)
    assert Recipe(lr_base=0.1, lr_base_size=100).peak_lr(50) == pytest.approx(0.05)
    assert Recipe(lr=0.3).peak_lr(2048) == 0.3


@pytest.mark.parametrize("name", RECIPES)
def test_every_packaged_recipe_states_what_to_expect(name):
    load_recipe(name)
    header = [line for line in RECIPES[name].read_text().splitlines() if line.startswith("#")]
    assert len(header[0]) <= 80  # a line of `cvt recipes`
    assert header[0].endswith(".")
    for word in ("command", "hardware", "time", "metric"):
        assert any(line.split()[1:2] == [word] for line in header), word
    assert f"--config {name}\n" in "\n".join(header)


def test_a_packaged_recipe_is_found_by_name_and_a_file_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()  # the folder of the photos
    packaged = RECIPES["photos"]
    for name in ("photos", "photos.yaml", Path("photos")):
        assert find_recipe(name) == packaged_recipe(name) == packaged
    Path("photos.yaml").write_text("epochs: 7\n")
    Path("sub").mkdir()
    Path("sub/digits").write_text("epochs: 8\n")
    assert load_recipe("photos").epochs == load_recipe("photos.yaml").epochs == 7
    assert load_recipe("sub/digits").epochs == 8
    assert packaged_recipe("photos") == packaged


@pytest.mark.parametrize(
    ("name", "hint"),
    [("photo", "photos"), ("recipes/digits.yaml", "digits"), ("zzz", None), ("", None)],
)
def test_an_unknown_recipe_is_an_error_that_lists_the_packaged(tmp_path, monkeypatch, name, hint):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as raised:
        load_recipe(name)
    listed = f"no packaged recipe is called {name}; there are {', '.join(RECIPES)}"
    assert str(raised.value) == (
        f"there is no file {name}, and {listed}" + (f"; is it {hint}?" if hint else "")
    )


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_authors_experiments_have_the_papers_settings(name):
    recipe = load_recipe(name)
    small = "13" in name
    assert recipe.peak_lr(2048) == pytest.approx(0.002)
    assert recipe.batch_size * recipe.accumulate * 8 == 2048
    assert recipe.weight_decay == (0.05 if small else 0.1)
    assert recipe.image_size == int(name[-3:])
    schedule = (recipe.epochs, recipe.warmup_epochs, recipe.warmup_lr, recipe.min_lr)
    assert schedule == (300, 5, 1e-6, 1e-5)
    assert (recipe.mixup, recipe.cutmix, recipe.label_smoothing) == (0.8, 1.0, 0.1)
    assert recipe.auto_augment == (None if name == "cvt-21-224x224" else "rand-m9-mstd0.5-inc1")


def test_a_resolved_recipe_is_a_recipe_again(tmp_path):
    recipe = load_recipe("cvt-w24-384x384", {"seed": 3})
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(dataclasses.asdict(recipe)))
    assert load_recipe(tmp_path / "args.yaml") == recipe


def test_every_setting_is_described():
    assert all(spec.metadata["help"].endswith(".") for spec in FIELDS.values())


# ------------------------------------------------------------------------------ architecture


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        (None, {}),
        ("stride_kv=1", {"stride_kv": [1, 1, 1]}),
        ("patch_sizes=4,2,2  mlp_ratio=2.5", {"patch_sizes": [4, 2, 2], "mlp_ratio": [2.5] * 3}),
        ("qkv_bias=true,False,true", {"qkv_bias": [True, False, True]}),
        (
            "position_embedding=learned,none,none hidden_act=gelu",
            {"position_embedding": ["learned", "none", "none"], "hidden_act": "gelu"},
        ),
        ("image_size=64,32 num_channels=1", {"image_size": [64, 32], "num_channels": 1}),
    ],
)
def test_an_architecture_is_fields_and_their_values(text, changes):
    assert Recipe(architecture=text).config_changes(3) == changes
    CvtConfig(**{"image_size": 64, **changes})


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("stride=1", "a configuration has no field stride; is it stride_"),
        ("zzz=1", "a configuration has no field zzz$"),
        ("stride_kv", "stride_kv is given without a value"),
        ("stride_kv=1 stride_kv=2", "stride_kv is given twice"),
    ],
)
def test_what_is_no_architecture_is_refused(text, fault):
    with pytest.raises(ValueError, match=f"^architecture = {text}: {fault}"):
        Recipe(architecture=text)
