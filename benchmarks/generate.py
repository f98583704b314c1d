"""Decoding speed of t5like and of PyTorch `transformers.generate`, measured alternately in one run.

    python benchmarks/generate.py [--shapes=small,dec] [--rows=1,32] [--ways=greedy,beams] [--rounds=5]
                                  [--torch_python=PYTHON] [--peers=transformers]

Models as in `peers.py` (T5 1.1 small; a Llama-like decoder of its size), random weights, float32, prompts of 64 tokens,
64 new tokens without end of sequence, greedy or with 4 beams. For each case both libraries have a process of their own.
After warm-up they decode alternately, so that other load on the machine affects both; the ratio is the median over
rounds. `floor ms` is a lower bound per token: the bytes of the weights that a step reads, over the bandwidth at which
this process sums an array of that size with all its cores.

Prints a JSON line per case and library, and finally a Markdown table on standard error. This file runs both libraries:
each process imports only JAX or only torch.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import measurement
from peers import SHAPES, Peer, Shape, t5like_command

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from t5like.config.schema import Config

PROMPT, NEW, BEAMS = 64, 64, 4
Run = Callable[[int], list[float]]  # number of times -> seconds of each


def serve_t5like(shape: Shape, rows: int, way: str) -> None:
    """Decode on request."""
    from t5like.sharding import allocator

    allocator.keep_freed()
    from t5like.config import loader

    settings = argparse.Namespace(dtype="float32", optimizer="adamw")
    _, fields = measurement.split(t5like_command(shape, settings)[2:])
    path = Path(__file__).parent.parent / "configs" / ("t5_small.py" if shape.inputs else "llama_7b.py")
    run, count = t5like_decoder(loader.load(path, fields), rows, PROMPT, NEW, BEAMS if way == "beams" else 1)
    _served(run, count, measurement.machine("jax", "jaxlib"), sum_gbps())


def t5like_decoder(config: "Config", rows: int, prompt: int, new: int, beams: int) -> tuple[Run, int]:
    """A function that decodes as often as it is told, by `decoding.decode_texts` as `t5like generate` calls it.

    Args:
        config: of the model, whose weights are random; on the first device.
        rows: prompts of a batch.
        prompt: tokens of a prompt.
        new: tokens of a text, without end of sequence.
        beams: 1 decodes greedily.

    Returns:
        The function, which returns the seconds of each time, and the number of parameters.
    """
    import jax
    import numpy as np

    from t5like import tree
    from t5like.data import pipeline
    from t5like.inference.decoding import decode_texts, row_keys, unstack_params
    from t5like.inference.sampling import DecodingOptions
    from t5like.optim import train_state
    from t5like.sharding import auto
    from t5like.sharding import mesh as meshes

    config = auto.resolve_auto(config, meshes.make_mesh(config, jax.devices()[:1]))
    params = tree.nested(train_state.random_params(config, pipeline.spec(config), jax.random.key(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    params = jax.jit(lambda params: unstack_params(config, params))(params)
    prompts = np.random.default_rng(0).integers(3, config.tokenizer.vocab_size, (rows, prompt)).astype(np.int32)
    lengths, no_end = np.full(rows, prompt, np.int32), np.array([-1], np.int32)
    decoding = DecodingOptions(max_new_tokens=new, num_beams=beams)
    traced = jax.tree.map(np.float32, decoding.traced)

    def run(times: int) -> list[float]:
        seconds = []
        for _ in range(times):
            begin = time.perf_counter()
            output = decode_texts(
                config,
                params,
                prompts,
                lengths,
                row_keys(0, np.arange(rows)),
                no_end,
                traced,
                max_new_tokens=new,
                num_texts=decoding.num_texts,
                use_beams=decoding.num_beams > 1,
            )
            assert (np.asarray(output.ids_BGL) != 0).mean() > 0.9
            seconds.append(time.perf_counter() - begin)
        return seconds

    return run, count


def serve_torch(shape: Shape, rows: int, way: str) -> None:
    """Decode on request."""
    import torch
    from torch_peer import llama, t5

    torch.manual_seed(0)
    model = (t5 if shape.inputs else llama)(shape).eval()
    count = sum(parameter.numel() for parameter in model.parameters())
    run = torch_decoder(model, rows, PROMPT, NEW, BEAMS if way == "beams" else 1)
    _served(run, count, measurement.machine("torch", "transformers"), None)


def torch_decoder(model: "PreTrainedModel", rows: int, prompt: int, new: int, beams: int) -> Run:
    """`t5like_decoder` by `transformers.generate`, on the model's device and in its dtype."""
    import torch

    prompts = torch.randint(3, model.config.vocab_size, (rows, prompt), device=model.device)

    def run(times: int) -> list[float]:
        seconds = []
        for _ in range(times):
            begin = time.perf_counter()
            with torch.inference_mode():
                made = model.generate(
                    prompts,
                    attention_mask=torch.ones_like(prompts),
                    max_new_tokens=new,
                    eos_token_id=None,
                    pad_token_id=0,
                    num_beams=beams,
                    do_sample=False,
                    use_cache=True,
                )
            assert made.cpu().shape[1] == new + (1 if model.config.is_encoder_decoder else prompt), made.shape
            seconds.append(time.perf_counter() - begin)
        return seconds

    return run


