"""Submit the run that works here to a cluster: one `JobSpec`, rendered by one module per backend.

`python -m launch BACKEND JOB-OPTIONS -- train --config=... --workdir=...` is the same as `t5like launch ...`.
"""
