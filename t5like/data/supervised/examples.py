"""Supervised examples of a token store as units for packing, with the token ranges of their inputs and targets.

For an encoder-decoder, each target is a unit with everything before it in the example as its inputs, so a conversation
gives one unit per assistant turn. For a decoder-only model, each example is a unit. Units that do not fit in a row are
dropped and counted, never truncated. `packing` makes rows of units; `pipeline` opens one `Examples` per source.
"""

import numpy as np

from t5like.config.schema import Config
from t5like.data.store.token_store import TokenStore
from t5like.errors import DataError


def capacity(config: Config) -> tuple[int, ...]:
    """The lengths of a row: of encoder and decoder, or of the single sequence of a model with one stack."""
    if config.model.architecture == "decoder":
        return (config.row_length,)
    if config.data.label_objective:
        return (config.data.inputs_length,)
    return config.data.inputs_length, config.data.targets_length


class Examples:
    """The units of one split that fit in a row.

    A conversation with two targets (in brackets), and its units as ranges ([begin, cut), [cut, end)):

        tokens              user: A </s> [B </s>] user: C </s> [D </s>]
        encoder-decoder     (user: A </s>), (B </s>) and (user: A </s> B </s> user: C </s>), (D </s>)
        decoder-only        (), (user: A </s> B </s> user: C </s> D </s>)

    In a decoder-only model, attention is causal in a conversation (cut = begin), and bidirectional in the inputs
    [begin, cut) of other examples.

    Attributes:
        stream: the tokens.
        begin_N, cut_N, end_N: int64 offsets in the stream: where the inputs begin, where the targets begin, the end.
        targets_M2: int64 offsets [start, stop) of all targets; those of unit n are `count_N[n]` from `first_N[n]` on.
        lengths_NC: int64 tokens of a unit, to compare with `capacity`.
        too_long: number of units that were dropped.
        note: a line about dropped units for the user, or "".
    """

    of_units = ("begin_N", "cut_N", "end_N", "first_N", "count_N", "lengths_NC")  # the arrays with a unit each

    def __init__(self, config: Config, source: str, store: TokenStore, split: str) -> None:
        """Find the units of a split, "train" or "heldout"; `source` is the entry of `data.source`, for messages.

        Raises:
            DataError: no unit fits in a row.
        """
        self.stream = store.split(split)
        ends, self.targets_M2 = self.stream.ends(), self.stream.target_ranges()
        starts = np.concatenate([[0], ends[:-1]])
        example_M = np.searchsorted(ends, self.targets_M2[:, 0], "right")
        if config.model.architecture == "decoder" and config.data.messages_field:
            self.count_N = np.bincount(example_M, minlength=len(ends))
            self.first_N = np.cumsum(self.count_N) - self.count_N
            self.begin_N = self.cut_N = starts
            last_N = self.first_N + self.count_N - 1  # no target follows it
            self.end_N = self.targets_M2[last_N, 1]
        else:
            self.count_N, self.first_N = np.ones(len(example_M), np.int64), np.arange(len(example_M))
            self.begin_N, (self.cut_N, self.end_N) = starts[example_M], self.targets_M2.T
        if config.model.architecture == "decoder":
            self.lengths_NC = (self.end_N - self.begin_N)[:, None]
        else:
            self.lengths_NC = np.stack([self.cut_N - self.begin_N, self.end_N - self.cut_N], axis=1)
        self._drop_too_long(config, source, "training" if split == "train" else "held-out")

    def __len__(self) -> int:
        return len(self.begin_N)

    def _drop_too_long(self, config: Config, source: str, split: str) -> None:
        """Keep the units that fit in a row."""
        data, longest, total = config.data, self.lengths_NC.max(axis=0).tolist(), len(self)
        fits_N = (self.lengths_NC <= capacity(config)).all(axis=1)
        self.too_long, self.note = int((~fits_N).sum()), ""
        if not self.too_long:
            return
        what = f"{split} assistant turns" if data.messages_field and len(longest) == 2 else f"{split} examples"
        if len(longest) == 2:
            limit = f"data.inputs_length={data.inputs_length} or data.targets_length={data.targets_length}"
            maximum = f"longest inputs {longest[0]:,}, targets {longest[1]:,}"
            fix = "data.inputs_length={} and data.targets_length={}".format(
                *np.maximum(longest, capacity(config)).tolist()
            )
        elif data.label_objective:
            limit, fix = f"data.inputs_length={data.inputs_length}", f"data.inputs_length={longest[0]}"
            maximum = f"the longest has {longest[0]:,} tokens"
        else:
            limit = f"data.inputs_length + data.targets_length = {config.row_length}"
            maximum = f"the longest has {longest[0]:,} tokens"
            fix = f"data.inputs_length={longest[0] - data.targets_length}"
        if self.too_long == total:
            raise DataError(f"data.source={source}: all {total:,} {what} are longer than {limit}; use {fix}")
        dropped = f"{self.too_long:,} of {total:,} {what} are longer than {limit} and left out"
        self.note = f"data.source={source}: {dropped}; {maximum}"
        for name in self.of_units:
            setattr(self, name, getattr(self, name)[fits_N])
