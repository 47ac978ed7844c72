import json
import math
import random
import re
from dataclasses import fields

import numpy as np
import pytest
import torch
from helpers.small_models import random_case
from transformers import PreTrainedConfig

from cvt import CvtBackbone, CvtConfig, CvtForImageClassification, CvtModel
from cvt.architecture import VARIANTS, check_memory

DEFAULTS = {
    field.name: getattr(CvtConfig(), field.name)
    for field in fields(CvtConfig)
    if field.name not in {inherited.name for inherited in fields(PreTrainedConfig)}
}
PER_STAGE = [name for name, value in DEFAULTS.items() if isinstance(value, list)]

NAN, INF = math.nan, math.inf
NO_COUNT = [0, -1, True, 1.0, 2.5, "3", None, NAN, INF, [3]]
NO_PADDING = [-1, False, 0.0, "1", None, NAN, INF, [1]]
NO_RATIO = [0, -4.0, "4", None, NAN, INF, [4.0]]
NO_RATE = [-0.1, 1, 1.0, 1.5, "0.1", None, NAN, INF, [0.1]]
NO_FLAG = [2, -1, 0.5, "True", "", None, NAN, [True]]
BAD_VALUES = {
    "num_channels": NO_COUNT,
    "image_size": [*(value for value in NO_COUNT if value is not None), [4, 4, 4], [4, 0]],
    "patch_sizes": NO_COUNT,
    "patch_stride": NO_COUNT,
    "patch_padding": NO_PADDING,
    "embed_dim": NO_COUNT,
    "num_heads": NO_COUNT,
    "depth": NO_COUNT,
    "mlp_ratio": [*NO_RATIO, 0.001],
    "attention_drop_rate": NO_RATE,
    "drop_rate": NO_RATE,
    "drop_path_rate": NO_RATE,
    "qkv_bias": NO_FLAG,
    "cls_token": NO_FLAG,
    "position_embedding": ["sine", "Learned", "", True, 3, None, NAN, ["learned"]],
    "qkv_projection_method": ["conv", "DW_BN", "", 3, None, NAN, ["avg"]],
    "kernel_qkv": NO_COUNT,
    "padding_kv": NO_PADDING,
    "stride_kv": NO_COUNT,
    "padding_q": NO_PADDING,
    "stride_q": NO_COUNT,
    "hidden_act": ["relu", "GELU", "", 3, None, NAN, ["gelu"]],
    "init": ["normal", "", 3, None, NAN, ["xavier"]],
    "initializer_range": NO_RATIO,
    "layer_norm_eps": NO_RATIO,
}
MODELS = [CvtModel, CvtForImageClassification, CvtBackbone]


def save(config, folder):
    config.save_pretrained(folder)
    return folder / "config.json"


# ------------------------------------------------------------------------------ bad values


def test_every_field_has_bad_values_here():
    assert BAD_VALUES.keys() == DEFAULTS.keys() - {"thresholds"}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD_VALUES.items() for value in values]
)
def test_a_bad_value_is_named_with_its_field_and_stage(name, value):
    if name in PER_STAGE:
        values = [DEFAULTS[name][0], value, DEFAULTS[name][2]]
        message = f"stage 2: {name}[1] = {value!r}"
    else:
        values, message = value, f"{name} = {value!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        CvtConfig(**{name: values})


@pytest.mark.parametrize(
    "value", [None, 3, 0.5, True, "abc", {1, 2, 3}, {1: 2, 3: 4, 5: 6}, [], ()]
)
@pytest.mark.parametrize("name", PER_STAGE)
def test_what_is_no_list_of_a_value_per_stage_is_named(name, value):
    with pytest.raises(ValueError, match=re.escape(f"{name} = {value!r}")):
        CvtConfig(**{name: value})


@pytest.mark.parametrize("length", [1, 2, 4])
@pytest.mark.parametrize("name", PER_STAGE)
def test_a_list_of_the_wrong_length_is_named_with_its_length(name, length):
    values = (DEFAULTS[name] * 2)[:length]
    if name == "position_embedding":
        assert CvtConfig(**{name: values}).position_embedding == ["none"] * 3  # fits any number
        values = ["learned"] * length
    message = (
        rf"depth = \[.*\] lists {length} stages" if name == "depth" else rf"{name} \({length}\)"
    )
    with pytest.raises(ValueError, match=message):
        CvtConfig(**{name: values})


