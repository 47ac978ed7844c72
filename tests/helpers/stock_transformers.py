"""Run by a Python that has transformers and not this package: opens folders that carry its code.

    python stock_transformers.py WORK

In the folder WORK are `model` and `mixed`, which carry the code, `lacking`, `model` without a
weight, `pixels.safetensors` and `picture.png`; a hub has `model` as someone/model. It leaves
`found.safetensors`, `found.json` and `again`, the model trained for a step and saved there.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, pipeline

TRUSTED = {"trust_remote_code": True}
work = Path(sys.argv[1])
folder, pixels = str(work / "model"), load_file(work / "pixels.safetensors")["pixels"]
torch.set_num_threads(1)


@torch.no_grad()
def logits(name, **options):
    model = AutoModelForImageClassification.from_pretrained(name, **options).eval()
    return model(pixels).logits


found = {"stock": logits(folder), "model": logits(folder, **TRUSTED)}
found["hub"] = logits("someone/model", **TRUSTED)
found["mixed"] = logits(str(work / "mixed"), **TRUSTED)
config = AutoConfig.from_pretrained(folder, **TRUSTED)
features = AutoModel.from_pretrained(folder, **TRUSTED).eval()
with torch.no_grad():
    found["features"] = features(pixels).last_hidden_state.contiguous()

classify = pipeline("image-classification", model=folder, device="cpu", **TRUSTED)
picture = Image.open(work / "picture.png")
scores = classify(picture, top_k=5)
found["seen"] = classify.image_processor(picture, return_tensors="pt")["pixel_values"]

model = AutoModelForImageClassification.from_pretrained(folder, **TRUSTED).train()
loss = model(pixels, labels=torch.arange(len(pixels))).loss
loss.backward()
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter -= 0.1 * parameter.grad
model.eval().save_pretrained(work / "again")
with torch.no_grad():
    found["trained"] = model(pixels).logits
found["again"] = logits(str(work / "again"), **TRUSTED)
model.save_pretrained(work / "third", with_code=True)
found["third"] = logits(str(work / "third"), **TRUSTED)

try:
    logits(str(work / "lacking"), **TRUSTED)
    refusal = ""
except ValueError as error:
    refusal = str(error)

save_file({name: tensor.contiguous() for name, tensor in found.items()}, work / "found.safetensors")
(work / "found.json").write_text(
    json.dumps(
        {
            "transformers": transformers.__version__,
            "modules": [type(each).__module__ for each in (config, model)],
            "is_one": type(model).config_class is type(model.config),
            "activation": config.hidden_act,
            "scores": {answer["label"]: answer["score"] for answer in scores},
            "refusal": refusal,
            "ours": [name for name in sys.modules if name.partition(".")[0] == "cvt"],
        }
    )
)
