"""What the name of a model means, above all a name on the hub: a server on this machine."""

import shutil

import pytest
import torch
from helpers.hub_server import HubServer, commit_of, connect
from huggingface_hub import constants
from PIL import Image

import cvt
from cvt import CvtForImageClassification, hub, profile
from cvt.checkpoints import CheckpointError, ModelSource, model_source
from cvt.checkpoints.loading import load_classifier
from cvt.files import write_checksums

TORCH = ("--runtime", "torch")


@pytest.fixture(scope="module")
def repositories(model_folder, tmp_path_factory):
    """Models of a user: with files of training beside, another revision, an adapter, a pickle."""
    place = tmp_path_factory.mktemp("repositories")
    main = shutil.copytree(model_folder, place / "main")
    write_checksums(main)
    (main / "optimizer.pt").write_text("not for others")
    (main / "checkpoint-5").mkdir()
    (main / "checkpoint-5/model.safetensors").write_text("not for others")
    other = shutil.copytree(model_folder, place / "other")
    model = CvtForImageClassification.from_pretrained(other)
    with torch.no_grad():
        model.classifier.bias += torch.arange(3.0)
    model.save_pretrained(other)
    pickled = shutil.copytree(model_folder, place / "pickled")
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    return {
        "someone/colours": main,
        "someone/colours@v2": other,
        "someone/pickled": pickled,
        "someone/gated": main,
        "someone/damaged": damaged(main, place / "damaged"),
    }


def damaged(folder, copy):
    """A copy of a folder with one bit of the weights flipped."""
    shutil.copytree(folder, copy)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    return copy


@pytest.fixture
def server(repositories, monkeypatch, tmp_path):
    with HubServer(repositories) as server:
        server.gated.add("someone/gated")
        connect(monkeypatch, server, tmp_path / "cache")
        monkeypatch.chdir(tmp_path)
        yield server


