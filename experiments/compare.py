"""Which efficient method pays at my budget, on my machine?

    python -m experiments.compare                       # about 5 minutes on 2 cores
    python -m experiments.compare --minutes 30          # for a verdict
    python -m experiments.compare --methods attention,window,int8 --corpus 'texts/*.txt'

Trains small byte-level decoders at equal training FLOPs, transforms the trained baseline, measures
every row alike and writes `runs/compare/{config.json, metrics.jsonl, record.json, report.html}`.
Ctrl-C keeps the rows that are finished and exits 75; the same command goes on.

Expectation at 5 minutes: the mixers lie within a tenth of a bit of each other; int8 costs nothing
that can be measured, groups of int4 a little, and 50%, 2:4 and a low rank much, since a model this
small and this briefly trained has few weights to spare.
Source: protocol after Treviso et al. 2023, "Efficient Methods for Natural Language Processing: A
Survey", section 8, https://arxiv.org/abs/2209.00099
"""

import os
import shlex
import time

import jax

from effjax.config import main
from effjax.data.tokenizers import ByteTokenizer
from effjax.errors import Preempted
from effjax.evaluate.measure import this_device, versions
from effjax.evaluate.record import Record
from effjax.evaluate.report import write_report
from effjax.evaluate.table import print_table
from effjax.inference.generate import generate
from effjax.inference.sampling import SamplingConfig
from effjax.models.decoder import decoder
from effjax.select.comparison import BASELINE, CompareConfig, Comparison
from effjax.training.run_directory import RunDirectory

PROMPT = "def main("


def compare(config: CompareConfig) -> int:
    """Runs what is missing of a comparison and shows all of it."""
    with RunDirectory(config.out, config, free=("methods",)) as directory:
        comparison = Comparison(config, directory)
        facts = header(comparison)
        print("effjax compare: efficient methods at equal training FLOPs")
        print("\n".join(f"  {name:9} {fact}" for name, fact in facts.items()), flush=True)
        try:
            for row in comparison.missing():
                begin = time.perf_counter()
                made = comparison.make(row)
                print(row_line(row, made, time.perf_counter() - begin), flush=True)
        except KeyboardInterrupt:
            left = ", ".join(comparison.missing())
            show(comparison, facts, sample="")
            raise Preempted(
                f"interrupted; finished rows are kept in {config.out}, and the same command goes "
                f"on with: {left}"
            ) from None
        sample = ""
        if BASELINE in comparison.records:
            sample = sample_text(comparison)
            print(f"\nThe baseline continues {PROMPT!r}:\n{sample}\n")
        show(comparison, facts, sample)
        print("\n".join(next_commands(config)))
    return 0


def header(comparison: Comparison) -> dict[str, str]:
    """What this run stands on: device, versions, text, budget, time."""
    config, device, text = comparison.config, this_device(), comparison.text.corpus
    named = ", ".join(f"{name} {number}" for name, number in versions().items())
    budget = config.budget_of(BASELINE)
    return {
        "device": f"{device.kind} x {device.count}, {device.cores} cores",
        "versions": named,
        "text": f"{text.name}, {text.bytes:,} bytes, digest {text.digest[:16]}",
        "budget": f"{budget:.3g} training FLOPs a row, "
        f"{config.train.batch} x {config.train.length} tokens a step",
        "rows": ", ".join(config.rows),
        "time": f"at most about {config.minutes:g} minutes; results in {config.out}",
    }


def row_line(row: str, made: Record, seconds: float) -> str:
    """One finished row, in a line."""
    if not made.status.finished:
        return f"{row}: skipped, {made.status.reason}"
    quality = made.quality
    spread = "" if quality.low is None else f" [{quality.low:.3f}, {quality.high:.3f}]"
    stored = (made.bytes.stored or 0) / 1e6
    rate = made.time.tokens_per_s_generate or 0
    return (
        f"{row}: {quality.value:.3f} bits per byte{spread}, {stored:.2f} MB stored "
        f"({made.bytes.saving}), {rate:,.0f} tokens/s generated  [{seconds:.0f} s]"
    )


def show(comparison: Comparison, facts: dict[str, str], sample: str) -> None:
    """Prints the table and writes the report."""
    records = list(comparison.records.values())
    print_table(records)
    where = comparison.directory / "report.html"
    write_report(records, where, title="effjax compare", header=facts, sample=sample)
    print(f"report: {where}")


def sample_text(comparison: Comparison) -> str:
    """A sample of the trained baseline's text."""
    tokenizer = ByteTokenizer()
    ids = generate(
        decoder(comparison.config.model).apply,
        comparison.baseline(),
        [tokenizer.document(PROMPT).tolist()],
        160,
        sampling=SamplingConfig(temperature=0.7, top_p=0.95),
        key=jax.random.key(comparison.config.seed),
    )
    return PROMPT + tokenizer.decode(ids[0])


def next_commands(config: CompareConfig) -> list[str]:
    """Three things to do next."""
    trained = os.path.join(config.out, "checkpoints", BASELINE)
    return [
        "next:",
        "  python -m experiments.compare --minutes 30 --out runs/compare-30    # for a verdict",
        f"  python -m experiments.generate --checkpoint {shlex.quote(trained)} --prompt 'import '",
        "  python -m effjax methods                                             # what there is",
    ]


if __name__ == "__main__":
    raise SystemExit(main(compare, CompareConfig, prog="python -m experiments.compare"))
