"""Published checkpoints: the table, the names, and the download path against a hub on this machine.

The hub library reads its settings when it is imported, so each situation is a process of its own.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.hub_server import HubServer
from helpers.small_models import images, make, tiny

from cvt import CvtBackbone, CvtConfig, CvtForImageClassification, CvtModel, hub
from cvt.architecture import VARIANTS
from cvt.hub import PUBLISHED

CLASSES = ("CvtConfig", "CvtModel", "CvtForImageClassification")
FOLDER = "models--microsoft--cvt-13"  # in the hub library's cache

# Starts every process; `answer` is printed at its end.
PRELUDE = """
import json, time
from pathlib import Path
pauses = []
time.sleep = pauses.append  # between the hub library's attempts: noted instead of slept
import huggingface_hub, torch, transformers
import cvt

torch.set_num_threads(1)
pixels = torch.arange(1.0, 1 + 2 * 3 * 32 * 32).sin().reshape(2, 3, 32, 32)
answer = {}

def logits(model):
    with torch.inference_mode():
        return model(pixels).logits.tolist()

def failures(name, **kwargs):
    found = {}
    for kind in ("CvtConfig", "CvtModel", "CvtForImageClassification"):
        pauses.clear()
        try:
            getattr(cvt, kind).from_pretrained(name, **kwargs)
        except OSError as error:
            found[kind] = {"message": str(error), "pauses": sum(pauses)}
    return found
"""

LOADS = """
for name in names:
    config = cvt.CvtConfig.from_pretrained(name)
    model = cvt.CvtForImageClassification.from_pretrained(name)
    features = cvt.CvtModel.from_pretrained(name)
    answer[name] = {
        "activations": [part.hidden_act for part in (config, model.config, features.config)],
        "layer_norm_eps": [part.layer_norm_eps for part in (config, model.config, features.config)],
        "label": [config.id2label[4], model.config.id2label[4]],
        "class token": features(pixels).cls_token_value.tolist(),
        "logits": logits(model),
        "gelu": logits(cvt.CvtForImageClassification.from_pretrained(name, hidden_act="gelu")),
    }