@pytest.fixture
def photo(tmp_path):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (40, 50, 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def files_asked_for(server):
    """The requests for files, of which no one may be there twice, by method and address."""
    asked = [request for request in server.requests if "/resolve/" in request]
    assert len(asked) == len(set(asked)), asked
    assert not any("optimizer" in request or "checkpoint" in request for request in asked)
    return {request.rpartition("/")[2] for request in asked}


def test_a_name_of_the_hub_is_resolved_to_the_files_of_a_commit(server, repositories):
    source = model_source("someone/colours")
    commit = commit_of(repositories["someone/colours"])
    assert (source.kind, source.hub_id, source.revision) == ("folder", "someone/colours", commit)
    assert source.path.name == commit
    assert {path.name for path in source.path.iterdir()} == {
        "checksums.json", "config.json", "model.safetensors", "preprocessor_config.json",
    }  # fmt: skip
    assert model_source(source) is source
    other = model_source("someone/colours@v2")
    assert other.revision == commit_of(repositories["someone/colours@v2"]) != commit
    assert model_source(f"someone/colours@{commit}") == ModelSource(
        f"someone/colours@{commit}", "folder", source.path, "someone/colours", commit
    )
    files_asked_for(server)


def test_of_a_run_folder_the_best_model_is_taken(model_folder, cvt, photo, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(model_folder, run / "best")
    (run / "args.yaml").touch()
    assert model_source(run) == ModelSource(str(run), "folder", run / "best")
    expected = cvt("predict", *TORCH, run / "best", photo, "--json", "--workers", 0)
    assert cvt("predict", *TORCH, run, photo, "--json", "--workers", 0) == expected
    with pytest.raises(OSError, match=r"no config\.json; the best model of this run is .*best$"):
        CvtForImageClassification.from_pretrained(run)
    shutil.copytree(model_folder, run, dirs_exist_ok=True)  # a model that was saved there
    assert model_source(run).path == run


@pytest.mark.parametrize("revision", ["", "@v2"])
def test_predict_takes_a_name_of_the_hub_and_asks_for_no_file_twice(
    server, repositories, cvt, photo, revision
):
    name, local = f"someone/colours{revision}", repositories[f"someone/colours{revision}"]
    expected = cvt("predict", *TORCH, local, photo, "--json", "--workers", 0)
    for _ in range(2):
        answer = cvt("predict", *TORCH, name, photo, "--json", "--workers", 0)
        assert answer[:2] == (0, expected[1])
    assert "model.safetensors" in files_asked_for(server)


def test_the_other_verbs_take_a_name_of_the_hub_and_ask_for_no_file_twice(
    server, repositories, cvt, photo, tmp_path, monkeypatch
):
    name, local = "someone/colours@v2", repositories["someone/colours@v2"]
    images = tmp_path / "images/red"
    images.mkdir(parents=True)
    shutil.copy(photo, images)
    results = [cvt("evaluate", *TORCH, model, images.parent) for model in (name, local)]
    assert results[0][:2] == results[1][:2] == (0, results[0][1])
    monkeypatch.setattr(profile, "training_peak", lambda *_: 0)  # which takes long
    code, described, _ = cvt("info", name)
    assert (code, described.splitlines()[0]) == (0, f"{name}: 3 classes, gelu, 32 x 32 pixels")
    assert cvt("convert", name, tmp_path / "converted")[0] == 0
    converted = load_classifier(tmp_path / "converted").state_dict()
    for key, weight in load_classifier(local).state_dict().items():
        assert torch.equal(converted[key], weight)
    assert "model.safetensors" in files_asked_for(server)


def test_the_classes_take_a_name_of_the_hub_and_ask_for_no_file_twice(server, repositories, photo):
    for revision in ("", "@v2"):
        name, local = f"someone/colours{revision}", repositories[f"someone/colours{revision}"]
        opened = [cvt.Classifier(model, runtime="torch") for model in (name, local)]
        assert opened[0](photo) == opened[1](photo)
        assert opened[0].processor.image_size == 32
    assert cvt.image_processor("someone/colours").size == {"shortest_edge": 32}
    asked = files_asked_for(server)
    server.requests.clear()
    for revision in ("", "@v2"):
        name, local = f"someone/colours{revision}", repositories[f"someone/colours{revision}"]
        loaded = CvtForImageClassification.from_pretrained(name)
        bias = CvtForImageClassification.from_pretrained(local).classifier.bias
        assert torch.equal(loaded.classifier.bias, bias)
    files_asked_for(server)
    assert asked == {
        "checksums.json", "config.json", "model.safetensors", "preprocessor_config.json",
    }  # fmt: skip
    with pytest.raises(ValueError, match="someone/colours@v2 has another"):
        CvtForImageClassification.from_pretrained("someone/colours@v2", revision="v1")


def test_older_repositories_with_a_pickle_alone_are_read_as_folders_are(server):
    source = model_source("someone/pickled")
    assert (source.path / "pytorch_model.bin").is_file()
    assert load_classifier(source).config.class_names == ["blue", "green", "red"]
    files_asked_for(server)


def test_an_adapter_of_the_hub_finds_its_base_there_at_its_revision(server, repositories, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = load_classifier(repositories["someone/colours@v2"])
    settings = LoraConfig(r=2, target_modules=["projection_query"], init_lora_weights=False)
    adapted = get_peft_model(base, settings)
    adapted.peft_config["default"].base_model_name_or_path = "someone/colours"
    adapted.peft_config["default"].revision = "v2"
    adapted.save_pretrained(tmp_path / "adapter")
    server.repositories["someone/adapter"] = tmp_path / "adapter"
    try:
        source = model_source("someone/adapter")
        assert source.kind == "adapter"
        loaded = load_classifier(source)
        expected = adapted.merge_and_unload().state_dict()
        for name, weight in loaded.state_dict().items():
            torch.testing.assert_close(weight, expected[name])
        file = tmp_path / "adapter/adapter_config.json"
        file.write_text(file.read_text().replace("someone/colours", "someone/adapter"))
        file.write_text(file.read_text().replace('"v2"', "null"))
        with pytest.raises(CheckpointError, match="names itself as its base"):
            load_classifier("someone/adapter")
    finally:
        del server.repositories["someone/adapter"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("someone/nothing", "no model someone/nothing: there is no such folder here, and .* does "),
        ("someone/colours@v9", "someone/colours has no revision v9$"),
        ("someone/gated", "someone/gated is gated: ask for access at .*someone/gated, then run "),
    ],
)
def test_what_the_hub_refuses_is_reported_in_one_sentence(server, name, message):
    for load in (
        model_source,
        cvt.Classifier,
        cvt.CvtConfig.from_pretrained,
        CvtForImageClassification.from_pretrained,
        cvt.image_processor,
    ):
        with pytest.raises(FileNotFoundError, match=message) as error:
            load(name)
        assert "\n" not in str(error.value)


def test_damage_on_the_way_is_found(server):
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: its SHA-256"):
        cvt.Classifier("someone/damaged")


def test_a_downloaded_model_opens_without_network_and_another_fails(server, monkeypatch, photo):
    found = cvt.Classifier("someone/colours", runtime="torch")(photo)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.requests.clear()
    assert cvt.Classifier("someone/colours", runtime="torch")(photo) == found
    with pytest.raises(OSError, match="someone/else is not on this machine and could not be downl"):
        cvt.Classifier("someone/else")
    assert server.requests == []


def test_a_folder_of_the_same_name_wins(server, repositories, tmp_path):
    shutil.copytree(repositories["someone/colours@v2"], tmp_path / "someone/colours")
    source = model_source("someone/colours")
    assert (source.hub_id, source.revision) == (None, None)
    loaded = CvtForImageClassification.from_pretrained("someone/colours")
    assert loaded.classifier.bias[2] > 1
    assert server.requests == []
    with pytest.raises(ValueError, match="someone/colours is a folder here, which has no revisio"):
        model_source("someone/colours@v2")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("someone/model", ("someone/model", None)),
        ("someone/model@v1.0", ("someone/model", "v1.0")),
        ("someone/model@refs/pr/1", ("someone/model", "refs/pr/1")),
        ("cvt-13", ("microsoft/cvt-13", None)),
        ("cvt-13@main", ("microsoft/cvt-13", "main")),
        *((name, None) for name in ("model", "a/b/c", "./model", "/model", "a/b@", "a/", "-a/b")),
    ],
)
def test_names_of_the_hub(name, found):
    repository = hub.Repository.parse(name)
    assert (repository and (repository.hub_id, repository.revision)) == found


def test_published_checkpoints_keep_what_is_known_of_them_at_a_revision():
    source = model_source("cvt-21-384@main")
    assert (source.kind, source.hub_id, source.revision, source.variant, source.image_size) == (
        *("published", "microsoft/cvt-21-384", "main", "cvt-21", 384),
    )
