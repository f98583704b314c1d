"""The training loop, read from top to bottom: run directory, data, devices, state, steps, what it shows at the end.

It does no math and makes no choices that the config does not make. Everything that it leaves behind lies in the run
directory: config.json, tokenizer.model, checkpoints/, metrics.jsonl, provenance.jsonl, tensorboard/, loss.png,
samples.txt. Starting the same command again continues after the last checkpoint, bitwise as if it had not stopped, or
says that it is complete.
Several processes (`distributed.joined`) all run this; the first one speaks and writes.
"""

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax

from t5like import tree
from t5like.checkpoint import provenance
from t5like.checkpoint.init_from import REPORT, Initial, begin_with, initial_params, write_report
from t5like.checkpoint.run_directory import (
    check_checkpoint,
    check_run_directory,
    checkpoints_of,
    imported_params,
    open_run_directory,
    with_run_tokenizer,
)
from t5like.config.schema import Config
from t5like.data import pipeline
from t5like.data.pipeline import Batches
from t5like.data.sources.names import source_names
from t5like.data.store import preparation, statistics
from t5like.data.store.verification import Verification
from t5like.data.tokenizers.vocabulary import Vocabulary
from t5like.distributed import processes
from t5like.distributed.preemption import catch_preemption
from t5like.errors import CheckpointError, ConfigError, Preempted
from t5like.evaluation.heldout import Evaluator
from t5like.evaluation.samples import samples
from t5like.evaluation.task_eval import TaskEvaluator, write_predictions
from t5like.inference.generate import Generator
from t5like.io.paths import cache_directory
from t5like.metrics import flops, writers
from t5like.metrics.loss_curve import draw_loss_curve
from t5like.metrics.profiler import Profiler
from t5like.metrics.progress import Progress
from t5like.metrics.throughput import Throughput
from t5like.optim import optimizers, step
from t5like.sharding import auto, memory, placement, xla_options
from t5like.sharding import mesh as meshes
from t5like.train.expected_loss import summary
from t5like.train.report import StepReporter, print_line


