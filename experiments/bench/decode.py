"""How fast does it generate, against Hugging Face's `generate`?

    python -m experiments.bench.decode                # 128 + 256 tokens, batch 1 and 8, size s
    python -m experiments.bench.decode --batch 1 --rounds 5

CPU seconds for a whole greedy generation, prefill included, on one pinned core; the ratio to a
Llama of the same sizes in transformers (extra `oracle`; left out, by name, without it); the first
call; the distance to reading every weight once a token. Cost: 2 minutes.
Expectation: the floors against Hugging Face are 4 at batch 1 and 3 at batch 8.
"""

import argparse
import time

from experiments.bench import pinned  # isort: skip  (pins the core before XLA counts them)

import jax
import numpy as np

from effjax.cost.memory import stored_bytes
from effjax.cost.peaks import peaks
from effjax.inference.generate import generate
from effjax.models.decoder import decoder
from effjax.models.presets import small

PROMPT, NEW = 128, 256


def hugging_face(config, prompts):
    """A thunk that generates with a randomly initialised LlamaForCausalLM of the same sizes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab,
            hidden_size=config.width,
            intermediate_size=config.hidden * 2 // 3,  # gated: as many weights as ours
            num_hidden_layers=config.layers,
            num_attention_heads=config.attention.heads,
            max_position_embeddings=PROMPT + NEW,
            tie_word_embeddings=True,
        )
    ).eval()
    tokens = torch.tensor(prompts)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}

    def thunk() -> None:
        with torch.no_grad():
            model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)

    return thunk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    config = small()
    init, apply, _ = decoder(config)
    params = jax.jit(init)(jax.random.key(0))
    for batch in options.batch:
        prompts = np.random.default_rng(0).integers(0, 256, (batch, PROMPT)).tolist()
        ours = lambda prompts=prompts: generate(apply, params, prompts, NEW)  # noqa: E731
        begin = time.process_time()
        ours()
        print(f"batch {batch}: first call {time.process_time() - begin:.1f} cpu s")
        thunks = {"effjax": ours}
        try:
            thunks["hugging face"] = hugging_face(config, prompts)
        except ImportError as error:
            print(f"  hugging face: left out, {error}; pip install 'effjax[oracle]'")
        seconds = pinned.rounds(thunks, options.rounds)
        pinned.show(seconds, list(thunks)[-1])
        limit = NEW * stored_bytes(params) / peaks().read
        share = limit / min(seconds["effjax"])
        print(f"  reading every weight once a token: {limit:.3f} s, a share of {share:.2f}")


if __name__ == "__main__":
    main()
