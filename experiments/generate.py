"""Continue a text with a trained model.

    python -m experiments.generate --prompt 'def main('
    python -m experiments.generate --checkpoint runs/pretrain/model --sampling.temperature 0

Reads what `experiments.compare` and `experiments.pretrain` saved. Cost: a few seconds.
"""

import time
from dataclasses import dataclass, field

import jax

from effjax.config import main, require_finite, require_positive, require_types
from effjax.data.tokenizers import ByteTokenizer
from effjax.inference.generate import generate
from effjax.inference.sampling import SamplingConfig
from effjax.models.decoder import decoder
from effjax.training.saved_model import load_model


@dataclass(frozen=True)
class GenerateConfig:
    """Continue a text with a trained model. tokens: how many to make, for each of `samples`."""

    checkpoint: str = "runs/compare/checkpoints/attention"
    prompt: str = "def "
    tokens: int = 200
    samples: int = 1
    seed: int = 0
    sampling: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(temperature=0.8, top_p=0.95)
    )

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "tokens", "samples")
        require_finite(self, "seed", low=0)


def continue_text(config: GenerateConfig) -> int:
    """Loads the model, continues the prompt and prints each sample."""
    model = load_model(config.checkpoint)
    tokenizer = ByteTokenizer()
    begin = time.perf_counter()
    made = generate(
        decoder(model.config).apply,
        model.params,
        [tokenizer.document(config.prompt).tolist()] * config.samples,
        config.tokens,
        sampling=config.sampling,
        key=jax.random.key(config.seed),
    )
    seconds = time.perf_counter() - begin
    for ids in made:
        print(f"{config.prompt}{tokenizer.decode(ids)}\n")
    print(f"{made.size} tokens in {seconds:.1f} s, compilation included")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(continue_text, GenerateConfig, prog="python -m experiments.generate"))
