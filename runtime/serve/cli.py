"""``qsm-serve``: reconstruct what scanner hosts send, as ISMRMRD streams or as DICOM."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.runtime.console.command import add_version, run_command
from qsm_deploy.runtime.job.arguments import (
    add_backend,
    add_consistency,
    add_geometry,
    host_from,
    memory_size,
    seconds,
)
from qsm_deploy.runtime.methods.method import DEFAULT
from qsm_deploy.runtime.serve.dicom.arguments import add_dicom, options_from, peer
from qsm_deploy.runtime.serve.limits import PORT
from qsm_deploy.runtime.serve.parameters import ONE_FIELD

NAME = "qsm-serve"
LIMITS = {  # and the flags that set them
    "session_bytes": "max_session",
    "all_sessions_bytes": "max_all_sessions",
    "idle_seconds": "idle_seconds",
    "session_seconds": "session_seconds",
    "clients": "max_clients",
}
HOST = "127.0.0.1"
EPILOG = """\
examples:
  qsm-serve                                   # total variation, on 127.0.0.1:9002
  qsm-serve --method tv-unet                  # the network that comes along
  qsm-serve ir2qsm.onnx --host 0.0.0.0 --allow 192.168.2.1
  qsm-serve --openrecon package/              # what an OpenRecon image is built from
  qsm-serve --dicom QSM@0.0.0.0:11112 --send-to PACS@10.0.0.2:104 --allow MR1@10.0.0.5

exit codes: 0 stopped, 2 usage, 3 data, 4 model or backend, 6 memory, 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = parser().parse_args(argv)

    def command() -> str:
        from qsm_deploy.runtime.job.request import maker_from, wants_from
        from qsm_deploy.runtime.serve.limits import Limits

        dicom = options_from(arguments)
        if dicom is None and len(arguments.model) > 1:
            raise UsageError("several models, one after the other, are for --dicom; name one")
        maker = maker_from(arguments.model, method=arguments.method)
        if arguments.openrecon is not None:
            from qsm_deploy.runtime.serve.openrecon.package import write_package

            return write_package(arguments.openrecon, maker, force=arguments.force)
        wants = wants_from(
            data_consistency=arguments.data_consistency,
            dc_iterations=arguments.dc_iterations,
            allow_geometry=arguments.allow_geometry,
            memory_limit=arguments.memory_limit,
        )
        given = {name: getattr(arguments, flag) for name, flag in LIMITS.items()}
        limits = Limits(
            **{name: value for name, value in given.items() if value is not None},
            allowed=[one.network for one in arguments.allow or ()],
        )
        host = host_from(arguments)
        if dicom is not None:
            from qsm_deploy.runtime.serve.dicom.running import run_dicom_server

            return run_dicom_server(maker, host, wants, dicom, limits)
        from qsm_deploy.runtime.serve.running import run_server

        if any(one.title for one in arguments.allow or ()):
            raise UsageError("--allow AE@ADDRESS is for --dicom; name the address alone")
        port = PORT if arguments.port is None else arguments.port
        return run_server(maker, host, wants, (arguments.host or HOST, port), limits)

    return run_command(NAME, command)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = argparse.ArgumentParser(
        prog=NAME,
        description="Answer ISMRMRD sessions with susceptibility maps, in memory; or DICOM studies "
        "with a series more.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = p.add_argument
    # fmt: off
    add("model", nargs="*", type=Path, metavar="MODEL",
        help="made by qsm-export, .onnx or .plan, for one local field; for --dicom also several, "
        "as qsm-run takes them; else a --method")
    add("--method", choices=ONE_FIELD,
        help=f"what makes the map of a session that names none, default {DEFAULT}")
    add("--host", help=f"where to listen; 0.0.0.0 for all (default: {HOST})")
    add("--port", type=port_number, help=f"0 takes a free one (default: {PORT})")
    add("--memory-limit", type=memory_size, metavar="SIZE",
        help="of a reconstruction, such as 6G; default four fifths of what is free")
    add("--max-session", type=memory_size, metavar="SIZE", default=None,
        help="most memory that a session may hold, such as 4G (default: 2G)")
    add("--max-all-sessions", type=memory_size, metavar="SIZE", default=None,
        help="the same of all sessions together (default: half of --memory-limit's default)")
    add("--idle-seconds", type=seconds, metavar="S", default=None,
        help="longest silence of a client (default: 60)")
    add("--session-seconds", type=seconds, metavar="S", default=None,
        help="longest time to send a session, and again to take the answer (default: 1800)")
    add("--max-clients", type=client_count, metavar="N", default=None,
        help="most connections at a time, half of them of one address (default: 8)")
    add("--allow", type=peer, metavar="[AE@]ADDRESS", action="append",
        help="take connections only of this address or network, such as 10.0.0.0/24, for --dicom "
        "also of one title there; repeatable")
    add("--openrecon", type=Path, metavar="DIR",
        help="write what a Siemens OpenRecon package is built from into DIR, and stop")
    add("--force", action="store_true", help="overwrite the files of --openrecon")
    # fmt: on
    add_dicom(p.add_argument_group("for DICOM"), seconds)
    add_geometry(p)
    add_consistency(p.add_argument_group("data consistency"))
    add_backend(p.add_argument_group("backend"))
    add_version(p)
    return p


def port_number(text: str) -> int:
    """Return a TCP port."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 to 65535")
    return int(text)


def client_count(text: str) -> int:
    """Return a positive number of clients."""
    if not text.isdecimal() or not 0 < int(text) <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 1000")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
