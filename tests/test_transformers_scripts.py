"""transformers' own scripts for image classification train our folders, unchanged.

They are in the source of transformers and in no package of it: CVT_TRANSFORMERS_EXAMPLES names the
folder `examples/pytorch` of its sources.
"""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from helpers.small_models import make, tiny
from helpers.without_cvt import run_by_itself

from cvt import CvtForImageClassification, image_processor

EXAMPLES = Path(os.environ.get("CVT_TRANSFORMERS_EXAMPLES", "no/examples/pytorch"))
PROGRAM = """
import runpy, sys
import cvt

cvt.register_auto_classes()
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# In place of the library `evaluate`, which loads this metric from the hub.
EVALUATE = """
class Accuracy:
    def __init__(self):
        self.right = []

    def add_batch(self, predictions, references):
        self.right += [p == r for p, r in zip(predictions.tolist(), references.tolist())]

    def compute(self, **batch):
        if batch:
            self.add_batch(**batch)
        right, self.right = self.right, []
        return {"accuracy": sum(right) / len(right)}


def load(name, **options):
    assert name == "accuracy"
    return Accuracy()
"""
COMMON = [
    *("--per_device_train_batch_size", "6", "--per_device_eval_batch_size", "6"),
    *("--learning_rate", "1e-3", "--seed", "0"),
]
SCRIPTS = {
    "run_image_classification.py": [
        *("--do_train", "--do_eval", "--max_steps", "4", "--remove_unused_columns", "False"),
        *("--use_cpu", "--report_to", "none", "--save_strategy", "no"),
    ],
    "run_image_classification_no_trainer.py": ["--max_train_steps", "4"],
}


@pytest.mark.parametrize("classes", [3, 5])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_of_transformers_trains_our_folder(photos, tmp_path, script, classes):
    path = EXAMPLES / "image-classification" / script
    if not path.is_file():
        pytest.skip(f"{script}: set CVT_TRANSFORMERS_EXAMPLES to examples/pytorch of transformers")
    start = make(tiny(hidden_act="quick_gelu", num_labels=classes))
    start.save_pretrained(tmp_path / "start")
    image_processor(start.config, 32).save_pretrained(tmp_path / "start")
    (tmp_path / "stand-ins").mkdir()
    (tmp_path / "stand-ins/evaluate.py").write_text(EVALUATE)
    command = [
        *(sys.executable, "-c", PROGRAM, path, "--model_name_or_path", tmp_path / "start"),
        *("--dataset_name", photos, "--output_dir", tmp_path / "out", *COMMON, *SCRIPTS[script]),
        *(["--ignore_mismatched_sizes"] if classes != 3 else []),
    ]
    places = [str(tmp_path / "stand-ins"), os.environ.get("PYTHONPATH", "")]
    run_by_itself(
        list(map(str, command)),
        tmp_path / "home",
        PYTHONPATH=os.pathsep.join(filter(None, places)),
        HF_DATASETS_OFFLINE="1",
    )
    trained = CvtForImageClassification.from_pretrained(tmp_path / "out")
    assert trained.config.hidden_act == "quick_gelu"
    assert trained.config.class_names == ["blue", "green", "red"]
    results = json.loads((tmp_path / "out/all_results.json").read_text())
    assert 0 <= results["eval_accuracy"] <= 1
    before, after = start.cvt.state_dict(), trained.cvt.state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) > 0.9 * len(before)
