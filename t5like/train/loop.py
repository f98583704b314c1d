"""The training loop, from top to bottom: devices, data, initial state, run directory, steps, summary.

It does no math and makes no choices that the config does not make. All its output is in the run directory:
config.json, tokenizer.model, checkpoints/, metrics.jsonl, provenance.jsonl, tensorboard/, loss.png, samples.txt. The
same command, started again, continues after the newest checkpoint, bitwise as if the run had not stopped, or prints
that the run is complete. With several processes (`distributed.process_group`) all run this function; process 0 prints
and writes.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from t5like.checkpoint import provenance
from t5like.checkpoint.init_from import REPORT, write_report
from t5like.checkpoint.run_directory import check_run_directory, checkpoints_of, open_run_directory, with_run_tokenizer
from t5like.checkpoint.teacher import with_teacher_step
from t5like.config.schema import Config
from t5like.data import pipeline
from t5like.distributed import processes
from t5like.distributed.preemption import catch_preemption
from t5like.distributed.shared_file_systems import share
from t5like.distributed.watchdog import watchdog
from t5like.errors import CheckpointError, Diverged, StateNotFinite
from t5like.metrics import flops, trackers, writers
from t5like.metrics.profiler import Profiler
from t5like.metrics.progress import Progress, status
from t5like.metrics.throughput import Throughput
from t5like.metrics.time_spent import TimeSpent
from t5like.optim import schedule_warnings, step, train_state
from t5like.optim.programs import ProgramsByShape
from t5like.sharding import auto, memory, placement, xla_options
from t5like.sharding import mesh as meshes
from t5like.train import completion, evaluation_steps
from t5like.train.distillation import open_task as open_training
from t5like.train.evidence import Evidence
from t5like.train.initial_state import initial_state, restore_state
from t5like.train.profile_summary import explain
from t5like.train.replicas import compare_replicas
from t5like.train.report import StepReporter, describe_devices, print_line
from t5like.train.rewind import BadSteps, TrainingBatches
from t5like.train.statistics import LayerStatistics, compiling_thread
from t5like.train.task import Task
from t5like.types import TrainState


def train(
    config: Config,
    workdir: Path,
    on_step: Callable[[int], None] | None = None,
    allowed: Sequence[str] = (),
    open_task: Callable[..., Task] = open_training,
    examine: Callable[[Config, TrainState, Any, int], str] | None = None,
) -> None:
    """Train until `train.num_steps`, from the run directory's newest checkpoint if it has one.

    Args:
        config: the config of the run.
        workdir: the run directory.
        on_step: called with the number of completed steps when a step's metrics have been reported.
        allowed: what may change when the run continues (`checkpoint.allowed_changes`).
        open_task: see `Pretraining.__init__`.
        examine: describes the first value of a step that is not finite, and ends the run: `replay.first_nonfinite_of`.

    Raises:
        UserError: see `errors`; nothing of an earlier run in `workdir` is lost.
    """
    batch, spent = pipeline.spec(config), TimeSpent()
    config = with_teacher_step(with_run_tokenizer(config, workdir), workdir)
    check_run_directory(config, workdir, allowed)
    primary = processes.is_primary()
    show = print_line if primary else (lambda _: None)

    # ---- Devices ----
    mesh = meshes.make_mesh(config)
    requested, config = config, auto.resolve_auto(config, mesh)
    abstract = train_state.abstract_state(config, batch, mesh)
    memory.check_training(config, batch, abstract, mesh)
    xla_options.check(config.train, mesh)
    for line in describe_devices(config, abstract, mesh):
        show(line)

    # ---- Data ----
    task = open_task(config, mesh, workdir, show)
    batches, tokenizer, verification = task.batches, task.tokenizer, task.verification
    provenance_record = provenance.describe(requested, config, mesh, tokenizer, task.stores, task.data)
    for line in [*task.lines, *provenance.lines(provenance_record)]:
        show(line)

    # ---- The source of the initial state; nothing is written until it is known to fit ----
    checkpoints = checkpoints_of(workdir, config)
    initial = initial_state(requested, config, batch, abstract, tokenizer, checkpoints, workdir, task.data, allowed)
    start, num_steps = initial.step, config.train.num_steps
    summarize = partial(task.summarize, fingerprints=provenance_record["fingerprints"])
    open_directory = partial(open_run_directory, requested, tokenizer, workdir, allowed)
    if start >= num_steps and (
        lines := completion.complete_run(
            checkpoints, start, config.train, abstract, workdir, open_directory, task.summary_files, summarize
        )
    ):
        for line in lines:
            show(line)
        return
    provenance_record["changes"] = initial.changes
    for line in initial.changes:
        show(f"change     {line} from step {start:,} on")
    for line in schedule_warnings.warnings(config, initial.previous_config, start):
        show(f"schedule   {line}")

    # ---- The run directory ----
    open_directory()
    if checkpoints.latest() != initial.checkpoint:
        raise CheckpointError(f"--workdir={workdir} was changed by another process; start again")
    if weights := initial.weights:
        write_report(workdir, config, weights)
        show(f"init_from  {weights.source}; by parameter in {workdir / REPORT}")
        for line in [*(weights.report if config.init_from.adapt else ()), *weights.differs]:
            show(f"           {line}")

    # ---- The initial state; the step compiles in parallel ----
    with compiling_thread() as pool, status("compiling the step", show=primary):
        started = time.monotonic()
        compiled_for = lambda batch: step.compile_train_step(config, batch, abstract, task.loss_fn, task.model_batch)
        compiling = pool.submit(ProgramsByShape, compiled_for, task.spec)
        statistics = LayerStatistics(pool, config, task, abstract)
        with watchdog("making the first state and compiling the step", start, times=3, mode="computing"):
            state, source, history = initial.make()
            batches.follow(history.rows)
            start = int(state.step)  # fewer than `initial.step` if that checkpoint is damaged
            task.start(state)
            train_step = compiling.result()
        processes.barrier("the first step", step=start)
        show(f"start      {source}, compiled in {time.monotonic() - started:.1f} s")
    del initial, weights  # their arrays are a part of the state

    # ---- Steps ----
    if verification.pending:
        verification.start(*share("verifying the data", task.directory))
    if primary:
        provenance.append(workdir, start, provenance_record)
    writer = writers.Writer(
        workdir,
        step=start,
        primary=primary,
        tensorboard="tensorboard" in config.metrics.trackers,
        trackers=trackers.start(config, workdir) if primary else (),
    )
    progress = Progress(config.train.num_steps, log_every=config.train.log_every, step=start, primary=primary)
    devices = mesh.devices.flatten()
    peak = flops.peak_flops(devices) if config.rl.method == "none" else None  # the FLOPs of sampling are not counted
    throughput = Throughput(flops.model_flops(config), peak, measured=meshes.on_cpus(devices))
    bad_steps = BadSteps(config, history)
    evidence = Evidence(config, workdir, mesh, task, checkpoints)
    keep_evidence = lambda done, values: evidence.keep(state, done, bad_steps.last[1], values, examine)
    report = StepReporter(config, writer, progress, throughput, spent, bad_steps, keep_evidence, on_step)
    profiler = Profiler(workdir / "profile", config.train.profile_step, explain(train_step, progress.note))

    def evaluate(done: int, *, early: bool = False) -> None:
        with throughput.pause(), spent.of("evaluate"):
            params = train_state.model_params(state, average=True)
            values, text = task.evaluate(params, done, stop.point, early=early)
            writer.write(done, values)
            progress.note(f"step {done:,}: {text}")

    def verify(done: int) -> None:
        """Wait until all data that the run has been trained on is verified."""
        if verification.pending:
            progress.note(f"step {done:,}: the token store is verified before the first checkpoint is saved")
            with throughput.pause(), spent.of("pauses"):
                verification.wait()
                processes.barrier("verifying the data", step=done)

    def compare(done: int) -> None:
        with throughput.pause(), spent.of("pauses"), watchdog("comparing replicas", done):
            compare_replicas(state, done, checkpoints.wait)

    def save(done: int) -> None:
        with throughput.pause(), spent.of("save"), watchdog("saving a checkpoint", done, times=2):
            saved = {"config": config, "tokenizer": tokenizer.model_bytes, "tokenizer_hash": tokenizer.hash}
            checkpoints.save(state, **saved, history=bad_steps.history)

    def finish_saving(done: int) -> None:
        with spent.of("save"), watchdog("completing a checkpoint", done, times=2):
            checkpoints.wait()

    def rewind() -> TrainState:
        """Go back to the checkpoint before the bad steps, and pass over the batches that led to them."""
        with throughput.pause(), spent.of("pauses"), watchdog("rewinding", times=3):
            target = bad_steps.rewind(checkpoints)
            batches.follow(bad_steps.history.rows)
            upcoming.go_to(target)
            report.go_back(target)
            jax.tree.map(lambda leaf: leaf.delete(), state._replace(base=None))  # before its successor is read
            return restore_state(checkpoints, abstract, target, base=state.base)

    def save_last_step() -> int:
        """Save the state when a signal stops the run before its next step; returns the number of saved steps."""
        if pending:
            report(*pending)
        with contextlib.suppress(StateNotFinite):  # the run that continues meets it again, and rewinds
            if done and not bad_steps.too_many:
                save(done)
                finish_saving(done)
                return done
        return checkpoints.latest() or 0

    done, pending = start, None  # completed steps, and metrics of the last one until the device computes the next one
    compare_every = config.train.compare_replicas_every
    # A run can stop in an evaluation, but it can only be resumed between batches.
    early = {s for s in evaluation_steps.early_evaluations(config.train) if s % task.updates_per_batch == 0}
    with catch_preemption(save_last_step, workdir) as stop, progress:
        if start == 0:
            if primary:
                values, text = task.baselines()
                writer.write(0, values)
                progress.note(text)
            evaluate(0)
        elif evaluation_steps.is_missing(config.train, start, workdir):
            evaluate(start, early=start in early and start != num_steps)
        # On a CPU, dispatching the next step early gains nothing, and its buffers would be a second set.
        synchronous = mesh.devices.flat[0].platform == "cpu" or examine is not None
        rows = placement.local_rows(mesh, config.data.batch_size)
        upcoming = TrainingBatches(batches, start, config.train.num_steps, rows, spent)
        for index, numpy_batch in upcoming:
            if index % task.updates_per_batch == 0:
                stop.point()
            profiler.before(index + 1)
            try:
                with spent.of("inputs"):
                    device_batch, notes = task.device_batch(state, index, numpy_batch)
            except Diverged:
                finish_saving(done)  # the newest good checkpoint
                raise
            if not train_step.has(device_batch):
                with throughput.pause(), spent.of("pauses"), watchdog("compiling", times=3, mode="computing"):
                    progress.note(f"step {index + 1:,}: {train_step.compile_for(device_batch)}")
            with spent.of("device"):
                notes |= statistics(state, index + 1, device_batch)
                state, values = train_step(state, device_batch)
            values |= notes
            if pending:
                report(*pending)
            pending, done = (index + 1, values), index + 1
            verification.check()
            at_end = done == config.train.num_steps
            at_evaluation = done % config.train.eval_every == 0 or at_end
            at_checkpoint = done % config.train.checkpoint_every == 0 or at_end
            if (synchronous or at_evaluation or at_checkpoint or done in early) and not bad_steps.too_many:
                report(*pending)  # before anything is saved: a diverged state must not become the newest checkpoint
                pending = None
            if bad_steps.too_many:
                state, pending = rewind(), None
                done = int(state.step)
                continue
            if compare_every and (done % compare_every == 0 or at_checkpoint):
                compare(done)
            if at_evaluation or done in early:
                evaluate(done, early=not at_evaluation)
            if at_checkpoint:
                verify(done)
                try:
                    save(done)
                    if at_end:
                        finish_saving(done)
                except StateNotFinite as error:
                    progress.note(f"step {done:,}: {bad_steps.observe_state(done, error.names)}, not saved")
                    state, pending = rewind(), None
                    done = int(state.step)
    profiler.stop()
    writer.write(done, spent.read())  # with the last evaluation and checkpoint
    writer.close()

    # ---- Summary ----
    for line in summarize(train_state.model_params(state, average=True)):
        show(line)
