"""The same training step in t5like and in PyTorch `transformers`, measured alternately in one run.

    python benchmarks/peers.py [--shapes=tiny,bert] [--peers=eager,compiled] [--rounds=10] [--torch_python=PYTHON]

For each shape every implementation has a process of its own, so that thread pool and allocator are as in real use. The
processes are started sequentially, with empty compilation caches, and then run one step each alternately, with short
pauses: other load on the machine affects all of them, and the ratio of two steps of one round is more reliable than the
step times. All implementations compute forward pass, backward pass and update of the same number of parameters
(checked) in the same dtype, without dropout, clipping, z-loss or recomputation; tokens are positions of encoder and
decoder. The work is `metrics.flops.model_flops` for all, though transformers' BERT also computes logits of tokens that
are not masked. `counted_flops` is PyTorch's own count of an eager step, which is lower by the matmuls of fused
attention: T5's cross-attention, Llama's self-attention. Each process also measures the matmul rate of its library,
which depends on the processor: a difference there is not a property of the model's code.

`--before=CHECKOUT` adds the code of another checkout of t5like. With `--wait_file=FILE` the steps of a shape begin when
the file exists: compile on a busy machine, and make the file when it is idle.

Prints a JSON line per peer and shape, and at the end, on standard error, a table in Markdown. Standard library only.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import measurement

HERE = Path(__file__).resolve().parent
PEERS = {"eager": [], "compiled": ["--compile"]}  # of PyTorch; t5like always runs


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model and a batch: `inputs` 0 makes it decoder-only (Llama), `targets` 0 encoder-only (BERT)."""

    model_dim: int
    layers: int  # of each stack
    heads: int  # of 64
    mlp_dim: int
    vocabulary: int
    inputs: int
    targets: int
    rows: int

    @property
    def tokens(self) -> int:
        """Positions of a batch."""
        return self.rows * (self.inputs + self.targets)


SHAPES = {
    "tiny": Shape(256, 4, 4, 1024, 4096, 256, 64, 16),
    "small": Shape(512, 8, 6, 1024, 32_128, 512, 114, 4),  # T5 1.1 small
    "dec": Shape(512, 8, 8, 2048, 32_000, 0, 512, 4),  # Llama's layer
    "bert": Shape(768, 12, 12, 3072, 30_592, 512, 0, 2),  # BERT base; its 30,522 tokens in multiples of 128
    "long": Shape(512, 8, 6, 1024, 32_128, 1024, 229, 2),  # T5 1.1 small, with rows twice as long as in "small"
    "toy": Shape(64, 1, 1, 64, 512, 32, 16, 8),  # not a measurement: it tests that all implementations run
    "toy_dec": Shape(64, 1, 1, 64, 512, 0, 32, 8),
    "toy_bert": Shape(64, 1, 1, 64, 512, 32, 0, 8),
}
MEASURED = ("tiny", "small", "dec", "bert", "long")


def t5like_command(shape: Shape, options: argparse.Namespace, checkout: Path = HERE.parent) -> list[str]:
    """The command line of `train_step.py` for a shape."""
    fields = {
        "tokenizer.vocab_size": shape.vocabulary,
        "tokenizer.num_sentinels": 100 if shape.inputs else 0,
        "data.batch_size": shape.rows,
        "data.inputs_length": shape.inputs,
        "model.model_dim": shape.model_dim,
        "model.num_layers": shape.layers,
        "model.num_heads": shape.heads,
        "model.num_kv_heads": shape.heads,
        "model.head_dim": 64,
        "model.mlp_dim": shape.mlp_dim,
        "model.dtype": options.dtype,
        "model.remat": "none",
        "optimizer.name": options.optimizer,
        **measurement.UPDATE,
    }
    if shape.targets:
        fields["data.targets_length"] = shape.targets
        config = "t5_small.py" if shape.inputs else "llama_7b.py"
    else:
        fields |= {"model.max_length": shape.inputs, "model.dropout_rate": 0}
        config = "bert_base.py"
    return [
        sys.executable,
        str(checkout / "benchmarks" / "train_step.py"),
        "--serve",
        f"--config={checkout / 'configs' / config}",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]


class Peer:
    """A process that runs training steps on request."""

    def __init__(self, name: str, command: list[str], **variables: str):
        """Start it with these environment variables and wait for its first step; `start` has the cost."""
        # Idle OpenMP threads must sleep while others are measured; compilation is measured, so caches are disabled.
        environment = os.environ | {
            "OMP_WAIT_POLICY": "passive",
            "JAX_ENABLE_COMPILATION_CACHE": "false",
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **variables,
        }
        self.name, self.rounds = name, []
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, env=environment, **pipes)
        self.machine, self.start = self._read(), self._read()

    def step(self) -> None:
        """Time one step."""
        self._process.stdin.write("1\n")
        self._process.stdin.flush()
        self.rounds.append(self._read())

    def stop(self) -> dict:
        """End the process and return its last line."""
        self._process.stdin.close()
        last = self._read()
        self._process.wait()
        return last

    def kill(self) -> None:
        """Kill the process."""
        self._process.kill()

    def _read(self) -> dict:
        for line in self._process.stdout:
            if line.startswith("{"):  # libraries print other lines
                return json.loads(line)
        raise SystemExit(f"peers.py: {self.name} ended with exit code {self._process.wait()}; its messages are above")


