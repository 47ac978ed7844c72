"""Folders that carry this package's code: transformers without the package gets the right model."""

import ast
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers.hub_server import HubServer
from helpers.small_models import images, make, mixed, tiny
from helpers.without_cvt import run_without_cvt
from PIL import Image
from safetensors.torch import load_file, save_file

import cvt
from cvt import CvtBackbone, CvtConfig, CvtForImageClassification, CvtModel
from cvt.architecture import PER_STAGE
from cvt.checkpoints import convert, load_classifier
from cvt.checkpoints.plain import read_plain
from cvt.checkpoints.source import model_source
from cvt.data.class_names import imagenet_classes
from cvt.files import sha256
from cvt.model_code import AUTO_MAP, code_files

SOURCES = Path(cvt.__file__).parent
STOCK = Path(__file__).parent / "helpers/stock_transformers.py"
MODULES = [
    "architecture.py", "configuration.py", "files.py", "hub.py", "losses.py", "model_code.py",
    "modeling.py", "problem_type.py", "strict_loading.py", "text.py", "views.py",
]  # fmt: skip
# Projections, positions, class tokens and numbers of blocks that transformers' own class lacks.
MIXED = mixed(
    hidden_act="quick_gelu", position_embedding=["learned", "none", "learned"], image_size=40
)
# Other interpreters to try, with transformers and without this package, separated as in PATH.
PYTHONS = [sys.executable, *filter(None, os.environ.get("CVT_STOCK_PYTHON", "").split(os.pathsep))]


def save(model, folder, **options):
    model.save_pretrained(folder, **options)
    cvt.image_processor(model.config, 40).save_pretrained(folder)
    return folder


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.fixture
def model():
    return make(tiny(hidden_act="quick_gelu"))


@pytest.fixture
def folder(model, tmp_path):
    return save(model, tmp_path / "model", with_code=True)


# ------------------------------------------------------------------------------ the files


def test_the_code_is_ours_unchanged(folder):
    carried = {path.name: sha256(path) for path in folder.glob("*.py")}
    assert carried == {name: sha256(SOURCES / name) for name in MODULES}


