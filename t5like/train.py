"""The training loop, read from top to bottom: run directory, data, devices, state, steps, what it shows at the end.

It does no math and makes no choices that the config does not make. Everything that it leaves behind lies in the run
directory: config.json, tokenizer.model, checkpoints/, metrics.jsonl, tensorboard/, loss.png, samples.txt. Starting the
same command again continues after the last checkpoint, bitwise as if it had not stopped, or says that it is complete.
Several processes (`distributed.joined`) all run this; the first one speaks and writes.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import numpy as np

from t5like import distributed, metrics, step, tree
from t5like import mesh as meshes
from t5like.answers import Answers, Question, write_predictions
from t5like.config import Config
from t5like.data import corpus, pipeline
from t5like.data.masking import MASK
from t5like.data.pipeline import Batches
from t5like.data.text import START, Vocabulary
from t5like.data.tokenizer import Tokenizer
from t5like.errors import ConfigError, Diverged, Preempted
from t5like.evaluate import Evaluator
from t5like.generate import Generator, Prompt, fill, spans
from t5like.run import (
    check_run_directory,
    checkpoints_of,
    imported_params,
    open_run_directory,
    with_its_tokenizer,
)
from t5like.types import COMPONENT_METRICS, Batch, Metrics, host_metrics
from t5like.warm_start import REPORT, Initial, begin_with, initial_params, write_report

SAMPLES = 3  # held-out passages shown at the end


def train(config: Config, workdir: Path) -> None:
    """Train until `train.num_steps`, from the run directory's last checkpoint if it has one.

    Raises:
        UserError: see `errors`; nothing of an earlier run in `workdir` is lost.
    """
    # ---- The run directory ----
    batch = pipeline.spec(config)
    config = with_its_tokenizer(config, workdir)
    check_run_directory(config, workdir)
    primary = distributed.primary()
    say = partial(print, flush=True) if primary else (lambda *_: None)  # a log file shows it at once

    # ---- Devices ----
    mesh = meshes.make_mesh(config)
    asked, config = config, meshes.settle(config, mesh)
    abstract = step.abstract_state(config, batch, mesh)
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    size = f"{tree.num_parameters(abstract.params):,} parameters"
    say(f"model      {size}, {config.model.architecture}, {config.model.dtype}")
    counted = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    say(f"devices    {mesh.size} x {mesh.devices.flat[0].device_kind}{counted}, {axes}")
    for line in meshes.whole_lengths(config, mesh):
        say(f"           {line}")

    # ---- Data ----
    directory = Path(config.data.directory).expanduser()
    prepared = distributed.once_per_file_system("preparing the data", directory, partial(corpus.prepare, config))
    for note in prepared.notes:
        say(note)
    tokenizer = prepared.tokenizer
    vocabulary = Vocabulary.of(tokenizer)
    splits = {split: pipeline.open_split(config, prepared.stores, split) for split in ("train", "heldout")}
    batches = Batches(config, vocabulary, splits["train"])
    heldout = Batches(config, vocabulary, splits["heldout"], heldout=True)
    evaluator = Evaluator(config, mesh, heldout, tokenizer)
    answers = Answers(config, mesh, tokenizer, *splits.values()) if config.evaluate.metrics else None
    rows, size = meshes.local_rows(mesh, config.data.batch_size), config.data.batch_size
    for source, store in zip(config.data.source, prepared.stores, strict=True):
        say(f"data       {source}: {store.split('train').num_tokens:,} tokens")
    left_out = [part.note for parts in splits.values() for part in parts if getattr(part, "note", "")]
    for line in [*batches.describe(), *left_out]:
        say(f"           {line}")

    # ---- Nothing is written until here: a run that can't begin leaves no trace ----
    checkpoints = checkpoints_of(workdir, config)
    saved = checkpoints.latest()
    distributed.agree("checkpoint", str(saved), "use a --workdir on a file system that all share")
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
    if initial and initial.report:
        write_report(workdir, config, initial)
        say(f"init_from  step {initial.step:,} of {config.init_from.checkpoint}; by parameter in {workdir / REPORT}")
        for line in [*(initial.report if config.init_from.adapt else ()), *initial.differs]:
            say(f"           {line}")

    # ---- State: own checkpoint, or init_from, or random; the step compiles meanwhile ----
    with ThreadPoolExecutor(1) as pool:
        last = saved or 0
        if last >= config.train.num_steps:
            done = f"{last:,} of {config.train.num_steps:,} steps"
            say(f"complete   {done} are done; nothing is left to train in {workdir}")
            return
        begin = time.monotonic()
        compiling = pool.submit(step.compile_train_step, config, batch, abstract)
        birth = f"after step {last:,}" if last else "from random parameters"
        with distributed.limit("the first state", last, times=3):
            if saved:
                state = checkpoints.restore(abstract, saved)
            else:
                state = step.new_state(config, batch, abstract)
                if initial:
                    state = begin_with(initial.params, state)
                    birth = f"from step {initial.step:,} of {config.init_from.checkpoint}"
                    birth = birth if initial.report else "from the import"
        train_step = compiling.result()
        distributed.wait("the first step", step=last)  # compiling takes as long as it takes
        say(f"start      {birth}, compiled in {time.monotonic() - begin:.1f} s")

    # ---- Steps ----
    writer = metrics.Writer(workdir, step=last, primary=primary)
    progress = metrics.Progress(config.train.num_steps, log_every=config.train.log_every, step=last, primary=primary)
    throughput = metrics.Throughput(metrics.model_flops(config), metrics.peak_flops(mesh.devices.flatten()))

    def evaluate(done: int) -> None:
        with throughput.pause():
            params = state.params if state.ema is None else state.ema
            values = evaluator(params)
            right = 100 * values["eval/accuracy"]
            text = f"step {done:,}: held-out loss {values['eval/loss']:.3f}, {right:.1f} % of tokens right"
            if answers:
                found, records = answers(params)
                values |= found
                text += "".join(f", {name.removeprefix('eval/score/')} {value:.1f} %" for name, value in found.items())
                if primary:
                    write_predictions(workdir, done, records)
            writer.write(done, values)
            progress.note(text)

    def save(done: int) -> None:
        with throughput.pause(), distributed.limit("saving a checkpoint", done, times=2):
            checkpoints.save(state, config=config, tokenizer=tokenizer.model_bytes, tokenizer_hash=tokenizer.hash)

    def finish(done: int) -> None:
        with distributed.limit("completing a checkpoint", done, times=2):
            checkpoints.wait()

    report = Report(config, writer, progress, throughput)
    profiler = Profiler(workdir / "profile", config.train.profile_step)
    with preemption() as preempted, progress:
        if last == 0:
            if primary:
                baselines = evaluator.baselines() | (answers.baselines() if answers else {})
                writer.write(0, baselines)
                uniform, unigram = baselines["baseline/uniform"], baselines["baseline/unigram"]
                progress.note(f"baselines: uniform {uniform:.3f}, unigram {unigram:.3f} nats")
            evaluate(0)
        pending = None  # the metrics of the step before, read while the device works on the next
        # On a CPU nothing is won by sending the next step off early, and its buffers would be a second set.
        one_by_one = mesh.devices.flat[0].platform == "cpu"
        for index, numpy_batch in enumerate(pipeline.prefetch(batches, last, config.train.num_steps, rows), start=last):
            profiler.before(index + 1)
            state, values = train_step(state, meshes.to_global(numpy_batch, mesh, size))
            if pending:
                report(*pending)
            pending, done = (index + 1, values), index + 1
            stop = preempted(done)  # asked once: a signal may come between two questions
            at_end = done == config.train.num_steps
            if (
                one_by_one
                or at_end
                or stop
                or done % config.train.eval_every == 0
                or done % config.train.checkpoint_every == 0
            ):
                report(*pending)  # before anything is saved: a diverged state must not become the newest checkpoint
                pending = None
            if done % config.train.eval_every == 0 or at_end:
                evaluate(done)
            if done % config.train.checkpoint_every == 0 or at_end or stop:
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
    with distributed.limit("showing samples", times=2):
        text = samples(Generator(config, params, tokenizer), heldout, mesh)
    if primary:
        picture = metrics.draw_loss_curve(workdir)
        (workdir / "samples.txt").write_text(text)
        say(f"\n{text}\n{summary(workdir, config)}\nloss curve  {picture}")


class Report:
    """Takes each step's metrics from the device, counts them, and passes them on at the right times.

    What concerns components (`pipeline.components`) is a mean over the steps since the last log, because one step may
    have few rows of each.
    """

    def __init__(
        self, config: Config, writer: metrics.Writer, progress: metrics.Progress, throughput: metrics.Throughput
    ):
        self._train, self._writer, self._progress, self._throughput = config.train, writer, progress, throughput
        self._names = pipeline.component_names(config)
        self._bad_steps = 0
        self._components = None  # sums since the last log

    def __call__(self, done: int, on_device: Metrics) -> None:
        """Report a completed step.

        Raises:
            Diverged: too many updates in a row had a gradient that is not finite.
        """
        with distributed.limit("a training step", done):
            sums = jax.device_get(on_device)
        values = {f"train/{name}": value for name, value in host_metrics(sums).items()}
        self._bad_steps = self._bad_steps + 1 if values["train/bad_steps"] else 0
        self._throughput.tick(values.pop("train/tokens"))
        if "by_component" in sums:
            new = {name: sums[name] for name in COMPONENT_METRICS}
            self._components = jax.tree.map(np.add, self._components, new) if self._components else new
        if self._bad_steps:
            self._progress.note(
                f"step {done:,}: the gradient is not finite, update skipped ({self._bad_steps} in a row)"
            )
        if done % self._train.log_every == 0 or done == self._train.num_steps or self._bad_steps:
            values |= self._throughput.read()
            if self._components:
                values |= metrics.by_component("train", self._names, self._components)
                self._components = None
            self._writer.write(done, values)
        self._progress.update(done, values, self._throughput.seconds_left(self._train.num_steps - done))
        if self._bad_steps >= self._train.max_bad_steps:
            raise Diverged(
                f"the gradient was not finite at {self._bad_steps} steps in a row up to step {done}; "
                "lower optimizer.learning_rate or raise optimizer.warmup_steps"
            )


@contextlib.contextmanager
def preemption() -> Iterator:
    """Note SIGTERM, SIGUSR1 and the first Ctrl-C instead of dying.

    Yields a function of the step that has been done, which says whether to stop after it. Of several processes all say
    so after the same step, whichever got the signal; there JAX keeps the watch for SIGTERM.
    """
    received = []
    several = distributed.several()

    def note(number, _):
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, old[signal.SIGINT])  # a second Ctrl-C stops at once
            print("stopping after this step; Ctrl-C again stops at once, without saving", file=sys.stderr)
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    caught = [signal.SIGUSR1, signal.SIGINT] + ([] if several else [signal.SIGTERM])
    old = {number: signal.signal(number, note) for number in caught}
    try:
        yield distributed.stop_agreed if several else (lambda done: bool(received))
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class Profiler:
    """Records three steps of the run, from `first` on, for TensorBoard or Perfetto; never, if `first` is 0."""

    def __init__(self, directory: Path, first: int):
        self._directory, self._first, self._running = directory, first, False

    def before(self, step: int) -> None:
        """Call before each step. The metrics are read a step late, so four steps on the three are surely done."""
        if self._first and step == self._first:
            jax.profiler.start_trace(str(self._directory))
            self._running = True
        elif step == self._first + 4:
            self.stop()

    def stop(self) -> None:
        """Write what was recorded."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False