@pytest.mark.parametrize("value", [[0.5], [0, 1, 1.5], [0, 1, NAN], [0, 1, "x"], 0.5, {0: 0.5}])
def test_thresholds_are_a_share_for_each_class(tmp_path, value):
    with pytest.raises(ValueError, match="thresholds = "):
        CvtConfig(num_labels=3, thresholds=value)
    save(CvtConfig(num_labels=3, thresholds=[0, 0.25, 1]), tmp_path)
    assert CvtConfig.from_pretrained(tmp_path).thresholds == [0.0, 0.25, 1.0]
    assert CvtConfig.from_pretrained(tmp_path, num_labels=5).thresholds is None


def test_heads_that_do_not_divide_the_width_are_named():
    with pytest.raises(ValueError, match=r"stage 2: embed_dim\[1\] = 192 .* num_heads\[1\] = 5"):
        CvtConfig(num_heads=[1, 5, 6])


def test_padding_that_average_pooling_refuses_is_named():
    paddings = {"padding_kv": [1, 2, 1], "kernel_qkv": [3, 3, 3]}
    assert CvtConfig(**paddings).padding_kv == [1, 2, 1]
    with pytest.raises(ValueError, match=r"stage 2: padding_kv\[1\] = 2 .* kernel_qkv\[1\] = 3"):
        CvtConfig(**paddings, qkv_projection_method=["dw_bn", "avg", "dw_bn"])


@pytest.mark.parametrize("model", MODELS)
def test_models_check_fields_set_later_before_they_allocate(model):
    config = CvtConfig()
    config.embed_dim = [2**19, 2**19, 2**19]  # would need terabytes
    config.num_heads = [1, 1, 3]
    with pytest.raises(ValueError, match=r"stage 3: embed_dim\[2\]"):
        model(config)


READERS = {
    "from_dict": lambda folder, **changes: CvtConfig.from_dict(CvtConfig().to_dict(), **changes),
    "from_pretrained": CvtConfig.from_pretrained,
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": [1, 0, 1]}, r"stage 2: depth\[1\] = 0"),
        ({"depth": [1, 1]}, r"depth = \[1, 1\] lists 2 stages"),
        ({"mlp_ratio": ["4", 4, 4]}, r"stage 1: mlp_ratio\[0\] = '4'"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ({"num_heads": [1, 3, 5]}, r"num_heads\[2\] = 5"),
        ({"out_features": ["stage4"]}, "out_features"),
    ],
)
def test_overrides_are_checked_while_reading(tmp_path, read, changes, message):
    save(CvtConfig(), tmp_path)
    with pytest.raises(ValueError, match=message):
        read(tmp_path, **changes)


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_overrides_are_brought_to_their_type_while_reading(tmp_path, read):
    save(CvtConfig(), tmp_path)
    config = read(tmp_path, depth=(1, 1, 1), mlp_ratio=[2, 2, 2], cls_token=[0, 0, 0])
    assert config.to_dict() == read(tmp_path).to_dict() | {
        "depth": [1, 1, 1],
        "mlp_ratio": [2.0, 2.0, 2.0],
        "cls_token": [False, False, False],
    }
    assert [type(value) for value in (config.mlp_ratio[0], config.cls_token[0])] == [float, bool]


# ------------------------------------------------------------------------------ accepted types


@pytest.mark.parametrize("container", [list, tuple])
@pytest.mark.parametrize("integer", [int, np.int64, np.uint8])
def test_integers_stand_for_integers_floats_and_flags(integer, container):
    given = {
        "num_channels": 3,
        "depth": [1, 2, 10],
        "padding_q": [1, 0, 1],
        "mlp_ratio": [4, 4, 4],
        "drop_path_rate": [0, 0, 0],
        "cls_token": [0, 0, 1],
        "initializer_range": 1,
    }
    config = CvtConfig(
        **{
            name: container(map(integer, value)) if name in PER_STAGE else integer(value)
            for name, value in given.items()
        }
    )
    for name, value in given.items():
        found = getattr(config, name)
        assert found == value
        assert type(found) is type(DEFAULTS[name])
        if name in PER_STAGE:
            assert {type(element) for element in found} == {type(DEFAULTS[name][0])}
    assert json.loads(config.to_json_string())["cls_token"] == [False, False, True]