def _served(run, count: int, machine: dict, gbps: float | None) -> None:
    [first] = run(1)
    measurement.emit(**machine)
    measurement.emit(params=count, first_s=first, sum_gbps=gbps)
    measurement.serve(run)
    measurement.emit(peak_rss_mb=measurement.peak_memory_mb())


def sum_gbps() -> float:
    """GB/s at which JAX sums 256 MB."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones(2**26)
    add = jax.jit(jnp.sum)
    add(x).block_until_ready()
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        add(x).block_until_ready()
        seconds.append(time.perf_counter() - begin)
    return x.nbytes / min(seconds) / 1e9


def weights_per_token(shape: Shape) -> int:
    """Bytes of float32 weights that a decoding step reads: layers of the decoder and the head."""
    attention = 4 * shape.model_dim * shape.heads * 64
    own = attention + 3 * shape.model_dim * shape.mlp_dim
    cross = attention // 2 if shape.inputs else 0  # keys and values are cached
    return 4 * (shape.layers * (own + cross) + shape.model_dim * shape.vocabulary)


def compare(name: str, rows: int, way: str, options: argparse.Namespace) -> list[dict]:
    """Run both libraries on a case and return a result for each."""
    pythons = {"t5like": sys.executable, "transformers": options.torch_python}
    peers, sides = [], ["t5like", *options.peers]
    case = {"shape": name, "rows": rows, "way": way}
    try:
        for side in sides:
            command = [pythons[side], str(Path(__file__)), f"--serve={side}", f"--case={json.dumps(case)}"]
            peers.append(Peer(side, command))
        ours, theirs = peers[0], peers[-1]
        if ours.start["params"] != theirs.start["params"]:
            raise SystemExit(f"generate.py: {name}: {ours.start['params']:,} parameters, {theirs.start['params']:,}")
        for _ in range(options.warmup + options.rounds):
            for peer in peers:
                time.sleep(options.pause)
                peer.step()
        times = {peer.name: [each["step_ms"][0] for each in peer.rounds[options.warmup :]] for peer in peers}
        ratios = [a / b for a, b in zip(times[ours.name], times[theirs.name], strict=True)]
        floor = weights_per_token(SHAPES[name]) / ours.start["sum_gbps"] / 1e6
        return [
            {
                **case,
                "program": peer.name,
                "tokens/s": 1e3 * rows * NEW / statistics.median(times[peer.name]),
                "ms a token": statistics.median(times[peer.name]) / NEW,
                "floor ms": floor,
                "transformers' time / t5like's": statistics.median(1 / ratio for ratio in ratios),
                "first s": peer.start["first_s"],
                "peak MB": peer.stop()["peak_rss_mb"],
                **peer.machine,
            }
            for peer in peers
        ]
    finally:
        for peer in peers:
            peer.kill()


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of a command line."""
    parser = argparse.ArgumentParser(description="Compare decoding with transformers.generate.")
    parser.add_argument("--shapes", default="small,dec")
    parser.add_argument("--rows", default="1,32")
    parser.add_argument("--ways", default="greedy,beams")
    parser.add_argument("--peers", default="transformers", help="empty: t5like alone")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each side")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them")
    parser.add_argument("--pause", type=float, default=0.2, help="seconds before each call")
    parser.add_argument("--torch_python", default=sys.executable, help="an interpreter that has torch and transformers")
    parser.add_argument("--serve", choices=["t5like", "transformers"], help=argparse.SUPPRESS)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for field, known in (("shapes", SHAPES), ("peers", ["transformers"]), ("ways", ["greedy", "beams"])):
        names = [name for name in getattr(options, field).split(",") if name]
        if unknown := set(names) - set(known):
            parser.error(f"--{field}: {', '.join(unknown)} must be of {', '.join(known)}")
        setattr(options, field, names)
    return options


def main(arguments: list[str]) -> None:
    """Run the cases of the command line."""
    options = parse(arguments)
    if options.serve:
        case = options.case
        serve = serve_t5like if options.serve == "t5like" else serve_torch
        serve(SHAPES[case["shape"]], case["rows"], case["way"])
        return
    rows = []
    for shape in options.shapes:
        for count in map(int, options.rows.split(",")):
            for way in options.ways:
                for values in compare(shape, count, way, options):
                    measurement.emit(**values)
                    rows.append({key: values[key] for key in list(values)[:9]})
    print(f"\n{measurement.table(rows)}", file=sys.stderr)


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    main(sys.argv[1:])
