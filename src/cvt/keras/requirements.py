"""What the Keras models need is asked for when this is imported, before anything else is."""

from cvt.libraries import keep_triton_apart, version_of

BACKENDS = ("tensorflow", "jax", "torch")
OLDEST = (3, 13)  # of Keras
INSTALL = "pip install 'cvt-vision[tensorflow]'"
SUPPORTED = f"cvt's TF classes run on {', '.join(BACKENDS)}: set KERAS_BACKEND to one of them"


def check() -> None:
    """Make sure that Keras is here, new enough and on a backend that it can train on.

    Raises:
        ImportError: it is not; names what to do.
    """
    found = version_of("keras")
    if found is None:
        raise ImportError(f"cvt's TF classes need Keras 3 and TensorFlow: {INSTALL}")
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ImportError(f"cvt's TF classes need Keras {oldest}, and this is {found}: {INSTALL}")
    keep_triton_apart()
    try:
        import keras
    except ModuleNotFoundError as error:
        raise ImportError(
            f"Keras' backend needs {error.name}, which is not installed: {INSTALL}, or set "
            f"KERAS_BACKEND to another of {', '.join(BACKENDS)}"
        ) from error
    except ValueError as error:  # Keras' own, of a backend that it does not know
        raise ImportError(f"{error}; {SUPPORTED}") from error
    if keras.config.backend() not in BACKENDS:
        raise ImportError(f"Keras' backend is {keras.config.backend()}; {SUPPORTED}")


check()
