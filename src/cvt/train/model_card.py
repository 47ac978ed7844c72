"""The model card of a trained classifier."""

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from cvt.libraries import version_of
from cvt.text import printable
from cvt.train.progress import Row
from cvt.train.recipe import Recipe


def model_card(config: Any, recipe: Recipe, row: Row) -> str:
    """A model card for the hub: what the model is, how good, how it was trained, how to use it."""
    metrics = {name: value for name, value in row.items() if name.startswith(("val_", "ema_"))}
    name = Path(recipe.model).name
    shown = dataclasses.replace(
        recipe, model=name, data="", val_data=None, classes=None
    )  # no paths of ours
    head = {
        "library_name": "cvt-vision",
        "pipeline_tag": "image-classification",
        "tags": ["cvt", "image-classification", "vision"],
        "metrics": ["accuracy"],
    }
    start = "random weights" if recipe.from_scratch else f"`{name}`"
    classes = printable(", ".join(config.class_names[:20])) + (
        ", ..." if config.num_labels > 20 else ""
    )
    results = "\n".join(f"| {k} | {v:.4f} |" for k, v in metrics.items() if v is not None)
    settings = yaml.safe_dump(dataclasses.asdict(shown), sort_keys=False, allow_unicode=True)
    return f"""---
{yaml.safe_dump(head, sort_keys=False).strip()}
---

# CvT, trained from {start}

Classifies images into {config.num_labels} classes: {classes}.

After epoch {row["epoch"]:.0f}, on the validation images:

| measure | value |
|---|---|
{results}

```python
import cvt
from cvt.data import decode

model = cvt.CvtForImageClassification.from_pretrained("FOLDER").eval()
processor = cvt.image_processor("FOLDER")
logits = model(**processor(decode("photo.jpg"), return_tensors="pt")).logits
print(model.config.id2label[logits.argmax().item()])
```

Trained with cvt-vision {version_of("cvt-vision")} and this recipe:

```yaml
{settings.strip()}
```
"""
