"""Write `authors.npz`: what the authors' own code computes for every case in `cases.py`.

    python tests/golden/make_authors_golden.py PATH_OF_A_CHECKOUT

The recipe. The checkout is github.com/microsoft/CvT, unchanged, at commit
f851e681966390779b71380d2600b52360ff4fe1. `get_cls_model` of its `lib/models/cls_cvt.py` builds
every model, so the activation (QuickGELU) and the LayerNorm epsilon (1e-5) are the authors' choice.
It was run in float32 on an x86-64 CPU with torch 2.15.0, numpy 2.4.6, einops 0.8.2, scipy 1.17.1
and yacs 0.1.8.

Two modules that the code imports are put in place by hand: `torch._six`, which torch no longer has,
and `timm.models.layers`, whose DropPath behaves as in timm 0.3.2, which the authors pinned, and
whose truncated normal is torch's. Every weight and buffer is then overwritten: `cases.fill` draws
it from its name. The authors' attention cannot run where query, key and value all have the method
"linear" (the three stay undefined); there the query's missing projection is set to the
rearrangement that their `forward_conv` applies in its absence.

For each case the file keeps the names and shapes of the model's tensors, the logits, every stage's
output and the last stage's class token; after a forward pass in training mode also the BatchNorm
statistics; where gradients are asked for, those of the mean squared logit. A batch of one loses its
batch axis in the authors' `torch.squeeze`; it is given back. For each published variant the file
keeps the names and shapes of the tensors, the drop-path rate of each block and the settings in its
yaml file.
"""

import argparse
import collections.abc
import json
import sys
from pathlib import Path
from types import ModuleType

import cases
import numpy as np
import torch
import yaml
from einops.layers.torch import Rearrange
from torch import Tensor, nn
from yacs.config import CfgNode

YAML_FILES = {
    "cvt-13": "cvt-13-224x224.yaml",
    "cvt-21": "cvt-21-224x224.yaml",
    "cvt-w24": "cvt-w24-384x384.yaml",
}


class DropPath(nn.Module):
    """As in timm 0.3.2: whole samples are dropped, the others scaled up; one draw per sample."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = 1 - self.rate
        draws = torch.rand((len(x), 1, 1), dtype=x.dtype, device=x.device)
        return x.div(kept) * (kept + draws).floor()


def import_authors(checkout: Path) -> ModuleType:
    """The authors' `cls_cvt`, with stand-ins for what it imports and is no longer there."""
    stand_ins = {
        "torch._six": {"container_abcs": collections.abc},
        "timm": {},
        "timm.models": {},
        "timm.models.layers": {"DropPath": DropPath, "trunc_normal_": nn.init.trunc_normal_},
    }
    for name, attributes in stand_ins.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        sys.modules[name] = module
    sys.path.insert(0, str(checkout / "lib"))
    from models import cls_cvt

    return cls_cvt


def build(authors: ModuleType, spec: dict, num_classes: int) -> nn.Module:
    settings = {"INIT_WEIGHTS": False, "NUM_CLASSES": num_classes, "SPEC": spec}
    model = authors.get_cls_model(CfgNode({"MODEL": settings}))
    for module in model.modules():
        if isinstance(module, authors.Attention) and module.conv_proj_k is None:
            module.conv_proj_q = Rearrange("b c h w -> b (h w) c")
    return model


def tensors_of(model: nn.Module) -> np.ndarray:
    return np.array([cases.describe(k, v.shape) for k, v in sorted(model.state_dict().items())])


def run(authors: ModuleType, name: str, case: cases.Case) -> dict[str, np.ndarray]:
    """What the authors' model gives for a case."""
    model = build(authors, cases.authors_spec(case.settings), cases.NUM_CLASSES)
    results = {"tensors": tensors_of(model)}
    weights = cases.fill(results["tensors"])
    model.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()}, strict=True)
    model.train(case.training)
    stages = []
    for stage in range(len(case.settings["depth"])):
        getattr(model, f"stage{stage}").register_forward_hook(
            lambda module, args, output: stages.append(output)
        )
    torch.manual_seed(cases.SEED)
    logits = model(torch.from_numpy(cases.image(name, case.image)))
    results["logits"] = logits.reshape(case.image[0], cases.NUM_CLASSES)
    results |= {f"hidden_states/{i}": image for i, (image, _) in enumerate(stages)}
    _, class_token = stages[-1]
    if class_token is not None:
        results["class_token"] = class_token
    if case.training:
        results |= {f"after/{k}": v for k, v in model.named_buffers()}
    logits.square().mean().backward()
    results |= {f"gradient/{k}": model.get_parameter(k).grad for k in case.gradients}
    return {k: v.detach().numpy() if isinstance(v, Tensor) else v for k, v in results.items()}


def describe_variant(authors: ModuleType, file: Path) -> dict[str, np.ndarray]:
    """The tensors, drop-path rates and settings of a published variant; nothing is computed."""
    spec = yaml.safe_load(file.read_text())["MODEL"]["SPEC"]
    model = build(authors, spec, num_classes=1000)
    blocks = (m for m in model.modules() if isinstance(m, authors.Block))
    rates = [getattr(block.drop_path, "rate", 0.0) for block in blocks]
    return {
        "tensors": tensors_of(model),
        "drop_path_rates": np.array(rates),
        "spec": np.array(json.dumps(spec)),
    }


def main() -> None:
    """Run every case and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    checkout = parser.parse_args().checkout
    authors = import_authors(checkout)
    torch.set_num_threads(1)
    groups = {name: run(authors, name, case) for name, case in cases.CASES.items()}
    for name in cases.VARIANTS:
        yaml_file = checkout / "experiments" / "imagenet" / "cvt" / YAML_FILES[name]
        groups[name] = describe_variant(authors, yaml_file)
    np.savez_compressed(
        cases.GOLDEN_FILE,
        **{f"{group}/{k}": v for group, results in groups.items() for k, v in results.items()},
    )
    print(f"{cases.GOLDEN_FILE.name}: {cases.GOLDEN_FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
