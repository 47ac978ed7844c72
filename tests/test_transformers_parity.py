"""Our model against the CvT of transformers, on everything that the latter computes rightly."""

import json
from dataclasses import fields

import pytest
import torch
from helpers.small_models import assert_equal, random_case, randomise, seeds
from transformers.models.cvt import CvtConfig as PortConfig
from transformers.models.cvt import CvtForImageClassification as PortForImageClassification
from transformers.models.cvt import CvtModel as PortModel

from cvt import CvtConfig, CvtForImageClassification, CvtModel
from cvt.architecture import VARIANTS

SEEDS = range(100)
OWN_FIELDS = {
    *("hidden_act", "image_size", "init", "out_features", "out_indices", "position_embedding"),
    "thresholds",
}


# ------------------------------------------------------------------------------ random models


def pair(config, attn_implementation="sdpa"):
    theirs = PortForImageClassification(PortConfig(**config, attn_implementation="eager"))
    ours = CvtForImageClassification(CvtConfig(**config, attn_implementation=attn_implementation))
    return theirs.eval(), ours.eval()


def equal_pair(seed, source="theirs", **changes):
    """The models of `seed` with the random weights of `source`; images and labels for them."""
    config, shape = random_case(seed)
    theirs, ours = pair(config | changes, ("sdpa", "eager")[seed % 2])
    giver, taker = (theirs, ours) if source == "theirs" else (ours, theirs)
    randomise(giver, seed)
    taker.load_state_dict(giver.state_dict(), strict=True)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return theirs, ours, images, torch.arange(len(images)) % config["num_labels"]


def several(images, labels):
    """Twice as many: BatchNorm does not train on one, and the port's gradients of one are wrong."""
    return torch.cat((images, images.square())), labels.repeat(2)


# ------------------------------------------------------------------------------ comparison


def outputs(model, images, labels):
    """All that `model` computes of `images`, by name."""
    features = model.cvt(images)
    output = model(images, labels=labels, output_hidden_states=True)
    states = {f"hidden_states[{i}]": state for i, state in enumerate(output.hidden_states)}
    return {"logits": output.logits, "loss": output.loss, **states, **features}


def outputs_and_gradients(model, images, labels):
    """The same, and the gradients of all that `model` reads.

    In double precision, where rounding leaves ten digits to compare; in single precision it is as
    large as the gradients that cancel, a key's bias for one.
    """
    model.double().zero_grad()
    images = images.double().requires_grad_()
    found = outputs(model, images, labels)
    # The hidden states take part, so that no gradient is too small to be compared.
    (
        found["loss"]
        + sum(found[name].square().sum() for name in found if name.startswith("hidden_states"))
    ).backward()
    return {
        **found,
        "gradient of pixel_values": images.grad,
        **{f"gradient of {name}": weight.grad for name, weight in model.named_parameters()},
    }


def shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


WITH_CLASS_TOKEN = next(seed for seed in SEEDS if random_case(seed)[0]["cls_token"][-1])


# ------------------------------------------------------------------------------ names and shapes


