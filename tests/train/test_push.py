"""Uploads to a hub on this machine, and the model cards that go with them."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from helpers.hub_server import HubServer, connect
from huggingface_hub import ModelCard

import cvt
from cvt import CvtConfig, CvtForImageClassification, image_processor
from cvt.checkpoints import load_classifier, model_source
from cvt.files import write_checksums
from cvt.model_code import code_files
from cvt.runtime.manifest import Manifest
from cvt.train import Recipe
from cvt.train.model_card import NO_LICENCE, PLACE, trained_card
from cvt.train.push import push
from cvt.train.run_folder import write_model

ROW = {"epoch": 3, "val_loss": 0.25, "val_top1": 0.91, "val_top5": 1.0}
MODEL = ["README.md", "checksums.json", "config.json", "model.safetensors"]
MODEL = [*MODEL, "preprocessor_config.json"]


@pytest.fixture
def run(tmp_path):
    """A run folder of a classifier that stock transformers can load."""
    torch.manual_seed(0)
    config = CvtConfig(embed_dim=[8, 16, 32], num_heads=[1, 2, 4], depth=[1, 2, 3])
    config.class_names = ["blue", "green", "red"]
    folder = tmp_path / "home/runs/demo"
    recipe = Recipe(data="/data/of/mine/colours", model="/models/of/mine/start", classes="/c.txt")
    model = CvtForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    write_model(folder / "best", model, image_processor(config, image_size=32), recipe, ROW)
    (folder / "args.yaml").write_text("data: /data/of/mine/colours\n")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints/state.pt").write_text("optimizer")
    (folder / "best/state.pt").write_text("optimizer")
    (folder / "best/notes.txt").write_text("mine")
    return folder


@pytest.fixture
def server(monkeypatch, tmp_path):
    (tmp_path / "hub").mkdir()
    with HubServer({}, tmp_path / "hub") as server:
        connect(monkeypatch, server, tmp_path / "cache")
        yield server


# ------------------------------------------------------------------------------ model cards


def test_the_card_of_a_run_has_metrics_labels_and_usage_and_no_path(run):
    card = ModelCard.load(run / "best/README.md")
    (result, loss) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == (
        *("accuracy", 0.91, "colours"),
    )
    assert (loss.metric_type, loss.metric_value) == ("loss", 0.25)
    assert card.data.to_dict()["model-index"][0]["results"][0]["dataset"]["split"] == "validation"
    assert card.data.license is card.data.base_model is None
    assert NO_LICENCE in card.text
    assert "3 classes: blue, green, red" in card.text
    assert f'cvt.Classifier("{PLACE}")' in card.text
    assert f"cvt predict {PLACE} photo.jpg" in card.text
    assert "data: colours\n" in card.text
    assert "CvT, trained from `start`" in card.text
    for path in ("/data", "of/mine", "/models", "c.txt"):
        assert path not in str(card)


@pytest.mark.parametrize(
    ("model", "data", "base", "datasets"),
    [
        ("cvt-13", "hub:someone/photos@train", "microsoft/cvt-13", ["someone/photos"]),
        ("someone/start@v1", "stream:hub:photos", "someone/start", ["photos"]),
        ("cvt-13", "digits", "microsoft/cvt-13", None),
    ],
)
def test_the_card_names_base_and_data_of_the_hub(model, data, base, datasets):
    config = CvtConfig(num_labels=2)
    for is_adapter, relation in ((False, "finetune"), (True, "adapter")):
        card = trained_card(config, Recipe(data=data, model=model), ROW, is_adapter)
        assert card.data.base_model == base
        assert card.data.base_model_relation == relation
        assert card.data.datasets == datasets
        taught = trained_card(config, Recipe(data=data, teacher="/home/me/big/best"), ROW)
        assert "teacher: best\n" in taught.text
        assert "/home" not in str(taught)
    scratch = trained_card(config, Recipe(data=data, model=model, from_scratch=True), ROW)
    assert scratch.data.base_model is None
    assert "trained from random weights" in scratch.text


def test_the_card_lists_twenty_classes_and_counts_the_others():
    text = trained_card(CvtConfig(num_labels=25), Recipe(data="photos"), ROW).text
    assert "25 classes: LABEL_0, LABEL_1, " in text
    assert ", LABEL_19 and 5 more." in text


def test_the_card_has_the_metrics_of_the_averaged_weights_where_they_are_saved():
    averaged = ROW | {"ema_loss": 0.2, "ema_top1": 0.95, "ema_top5": 0.99}
    card = trained_card(CvtConfig(num_labels=9), Recipe(data="photos"), averaged)
    values = {each.metric_name: each.metric_value for each in card.data.eval_results}
    assert values == {"top-1": 0.95, "top-5": 0.99, "loss": 0.2}


@pytest.mark.parametrize("hidden_act", ["gelu", "quick_gelu"])
def test_what_the_card_claims_of_transformers_is_so(run, hidden_act):
    best = run / "best"
    config = CvtConfig.from_pretrained(best, hidden_act=hidden_act)
    config.layer_norm_eps = 1e-5
    config.save_pretrained(best)
    pixels = torch.arange(3.0 * 32 * 32).sin().reshape(1, 3, 32, 32)
    classes = (transformers.CvtForImageClassification, CvtForImageClassification)
    stock, ours = (each.from_pretrained(best).eval()(pixels).logits for each in classes)
    text = trained_card(config, Recipe(data="photos"), ROW).text
    is_same = torch.allclose(stock, ours, atol=1e-5)
    assert is_same == ("It computes what this package does" in text) == (hidden_act == "gelu")
    assert is_same != ("exact GELU instead of quick_gelu, whatever config.json has" in text)


@pytest.mark.parametrize(
    "fields",
    [
        {"qkv_projection_method": ["avg"] * 3},
        {"cls_token": [True, False, True]},
        {"position_embedding": ["none", "learned", "none"], "image_size": 64},
        {"depth": [1, 1, 2]},
    ],
)
def test_the_card_claims_nothing_of_stages_that_transformers_does_not_have(fields):
    text = trained_card(CvtConfig(num_labels=2, **fields), Recipe(data="photos"), ROW).text
    assert "Its own CvT has no such stages" in text
    assert "from transformers" not in text


# ------------------------------------------------------------------------------ uploads


def test_a_dry_run_shows_the_files_and_contacts_nothing(server, run, cvt):
    code, out, _ = cvt("push", run, "someone/colours", "--dry-run", "--license", "mit")
    assert code == 0
    for file in MODEL:
        assert file in out
    weights = (run / "best/model.safetensors").stat().st_size
    assert f"{weights:,}" in out
    assert "license: mit" in out
    assert "Nothing was uploaded." in out
    left_out, _, uploaded = out.partition("\n")
    assert left_out.startswith("not files of the model, not uploaded: ")
    assert "notes.txt" in left_out
    assert not any(word in uploaded for word in ("state.pt", "notes.txt", "args.yaml"))
    assert server.requests == []


def test_a_run_is_pushed_in_one_commit_and_opens_from_the_hub(server, run, cvt):
    code, out, err = cvt("push", run, "someone/colours", "--license", "apache-2.0")
    assert code == 0, err
    ((repository, operations),) = server.commits
    assert repository == "someone/colours"
    kinds = ["file", "file", "file", "lfsFile", "file"]
    assert operations == sorted(f"{kind} {name}" for kind, name in zip(kinds, MODEL, strict=True))
    assert f"5 files uploaded, {server.endpoint}/someone/colours/commit/" in out
    card = ModelCard.load(server.repositories["someone/colours"] / "README.md")
    assert card.data.license == "apache-2.0"
    assert "## Licence\n\napache-2.0." in card.text
    assert 'cvt.Classifier("someone/colours")' in card.text
    assert PLACE not in card.text
    assert PLACE in (run / "best/README.md").read_text()  # the folder stays as it is
    pushed = load_classifier("someone/colours").state_dict()
    for name, weight in load_classifier(run / "best").state_dict().items():
        assert torch.equal(pushed[name], weight)
    assert "someone/colours" not in server.private


def test_a_second_push_replaces_the_files_and_deletes_those_of_the_old_model(
    server, run, cvt, tmp_path
):
    sharded = shutil.copytree(run / "best", tmp_path / "sharded")
    (sharded / "model.safetensors").unlink()
    load_classifier(run / "best").save_pretrained(sharded, max_shard_size="100KB")
    write_checksums(sharded)
    assert push(sharded, "someone/colours", private=True, licence="mit").replaced == []
    assert "someone/colours" in server.private
    edited = run / "best/README.md"
    edited.write_text(edited.read_text().replace("library_name: cvt-vision", "library_name: peft"))
    by_hand = ["files.py", "labels.txt", "losses.py", "model/notes.txt", "notes.txt"]
    (server.repositories["someone/colours"] / "model").mkdir()
    for name in by_hand:
        (server.repositories["someone/colours"] / name).write_text("stays")
    code, out, err = cvt("push", run / "best", "someone/colours")
    assert code == 0, err
    assert "replaced in someone/colours: README.md, checksums.json, config.json" in out
    assert "deleted in someone/colours: model-00001-of-" in out
    assert "model.safetensors.index.json" in out
    place = server.repositories["someone/colours"]
    left = {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}
    assert left == {*MODEL, ".gitattributes", *by_hand}
    assert len(server.commits) == 2
    load_classifier("someone/colours")
    card = server.repositories["someone/colours"] / "README.md"
    assert ModelCard.load(card).data.license == "mit"
    assert "## Licence\n\nmit." in card.read_text()
    done = push(run / "best", "someone/colours", licence="apache-2.0")
    assert done.card == card.read_text()
    assert done.files["README.md"] == card.stat().st_size
    assert ModelCard.load(card).data.license == "apache-2.0"


def test_a_branch_is_created_and_opens_by_its_name(server, run):
    push(run, "someone/colours")
    model = load_classifier(run / "best")
    with torch.no_grad():
        model.classifier.bias += 1
    model.save_pretrained(run / "best")
    push(run, "someone/colours@v2")
    assert [name for name, _ in server.commits] == ["someone/colours", "someone/colours@v2"]
    main, other = map(load_classifier, ("someone/colours", "someone/colours@v2"))
    assert torch.allclose(main.classifier.bias + 1, other.classifier.bias)


def test_a_repository_of_others_is_left_unless_forced(server, run, tmp_path, cvt):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "README.md").write_text("---\nlibrary_name: timm\n---\n")
    (theirs / "model.safetensors").write_text("theirs")
    server.repositories["someone/theirs"] = theirs
    code, _, err = cvt("push", run, "someone/theirs")
    assert code == 1
    assert "has files that this package has not written, such as README.md; nothing was over" in err
    assert "--force" in err
    assert server.commits == []
    assert (theirs / "model.safetensors").read_text() == "theirs"
    assert cvt("push", run, "someone/theirs", "--force")[0] == 0
    assert load_classifier("someone/theirs").num_labels == 3
    with pytest.raises(OSError, match="exists and is public"):
        push(run, "someone/theirs", private=True)


@pytest.mark.parametrize(
    ("token", "name", "message"),
    [
        ("wrong", "someone/colours", "was not pushed to .*/someone/colours: run `hf auth login`; "),
        (None, "other/colours", "was not pushed to .*/other/colours: you may not write there; "),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(server, run, monkeypatch, token, name, message):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(OSError, match=message) as error:
        push(run, name)
    assert "\n" not in str(error.value)
    assert server.commits == []


def test_no_network_is_one_sentence(server, run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"best was not pushed to .*offline mode is enabled"):
        push(run, "someone/colours")


# ------------------------------------------------------------------------------ with the code


def test_with_the_code_a_repository_is_what_saving_with_it_writes(server, run, cvt, tmp_path):
    best = run / "best"
    before = (best / "config.json").read_bytes()
    code, out, err = cvt("push", run, "someone/colours", "--with-code")
    assert code == 0, err
    assert f"{len(MODEL) + len(code_files())} files uploaded" in out
    assert (best / "config.json").read_bytes() == before
    load_classifier(best).save_pretrained(tmp_path / "saved", with_code=True)
    place = server.repositories["someone/colours"]
    for path in (tmp_path / "saved").iterdir():
        assert (place / path.name).read_bytes() == path.read_bytes()
    sums = json.loads((place / "checksums.json").read_text())
    assert (
        sums["config.json"][1] == hashlib.sha256((place / "config.json").read_bytes()).hexdigest()
    )
    load_classifier("someone/colours")
    snapshot = model_source("someone/colours").path
    assert {path.name for path in snapshot.iterdir()} == set(MODEL)  # nothing of the code


def test_a_file_of_others_that_has_the_name_of_a_module_is_left_unless_forced(server, run):
    push(run, "someone/colours")
    theirs = server.repositories["someone/colours"] / "text.py"
    theirs.write_text("theirs")
    with pytest.raises(FileExistsError, match=r"files of other content, text\.py; nothing was"):
        push(run, "someone/colours", with_code=True)
    assert theirs.read_text() == "theirs"
    push(run, "someone/colours", with_code=True, overwrite=True)
    assert theirs.read_bytes() == code_files()["text.py"].read_bytes()


def test_the_card_says_how_transformers_runs_the_code(run):
    card = push(run, "someone/colours", with_code=True, dry_run=True).card
    call = 'pipeline("image-classification", model="someone/colours", trust_remote_code=True)'
    assert card.count("## In transformers") == card.count(call) == 1
    assert "it computes\n`gelu` and needs Python 3.11" in card
    assert "val_top1 | 0.9100" in card
    assert "The activation of its MLPs is `gelu`." in card
    (run / "best/README.md").write_text(push(run, "someone/first", dry_run=True).card)  # as fetched
    card = push(run, "someone/colours", with_code=True, dry_run=True).card
    assert card.count("## In transformers") == card.count("from transformers import") == 1
    assert call in card
    assert card.index(call) < card.index("## Training") < card.index("## Licence")
    (run / "best/README.md").write_text("# Mine\n\nText.\n")
    card = push(run, "someone/colours", with_code=True, dry_run=True).card
    assert card.index("# Mine\n\nText.") < card.index("## In transformers") < card.index(call)
    (run / "best/README.md").write_text("# Mine\n\nUse trust_remote_code.\n")
    assert "## In tr" not in push(run, "someone/colours", with_code=True, dry_run=True).card


def test_a_folder_with_the_code_is_pushed_with_it_and_with_no_other(server, run):
    best = run / "best"
    load_classifier(best).save_pretrained(best, with_code=True)
    push(run, "someone/colours")
    place = server.repositories["someone/colours"]
    assert {path.name for path in place.glob("*.py")} == code_files().keys()
    (best / "text.py").write_text("print('mine')")
    with pytest.raises(ValueError, match=r"text\.py is not the code of this version of cvt"):
        push(run, "someone/colours")
    push(run, "someone/colours", with_code=True)
    assert (place / "text.py").read_bytes() == code_files()["text.py"].read_bytes()
    load_classifier(best).save_pretrained(best)
    assert "text.py" in push(run, "someone/colours").deleted
    assert not [*place.glob("*.py")]


# ------------------------------------------------------------------------------ what is no model


def emptied(folder):
    (folder / "model.safetensors").unlink()


def pickled(folder):
    torch.save(load_classifier(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    (folder / "checksums.json").unlink()


def flipped(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def with_home(folder):
    with open(folder / "README.md", "a") as file:
        file.write(f"trained on {Path.home()}/photos\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (emptied, "best is no model: it has no weights"),
        (pickled, "has its weights in a pickled file, which others need not trust: `cvt convert"),
        (flipped, r"model\.safetensors is damaged"),
        (with_home, r"README\.md has a path of this machine, .*: nothing was uploaded"),
    ],
)
def test_what_others_could_not_use_is_refused(run, change, message):
    change(run / "best")
    with pytest.raises((ValueError, OSError), match=message):
        push(run, "someone/colours", dry_run=True)


@pytest.mark.parametrize(
    ("folder", "name", "message"),
    [
        ("nowhere", "someone/colours", "nowhere is no folder here"),
        ("best/model.safetensors", "someone/colours", "is a file; `cvt convert` writes a folder"),
        ("checkpoints", "someone/colours", "checkpoints is no model: it has no weights"),
        ("best", "colours", "colours: must be USER/NAME, or USER/NAME@BRANCH"),
        ("best", "cvt-13", "cvt-13: must be USER/NAME"),
        ("best", "cvt-13@a/b", "cvt-13@a/b: must be USER/NAME"),
        ("best", "a/b/c", "a/b/c: must be USER/NAME"),
    ],
)
def test_other_things_and_names_are_refused(run, folder, name, message):
    with pytest.raises((ValueError, OSError), match=message):
        push(run / folder, name, dry_run=True)


# ------------------------------------------------------------------------------ other folders


def test_a_folder_without_card_gets_one_and_a_card_of_the_user_stays(run):
    (run / "best/README.md").unlink()
    made = push(run, "someone/colours", dry_run=True).card
    assert "# CvT of " in made
    assert "3 classes: blue, green, red" in made
    assert "model-index" not in made
    (run / "best/README.md").write_text("---\nlanguage: de\n---\n# Meins\n\nText.\n")
    kept = ModelCard(push(run, "someone/colours", dry_run=True).card)
    assert kept.text == "# Meins\n\nText.\n"
    assert (kept.data.language, kept.data.library_name) == ("de", "cvt-vision")
    (run / "best/README.md").write_text("---\n- a\n---\n")
    with pytest.raises(ValueError, match=r"README\.md: repo card metadata block should be a dict"):
        push(run, "someone/colours", dry_run=True)


def adapter_of(base, folder, name):
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=2, target_modules=["projection_query"], init_lora_weights=False)
    adapted = get_peft_model(load_classifier(base), settings)
    adapted.peft_config["default"].base_model_name_or_path = name
    adapted.save_pretrained(folder)
    return adapted


def test_an_adapter_is_pushed_and_merged_with_its_base_of_the_hub(server, run, tmp_path):
    push(run, "someone/base")
    adapted = adapter_of(run / "best", tmp_path / "adapter", "someone/base")
    (tmp_path / "adapter/README.md").unlink()  # PEFT's own
    done = push(tmp_path / "adapter", "someone/adapter")
    assert sorted(done.files) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    card = ModelCard(done.card)
    assert (card.data.base_model, card.data.base_model_relation) == ("someone/base", "adapter")
    assert 'PeftModel.from_pretrained(base, "someone/adapter")' in card.text
    expected = adapted.merge_and_unload().state_dict()
    for name, weight in load_classifier("someone/adapter").state_dict().items():
        torch.testing.assert_close(weight, expected[name])
    with pytest.raises(ValueError, match=r"with_code: .*adapter is an adapter, which no code of a"):
        push(tmp_path / "adapter", "someone/adapter", with_code=True, dry_run=True)


def test_an_adapter_of_a_folder_of_this_machine_is_refused(run, tmp_path):
    folder = tmp_path / "adapter"
    for name in (str(run / "best"), os.path.relpath(run / "best", folder), ""):
        adapter_of(run / "best", folder, name)
        with pytest.raises(ValueError, match="which is not on the hub: push that first"):
            push(folder, "someone/adapter", dry_run=True)


def test_an_export_is_pushed_whole_and_opens_from_the_hub(server, run, tmp_path):
    from cvt.export import export

    export(run / "best", tmp_path / "export", "torch-export", dynamic=())
    (tmp_path / "export/notes.txt").write_text("mine")
    done = push(tmp_path / "export", "someone/export")
    files = ["README.md", "config.json", "export.json", "model.pt2", "preprocessor_config.json"]
    assert sorted(done.files) == files
    assert "`model.pt2`: torch-export, in fp32, for images of 32 x 32 pixels" in done.card
    assert "from transformers" not in done.card
    with pytest.raises(ValueError, match=r"with_code: .*export is an export, which no code of a"):
        push(tmp_path / "export", "someone/export", with_code=True, dry_run=True)
    source = model_source("someone/export")
    assert source.is_export
    Manifest.read(source.path).verify(source.path)
    pixels = torch.zeros(1, 3, 32, 32)
    opened = cvt.Classifier("someone/export").runtime(pixels)
    torch.testing.assert_close(opened, load_classifier(run / "best")(pixels).logits)