def samples(generator: Generator, heldout: Batches, mesh: jax.sharding.Mesh) -> str:
    """Passages from all over the held-out text: what the model was given, what stood there, and what it says."""
    config, tokenizer = generator.config, generator.tokenizer
    count, batches = min(SAMPLES, heldout.num_heldout), []
    for number in range(count):
        index, row = divmod(number * heldout.num_heldout // count, config.data.batch_size)
        batches.append(jax.tree.map(lambda x, row=row: x[row : row + 1], heldout.at(index)))
    with jax.set_mesh(mesh):
        if config.model.architecture == "encoder":
            said = [generator.likeliest(batch) for batch in batches]
            return "\n".join(
                show_masked(tokenizer, n, *each) for n, each in enumerate(zip(batches, said, strict=True), 1)
            )
        asked = [found for batch in batches if (found := passage(batch)).answer]
        if not asked:
            return ""
        prompts, longest = [found.prompt for found in asked], max(len(found.answer) for found in asked)
        ids_BL = generator.ids(prompts, max_new_tokens=min(longest, generator.room(prompts)))
    blocks = []
    for number, (found, ids_L) in enumerate(zip(asked, ids_BL, strict=True), 1):
        given, truth = (tokenizer.decode(ids) for ids in (found.read, found.answer))
        blocks.append(show(number, given, truth, *generator.texts([ids_L[: len(found.answer)]])))
    return "\n".join(blocks)


def passage(batch: Batch) -> Question:
    """What the first text of a batch's first row asks, and what should follow.

    A text of which all is learned is asked to go on after three quarters.
    """
    batch = jax.tree.map(lambda x: x[0], batch)
    learned_L = batch.weights_BL > 0
    mine_L = np.ones(len(learned_L), bool)
    if batch.decoder_segments_BL is not None:
        mine_L = batch.decoder_segments_BL == batch.decoder_segments_BL[learned_L.argmax()]
    learned_L = learned_L & mine_L
    targets = batch.targets_BL[learned_L].tolist()
    if batch.encoder_BS is not None:
        read_S = np.ones(len(batch.encoder_BS), bool)
        if batch.encoder_segments_BS is not None:
            read_S = batch.encoder_segments_BS == batch.decoder_segments_BL[learned_L.argmax()]
        read = batch.encoder_BS[read_S].tolist()
        return Question(Prompt(read), read, targets)
    row, first = batch.decoder_BL[mine_L].tolist(), int(mine_L.argmax())
    prefix = 0 if batch.prefix_BL is None else int(batch.prefix_BL[mine_L].sum())
    begin = int(learned_L.argmax()) - first  # place of the first target that is learned
    if not prefix and learned_L.sum() >= len(row) - 1:
        cut = len(row) * 3 // 4
        return Question(Prompt(row[:cut]), row[:cut], targets[cut - 1 - begin :])
    stop = begin + int((~np.append(learned_L[first + begin :], False)).argmax())  # of the first stretch
    answer = batch.targets_BL[mine_L][begin:stop].tolist()
    read = [token for token in row[: begin + 1] if token != START]
    return Question(Prompt(row[: begin + 1], prefix), read, answer)


def show(number: int, given: str, truth: str, said: str) -> str:
    """One passage as text; span corruption shows each gap with the truth and the model's filling."""
    gaps = spans(truth)
    if not gaps:
        return f"---- held-out passage {number} ----\n{given}\n  truth  {truth!r}\n  model  {said!r}\n"
    filled = spans(said)
    lines = [f"  {gap}  truth {text!r}  model {filled.get(gap, '')!r}" for gap, text in gaps.items()]
    return f"---- held-out passage {number} ----\n{given}\n" + "\n".join(lines) + f"\n  filled  {fill(given, said)!r}\n"


def show_masked(tokenizer: Tokenizer, number: int, batch: Batch, said_BS: np.ndarray) -> str:
    """One passage of an encoder-only model: each masked token with the truth and the model's guess."""
    ids, targets, said = batch.encoder_BS[0], batch.targets_BL[0], said_BS[0]
    if batch.encoder_segments_BS is not None:
        ids = ids[batch.encoder_segments_BS[0] > 0]
    lines = [
        f"  masked  truth {tokenizer.decode([targets[place]])!r}  model {tokenizer.decode([said[place]])!r}\n"
        for place in np.flatnonzero((batch.weights_BL[0] > 0)[: len(ids)])
        if ids[place] == tokenizer.sentinel_ids[MASK]
    ]
    return f"---- held-out passage {number} ----\n{tokenizer.decode(ids)}\n" + "".join(lines)


def summary(workdir: Path, config: Config) -> str:
    """The run's result in one block, read back from its metrics file."""
    records = metrics.read(workdir)
    first, last = (next(r for r in order if "eval/loss" in r) for order in (records, reversed(records)))
    base = next(r for r in records if "baseline/unigram" in r)
    return (
        f"held-out loss  {first['eval/loss']:.3f} untrained, {last['eval/loss']:.3f} after {config.train.num_steps:,} "
        f"steps (nats per target token; uniform {base['baseline/uniform']:.3f}, unigram {base['baseline/unigram']:.3f})"
    )