CONFIGS = {name: variant | {"num_labels": 1000} for name, variant in VARIANTS.items()} | {
    f"random {seed}": random_case(seed)[0] for seed in SEEDS[:20]
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_weights_have_the_ports_names_and_shapes(config):
    with torch.device("meta"):
        theirs, ours = pair(config)
        assert shapes(CvtModel(ours.config)) == shapes(PortModel(theirs.config))
    assert shapes(ours) == shapes(theirs)
    assert [name for name, _ in ours.named_parameters()] == [
        name for name, _ in theirs.named_parameters()
    ]


# ------------------------------------------------------------------------------ computation


@pytest.mark.parametrize("seed", seeds(30, len(SEEDS)))
def test_outputs_equal_the_ports_in_single_precision(seed):
    theirs, ours, *batch = equal_pair(seed, source="theirs")
    with torch.no_grad():
        assert_equal(outputs(ours, *batch), outputs(theirs, *batch), tolerance=1e-5)


@pytest.mark.parametrize("seed", seeds(30, len(SEEDS)))
def test_outputs_and_gradients_equal_the_ports(seed):
    theirs, ours, images, labels = equal_pair(seed, source="ours")
    batch = several(images, labels)
    expected = outputs_and_gradients(theirs, *batch)
    assert_equal(outputs_and_gradients(ours, *batch), expected, tolerance=1e-10)


@pytest.mark.parametrize("seed", seeds(30, len(SEEDS)))
def test_training_and_its_batch_statistics_equal_the_ports(seed):
    stages = len(random_case(seed)[0]["depth"])
    no_dropout = dict.fromkeys(
        ("attention_drop_rate", "drop_rate", "drop_path_rate"), [0.0] * stages
    )
    theirs, ours, images, labels = equal_pair(seed, source="ours", **no_dropout)
    batch = several(images, labels)
    expected = outputs_and_gradients(theirs.train(), *batch)
    assert_equal(outputs_and_gradients(ours.train(), *batch), expected, tolerance=1e-10)
    assert_equal(ours.state_dict(), theirs.state_dict(), tolerance=1e-10)


def test_the_random_configs_vary_in_all_that_the_port_can_vary():
    cases = [random_case(seed) for seed in SEEDS]
    assert {len(config["depth"]) for config, _ in cases} == {1, 2, 3, 4}
    assert {shape[0] for _, shape in cases} == {1, 2, 3}
    assert any(sum(config["cls_token"]) > 1 for config, _ in cases)
    assert any(not config["cls_token"][-1] for config, _ in cases)
    for name in random_case(0)[0].keys() - {"qkv_projection_method"}:
        assert len({str(config[name]) for config, _ in cases}) > 1, name


@pytest.mark.parametrize(
    ("num_labels", "problem_type", "labels"),
    [
        (1, None, [0.5, -1.0]),
        (1, None, [[0.5], [-1.0]]),
        (3, "regression", [[0.5, -1.0, 2.0], [0.0, 1.0, 3.0]]),
        (3, None, [2, 0]),
        (3, "single_label_classification", [[2], [0]]),
        (3, "single_label_classification", [2, -100]),
        (3, None, [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]),
        (3, "multi_label_classification", [[1.0, 0.0, 1.0], [0.0, 0.3, 0.0]]),
    ],
)
def test_the_loss_of_every_problem_equals_the_ports(num_labels, problem_type, labels):
    theirs, ours, images, _ = equal_pair(0, num_labels=num_labels, problem_type=problem_type)
    images, labels = torch.cat((images[:1], images[:1].square())), torch.tensor(labels)
    expected = theirs(images, labels=labels, output_hidden_states=True).loss
    torch.testing.assert_close(ours(images, labels=labels).loss, expected)


# ------------------------------------------------------------------------------ tuples


def assert_same_structure(ours, theirs):
    assert type(ours) is type(theirs)
    if isinstance(theirs, tuple):
        assert len(ours) == len(theirs)
        for mine, expected in zip(ours, theirs, strict=True):
            assert_same_structure(mine, expected)
    else:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("output_hidden_states", [None, False, True])
@pytest.mark.parametrize("setting", ["argument", "config"])
@pytest.mark.parametrize("part", ["model", "classifier", "classifier with labels"])
def test_tuples_equal_the_ports(part, setting, output_hidden_states):
    theirs, ours, images, labels = equal_pair(WITH_CLASS_TOKEN)
    arguments = {"output_hidden_states": output_hidden_states}
    if setting == "argument":
        arguments["return_dict"] = False
    else:
        theirs.config.return_dict = ours.config.return_dict = False
    if part == "classifier with labels":
        arguments["labels"] = labels
    if part == "model":
        theirs, ours = theirs.cvt, ours.cvt
    assert_same_structure(ours(images, **arguments), theirs(images, **arguments))


def test_hidden_states_asked_for_by_the_config_are_the_ports():
    theirs, ours, images, _ = equal_pair(WITH_CLASS_TOKEN, output_hidden_states=True)
    assert_same_structure(ours(images).to_tuple(), theirs(images).to_tuple())


# ------------------------------------------------------------------------------ folders


@pytest.mark.parametrize("seed", range(4))
def test_a_folder_of_ours_opens_in_the_port(tmp_path, seed):
    _, ours, images, _ = equal_pair(seed)
    ours.save_pretrained(tmp_path)
    theirs, loading = PortForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    expected = theirs.eval()(images, output_hidden_states=True).logits
    torch.testing.assert_close(ours(images).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_a_folder_of_the_ports_opens_in_ours(tmp_path, seed):
    theirs, _, images, _ = equal_pair(seed)
    theirs.save_pretrained(tmp_path)
    expected = theirs(images, output_hidden_states=True)
    logits = CvtForImageClassification.from_pretrained(tmp_path).eval()(images).logits
    features = CvtModel.from_pretrained(tmp_path).eval()(images).last_hidden_state
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(features, expected.hidden_states[-1], rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------ configs


def test_every_field_of_the_port_is_ours_with_the_same_default():
    ours, theirs = CvtConfig().to_dict(), PortConfig().to_dict()
    assert {field.name for field in fields(PortConfig)} <= {f.name for f in fields(CvtConfig)}
    assert ours.pop("layer_norm_eps") == 1e-5
    assert theirs.pop("layer_norm_eps") == 1e-12
    assert {name: ours[name] for name in theirs} == theirs
    assert ours.keys() - theirs.keys() == OWN_FIELDS


READERS = {
    "from_pretrained": lambda folder: CvtConfig.from_pretrained(folder),
    "from_json_file": lambda folder: CvtConfig.from_json_file(folder / "config.json"),
    "from_dict": lambda folder: CvtConfig.from_dict(
        json.loads((folder / "config.json").read_text())
    ),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_stock_config_is_read_as_the_port_computes(tmp_path, read):
    PortConfig().save_pretrained(tmp_path)
    stock = json.loads((tmp_path / "config.json").read_text())
    assert stock["layer_norm_eps"] == 1e-12
    assert "hidden_act" not in stock
    config = read(tmp_path)
    assert (config.hidden_act, config.layer_norm_eps) == ("gelu", 1e-5)


@pytest.mark.parametrize("hidden_act", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_config_with_an_activation_keeps_its_own_eps(tmp_path, read, hidden_act):
    written = {"model_type": "cvt", "hidden_act": hidden_act, "layer_norm_eps": 1e-12}
    (tmp_path / "config.json").write_text(json.dumps(written))
    config = read(tmp_path)
    assert (config.hidden_act, config.layer_norm_eps) == (hidden_act, 1e-12)


@pytest.mark.parametrize("reader", [CvtConfig, PortConfig])
@pytest.mark.parametrize("seed", range(4))
def test_a_config_of_ours_keeps_every_field_in_both_libraries(tmp_path, seed, reader):
    config = CvtConfig(
        **random_case(seed)[0],
        hidden_act="quick_gelu",
        init="xavier",
        initializer_range=0.5,
        layer_norm_eps=1e-6,
        out_features=["stage1"],
        problem_type="multi_label_classification",
    )
    config.save_pretrained(tmp_path / "ours")
    reader.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "again")
    # Of what transformers saved, the activation of the weights must be given.
    reloaded = CvtConfig.from_pretrained(tmp_path / "again", hidden_act="quick_gelu")
    assert reloaded.to_dict() == config.to_dict()
