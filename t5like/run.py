"""A trained model in Python: `load` reads a run directory, `Run` generates, and shows batches, logits and layers.

The whole interface is `load` and `Run` with its nine other members, which are those of the command line:

    generate        texts, as `t5like generate`
    predict         labels or numbers of texts, as `t5like predict`
    embed           embeddings of texts, as `t5like embed`
    batch           the rows of a training step, as `t5like inspect data`
    tokens          what the model reads for a text, position by position
    logits          scores of the next token at each position
    intermediates   values inside of the layers: residual stream, attention weights
    step, config, tokenizer

Every failure that a user can fix is an exception of `t5like.errors`, whose message is one line. Arrays are NumPy's, on
the host. Letters in shapes are those of `t5like.types`: L decoder positions, S encoder positions, V vocabulary, D model
dim, N heads, Y layers.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack, overload

import jax
import numpy as np

from t5like.checkpoint import run_directory
from t5like.config.schema import Config
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.data.tokenizers.vocabulary import DECODER_START_ID
from t5like.errors import ConfigError, shown
from t5like.evaluation import label_eval
from t5like.inference import encoder_rows
from t5like.inference.generate import BUCKET, Generator
from t5like.inference.infilling import completed
from t5like.inference.sampling import DecodingOptions
from t5like.inference.target_scores import scoring_batch
from t5like.inspect import step_data
from t5like.io.paths import check_path, expand
from t5like.io.storage import storage_errors
from t5like.model.intermediates import INTERMEDIATES
from t5like.model.layer_values import compute_intermediates
from t5like.model.transformer import Transformer
from t5like.types import Array, Batch, Tree


def load(workdir: str | Path, step: int | None = None) -> "Run":
    """Load a run on one device, the first that JAX has.

    Args:
        workdir: the run directory of `t5like train`, `rl` or `import`; ``~`` is the home directory.
        step: of the checkpoint; None: the newest that is not damaged.

    Raises:
        ConfigError: `workdir` can't be a path, or `step` is no step.
        CheckpointError: there is no run or no such checkpoint, or it can't be read.
        DataError: the tokenizer does not belong to the checkpoint.
    """
    check_path("workdir", str(workdir))
    if step is not None and (isinstance(step, bool) or not isinstance(step, int) or step < 0):
        raise ConfigError(f"step={shown(step)} must be a whole number of at least 0, or None: the newest checkpoint")
    path = expand(workdir).absolute()
    with storage_errors():
        return Run(path, run_directory.load(path, step, flag="workdir="))


class GenerationOptions(TypedDict, total=False):
    """The keyword arguments of `Run.generate`, for type checkers."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    num_beams: int
    stop: Sequence[str]
    seed: int


class _Rows(NamedTuple):
    """A text as one row of a batch, which is padded; and the ids that its encoder and its decoder read."""

    batch: Batch
    encoder: list[int]
    decoder: list[int]


