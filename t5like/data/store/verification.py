"""Verify the checksums of a run's token stores: small stores before the first step, large ones during training.

Reading and hashing take less than a second per GB. Batches are drawn from all parts of a store, so verifying a large
store first would delay the first step by minutes. A background thread verifies its training tokens instead. The run
stops as soon as damage is detected, and saves no checkpoint before everything is verified, except when a signal stops
the run. Processes that share a file system divide that work. Other data of a store, such as held-out tokens in
`t5like evaluate`, are verified on first read (`token_store`).

Called by `train`.
"""

import os
import sys
import threading
from collections.abc import Sequence

from t5like.data.store.manifest import SPLITS
from t5like.data.store.token_store import StoredFile, TokenStore
from t5like.errors import DataError

LARGE = 2**30  # bytes of tokens; a larger training split is verified in the background
NICENESS = 10  # of the thread: it uses idle cores only


class Verification:
    """The verification of a run's stores. Its daemon thread ends with the process."""

    def __init__(self, stores: Sequence[TokenStore], *, large: int = LARGE):
        """Verify each split of at most `large` bytes, and queue the training tokens of larger ones for the thread.

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
                    self._files += stream.defer_verification()
        self.pending = bool(self._files)  # also if this process's share is empty
        self._damage: DataError | None = None
        self._thread: threading.Thread | None = None

    def start(self, process: int = 0, num_processes: int = 1) -> None:
        """Start the thread with this process's share of the files."""
        share = self._files[process::num_processes]
        self._thread = threading.Thread(target=self._verify, args=(share,), daemon=True, name="verification")
        self._thread.start()

    def check(self) -> None:
        """Raise the damage that was detected so far, if any; does not block.

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