def test_numpy_floats_and_flags_come_out_as_pythons():
    config = CvtConfig(
        mlp_ratio=[np.float32(2.5)] * 3, qkv_bias=[np.False_] * 3, layer_norm_eps=np.float64(1e-6)
    )
    text = json.loads(config.to_json_string())
    assert text["mlp_ratio"] == [2.5] * 3
    assert text["qkv_bias"] == [False] * 3
    assert text["layer_norm_eps"] == 1e-6


# ------------------------------------------------------------------------------ round trips


CONFIGS = {
    "default": {},
    "variant": {"hidden_act": "quick_gelu", "num_labels": 1000, **VARIANTS["cvt-w24"]},
    "labels": {
        "id2label": {0: "cat", 1: "dog", 2: "owl"},
        "label2id": {"cat": 0, "dog": 1, "owl": 2},
    },
    "others": {
        "init": "xavier",
        "layer_norm_eps": 1e-6,
        "initializer_range": 1,
        "depth": (1, 1, 1),
    },
    "two maps": {"out_features": ["stage1", "stage3"]},
    "task": {"problem_type": "regression", "num_labels": 1, "output_hidden_states": True},
}


@pytest.mark.parametrize("values", CONFIGS.values(), ids=CONFIGS)
def test_a_config_survives_its_file_unchanged(tmp_path, values):
    config = CvtConfig(**values)
    text = save(config, tmp_path / "first").read_text()
    assert text == config.to_json_string()
    reloaded = CvtConfig.from_pretrained(tmp_path / "first")
    path = save(reloaded, tmp_path / "second")
    assert path.read_text() == text
    for again in (reloaded, CvtConfig.from_json_file(path), CvtConfig.from_dict(json.loads(text))):
        assert again.to_dict() == config.to_dict()


def test_what_is_not_set_is_not_in_the_file():
    assert None not in json.loads(CvtConfig().to_json_string()).values()
    set_ = CvtConfig(problem_type="multi_label_classification", thresholds=[0.5, 0.1])
    assert json.loads(set_.to_json_string())["thresholds"] == [0.5, 0.1]


def test_another_number_of_classes_takes_no_names_and_no_thresholds(tmp_path, monkeypatch):
    task = {"problem_type": "multi_label_classification", "thresholds": [0.1, 0.2, 0.3]}
    CvtConfig(id2label={0: "cat", 1: "dog", 2: "owl"}, **task).save_pretrained(tmp_path)
    warnings = []
    monkeypatch.setattr("transformers.configuration_utils.logger.warning", warnings.append)
    config = CvtConfig.from_pretrained(tmp_path, num_labels=2)
    assert (config.class_names, config.thresholds) == (["LABEL_0", "LABEL_1"], None)
    assert warnings == []
    same = CvtConfig.from_pretrained(tmp_path, num_labels=3)
    assert (same.class_names, same.thresholds) == (["cat", "dog", "owl"], [0.1, 0.2, 0.3])


def test_reading_leaves_the_given_dictionary_alone():
    given = {"model_type": "cvt", "layer_norm_eps": 1e-12, "depth": [1, 1, 1]}
    before = json.dumps(given)
    CvtConfig.from_dict(given, num_labels=5, depth=[2, 2, 2])
    assert json.dumps(given) == before


# ------------------------------------------------------------------------------ variants


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("cvt-13", 19_997_480),
        ("cvt-21", 31_622_696),
        ("cvt-w24", 277_196_392),
        ("cvt-7", 2_473_672),
        ("cvt-digits", 1_152_552),
    ],
)
def test_variants_have_their_size(name, parameters):
    config = CvtConfig.from_variant(name)
    assert (config.hidden_act, config.num_labels) == ("quick_gelu", 1000)
    with torch.device("meta"):
        model = CvtForImageClassification(config)
    assert sum(weight.numel() for weight in model.parameters()) == parameters


