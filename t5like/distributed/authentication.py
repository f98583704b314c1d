"""The shared secret of a run: both sides of a connection prove that they know it, and never send it.

With `T5LIKE_RENDEZVOUS_SECRET` in its environment, a process accepts only processes with the same secret. Each side
sends a random challenge, and the proof is HMAC-SHA256 (RFC 2104) of both challenges, the sender's role and its message.
A recorded proof is useless for another connection, one side's proof is none for the other side, and nobody between
them can change the message. Who records a connection can try out secrets, so use a random one, as in
``openssl rand -hex 32``. Called by `rendezvous`.
"""

import hashlib
import hmac
import os
import secrets

VARIABLE = "T5LIKE_RENDEZVOUS_SECRET"


def shared_secret() -> bytes:
    """Return the secret of this process's environment; empty: there is none."""
    return os.environ.get(VARIABLE, "").encode("utf-8", "surrogateescape")


def challenge() -> str:
    """Return a random text that the other side's proof must contain."""
    return secrets.token_hex(16)


def prove(secret: bytes, role: str, challenges: tuple[str, str], text: str) -> str:
    """Return the proof of a message, as hexadecimal digits.

    Args:
        secret: from `shared_secret`.
        role: of the sender, ``process 0`` or ``another process``.
        challenges: of process 0 and of the other process.
        text: the message.
    """
    parts = [part.encode("utf-8", "surrogatepass") for part in (role, *challenges, text)]
    lengths = b"".join(len(part).to_bytes(8, "big") for part in parts)  # so that parts can't be shifted
    return hmac.new(secret, lengths + b"".join(parts), hashlib.sha256).hexdigest()


def is_proof(proof: object, secret: bytes, role: str, challenges: tuple[str, str], text: str) -> bool:
    """Whether a received value is the proof of a message. The time it takes does not depend on the value."""
    if not isinstance(proof, str):
        return False
    expected = prove(secret, role, challenges, text)
    return hmac.compare_digest(proof.encode("utf-8", "surrogatepass"), expected.encode())