def compare(name: str, options: argparse.Namespace) -> list[dict]:
    """Run all implementations on a shape and return a result for each."""
    shape, peers = SHAPES[name], []
    try:
        peers.append(Peer("t5like", t5like_command(shape, options)))
        if options.before:
            command = t5like_command(shape, options, options.before)
            peers.append(Peer("t5like before", command, PYTHONPATH=str(options.before)))
        for peer in options.peers:
            settings = [f"--shape={name}", f"--optimizer={options.optimizer}", f"--dtype={options.dtype}", *PEERS[peer]]
            peers.append(Peer(f"torch {peer}", [options.torch_python, str(HERE / "torch_peer.py"), *settings]))
            ours, theirs = peers[0].start["params"], peers[-1].start["params"]
            if ours != theirs:
                raise SystemExit(f"peers.py: {name}: t5like has {ours:,} parameters, {peers[-1].name} {theirs:,}")
        if options.wait_file:
            print(f"peers.py: {name} waits for {options.wait_file}", file=sys.stderr, flush=True)
            while not options.wait_file.exists():
                time.sleep(0.2)
        for _ in range(options.warmup + options.rounds):
            for peer in peers:
                time.sleep(options.pause)
                peer.step()
        return [result(name, peer, peers[0], options) for peer in peers]
    finally:
        for peer in peers:
            peer.kill()


def result(name: str, peer: Peer, ours: Peer, options: argparse.Namespace) -> dict:
    """The result of one implementation; ratios are t5like's time over its time, medians over rounds."""

    def steps(peer: Peer, what: str) -> list[float]:
        values = [round_[what] for round_ in peer.rounds[options.warmup :]]
        return [value[0] if isinstance(value, list) else value for value in values]

    def ratio(what: str) -> float:
        return statistics.median(a / b for a, b in zip(steps(ours, what), steps(peer, what), strict=True))

    speed = measurement.summary(steps(peer, "step_ms"), SHAPES[name].tokens)
    flops = ours.start["flops_per_step"]
    return {
        "shape": name,
        "program": peer.name,
        "dtype": options.dtype,
        "optimizer": options.optimizer,
        "rounds": options.rounds,
        "params": peer.start["params"],
        "flops_per_step": flops,
        **speed,
        "cpu_ms": statistics.median(steps(peer, "cpu_ms")),
        "gflops": flops / speed["step_ms"] / 1e6,
        "t5like_time_ratio": ratio("step_ms"),
        "t5like_cpu_ratio": ratio("cpu_ms"),
        **{key: peer.start.get(key) for key in ("start_to_first_step_s", "compile_s", "loss")},
        **peer.stop(),
        **peer.machine,
    }


def row(r: dict) -> dict:
    """The columns of the table."""
    return {
        "shape": r["shape"],
        "program": r["program"],
        "parameters": r["params"],
        "tokens/s": r["tokens_per_second"],
        "step ms": r["step_ms"],
        "least ms": r["step_ms_min"],
        "CPU ms": r["cpu_ms"],
        "GFLOP/s": r["gflops"],
        "of matmul rate": r["matmul_gflops"] and r["gflops"] / r["matmul_gflops"],
        "t5like time / program": r["t5like_time_ratio"],
        "CPU time / program": r["t5like_cpu_ratio"],
        "start to first step s": r["start_to_first_step_s"],
        "compile s": r["compile_s"],
        "peak MB": r["peak_rss_mb"],
    }


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of a command line."""
    parser = argparse.ArgumentParser(description="Compare t5like with PyTorch transformers.")
    parser.add_argument("--shapes", default=",".join(MEASURED), help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--peers", default=",".join(PEERS), help="PyTorch's modes; may be empty")
    parser.add_argument("--rounds", type=int, default=10, help="timed steps of each peer")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them")
    parser.add_argument("--pause", type=float, default=0.3, help="seconds before each step")
    parser.add_argument("--optimizer", choices=["adamw", "adafactor"], default="adamw")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the computation")
    parser.add_argument("--torch_python", default=sys.executable, help="an interpreter that has torch and transformers")
    parser.add_argument("--before", type=Path, help="another checkout of t5like, to compare with")
    parser.add_argument("--wait_file", type=Path, help="the steps of a shape begin when this file exists")
    options = parser.parse_args(arguments)
    for field, known in (("shapes", SHAPES), ("peers", PEERS)):
        names = [name for name in getattr(options, field).split(",") if name]
        if unknown := set(names) - set(known):
            parser.error(f"--{field}: {', '.join(unknown)} must be of {', '.join(known)}")
        setattr(options, field, names)
    return options


def main(arguments: list[str]) -> None:
    """Run the shapes of the command line."""
    options, rows = parse(arguments), []
    for name in options.shapes:
        for values in compare(name, options):
            measurement.emit(**values)
            rows.append(row(values))
    print(f"\n{measurement.table(rows)}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
