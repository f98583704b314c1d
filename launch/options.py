"""The command line of `t5like launch` as a `JobSpec`: flags and defaults of the site before ``--``, then the command.

Called by `launch.main`.
"""

import argparse
import dataclasses
import difflib
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from launch import accelerators, site_file
from launch.flag_table import GROUPS, OPTIONS, Option
from launch.job import LONGEST_NAME, JobSpec, check_name, check_text, job_name
from launch.record import BACKENDS, ID_EXAMPLES
from launch.sweep import read_sweep
from t5like.cli.flags import Parser, commands_with_workdir
from t5like.errors import ConfigError, shown
from t5like.io.paths import expand
from t5like.plan.topology import CHIPS, GPUS, Topology, parse

EXAMPLE = "-- train --config=tiny --workdir=runs/a"
SWITCHES = ("dry_run", "follow", "skip_plan", "workdir_is_shared", "site", "name", "sweep")  # of parser only
HELP = {
    "local": "processes on this machine, to debug a job of several processes",
    "slurm": "a Slurm cluster, by sbatch",
    "kubernetes": "a Kubernetes cluster, as a JobSet",
    "tpu_vm": "TPU VMs of Google Cloud, as queued resources",
}


class Request(NamedTuple):
    """A parsed command line.

    Attributes:
        action: a backend, or ``status``, ``logs``, ``cancel``.
        job: of a backend.
        id: of the other actions.
        follow: follow the log.
        dry_run: print the job instead of submitting it.
        skip_plan: leave out the checks of `t5like plan`.
        workdir_is_shared: leave out the check that all hosts see the run directory.
    """

    action: str
    job: JobSpec | None = None
    id: str = ""
    follow: bool = False
    dry_run: bool = False
    skip_plan: bool = False
    workdir_is_shared: bool = False


def parse_arguments(arguments: Sequence[str]) -> Request:
    """Parse the arguments after `t5like launch`.

    Raises:
        ConfigError: a flag, value, or the site's file is wrong, or the command is missing.
    """
    arguments, parser = list(arguments), build_parser()
    end = arguments.index("--") if "--" in arguments else len(arguments)
    own, command = arguments[:end], arguments[end + 1 :]
    if own[:1] and own[0] in BACKENDS and not command and not {"-h", "--help"} & set(own):
        raise ConfigError(f"launch {own[0]} needs -- and the command of the job; add {EXAMPLE}")
    options, unknown = parser.parse_known_args(own)
    if unknown:
        raise ConfigError(_unknown(unknown[0], options.action))
    if options.action not in BACKENDS:
        if command:
            raise ConfigError(f"launch {options.action} takes no command; leave out the part after --")
        return Request(options.action, id=options.id, follow=getattr(options, "follow", False))
    path = site_file.find(options.site)
    if path is not None:
        takes = {name: [flag for flag, option in OPTIONS.items() if name in option.backends] for name in BACKENDS}
        defaults = site_file.flags(path, options.action, takes)
        try:
            _fields(parser.parse_args([options.action, *defaults]))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        options = parser.parse_args([options.action, *defaults, *own[own.index(options.action) + 1 :]])
    job = make_job(options.action, _fields(options), options.name, command)
    if options.sweep:
        job = dataclasses.replace(job, runs=read_sweep(options.sweep))
    switches = (options.follow, options.dry_run, options.skip_plan, options.workdir_is_shared)
    return Request(options.action, job, "", *switches)