answer["of a user"] = cvt.CvtConfig.from_pretrained("someone/cvt-13").hidden_act
cvt.register_auto_classes()
model = transformers.AutoModelForImageClassification.from_pretrained("microsoft/cvt-13")
answer["auto"] = [type(model).__module__, logits(model)]
"""

OUT_OF_REACH = """
answer["empty"] = failures("cvt-13", cache_dir=caches["empty"])
answer["half"] = failures("microsoft/cvt-13", cache_dir=caches["half"])
pauses.clear()
model = cvt.CvtForImageClassification.from_pretrained("cvt-13", cache_dir=caches["full"])
answer["pauses"] = sum(pauses)
answer["logits"] = logits(model)
"""

FAULTS = """
answer["no repository"] = failures("cvt-21")
answer["no revision"] = failures("cvt-13", revision="v2")
answer["overloaded"] = failures("cvt-13-384")
answer["broken off"] = failures("cvt-13")
cache = Path(huggingface_hub.constants.HF_HUB_CACHE, "models--microsoft--cvt-13")
answer["kept"] = sorted({path.name for path in cache.glob("snapshots/*/*")})
answer["incomplete"] = [path.name for path in cache.rglob("*.incomplete")]
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 1000  # bytes: these weights are small
answer["logits"] = logits(cvt.CvtForImageClassification.from_pretrained("cvt-13"))
"""


def process(command: list[str], home: Path, endpoint: str, **variables: str) -> str:
    """What `command` prints, in an environment where nothing but these hub settings counts."""
    dropped = ("HF_", "HUGGING", "TRANSFORMERS_")
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(dropped) and not name.lower().endswith("_proxy")
    }
    settings = {
        "HF_HOME": str(home),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DISABLE_SAFETENSORS_CONVERSION": "1",  # would call a third host
    }
    home.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, *command],
        env={**inherited, **settings, **variables},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(script: str, home: Path, endpoint: str, **variables: str) -> dict[str, Any]:
    code = f"{PRELUDE}{script}\nprint(json.dumps(answer))"
    return json.loads(process(["-c", code], home, endpoint, **variables).splitlines()[-1])


def assert_equal(found: list, expected: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-5)


def assert_one_sentence(failure: dict[str, Any], cache: Path, reason: str, hub_id: str) -> None:
    message = failure["message"]
    assert message.startswith(f"{hub_id} is not on this machine and could not be downloaded")
    assert message.count("is not on this machine") == message.count(reason) == 1, message
    assert f"`hf download {hub_id}`" in message
    assert "--local-dir" not in message  # a bare folder would have lost its QuickGELU
    assert str(cache) in message
    assert "\n" not in message


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small CvT as transformers leaves it on the hub, by the file its weights are in."""
    labels = ["cat", "dog", "fox", "owl", "yak"]
    config = transformers.CvtConfig(
        embed_dim=[8, 12, 16],
        num_heads=[1, 2, 4],
        depth=[1, 2, 3],
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    torch.manual_seed(0)
    model = transformers.CvtForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    preprocessing = {
        "crop_pct": 0.875,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "ConvNextFeatureExtractor",
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
        "size": 224,
    }
    top = tmp_path_factory.mktemp("hub")
    folders = {name: top / name for name in ("model.safetensors", "pytorch_model.bin")}
    model.save_pretrained(folders["model.safetensors"])
    folders["pytorch_model.bin"].mkdir()
    torch.save(model.state_dict(), folders["pytorch_model.bin"] / "pytorch_model.bin")
    config.architectures = ["CvtForImageClassification"]
    config.save_pretrained(folders["pytorch_model.bin"])
    for folder in folders.values():
        assert "hidden_act" not in json.loads((folder / "config.json").read_text())
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return folders


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[str, torch.Tensor]:
    pixels = torch.arange(1.0, 1 + 2 * 3 * 32 * 32).sin().reshape(2, 3, 32, 32)
    folder = folders["model.safetensors"]
    model = CvtForImageClassification.from_pretrained(folder, hidden_act="quick_gelu")
    features = CvtModel.from_pretrained(folder, hidden_act="quick_gelu")
    theirs = transformers.CvtForImageClassification.from_pretrained(folder)
    with torch.inference_mode():
        outputs = {
            "logits": model(pixels).logits,
            "class token": features(pixels).cls_token_value,
            "gelu": theirs(pixels).logits,
        }
    assert not torch.allclose(outputs["logits"], outputs["gelu"], atol=1e-3)
    return outputs


@pytest.fixture(scope="module")
def caches(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Caches on a machine without network: empty, brought as we advise, and without the weights."""
    elsewhere, here = tmp_path_factory.mktemp("elsewhere"), tmp_path_factory.mktemp("here")
    with HubServer({"microsoft/cvt-13": folders["model.safetensors"]}) as server:
        command = ["-m", "huggingface_hub.cli.hf", "download", "microsoft/cvt-13"]
        process(command, elsewhere, server.endpoint)
    caches = {name: here / name for name in ("empty", "full", "half")}
    for name in ("full", "half"):
        shutil.copytree(elsewhere / "hub" / FOLDER, caches[name] / FOLDER, symlinks=True)
    for weights in caches["half"].glob("*/snapshots/*/model.safetensors"):
        weights.unlink()
    return caches


def test_a_published_name_downloads_once_and_loads_with_quick_gelu(folders, expected, tmp_path):
    repositories = {
        "microsoft/cvt-13": folders["model.safetensors"],
        "microsoft/cvt-21": folders["pytorch_model.bin"],
        "someone/cvt-13": folders["model.safetensors"],
    }
    names = ("cvt-13", "microsoft/cvt-13", "cvt-21", "microsoft/cvt-21")
    with HubServer(repositories) as server:
        answer = run(f"names = {names}{LOADS}", tmp_path, server.endpoint)
    for name in names:
        assert answer[name]["activations"] == ["quick_gelu"] * 3
        assert answer[name]["layer_norm_eps"] == [1e-5] * 3
        assert answer[name]["label"] == ["yak"] * 2
        for output, tensor in expected.items():
            assert_equal(answer[name][output], tensor)
    assert answer["of a user"] == "gelu"
    home, logits = answer["auto"]
    assert home == "cvt.modeling"
    assert_equal(logits, expected["logits"])
    asked = [request for request in server.requests if "/microsoft/cvt-13/resolve/" in request]
    assert len(asked) == len(set(asked))  # later loads find everything in the cache
    files = ["config.json"] * 3 + ["model.safetensors", "pytorch_model.bin"]
    assert sorted(server.downloads) == [(file, 0) for file in files]


@pytest.mark.parametrize(
    ("endpoint", "variables", "reason"),
    [
        ("closed", {"HF_HUB_OFFLINE": "1"}, "unset the `HF_HUB_OFFLINE`"),
        pytest.param("closed", {}, "refused", marks=pytest.mark.slow),
        ("silent", {"HF_HUB_ETAG_TIMEOUT": "1"}, "timed out"),
    ],
    ids=["offline mode", "closed port", "no answer"],
)
def test_without_network_a_cached_checkpoint_loads_and_another_fails_soon_with_advice(
    endpoint, variables, reason, caches, expected, tmp_path
):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if endpoint == "silent":
            listener.listen()  # and never accepts
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        paths = {name: str(path) for name, path in caches.items()}
        answer = run(f"caches = {paths}{OUT_OF_REACH}", tmp_path, address, **variables)
    assert list(answer["empty"]) == list(CLASSES)
    assert list(answer["half"]) == list(CLASSES[1:])  # it has the configuration
    for cache in ("empty", "half"):
        for failure in answer[cache].values():
            assert_one_sentence(failure, caches[cache], reason, "microsoft/cvt-13")
            assert address in failure["message"]
            assert failure["pauses"] < 10  # seconds; transformers alone waits 23 for each file
    assert answer["pauses"] < 10
    assert_equal(answer["logits"], expected["logits"])


@pytest.fixture(scope="module")
def faults(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], HubServer, Path]:
    """What came of the script `FAULTS`, the server it met and its cache."""
    home = tmp_path_factory.mktemp("faults")
    folder = folders["model.safetensors"]
    with HubServer({"microsoft/cvt-13": folder, "microsoft/cvt-13-384": folder}) as server:
        server.overloaded.add("microsoft/cvt-13-384")
        server.downloads_to_break = 13  # six attempts for each of two models, and one more
        return run(FAULTS, home, server.endpoint), server, home / "hub"


@pytest.mark.parametrize(
    ("fault", "hub_id", "reason"),
    [
        ("overloaded", "microsoft/cvt-13-384", "'503 Service Unavailable'"),
        ("broken off", "microsoft/cvt-13", "closed connection"),
    ],
)
def test_a_failed_download_is_reported_in_one_sentence(fault, hub_id, reason, faults):
    answer, _, cache = faults
    kinds = CLASSES[1:] if fault == "broken off" else CLASSES  # the configuration came whole
    assert list(answer[fault]) == list(kinds)
    for failure in answer[fault].values():
        assert_one_sentence(failure, cache, reason, hub_id)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            "no repository",
            "no model microsoft/cvt-21: there is no such folder here, and {} does not ",
        ),
        ("no revision", "{} has no revision v2"),
    ],
)
def test_what_the_hub_does_not_have_is_named(fault, message, faults):
    answer, server, _ = faults
    place = f"{server.endpoint}/microsoft/{'cvt-13' if fault == 'no revision' else 'cvt-21'}"
    assert list(answer[fault]) == list(CLASSES)
    for failure in answer[fault].values():
        assert failure["message"].startswith(message.format(place))
        assert "\n" not in failure["message"]


def test_a_download_that_breaks_off_leaves_nothing_behind_and_the_next_one_resumes(
    faults, expected
):
    answer, server, _ = faults
    assert answer["kept"] == ["config.json"]
    assert answer["incomplete"] == []
    assert_equal(answer["logits"], expected["logits"])
    starts = [first for file, first in server.downloads if file == "model.safetensors"]
    assert starts[:13] == [0] * 13
    assert len(starts) == 14
    assert starts[13] > 0


@pytest.mark.parametrize(
    ("name", "authors_file", "variant", "image_size", "pretraining", "top1"),
    [
        ("cvt-13", "CvT-13-224x224-IN-1k.pth", "cvt-13", 224, "ImageNet-1k", 81.6),
        ("cvt-13-384", "CvT-13-384x384-IN-1k.pth", "cvt-13", 384, "ImageNet-1k", 83.0),
        ("cvt-13-384-22k", "CvT-13-384x384-IN-22k.pth", "cvt-13", 384, "ImageNet-22k", 83.3),
        ("cvt-21", "CvT-21-224x224-IN-1k.pth", "cvt-21", 224, "ImageNet-1k", 82.5),
        ("cvt-21-384", "CvT-21-384x384-IN-1k.pth", "cvt-21", 384, "ImageNet-1k", 83.3),
        ("cvt-21-384-22k", "CvT-21-384x384-IN-22k.pth", "cvt-21", 384, "ImageNet-22k", 84.9),
        ("cvt-w24-384-22k", "CvT-w24-384x384-IN-22k.pth", "cvt-w24", 384, "ImageNet-22k", 87.7),
    ],
)
def test_a_published_checkpoint_is_found_by_both_names_and_is_as_published(
    name, authors_file, variant, image_size, pretraining, top1
):
    checkpoint = hub.published(name)
    assert checkpoint is hub.published(f"microsoft/{name}") is PUBLISHED[name]
    assert (checkpoint.name, checkpoint.hub_id) == (name, f"microsoft/{name}")
    assert checkpoint.authors_file == authors_file
    assert checkpoint.variant == variant
    assert checkpoint.image_size == image_size
    assert checkpoint.pretraining == pretraining
    assert checkpoint.top1 == top1


def test_nothing_else_is_published():
    assert len(PUBLISHED) == 7
    variants = {checkpoint.variant for checkpoint in PUBLISHED.values()}
    assert variants == VARIANTS.keys() - {"cvt-7", "cvt-digits"}
    for name in ("cvt-w24", "CvT-13", "someone/cvt-13", "microsoft/cvt-12", "", Path("cvt")):
        assert hub.published(name) is None


def test_a_folder_comes_before_a_published_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("cvt-13").touch()
    assert hub.published("cvt-13")
    Path("microsoft/cvt-21").mkdir(parents=True)
    Path("cvt-21").mkdir()
    assert hub.published("cvt-21") is hub.published("microsoft/cvt-21") is None


@pytest.mark.parametrize("cls", [CvtConfig, CvtModel, CvtBackbone])
@pytest.mark.parametrize("name", ["./nope", "nope/", "/no/such/folder", "nope.pth", "cvt-99"])
def test_a_name_that_means_no_model_is_not_asked_for(cls, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given in (name, Path(name)):
        message = rf"^no model {re.escape(str(given))}: .* none of cvt-13, "
        with pytest.raises(FileNotFoundError, match=message):
            cls.from_pretrained(given)


# ------------------------------------------------------------------------------ files of weights


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 80113104\n"


def save(model: torch.nn.Module, folder: Path, kind: str, weights: dict[str, torch.Tensor]) -> Path:
    """Save a model with these weights in one of the formats that transformers reads."""
    size = {"max_shard_size": "20KB"} if kind == "shards" else {}
    model.save_pretrained(folder, state_dict=dict(weights), **size)  # which empties it
    if kind == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("kind", ["whole", "shards", "bin"])
@pytest.mark.parametrize("cls", [CvtModel, CvtForImageClassification, CvtBackbone])
def test_weights_that_lack_only_the_counters_of_batches_load(cls, kind, tmp_path):
    model = make(tiny(depth=[1, 1, 1]), cls)
    names = [name for name in model.state_dict() if not name.endswith("num_batches_tracked")]
    weights = {name: model.state_dict()[name] for name in names}
    loaded = cls.from_pretrained(save(model, tmp_path / "a", kind, weights)).eval()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, weights[name] if name in weights else torch.tensor(0)), name
    outputs = [each(images())[0] for each in (model, loaded)]
    torch.testing.assert_close(*(o[0] if isinstance(o, tuple) else o for o in outputs))
    variance = next(name for name in names if name.endswith("running_var"))
    del weights[variance]
    with pytest.raises(ValueError, match=rf"fit {cls.__name__}.*:\n  missing \S*{variance}$"):
        cls.from_pretrained(save(model, tmp_path / "b", kind, weights))


@pytest.mark.parametrize("kind", ["whole", "shards", "bin"])
def test_a_pointer_of_git_lfs_in_place_of_weights_is_called_one(kind, tmp_path):
    model = make(tiny(depth=[1, 1, 1]))
    folder = save(model, tmp_path / "a", kind, model.state_dict())
    file = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))[-1]
    file.write_text(POINTER)
    for cls in (CvtModel, CvtForImageClassification):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            cls.from_pretrained(folder)
        assert str(error.value) == (
            f"{file} is a git-lfs pointer, not the weights: `git lfs pull` in its repository gets "
            "it"
        )


def test_a_pointer_that_is_not_read_does_no_harm(tmp_path):
    model = make(tiny(depth=[1, 1, 1]))
    model.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_text(POINTER)
    (tmp_path / "tf_model.h5").write_text(POINTER)
    CvtForImageClassification.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a git-lfs pointer"):
        CvtForImageClassification.from_pretrained(tmp_path, use_safetensors=False)


# ------------------------------------------------------------------------------ malicious files


class Runs:
    def __reduce__(self):
        return os.system, ("exit 1",)


@pytest.mark.parametrize(
    "content",
    [
        {"weight": torch.ones(40_000), "more": Runs()},
        [torch.ones(40_000)],
        {"state_dict": {"weight": torch.ones(40_000)}},
    ],
)
def test_a_pickle_of_more_than_tensors_gets_our_sentence(tmp_path, content):
    tiny().save_pretrained(tmp_path)
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin was not read") as raised:
        CvtForImageClassification.from_pretrained(tmp_path)
    assert "weights_only" not in str(raised.value)


def test_a_config_of_more_weights_than_the_file_can_hold_is_refused_before_they_exist(tmp_path):
    make(tiny()).save_pretrained(tmp_path)
    tiny(depth=[1, 2, 900]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"parameters \(.*depth \[1, 2, 900\].* do not fit"):
        CvtForImageClassification.from_pretrained(tmp_path)
    tiny(num_labels=20_000).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"parameters \(.*num_labels 20000\).* do not fit"):
        CvtForImageClassification.from_pretrained(tmp_path)
    assert CvtForImageClassification.from_pretrained(tmp_path, num_labels=3).num_labels == 3
