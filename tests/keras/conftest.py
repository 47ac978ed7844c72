import os

from cvt.libraries import keep_triton_apart

# What a test compiles runs a few times: XLA takes a third of the time without optimising it.
FLAGS = {
    "tensorflow": (
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ),
    "jax": (
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_use_fusion_emitters=false",
    ),
}
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS.get(os.environ.get("KERAS_BACKEND"), ())))

keep_triton_apart()  # before any test imports Keras
