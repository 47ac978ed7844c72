"""The Keras models come from the hub, or rather from one on this machine.

The hub library reads its settings when it is imported, so they come in a process of their own.
"""

import json
import os
import subprocess
import sys

from golden.cases import TF_MODEL
from helpers.hub_server import HubServer
from helpers.small_models import assert_equal, make, tiny
from safetensors.torch import load_file

from cvt import CvtConfig

SCRIPT = """
import cvt
cvt.TFCvtForImageClassification.from_pretrained("cvt-13").save_pretrained("published")
cvt.TFCvtModel.from_pretrained("someone/cvt").save_pretrained("old")
for name in ("cvt-21", "no/such", "./nope"):
    try:
        cvt.TFCvtModel.from_pretrained(name)
    except OSError as error:
        print(*str(error).splitlines())
"""


def test_models_come_from_the_hub_with_their_activation(tmp_path):
    model = make(tiny(depth=[1, 1, 1]))
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["hidden_act"]  # as on the hub
    (folder / "config.json").write_text(json.dumps(config))
    with HubServer({"microsoft/cvt-13": folder, "someone/cvt": TF_MODEL}) as server:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={**kept, "HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home")},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=200,
        )
    assert done.returncode == 0, done.stderr
    published, other, path = done.stdout.splitlines()
    assert published.startswith("no model microsoft/cvt-21: there is no such folder here")
    assert "no/such" in other
    assert path.startswith("no model ./nope: it is no file")
    found = load_file(tmp_path / "published" / "model.safetensors")
    assert_equal(found, model.state_dict(), tolerance=0)
    assert CvtConfig.from_pretrained(tmp_path / "published").hidden_act == "quick_gelu"
    assert CvtConfig.from_pretrained(tmp_path / "old").hidden_act == "gelu"
