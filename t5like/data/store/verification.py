"""Verify the token stores of a run: small ones before its first step, large ones while it already trains.

Reading and hashing take less than a second per GB. Batches are drawn from all parts of a store, so a large one would
delay the first step by minutes: its training tokens are verified by a background thread. The run then stops as soon as
damage is noticed, and no checkpoint is saved before all has been verified, except when a signal stops the run.
Processes that share a file system share that work. Whatever else is read of a store, such as held-out tokens by
`t5like evaluate`, is verified when it is first read (`data.token_store`).

Called by `train`.
"""

import os
import sys
import threading
from collections.abc import Sequence

from t5like.data.store.manifest import SPLITS
from t5like.data.store.token_store import StoredFile, TokenStore
from t5like.errors import DataError

LARGE = 2**30  # bytes of a split's tokens, above which it does not delay the first step
NICENESS = 10  # of the thread: it runs where nothing else wants to


class Verification:
    """The verification of a run's stores. Its thread ends with the process, finished or not."""

    def __init__(self, stores: Sequence[TokenStore], *, large: int = LARGE):
        """Verify each split of at most `large` bytes, and take the training tokens of larger ones over.

        Raises:
            DataError: a file is damaged; names it.
        """
        self._files: list[StoredFile] = []
        for store in stores:
            for split in SPLITS:
                stream = store.split(split)
                if stream.token_bytes <= large:
                    stream.verify()
                elif split == "train":
                    self._files += stream.leave_verifying()
        self.pending = bool(self._files)  # also where other processes verify this process's share
        self._damage: DataError | None = None
        self._thread: threading.Thread | None = None

    def start(self, number: int = 0, count: int = 1) -> None:
        """Begin with this process's share, the `number`-th of `count`."""
        work = self._files[number::count]
        self._thread = threading.Thread(target=self._verify, args=(work,), daemon=True, name="verification")
        self._thread.start()

    def check(self) -> None:
        """Look what has been noticed so far; takes no time.

        Raises:
            DataError: a file is damaged; names it.
        """
        if self._damage:
            raise self._damage

    def wait(self) -> None:
        """Wait until this process's share has been verified.

        Raises:
            DataError: a file is damaged; names it.
        """
        if self._thread:
            self._thread.join()
        self.pending = False
        self.check()

    def _verify(self, files: Sequence[StoredFile]) -> None:
        if sys.platform == "linux":  # where a thread has a priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        try:
            for file in files:
                file.verify()
        except DataError as error:
            self._damage = error
