"""The token store: how it is prepared, read, verified and described."""
