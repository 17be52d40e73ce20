"""Eight fake devices, exact matmuls and no silent broadcasting, for every test.

Nearly all test time is the compiler's last step, turning small programs that run once into fast
machine code. Tests leave it out: graphs, fusions, buffers and collectives are the same as a
user's, the machine code is not tuned. `EFFJAX_TEST_TUNED=1 pytest` runs what a user runs.
"""

import os
from importlib.metadata import version

_FLAGS = ["--xla_force_host_platform_device_count=8"]
if not os.environ.get("EFFJAX_TEST_TUNED"):
    _FLAGS += [
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
    if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # later ones lack the option
        _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS]).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402  (reads the flags when it is imported)

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