def test_there_are_the_authors_variants_and_two_small_ones():
    assert list(VARIANTS) == ["cvt-13", "cvt-21", "cvt-w24", "cvt-7", "cvt-digits"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"num_labels": 7}, {"num_labels": 7}),
        ({"id2label": {0: "cat", 1: "dog"}}, {"num_labels": 2}),
        ({"hidden_act": "gelu"}, {"hidden_act": "gelu"}),
        ({"depth": (1, 1, 1)}, {"depth": [1, 1, 1], "embed_dim": [192, 768, 1024]}),
        ({"num_channels": 1}, {"num_channels": 1, "drop_path_rate": [0.0, 0.0, 0.3]}),
    ],
)
def test_variants_take_overrides(overrides, expected):
    config = CvtConfig.from_variant("cvt-w24", **overrides)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize("name", ["cvt-14", "CvT-13", "", "microsoft/cvt-13"])
def test_an_unknown_variant_is_named_with_those_there_are(name):
    with pytest.raises(ValueError, match=f"{name!r}.*cvt-13, cvt-21, cvt-w24"):
        CvtConfig.from_variant(name)


# ------------------------------------------------------------------------------ effects


BASE = {
    "patch_sizes": [3, 3],
    "patch_stride": [2, 1],
    "patch_padding": [1, 1],
    "embed_dim": [8, 8],
    "num_heads": [2, 2],
    "depth": [2, 2],
    "mlp_ratio": [2.0, 2.0],
    "attention_drop_rate": [0.0, 0.0],
    "drop_rate": [0.0, 0.0],
    "drop_path_rate": [0.0, 0.0],
    "qkv_bias": [True, True],
    "cls_token": [False, False],
    "position_embedding": ["none", "none"],
    "image_size": 6,
    "qkv_projection_method": ["dw_bn", "dw_bn"],
    "kernel_qkv": [3, 3],
    "padding_kv": [1, 1],
    "stride_kv": [2, 2],
    "padding_q": [1, 1],
    "stride_q": [1, 1],
    "initializer_range": 0.5,
}
# Another value (of a stage, where there is one per stage) and the first thing that it changes. Both
# stages of BASE see a grid of 3 x 3, where the queries may be 3 x 3 or a single one.
EFFECTS = {
    "num_channels": (1, "shapes"),
    "patch_sizes": (4, "shapes"),
    "patch_stride": (3, "evaluation"),
    "patch_padding": (0, "evaluation"),
    "embed_dim": (12, "shapes"),
    "num_heads": (4, "evaluation"),
    "depth": (3, "shapes"),
    "mlp_ratio": (3.0, "shapes"),
    "attention_drop_rate": (0.5, "training"),
    "drop_rate": (0.5, "training"),
    "drop_path_rate": (0.5, "training"),
    "qkv_bias": (False, "shapes"),
    "cls_token": (True, "shapes"),
    "position_embedding": ("learned", "shapes"),
    "image_size": ([6, 9], "shapes"),
    "qkv_projection_method": ("avg", "shapes"),
    "kernel_qkv": (5, "shapes"),
    "padding_kv": (0, "evaluation"),
    "stride_kv": (1, "evaluation"),
    "padding_q": (0, "evaluation"),
    "stride_q": (3, "evaluation"),
    "hidden_act": ("quick_gelu", "evaluation"),
    "init": ("xavier", "weights"),
    "initializer_range": (0.1, "weights"),
    "layer_norm_eps": (0.1, "evaluation"),
}


@torch.no_grad()
def effects(config):
    """What a config decides, one after the other, with the random numbers of a fixed seed."""
    torch.manual_seed(0)
    model = CvtForImageClassification(CvtConfig(**config)).eval()
    state = model.state_dict()
    yield "shapes", {name: tensor.shape for name, tensor in state.items()}
    yield "weights", torch.cat([tensor.flatten().double() for tensor in state.values()]).tolist()
    images = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    yield "evaluation", model(images).logits.round(decimals=4).tolist()
    torch.manual_seed(0)
    yield "training", model.train()(images).logits.round(decimals=4).tolist()


def first_difference(config, other):
    pairs = zip(effects(config), effects(other), strict=True)
    return next((name for (name, mine), (_, others) in pairs if mine != others), None)


def test_every_field_has_an_effect_here():
    assert EFFECTS.keys() == DEFAULTS.keys() - {"thresholds"}  # of predictions: test_predict.py


