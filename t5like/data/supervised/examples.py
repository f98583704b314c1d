"""Supervised examples of a token store as units that rows are made of: which tokens are read, which are learned.

An encoder-decoder has a unit for each part that is learned; its inputs are all that stands before it in the example, so
a conversation gives one for each answer. A decoder-only model has a unit for each example. Units that no row can hold
are left out and counted, never cut. `data.packing` makes rows of them; `pipeline` opens one `Examples` per source.
"""

import numpy as np

from t5like.config.schema import Config
from t5like.data.store.token_store import TokenStore
from t5like.errors import DataError


def capacity(config: Config) -> tuple[int, ...]:
    """Tokens of a row: of encoder and decoder, or of the one sequence of a decoder-only model."""
    if config.model.architecture == "decoder":
        return (config.row_length,)
    return config.data.inputs_length, config.data.targets_length


class Examples:
    """The units of one split that fit a row.

    A conversation with two answers, what is learned in brackets, and its units ([begin, cut), [cut, end)):

        tokens              user: A </s> [B </s>] user: C </s> [D </s>]
        encoder-decoder     (user: A </s>), (B </s>) and (user: A </s> B </s> user: C </s>), (D </s>)
        decoder-only        (), (user: A </s> B </s> user: C </s> D </s>)

    A decoder-only model reads a conversation from left to right (cut = begin); the inputs of other examples, [begin,
    cut), it sees in both directions.

    Attributes:
        stream: the tokens; places count from its first.
        begin_N, cut_N, end_N: int64 places of each unit.
        targets_M2: int64 [start, stop) of what is learned; unit n has `count_N[n]` of them from `first_N[n]` on.
        lengths_NC: int64 tokens that a unit takes of each part of `capacity`.
        too_long: number of units that were left out.
        note: a line that says so, or "".
    """

    def __init__(self, config: Config, source: str, store: TokenStore, split: str) -> None:
        """Find the units of a split, "train" or "heldout"; `source` is its word of `data.source`, for messages.

        Raises:
            DataError: no unit fits a row.
        """
        self.stream = store.split(split)
        ends, self.targets_M2 = self.stream.ends(), self.stream.target_ranges()
        starts = np.concatenate([[0], ends[:-1]])
        owner_M = np.searchsorted(ends, self.targets_M2[:, 0], "right")
        if config.model.architecture == "decoder" and config.data.messages_field:
            self.count_N = np.bincount(owner_M, minlength=len(ends))
            self.first_N = np.cumsum(self.count_N) - self.count_N
            self.begin_N = self.cut_N = starts
            last_N = self.first_N + self.count_N - 1  # behind it, nothing is learned
            self.end_N = self.targets_M2[last_N, 1]
        else:
            self.count_N, self.first_N = np.ones(len(owner_M), np.int64), np.arange(len(owner_M))
            self.begin_N, (self.cut_N, self.end_N) = starts[owner_M], self.targets_M2.T
        if config.model.architecture == "decoder":
            self.lengths_NC = (self.end_N - self.begin_N)[:, None]
        else:
            self.lengths_NC = np.stack([self.cut_N - self.begin_N, self.end_N - self.cut_N], axis=1)
        self._leave_out(config, source, "training" if split == "train" else "held-out")

    def __len__(self) -> int:
        return len(self.begin_N)

    def _leave_out(self, config: Config, source: str, split: str) -> None:
        """Keep the units that fit a row."""
        data, longest, total = config.data, self.lengths_NC.max(axis=0).tolist(), len(self)
        fits_N = (self.lengths_NC <= capacity(config)).all(axis=1)
        self.too_long, self.note = int((~fits_N).sum()), ""
        if not self.too_long:
            return
        what = f"{split} answers" if data.messages_field and len(longest) == 2 else f"{split} examples"
        if len(longest) == 2:
            limit = f"data.inputs_length={data.inputs_length} or data.targets_length={data.targets_length}"
            found = f"longest inputs {longest[0]:,}, targets {longest[1]:,}"
            fix = "data.inputs_length={} and data.targets_length={}".format(
                *np.maximum(longest, capacity(config)).tolist()
            )
        else:
            limit = f"data.inputs_length + data.targets_length = {config.row_length}"
            found = f"the longest has {longest[0]:,} tokens"
            fix = f"data.inputs_length={longest[0] - data.targets_length}"
        if self.too_long == total:
            raise DataError(f"data.source={source}: all {total:,} {what} are longer than {limit}; use {fix}")
        self.note = (
            f"data.source={source}: {self.too_long:,} of {total:,} {what} are longer than {limit} and left out; {found}"
        )
        for name in ("begin_N", "cut_N", "end_N", "first_N", "count_N", "lengths_NC"):
            setattr(self, name, getattr(self, name)[fits_N])