def test_the_code_is_all_that_the_model_imports_of_ours():
    """Found by Python's own parser; transformers finds it by its regular expressions."""
    found, left = set(), {"modeling"}
    while left:
        name = left.pop()
        found.add(f"{name}.py")
        for node in ast.walk(ast.parse((SOURCES / f"{name}.py").read_text("utf-8"))):
            if isinstance(node, ast.Import):
                assert all(alias.name.partition(".")[0] != "cvt" for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert str(node.module).partition(".")[0] != "cvt" or node.level, ast.unparse(node)
                if node.level:
                    assert node.level == 1
                    assert node.module, ast.unparse(node)  # transformers overlooks `from . import`
                    left |= {node.module} - {path[:-3] for path in found}
    assert sorted(found) == sorted(code_files()) == MODULES


def test_the_config_names_the_classes_and_the_model_is_as_it_was(model, folder, tmp_path):
    assert config_of(folder)["auto_map"] == AUTO_MAP
    assert not hasattr(model.config, "auto_map")
    assert "auto_map" not in config_of(save(model, tmp_path / "other"))
    for cls in (CvtModel, CvtBackbone):
        save(make(tiny(), cls), tmp_path / cls.__name__, with_code=True)
        assert config_of(tmp_path / cls.__name__)["auto_map"] == AUTO_MAP


def test_files_of_others_are_left_and_older_code_is_replaced(model, folder, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/text.py").write_text("mine")
    with pytest.raises(FileExistsError, match=r"theirs has files of other content, text\.py; noth"):
        save(model, tmp_path / "theirs", with_code=True)
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["text.py"]
    (folder / "text.py").write_text("of an older version")
    save(model, folder, with_code=True)
    assert sha256(folder / "text.py") == sha256(SOURCES / "text.py")


def test_what_would_leave_the_code_out_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"with_code: push_to_hub leaves it out; `cvt push --with"):
        save(model, tmp_path / "new", with_code=True, push_to_hub=True)
    save(model, tmp_path / "rank1", with_code=True, is_main_process=False)
    assert not [*(tmp_path / "rank1").glob("*.py")]


# ------------------------------------------------------------------------------ opened by ours


ROUTES = {
    "the class": CvtForImageClassification.from_pretrained,
    "told to trust": lambda folder: CvtForImageClassification.from_pretrained(
        folder, trust_remote_code=True
    ),
    "commands": load_classifier,
}


@pytest.mark.parametrize("route", ROUTES)
def test_our_loaders_run_nothing_in_the_folder(model, folder, tmp_path, monkeypatch, route):
    monkeypatch.chdir(folder)  # where an import by name would find it first
    for path in folder.glob("*.py"):
        path.write_text("raise SystemExit('the code of the folder ran')")
    opened = ROUTES[route](folder).eval()
    assert type(opened) is CvtForImageClassification
    assert torch.equal(opened(images()).logits, model(images()).logits)
    assert not hasattr(opened.config, "auto_map")
    config, _ = read_plain(model_source(folder))
    assert config.hidden_act == "quick_gelu"
    convert(folder, tmp_path / "converted")
    assert "auto_map" not in config_of(tmp_path / "converted")


# ------------------------------------------------------------------------------ without ours


@pytest.fixture(scope="module", params=PYTHONS)
def stock(request, tmp_path_factory):
    """What a Python without this package found, and the folder with all of it."""
    work = tmp_path_factory.mktemp("stock")
    model = make(tiny(hidden_act="quick_gelu"))
    save(model, work / "model", with_code=True)
    save(make(MIXED), work / "mixed", with_code=True)
    shutil.copytree(work / "model", work / "lacking")
    weights = load_file(work / "lacking/model.safetensors")
    del weights["layernorm.bias"]
    save_file(weights, work / "lacking/model.safetensors", {"format": "pt"})
    save_file({"pixels": images()}, work / "pixels.safetensors")
    noise = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(work / "picture.png")
    with HubServer({"someone/model": work / "model"}) as server:
        online = {"HF_ENDPOINT": server.endpoint, "HF_HUB_OFFLINE": "0"}
        run_without_cvt(STOCK, work, home=work / "home", python=request.param, **online)
    return (
        work,
        model,
        load_file(work / "found.safetensors"),
        json.loads((work / "found.json").read_text()),
    )


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_transformers_without_this_package_gives_our_logits(stock):
    _, model, found, about = stock
    assert about["ours"] == []
    assert [name.split(".")[0] for name in about["modules"]] == ["transformers_modules"] * 2
    assert about["activation"] == "quick_gelu"
    assert about["is_one"]
    expected = model(images())
    close(found["model"], expected.logits)
    close(found["hub"], expected.logits)
    close(found["features"], model.cvt(images()).last_hidden_state)
    assert (found["stock"] - expected.logits).abs().max() > 1e-3  # its own class: another model
    scores = model(found["seen"]).logits[0].softmax(0)
    assert about["scores"] == pytest.approx(
        {name: scores[i].item() for i, name in model.config.id2label.items()}, abs=1e-5
    )


def test_it_is_strict_there_too(stock):
    assert "do not fit CvtForImageClassification" in stock[-1]["refusal"]
    assert "missing layernorm.bias" in stock[-1]["refusal"]


@torch.no_grad()
@pytest.mark.parametrize("name", ["again", "third"])
def test_what_it_saves_there_carries_the_code_on_and_opens_here(stock, name):
    work, _, found, _ = stock
    close(found[name], found["trained"])
    assert {path.name: sha256(path) for path in (work / name).glob("*.py")} == {
        module: sha256(SOURCES / module) for module in MODULES
    }
    opened = load_classifier(work / name).eval()
    assert opened.config.hidden_act == "quick_gelu"
    close(opened(images()).logits, found["trained"])


@torch.no_grad()
def test_stages_that_transformers_lacks_are_computed_there(stock):
    close(stock[2]["mixed"], make(MIXED)(images()).logits)


# ------------------------------------------------------------------------------ which activation


def save_stock_config(folder, **fields):
    """What transformers' own CvtConfig writes, for small stages."""
    small = {name: getattr(tiny(), name) for name in PER_STAGE}
    transformers.CvtConfig(**small, **fields).save_pretrained(folder)


def test_our_config_is_marked_as_ours(tmp_path):
    tiny().save_pretrained(tmp_path)
    saved = config_of(tmp_path)
    assert saved["library_name"] == "cvt-vision"
    assert "transformers_version" not in saved
    assert not hasattr(CvtConfig.from_pretrained(tmp_path), "library_name")


def test_what_transformers_trained_is_gelu(tmp_path):
    save_stock_config(tmp_path, num_labels=7)
    assert "transformers_version" in config_of(tmp_path)
    config = CvtConfig.from_pretrained(tmp_path)
    assert (config.hidden_act, config.layer_norm_eps) == ("gelu", 1e-5)


def saved_again_by_transformers(folder):
    tiny(hidden_act="quick_gelu", layer_norm_eps=1e-3).save_pretrained(folder)
    transformers.CvtConfig.from_pretrained(folder).save_pretrained(folder)


def like_the_published(folder):
    names = dict(enumerate(imagenet_classes().values()))
    save_stock_config(folder, id2label=names, label2id={name: i for i, name in names.items()})


def without_marks(folder):
    tiny().save_pretrained(folder)
    saved = config_of(folder)
    del saved["hidden_act"]
    (folder / "config.json").write_text(json.dumps(saved))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (saved_again_by_transformers, "has saved a model of quick_gelu; where it trained the"),
        (like_the_published, "its classes are ImageNet's, as those of the published checkpoints"),
        (without_marks, "neither hidden_act nor transformers_version is in the configuration"),
    ],
)
def test_what_cannot_be_told_is_asked_for(cvt, tmp_path, write, message):
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder)
    with pytest.raises(ValueError, match=f"hidden_act is unknown: .*{message}.*--hidden-act gelu"):
        CvtConfig.from_pretrained(folder)
    model = CvtForImageClassification(CvtConfig.from_pretrained(folder, hidden_act="gelu"))
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    code, _, err = cvt("info", folder)
    assert code == 1
    assert "hidden_act is unknown" in " ".join(err.split())
    for activation in ("gelu", "quick_gelu"):
        loaded = CvtForImageClassification.from_pretrained(folder, hidden_act=activation)
        assert loaded.config.hidden_act == activation
        is_kept = write is saved_again_by_transformers and activation == "quick_gelu"
        assert loaded.config.layer_norm_eps == (1e-3 if is_kept else 1e-5)


def test_the_command_that_is_named_records_it(cvt, tmp_path):
    folder = tmp_path / "model"
    save(make(tiny(hidden_act="quick_gelu")), folder)
    saved_again_by_transformers(folder)
    assert cvt("convert", folder, tmp_path / "new")[0] == 1
    code, _, err = cvt("convert", folder, tmp_path / "new", "--hidden-act", "gelu")
    assert code == 0, err
    assert CvtConfig.from_pretrained(tmp_path / "new").hidden_act == "gelu"
