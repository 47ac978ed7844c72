"""What the README's commands run on, written to the working folder of the wheel's environment."""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import cvt
from cvt.checkpoints import transformers_to_authors

assert "site-packages" in cvt.__file__, cvt.__file__

# Pictures of two classes: a folder of them, and one with train/ and val/.
draw = np.random.default_rng(0)
for folder in ("photos", "flowers/train", "flowers/val"):
    for name, colour in (("poppy", (200, 40, 30)), ("violet", (60, 40, 200))):
        Path(folder, name).mkdir(parents=True)
        for i in range(5):
            pixels = draw.normal(colour, 30, (240, 320, 3)).clip(0, 255).astype("uint8")
            Image.fromarray(pixels).save(Path(folder, name, f"{i}.jpg"))
Image.fromarray(pixels).save("cat.jpg")

# A model of random weights as `cvt-13`, in the cache of the hub, and as the authors' file.
torch.manual_seed(0)
model = cvt.CvtForImageClassification(cvt.CvtConfig.from_variant("cvt-13"))
commit = "0" * 40
repository = Path(os.environ["HF_HOME"], "hub/models--microsoft--cvt-13")
model.save_pretrained(repository / "snapshots" / commit)
cvt.image_processor("cvt-13").save_pretrained(repository / "snapshots" / commit)
(repository / "refs").mkdir()
(repository / "refs/main").write_text(commit)
torch.save(transformers_to_authors(model.state_dict()), "CvT-13-224x224-IN-1k.pth")