@pytest.mark.parametrize(
    ("name", "stage"), [(name, i) for name in EFFECTS for i in range(2 if name in PER_STAGE else 1)]
)
def test_every_field_changes_what_it_should(name, stage):
    value, expected = EFFECTS[name]
    if name in PER_STAGE:
        value = [value if i == stage else BASE[name][i] for i in range(2)]
    base = BASE | {"position_embedding": ["learned"] * 2} if name == "image_size" else BASE
    assert first_difference(base, base | {name: value}) == expected


def test_equal_configs_have_equal_effects():
    assert first_difference(BASE, BASE) is None


# ------------------------------------------------------------------------------ maps of a backbone


def test_the_last_stage_is_the_default_map():
    config = CvtConfig()
    assert config.stage_names == ["stage1", "stage2", "stage3"]
    assert (config.out_features, config.out_indices) == (["stage3"], [2])


@pytest.mark.parametrize(
    "chosen",
    [{"out_features": ["stage1", "stage3"]}, {"out_indices": [0, 2]}, {"out_indices": (0, 2)}],
)
def test_chosen_maps_survive_their_file(tmp_path, chosen):
    save(CvtConfig(**chosen), tmp_path)
    config = CvtConfig.from_pretrained(tmp_path)
    assert (config.out_features, config.out_indices) == (["stage1", "stage3"], [0, 2])


@pytest.mark.parametrize(
    "chosen",
    [
        {"out_features": ["stage4"]},
        {"out_features": ["stage0"]},
        {"out_features": ["stem"]},
        {"out_features": "stage1"},
        {"out_features": ["stage1", "stage1"]},
        {"out_features": ["stage2", "stage1"]},
        {"out_indices": [3]},
        {"out_indices": [0, 0]},
        {"out_indices": [1, 0]},
        {"out_indices": 1},
        {"out_features": ["stage1"], "out_indices": [1]},
    ],
)
def test_maps_that_there_are_not_are_refused(chosen):
    with pytest.raises(ValueError, match=r"out_features|out_indices"):
        CvtConfig(**chosen)


@pytest.mark.parametrize("saved", [{}, {"out_features": ["stage2", "stage3"]}])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_another_number_of_stages_leaves_no_stale_names(tmp_path, stages, saved):
    path = save(CvtConfig(**saved), tmp_path)
    written = json.loads(path.read_text()) | {"stage_names": ["stem", "stage1", "stage2", "stage3"]}
    path.write_text(json.dumps(written))
    changes = {name: [DEFAULTS[name][0]] * stages for name in PER_STAGE}
    config = CvtConfig.from_pretrained(tmp_path, **changes)
    assert config.stage_names == [f"stage{i + 1}" for i in range(stages)]
    assert (config.out_features, config.out_indices) == ([f"stage{stages}"], [stages - 1])
    with torch.device("meta"):
        assert CvtBackbone(config).channels == [64]


def test_another_depth_keeps_the_chosen_maps(tmp_path):
    save(CvtConfig(out_features=["stage1", "stage2"]), tmp_path)
    assert CvtConfig.from_pretrained(tmp_path, depth=[2, 2, 2]).out_indices == [0, 1]


# ------------------------------------------------------------------------------ minimum image size


