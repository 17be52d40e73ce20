"""Eight fake devices, exact matmuls and no silent broadcasting, for every test.

Nearly all test time is the compiler's last step, turning small programs that run once into fast
machine code. Tests leave it out: graphs, fusions, buffers and collectives are the same as a
user's, the machine code is not tuned. `EFFJAX_TEST_TUNED=1 pytest` runs what a user runs.
"""

import gc
import os
from importlib.metadata import version

_FLAGS = ["--xla_force_host_platform_device_count=8"]
if not os.environ.get("EFFJAX_TEST_TUNED"):
    _FLAGS += [
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",  # small programs gain nothing from threads
        "--xla_cpu_prefer_vector_width=128",
    ]
    if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # later ones lack the option
        _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS]).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402  (reads the flags when it is imported)

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_collection_finish() -> None:
    """Tracing makes millions of small objects: collect them seldom, and never what stands now."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)
