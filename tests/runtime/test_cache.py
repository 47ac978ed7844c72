"""Graphs that were converted once, in the user's cache."""

import json
import os
import shutil

import numpy as np
import openvino
import pytest
from click.testing import CliRunner
from helpers.small_models import one_block

import cvt
from cvt.checkpoints import model_source
from cvt.cli import verbs
from cvt.runtime import cache, capture, open_runtime
from cvt.runtime.cache import GraphCache, entries

SIZE = (32, 32)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setattr(cache, "cache_folder", lambda: folder)
    return folder


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    model = one_block()
    model.save_pretrained(folder)
    cvt.image_processor(model.config, SIZE[0]).save_pretrained(folder)
    return folder


def graphs(model):
    return GraphCache(model_source(str(model)))


@pytest.fixture
def graph():
    values = openvino.opset13.parameter([1, 3], np.float32, name="pixels")
    return openvino.Model([openvino.opset13.relu(values)], [values])


def test_a_model_is_converted_once_and_auto_takes_the_graph(model, monkeypatch):
    pixels = np.random.default_rng(0).standard_normal((2, 3, *SIZE)).astype(np.float32)
    assert open_runtime(str(model), threads=1).name == "fused"
    expected = open_runtime(str(model), "openvino", threads=1)(pixels)
    (entry,) = entries()
    assert entry.about["model"] == str(model)
    assert entry.about["image_size"] == "32 x 32"
    monkeypatch.setattr(capture, "openvino_graph", None)  # nothing is converted any more
    runtime = open_runtime(str(model), threads=1)
    assert runtime.name == "openvino"
    np.testing.assert_array_equal(runtime(pixels), expected)


def test_the_kept_graph_computes_what_the_model_does(model):
    pixels = np.random.default_rng(0).standard_normal((2, 3, *SIZE)).astype(np.float32)
    expected = open_runtime(str(model), "torch", threads=1)(pixels)
    for _ in range(2):
        found = open_runtime(str(model), "openvino", threads=1)(pixels)
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_graph_is_found_by_size(model, graph):
    graphs(model).keep(SIZE, graph)
    assert graphs(model).find(SIZE).is_file()
    assert graphs(model).find((32, 33)) is None


def test_other_weights_or_settings_have_a_graph_of_their_own(model, graph):
    graphs(model).keep(SIZE, graph)
    for file in ("config.json", "model.safetensors"):
        content = (model / file).read_bytes()
        (model / file).write_bytes(content[:-2] + b" " + content[-1:])
        assert graphs(model).find(SIZE) is None
        (model / file).write_bytes(content)
        assert graphs(model).find(SIZE)


@pytest.mark.parametrize("file", ["tf_model.h5", "pytorch_model.bin", "any-1.safetensors"])
def test_other_weights_of_any_software_have_a_graph_of_their_own(model, graph, file):
    (model / "model.safetensors").rename(model / file)
    if file.startswith("any"):  # a shard, as the index names it
        index = {"weight_map": {"cvt.encoder.stages.0.cls_token": file}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
    graphs(model).keep(SIZE, graph)
    assert graphs(model).find(SIZE)
    content = (model / file).read_bytes()
    (model / file).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert graphs(model).find(SIZE) is None


@pytest.mark.parametrize("version", ["torch", "openvino", "cvt-vision", "processor"])
def test_other_versions_have_a_graph_of_their_own(model, graph, monkeypatch, version):
    graphs(model).keep(SIZE, graph)
    known = cache.version_of
    if version == "cvt-vision":
        monkeypatch.setattr(cache, "__version__", "99")
    elif version == "processor":
        monkeypatch.setattr(cache.platform, "machine", lambda: "another")
    else:
        monkeypatch.setattr(cache, "version_of", lambda name: name == version or known(name))
    assert graphs(model).find(SIZE) is None


@pytest.mark.parametrize("name", ["model.xml", "model.bin", "config.json", "checksums.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_entry_is_deleted(model, graph, name, damage):
    graphs(model).keep(SIZE, graph)
    file = entries()[0].folder / name
    content = bytearray(file.read_bytes() or b"x")
    content[len(content) // 2] ^= 1
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content[:-1] + b"xx" if damage == "cut" else content)
    assert graphs(model).find(SIZE) is None
    assert entries() == []
    graphs(model).keep(SIZE, graph)
    assert graphs(model).find(SIZE)


def test_what_another_process_has_kept_meanwhile_stays(model, graph):
    graphs(model).keep(SIZE, graph)
    before = entries()[0].folder.stat().st_ino
    graphs(model).keep(SIZE, graph)
    assert entries()[0].folder.stat().st_ino == before


def test_where_nothing_can_be_kept_nothing_fails(model, graph, place):
    place.write_text("no folder")
    graphs(model).keep(SIZE, graph)
    assert graphs(model).find(SIZE) is None
    assert place.read_text() == "no folder"
    assert entries() == []


def test_a_home_that_cannot_be_written_to_is_left(model, graph, monkeypatch):
    def denied(folder):  # as to all but root
        raise PermissionError(f"{folder}: Permission denied")

    monkeypatch.setattr(cache, "staged", denied)
    graphs(model).keep(SIZE, graph)
    assert entries() == []


def test_the_entry_that_was_not_used_for_longest_goes_first(model, graph, monkeypatch):
    kept = graphs(model)
    for i, side in enumerate((32, 40)):
        kept.keep((side, side), graph)
        os.utime(entries()[0].folder, (i, i))
    monkeypatch.setattr(cache, "CACHE_BYTES", int(2.5 * entries()[0].size))
    assert kept.find((32, 32))  # which is a use
    kept.keep((48, 48), graph)
    assert kept.find((32, 32))
    assert kept.find((40, 40)) is None
    assert kept.find((48, 48))


def test_other_runtimes_keep_nothing(model):
    for runtime in ("torch", "fused"):
        open_runtime(str(model), runtime, threads=1)
    assert entries() == []


def test_the_command_lists_and_clears(model, graph, place):
    run = CliRunner().invoke
    assert run(verbs, ["cache", "list"]).stdout == f"0 graphs, 0.0 MB, in {place}\n"
    graphs(model).keep(SIZE, graph)
    listed = run(verbs, ["cache", "list"]).stdout
    assert str(model) in listed
    assert "32 x 32" in listed
    assert listed.splitlines()[-1].startswith("1 graphs, ")
    shutil.rmtree(model)
    assert run(verbs, ["cache", "clear"]).stdout.startswith("1 graphs deleted, ")
    assert entries() == []
    assert run(verbs, ["cache", "burn"]).exit_code == 2
