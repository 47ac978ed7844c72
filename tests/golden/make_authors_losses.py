"""Write `authors_losses.npz`: how the authors' model learns in every training in `cases.py`.

    python tests/golden/make_authors_losses.py PATH_OF_A_CHECKOUT

The checkout, the stand-ins, the filled weights and the versions are those of
`make_authors_golden.py`. The loss, the optimizer with its parameter groups and the schedule are the
authors' too, from `core/loss.py`, `optim/build.py` and `scheduler/build.py` of their `lib`. The
schedule calls timm, which was 1.0.31; 0.3.2, which the authors pinned, gives the same rates.

For each training the file keeps the learning rate and the loss of every step and, after the last,
the logits of all images in evaluation mode.
"""

import argparse
from pathlib import Path
from types import ModuleType

import cases
import numpy as np
import timm.optim  # before `import_authors` puts a stand-in in the place of timm
import timm.scheduler  # noqa: F401
import torch
from make_authors_golden import build, import_authors
from yacs.config import CfgNode


def settings(training: cases.Training) -> CfgNode:
    """What the authors' functions read of their yaml files."""
    schedule = {"sched": "cosine", "cooldown_epochs": 10, "decay_rate": 0.1, **cases.SCHEDULE}
    optimizer = {
        "OPTIMIZER": training.optimizer,
        "LR": training.learning_rate,
        "WD": training.weight_decay,
        "WITHOUT_WD_LIST": ["bn", "bias", "ln"],
        "MOMENTUM": 0.9,
        "NESTEROV": False,
    }
    return CfgNode(
        {
            "VERBOSE": False,
            "AUG": {"MIXUP_PROB": float(training.soft_targets)},
            "LOSS": {"LOSS": "softmax", "LABEL_SMOOTHING": 0.0},
            "TRAIN": {**optimizer, "LR_SCHEDULER": {"METHOD": "timm", "ARGS": schedule}},
        }
    )


def run(authors: ModuleType, training: cases.Training) -> dict[str, np.ndarray]:
    """The authors' learning rates, losses and final logits."""
    from core.loss import build_criterion
    from optim import build_optimizer
    from scheduler import build_lr_scheduler

    spec = cases.authors_spec(cases.LEARNER.settings)
    model = build(authors, spec, cases.LEARNER_CLASSES).train()
    weights = cases.fill(cases.describe(k, v.shape) for k, v in model.state_dict().items())
    model.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()}, strict=True)
    config = settings(training)
    criterion = build_criterion(config)
    optimizer = build_optimizer(config, model)
    scheduler = build_lr_scheduler(config, optimizer, 0) if training.cosine else None
    images = torch.from_numpy(cases.training_images())
    targets = torch.from_numpy(cases.training_targets(training))
    rates, losses = [], []
    for step in range(cases.STEPS):
        loss = criterion(model(images[step % 2]), targets[step % 2])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
        losses.append(loss.item())
        if scheduler is not None:
            scheduler.step(step + 1)
    with torch.no_grad():
        logits = model.eval()(images.flatten(0, 1))
    return {
        "learning_rates": np.array(rates),
        "losses": np.array(losses, np.float32),
        "logits": logits.numpy(),
    }


def main() -> None:
    """Run every training and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    authors = import_authors(parser.parse_args().checkout)
    torch.set_num_threads(1)
    groups = {name: run(authors, training) for name, training in cases.TRAININGS.items()}
    np.savez_compressed(
        cases.LOSSES_FILE,
        **{f"{group}/{k}": v for group, results in groups.items() for k, v in results.items()},
    )
    for name, results in groups.items():
        print(f"{name}: loss {results['losses'][0]:.3f} to {results['losses'][-1]:.3f}")


if __name__ == "__main__":
    main()