class Run:
    """A trained model with its config, tokenizer and data. Made by `load`.

    Attributes:
        step: of the checkpoint, in completed updates.
        config: the config of the run.
        tokenizer: `encode(text)` and `decode(ids)`.
    """

    step: int
    config: Config
    tokenizer: Tokenizer

    def __init__(self, workdir: Path, loaded: run_directory.Run):
        """`loaded`: the run of that directory."""
        self.step, self.config, self.tokenizer = loaded.step, loaded.config, loaded.tokenizer
        self._workdir, self._mesh, self._params = workdir, loaded.mesh, loaded.params
        self._generator = Generator(loaded.config, loaded.params, loaded.tokenizer)

    def __repr__(self) -> str:
        return f"<t5like.Run {self._workdir}, step {self.step:,}, {self.config.model.architecture}>"

    @overload
    def generate(self, prompt: str, **options: Unpack[GenerationOptions]) -> str: ...

    @overload
    def generate(self, prompt: list[str] | tuple[str, ...], **options: Unpack[GenerationOptions]) -> list[str]: ...

    def generate(
        self,
        prompt: str | list[str] | tuple[str, ...],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        num_beams: int = 1,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> str | list[str]:
        """Generate a text for a prompt, or one for each of several prompts, which are decoded together.

        The prompt is put into the format that the model was trained on. If it has <extra_id_N>, the result is the
        prompt with each of them replaced; otherwise it is what the model generates. An encoder-only model replaces
        each <extra_id_0> by one token, and ignores the options.

        Args:
            prompt: a text, or several.
            max_new_tokens: upper limit of new tokens.
            temperature: 0: greedy decoding; above: sample from softmax(logits / temperature).
            top_k: sample only from the k most likely tokens; 0: all.
            top_p: sample only from the most likely tokens that together reach this probability.
            num_beams: beams of a beam search; 1: none. It needs temperature 0.
            stop: texts that end the generated text; they are not part of it.
            seed: of sampling.

        Raises:
            ConfigError: an option is out of range (the message names the flag of `t5like generate`), or a prompt is
                longer than the model's positions.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if wrong := [each for each in prompts if not isinstance(each, str)]:
            raise ConfigError(f"prompt={shown(wrong[0])} must be a text, or a list of texts")
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        options = DecodingOptions(max_new_tokens, temperature, top_k, top_p, num_beams=num_beams, stop=stop, seed=seed)
        texts = self._generate(prompts, options) if prompts else []
        return texts[0] if isinstance(prompt, str) else texts

    def _generate(self, prompts: list[str], options: DecodingOptions) -> list[str]:
        self._generator.refuse_labels()
        with jax.set_mesh(self._mesh):
            if self.config.model.architecture == "encoder":
                return self._generator(prompts)
            rows = [self._generator.prompt(text) for text in prompts]
            answers = [best.text for best, *_ in self._generator.answer(rows, options)]
        return [completed(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]

    def predict(self, texts: Sequence[str | tuple[str, str]]) -> list[dict[str, Any]]:
        """What a model of classification, regression or token classification predicts for each text.

        Args:
            texts: texts; of a model that reads pairs, pairs. The words of token classification have white space
                between them.

        Returns:
            for each text a dict: ``label`` and ``probabilities``, or ``value``, or ``labels``, one for each word.

        Raises:
            ConfigError: the model predicts no labels, or a text is longer than its positions or not what it reads.
        """
        label_eval.check_labels(self.config)
        rows = self._encoder_rows(texts)
        with jax.set_mesh(self._mesh):
            outputs = encoder_rows.label_outputs(self.config, self._params, rows)
        return [label_eval.prediction(self.config, *each) for each in zip(outputs, rows, strict=True)]

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings of texts: the mean of the encoder's output over the tokens of each, float32 [texts, D].

        Raises:
            ConfigError: the model has no encoder, or a text is longer than its positions.
        """
        rows = self._encoder_rows(texts)
        with jax.set_mesh(self._mesh):
            return encoder_rows.embeddings(self.config, self._params, rows)

    def _encoder_rows(self, texts: Sequence[str | tuple[str, str]]) -> list[encoder_rows.EncoderRow]:
        parts = [(text,) if isinstance(text, str) else text for text in ([texts] if isinstance(texts, str) else texts)]
        is_text = lambda each: isinstance(each, tuple) and len(each) < 3 and all(isinstance(x, str) for x in each)
        if wrong := [each for each in parts if not is_text(each)]:
            raise ConfigError(f"texts: {shown(wrong[0])} must be a text, or a pair of texts")
        return [encoder_rows.row_of(self.config, self.tokenizer, *each) for each in parts]

    def batch(self, step: int) -> Batch:
        """The batch of an update, with the rows that training reads, bit for bit: arrays of NumPy.

        Args:
            step: the update, from 1: the one that makes step - 1 completed updates to step. It may be one that the run
                has not reached.

        Raises:
            ConfigError: `step` is less than 1, or the run is one of `t5like rl`, whose batches contain answers.
            DataError: the data are not those of the run.
        """
        if isinstance(step, bool) or not isinstance(step, int) or step < 1:
            raise ConfigError(f"step={shown(step)} must be a whole number of at least 1: the first update is 1; use 1")
        if self.config.rl.method != "none":
            raise ConfigError(
                f"{self._workdir} is a run of rl.method={self.config.rl.method}: its batches are made by it"
            )
        with storage_errors():
            data = step_data.open_data(step_data.plan_of_run(self._workdir, step))
            return data.rows(np.arange(data.plan.config.data.batch_size))

    def tokens(self, text: str, target: str = "") -> tuple[list[str], list[str]]:
        """The tokens that encoder and decoder read for a text, by name; empty for a stack that the model does not have.

        They are the positions of `logits` and `intermediates`: the i-th row of the logits belongs to the i-th token of
        the decoder, or of the encoder if there is no decoder.

        Args:
            text: as the prompt of `generate`: the encoder's input; decoder-only models: the beginning of the text.
            target: what follows: the decoder's targets. Encoder-only models have none.

        Raises:
            ConfigError: the texts are longer than the model's positions, or an encoder-only model has a target.
        """
        rows = self._rows(text, target)
        name = self.tokenizer.name
        return [name(token) for token in rows.encoder], [name(token) for token in rows.decoder]

    def logits(self, text: str, target: str = "") -> np.ndarray:
        """Scores of every token at each position, without dropout: float32 [L, V], softmax of a row is p(token).

        An encoder-decoder reads `text` in its encoder, the start token and `target` in its decoder: row 0 predicts the
        first token of the target, the last row the token behind it, which is EOS at its end. A decoder-only model reads
        both texts in one: row i predicts token i + 1, the last row what follows. An encoder-only model reads `text`
        alone: row i scores the token at position i, which is <extra_id_0> where it is to be predicted.

        Args, Raises: see `tokens`, which has the token of each row.
        """
        rows = self._rows(text, target)
        with jax.set_mesh(self._mesh):
            logits_BLV = _logits(self.config.of_model(), self._params, rows.batch)
        length = len(rows.decoder) or len(rows.encoder)
        return np.asarray(logits_BLV[0, :length, : self.config.tokenizer.vocab_size], np.float32)

    def intermediates(
        self, text: str, target: str = "", names: Sequence[str] = tuple(INTERMEDIATES)
    ) -> dict[str, np.ndarray]:
        """Values inside of the layers, without dropout, float32, by stack and name: "decoder/residual".

            residual                  [Y, L, D], the residual stream behind each layer
            attention_weights         [Y, N, L, L] of self-attention: a query's weights of the keys add up to 1
            attention_output          [Y, L, D], what self-attention adds to the residual stream
            cross_attention_weights   [Y, N, L, S], of the decoder's attention to the encoder
            cross_attention_output    [Y, L, D], what that attention adds
            mlp_input                 [Y, L, D], what each MLP reads
            mlp_hidden                [Y, L, F], the units of each MLP, behind the activation
            mlp_output                [Y, L, D], what each MLP adds

        In the encoder, L is S; F is the MLP dim. Weights of a query that may attend to no key are 0.

        Args:
            text, target: see `tokens`, which has the token of each position.
            names: which of these values; all by default.

        Raises:
            ConfigError: a name does not exist; or see `tokens`.
        """
        rows = self._rows(text, target)
        with jax.set_mesh(self._mesh):
            values = _intermediates(self.config.of_model(), self._params, rows.batch, tuple(names))
        sizes = {"encoder": len(rows.encoder), "decoder": len(rows.decoder)}
        found = {}
        for name, value in values.items():
            queries, keys = (
                sizes[name.partition("/")[0]],
                sizes["encoder" if "/cross" in name else name.partition("/")[0]],
            )
            value = np.asarray(value[:, 0], np.float32)
            found[name] = value[:, :, :queries, :keys] if name.endswith("_weights") else value[:, :queries]
        return found

    def _rows(self, text: str, target: str) -> _Rows:
        """A text as a batch of one row, in the form of training, padded to a multiple of `BUCKET`."""
        for name, value in (("text", text), ("target", target)):
            if not isinstance(value, str):
                raise ConfigError(f"{name}={shown(value)} must be a text")
        architecture, padded = self.config.model.architecture, lambda length: -(-length // BUCKET) * BUCKET
        prompt = self._generator.prompt(text)
        if architecture == "encoder":
            if target:
                raise ConfigError(f"target={shown(target)} needs a decoder, and this model has none; leave it out")
            self._generator.check(prompt, DecodingOptions(max_new_tokens=1))
            ids_1S, real_1S = (np.zeros((1, padded(len(prompt.ids))), np.int32) for _ in range(2))
            ids_1S[0, : len(prompt.ids)], real_1S[0, : len(prompt.ids)] = prompt.ids, 1
            return _Rows(Batch(None, ids_1S, real_1S.astype(np.float32), ids_1S, real_1S), prompt.ids, [])
        ids = [*self.tokenizer.encode_with_sentinels(target), self.tokenizer.eos_id]
        self._generator.check(prompt, DecodingOptions(max_new_tokens=len(ids)))
        if architecture == "decoder":  # what it reads ends in front of the last target
            read = [*prompt.ids, *ids[:-1]]
            length = padded(len(read))
            return _Rows(
                scoring_batch(self.config, [(prompt, ids)], len(prompt.ids), length - len(prompt.ids)), [], read
            )
        batch = scoring_batch(self.config, [(prompt, ids)], padded(len(prompt.ids)), padded(len(ids)))
        return _Rows(batch, prompt.ids, [DECODER_START_ID, *ids[:-1]])


@partial(jax.jit, static_argnames="config")
def _logits(config: Config, params: Tree, batch: Batch) -> Array:
    return Transformer(config).apply({"params": params}, batch)


@partial(jax.jit, static_argnames=("config", "names"))
def _intermediates(config: Config, params: Tree, batch: Batch, names: tuple[str, ...]) -> dict[str, jax.Array]:
    return compute_intermediates(config, params, batch, names)
