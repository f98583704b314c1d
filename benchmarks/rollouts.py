"""Speed of the rollouts of `t5like rl` and of `t5like generate` on the same model and prompts, in one process.

    python benchmarks/rollouts.py --workdir=RUN [--prompts=16] [--answers=8] [--rounds=10]

RUN is an encoder-decoder or decoder-only run whose prompts are texts; here they are random ids of the length
`data.inputs_length` / 2. Three ways are measured alternately, all sample at temperature 1 up to `data.targets_length`
tokens: the `Sampler` of rollouts, with its log-probabilities; `Generator.answer` as for a file of prompts, with several
predictions per prompt; and the same with each prompt repeated and one prediction each.

Prints a JSON line per way: tokens per second, and the rollout's time as a multiple of this way's, as medians of rounds;
the same ratio of processor time, which other programs on the machine change less; and that per token, because the ways
sample texts of different lengths.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import measurement


def ways(workdir: Path, prompts: int, answers: int) -> dict[str, Callable[[], int]]:
    """Each way as a function that samples once and returns the number of tokens."""
    import jax
    import numpy as np

    from t5like.checkpoint import run_directory
    from t5like.inference.generate import Generator
    from t5like.inference.sampling import DecodingOptions
    from t5like.rl.rollouts import Sampler

    loaded = run_directory.load(workdir.absolute(), None, all_devices=True)
    config, tokenizer = loaded.config, loaded.tokenizer
    generator, sampler = Generator(config, loaded.params, tokenizer), Sampler(config, loaded.mesh, tokenizer)
    ids = np.random.default_rng(0).integers(3, tokenizer.vocab_size, (prompts, max(config.data.inputs_length // 2, 1)))
    rows = [generator.prompt_format.input_prompt(row.tolist()) for row in ids]
    length = config.data.targets_length

    def rollout() -> int:
        made = sampler(loaded.params, rows, np.arange(prompts), answers=answers, temperature=1.0, seed=0)
        return int(made.lengths_BG.sum())

    def generate(copies: int, returned: int) -> int:
        options = DecodingOptions(max_new_tokens=length, temperature=1.0, num_returned=returned)
        with jax.set_mesh(loaded.mesh):
            made = generator.answer(rows * copies, options)
        return sum(min(len(answer.ids) + 1, length) for of_prompt in made for answer in of_prompt)

    return {
        "rollout": rollout,
        "generate, several per prompt": lambda: generate(1, answers),
        "generate, one per prompt": lambda: generate(answers, 1),
    }


def measure(options: argparse.Namespace) -> list[dict]:
    """A result for each way."""
    programs = ways(Path(options.workdir), options.prompts, options.answers)
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    processor: dict[str, list[float]] = {name: [] for name in programs}
    tokens = {name: program() for name, program in programs.items()}  # compiles
    for _ in range(options.rounds):
        for name, program in programs.items():
            begin, begin_processor = time.perf_counter(), time.process_time()
            program()
            seconds[name].append(time.perf_counter() - begin)
            processor[name].append(time.process_time() - begin_processor)
    ratio = lambda of, name: statistics.median(a / b for a, b in zip(of["rollout"], of[name], strict=True))
    return [
        {
            "way": name,
            "tokens": tokens[name],
            "tokens/s": tokens[name] / statistics.median(seconds[name]),
            "rollout's time / this": ratio(seconds, name),
            "processor time": ratio(processor, name),
            "processor time per token": ratio(processor, name) * tokens[name] / tokens["rollout"],
        }
        for name in programs
    ]


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of a command line."""
    parser = argparse.ArgumentParser(description="Compare rollouts with generate.")
    parser.add_argument("--workdir", required=True, help="a run")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--answers", type=int, default=8, help="per prompt")
    parser.add_argument("--rounds", type=int, default=10)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Measure and print."""
    options = parse(arguments)
    measurement.emit(**measurement.machine("jax", "jaxlib"))
    for result in measure(options):
        measurement.emit(**result)


if __name__ == "__main__":
    main(sys.argv[1:])
