"""Write `dialects/`: a small CvT as each other software saves it, and the logits that it computes.

    python tests/golden/make_dialects_golden.py DIALECT [CHECKOUT]

It was run on an x86-64 CPU, in an environment for each software:

- `cvt-tensorflow`: the package of this name on PyPI, 1.1.4, with the versions that it pins
  (TensorFlow 2.9.0, Python 3.10).
- `transformers-tf`: transformers 4.57.6, tensorflow-cpu 2.21.0 and tf-keras 2.21.0 save
  `tf_classifier/` as safetensors; `tf_classifier/outputs.npz` has its outputs.
- `timm`: CHECKOUT is github.com/fffffgggg54/pytorch-image-models, branch `cvt`, commit 76afc05, of
  which pull request 2176 of timm is made. Its logits are kept with and without fused attention.
- `vformer`: the package of this name on PyPI, 0.1.3.
- `paddlevit`: CHECKOUT is github.com/BR-IDL/PaddleViT, commit 5ac7d89; paddlepaddle saves.
- `passl`: CHECKOUT is github.com/PaddlePaddle/PASSL, commit 5c7359b, its `passl_v110`; saved as its
  `hooks/checkpoint_hook.py` does.

lucid-dl runs on Apple's processors only: no file of it is here.

Every weight is drawn from its name in the software. The model is `cases.DIALECT_SETTINGS`.
"""

import importlib.util
import math
import os
import pickle
import re
import sys
import types
from pathlib import Path
from typing import Any

import cases
import numpy as np

FOLDER = cases.DIALECTS_FOLDER
MODEL = cases.DIALECT_SETTINGS
CLASSES = cases.NUM_CLASSES
IMAGES = cases.image("dialects", cases.DIALECT_IMAGES)


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A value for a weight, at a scale that keeps activations and logits near 1."""
    random = cases.rng(name)
    if "num_batches" in name:
        return np.zeros(shape, np.int64)
    if "var" in name:
        return random.uniform(0.5, 2.0, shape).astype(np.float32)
    normal = random.standard_normal(shape)
    if len(shape) == 1:
        value = 0.2 * normal + name.endswith((".weight", "gamma:0"))
    else:
        value = normal * math.sqrt(max(shape) / math.prod(shape))
    if re.match(r"(.*/)?(head|classifier)\b", name):  # logits below 1, where 1e-6 can be told
        value = value / 8
    return value.astype(np.float32)


def keep(name: str, logits: np.ndarray) -> None:
    """Write the logits of a software."""
    np.save(FOLDER / f"{name}.npy", logits)
    print(name, logits.shape, logits[0])


def cvt_tensorflow() -> None:
    from cvt_tensorflow import CvT

    spec = {**cases.authors_spec(MODEL), "INIT": "trunc_norm"}
    model = CvT(spec=spec, num_classes=CLASSES)
    images = IMAGES.transpose(0, 2, 3, 1)
    model(images)
    for weight in model.weights:
        weight.assign(draw(weight.name, tuple(weight.shape)))
    model.save_weights(FOLDER / "cvt-tensorflow.h5")
    keep("cvt-tensorflow", model(images, training=False).numpy())


def transformers_tf() -> None:
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    from transformers import TFCvtForImageClassification

    model = TFCvtForImageClassification.from_pretrained(cases.TF_CLASSIFIER)
    model.save_pretrained("saved", safe_serialization=True)
    Path("saved/model.safetensors").rename(FOLDER / "transformers-tf.safetensors")


def of_torch(name: str, model: Any) -> None:
    """Draw the weights of a model in PyTorch, and keep it and its logits."""
    import torch
    from safetensors.torch import save_file

    model.eval().load_state_dict(
        {n: torch.from_numpy(draw(n, tuple(w.shape))) for n, w in model.state_dict().items()}
    )
    if name == "timm":
        save_file(model.state_dict(), FOLDER / f"{name}.safetensors")
    else:  # the old format, which is smaller
        torch.save(model.state_dict(), FOLDER / f"{name}.pth", _use_new_zipfile_serialization=False)
    with torch.no_grad():
        keep(name, model.double()(torch.from_numpy(IMAGES).double()).numpy())


def timm(checkout: str) -> None:
    sys.path.insert(0, checkout)
    from timm.layers import set_fused_attn
    from timm.models.cvt import CvT

    for fused in (True, False):
        set_fused_attn(fused)
        model = CvT(
            num_classes=CLASSES,
            dims=MODEL["embed_dim"],
            depths=MODEL["depth"],
            num_heads=MODEL["num_heads"],
        )
        of_torch("timm", model)
        if fused:
            (FOLDER / "timm.npy").rename(FOLDER / "timm_fused.npy")


def vformer() -> None:
    from vformer.models.classification.convvt import ConvVT

    model = ConvVT(
        img_size=IMAGES.shape[-1],
        n_classes=CLASSES,
        embedding_dim=MODEL["embed_dim"],
        depth=MODEL["depth"],
        num_heads=MODEL["num_heads"],
    )
    of_torch("vformer", model)


def of_paddle(name: str, model: Any) -> dict[str, Any]:
    """Draw the weights of a model in PaddlePaddle, and keep its logits; returns its state dict."""
    import paddle

    model.eval()
    state = model.state_dict()
    model.set_state_dict({n: draw(n, tuple(w.shape)) for n, w in state.items()})
    with paddle.no_grad():
        keep(name, model(paddle.to_tensor(IMAGES)).numpy())
    return model.state_dict()


def paddlevit(checkout: str) -> None:
    import paddle

    sys.path.insert(0, str(Path(checkout, "image_classification/CvT")))
    from cvt import ConvolutionalVisionTransformer

    model = ConvolutionalVisionTransformer(
        num_classes=CLASSES,
        embed_dim=MODEL["embed_dim"],
        depth=MODEL["depth"],
        num_heads=MODEL["num_heads"],
    )
    paddle.save(of_paddle("paddlevit", model), str(FOLDER / "paddlevit.pdparams"))


def passl(checkout: str) -> None:
    import paddle

    class Registry:
        def register(self) -> Any:
            return lambda cls: cls

    def module(folder: str, file: str, registry: str) -> types.ModuleType:
        """A module of PASSL without the rest of it."""
        package = f"passl_v110.modeling.{folder}"
        builder = types.ModuleType(f"{package}.builder")
        setattr(builder, registry, Registry())
        sys.modules[builder.__name__] = builder
        path = Path(checkout, "passl_v110/modeling", folder, file)
        spec = importlib.util.spec_from_file_location(f"{package}.{path.stem}", path)
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
        return found

    class Wrapper(paddle.nn.Layer):  # as CvTWrapper
        def __init__(self) -> None:
            super().__init__()
            self.backbone = module("backbones", "cvt.py", "BACKBONES").CvT(
                embed_dim=MODEL["embed_dim"], depth=MODEL["depth"], num_heads=MODEL["num_heads"]
            )
            self.head = module("heads", "cvt_head.py", "HEADS").CvTClsHead(
                in_channels=MODEL["embed_dim"][-1], num_classes=CLASSES
            )

        def forward(self, images: Any) -> Any:
            return self.head(self.backbone(images))

    state = {name: weight.numpy() for name, weight in of_paddle("passl", Wrapper()).items()}
    with open(FOLDER / "passl.pdparams", "wb") as file:
        pickle.dump({"epoch": 3, "state_dict": state, "lr_scheduler": {"last_lr": 0.1}}, file)


if __name__ == "__main__":
    globals()[sys.argv[1].replace("-", "_")](*sys.argv[2:])