def build_parser() -> Parser:
    """Return the parser of everything before ``--``."""
    parser = Parser(
        prog="t5like launch",
        description="Submit a command of t5like as a job, or look after a submitted job.",
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="BACKEND", parser_class=Parser)
    for backend in BACKENDS:
        sub = actions.add_parser(
            backend,
            help=HELP[backend],
            description=f"Submit a job to {HELP[backend]}.",
            usage=f"t5like launch {backend} [OPTIONS] {EXAMPLE}",
            epilog="Defaults come from launch.toml (see docs/launch.md); flags win over it.",
            allow_abbrev=False,
        )
        sub.add_argument("--dry_run", action="store_true", help="print what would be submitted, and submit nothing")
        text = "print the log until the job ends" + "; always so with local" * (backend == "local")
        sub.add_argument("--follow", action="store_true", default=backend == "local", help=text)
        if backend == "slurm":
            text = "submit although --workdir seems to be on a disk of this machine"
            sub.add_argument("--workdir_is_shared", action="store_true", help=text)
        else:
            sub.set_defaults(workdir_is_shared=False)
        sub.add_argument("--skip_plan", action="store_true", help="submit without the checks of t5like plan")
        sub.add_argument(
            "--site", metavar="FILE", help="defaults; default: ./launch.toml, ~/.config/t5like/launch.toml"
        )
        sub.add_argument("--name", help="name of the job: letters a-z, digits, dashes; default: from the run directory")
        sub.add_argument(
            "--sweep", metavar="FILE", help="runs that differ in config fields, a TOML or JSON list or grid"
        )
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        for title, options in GROUPS.items():
            group = sub.add_argument_group(title)
            for option in options:
                if backend in option.backends:
                    _add(group, option)
    for action, text in (
        ("status", "Print the state of a job."),
        ("logs", "Print the log of a job."),
        ("cancel", "End a job."),
    ):
        sub = actions.add_parser(action, help=text, description=text, allow_abbrev=False)
        sub.add_argument("id", metavar="ID", help=ID_EXAMPLES)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if action == "logs":
            sub.add_argument("--follow", action="store_true", help="follow the log until the job ends")
    return parser


def _add(group: argparse._ArgumentGroup, option: Option) -> None:
    switch = {"nargs": "?", "const": "true"} if option.kind == "switch" else {}
    action = "append" if option.field else "store"
    metavar = {"number": "N", "duration": "TIME", "switch": "BOOL"}.get(option.kind, option.flag.upper())
    group.add_argument(f"--{option.flag}", action=action, metavar=metavar, help=option.help, **switch)


def _unknown(argument: str, action: str) -> str:
    """Return the message about an argument that the action does not take."""
    flag = argument.partition("=")[0]
    if option := OPTIONS.get(flag.removeprefix("--")):
        return f"{flag} goes with {', '.join(option.backends)}, not with launch {action}; leave it out"
    names = (*(name for name, option in OPTIONS.items() if action in option.backends), *SWITCHES)
    near = difflib.get_close_matches(flag.lstrip("-"), names if action in BACKENDS else ("follow",), n=1)
    remedy = f"did you mean --{near[0]}?" if near else f"see t5like launch {action} --help"
    return f"launch {action} has no argument {shown(flag)[1:-1]}; {remedy}"