def random_small_config(seed):
    """A config that needs images of at least 2 pixels; every method, padding, kernel and stride."""
    rng = random.Random(seed)
    stages = rng.randint(1, 3)
    values = {name: [] for name in PER_STAGE}
    for _ in range(stages):
        method = rng.choice(["dw_bn", "avg", "linear"])
        kernel = rng.choice([1, 3, 5]) if method == "dw_bn" else rng.randint(1, 5)
        patch = rng.randint(1, 5)
        stage = {
            "patch_sizes": patch,
            "patch_stride": rng.randint(1, 3),
            "patch_padding": rng.randint(0, patch),
            "embed_dim": 4,
            "num_heads": 2,
            "depth": 1,
            "mlp_ratio": 1.0,
            "qkv_projection_method": method,
            "kernel_qkv": kernel,
            "padding_kv": rng.randint(0, kernel // 2),
            "stride_kv": rng.randint(1, 3),
            "padding_q": kernel // 2,
            "stride_q": 1,
        }
        for name in PER_STAGE:
            values[name].append(stage.get(name, DEFAULTS[name][0]))
    config = CvtConfig(**values)
    return config if config.minimum_image_size > 1 else random_small_config(seed + 1000)


def single_query_config(kernel, padding, stride):
    """One stage without a class token, whose queries are one; it is broadcast to the tokens."""
    values = {name: DEFAULTS[name][:1] for name in PER_STAGE}
    return CvtConfig(
        **values
        | {
            "embed_dim": [4],
            "kernel_qkv": [kernel],
            "padding_q": [padding],
            "stride_q": [stride],
            "padding_kv": [kernel // 2],
        }
    )


MINIMA = {f"random {seed}": random_small_config(seed) for seed in range(100)} | {
    f"single query {case}": single_query_config(*case)
    for case in [(3, 0, 1), (3, 0, 4), (5, 1, 2), (5, 0, 1)]
}


@pytest.mark.parametrize("config", MINIMA.values(), ids=MINIMA)
@torch.no_grad()
def test_the_minimum_image_size_is_exact(config):
    least = config.minimum_image_size
    model = CvtModel(config).eval()
    states = model(torch.randn(1, 3, least, least), output_hidden_states=True).hidden_states
    assert all(state.numel() > 0 and state.isfinite().all() for state in states)
    too_small = [torch.randn(1, 3, *size) for size in ((least - 1, least), (least, least - 1))]
    for images in too_small:
        with pytest.raises(ValueError, match=f"at least {least} x {least}"):
            model(images)
    model.encoder.minimum_image_size = 0  # our own check apart, the arithmetic fails there
    for images in too_small:
        with pytest.raises(RuntimeError, match=r"(?i)size"):
            model(images)


def test_the_minima_are_limited_by_every_method():
    methods = {m for config in MINIMA.values() for m in config.qkv_projection_method}
    assert methods == {"dw_bn", "avg", "linear"}
    assert len({config.minimum_image_size for config in MINIMA.values()}) > 10


@pytest.mark.parametrize("size", [(0, 1), (1, 0)])
def test_an_image_without_pixels_is_too_small_for_any_model(size):
    values = {name: DEFAULTS[name][:1] for name in PER_STAGE}
    config = CvtConfig(**values | {"patch_sizes": [1], "patch_padding": [2], "embed_dim": [4]})
    assert config.minimum_image_size == 1
    with pytest.raises(ValueError, match="at least 1 x 1"):
        CvtModel(config)(torch.randn(1, 3, *size))


def test_a_folder_without_config_or_of_another_model_is_refused(tmp_path):
    with pytest.raises(OSError, match=r"config\.json"):
        CvtConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match=r"config\.json: .*a model of type vit, not cvt"):
        CvtConfig.from_pretrained(tmp_path)
    for content, message in (("[1]", "must be an object"), ("{", "Expecting property name")):
        (tmp_path / "config.json").write_text(content)
        for read in (CvtConfig.from_pretrained, CvtConfig.from_json_file):
            with pytest.raises(ValueError, match=rf"config\.json: {message}"):
                read(tmp_path / "config.json")
    with pytest.raises(ValueError, match="id2label"):
        CvtConfig(id2label={1: "one", 2: "two"})


def test_an_unknown_problem_is_refused():
    with pytest.raises(ValueError, match="problem_type = 'nonsense': must be one of single_label"):
        CvtConfig(problem_type="nonsense")


TWELVE = [f"class {i}" for i in range(12)]


@pytest.mark.parametrize("order", [range(12), sorted(map(str, range(12))), range(11, -1, -1)])
def test_labels_under_strings_and_in_any_order_keep_their_places(tmp_path, order):
    id2label = {str(i): TWELVE[int(i)] for i in order}
    label2id = {name: i for i, name in id2label.items()}  # as transformers' tutorial builds it
    later = CvtConfig(num_labels=12)
    later.id2label, later.label2id = id2label, label2id
    save(CvtConfig(num_labels=3), tmp_path / "three")
    for config in (
        CvtConfig(id2label=id2label, label2id=label2id),
        CvtConfig.from_dict({"id2label": id2label, "label2id": label2id}),
        CvtConfig.from_pretrained(tmp_path / "three", id2label=id2label, label2id=label2id),
        later,
    ):
        assert config.id2label == dict(enumerate(TWELVE))
        assert config.class_names == TWELVE
        assert config.label2id == {name: i for i, name in enumerate(TWELVE)}
        assert CvtConfig.from_dict(json.loads(config.to_json_string())).class_names == TWELVE
        config.validate()


def test_a_saved_config_with_sorted_strings_as_indices_opens(tmp_path):
    path = save(CvtConfig(id2label=dict(enumerate(TWELVE))), tmp_path)
    fields = json.loads(path.read_text())
    fields["id2label"] = {i: TWELVE[int(i)] for i in sorted(map(str, range(12)))}
    path.write_text(json.dumps(fields))
    assert list(json.loads(path.read_text())["id2label"])[:3] == ["0", "1", "10"]
    assert CvtConfig.from_pretrained(tmp_path).class_names == TWELVE


@pytest.mark.parametrize("labels", [{"id2label": {"ant": 0}}, {"label2id": {"ant": "bee"}}])
def test_class_indices_that_are_no_integers_are_refused(labels):
    ((name, value),) = labels.items()
    with pytest.raises(ValueError, match=f"{name} = .*class indices must be integers"):
        CvtConfig(**labels)
    with pytest.raises(ValueError, match=f"{name} = .*class indices must be integers"):
        setattr(CvtConfig(), name, value)


# ------------------------------------------------------------------------------ absurd numbers


@pytest.mark.parametrize("seed", range(20))
def test_parameters_are_counted_without_a_model(seed):
    fields, _ = random_case(seed, portable=False)
    config = CvtConfig(**fields)
    with torch.device("meta"):
        model = CvtForImageClassification(config)
    assert config.parameters == sum(weight.numel() for weight in model.parameters())


ABSURD = {
    "depth": ({"depth": [1, 2, 10**9]}, r"depth\[2\] = 1000000000: must be an integer from 1 to"),
    "blocks": ({"depth": [400, 400, 400]}, "1200 blocks in 3 stages: there may be at most 1000"),
    "stages": ({"depth": [1] * 3000}, "3000 stages: there may be at most 1000"),
    "classes": ({"num_labels": 10**9}, "num_labels = 1000000000: must be an integer from 0 to"),
    "width": ({"embed_dim": [64, 192, 4 * 10**9]}, r"embed_dim\[2\] = 4000000000: must be"),
    "padding": ({"patch_padding": [10**9, 1, 1]}, r"patch_padding\[0\] = 1000000000: must be"),
    "dtype": ({"dtype": "os.system"}, "dtype = 'os.system': must be one of float32"),
    "torch_dtype": ({"torch_dtype": "load"}, "torch_dtype = 'load': must be one of float32"),
    "names": ({"id2label": ["cat"]}, r"id2label = \['cat'\]: must be a map"),
    "kernels": ({"attn_implementation": "evil/kernel"}, "attn_implementation = 'evil/kernel'"),
    "kernels, too": ({"_attn_implementation": "a/b"}, "_attn_implementation = 'a/b'"),
    "quantised": ({"quantization_config": {"quant_method": "x"}}, "quantization_config: quantised"),
}


@pytest.mark.parametrize(("fields", "fault"), ABSURD.values(), ids=ABSURD)
def test_absurd_fields_of_a_file_are_refused_by_name(tmp_path, fields, fault):
    written = CvtConfig().to_dict() | fields
    if "num_labels" in fields:
        written = {name: value for name, value in written.items() if "2" not in name}
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match=fault) as raised:
        CvtConfig.from_pretrained(tmp_path)
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize("fields", [{"mlp_ratio": [4, 4, 1e12]}, {"embed_dim": [64, 192, 900_000]}])
def test_a_model_larger_than_the_memory_is_refused_before_it_is_built(fields):
    config = CvtConfig(**fields)
    with pytest.raises(ValueError, match=r"parameters \(.*\) take at least .* of memory"):
        CvtForImageClassification(config)


def test_many_names_are_no_absurdity():
    config = CvtConfig(id2label={i: f"class {i}" for i in range(21_841)})
    assert config.num_labels == 21_841
    check_memory(CvtConfig.from_variant("cvt-w24", num_labels=21_841))