def train(config: Config, workdir: Path) -> None:
    """Train until `train.num_steps`, from the run directory's last checkpoint if it has one.

    Raises:
        UserError: see `errors`; nothing of an earlier run in `workdir` is lost.
    """
    # ---- The run directory ----
    batch = pipeline.spec(config)
    config = with_run_tokenizer(config, workdir)
    check_run_directory(config, workdir)
    primary = processes.is_primary()
    say = print_line if primary else (lambda _: None)

    # ---- Devices ----
    mesh = meshes.make_mesh(config)
    asked, config = config, auto.resolve_auto(config, mesh)
    abstract = step.abstract_state(config, batch, mesh)
    memory.check_training(config, batch, abstract, mesh)
    xla_options.check(config.train, mesh)
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    size = f"{tree.num_parameters(abstract.params):,} parameters"
    say(f"model      {size}, {config.model.architecture}, {config.model.dtype}")
    counted = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    say(f"devices    {mesh.size} x {mesh.devices.flat[0].device_kind}{counted}, {axes}")
    for line in meshes.unsplit_lengths(config, mesh):
        say(f"           {line}")

    # ---- Data ----
    directory = cache_directory(config.data.cache_directory)
    prepared = processes.once_per_file_system("preparing the data", directory, partial(preparation.prepare, config))
    for note in prepared.notes:
        say(note)
    verification = Verification(prepared.stores)  # before anything of them is read
    tokenizer = prepared.tokenizer
    vocabulary = Vocabulary.of(tokenizer)
    splits = {split: pipeline.open_split(config, prepared.stores, split) for split in ("train", "heldout")}
    batches = Batches(config, vocabulary, splits["train"])
    heldout = Batches(config, vocabulary, splits["heldout"], heldout=True)
    evaluator = Evaluator(config, mesh, heldout, tokenizer)
    answers = TaskEvaluator(config, mesh, tokenizer, *splits.values()) if config.evaluate.metrics else None
    rows, size = placement.local_rows(mesh, config.data.batch_size), config.data.batch_size
    for line in statistics.lines(source_names(config.data), prepared.stores, config.data.source):
        say(f"data       {line}")
    left_out = [part.note for parts in splits.values() for part in parts if getattr(part, "note", "")]
    for line in [*batches.describe(), *left_out]:
        say(f"           {line}")
    origin = provenance.describe(asked, config, mesh, tokenizer, prepared.stores)
    for line in provenance.lines(origin):
        say(line)
    for name, rule in answers.describe().items() if answers else ():
        say(f"metric     {name.removeprefix('eval/rule/')}: {rule}")

    # ---- Nothing is written until here: a run that can't begin leaves no trace ----
    checkpoints = checkpoints_of(workdir, config)
    saved = checkpoints.latest()
    processes.assert_equal("checkpoint", str(saved), "use a --workdir on a file system that all share")
    before = config  # of what the run has learned so far
    if saved is not None:
        meta = checkpoints.meta(saved)
        check_checkpoint(meta, asked, tokenizer, workdir)
        before = meta.config
    if saved and saved >= config.train.num_steps:
        done = f"{saved:,} of {config.train.num_steps:,} steps are done"
        say(f"complete   {done}; nothing is left to train in {workdir}")
        return
    for line in optimizers.warnings(config, before, saved or 0):
        say(f"schedule   {line}")
    initial = None
    if saved == 0:  # weights from elsewhere, and no optimizer state
        if config.init_from.checkpoint:
            raise ConfigError(
                f"init_from.checkpoint={config.init_from.checkpoint}, but --workdir={workdir} holds imported weights; "
                "use another --workdir"
            )
        initial = Initial(imported_params(workdir, abstract), 0, [], [])
    elif saved is None and config.init_from.checkpoint:
        initial = initial_params(config, abstract, tokenizer)
    open_run_directory(asked, tokenizer, workdir)
    if checkpoints.latest() != saved:
        raise CheckpointError(f"--workdir={workdir} was written by another process meanwhile; start again")
    if initial and initial.report:
        write_report(workdir, config, initial)
        say(f"init_from  step {initial.step:,} of {config.init_from.checkpoint}; by parameter in {workdir / REPORT}")
        for line in [*(initial.report if config.init_from.adapt else ()), *initial.differs]:
            say(f"           {line}")

    # ---- State: own checkpoint, or init_from, or random; the step compiles meanwhile ----
    with compiling_thread() as pool:
        last = saved or 0
        begin = time.monotonic()
        compiling = pool.submit(step.compile_train_step, config, batch, abstract)
        birth = f"after step {last:,}" if last else "from random parameters"
        with processes.watchdog("the first state", last, times=3):
            if saved:
                state = checkpoints.restore(abstract, saved)
            else:
                state = step.new_state(config, batch, abstract)
                if initial:
                    state = begin_with(initial.params, state)
                    birth = f"from step {initial.step:,} of {config.init_from.checkpoint}"
                    birth = birth if initial.report else "from the import"
        train_step = compiling.result()
        processes.barrier("the first step", step=last)  # compiling takes as long as it takes
        say(f"start      {birth}, compiled in {time.monotonic() - begin:.1f} s")

    # ---- Steps ----
    if verification.pending:
        verification.start(*processes.share("verifying the data", directory))
    if primary:
        provenance.append(workdir, last, origin)
    writer = writers.Writer(workdir, step=last, primary=primary)
    progress = Progress(config.train.num_steps, log_every=config.train.log_every, step=last, primary=primary)
    throughput = Throughput(flops.model_flops(config), flops.peak_flops(mesh.devices.flatten()))

    def evaluate(done: int, *, early: bool = False) -> None:
        with throughput.pause():
            params = state.params if state.ema is None else state.ema
            values = evaluator(params)
            right = 100 * values["eval/accuracy"]
            text = f"step {done:,}: held-out loss {values['eval/loss']:.3f}, {right:.1f} % of tokens right"
            if answers and not early:
                found, records = answers(params)
                values |= found
                text += "".join(f", {name.removeprefix('eval/score/')} {value:.1f} %" for name, value in found.items())
                if primary:
                    write_predictions(workdir, done, records)
            writer.write(done, values)
            progress.note(text)

    def verified(done: int) -> None:
        """Wait until all that the run has learned from is known to be sound."""
        if verification.pending:
            progress.note(f"step {done:,}: the token store is verified before the first checkpoint is saved")
            with throughput.pause():
                verification.wait()
                processes.all_gather("verifying the data", step=done, seconds=processes.PREPARE_SECONDS)

    def save(done: int) -> None:
        with throughput.pause(), processes.watchdog("saving a checkpoint", done, times=2):
            checkpoints.save(state, config=config, tokenizer=tokenizer.model_bytes, tokenizer_hash=tokenizer.hash)

    def finish(done: int) -> None:
        with processes.watchdog("completing a checkpoint", done, times=2):
            checkpoints.wait()

    report = StepReporter(config, writer, progress, throughput)
    profiler = Profiler(workdir / "profile", config.train.profile_step)
    with catch_preemption() as preempted, progress:
        if last == 0:
            if primary:
                baselines = evaluator.baselines() | (answers.baselines() if answers else {})
                writer.write(0, baselines)
                uniform, unigram = baselines["baseline/uniform"], baselines["baseline/unigram"]
                progress.note(f"baselines: uniform {uniform:.3f}, unigram {unigram:.3f} nats")
            evaluate(0)
        early = early_evaluations(config)
        pending = None  # the metrics of the step before, read while the device works on the next
        # On a CPU nothing is won by sending the next step off early, and its buffers would be a second set.
        one_by_one = mesh.devices.flat[0].platform == "cpu"
        for index, numpy_batch in enumerate(pipeline.prefetch(batches, last, config.train.num_steps, rows), start=last):
            profiler.before(index + 1)
            state, values = train_step(state, placement.to_global(numpy_batch, mesh, size))
            if pending:
                report(*pending)
            pending, done = (index + 1, values), index + 1
            verification.check()
            stop = preempted(done)  # asked once: a signal may come between two questions
            at_end = done == config.train.num_steps
            at_evaluation = done % config.train.eval_every == 0 or at_end
            at_checkpoint = done % config.train.checkpoint_every == 0 or at_end or stop
            if one_by_one or at_evaluation or at_checkpoint or done in early:
                report(*pending)  # before anything is saved: a diverged state must not become the newest checkpoint
                pending = None
            if at_evaluation or done in early:
                evaluate(done, early=not at_evaluation)
            if at_checkpoint:
                if not stop:
                    verified(done)
                save(done)
            if stop and not at_end:
                finish(done)
                raise Preempted(
                    f"stopped by a signal after step {done:,}; saved in {workdir}; the same command continues"
                )
        finish(config.train.num_steps)
    profiler.stop()
    writer.close()

    # ---- What came out ----
    params = state.params if state.ema is None else state.ema
    with processes.watchdog("showing samples", times=2):
        text = samples(Generator(config, params, tokenizer), heldout, mesh)
    if primary:
        picture = draw_loss_curve(workdir)
        writers.replace(workdir / "samples.txt", text.encode())
        for line in f"\n{text}\n{summary(workdir, config, origin['fingerprints'])}".split("\n"):
            say(line)
        say(f"loss curve  {picture}")


def early_evaluations(config: Config) -> set[int]:
    """Steps before `train.eval_every` with a held-out loss of their own, for the steep beginning of its curve."""
    every, count = config.train.eval_every, config.train.early_evals
    return {-(-every // 2**halving) for halving in range(1, min(count, every.bit_length()) + 1)} - {every}


@contextlib.contextmanager
def compiling_thread() -> Iterator[ThreadPoolExecutor]:
    """A thread beside this one. What interrupts this one doesn't wait for it: a large step compiles for minutes."""
    pool = ThreadPoolExecutor(1)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False)
