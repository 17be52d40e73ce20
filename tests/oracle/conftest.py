"""Independent implementations to compare with; they come with the extra `oracle`."""

import pytest

NEEDED = "needs the extra 'oracle': pip install -e '.[dev,oracle]'"


@pytest.fixture(scope="session")
def torch():
    module = pytest.importorskip("torch", reason=NEEDED)
    module.set_num_threads(1)
    return module


@pytest.fixture(scope="session")
def llama(torch):
    """Transformers' Llama, whose attention is ours but for names and layouts."""
    pytest.importorskip("transformers", reason=NEEDED)
    from transformers import LlamaConfig
    from transformers.models.llama import modeling_llama

    return LlamaConfig, modeling_llama
