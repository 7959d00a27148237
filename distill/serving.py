"""`make serve`: the live page of an Online LPM, or of two side by side.

MODEL, COMPARE (folders), HOST, PORT  ->  a server until ctrl-C (student/serve.py)
"""

from __future__ import annotations

from pathlib import Path

from distill.errors import ExitCode, UserError
from distill.options import Options
from distill.runs import run_folder


def serve(options: Options) -> None:
    """Serve until ctrl-C; UserError when a model is missing or the address cannot be had."""
    own = options.own
    folders = [Path(own["model"]) if own["model"] else run_folder(options.run) / "online-lpm"]
    if own["compare"]:
        folders.append(Path(own["compare"]))
    for folder, name in zip(folders, ("MODEL", "COMPARE"), strict=False):
        if not folder.is_dir():
            raise UserError(f"There is no Online LPM at {folder}: run `make export`, or give {name}=folder.")
    port = own["port"] or "8000"
    if not port.isdecimal() or not 0 <= int(port) < 65536:
        raise UserError(f"PORT must be a number from 0 to 65535, not '{port}'.")
    try:
        from student import serve as live
    except ImportError as error:
        raise UserError(
            f"The server needs a package that is missing ({error.name}): start it with `make serve`, which installs it."
        ) from None
    try:
        host = own["host"] or "127.0.0.1"
        listener = live.bind(host, int(port))
    except ValueError as error:
        raise UserError(str(error)) from None
    try:
        live.serve(folders, listener, host)
    except ValueError as error:
        raise UserError(str(error), ExitCode.CHECKPOINT) from None
