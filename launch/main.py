"""`t5like launch`: make a job from the command line, check it, then print or submit it; look after submitted jobs.

Called by `cli.main`, which prints errors and returns exit codes. Standard output of `--dry_run` is exactly what would
be submitted; notes go to standard error.
"""

import sys
from collections.abc import Sequence

from launch import checks, kubernetes, local, record, slurm, tpu_vm
from launch.options import Request, parse_arguments
from t5like.errors import printable

BACKENDS = {
    "local": local,
    "slurm": slurm,
    "kubernetes": kubernetes,
    "tpu_vm": tpu_vm,
}


def launch(arguments: Sequence[str]) -> int:
    """Run the arguments after `t5like launch`; returns the exit code.

    Raises:
        UserError: wrong arguments, a failed check, or a client program that fails.
    """
    request = parse_arguments(arguments)
    if request.job is not None:
        return submit(request)
    found = record.find(request.id)
    backend = BACKENDS[found.backend]
    if request.action == "logs":
        return backend.logs(found, follow=request.follow)
    if request.action == "cancel":
        backend.cancel(found)
        print(f"cancelled  {printable(found.full_id)}")
    else:
        print(backend.status(found))
    return 0


def submit(request: Request) -> int:
    """Check and render a job, then print or submit it; returns the exit code, with `--follow` that of the job."""
    job, backend = request.job, BACKENDS[request.action]
    backend.check(job)
    text = backend.render(job)
    notes = checks.check_job(job, request.action, skip_plan=request.skip_plan, shared=request.workdir_is_shared)
    for note in notes:
        print(f"t5like: {printable(note)}", file=sys.stderr, flush=True)
    if request.dry_run:
        sys.stdout.write(text)
        return 0
    if request.action == "local":  # runs in the foreground
        return local.run(job)
    submission = backend.submit(job, text)
    submitted = record.Record(request.action, submission.id, job.name, job.workdir, submission.logs, submission.details)
    lines = {"id": submitted.full_id, "log": submission.logs, **submission.lines}
    for name, line in lines.items():
        if line:
            print(printable(f"{name:8}  {line}"), flush=True)
    record.write(submitted)
    return backend.logs(submitted, follow=True) if request.follow else 0