def _fields(options: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of `JobSpec` that flags set."""
    fields = {}
    for flag, option in OPTIONS.items():
        value = getattr(options, flag, None)
        if value is not None:
            field = option.field or flag
            convert = lambda text, option=option: option.convert(text, options.action)
            fields[field] = tuple(map(convert, value)) if option.field else convert(value)
    if "env" in fields:  # the last value of a name wins
        fields["env"] = tuple(dict(fields["env"]).items())
    if "secrets" in fields:
        fields["secrets"] = tuple({secret.name: secret for secret in fields["secrets"]}.values())
    if twice := {secret.name for secret in fields.get("secrets", ())} & dict(fields.get("env", ())).keys():
        raise ConfigError(f"--env={min(twice)} is given by --secret as well; leave one of them out")
    if fields.get("container", "pyxis") not in ("pyxis", "apptainer"):
        raise ConfigError(f"--container={fields['container']} must be pyxis or apptainer; use --container=pyxis")
    return fields


def make_job(backend: str, fields: dict[str, Any], name: str | None, command: Sequence[str]) -> JobSpec:
    """Return the job of flags and a command.

    Raises:
        ConfigError: values do not fit together.
    """
    _check_command(backend, command[0])
    command, workdir, fake_devices = _split_command(command)
    if fake_devices and fields.get("fake_devices", int(fake_devices)) != int(fake_devices):
        raise ConfigError(f"--fake_devices={fake_devices} is another number before --; give it once, before --")
    if fake_devices:
        fields = fields | {"fake_devices": int(fake_devices)}
    _check_paths(fields)
    workdir = _absolute(workdir, backend, fields.get("directory", ""))
    pattern = f"[a-z]([a-z0-9-]{{0,{LONGEST_NAME - 2}}}[a-z0-9])?"
    name = check_name("--name", job_name(workdir.rstrip("/").rpartition("/")[2]) if name is None else name,
                      pattern=pattern, example="--name=my-run")  # fmt: skip
    machines = _machines(fields)
    if backend in ("local", "slurm") and not fields.get("image"):  # the machines see this environment
        fields = {"python": sys.executable} | fields
    return JobSpec(name=name, command=(*command, f"--workdir={workdir}"), workdir=workdir, **fields | machines)


def _check_paths(fields: dict[str, Any]) -> None:
    for field, example in (("directory", "/home/me/t5like"), ("compile_cache", "/shared/jax_cache")):
        path = fields.get(field, "")
        if path and not path.startswith("/") and "://" not in path:
            raise ConfigError(f"--{field}={shown(path)[1:-1]} must be absolute; use --{field}={example}")
    if (python := fields.get("python", "python3"))[:1] in ("", "-"):
        raise ConfigError(f"--python={shown(python)[1:-1]} must be the path or name of a program; use --python=python3")


def _check_command(backend: str, name: str) -> None:
    """Refuse a command that does not exist, or takes no run directory."""
    allowed = commands_with_workdir()
    if name not in allowed:
        near = difflib.get_close_matches(name, allowed, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"use {EXAMPLE}"
        rule = f"a job is one of the commands {', '.join(allowed)}"
        raise ConfigError(f"launch {backend} -- {shown(name)[1:-1]}: {rule}; {remedy}")


def _split_command(command: Sequence[str]) -> tuple[list[str], str, str]:
    """Return a command without the flags that the job sets, the value of --workdir, and that of --fake_devices."""
    values, rest, words = {"--workdir": "", "--fake_devices": ""}, [], iter(command)
    for word in words:
        check_text("the command's argument", word)
        flag, equals, value = word.partition("=")
        if flag in values:
            values[flag] = value if equals else next(words, "")
        else:
            rest.append(word)
    workdir, fake_devices = values.values()
    check_text("--workdir", workdir)
    if not workdir:
        raise ConfigError(f"the command of the job needs --workdir, the run directory; as in {EXAMPLE}")
    if fake_devices and not (fake_devices.isdecimal() and 0 < int(fake_devices) <= 1024):
        raise ConfigError(f"--fake_devices={fake_devices} must be at least 1 and at most 1,024; use --fake_devices=8")
    return rest, workdir, fake_devices


def _absolute(workdir: str, backend: str, directory: str) -> str:
    """Return the run directory as the job's machines see it."""
    if "://" in workdir:
        return workdir
    if backend in ("local", "slurm"):  # the machines see the paths of this one
        return os.path.normpath(os.path.join(directory or os.getcwd(), expand(workdir)))
    if not workdir.startswith("/"):
        raise ConfigError(f"--workdir={workdir} must be absolute in a job of {backend}; use --workdir=/data/runs/a")
    return os.path.normpath(workdir)


def _machines(fields: dict[str, Any]) -> dict[str, Any]:
    """Return accelerator and nodes, each derived from the other where one is missing.

    Raises:
        ConfigError: they differ, or there is no such accelerator.
    """
    accelerator = fields.get("accelerator", "cpu").strip().lower()
    nodes, processes = fields.get("nodes"), fields.get("processes_per_node", 1)
    kind = accelerator.partition(":")[0]
    if accelerator == "cpu":
        return {"accelerator": "cpu", "nodes": nodes or 1}
    if kind not in (*CHIPS, *GPUS):
        raise ConfigError(
            f"--accelerator={accelerator} must be cpu, a TPU slice such as v5e:16x16, or GPUs such as h100:8x8; "
            "use --accelerator=cpu with --fake_devices=8 for CPU devices"
        )
    try:
        topology = parse(accelerator, fields.get("slices", 1))
    except ConfigError as error:
        raise ConfigError(str(error).replace("--topology=", "--accelerator=")) from None
    if kind in GPUS and nodes and topology.shape[0] == 1:
        topology = topology._replace(shape=(nodes, topology.shape[1]))
    hosts = topology.shape[0] if kind in GPUS else accelerators.hosts_per_slice(topology)
    if (nodes or hosts) != hosts:
        raise ConfigError(f"--nodes={nodes} differs from --accelerator={accelerator}, which has {hosts}; leave it out")
    _check_processes(topology, processes)
    return {"accelerator": f"{kind}:{'x'.join(map(str, topology.shape))}", "nodes": hosts}


def _check_processes(topology: Topology, processes: int) -> None:
    """Refuse a number of processes per host that does not share its accelerators evenly."""
    gpus = topology.shape[1] if topology.kind in GPUS else 1
    if processes not in (1, gpus):
        allowed = f"1 or {gpus}, the GPUs of a host" if gpus > 1 else "1"
        raise ConfigError(f"--processes_per_node={processes} must be {allowed}; use --processes_per_node={gpus}")
