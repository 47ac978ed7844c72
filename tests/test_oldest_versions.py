"""The bounds of pyproject.toml, as `make test-oldest` installs them."""

import pytest
from oldest_versions import oldest, requirements


def test_every_requirement_is_pinned_to_its_lower_bound():
    declared = [
        "transformers>=5.17,<6",
        "ray[data]>=2.52",
        "tensorflow>=2.20; sys_platform != 'linux'",
        "numpy<3, >= 2.0",
        "matplotlib>=3.10",
        "matplotlib>=3.10",
        "cvt-vision[train,export]",
    ]
    assert oldest(declared) == [
        "matplotlib==3.10",
        "numpy==2.0",
        "ray==2.52",
        "tensorflow==2.20; sys_platform != 'linux'",
        "transformers==5.17",
    ]


@pytest.mark.parametrize("requirement", ["torch", "torch<3", "torch==2.10"])
def test_a_requirement_without_a_lower_bound_is_named(requirement):
    with pytest.raises(ValueError, match=f"'{requirement}' has no lower bound: write torch>="):
        oldest([requirement])


def test_a_distribution_has_one_lower_bound():
    names = [pin.partition("==")[0] for pin in oldest(requirements())]
    assert len(set(names)) == len(names)
    assert {"torch", "ray", "keras", "pytest"} <= set(names)
